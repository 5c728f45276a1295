"""The retina: sharp at the point looked at, coarser and wider around it (Mnih et al. 2014, section 3.1).

A pyramid is made once an image; a glimpse then reads `patch`² pixels of every level, whatever the image's size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pyramid = tuple[Tensor, ...]  # level i: [batch, channels, height / factor^i, width / factor^i], rounded up


def build_pyramid(images: Float[Tensor, "batch channels height width"], scales: int, factor: int) -> Pyramid:
    """Average `images` over blocks of `factor`^i pixels for each scale i; beyond the edge everything is zero."""
    levels = [images]
    for _ in range(scales - 1):
        below = levels[-1]
        missing = [-size % factor for size in below.shape[-2:]]
        levels.append(F.avg_pool2d(F.pad(below, (0, missing[1], 0, missing[0])), factor))
    return tuple(levels)


def look(
    pyramid: Pyramid, locations: Float[Tensor, "batch 2"], patch: int, factor: int
) -> Float[Tensor, "batch scales_channels patch patch"]:
    """Cut `patch`×`patch` samples of every level around `locations` (x, y) in [-1, 1]; zero outside the image.

    Scale i covers patch · factor^i pixels of the image. Samples lie between pixels in general and are interpolated
    linearly. Channels of the finest scale come first. No gradient flows to the locations.
    """
    slopes, offsets = _grids(patch, factor, tuple(tuple(level.shape[-2:]) for level in pyramid), locations.device)
    places = locations.detach()[:, None, None]
    cuts = [
        F.grid_sample(level, torch.addcmul(offset, places, slope), align_corners=False)
        for level, slope, offset in zip(pyramid, slopes, offsets, strict=True)
    ]
    return cuts[0] if len(cuts) == 1 else torch.cat(cuts, 1)


@lru_cache(maxsize=16)
def _grids(
    patch: int, factor: int, sizes: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """What makes a location into the sampling grid of every level: location · slope [2] + offset [patch, patch, 2].

    A pixel (x, y) of the image lies at (x, y) / factor^i of level i, whose width is rounded up.
    """
    steps = torch.arange(patch, device=device) - (patch - 1) / 2
    steps = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    image = torch.tensor(sizes[0][::-1], device=device)
    slopes, offsets = [], []
    for scale, size in enumerate(sizes):
        level = torch.tensor(size[::-1], device=device)
        slopes.append(image / factor**scale / level)
        offsets.append(slopes[-1] - 1 + steps * (2 / level))
    return slopes, offsets
