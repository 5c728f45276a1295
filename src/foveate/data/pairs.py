"""Pairs of pictures of the same thing that look different, with landmarks in both: what is to be registered.

    pairs = load_pairs("scenes", None, "train", 96)
    pairs.moving[0]                                  # is to be laid over pairs.fixed[0]
    pairs.moving_points[0], pairs.fixed_points[0]    # row k of the one is the place of row k of the other

Rendered pairs are one picture twice, the second time in another contrast and, before it is displaced, larger: what a
displaced picture shows beyond the fixed one's frame is there, so that no edge of the picture tells where it belongs.
`birl` pairs are two pictures of the user's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data import digit_scenes, scenes
from foveate.data.classification import check_rgb, load_images
from foveate.data.photographs import load_photographs
from foveate.data.registration_files import read_pairs
from foveate.data.similarity import apply, compose, fitted, inverse, matrices, warp
from foveate.types import InputError, concatenate, map_tree

DATASETS = {
    "scenes": "rendered scenes, and the same in another contrast",
    "photographs": "crops of the photographs of scikit-image, and the same in another contrast",
    "digits": "scenes of embedded handwritten digits, and the same in another contrast",
    "birl": "your pairs with landmarks, in the layout of BIRL: ROOT/pairs.csv",
}
GRID = 5  # landmarks of a rendered pair in a row
MIDDLE = 0.6  # of the picture, in which they lie
CANVAS = 2  # side of a rendered moving picture before it is displaced, in sides of the fixed one
PHOTOGRAPH = 128  # side of the largest crop of a photograph; larger canvases are enlarged from it
OBJECTS = 12  # on a canvas at most
_AT_ONCE = 10  # pictures rendered together

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of square pictures.

    Attributes:
        fixed: RGB, 0 to 255.
        moving: is to be laid over it; before a rendered one is displaced, it is larger, `CANVAS` sides.
        fixed_points: landmarks in pixels (x, y) of the fixed picture.
        moving_points: the same places in the moving one; they may lie outside of it.
        mask: true where there is a landmark.
    """

    fixed: UInt8[Tensor, "size 3 side side"]
    moving: UInt8[Tensor, "size 3 canvas canvas"]
    fixed_points: Float[Tensor, "size count 2"]
    moving_points: Float[Tensor, "size count 2"]
    mask: Bool[Tensor, "size count"]

    def __len__(self) -> int:
        return len(self.fixed)

    @property
    def side(self) -> int:
        """Of the fixed pictures, in pixels."""
        return self.fixed.shape[-1]

    def aligned(self) -> Float[Tensor, "size 2 3"]:
        """From moving to fixed, by least squares of the landmarks."""
        return fitted(self.moving_points, self.fixed_points, self.mask)

    def errors(self, matrix: Float[Tensor, "size 2 3"]) -> Float[Tensor, " size"]:
        """Target registration error of maps from moving to fixed: mean distance of the landmarks, in pixels."""
        return distances(apply(matrix, self.moving_points), self.fixed_points, self.mask)


@dataclass(frozen=True)
class Spread:
    """How far the moving picture may be from where it belongs.

    Attributes:
        shift: longest translation in parts of the picture's side; any direction, any length up to it.
        turn: most degrees, either way.
        zoom: most of the logarithm of the scale, either way.
    """

    shift: float = 0.36
    turn: float = 15.0
    zoom: float = 0.15

    def draw(self, keys: Int[Tensor, " batch"], side: int) -> Float[Tensor, "batch 4"]:
        """The parameters that would bring a moving picture back (`foveate.data.similarity`)."""
        draws = noise.uniform(noise.fold(keys, "similarity"), 4)
        way = 2 * torch.pi * draws[:, :1]
        shift = torch.cat((way.cos(), way.sin()), 1) * draws[:, 1:2] * self.shift * side
        return torch.cat((shift, (2 * draws[:, 2:] - 1) * draws.new_tensor([self.turn, self.zoom])), 1)


def distances(
    points: Float[Tensor, "*batch count 2"], others: Float[Tensor, "*batch count 2"], mask: Bool[Tensor, "*batch count"]
) -> Float[Tensor, "*batch"]:
    """Mean distance of landmarks, over those of the mask."""
    return ((points - others).norm(dim=-1) * mask).sum(-1) / mask.sum(-1)


