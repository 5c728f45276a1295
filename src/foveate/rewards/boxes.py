"""Rewards of detection: what a set of boxes is worth, told box by box.

All are functions of (predictions, targets), both `foveate.geometry.Boxes`, on any device, without a loop over images. A
box of a class counts for targets of that class only. Crowds are neither to be found nor to be blamed for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.geometry import Boxes, overlaps
from foveate.types import InputError, RewardOutput, map_tree

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # COCO's
RECALLS = 101  # at so many recalls COCO reads the precision, 0 to 1
MOST = 100  # detections a class and image that COCO looks at


def iou_reward(predictions: Boxes, targets: Boxes) -> RewardOutput:
    """How well each target is covered by the box of its class that covers it best: mean IoU over targets, in [0, 1].

    For one object an image, one box, it is their IoU. Further boxes cost nothing: see `DetectionReward`. An image
    without targets scores 1 if nothing is predicted there, else 0.

    Over a data set its mean weighs every image alike, and it knows neither scores nor false positives: it is no mAP. It
    rises with recall at any threshold, as a mean over all thresholds from 0 to 1 of the share of targets that are found
    (boxes may be found by one prediction together).
    """
    predictions, targets = _padded(predictions, targets)
    wanted = targets.wanted
    best = _same_class(predictions, targets).amax(1)
    mean = best.sum(1) / wanted.sum(1).clamp(min=1)
    return RewardOutput(torch.where(wanted.any(1), mean, (~predictions.mask.any(1)).to(mean)))


@dataclass(frozen=True)
class DetectionReward:
    """Matches less duplicates, the mean over thresholds: recall and mAP as rewards that add up over boxes.

    Pinto et al. 2023, "Tuning computer vision models with task rewards", section 4.2. At a threshold each predicted box
    goes to the target of its class with which its IoU is largest, if it is *above* the threshold. Of several boxes at
    one target the best is a match, the others are duplicates; a box at no target is a false positive, a target without
    box a miss. With w the weight of the class,

        total = mean over thresholds of  Σ_matches w - duplicate · Σ_duplicates w - false_positive · Σ_false positives w

    `parts` are these sums and that of the misses, "matches@0.5" and so on, before the mean and without the signs.
    `credit` is what each predicted box adds to those before it, which sums to the total: of several boxes at one target
    the first gains the weight; or how much more the set is worth than without the box: the weight where it is alone at
    its target, the cost of a duplicate where it is not.

    To corpus metrics: at one threshold, without weights and penalties, the sum over images divided by the number of
    targets is the recall; the default, with class weights, stands for mAP, which does not add up over images: weights
    inverse to the classes' frequency do what its mean over classes does, duplicates cost because they cost precision.
    Boxes need no scores: their order is learned apart, as the expected IoU.

    Attributes:
        thresholds: of the IoU.
        duplicate: cost of a duplicate.
        false_positive: cost of a box at no target; the paper's reward has none, and lets boxes multiply.
        class_weights: a weight for each class (`class_weights`); None: 1.
        credited: what `credit` is.
    """

    thresholds: tuple[float, ...] = THRESHOLDS
    duplicate: float = 0.3
    false_positive: float = 0.0
    class_weights: Float[Tensor, " classes"] | None = None
    credited: Literal["gain", "difference"] = "gain"

    def __call__(self, predictions: Boxes, targets: Boxes) -> RewardOutput:
        """Score each image.

        Raises:
            InputError: a box of a class that has no weight.
        """
        predictions, targets = _padded(predictions, targets)
        ious, wanted = _same_class(predictions, targets), targets.wanted
        own, there = self._weights(predictions), self._weights(targets)
        best, place = ious.max(2, keepdim=True)
        at_target = torch.zeros_like(ious).scatter(2, place, best)  # [batch, boxes, targets]: one target a box
        in_crowd = _in_crowd(predictions, targets)
        parts: dict[str, Tensor] = {}
        total, credit = torch.zeros_like(own[:, 0]), torch.zeros_like(own)
        for threshold in self.thresholds:
            above = at_target > threshold
            match = (above & (above.cumsum(1) == 1)).any(2)  # all at a target weigh alike: any of them may be the match
            duplicate = above.any(2) & ~match
            wrong = predictions.mask & ~above.any(2) & ~(in_crowd > threshold)
            sums = {
                "matches": (match * own).sum(1),
                "duplicates": (duplicate * own).sum(1),
                "false_positives": (wrong * own).sum(1),
                "misses": (wanted & ~above.any(1)).mul(there).sum(1),
            }
            parts |= {f"{name}@{threshold:g}": value for name, value in sums.items()}
            gain = own * (match.to(own) - self.duplicate * duplicate - self.false_positive * wrong)
            total = total + gain.sum(1)
            if self.credited == "difference":
                doubled = (above & (above.sum(1, keepdim=True) > 1)).any(2)
                gain = torch.where(doubled, -self.duplicate * own, gain)
            credit = credit + gain
        number = len(self.thresholds)
        return RewardOutput(total / number, parts, credit[:, :-1] / number)

    def _weights(self, boxes: Boxes) -> Tensor:
        if self.class_weights is None:
            return torch.ones_like(boxes.boxes[..., 0])
        weights = self.class_weights.to(boxes.boxes)
        labels = torch.where(boxes.mask, boxes.labels, 0)
        if (strange := (labels < 0) | (labels >= len(weights))).any():
            found = f"found class {int(labels[strange][0])}, expected 0 to {len(weights) - 1}"
            raise InputError(f"labels: {found}: give class_weights a weight for each class, or correct the label")
        return weights[labels]


def matched_iou(predictions: Boxes, targets: Boxes, threshold: float = 0.5) -> Float[Tensor, "batch boxes"]:
    """IoU of each predicted box with the target of its class that it overlaps most; 0 at or below the threshold.

    What the confidence of a box is to expect (Pinto et al. 2023, section 4.2): duplicates count like the best.
    """
    predictions, targets = _padded(predictions, targets)
    best = _same_class(predictions, targets).amax(2)[:, :-1]
    return torch.where(best > threshold, best, 0.0)


def class_weights(counts: Int[Tensor, " classes"], smoothing: float = 0.05) -> Float[Tensor, " classes"]:
    """Weights inverse to smoothed frequency, with mean 1: w_c ∝ 1 / (n_c + smoothing · Σ n) (Pinto et al. 2023).

    Args:
        counts: targets of each class in the training set.
        smoothing: of what share of all targets a class that never occurs is taken to have.
    """
    weights = 1 / (counts + smoothing * counts.sum()).double()
    return (weights / weights.mean()).float()


def average_precision(predictions: Boxes, targets: Boxes, thresholds: tuple[float, ...] = THRESHOLDS) -> RewardOutput:
    """COCO's average precision of a scored set on its image alone, in [0, 1]; `parts` are that of each threshold.

    The mean over thresholds and over the classes *that have a target in the image*, as pycocotools' COCOeval gives it
    for that one image: boxes are taken by falling score, at most 100 a class, each goes to the target still free with
    which its IoU is largest, if it is *at or above* the threshold; precision is made to fall and read at 101 recalls.
    Boxes of other classes are not blamed. Where no class has a target COCOeval answers -1; here an image without
    targets scores 1 if nothing is predicted, else 0.

    To the corpus metric: mAP pools the boxes of all images before it draws the curve, so that the mean of this over
    images is another number, and ranks detectors alike in most cases but not always.

    Raises:
        InputError: predictions without scores.
    """
    predictions, targets = _padded(predictions, targets)
    matched, ignored, order = _match_by_score(predictions, targets, thresholds)
    wanted = targets.wanted
    labels = predictions.labels.gather(1, order)
    inside = predictions.mask.gather(1, order)
    same = targets.labels[:, :, None] == targets.labels[:, None]
    # a class is spoken for by its first target
    earlier = torch.ones_like(same[0]).tril(-1)
    speaks = wanted & ~(same & earlier & wanted[:, None]).any(2)
    size = (same & wanted[:, None]).sum(2)  # [batch, targets]: how many targets the class has
    member = (labels[:, None] == targets.labels[:, :, None]) & inside[:, None] & speaks[:, :, None]
    counted = member[:, None] & ~ignored[:, :, None]  # [batch, thresholds, classes, boxes]
    right = (counted & matched[:, :, None]).double().cumsum(-1)
    seen = counted.double().cumsum(-1)
    precision = torch.where(counted, right / seen.clamp(min=1), 0.0)
    falling = precision.flip(-1).cummax(-1).values.flip(-1)
    recall = right / size[:, None, :, None].clamp(min=1)
    grid = torch.linspace(0, 1, RECALLS, dtype=torch.float64, device=recall.device)
    reached = torch.searchsorted(grid, recall.contiguous(), right=True) * (counted & matched[:, :, None])
    reached = reached.cummax(-1).values
    gained = reached.diff(dim=-1, prepend=torch.zeros_like(reached[..., :1]))
    each = (falling * gained).sum(-1) / RECALLS  # [batch, thresholds, classes]
    scores = (each * speaks[:, None]).sum(-1) / speaks.sum(1, keepdim=True).clamp(min=1)
    empty = (~predictions.mask.any(1)).to(scores)
    scores = torch.where(wanted.any(1)[:, None], scores, empty[:, None]).to(predictions.boxes.dtype)
    parts = {f"precision@{threshold:g}": scores[:, place] for place, threshold in enumerate(thresholds)}
    return RewardOutput(scores.mean(1), parts)


def corpus_average_precision(predictions: Boxes, targets: Boxes, classes: int) -> dict[str, float]:
    """COCO's metrics of a whole data set, by faster-coco-eval, in [0, 1]; -1 where no target is left to be found.

    "map" over the ten thresholds, "map50" and "map75" at one, "ar1", "ar10", "ar100": recall with so many boxes an
    image, the mean over thresholds and classes. Each box of `predictions` needs a score.

    Args:
        predictions: all images in order.
        targets: the same images.
        classes: how many there are.

    Raises:
        InputError: predictions without scores, or no target in any image.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if predictions.scores is None:
        raise InputError(
            "predictions: found boxes without scores, expected how sure the detector is of each: give scores"
        )
    if not targets.mask.any():
        raise InputError("targets: found no box in any image, expected some to be found; score other images")
    entries = _entries(targets)
    truth = COCO(
        {
            "images": [{"id": row} for row in range(len(targets.mask))],
            "annotations": [{**entry, "id": place + 1} for place, entry in enumerate(entries)],
            "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        }
    )
    judge = COCOeval_faster(truth, truth.loadRes(_entries(predictions) or [_NOTHING]), "bbox", print_function=_silent)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    names = {"map": 0, "map50": 1, "map75": 2, "ar1": 6, "ar10": 7, "ar100": 8}
    return {name: float(judge.stats[place]) for name, place in names.items()}


_NOTHING = {"image_id": 0, "category_id": 0, "bbox": [0.0, 0.0, 0.0, 0.0], "score": 0.0}  # an empty list is refused


def _silent(*_: object) -> None:
    """faster-coco-eval prints a table of what it found."""


def _entries(boxes: Boxes) -> list[dict[str, Any]]:
    """COCO's JSON of boxes, one by one: this is for evaluation, not for training."""
    row, place = boxes.mask.nonzero(as_tuple=True)
    corners = boxes.boxes[row, place].double()
    sides = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), 1).tolist()
    scores = [0.0] * len(row) if boxes.scores is None else boxes.scores[row, place].tolist()
    crowd = [False] * len(row) if boxes.crowd is None else boxes.crowd[row, place].tolist()
    columns = zip(row.tolist(), boxes.labels[row, place].tolist(), sides, scores, crowd, strict=True)
    return [
        {
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": int(group),
        }
        for image, label, box, score, group in columns
    ]


