"""The retina: sharp at the point looked at, coarser and wider around it (Mnih et al. 2014, section 3.1).

A pyramid is made once an image; a glimpse then reads `patch`² pixels of every level, whatever the image's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.geometry import to_pixels

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
    height, width = pyramid[0].shape[-2:]
    centres = to_pixels(locations.detach(), (height, width))[:, None, None]
    offsets = torch.arange(patch, device=centres.device) - (patch - 1) / 2
    offsets = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), -1)
    cuts = []
    for scale, level in enumerate(pyramid):
        size = centres.new_tensor([level.shape[-1], level.shape[-2]])
        grid = (centres / factor**scale + offsets) * (2 / size) - 1
        cuts.append(F.grid_sample(level, grid, align_corners=False))
    return torch.cat(cuts, 1)
