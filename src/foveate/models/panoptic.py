"""Panoptic maps as channels that a network draws, and back: what a pixel is, and if a thing, of which class and number.

Of the classes the first ones are things, which can be counted; the others are stuff, of which an image has one segment
a class. Things are numbered in the order in which squares of pixels, read row by row, first show them: the order in
which a text with a word a square meets them.

Class and number of things are drawn apart from the outlines: a pixel is scored as stuff of some class or as a thing,
and what thing it would be is asked only where there is one. A word can then say the class of a whole square while the
image says where its edges are.
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
    """Which channels there are: the classes of things, a thing or which stuff, the numbers of things.

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
        return sum(self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.things, 1 + self.classes - self.things, self.most

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

    def _questions(self, maps: Maps) -> dict[str, Tensor]:
        """The answer to each group of channels at every pixel, -1 where it is not asked."""
        classes, numbers = maps
        kind = (classes - self.things + 1).clamp(min=0).masked_fill(classes < 0, -1)
        return {"class": classes.masked_fill(kind != 0, -1), "kind": kind, "number": numbers}

    def seen(self, maps: Maps) -> Float[Tensor, "batch channels height width"]:
        """Maps as an oracle sees them: 1 in the channels of what a pixel is, 0 elsewhere."""
        hot = [
            truth[:, None] == torch.arange(size, device=truth.device)[:, None, None]
            for truth, size in zip(self._questions(maps).values(), self._sizes, strict=True)
        ]
        return torch.cat(hot, 1).float()

    def losses(self, scores: Float[Tensor, "batch channels height width"], maps: Maps) -> dict[str, Tensor]:
        """Cross-entropy of drawn scores, in nats a pixel that is asked: "class_loss", "kind_loss", "number_loss"."""
        return {
            f"{name}_loss": F.cross_entropy(each, truth, ignore_index=-1, reduction="sum")
            / (truth >= 0).sum().clamp(min=1)
            for each, (name, truth) in zip(scores.split(self._sizes, 1), self._questions(maps).items(), strict=True)
        }

    def segments(self, scores: Float[Tensor, "batch channels height width"]) -> Segments:
        """What drawn scores say.

        Each pixel is a thing or some stuff, whichever scores best, and a thing has its best class and number. A segment
        is all pixels of a number, its class that of most of them, or all pixels of a class of stuff. The segments stand
        for every number, then for every class of stuff; those that an image does not have are without a pixel.
        """
        classes, kinds, numbers = (each.argmax(1) for each in scores.split(self._sizes, 1))
        ids = torch.where(kinds == 0, 1 + numbers, self.most + kinds)
        classes = torch.where(kinds == 0, classes, self.things - 1 + kinds)
        batch, size = len(scores), 1 + self.most + self.classes - self.things
        image = torch.arange(batch, device=ids.device)[:, None, None]
        votes = (
            ((image * size + ids) * self.classes + classes).flatten().bincount(minlength=batch * size * self.classes)
        )
        votes = votes.view(batch, size, self.classes)
        ids = ids.masked_fill(votes.sum(2).gather(1, ids.flatten(1)).view(ids.shape) < self.least_area, 0)
        stuff = torch.arange(self.things, self.classes, device=ids.device).expand(batch, -1)
        return Segments(ids, torch.cat((votes[:, 1 : 1 + self.most].argmax(2), stuff), 1))
