"""A small detector without anchors: every cell of a feature map says which class, and where its box is.

After Tian et al. 2019, "FCOS: fully convolutional one-stage object detection", on one map: cells near the middle of an
object are taught its class by cross-entropy and its box by 1 - generalised IoU. The focal loss of that paper leaves
probabilities too even to draw from. A box is told as the offset of its centre from the cell and the logarithms of its
sides, so that objects smaller than a cell have one too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from foveate.geometry import Boxes, areas
from foveate.models.backbones import TORCHVISION, Pretrained, Pyramid, convolutions
from foveate.models.candidates import Detector, Proposals, clipped, proposed
from foveate.types import InputError

NEAR = 0.2  # how far from an object's middle cells are taught it, in parts of its sides
WIDEST = 4.0  # of the logarithm of a side, in parts of two cells
RARE = 0.01  # probability of being anything that a cell begins with


class Cells(Detector):
    """A detector of ours, small enough to be trained from nothing.

    Args:
        classes: how many there are.
        backbone: "convolutions", learned from nothing, or a name of timm that `models.backbones.Pretrained` knows.
        stride: side of a cell in pixels, a power of 2 from 4 on.
        width: of the vectors.
    """

    def __init__(self, classes: int, backbone: str = "convolutions", stride: int = 8, width: int = 96) -> None:
        super().__init__()
        self.stride = stride
        self.eye: nn.Module
        if backbone == "convolutions":
            self.eye = nn.Sequential(convolutions(3, width, stride), _Tower(width, 3))
        elif backbone.startswith(TORCHVISION):
            raise InputError(f"backbone: found {backbone!r}, but cells read networks of timm; name one of these")
        else:
            self.eye = Pyramid(Pretrained(backbone, 32), stride, width)
        # one for each, so that the reward of decisions does not move the boxes by the way
        self.what, self.where = (nn.Sequential(_Tower(width, 2), nn.GroupNorm(8, width), nn.GELU()) for _ in range(2))
        self.classify = nn.Conv2d(width, classes, 3, padding=1)
        self.place = nn.Conv2d(width, 4, 3, padding=1)
        for layer, bias in ((self.classify, math.log(RARE / classes)), (self.place, 0.0)):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        places: tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]] | None,
    ) -> Proposals:
        """The likeliest cells, or those of given places."""
        boxes, logits, _ = self.dense(images)
        return proposed(clipped(boxes, images), logits, places, self)

    def dense(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch cells 4"], Float[Tensor, "batch cells choices"], Float[Tensor, "cells 2"]]:
        """Box and logits of every cell, and the middles of the cells; boxes may reach beyond the image."""
        seen = self.eye(images)
        rows, columns = seen.shape[-2:]
        y, x = (torch.arange(count, device=seen.device) * self.stride + self.stride / 2 for count in (rows, columns))
        middles = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        scores = self.classify(self.what(seen)).flatten(2).mT.float()
        numbers = self.place(self.where(seen)).flatten(2).mT.float()
        centres = middles + numbers[..., :2] * self.stride
        # a side of two cells to begin with; bounded softly, as a clamp has no gradient by which to come back
        half = (WIDEST * (numbers[..., 2:] / WIDEST).tanh()).exp() * self.stride
        boxes = torch.cat((centres - half, centres + half), -1)
        return boxes, torch.cat((scores, torch.zeros_like(scores[..., :1])), -1), middles

    def loss(self, images: Float[Tensor, "batch 3 height width"], targets: Boxes) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of all cells, and 1 - generalised IoU of those that belong to an object, over their number."""
        boxes, logits, middles = self.dense(images)
        owner, is_object, counted = taught(middles, targets, self.stride)
        labels = torch.where(is_object, targets.labels.gather(1, owner), logits.shape[-1] - 1)
        number = is_object.sum().clamp(min=1)
        log_probs = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        wanted = targets.boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        apart = generalized_box_iou_loss(boxes[is_object], wanted[is_object], reduction="sum")
        return {"cross_entropy": -(log_probs * counted).sum() / number, "box": apart / number}

    def backbone(self) -> Iterator[nn.Parameter]:
        """The weights before the towers."""
        return self.eye.parameters()


def taught(
    middles: Float[Tensor, "cells 2"], targets: Boxes, stride: int
) -> tuple[Int[Tensor, "batch cells"], Bool[Tensor, "batch cells"], Bool[Tensor, "batch cells"]]:
    """Which target each cell is taught, whether it is one at all, and whether it counts.

    Cells within `NEAR` of an object's middle are taught it, and in any case the one in which the middle lies; of
    several objects the smallest. Cells of a crowd do not count unless they are taught another object.
    """
    crowd = torch.zeros_like(targets.mask) if targets.crowd is None else targets.crowd
    low, high = targets.boxes[:, None, :, :2], targets.boxes[:, None, :, 2:]
    distance = (middles[None, :, None] - (low + high) / 2).abs()
    near = (distance <= ((high - low) * NEAR).clamp(min=stride / 2)).all(-1) & (targets.mask & ~crowd)[:, None]
    size = torch.where(near, areas(targets.boxes)[:, None], torch.inf)
    inside = ((middles[None, :, None] >= low) & (middles[None, :, None] <= high)).all(-1)
    in_crowd = (inside & (targets.mask & crowd)[:, None]).any(-1)
    is_object = near.any(-1)
    return size.argmin(-1), is_object, is_object | ~in_crowd


class _Tower(nn.Sequential):
    """Convolutions of 3×3, each with its input added."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(*(_Layer(width) for _ in range(depth)))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, seen: Tensor) -> Tensor:
        """As it came, and what the neighbours add."""
        return seen + self.turn(seen)