def load_pairs(
    name: str,
    root: Path | None,
    split: Part,
    side: int,
    count: int = 200,
    spread: Spread | None = None,
    views: int = 1,
) -> Pairs:
    """Read or render one split.

    `train` is to be displaced anew in every episode (`foveate.envs.registration`): rendered pairs lie as they belong,
    BIRL's as they are. `val` and `test` are displaced here, once, the same for every run: each picture is what a user
    would have, cut off at its frame.

    Args:
        name: one of `DATASETS`.
        root: the folder of `pairs.csv`; not used for rendered pairs.
        split: part of the data.
        side: in pixels; pictures of files are made as large as fits, and filled up with their mean colour.
        count: pairs to render.
        spread: how far those of `val` and `test` are displaced.
        views: of a held-out BIRL pair: as it is, then displaced from the best fit in other ways.

    Raises:
        InputError: an unknown name; a side below 16 pixels; what the readers raise.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")
    if side < 16:
        raise InputError(f"image_size: found {side}, expected at least 16 pixels")
    spread = spread or Spread()
    if name == "birl":
        found = Pairs(*read_pairs(root, split, side))
        if split == "train" or views == 1:
            return found
        rows = torch.arange(len(found)).repeat_interleave(views - 1)
        more = displaced(map_tree(lambda leaf: leaf[rows], found), noise.key("views", torch.arange(len(rows))), spread)
        return concatenate([found, more], 0)
    rendered = _rendered(name, split, side, count)
    return rendered if split == "train" else displaced(rendered, noise.key(split, torch.arange(len(rendered))), spread)


def without_landmarks(fixed: Float[Tensor, "batch 3 side side"], moving: Float[Tensor, "batch 3 side side"]) -> Pairs:
    """Pictures in [0, 1] of which nobody knows how they belong together: they count as if they lay as they should."""
    corners = torch.tensor([[0.0, 0.0], [fixed.shape[-1], fixed.shape[-1]]], device=fixed.device)
    points = corners.expand(len(fixed), -1, -1)
    one, other = ((255 * each).round().byte() for each in (fixed, moving))
    return Pairs(one, other, points, points, torch.ones(points.shape[:2], dtype=torch.bool, device=fixed.device))


def checked_pair(images: Any) -> tuple[Tensor, Tensor]:
    """The pictures "fixed" and "moving" that a user hands in.

    Raises:
        InputError: not these two, or they break the convention, are not RGB or not as many.
    """
    if not isinstance(images, dict) or not {"fixed", "moving"} <= set(images):
        found = ", ".join(images) if isinstance(images, dict) else type(images).__name__
        raise InputError(f"images: found {found}, expected a dict of 'fixed' and 'moving' pictures")
    for name in ("fixed", "moving"):
        check_rgb(images[name], name)
    fixed, moving = images["fixed"], images["moving"]
    if len(fixed) != len(moving):
        raise InputError(f"moving: found {len(moving)} pictures, expected {len(fixed)}, one for each fixed one")
    return fixed, moving


def displaced(pairs: Pairs, keys: Int[Tensor, " size"], spread: Spread) -> Pairs:
    """The pairs, each moving picture carried away from its best fit, with its landmarks, and cut off at its frame."""
    start = compose(inverse(matrices(spread.draw(keys, pairs.side), pairs.side)), pairs.aligned())
    moved = [
        warp(moving.float() / 255, matrix, (pairs.side, pairs.side))
        for moving, matrix in zip(pairs.moving.split(_AT_ONCE), start.split(_AT_ONCE), strict=True)
    ]
    pixels = (255 * torch.cat(moved)).round().byte()
    return Pairs(pairs.fixed, pixels, pairs.fixed_points, apply(start, pairs.moving_points), pairs.mask)


@lru_cache(maxsize=6)
def _rendered(name: str, split: Part, side: int, count: int) -> Pairs:
    """The middle of pictures, and the whole of them in another contrast."""
    keys, whole, first = noise.key("pairs", name, split, torch.arange(count)), CANVAS * side, (CANVAS - 1) * side // 2
    digits = load_images("digits", None, split, None) if name == "digits" else None
    photographs = _photographs(split, whole, count) if name == "photographs" else None
    fixed, moving = [], []
    for rows in torch.arange(count).split(_AT_ONCE):
        if photographs is not None:
            looks = photographs[rows].float() / 255
        elif digits is not None:
            several = [
                digit_scenes.digit_scenes(digits, noise.fold(keys[rows], k), whole, OBJECTS)[0] for k in range(3)
            ]
            looks = torch.stack(several).amax(0)  # of one scene, hardly anything may lie in the window
        else:
            looks = scenes.draw(scenes.describe(keys[rows], OBJECTS - 4, OBJECTS), whole).images
        window = looks[:, :, first : first + side, first : first + side]
        fixed.append((255 * window).round().byte())
        moving.append((255 * other_contrast(looks, keys[rows])).round().byte())
    step = (torch.arange(GRID) + 0.5) / GRID
    points = (torch.cartesian_prod(step, step) * MIDDLE + (1 - MIDDLE) / 2) * side
    points = points.expand(count, -1, -1)
    mask = torch.ones(points.shape[:2], dtype=torch.bool)
    return Pairs(torch.cat(fixed), torch.cat(moving), points, points + first, mask)


def _photographs(split: Part, side: int, count: int) -> UInt8[Tensor, "count 3 side side"]:
    """Crops in the order of a permutation, over again if there are too few."""
    pool = load_photographs("photographs", None, split, min(side, PHOTOGRAPH))
    chosen = pool[noise.permutation(noise.key("crops", split), len(pool))[torch.arange(count) % len(pool)]]
    if chosen.shape[-1] == side:
        return chosen
    larger = [F.interpolate(some.float(), (side, side), mode="bicubic").round() for some in chosen.split(_AT_ONCE)]
    return torch.cat(larger).clamp(0, 255).byte()


def other_contrast(
    images: Float[Tensor, "batch 3 height width"], keys: Int[Tensor, " batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """The pictures as another instrument might show them.

    Colours are mixed, put through a curve x^γ that is turned round in half of them (bright becomes dark), stained with
    two colours, and noise is added. Each picture has its own.
    """
    draws = noise.uniform(noise.fold(keys, "contrast"), 17)
    mixing = draws[:, :9].view(-1, 3, 3).square()
    mixed = torch.einsum("bij,bjhw->bihw", mixing / mixing.sum(2, keepdim=True), images)
    curved = mixed.clamp(0, 1) ** (4 ** (2 * draws[:, 9] - 1))[:, None, None, None]
    curved = torch.where((draws[:, 10] < 0.5)[:, None, None, None], 1 - curved, curved)
    low, high = 0.35 * draws[:, 11:14, None, None], 1 - 0.35 * draws[:, 14:17, None, None]
    grain = noise.normal(noise.fold(keys, "grain"), *images.shape[1:])
    return (low + (high - low) * curved + 0.03 * grain).clamp(0, 1)
