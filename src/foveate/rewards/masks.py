"""Rewards of segmentation: IoU, Dice and boundary F of masks, class by class and as their mean.

Predictions and targets are bool [batch, classes, height, width]; a single mask has one class. `total` is the mean of
the classes that are in the prediction or in the target of that image, in [0, 1]; 1 if none is in either. `parts` are
those of each class, "class0" and so on, and 1 where it is in neither. Pixels that nobody labelled are left out by
clearing them in both.

To corpus metrics: mean IoU over a data set divides sums over all images, this is the mean of quotients of single
images; large objects weigh less in it. DAVIS' J and F are the means over frames that stand here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.types import RewardOutput

Masks = Bool[Tensor, "batch classes height width"]


def iou_reward(predictions: Masks, targets: Masks) -> RewardOutput:
    """TP / (TP + FP + FN) of the pixels, of each class and the mean over those that are in either mask.

    Its mean over a data set weighs every image alike. The mIoU of VOC and Cityscapes divides sums over all images, in
    which large objects count more: the two may rank models differently.
    """
    both, either = (predictions & targets).sum((2, 3)), (predictions | targets).sum((2, 3))
    return _mean(torch.where(either > 0, both / either.clamp(min=1), 1.0), either > 0)


def dice_reward(predictions: Masks, targets: Masks) -> RewardOutput:
    """2 TP / (2 TP + FP + FN) of the pixels: the F1 score; a rising function of IoU, kinder to half a match."""
    both, sizes = (predictions & targets).sum((2, 3)), predictions.sum((2, 3)) + targets.sum((2, 3))
    return _mean(torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0), sizes > 0)


def iou_effects(predictions: Masks, targets: Masks) -> Float[Tensor, "batch classes height width"]:
    """What the label of each pixel adds to the IoU of its class: IoU as it is, less IoU with that one pixel flipped.

    A mask is thousands of decisions that share one score; this tells each its own part, in closed form. If the pixels
    of a mask are drawn independently, each with its probability π, then the advantage of the drawn label a,

        (1 - π(a)) · effect  =  R - E over that pixel's label of R, the others as they are,

    has the largest baseline that does not look at the pixel's own label, so that Σ ∇log π(a) · advantage is unbiased
    for ∇E[R] and has far less variance than with one advantage for the whole mask.
    """
    return _effects(predictions, targets, lambda right, wrong: _share(right, right + wrong))


def dice_effects(predictions: Masks, targets: Masks) -> Float[Tensor, "batch classes height width"]:
    """As `iou_effects`, for Dice (F1)."""
    return _effects(predictions, targets, lambda right, wrong: _share(2 * right, 2 * right + wrong))


def effects_on_total(
    output: RewardOutput, effects: Float[Tensor, "batch classes height width"], predictions: Masks, targets: Masks
) -> Float[Tensor, "batch classes height width"]:
    """What the label of each pixel adds to `total`, the mean of the classes, given what it adds to its own class.

    Exact also where a flip makes a class appear or vanish: a single pixel of a class that is not in the target counts
    as a class that was missed.

    Args:
        output: of the reward whose effects are given.
        effects: of `iou_effects` or `dice_effects`.
        predictions: masks.
        targets: masks.
    """
    each = torch.stack(list(output.parts.values()), 1)[:, :, None, None]
    wanted, found = targets.sum((2, 3), keepdim=True), predictions.sum((2, 3), keepdim=True)
    there = wanted + found > 0
    stays = wanted + found + torch.where(predictions, -1, 1) > 0
    number = there.sum(1, keepdim=True)
    others, left = (each * there).sum(1, keepdim=True) - each * there, number - there.int()
    flipped = (others + (each - effects) * stays) / (left + stays.int()).clamp(min=1)
    flipped = torch.where(left + stays.int() > 0, flipped, 1.0)
    # where no class comes or goes there is no need to subtract numbers that are nearly equal
    return torch.where(stays == there, effects / number.clamp(min=1), output.total[:, None, None, None] - flipped)


def credited(name: Literal["dice", "iou"], exclusive: bool = False) -> Callable[[Masks, Masks], RewardOutput]:
    """The reward of this name with the credit of every pixel, to be tuned on: `foveate.tune(..., credit="flip")`.

    `credit` is [batch, classes · height · width], what each label adds to `total`. Of `exclusive` classes it is
    [batch, height · width], what a pixel adds to leaving it to the background, for `credit="difference"`.
    """
    score, effects = {"dice": (dice_reward, dice_effects), "iou": (iou_reward, iou_effects)}[name]

    def reward(predictions: Masks, targets: Masks) -> RewardOutput:
        output = score(predictions, targets)
        credit = effects_on_total(output, effects(predictions, targets), predictions, targets)
        if exclusive:
            credit = (credit * predictions).sum(1)
        return replace(output, credit=credit.flatten(1))

    return reward


def _effects(predictions: Masks, targets: Masks, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """By counts of right pixels (TP) and wrong ones (FP + FN), of which a flip changes each by one at most."""
    right = (predictions & targets).sum((2, 3), keepdim=True).float()
    wrong = (predictions ^ targets).sum((2, 3), keepdim=True).float()
    now = score(right, wrong)
    if_flipped = torch.where(
        targets,
        torch.where(predictions, score(right - 1, wrong + 1), score(right + 1, wrong - 1)),
        torch.where(predictions, score(right, wrong - 1), score(right, wrong + 1)),
    )
    return now - if_flipped


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)


def boundary_reward(predictions: Masks, targets: Masks, tolerance: int | None = None) -> RewardOutput:
    """F1 of the outlines: precision and recall of boundary pixels within `tolerance` pixels of the other outline.

    Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for video object segmentation", section 4,
    as their published code computes it (without the bipartite matching that it approximates).

    Args:
        predictions: masks.
        targets: masks.
        tolerance: radius of the disk; None: 0.8 % of the image's diagonal, rounded up.
    """
    if tolerance is None:
        tolerance = math.ceil(0.008 * math.hypot(*predictions.shape[2:]))
    outlines, others = _outline(predictions), _outline(targets)
    found, wanted = outlines.sum((2, 3)), others.sum((2, 3))
    right = (outlines & _grown(others, tolerance)).sum((2, 3))
    hit = (others & _grown(outlines, tolerance)).sum((2, 3))
    # without an outline nothing said is wrong, and nothing wanted is missed
    precision = torch.where(found > 0, right / found.clamp(min=1), 1.0)
    recall = torch.where(wanted > 0, hit / wanted.clamp(min=1), 1.0)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return _mean(score, predictions.any(3).any(2) | targets.any(3).any(2))


def _mean(each: Float[Tensor, "batch classes"], there: Bool[Tensor, "batch classes"]) -> RewardOutput:
    count = there.sum(1)
    total = torch.where(count > 0, (each * there).sum(1) / count.clamp(min=1), 1.0)
    return RewardOutput(total, {f"class{place}": values for place, values in enumerate(each.unbind(1))})


def _outline(masks: Masks) -> Masks:
    """Pixels that differ from the one to the right, below, or below to the right."""
    beyond = F.pad(masks.float(), (0, 1, 0, 1), mode="replicate").bool()
    right, below, diagonal = beyond[..., :-1, 1:], beyond[..., 1:, :-1], beyond[..., 1:, 1:]
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def _grown(masks: Masks, radius: int) -> Masks:
    """Every pixel within a disk around one that is set."""
    steps = torch.arange(-radius, radius + 1, device=masks.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()[None, None]
    return (F.conv2d(masks.flatten(0, 1)[:, None].float(), disk, padding=radius) > 0.5).view(masks.shape)
