"""Pictures in folders: which file belongs to which class and part, and their pixels.

Everything is decoded into memory, at most `MEMORY` bytes of it.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.types import InputError

Split = Literal["train", "val", "test", "all"]

MEMORY = 4 * 10**9

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_HIDDEN = (".", "__MACOSX")
_PARTS = ("train", "val", "test")
_ORIENTATION = 0x0112  # of the EXIF standard; 5 to 8 swap width and height
_VAL_SHARE, _TEST_SHARE = 0.1, 0.2


def read_pictures(path: Path, channels: int, image_size: int | None) -> Float[Tensor, "batch channels height width"]:
    """Read one picture, or all pictures directly in a folder in the order of their names; float32 in [0, 1].

    They become what an agent was trained on: `channels` 1 turns them gray, 3 makes them RGB; `image_size` is the side
    of the central square to which they are shrunk, enlarged and cut, None for pictures of one size.

    Raises:
        InputError: nothing at `path`; a folder without pictures; a file that is no picture; pictures of several sizes
            and no `image_size`; more than `MEMORY`.
    """
    check_side(image_size)
    if not path.exists():
        raise InputError(f"{path}: does not exist, expected a picture or a folder of pictures: correct the path")
    paths = _inside(path)[1] if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no pictures directly in it (*{', *'.join(_SUFFIXES)}): name another folder or file")
    remedy = "resize them to one size or name a single picture"
    size = _one_size(paths, [_head(each)[0] for each in paths], image_size, remedy)
    check_memory(str(path), (len(paths), channels, *size[::-1]), 4)
    return _decode(paths, size, channels, image_size).float().div_(255)


def by_number(path: Path) -> list[str | int]:
    """What to sort frames by: 2 comes before 10, in whatever text the numbers stand."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", path.name))]


def read_stretched(path: Path, side: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, int]]:
    """A picture in RGB, stretched to a square of `side` pixels, uint8 [3, side, side]; and its (width, height) before.

    Raises:
        InputError: the file is missing or no picture.
    """
    from PIL import Image

    with _reading(path):
        whole = Image.fromarray(_picture(path, "RGB", None))
        size = whole.size
        return np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1), size


def read_folder(
    root: Path, split: Split, image_size: int | None, labelled: bool = True
) -> tuple[UInt8[Tensor, "size channels height width"], Int[Tensor, " size"], tuple[str, ...]]:
    """Pixels, labels and class names of one split of a folder of pictures, as `classification.load_images` tells.

    Raises:
        InputError: as `layout`; one class only, of `labelled` ones; an empty or missing split; a file that is no
            picture; pictures of several sizes and no `image_size`; more than `MEMORY`.
    """
    found = layout(root, labelled)
    classes = tuple(sorted(set().union(*found.values())))
    if labelled and len(classes) < 2:
        raise InputError(
            f"{root}: one class only ({classes[0]}), expected at least two folders of pictures: "
            "add a folder for each further class"
        )
    chosen = _choose(found, root, split)
    paths = [path for label in classes for path in chosen.get(label, [])]
    if not paths:
        raise InputError(
            f"{root}: too few pictures a class to hold out split {split!r}: "
            "add pictures (three a class are enough) or make folders train, val and test"
        )
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in chosen.get(name, [])])
    # colour and size are those of the whole folder, so that its splits agree
    everything = [path for part in found.values() for label in sorted(part) for path in part[label]]
    heads = [_head(path) for path in everything]
    channels = 1 if all(gray for _, gray in heads) else 3
    remedy = f"give an image_size, for example --image-size {min(64, *(side for size, _ in heads for side in size))}"
    size = _one_size(everything, [size for size, _ in heads], image_size, remedy)
    check_memory(str(root), (len(paths), channels, *size[::-1]))
    return _decode(paths, size, channels, image_size), labels, classes


def layout(root: Path, labelled: bool = True) -> dict[str, dict[str, list[Path]]]:
    """Part → class → its pictures, sorted. The parts are those of train, val and test that exist, or "flat" alone.

    Pictures that need not be `labelled` may also lie directly in the folder, or in that of a part: they are of the
    class "".

    Raises:
        InputError: no class folders; a class without pictures; a class of val or test that train does not have.
    """
    # a class may be called train: a part is a folder that itself holds folders, or nothing but parts lie beside it
    folders = [root / part for part in _PARTS if (root / part).is_dir()]
    alone = not labelled and all(entry.name in _PARTS for entry in _inside(root)[0])
    parts = {folder.name: folder for folder in folders if _inside(folder)[0] or (alone and _inside(folder)[1])}
    found = {part: _classes(folder, labelled) for part, folder in (parts or {"flat": root}).items()}
    for part, classes in found.items():
        strangers = sorted(set(classes) - set(found.get("train", classes)))
        if labelled and strangers:
            known = ", ".join(found["train"])
            raise InputError(f"{root / part / strangers[0]}: no class of train ({known}): rename or remove the folder")
    return found


