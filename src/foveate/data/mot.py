"""Sequences in MOTChallenge's folders: SEQUENCE/{img1/%06d.jpg, gt/gt.txt, det/det.txt, seqinfo.ini}.

A line of gt.txt or det.txt is `frame, identity, left, top, width, height, score, ...`, frames from 1. A true box whose
score is 0 is not to be counted and is left out; in the newer sets (nine columns, the eighth a class) so is what is no
pedestrian. Columns of world coordinates (ten in all) are not read. Numbers are taken as they stand.
"""

from __future__ import annotations

import configparser
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from foveate.data.picture_folders import MEMORY, by_number
from foveate.geometry import Boxes
from foveate.types import InputError

VAL_SHARE = 0.25  # last part of a sequence to train on
ALONE = (0.6, 0.8)  # where one sequence alone is cut into train, val and test
COLUMNS = "frame,identity,left,top,width,height,score"
CLASSED, PEDESTRIAN = 9, 1  # columns of MOT16 and later: ..., counts, class, visible


@dataclass(frozen=True)
class Clip:
    """A sequence.

    Attributes:
        name: of it.
        pixels: RGB, 0 to 255.
        truth: boxes in pixels; `labels` are identities.
        detections: boxes with `scores`.
        rate: frames a second.
    """

    name: str
    pixels: UInt8[Tensor, "time 3 height width"]
    truth: Boxes
    detections: Boxes
    rate: float


def mot_clips(root: Path, split: str, image_size: int, test: tuple[str, ...] | None = None) -> list[Clip]:
    """The sequences of one split, or their part in it (`foveate.data.videos.load_videos`).

    Raises:
        InputError: no sequences, or none of the names in `test`; damaged ones, as `read_sequence`.
    """
    folders = sequences_in(root)
    if len(folders) == 1:
        clip = read_sequence(folders[0], image_size)
        count = len(clip.pixels)
        first, second = (round(share * count) for share in ALONE)
        part = {"train": slice(0, first), "val": slice(first, second), "test": slice(second, count)}[split]
        return [_part(clip, part)]
    names = [folder.name for folder in folders]
    wanted = names[-1:] if test is None else test
    for name in wanted:
        if name not in names:
            raise InputError(f"test: {name!r} is no sequence in {root}; there are {', '.join(names)}")
    if set(wanted) == set(names):
        raise InputError(f"test: names all sequences in {root} ({', '.join(names)}); leave one to train on")
    if split == "test":
        return [read_sequence(folder, image_size) for folder in folders if folder.name in wanted]
    found = []
    for folder in folders:
        if folder.name not in wanted:
            clip = read_sequence(folder, image_size)
            cut = round((1 - VAL_SHARE) * len(clip.pixels))
            found.append(_part(clip, slice(cut, None) if split == "val" else slice(0, cut)))
    return found


