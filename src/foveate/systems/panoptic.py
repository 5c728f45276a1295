"""Panoptic segmentation: a map of classes and things as a short text, first learned from maps, then tuned on PQ.

| | |
|---|---|
| state | the image, and the words written so far |
| action | the next word of the code of its panoptic map |
| reward | at the end: Σ IoU of the matched segments less a weight for each unmatched one, or PQ, of the map as drawn |
| horizon | one word a square of 8×8 pixels: 36 words for 48×48 |
| learner | maximum likelihood, then REINFORCE with the mean of the other answers as baseline |
| corner | policy |

Pinto et al. 2023, "Tuning computer vision models with task rewards" (arXiv 2302.08242), section 4.1, on the codes of
Kolesnikov et al. 2022, "UViM" (arXiv 2205.10337). What differs here, and the numbers: docs/systems/panoptic.md.

    foveate train panoptic --minutes 10                                             rendered scenes
    foveate train panoptic --data coco --root FOLDER --supercategories --minutes 60
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.box_files import Part
from foveate.data.classification import check_images
from foveate.data.panoptic import PanopticMaps, load_panoptic
from foveate.data.picture_folders import read_pictures
from foveate.learn.answers import Precision, Reward, Tuning, answering
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.backbones import convolutions
from foveate.models.codes import Base, Coded, CodedAnswers, MapCode, Words, kept_words
from foveate.models.encoder_decoder import EncoderDecoder
from foveate.models.panoptic import channels, classes_and_numbers, drawing_losses, segments_of
from foveate.rewards.panoptic import Segments, class_sums, corpus_quality, matched_less_unmatched, panoptic_quality
from foveate.run import Run
from foveate.two_steps import learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train panoptic`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), or coco (its panoptic layout)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """side in pixels to which pictures are stretched; None: 48 for scenes, 96 for coco"""
    skip_bad: bool = False
    """leave out pictures with which something is wrong, and count them, instead of stopping"""
    supercategories: bool = False
    """coco: classes are the supercategories, e.g. animal, vehicle, ground"""
    scenes: int = 6000
    """how many scenes are rendered to train on"""
    most: int | None = None
    """things of an image that have a number; None: 4 for scenes, 20 for coco"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    code_share: float = 0.2
    """part of the budget that learns the code of maps"""
    likelihood_share: float = 0.4
    """part for maximum likelihood; the rest is shared evenly by the reward and the control"""
    code_patch: int = 8
    """side in pixels of the square that a word is about"""
    levels: tuple[int, ...] = (8, 6, 5)
    """of the numbers that make a word; their product is the number of words"""
    code_width: int = 16
    """features at full size of what draws maps from words"""
    code_rate: float = 3e-3
    """peak of the one-cycle schedule of the code"""
    least_area: int = 8
    """drawn segments of fewer pixels become void"""
    patch: int = 8
    """pixels of the image, a side, to a vector that is read"""
    width: int = 128
    """of the vectors"""
    depth: int = 2
    """blocks of the encoder, and of the decoder"""
    heads: int = 4
    """of the attention"""
    batch: int = 32
    """images in an update of code and likelihood"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of likelihood"""
    reward: Literal["matched", "pq"] = "matched"
    """Σ IoU of the matched segments less `unmatched` for each other one, or the PQ of the image"""
    unmatched: float = 0.5
    """what a false positive and a missed segment cost"""
    tuning_batch: int = 8
    """images in an update on the reward"""
    samples: int = 8
    """maps of each of them"""
    tuning_rate: float = 1e-3
    """learning rate of the reward, constant after a warm-up"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    every: int = 50
    """updates between looks at the validation split"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    classes: tuple[str, ...] | None = None
    """names of the classes, things first; taken from the data"""
    things: int | None = None
    """how many of them are things; taken from the data"""


