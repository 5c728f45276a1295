"""Images of which every pixel belongs to a segment: rendered scenes, and COCO's panoptic layout.

Pictures are stretched to a square, ids by the nearest pixel, so that a segment thinner than a pixel of the square is
gone. Splits are fixed: they depend on the data alone, never on the seed of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.box_files import Part, coco_content, hashable, held_out, image_check, inside, twice
from foveate.data.picture_folders import check_memory, read_stretched
from foveate.data.scenes import SHAPES, STUFF, describe, draw
from foveate.geometry import Segments
from foveate.types import InputError, map_tree

DATASETS: dict[str, str] = {
    "scenes": "rendered scenes: objects are things, sky and ground are stuff; nothing to download",
    "coco": "ROOT/annotations/panoptic_NAME.json and panoptic_NAME/*.png, pictures in ROOT/NAME/, e.g. of val2017",
}
SCENES = {"val": 250, "test": 500}
VAL_SHARE = 0.15  # of coco's train
_AT_ONCE = 64  # scenes drawn together: their layers then stay in the processor's cache
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PanopticMaps:
    """Images of one size, in memory, with their segments.

    Attributes:
        pixels: RGB, 0 to 255.
        segments: of each, ids as int16; a segment without a pixel is not there.
        classes: their names, things first.
        things: how many of them are things.
        name: of the data set, one of `DATASETS`.
        split: which part of it this is.
        skipped: what was left out because something is wrong with it: file, item and why, one line each.
    """

    pixels: UInt8[Tensor, "size 3 side side"]
    segments: Segments
    classes: tuple[str, ...]
    things: int
    name: str
    split: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)


def load_panoptic(
    name: str,
    root: Path | None,
    split: Part,
    image_size: int,
    skip_bad: bool = False,
    scenes: int = 6000,
    most: int = 4,
    supercategories: bool = False,
    say: Callable[[str], None] | None = None,
) -> PanopticMaps:
    """Read one split of a data set into memory.

    - scenes: `scenes` of them to train on, up to `SCENES` others to choose by and to test on. An object of which fewer
      than `scenes.VISIBLE` pixels are seen is void.
    - coco: panoptic_train*.json and panoptic_val*.json. Without panoptic_test*.json, test is val, and val is held out
      of train by the pictures' names. Classes are the categories that occur. Stuff has one segment a class.

    Args:
        name: one of `DATASETS`.
        root: the folder of the data; not needed for scenes.
        split: which part.
        image_size: side in pixels to which pictures are stretched.
        skip_bad: leave out pictures with which something is wrong, and tell it in `skipped`.
        scenes: how many to train on.
        most: objects in a scene at most.
        supercategories: coco: classes are the supercategories, e.g. animal, vehicle, ground.
        say: is told what takes long.

    Raises:
        InputError: unknown name; missing or damaged files; an empty split; without `skip_bad`: a PNG with an id that
            its JSON does not list, or the reverse; an unknown category; a PNG that is missing or has another size than
            its picture; a picture that is missing or listed twice, or has another size than its JSON says, or not one
            annotation; a segment that is listed twice, an annotation of no picture.
    """
    if name not in DATASETS:
        raise InputError(f"data: found {name!r}, expected one of {', '.join(DATASETS)}")
    if image_size < 8:
        raise InputError(f"image_size: found {image_size}, expected at least 8 pixels")
    if name == "scenes":
        count = scenes if split == "train" else min(SCENES[split], scenes)
        check_memory("scenes", (count, 5, image_size, image_size))
        return _rendered(split, count, image_size, most, say)
    if root is None:
        raise InputError(f"root: not given; data {name!r} needs the folder in which it lies: --root FOLDER")
    if not root.is_dir():
        raise InputError(f"root: {root} is no folder; correct the path")
    return _read_coco(root, split, image_size, skip_bad, supercategories)


def _rendered(split: Part, count: int, side: int, most: int, say: Callable[[str], None] | None) -> PanopticMaps:
    keys = noise.key("panoptic scenes", split, torch.arange(count))
    if say is not None and count * side**2 > 4e6:
        say(f"drawing {count:,} scenes of {side} pixels")
    pixels, ids, labels = [], [], []
    for some in keys.split(_AT_ONCE):
        drawn = draw(describe(some, 1, most), side)
        seen = torch.nn.functional.pad(drawn.boxes.mask, (1, 2), value=True)  # void, objects, sky and ground
        pixels.append((drawn.images * 255).round().byte())
        ids.append((drawn.ids * seen.gather(1, drawn.ids.flatten(1)).view(drawn.ids.shape)).short())
        labels.append(drawn.labels)
    known = torch.cat(labels)
    return PanopticMaps(
        torch.cat(pixels),
        Segments(torch.cat(ids), known, torch.zeros_like(known, dtype=torch.bool)),
        (*SHAPES, *STUFF),
        len(SHAPES),
        "scenes",
        split,
    )


def chosen(data: PanopticMaps, rows: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch 3 side side"], Segments]:
    """Images in [0, 1] and segments of some rows, on the device of the rows."""
    pixels, found = map_tree(lambda leaf: leaf[rows.to(leaf.device)].to(rows.device), (data.pixels, data.segments))
    return pixels.float() / 255, replace(found, ids=found.ids.long())


def mirrored(
    images: Float[Tensor, "batch 3 side side"], segments: Segments, flip: Bool[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch 3 side side"], Segments]:
    """Images and segments with left and right exchanged where `flip` says so."""
    where = flip[:, None, None]
    ids = torch.where(where, segments.ids.flip(2), segments.ids)
    return torch.where(where[:, None], images.flip(3), images), replace(segments, ids=ids)


# COCO


@dataclass(frozen=True)
class _Item:
    """A picture, its map, and what the JSON says of it."""

    where: str
    picture: Path
    map: Path
    size: tuple[int, int]
    segments: list[dict[str, Any]]


@dataclass(frozen=True)
class _Categories:
    """Which class each category is."""

    classes: tuple[str, ...]
    things: int
    of: dict[Any, int]


def _read_coco(root: Path, split: Part, side: int, skip_bad: bool, supercategories: bool) -> PanopticMaps:
    files = {path.stem.removeprefix("panoptic_"): path for path in sorted(root.glob("annotations/panoptic_*.json"))}
    parts = {part: path for part in ("train", "val", "test") for name, path in files.items() if name.startswith(part)}
    if not {"train", "val"} <= set(parts):
        raise InputError(
            f"{root}: found {', '.join(path.name for path in parts.values()) or 'no panoptic files'} in annotations, "
            "expected panoptic_train*.json and panoptic_val*.json: correct --root"
        )
    contents = {part: coco_content(path, "segments") for part, path in parts.items()}
    known = _categories(root, contents, supercategories)
    own = "test" in parts
    source: Part = split if own else "train" if split == "val" else "val" if split == "test" else "train"
    items, strangers = _items(root, parts[source], contents[source])
    if not own and source == "train":
        held = set(held_out(list(items), VAL_SHARE, "val"))
        items = {name: item for name, item in items.items() if (name in held) is (split == "val")}
        strangers = strangers if split == "train" else []  # what is of no picture is counted once
    check_memory(str(root), (len(items), 5, side, side))
    read, skipped = [], []
    for item in (*strangers, *items.values()):
        try:
            if isinstance(item, InputError):
                raise item
            read.append(_read(item, side, known))
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}, or leave it out with --skip-bad") from error
            skipped.append(str(error))
    if not read:
        raise InputError(f"{root}: split {split!r} has no picture that can be used ({len(items)} listed); add some")
    width = max(1, *(len(labels) for _, _, labels, _ in read))
    labels, crowd = np.zeros((len(read), width), np.int64), np.zeros((len(read), width), bool)
    for row, (*_, of_item, many) in enumerate(read):
        labels[row, : len(of_item)], crowd[row, : len(of_item)] = of_item, many
    pixels, ids = (torch.from_numpy(np.stack([item[place] for item in read])) for place in (0, 1))
    segments = Segments(ids, torch.from_numpy(labels), torch.from_numpy(crowd))
    return PanopticMaps(pixels, segments, known.classes, known.things, "coco", split, tuple(skipped))


def _categories(root: Path, contents: dict[str, dict[str, Any]], supercategories: bool) -> _Categories:
    """The classes of the categories that occur in any part, things first, in the order of their ids."""
    for content in contents.values():
        if double := twice(hashable(entry.get("id")) for entry in content["categories"]):
            raise InputError(f"{root}: category {next(iter(double))} is listed twice in one file; remove one")
    entries = [entry for content in contents.values() for entry in content["categories"]]
    listed = {number: entry for entry in entries if isinstance(number := entry.get("id"), int)}
    occur = {
        hashable(segment.get("category_id"))
        for content in contents.values()
        for entry in content["annotations"]
        for segment in _segments(entry) or ()
    }
    used = [(number, listed[number]) for number in sorted(occur & listed.keys())]
    field = "supercategory" if supercategories else "name"
    kinds = [
        dict.fromkeys(str(entry.get(field)) for _, entry in used if bool(entry.get("isthing")) is thing)
        for thing in (True, False)
    ]
    if not kinds[0]:
        raise InputError(
            f"{root}: no segment is of a thing (isthing 1), expected some; for stuff alone, tune-segmenter"
        )
    places = [{name: place for place, name in enumerate(kinds[0])}]
    places.append({name: len(kinds[0]) + place for place, name in enumerate(kinds[1])})
    of = {number: places[0 if entry.get("isthing") else 1][str(entry.get(field))] for number, entry in used}
    return _Categories((*kinds[0], *kinds[1]), len(kinds[0]), of)


def _segments(annotation: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What the JSON lists of a map; None if that is no list of objects."""
    found = annotation.get("segments_info", [])
    return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else None


