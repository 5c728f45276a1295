"""How well regions find objects, and the regions that an agent has to beat: random, sliding, in the middle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.geometry import Boxes, overlaps
from foveate.rewards.boxes import corpus_average_precision
from foveate.rewards.sets import set_scores

SCALES = tuple(step / 20 for step in range(2, 21))  # of the shapes among which one is chosen, in parts of the side
CURVE = (1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 49, 64, 81, 100)  # numbers of sliding windows
NEVER = -1e4  # a value that nothing has
FOUND = 0.01  # AP of searches that find something
ASPECTS = (0.5, 0.7, 1.0, 1.4, 2.0)  # width to height


@dataclass(frozen=True)
class Searched:
    """Searches, padded to one length: what was looked at, how much the best action promised, and what was triggered.

    `labels` are the classes that were searched for; None: the only one.
    """

    regions: Float[Tensor, "batch time 4"]
    values: Float[Tensor, "batch time"]
    looked: Bool[Tensor, "batch time"]
    fired: Bool[Tensor, "batch time"]
    labels: Int[Tensor, " batch"] | None = None

    def until(self, level: float) -> Searched:
        """Given up at the first region at which the best values since the last trigger were below a level in the mean.

        One value says little about what is left to be found; the mean of a few says more.
        """
        place = torch.arange(self.values.shape[1], device=self.values.device)
        since = F.pad(torch.where(self.fired, place + 1, 0).cummax(1).values, (1, 0))[:, :-1]  # the search's first
        total = F.pad(self.values.cumsum(1), (1, 0))
        mean = (total[:, 1:] - total.gather(1, since)) / (place + 1 - since)
        ends = (self.looked & (mean < level)).int().cumsum(1)
        looked = self.looked & (F.pad(ends, (1, 0))[:, :-1] == 0)
        return replace(self, looked=looked, fired=self.fired & looked & (ends == 0))

    def boxes(self, most: int | None = None) -> Boxes:
        """What was triggered, with the trigger's value as score; room for `most` boxes, or for as many as there are."""
        room = max(1, int(self.fired.sum(1).max())) if most is None else most
        place = self.fired.int().sort(dim=1, descending=True, stable=True).indices[:, :room]
        boxes = self.regions.gather(1, place[..., None].expand(-1, -1, 4))
        label = torch.zeros_like(place[:, 0]) if self.labels is None else self.labels
        return Boxes(boxes, label[:, None].expand_as(place), self.fired.gather(1, place), self.values.gather(1, place))


def ap50(found: Boxes, targets: Boxes) -> float:
    """COCO's average precision at an IoU of 0.5 in [0, 1], the mean over the classes that have a target.

    A row may be a picture, or a picture and a class of which all its boxes are: a box is held against targets of its
    class alone, so that the one score is the other.
    """
    return corpus_average_precision(found, targets, 1 + int(targets.labels.max()))["map50"]


def search_scores(found: Searched, targets: Boxes) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Scores of searches, and their recall by the number of regions.

    "ap50" and "f1" of what was triggered; "recall" at an IoU of 0.5 of all regions looked at; "regions" that were
    looked at for each object found.
    """
    so_far = recall_so_far(found.regions, found.looked, targets)
    hits = recall_so_far(found.regions, found.fired, targets)[-1] * targets.wanted.sum()
    scores = box_scores(found.boxes(), targets)
    scores |= {"recall": float(so_far[-1]), "regions": float(found.looked.sum() / hits.clamp(min=1))}
    return scores, points(so_far)


def box_scores(found: Boxes, targets: Boxes) -> dict[str, float]:
    """ "ap50", "f1" and "recall" of boxes at an IoU of 0.5; a row is a picture, or a picture and a class."""
    recall = float(recall_so_far(found.boxes, found.mask, targets)[-1])
    return {"ap50": ap50(found, targets), "f1": set_scores(found, targets)["f1"], "recall": recall}


def points(recalls: Float[Tensor, " count"]) -> list[tuple[float, float]]:
    """A curve of them: after the first, the second, ..."""
    return [(float(place + 1), recall) for place, recall in enumerate(recalls.tolist())]


def giving_up(found: Searched, targets: Boxes, cost: float) -> float:
    """The value below which searches are given up: the highest at which they keep 1 - `cost` of their AP here.

    Where nothing is found yet there is nothing to tell it by: they never are.
    """
    levels = (NEVER, *found.values[found.looked].quantile(torch.linspace(0, 0.95, 39)).tolist())
    scores = [ap50(found.until(level).boxes(), targets) for level in levels]
    if max(scores) <= FOUND:
        return NEVER
    return max(level for level, score in zip(levels, scores, strict=True) if score >= (1 - cost) * max(scores))


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
    some = targets.wanted.any(1)  # where nothing is to be found nothing is
    wanted = targets.wanted[some]
    hit = (overlaps(regions[some], targets.boxes[some]) >= threshold) & looked[some][..., None] & wanted[:, None]
    number = wanted.sum().clamp(min=1)
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


def sliding_boxes(count: int, seen: Boxes, images: int, side: int) -> Boxes:
    """So many sliding windows in each of some images, of the shape that is best on the boxes seen before; all alike."""
    windows = sliding(count, best_shape(count, seen, side), side).expand(images, -1, -1)
    scores = torch.ones(windows.shape[:2])
    return Boxes(windows, torch.zeros_like(scores, dtype=torch.int64), scores > 0, scores)


def other_regions(
    keys: Int[Tensor, " batch"], looked: Bool[Tensor, "batch count"], seen: Boxes, targets: Boxes, side: int
) -> dict[str, tuple[float, list[tuple[float, float]]]]:
    """What nobody had to learn: recall of as many regions as were looked at, and the curve by their number.

    "random": boxes anywhere, as many in each image; "sliding": windows, as many as in the mean image.

    Args:
        keys: of the random ones, one an image.
        looked: true for each region that was looked at.
        seen: boxes from which sizes and shapes are taken.
        targets: what is to be found.
        side: of the images in pixels.
    """
    drawn = random_regions(keys, looked.shape[1], seen, side)
    curve = points(recall_so_far(drawn, torch.ones_like(looked), targets))
    found = {"random": (float(recall_so_far(drawn, looked, targets)[-1]), curve)}
    mean = max(1, round(float(looked.sum(1).float().mean())))
    slid = {}
    for count in sorted({mean, *(count for count in CURVE if count <= looked.shape[1])}):
        boxes = sliding_boxes(count, seen, len(targets.mask), side)
        slid[count] = float(recall_so_far(boxes.boxes, boxes.mask, targets)[-1])
    found["sliding"] = slid[mean], [(float(count), recall) for count, recall in slid.items()]
    return found


def random_regions(keys: Int[Tensor, " batch"], count: int, seen: Boxes, side: int) -> Float[Tensor, "batch count 4"]:
    """Boxes anywhere within the image, each as wide and high as one of those seen before, which is drawn."""
    sizes = (seen.boxes[..., 2:] - seen.boxes[..., :2])[seen.wanted]
    pick = noise.integers(noise.fold(keys, "size"), len(sizes), count)
    size = sizes[pick]
    low = noise.uniform(noise.fold(keys, "place"), count, 2) * (side - size)
    return torch.cat((low, low + size), -1)
