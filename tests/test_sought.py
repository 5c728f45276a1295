"""What is searched for: pairs of a picture and a class, the boxes that are theirs, and COCO's score by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster

from foveate import noise
from foveate.data.detection import Detections, first_shown, load_detections
from foveate.data.sought import (
    check_classes,
    every_search,
    in_pieces,
    of_searches,
    of_target,
    searches_to_learn,
)
from foveate.geometry import Boxes
from foveate.rewards.regions import Searched, ap50, box_scores
from foveate.types import InputError

SIDE = 32


def scenes(count: int = 60, most: int = 3) -> Detections:
    return load_detections("scenes", None, "train", SIDE, scenes=count, most=most)


def test_of_one_class_every_picture_is_a_search_and_its_objects_are_alike() -> None:
    data = scenes()
    for target, name in (("any", "object"), ("ring", "ring")):
        found = of_target(data, target, "here")
        assert found.classes == (name,)
        assert not found.boxes.labels.any()
        expected = torch.stack((torch.arange(60), torch.zeros(60).long()), 1)
        for searches in (every_search(found), searches_to_learn(found)):
            assert torch.equal(searches, expected)
            assert torch.equal(of_searches(found.boxes, searches).wanted, found.boxes.wanted)
    assert torch.equal(of_target(data, "any", "here").boxes.mask, data.boxes.mask)


def test_every_object_belongs_to_one_search_for_its_class() -> None:
    data = of_target(scenes(), "each", "here")
    searches = every_search(data)
    assert len(searches) == 60 * 6
    mine = of_searches(data.boxes, searches)
    assert torch.equal(mine.labels[mine.mask], searches[:, 1:].expand_as(mine.mask)[mine.mask])
    assert torch.equal(mine.mask.unflatten(0, (60, 6)).sum(1), data.boxes.mask.long())


def test_learning_has_all_searches_that_find_something_and_as_many_that_do_not() -> None:
    data = of_target(scenes(), "each", "here")
    searches = searches_to_learn(data)
    assert len(searches.unique(dim=0)) == len(searches)
    finds = of_searches(data.boxes, searches).wanted.any(1)
    all_ = of_searches(data.boxes, every_search(data)).wanted.any(1)
    assert finds.sum() == all_.sum(), "none of the classes shown is left out"
    for picture in range(60):
        mine = searches[:, 0] == picture
        assert (mine & finds).sum() == (mine & ~finds).sum(), "three classes of six at most are shown"
    assert len(searches[~finds, 1].unique()) == 6
    few = replace(data, boxes=replace(data.boxes, mask=torch.zeros_like(data.boxes.mask)))
    assert (searches_to_learn(few)[:, 0] == torch.arange(60)).all(), "an empty picture is searched once"


def test_a_class_of_which_there_is_only_a_crowd_is_not_taught_to_be_absent() -> None:
    data = of_target(scenes(most=1), "each", "here")
    boxes = replace(data.boxes, crowd=data.boxes.mask)
    searches = searches_to_learn(replace(data, boxes=boxes))
    assert len(searches) == 60
    assert not (data.boxes.labels[searches[:, 0], 0] == searches[:, 1]).any()


@pytest.mark.parametrize(
    ("showing", "taken"),
    [
        (range(20), [0, 1, 2, 3]),  # as many as are asked for: the first
        ([1, 3, 5], [0, 1, 2, 3]),
        ([17], [0, 1, 2, 17]),
        ([3, 8, 9, 15], [0, 1, 3, 8]),
        ([], [0, 1, 2, 3]),
    ],
)
def test_the_first_pictures_are_taken_but_half_of_them_show_an_object(showing: Any, taken: list[int]) -> None:
    data = scenes(20)
    there = torch.isin(torch.arange(20), torch.tensor(list(showing)))
    data = replace(data, boxes=replace(data.boxes, mask=data.boxes.mask & there[:, None]))
    assert torch.equal(first_shown(data, 4).pixels, data.pixels[taken])
    assert torch.equal(first_shown(data, 30).pixels, data.pixels)


def test_pieces_hold_each_picture_once_and_all_searches_in_order() -> None:
    data = of_target(scenes(20), "each", "here")
    searches = searches_to_learn(data)
    pieces = list(in_pieces(data, searches, 7))
    assert torch.cat([data.pixels[searches[:, 0]]]).equal(
        torch.cat([shown.pixels[some[:, 0]] for shown, some in pieces])
    )
    assert torch.cat([some[:, 1] for _, some in pieces]).equal(searches[:, 1])
    assert all(len(shown) == len(some[:, 0].unique()) for shown, some in pieces)
    wanted = torch.cat([of_searches(shown.boxes, some).boxes for shown, some in pieces])
    assert wanted.equal(of_searches(data.boxes, searches).boxes)


def test_a_class_without_examples_and_other_classes_are_named() -> None:
    data = scenes()
    one = replace(data.boxes, mask=data.boxes.mask & (data.boxes.labels != 3))
    with pytest.raises(InputError, match=r"^here: split 'train' \(60 pictures\) has no object of class 'ring'"):
        check_classes(replace(data, boxes=one), "here")
    check_classes(data, "here")
    with pytest.raises(
        InputError, match=r"^here: the classes of split 'train' are disk, .* expected .* ring, disk: name"
    ):
        of_target(data, "each", "here", ("ring", "disk"))


def _by_coco(found: Boxes, targets: Boxes, classes: int) -> float:
    """AP at 0.5 of whole pictures, by faster-coco-eval itself."""

    def entries(boxes: Boxes) -> list[dict[str, Any]]:
        told = []
        for row, place in boxes.mask.nonzero().tolist():
            left, top, right, bottom = boxes.boxes[row, place].tolist()
            sides = [left, top, right - left, bottom - top]
            entry = {"image_id": row, "category_id": int(boxes.labels[row, place]), "bbox": sides}
            entry |= {"id": len(told) + 1, "area": sides[2] * sides[3], "iscrowd": 0, "score": 0.0}
            entry |= {} if boxes.scores is None else {"score": float(boxes.scores[row, place])}
            told.append(entry)
        return told

    names = [{"id": number, "name": str(number)} for number in range(classes)]
    images = [{"id": row} for row in range(len(targets.mask))]
    truth = COCO({"images": images, "annotations": entries(targets), "categories": names})
    judge = COCOeval_faster(truth, truth.loadRes(entries(found)), "bbox", print_function=lambda *_: None)
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return float(judge.stats[1])


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_by_searches_is_cocos_of_the_pictures(seed: int) -> None:
    """The mean over classes; false positives in pictures without the class count."""
    data = of_target(scenes(24), "each", "here")
    searches = every_search(data)
    targets = of_searches(data.boxes, searches)
    keys = noise.key("found", seed, torch.arange(len(searches)))
    first = targets.mask.int().argmax(1)  # an object of the class if there is one, else of another
    near = targets.boxes[torch.arange(len(searches)), first][:, None] + noise.normal(keys, 2, 4)
    regions = torch.cat((near[..., :2], torch.maximum(near[..., 2:], near[..., :2] + 1)), -1)
    values, fired = noise.normal(noise.fold(keys, "value"), 2), noise.uniform(noise.fold(keys, "fired"), 2) < 0.7
    found = Searched(regions, values, torch.ones_like(fired), fired, searches[:, 1])
    by_search = found.boxes()
    whole = Boxes(  # of each picture together
        *(leaf.unflatten(0, (24, 6)).flatten(1, 2) for leaf in (by_search.boxes, by_search.labels, by_search.mask)),
        by_search.scores.unflatten(0, (24, 6)).flatten(1, 2),
    )
    expected = _by_coco(whole, data.boxes, 6)
    assert 0.03 < expected < 0.9
    assert ap50(by_search, targets) == pytest.approx(expected, abs=1e-6)
    assert box_scores(by_search, targets)["ap50"] == pytest.approx(expected, abs=1e-6)
    assert ap50(replace(by_search, labels=0 * by_search.labels), targets) < expected, "classes are told apart"


def test_triggered_regions_come_first_in_their_order() -> None:
    regions = torch.arange(16.0).view(1, 4, 4)
    fired = torch.tensor([[False, True, False, True]])
    found = Searched(regions, torch.arange(4.0)[None], torch.ones_like(fired), fired, torch.tensor([5]))
    for most, mask in ((None, [True, True]), (3, [True, True, False]), (1, [True])):
        boxes = found.boxes(most)
        assert boxes.mask[0].tolist() == mask
        assert boxes.scores[boxes.mask].tolist() == [1, 3][: sum(mask)]
        assert boxes.boxes[0, 0].tolist() == [4, 5, 6, 7]
        assert (boxes.labels == 5).all()
