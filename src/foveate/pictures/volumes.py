"""Walks through volumes: three slices through a place, with the path, where it ends and where the landmark is.

A volume is [depth, height, width] in [0, 1], axes as in `foveate.data.nifti`; superior and anterior are drawn up, and
the right side of the body on the right. Places are x, y, z in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from foveate.pictures.canvas import DARK, MARGIN, grid, rgb, to_pillow

PLANES = ((0, 1), (0, 2), (1, 2))  # across, up: axial, coronal, sagittal
PATH, END, TRUTH = (255, 196, 64), (255, 96, 32), (0, 210, 130)
DOUBLE = 2  # drawn larger, then reduced: smooth lines


def walk_slices(
    volume: Float[Tensor, "depth height width"],
    path: Float[Tensor, "time 3"],
    truth: Float[Tensor, " 3"] | None = None,
    cube: float | None = None,
    through: Float[Tensor, " 3"] | None = None,
    cell: int = 200,
) -> Image.Image:
    """Axial, coronal and sagittal slice side by side, and the path laid onto them.

    Args:
        volume: in [0, 1].
        path: places in their order; the last is marked.
        truth: the landmark, a green cross.
        cube: side in voxels of what is seen at the last place, drawn around it.
        through: place of the slices; None: the last of the path.
        cell: longest side of a slice in pixels.
    """
    at = path[-1] if through is None else through
    scale = DOUBLE * cell / max(volume.shape)
    tiles = []
    for across, up in PLANES:
        image = _slice(volume, 3 - across - up, float(at[3 - across - up]))
        height, width = image.shape[1:]
        size = max(1, round(width * scale)), max(1, round(height * scale))
        tile = to_pillow(rgb(image)).resize(size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(tile)

        def place(point: Tensor, axes: tuple[int, int] = (across, up), rows: int = height) -> tuple[float, float]:
            return (float(point[axes[0]]) + 0.5) * scale, (rows - 0.5 - float(point[axes[1]])) * scale

        points = [place(point) for point in path]
        if len(points) > 1:
            draw.line(points, PATH, DOUBLE * 2, joint="curve")
        x, y = points[-1]
        if cube is not None:
            half = cube * scale / 2
            draw.rectangle((x - half, y - half, x + half, y + half), outline=PATH, width=DOUBLE)
        if truth is not None:
            u, v = place(truth)
            arm = DOUBLE * 7
            draw.line((u - arm, v, u + arm, v), TRUTH, DOUBLE * 2)
            draw.line((u, v - arm, u, v + arm), TRUTH, DOUBLE * 2)
        dot = DOUBLE * 4
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), END, "white", DOUBLE)
        tiles.append(tile)
    tall, gap = max(tile.height for tile in tiles), DOUBLE * 4
    page = Image.new("RGB", (sum(tile.width for tile in tiles) + gap * (len(tiles) - 1), tall), DARK)
    left = 0
    for tile in tiles:
        page.paste(tile, (left, (tall - tile.height) // 2))
        left += tile.width + gap
    return ImageOps.expand(page.reduce(DOUBLE), MARGIN, "white")


def walk_grid(tiles: Sequence[Image.Image], captions: Sequence[str], columns: int = 2) -> Image.Image:
    """Walks of one volume's size in rows, each with its caption."""
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    page = [ImageOps.pad(tile, (width, height), color="white") for tile in tiles]
    return grid(page, captions, columns)


def walk_frames(
    volume: Float[Tensor, "depth height width"],
    path: Float[Tensor, "time 3"],
    cubes: Float[Tensor, " time"],
    captions: Sequence[str],
    truth: Float[Tensor, " 3"] | None = None,
    cell: int = 260,
) -> list[Image.Image]:
    """A frame for each place of a path: the slices through it, what is seen from it, and the way so far."""
    return [
        grid([walk_slices(volume, path[: step + 1], truth, float(cubes[step]), cell=cell)], [caption], 1)
        for step, caption in enumerate(captions)
    ]


def _slice(volume: Tensor, axis: int, at: float) -> Tensor:
    """[1, rows, columns], up first; `axis` is 0 for x, 1 for y, 2 for z."""
    dim = 2 - axis
    number = min(max(round(at), 0), volume.shape[dim] - 1)
    return torch.flip(volume.select(dim, number), (0,))[None]
