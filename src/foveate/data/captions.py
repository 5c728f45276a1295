"""Images with several sentences each: rendered scenes and COCO's captions, in memory at one size.

Pictures are stretched to a square. Splits are fixed: they depend on the data alone, never on the seed of a run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data import scenes as rendered
from foveate.data.picture_folders import check_memory, read_stretched
from foveate.types import InputError

DATASETS: dict[str, str] = {
    "scenes": "rendered scenes of textured objects with five sentences each, nothing to download",
    "coco": "ROOT/annotations/captions_NAME.json and the pictures in ROOT/NAME/, e.g. of NAME val2017",
}
SCENES = {"val": 500, "test": 1000}
RESERVED = ("", "<unknown>")  # ids before those of words
END, UNKNOWN = range(len(RESERVED))  # the end of a sentence, a word outside the vocabulary
LONGEST = 48  # bytes of a word; what is longer is none that could be learned
MANY = 4e6  # pixels that take more than a second or two to draw
_AT_ONCE = 64  # scenes drawn together: their layers then stay in the processor's cache
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

Part: TypeAlias = Literal["train", "val", "test", "all"]
Sentence: TypeAlias = tuple[str, ...]  # its words, in lower case


@dataclass(frozen=True)
class Captioned:
    """Images of one size, in memory, with what is said of each.

    Attributes:
        pixels: RGB, 0 to 255.
        sentences: of each image, at least one, as words in lower case without punctuation.
        name: of the data set, one of `DATASETS`.
        split: which part of it this is.
        skipped: what was left out because something is wrong with it: file, item and why, one line each.
    """

    pixels: UInt8[Tensor, "size 3 side side"]
    sentences: tuple[tuple[Sentence, ...], ...]
    name: str
    split: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def texts(self) -> list[list[str]]:
        """The sentences of each image, as words with spaces between."""
        return [[" ".join(words) for words in sentences] for sentences in self.sentences]

    def some(self, count: int = 9) -> tuple[Float[Tensor, "few 3 side side"], list[list[str]]]:
        """So many images in [0, 1], or as many as there are, spread over all; and the sentences of each."""
        rows, texts = torch.linspace(0, len(self) - 1, min(count, len(self))).long(), self.texts
        return self.pixels[rows].float() / 255, [texts[row] for row in rows.tolist()]


def load_captions(
    name: str,
    root: Path | None,
    split: Part,
    image_size: int,
    skip_bad: bool = False,
    scenes: int = 8000,
    say: Callable[[str], None] | None = None,
) -> Captioned:
    """Read one split of a data set into memory.

    - scenes: `scenes` of them to train on, `SCENES` others to choose by and to test on; "all" is the test.
    - coco: all captions_*.json of ROOT/annotations together. A tenth of the pictures, by the hash of their ids, are the
      test, another tenth val, whatever file they come from; "all" is every picture.

    Args:
        name: one of `DATASETS`.
        root: the folder of the data; not needed for scenes.
        split: which part.
        image_size: side in pixels to which pictures are stretched.
        skip_bad: leave out what is wrong, and tell it in `skipped`.
        scenes: how many to train on.
        say: is told what takes long.

    Raises:
        InputError: unknown name; no such folder or files; a damaged file; an empty split; more memory than
            `picture_folders.MEMORY`. Without `skip_bad`: a caption that is empty or of an unknown picture; a picture
            without captions, listed twice, missing or damaged.
    """
    if name not in DATASETS:
        raise InputError(f"data: found {name!r}, expected one of {', '.join(DATASETS)}")
    if image_size < 8:
        raise InputError(f"image_size: found {image_size}, expected at least 8 pixels")
    if name == "scenes":
        count = scenes if split == "train" else SCENES["test" if split == "all" else split]
        check_memory("scenes", (count, 3, image_size, image_size))
        return _rendered("test" if split == "all" else split, count, image_size, say)
    if root is None:
        raise InputError(f"root: not given, but data {name!r} is read from a folder: add --root FOLDER")
    if not root.is_dir():
        raise InputError(f"root: {root} is no folder; correct the path")
    return _read_coco(root, split, image_size, _Bad(skip_bad))


class _Bad:
    """What is wrong with single items: an error, or a line of what was left out."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.told: list[str] = []

    def tell(self, what: str, remedy: str) -> None:
        if not self.skip:
            raise InputError(f"{what}: {remedy}, or leave it out with --skip-bad")
        self.told.append(what)


