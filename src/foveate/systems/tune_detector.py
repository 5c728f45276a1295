"""A detector tuned on the score of its sets of boxes: ours, torchvision's, or any that proposes candidates.

| | |
|---|---|
| state | the image, and the candidates that the detector proposes in it |
| action | for each candidate, which class it is, or none (with `jitter` also where its box is) |
| reward | of the set: boxes matched less duplicates and false positives, the mean over ten thresholds of the IoU |
| horizon | one decision for every candidate, all at once |
| learner | the detector's own losses, then REINFORCE; each decision is weighed by what the set gains from it |
| corner | policy |

The two steps of Pinto et al. 2023, "Tuning computer vision models with task rewards" (ICML; arXiv 2302.08242), for
detectors that write no text, with difference rewards (Wolpert and Tumer 2002). What differs here and why, other
detectors, and the numbers: docs/systems/tune-detector.md and docs/results.md.

    foveate train tune-detector --minutes 10                                                  rendered scenes
    foveate train tune-detector --data voc --root FOLDER --image-size 128 --backbone efficientnet-lite0 --minutes 10
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from foveate.data.detection import Detections, check_objects, chosen, first_shown, load_detections, views
from foveate.data.picture_folders import read_pictures
from foveate.geometry import Boxes
from foveate.learn.answers import Reward, Scored
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.learn.settings import Precision, Tuning
from foveate.models.adapters import load_weights, named, take_coco
from foveate.models.candidates import Candidates
from foveate.parts import restored, tracked
from foveate.rewards.boxes import DetectionReward, average_precision, class_weights, corpus_average_precision
from foveate.rewards.combine import guarded, load_reward
from foveate.rewards.sets import above, best_level, check_tells_boxes, own_score, placing_loss, set_scores, without_each
from foveate.run import Run
from foveate.two_steps import check_reward, held_out_scores, tune_on_reward
from foveate.types import Decisions, Evaluation, InputError, check_least, concatenate, known, map_tree


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train tune-detector`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), voc, or coco"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int = 64
    """side in pixels to which pictures are stretched"""
    skip_bad: bool = False
    """leave out pictures whose boxes are wrong, and sets on which your reward fails, and count them"""
    scenes: int = 6000
    """how many scenes are rendered to train on"""
    objects: int = 6
    """in a scene at most"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.5
    """part of the budget for the detector's own losses; the rest is shared evenly by the reward and its control"""
    model: str = "cells"
    """cells (ours), torchvision:NAME, or package.module:function, which is called with the number of classes"""
    pretrained: bool = False
    """begin with what a detector of torchvision learned on COCO; it may be downloaded"""
    weights: Path | None = None
    """a safetensors file of the model's weights to begin with"""
    backbone: str = "convolutions"
    """what sees the image first in cells: convolutions, efficientnet-lite0 (ImageNet, no download), a name of timm"""
    stride: int = 8
    """side in pixels of the cells in which objects are sought"""
    width: int = 96
    """of the vectors"""
    candidates: int = 50
    """decisions in an image at most"""
    overlap: float = 0.6
    """IoU with a surer candidate from which one is left out"""
    reward: str = "map"
    """map (rare classes weigh more), matches (all alike), average-precision, or package.module:function"""
    duplicate: float = 0.3
    """cost of a second box at a target, for map and matches"""
    false_positive: float = 0.3
    """cost of a box at no target, for map and matches"""
    credit: Literal["difference", "answer"] = "difference"
    """a decision is weighed by what the set gains from it, or all by the reward of the set"""
    placing: float | None = None
    """weight of the loss that moves chosen boxes to their targets; None: 1, and 0 for a reward of your own"""
    jitter: float = 0.0
    """how widely boxes are drawn, in parts of their sides; 0: as predicted"""
    tune: Literal["all", "heads"] = "all"
    """what the reward and its control change: the whole network, or all but its backbone"""
    batch: int = 16
    """images in an update"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of the detector's own losses"""
    samples: int = 8
    """sets drawn for each image"""
    tuning_rate: float = 1e-4
    """learning rate of the reward, which falls evenly to 0"""
    anchor: float = 0.1
    """weight of the KL to the start"""
    entropy: float = 0.0
    """weight of the entropy, which is sought"""
    every: int = 50
    """updates between looks at held-out images"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    classes: tuple[str, ...] | None = None
    """names of the classes; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
REWARDS = ("map", "matches", "average-precision")
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
HELD_OUT, AT_ONCE = 100, 50  # images on which weights are chosen; images that are looked at together
_load = lru_cache(maxsize=6)(partial(load_detections, say=partial(print, file=sys.stderr)))  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    if not 0 <= config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share}, expected from 0 to less than 1")
    check_least(config, 1, "batch", "candidates", "every", "objects", "scenes", "stride", "width")
    check_least(config, 0, "learning_rate", "tuning_rate", "anchor", "jitter", "placing")
    _tuning(config)
    for split in ("train", "val", "test"):  # now, not after hours
        check_objects(data := _data(config, split), config.root or config.data)
    _reward(config, _data(config, "train"))
    placing = float(config.reward in REWARDS) if config.placing is None else config.placing
    return replace(config, classes=data.classes, placing=placing)


