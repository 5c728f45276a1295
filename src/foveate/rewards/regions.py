"""How well regions find objects, and the regions that an agent has to beat: random, sliding, in the middle."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.geometry import Boxes, overlaps

SCALES = tuple(step / 20 for step in range(2, 21))  # of the shapes among which one is chosen, in parts of the side
ASPECTS = (0.5, 0.7, 1.0, 1.4, 2.0)  # width to height


def recall_so_far(
    regions: Float[Tensor, "batch count 4"],
    looked: Bool[Tensor, "batch count"],
    targets: Boxes,
    threshold: float = 0.5,
) -> Float[Tensor, " count"]:
    """Which part of all objects the first 1, 2, ..., count regions of each image have at this IoU or more, in [0, 1].

    Args:
        regions: in the order in which they were looked at.
        looked: which of them were.
        targets: objects; crowds are not counted.
        threshold: of the IoU.
    """
    hit = (overlaps(regions, targets.boxes) >= threshold) & looked[..., None] & targets.wanted[:, None]
    number = targets.wanted.sum().clamp(min=1)
    return (hit.int().cummax(1).values > 0).sum((0, 2)) / number


def shapes(side: int) -> Float[Tensor, "shapes 2"]:
    """Widths and heights in pixels, of which a baseline chooses one: squares and oblongs that fit into the image."""
    scales, aspects = torch.tensor(SCALES)[:, None], torch.tensor(ASPECTS).sqrt()
    sizes = torch.stack((scales * aspects, scales / aspects), -1).flatten(0, 1)
    return sizes[(sizes <= 1.0).all(1)] * side


def sliding(count: int, shape: Float[Tensor, " 2"], side: int) -> Float[Tensor, "count 4"]:
    """So many windows of one shape, evenly over the image: rows of as many as come out even, as close as can be."""
    rows = max(1, round(count**0.5))
    place = torch.arange(count)
    row = place * rows // count
    first = -(-row * count // rows)  # the first window of its row
    many = -(-(row + 1) * count // rows) - first
    share = torch.stack(((place - first + 0.5) / many, (row + 0.5) / rows), 1)
    # windows at the edges touch them
    spread = torch.stack(((place - first) / (many - 1).clamp(min=1), row / max(1, rows - 1)), 1)
    alone = torch.stack((many == 1, torch.full_like(many, rows == 1, dtype=torch.bool)), 1)
    low = torch.where(alone, share * side - shape / 2, spread * (side - shape))
    return torch.cat((low, low + shape), 1).clamp(0, side)


def best_shape(count: int, targets: Boxes, side: int) -> Float[Tensor, " 2"]:
    """The shape of which so many sliding windows have the best recall at an IoU of 0.5; one window is the middle."""
    all_ = shapes(side)
    recalls = []
    for shape in all_:
        windows = sliding(count, shape, side).expand(len(targets.mask), -1, -1)
        looked = torch.ones(windows.shape[:2], dtype=torch.bool)
        recalls.append(recall_so_far(windows, looked, targets)[-1])
    return all_[int(torch.stack(recalls).argmax())]


def random_regions(
    keys: Int[Tensor, " batch"], count: int, sizes: Float[Tensor, "some 2"], side: int
) -> Float[Tensor, "batch count 4"]:
    """Boxes anywhere within the image, each as wide and high as one of the given sizes, which is drawn."""
    pick = noise.integers(noise.fold(keys, "size"), len(sizes), count)
    size = sizes[pick]
    low = noise.uniform(noise.fold(keys, "place"), count, 2) * (side - size)
    return torch.cat((low, low + size), -1)
