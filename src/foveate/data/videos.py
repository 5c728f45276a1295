"""Videos with boxes and identities: rendered scenes that move, and MOTChallenge folders, in memory at a reduced size.

Frames of all sizes lie in one tensor, one after another, each also halved several times: a crop is read from the level
at which a pixel of the crop is about one of the frame, so that large objects are seen no noisier than small ones.

Splits are fixed: they depend on the data alone, never on the seed of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.classification import check_rgb
from foveate.data.mot import Clip, mot_clips
from foveate.data.scenes import at, describe, draw
from foveate.geometry import Boxes, check_boxes, joined
from foveate.types import InputError, concatenate, map_tree

Part = Literal["train", "val", "test"]
DATASETS: dict[str, str] = {
    "scenes": "rendered scenes of objects that move, with detections made from the truth, nothing to download",
    "mot": "ROOT/train/SEQUENCE/{img1, gt/gt.txt, det/det.txt, seqinfo.ini} (or ROOT/SEQUENCE/...)",
}
LEVELS = 4
SIZES = {"scenes": 64, "mot": 384}  # longer side in pixels if nothing is said
LENGTH, RATE = 24, 8.0  # frames of a rendered video, and how many are a second
SHARES = {"val": 0.15, "test": 0.25}  # of the number of rendered videos to train on
MISSED, BURST, FALSE, SHAKY = 0.2, 4, 0.3, 0.05  # of rendered detections: see `_detected`


@dataclass(frozen=True)
class Videos:
    """Frames of several sequences with their boxes: a tree whose tensors begin with the frames, but for the pixels.

    Attributes:
        pixels: RGB, 0 to 255, and a 0, of all frames and levels, row by row: four bytes are read as one number.
        offsets: where each level of a frame begins.
        sizes: (height, width) of each level; the first is the frame's, and boxes are in its pixels.
        sequences: number of the sequence of each frame; its frames stand next to each other.
        truth: boxes of a frame, `labels` their identities, which are those of one sequence; without boxes if unknown.
        detections: boxes that a detector found, with `scores`.
        names: of the sequences.
        rates: frames a second of each sequence.
    """

    pixels: UInt8[Tensor, "places 4"]
    offsets: Int[Tensor, "frames levels"]
    sizes: Int[Tensor, "frames levels 2"]
    sequences: Int[Tensor, " frames"]
    truth: Boxes
    detections: Boxes
    names: tuple[str, ...]
    rates: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def frame(self, number: int) -> UInt8[Tensor, "3 height width"]:
        """A frame as an image, 0 to 255."""
        height, width = self.sizes[number, 0].tolist()
        first = int(self.offsets[number, 0])
        return self.pixels[first : first + height * width, :3].reshape(height, width, 3).permute(2, 0, 1)


def crops(
    videos: Videos, frames: Int[Tensor, " batch"], boxes: Float[Tensor, "batch 4"], patch: int
) -> Float[Tensor, "batch 3 patch patch"]:
    """Regions of frames, each stretched to `patch` pixels, in [0, 1]. Beyond the frame its edge goes on.

    Only the pixels around each place are read, however large the frames are.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)
    level = (sides / patch).log2().mean(1).round().long().clamp(0, videos.offsets.shape[1] - 1)
    size, first = videos.sizes[frames, level], videos.offsets[frames, level]
    zoom = (size / videos.sizes[frames, 0]).flip(1)  # (x, y)
    share = (torch.arange(patch, device=boxes.device) + 0.5) / patch
    points = (boxes[:, None, :2] + share[:, None] * (boxes[:, 2:] - boxes[:, :2])[:, None]) * zoom[:, None] - 0.5
    limit = (size.flip(1) - 1)[:, None]
    points = torch.minimum(points.clamp(min=0), limit.float())
    low = points.long()
    high = torch.minimum(low + 1, limit)
    across, down = (points - low).unbind(2)
    packed = videos.pixels.view(torch.int32).squeeze(1)
    across = across.repeat_interleave(4, 1)[:, None]  # the colours of a row's pixels stand side by side
    rows = torch.cat((low[..., 1], high[..., 1]), 1)  # of both kinds
    start = (first[:, None] + rows * size[:, 1:])[:, :, None]
    left, right = (
        packed.index_select(0, (start + place[:, None]).flatten()).view(torch.uint8).view(-1, 2 * patch, 4 * patch)
        for place in (low[..., 0], high[..., 0])
    )
    above, below = left.float().lerp_(right.float(), across).chunk(2, 1)
    found = above.lerp_(below, down[:, :, None]).div_(255)
    return found.unflatten(2, (patch, 4))[..., :3].permute(0, 3, 1, 2)


