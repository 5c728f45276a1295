"""Harder images from easy ones, as in the paper on recurrent models of visual attention.

Mnih, Heess, Graves, Kavukcuoglu 2014, "Recurrent Models of Visual Attention", section 4.1: a digit at a random place of
a larger black canvas (translated), to which 8×8 pieces of other random digits are added at random places (cluttered):
4 pieces on 60×60, 8 on 100×100. How they combine follows the generator that DeepMind published for this task
(github.com/google-deepmind/mnist-cluttered): pieces and digit are added up and the sum is cut at white; every place at
which a piece or the digit fits is equally likely. One thing differs: a piece never comes from the very image it is laid
over, as the text has it ("from other random MNIST digits"); that generator may draw it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.types import InputError

PIECE = 8


@dataclass(frozen=True)
class Variant:
    """A way to make images.

    Attributes:
        canvas: side of the square canvas in pixels; None keeps the image as it is.
        pieces: number of 8×8 pieces of other images added to it.
        description: one line for lists and help.
    """

    canvas: int | None
    pieces: int
    description: str


VARIANTS: dict[str, Variant] = {
    "plain": Variant(None, 0, "the image as it is"),
    "translated60": Variant(60, 0, "the image at a random place of a black 60x60 canvas"),
    "cluttered60": Variant(60, 4, "translated60 with 4 pieces (8x8) of other images added"),
    "cluttered100": Variant(100, 8, "the same on 100x100 with 8 pieces"),
}


def canvas_size(variant: str, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what `render` makes of images of `image_size` = (height, width).

    Raises:
        InputError: no such variant; an image larger than the canvas, or too small to cut a piece from.
    """
    if variant not in VARIANTS:
        nearest = difflib.get_close_matches(variant, VARIANTS, 1, cutoff=0.0)[0]
        raise InputError(f"variant: no {variant!r}, expected one of {', '.join(VARIANTS)}: did you mean {nearest!r}?")
    canvas, (height, width) = VARIANTS[variant].canvas, image_size
    if canvas is None:
        return image_size
    if max(image_size) > canvas:
        raise InputError(
            f"variant: images of {width}x{height} do not fit the {canvas}x{canvas} canvas of {variant!r}: "
            f"use variant 'plain', or image_size {canvas} or less"
        )
    if VARIANTS[variant].pieces and min(image_size) < PIECE:
        raise InputError(
            f"variant: images of {width}x{height} are too small to cut the {PIECE}x{PIECE} pieces of {variant!r} from: "
            f"use variant 'plain', or image_size {PIECE} or more"
        )
    return canvas, canvas


def render(
    pool: UInt8[Tensor, "size channels height width"],
    ids: Int[Tensor, " batch"],
    keys: Int[Tensor, " batch"],
    variant: str,
) -> Float[Tensor, "batch channels H W"]:
    """Make one image of each of `pool[ids]`, float32 in [0, 1], on the device of the pool.

    Row i is a function of the pool, `ids[i]`, `keys[i]` (see `foveate.noise`) and the variant; it does not depend on
    the rest of the batch. All channels of an image move together.

    Raises:
        InputError: as `canvas_size`.
    """
    size, channels, height, width = pool.shape
    rows, columns = canvas_size(variant, (height, width))
    chosen = pool.index_select(0, ids).float().div_(255)
    if VARIANTS[variant].canvas is None:
        return chosen
    pieces = VARIANTS[variant].pieces
    place = [rows - height + 1, columns - width + 1]
    piece = [max(size - 1, 1), height - PIECE + 1, width - PIECE + 1, rows - PIECE + 1, columns - PIECE + 1]
    highs = torch.tensor(place + piece * pieces, device=pool.device)
    # one call for all draws: hashing small tensors is what this function would otherwise spend half its time on
    draws = noise.integers(noise.fold(keys, "variant"), highs, len(highs))

    canvas = torch.zeros(len(ids), channels, rows * columns, device=pool.device)
    _add(canvas, chosen[:, :, None], draws[:, None, 0] * columns + draws[:, None, 1], columns)
    if pieces:
        donor, top, left, landing_row, landing_column = draws[:, 2:].unflatten(1, (pieces, 5)).unbind(-1)
        # from 1 to size - 1 places onwards, round the pool, never comes back to the image itself
        donor = (ids[:, None] + 1 + donor) % size
        channel = torch.arange(channels, device=pool.device)[:, None]
        start = (donor[:, None] * channels + channel) * (height * width) + (top * width + left)[:, None]
        source = start[..., None, None] + _window(PIECE, PIECE, width, pool.device)
        cut = pool.flatten().index_select(0, source.flatten()).view(source.shape).float().div_(255)
        _add(canvas, cut, landing_row * columns + landing_column, columns)
    return canvas.clamp_(max=1).view(len(ids), channels, rows, columns)


def _window(height: int, width: int, stride: int, device: torch.device) -> Int[Tensor, "height width"]:
    """Flat offsets of a window's pixels in an image whose rows are `stride` long."""
    return torch.arange(height, device=device)[:, None] * stride + torch.arange(width, device=device)


def _add(
    canvas: Float[Tensor, "batch channels pixels"],
    patches: Float[Tensor, "batch channels count height width"],
    starts: Int[Tensor, "batch count"],
    width: int,
) -> None:
    """Add patches whose top left pixels are at `starts`, in rows `width` long; where they overlap, all count."""
    window = _window(patches.shape[-2], patches.shape[-1], width, canvas.device)
    pixels = (starts[..., None, None] + window).flatten(1)
    canvas.scatter_add_(2, pixels[:, None].expand(-1, canvas.shape[1], -1), patches.flatten(2))
