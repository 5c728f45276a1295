"""Images with the class of every pixel: rendered scenes, folders of pictures beside their masks, and VOC's layout.

Splits are fixed: they depend on the data alone. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.picture_folders import Split, check_memory, check_side
from foveate.data.scenes import SHAPES, describe, draw
from foveate.types import InputError

DATASETS: dict[str, str] = {
    "scenes": "rendered scenes in heavy grain; the classes are shapes, a ring if none are named",
    "pairs": "your pictures and a mask of 0 and 255 for each: images/ and masks/, MSRA10K's Imgs/, or CHASEDB1's files",
    "voc": "VOCdevkit/VOC2007 or VOC2012 with SegmentationClass (torchvision's layout)",
}
VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOID = 255  # nobody labelled the pixel
GRAIN = 0.25  # standard deviation laid over scenes, whose brightness is 0 to 1
SCENES = {"train": 1000, "val": 200, "test": 500}
_TEST, _VAL = 0.25, 0.2  # shares of the groups of `pairs`
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".gif")
Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Pair: TypeAlias = tuple[str, str, Path | None, Path | None]  # name, group, picture, mask


@dataclass(frozen=True)
class Segmented:
    """Images of one size, in memory, with the class of every pixel.

    Attributes:
        pixels: RGB, 0 to 255.
        labels: 0 for the background, k for class k - 1, `VOID` where nobody labelled the pixel.
        classes: their names.
        names: of the items.
        left_out: how many unusable items were left out.
    """

    pixels: UInt8[Tensor, "size 3 height width"]
    labels: UInt8[Tensor, "size height width"]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    left_out: int = 0

    def to(self, device: torch.device | str) -> Segmented:
        """The same on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


