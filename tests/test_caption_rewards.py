"""CIDEr-D against pycocoevalcap, CIDEr against its formula written out."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer

from foveate import noise
from foveate.rewards.captions import Cider, DocumentFrequency, Words, _hashed, _table, document_frequency
from foveate.types import InputError

TEXT = st.lists(st.integers(0, 6), min_size=0, max_size=9)
REFERENCES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=3)


def words(texts: list[list[int]], length: int | None = None) -> Words:
    length = max([1, *map(len, texts)]) if length is None else length
    ids = torch.tensor([[*text, *[7] * (length - len(text))] for text in texts])
    return Words(ids, torch.arange(length) < torch.tensor([[len(text)] for text in texts]))


def references(images: list[list[list[int]]]) -> Words:
    most, length = max(map(len, images)), max(len(text) for texts in images for text in texts)
    padded = [words([*texts, *[[]] * (most - len(texts))], length) for texts in images]
    return Words(torch.stack([one.ids for one in padded]), torch.stack([one.mask for one in padded]))


def official(captions: list[list[int]], images: list[list[list[int]]]) -> list[float]:
    scorer = CiderScorer()
    for caption, texts in zip(captions, images, strict=True):
        scorer += (" ".join(map(str, caption)), [" ".join(map(str, text)) for text in texts])
    return list(scorer.compute_score()[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, REFERENCES), min_size=2, max_size=6))
def test_cider_d_is_pycocoevalcaps(pairs: list[tuple[list[int], list[list[int]]]]) -> None:
    captions, images = [list(part) for part in zip(*pairs, strict=True)]
    targets = references(images)
    found = Cider(document_frequency(targets))(words(captions), targets)
    expected = torch.tensor(official(captions, images), dtype=torch.float32)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(list(found.parts.values())).mean(0), found.total, rtol=1e-5, atol=1e-5)


def by_formula(caption: list[int], texts: list[list[int]], images: list[list[list[int]]]) -> float:
    """CIDEr as in the paper's equations 1 to 4, times 10."""

    def grams(text: list[int], n: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(text[place : place + n]) for place in range(len(text) - n + 1))

    total = 0.0
    for n in range(1, 5):
        documents = Counter(gram for all_texts in images for gram in {g for text in all_texts for g in grams(text, n)})

        def vector(text: list[int], n: int, documents: Counter[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
            return {g: count * math.log(len(images) / max(1, documents[g])) for g, count in grams(text, n).items()}

        one = vector(caption, n, documents)
        for text in texts:
            other = vector(text, n, documents)
            norm = math.hypot(*one.values()) * math.hypot(*other.values())
            total += sum(one[g] * other.get(g, 0) for g in one) / norm / len(texts) / 4 if norm else 0
    return 10 * total


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXT, REFERENCES), min_size=2, max_size=5))
def test_plain_cider_is_the_papers_formula(pairs: list[tuple[list[int], list[list[int]]]]) -> None:
    captions, images = [list(part) for part in zip(*pairs, strict=True)]
    targets = references(images)
    found = Cider(document_frequency(targets), plain=True)(words(captions), targets).total
    for row, (caption, texts) in enumerate(zip(captions, images, strict=True)):
        assert found[row] == pytest.approx(by_formula(caption, texts, images), abs=1e-5)


def test_the_published_example_scores_as_pycocoevalcap_scores_it(shared_data: Path) -> None:
    folder = shared_data / "coco_captions_text"
    results = json.loads((folder / "fakecap_results.json").read_text())
    annotations = json.loads((folder / "fakecap_references.json").read_text())["annotations"]
    texts: dict[int, list[str]] = {}
    for annotation in annotations:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"].lower())
    vocabulary: dict[str, int] = {}

    def ids(text: str) -> list[int]:
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]

    captions = [ids(result["caption"].lower()) for result in results]
    images = [[ids(text) for text in texts[result["image_id"]]] for result in results]
    targets = references(images)
    found = Cider(document_frequency(targets))(words(captions), targets).total
    torch.testing.assert_close(
        found, torch.tensor(official(captions, images), dtype=torch.float32), rtol=1e-6, atol=1e-6
    )
    assert found.mean() > 0.5


def test_repeating_is_not_praised_and_large_vocabularies_do_not_collide() -> None:
    images = [[[65535, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]], [[1, 65535, 2]]]
    targets = references(images)
    reward = Cider(document_frequency(targets))
    captions = [[65535, 1, 2, 3, 4], [5, 5, 5, 5, 5], [65535, 1, 2]]
    found = reward(words(captions), targets).total
    assert found[0] == pytest.approx(10, abs=1e-5)
    assert found[1] < 1
    expected = torch.tensor(official(captions, images), dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_padding_does_not_matter() -> None:
    images = [[[1, 2, 3], [2, 3]], [[4, 5], [1, 4, 5, 6]]]
    targets = references(images)
    reward = Cider(document_frequency(targets))
    short, long = words([[1, 2, 3], [4]]), words([[1, 2, 3], [4]], 8)
    found = reward(short, targets)
    torch.testing.assert_close(found.total, reward(long, targets).total)
    other = replace(long, ids=long.ids.masked_fill(~long.mask, 2))
    torch.testing.assert_close(found.total, reward(other, targets).total)


def test_bad_words_are_named() -> None:
    targets = references([[[1, 2]], [[3]]])
    reward = Cider(document_frequency(targets))
    with pytest.raises(InputError, match=r"^words: found ids from 0 to 70000"):
        reward(words([[0], [70000]]), targets)
    with pytest.raises(InputError, match=r"^targets: image 1 has no reference"):
        reward(words([[1], [2]]), replace(targets, mask=targets.mask & torch.tensor([True, False])[:, None, None]))


def test_an_n_gram_is_found_wherever_it_came_to_stand() -> None:
    """In a table that is a quarter full several hundred of 5,000 stand beside their place."""
    counts = noise.integers(noise.key(0, "grams", torch.arange(5_000)), 50, 1)[:, 0] + 1
    keys = noise.integers(noise.key(1, "grams", torch.arange(5_000)), 2**31, 1)[:, 0].unique()
    table = DocumentFrequency(*((each,) for each in _table(keys, counts[: len(keys)])), 100)
    assert (_hashed(keys, len(table.keys[0])).bincount() > 1).sum() > 300
    expected = math.log(100) - counts[: len(keys)].double().log()
    torch.testing.assert_close(table.weights(keys, 1), expected)
    unknown = keys + 2**40
    assert (table.weights(unknown, 1) == math.log(100)).all()
