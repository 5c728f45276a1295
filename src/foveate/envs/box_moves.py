"""The eight moves of a box, as parts of its own sides: what agents that change a box step by step choose from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MOVES = ("right", "left", "up", "down", "bigger", "smaller", "fatter", "taller")


def moves(boxes: Float[Tensor, "batch 4"], alpha: float) -> Float[Tensor, "batch moves 4"]:
    """Boxes after each of `MOVES`; nothing keeps them within an image.

    Fatter takes from the height, taller from the width, bigger and smaller add to both and take from both.

    Args:
        boxes: left, top, right, bottom.
        alpha: part of the width or height by which a move changes it.
    """
    left, top, right, bottom = boxes.unbind(1)
    across, down = alpha * (right - left), alpha * (bottom - top)
    zero = torch.zeros_like(left)
    half_x, half_y = across / 2, down / 2
    changes = (
        (across, zero, across, zero),
        (-across, zero, -across, zero),
        (zero, -down, zero, -down),
        (zero, down, zero, down),
        (-half_x, -half_y, half_x, half_y),
        (half_x, half_y, -half_x, -half_y),
        (zero, half_y, zero, -half_y),
        (half_x, zero, -half_x, zero),
    )
    return boxes[:, None] + torch.stack([torch.stack(change, 1) for change in changes], 1)