def _items(root: Path, path: Path, content: dict[str, Any]) -> tuple[dict[str, _Item | InputError], list[InputError]]:
    """Picture → what is said of it, or what is wrong with that; and the annotations of no picture."""
    told: dict[Any, list[dict[str, Any]]] = {}
    for entry in content["annotations"]:
        told.setdefault(hashable(entry.get("image_id")), []).append(entry)
    known = {hashable(image.get("id")) for image in content["images"]}
    strangers = [
        InputError(f"{path}: found an annotation of image {number}, which is not listed: add the image")
        for number, entries in told.items()
        for _ in entries
        if number not in known
    ]
    folder, check = path.stem.removeprefix("panoptic_"), image_check(path, content["images"])
    items: dict[str, _Item | InputError] = {}
    for image in content["images"]:
        name = Path(f"{folder}/{image.get('file_name')}").as_posix()  # the same wherever the data lie
        try:
            check(image)
            items[name] = _item(root / folder, path, image, told.get(image["id"], []))
        except InputError as error:
            items[name] = error
    return items, strangers


def _item(folder: Path, path: Path, image: dict[str, Any], entries: list[dict[str, Any]]) -> _Item:
    where = f"{path}: image {image['id']}"
    if len(entries) != 1:
        raise InputError(f"{where} has {f'{len(entries)} annotations' if entries else 'no annotation'}: give it one")
    if (segments := _segments(entries[0])) is None:
        raise InputError(f"{where}: its segments_info is no list of objects: correct it")
    picture = inside(folder, image["file_name"], path)
    map_of = inside(path.with_suffix(""), str(entries[0].get("file_name")), path)
    return _Item(where, picture, map_of, (image["width"], image["height"]), segments)


