"""Values of moving a box: what its region looks like, in a feature map that is computed once an image.

Caicedo and Lazebnik 2015, "Active object localization with deep reinforcement learning", section 4: the region with
some context, and the last actions, to the value of each action. There the region is cut out of the picture and put
through a network at every step; here the network sees the picture once, and a step reads its map between the cells.

    maps = network.see(images)                                          # once
    values = network(Regions(number, box, marks, marked, history, maps=maps))   # every step
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from foveate.geometry import enlarged
from foveate.models.backbones import Pretrained, convolutions
from foveate.types import InputError

CROSS = 1 / 3  # width of the bars of a mark, in parts of the box's sides
REGION = 224 / 192  # the paper's region has 16 pixels of context on each side in a crop of 224
AROUND = 2.5  # side of the region's surroundings, in parts of its own
NEVER = -1e4  # a value that nothing has
SAMPLES = 2  # points a side at which a cell of a region reads the map


@dataclass(frozen=True)
class Regions:
    """What is looked at: boxes in images of which each may have several.

    Attributes:
        number: of the image of each box, a row of `images` or `maps`.
        box: in pixels.
        marks: boxes that are crossed out.
        marked: how many of them there are: true for those.
        history: the last actions, the latest first; 0 where there was none, else 1 more than the action.
        label: the class that is searched for, if there are several.
        images: in [0, 1], to be seen anew.
        maps: of the images, if they were seen before.
    """

    number: Int[Tensor, " batch"]
    box: Float[Tensor, "batch 4"]
    marks: Float[Tensor, "batch triggers 4"]
    marked: Bool[Tensor, "batch triggers"]
    history: UInt8[Tensor, "batch past"]
    label: Int[Tensor, " batch"] | None = None
    images: Float[Tensor, "images 3 height width"] | None = None
    maps: Float[Tensor, "images features rows columns"] | None = None


class RegionQ(nn.Module):
    """Values of the actions on a box. Learns along, in `eye`, the map it reads; or reads that of a frozen network.

    Three views of the map, `bins`² cells each: the region with the paper's context, its surroundings, the whole image.
    A cell under a mark is zero. Beside them stand the last actions and the box's place and size. Of several
    classes the one that is searched for weighs the vectors of the cells.

    Args:
        values: what turns `hidden` features into the values of the actions.
        side: of the images in pixels.
        backbone: "convolutions", learned from nothing, or a name that `models.backbones.Pretrained` knows, frozen.
        stride: of the map, in pixels.
        actions: how many there are.
        past: how many of them are remembered.
        bins: cells a side of a view.
        width: of a cell's vector.
        hidden: of the layers.
        classes: that may be searched for; if there are several, `Regions.label` tells which.

    Raises:
        InputError: as `convolutions` and `Pretrained`; a stride that does not divide the side.
    """

    level: Tensor

    def __init__(
        self,
        values: nn.Module,
        side: int,
        backbone: str = "convolutions",
        stride: int = 4,
        actions: int = 9,
        past: int = 10,
        bins: int = 7,
        width: int = 32,
        hidden: int = 128,
        classes: int = 1,
    ) -> None:
        super().__init__()
        self.side, self.stride, self.bins, self.actions = side, stride, bins, actions
        self.backbone = backbone
        self.eye, self.channels = eye(side, backbone, stride, width)
        self.views = nn.ModuleList(View(self.channels, bins, width, hidden) for _ in range(3))
        self.join = nn.Sequential(nn.Linear(3 * hidden + past * actions + 6, hidden), nn.ReLU())
        self.values = values
        self.kinds = kinds(classes, width)
        self.register_buffer("level", torch.tensor(NEVER))  # a search whose best value is lower is given up

    def see(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features rows columns"]:
        """The maps of images in [0, 1]."""
        return seen_by(self, images)

    def forward(self, seen: Regions) -> Float[Tensor, "batch actions"]:
        """Values of all actions on each box."""
        return self.values(self.features(seen))

    def both(self, seen: Regions) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch actions"]]:
        """Values, and the head's belief (`foveate.learn.q_learning.Believing`)."""
        head: Any = self.values
        values, belief = head.both(self.features(seen))
        return values, belief

    def features(self, seen: Regions) -> Float[Tensor, "batch hidden"]:
        """What is seen of each box."""
        if seen.maps is None:
            assert seen.images is not None
            maps = self.see(seen.images)
        else:
            maps = seen.maps
        whole = seen.box.new_tensor([0.0, 0.0, self.side, self.side]).expand_as(seen.box)
        windows = torch.stack((enlarged(seen.box, REGION), enlarged(seen.box, AROUND), whole), 1)
        cells = region_cells(maps, windows, seen.number, self.bins, self.stride)
        shares = (torch.arange(self.bins, device=maps.device) + 0.5) / self.bins
        low, high = windows[..., :2, None], windows[..., 2:, None]
        x, y = (low + shares * (high - low)).flatten(0, 1).unbind(1)  # [batch · views, bins]
        x, y = x[:, None, :].expand(-1, self.bins, -1), y[:, :, None].expand(-1, -1, self.bins)
        marks, marked = (leaf.repeat_interleave(3, 0) for leaf in (seen.marks, seen.marked))
        under = crossed(marks, marked, x, y).unflatten(0, (-1, 3))
        parts = cells.masked_fill(under[:, :, None], 0.0).unbind(1)
        weights = None if self.kinds is None else self.kinds(seen.label)
        told = [head(part, weights) for head, part in zip(self.views, parts, strict=True)]
        past = F.one_hot(seen.history.long(), self.actions + 1)[..., 1:].flatten(1).float()
        return self.join(torch.cat((*told, past, placed(seen.box, self.side)), 1))