def _data(config: Config, split: Literal["train", "val", "test"]) -> Detections:
    return _load(config.data, config.root, split, config.image_size, config.skip_bad, config.scenes, config.objects)


def build(config: Config) -> Candidates:
    """The policy of a resolved config, untrained."""
    classes = len(known(config.classes))
    sizes = {"backbone": config.backbone, "stride": config.stride, "width": config.width}
    detector = named(config.model, classes, config.pretrained, **sizes)
    detector.count, detector.overlap = config.candidates, config.overlap
    return Candidates(detector, classes, config.jitter)


def _tuning(config: Config) -> Tuning:
    how: dict[str, Any] = {"anchor": config.anchor, "entropy": config.entropy, "learning_rate": config.tuning_rate}
    return Tuning(config.samples, credit=config.credit, precision=config.precision, anneal=True, **how)


def _reward(config: Config, data: Detections) -> Reward:
    if config.reward in ("map", "matches"):
        counts = data.boxes.labels[data.boxes.wanted].bincount(minlength=len(data.classes))
        weights = class_weights(counts) if config.reward == "map" else None
        costs: dict[str, Any] = {"duplicate": config.duplicate, "false_positive": config.false_positive}
        return DetectionReward(**costs, class_weights=weights, credited="difference")
    own = config.reward not in REWARDS
    reward = load_reward(config.reward, REWARDS) if own else average_precision
    reward = without_each(reward) if config.credit == "difference" else reward
    return guarded(reward, config.skip_bad, config.reward) if own else reward


def train(config: Config, run: Run) -> None:
    """Learn by the detector's own losses, then by the reward; then more of the losses from the same start, as long."""
    data, val = _data(config, "train"), first_shown(_data(config, "val"), HELD_OUT)
    parts: dict[str, Any] = {}
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        policy = build(config)
        if name == "likelihood" and config.pretrained:
            take_coco(policy.detector, config.model)
        if name == "likelihood" and config.weights is not None:
            load_weights(policy.detector, config.weights)
        if config.tune == "heads" and name != "likelihood":
            for weight in policy.detector.backbone():
                weight.requires_grad_(False)
        parts[name] = tracked(run, name, policy)
    (average,) = run.track(average=MovingAverage())
    reward, share = _reward(config, data), (1 - config.likelihood_share) / 2
    look, batches = partial(_look, config, reward, val, run), partial(_batch, config, data, run)
    start = parts["likelihood"][0]
    found = check_reward(run, start, reward, batches("reward", 0), config.samples)  # now, not after the first phase
    check_tells_boxes(config.reward, REWARDS, found.total, data.boxes)
    if config.likelihood_share:
        _supervise(config, run, "likelihood", config.likelihood_share, parts["likelihood"], batches, look)
    policy, optimizer, keeper = parts[PART]
    learner = policy, reward, partial(batches, "reward"), _tuning(config), optimizer, average, start

    def place(decisions: Decisions, scored: Scored, targets: Boxes) -> dict[str, Tensor]:
        loss = placing_loss(policy.decode(scored.actions), decisions.extras["boxes"], targets)
        return {"placing": known(config.placing) * loss}

    held_out: Any = {"keeper": keeper, "validate": partial(look, policy), "every": config.every}
    tune_on_reward(run, "reward", share, *learner, beside=place, **held_out)
    _supervise(config, run, "control", share, parts["control"], batches, look, start)


def _supervise(
    config: Config,
    run: Run,
    phase: str,
    share: float,
    parts: tuple[Candidates, torch.optim.Optimizer, Keeper],
    batches: Callable[[str, int], tuple[Tensor, Boxes]],
    look: Callable[[Candidates], dict[str, Any]],
    start: Candidates | None = None,
) -> None:
    """The detector's own losses for one phase; it ends with the weights that were best on held-out images."""
    policy, optimizer, keeper = parts
    for step in run.steps(phase, share):
        if step == 0:
            if start is not None:
                policy.load_state_dict(start.state_dict())
            keeper.begin()
            keeper.offer(policy, look(policy)["held_out_map"])
        images, targets = batches(phase, step)
        policy.train()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = policy.detector.loss(images, targets)
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(torch.stack(list(losses.values())).sum(), optimizer, clip=10.0)
        run.log(**{name: value.detach() for name, value in losses.items()})
        if (step + 1) % config.every == 0:
            found = look(policy)
            keeper.offer(policy, found["held_out_map"])
            run.log(**found)
    keeper.finish(policy, look(policy)["held_out_map"])
    run.save()


