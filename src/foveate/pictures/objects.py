"""What was found in images: boxes, segments and masks, drawn over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import Tensor

from foveate.colors import PALETTE
from foveate.geometry import Boxes, Segments
from foveate.pictures.canvas import DARK, MARGIN, SHARPER, enlarge, font_of, grid, size_of


def box_grid(
    images: Float[Tensor, "batch channels height width"],
    sets: Mapping[str, Boxes],
    classes: Sequence[str],
    columns: int | None = None,
    cell: int = 224,
    least: float = 0.1,
) -> Image.Image:
    """Draw sets of boxes over images: a row an image and a column a set, or `columns` tiles in a row.

    Args:
        images: in [0, 1].
        sets: name → boxes in pixels of the images.
        classes: names of the labels; each has its colour.
        columns: tiles in a row; None: a set each, or of one set as many as make a square, at most 4.
        cell: longer side of an image as drawn.
        least: boxes with a lower score are not drawn.
    """
    tiles, captions = [], []
    for row, image in enumerate(images):
        for name, boxes in sets.items():
            tiles.append(box_tile(image, boxes, row, classes, cell, least))
            captions.append(name)
    return grid(tiles, captions, columns or (len(sets) if len(sets) > 1 else min(4, math.isqrt(len(tiles) - 1) + 1)))


def segment_grid(
    images: Float[Tensor, "batch channels height width"],
    sets: Mapping[str, Segments],
    classes: Sequence[str],
    columns: int | None = None,
    cell: int = 192,
) -> Image.Image:
    """Draw images, each beside its sets of segments: a colour a class, an edge around each segment, and its class.

    Args:
        images: in [0, 1].
        sets: name → segments of all images.
        classes: their names.
        columns: tiles in a row; None: an image and its sets.
        cell: longer side of an image as drawn.
    """
    tiles, captions = [], []
    for row, image in enumerate(images):
        tiles.append(ImageOps.expand(enlarge(image, SHARPER * cell), SHARPER * MARGIN, "white").reduce(SHARPER))
        captions.append("image")
        for name, segments in sets.items():
            ids = segments.ids[row].cpu().numpy()
            tiles.append(_segment_tile(image, ids, segments.labels[row].tolist(), classes, cell))
            captions.append(name)
    return grid(tiles, captions, columns or 1 + len(sets))


def painted(
    images: Float[Tensor, "batch channels height width"], masks: Bool[Tensor, "batch classes height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Images darkened, with each class of masks in a colour of its own."""
    shown = 0.4 * images.expand(-1, 3, -1, -1)
    for place in range(masks.shape[1]):
        colour = shown.new_tensor(ImageColor.getrgb(PALETTE[(place + 4) % len(PALETTE)])) / 255
        shown = torch.where(masks[:, place, None], 0.3 * shown + 0.7 * colour[:, None, None], shown)
    return shown


def box_tile(image: Tensor, boxes: Boxes, row: int, classes: Sequence[str], cell: int, least: float) -> Image.Image:
    """An image with its boxes, and a margin."""
    picture = enlarge(image, SHARPER * cell)
    draw_boxes(picture, SHARPER * cell / max(image.shape[-2:]), SHARPER * cell / 192, boxes, row, classes, least)
    return ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER)


def draw_boxes(
    picture: Image.Image,
    zoom: float,
    unit: float,
    boxes: Boxes,
    row: int,
    classes: Sequence[str],
    least: float = 0.0,
    numbered: bool = False,
) -> None:
    """Draw the boxes of a row into a picture that is enlarged `zoom` times; `unit` is as thick as a thin line."""
    draw, font = ImageDraw.Draw(picture), font_of(round(9 * unit), True)
    for place in boxes.mask[row].nonzero().flatten().tolist():
        score = None if boxes.scores is None else float(boxes.scores[row, place])
        if score is not None and score < least:
            continue
        label = int(boxes.labels[row, place])
        colour = PALETTE[label % (len(PALETTE) - 1)]  # its last is black, as is much of what boxes are drawn on
        left, top, right, bottom = (boxes.boxes[row, place] * zoom).tolist()
        draw.rectangle((left, top, max(left, right), max(top, bottom)), None, colour, round(1.6 * unit))
        text = classes[label] + ("" if score is None else f" {score:.2f}")
        text = f"{place + 1}: {text}" if numbered else text
        under = draw.textbbox((left, max(top, 10 * unit)), text, font, anchor="lb")
        draw.rectangle(under, colour)
        draw.text((left, max(top, 10 * unit)), text, "white", font, anchor="lb")


def _segment_tile(
    image: Tensor, ids: np.ndarray[Any, np.dtype[Any]], labels: Sequence[int], classes: Sequence[str], cell: int
) -> Image.Image:
    rows, columns = size_of(image, SHARPER * cell)
    hues = [ImageColor.getrgb(f"hsv({int(k * 222.5) % 360},{55 + k % 3 * 20}%,{95 - k % 2 * 20}%)") for k in labels]
    base = np.asarray(enlarge(image, SHARPER * cell)).mean(2, keepdims=True)
    down, across = (np.arange(size) * count // size for size, count in zip((rows, columns), ids.shape, strict=True))
    where = ids[down[:, None], across]
    shown = 0.35 * base + 0.65 * np.array([(0, 0, 0), *hues], float)[where]
    edge = np.zeros(where.shape, bool)
    for axis in (0, 1):
        edge |= where != np.roll(where, SHARPER, axis)
    edge[:SHARPER], edge[:, :SHARPER] = False, False
    shown[edge] = 255
    picture = Image.fromarray(shown.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), font_of(round(9.5 * SHARPER * cell / 192), True)
    for number in np.unique(ids[ids > 0]).tolist():
        name, (y, x) = classes[labels[number - 1]], _middle(ids == number)
        half = min(font.getlength(name) / 2, columns / 2)
        place = min(max(x * columns / ids.shape[1], half), columns - half), y * rows / ids.shape[0]
        draw.text(place, name, "white", font, anchor="mm", stroke_width=SHARPER // 2, stroke_fill=DARK)
    return ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER)


def _middle(mask: np.ndarray[Any, np.dtype[Any]]) -> tuple[float, float]:
    """A place deep inside of a mask, (y, x) in pixels: what is left last when its edges are taken away."""
    left = np.pad(mask, 1)
    while left.any():
        last = left
        left = left & np.roll(left, 1, 0) & np.roll(left, -1, 0) & np.roll(left, 1, 1) & np.roll(left, -1, 1)
    y, x = np.argwhere(last)[0]
    return float(y) - 0.5, float(x) - 0.5
