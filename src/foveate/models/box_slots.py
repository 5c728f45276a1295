"""The supervised twin of an agent that searches for boxes: one look at a feature map, and all boxes at once.

After Carion et al. 2020, "End-to-end object detection with transformers", as far as this goes without one: some slots,
each with a box and a confidence; slots and objects are matched, and what is matched learns by L1 and generalised IoU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from foveate.geometry import Boxes
from foveate.models.region_q import View, eye, kinds, region_cells, seen_by


class BoxSlots(nn.Module):
    """Boxes of an image from its map, in one step.

    Args:
        slots: how many boxes.
        side: of the images in pixels.
        backbone: as for `models.region_q.RegionQ`.
        stride: of the map, in pixels.
        bins: cells a side in which it reads the map.
        width: of a cell's vector.
        hidden: of the layers.
        classes: that may be asked for; if there are several it is told which.
    """

    def __init__(
        self,
        slots: int,
        side: int,
        backbone: str = "convolutions",
        stride: int = 4,
        bins: int = 14,
        width: int = 32,
        hidden: int = 128,
        classes: int = 1,
    ) -> None:
        super().__init__()
        self.side, self.stride, self.bins, self.backbone = side, stride, bins, backbone
        self.eye, channels = eye(side, backbone, stride, width)
        self.whole = View(channels, bins, width, hidden)
        self.told = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 5 * slots), nn.Unflatten(1, (slots, 5))
        )
        self.kinds = kinds(classes, width)

    def see(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features rows columns"]:
        """The maps of images in [0, 1]."""
        return seen_by(self, images)

    def forward(
        self, maps: Float[Tensor, "batch features rows columns"], label: Int[Tensor, " batch"] | None = None
    ) -> tuple[Float[Tensor, "batch slots 4"], Float[Tensor, "batch slots"]]:
        """Boxes in pixels, within the image, and the logits of their confidence."""
        number = torch.arange(len(maps), device=maps.device)
        whole = maps.new_tensor([0.0, 0.0, self.side, self.side]).expand(len(maps), 1, 4)
        weights = None if self.kinds is None else self.kinds(label)
        told = self.told(self.whole(region_cells(maps, whole, number, self.bins, self.stride)[:, 0], weights))
        places = told[..., :4].sigmoid()
        centres, half = places[..., :2], places[..., 2:] / 2
        boxes = torch.cat((centres - half, centres + half), -1).clamp(0, 1) * self.side
        return boxes, told[..., 4]

    @torch.no_grad()
    def found(
        self, maps: Float[Tensor, "batch features rows columns"], label: Int[Tensor, " batch"] | None = None
    ) -> Boxes:
        """All slots, of the class asked for, with their confidence in [0, 1] as score."""
        boxes, logits = self(maps, label)
        there = torch.ones_like(logits, dtype=torch.bool)
        labels = torch.zeros_like(there, dtype=torch.int64) if label is None else label[:, None].expand_as(there)
        return Boxes(boxes, labels, there, logits.sigmoid())


def slot_loss(
    boxes: Float[Tensor, "batch slots 4"], logits: Float[Tensor, "batch slots"], targets: Boxes, side: int
) -> dict[str, Float[Tensor, ""]]:
    """L1 in parts of the side and 1 - generalised IoU of matched slots, and cross-entropy of all confidences."""
    owner, taken = matched(boxes.detach(), targets, side)
    wanted = targets.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[taken]
    number = taken.sum().clamp(min=1)
    return {
        "l1_loss": 5 * (boxes[taken] - wanted).abs().sum() / (4 * side * number),
        "giou_loss": generalized_box_iou_loss(boxes[taken], wanted, reduction="sum") / number,
        "confidence_loss": F.binary_cross_entropy_with_logits(logits, taken.float()),
    }


def matched(
    boxes: Float[Tensor, "batch slots 4"], targets: Boxes, side: int
) -> tuple[Int[Tensor, "batch slots"], Bool[Tensor, "batch slots"]]:
    """Which object each slot is taught, and whether it is taught one: the nearest pair first, each of them once."""
    far = (boxes[:, :, None] - targets.boxes[:, None]).abs().sum(-1) / side
    far = far.masked_fill(~targets.wanted[:, None], torch.inf)
    slots, objects = far.shape[1:]
    owner = torch.zeros(far.shape[:2], dtype=torch.int64, device=far.device)
    taken = torch.zeros_like(owner, dtype=torch.bool)
    for _ in range(min(slots, objects)):
        nearest, pair = far.flatten(1).min(1)
        slot, target = F.one_hot(pair // objects, slots).bool(), F.one_hot(pair % objects, objects).bool()
        now = slot & nearest.isfinite()[:, None]
        owner, taken = torch.where(now, (pair % objects)[:, None], owner), taken | now
        far = far.masked_fill(slot[:, :, None] | target[:, None], torch.inf)
    return owner, taken
