"""Images as they are drawn: enlarged, laid out in rows with captions, and as animations."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from foveate.types import InputError

MARGIN = 10  # around an enlarged image, so that a glimpse at its edge can be drawn whole
DARK, RIGHT, WRONG = "#141619", "#00694a", "#b3261e"
SHARPER = 4  # drawn this many times larger, then reduced: smooth lines


def image_grid(
    images: Float[Tensor, "batch channels height width"],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    cell: int = 192,
) -> Image.Image:
    """Lay images out in rows, each with a caption below, of one line or several; as `glimpse_paths`, without paths."""
    pictures = [enlarge(image, SHARPER * cell) for image in images]
    tiles = [ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER) for picture in pictures]
    return grid(tiles, captions, columns)


def sentence_grid(
    images: Float[Tensor, "batch channels height width"], sentences: Sequence[Sequence[str]], columns: int = 3
) -> Image.Image:
    """Lay images out in rows, each with its sentences below, which begin a line and are wrapped."""
    lines = ["\n".join(line for one in several for line in textwrap.wrap(one, 32)) for several in sentences]
    return image_grid(images, lines, columns, cell=320)


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


def grid(
    tiles: Sequence[Image.Image], captions: Sequence[str] | None, columns: int, correct: Sequence[bool] | None = None
) -> Image.Image:
    """Lay tiles out in rows, each with a caption below, in green or red if it is `correct` or not."""
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    font = font_of(min(max(10, width // 13), 18))
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


def enlarge(image: Tensor, side: int) -> Image.Image:
    """An image, its longer side made `side` long."""
    rows, cols = size_of(image, side)
    # the pixels of a small image are to be seen as such, those of a photograph are not
    method = Image.Resampling.NEAREST if rows >= 2 * SHARPER * image.shape[-2] else Image.Resampling.BICUBIC
    return to_pillow(rgb(image)).resize((cols, rows), method)


def size_of(image: Tensor, side: int) -> list[int]:
    """Rows and columns of an image whose longer side is made `side` long."""
    return [max(1, round(length * side / max(image.shape[-2:]))) for length in image.shape[-2:]]


def rgb(image: Tensor) -> Tensor:
    """Three channels within [0, 1]."""
    if image.shape[0] not in (1, 3):
        raise InputError(f"image: found {image.shape[0]} channels, expected 1 (grey) or 3 (RGB); pick the ones to draw")
    return image.detach().float().nan_to_num(0.0).clamp(0, 1).expand(3, -1, -1)


def to_pillow(image: Tensor) -> Image.Image:
    """A Pillow image of one in [0, 1]."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


@lru_cache(maxsize=16)
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that has arrows and ticks."""
    import matplotlib

    # Pillow's own font has no arrows and no ticks
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