def check_side(image_size: int | None) -> None:
    """Check a side in pixels that a user hands in.

    Raises:
        InputError: below 1.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size: {image_size}, expected at least 1 pixel: leave it out to keep the images' size")


def check_memory(name: str, shape: tuple[int, ...], width: int = 1) -> None:
    """Check that a tensor [size, channels, height, width] of `width` bytes a number is not above `MEMORY`.

    Raises:
        InputError: it is; the message names `name` and the largest image_size that fits.
    """
    size, channels, rows, columns = shape
    if (needed := size * channels * rows * columns * width) > MEMORY:
        side = max(1, int((MEMORY / (size * channels * width)) ** 0.5))
        raise InputError(
            f"{name}: {size} images of {columns}x{rows} with {channels} channels take {needed / 1e9:.1f} GB in memory, "
            f"expected at most {MEMORY / 1e9:g}: give an image_size of {side} or less, or fewer images"
        )


# Which picture belongs where


def _classes(folder: Path, labelled: bool) -> dict[str, list[Path]]:
    folders, pictures = _inside(folder)
    loose = {"": pictures} if pictures and not labelled else {}
    if not folders and not loose and not labelled:
        raise InputError(f"{folder}: no pictures in it (*{', *'.join(_SUFFIXES)}): add some or name another folder")
    if not folders and not loose:
        found = f"{len(pictures)} pictures but no folders" if pictures else "no folders and no pictures"
        raise InputError(f"{folder}: {found}, expected a folder for each class: move the pictures to {folder}/CLASS/")
    found_here = loose | {entry.name: _pictures(entry) for entry in folders}
    empty = [name for name, paths in found_here.items() if not paths]
    if empty:
        raise InputError(f"{folder / empty[0]}: no pictures (*{', *'.join(_SUFFIXES)}): add some or remove the folder")
    return found_here


def _pictures(folder: Path) -> list[Path]:
    folders, pictures = _inside(folder)
    return pictures + [path for entry in folders for path in _pictures(entry)]


def _inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and pictures directly in a folder, sorted by name; hidden ones and other files are passed over."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(_HIDDEN))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}): correct its permissions") from error
    folders = [entry for entry in entries if entry.is_dir()]
    return folders, [entry for entry in entries if entry.suffix.lower() in _SUFFIXES and entry.is_file()]


def _choose(parts: dict[str, dict[str, list[Path]]], root: Path, split: Split) -> dict[str, list[Path]]:
    if split == "all":
        return {
            label: [path for part in parts.values() for path in part.get(label, [])]
            for label in set().union(*parts.values())
        }
    if "flat" in parts:
        kept, held = _hold_out(parts["flat"], _TEST_SHARE, "test")
        parts = {"train": kept, "test": held}
    if "val" not in parts and split != "test" and "train" in parts:
        kept, held = _hold_out(parts["train"], _VAL_SHARE, "val")
        parts = {**parts, "train": kept, "val": held}
    if split not in parts:
        raise InputError(
            f"{root / split}: no such folder of class folders beside {', '.join(parts)}: "
            f"add it, or use another split ({', '.join(parts)}, all)"
        )
    return parts[split]


def _hold_out(
    pictures: dict[str, list[Path]], share: float, purpose: str
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Divide every class by the hash of its pictures' names: (kept, held out). One at least is kept, then one held."""
    kept, held = {}, {}
    for label, paths in pictures.items():

        def rank(path: Path) -> tuple[int, Path]:
            # the name as bytes: file names need not be valid text
            return int(noise.key(purpose, zlib.crc32(os.fsencode(path.name)))), path

        count = min(max(1, round(len(paths) * share)), len(paths) - 1)
        chosen = set(sorted(paths, key=rank)[:count])
        held[label] = [path for path in paths if path in chosen]
        kept[label] = [path for path in paths if path not in chosen]
    return kept, held


# Pixels


def _one_size(paths: list[Path], sizes: list[tuple[int, int]], image_size: int | None, remedy: str) -> tuple[int, int]:
    """Width and height that all pictures will have."""
    if image_size is not None:
        return image_size, image_size
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            first, other = ("x".join(map(str, found)) for found in (sizes[0], size))
            raise InputError(
                f"{paths[0]} is {first}, but {path} is {other} (width x height), expected one size: {remedy}"
            )
    return sizes[0]


def _decode(
    paths: list[Path], size: tuple[int, int], channels: int, image_size: int | None
) -> UInt8[Tensor, "size channels height width"]:
    pixels = np.empty((len(paths), channels, *size[::-1]), np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        row[:] = np.atleast_3d(_picture(path, "L" if channels == 1 else "RGB", image_size)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _head(path: Path) -> tuple[tuple[int, int], bool]:
    """Width and height as shown, and whether the picture is grayscale; without decoding it."""
    from PIL import Image

    with _reading(path), Image.open(path) as image:
        # Pillow opens 16-bit PNG and PGM as "I" too; elsewhere "I" is numbers of which no scale is known
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            kind = "32-bit float" if image.mode == "F" else "signed or 32-bit integer"
            raise ValueError(f"{kind} pixels; save it with 8 bits, or 16 unsigned")
        turned = image.format in ("JPEG", "MPO") and image.getexif().get(_ORIENTATION, 1) >= 5
        gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        return image.size[::-1] if turned else image.size, gray


def _picture(path: Path, mode: str, image_size: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image, ImageOps

    with _reading(path), Image.open(path) as opened:
        image: Image.Image = opened
        if image_size is not None:
            opened.draft(opened.mode, (2 * image_size, 2 * image_size))  # a JPEG is decoded no larger than needed
        if opened.format in ("JPEG", "MPO"):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16 bits; Pillow would clip them at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert(mode)
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(image)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:  # it names the file itself
        raise
    except Exception as error:  # decoders raise anything on a broken file
        found = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{path}: cannot be read as a picture ({found}): replace or remove the file") from error
