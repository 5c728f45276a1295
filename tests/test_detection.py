"""Detection by writing: it learns to find, the reward lifts what it finds, and what it finds is told in pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import foveate
from foveate import commands, noise
from foveate.cli import main
from foveate.geometry import Boxes
from foveate.models.box_tokens import EACH, RIGHT, BoxTokens, BoxWriter
from foveate.systems import detection
from foveate.types import InputError

SMALL = {"image_size": 24, "patch": 4, "objects": 1, "scenes": 300, "width": 32, "depth": 1, "most": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> commands.Agent:
    """Scenes of one object: 60 % likelihood, the rest for the reward."""
    folder = tmp_path_factory.mktemp("detection") / "run"
    return foveate.train(
        "detection", steps=420, likelihood_share=0.8, controls=(), learning_rate=3e-3, out=folder, **SMALL
    )


def rows(folder: Path, phase: str) -> list[dict[str, float]]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if row["phase"] == phase]


def test_likelihood_learns_and_the_reward_lifts_what_is_drawn(agent: commands.Agent) -> None:
    learned, tuned = rows(agent.folder, "likelihood"), rows(agent.folder, "reward")
    assert learned[-1]["negative_log_likelihood"] < learned[1]["negative_log_likelihood"] - 0.5
    early, late = (sum(row["reward"] for row in part) / len(part) for part in (tuned[:1], tuned[-2:]))
    assert late > 1.15 * early
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in tuned)
    assert tuned[-1]["confidence_loss"] < tuned[0]["confidence_loss"]


def test_boxes_are_in_pixels_of_the_users_images(agent: commands.Agent) -> None:
    images = noise.uniform(noise.key(0, torch.arange(2)), 3, 30, 60)
    found = agent(images)
    assert found["boxes"].shape[:2] == found["labels"].shape == found["scores"].shape == found["mask"].shape
    inside = found["boxes"][found["mask"]]
    assert len(inside)
    assert inside[:, 2].max() <= 60
    assert inside[:, 3].max() <= 30
    assert ((found["scores"] > 0) & (found["scores"] < 1)).all()
    with pytest.raises(InputError, match=r"^images: 1 channels, expected 3"):
        agent(images[:, :1])


def test_the_command_analyses_the_run(agent: commands.Agent, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", str(agent.folder), "--samples", "100", "--images", "2"]) == 0
    shown = capsys.readouterr().out
    assert "best of 100" in shown.replace("\n", " ") or "best of" in shown
    files = {path.name for path in (agent.folder / "analysis").iterdir()}
    assert files == {"rewards-of-answers.png", "best-of-N.png", "reward-against-metric.png"}
    assert main(["analyse", str(agent.folder), "--samples", "10"]) == 2
    assert "samples: found 10" in capsys.readouterr().err


def test_a_system_that_tunes_nothing_is_not_analysed(tmp_path: Path) -> None:
    run = foveate.train("foveating-grid", steps=2, batch=8, episodes=20, out=tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="foveating-grid is not tuned from a start"):
        commands.analyse(run.folder)


def test_a_model_that_may_not_end_fills_its_places() -> None:
    torch.manual_seed(0)
    model = BoxWriter(BoxTokens((16, 16), 2, 3, 16), 8, width=16, depth=1)
    images = noise.uniform(noise.key(0, torch.arange(4)), 3, 16, 16)
    keys = noise.key(1, torch.arange(4))
    full = model.unending().detect(images, keys)
    assert full.mask.all()
    assert full.mask.shape == (4, 3)
    assert not model.detect(images, keys, greedy=False).mask.all(), "the model itself was not changed"
    texts = model.sample(images, 2, False, keys)
    places = texts.ids[:, EACH - 1 :: EACH][texts.mask[:, EACH - 1 :: EACH]]
    assert (places == RIGHT).all(), "confidences are given, not drawn"
    decided = model(images, texts).mask
    assert not decided[:, EACH - 1 :: EACH].any()
    assert torch.equal(decided.sum(1), texts.mask.sum(1) - texts.mask[:, EACH - 1 :: EACH].sum(1))


def test_scores_are_confidences_or_the_probability_of_the_class() -> None:
    torch.manual_seed(0)
    model = BoxWriter(BoxTokens((16, 16), 2, 3, 16), 8, width=16, depth=1)
    images, keys = noise.uniform(noise.key(0, torch.arange(2)), 3, 16, 16), torch.zeros(2).long()
    by_class, by_confidence = (model.unending().detect(images, keys, score) for score in ("class", "confidence"))
    assert torch.equal(by_class.boxes, by_confidence.boxes)
    assert (by_class.scores >= 0.5 - 1e-6).all(), "of two classes the likelier"
    assert not torch.equal(by_class.scores, by_confidence.scores)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood_share": 1.0}, "^likelihood_share: found 1"),
        ({"image_size": 20, "patch": 8}, "^image_size: 20x20 pixels cannot be cut into patches of 8"),
        ({"width": 30}, "^width: found 30, expected a multiple of 8"),
        ({"samples": 1}, "^samples: found 1"),
        ({"most": 1, "objects": 4, "patch": 4}, "^most: found 1, but an image has"),
        ({"data": "coco"}, "^root: not given"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(settings: dict[str, object], message: str) -> None:
    base = {"image_size": 16, "scenes": 20, "width": 16}
    with pytest.raises(InputError, match=message):
        detection.resolve(detection.Config(**(base | settings)))  # type: ignore[arg-type]


def test_crowds_are_not_taught() -> None:
    boxes = Boxes(
        torch.tensor([[[0.0, 0, 8, 8], [4, 4, 12, 12]]]),
        torch.zeros(1, 2).long(),
        torch.ones(1, 2).bool(),
        crowd=torch.tensor([[False, True]]),
    )
    assert boxes.wanted.tolist() == [[True, False]]