def _match_by_score(
    predictions: Boxes, targets: Boxes, thresholds: tuple[float, ...]
) -> tuple[Bool[Tensor, "batch thresholds boxes"], Bool[Tensor, "batch thresholds boxes"], Int[Tensor, "batch boxes"]]:
    """COCOeval's matching: which boxes, by falling score, found a target and which are not counted; and their order."""
    if predictions.scores is None:
        raise InputError(
            "predictions: found boxes without scores, expected how sure the detector is of each: give scores"
        )
    scores = predictions.scores.masked_fill(~predictions.mask, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    labels, inside = predictions.labels.gather(1, order), predictions.mask.gather(1, order)
    boxes = predictions.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    ious = overlaps(boxes.double(), targets.boxes.double(), targets.crowd)  # as exact as COCOeval's at a threshold
    same = (labels[..., None] == targets.labels[:, None]) & inside[..., None] & targets.mask[:, None]
    rank = ((labels[:, :, None] == labels[:, None]) & inside[:, None]).tril(-1).sum(2)
    same = same & (rank < MOST)[..., None]
    crowd = torch.zeros_like(targets.mask) if targets.crowd is None else targets.crowd
    limits = ious.new_tensor(thresholds)[:, None]
    free = (targets.mask & ~crowd)[:, None].expand(-1, len(thresholds), -1)
    matched, ignored = [], []
    for box in range(ious.shape[1]):
        iou, mine = ious[:, box, None], same[:, box, None]
        reaches = mine & (iou >= limits)
        possible = torch.where(reaches & free, iou, -1.0)
        # of equal overlaps COCOeval takes the last
        best, place = possible.flip(-1).max(-1)
        place = possible.shape[-1] - 1 - place
        hit = best >= 0
        taken = torch.arange(possible.shape[-1], device=ious.device) == place[..., None]
        free = free & ~(taken & hit[..., None])
        matched.append(hit)
        ignored.append(~hit & (reaches & crowd[:, None]).any(-1))
    beyond = (rank >= MOST)[:, None]
    return torch.stack(matched, -1), torch.stack(ignored, -1) | beyond, order


def _same_class(predictions: Boxes, targets: Boxes) -> Float[Tensor, "batch boxes targets"]:
    """IoU where both are boxes of one class, and no crowd; 0 elsewhere."""
    same = predictions.labels[..., None] == targets.labels[:, None]
    same = same & predictions.mask[..., None] & targets.wanted[:, None]
    return torch.where(same, overlaps(predictions.boxes, targets.boxes), 0.0)


def _in_crowd(predictions: Boxes, targets: Boxes) -> Float[Tensor, "batch boxes"]:
    """Which part of a box lies in a crowd of its class."""
    if targets.crowd is None:
        return torch.zeros_like(predictions.boxes[..., 0])
    same = (predictions.labels[..., None] == targets.labels[:, None]) & (targets.mask & targets.crowd)[:, None]
    return torch.where(same, overlaps(predictions.boxes, targets.boxes, targets.crowd), 0.0).amax(2)


def _padded(*sets: Boxes) -> list[Boxes]:
    """With one more place that holds no box, so that there is a place in any case."""
    return [
        map_tree(lambda leaf: torch.cat((leaf, leaf.new_zeros((len(leaf), 1, *leaf.shape[2:]))), 1), boxes)
        for boxes in sets
    ]
