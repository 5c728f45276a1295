"""Detection by glimpses: look, decide on a box, look elsewhere, and stop when it is enough.

| | |
|---|---|
| state | hidden vector of the glimpses so far, and where boxes were emitted |
| action | at each glimpse: emit its candidate or decline; then stop, or the next place (x, y) |
| reward | what the emitted box adds to the image's average precision, less a cost of every glimpse and box |
| horizon | at most `glimpses` |
| learner | REINFORCE with the other walks' mean as baseline; IoU and cross-entropy for the candidates |
| corner | policy |

Yeung, Russakovsky, Mori, Fei-Fei 2016, "End-to-end learning of action detection from frame glimpses in videos" (CVPR;
arXiv 1511.06984), carried from videos to images. What differs here and why, and the numbers:
docs/systems/sequential-detection.md and docs/results.md.

    foveate train sequential-detection --minutes 10                                    rendered scenes
    foveate train sequential-detection --data voc --root FOLDER --glimpses 12 --minutes 30
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_images
from foveate.data.detection import Detections, chosen, load_detections, mirrored
from foveate.data.picture_folders import read_pictures
from foveate.data.zoom import zoomed
from foveate.geometry import Boxes
from foveate.learn.answers import Tuning
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.learn.returns import reward_to_go
from foveate.models.sequential import Looking, SequentialDetector, Walk, candidate_losses
from foveate.rewards.boxes import THRESHOLDS, average_precision, corpus_average_precision
from foveate.rewards.sets import set_scores
from foveate.run import Run
from foveate.two_steps import held_out_scores, tune_on_reward
from foveate.types import Evaluation, InputError, RewardOutput, concatenate, map_tree, split

Control = Literal["random", "raster", "all"]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train sequential-detection`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), voc, or coco"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int = 96
    """side in pixels to which pictures are stretched"""
    skip_bad: bool = False
    """leave out pictures whose boxes are wrong, and count them, instead of stopping"""
    scenes: int = 4000
    """how many scenes are rendered to train on"""
    objects: int = 4
    """in a scene at most"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    start_share: float = 0.4
    """part of the budget for candidates at random places; the rest is shared evenly by the agent and its controls"""
    controls: tuple[Control, ...] = ("random", "raster")
    """trained beside the agent from the same start: looking at random places, row after row, or emitting all"""
    glimpses: int = 6
    """in a walk at most"""
    patch: int = 12
    """side of a glimpse in pixels"""
    scales: int = 3
    """patches in a glimpse, each wider than the one before"""
    factor: int = 2
    """how much wider"""
    hidden: int = 192
    """width of the core"""
    std: float = 0.15
    """standard deviation of the place; half the image is 1"""
    reward: Literal["map", "ap50"] = "map"
    """average precision: the mean over ten thresholds of the IoU, or at 0.5"""
    glimpse_cost: float = 0.01
    """taken off the reward for each glimpse, so that stopping pays"""
    box_cost: float = 0.02
    """taken off for each emitted box, so that declining pays"""
    discount: float = 0.9
    """of what later glimpses gain, a glimpse"""
    entropy: float = 0.0
    """weight of the entropy, which is sought"""
    batch: int = 32
    """images in an update"""
    samples: int = 4
    """walks over each of them"""
    learning_rate: float = 1e-3
    """of Adam; it falls evenly to 0 in every phase"""
    every: int = 100
    """updates between looks at held-out images"""
    classes: tuple[str, ...] | None = None
    """names of the classes; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
AT_ONCE = 100  # images looked at together where nothing is learned
_load = lru_cache(maxsize=6)(load_detections)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, or the data cannot be read.
    """
    if not 0 < config.start_share < 1:
        raise InputError(f"start_share: found {config.start_share}, expected more than 0 and less than 1")
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    _tuning(config, PART)
    return replace(config, classes=data.classes)


def _data(config: Config, part: Literal["train", "val", "test"]) -> Detections:
    return _load(config.data, config.root, part, config.image_size, config.skip_bad, config.scenes, config.objects)


def build(config: Config) -> SequentialDetector:
    """The policy of a resolved config, untrained."""
    return _detector(config, PART)


