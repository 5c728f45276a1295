"""Locations, boxes and segments: the conventions, and the few conversions between them.

A location is (x, y) in [-1, 1]: -1 is the outer edge of the first pixel, +1 the outer edge of the last one, as in
`torch.nn.functional.grid_sample(..., align_corners=False)`. Pixel coordinates put the centre of the first pixel at 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.types import InputError, concatenate, map_tree


def to_pixels(locations: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Turn locations (x, y) in [-1, 1] into pixel coordinates (x, y) of an image of `size` = (height, width)."""
    return (locations + 1) / 2 * locations.new_tensor([size[1], size[0]])


def to_locations(pixels: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Turn pixel coordinates (x, y) of an image of `size` = (height, width) into locations in [-1, 1]."""
    return pixels / pixels.new_tensor([size[1], size[0]]) * 2 - 1


@dataclass(frozen=True)
class Boxes:
    """Sets of boxes, one an image, padded to one length: a tree of [batch, count, ...].

    Attributes:
        boxes: (left, top, right, bottom) in absolute pixels of the image; the padding may hold anything finite.
        labels: the class of each, from 0.
        mask: true where there is a box.
        scores: how sure a detector is of each, if it says so; any scale.
        crowd: true where a target is a region of many objects that nobody counted.
    """

    boxes: Float[Tensor, "batch count 4"]
    labels: Int[Tensor, "batch count"]
    mask: Bool[Tensor, "batch count"]
    scores: Float[Tensor, "batch count"] | None = None
    crowd: Bool[Tensor, "batch count"] | None = None

    @property
    def wanted(self) -> Bool[Tensor, "batch count"]:
        """True where there is a box that is to be found: no crowd."""
        return self.mask if self.crowd is None else self.mask & ~self.crowd


@dataclass(frozen=True)
class Segments:
    """Panoptic maps: a tree of [batch, ...].

    Attributes:
        ids: 0 for a pixel that belongs to nothing (void), k for one of segment k.
        labels: the class of segment 1, 2, ..., from 0.
        crowd: true where a true segment is many objects that nobody told apart.
    """

    ids: Int[Tensor, "batch height width"]
    labels: Int[Tensor, "batch segments"]
    crowd: Bool[Tensor, "batch segments"] | None = None


def joined(sets: Sequence[Boxes]) -> Boxes:
    """Sets of several batches as one, padded to the longest."""
    most = max(boxes.mask.shape[1] for boxes in sets)

    def pad(leaf: Tensor) -> Tensor:
        after = (0, most - leaf.shape[1])
        return F.pad(leaf, (0, 0, *after) if leaf.ndim == 3 else after)

    return concatenate([map_tree(pad, boxes) for boxes in sets], 0)


def areas(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Width times height, in square pixels; 0 for a box without one of them."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def enlarged(boxes: Float[Tensor, "*batch 4"], factor: float | Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 4"]:
    """Boxes with sides so many times as long around the same centre; they may reach beyond the image."""
    more = (torch.as_tensor(factor, device=boxes.device)[..., None] - 1) / 2 * (boxes[..., 2:] - boxes[..., :2])
    return torch.cat((boxes[..., :2] - more, boxes[..., 2:] + more), -1)


def mask_boxes(
    masks: Bool[Tensor, "*batch height width"], trim: float = 0.0
) -> tuple[Float[Tensor, "*batch 4"], Bool[Tensor, "*batch"]]:
    """The box around each mask in pixels, and whether there is anything in it; without, the box is all 0.

    Args:
        masks: of images.
        trim: the share of a mask that may lie beyond each edge, so that a few stray pixels do not stretch the box.
    """
    total = masks.sum((-2, -1))[..., None]
    edges = []
    for line in (masks.sum(-2), masks.sum(-1)):  # pixels of each column, of each row
        so_far = line.cumsum(-1)
        first = (so_far > trim * total).int().argmax(-1)
        last = (so_far >= (1 - trim) * total).int().argmax(-1)
        edges.append((first, last + 1))
    boxes = torch.stack((edges[0][0], edges[1][0], edges[0][1], edges[1][1]), -1).float()
    return boxes * (total > 0), total[..., 0] > 0


def overlaps(
    boxes: Float[Tensor, "batch count 4"],
    others: Float[Tensor, "batch more 4"],
    crowd: Bool[Tensor, "batch more"] | None = None,
) -> Float[Tensor, "batch count more"]:
    """Intersection over union of every box of an image with every other one, in [0, 1]; 0 where the union is empty.

    With a `crowd` among the others it is the intersection over the box's own area (as pycocotools has it): a box that
    lies in a crowd is not to be blamed for the rest of it.
    """
    low = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    own = areas(boxes)[:, :, None]
    whole = own + areas(others)[:, None] - shared
    if crowd is not None:
        whole = torch.where(crowd[:, None], own, whole)
    return torch.where(whole > 0, shared / whole, 0.0)


def check_boxes(found: Boxes, field: str, size: tuple[int, int] | None = None) -> None:
    """Check boxes that a user hands in against the convention; padding is not looked at.

    Args:
        found: the boxes.
        field: what the message calls them.
        size: (height, width) of the images; without it boxes may lie anywhere.

    Raises:
        InputError: NaN or infinity, a side of 0 or below (xywh, or corners in another order), all within [0, 1] where
            pixels are due, or beyond the image. The message names the first such box.
    """
    inside = found.mask[..., None].expand_as(found.boxes)
    wrong = inside & ~found.boxes.isfinite()
    if wrong.any():
        raise InputError(f"{_first(field, found, wrong.any(-1))} is not finite: leave it out, or repair it")
    turned = found.mask & (found.boxes[..., 2:] < found.boxes[..., :2]).any(-1)
    if turned.any():
        raise InputError(
            f"{_first(field, found, turned)} ends before it begins, expected left, top, right, bottom in pixels: "
            "convert x, y, width, height"
        )
    flat = found.mask & (found.boxes[..., 2:] == found.boxes[..., :2]).any(-1)
    if flat.any():
        raise InputError(f"{_first(field, found, flat)} has no area: leave it out, or repair it")
    if size is None or not found.mask.any():
        return
    if found.boxes[inside].max() <= 1 < min(size):
        raise InputError(
            f"{_first(field, found, found.mask)} lies within [0, 1], and so do all others, in images of "
            f"{size[1]}x{size[0]}; expected pixels: multiply by width and height"
        )
    limit = found.boxes.new_tensor([size[1], size[0], size[1], size[0]])
    beyond = found.mask & ((found.boxes < -1e-3) | (found.boxes > limit + 1e-3)).any(-1)
    if beyond.any():
        raise InputError(
            f"{_first(field, found, beyond)} reaches beyond the image of {size[1]}x{size[0]} pixels: clip it, or look "
            "whether it belongs to another size"
        )


def _first(field: str, found: Boxes, wrong: Tensor) -> str:
    row, place = wrong.nonzero()[0].tolist()
    numbers = ", ".join(f"{number:g}" for number in found.boxes[row, place].tolist())
    return f"{field}: box {place} of image {row} ({numbers})"
