"""Panoptic segmentation: a map of classes and things as a short text, first learned from maps, then tuned on PQ.

| | |
|---|---|
| state | the image, and the words written so far |
| action | the next word of the code of its panoptic map |
| reward | at the end: Σ IoU of the matched segments less a weight for each unmatched one, or PQ, of the map as drawn |
| horizon | one word a square of 8×8 pixels: 16 words for 32×32 |
| learner | maximum likelihood, then REINFORCE with the mean of the other answers as baseline |
| corner | policy |

Pinto et al. 2023, "Tuning computer vision models with task rewards" (arXiv 2302.08242), section 4.1, on the codes of
Kolesnikov et al. 2022, "UViM" (arXiv 2205.10337). What differs here, and the numbers: docs/systems/panoptic.md.

    foveate train panoptic --minutes 10                                             rendered scenes
    foveate train panoptic --data coco --root FOLDER --supercategories --backbone efficientnet-lite0 --minutes 60
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.coding import learn_code
from foveate.data.box_files import Part
from foveate.data.classification import check_rgb
from foveate.data.panoptic import PanopticMaps, chosen, load_panoptic, mirrored
from foveate.data.picture_folders import read_pictures
from foveate.geometry import Segments
from foveate.learn.answers import Reward, answering
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.backbones import stem
from foveate.models.codes import Base, Coded, CodedAnswers, MapCode, Words
from foveate.models.encoder_decoder import EncoderDecoder
from foveate.models.panoptic import Maps, PanopticChannels
from foveate.parts import restored, tracked
from foveate.rewards.combine import guarded, load_reward
from foveate.rewards.panoptic import (
    check_tells_maps,
    class_sums,
    corpus_quality,
    matched_less_unmatched,
    panoptic_quality,
)
from foveate.rewards.telling import FEW
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, check_least, known


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train panoptic`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), or coco (its panoptic layout)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """side in pixels to which pictures are stretched; None: 32 for scenes, 96 for coco"""
    skip_bad: bool = False
    """leave out pictures with which something is wrong, and maps on which your reward fails, and count them"""
    supercategories: bool = False
    """coco: classes are the supercategories, e.g. animal, vehicle, ground"""
    scenes: int = 6000
    """how many scenes are rendered to train on"""
    most: int | None = None
    """things of an image that have a number; None: 3 for scenes, 20 for coco"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    code_share: float = 0.35
    """part of the budget that learns the code of maps; 0: take it from the run given by --from"""
    likelihood_share: float = 0.25
    """part for maximum likelihood, 0 as above; the rest is shared evenly by the reward and the control"""
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
    backbone: str = "convolutions"
    """what sees first: convolutions, efficientnet-lite0 (ImageNet, no download), torchvision:NAME, or a name of timm"""
    patch: int = 8
    """pixels of the image, a side, to a vector that is read"""
    width: int = 128
    """of the vectors"""
    depth: int = 2
    """blocks of the encoder, and of the decoder"""
    heads: int = 4
    """of the attention"""
    batch: int = 16
    """images in an update of code and likelihood"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of likelihood"""
    reward: str = "matched"
    """matched (Σ IoU of the matched segments less `unmatched` for each other), pq, or package.module:function"""
    unmatched: float = 0.5
    """what a false positive and a missed segment cost"""
    tuning_batch: int = 8
    """images in an update on the reward"""
    samples: int = 8
    """maps of each of them"""
    temperature: float = 1.0
    """by which scores are divided where maps are drawn for the reward; below 1 these are more like the likeliest"""
    tuning_rate: float = 1e-3
    """learning rate of the reward, which falls evenly to 0"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    classes: tuple[str, ...] | None = None
    """names of the classes, things first; taken from the data"""
    things: int | None = None
    """how many of them are things; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
REWARDS = ("pq", "matched")  # other names are of the user's functions
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
GAIN = 8.0  # of words: at 1 the base learns some hundred updates later to read the class of a thing from them
AT_ONCE = 50  # images in a pass where nothing is learned
EVERY = 50  # updates on the reward between looks at the validation split; four times as many in other phases
_load = lru_cache(maxsize=6)(load_panoptic)
_say = partial(print, file=sys.stderr)  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    side, most = (32, 3) if config.data == "scenes" else (96, 20)
    config = replace(config, image_size=config.image_size or side, most=most if config.most is None else config.most)
    shares = config.code_share, config.likelihood_share
    if min(shares) < 0 or sum(shares) >= 1:
        told = f"found {shares[0]} and {shares[1]}, expected at least 0 each and less than 1 together"
        raise InputError(f"code_share, likelihood_share: {told}, so that the reward has its part")
    sizes = "code_patch", "code_width", "patch", "width", "heads"
    check_least(config, 1, "batch", "tuning_batch", "scenes", "most", "least_area", *sizes)
    check_least(config, 0, "unmatched", "code_rate", "learning_rate", "tuning_rate", "anchor")
    _tuning(config)
    _reward(config)
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    config = replace(config, classes=data.classes, things=data.things)
    _code(config)
    build(config)  # sizes that do not go into each other are told now
    return config


