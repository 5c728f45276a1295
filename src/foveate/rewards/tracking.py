"""What tracking is scored by, from the official implementation: HOTA, MOTA, IDF1 and identity switches (TrackEval)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from foveate.geometry import Boxes, overlaps
from foveate.types import InputError

EXTRA = "pip install 'foveate[tracking]'"


def tracking_metrics(truth: Boxes, found: Boxes, sequences: Int[Tensor, " frames"]) -> dict[str, float]:
    """Score the tracks of several sequences as one.

    Luiten et al. 2021, "HOTA: a higher order metric for evaluating multi-object tracking"; Bernardin and Stiefelhagen
    2008 (MOTA); Ristani et al. 2016 (IDF1). MOTA and IDF1 match boxes from IoU 0.5 on.

    Args:
        truth: boxes of each frame, `labels` their identities, one sequence's own.
        found: a tracker's, likewise.
        sequences: number of the sequence of each frame.

    Returns:
        "hota", "deta" and "assa" (its parts: detection and association), "idf1" in [0, 1]; "mota", at most 1;
        "switches" of identity, a count.

    Raises:
        InputError: TrackEval is not installed.
    """
    try:
        from trackeval.metrics import CLEAR, HOTA, Identity
    except ImportError as error:
        raise InputError(f"trackeval: not installed, and HOTA is computed by it; {EXTRA}") from error
    kinds = {"HOTA": HOTA(), "CLEAR": CLEAR({"PRINT_CONFIG": False}), "Identity": Identity({"PRINT_CONFIG": False})}
    given = [_prepared(truth, found, (sequences == number).nonzero().flatten()) for number in sequences.unique()]
    scores: dict[str, Any] = {}
    for name, kind in kinds.items():
        scores[name] = kind.combine_sequences({str(row): kind.eval_sequence(data) for row, data in enumerate(given)})
    return {
        "hota": float(np.mean(scores["HOTA"]["HOTA"])),
        "mota": float(scores["CLEAR"]["MOTA"]),
        "idf1": float(scores["Identity"]["IDF1"]),
        "switches": float(scores["CLEAR"]["IDSW"]),
        "deta": float(np.mean(scores["HOTA"]["DetA"])),
        "assa": float(np.mean(scores["HOTA"]["AssA"])),
    }


def _prepared(truth: Boxes, found: Boxes, frames: Tensor) -> dict[str, Any]:
    """A sequence as TrackEval's metrics take it: identities from 0, frame by frame, and how alike the boxes are."""
    ids: dict[str, list[np.ndarray]] = {"gt": [], "tracker": []}
    similar = overlaps(truth.boxes[frames], found.boxes[frames]).cpu().double()
    alike, counts = [], {}
    for name, boxes in ("gt", truth), ("tracker", found):
        mask, labels = boxes.mask[frames].cpu(), boxes.labels[frames].cpu()
        known, places = torch.unique(labels[mask], return_inverse=True)
        counts[f"num_{name}_ids"], counts[f"num_{name}_dets"] = len(known), int(mask.sum())
        ids[name] = [part.numpy() for part in places.split(mask.sum(1).tolist())]
    for row, (one, other) in enumerate(zip(truth.mask[frames].cpu(), found.mask[frames].cpu(), strict=True)):
        alike.append(similar[row][one][:, other].numpy())
    return {
        "num_timesteps": len(frames),
        "gt_ids": ids["gt"],
        "tracker_ids": ids["tracker"],
        "similarity_scores": alike,
        **counts,
    }
