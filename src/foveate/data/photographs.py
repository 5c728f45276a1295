"""Colour photographs of one size, for colouring: crops of scikit-image's, CIFAR-10's, or a folder of the user's.

Nothing is downloaded: six photographs ship inside scikit-image.
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from foveate import noise
from foveate.data import classification
from foveate.data.picture_folders import Split, check_memory, check_side, read_folder, read_pictures
from foveate.types import InputError

DATASETS: dict[str, str] = {
    "photographs": "crops of six photographs that ship inside scikit-image: train of four, val and test of one each",
    "cifar10": "CIFAR-10 as pictures: ROOT/train|test/CLASS/*.jpg",
    "folder": "your colour pictures: ROOT/*.png or ROOT/train|val|test/*.png, in folders of their classes or without",
}

# no photograph is in two parts, so that what is held out was never seen, not even beside the crop
_PARTS = {
    "train": ("astronaut.png", "coffee.png", "motorcycle_left.png", "hubble_deep_field.jpg"),
    "val": ("rocket.jpg",),
    "test": ("chelsea.png",),
}
_CROPS = {"train": 1000, "val": 250, "test": 250}  # of each photograph
_SHORTEST = 128  # pixels to which a photograph's short side is shrunk: a crop of 32 then shows a thing, not a texture
SIDE = 32  # of a crop, unless another is asked for


def load_photographs(
    name: str, root: Path | None, split: Split, image_size: int | None = None
) -> UInt8[Tensor, "size 3 height width"]:
    """Read one split into memory.

    Crops are squares at random places, the same for every seed of a run. The splits of folders are those of
    `classification.load_images`; classes are not used, and need not be.

    Args:
        name: one of `DATASETS`.
        root: the folder in which the data lie; not used for photographs.
        split: "all" is every picture.
        image_size: side in pixels; None: 32 for photographs, else that of the pictures.

    Raises:
        InputError: unknown name; scikit-image missing; what `load_images` raises; pictures without colour; crops larger
            than the photographs.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")
    if name == "photographs":
        return _crops(split, image_size or SIDE)
    check_side(image_size)
    pixels, *_ = read_folder(classification.folder_of("folder", root), split, image_size, labelled=False)
    if pixels.shape[1] != 3:
        raise InputError(f"{root}: all pictures are grayscale, expected colours to learn from: use colour pictures")
    return pixels


def evaluation_split(name: str, root: Path | None) -> Literal["test", "val", "all"]:
    """The split on which a policy is scored that was trained elsewhere (`classification.evaluation_split`)."""
    return "test" if name == "photographs" else classification.evaluation_split("folder", root, labelled=False)


def held_out_split(name: str, root: Path | None) -> Literal["test", "val"]:
    """The split on which a policy is scored that was trained here (`classification.held_out_split`)."""
    return "test" if name == "photographs" else classification.held_out_split("folder", root, labelled=False)


def _crops(split: Split, side: int) -> Tensor:
    if not 1 <= side <= _SHORTEST:
        raise InputError(f"image_size: {side}, but crops of the photographs have 1 to {_SHORTEST} pixels; use a folder")
    parts = ("train", "val", "test") if split == "all" else (split,)
    chosen = [(name, _CROPS[part]) for part in parts for name in _PARTS[part]]
    check_memory("data 'photographs'", (sum(count for _, count in chosen), 3, side, side))
    return torch.cat([_cut(name, count, side) for name, count in chosen])


def _cut(name: str, count: int, side: int) -> Tensor:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError(
            "data: 'photographs' ship inside the package scikit-image, which is not installed: "
            "pip install 'foveate[photographs]'"
        )
    path = Path(package.origin).parent / "data" / name
    if not path.is_file():
        raise InputError(f"{path}: not in this scikit-image: pip install --force-reinstall 'foveate[photographs]'")
    whole = read_pictures(path, 3, None)
    shrink = _SHORTEST / min(whole.shape[-2:])
    size = [round(shrink * length) for length in whole.shape[-2:]]
    small = torch.nn.functional.interpolate(whole, size, mode="bilinear", antialias=True)[0]
    pixels = (255 * small).round().clamp(0, 255).byte()
    windows = pixels.unfold(1, side, 1).unfold(2, side, 1)  # [3, rows, columns, side, side], no copy
    keys = noise.key("photographs", name, torch.arange(count))
    top, left = (noise.integers(noise.fold(keys, axis), windows.shape[1 + axis]) for axis in (0, 1))
    return windows[:, top, left].transpose(0, 1).contiguous()
