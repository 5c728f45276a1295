"""Searches with a box: its way from light to strong, and what was triggered."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from foveate.geometry import Boxes
from foveate.pictures.canvas import MARGIN, SHARPER, enlarge, font_of, grid
from foveate.pictures.glimpses import PATH
from foveate.pictures.objects import box_tile

CROSS = 1 / 3  # width of a mark's bars, in parts of the box's sides
TRIGGERED = "#00694a"


def search_grid(
    images: Float[Tensor, "batch channels height width"],
    regions: Float[Tensor, "batch time 4"],
    looked: Bool[Tensor, "batch time"],
    fired: Bool[Tensor, "batch time"],
    scores: Float[Tensor, "batch time"],
    truth: Boxes | None = None,
    classes: Sequence[str] = ("object",),
    sought: Sequence[str] | None = None,
    found: Boxes | None = None,
    columns: int = 4,
    cell: int = 192,
) -> Image.Image:
    """Draw the search over each image: boxes from a light to a strong colour, those that were triggered in green.

    Args:
        images: in [0, 1].
        regions: boxes in pixels, in the order in which they were looked at.
        looked: which of them were.
        fired: those that were triggered; they are numbered, with their score.
        scores: of them.
        truth: true boxes, drawn in a second tile beside the first.
        classes: their names.
        sought: what each search was for, for the captions.
        found: what all searches in each image found, drawn in a tile of its own.
        columns: tiles in a row at most, those of an image together.
        cell: longer side of an image as drawn.
    """
    tiles, captions = [], []
    for row, image in enumerate(images):
        count = int(looked[row].sum())
        way = regions[row][looked[row]], fired[row][looked[row]], scores[row][looked[row]]
        tiles.append(_tile(image, *way, cell, crossed=False))
        told = f"{count} regions"
        captions.append(f"{told}, {int(way[1].sum())} triggered" if sought is None else f"{sought[row]}: {told}")
        if found is not None:
            tiles.append(box_tile(image, found, row, classes, cell, -math.inf))
            captions.append("found")
        if truth is not None:
            tiles.append(box_tile(image, truth, row, classes, cell, 0.0))
            captions.append("truth")
    each = len(tiles) // len(images)
    return grid(tiles, captions, max(each, columns - columns % each))


def search_frames(
    image: Float[Tensor, "channels height width"],
    regions: Float[Tensor, "time 4"],
    fired: Bool[Tensor, " time"],
    scores: Float[Tensor, " time"],
    sought: str | None = None,
    cell: int = 320,
) -> list[Image.Image]:
    """One frame a step: the box as it is, the last ones behind it; a triggered region is crossed out afterwards.

    Args:
        image: in [0, 1].
        regions: boxes in pixels that were looked at.
        fired: those that were triggered.
        scores: of them.
        sought: what the search is for, for the captions.
        cell: longer side of the image as drawn.
    """
    frames = []
    for step in range(1, len(regions) + 1):
        tile = _tile(image, regions[:step], fired[:step], scores[:step], cell, crossed=True)
        told = "triggered" if bool(fired[step - 1]) else f"region {step}"
        frames.append(grid([tile], [told if sought is None else f"{sought}: {told}"], 1))
    return frames


def _tile(image: Tensor, regions: Tensor, fired: Tensor, scores: Tensor, cell: int, crossed: bool) -> Image.Image:
    """An image with a way of boxes. `crossed`: only its last boxes, and crosses over what was triggered before."""
    picture = enlarge(image, SHARPER * cell)
    zoom, unit = SHARPER * cell / max(image.shape[-2:]), SHARPER * cell / 192
    draw, font = ImageDraw.Draw(picture), font_of(round(10 * unit), True)
    boxes, last = (regions * zoom).tolist(), len(regions) - 1
    begun = 0  # where the present search begins
    marked = []
    for step, (box, fires) in enumerate(zip(boxes, fired.tolist(), strict=True)):
        if fires:
            marked.append((step, box))
        if fires and step < last:
            begun = step + 1
    if crossed:
        for step, (left, top, right, bottom) in marked:
            if step < last:
                wide, high = (right - left) * (1 - CROSS) / 2, (bottom - top) * (1 - CROSS) / 2
                draw.rectangle((left + wide, top, right - wide, bottom), "black")
                draw.rectangle((left, top + high, right, bottom - high), "black")
    for step, box in enumerate(boxes):
        if fired[step] or (crossed and step < begun):
            continue
        share = (step - begun) / max(1, last - begun) if crossed else step / max(1, last)
        now = step == last
        thick = 2.0 if now else 0.7
        draw.rectangle(box, None, _mix(share), max(1, round(thick * unit)))
    for number, (step, box) in enumerate(marked, 1):
        draw.rectangle(box, None, TRIGGERED, round(2.2 * unit))
        text = f"{number}: {float(scores[step]):.1f}"
        place = box[0], max(box[1], 11 * unit)
        under = draw.textbbox(place, text, font, anchor="lb")
        draw.rectangle(under, TRIGGERED)
        draw.text(place, text, "white", font, anchor="lb")
    return ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER)


def _mix(share: float) -> tuple[int, int, int]:
    """The colour of a step."""
    low = min(int(share * 2), 1)
    part = share * 2 - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(PATH[low], PATH[low + 1], strict=True))
    return red, green, blue