def _look(config: Config, reward: Reward, val: Detections, run: Run, policy: Candidates) -> dict[str, Any]:
    batches = (chosen(val, rows.to(run.device)) for rows in torch.arange(len(val)).split(AT_ONCE))
    found = held_out_scores(policy, reward, batches, config.seed, config.precision)
    ranked = _over(val, run, policy.eval().ranked)
    return found | {"held_out_map": corpus_average_precision(ranked, val.boxes, policy.classes)["map"]}


def _over(data: Detections, run: Run, function: Callable[[Tensor], Boxes]) -> Boxes:
    """Boxes of all images, some at a time, on the CPU."""
    found = [function(some.to(run.device).float() / 255) for some in data.pixels.split(AT_ONCE)]
    return map_tree(lambda leaf: leaf.cpu(), concatenate(found, 0))


def _batch(config: Config, data: Detections, run: Run, phase: str, step: int) -> tuple[Tensor, Boxes]:
    """Images of a step, each a new window and half of them mirrored, and their boxes."""
    here = run.rows(config.batch)
    rows = noise.examples(config.seed, step, config.batch, len(data))[here].to(run.device)
    keys = noise.key(config.seed, phase, "view", step, torch.arange(config.batch)[here]).to(run.device)
    return views(data, rows, keys)


def evaluate(config: Config, policy: Candidates, run: Run, elsewhere: bool = False) -> Evaluation:
    """COCO's metrics on the test split with class probabilities as scores, and those of the greedy set at IoU 0.5.

    All in [0, 1]. Baselines: `mle`, the start; `control`, the start with more of the detector's own losses; and these
    with the threshold of the score that gives the best F1 on the val split, `mle threshold` and `control threshold`.
    `left_out` counts the pictures that `skip_bad` left out; `reward` is that of the greedy sets, if it is your own.
    """
    data, val = _data(config, "test"), _data(config, "val")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics, baselines = _score(config, policy, data, run)[0], dict[str, dict[str, float]]()
    if config.skip_bad:
        metrics["left_out"] = float(sum(_data(config, split).skipped for split in ("train", "val", "test")))
    for name, other in restored(run, ROWS, partial(build, config)).items():
        scores, ranked = _score(config, other, data, run)
        kept = above(ranked, best_level(_over(val, run, other.ranked), val.boxes))
        told = set_scores(kept, data.boxes) | own_score(config.reward, REWARDS, kept, data.boxes, config.skip_bad)
        baselines |= {name: scores, f"{name} threshold": scores | told}
    return Evaluation(metrics, baselines)


def compared(config: Config, policy: Candidates, run: Run, images: int) -> tuple[Reward, Tensor, Boxes]:
    """The reward, and the first test images with their boxes: for `foveate analyse`."""
    test = _data(config, "test")
    rows = torch.arange(min(images, len(test)), device=run.device)
    return _reward(config, _data(config, "train")), *chosen(test, rows)


def _score(config: Config, policy: Candidates, data: Detections, run: Run) -> tuple[dict[str, float], Boxes]:
    ranked, greedy = _over(data, run, policy.ranked), _over(data, run, partial(_greedy, policy))
    scores = corpus_average_precision(ranked, data.boxes, len(data.classes))
    scores |= own_score(config.reward, REWARDS, greedy, data.boxes, config.skip_bad)
    return scores | set_scores(greedy, data.boxes), ranked


def _greedy(policy: Candidates, images: Tensor) -> Boxes:
    keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)  # greedy: nothing is drawn
    return policy.decode(policy.sample(images, 1, True, keys))


def predict(
    config: Config, policy: Candidates, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Find boxes: `boxes` [batch, count, 4] in pixels of the images, `labels`, `scores` and `mask` [batch, count].

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    height, width = images.shape[2:]
    seen = F.interpolate(images, (config.image_size, config.image_size), mode="bilinear", antialias=True)
    found = _greedy(policy, seen.to(next(policy.parameters()).device))
    assert found.scores is not None
    scale = found.boxes.new_tensor([width, height, width, height]) / config.image_size
    return {"boxes": found.boxes * scale, "labels": found.labels, "scores": found.scores, "mask": found.mask}


def picture(
    config: Config, policy: Candidates, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Boxes on test pictures beside the true ones and those of the start; or on pictures of the user."""
    shown: dict[str, Boxes] = {}
    if images is None:
        data = _data(config, "test")
        images, shown["truth"] = chosen(data, torch.linspace(0, len(data) - 1, min(6, len(data))).long().to(run.device))
        for name, start in restored(run, {"start": "likelihood"}, partial(build, config)).items():
            shown[name] = _greedy(start, images)
    found = predict(config, policy, images)
    shown["tuned"] = Boxes(found["boxes"], found["labels"], found["mask"], found["scores"])
    return {"boxes": pictures.box_grid(images, shown, known(config.classes))}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with their boxes."""
    data = _data(config, "train")
    images, boxes = chosen(data, torch.linspace(0, len(data) - 1, min(8, len(data))).long())
    return {"data": pictures.box_grid(images, {"truth": boxes}, data.classes, columns=4)}
