"""Files that say which boxes are in which pictures: Pascal VOC's XML and COCO's JSON.

Nothing is decoded here; paths that leave the data's folder are refused, and XML that defines entities is not read.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from xml.etree import ElementTree

from foveate import noise
from foveate.types import InputError

Part = Literal["train", "val", "test"]
_VAL_SHARE, _TEST_SHARE = 0.15, 0.2


@dataclass(frozen=True)
class Item:
    """A picture, and what is said of it.

    Attributes:
        picture: its file.
        where: who says so, for messages.
        size: (width, height) as annotated.
        names: class of each object.
        boxes: (left, top, right, bottom) of each, in pixels of the file, unchecked.
        crowd: true where an object is a crowd, or marked difficult.
    """

    picture: Path
    where: str
    size: tuple[int, int]
    names: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    crowd: tuple[bool, ...]


Reader: TypeAlias = Callable[[Part], tuple[list[Item], int]]  # a part to its pictures, and how many were left out


# Pascal VOC


def voc_items(root: Path, skip_bad: bool) -> tuple[Reader, tuple[str, ...]]:
    """Pascal VOC's folders in `root`, or in one set below it: a reader of its parts, and the classes, sorted.

    Parts are the lists of ImageSets/Main; what is missing is held out of train by the pictures' names.

    Raises:
        InputError: no such folders or several, a damaged file (unless `skip_bad`), a name that is nowhere annotated.
    """
    folders = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    found = [folder for folder in folders if (folder / "Annotations").is_dir()]
    if not found:
        raise InputError(f"{root}: no Annotations in it, nor in VOCdevkit/VOC*/; expected Pascal VOC's folders")
    if len(found) > 1 and root not in found:
        raise InputError(f"root: {root} holds {len(found)} sets ({found[0].name}, {found[1].name}, ...); name one")
    folder = found[0]
    items: dict[str, Item | InputError] = {}
    for path in sorted((folder / "Annotations").glob("*.xml")):
        try:
            items[path.stem] = _voc_item(folder, path)
        except InputError as error:
            if not skip_bad:
                raise
            items[path.stem] = error
    good = [item for item in items.values() if isinstance(item, Item)]
    classes = tuple(sorted({name for item in good for name in item.names}))
    if not classes:
        raise InputError(f"{folder / 'Annotations'}: no object in any file, expected some")
    lists = _voc_lists(folder, list(items))

    def read(split: Part) -> tuple[list[Item], int]:
        missing = [name for name in lists[split] if name not in items]
        if missing and not skip_bad:
            where = folder / "ImageSets" / "Main" / f"{split}.txt"
            raise InputError(f"{where}: names {missing[0]!r}, of which there is no annotation; remove the line")
        chosen = [items[name] for name in lists[split] if name in items]
        listed = [item for item in chosen if isinstance(item, Item)]
        return listed, len(missing) + len(chosen) - len(listed)

    return read, classes


def _voc_lists(folder: Path, names: Sequence[str]) -> dict[Part, list[str]]:
    lists: dict[Part, list[str]] = {}
    parts: tuple[Part, ...] = ("train", "val", "test")
    for part in parts:
        path = folder / "ImageSets" / "Main" / f"{part}.txt"
        if path.is_file():
            lists[part] = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    held = {name for part in ("val", "test") for name in lists.get(part, ())}
    train = [name for name in lists.get("train", names) if name not in held]
    for part, share in (("test", _TEST_SHARE), ("val", _VAL_SHARE)):
        if part not in lists:
            lists[part] = held_out(train, share, part)
            train = [name for name in train if name not in set(lists[part])]
    return lists | {"train": train}


def _voc_item(folder: Path, path: Path) -> Item:
    try:
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ValueError("it defines entities, which are not read")
        tree = ElementTree.fromstring(text)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: is no readable XML ({error}); repair or remove it") from error
    size = int(_number(tree, "size/width", path)), int(_number(tree, "size/height", path))
    names, boxes, crowd = [], [], []
    for place, entry in enumerate(tree.findall("object")):
        where = f"{path}: object {place}"
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{where} has no name; give it a class")
        box = [_number(entry, f"bndbox/{side}", f"{where} ({name})") for side in ("xmin", "ymin", "xmax", "ymax")]
        names.append(name)
        boxes.append((box[0], box[1], box[2], box[3]))
        crowd.append((entry.findtext("difficult") or "0").strip() == "1")
    picture = inside(folder / "JPEGImages", (tree.findtext("filename") or "").strip(), path)
    if not picture.is_file():  # some sets give a filename of another machine: the stem is what counts
        near = sorted((folder / "JPEGImages").glob(f"{path.stem}.*"))
        if not near:
            raise InputError(f"{path}: its picture {picture} does not exist; add it, or remove the annotation")
        picture = near[0]
    return Item(picture, str(path), size, tuple(names), tuple(boxes), tuple(crowd))


def _number(tree: ElementTree.Element, name: str, where: Path | str) -> float:
    try:
        if math.isfinite(number := float(tree.findtext(name) or "")):
            return number
        raise ValueError("not finite")
    except ValueError as error:
        raise InputError(f"{where}: {name} is {tree.findtext(name)!r}, expected a number") from error


# COCO


def coco_items(root: Path, split: Part, skip_bad: bool) -> tuple[Reader, tuple[str, ...]]:
    """COCO's instances_*.json in `root`/annotations: a reader of that part, and the classes in their order.

    Raises:
        InputError: no such file, a damaged one, a category that is listed twice; unless `skip_bad`: an annotation of an
            unlisted image, without a class or four numbers of a box, an image without name or size, or listed twice.
    """
    files = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    parts = {part: path for name, path in files.items() for part in ("train", "val", "test") if name.startswith(part)}
    if "train" not in parts:
        raise InputError(f"{root}: found no annotations/instances_train*.json, expected COCO's layout")
    tests = parts.get("test") or parts.get("val")
    own_val = "test" in parts and "val" in parts
    path = tests if split == "test" else parts["val"] if split == "val" and own_val else parts["train"]
    path = path or parts["train"]
    content = coco_content(path, "boxes")
    try:
        named = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a category has no id or no name ({error!r}); give it both") from error
    if double := twice(int(entry["id"]) for entry in content["categories"]):
        raise InputError(f"{path}: category {min(double)} is listed twice; remove one")
    classes = tuple(dict.fromkeys(named[number] for number in sorted(named)))  # of one name they are one class

    def read(part: Part) -> tuple[list[Item], int]:
        items, strangers = _items(root, path, content, named, skip_bad)
        names = list(items)
        held = [] if own_val else held_out(names, _VAL_SHARE, "val")
        test = [] if tests else held_out([name for name in names if name not in set(held)], _TEST_SHARE, "test")
        if part == "test":
            chosen = names if tests else test
        elif part == "val":
            chosen = names if own_val else held
        else:
            chosen = [name for name in names if name not in {*held, *test}]
        good = [item for name in chosen if isinstance(item := items[name], Item)]
        once = part == "train" or path != parts["train"]  # of the parts of a file the first counts what is of no image
        return good, len(chosen) - len(good) + (strangers if once else 0)

    return read, classes


def coco_content(path: Path, kind: str) -> dict[str, Any]:
    """Images, annotations and categories of a COCO file, of boxes or another `kind`.

    Raises:
        InputError: it cannot be read, or one of the three is no list of objects.
    """
    try:
        content = json.loads(path.read_bytes())
        for name in ("images", "annotations", "categories"):
            if not isinstance(content[name], list) or not all(isinstance(entry, dict) for entry in content[name]):
                raise TypeError(f"{name!r} is no list of objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is no COCO file of {kind} ({error}); expected images, annotations, categories"
        ) from error
    return dict(content)


def _items(
    root: Path, path: Path, content: dict[str, Any], named: dict[int, str], skip_bad: bool
) -> tuple[dict[str, Item | InputError], int]:
    """Picture → what is said of it, or what is wrong with that; and how many annotations are of no image."""
    folder = root / path.stem.removeprefix("instances_")
    told: dict[Any, list[dict[str, Any]]] = {}
    for entry in content["annotations"]:
        told.setdefault(hashable(entry.get("image_id")), []).append(entry)
    known = {hashable(image.get("id")) for image in content["images"]}
    strangers = [entry for number, entries in told.items() if number not in known for entry in entries]
    if strangers and not skip_bad:
        of = f"annotation {strangers[0].get('id')} is of image {strangers[0].get('image_id')}, unknown"
        raise InputError(f"{path}: {of}: add the image, or remove the annotation")
    check = image_check(path, content["images"])
    items: dict[str, Item | InputError] = {}
    for image in content["images"]:
        name = str(image.get("file_name"))  # without its folder: parts are not to change when the data are moved
        try:
            check(image)
            items[name] = _coco_item(folder, path, image, told.get(hashable(image.get("id")), []), named)
        except InputError as error:
            if not skip_bad:
                raise
            items[name] = error
    return items, len(strangers)


def twice(names: Iterable[Any]) -> set[Any]:
    """Those of the names that are there more than once."""
    return {name for name, count in Counter(names).items() if count > 1}


def hashable(value: Any) -> Any:
    """What a file gives for an id, as it is; lists and objects, which can be none, as text."""
    return repr(value) if isinstance(value, list | dict) else value


def image_check(path: Path, images: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """A check of each of the images of a COCO file.

    It raises an `InputError` for one without id, name or size, or whose id or name another one has: nobody knows which
    annotations are whose.
    """
    fields = (("id", int), ("file_name", str), ("width", int), ("height", int))
    doubles = {field: twice(hashable(image.get(field)) for image in images) for field in ("id", "file_name")}

    def check(image: dict[str, Any]) -> None:
        for field, kind in fields:
            if not isinstance(value := image.get(field), kind):
                raise InputError(
                    f"{path}: image {image.get('id')}: its {field} is {value!r}, expected {kind.__name__}; correct it"
                )
            if value in doubles.get(field, ()):
                raise InputError(f"{path}: images with the {field} {value!r} are listed twice; remove one")

    return check


def _coco_item(
    folder: Path, path: Path, image: dict[str, Any], entries: list[dict[str, Any]], named: dict[int, str]
) -> Item:
    where = f"{path}: image {image.get('id')}"
    names, boxes, crowd = [], [], []
    for place, entry in enumerate(entries):
        box, number = entry.get("bbox"), entry.get("category_id")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise InputError(f"{where}: object {place} has the bbox {box!r}, expected [left, top, width, height]")
        if not isinstance(number, int):
            raise InputError(f"{where}: object {place} has the category_id {number!r}, expected one of {list(named)}")
        left, top, width, height = map(float, box)
        names.append(named.get(number, f"id {number}"))
        boxes.append((left, top, left + width, top + height))
        crowd.append(bool(entry.get("iscrowd", 0)))
    picture = inside(folder, image["file_name"], path)
    return Item(picture, where, (image["width"], image["height"]), tuple(names), tuple(boxes), tuple(crowd))


# Both


def held_out(names: Sequence[str], share: float, purpose: str) -> list[str]:
    """Some names, by their hashes: one more name moves hardly any other."""
    ranked = sorted(names, key=lambda name: (int(noise.key(purpose, zlib.crc32(name.encode()))), name))
    chosen = set(ranked[: max(1, round(len(names) * share))])
    return [name for name in names if name in chosen]


def inside(folder: Path, name: str, where: Path) -> Path:
    """The path of a file that a file of annotations names.

    Raises:
        InputError: it lies outside of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{where}: names the picture {name!r}, which lies outside of {folder}; correct it")
    return path
