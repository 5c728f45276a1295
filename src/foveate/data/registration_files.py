"""Pairs of pictures with landmarks in files: the layout of BIRL (Borovec et al. 2020, "ANHIR: automatic non-rigid
histological image registration challenge").

`pairs.csv` has the columns "Target image", "Source image", "Target landmarks", "Source landmarks", paths from its own
folder; the target is fixed, the source moves. A file of landmarks has the columns X and Y, in pixels, after an unnamed
one of numbers; row k of the one belongs to row k of the other.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise
from foveate.data.picture_folders import read_pictures
from foveate.data.similarity import apply
from foveate.types import InputError

IMAGES = "Target image", "Source image"
LANDMARKS = "Target landmarks", "Source landmarks"
STATUS = "status"  # BIRL's column that says which pairs are for training
_PARTS = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "val": "val",
    "evaluation": "test",
    "test": "test",
}
_SHARES = {"val": 0.15, "test": 0.25}


def read_pairs(root: Path | None, split: str, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pixels uint8 [size, 3, side, side] of fixed and moving pictures, landmarks [size, count, 2] in both, and a mask.

    A column "status" (training, validation, evaluation) says which pair is in which part; without it a quarter of the
    pairs is `test` and some more `val`, by the hash of their files' names. Pairs of both parts may share a picture.

    Raises:
        InputError: no `root`; a missing file; another column; no landmarks, or not as many in both; a number that is
            none, or lies outside of the picture; a split without pairs.
    """
    if root is None:
        raise InputError("root: not given, expected the folder of pairs.csv: add --root FOLDER")
    table = root / "pairs.csv"
    rows = list(_rows(table, (*IMAGES, *LANDMARKS)))
    parts = _parts(table, rows)
    found = [row for row, part in zip(rows, parts, strict=True) if part == split]
    if not found:
        raise InputError(
            f"{table}: found {len(rows)} pairs but none for split {split!r}, expected four pairs at least, or a column "
            "'status' with training, validation and evaluation: add pairs"
        )
    pictures: tuple[list[Tensor], list[Tensor]] = [], []
    points: tuple[list[Tensor], list[Tensor]] = [], []
    for line, row in found:
        both = []
        for image, landmarks in zip(IMAGES, LANDMARKS, strict=True):
            picture = _picture(table, line, image, row[image])
            square, box = letterbox(picture, side)
            marks = _landmarks(table, line, landmarks, row[landmarks], picture.shape[2:])
            both.append(((255 * square[0]).round().byte(), apply(box, marks)))
        if len(both[0][1]) != len(both[1][1]):
            raise InputError(
                f"{table}, line {line}: {row[LANDMARKS[0]]} has {len(both[0][1])} landmarks and {row[LANDMARKS[1]]} "
                f"{len(both[1][1])}, expected as many: row k of the one belongs to row k of the other"
            )
        for place, (pixels, marks) in enumerate(both):
            pictures[place].append(pixels)
            points[place].append(marks)
    most = max(map(len, points[0]))
    mask = torch.stack([torch.arange(most) < len(marks) for marks in points[0]])
    one, other = (torch.stack([F.pad(marks, (0, 0, 0, most - len(marks))) for marks in each]) for each in points)
    return torch.stack(pictures[0]), torch.stack(pictures[1]), one, other, mask


def read_pictures_of_pairs(path: Path, side: int) -> dict[str, Float[Tensor, "batch 3 side side"]]:
    """Pictures to be registered, "fixed" and "moving": of a `pairs.csv`, or `fixed.*` and `moving.*` in a folder.

    Landmarks are not asked for.

    Raises:
        InputError: neither is there, or a file is no picture.
    """
    table = path if path.suffix == ".csv" else path / "pairs.csv"
    if table.is_file():
        rows = list(_rows(table, IMAGES))
        columns = [
            [letterbox(_picture(table, line, name, row[name]), side)[0] for line, row in rows] for name in IMAGES
        ]
        return dict(zip(("fixed", "moving"), map(torch.cat, columns), strict=True))
    found = {}
    for name in ("fixed", "moving"):
        files = sorted(path.glob(f"{name}.*")) if path.is_dir() else []
        if len(files) != 1:
            raise InputError(
                f"{path}: found {len(files)} files {name}.*, expected a folder with one picture fixed.* and one "
                "moving.*, or with pairs.csv"
            )
        found[name] = letterbox(read_pictures(files[0], 3, None), side)[0]
    return found