T = TypeVar("T")
PART = "policy"  # the tracked part that holds the policy
AT_ONCE = 50  # images looked at together where nothing is learned
ROWS = {"mle": "likelihood", "control": "control"}
_load = lru_cache(maxsize=6)(load_panoptic)
_say = partial(print, file=sys.stderr)  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, or the data cannot be read.
    """
    found = {"image_size": 48, "most": 4} if config.data == "scenes" else {"image_size": 96, "most": 20}
    config = replace(config, **{name: value for name, value in found.items() if getattr(config, name) is None})
    for name in ("code_share", "likelihood_share"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected more than 0 and less than 1")
    if config.code_share + config.likelihood_share >= 1:
        raise InputError("code_share, likelihood_share: together they leave nothing for the reward; lower one")
    for name in ("batch", "tuning_batch", "every", "scenes", "most", "least_area"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if config.unmatched < 0:
        raise InputError(f"unmatched: found {config.unmatched}, expected 0 or more: it is taken off the reward")
    _tuning(config)
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    config = replace(config, classes=data.classes, things=data.things)
    _code(config)
    build(config)  # sizes that do not go into each other are told now
    return config


def _known(value: T | None) -> T:
    """A field that `resolve` has filled in."""
    assert value is not None
    return value


def _data(config: Config, part: Part) -> PanopticMaps:
    side, most = _known(config.image_size), _known(config.most) if config.data == "scenes" else 0
    return _load(
        config.data, config.root, part, side, config.skip_bad, config.scenes, most, config.supercategories, _say
    )


def _tuning(config: Config) -> Tuning:
    return Tuning(config.samples, anchor=config.anchor, learning_rate=config.tuning_rate, precision=config.precision)


def _sizes(config: Config) -> tuple[tuple[int, int, int], int]:
    """Of the images; and channels of the maps."""
    side = _known(config.image_size)
    return (3, side, side), len(_known(config.classes)) + _known(config.most)


def _code(config: Config) -> MapCode:
    image, drawn = _sizes(config)
    return MapCode(image, drawn, drawn, config.code_patch, config.levels, config.code_width)


def build(config: Config) -> Coded:
    """The policy of a resolved config, untrained."""
    image, drawn = _sizes(config)
    side, words = image[1] // config.code_patch, Words(config.levels)
    sizes: dict[str, Any] = {"width": config.width, "depth": config.depth, "heads": config.heads}
    stem = convolutions(3, config.width, config.patch)
    writer = EncoderDecoder(image, config.patch, words.count, side * side, stem=stem, **sizes)
    return Coded(writer, words, Base(3, drawn, (side, side), config.code_patch, len(config.levels), config.code_width))


def _segments(config: Config, scores: Tensor) -> Segments:
    return Segments(*segments_of(scores, len(_known(config.classes)), _known(config.things), config.least_area))


def _reward(config: Config) -> Reward:
    """Of drawn scores, against true segments."""
    score = panoptic_quality
    if config.reward == "matched":
        score = partial(matched_less_unmatched, unmatched=config.unmatched)
    return lambda scores, targets: score(_segments(config, scores), targets)


def _chosen(data: PanopticMaps, rows: Tensor) -> tuple[Tensor, Segments]:
    """Images in [0, 1] and segments of some rows, on the device of the rows."""
    images, *truth = (
        leaf[rows.to(leaf.device)].to(rows.device) for leaf in (data.pixels, data.ids, data.labels, data.crowd)
    )
    return images.float() / 255, Segments(truth[0].long(), truth[1], truth[2])


def _maps(config: Config, truth: Segments) -> tuple[Tensor, Tensor]:
    """Class and number of every pixel."""
    crowd = torch.zeros_like(truth.labels, dtype=torch.bool) if truth.crowd is None else truth.crowd
    most = _known(config.most)
    return classes_and_numbers(truth.ids, truth.labels, crowd, _known(config.things), most, config.code_patch)


def _shown(config: Config, maps: tuple[Tensor, Tensor]) -> Tensor:
    """Maps as the oracle sees them."""
    return channels(*maps, len(_known(config.classes)), _known(config.most))


def train(config: Config, run: Run) -> None:
    """Learn the code, then by likelihood, then by the reward; then the control from the start of the reward.

    Each phase ends with those of its weights that drew the best maps of the validation split.
    """
    data, val = _data(config, "train"), _data(config, "val")
    torch.manual_seed(config.seed)
    code = _code(config).to(run.device)
    optimizer = torch.optim.Adam(code.parameters(), config.code_rate)
    code_parts = run.track(code=code, code_optimizer=optimizer, code_keeper=Keeper(code))
    parts: dict[str, tuple[Any, ...]] = {}
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        policy = build(config).to(run.device)
        kind = torch.optim.Adafactor if name == PART else torch.optim.Adam
        keeper = "keeper" if name == PART else f"{name}_keeper"
        optimizer = kind(policy.writer.parameters(), config.tuning_rate)
        parts[name] = run.track(**{name: policy, f"{name}_optimizer": optimizer, keeper: Keeper(policy)})
    (average,) = run.track(average=MovingAverage())
    if skipped := _left_out(config):
        run.say(f"{len(skipped)} pictures of the data are left out, the first: {skipped[0]}")
    _learn_code(config, run, *code_parts, data, val)
    for policy, _, keeper in parts.values():  # all draw with the base model as it is from now on
        for coded in (policy, keeper.best):
            coded.base.load_state_dict(code_parts[0].base.state_dict())

    def batch(phase: str, step: int, size: int) -> tuple[Tensor, Segments]:
        return _batch(config, data, run, phase, step, size)

    def answers(step: int) -> tuple[Tensor, CodedAnswers]:
        images, truth = batch("likelihood", step, config.batch)
        with torch.no_grad():
            return images, start.answers(images, code_parts[0].encode(images, _shown(config, _maps(config, truth))))

    def look(policy: Coded) -> Callable[[], dict[str, Any]]:
        return lambda: {f"held_out_{name}": value for name, value in _score(config, policy, val, run).items()}

    def learn(name: str, share: float, source: Coded | None = None) -> None:
        policy, optimizer, keeper = parts[name]
        how: dict[str, Any] = {"keeper": keeper, "validate": look(policy), "every": 4 * config.every}
        how |= {"start": source, "precision": config.precision}
        learn_likelihood(run, name, share, policy, answers, optimizer, config.learning_rate, **how)

    share, start = (1 - config.code_share - config.likelihood_share) / 2, parts["likelihood"][0]
    learn("likelihood", config.likelihood_share)
    policy, optimizer, keeper = parts[PART]
    tune_on_reward(
        run,
        "reward",
        share,
        policy,
        _reward(config),
        lambda step: batch("reward", step, config.tuning_batch),
        _tuning(config),
        optimizer,
        average,
        start,
        keeper=keeper,
        validate=look(policy),
        every=config.every,
    )
    learn("control", share, start)


def _learn_code(
    config: Config, run: Run, code: MapCode, optimizer: Any, keeper: Keeper, data: PanopticMaps, val: PanopticMaps
) -> None:
    rows, count = run.rows(config.batch), len(_known(config.classes))

    def look() -> None:
        found = _score(config, code, val, run)
        keeper.offer(code, found["reward"])
        run.log(**{f"drawn_{name}": value for name, value in found.items()})

    for step in run.steps("codes", config.code_share):
        if step == 0:
            keeper.begin()
            look()
        images, truth = _batch(config, data, run, "codes", step, config.batch)
        maps = _maps(config, truth)
        keep = kept_words(noise.key(config.seed, "kept", step, torch.arange(config.batch)[rows]), code.length)
        losses = drawing_losses(code(images, _shown(config, maps), keep.to(run.device)), *maps, count)
        set_learning_rate(optimizer, one_cycle(run.progress, config.code_rate))
        run.optimise(torch.stack(list(losses.values())).sum(), optimizer, clip=1.0)
        run.log(**{name: value.detach() for name, value in losses.items()})
        if (step + 1) % (4 * config.every) == 0:
            look()
    keeper.offer(code, _score(config, code, val, run)["reward"])
    code.load_state_dict(keeper.best.state_dict())
    run.save()


def _batch(config: Config, data: PanopticMaps, run: Run, phase: str, step: int, size: int) -> tuple[Tensor, Segments]:
    """This process's images and segments of a step, half of them mirrored."""
    rows = run.rows(size)
    images, truth = _chosen(data, noise.examples(config.seed, step, size, len(data))[rows].to(run.device))
    flip = noise.uniform(noise.key(config.seed, phase, "mirrored", step, torch.arange(size)[rows]), 1, 1) < 0.5
    flip = flip.to(run.device)
    images = torch.where(flip[:, None], images.flip(3), images)
    return images, replace(truth, ids=torch.where(flip, truth.ids.flip(2), truth.ids))