def sequences_in(root: Path) -> list[Path]:
    """Folders of sequences at, in, or in `train` of a folder, sorted by name.

    Raises:
        InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"{root}: is no folder; correct the path")
    for place in (root, root / "train"):
        inside = [place] if place == root and (root / "img1").is_dir() else []
        inside += [folder for folder in sorted(place.glob("*")) if (folder / "img1").is_dir()]
        if inside:
            return inside
    raise InputError(f"{root}: no sequence in it or in {root / 'train'}; expected folders with img1 and seqinfo.ini")


def read_sequence(folder: Path, image_size: int, truth: bool = True) -> Clip:
    """Read a sequence; frames whose longer side is above `image_size` are shrunk, and boxes with them.

    Args:
        folder: of the sequence.
        image_size: longer side in pixels at most.
        truth: read gt/gt.txt too.

    Raises:
        InputError: seqinfo.ini missing, incomplete, or of another length or size than the frames; no frames; frames
            that cannot be read or change size; a line of gt.txt or det.txt with other separators, without a number, of
            a frame that does not exist, or of a box without width or height; an identity twice in a frame; more than
            `MEMORY`.
    """
    pictures = (path for path in (folder / "img1").glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = sorted(pictures, key=by_number)
    if not paths:
        raise InputError(f"{folder / 'img1'}: holds no frame; expected 000001.jpg, 000002.jpg, ...")
    rate, length, size = _seqinfo(folder / "seqinfo.ini")
    if length != len(paths):
        raise InputError(
            f"{folder / 'seqinfo.ini'}: seqLength is {length}, but {folder / 'img1'} holds {len(paths)} "
            "frames; correct it"
        )
    zoom = min(1.0, image_size / max(size))
    shrunk = max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom))
    if (needed := 4 * len(paths) * shrunk[0] * shrunk[1]) > MEMORY:
        raise InputError(
            f"{folder}: {len(paths)} frames of {shrunk[0]}x{shrunk[1]} take {needed / 1e9:.1f} GB, expected at most "
            f"{MEMORY / 1e9:g}; give a smaller image_size"
        )
    pixels = np.empty((len(paths), 3, shrunk[1], shrunk[0]), np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        row[:] = _frame(path, size, shrunk, folder)
    scale = torch.tensor([shrunk[0] / size[0], shrunk[1] / size[1]] * 2)
    nothing = _padded([], len(paths), scale)
    true = _padded(_lines(folder / "gt" / "gt.txt", len(paths), True), len(paths), scale) if truth else nothing
    found = _padded(_lines(folder / "det" / "det.txt", len(paths), False), len(paths), scale)
    return Clip(folder.name, torch.from_numpy(pixels), true, found, rate)


def read_boxes(path: Path, frames: int, truth: bool = False) -> Boxes:
    """Boxes of a file of MOTChallenge's kind (gt.txt, det.txt, a tracker's result) for frames 1 to `frames`.

    Args:
        path: the file.
        frames: how many there are.
        truth: as gt.txt: `labels` are identities, each once in a frame, and what does not count is left out.

    Raises:
        InputError: as `read_sequence` for lines.
    """
    return _padded(_lines(path, frames, truth), frames, torch.ones(4))


def _seqinfo(path: Path) -> tuple[float, int, tuple[int, int]]:
    """Frames a second, how many, and (width, height)."""
    if not path.is_file():
        raise InputError(f"{path}: not found; expected a [Sequence] with frameRate, seqLength, imWidth and imHeight")
    parser = configparser.ConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
        said = parser["Sequence"]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({what}); expected a [Sequence] with its fields") from error
    numbers = []
    for name in ("frameRate", "seqLength", "imWidth", "imHeight"):
        text = said.get(name, "nothing")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 < number < math.inf:
            raise InputError(f"{path}: {name} is {text}, expected a number above 0; correct it")
        numbers.append(number)
    return numbers[0], int(numbers[1]), (int(numbers[2]), int(numbers[3]))


def _frame(path: Path, size: tuple[int, int], shrunk: tuple[int, int], folder: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.size != size:
                found, said = ("x".join(map(str, each)) for each in (opened.size, size))
                raise InputError(
                    f"{path}: is {found}, but {folder / 'seqinfo.ini'} says {said}; a sequence has one size: "
                    "resize the frame, or correct the file"
                )
            image = opened.convert("RGB")
            if shrunk != size:
                image = image.resize(shrunk, Image.Resampling.BILINEAR, reducing_gap=2.0)
            return np.asarray(image).transpose(2, 0, 1)
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        what = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a picture ({what}): replace the file") from error


def _lines(path: Path, frames: int, truth: bool) -> list[tuple[int, int, float, float, float, float, float]]:
    """(frame from 0, identity, left, top, right, bottom, score) of each line."""
    if not path.is_file():
        raise InputError(f"{path}: not found; expected lines {COLUMNS}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); expected lines {COLUMNS}") from error
    found, seen = [], dict[tuple[int, int], int]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where, fields = f"{path}, line {number}", line.split(",")
        if len(fields) < 6:
            raise InputError(f"{where}: found {line.strip()[:40]!r}, expected {COLUMNS} with commas; convert the file")
        values = []
        for name, field in zip(COLUMNS.split(","), fields, strict=False):
            try:
                value = float(field)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise InputError(f"{where}: {name} is {field.strip()[:20]!r}, expected a number; correct the line")
            values.append(value)
        frame, identity, left, top, width, height = values[:6]
        score = values[6] if len(values) > 6 else 1.0
        if frame != int(frame) or not 1 <= frame <= frames:
            raise InputError(f"{where}: frame {frame:g}, expected 1 to {frames}, the frames in img1; remove the line")
        for name, side in ("width", width), ("height", height):
            if not side > 0:
                raise InputError(f"{where}: {name} is {side:g}, expected above 0 ({COLUMNS}); remove the line")
        if truth:
            if score == 0 or (len(fields) == CLASSED and _other_class(fields[7])):
                continue
            if (place := (int(frame), int(identity))) in seen:
                raise InputError(
                    f"{where}: identity {place[1]} is in frame {place[0]} already, on line {seen[place]}; remove one"
                )
            seen[place] = number
        found.append((int(frame) - 1, int(identity), left, top, left + width, top + height, score))
    return found


def _other_class(field: str) -> bool:
    """Whether a class is told that is not the pedestrian's; -1 tells none."""
    try:
        return float(field) not in (-1, PEDESTRIAN)
    except ValueError:
        return False


def _padded(
    lines: list[tuple[int, int, float, float, float, float, float]], frames: int, scale: Float[Tensor, " 4"]
) -> Boxes:
    of_frame: list[list[tuple[int, int, float, float, float, float, float]]] = [[] for _ in range(frames)]
    for line in lines:
        of_frame[line[0]].append(line)
    most = max((len(each) for each in of_frame), default=0)
    table = np.zeros((frames, most, 7))
    for row, each in zip(table, of_frame, strict=True):
        row[: len(each)] = np.array(each).reshape(-1, 7)
    mask = torch.arange(most) < torch.tensor([len(each) for each in of_frame])[:, None]
    numbers = torch.from_numpy(table).float()
    return Boxes(numbers[..., 2:6] * scale, torch.from_numpy(table[..., 1]).long(), mask, numbers[..., 6])


def _part(clip: Clip, frames: slice) -> Clip:
    def cut(boxes: Boxes) -> Boxes:
        assert boxes.scores is not None
        return Boxes(boxes.boxes[frames], boxes.labels[frames], boxes.mask[frames], boxes.scores[frames])

    return Clip(clip.name, clip.pixels[frames], cut(clip.truth), cut(clip.detections), clip.rate)
