"""Pictures laid over each other, as a checkerboard: where they lie together, edges go on from tile to tile."""

from __future__ import annotations

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from foveate.pictures.canvas import image_grid

TILES = 6  # in a row


def checkered(
    fixed: Float[Tensor, "batch 3 height width"], moving: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Every other tile of the one, the rest of the other."""
    down, across = (torch.arange(length, device=fixed.device) * TILES // length for length in fixed.shape[2:])
    return torch.where((down[:, None] + across) % 2 == 0, fixed, moving)


def overlays(
    fixed: Float[Tensor, "batch 3 height width"],
    moving: Float[Tensor, "batch 3 height width"],
    before: Float[Tensor, "batch 3 height width"],
    after: Float[Tensor, "batch 3 height width"],
    errors: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]] | None = None,
    cell: int = 192,
) -> Image.Image:
    """A row a pair: both pictures, and their checkerboards before and after.

    Args:
        fixed: pictures in [0, 1].
        moving: those that were registered.
        before: the moving ones where they were, in the frame of the fixed ones.
        after: where they have been brought.
        errors: of the landmarks before and after, in pixels, where they are known.
        cell: longer side of a picture as drawn.
    """
    tiles = torch.stack((fixed, moving, checkered(fixed, before), checkered(fixed, after)), 1).flatten(0, 1)
    told = [["before"] * len(fixed), ["after"] * len(fixed)]
    if errors is not None:
        told = [[f"{line[0]}: {error:.1f} px off" for error in each] for line, each in zip(told, errors, strict=True)]
    lines = [line for both in zip(*told, strict=True) for line in ("fixed", "moving", *both)]
    return image_grid(tiles, lines, 4, cell)


def frames(
    fixed: Float[Tensor, "1 3 height width"], seen: Float[Tensor, "states 3 height width"], cell: int = 288
) -> list[Image.Image]:
    """A walk as an animation of checkerboards: every other of its states, and the last.

    Args:
        fixed: the picture that stays.
        seen: the moving one in the states of the walk.
        cell: longer side of a picture as drawn.
    """
    shown = [*range(0, len(seen) - 1, 2), len(seen) - 1]
    tiles = checkered(fixed.expand(len(seen), -1, -1, -1), seen)
    return [image_grid(tiles[place][None], [f"step {place}"], 1, cell) for place in shown]
