"""Boxes around objects: cut out of images or the frames of videos, and the masks made there put back.

Boxes are xyxy in pixels of the frames. A region is a box that may reach beyond its frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.geometry import enlarged, mask_boxes

LEAST = 4.0  # pixels of a side of a box
Planes: TypeAlias = UInt8[Tensor, "frames height width planes"]
Regions: TypeAlias = Float[Tensor, "batch 4"]
Place: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Make: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept_inside(boxes: Float[Tensor, "*batch 4"], size: tuple[int, int]) -> Float[Tensor, "*batch 4"]:
    """Boxes cut at the edges of a frame of `size` = (height, width), of which `LEAST` pixels a side are left."""
    limit = boxes.new_tensor([size[1], size[0]])
    low = torch.minimum(boxes[..., :2].clamp(min=0), limit - LEAST)
    high = torch.maximum(torch.minimum(boxes[..., 2:], limit), low + LEAST)
    return torch.cat((low, high), -1)


def jittered(boxes: Regions, keys: Int[Tensor, " batch"], much: float, size: tuple[int, int]) -> Regions:
    """Boxes moved and scaled at random: by normal numbers of standard deviation `much`, in parts of their sides."""
    draws = much * noise.normal(noise.fold(keys, "jitter"), 4).clamp(-2.5, 2.5)
    sides = boxes[:, 2:] - boxes[:, :2]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 + draws[:, :2] * sides
    half = sides / 2 * draws[:, 2:].exp()
    return kept_inside(torch.cat((middle - half, middle + half), 1), size)


def cut(
    planes: Planes, frames: Int[Tensor, " batch"], regions: Regions, side: int
) -> Float[Tensor, "batch planes {side} {side}"]:
    """Regions of frames as squares of `side` pixels, in [0, 1]; 0 beyond the frame.

    Only the pixels around each place are read, however large the frames are.
    """
    height, width = planes.shape[1:3]
    share = (torch.arange(side, device=regions.device) + 0.5) / side
    corners = regions.unflatten(1, (2, 2))
    points = corners[:, :1] + share[:, None] * (corners[:, 1:] - corners[:, :1])  # [batch, side, (x, y)]
    limit = regions.new_tensor([width, height])
    places = (points - 0.5).clamp(min=0).minimum(limit - 1)
    low = torch.minimum(places.long(), (limit - 2).long())
    part = places - low
    number, x, y = frames[:, None, None], low[:, None, :, 0], low[:, :, None, 1]
    across, down = part[:, None, :, 0, None], part[:, :, None, 1, None]
    flat, row = planes.flatten(0, 2).squeeze(1), (number * height + y) * width + x  # one plane is read faster as a line
    above, below = (_read(flat, at).lerp_(_read(flat, at + 1), across) for at in (row, row + width))
    seen = above.lerp_(below, down).div_(255).clamp_(0, 1).permute(0, 3, 1, 2)
    return seen.mul_(within(regions, side, (height, width))[:, None])


def _read(flat: Tensor, at: Int[Tensor, "batch s s"]) -> Float[Tensor, "batch s s planes"]:
    return flat.index_select(0, at.flatten()).view(*at.shape, flat[0].numel()).float()


def within(regions: Regions, side: int, size: tuple[int, int]) -> Bool[Tensor, "batch {side} {side}"]:
    """Which pixels of regions as squares of `side` pixels lie in a frame of `size` = (height, width)."""
    share = (torch.arange(side, device=regions.device) + 0.5) / side
    x, y = (regions[:, k, None] + share * (regions[:, k + 2] - regions[:, k])[:, None] for k in (0, 1))
    across, down = (x >= 0) & (x <= size[1]), (y >= 0) & (y <= size[0])
    return down[:, :, None] & across[:, None]


def pasted(
    shares: Float[Tensor, "batch s s"], regions: Regions, size: tuple[int, int]
) -> Float[Tensor, "batch height width"]:
    """Put squares back where `cut` took them from, in frames of `size` = (height, width); 0 elsewhere."""
    height, width = size
    x, y = (torch.arange(length, device=shares.device) + 0.5 for length in (width, height))
    low, sides = regions[:, None, :2], (regions[:, 2:] - regions[:, :2])[:, None]
    across = (x[:, None] - low[..., :1]) / sides[..., :1] * 2 - 1
    down = (y[:, None] - low[..., 1:]) / sides[..., 1:] * 2 - 1
    places = torch.stack(
        (across.mT.expand(-1, height, -1), down.expand(-1, -1, width)), -1
    )  # [batch, height, width, (x, y)]
    found = F.grid_sample(shares[:, None], places, padding_mode="border", align_corners=False)[:, 0]
    return found * (places.abs() <= 1).all(-1)


@dataclass(frozen=True)
class Counted:
    """Masks in the squares of their regions, held against the truth of the whole frame: a tree of [batch].

    Attributes:
        both: pixels of the frame in the mask and in the truth.
        found: pixels in the mask.
        wanted: pixels in the truth, wherever in the frame.
    """

    both: Float[Tensor, " batch"]
    found: Float[Tensor, " batch"]
    wanted: Float[Tensor, " batch"]

    @property
    def iou(self) -> Float[Tensor, " batch"]:
        """Intersection over union; what of the truth lies beyond the region is missed. 1 if both are empty."""
        either = self.found + self.wanted - self.both
        return torch.where(either > 0, self.both / either.clamp(min=1e-6), 1.0).clamp(0, 1)


def counted(
    masks: Bool[Tensor, "batch s s"],
    truth: Bool[Tensor, "batch s s"],
    wanted: Float[Tensor, " batch"],
    regions: Regions,
) -> Counted:
    """Count pixels of the frame by those of squares.

    Args:
        masks: in the squares, nothing of them beyond the frame.
        truth: in the same squares.
        wanted: pixels of the truth in the whole frame.
        regions: of the squares.
    """
    area = (regions[:, 2:] - regions[:, :2]).prod(1) / (masks.shape[1] * masks.shape[2])
    both, found = (masks & truth).sum((1, 2)) * area, masks.sum((1, 2)) * area
    return Counted(torch.minimum(both, wanted), found, wanted)


def changes(boxes: Regions, targets: Regions) -> Regions:
    """What moves and scales boxes into others: shifts of the centre in parts of the sides, logarithms of the ratios."""
    sides, others = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / sides
    return torch.cat((shift, (others / sides).log()), 1)


def changed(boxes: Regions, by: Regions, size: tuple[int, int]) -> Regions:
    """Undo `changes`, within a frame of `size` = (height, width)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 + by[:, :2] * sides
    half = sides / 2 * by[:, 2:].clamp(-1, 1).exp()
    return kept_inside(torch.cat((middle - half, middle + half), 1), size)


