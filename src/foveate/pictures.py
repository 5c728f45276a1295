"""Drawings: where an agent looked, what it saw on the way, and what was found. Everything is a Pillow image.

Images are [batch, channels, height, width] in [0, 1], grey or RGB. Locations are (x, y) in [-1, 1] as in
`foveate.geometry`; one beyond the image is drawn at the clamped place, which is where the glimpse was taken.
"""

from __future__ import annotations

import io
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

from foveate import geometry
from foveate.colors import PALETTE
from foveate.geometry import Boxes, Segments
from foveate.types import InputError

PATH = ((255, 236, 153), (253, 141, 60), (214, 22, 82))  # light to strong, the order of the glimpses
MARGIN = 10  # around an enlarged image, so that a glimpse at its edge can be drawn whole
DARK, RIGHT, WRONG, UNSEEN = "#141619", "#00694a", "#b3261e", (222, 226, 232)
SHARPER = 4  # drawn this many times larger, then reduced: smooth lines


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
    return _grid([_path_tile(*pair, patch, scales, factor, cell) for pair in both], captions, columns, correct)


def image_grid(
    images: Float[Tensor, "batch channels height width"],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    cell: int = 192,
) -> Image.Image:
    """Lay images out in rows, each with a caption below, of one line or several; as `glimpse_paths`, without paths."""
    pictures = [_enlarge(image, SHARPER * cell) for image in images]
    tiles = [ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER) for picture in pictures]
    return _grid(tiles, captions, columns)


def sentence_grid(
    images: Float[Tensor, "batch channels height width"], sentences: Sequence[Sequence[str]], columns: int = 3
) -> Image.Image:
    """Lay images out in rows, each with its sentences below, which begin a line and are wrapped."""
    lines = ["\n".join(line for one in several for line in textwrap.wrap(one, 32)) for several in sentences]
    return image_grid(images, lines, columns, cell=320)


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
        columns: tiles in a row.
        cell: longer side of an image as drawn.
        least: boxes with a lower score are not drawn.
    """
    tiles, captions = [], []
    for row, image in enumerate(images):
        for name, boxes in sets.items():
            tiles.append(_box_tile(image, boxes, row, classes, cell, least))
            captions.append(name)
    return _grid(tiles, captions, columns or len(sets))


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
        tiles.append(ImageOps.expand(_enlarge(image, SHARPER * cell), SHARPER * MARGIN, "white").reduce(SHARPER))
        captions.append("image")
        for name, segments in sets.items():
            ids = segments.ids[row].cpu().numpy()
            tiles.append(_segment_tile(image, ids, segments.labels[row].tolist(), classes, cell))
            captions.append(name)
    return _grid(tiles, captions, columns or 1 + len(sets))


def painted(
    images: Float[Tensor, "batch channels height width"], masks: Bool[Tensor, "batch classes height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Images darkened, with each class of masks in a colour of its own."""
    shown = 0.4 * images.expand(-1, 3, -1, -1)
    for place in range(masks.shape[1]):
        colour = shown.new_tensor(ImageColor.getrgb(PALETTE[(place + 4) % len(PALETTE)])) / 255
        shown = torch.where(masks[:, place, None], 0.3 * shown + 0.7 * colour[:, None, None], shown)
    return shown


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
    sights = _seen(_rgb(image), locations, patch, scales, factor, cell)
    seen = [ImageOps.expand(_to_pillow(sight), MARGIN, "white") for sight in sights]
    lines = captions or [f"glimpse {step} of {len(locations)}" for step in steps]
    return [_grid(pair, [line, "what it has seen"], 2) for *pair, line in zip(paths, seen, lines, strict=True)]


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
            tiles.append(_box_tile(image, truth, row, classes, cell, 0.0))
            captions.append("truth")
        tiles.append(_path_tile(image, path[seen], patch, scales, factor, cell, (found, row, classes)))
        count = int(found.mask[row].sum())
        captions.append(f"{int(seen.sum())} glimpses, {count} {'box' if count == 1 else 'boxes'}")
    return _grid(tiles, captions, columns * (1 if truth is None else 2))


def save_gif(path: Path, frames: Sequence[Image.Image], milliseconds: int = 600) -> None:
    """Write an animation that repeats and rests on its last frame; an older file is replaced whole or not at all.

    Raises `InputError` when there are no frames.
    """
    if not frames:
        raise InputError(f"{path}: found no frames, expected at least one; draw a picture before saving it")
    # one palette for all frames, without dither: what does not change does not flicker
    colours = [frame.convert("RGB") for frame in frames]
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in colours])).quantize(256)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in colours)
    durations = [milliseconds] * len(rest) + [milliseconds * 3]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, loop=0, duration=durations if rest else durations[0])
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)


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
    picture = _enlarge(image, SHARPER * cell)
    zoom, unit, final = SHARPER * cell / max(height, width), SHARPER * cell / 192, len(path) - 1
    if found is not None:
        _draw_boxes(picture, zoom, unit, *found, numbered=True)
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
    radius, font = 6.5 * unit, _font(round(8.5 * unit), True)
    for step, point in enumerate(points):
        colour = _colour(step, final)
        draw.ellipse((*(point - radius), *(point + radius)), colour, DARK, round(0.9 * unit))
        draw.text(tuple(point), str(step + 1), DARK if sum(colour) > 380 else "white", font, anchor="mm")
    return tile.reduce(SHARPER)