def _data(config: Config, part: Part) -> PanopticMaps:
    most = known(config.most) if config.data == "scenes" else 0
    how = config.skip_bad, config.scenes, most, config.supercategories, _say
    return _load(config.data, config.root, part, known(config.image_size), *how)


def _tuning(config: Config) -> Tuning:
    same = {name: getattr(config, name) for name in ("samples", "temperature", "anchor", "precision")}
    return Tuning(learning_rate=config.tuning_rate, anneal=True, **same)


def _channels(config: Config) -> PanopticChannels:
    sizes = len(known(config.classes)), known(config.things), known(config.most)
    return PanopticChannels(*sizes, config.code_patch, config.least_area)


def _code(config: Config) -> MapCode:
    side, drawn = known(config.image_size), _channels(config).count
    return MapCode((3, side, side), drawn, drawn, config.code_patch, config.levels, config.code_width, GAIN)


def build(config: Config) -> Coded:
    """The policy of a resolved config, untrained."""
    image, words = (3, known(config.image_size), known(config.image_size)), Words(config.levels)
    side = image[1] // config.code_patch
    sizes: dict[str, Any] = {"width": config.width, "depth": config.depth, "heads": config.heads}
    sizes["stem"] = stem(config.backbone, config.width, config.patch)
    writer = EncoderDecoder(image, config.patch, words.count, side * side, **sizes)
    drawn = _channels(config).count, (side, side), config.code_patch, len(config.levels), config.code_width
    return Coded(writer, words, Base(3, *drawn))


def _reward(config: Config) -> Reward:
    costly = partial(matched_less_unmatched, unmatched=config.unmatched)
    named: dict[str, Reward] = {"matched": costly, "pq": panoptic_quality}
    score = named.get(config.reward) or guarded(load_reward(config.reward, REWARDS), config.skip_bad, config.reward)
    return lambda scores, truth: score(_channels(config).segments(scores), truth)


def train(config: Config, run: Run) -> None:
    """Code, likelihood, reward, then the control from the start of the reward; each ends with its best on val."""
    check_taught(run, code_share=config.code_share, likelihood_share=config.likelihood_share)
    data, val = _data(config, "train"), _data(config, "val")
    if skipped := _left_out(config):
        run.say(f"{len(skipped)} pictures of the data are left out, the first: {skipped[0]}")
    torch.manual_seed(config.seed)
    code, code_optimizer, code_keeper = tracked(run, "code", _code(config))
    channels, parts = _channels(config), dict[str, tuple[Any, ...]]()
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        parts[name] = tracked(run, name, build(config), torch.optim.Adafactor if name == PART else torch.optim.Adam)
    (average,) = run.track(average=MovingAverage())

    def batch(phase: str, size: int, step: int) -> tuple[Tensor, Segments]:
        rows = run.rows(size)
        some = chosen(data, noise.examples(config.seed, step, size, len(data))[rows].to(run.device))
        keys = noise.key(config.seed, phase, "mirrored", step, torch.arange(size)[rows])
        return mirrored(*some, (noise.uniform(keys) < 0.5).to(run.device))

    def maps(step: int) -> tuple[Tensor, Tensor, Maps]:
        images, truth = batch("codes", config.batch, step)
        return images, channels.seen(found := channels.maps(truth)), found

    def answers(step: int) -> tuple[Tensor, CodedAnswers]:
        images, seen, _ = maps(step)
        with torch.no_grad():
            return images, start.answers(images, code.encode(images, seen))

    def look(model: Coded | MapCode) -> Callable[[], dict[str, Any]]:
        return lambda: {f"held_out_{name}": value for name, value in _score(config, model, val, run).items()}

    inputs = partial(batch, "reward", config.tuning_batch)
    found = check_reward(run, parts[PART][0], _reward(config), inputs(0), config.samples)  # now, not after hours
    _, truth = chosen(data, torch.arange(min(FEW, len(data)), device=run.device))
    check_tells_maps(config.reward, REWARDS, found.total, truth)
    how, every = (code_optimizer, config.code_rate, code_keeper, look(code)), 4 * EVERY
    learn_code(run, config.code_share, code, maps, channels.losses, *how, every=every)
    for policy, _, keeper in parts.values():  # all draw with the base model as it is from now on
        for coded in (policy, keeper.best):
            coded.base.load_state_dict(code.base.state_dict())

    def learn(name: str, share: float, source: Coded | None = None) -> None:
        policy, optimizer, keeper = parts[name]
        how: Any = {"keeper": keeper, "validate": look(policy), "start": source, "every": every}
        learner = run, name, share, policy, answers, optimizer, config.learning_rate
        learn_likelihood(*learner, precision=config.precision, **how)

    share, start = (1 - config.code_share - config.likelihood_share) / 2, parts["likelihood"][0]
    learn("likelihood", config.likelihood_share)
    policy, optimizer, keeper = parts[PART]
    learner = policy, _reward(config), inputs, _tuning(config), optimizer, average, start
    tune_on_reward(run, "reward", share, *learner, keeper=keeper, validate=look(policy), every=EVERY)
    learn("control", share, start)


