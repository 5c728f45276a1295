"""Where an agent looked, what it saw on the way, and what it found there.

Locations are (x, y) in [-1, 1] as in `foveate.geometry`; one beyond the image is drawn at the clamped place, which is
where the glimpse was taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional

from foveate import geometry
from foveate.geometry import Boxes
from foveate.pictures.canvas import DARK, MARGIN, SHARPER, enlarge, font_of, grid, rgb, size_of, to_pillow
from foveate.pictures.objects import box_tile, draw_boxes

PATH = ((255, 236, 153), (253, 141, 60), (214, 22, 82))  # light to strong, the order of the glimpses
UNSEEN = (222, 226, 232)


def glimpse_paths(
    images: Float[Tensor, "batch channels height width"],
    locations: Float[Tensor, "batch time 2"],
    patch: int,
    scales: int,
    factor: int = 2,
    captions: Sequence[str] | None = None,
    columns: int = 4,
    cell: int = 192,
    correct: Sequence[bool] | None = None,
) -> Image.Image:
    """Draw the path of glimpses over each image: numbered points from a light to a strong colour.

    Thin squares show the finest patch of every glimpse, the strong ones every scale of the last.

    Args:
        images: what was looked at, in [0, 1].
        locations: where, in order.
        patch: pixels of the retina's finest scale.
        scales: how many scales it has.
        factor: scale k = 0 ... scales - 1 covers patch · factor^k pixels a side.
        captions: a line below each image, e.g. "7 → 7 (0.98)".
        columns: images in a row.
        cell: longer side of an image as drawn.
        correct: which captions to print in green with a tick, and which in red with a cross.
    """
    both = zip(images, locations, strict=True)
    return grid([_path_tile(*pair, patch, scales, factor, cell) for pair in both], captions, columns, correct)


def glimpse_frames(
    image: Float[Tensor, "channels height width"],
    locations: Float[Tensor, "time 2"],
    patch: int,
    scales: int,
    factor: int = 2,
    captions: Sequence[str] | None = None,
    cell: int = 256,
    found: Boxes | None = None,
    classes: Sequence[str] = (),
) -> list[Image.Image]:
    """Draw one frame a glimpse: the path so far on the left, on the right all that the agent has seen of the image.

    The arguments are those of `glimpse_paths` and, with boxes of this one image, those of `box_walks`; `captions` has
    one line for each glimpse.
    """
    steps = range(1, len(locations) + 1)
    boxes = [None if found is None else (_up_to(found, step), 0, classes) for step in steps]
    paths = [_path_tile(image, locations[:step], patch, scales, factor, cell, boxes[step - 1]) for step in steps]
    sights = _seen(rgb(image), locations, patch, scales, factor, cell)
    seen = [ImageOps.expand(to_pillow(sight), MARGIN, "white") for sight in sights]
    lines = captions or [f"glimpse {step} of {len(locations)}" for step in steps]
    return [grid(pair, [line, "what it has seen"], 2) for *pair, line in zip(paths, seen, lines, strict=True)]


def box_walks(
    images: Float[Tensor, "batch channels height width"],
    locations: Float[Tensor, "batch time 2"],
    taken: Bool[Tensor, "batch time"],
    found: Boxes,
    classes: Sequence[str],
    patch: int,
    scales: int,
    factor: int = 2,
    truth: Boxes | None = None,
    columns: int = 2,
    cell: int = 224,
) -> Image.Image:
    """Draw glimpses and the boxes emitted at them, each with its glimpse's number, beside the true boxes if given.

    As `glimpse_paths`; `taken` is true where there was a glimpse, `found` the candidate of each, in pixels, whose
    `mask` is true where it was emitted, `truth` what there is to be found.
    """
    tiles, captions = [], []
    for row, (image, path, seen) in enumerate(zip(images, locations, taken, strict=True)):
        if truth is not None:
            tiles.append(box_tile(image, truth, row, classes, cell, 0.0))
            captions.append("truth")
        tiles.append(_path_tile(image, path[seen], patch, scales, factor, cell, (found, row, classes)))
        count = int(found.mask[row].sum())
        captions.append(f"{int(seen.sum())} glimpses, {count} {'box' if count == 1 else 'boxes'}")
    return grid(tiles, captions, columns * (1 if truth is None else 2))


def _path_tile(
    image: Tensor,
    path: Tensor,
    patch: int,
    scales: int,
    factor: int,
    cell: int,
    found: tuple[Boxes, int, Sequence[str]] | None = None,
) -> Image.Image:
    height, width = image.shape[-2:]
    picture = enlarge(image, SHARPER * cell)
    zoom, unit, final = SHARPER * cell / max(height, width), SHARPER * cell / 192, len(path) - 1
    if found is not None:
        draw_boxes(picture, zoom, unit, *found, numbered=True)
    points = geometry.to_pixels(path.detach().float().cpu().clamp(-1, 1), (height, width)).numpy() * zoom
    draw = ImageDraw.Draw(picture, "RGBA")  # this mode mixes colours
    for step, point in enumerate(points):
        for scale in reversed(range(scales if step == final else 1)):
            thick = 2 * round((1.1 if step == final and scale == 0 else 0.65) * unit)
            reach = (patch * factor**scale * zoom + thick) / 2
            colour = (*_colour(step, final), 255 if step == final else 140)
            draw.rectangle((*(point - reach), *(point + reach - 1)), None, colour, thick)
    tile = ImageOps.expand(picture, SHARPER * MARGIN, "white")
    draw = ImageDraw.Draw(tile)
    points += SHARPER * MARGIN
    draw.line(points.ravel().tolist(), DARK, round(4 * unit), joint="curve")
    fine = np.linspace(0, final, 12 * final + 1)
    trail = np.stack([np.interp(fine, range(final + 1), points[:, axis]) for axis in (0, 1)], 1)
    for share, ends in zip(fine, itertools.pairwise(trail), strict=False):
        draw.line(np.ravel(ends).tolist(), _colour(share, final), round(2.4 * unit))
    radius, font = 6.5 * unit, font_of(round(8.5 * unit), True)
    for step, point in enumerate(points):
        colour = _colour(step, final)
        draw.ellipse((*(point - radius), *(point + radius)), colour, DARK, round(0.9 * unit))
        draw.text(tuple(point), str(step + 1), DARK if sum(colour) > 380 else "white", font, anchor="mm")
    return tile.reduce(SHARPER)


def _up_to(boxes: Boxes, count: int) -> Boxes:
    return replace(boxes, mask=boxes.mask & (torch.arange(boxes.mask.shape[1]) < count))


def _seen(image: Tensor, locations: Tensor, patch: int, scales: int, factor: int, side: int) -> list[Tensor]:
    """What was seen after each glimpse, enlarged: everywhere the finest scale that covered it, the latest of equals.

    A cell of scale k is the mean over factor^k × factor^k pixels; places never seen are a light grey.
    """
    height, width = image.shape[1:]
    rows, cols = size_of(image, side)
    y = (torch.arange(rows, device=image.device) + 0.5) * (height / rows)
    x = (torch.arange(cols, device=image.device) + 0.5) * (width / cols)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [rows, cols, (x, y)] in pixels of the image
    centres = geometry.to_pixels(locations.to(image).clamp(-1, 1), (height, width))[:, None, None]
    covered, values = [], []
    for block in (factor**scale for scale in range(scales)):
        # entry i is the mean of the block that begins at pixel i - block
        means = functional.avg_pool2d(functional.pad(image[None], (block,) * 4), block, 1)
        cells = ((points - centres) / block + patch / 2).floor()
        covered.append(((cells >= 0) & (cells < patch)).all(-1))
        entries = centres + (cells + 0.5 - patch / 2) * block + (block / 2 + 0.5)
        where = geometry.to_locations(entries, (means.shape[-2], means.shape[-1]))
        values.append(functional.grid_sample(means.expand(len(where), -1, -1, -1), where, align_corners=False))
    shown = image.new_tensor(UNSEEN)[:, None, None].expand(3, rows, cols) / 255
    finest = torch.full((rows, cols), scales, device=image.device)
    frames = []
    for step in range(len(locations)):
        for scale in reversed(range(scales)):
            sharper = covered[scale][step] & (finest >= scale)
            shown = torch.where(sharper, values[scale][step], shown)
            finest = torch.where(sharper, scale, finest)
        frames.append(shown)
    return frames


def _colour(step: int | float, final: int) -> tuple[int, ...]:
    share = step / final if final else 1.0
    return tuple(round(float(np.interp(share, (0.0, 0.5, 1.0), levels))) for levels in zip(*PATH, strict=True))