def _box_tile(image: Tensor, boxes: Boxes, row: int, classes: Sequence[str], cell: int, least: float) -> Image.Image:
    picture = _enlarge(image, SHARPER * cell)
    _draw_boxes(picture, SHARPER * cell / max(image.shape[-2:]), SHARPER * cell / 192, boxes, row, classes, least)
    return ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER)


def _up_to(boxes: Boxes, count: int) -> Boxes:
    return replace(boxes, mask=boxes.mask & (torch.arange(boxes.mask.shape[1]) < count))


def _draw_boxes(
    picture: Image.Image,
    zoom: float,
    unit: float,
    boxes: Boxes,
    row: int,
    classes: Sequence[str],
    least: float = 0.0,
    numbered: bool = False,
) -> None:
    draw, font = ImageDraw.Draw(picture), _font(round(9 * unit), True)
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
    rows, columns = _size(image, SHARPER * cell)
    hues = [ImageColor.getrgb(f"hsv({int(k * 222.5) % 360},{55 + k % 3 * 20}%,{95 - k % 2 * 20}%)") for k in labels]
    base = np.asarray(_enlarge(image, SHARPER * cell)).mean(2, keepdims=True)
    down, across = (np.arange(size) * count // size for size, count in zip((rows, columns), ids.shape, strict=True))
    where = ids[down[:, None], across]
    shown = 0.35 * base + 0.65 * np.array([(0, 0, 0), *hues], float)[where]
    edge = np.zeros(where.shape, bool)
    for axis in (0, 1):
        edge |= where != np.roll(where, SHARPER, axis)
    edge[:SHARPER], edge[:, :SHARPER] = False, False
    shown[edge] = 255
    picture = Image.fromarray(shown.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), _font(round(9.5 * SHARPER * cell / 192), True)
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


def _seen(image: Tensor, locations: Tensor, patch: int, scales: int, factor: int, side: int) -> list[Tensor]:
    """What was seen after each glimpse, enlarged: everywhere the finest scale that covered it, the latest of equals.

    A cell of scale k is the mean over factor^k × factor^k pixels; places never seen are a light grey.
    """
    height, width = image.shape[1:]
    rows, cols = _size(image, side)
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


def _enlarge(image: Tensor, side: int) -> Image.Image:
    rows, cols = _size(image, side)
    # the pixels of a small image are to be seen as such, those of a photograph are not
    method = Image.Resampling.NEAREST if rows >= 2 * SHARPER * image.shape[-2] else Image.Resampling.BICUBIC
    return _to_pillow(_rgb(image)).resize((cols, rows), method)


def _size(image: Tensor, side: int) -> list[int]:
    """Rows and columns of an image whose longer side is made `side` long."""
    return [max(1, round(length * side / max(image.shape[-2:]))) for length in image.shape[-2:]]


def _grid(
    tiles: Sequence[Image.Image], captions: Sequence[str] | None, columns: int, correct: Sequence[bool] | None = None
) -> Image.Image:
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    font = _font(min(max(10, width // 13), 18))
    line = round(font.size * 1.5)
    below = line * max((len(caption.splitlines()) or 1 for caption in captions or ()), default=0)
    page = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * (height + below)), "white")
    draw = ImageDraw.Draw(page)
    for index, tile in enumerate(tiles):
        page.paste(tile, (x := index % columns * width, y := index // columns * (height + below)))
        if captions:
            right = None if correct is None else bool(correct[index])
            mark, ink = ("", DARK) if right is None else ("✓ ", RIGHT) if right else ("✗ ", WRONG)
            for place, told in enumerate((mark + captions[index]).splitlines()):
                text = " ".join(told.split())
                while len(text) > 1 and font.getlength(text) > width - MARGIN:
                    text = text[:-2] + "…"
                top = y + height - MARGIN / 2 + 1 + place * line
                draw.text((x + width / 2, top), text, ink, font, anchor="ma")
    return page


def _rgb(image: Tensor) -> Tensor:
    if image.shape[0] not in (1, 3):
        raise InputError(f"image: found {image.shape[0]} channels, expected 1 (grey) or 3 (RGB); pick the ones to draw")
    return image.detach().float().nan_to_num(0.0).clamp(0, 1).expand(3, -1, -1)


def _to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _colour(step: int | float, final: int) -> tuple[int, ...]:
    share = step / final if final else 1.0
    return tuple(round(float(np.interp(share, (0.0, 0.5, 1.0), levels))) for levels in zip(*PATH, strict=True))


@lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has no arrows and no ticks
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