# Scenes


def _rendered(split: str, count: int, side: int, say: Callable[[str], None] | None) -> Captioned:
    if say is not None and count * side**2 > MANY:
        say(f"drawing {count:,} scenes of {side} pixels")
    pixels, told = [], []
    for keys in noise.key("caption scenes", split, torch.arange(count)).split(_AT_ONCE):
        described = rendered.describe(keys)
        pixels.append((rendered.draw(described, side).images * 255).round().byte())
        told += [tuple(map(words_of, five)) for five in rendered.captions(described)]
    return Captioned(torch.cat(pixels), tuple(told), "scenes", split)


# COCO


@dataclass
class _Picture:
    path: Path
    where: str
    sentences: list[Sentence]


def _read_coco(root: Path, split: Part, side: int, bad: _Bad) -> Captioned:
    files = sorted((root / "annotations").glob("captions_*.json"))
    if not files:
        raise InputError(
            f"{root / 'annotations'}: no captions_*.json, expected e.g. captions_val2017.json: correct --root"
        )
    found: dict[Any, _Picture] = {}
    for path in files:
        _read_file(root, path, split, found, bad)
    pixels, told = [], []
    chosen = [found[number] for number in sorted(found)]
    check_memory(str(root), (len(chosen), 3, side, side))
    for picture in chosen:
        if not picture.sentences:
            bad.tell(f"{picture.where} has no captions", "add some")
            continue
        try:
            pixels.append(torch.from_numpy(np.ascontiguousarray(read_stretched(picture.path, side)[0])))
        except InputError as error:
            if not bad.skip:
                raise
            bad.told.append(str(error))
            continue
        told.append(tuple(picture.sentences))
    if not pixels:
        raise InputError(
            f"{root}: split {split!r} has no picture that can be used ({len(chosen)} listed), "
            "expected a tenth of all or more: add pictures"
        )
    return Captioned(torch.stack(pixels), tuple(told), "coco", split, tuple(bad.told))


def _read_file(root: Path, path: Path, split: Part, found: dict[Any, _Picture], bad: _Bad) -> None:
    """Add the pictures of a file that belong to a split, with their captions."""
    images, annotations = _lists(path)
    folder = root / path.stem.removeprefix("captions_")
    here: dict[int, _Picture] = {}
    strangers = {image["id"] for image in images}
    for image in images:
        number, name = image["id"], image.get("file_name")
        if split not in ("all", part_of(number)):
            continue
        where = f"{path}: image {number}"
        if number in here or number in found:
            bad.tell(f"{where} is listed twice", "remove one")
        elif not isinstance(name, str):
            bad.tell(f"{where} has the file_name {name!r}", "correct it")
        elif not (picture := folder / name).resolve().is_relative_to(folder.resolve()):
            bad.tell(f"{where} names the picture {name!r}, which lies outside of {folder}", "correct it")
        else:
            here[number] = _Picture(picture, where, [])
    for place, entry in enumerate(annotations):
        number, caption = entry.get("image_id"), entry.get("caption")
        where = f"{path}: caption {entry.get('id', f'at place {place}')}"
        if not isinstance(number, int) or number not in strangers:
            if split in ("train", "all"):  # it belongs to no split, and is counted once
                bad.tell(f"{where} is of image {number}, which is not listed", "add the image")
        elif number in here:
            words = words_of(caption) if isinstance(caption, str) else ()
            if words:
                here[number].sentences.append(words)
            else:
                bad.tell(f"{where} of image {number} has no words ({caption!r})", "write it")
    found.update(here)


