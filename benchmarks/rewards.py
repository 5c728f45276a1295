"""Rewards of a batch against the official implementation, or the loop that is usually written, on the same inputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import best_seconds
from foveate import noise
from foveate.geometry import Boxes, Segments
from foveate.rewards.boxes import DetectionReward, average_precision
from foveate.rewards.captions import Cider, Words, document_frequency
from foveate.rewards.panoptic import panoptic_quality
from foveate.types import RewardOutput, map_tree

Rates = tuple[float, float, str]
CAPTIONS, REFERENCES, LENGTH, VOCABULARY = 4096, 5, 12, 2000
IMAGES, BOXES, TARGETS, CLASSES = 256, 100, 20, 20
MAPS, SIDE, SEGMENTS = 32, 256, 12


def cider() -> Rates:
    """4,096 captions of some 10 words with 5 references each. Ours has the table of document frequencies already."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    found, wanted = texts("found", CAPTIONS), texts("wanted", CAPTIONS * REFERENCES)
    wanted = map_tree(lambda leaf: leaf.view(CAPTIONS, REFERENCES, LENGTH), wanted)
    reward = Cider(document_frequency(wanted))
    spoken = sentences(found), sentences(map_tree(lambda leaf: leaf.flatten(0, 1), wanted))

    def official() -> None:
        scorer = CiderScorer()
        for place, text in enumerate(spoken[0]):
            scorer += (text, spoken[1][place * REFERENCES : (place + 1) * REFERENCES])
        scorer.compute_score()

    ours, peer = best_seconds(lambda: reward(found, wanted), official, rounds=3)
    return CAPTIONS / ours, CAPTIONS / peer, "captions/s"


def texts(name: str, count: int) -> Words:
    """Random words, frequent ones more often; 8 to 12 a text."""
    keys = noise.key(0, name, torch.arange(count))
    ids = (noise.uniform(keys, LENGTH) ** 3 * VOCABULARY).long()
    return Words(ids, torch.arange(LENGTH) < 8 + noise.integers(noise.fold(keys, "length"), 5, 1))


def sentences(words: Words) -> list[str]:
    return [
        " ".join(map(str, ids[:length]))
        for ids, length in zip(words.ids.tolist(), words.mask.sum(1).tolist(), strict=True)
    ]


def detection(reward: Callable[[Boxes, Boxes], RewardOutput]) -> Rates:
    """256 images of 100 boxes and 20 targets against pycocotools' COCOeval image by image (on 8 of them)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, wanted = boxes()
    few = 8
    truths = [annotations(wanted, row) for row in range(few)]
    guesses = [annotations(found, row) for row in range(few)]

    def official() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            for truth, guess in zip(truths, guesses, strict=True):
                one = COCO()
                categories = [{"id": label} for label in range(CLASSES)]
                one.dataset = {"images": [{"id": 1}], "categories": categories, "annotations": truth}
                one.createIndex()
                judge = COCOeval(one, one.loadRes(guess), "bbox")
                judge.evaluate()
                judge.accumulate()

    ours, peer = best_seconds(lambda: reward(found, wanted), official, rounds=3)
    return IMAGES / ours, few / peer, "images/s"


def boxes() -> tuple[Boxes, Boxes]:
    """Targets, and five boxes around each of them."""
    keys = noise.key(0, "boxes", torch.arange(IMAGES))
    low = noise.uniform(keys, TARGETS, 2) * 400
    high = low + 20 + noise.uniform(noise.fold(keys, "size"), TARGETS, 2) * 200
    labels = noise.integers(noise.fold(keys, "labels"), CLASSES, TARGETS)
    wanted = Boxes(torch.cat((low, high), -1), labels, torch.ones_like(labels, dtype=torch.bool))
    found = map_tree(lambda leaf: leaf.repeat(1, BOXES // TARGETS, *[1] * (leaf.dim() - 2)), wanted)
    moved = found.boxes + 16 * noise.uniform(noise.fold(keys, "moves"), BOXES, 4) - 8
    return replace(found, boxes=moved, scores=noise.uniform(noise.fold(keys, "scores"), BOXES)), wanted


def annotations(found: Boxes, row: int) -> list[dict[str, object]]:
    rows = []
    for place, (left, top, right, bottom) in enumerate(found.boxes[row].tolist()):
        box = [left, top, right - left, bottom - top]
        one = {"image_id": 1, "category_id": int(found.labels[row, place]), "bbox": box, "iscrowd": 0, "id": place + 1}
        value = (right - left) * (bottom - top) if found.scores is None else float(found.scores[row, place])
        rows.append(one | {"area" if found.scores is None else "score": value})
    return rows


def panoptic() -> Rates:
    """32 maps of 256×256 with 12 segments against a loop over pairs of segments on NumPy arrays."""
    found, wanted = maps("found"), maps("wanted")

    def loop() -> None:
        for row in range(MAPS):
            quality_by_loops(*(part[row].numpy() for part in (found.ids, found.labels, wanted.ids, wanted.labels)))

    ours, peer = best_seconds(lambda: panoptic_quality(found, wanted), loop, rounds=10)
    return MAPS / ours, MAPS / peer, "maps/s"


def maps(name: str) -> Segments:
    keys = noise.key(0, "maps", torch.arange(MAPS))
    field: Tensor = noise.normal(keys, SEGMENTS, 8, 8)
    field = field + 0.3 * noise.normal(noise.fold(keys, name), SEGMENTS, 8, 8)
    ids = torch.nn.functional.interpolate(field, (SIDE, SIDE), mode="bilinear").argmax(1) + 1
    return Segments(ids, noise.integers(noise.fold(keys, "labels"), CLASSES, SEGMENTS))


def quality_by_loops(ids: np.ndarray, labels: np.ndarray, true_ids: np.ndarray, true_labels: np.ndarray) -> float:
    """PQ of a map as it is usually written: a mask a segment, their overlaps pair by pair."""
    own = {k: ids == k for k in np.unique(ids)}
    true = {k: true_ids == k for k in np.unique(true_ids)}
    scores = []
    for label in np.union1d(labels[[k - 1 for k in own]], true_labels[[k - 1 for k in true]]):
        ours = [mask for k, mask in own.items() if labels[k - 1] == label]
        theirs = [mask for k, mask in true.items() if true_labels[k - 1] == label]
        overlaps = [(a & b).sum() / (a | b).sum() for a in ours for b in theirs]
        matched = [iou for iou in overlaps if iou > 0.5]
        scores.append(sum(matched) / ((len(ours) + len(theirs)) / 2))
    return float(np.mean(scores))


ROWS: dict[str, Callable[[], Rates]] = {
    "cider": cider,
    "detection-reward": partial(detection, DetectionReward()),
    "average-precision": partial(detection, average_precision),
    "pq": panoptic,
}
