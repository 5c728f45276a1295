"""Panoptic maps as channels that a network draws, and back: scores of classes, scores of the numbers of things.

A map has two numbers a pixel: the class, and, where that is a thing, which thing it is. Of the classes the first ones
are things, which can be counted; the others are stuff, of which an image has one segment a class. Things are numbered
in the order in which squares of pixels, read row by row, first show them: the order in which a text with a word a
square meets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate.geometry import Segments

Maps: TypeAlias = tuple[Tensor, Tensor]  # class and number of each pixel, -1 for none: [batch, height, width]


@dataclass(frozen=True)
class PanopticChannels:
    """Which channels there are, and what they say: one for each class, then one for each number.

    Attributes:
        classes: how many.
        things: how many of them, the first ones, are things.
        most: numbers; of an image's things beyond them nothing is learned but the class.
        patch: side in pixels of the squares by which things are numbered; it divides height and width.
        least_area: drawn segments of fewer pixels become void.
    """

    classes: int
    things: int
    most: int
    patch: int
    least_area: int = 1

    @property
    def count(self) -> int:
        """Channels of a map."""
        return self.classes + self.most

    def maps(self, segments: Segments) -> tuple[Int[Tensor, "batch height width"], Int[Tensor, "batch height width"]]:
        """Class and number of every pixel, -1 where there is none: in void, in a crowd; no number in stuff."""
        ids, labels = segments.ids, segments.labels
        crowd = torch.zeros_like(labels, dtype=torch.bool) if segments.crowd is None else segments.crowd
        batch, height, width = ids.shape
        row, column = torch.arange(height, device=ids.device)[:, None], torch.arange(width, device=ids.device)
        square = row // self.patch * (width // self.patch) + column // self.patch
        place = (square * self.patch + row % self.patch) * self.patch + column % self.patch
        never, where = height * width, ids.flatten(1).long()
        first = torch.full((batch, labels.shape[1] + 1), never, device=ids.device)
        first = first.scatter_reduce(1, where, place.flatten().expand(batch, -1), "amin")[:, 1:]
        counted = (labels < self.things) & ~crowd & (first < never)
        number = first.masked_fill(~counted, never).argsort(1).argsort(1)

        def spread(values: Tensor) -> Tensor:
            return F.pad(values, (1, 0), value=-1).gather(1, where).view(ids.shape)

        return spread(labels.masked_fill(crowd, -1)), spread(number.masked_fill(~counted | (number >= self.most), -1))

    def seen(self, maps: Maps) -> Float[Tensor, "batch channels height width"]:
        """Maps as an oracle sees them: 1 in the channels of class and number, 0 elsewhere."""
        hot = [
            values[:, None] == torch.arange(size, device=values.device)[:, None, None]
            for values, size in zip(maps, (self.classes, self.most), strict=True)
        ]
        return torch.cat(hot, 1).float()

    def losses(self, scores: Float[Tensor, "batch channels height width"], maps: Maps) -> dict[str, Tensor]:
        """Cross-entropy of drawn scores, in nats a pixel: "class_loss" and "number_loss". Pixels at -1 do not count."""
        drawn = scores.split((self.classes, self.most), 1)
        return {
            name: F.cross_entropy(each, truth, ignore_index=-1, reduction="sum") / (truth >= 0).sum().clamp(min=1)
            for name, each, truth in zip(("class_loss", "number_loss"), drawn, maps, strict=True)
        }

    def segments(self, scores: Float[Tensor, "batch channels height width"]) -> Segments:
        """What drawn scores say.

        Each pixel takes its best class and, if that is a thing, its best number. A thing is all pixels of a number; its
        class is that of most of them. Stuff is all pixels of a class. The segments stand for every number, then for
        every class of stuff; those that an image does not have are without a pixel.
        """
        classes, numbers = (each.argmax(1) for each in scores.split((self.classes, self.most), 1))
        ids = torch.where(classes < self.things, 1 + numbers, 1 + self.most + classes - self.things)
        batch, size = len(scores), 1 + self.most + self.classes - self.things
        image = torch.arange(batch, device=ids.device)[:, None, None]
        votes = (
            ((image * size + ids) * self.classes + classes).flatten().bincount(minlength=batch * size * self.classes)
        )
        votes = votes.view(batch, size, self.classes)
        ids = ids.masked_fill(votes.sum(2).gather(1, ids.flatten(1)).view(ids.shape) < self.least_area, 0)
        stuff = torch.arange(self.things, self.classes, device=ids.device).expand(batch, -1)
        return Segments(ids, torch.cat((votes[:, 1 : 1 + self.most].argmax(2), stuff), 1))