def _detector(config: Config, part: str) -> SequentialDetector:
    assert config.classes is not None
    looking: dict[str, Looking] = {"start": "random", "random": "random", "raster": "raster"}
    sizes = config.image_size, len(config.classes), config.glimpses, config.patch, config.scales, config.factor
    emits: Any = "all" if part == "all" else "drawn"
    return SequentialDetector(*sizes, config.hidden, config.std, looking.get(part, "learned"), emits)


@dataclass(frozen=True)
class WalkReward:
    """The image's average precision, less what the walk cost; told decision by decision.

    total = average precision of the emitted boxes - `glimpse_cost` · glimpses - `box_cost` · boxes. Its parts are
    "average_precision", "glimpses" and "boxes". A box gains what it adds to the average precision of those before it:
    the gains sum to the whole (Ng et al. 1999, "Policy invariance under reward transformations"). `credit` [batch,
    2 · time] is what followed a decision, discounted a glimpse: of emitting or declining its own glimpse on, of moving
    or stopping from the next one on.
    """

    thresholds: tuple[float, ...]
    glimpse_cost: float
    box_cost: float
    discount: float

    def __call__(self, walk: Walk, targets: Boxes) -> RewardOutput:
        """Score each walk."""
        worth = self.prefixes(walk, targets)
        gains = worth.diff(dim=1) - self.glimpse_cost * walk.mask - self.box_cost * walk.found.mask
        returns = reward_to_go(gains, walk.mask, self.discount)
        after = F.pad(self.discount * returns[:, 1:], (0, 1))
        counts = {"glimpses": walk.mask.sum(1).float(), "boxes": walk.found.mask.sum(1).float()}
        total = worth[:, -1] - self.glimpse_cost * counts["glimpses"] - self.box_cost * counts["boxes"]
        return RewardOutput(
            total, {"average_precision": worth[:, -1], **counts}, torch.stack((returns, after), -1).flatten(1)
        )

    def prefixes(self, walk: Walk, targets: Boxes) -> Float[Tensor, "batch more"]:
        """Average precision of what was emitted before the first glimpse, after it, ..., after the last."""
        count = walk.mask.shape[1] + 1
        first = torch.ones(count, count - 1, dtype=torch.bool, device=walk.mask.device).tril(-1)
        sets, wanted = (map_tree(lambda leaf: leaf.repeat_interleave(count, 0), each) for each in (walk.found, targets))
        sets = replace(sets, mask=sets.mask & first.repeat(len(walk.mask), 1))
        return average_precision(sets, wanted, self.thresholds).total.view(-1, count)


def _reward(config: Config) -> WalkReward:
    thresholds = THRESHOLDS if config.reward == "map" else (0.5,)
    return WalkReward(thresholds, config.glimpse_cost, config.box_cost, config.discount)


def _tuning(config: Config, part: str) -> Tuning:
    settings: dict[str, Any] = {"learning_rate": config.learning_rate, "anneal": True, "entropy": config.entropy}
    if part == "start":  # nothing is decided
        return Tuning(config.samples, "none", **settings | {"entropy": 0.0})
    return Tuning(config.samples, credit="difference", **settings)


def train(config: Config, run: Run) -> None:
    """Learn candidates at random places; then to decide, and every control, from there and for as long."""
    data, val = _data(config, "train"), _data(config, "val")
    parts: dict[str, Any] = {}
    for name in ("start", PART, *config.controls):
        torch.manual_seed(config.seed)
        policy = _detector(config, name).to(run.device)
        optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate, fused=True)
        parts[name] = run.track(**{name: policy, f"{name}_optimizer": optimizer, f"{name}_keeper": Keeper(policy)})
    (average,) = run.track(average=MovingAverage())
    reward, share = _reward(config), (1 - config.start_share) / (1 + len(config.controls))
    held_out = split(chosen(val, torch.arange(len(val)).to(run.device)), AT_ONCE)
    for name, (policy, optimizer, keeper) in parts.items():
        begin = name == "start"
        tune_on_reward(
            run,
            name,
            config.start_share if begin else share,
            policy,
            reward,
            partial(_batch, config, data, run, name),
            _tuning(config, name),
            optimizer,
            average,
            None if begin else parts["start"][0],
            beside=lambda decisions, scored, targets: candidate_losses(
                decisions.extras, scored.actions, targets, config.image_size
            ),
            keeper=keeper,
            validate=partial(held_out_scores, policy, reward, held_out, config.seed),
            every=config.every,
        )


