"""Videos with a mask of one object in every frame: rendered scenes that move, and DAVIS' layout.

Splits are fixed: they depend on the data alone. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.davis import (
    SUFFIXES,
    alike,
    check_foreground,
    colors_of,
    frames_in,
    listed,
    marks_of,
    opened,
    pictures_in,
    read_sequence,
    resolution_in,
)
from foveate.data.picture_folders import Split, check_memory, check_side
from foveate.data.scenes import Scenes, at, describe, draw
from foveate.types import InputError, map_tree

DATASETS: dict[str, str] = {
    "scenes": "rendered scenes; the object in front moves, turns, grows and shrinks",
    "davis": "JPEGImages/480p/SEQ, Annotations/480p/SEQ and ImageSets/2016 (DAVIS' layout)",
}
SCENES = {"train": 1.0, "val": 0.2, "test": 0.4}  # videos, in parts of those asked for
VAL_SHARE = 0.2  # of the sequences of train.txt


@dataclass(frozen=True)
class Videos:
    """Videos of one size, in memory, all frames one after the other.

    Attributes:
        pixels: RGB, 0 to 255.
        masks: where the object is seen.
        first: place of the first frame of each video.
        lengths: frames of each.
        names: of the videos.
    """

    pixels: UInt8[Tensor, "frames 3 height width"]
    masks: Bool[Tensor, "frames height width"]
    first: Int[Tensor, " videos"]
    lengths: Int[Tensor, " videos"]
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> Videos:
        """The same on another device."""
        return map_tree(lambda leaf: leaf.to(device), self)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        height, width = self.masks.shape[1:]
        return height, width

    @property
    def video(self) -> Int[Tensor, " frames"]:
        """Which video each frame belongs to."""
        return torch.arange(len(self), device=self.first.device).repeat_interleave(self.lengths)

    def frames(self, time: int) -> Int[Tensor, " videos"]:
        """The frames of all videos at a time, the last one of those that are over."""
        return self.first + torch.minimum(torch.full_like(self.lengths, time), self.lengths - 1)


def load_videos(
    name: str, root: Path | None, split: Split, image_size: int | None = None, videos: int = 60, length: int = 16
) -> Videos:
    """Read one split of a data set into memory.

    - scenes: `videos` square ones to train on, a fifth as many for val and two fifths for test. `root` is not used.
    - davis: test is `ImageSets/2016/val.txt` (or that of 2017), val a fifth of the sequences of `train.txt`, by the
      hash of their names. All objects of a frame are one. Frames get `image_size` rows, and the columns that the
      first sequence then has.

    Args:
        name: of `DATASETS`.
        root: folder of the data.
        split: "all" is every video found.
        image_size: height in pixels; None: 64 for scenes, 120 for davis.
        videos: scenes rendered to train on.
        length: frames of a scene.

    Raises:
        InputError: unknown name; a folder or list that is missing, or an empty list; a sequence that is listed and not
            there; one without frames, with frames of several sizes, with an annotation that is missing or of another
            size, or without foreground in its first frame; a file that cannot be read; more than
            `picture_folders.MEMORY`. The message names the file, and the line of the list.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name.lower(), DATASETS, 1, cutoff=0.0)[0]
        raise InputError(f"data: no {name!r}, expected one of {', '.join(DATASETS)}: did you mean {nearest!r}?")
    check_side(image_size)
    if name == "scenes":
        for field, number in ("scenes", videos), ("length", length):
            if number < 2:
                raise InputError(f"{field}: found {number}, expected at least 2")
        return _scenes(split, image_size or 64, videos, length)
    if root is None:
        raise InputError(f"root: not given, but data {name!r} is read from a folder: add --root FOLDER")
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root}: {found}, expected the folder of data {name!r}: correct --root")
    return _davis(root, split, image_size or 120)


