"""What is searched for in pictures: objects of any class, those of one, or those of each class in turn.

A search is a pair of numbers: of a picture, and of a class. Where there is one class it is that of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate import noise
from foveate.data.detection import Detections, check_objects, of_class, subset
from foveate.geometry import Boxes
from foveate.types import InputError, map_tree

Searches: TypeAlias = Int[Tensor, "searches 2"]


def of_target(data: Detections, target: str, where: Path | str, known: tuple[str, ...] | None = None) -> Detections:
    """The same pictures with the objects that are searched for.

    Args:
        data: pictures with their boxes.
        target: "each" keeps the classes apart; "any" makes one of them, called object; a name leaves that class only.
        where: whose pictures they are, for the message.
        known: the classes that an agent knows, if it does: those of what is returned, in their order.

    Raises:
        InputError: there is no such class, no picture has such an object, or the classes are others than those known.
    """
    named = None if target in ("any", "each") else target
    found = data if named is None else of_class(data, named)
    check_objects(found, where, named)
    if target != "each":
        alike = replace(found.boxes, labels=torch.zeros_like(found.boxes.labels))
        return replace(found, boxes=alike, classes=(named or "object",))
    if known is not None and found.classes != known:
        raise InputError(
            f"{where}: the classes of split {data.split!r} are {', '.join(found.classes)}, expected those that the "
            f"agent knows, {', '.join(known)}: name them alike, in this order"
        )
    return found


def check_classes(data: Detections, where: Path | str) -> None:
    """Check that each class has an object to learn from.

    Raises:
        InputError: one has none; it is named.
    """
    for name in data.classes:
        check_objects(of_class(data, name), where, name)


def unmarked(images: Float[Tensor, "batch 3 height width"], side: int, classes: tuple[str, ...]) -> Detections:
    """Images in [0, 1], stretched to `side` pixels, of which nobody said what is in them."""
    pixels = F.interpolate(images, (side, side), mode="bilinear", antialias=True).clamp(0, 1).mul(255).round().byte()
    none = torch.zeros(len(images), 1, device=images.device)
    nobody = Boxes(none[..., None].expand(-1, -1, 4), none.long(), none.bool())
    return Detections(pixels, nobody, classes, "images", "test")


def every_search(data: Detections) -> Searches:
    """Each picture with every class: the first picture with all of them, then the second."""
    return torch.cartesian_prod(torch.arange(len(data)), torch.arange(len(data.classes)))


def searches_to_learn(data: Detections) -> Searches:
    """Each picture with the classes that it shows, and with as many, at least one, that it does not, drawn once.

    From these an agent learns to find nothing. A class of which a picture has only crowds is drawn last.
    """
    count, labels = len(data.classes), data.boxes.labels
    shown, hinted = (
        torch.zeros(len(data), count, dtype=torch.int64).scatter_add(1, labels, there.long()) > 0
        for there in (data.boxes.wanted, data.boxes.mask)
    )
    dice = noise.uniform(noise.key("searches", torch.arange(len(data))), count) + hinted
    place = dice.masked_fill(shown, torch.inf).argsort(1).argsort(1)
    drawn = place < shown.sum(1, keepdim=True).clamp(min=1)
    return (shown | drawn).nonzero()


def of_searches(boxes: Boxes, searches: Searches) -> Boxes:
    """The boxes of each search: those in its picture that are of its class, on the device where they lie."""
    number, label = searches.to(boxes.mask.device).unbind(1)
    mine = map_tree(lambda leaf: leaf[number], boxes)
    asked = label[:, None].expand_as(mine.labels)
    return replace(mine, labels=asked, mask=mine.mask & (mine.labels == asked))


def in_pieces(data: Detections, searches: Searches, most: int) -> Iterator[tuple[Detections, Searches]]:
    """So many searches at a time, numbered anew, with the pictures they are in, each of them once."""
    for some in searches.split(most):
        rows, number = some[:, 0].unique(return_inverse=True)
        yield subset(data, rows), torch.stack((number, some[:, 1]), 1)
