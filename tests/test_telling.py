"""A reward that tells no answers apart is refused before anything is trained for it; any other is not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.geometry import Boxes
from foveate.rewards.boxes import iou_reward
from foveate.rewards.combine import told
from foveate.rewards.sets import check_tells_boxes
from foveate.rewards.telling import FEW, check_tells_apart
from foveate.types import InputError
from test_systems import QUICK


def ones(predictions: Any, targets: Any) -> Tensor:
    """The same for everything."""
    return torch.ones(len(getattr(predictions, "mask", getattr(predictions, "ids", predictions))))


def rare(predictions: Boxes, targets: Boxes) -> Tensor:
    """Something only where the class 7 is found."""
    return (predictions.mask & (predictions.labels == 7)).any(1).float()


def sure(predictions: Boxes, targets: Boxes) -> Tensor:
    """Needs what a true box has not, and is the same for most."""
    if predictions.mask.shape[1] != 5:
        raise ValueError("expected five")
    return torch.ones(len(predictions.mask))


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions above as a module of the user's."""
    module = ModuleType("mine_telling")
    for function in (ones, rare, sure):
        setattr(module, function.__name__, function)
    module.iou = iou_reward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine_telling", module)


def boxes(rows: int) -> Boxes:
    """Two in each image, of class 0."""
    places = torch.tensor([[1.0, 1, 9, 9], [4, 4, 14, 12]]).expand(rows, 2, 4)
    return Boxes(places, torch.zeros(rows, 2).long(), torch.ones(rows, 2).bool(), crowd=torch.zeros(rows, 2).bool())


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("system", ["tune-detector", "detection", "panoptic", "colorization", "sequential-detection"])
def test_a_reward_that_is_the_same_for_everything_is_refused_at_once(system: str, tmp_path: Path) -> None:
    reward = "mine_telling:ones"
    with pytest.raises(
        InputError, match=rf"^reward {reward}: is 1 for all \d+ answers.*nothing can be learned from it"
    ):
        foveate.train(system, reward=reward, steps=4, device="cpu", out=tmp_path / "run", **QUICK[system])


@pytest.mark.usefixtures("mine")
def test_a_reward_is_asked_on_until_it_tells_two_answers_apart() -> None:
    drawn, targets = torch.zeros(8), boxes(FEW)
    check_tells_boxes("mine_telling:iou", (), drawn, targets)
    with pytest.raises(InputError, match=r"^reward mine_telling:rare: is 0 for all 908 answers"):
        check_tells_boxes("mine_telling:rare", (), drawn, targets)
    targets.labels[FEW - 1, 1] = 7  # one object of the last image
    check_tells_boxes("mine_telling:rare", (), drawn, targets)
    check_tells_boxes("mine_telling:ones", (), torch.arange(8.0), targets)  # it has told answers apart already
    check_tells_boxes("mine_telling:sure", (), torch.ones(8), targets)  # it fails on what no policy has said
    check_tells_boxes("mine_telling:ones", ("mine_telling:ones",), torch.ones(8), targets)


def test_colours_of_another_picture_and_grey_are_asked_about() -> None:
    """A reward that looks at the prediction alone, and one that only knows whether it is right."""
    light, chroma = torch.zeros(60, 1, 4, 4), torch.full((60, 2, 4, 4), 0.5)
    asked = chroma, torch.zeros_like(chroma), light
    check_tells_apart(told(lambda found, light: found.flatten(1).mean(1)), "mine", torch.full((4,), 0.5), *asked)
    with pytest.raises(InputError, match=r"^reward mine: is 0\.5 for all 184 answers"):
        check_tells_apart(
            told(lambda found, light: torch.full((len(found),), 0.5)), "mine", torch.full((4,), 0.5), *asked
        )