def _batch(config: Config, data: Detections, run: Run, phase: str, step: int) -> tuple[Tensor, Boxes]:
    """Images of a step, zoomed and half of them mirrored, and their boxes."""
    here = run.rows(config.batch)
    rows = noise.examples(config.seed, step, config.batch, len(data))[here].to(run.device)
    keys = noise.key(config.seed, phase, "view", step, torch.arange(config.batch)[here]).to(run.device)
    flip = noise.uniform(noise.fold(keys, "flip"), 1)[:, 0] < 0.5
    return zoomed(*mirrored(*chosen(data, rows), flip), keys)


def evaluate(config: Config, policy: SequentialDetector, run: Run, elsewhere: bool = False) -> Evaluation:
    """COCO's metrics of greedy walks on the test split, in [0, 1]."""
    data = _data(config, "test")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics, curve = _score(config, policy, data)
    baselines, series = {}, {"agent": curve}
    for name in ("start", *config.controls):
        other = _detector(config, name).to(run.device)
        if run.restore(name, other):
            baselines[name], series[name] = _score(config, other.eval(), data)
    return Evaluation(metrics, baselines, {"map against glimpses": series})


def _walks(config: Config, policy: SequentialDetector, data: Detections, greedy: bool = True) -> Walk:
    rows = torch.arange(len(data), device=policy.where.weight.device).split(AT_ONCE)
    keys = noise.key(config.seed, "evaluation", torch.arange(len(data))).to(rows[0].device)
    found = [policy.sample(chosen(data, some)[0], 1, greedy, keys[some]) for some in rows]
    return map_tree(lambda leaf: leaf.cpu(), concatenate(found, 0))


def _score(
    config: Config, policy: SequentialDetector, data: Detections
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    walk, drawn = _walks(config, policy, data), _walks(config, policy, data, False)
    count = len(data.classes)
    curve = []
    for step in range(1, config.glimpses + 1):
        few = replace(walk.found, mask=walk.found.mask & (torch.arange(config.glimpses) < step))
        found = corpus_average_precision(few, data.boxes, count)
        curve.append((float(step), found["map"]))
    scores = {"map": found["map"], "ap50": found["map50"]}
    scores["sampled_map"] = corpus_average_precision(drawn.found, data.boxes, count)["map"]
    scores |= set_scores(walk.found, data.boxes)
    scores["glimpses"] = float(walk.mask.sum(1).float().mean())
    return scores, curve


def predict(
    config: Config, policy: SequentialDetector, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Walk over images in [0, 1].

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_images(images, "images")
    if images.shape[1] != 3:
        raise InputError(f"images: {images.shape[1]} channels, expected 3: pass images.expand(-1, 3, -1, -1)")
    height, width = images.shape[2:]
    side = config.image_size
    seen = F.interpolate(images.to(policy.where.weight.device), (side, side), mode="bilinear", antialias=True)
    keys = noise.key(config.seed, "predict", torch.arange(len(images))).to(seen.device)
    walk = policy.sample(seen, 1, True, keys)
    scale = walk.boxes.new_tensor([width, height, width, height]) / side
    found = walk.found
    assert found.scores is not None
    return {
        "boxes": found.boxes * scale,
        "labels": found.labels,
        "scores": found.scores,
        "mask": found.mask,
        "locations": walk.places.clamp(-1, 1),
        "taken": walk.mask,
    }


def picture(
    config: Config, policy: SequentialDetector, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Walks."""
    shown: dict[str, Boxes] = {}
    if images is None:
        test = _data(config, "test")
        images, shown["truth"] = chosen(test, torch.arange(min(6, len(test)), device=run.device))
    found = predict(config, policy, images)
    shown["emitted"] = Boxes(found["boxes"], found["labels"], found["mask"], found["scores"])
    return {"boxes": pictures.box_grid(images, shown, config.classes or (), least=0.0)}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with their boxes."""
    data = _data(config, "train")
    images, boxes = chosen(data, torch.linspace(0, len(data) - 1, min(8, len(data))).long())
    return {"data": pictures.box_grid(images, {"truth": boxes}, data.classes, columns=4)}
