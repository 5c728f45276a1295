"""The files of videos with masks: DAVIS' folders and lists, frames and annotations.

Whatever is wrong raises an `InputError` with the file, or with the list and its line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from foveate.data.picture_folders import by_number
from foveate.types import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def resolution_in(folder: Path) -> Path:
    """The folder of one resolution: 480p, or else the only one."""
    if (folder / "480p").is_dir():
        return folder / "480p"
    found = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(f"{folder / '480p'}: not found, expected a folder for each sequence: correct --root")
    return found[0]


def listed(root: Path, part: str, images: Path) -> list[str]:
    """The sequences of a list, each of which is there."""
    places = [root / "ImageSets" / year / f"{part}.txt" for year in ("2016", "2017")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"{places[0]}: not found, expected the name of a sequence a line: add it or correct --root")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not (name := line.strip()):
            continue
        if not (images / name).is_dir():
            raise InputError(
                f"{path}, line {number}: no sequence {name!r} in {images}: add its folder or drop the line"
            )
        if name in found:
            raise InputError(f"{path}, line {number}: {name!r} is listed twice: drop one of the lines")
        found.append(name)
    if not found:
        raise InputError(f"{path}: holds no names, expected the name of a sequence a line: add some")
    return found


def frames_in(folder: Path) -> list[Path]:
    """The frames of a sequence in their order, of which there must be some."""
    found = pictures_in(folder)
    if not found:
        raise InputError(f"{folder}: holds no frames (*{', *'.join(SUFFIXES)}): add some or drop it from the list")
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by their names, and these by the numbers in them."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return sorted(found, key=by_number)


def read_sequence(frames: list[Path], marks: Path, pixels: Array, masks: Array) -> None:
    """Decode a sequence into the first rows of these arrays."""
    from PIL import Image

    (height, width), kept = pixels.shape[1:3], None
    for row, path in enumerate(frames):
        mark = marks / f"{path.stem}.png"
        if not mark.is_file():
            raise InputError(f"{mark}: not found, expected the annotation of {path.name}: add it or drop the sequence")
        shown = opened(path, colors_of)
        kept = shown if kept is None else kept
        mask = alike(opened(mark, marks_of), mark, alike(shown, path, kept, frames[0]), path)
        if row == 0:
            check_foreground(mask, mark)
        pixels[row] = np.asarray(Image.fromarray(shown).resize((width, height), Image.Resampling.BILINEAR))
        share = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
        masks[row] = np.asarray(share) >= 128
        if row == 0 and not masks[0].any():
            raise InputError(f"{mark}: its foreground is lost at {width}x{height} pixels: raise --image-size")


def alike(found: Array, path: Path, other: Array, beside: Path) -> Array:
    """An array, if it has the height and width of another, else an error that names both files."""
    if found.shape[:2] != other.shape[:2]:
        one, two = (f"{shape[1]}x{shape[0]}" for shape in (found.shape, other.shape))
        raise InputError(
            f"{path}: is {one}, but {beside.name} is {two} (width x height), expected one size: replace it"
        )
    return found


def check_foreground(mask: Array, path: Path) -> None:
    """Stop at a first mask with nothing in it."""
    if not mask.any():
        raise InputError(f"{path}: found no foreground, expected the object in the first frame: mark it")


def colors_of(image: Any) -> Array:
    """Red, green, blue, uint8 [height, width, 3]."""
    return np.asarray(image.convert("RGB"))


def marks_of(image: Any) -> Array:
    """Where a mask is not black, whether its values are gray, of a palette, or colours."""
    values = np.asarray(image if image.mode in ("1", "L", "P") else image.convert("RGB"))
    return np.asarray(values.reshape(*values.shape[:2], -1).astype(bool).any(2))


def opened(path: Path, get: Any) -> Array:
    """What `get` makes of a picture file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return get(image)
    except Exception as error:  # decoders raise anything on a broken file
        found = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{path}: cannot be read as a picture ({found}): replace the file") from error