def read_video(path: Path) -> dict[str, Tensor]:
    """A video, `frames` [time, 3, height, width] in [0, 1], and its object in the first, `mask` [1, height, width].

    The folder holds the frames and `mask.png`, or is one of DAVIS' (`JPEGImages/480p/SEQ`, beside `Annotations`).

    Raises:
        InputError: as `load_videos`, for this one video; no mask.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path}: {found}, expected a folder of frames with mask.png: correct the path")
    frames = [each for each in pictures_in(path) if each.stem != "mask"]
    if not frames:
        raise InputError(f"{path}: holds no frames (*{', *'.join(SUFFIXES)}): add some, or name another folder")
    masks = [each for each in pictures_in(path) if each.stem == "mask"]
    if not masks:
        beside = path.parent.parent.parent / "Annotations" / path.parent.name / path.name / f"{frames[0].stem}.png"
        if not beside.is_file():
            raise InputError(f"{path / 'mask.png'}: not found, expected the mask of {frames[0].name}: add it")
        masks = [beside]
    shown = opened(frames[0], colors_of)
    check_memory(str(path), (len(frames), 3, *shown.shape[:2]), 4)
    pixels = np.stack([alike(opened(each, colors_of), each, shown, frames[0]) for each in frames])
    mask = alike(opened(masks[0], marks_of), masks[0], shown, frames[0])
    check_foreground(mask, masks[0])
    return {
        "frames": torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        "mask": torch.from_numpy(mask)[None],
    }


def as_video(
    frames: Float[Tensor, "time channels height width"], mask: Bool[Tensor, "1 rows columns"], image_size: int
) -> Videos:
    """One video of the user at `image_size` rows, with the first frame's mask in all frames, and the last frame twice.

    Raises:
        InputError: no frames, another shape, colours beyond [0, 1]; a mask of another size or without foreground, or
            one of which nothing is left at that size.
    """
    if frames.shape[1] != 3 or not len(frames):
        raise InputError(f"frames: found {list(frames.shape)}, expected [time, 3, height, width] with a frame or more")
    low, high = float(frames.min()), float(frames.max())
    if not (low >= 0 and high <= 1):  # also NaN
        raise InputError(f"frames: found values from {low:g} to {high:g}, expected 0 to 1: divide by 255")
    if mask.shape != (1, *frames.shape[2:]):
        raise InputError(f"mask: found {list(mask.shape)}, expected {[1, *frames.shape[2:]]}, the size of a frame")
    if not bool(mask.any()):
        raise InputError("mask: found no foreground, expected the object's pixels in the first frame: mark it")
    size = image_size, max(1, round(frames.shape[3] * image_size / frames.shape[2]))
    small = F.interpolate(torch.cat((frames, frames[-1:])), size, mode="bilinear", antialias=True)
    start = F.interpolate(mask[None].float(), size, mode="area")[0] >= 0.5
    if not bool(start.any()):
        raise InputError(
            f"mask: nothing of it is left at {size[1]}x{size[0]} pixels: mark more, or train at a larger size"
        )
    pixels, count = (small.clamp(0, 1) * 255).round().byte(), torch.tensor([len(small)], device=frames.device)
    return Videos(pixels, start.expand(len(small), -1, -1), torch.zeros_like(count), count, ("video",))


def views(videos: Videos) -> Videos:
    """The videos, then the same backwards (but for those that end without the object), then all of these mirrored."""
    ends = videos.first + videos.lengths - 1
    back = [
        torch.arange(int(end), int(first) - 1, -1)
        for first, end in zip(videos.first, ends, strict=True)
        if videos.masks[end].any()
    ]
    order = torch.cat([torch.arange(len(videos.masks)), *back]).to(videos.masks.device)
    lengths = torch.cat((videos.lengths, torch.tensor([len(each) for each in back]).to(videos.lengths))).repeat(2)
    pixels, masks = videos.pixels[order], videos.masks[order]
    return Videos(
        torch.cat((pixels, pixels.flip(3))),
        torch.cat((masks, masks.flip(2))),
        lengths.cumsum(0) - lengths,
        lengths,
        tuple(f"view {row}" for row in range(len(lengths))),
    )


# Rendered


def _scenes(split: Split, side: int, videos: int, length: int) -> Videos:
    if split == "all":
        return _joined([_scenes(part, side, videos, length) for part in ("train", "val", "test")])
    count = max(2, round(videos * SCENES[split]))
    scenes = describe(noise.key("videos", split, torch.arange(count)), 2, 4)
    check_memory("scenes", (count * length, 3, side, side))
    shown = [draw(_later(scenes, time), side) for time in range(length)]
    pixels = torch.stack([(each.images * 255).round().byte() for each in shown], 1)
    front = scenes.mask.sum(1)  # the last object stands in front of all others, so that it stays visible
    masks = torch.stack([each.ids == front[:, None, None] for each in shown], 1)
    names = tuple(f"{split} {row}" for row in range(count))
    first, lengths = torch.arange(count) * length, torch.full((count,), length)
    return Videos(pixels.flatten(0, 1), masks.flatten(0, 1), first, lengths, names)


def _later(scenes: Scenes, time: int) -> Scenes:
    """The scenes some frames later: objects move and turn, and grow and shrink by a third."""
    swing = torch.sin(0.35 * time + 2 * math.pi * noise.uniform(noise.fold(scenes.keys, "swing"), 1))
    large = scenes.radii.clamp(min=0.1) * (1 + 0.33 * swing)
    return replace(at(replace(scenes, radii=large), float(time)), angles=scenes.angles + 0.1 * time)


def _joined(parts: list[Videos]) -> Videos:
    before = torch.tensor([0, *(len(part.pixels) for part in parts[:-1])]).cumsum(0)
    return Videos(
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.masks for part in parts]),
        torch.cat([part.first + start for part, start in zip(parts, before, strict=True)]),
        torch.cat([part.lengths for part in parts]),
        tuple(name for part in parts for name in part.names),
    )


# DAVIS


def _davis(root: Path, split: Split, rows: int) -> Videos:
    images = resolution_in(root / "JPEGImages")
    marks = root / "Annotations" / images.name
    names = {part: listed(root, part, images) for part in ("train", "val")}
    held = set(_held_out(names["train"]))
    chosen = {
        "train": [name for name in names["train"] if name not in held],
        "val": [name for name in names["train"] if name in held],
        "test": names["val"],
        "all": names["train"] + [name for name in names["val"] if name not in names["train"]],
    }[split]
    if not chosen:
        raise InputError(f"{root}: no sequence is left for split {split!r}: list more in ImageSets, two are enough")
    # the size is that of the first sequence of all, so that splits agree
    height, width = opened(frames_in(images / names["train"][0])[0], colors_of).shape[:2]
    size = rows, max(1, round(width * rows / height))
    paths = [frames_in(images / name) for name in chosen]
    total = sum(map(len, paths))
    check_memory(str(root), (total, 3, *size))
    pixels, masks = np.empty((total, *size, 3), np.uint8), np.empty((total, *size), bool)
    place, lengths = 0, []
    for name, frames in zip(chosen, paths, strict=True):
        read_sequence(frames, marks / name, pixels[place:], masks[place:])
        place += len(frames)
        lengths.append(len(frames))
    counts = torch.tensor(lengths)
    first = counts.cumsum(0) - counts
    return Videos(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(masks), first, counts, tuple(chosen))


def _held_out(names: list[str]) -> list[str]:
    ranked = sorted(names, key=lambda name: (int(noise.key("val", zlib.crc32(name.encode()))), name))
    return ranked[: min(max(1, round(len(names) * VAL_SHARE)), len(names) - 1)]