def load_segmented(
    name: str,
    root: Path | None,
    split: Split,
    image_size: int | None = None,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
) -> Segmented:
    """Read one split of a data set into memory.

    - scenes: 1,000 / 200 / 500 scenes, each with at least one object of the classes, 64 pixels a side if no
      `image_size` is given. `root` is not used.
    - pairs: `images/NAME.*` with `masks/NAME.*`, `Imgs/NAME.jpg` with `Imgs/NAME.png`, or `NAME.jpg` with
      `NAME_1stHO.png` directly in the root. A quarter is test and a fifth val, by the hash of the name; "01L" and "01R"
      are two pictures of one person and stay together.
    - voc: the lists of ImageSets/Segmentation. Where test has none (VOC2012), test is val, and val a fifth of train.

    Args:
        name: one of `DATASETS`.
        root: the folder in which the data lie.
        split: "all" is every image found.
        image_size: scale the longer side to this many pixels, and fill up to a square that nobody labelled.
        classes: scenes: shapes; voc: which of its classes are kept, the rest is background; pairs: the masks hold 0,
            1, 2, ... for these classes, and 255 where nobody labelled. None: a ring; all; masks of 0 and 255.
        skip_bad: leave unusable items out and count them.

    Raises:
        InputError: unknown name or class; a folder that is missing or has another layout; a picture without mask or the
            reverse, a mask of another size or with other values, a file that cannot be read (unless `skip_bad`);
            pictures of several sizes and no `image_size`; nothing left; more than `picture_folders.MEMORY`.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")
    check_side(image_size)
    if name == "scenes":
        return _scenes(split, image_size or 64, classes or ("ring",))
    if root is None:
        raise InputError(f"root: not given, but data {name!r} is read from a folder: add --root FOLDER")
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root}: {found}, expected the folder of data {name!r}: correct --root")
    if name == "voc":
        _check_classes(classes, VOC)
        names = classes or VOC
        known = {VOC.index(each) + 1: place for place, each in enumerate(names, 1)}
        values = {value: known.get(value, 0) for value in range(len(VOC) + 1)} | {VOID: VOID}
        return _read(root, _voc(root, split), names, values, image_size, skip_bad)
    values = {0: 0, 255: 1} if classes is None else {value: value for value in (*range(len(classes) + 1), VOID)}
    data = _read(root, _choose(_pairs(root), split), classes or ("foreground",), values, image_size, skip_bad)
    if classes and not ((data.labels > 0) & (data.labels != VOID)).any():
        raise InputError(
            f"{root}: no mask of split {split!r} holds one of the values 1 to {len(classes)}, which --classes says; "
            "leave --classes out if the masks are 0 and 255"
        )
    return data


def masks_of(
    labels: UInt8[Tensor, "batch height width"], classes: int
) -> tuple[Bool[Tensor, "batch classes height width"], Bool[Tensor, "batch 1 height width"]]:
    """The mask of each class, and which pixels somebody labelled."""
    ids = torch.arange(1, classes + 1, device=labels.device)[:, None, None]
    return labels[:, None] == ids, labels[:, None] != VOID


def crops(
    data: Segmented, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"], side: int, flip: bool, jitter: float = 0.0
) -> tuple[Float[Tensor, "batch 3 rows columns"], UInt8[Tensor, "batch rows columns"]]:
    """Windows of at most `side` pixels at random places of images: in [0, 1].

    With `flip` half of them are mirrored; with `jitter` contrast and brightness of each channel change by that share.
    """
    height, width = data.labels.shape[1:]
    draws = noise.uniform(noise.fold(keys, "crop"), 3)
    rows = _window(draws[:, 0], height, side)
    columns = _window(draws[:, 1], width, side)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    rows, columns = rows[:, :, None], columns[:, None]
    channels = torch.arange(3, device=ids.device)[:, None, None]
    pixels = data.pixels[ids[:, None, None, None], channels, rows[:, None], columns[:, None]].float() / 255
    if jitter:
        contrast, brightness = (jitter * (2 * noise.uniform(noise.fold(keys, "jitter"), 2, 3, 1, 1) - 1)).unbind(1)
        pixels = ((pixels - 0.5) * (1 + contrast) + 0.5 + brightness / 2).clamp(0, 1)
    return pixels, data.labels[ids[:, None, None], rows, columns]


def _window(draw: Tensor, length: int, side: int) -> Tensor:
    first = (draw * (max(0, length - side) + 1)).long()
    return first[:, None] + torch.arange(min(side, length), device=draw.device)


def _check_classes(classes: tuple[str, ...] | None, known: tuple[str, ...]) -> None:
    for each in classes or ():
        if each not in known:
            nearest = difflib.get_close_matches(each, known, 1, cutoff=0.0)[0]
            raise InputError(f"classes: no {each!r}, expected of {', '.join(known)}: did you mean {nearest!r}?")


def _scenes(split: Split, side: int, classes: tuple[str, ...]) -> Segmented:
    _check_classes(classes, SHAPES)
    if split == "all":
        parts = [_scenes(part, side, classes) for part in ("train", "val", "test")]
        pixels, labels = torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts])
        return Segmented(pixels, labels, classes, tuple(name for part in parts for name in part.names))
    place = torch.zeros(len(SHAPES) + 5, dtype=torch.uint8)  # of the label of a segment among the classes; stuff is 0
    place[[SHAPES.index(each) for each in classes]] = torch.arange(1, len(classes) + 1, dtype=torch.uint8)
    shown_here, marks_here = list[Tensor](), list[Tensor]()
    drawn, size = 0, SCENES[split]
    while sum(map(len, marks_here)) < size:
        keys = noise.key("segmentation", split, torch.arange(drawn, drawn + 250))
        shown = draw(describe(keys), side)
        marks = place[shown.labels.gather(1, shown.ids.flatten(1) - 1)].view(shown.ids.shape)
        there = (marks > 0).flatten(1).any(1)
        grain = GRAIN * noise.normal(noise.fold(keys, "heavy grain"), 1, side, side)
        shown_here.append(((shown.images + grain).clamp(0, 1)[there] * 255).round().byte())
        marks_here.append(marks[there])
        drawn += len(keys)
    names = tuple(f"{split} {row}" for row in range(size))
    return Segmented(torch.cat(shown_here)[:size], torch.cat(marks_here)[:size], classes, names)


# Which files belong together


def _pairs(root: Path) -> list[Pair]:
    if (root / "images").is_dir() and (root / "masks").is_dir():
        found = _match(_files(root / "images"), _files(root / "masks"))
    elif (root / "Imgs").is_dir():
        files = _files(root / "Imgs", every=True)
        found = _match(*({p.stem: p for p in files.values() if (p.suffix == ".png") is mask} for mask in (False, True)))
    elif masks := {path.name.removesuffix("_1stHO.png"): path for path in sorted(root.glob("*_1stHO.png"))}:
        found = _match({path.stem: path for path in sorted(root.glob("*.jpg"))}, masks)
    else:
        raise InputError(
            f"{root}: found no pairs, expected the folders images/ and masks/ with files of the same names, Imgs/ with "
            "NAME.jpg and NAME.png, or NAME.jpg beside NAME_1stHO.png: correct --root or rename"
        )
    if not found:
        raise InputError(f"{root}: its folders hold no pictures ({', '.join(_SUFFIXES)}): add some or correct --root")
    return found


def _files(folder: Path, every: bool = False) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != ".")
    return {path.name if every else path.stem: path for path in paths}


def _match(pictures: dict[str, Path], masks: dict[str, Path]) -> list[Pair]:
    names = sorted(pictures.keys() | masks.keys())
    return [(name, re.sub(r"(?<=\d)[LR]$", "", name), pictures.get(name), masks.get(name)) for name in names]


def _choose(pairs: list[Pair], split: Split) -> list[Pair]:
    """By the hash of the groups' names; one group at least is kept for training, then one held out for each part."""
    groups = sorted(
        {group for _, group, *_ in pairs}, key=lambda group: (int(noise.key("test", zlib.crc32(group.encode()))), group)
    )
    if len(groups) < 3 and split != "all":
        raise InputError(f"pairs: {len(groups)} items are too few for train, val and test: add some, three are enough")
    tests, vals = (max(1, round(len(groups) * share)) for share in (_TEST, _VAL))
    parts = {"test": groups[:tests], "val": groups[tests : tests + vals], "train": groups[tests + vals :]}
    return [pair for pair in pairs if split == "all" or pair[1] in parts[split]]


