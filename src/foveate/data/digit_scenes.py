"""Scenes of several handwritten digits on a canvas, with the boxes of their ink."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from foveate import noise
from foveate.data.classification import Images
from foveate.geometry import Boxes, mask_boxes

SMALLEST, LARGEST = 0.16, 0.34  # side of a digit with its margin, in parts of the canvas
INK = 0.25  # brightness from which on a pixel belongs to a digit
_TRIES = 12  # places among which a digit takes the one that is farthest from the others


def digit_scenes(images: Images, keys: Int[Tensor, " batch"], side: int, most: int) -> tuple[Tensor, Boxes]:
    """Scenes [batch, 3, side, side] in [0, 1] of 1 to `most` digits, white on black, and their boxes.

    Row i follows from key i alone. Digits are stretched evenly, and stand upright and apart where there is room.
    """
    draws = noise.uniform(noise.fold(keys, "digits"), most, 2 + 2 * _TRIES)
    mask = torch.arange(most) < 1 + noise.integers(noise.fold(keys, "count"), most)[:, None]
    which = (draws[..., 0] * len(images)).long()
    sizes = SMALLEST + (LARGEST - SMALLEST) * draws[..., 1]
    tries = draws[..., 2:].unflatten(-1, (_TRIES, 2)) * (1 - sizes[..., None, None]) + sizes[..., None, None] / 2
    centres: list[Tensor] = []
    for place in range(most):
        here = tries[:, place]
        if centres:
            apart = (here[:, :, None] - torch.stack(centres, 1)[:, None]).abs().amax(-1)
            room = (apart - (sizes[:, :place] + sizes[:, place, None])[:, None] / 2).amin(2)
            here = here.gather(1, room.argmax(1)[:, None, None].expand(-1, 1, 2))
        centres.append(here[:, 0])
    steps = (torch.arange(side) + 0.5) / side
    points = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # (x, y) in parts of the canvas
    canvas, boxes = torch.zeros(len(keys), 1, side, side), []
    for place in range(most):
        grid = (points - centres[place][:, None, None]) / sizes[:, place, None, None, None] * 2
        drawn = F.grid_sample(images.pixels[which[:, place]].float() / 255, grid, "bilinear", align_corners=False)
        drawn = drawn * mask[:, place, None, None, None]
        boxes.append(mask_boxes(drawn[:, 0] > INK)[0])
        canvas = torch.maximum(canvas, drawn)
    around = torch.stack(boxes, 1)
    mask = mask & (around[..., 2] > around[..., 0])
    return canvas.expand(-1, 3, -1, -1), Boxes(around, images.labels[which], mask)
