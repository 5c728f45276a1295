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
arXiv 1511.06984), carried to images. What differs here and why, and the numbers: docs/systems/sequential-detection.md.

    foveate train sequential-detection --minutes 10
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_rgb
from foveate.data.detection import Detections, check_objects, chosen, load_detections, views
from foveate.data.picture_folders import read_pictures
from foveate.geometry import Boxes
from foveate.learn.answers import Reward, Scored, repeat
from foveate.learn.baselines import MovingAverage
from foveate.learn.returns import reward_to_go
from foveate.learn.settings import Tuning
from foveate.models.sequential import SequentialDetector, Walk, candidate_losses, near_objects, raster
from foveate.parts import tracked
from foveate.rewards.boxes import THRESHOLDS, average_precision, corpus_average_precision
from foveate.rewards.combine import guarded, load_reward
from foveate.rewards.sets import box_by_box, check_tells_boxes, own_score, set_scores
from foveate.run import Run
from foveate.two_steps import check_reward, held_out_scores, tune_on_reward
from foveate.types import Decisions, Evaluation, InputError, RewardOutput, Tree, concatenate, map_tree, split

Pictures: TypeAlias = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train sequential-detection`. What defaults to None is chosen by the data and printed."""

    data: str = "digits"
    """digits (scenes of embedded ones), scenes (rendered objects), voc, or coco"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int = 96
    """side in pixels to which pictures are stretched"""
    skip_bad: bool = False
    """leave out pictures whose boxes are wrong, and walks on which your reward fails, and count them"""
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
    controls: tuple[Literal["control", "random", "raster"], ...] = ("control", "random", "raster")
    """beside the agent, from the same start: candidates alone, or emission at random places, or at places row by row"""
    glimpses: int = 6
    """in a walk at most"""
    patch: int = 12
    """side of a glimpse in pixels"""
    scales: int = 4
    """patches in a glimpse, each twice as wide as the one before"""
    hidden: int = 192
    """width of the core"""
    std: float = 0.15
    """standard deviation of the place; half the image is 1"""
    reward: str = "map"
    """map (average precision over ten thresholds of the IoU), ap50, or package.module:function of two sets of boxes"""
    glimpse_cost: float = 0.01
    """taken off the reward for each glimpse, so that stopping pays; in learning it rises evenly from 0"""
    box_cost: float = 0.01
    """the same for each emitted box, so that declining pays"""
    discount: float = 0.7
    """of what later glimpses gain, a glimpse"""
    batch: int = 16
    """images in an update"""
    samples: int = 4
    """walks over each of them"""
    learning_rate: float = 2e-3
    """of Adam; it falls evenly to 0 in every phase"""
    classes: tuple[str, ...] | None = None
    """names of the classes; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
SUPERVISED = ("start", "control")  # parts that learn candidates alone
REWARDS = {"map": THRESHOLDS, "ap50": (0.5,)}  # of the average precision, which other names are not
# baseline → its tracked part
ROWS = {"mle": "start", "control": "control", "all": PART, "random": "random", "raster": "raster"}
AT_ONCE = 100  # images looked at together where nothing is learned
_load = lru_cache(maxsize=6)(partial(load_detections, say=partial(print, file=sys.stderr)))  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    if not 0 < config.start_share < 1:
        raise InputError(f"start_share: found {config.start_share}, expected more than 0 and less than 1")
    for name in ("glimpses", "scales", "hidden", "batch", "scenes", "objects"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if not 2 <= config.patch <= config.image_size:
        raise InputError(f"patch: found {config.patch}, expected 2 to the image's {config.image_size} pixels")
    if not config.std > 0:
        raise InputError(f"std: found {config.std}, expected a number above 0")
    _tuning(config, PART)
    _reward(config)
    for part in ("train", "val", "test"):  # now, not after hours
        check_objects(data := _data(config, part), config.root or config.data)
    return replace(config, classes=data.classes)


def _data(config: Config, part: Literal["train", "val", "test"]) -> Detections:
    return _load(config.data, config.root, part, config.image_size, config.skip_bad, config.scenes, config.objects)


def build(config: Config) -> SequentialDetector:
    """The policy of a resolved config, untrained."""
    return _detector(config, PART)


def _detector(config: Config, part: str) -> SequentialDetector:
    assert config.classes is not None
    sizes = config.image_size, len(config.classes), config.glimpses, config.patch, config.scales, config.hidden
    return SequentialDetector(*sizes, config.std, "all" if part == "all" else "drawn")


def _shown(config: Config, part: str, images: Tensor, keys: Tensor, targets: Boxes | None = None) -> Tree:
    """Images, and with them the places to look at for parts that do not choose them."""
    if part in (PART, "all"):
        return images
    if part in SUPERVISED and targets is not None:
        return images, near_objects(targets, keys, config.glimpses, config.image_size)
    if part == "raster":
        return images, raster(config.glimpses).to(images.device).expand(len(images), -1, -1)
    return images, noise.uniform(noise.fold(keys, "places"), config.glimpses, 2) * 2 - 1


@dataclass(frozen=True)
class WalkReward:
    """What the emitted boxes are worth, less what the walk cost; told decision by decision.

    total = `worth` of the emitted boxes - `glimpse_cost` · glimpses - `box_cost` · boxes. Its parts are "worth",
    "glimpses" and "boxes". A box gains what it adds to the worth of those before it. `credit` [batch, 2 · time] is what
    followed a decision: emitting or declining from its own glimpse on, moving from the next one on.
    """

    worth: Reward
    glimpse_cost: float
    box_cost: float
    discount: float

    def __call__(self, walk: Walk, targets: Boxes) -> RewardOutput:
        """Score each walk."""
        found = box_by_box(self.worth)(walk.found, targets)
        assert found.credit is not None
        gains = found.credit - self.glimpse_cost * walk.mask - self.box_cost * walk.found.mask
        returns = reward_to_go(gains, walk.mask, self.discount)
        after = F.pad(self.discount * returns[:, 1:], (0, 1))
        counts = {"glimpses": walk.mask.sum(1).float(), "boxes": walk.found.mask.sum(1).float()}
        total = found.total - self.glimpse_cost * counts["glimpses"] - self.box_cost * counts["boxes"]
        credit = torch.stack((returns, after), -1).flatten(1)
        return RewardOutput(total, {"worth": found.total, **counts}, credit)


def _reward(config: Config, share: float = 1.0) -> Reward:
    costs = share * config.glimpse_cost, share * config.box_cost, config.discount
    if config.reward in REWARDS:
        return WalkReward(partial(average_precision, thresholds=REWARDS[config.reward]), *costs)
    return guarded(WalkReward(load_reward(config.reward, REWARDS), *costs), config.skip_bad, config.reward)


def _tuning(config: Config, part: str) -> Tuning:
    settings: dict[str, Any] = {"learning_rate": config.learning_rate, "anneal": True}
    if part in SUPERVISED:  # no decision is learned yet, so there is nothing to compare
        return Tuning(1, "none", **settings)
    return Tuning(config.samples, credit="difference", **settings)


def _rising(config: Config, run: Run, walk: Walk, targets: Boxes) -> RewardOutput:
    """The reward with costs that rise from nothing: before boxes are found it would pay to stop, and stay at that."""
    return _reward(config, run.progress)(walk, targets)


def train(config: Config, run: Run) -> None:
    """Learn candidates at random places; then to decide, and every control, from there and for as long."""
    data, val = _data(config, "train"), _data(config, "val")
    parts: dict[str, Any] = {}
    for name in ("start", PART, *config.controls):
        torch.manual_seed(config.seed)
        parts[name] = tracked(run, name, _detector(config, name))
    (average,) = run.track(average=MovingAverage())
    found = check_reward(run, parts[PART][0], _reward(config), _batch(config, data, run, PART, 0), config.samples)
    check_tells_boxes(config.reward, REWARDS, found.parts["worth"], data.boxes)
    reward, share = partial(_rising, config, run), (1 - config.start_share) / (1 + len(config.controls))
    rows = torch.arange(len(val), device=run.device)
    (images, targets), keys = chosen(val, rows), noise.key(config.seed, "held out places", rows)
    for name, (policy, optimizer, keeper) in parts.items():
        reference, much = (None, config.start_share) if name == "start" else (parts["start"][0], share)
        batches, tuning = partial(_batch, config, data, run, name), _tuning(config, name)
        held_out = split((_shown(config, name, images, keys), targets), AT_ONCE)
        how: dict[str, Any] = {"keeper": keeper, "beside": partial(_candidates, policy)}
        how["validate"] = partial(held_out_scores, policy, _reward(config), held_out, config.seed)
        tune_on_reward(run, name, much, policy, reward, batches, tuning, optimizer, average, reference, **how)


def _candidates(policy: SequentialDetector, made: Decisions, scored: Scored, targets: Boxes) -> dict[str, Tensor]:
    return candidate_losses(made.extras, scored.actions, targets, policy.side, policy.reach)


def _batch(config: Config, data: Detections, run: Run, part: str, step: int) -> tuple[Tree, Boxes]:
    """Images of a step, other than digits zoomed and half of them mirrored, with places to look at; and their boxes."""
    here = run.rows(config.batch)
    rows = noise.examples(config.seed, step, config.batch, len(data))[here].to(run.device)
    keys = noise.key(config.seed, part, "view", step, torch.arange(config.batch)[here]).to(run.device)
    # of rendered digits there are views enough
    images, boxes = chosen(data, rows) if config.data == "digits" else views(data, rows, keys)
    if part in SUPERVISED:  # as many walks, each by other places
        keys = noise.fold(keys[:, None], torch.arange(config.samples, device=keys.device)).flatten()
        images, boxes = repeat(images, config.samples), repeat(boxes, config.samples)
    return _shown(config, part, images, keys, boxes), boxes


def evaluate(config: Config, policy: SequentialDetector, run: Run, elsewhere: bool = False) -> Evaluation:
    """COCO's metrics of greedy walks on the test split, in [0, 1], and how many boxes and glimpses they take.

    Baselines: `mle`, candidates at random places before anything else was learned; `control`, the same for longer;
    `random` and `raster`, as much longer at random places, or at places row after row, with emission learned likewise;
    `all`, the agent's own walks with every candidate emitted. They take all glimpses, but for the last.
    """
    data = _data(config, "test")
    if elsewhere and data.classes != config.classes:
        raise InputError(f"data: its classes are {', '.join(data.classes)}; the agent knows {config.classes}")
    metrics, curve, walk = _score(config, policy, PART, data)
    if config.skip_bad:
        metrics["left_out"] = float(sum(_data(config, part).skipped for part in ("train", "val", "test")))
    objects = data.boxes.wanted.sum(1)
    baselines, series = {}, {"agent": curve}
    for row, part in ROWS.items():
        other = _detector(config, row).to(run.device)
        if run.restore(part, other):
            baselines[row], series[row], _ = _score(config, other.eval(), row, data)
    curves = {"map against glimpses": series}
    for name, number in (("glimpses", walk.mask.sum(1)), ("boxes", walk.found.mask.sum(1))):
        means = [(float(n), float(number[objects == n].float().mean())) for n in objects.unique().tolist() if n]
        curves[f"{name} against objects in the image"] = {"agent": means}
    return Evaluation(metrics, baselines, curves)


def _walks(config: Config, policy: SequentialDetector, part: str, data: Detections, greedy: bool) -> Walk:
    found = []
    for rows in torch.arange(len(data), device=policy.where.weight.device).split(AT_ONCE):
        keys = noise.key(config.seed, "evaluation", rows)
        found.append(policy.sample(_shown(config, part, chosen(data, rows)[0], keys), 1, greedy, keys))
    return map_tree(lambda leaf: leaf.cpu(), concatenate(found, 0))


def _score(
    config: Config, policy: SequentialDetector, part: str, data: Detections
) -> tuple[dict[str, float], list[tuple[float, float]], Walk]:
    """Metrics, mAP by the number of glimpses, and greedy walks."""
    walk, drawn = (_walks(config, policy, part, data, greedy) for greedy in (True, False))
    count, curve = len(data.classes), []
    for step in range(1, config.glimpses + 1):
        few = replace(walk.found, mask=walk.found.mask & (torch.arange(config.glimpses) < step))
        found = corpus_average_precision(few, data.boxes, count)
        curve.append((float(step), found["map"]))
    sampled = corpus_average_precision(drawn.found, data.boxes, count)["map"]
    scores = {"map": found["map"], "ap50": found["map50"], "sampled_map": sampled, **set_scores(walk.found, data.boxes)}
    scores |= own_score(config.reward, REWARDS, walk.found, data.boxes, config.skip_bad)
    scores["count_error"] = float((walk.found.mask.sum(1) - data.boxes.wanted.sum(1)).abs().float().mean())
    scores["glimpses"] = float(walk.mask.sum(1).float().mean())
    return scores, curve, walk


def compared(config: Config, policy: SequentialDetector, run: Run, images: int) -> tuple[Reward, Tensor, Boxes]:
    """The reward, and the first test images with their boxes: for `foveate analyse`."""
    test = _data(config, "test")
    return _reward(config), *chosen(test, torch.arange(min(images, len(test)), device=run.device))


def predict(config: Config, policy: SequentialDetector, images: Pictures) -> dict[str, Tensor]:
    """Walk over images in [0, 1].

    Returns `boxes` [batch, glimpses, 4] in pixels of the images, `labels` and `scores`, `mask` true where the candidate
    of a glimpse was emitted, `taken` where a glimpse was, and its place, `locations` [batch, glimpses, 2].

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    height, width = images.shape[2:]
    side = config.image_size
    seen = F.interpolate(images.to(policy.where.weight.device), (side, side), mode="bilinear", antialias=True)
    keys = torch.zeros(len(images), dtype=torch.int64, device=seen.device)  # greedy: nothing is drawn
    walk = policy.sample(seen, 1, True, keys)
    scale = walk.boxes.new_tensor([width, height, width, height]) / side
    found = {"labels": walk.labels, "scores": walk.scores, "mask": walk.found.mask, "taken": walk.mask}
    return found | {"boxes": walk.boxes * scale, "locations": walk.places.clamp(-1, 1)}


def picture(config: Config, policy: SequentialDetector, run: Run, images: Pictures | None = None) -> dict[str, Any]:
    """Walks over test pictures beside the true boxes, or over pictures of the user; the first one as an animation."""
    truth = None
    if images is None:
        test = _data(config, "test")
        images, truth = chosen(test, torch.arange(min(8, len(test)), device=run.device))
    elif images.shape[-1] != images.shape[-2]:  # the retina's squares are those of the square it looks at
        side = max(images.shape[-2:])
        images = F.interpolate(images, (side, side), mode="bilinear")
    walk = {name: value.cpu() for name, value in predict(config, policy, images).items()}
    found = Boxes(walk["boxes"], walk["labels"], walk["mask"], walk["scores"])
    patch = round(config.patch * images.shape[-1] / config.image_size)
    retina, classes = (patch, config.scales), config.classes or ()
    path, first = walk["locations"][0][walk["taken"][0]], split(found, 1)[0]
    frames = pictures.glimpse_frames(images[0].cpu(), path, *retina, found=first, classes=classes)
    walks = pictures.box_walks(images.cpu(), walk["locations"], walk["taken"], found, classes, *retina, truth=truth)
    return {"walks": walks, "first walk": frames}


def read(config: Config, path: Path) -> Pictures:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with their boxes."""
    data = _data(config, "train")
    images, boxes = chosen(data, torch.linspace(0, len(data) - 1, min(8, len(data))).long())
    return {"data": pictures.box_grid(images, {"truth": boxes}, data.classes, columns=4)}
