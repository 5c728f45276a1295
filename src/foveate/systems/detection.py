"""Detection by writing: boxes as a text, first learned from people's boxes, then tuned on what detection is scored by.

| | |
|---|---|
| state | the image, and the tokens written so far |
| action | the next token: top, left, bottom, right, class, or the end |
| reward | at the end: boxes matched less duplicates, the mean over ten thresholds of the IoU |
| horizon | five decisions a box, at most `most` boxes |
| learner | likelihood, then REINFORCE with the other answers' mean as baseline; cross-entropy for the confidence |
| corner | policy |

Pinto et al. 2023, "Tuning computer vision models with task rewards" (ICML; arXiv 2302.08242), on the texts of Chen et
al. 2022, "Pix2seq". What differs here and why, and the numbers: docs/systems/detection.md and docs/results.md.

    foveate train detection --minutes 10                                        rendered scenes
    foveate train detection --data voc --root FOLDER --image-size 128 --minutes 30
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_rgb
from foveate.data.detection import Detections, check_objects, chosen, load_detections, views
from foveate.data.picture_folders import read_pictures
from foveate.geometry import Boxes, joined
from foveate.learn.answers import Reward, Scored, answering
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.backbones import stem
from foveate.models.box_tokens import BoxTokens, BoxWriter, by_token, ranked
from foveate.models.encoder_decoder import Tokens
from foveate.parts import restored, tracked
from foveate.rewards.boxes import DetectionReward, class_weights, corpus_average_precision, matched_iou
from foveate.rewards.combine import guarded, load_reward
from foveate.rewards.sets import box_by_box, check_tells_boxes, own_score
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Decisions, Evaluation, InputError, Tree, check_least, map_tree, split

Control = Literal["likelihood", "confidence"]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train detection`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), voc, or coco"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int = 48
    """side in pixels to which pictures are stretched"""
    skip_bad: bool = False
    """leave out pictures whose boxes are wrong, and texts on which your reward fails, and count them"""
    scenes: int = 6000
    """how many scenes are rendered to train on"""
    objects: int = 4
    """in a scene at most"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.5
    """part of the budget for maximum likelihood, 0 with --from; the rest is shared evenly by reward and controls"""
    controls: tuple[Control, ...] = ("likelihood", "confidence")
    """trained beside the reward from the same start: more likelihood, or that with the confidence but no reward"""
    reward: str = "map"
    """map (matches, rare classes weigh more), recall (all alike), or package.module:function of boxes and true boxes"""
    duplicate: float = 0.3
    """cost of a second box at a target"""
    false_positive: float = 0.0
    """cost of a box at no target"""
    confidence: float = 0.3
    """weight of the loss that learns the expected IoU of a box"""
    most: int | None = None
    """boxes in an answer at most; None: 25, or a quarter more than any image has"""
    bins: int | None = None
    """into which a side is divided; None: four a pixel, at most 1,000"""
    order: Literal["random", "raster"] = "random"
    """of the boxes in likelihood: drawn anew each time, or by rows"""
    backbone: str = "convolutions"
    """what sees first: convolutions, efficientnet-lite0 (ImageNet, no download), torchvision:NAME, or a name of timm"""
    patch: int = 8
    """pixels of the image, a side, to a vector that is read"""
    width: int = 96
    """of the vectors"""
    depth: int = 2
    """blocks of the encoder, and of the decoder"""
    batch: int = 32
    """images in an update of likelihood"""
    learning_rate: float = 1e-3
    """peak of its one-cycle schedule"""
    tuning_batch: int = 16
    """images in an update on the reward"""
    samples: int = 8
    """answers to each of them"""
    tuning_rate: float = 1e-3
    """learning rate of the reward, which falls evenly to 0"""
    temperature: float = 1.0
    """by which scores are divided where texts are drawn for the reward; below 1 they are nearer to the likeliest"""
    credit: Literal["to-go", "answer"] = "to-go"
    """weigh a token by what its box and those after it gain, or by the whole answer"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    classes: tuple[str, ...] | None = None
    """names of the classes; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