def _read(item: _Item, side: int, known: _Categories) -> tuple[Array, Array, list[int], list[bool]]:
    """Pixels [3, side, side], ids [side, side], and class and crowd of each segment."""
    listed: dict[Any, dict[str, Any]] = {hashable(segment.get("id")): segment for segment in item.segments}
    if double := twice(hashable(segment.get("id")) for segment in item.segments):
        raise InputError(f"{item.where}: segment {next(iter(double))} is listed twice: remove one")
    for number, segment in listed.items():
        if hashable(segment.get("category_id")) not in known.of:
            raise InputError(
                f"{item.where}: segment {number} is of category {segment.get('category_id')}, which is not among the "
                "categories: add it there, or correct the segment"
            )
    pixels, size = read_stretched(item.picture, side)
    ids = _ids(item.map)
    if size != item.size or ids.shape[::-1] != size:
        said = " and ".join("x".join(map(str, each)) for each in (item.size, ids.shape[::-1]))
        raise InputError(
            f"{item.where}: its JSON and {item.map.name} say {said}, but {item.picture.name} is {size[0]}x{size[1]} "
            "(width x height): replace one"
        )
    found = set(np.unique(ids).tolist()) - {0}
    if strange := found - listed.keys():
        raise InputError(
            f"{item.map}: found id {min(strange)}, of which the JSON lists no segment: add it, or paint these pixels 0"
        )
    if missing := listed.keys() - found:
        raise InputError(
            f"{item.where}: segment {min(missing, key=str)} is listed, but {item.map} has no pixel of it: remove it"
        )
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in ids.shape)
    return pixels, *_numbered(ids[rows[:, None], columns], listed, known)


def _numbered(ids: Array, listed: dict[int, dict[str, Any]], known: _Categories) -> tuple[Array, list[int], list[bool]]:
    """Ids from 1 on, and class and crowd of each; segments of one class of stuff become one."""
    places: dict[tuple[int, bool, int], int] = {}
    values, inverse = np.unique(ids, return_inverse=True)
    table = np.zeros(len(values), np.int16)
    for row, value in enumerate(values.tolist()):
        if value:
            label, crowd = known.of[listed[value]["category_id"]], bool(listed[value].get("iscrowd", 0))
            table[row] = places.setdefault((label, crowd, value if label < known.things else 0), 1 + len(places))
    return table[inverse].reshape(ids.shape), [key[0] for key in places], [key[1] for key in places]


def _ids(path: Path) -> Array:
    """Ids of a PNG: R + 256 G + 65536 B."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise ValueError(f"its mode is {image.mode}, expected the ids as RGB")
            red, green, blue = np.asarray(image.convert("RGB")).astype(np.int64).transpose(2, 0, 1)
    except Exception as error:  # decoders raise anything on a broken file
        found = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{path}: cannot be read as a panoptic map ({found}): replace the file") from error
    return red + 256 * green + 65536 * blue