def _voc(root: Path, split: Split) -> list[Pair]:
    years = [root] if (root / "SegmentationClass").is_dir() else sorted(root.glob("VOCdevkit/VOC*/"))
    if len(years) != 1 or not (years[0] / "SegmentationClass").is_dir():
        found = ", ".join(year.name for year in years) or "no VOCdevkit/VOC*"
        raise InputError(f"{root}: found {found}, expected one year with SegmentationClass/: name its folder by --root")
    year, lists = years[0], years[0] / "ImageSets" / "Segmentation"

    def listed(part: str) -> list[str]:
        path = lists / f"{part}.txt"
        if not path.is_file():
            raise InputError(f"{path}: not found, expected a name a line: add it or correct --root")
        return path.read_text().split()

    if (lists / "test.txt").is_file():
        names = (
            sorted({n for part in ("train", "val", "test") for n in listed(part)}) if split == "all" else listed(split)
        )
    else:
        train: list[Pair] = [(name, name, None, None) for name in listed("train")]
        held = {name for name, *_ in _choose(train, "val")}
        kept = [name for name in listed("train") if name not in held]
        parts = {"train": kept, "val": sorted(held), "test": listed("val")}
        names = [*listed("train"), *listed("val")] if split == "all" else parts[split]
    pictures = [year / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [year / "SegmentationClass" / f"{name}.png" for name in names]
    there = [[path if path.is_file() else None for path in paths] for paths in (pictures, masks)]
    return list(zip(names, names, *there, strict=True))


# Pixels


def _read(
    root: Path,
    pairs: list[Pair],
    classes: tuple[str, ...],
    values: dict[int, int],
    image_size: int | None,
    skip_bad: bool,
) -> Segmented:
    items: dict[str, tuple[Array, Array]] = {}
    for name, _, picture, mask in pairs:
        try:
            pixels, labels = _item(name, picture, mask, values)
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; or leave it out with --skip-bad") from error
            continue
        if image_size is not None:
            pixels, labels = _square(pixels, labels, image_size)
        elif items and labels.shape != items[first := next(iter(items))][1].shape:
            one, other = (f"{shape[1]}x{shape[0]}" for shape in (items[first][1].shape, labels.shape))
            raise InputError(
                f"{root}: {first} is {one}, but {name} is {other} (width x height), expected one size: give an "
                f"image_size, for example --image-size {min(256, max(labels.shape))}"
            )
        if not items:
            check_memory(str(root), (len(pairs), 4, *labels.shape))
        items[name] = pixels, labels
    if not items:
        raise InputError(f"{root}: none of {len(pairs)} items of the split can be used: add or repair some")
    shown, marks = (torch.from_numpy(np.stack([item[place] for item in items.values()])) for place in (0, 1))
    return Segmented(shown.permute(0, 3, 1, 2).contiguous(), marks, classes, tuple(items), len(pairs) - len(items))


def _item(name: str, picture: Path | None, mask: Path | None, values: dict[int, int]) -> tuple[Array, Array]:
    """Pixels [height, width, 3] and labels [height, width]."""
    if picture is None or mask is None:
        lacking, there = ("mask", picture) if mask is None else ("picture", mask)
        raise InputError(f"{there or name}: found no {lacking} of it: add the {lacking} or remove the file")
    pixels = _decode(picture, lambda image: np.asarray(image.convert("RGB")))
    labels = _decode(mask, _values)
    if labels.shape != pixels.shape[:2]:
        one, other = (f"{shape[1]}x{shape[0]}" for shape in (labels.shape, pixels.shape))
        raise InputError(f"{mask}: the mask is {one}, but {picture.name} is {other} (width x height): replace one")
    strange = [value for value in np.unique(labels).tolist() if value not in values]
    if strange:
        shown = ", ".join(map(str, strange[:4])) + (", ..." if len(strange) > 4 else "")
        remedy = "save it without smoothing, or name the classes of the values 1, 2, ... by --classes"
        raise InputError(f"{mask}: found the values {shown}, expected {', '.join(map(str, values))}: {remedy}")
    table = np.zeros(256, np.uint8)
    table[list(values)] = list(values.values())
    return pixels, table[labels]


def _values(image: Any) -> Array:
    """Of a mask: gray, indices of a palette, or one bit a pixel, which is 0 or 255."""
    if image.mode not in ("1", "L", "P"):
        raise ValueError(f"a mask of mode {image.mode}; save it as 8-bit gray or with a palette")
    values = np.asarray(image)
    return values * np.uint8(255) if values.dtype == bool else values


def _decode(path: Path, get: Callable[[Any], Array]) -> Array:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return get(ImageOps.exif_transpose(image) if image.format in ("JPEG", "MPO") else image)
    except Exception as error:  # decoders raise anything on a broken file
        found = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{path}: cannot be read as a picture ({found}): replace or remove the file") from error


def _square(pixels: Array, labels: Array, side: int) -> tuple[Array, Array]:
    from PIL import Image

    scale = side / max(labels.shape)
    size = tuple(max(1, round(length * scale)) for length in labels.shape[::-1])
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    mask = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
    square, marks = np.zeros((side, side, 3), np.uint8), np.full((side, side), VOID, np.uint8)
    square[: size[1], : size[0]], marks[: size[1], : size[0]] = np.asarray(image), np.asarray(mask)
    return square, marks