def _lists(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
        lists = [content[name] for name in ("images", "annotations")]
        for name, entries in zip(("images", "annotations"), lists, strict=True):
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise TypeError(f"{name!r} is no list of objects")
        if not all(isinstance(image.get("id"), int) for image in lists[0]):
            raise TypeError("an image has no id that is a whole number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path}: is no COCO file of captions ({told}), expected lists of images and annotations: "
            "fetch it again or remove it"
        ) from error
    return lists[0], lists[1]


def part_of(number: int) -> Literal["train", "val", "test"]:
    """The split that a picture of this id belongs to, in every COCO folder: 80, 10 and 10 %."""
    tenth = int(noise.key("captions", number)) % 10
    return "test" if tenth == 0 else "val" if tenth == 1 else "train"


# Words


def words_of(sentence: str) -> Sentence:
    """The words of a sentence in lower case, without punctuation; letters and digits of any script."""
    return tuple(_WORD.findall(sentence.lower()))


def vocabulary(captioned: Iterable[Sequence[Sentence]], least_count: int) -> tuple[tuple[str, ...], int]:
    """`RESERVED` and all words that occur, the most frequent first; and how many of these can be written.

    Those are the reserved, and the words that occur at least `least_count` times and have at most `LONGEST` bytes.
    """
    counts = Counter(word for sentences in captioned for sentence in sentences for word in sentence)
    short = {word: count if len(word.encode()) <= LONGEST else 0 for word, count in counts.items()}
    ranked = sorted(short, key=lambda word: (-short[word], word))
    return (*RESERVED, *ranked), len(RESERVED) + sum(short[word] >= max(1, least_count) for word in ranked)


def every_word(words: Sequence[str], *parts: Captioned) -> tuple[str, ...]:
    """These words, and behind them all others that are said in some parts of the data."""
    found, _ = vocabulary((sentences for part in parts for sentences in part.sentences), 1)
    return tuple(dict.fromkeys((*words, *found)))


def numbered(
    captioned: Sequence[Sequence[Sentence]], words: Sequence[str]
) -> tuple[Int[Tensor, "size references length"], Bool[Tensor, "size references length"]]:
    """Sentences as ids, padded with `END`: the place of each word in `words`, which begins with `RESERVED`.

    Each word that is not there has an id of its own behind them.

    An image with fewer sentences than another has references without a word.
    """
    ids = {word: place for place, word in enumerate(words)}
    most = max(len(sentences) for sentences in captioned)
    longest = max(len(sentence) for sentences in captioned for sentence in sentences)
    found = np.full((len(captioned), most, longest), END)
    for row, sentences in enumerate(captioned):
        for place, sentence in enumerate(sentences):
            found[row, place, : len(sentence)] = [ids.setdefault(word, len(ids)) for word in sentence]
    numbers = torch.from_numpy(found)
    return numbers, numbers != END


def not_learned(skipped: Sequence[str], references: Bool[Tensor, "..."], learned: Bool[Tensor, "..."]) -> list[str]:
    """What of the data is not learned from, to be said: items left out, and captions longer than is written.

    Args:
        skipped: a line for each item.
        references: mask of all captions, [size, most, words].
        learned: that of those to learn from, [size, most, tokens].
    """
    told = [f"{len(skipped)} items of the data are left out, the first: {skipped[0]}"] if skipped else []
    count, few = int(references.any(2).sum()), int(learned.any(2).sum())
    if few < count:
        told.append(f"{count - few:,} of {count:,} captions are longer than length: references, but not learned")
    return told


def answers(
    ids: Int[Tensor, "size references length"], mask: Bool[Tensor, "size references length"], count: int, length: int
) -> tuple[Int[Tensor, "size references more"], Bool[Tensor, "size references more"]]:
    """Sentences to learn from: the end behind each, `UNKNOWN` for ids from `count` on.

    Masked out whole is one that does not exist, or is longer than `length` with its end.
    """
    lengths = mask.sum(2, keepdim=True) + 1
    learned = (lengths > 1) & (lengths <= length)
    known = torch.cat((ids, torch.full_like(ids[..., :1], END)), 2)
    places = torch.arange(known.shape[2], device=ids.device)
    return known.masked_fill(known >= count, UNKNOWN), (places < lengths) & learned