def _left_out(config: Config) -> list[str]:
    return [line for part in ("train", "val", "test") for line in _data(config, part).skipped]


def _score(config: Config, model: Coded | MapCode, data: PanopticMaps, run: Run) -> dict[str, float]:
    """Reward and corpus PQ of greedy maps; of a code, those of the maps that its own words draw."""
    sums, rewards, reward = [], [], _reward(config)
    with torch.no_grad(), answering(model, config.precision):
        for rows in torch.arange(len(data), device=run.device).split(AT_ONCE):
            images, truth = _chosen(data, rows)
            if isinstance(model, MapCode):
                scores = model(images, _shown(config, _maps(config, truth)))
            else:
                scores = model.decode(model.sample(images, 1, True, noise.key(config.seed, "evaluation", rows)))
            rewards.append(reward(scores, truth).total)
            sums.append(class_sums(_segments(config, scores), truth, len(data.classes)))
    return corpus_quality(torch.stack(sums).sum(0)) | {"reward": float(torch.cat(rewards).mean())}


def evaluate(config: Config, policy: Coded, run: Run, elsewhere: bool = False) -> Evaluation:
    """PQ, SQ and RQ of the test split as panopticapi gives them, in [0, 1], of the most likely words of each image.

    Sums are over all images, then each class is divated, then comes the mean over classes; at the size to which pictures
    are stretched. `reward` is the mean of what was tuned on. Baselines: `mle`, the start; `control`, the start with more
    likelihood instead of the reward; `ceiling`, what the code itself says: maps drawn from the oracle's words, which
    have seen the truth. `left_out` counts what `skip_bad` left out of the data. `elsewhere`: of other data.

    Raises:
        InputError: other data with other classes.
    """
    data = _data(config, "test")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics, baselines = _score(config, policy, data, run), {}
    if config.skip_bad:
        metrics["left_out"] = float(len(data.skipped if elsewhere else _left_out(config)))
    for name, part in ROWS.items():
        other = build(config).to(run.device)
        if run.restore(part, other):
            baselines[name] = _score(config, other, data, run)
    code = _code(config).to(run.device)
    if run.restore("code", code):
        baselines["ceiling"] = _score(config, code, data, run)
    return Evaluation(metrics, baselines)


