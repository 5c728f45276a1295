"""What a glimpse costs on large images: as much as on small ones, once the pyramid is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks import best_seconds
from foveate import noise
from foveate.models.retina import build_pyramid, look

PATCH, SCALES, FACTOR, GLIMPSES = 24, 3, 2, 6
BATCH, SMALL = 4, 256
Rates = tuple[float, float, str]


def picture(side: int) -> tuple[Tensor, Tensor]:
    """RGB images, tiled of one small one, and where to look at them, one location a glimpse."""
    locations = noise.uniform(noise.key(1), GLIMPSES, BATCH, 2) * 2 - 1
    tiles = side // SMALL
    return noise.uniform(noise.key(0), BATCH, 3, SMALL, SMALL).repeat(1, 1, tiles, tiles), locations


def glimpses(side: int) -> Callable[[], None]:
    images, locations = picture(side)
    pyramid = build_pyramid(images, SCALES, FACTOR)

    def work() -> None:
        for location in locations:
            look(pyramid, location, PATCH, FACTOR)

    return work


def compare_glimpses(side: int, rounds: int = 12, repeats: int = 15) -> Rates:
    """Images/s for six glimpses of each, on large images and on small ones; 1 is flat."""
    large, small = best_seconds(glimpses(side), glimpses(SMALL), rounds=rounds, repeats=repeats)
    return BATCH / large, BATCH / small, f"images/s, 6 glimpses 24x24x3 each; peer: the same at {SMALL}x{SMALL}"


def compare_pyramid(side: int, rounds: int = 4) -> Rates:
    """Images/s for building the pyramid, and for the six glimpses that are then taken of it."""
    images, _ = picture(side)
    built, seen = best_seconds(
        partial(build_pyramid, images, SCALES, FACTOR), glimpses(side), rounds=rounds, repeats=1 if side > 512 else 5
    )
    return BATCH / built, BATCH / seen, "images/s, building the pyramid; peer: its 6 glimpses"


SIDES = (512, 1024, 2048)
ROWS: dict[str, Callable[[], Rates]] = {f"retina-{side}": partial(compare_glimpses, side) for side in SIDES} | {
    f"pyramid-{side}": partial(compare_pyramid, side) for side in (SMALL, *SIDES)
}