def eye(side: int, backbone: str, stride: int, width: int) -> tuple[nn.Module | None, int]:
    """A network that learns along, or None for a frozen one; and the channels of the map.

    Raises:
        InputError: as `convolutions` and `Pretrained`; a stride that does not divide the side.
    """
    if side % stride:
        raise InputError(f"image_size: found {side}, expected a multiple of the stride, {stride} pixels")
    if backbone == "convolutions":
        return convolutions(3, width, stride), width
    return None, frozen(backbone, stride).channels


class View(nn.Sequential):
    """What turns the cells of a view into features."""

    def __init__(self, channels: int, bins: int, width: int, hidden: int) -> None:
        cell = nn.Conv2d(channels, width, 1), nn.GroupNorm(8, width), nn.ReLU()
        super().__init__(*cell, nn.Flatten(), nn.Linear(width * bins**2, hidden), nn.ReLU())

    def forward(
        self, cells: Float[Tensor, "batch channels bins bins"], weights: Float[Tensor, "batch width"] | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """Features of the cells; `weights` tell how much each number of a cell's vector counts."""
        found = cells
        for layer in self:
            if weights is not None and isinstance(layer, nn.Flatten):
                found = found * weights[:, :, None, None]
            found = layer(found)
        return found


def kinds(classes: int, width: int) -> nn.Embedding | None:
    """Of several classes: for each the weights of a cell's vector, around 1.

    So a network knows what is searched for before it puts the cells together. Told afterwards, beside the last actions,
    it has to carry along where everything else lies, and learns far less in the same time.
    """
    if classes == 1:
        return None
    told = nn.Embedding(classes, width)
    nn.init.normal_(told.weight, 1.0)
    return told


@lru_cache(maxsize=2)
def frozen(name: str, stride: int) -> Pretrained:
    """A network of ImageNet that is not learned: made once, and no part of a policy's weights."""
    return Pretrained(name, stride).requires_grad_(False).eval()


def seen_by(
    network: nn.Module, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch features rows columns"]:
    """The maps of images in [0, 1], by a network's `eye`, or by the frozen one that its `backbone` names."""
    own, name, stride = (getattr(network, field) for field in ("eye", "backbone", "stride"))
    if own is not None:
        return own(images - 0.5)
    with torch.no_grad():
        return frozen(name, stride).to(images.device)(images)


@torch.no_grad()
def seen_maps(
    network: nn.Module, pixels: UInt8[Tensor, "size 3 height width"]
) -> Float[Tensor, "size features rows columns"]:
    """The maps of all pictures, once and without a graph, on the network's device."""
    device = next(network.parameters()).device
    return torch.cat([seen_by(network, some.to(device).float() / 255) for some in pixels.split(64)])


def region_cells(
    maps: Float[Tensor, "images features rows columns"],
    windows: Float[Tensor, "batch views 4"],
    number: Int[Tensor, " batch"],
    bins: int,
    stride: int,
    samples: int = SAMPLES,
) -> Float[Tensor, "batch views features bins bins"]:
    """The map under windows into it, in `bins`² cells each; 0 beyond the image.

    The same as `torchvision.ops.roi_align(..., aligned=True)` (He et al. 2017, "Mask R-CNN"). What is read between
    cells is a sum over rows times a sum over columns, so two products of matrices do it: on a processor they take a
    fraction of the time of that operator, whose gradient adds to one number after the other.

    Args:
        maps: of the images.
        windows: in pixels; several into the same image.
        number: of the image of each row.
        bins: cells a side.
        stride: pixels a cell of the map.
        samples: points a side of a cell, of which its vector is the mean.
    """
    columns, rows = (
        _reading(windows[..., axis], windows[..., axis + 2], maps.shape[3 - axis], bins, stride, samples)
        for axis in (0, 1)
    )  # [batch, views, bins, columns or rows]
    mine = maps[number]
    features, views = mine.shape[1], windows.shape[1]
    across = (mine.flatten(1, 2) @ columns.flatten(1, 2).mT).unflatten(1, (features, -1)).unflatten(3, (views, bins))
    return torch.einsum("bvkr,bfrvl->bvfkl", rows, across)


def _reading(low: Tensor, high: Tensor, cells: int, bins: int, stride: int, samples: int) -> Tensor:
    """How much each cell of a line of the map counts in each bin between `low` and `high`, [..., bins, cells]."""
    points = torch.arange(bins * samples, device=low.device).add(0.5) / (bins * samples)
    points = (low[..., None] + points * (high - low)[..., None]) / stride - 0.5  # in cells; the first one's middle is 0
    inside = (points >= -1) & (points <= cells)
    near = 1 - (points.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=low.device)).abs()
    return (near.clamp(min=0) * inside[..., None]).unflatten(-2, (bins, samples)).mean(-2)


def placed(boxes: Float[Tensor, "batch 4"], side: int) -> Float[Tensor, "batch 6"]:
    """Centres and sides of boxes in parts of the image's, and the logarithms of the sides."""
    sides = (boxes[:, 2:] - boxes[:, :2]) / side
    return torch.cat(((boxes[:, :2] + boxes[:, 2:]) / (2 * side), sides, sides.log()), 1)


def crossed(
    marks: Float[Tensor, "batch triggers 4"],
    marked: Bool[Tensor, "batch triggers"],
    x: Float[Tensor, "batch rows columns"],
    y: Float[Tensor, "batch rows columns"],
) -> Bool[Tensor, "batch rows columns"]:
    """Which places lie under a mark: a cross over a box, its bars a third of the sides wide.

    Args:
        marks: boxes in pixels.
        marked: which of them there are.
        x: of places, in pixels.
        y: the same.
    """
    low, high = marks[:, :, None, None, :2], marks[:, :, None, None, 2:]
    place = (torch.stack((x, y), -1)[:, None] - low) / (high - low).clamp(min=1e-6)
    inside = ((place >= 0) & (place <= 1)).all(-1)
    middle = ((place - 0.5).abs() <= CROSS / 2).any(-1)
    return (inside & middle & marked[..., None, None]).any(1)