def letterbox(
    pictures: Float[Tensor, "batch 3 height width"], side: int
) -> tuple[Float[Tensor, "batch 3 side side"], Float[Tensor, "2 3"]]:
    """Pictures made as large as fits in a square, in its middle, and the map from their pixels to its pixels."""
    height, width = pictures.shape[2:]
    rows, columns = (max(1, round(length * side / max(height, width))) for length in (height, width))
    small = F.interpolate(pictures, (rows, columns), mode="bilinear", antialias=True)
    top, left = (side - rows) // 2, (side - columns) // 2
    square = pictures.mean((2, 3), keepdim=True).repeat(1, 1, side, side)
    square[:, :, top : top + rows, left : left + columns] = small
    return square.clamp(0, 1), pictures.new_tensor([[columns / width, 0, left], [0, rows / height, top]])


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the line and fields of every row."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: cannot be read ({error}), expected a table of pairs: correct the path") from error
    reader = csv.DictReader(text.splitlines())
    for name in columns:
        if name not in (reader.fieldnames or ()):
            raise InputError(
                f"{table}, line 1: found the columns {', '.join(reader.fieldnames or ['none'])}, expected "
                f"{', '.join(columns)}: rename them"
            )
    for row in reader:
        yield reader.line_num, row


def _parts(table: Path, rows: list[tuple[int, dict[str, str]]]) -> list[str]:
    if rows and STATUS in rows[0][1]:
        for line, row in rows:
            if (row[STATUS] or "").lower() not in _PARTS:
                raise InputError(f"{table}, line {line}: status {row[STATUS]!r}, expected one of {', '.join(_PARTS)}")
        return [_PARTS[row[STATUS].lower()] for _, row in rows]
    names = [":".join(row[name] or "" for name in IMAGES) for _, row in rows]
    order = sorted(range(len(rows)), key=lambda place: int(noise.key("pairs", zlib.crc32(names[place].encode()))))
    parts, first = ["train"] * len(rows), 0
    if len(rows) < 4:
        return parts
    for part, share in _SHARES.items():
        count = max(1, round(share * len(rows)))
        for place in order[first : first + count]:
            parts[place] = part
        first += count
    return parts


def _picture(table: Path, line: int, column: str, name: str | None) -> Tensor:
    path = table.parent / (name or "")
    if not name or not path.is_file():
        raise InputError(f"{table}, line {line}: {column} {name!r} is not there, expected a picture: correct the path")
    return read_pictures(path, 3, None)


def _landmarks(table: Path, line: int, column: str, name: str | None, size: torch.Size) -> Float[Tensor, "count 2"]:
    path = table.parent / (name or "")
    if not name or not path.is_file():
        raise InputError(
            f"{table}, line {line}: {column} {name!r} is not there, expected a file of landmarks (X, Y): pairs without "
            "landmarks are for `foveate show`, not for training"
        )
    found = []
    for number, row in _rows(path, ("X", "Y")):
        try:
            x, y = float(row["X"]), float(row["Y"])
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}, line {number}: found X {row['X']!r}, Y {row['Y']!r}, expected two numbers: repair the row"
            ) from error
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            raise InputError(
                f"{path}, line {number}: ({x:g}, {y:g}) lies outside of the picture of {size[1]}x{size[0]} pixels: "
                "is it in another scale?"
            )
        found.append((x, y))
    if len(set(found)) < 2:
        raise InputError(f"{path}: found {len(set(found))} different landmarks, expected two at least: add some")
    return torch.tensor(found)