@dataclass(frozen=True)
class Carried:
    """Masks carried through videos in lockstep, and the boxes they were made from: a tree of [videos, time, ...].

    Attributes:
        masks: the first is the one given.
        boxes: object boxes; the first is that of the mask given.
        contexts: which context box.
    """

    masks: Bool[Tensor, "videos time height width"]
    boxes: Float[Tensor, "videos time 4"]
    contexts: Int[Tensor, "videos time"]


@torch.no_grad()
def carry(
    start: Bool[Tensor, "videos height width"],
    frames: Int[Tensor, "videos time"],
    place: Place,
    make: Make,
    factors: Float[Tensor, " contexts"],
    context: int,
    trim: float = 0.005,
) -> Carried:
    """Carry the masks of first frames through all videos at once.

    Args:
        start: the masks.
        frames: numbers of the frames.
        place: (frames, boxes of the masks before, contexts before) → boxes and contexts from which to make these masks.
        make: (frames, boxes, contexts) → for each pixel of the context box the share of the object, [videos, s, s].
        factors: of the context boxes.
        context: which one the second frame begins with.
        trim: of the boxes of masks (`fitted`). A mask without a pixel leaves the box where it was.
    """
    (height, width), count = start.shape[1:], len(start)
    size = height, width
    box = kept_inside(mask_boxes(start, trim)[0], size)
    choice = torch.full((count,), context, device=start.device)
    rows = [(start, box, choice)]
    for frame in frames.unbind(1)[1:]:
        placed, choice = place(frame, box, choice)
        mask = pasted(make(frame, placed, choice), enlarged(placed, factors[choice]), size) > 0.5
        rows.append((mask, placed, choice))
        found, there = mask_boxes(mask, trim)
        box = torch.where(there[:, None], kept_inside(found, size), placed)
    return Carried(*(torch.stack(row, 1) for row in zip(*rows, strict=True)))
