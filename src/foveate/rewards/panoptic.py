"""Rewards of panoptic segmentation: every pixel belongs to one segment, every segment to a class.

Kirillov et al. 2019, "Panoptic segmentation", section 4, with the treatment of void and crowd of their published code
(panopticapi). A predicted and a true segment match if they are of one class and their IoU is *above* 0.5, which pairs
each with one other at most. Pixels of the prediction that nobody labelled do not count against it, and a predicted
segment that lies to more than half in void and crowd of its class is no false positive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.geometry import Segments
from foveate.rewards.combine import load_reward
from foveate.rewards.telling import check_tells_apart
from foveate.types import InputError, RewardOutput, split

CACHED = 2**18  # pixels whose segments are counted together: what is read of them again is still near the processor


@dataclass(frozen=True)
class _Matches:
    """Of every pair and segment: IoU of the matched pairs, the class of each, and who is right, wrong and missed."""

    ious: Float[Tensor, "batch predicted true"]
    right: Bool[Tensor, "batch predicted true"]
    wrong: Bool[Tensor, "batch predicted"]
    missed: Bool[Tensor, "batch true"]


def panoptic_quality(predictions: Segments, targets: Segments) -> RewardOutput:
    """PQ of each image, the mean over the classes that are in it, in [0, 1]; 1 if none is.

    PQ_c = Σ IoU of the matched pairs / (TP + FP / 2 + FN / 2), as panopticapi gives it for that image alone. `parts`:
    "sq", the mean over classes of the mean IoU of matched pairs (0 for a class without), "rq", the mean of
    TP / (TP + FP / 2 + FN / 2), and the counts "tp", "fp", "fn" of the image. Class by class PQ = SQ · RQ; of the means
    that is not so.

    To the corpus metric: PQ of a data set sums IoU and counts of each class over all images before it divides
    (`corpus_quality`), so the mean of this over images is another number; `matched_less_unmatched` adds up.

    Raises:
        InputError: an id without a segment.
    """
    found = _match(predictions, targets)
    classes = torch.cat((predictions.labels, targets.labels), 1)
    own = (classes[:, :, None] == predictions.labels[:, None]).float()
    true = (classes[:, :, None] == targets.labels[:, None]).float()
    # a matched pair is of one class, that of its predicted segment
    told = torch.stack((found.right.any(2).float(), (found.right * found.ious).sum(2), found.wrong.float()), 2)
    matched, overlap, wrong = (own @ told).unbind(2)
    size = matched + (wrong + (true @ found.missed.float()[..., None]).squeeze(2)) / 2
    # every class is counted once: at the first place where it stands
    same = (classes[:, :, None] == classes[:, None]).tril(-1)
    first = (size > 0) & ~(same & (size > 0)[:, None]).any(2)
    quality, recognition = overlap / size.clamp(min=0.5), matched / size.clamp(min=0.5)
    segmentation = overlap / matched.clamp(min=1)
    count = first.sum(1)

    def mean(each: Tensor) -> Tensor:
        return torch.where(count > 0, (each * first).sum(1) / count.clamp(min=1), 1.0)

    parts = {"sq": mean(segmentation), "rq": mean(recognition), **_counts(found)}
    return RewardOutput(mean(quality), parts)


def matched_less_unmatched(predictions: Segments, targets: Segments, unmatched: float = 0.5) -> RewardOutput:
    """Σ IoU of the matched pairs - unmatched · (FP + FN): the form of PQ that adds up over segments and images.

    Pinto et al. 2023, "Tuning computer vision models with task rewards", section 4.1, tune this in place of PQ, whose
    numerator and denominator it brings together. `parts`: "overlap", the sum of IoU, and the counts "tp", "fp", "fn":
    total = overlap - unmatched · (fp + fn).
    """
    found = _match(predictions, targets)
    overlap = (found.ious * found.right).sum((1, 2))
    counts = _counts(found)
    return RewardOutput(overlap - unmatched * (counts["fp"] + counts["fn"]), {"overlap": overlap, **counts})


def class_sums(predictions: Segments, targets: Segments, classes: int) -> Float[Tensor, "4 classes"]:
    """Σ IoU of the matched pairs, TP, FP and FN of each class over a batch: add these up over all batches.

    Raises:
        InputError: an id without a segment.
    """
    found = _match(predictions, targets)
    pairs = targets.labels[:, None].expand_as(found.right), found.right
    places = (
        (*pairs, found.ious),
        (*pairs, torch.ones_like(found.ious)),
        (predictions.labels, found.wrong, torch.ones_like(found.wrong, dtype=torch.float)),
        (targets.labels, found.missed, torch.ones_like(found.missed, dtype=torch.float)),
    )
    return torch.stack([labels[mask].bincount(values[mask], classes).float() for labels, mask, values in places])


def corpus_quality(sums: Float[Tensor, "4 classes"]) -> dict[str, float]:
    """PQ, SQ and RQ of a data set from its `class_sums`, in [0, 1]: means over the classes that occur or are claimed.

    As panopticapi's `pq_average`: a class without a match has an SQ of 0. All are 0 if there is no class.
    """
    overlap, matched, wrong, missed = sums
    size = matched + (wrong + missed) / 2
    there = size > 0
    each = {
        "pq": overlap / size.clamp(min=0.5),
        "sq": overlap / matched.clamp(min=1),
        "rq": matched / size.clamp(min=0.5),
    }
    return {name: float((value * there).sum() / there.sum().clamp(min=1)) for name, value in each.items()}


def check_tells_maps(name: str, known: Iterable[str], drawn: Tensor, targets: Segments) -> None:
    """`check_tells_apart` of a reward of panoptic maps, unless it is a known one: true ones, and maps of nothing."""
    if name in known:
        return
    right = replace(targets, crowd=None)
    check_tells_apart(load_reward(name), name, drawn, right, replace(right, ids=torch.zeros_like(right.ids)), targets)


def _counts(found: _Matches) -> dict[str, Tensor]:
    sums = {"tp": found.right.sum((1, 2)), "fp": found.wrong.sum(1), "fn": found.missed.sum(1)}
    return {name: count.float() for name, count in sums.items()}


def _match(predictions: Segments, targets: Segments) -> _Matches:
    shared = _intersections(predictions, targets)
    sizes, true_sizes = shared.sum(2)[:, 1:], shared.sum(1)[:, 1:]
    in_void, pairs = shared[:, 1:, 0], shared[:, 1:, 1:]
    union = sizes[:, :, None] + true_sizes[:, None] - pairs - in_void[:, :, None]
    same = predictions.labels[:, :, None] == targets.labels[:, None]
    crowd = torch.zeros_like(targets.labels, dtype=torch.bool) if targets.crowd is None else targets.crowd
    ious = pairs / union.clamp(min=1)
    right = same & ~crowd[:, None] & (ious > 0.5)
    excused = in_void + (pairs * (same & crowd[:, None])).sum(2)
    wrong = (sizes > 0) & ~right.any(2) & (2 * excused <= sizes)
    missed = (true_sizes > 0) & ~crowd & ~right.any(1)
    return _Matches(ious, right, wrong, missed)


def _intersections(predictions: Segments, targets: Segments) -> Float[Tensor, "batch predicted true"]:
    """How many pixels each predicted segment shares with each true one; place 0 is void."""
    counts = predictions.labels.shape[1] + 1, targets.labels.shape[1] + 1
    few = max(1, CACHED // max(1, predictions.ids[:1].numel()))
    return torch.cat([_shared(*some, *counts) for some in split((predictions.ids, targets.ids), few)])


def _shared(ids: Tensor, true_ids: Tensor, count: int, true_count: int) -> Float[Tensor, "batch predicted true"]:
    size = len(ids) * count * true_count
    kind = torch.int32 if size < 2**31 else torch.int64  # half the bytes are a quarter of the time
    ids, true_ids = ids.to(kind), true_ids.to(kind)  # beyond 32 bits they wrap; segments' numbers are far below
    for name, found, most in ("predictions", ids, count), ("targets", true_ids, true_count):
        low, high = (int(end) for end in found.aminmax())
        if not 0 <= low <= high < most:
            raise InputError(
                f"{name}: found ids from {low} to {high}, but {most - 1} labels: give every segment a label, number "
                "them from 1, and void pixels 0"
            )
    image = torch.arange(0, size, count * true_count, dtype=kind, device=ids.device)[:, None, None]
    place = torch.add(true_ids, ids, alpha=true_count).add_(image)
    return torch.bincount(place.flatten(), minlength=size).view(-1, count, true_count).float()
