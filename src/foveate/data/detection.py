"""Images with boxes: rendered scenes, Pascal VOC's folders and COCO's JSON, in memory at one size.

Pictures are stretched to a square and their boxes with them: the IoU of two boxes does not change when both axes are
scaled, so neither do the metrics. Splits are fixed: they depend on the data alone, never on the seed of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.box_files import Item, Part, coco_items, voc_items
from foveate.data.classification import load_images
from foveate.data.digit_scenes import digit_scenes
from foveate.data.picture_folders import check_memory, read_stretched
from foveate.data.scenes import SHAPES, describe, draw
from foveate.data.zoom import zoomed
from foveate.geometry import Boxes
from foveate.types import InputError, concatenate, map_tree

DATASETS: dict[str, str] = {
    "scenes": "rendered scenes of textured objects, nothing to download",
    "voc": "ROOT/Annotations/*.xml, ROOT/JPEGImages, ROOT/ImageSets/Main (or ROOT/VOCdevkit/VOC*/...)",
    "coco": "ROOT/annotations/instances_*.json and the pictures in ROOT/*/",
    "digits": "rendered scenes of embedded handwritten digits, nothing to download",
}
SCENES = {"val": 250, "test": 500}
_AT_ONCE = 64  # scenes drawn together: their layers then stay in the processor's cache


@dataclass(frozen=True)
class Detections:
    """Images of one size, in memory, with their boxes.

    Attributes:
        pixels: RGB, 0 to 255.
        boxes: in pixels of these images; objects marked difficult, and crowds, are `crowd`.
        classes: names of the classes.
        name: of the data set, one of `DATASETS`.
        split: which part of it this is.
        skipped: pictures left out because something about them is wrong, and annotations of no picture.
        clipped: boxes that reached up to a pixel beyond their picture, and end at its edge here.
    """

    pixels: UInt8[Tensor, "size 3 side side"]
    boxes: Boxes
    classes: tuple[str, ...]
    name: str
    split: str
    skipped: int = 0
    clipped: int = 0

    def __len__(self) -> int:
        return len(self.pixels)


def load_detections(
    name: str,
    root: Path | None,
    split: Part,
    image_size: int,
    skip_bad: bool = False,
    scenes: int = 6000,
    most: int = 6,
    say: Callable[[str], None] | None = None,
) -> Detections:
    """Read one split of a data set into memory.

    - digits: `scenes` scenes of handwritten digits to train on, others as for scenes; classes are the digits.
    - scenes: `scenes` of them to train on, up to `SCENES` others to choose by and to test on; classes are shapes.
    - voc: the lists of ImageSets/Main (train.txt, val.txt, test.txt); what is missing is held out of train by the
      pictures' names. Numbers are taken as they stand.
    - coco: instances_train*.json, instances_val*.json, instances_test*.json. Without a test file that of val is the
      test, and val is held out of train.

    Args:
        name: one of `DATASETS`.
        root: the folder of the data; not needed for scenes.
        split: which part.
        image_size: side in pixels to which pictures are stretched.
        skip_bad: leave out pictures with which something is wrong, and count them.
        scenes: how many to train on.
        most: objects in a scene at most.
        say: is told what takes long, and how many boxes are cut at the edge of their picture.

    Raises:
        InputError: unknown name; missing or damaged files; without `skip_bad`: a box without area within its image,
            that ends before it begins, over a pixel beyond its image, or of normalised coordinates; an unknown class;
            a missing picture, or one of another size than annotated; an empty split.
    """
    if name not in DATASETS:
        raise InputError(f"data: found {name!r}, expected one of {', '.join(DATASETS)}")
    if image_size < 8:
        raise InputError(f"image_size: found {image_size}, expected at least 8 pixels")
    if name in ("scenes", "digits"):
        count = scenes if split == "train" else min(SCENES[split], scenes)
        check_memory(name, (count, 3, image_size, image_size))
        return (_digits if name == "digits" else _rendered)(split, count, image_size, most, say)
    if root is None:
        raise InputError(f"root: not given; data {name!r} needs the folder in which it lies: --root FOLDER")
    if not root.is_dir():
        raise InputError(f"root: {root} is no folder; correct the path")
    if name == "voc":
        read, classes = voc_items(root, skip_bad)
    else:
        read, classes = coco_items(root, split, skip_bad)
    items, skipped = read(split)
    check_memory(str(root), (len(items), 3, image_size, image_size))
    pixels, good = [], []
    for item in items:
        try:
            _check(item, classes)
            pixels.append(_pixels(item, image_size))
        except InputError:
            if not skip_bad:
                raise
            skipped += 1
            continue
        good.append(item)
    if not good:
        raise InputError(f"{root}: split {split!r} has no picture that can be used; add some")
    boxes = _padded(good, classes, image_size)
    clipped = sum(_reaches_beyond(box, item.size, 0.0) for item in good for box in item.boxes)
    if clipped and say is not None:
        say(f"{root}: {clipped} boxes of {split} reach up to a pixel beyond their picture, and are cut at its edge")
    return Detections(torch.from_numpy(np.stack(pixels)), boxes, classes, name, split, skipped, clipped)


def _rendered(split: Part, count: int, side: int, most: int, say: Callable[[str], None] | None) -> Detections:
    keys = noise.key("detection scenes", split, torch.arange(count))
    if say is not None and count * side**2 > 4e6:
        say(f"drawing {count:,} scenes of {side} pixels")
    drawn = [draw(describe(some, 1, most), side) for some in keys.split(_AT_ONCE)]
    pixels = torch.cat([(one.images * 255).round().byte() for one in drawn])
    return Detections(pixels, concatenate([one.boxes for one in drawn], 0), SHAPES, "scenes", split)


def _digits(split: Part, count: int, side: int, most: int, say: Callable[[str], None] | None) -> Detections:
    keys, images = noise.key("digit scenes", split, torch.arange(count)), load_images("digits", None, split)
    drawn = [digit_scenes(images, some, side, most) for some in keys.split(_AT_ONCE)]
    pixels = torch.cat([(one[0] * 255).round().byte() for one in drawn])
    return Detections(pixels, concatenate([one[1] for one in drawn], 0), images.classes, "digits", split)


def _check(item: Item, classes: tuple[str, ...]) -> None:
    width, height = item.size
    # one is enough, beside others in pixels; 0 and 1 alone may be the pixel in the corner
    in_parts = any(max(box) <= 1 and any(number % 1 for number in box) for box in item.boxes)
    for place, (name, box) in enumerate(zip(item.names, item.boxes, strict=True)):
        numbers = ", ".join(f"{number:g}" for number in box)
        where = f"{item.where}: object {place} ({name}: {numbers})"
        if name not in classes:
            raise InputError(f"{where} is of an unknown class; known are {', '.join(classes)}")
        if in_parts and max(box) <= 1 < min(width, height):
            raise InputError(f"{where} is in parts of the image, expected pixels; multiply by {width} and {height}")
        if not (box[2] >= box[0] and box[3] >= box[1]):
            raise InputError(f"{where} ends before it begins, expected left, top, right, bottom; correct it")
        if _reaches_beyond(box, item.size, 1.0):
            raise InputError(f"{where} reaches beyond the image of {width}x{height}; clip it, or correct the size")
        if min(box[2], width) <= max(box[0], 0) or min(box[3], height) <= max(box[1], 0):
            raise InputError(f"{where} has no area within the image of {width}x{height}; correct or remove it")


def _reaches_beyond(box: tuple[float, ...], size: tuple[int, int], by: float) -> bool:
    return min(box) < -by or box[2] > size[0] + by or box[3] > size[1] + by


def _pixels(item: Item, side: int) -> Any:
    pixels, size = read_stretched(item.picture, side)
    if size != item.size:
        found, said = ("x".join(map(str, each)) for each in (size, item.size))
        raise InputError(f"{item.where}: says {said}, but {item.picture} is {found}; correct the annotation")
    return pixels


def _padded(items: list[Item], classes: tuple[str, ...], side: int) -> Boxes:
    most = max(1, *(len(item.boxes) for item in items)) if items else 1
    place = {name: number for number, name in enumerate(classes)}
    boxes, labels = torch.zeros(len(items), most, 4), torch.zeros(len(items), most, dtype=torch.int64)
    mask, crowd = torch.zeros(len(items), most, dtype=torch.bool), torch.zeros(len(items), most, dtype=torch.bool)
    for row, item in enumerate(items):
        count = len(item.boxes)
        if count:
            scale = torch.tensor([side / item.size[0], side / item.size[1]] * 2)
            boxes[row, :count] = (torch.tensor(item.boxes) * scale).clamp(0, side)
            labels[row, :count] = torch.tensor([place[name] for name in item.names])
            mask[row, :count], crowd[row, :count] = True, torch.tensor(item.crowd)
    return Boxes(boxes, labels, mask, crowd=crowd)


def check_objects(data: Detections, where: Path | str, name: str | None = None) -> None:
    """Check that there is something to be found.

    Args:
        data: pictures with their boxes.
        where: whose they are, for the message.
        name: the class that was asked for; None: any.

    Raises:
        InputError: no picture has an object; crowds, and objects marked difficult, are none.
    """
    if not data.boxes.wanted.any():
        what = "object" if name is None else f"object of class {name!r}"
        raise InputError(
            f"{where}: split {data.split!r} ({len(data)} pictures) has no {what} to be found, crowds and "
            "difficult ones aside, expected some: annotate some, or name another class or folder"
        )


def of_class(data: Detections, name: str) -> Detections:
    """The same pictures with the boxes of one class only.

    Raises:
        InputError: there is no such class.
    """
    if name not in data.classes:
        raise InputError(f"target: found {name!r}, expected any, each, or a class: {', '.join(data.classes)}")
    same = data.boxes.labels == data.classes.index(name)
    return replace(data, boxes=replace(data.boxes, mask=data.boxes.mask & same))


def showing(data: Detections) -> Detections:
    """The pictures that have an object to be found."""
    return subset(data, data.boxes.wanted.any(1).nonzero().squeeze(1))


def subset(data: Detections, rows: Int[Tensor, " some"]) -> Detections:
    """Some of the pictures."""
    return replace(data, pixels=data.pixels[rows], boxes=map_tree(lambda leaf: leaf[rows], data.boxes))


def first_shown(data: Detections, count: int) -> Detections:
    """The first so many pictures, of which half show an object if there are as many: later ones take part for that."""
    shows = data.boxes.wanted.any(1)
    early = shows & (shows.cumsum(0) <= -(-count // 2))
    return subset(data, (~early).int().argsort(stable=True)[:count].sort().values)


def several_views(data: Detections, count: int, seed: int = 0) -> Detections:
    """The data and further views of each picture, once and for all: for features that are computed once.

    The first view is the picture, the second its mirror image, the others are `views`.
    """
    if count == 1:
        return data
    rows, pixels, boxes = torch.arange(len(data)), [data.pixels], [_with_crowd(data.boxes)]
    for view in range(1, count):
        keys = noise.key(seed, "several views", view, rows)
        for some, of in zip(rows.split(_AT_ONCE), keys.split(_AT_ONCE), strict=True):
            if view == 1:
                images, found = mirrored(*chosen(data, some), torch.ones_like(some, dtype=torch.bool))
            else:
                images, found = views(data, some, of)
            pixels.append((images * 255).round().byte())
            boxes.append(_with_crowd(found))
    return replace(data, pixels=torch.cat(pixels), boxes=concatenate(boxes, 0))


def _with_crowd(boxes: Boxes) -> Boxes:
    return boxes if boxes.crowd is not None else replace(boxes, crowd=torch.zeros_like(boxes.mask))


def chosen(data: Detections, rows: Tensor) -> tuple[Tensor, Boxes]:
    """Images in [0, 1] and boxes of some rows, on the device of the rows."""
    boxes = map_tree(lambda leaf: leaf[rows.to(leaf.device)].to(rows.device), data.boxes)
    return data.pixels[rows.to(data.pixels.device)].to(rows.device).float() / 255, boxes


def views(
    data: Detections, rows: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch 3 height width"], Boxes]:
    """`chosen` to learn from: each a new window, half of them mirrored; not so digits, which would become others."""
    images, boxes = chosen(data, rows)
    if data.name != "digits":
        images, boxes = mirrored(images, boxes, noise.uniform(noise.fold(keys, "flip")) < 0.5)
    return zoomed(images, boxes, noise.fold(keys, "zoom"))


def mirrored(images: Tensor, boxes: Boxes, flip: Tensor) -> tuple[Tensor, Boxes]:
    """Images and boxes with left and right exchanged where `flip` [batch] says so."""
    side = images.shape[-1]
    turned = torch.stack(
        (side - boxes.boxes[..., 2], boxes.boxes[..., 1], side - boxes.boxes[..., 0], boxes.boxes[..., 3]), -1
    )
    where = flip[:, None, None]
    images = torch.where(where[..., None], images.flip(-1), images)
    return images, replace(boxes, boxes=torch.where(where, turned, boxes.boxes))