PARTS: dict[Control, str] = {"likelihood": "control", "confidence": "confidence"}  # control → its tracked part
REWARDS = ("map", "recall")  # other names are of the user's functions
ROWS = {"mle": "likelihood", "control": "control", "confidence": "confidence"}  # baseline → its tracked part
TRUSTS = (0.0, 0.5, 1.0)  # how much a confidence that was learned may count in the ranking: chosen on val
_load = lru_cache(maxsize=6)(partial(load_detections, say=partial(print, file=sys.stderr)))  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    if not 0 <= config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share}, expected from 0 to less than 1")
    check_least(config, 1, "batch", "tuning_batch", "scenes", "objects", "most", "bins", "patch", "width")
    check_least(config, 0, "learning_rate", "tuning_rate", "anchor", "confidence")
    _tuning(config)
    parts = data, *_ = [_data(config, part) for part in ("train", "val", "test")]
    _reward(config, data)
    for part in parts:
        check_objects(part, config.root or config.data)
    counts = [int(part.boxes.wanted.sum(1).max()) for part in parts]  # crowds are not written
    most, bins = config.most or max(25, max(counts) * 5 // 4), config.bins or min(1000, 4 * config.image_size)
    if most < counts[0]:
        raise InputError(f"most: found {most}, but an image has {counts[0]} boxes; raise it")
    config = replace(config, most=most, bins=bins, classes=data.classes)
    build(config)  # what cannot be built is said now
    return config


def _data(config: Config, split: Literal["train", "val", "test"]) -> Detections:
    return _load(config.data, config.root, split, config.image_size, config.skip_bad, config.scenes, config.objects)


def _code(config: Config) -> BoxTokens:
    count, most, bins = len(config.classes or ()), config.most or 0, config.bins or 0
    return BoxTokens((config.image_size, config.image_size), count, most, bins)


def build(config: Config) -> BoxWriter:
    """The policy of a resolved config, untrained."""
    first = stem(config.backbone, config.width, config.patch)
    return BoxWriter(_code(config), config.patch, first, config.width, config.depth)


def _tuning(config: Config) -> Tuning:
    same = "samples", "anchor", "credit", "precision", "temperature"
    return Tuning(learning_rate=config.tuning_rate, anneal=True, **{name: getattr(config, name) for name in same})


def _reward(config: Config, data: Detections) -> Reward:
    if config.reward not in REWARDS:
        score = load_reward(config.reward, REWARDS)
        own = box_by_box(score) if config.credit == "to-go" else score
        return by_token(guarded(own, config.skip_bad, config.reward))
    counts = data.boxes.labels[data.boxes.wanted].bincount(minlength=len(data.classes))
    weights = class_weights(counts) if config.reward == "map" else None
    costs: Any = {"duplicate": config.duplicate, "false_positive": config.false_positive}
    return by_token(DetectionReward(**costs, class_weights=weights))


def train(config: Config, run: Run) -> None:
    """Learn by likelihood, then by the reward; then every control from the same start, for as long as the reward."""
    check_taught(run, likelihood_share=config.likelihood_share)
    data, val, parts = _data(config, "train"), _data(config, "val"), dict[str, Any]()
    for name in ("likelihood", PART, *(PARTS[control] for control in config.controls)):
        torch.manual_seed(config.seed)
        kind = torch.optim.Adafactor if name == PART else torch.optim.Adam
        by = "held_out_map" if name == "likelihood" or config.reward in REWARDS else "held_out_reward"
        parts[name] = tracked(run, name, build(config), kind, by)
    (average,) = run.track(average=MovingAverage())
    reward, share = _reward(config, data), (1 - config.likelihood_share) / (1 + len(config.controls))
    held_out = split(chosen(val, torch.arange(len(val)).to(run.device)), 50)
    batches = partial(_batch, config, data, run, "reward", size=config.tuning_batch)

    def look(name: str) -> dict[str, Any]:
        policy = parts[name][0].eval()
        trusts = TRUSTS if name in (PART, PARTS["confidence"]) else TRUSTS[:1]
        metric = {"held_out_map": _score(config, policy, val, run, trusts)["map"]}
        return held_out_scores(policy, reward, held_out, config.seed, config.precision) | metric

    def learn(name: str, share: float, start: BoxWriter | None = None, beside: Any = None) -> None:
        policy, optimizer, keeper = parts[name]
        how: Any = {"start": start, "beside": beside, "keeper": keeper, "precision": config.precision}
        how |= {"validate": partial(look, name), "learning_rate": config.learning_rate}
        learn_likelihood(run, name, share, policy, partial(_answers, config, data, run), optimizer, **how)

    found = check_reward(run, parts["likelihood"][0], reward, batches(0), config.samples)  # not after the first phase
    check_tells_boxes(config.reward, REWARDS, found.total, data.boxes)
    learn("likelihood", config.likelihood_share)
    start, (policy, optimizer, keeper) = parts["likelihood"][0], parts[PART]

    def sure(decisions: Decisions, scored: Scored, targets: Boxes) -> dict[str, Tensor]:
        return _confidence(config, policy, decisions, scored.actions, targets, config.temperature)

    how: Any = {"beside": sure, "keeper": keeper, "validate": partial(look, PART)}
    tune_on_reward(run, "reward", share, policy, reward, batches, _tuning(config), optimizer, average, start, **how)
    for control in config.controls:
        learner, beside = parts[PARTS[control]][0], None
        if control == "confidence":

            def beside(inputs: Tree, answers: Tree, keys: Tensor, learner: BoxWriter = learner) -> dict[str, Tensor]:
                few = slice(0, config.tuning_batch)
                with answering(learner, config.precision, config.temperature):
                    written = learner.sample(inputs[few], 1, False, keys[few])
                targets = map_tree(lambda leaf: leaf[few], learner.decode(answers))
                return _confidence(config, learner, learner(inputs[few], written), written, targets)

        learn(PARTS[control], share, start, beside)


def _batch(config: Config, data: Detections, run: Run, phase: str, step: int, size: int) -> tuple[Tensor, Boxes]:
    """Images of a step, zoomed and half of them mirrored, and their boxes."""
    here = run.rows(size)
    rows = noise.examples(config.seed, step, size, len(data))[here].to(run.device)
    keys = noise.key(config.seed, phase, "view", step, torch.arange(size)[here]).to(run.device)
    return views(data, rows, keys)


def _answers(config: Config, data: Detections, run: Run, step: int) -> tuple[Tensor, Tokens]:
    """Images of a step and the texts of their boxes."""
    images, boxes = _batch(config, data, run, "likelihood", step, config.batch)
    keys = noise.key(config.seed, "order", step, torch.arange(config.batch)[run.rows(config.batch)]).to(run.device)
    order = keys if config.order == "random" else None
    return images, _code(config).encode(replace(boxes, mask=boxes.wanted), order)


def _confidence(
    config: Config, policy: BoxWriter, decisions: Decisions, actions: Tokens, targets: Boxes, scale: float = 1.0
) -> dict[str, Tensor]:
    """The confidences of written boxes learn how much each overlaps its target; `scale` is the scores' temperature."""
    written, logits = policy.decode(actions), scale * decisions.distribution.logits
    loss = policy.code.confidence_loss(logits, written, matched_iou(written, targets))
    return {"confidence_loss": config.confidence * loss}


def evaluate(config: Config, policy: BoxWriter, run: Run, elsewhere: bool = False) -> Evaluation:
    """COCO's metrics of greedy answers on the test split, in [0, 1].

    Baselines: `mle`, the start; `mle unending`, the start made to fill all its places; `control`, the start with more
    likelihood; `confidence` and `confidence unending`, that with the confidence learned on its own answers, without a
    reward. Boxes are scored by the probability of their class, and by their confidence as far as `val` says it helps.
    `ceiling`: the true boxes as the code can write them; not there if an image has more than `most`.
    """
    data = _data(config, "test")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics, baselines = _score(config, policy, data, run), dict[str, dict[str, float]]()
    if config.skip_bad:
        metrics["left_out"] = float(sum(_data(config, part).skipped for part in ("train", "val", "test")))
    for name, other in restored(run, ROWS, partial(build, config)).items():
        baselines[name] = _score(config, other, data, run)
        if name != "control":
            baselines[f"{name} unending"] = _score(config, other.unending().eval(), data, run)
    code = _code(config)
    if int(data.boxes.wanted.sum(1).max()) <= code.most:
        written = code.decode(code.encode(replace(data.boxes, mask=data.boxes.wanted)))
        sure = replace(written, scores=torch.ones_like(written.boxes[..., 0]))
        baselines["ceiling"] = corpus_average_precision(sure, data.boxes, len(data.classes))
    return Evaluation(metrics, baselines)


def compared(config: Config, policy: BoxWriter, run: Run, images: int) -> tuple[Reward, Tensor, Boxes]:
    """The reward, and the first test images with their boxes: for `foveate analyse`."""
    test = _data(config, "test")
    return _reward(config, _data(config, "train")), *chosen(
        test, torch.arange(min(images, len(test)), device=run.device)
    )


def _score(
    config: Config, policy: BoxWriter, data: Detections, run: Run, trusts: tuple[float, ...] = ()
) -> dict[str, float]:
    """COCO's metrics of greedy texts, and a reward of the user's own; policies keep which of `trusts` ranks best."""
    rows = torch.arange(len(data), device=run.device).split(100)
    found = [policy.scored(images := chosen(data, some)[0], _greedy(images)) for some in rows]
    known, sure = (map_tree(lambda leaf: leaf.cpu(), joined(list(one))) for one in zip(*found, strict=True))
    score = partial(corpus_average_precision, targets=data.boxes, classes=len(data.classes))
    scores = {trust: score(ranked(known, sure, trust)) for trust in trusts or (float(policy.trust),)}
    policy.trust.fill_(best := max(scores, key=lambda trust: scores[trust]["map"]))
    own = {} if trusts else own_score(config.reward, REWARDS, known, data.boxes, config.skip_bad)  # looks have it
    return scores[best] | own


def _greedy(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)  # keys: nothing is drawn


def predict(
    config: Config, policy: BoxWriter, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Find boxes: `boxes` [batch, count, 4] in pixels of the images, `labels`, `scores` and `mask` [batch, count].

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    (height, width), side = images.shape[2:], config.image_size
    seen = F.interpolate(images.to(policy.where.device), (side, side), mode="bilinear", antialias=True)
    found = policy.detect(seen, _greedy(seen))
    assert found.scores is not None
    scale = found.boxes.new_tensor([width, height, width, height]) / side
    return {"boxes": found.boxes * scale, "labels": found.labels, "scores": found.scores, "mask": found.mask}


def picture(
    config: Config, policy: BoxWriter, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Boxes on test pictures beside the true ones and those of the start; or on pictures of the user."""
    shown: dict[str, Boxes] = {}
    if images is None:
        _, images, shown["truth"] = compared(config, policy, run, 6)
        for name, start in restored(run, {"likelihood": "likelihood"}, partial(build, config)).items():
            shown[name] = start.detect(images, _greedy(images))
    found = predict(config, policy, images)
    shown["tuned"] = Boxes(found["boxes"], found["labels"], found["mask"], found["scores"])
    return {"boxes": pictures.box_grid(images, shown, config.classes or ())}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with their boxes."""
    data = _data(config, "train")
    images, truth = chosen(data, torch.linspace(0, len(data) - 1, min(8, len(data))).long())
    return {"data": pictures.box_grid(images, {"truth": truth}, data.classes, columns=4)}
