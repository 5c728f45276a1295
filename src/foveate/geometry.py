"""Locations and boxes: the conventions, and the few conversions between them.

A location is (x, y) in [-1, 1]: -1 is the outer edge of the first pixel, +1 the outer edge of the last one, as in
`torch.nn.functional.grid_sample(..., align_corners=False)`. Pixel coordinates put the centre of the first pixel at 0.5.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def to_pixels(locations: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Turn locations (x, y) in [-1, 1] into pixel coordinates (x, y) of an image of `size` = (height, width)."""
    return (locations + 1) / 2 * locations.new_tensor([size[1], size[0]])


def to_locations(pixels: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Turn pixel coordinates (x, y) of an image of `size` = (height, width) into locations in [-1, 1]."""
    return pixels / pixels.new_tensor([size[1], size[0]]) * 2 - 1