def stacked(clips: Sequence[Clip]) -> Videos:
    """Sequences as one `Videos`."""
    pixels, offsets, sizes, begun = [], [], [], 0
    for clip in clips:
        level, count = clip.pixels, len(clip.pixels)
        first, size = [], []
        for number in range(LEVELS):
            if number:
                shape = [max(1, side // 2) for side in level.shape[2:]]
                level = torch.cat([_halved(some, shape) for some in level.split(32)])
            height, width = level.shape[2:]
            pixels.append(F.pad(level.permute(0, 2, 3, 1).reshape(-1, 3), (0, 1)))
            first.append(begun + torch.arange(count) * (height * width))
            size.append(torch.tensor([height, width]).expand(count, 2))
            begun += count * height * width
        offsets.append(torch.stack(first, 1))
        sizes.append(torch.stack(size, 1))
    numbers = torch.cat([torch.full((len(clip.pixels),), row) for row, clip in enumerate(clips)])
    truth = joined([Boxes(clip.truth.boxes, clip.truth.labels, clip.truth.mask) for clip in clips])
    found = joined([clip.detections for clip in clips])
    names, rates = tuple(clip.name for clip in clips), tuple(clip.rate for clip in clips)
    return Videos(torch.cat(pixels), torch.cat(offsets), torch.cat(sizes), numbers, truth, found, names, rates)


def _halved(frames: Tensor, shape: list[int]) -> Tensor:
    return F.interpolate(frames.float(), shape, mode="area").round().byte()


def with_mirrored(clips: Sequence[Clip]) -> list[Clip]:
    """The sequences, and each with left and right exchanged."""
    found = list(clips)
    for clip in clips:
        width = clip.pixels.shape[-1]
        sets = {name: getattr(clip, name) for name in ("truth", "detections")}
        for name, boxes in sets.items():
            left, top, right, bottom = boxes.boxes.unbind(-1)
            sets[name] = replace(boxes, boxes=torch.stack((width - right, top, width - left, bottom), -1))
        found.append(replace(clip, pixels=clip.pixels.flip(-1), name=f"{clip.name} mirrored", **sets))
    return found


@lru_cache(maxsize=6)
def load_videos(
    name: str,
    root: Path | None = None,
    split: Part = "train",
    image_size: int | None = None,
    scenes: int = 60,
    test: tuple[str, ...] | None = None,
    mirrored: bool = False,
) -> Videos:
    """Read one split of a data set into memory.

    Args:
        name: one of `DATASETS`.
        root: the folder of the data; not needed for scenes.
        split: of MOTChallenge folders, "test" are the sequences of these names, "val" is the last part of each of the
            others, "train" what comes before it. One sequence alone is divided in three.
        image_size: longer side in pixels to which larger frames are shrunk; None: `SIZES`.
        scenes: how many videos of `LENGTH` frames are rendered to train on, beside those in folders too.
        test: names of the sequences to test on; None: the last by name.
        mirrored: add every sequence with left and right exchanged.

    Raises:
        InputError: unknown name; missing or damaged files (`foveate.data.mot`); no object in two frames running.
    """
    if name not in DATASETS:
        raise InputError(f"data: found {name!r}, expected one of {', '.join(DATASETS)}")
    size = SIZES[name] if image_size is None else image_size
    if size < 16:
        raise InputError(f"image_size: found {size}, expected at least 16 pixels")
    if scenes < (name == "scenes"):
        raise InputError(f"scenes: found {scenes}, expected at least {int(name == 'scenes')}")
    if name == "scenes":
        clips = _scenes(split, scenes if split == "train" else max(2, round(SHARES[split] * scenes)), size)
    elif root is None:
        raise InputError(f"root: not given; data {name!r} needs the folder in which it lies: --root FOLDER")
    else:
        clips = mot_clips(root, split, size, test)
        if split == "train":
            clips += _scenes(split, scenes, SIZES["scenes"])
    return stacked(with_mirrored(clips) if mirrored else clips)


def _scenes(split: str, count: int, side: int) -> list[Clip]:
    keys = noise.key("videos", split, torch.arange(count))
    return [_rendered(key, split, number, side) for number, key in enumerate(keys)]


def _rendered(key: Tensor, split: str, number: int, side: int) -> Clip:
    scene = describe(key[None], 3, 6)
    moving = concatenate([at(scene, float(frame)) for frame in range(LENGTH)], 0)
    drawn = draw(moving, side)
    truth = replace(drawn.boxes, labels=torch.arange(drawn.boxes.mask.shape[1]).expand(LENGTH, -1))
    pixels = (drawn.images * 255).round().byte()
    return Clip(f"{split}-{number}", pixels, truth, _detected(truth, noise.fold(key, "detector"), side), RATE)


def _detected(truth: Boxes, key: Tensor, side: int) -> Boxes:
    """What a poor detector would find: corners off by `SHAKY` of the sides, objects missed for `BURST` frames with
    probability `MISSED`, and a box where nothing is in `FALSE` of the frames."""
    frames, count = truth.mask.shape
    keys = noise.fold(key, torch.arange(frames))
    sides = (truth.boxes[..., 2:] - truth.boxes[..., :2]).repeat(1, 1, 2)
    boxes = truth.boxes + SHAKY * sides * noise.normal(noise.fold(keys, "shake"), count, 4)
    runs = noise.fold(key, "missed", torch.arange(frames) // BURST)
    there = truth.mask & (noise.uniform(runs, count) >= MISSED)
    draws = noise.uniform(noise.fold(keys, "false"), 6)
    low = draws[:, :2] * 0.8 * side
    wrong = torch.cat((low, low + (0.1 + 0.2 * draws[:, 2:4]) * side), 1)
    scores = torch.cat((0.6 + 0.4 * noise.uniform(noise.fold(keys, "score"), count), 0.3 + 0.5 * draws[:, 4:5]), 1)
    mask = torch.cat((there, draws[:, 5:] < FALSE), 1)
    boxes = torch.cat((boxes, wrong[:, None]), 1).clamp(0, side) * mask[..., None]
    return Boxes(boxes, torch.zeros_like(mask, dtype=torch.int64), mask, scores * mask)


def pairs(videos: Videos, gaps: int = 1) -> Int[Tensor, "pairs 4"]:
    """Objects that are in two frames of a sequence, up to `gaps` apart: (frame, place, later frame, place there).

    Raises:
        InputError: there is none.
    """
    truth, found = videos.truth, []
    for gap in range(1, gaps + 1):
        if gap >= len(videos):
            break
        same = truth.labels[:-gap, :, None] == truth.labels[gap:, None, :]
        both = truth.mask[:-gap, :, None] & truth.mask[gap:, None, :]
        kept = same & both & (videos.sequences[:-gap] == videos.sequences[gap:])[:, None, None]
        frame, here, there = kept.nonzero().unbind(1)
        found.append(torch.stack((frame, here, frame + gap, there), 1))
    together = torch.cat(found) if found else torch.zeros(0, 4, dtype=torch.int64)
    if not len(together):
        raise InputError(f"{', '.join(videos.names)}: no object is in two frames running; give longer videos")
    return together


def given(images: dict[str, Any], image_size: int) -> tuple[Videos, float]:
    """A user's video with what a detector found as `Videos` without truth, and by how much it was shrunk.

    Args:
        images: "frames" [time, 3, height, width] in [0, 1], "boxes" [time, count, 4] in their pixels, "scores" [time,
            count], of any scale, and "mask" [time, count], true where there is a box (where the score is not 0);
            "rate", frames a second (25).
        image_size: longer side in pixels at most.

    Raises:
        InputError: something is missing, or breaks the convention; no frames.
    """
    for name in ("frames", "boxes", "scores"):
        if not isinstance(images, dict) or name not in images:
            raise InputError(f"images: found no {name!r}, expected frames, and boxes and scores of a detector in each")
    frames, boxes, scores = (images[name].detach().cpu() for name in ("frames", "boxes", "scores"))
    if not len(frames):
        raise InputError("frames: found none, expected at least one; give [time, 3, height, width]")
    check_rgb(frames, "frames")
    if boxes.shape != (len(frames), scores.shape[-1], 4) or scores.shape != boxes.shape[:2]:
        raise InputError(
            f"boxes, scores: found {tuple(boxes.shape)} and {tuple(scores.shape)}, expected ({len(frames)}, count, 4) "
            f"and ({len(frames)}, count): pad each frame to the same count"
        )
    mask = images["mask"].detach().cpu().bool() if "mask" in images else scores != 0
    if mask.shape != scores.shape:
        raise InputError(f"mask: found {tuple(mask.shape)}, expected {tuple(scores.shape)}, true where there is a box")
    found = Boxes(boxes.float(), torch.zeros_like(scores, dtype=torch.int64), mask, scores.float())
    check_boxes(found, "boxes")
    zoom = min(1.0, image_size / max(frames.shape[2:]))
    if zoom < 1:
        shape = [max(1, round(side * zoom)) for side in frames.shape[2:]]
        frames, found = (
            F.interpolate(frames, shape, mode="bilinear", antialias=True),
            replace(found, boxes=found.boxes * zoom),
        )
    pixels, nothing = (frames * 255).round().byte(), torch.zeros(len(frames), 0, dtype=torch.int64)
    truth = Boxes(torch.zeros(len(frames), 0, 4), nothing, nothing.bool())
    return stacked([Clip("video", pixels, truth, found, float(images.get("rate", 25.0)))]), zoom


def opening(videos: Videos, boxes: Boxes, count: int) -> tuple[Float[Tensor, "time 3 height width"], Boxes]:
    """The first frames of the first sequence in [0, 1], at most `count`, and boxes in them."""
    count = min(count, int((videos.sequences == videos.sequences[0]).sum()))
    frames = torch.stack([videos.frame(number) for number in range(count)]).float() / 255
    return frames, Boxes(boxes.boxes[:count], boxes.labels[:count], boxes.mask[:count])


def on(videos: Videos, device: torch.device | Any) -> Videos:
    """The videos on a device."""
    return map_tree(lambda leaf: leaf.to(device), videos)
