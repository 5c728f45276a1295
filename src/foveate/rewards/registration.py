"""How well pictures were registered: the target registration error of their landmarks, and how often it is small.

Fitzpatrick and West 2001, "The distribution of target registration error in rigid-body point-based registration".
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

FAR = 25.0  # pixels of mean displacement from which on a pair is far
NEAR = 5.0  # of mean error below which it is registered


def registration_scores(errors: Float[Tensor, " size"], before: Float[Tensor, " size"]) -> dict[str, float]:
    """Scores of pairs.

    Args:
        errors: mean distance of the landmarks of each pair, in pixels.
        before: the same before anything was done.

    Returns:
        `tre_error` and `median_error` in pixels; `success`, the part of the pairs with less than `NEAR`, and the same
        of those displaced by up to `FAR`, `success_near`, and by more, `success_far`, where there are any.
    """
    hits = (errors < NEAR).float()
    found = {"tre_error": errors.mean(), "median_error": errors.median(), "success": hits.mean()}
    for name, rows in (("success_near", before <= FAR), ("success_far", before > FAR)):
        if rows.any():
            found[name] = hits[rows].mean()
    return {name: float(value) for name, value in found.items()}
