"""Pictures with the mask of the one object that is meant: rendered scenes, MSRA10K's layout, and that of GrabCut.

Splits are fixed: they depend on the names alone. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.picture_folders import Split, check_memory
from foveate.data.scenes import describe, draw
from foveate.data.segmentation import VOID, load_segmented
from foveate.types import InputError

DATASETS = {
    "scenes": "rendered scenes; what is meant is the object of which most is seen",
    "pairs": "pictures and masks of 0 and 255: MSRA10K's Imgs/NAME.jpg and NAME.png, or images/ and masks/",
    "grabcut": "images/, masks/ (and bboxes/, which are not needed): a test set, all of it",
}
GRAIN = 0.06  # standard deviation laid over scenes, whose brightness is 0 to 1
FINER = 2  # pictures are read so many times larger than asked, then averaged


@dataclass(frozen=True)
class Salient:
    """Pictures of one size, in memory, and in each the object that is meant.

    Attributes:
        pixels: RGB, 0 to 255.
        masks: true at the object.
        names: of the items.
        left_out: how many unusable items were left out.
    """

    pixels: UInt8[Tensor, "size 3 side side"]
    masks: Bool[Tensor, "size side side"]
    names: tuple[str, ...]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def images(self) -> Float[Tensor, "size 3 side side"]:
        """In [0, 1]."""
        return self.pixels.float() / 255


def load_salient(
    name: str, root: Path | None, split: Split, image_size: int = 48, skip_bad: bool = False, scenes: int = 200
) -> Salient:
    """Read one split of a data set into memory, stretched to squares.

    Args:
        name: one of `DATASETS`.
        root: the folder in which the data lie; not used for scenes.
        split: of scenes, other scenes each; of pairs a quarter is test and a fifth val, by the hash of the names; of
            grabcut all is test.
        image_size: side in pixels.
        skip_bad: leave unusable items out and count them.
        scenes: how many are rendered for train; val and test have a quarter of them each, 20 to 100.

    Raises:
        InputError: unknown name; a folder that is missing or has another layout; a picture without mask or the reverse,
            masks of another size, with other values than 0 and 255, empty, or all object (unless `skip_bad`); a split
            other than test of grabcut; nothing left.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")
    if image_size < 8:
        raise InputError(f"image_size: found {image_size}, expected at least 8 pixels")
    if name == "scenes":
        if scenes < 3:
            raise InputError(f"scenes: found {scenes}, expected at least 3")
        return _scenes(split, scenes if split == "train" else min(100, max(20, scenes // 4)), image_size)
    if name == "grabcut" and split in ("train", "val"):
        raise InputError("data: grabcut is a test set; train on pairs or scenes, then: foveate eval RUN --data grabcut")
    try:
        found = load_segmented("pairs", root, "all" if name == "grabcut" else split, FINER * image_size, None, skip_bad)
    except InputError as error:  # there are no classes here
        text = str(error).replace(", or name the classes of the values 1, 2, ... by --classes", "")
        raise InputError(text.replace("data 'pairs'", f"data {name!r}")) from error
    check_memory(str(root), (len(found), 4, image_size, image_size))
    pixels, masks, names = [], [], []
    for picture, labels, called in zip(found.pixels, found.labels, found.names, strict=True):
        there = labels != VOID  # the rest was filled up to a square
        rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
        window = ..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        mask = _stretched((labels == 1)[window][None].float(), image_size)[0] >= 0.5
        if not mask.any() or mask.all():
            if skip_bad:
                continue
            what = "is object everywhere" if mask.all() else f"has no object of a pixel's size at {image_size} pixels"
            raise InputError(
                f"{root}: the mask of {called} {what}, expected an object and a background: replace it, or leave it "
                "out with --skip-bad"
            )
        pixels.append((_stretched(picture[window].float(), image_size)).round().clamp(0, 255).byte())
        masks.append(mask)
        names.append(called)
    if not names:
        raise InputError(f"{root}: none of its masks has an object and a background: replace them")
    out = found.left_out + len(found) - len(names)
    return Salient(torch.stack(pixels), torch.stack(masks), tuple(names), out)


def _stretched(image: Tensor, side: int) -> Tensor:
    return F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0]


def _scenes(split: Split, size: int, side: int) -> Salient:
    if split == "all":
        split = "test"
    keys = noise.key("salient", split, torch.arange(size))
    shown, masks = [], []
    for rows in keys.split(100):
        found = draw(describe(rows), side)
        seen = found.masks
        largest = seen.sum((2, 3)).argmax(1)
        masks.append(seen[torch.arange(len(rows)), largest])
        grain = GRAIN * noise.normal(noise.fold(rows, "salient grain"), 3, side, side)
        shown.append(((found.images + grain).clamp(0, 1) * 255).round().byte())
    return Salient(torch.cat(shown), torch.cat(masks), tuple(f"{split} {row}" for row in range(size)))