def compared(config: Config, run: Run, images: int) -> tuple[dict[str, Coded], Reward, Tensor, Segments]:
    """The start and the tuned model, the reward, and the first test images with their segments: for `analyse`."""
    models = {name: build(config).to(run.device).eval() for name in ("likelihood", "tuned")}
    for name, model in models.items():
        run.restore(PART if name == "tuned" else name, model)
    test = _data(config, "test")
    return models, _reward(config), *_chosen(test, torch.arange(min(images, len(test)), device=run.device))


def predict(config: Config, policy: Coded, images: Float[Tensor, "batch channels height width"]) -> dict[str, Any]:
    """Segments of RGB images in [0, 1]: `ids` [batch, height, width], 0 for void; `labels` [batch, segments].

    The class of segment k is `classes[labels[row, k - 1]]`, with the names `classes`. Not every segment occurs.

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_images(images, "images")
    if images.shape[1] != 3:
        raise InputError(f"images: {images.shape[1]} channels, expected 3: pass images.expand(-1, 3, -1, -1)")
    side, size = _known(config.image_size), images.shape[2:]
    stretched = images.to(next(policy.parameters()).device)
    if size != (side, side):
        stretched = F.interpolate(stretched, (side, side), mode="bilinear", antialias=True)
    keys = torch.zeros(len(images), dtype=torch.int64, device=stretched.device)  # greedy: nothing is drawn
    with torch.no_grad(), answering(policy, config.precision):
        found = _segments(config, policy.decode(policy.sample(stretched, 1, True, keys)).float())
    rows, columns = (((torch.arange(length, device=keys.device) + 0.5) * side / length).long() for length in size)
    return {"ids": found.ids[:, rows[:, None], columns], "labels": found.labels, "classes": _known(config.classes)}


def picture(
    config: Config, policy: Coded, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Image, true segments (of test pictures), those of the likelihood model, of the tuned one: a row a picture."""
    sets: dict[str, Any] = {}
    if images is None:
        data = _data(config, "test")
        rows = torch.linspace(0, len(data) - 1, min(8, len(data))).long()
        images, truth = _chosen(data, rows.to(run.device))
        sets["truth"] = {"ids": truth.ids, "labels": truth.labels}
    start = build(config).to(run.device)
    if run.restore("likelihood", start):
        sets["mle"] = predict(config, start, images)
    sets["tuned"] = predict(config, policy, images)
    return {"segments": _page(config, images, sets)}


def _page(config: Config, images: Tensor, sets: dict[str, dict[str, Tensor]]) -> Any:
    drawn = {name: (found["ids"], found["labels"]) for name, found in sets.items()}
    return pictures.segment_grid(images, drawn, _known(config.classes))


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * _known(config.image_size))


def check(config: Config) -> dict[str, Any]:
    """The first pictures, each beside its segments."""
    images, truth = _chosen(data := _data(config, "train"), torch.arange(min(8, len(_data(config, "train")))))
    return {"data": pictures.segment_grid(images, {"truth": (truth.ids, truth.labels)}, data.classes, columns=4)}
