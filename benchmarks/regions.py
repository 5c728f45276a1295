"""What it costs to read regions of feature maps: two products of matrices, beside torchvision's operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.ops import roi_align

from benchmarks import best_seconds
from foveate import noise
from foveate.models.region_q import region_cells

BATCH, VIEWS, CHANNELS, CELLS, STRIDE, BINS = 128, 3, 32, 12, 4, 7
Rates = tuple[float, float, str]


def compare_regions(rounds: int = 8, repeats: int = 3) -> Rates:
    """Regions/s with the gradient of the maps: three views of each of 128 images, as in an update of `localization`."""
    maps = noise.normal(noise.key(0), BATCH, CHANNELS, CELLS, CELLS).requires_grad_()
    draws = noise.uniform(noise.key(1), BATCH, VIEWS, 4) * CELLS * STRIDE / 2
    windows = torch.cat((draws[..., :2], draws[..., :2] + draws[..., 2:]), -1)
    number = torch.arange(BATCH)
    rois = torch.cat((number.repeat_interleave(VIEWS)[:, None].float(), windows.flatten(0, 1)), 1)

    def ours() -> None:
        region_cells(maps, windows, number, BINS, STRIDE).sum().backward()

    def peer() -> None:
        roi_align(maps, rois, BINS, 1 / STRIDE, 2, aligned=True).sum().backward()

    mine, theirs = best_seconds(ours, peer, rounds=rounds, repeats=repeats)
    told = f"regions/s, {BINS}x{BINS}x{CHANNELS} with gradient; peer: torchvision's roi_align"
    return BATCH * VIEWS / mine, BATCH * VIEWS / theirs, told


ROWS: dict[str, Callable[[], Rates]] = {"localization-regions": compare_regions}
