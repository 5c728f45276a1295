"""Sets of boxes whatever their reward: what each box is worth to its set, and how good sets are at one threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.geometry import Boxes
from foveate.rewards.boxes import DetectionReward, matched_iou
from foveate.rewards.combine import guarded, load_reward
from foveate.rewards.telling import check_tells_apart
from foveate.types import RewardOutput, map_tree


def without_each(
    reward: Callable[[Boxes, Boxes], RewardOutput], at_once: int = 4096
) -> Callable[[Boxes, Boxes], RewardOutput]:
    """The same reward, with `credit` [batch, boxes]: its total less that of the set without the box; 0 for padding.

    The difference rewards of Wolpert and Tumer 2002, "Optimal payoff functions for members of collectives". Where a set
    is made of independent decisions, box or none, each weighed by its own difference, the expected gradient is that of
    the reward: what the set is worth without a decision does not depend on it.

    The reward is asked once more for every box, for sets of all images in one batch.

    Args:
        reward: of (predictions, targets).
        at_once: sets in a batch at most.
    """

    def credited(predictions: Boxes, targets: Boxes) -> RewardOutput:
        output = reward(predictions, targets)
        small, places = _together(predictions)
        credit = torch.zeros_like(small.mask, dtype=output.total.dtype)
        for row, box in zip(*(part.split(at_once) for part in small.mask.nonzero(as_tuple=True)), strict=True):
            rest, wanted = (map_tree(lambda leaf, row=row: leaf[row], tree) for tree in (small, targets))
            rest = replace(rest, mask=rest.mask.scatter(1, box[:, None], False))
            credit[row, box] = output.total[row] - reward(rest, wanted).total
        own = torch.zeros_like(predictions.mask, dtype=credit.dtype).scatter(1, places, credit)
        return replace(output, credit=own)

    return credited


def _together(boxes: Boxes) -> tuple[Boxes, Int[Tensor, "batch few"]]:
    """The sets with as little padding as fits all, and where each of their places was."""
    most = int(boxes.mask.sum(1).max()) if boxes.mask.numel() else 0
    places = boxes.mask.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]

    def take(leaf: Tensor) -> Tensor:
        index = places.view(*places.shape, *(1,) * (leaf.ndim - 2))
        return leaf.gather(1, index.expand(-1, -1, *leaf.shape[2:]))

    return map_tree(take, boxes), places


def box_by_box(reward: Callable[[Boxes, Boxes], RewardOutput]) -> Callable[[Boxes, Boxes], RewardOutput]:
    """The same reward, with `credit` [batch, boxes]: what each box adds to those before it; 0 for padding.

    They sum to the total less that of no box. Of a text's boxes it is the gain of what was written there, and of an
    agent's that of the step (Ng et al. 1999, "Policy invariance under reward transformations").

    The reward is asked for the first 0, 1, ..., count boxes of all images in one batch.
    """

    def credited(predictions: Boxes, targets: Boxes) -> RewardOutput:
        count = predictions.mask.shape[1]
        first = torch.ones(count + 1, count, dtype=torch.bool, device=predictions.mask.device).tril(-1)
        several = (map_tree(lambda leaf: leaf.repeat_interleave(count + 1, 0), each) for each in (predictions, targets))
        sets, wanted = several
        output = reward(replace(sets, mask=sets.mask & first.repeat(len(predictions.mask), 1)), wanted)
        whole = map_tree(lambda leaf: leaf[count :: count + 1], output)
        return replace(whole, credit=output.total.view(-1, count + 1).diff(dim=1))

    return credited


def check_tells_boxes(name: str, known: Iterable[str], drawn: Tensor, targets: Boxes) -> None:
    """`check_tells_apart` of a reward of sets, unless it is a known one: the true boxes, the next image's, and none."""
    if name in known:
        return
    right = replace(targets, mask=targets.wanted, crowd=None, scores=torch.ones_like(targets.boxes[..., 0]))
    none = replace(right, mask=torch.zeros_like(right.mask))
    check_tells_apart(load_reward(name), name, drawn, right, none, targets)


def placing_loss(chosen: Boxes, placed: Float[Tensor, "batch count 4"], targets: Boxes) -> Float[Tensor, ""]:
    """A loss beside the reward that moves the boxes that were chosen: minus twice their IoU with what they match.

    The mean over COCO's thresholds is a staircase of a match's IoU whose slope is 2 above 0.5: so this is a smooth
    stand-in for what a better place of a match gains, where drawing boxes would only estimate it. It is not the
    gradient of the reward: classes weigh alike, and a duplicate is moved to its target as well, which the reward does
    not pay for.

    Args:
        chosen: the sets.
        placed: their boxes, with the graph.
        targets: what they should be.
    """
    return -2 * matched_iou(replace(chosen, boxes=placed), targets).sum(1).mean()


def set_scores(boxes: Boxes, targets: Boxes, threshold: float = 0.5) -> dict[str, float]:
    """Precision, recall and F1 of sets over all images together, in [0, 1]; scores of boxes are not looked at.

    A match is the best of the boxes whose IoU with a target of their class is above the threshold; the others at that
    target count against precision, as those at no target do. Without any box and any target all are 1.
    """
    parts = DetectionReward(thresholds=(threshold,))(boxes, targets).parts
    names = ("matches", "duplicates", "false_positives", "misses")
    right, double, wrong, missed = (float(parts[f"{name}@{threshold:g}"].sum()) for name in names)

    def share(good: float, bad: float) -> float:
        return good / (good + bad) if good + bad else 1.0

    return {
        "f1": share(2 * right, double + wrong + missed),
        "precision": share(right, double + wrong),
        "recall": share(right, missed),
    }


def own_score(name: str, known: Iterable[str], boxes: Boxes, targets: Boxes, skip_bad: bool) -> dict[str, float]:
    """What sets have of a reward of the user's own, "reward", the mean over images; nothing if it is a known one.

    With `skip_bad` images on which it fails are left out of the mean.
    """
    if name in known:
        return {}
    found = guarded(load_reward(name, known), skip_bad, name)(boxes, targets)
    return {"reward": float((found.total if found.skipped is None else found.total[~found.skipped]).mean())}


def above(boxes: Boxes, level: float) -> Boxes:
    """The boxes that have at least this score."""
    assert boxes.scores is not None
    return replace(boxes, mask=boxes.mask & (boxes.scores >= level))


def best_level(boxes: Boxes, targets: Boxes) -> float:
    """The score, of 0.05 to 0.95, from which on boxes are kept for the best F1 of their sets."""
    return max((level / 20 for level in range(1, 20)), key=lambda level: set_scores(above(boxes, level), targets)["f1"])