def _left_out(config: Config) -> list[str]:
    return [line for part in ("train", "val", "test") for line in _data(config, part).skipped]


def _score(config: Config, model: Coded | MapCode, data: PanopticMaps, run: Run) -> dict[str, float]:
    """Reward and corpus PQ of greedy maps; of a code, those of the maps that its own words draw."""
    channels, reward, sums, rewards = _channels(config), _reward(config), [], []
    with torch.no_grad():
        for rows in torch.arange(len(data), device=run.device).split(AT_ONCE):
            images, truth = chosen(data, rows)
            with answering(model, config.precision):
                if isinstance(model, MapCode):
                    scores = model(images, channels.seen(channels.maps(truth)))
                else:
                    scores = model.decode(model.sample(images, 1, True, noise.key(config.seed, "evaluation", rows)))
            rewards.append(reward(scores, truth).total)
            sums.append(class_sums(channels.segments(scores), truth, channels.classes))
    return corpus_quality(torch.stack(sums).sum(0)) | {"reward": float(torch.cat(rewards).mean())}


def evaluate(config: Config, policy: Coded, run: Run, elsewhere: bool = False) -> Evaluation:
    """PQ, SQ and RQ of the test split as panopticapi gives them, in [0, 1], of the most likely words of each image.

    IoU and counts of each class are summed over all images before they are divided, at the size to which pictures are
    stretched. `reward` is the mean of what was tuned on. Baselines: `mle`, the start; `control`, the start with more
    likelihood instead of the reward; `ceiling`, maps drawn from the words of the oracle, which has seen the truth:
    what the code can say. `left_out` counts what `skip_bad` left out of the data. `elsewhere`: of other data.

    Raises:
        InputError: other data with other classes.
    """
    data = _data(config, "test")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics = _score(config, policy, data, run)
    if config.skip_bad:
        metrics["left_out"] = float(len(data.skipped if elsewhere else _left_out(config)))
    models: dict[str, Coded | MapCode] = dict(restored(run, ROWS, partial(build, config)))
    models |= restored(run, {"ceiling": "code"}, partial(_code, config))
    return Evaluation(metrics, {name: _score(config, model, data, run) for name, model in models.items()})


def compared(config: Config, policy: Coded, run: Run, images: int) -> tuple[Reward, Tensor, Segments]:
    """The reward, and the first test images with their segments: for `foveate analyse`."""
    test = _data(config, "test")
    return _reward(config), *chosen(test, torch.arange(min(images, len(test)), device=run.device))


def predict(config: Config, policy: Coded, images: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
    """Segments of RGB images in [0, 1]: `ids` [batch, height, width], 0 for void; `labels` [batch, segments].

    Segment k of a row is of class `config.classes[labels[row, k - 1]]`. Not every segment has pixels.

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    side, device = known(config.image_size), next(policy.parameters()).device
    stretched = F.interpolate(images.to(device), (side, side), mode="bilinear", antialias=True)
    keys = torch.zeros(len(images), dtype=torch.int64, device=device)  # greedy: nothing is drawn
    with torch.no_grad(), answering(policy):
        found = _channels(config).segments(policy.decode(policy.sample(stretched, 1, True, keys)))
    rows, columns = (((torch.arange(size, device=device) + 0.5) * side / size).long() for size in images.shape[2:])
    return {"ids": found.ids[:, rows[:, None], columns], "labels": found.labels}


def picture(
    config: Config, policy: Coded, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Image, true segments (of test pictures), those of the likelihood model, of the tuned one: a row a picture."""
    sets: dict[str, Segments] = {}
    if images is None:
        data = _data(config, "test")
        rows = torch.linspace(0, len(data) - 1, min(8, len(data))).long()
        images, sets["truth"] = chosen(data, rows.to(run.device))
    for name, start in restored(run, {"mle": "likelihood"}, partial(build, config)).items():
        sets[name] = Segments(**predict(config, start, images))
    sets["tuned"] = Segments(**predict(config, policy, images))
    return {"segments": pictures.segment_grid(images, sets, known(config.classes))}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * known(config.image_size))


def check(config: Config) -> dict[str, Any]:
    """The first pictures, each beside its segments."""
    images, truth = chosen(data := _data(config, "train"), torch.arange(min(8, len(data))))
    return {"data": pictures.segment_grid(images, {"truth": truth}, data.classes, columns=4)}
