"""Drawings of paintings: those of several makers beside each other, and how a painting comes about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from foveate.pictures.canvas import image_grid

CELL = 64
Drawn = UInt8[Tensor, "batch height width 3"]


def beside(
    images: Mapping[str, Float[Tensor, "batch channels height width"]], kinds: Sequence[str], each: int
) -> Image.Image:
    """A column a kind, `each` rows a maker; the images of a maker are kind after kind, again and again."""
    tiles = torch.cat([one.cpu()[: each * len(kinds)] for one in images.values()])
    captions = [f"{kind}: {maker}"[:24] for maker in images for _ in range(each) for kind in kinds]
    return image_grid(tiles, captions, len(kinds), CELL)


def step_by_step(steps: Sequence[Drawn], kinds: Sequence[str]) -> Image.Image:
    """A row a painting, a column a stroke, as the environment draws them."""
    tiles = torch.stack([as_images(step) for step in steps], 1)
    captions = [f"{kind}, {step}" if step else kind for kind in kinds for step in range(len(steps))]
    return image_grid(tiles.flatten(0, 1), captions, len(steps), CELL)


def frames(steps: Sequence[Drawn], kinds: Sequence[str]) -> list[Image.Image]:
    """A frame a stroke: all paintings, in rows of as many as there are kinds."""
    captions = [kinds[place % len(kinds)] for place in range(len(steps[0]))]
    return [image_grid(as_images(step), captions, len(kinds), CELL) for step in steps]


def as_images(drawn: Drawn) -> Float[Tensor, "batch 3 height width"]:
    """What an environment draws, in [0, 1]."""
    return drawn.permute(0, 3, 1, 2).float().cpu() / 255


def pairs(
    images: Float[Tensor, "batch channels height width"],
    paintings: Float[Tensor, "batch channels height width"],
    captions: Sequence[str],
) -> Image.Image:
    """Each image with what is said of it, and a painting to its right."""
    tiles = torch.stack((images.cpu(), paintings.cpu()), 1).flatten(0, 1)
    return image_grid(tiles, [text for caption in captions for text in (caption, "painted")], 8, 2 * CELL)
