"""DAVIS' scores of a mask carried through a video: region similarity J and boundary accuracy F.

Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for video object segmentation", sections 4 and 5.
As in their code for methods that are given the first mask, the first and the last frame of a sequence are not scored.
A statistic of the frames of each sequence is averaged over the sequences, short and long alike:

- mean; recall: the share of frames above 0.5; decay: the mean of the first quarter of the frames less that of the last.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.rewards.masks import boundary_reward, iou_reward

Masks = Bool[Tensor, "videos time height width"]


def overlap(predictions: Masks, targets: Masks) -> Float[Tensor, "videos time"]:
    """J: the IoU of every frame, in [0, 1]; 1 if both masks are empty."""
    flat = predictions.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
    return iou_reward(*flat).total.view(predictions.shape[:2])


def accuracy(predictions: Masks, targets: Masks) -> Float[Tensor, "videos time"]:
    """F: F1 of the outlines of every frame, in [0, 1] (`foveate.rewards.masks.boundary_reward`)."""
    flat = predictions.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
    return boundary_reward(*flat).total.view(predictions.shape[:2])


def davis_scores(
    predictions: Masks, targets: Masks, lengths: Int[Tensor, " videos"], boundary: bool = True
) -> dict[str, float]:
    """Means over sequences: "j", "f", their mean "jf", "j_recall", "j_decay", "f_recall", "f_decay".

    Args:
        predictions: masks; what comes after the length of a video is not looked at.
        targets: true masks.
        lengths: frames of each video. If it has fewer than three, all after the first are scored.
        boundary: also F, which takes longer.
    """
    frames = {"j": overlap(predictions, targets)}
    if boundary:
        frames["f"] = accuracy(predictions, targets)
    found: dict[str, float] = {}
    for name, values in frames.items():
        rows = []
        for row, length in zip(values, lengths.tolist(), strict=True):
            scored = row[1 : max(2, length - 1)]
            rows.append((float(scored.mean()), float((scored > 0.5).float().mean()), decay(scored)))
        mean, recall, fall = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        found |= {name: mean, f"{name}_recall": recall, f"{name}_decay": fall}
    return found | ({"jf": (found["j"] + found["f"]) / 2} if boundary else {})


def decay(values: Float[Tensor, " time"]) -> float:
    """Mean of the first quarter less that of the last; neighbouring quarters share a frame, as in their code."""
    edges = (torch.linspace(1, len(values), 5, dtype=torch.float64) + 1e-10).round().long() - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return float(first.mean() - last.mean())
