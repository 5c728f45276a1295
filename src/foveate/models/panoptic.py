"""Panoptic maps as channels that a network draws, and back: scores of classes, scores of the numbers of things.

A map has two numbers a pixel: the class, and, where that is a thing, which thing it is. Of the classes 0 ... C - 1 the
first `things` can be counted; the others are stuff, of which an image has one segment a class. Things are numbered in
the order in which squares of `patch` pixels, read row by row, first show them: the order in which a text with a word a
square meets them. Nothing here loops over examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def classes_and_numbers(
    ids: Int[Tensor, "batch height width"],
    labels: Int[Tensor, "batch segments"],
    crowd: Bool[Tensor, "batch segments"],
    things: int,
    most: int,
    patch: int,
) -> tuple[Int[Tensor, "batch height width"], Int[Tensor, "batch height width"]]:
    """Class and number of every pixel, -1 where there is none to learn from.

    Args:
        ids: 0 for void, k for a pixel of segment k.
        labels: the class of segment 1, 2, ...
        crowd: segments that are many things nobody told apart; they are as void.
        things: how many of the classes, the first ones, are things.
        most: things beyond this many in an image have no number.
        patch: side in pixels of the squares by which things are numbered; it divides height and width.
    """
    batch, height, width = ids.shape
    row, column = (torch.arange(side, device=ids.device) for side in (height, width))
    square = row[:, None] // patch * (width // patch) + column // patch
    place = (square * patch + row[:, None] % patch) * patch + column % patch
    first = torch.full((batch, labels.shape[1] + 1), height * width, device=ids.device)
    first = first.scatter_reduce(1, ids.flatten(1).long(), place.flatten().expand(batch, -1), "amin")[:, 1:]
    counted = (labels < things) & ~crowd & (first < height * width)
    number = first.masked_fill(~counted, height * width).argsort(1).argsort(1)
    number = number.masked_fill(~counted | (number >= most), -1)
    known = labels.masked_fill(crowd, -1)

    def spread(values: Tensor) -> Tensor:
        return F.pad(values, (1, 0), value=-1).gather(1, ids.flatten(1).long()).view(ids.shape)

    return spread(known), spread(number)


def channels(
    classes: Int[Tensor, "batch height width"], numbers: Int[Tensor, "batch height width"], count: int, most: int
) -> Float[Tensor, "batch channels height width"]:
    """Maps as an oracle sees them: a channel for each of `count` classes, then one for each of `most` numbers."""

    def one_hot(values: Tensor, size: int) -> Tensor:
        return values[:, None] == torch.arange(size, device=values.device)[:, None, None]

    return torch.cat((one_hot(classes, count), one_hot(numbers, most)), 1).float()


def drawing_losses(
    scores: Float[Tensor, "batch channels height width"],
    classes: Int[Tensor, "batch height width"],
    numbers: Int[Tensor, "batch height width"],
    count: int,
) -> dict[str, Tensor]:
    """Cross-entropy a pixel, in nats, of drawn scores: "class_loss" and "number_loss"; pixels at -1 do not count."""
    drawn = scores[:, :count], scores[:, count:]
    sums = [
        F.cross_entropy(*pair, ignore_index=-1, reduction="sum") for pair in zip(drawn, (classes, numbers), strict=True)
    ]
    sizes = [(truth >= 0).sum().clamp(min=1) for truth in (classes, numbers)]
    return {name: total / size for name, total, size in zip(("class_loss", "number_loss"), sums, sizes, strict=True)}


def segments_of(
    scores: Float[Tensor, "batch channels height width"], count: int, things: int, least_area: int = 1
) -> tuple[Int[Tensor, "batch height width"], Int[Tensor, "batch segments"]]:
    """What drawn scores say: the id of every pixel, 0 for void, and the class of segments 1, 2, ...

    Each pixel takes its best class and, if that is a thing, its best number. A thing is all pixels of a number; its
    class is that of most of them. Stuff is all pixels of a class. Which of the ids occur is up to the image: there is
    one for every number and every class of stuff.

    Args:
        scores: of `count` classes, then of the numbers.
        count: of classes.
        things: how many of them, the first ones, are things.
        least_area: segments of fewer pixels become void.
    """
    batch, most = len(scores), scores.shape[1] - count
    classes, numbers = scores[:, :count].argmax(1), scores[:, count:].argmax(1)
    ids = torch.where(classes < things, 1 + numbers, 1 + most + classes - things)
    image = torch.arange(batch, device=ids.device)[:, None, None]
    votes = ((image * (1 + most + count - things) + ids) * count + classes).flatten()
    votes = votes.bincount(minlength=batch * (1 + most + count - things) * count).view(batch, -1, count)
    ids = ids.masked_fill(votes.sum(2).gather(1, ids.flatten(1)).view(ids.shape) < least_area, 0)
    # the pixels of a number are all of things, those of stuff all of its class
    stuff = torch.arange(things, count, device=ids.device).expand(batch, -1)
    return ids, torch.cat((votes[:, 1 : 1 + most].argmax(2), stuff), 1)
