"""Rewards of detection against pycocotools and against loops written out from their docstrings."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from foveate import noise
from foveate.geometry import Boxes, areas, check_boxes, overlaps
from foveate.rewards.boxes import (
    THRESHOLDS,
    DetectionReward,
    average_precision,
    class_weights,
    corpus_average_precision,
    iou_reward,
    matched_iou,
)
from foveate.types import InputError, map_tree

CLASSES = 3


def random_boxes(seed: int, name: str, batch: int, count: int, side: int = 12, crowds: bool = False) -> Boxes:
    """Boxes on a coarse grid, so that equal overlaps, equal boxes and boxes of one pixel or none occur."""
    keys = noise.key(seed, name, torch.arange(batch))
    corners = noise.integers(keys, side, count, 2, 2).sort(2).values.float()
    chance = noise.uniform(noise.fold(keys, "mask"), count, 3)
    return Boxes(
        corners.flatten(2),
        noise.integers(noise.fold(keys, "labels"), CLASSES, count),
        chance[..., 0] < 0.8,
        (chance[..., 1] * 5).round() / 5,  # with ties
        (chance[..., 2] < 0.2) if crowds else None,
    )


def shaken(targets: Boxes, seed: int) -> Boxes:
    """Predictions that are the targets, some moved by a pixel, and some of them twice."""
    keys = noise.key(seed, "shaken", torch.arange(len(targets.mask)))
    count = targets.mask.shape[1]
    twice = map_tree(lambda leaf: torch.cat((leaf, leaf), 1), replace(targets, crowd=None))
    moved = twice.boxes + noise.integers(keys, 3, 2 * count, 4) - 1
    corners = moved.unflatten(2, (2, 2)).sort(2).values.flatten(2)
    return replace(twice, boxes=corners, scores=noise.uniform(noise.fold(keys, "scores"), 2 * count))


def coco_precision(predictions: Boxes, targets: Boxes, row: int) -> Tensor:
    """[thresholds]: COCOeval on one image, -1 where it has no target."""
    found = COCO()
    annotations = []
    for place in targets.mask[row].nonzero().flatten().tolist():
        left, top, right, bottom = targets.boxes[row, place].tolist()
        annotations.append(
            {
                "id": place + 1,
                "image_id": 1,
                "category_id": int(targets.labels[row, place]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(targets.crowd is not None and bool(targets.crowd[row, place])),
            }
        )
    found.dataset = {
        "images": [{"id": 1}],
        "categories": [{"id": label + 1} for label in range(CLASSES)],
        "annotations": annotations,
    }
    boxes = []
    for place in predictions.mask[row].nonzero().flatten().tolist():
        left, top, right, bottom = predictions.boxes[row, place].tolist()
        boxes.append(
            {
                "image_id": 1,
                "category_id": int(predictions.labels[row, place]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "score": float(predictions.scores[row, place]),
            }
        )
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
        if not boxes:
            return torch.full((len(THRESHOLDS),), 0.0)
        judge = COCOeval(found, found.loadRes(boxes), "bbox")
        judge.evaluate()
        judge.accumulate()
    table = torch.from_numpy(judge.eval["precision"])[:, :, :, 0, 2]  # [thresholds, recalls, classes]
    there = table[0, 0] > -1
    return table[:, :, there].mean((1, 2)).float() if there.any() else torch.full((len(THRESHOLDS),), -1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(0, 6), st.booleans(), st.booleans())
def test_average_precision_is_cocoevals_on_the_image_alone(
    seed: int, count: int, more: int, crowds: bool, near: bool
) -> None:
    targets = random_boxes(seed, "targets", 3, more, crowds=crowds)
    predictions = shaken(targets, seed) if near else random_boxes(seed, "predictions", 3, count)
    found = average_precision(predictions, targets)
    each = torch.stack(list(found.parts.values()), 1)
    for row in range(3):
        wanted = targets.mask[row] if targets.crowd is None else targets.mask[row] & ~targets.crowd[row]
        if not wanted.any():
            assert found.total[row] == float(not predictions.mask[row].any())
            continue
        torch.testing.assert_close(each[row], coco_precision(predictions, targets, row), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.total, each.mean(1))


def test_average_precision_looks_at_a_hundred_boxes_a_class() -> None:
    targets = random_boxes(3, "targets", 1, 8)
    predictions = random_boxes(3, "predictions", 1, 500)
    assert (predictions.mask & (predictions.labels == 0)).sum() > 100
    found = torch.stack(list(average_precision(predictions, targets).parts.values()), 1)
    torch.testing.assert_close(found[0], coco_precision(predictions, targets, 0), rtol=0, atol=1e-6)


def by_loops(predictions: Boxes, targets: Boxes, reward: DetectionReward) -> tuple[list[float], list[dict[str, float]]]:
    """The rule of the docstring, box by box."""
    boxes_of = predictions.boxes.double(), targets.boxes.double()
    ious = overlaps(*boxes_of).tolist()
    in_crowd = overlaps(*boxes_of, targets.crowd).tolist() if targets.crowd is not None else ious
    totals, parts = [], []
    for row in range(len(ious)):
        boxes = predictions.mask[row].nonzero().flatten().tolist()
        all_places = targets.mask[row].nonzero().flatten().tolist()
        crowds = [] if targets.crowd is None else [place for place in all_places if targets.crowd[row, place]]
        places = [place for place in all_places if place not in crowds]
        label, of_target = predictions.labels[row].tolist(), targets.labels[row].tolist()
        weight = [1.0] * CLASSES if reward.class_weights is None else reward.class_weights.tolist()
        sums: dict[str, float] = {}
        total = 0.0
        for threshold in reward.thresholds:
            at: dict[int, list[int]] = {place: [] for place in places}
            lost = 0.0
            for box in boxes:
                own = [place for place in places if of_target[place] == label[box] and ious[row][box][place] > 0]
                best = max(own, key=lambda place: ious[row][box][place], default=None)
                if best is not None and ious[row][box][best] > threshold:
                    at[best].append(box)
                elif not any(
                    of_target[place] == label[box] and in_crowd[row][box][place] > threshold for place in crowds
                ):
                    lost += weight[label[box]]
            matches = sum(weight[of_target[place]] for place, some in at.items() if some)
            duplicates = sum(weight[of_target[place]] * (len(some) - 1) for place, some in at.items() if some)
            misses = sum(weight[of_target[place]] for place, some in at.items() if not some)
            for name, value in {
                "matches": matches, "duplicates": duplicates, "false_positives": lost, "misses": misses
            }.items():  # fmt: skip
                sums[f"{name}@{threshold:g}"] = value
            total += matches - reward.duplicate * duplicates - reward.false_positive * lost
        totals.append(total / len(reward.thresholds))
        parts.append(sums)
    return totals, parts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10), st.integers(0, 6), st.booleans(), st.booleans(), st.booleans())
def test_matches_and_duplicates_are_those_of_loops(
    seed: int, count: int, more: int, crowds: bool, near: bool, weighted: bool
) -> None:
    targets = random_boxes(seed, "targets", 3, more, crowds=crowds)
    predictions = shaken(targets, seed) if near else random_boxes(seed, "predictions", 3, count)
    weights = torch.tensor([0.5, 1.0, 1.5]) if weighted else None
    reward = DetectionReward(false_positive=0.1, class_weights=weights)
    found = reward(predictions, targets)
    totals, parts = by_loops(predictions, targets, reward)
    torch.testing.assert_close(found.total, torch.tensor(totals), rtol=1e-5, atol=1e-5)
    assert set(found.parts) == set(parts[0])
    for name, values in found.parts.items():
        torch.testing.assert_close(values, torch.tensor([float(row[name]) for row in parts]), rtol=1e-5, atol=1e-5)
    assert found.credit is not None
    assert not found.credit[~predictions.mask].any()
    before = torch.zeros_like(found.total)
    for place in range(predictions.mask.shape[1]):
        so_far = torch.arange(predictions.mask.shape[1]) <= place
        total = reward(replace(predictions, mask=predictions.mask & so_far), targets).total
        torch.testing.assert_close(found.credit[:, place], total - before, rtol=1e-5, atol=1e-5)
        before = total
    torch.testing.assert_close(before, found.total)


def test_credit_of_a_box_is_what_it_adds() -> None:
    """A match is praised, its duplicate blamed, a stray box costs what was said, and padding nothing."""
    targets = Boxes(torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10]]])
    mask = torch.tensor([[True, True, True, True, False]])
    predictions = Boxes(boxes, torch.tensor([[1, 1, 1, 0, 1]]), mask)
    found = DetectionReward((0.5,), duplicate=0.3, false_positive=0.05)(predictions, targets)
    torch.testing.assert_close(found.credit, torch.tensor([[1, -0.3, -0.05, -0.05, 0]]))
    assert found.parts["misses@0.5"].item() == 0


def test_a_match_is_above_the_threshold_here_and_at_it_in_coco() -> None:
    targets = Boxes(torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool))
    half = replace(targets, boxes=torch.tensor([[[0.0, 0, 10, 5]]]), scores=torch.ones(1, 1))
    assert DetectionReward((0.5,))(half, targets).total.item() == 0
    assert average_precision(half, targets, (0.5,)).total.item() == 1
    assert iou_reward(half, targets).total.item() == 0.5


def test_iou_of_single_boxes_and_of_images_without_any() -> None:
    targets = random_boxes(0, "targets", 64, 1)
    predictions = replace(random_boxes(1, "predictions", 64, 1), labels=targets.labels)
    found = iou_reward(predictions, targets).total
    both = (predictions.mask & targets.mask)[:, 0]
    torch.testing.assert_close(found[both], overlaps(predictions.boxes, targets.boxes)[both, 0, 0])
    assert found[~both].tolist() == [float(not row) for row in (predictions.mask | targets.mask)[~both, 0]]


def test_matched_iou_is_that_of_the_best_target_above_the_threshold() -> None:
    targets = random_boxes(1, "targets", 20, 4)
    predictions = shaken(targets, 1)
    found = matched_iou(predictions, targets)
    ious = overlaps(predictions.boxes, targets.boxes)
    for row in range(20):
        for box in range(8):
            own = [
                float(ious[row, box, place])
                for place in range(4)
                if predictions.mask[row, box]
                and targets.mask[row, place]
                and targets.labels[row, place] == predictions.labels[row, box]
            ]
            best = max(own, default=0.0)
            assert found[row, box] == pytest.approx(best if best > 0.5 else 0.0)
    assert (found > 0.5).sum() > 20


def test_perfect_and_empty_answers() -> None:
    targets = random_boxes(5, "targets", 8, 4)
    # boxes that are equal cannot be told apart, and boxes of no area overlap with nothing
    apart = torch.tensor([[0.0, 0, 5, 5], [10, 0, 15, 5], [0, 10, 5, 15], [10, 10, 15, 15]]).expand(8, -1, -1)
    targets = replace(targets, boxes=apart)
    found = DetectionReward()(targets, targets)
    torch.testing.assert_close(found.total, targets.mask.sum(1).float())
    assert average_precision(targets, targets).total.eq(1).all()
    nothing = replace(targets, mask=torch.zeros_like(targets.mask))
    assert not DetectionReward()(nothing, targets).total.any()
    torch.testing.assert_close(average_precision(nothing, targets).total, (~targets.mask.any(1)).float())


def test_class_weights_are_those_of_the_paper() -> None:
    counts = torch.tensor([900, 90, 10, 0])
    found = class_weights(counts)
    by_hand = torch.tensor([1 / (count + 0.05 * 1000) for count in (900, 90, 10, 0)])
    torch.testing.assert_close(found, by_hand / by_hand.mean())
    assert found.diff().gt(0).all()


def test_a_class_without_a_weight_is_named_and_padding_is_not_looked_at() -> None:
    targets = Boxes(torch.tensor([[[0.0, 0, 9, 9]] * 2]), torch.tensor([[1, 7]]), torch.tensor([[True, False]]))
    reward = DetectionReward(class_weights=torch.tensor([1.0, 2.0]))
    assert reward(targets, targets).total.item() == pytest.approx(2)
    strange = replace(targets, labels=torch.tensor([[2, 7]]))
    with pytest.raises(InputError, match=r"^labels: found class 2, expected 0 to 1"):
        reward(targets, strange)
    with pytest.raises(InputError, match=r"^labels: found class 2, expected 0 to 1"):
        reward(strange, targets)


def test_overlaps_are_those_of_torchvision() -> None:
    from torchvision.ops import box_iou

    one, other = random_boxes(1, "one", 5, 7), random_boxes(2, "other", 5, 3)
    found = overlaps(one.boxes, other.boxes)
    for row in range(5):
        expected = box_iou(one.boxes[row], other.boxes[row]).nan_to_num(0)
        torch.testing.assert_close(found[row], expected)
    assert areas(torch.tensor([3.0, 0, 1, 5])) == 0


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ([0.1, 0.1, 0.5, 0.9], r"within \[0, 1\].*multiply"),
        ([30.0, 30, 10, 10], "ends before it begins.*convert"),
        ([30.0, 30, 30, 40], "has no area: leave it out"),
        ([0.0, 0, 70, 10], "beyond the image of 64x48"),
        ([0.0, 0, float("nan"), 10], "not finite"),
    ],
)
def test_boxes_of_another_convention_are_named(box: list[float], says: str) -> None:
    boxes = Boxes(torch.tensor([[box]]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^targets: .*box 0 of image 0.*" + says):
        check_boxes(boxes, "targets", (48, 64))
    check_boxes(replace(boxes, mask=~boxes.mask), "targets", (48, 64))
    good = replace(boxes, boxes=torch.tensor([[[0.0, 0, 64, 48]]]))
    check_boxes(good, "targets", (48, 64))


def test_average_precision_needs_scores() -> None:
    targets = replace(random_boxes(0, "targets", 1, 2), scores=None)
    with pytest.raises(InputError, match="without scores"):
        average_precision(targets, targets)


@pytest.mark.parametrize("seed", range(6))
def test_the_corpus_metric_is_that_of_pycocotools(seed: int) -> None:
    """Fractions of a pixel, so that no overlap lies at a threshold, where the two round differently."""
    targets = replace(random_boxes(seed, "targets", 12, 6, side=40, crowds=seed % 2 == 0), scores=None)
    predictions = shaken(targets, seed)
    moved = predictions.boxes + noise.uniform(noise.key(seed, "moved", torch.arange(12)), 12, 4)
    predictions = replace(predictions, boxes=torch.cat((moved[..., :2].minimum(moved[..., 2:]), moved[..., 2:]), -1))
    images = [{"id": row} for row in range(12)]
    entries, found = [], []
    for boxes, into in ((targets, entries), (predictions, found)):
        for row, place in boxes.mask.nonzero().tolist():
            left, top, right, bottom = boxes.boxes[row, place].tolist()
            entry = {
                "id": len(into) + 1,
                "image_id": row,
                "category_id": int(boxes.labels[row, place]),
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(boxes.crowd is not None and bool(boxes.crowd[row, place])),
            }
            into.append(entry if boxes is targets else entry | {"score": float(boxes.scores[row, place])})
    truth = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "images": images,
            "annotations": entries,
            "categories": [{"id": label, "name": str(label)} for label in range(CLASSES)],
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ours = corpus_average_precision(predictions, targets, CLASSES)
    assert ours["map"] == pytest.approx(judge.stats[0], abs=1e-6)
    assert ours["map50"] == pytest.approx(judge.stats[1], abs=1e-6)
    assert ours["ar1"] == pytest.approx(judge.stats[6], abs=1e-6)
    assert ours["ar100"] == pytest.approx(judge.stats[8], abs=1e-6)
    assert 0.05 < ours["map"] < 0.95


def test_the_corpus_metric_of_nothing_found_is_nought_and_of_nothing_wanted_an_error() -> None:
    targets = random_boxes(0, "targets", 4, 3)
    nothing = replace(targets, mask=torch.zeros_like(targets.mask))
    assert corpus_average_precision(nothing, targets, CLASSES)["map"] == 0
    with pytest.raises(InputError, match=r"^targets: found no box"):
        corpus_average_precision(targets, nothing, CLASSES)
    with pytest.raises(InputError, match=r"^predictions: found boxes without scores"):
        corpus_average_precision(replace(targets, scores=None), targets, CLASSES)
