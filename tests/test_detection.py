"""Detection by writing: it learns, the reward lifts what it finds, and what it finds is told in pixels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate
from foveate import agents, commands, noise
from foveate.cli import main
from foveate.geometry import Boxes
from foveate.learn.answers import frozen, likelihood_loss
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.box_tokens import EACH, RIGHT, BoxTokens, BoxWriter
from foveate.rewards.boxes import iou_reward
from foveate.run import Run
from foveate.systems import detection
from foveate.two_steps import tune_on_reward
from foveate.types import InputError, concatenate, map_tree
from test_detection_data import GOOD, three

SMALL = {"image_size": 24, "patch": 4, "objects": 1, "scenes": 300, "width": 32, "depth": 1, "most": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> agents.Agent:
    """Scenes of one object, for some seconds."""
    folder = tmp_path_factory.mktemp("detection") / "run"
    return foveate.train(
        "detection", steps=120, likelihood_share=0.5, controls=(), learning_rate=3e-3, out=folder, **SMALL
    )


def rows(folder: Path, phase: str) -> list[dict[str, float]]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if row["phase"] == phase]


def test_likelihood_and_confidence_are_learned(agent: agents.Agent) -> None:
    learned, tuned = rows(agent.folder, "likelihood"), rows(agent.folder, "reward")
    assert learned[-1]["negative_log_likelihood"] < learned[0]["negative_log_likelihood"] - 0.3
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in tuned)
    assert tuned[-1]["confidence_loss"] < tuned[0]["confidence_loss"]


def squares(step: int, size: int = 32) -> tuple[Tensor, Boxes]:
    """A white square of 4 pixels somewhere on a grid of 4×4 in an image of 16."""
    cell = noise.integers(noise.key(0, "squares", step, torch.arange(size)), 16, 1)
    corner = torch.cat((cell % 4, cell // 4), 1) * 4
    place = torch.arange(16)
    inside = [(place >= corner[:, axis, None]) & (place < corner[:, axis, None] + 4) for axis in (0, 1)]
    images = (inside[1][:, :, None] & inside[0][:, None]).float()[:, None].expand(-1, 3, -1, -1)
    boxes = torch.cat((corner, corner + 4), 1).float()[:, None]
    return images, Boxes(boxes, torch.zeros(size, 1, dtype=torch.int64), torch.ones(size, 1, dtype=torch.bool))


def test_the_reward_lifts_what_likelihood_left(tmp_path: Path) -> None:
    """Drawn answers find more after a minute's worth of reward; the anchor's reference is what likelihood left."""
    torch.manual_seed(0)
    model = BoxWriter(BoxTokens((16, 16), 1, 1, 16), 4, width=32, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(90):
        images, boxes = squares(step)
        likelihood_loss(model(images, model.code.encode(boxes))).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = Run(tmp_path / "run", system="test", config={}, steps=60, device="cpu", quiet=True)
    policy, start, average = model, frozen(model), MovingAverage()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    run.track(policy=policy, start=start, optimizer=optimizer, average=average)
    how = Tuning(samples=8, learning_rate=1e-3)
    batches = lambda step: squares(1000 + step, 16)  # noqa: E731
    tune_on_reward(run, "reward", 1.0, policy, iou_reward, batches, how, optimizer, average, start)
    images, boxes = squares(5000, 200)
    before, after = (
        iou_reward(each.decode(each.sample(images, 1, False, noise.key(1, torch.arange(200)))), boxes).total.mean()
        for each in (start, policy)
    )
    assert after > 1.3 * before
    assert 0.05 < before < 0.5, "something was learned, and something was left"


def test_boxes_are_in_pixels_of_the_users_images(agent: agents.Agent) -> None:
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


def test_the_command_analyses_the_run(agent: agents.Agent, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_scores_are_confidences_the_probability_of_the_class_or_both() -> None:
    torch.manual_seed(0)
    model = BoxWriter(BoxTokens((16, 16), 2, 3, 16), 8, width=16, depth=1)
    images, keys = noise.uniform(noise.key(0, torch.arange(2)), 3, 16, 16), torch.zeros(2).long()
    by_class, by_confidence = model.unending().scored(images, keys)
    assert torch.equal(by_class.boxes, by_confidence.boxes)
    assert (by_class.scores >= 0.5 - 1e-6).all(), "of two classes the likelier"
    assert not torch.equal(by_class.scores, by_confidence.scores)
    found = {}
    for trust in (0.0, 0.5, 1.0):
        model.trust.fill_(trust)
        found[trust] = model.unending().detect(images, keys).scores
    torch.testing.assert_close(found[0.0], by_class.scores)
    torch.testing.assert_close(found[0.5], by_class.scores * by_confidence.scores.sqrt())
    torch.testing.assert_close(found[1.0], by_class.scores * by_confidence.scores)


class Told(BoxWriter):
    """Finds the true boxes of some data, and as many wrong ones; their class says nothing, their confidence all."""

    def __init__(self, truth: Boxes, right: float, wrong: float) -> None:
        super().__init__(BoxTokens((16, 16), 6, 3, 16), 8, width=16, depth=1)
        self.truth, self.right, self.wrong, self.seen = truth, right, wrong, 0

    def scored(self, images: Tensor, keys: Tensor, greedy: bool = True) -> tuple[Boxes, Boxes]:
        here = slice(self.seen, self.seen + len(images))
        self.seen = here.stop
        truth = map_tree(lambda leaf: leaf[here], replace(self.truth, crowd=None, scores=None))
        both = concatenate([truth, replace(truth, boxes=truth.boxes + 50)], 1)
        half = torch.full(both.mask.shape, 0.5)
        sure = torch.cat([torch.full(truth.mask.shape, value) for value in (self.right, self.wrong)], 1)
        return replace(both, scores=half), replace(both, scores=sure)


def test_the_confidence_is_trusted_where_it_ranks_better(agent: agents.Agent) -> None:
    data = detection._data(detection.Config(**{**vars(agent.config)}), "val")
    run = Run.open(agent.folder, "cpu")
    good, bad = Told(data.boxes, 0.9, 0.1), Told(data.boxes, 0.1, 0.9)
    known, misled = (detection._score(agent.config, each, data, run, detection.TRUSTS)["map"] for each in (good, bad))
    assert float(good.trust) > 0
    assert float(bad.trust) == 0
    assert known == pytest.approx(1)
    assert misled < known


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


def test_more_boxes_than_can_be_written_are_evaluated_without_a_ceiling(tmp_path: Path) -> None:
    """Crowds are never written, so they do not count; a test picture may have more boxes than a text has room for."""
    root = three(tmp_path / "set", GOOD)
    crowded, many = (root / "Annotations" / f"{name}.xml" for name in ("b", "e"))
    crowded.write_text(crowded.read_text().replace("</name>", "</name><difficult>1</difficult>", 1))
    for name in ("a", "c"):  # one box each
        path = root / "Annotations" / f"{name}.xml"
        path.write_text(re.sub("<object><name>dog.*?</object>", "", path.read_text()))
    settings = {"data": "voc", "root": str(root), "image_size": 16, "width": 16, "depth": 1, "batch": 2}
    settings |= {"tuning_batch": 2, "samples": 2, "controls": (), "steps": 2, "device": "cpu"}

    def baselines(most: int) -> set[str]:
        run = foveate.train("detection", most=most, out=tmp_path / str(most), **settings)
        return set(json.loads((run.folder / "evaluation.json").read_text())["baselines"])

    assert "<name>dog" in many.read_text(), "the test picture has two"
    assert "ceiling" in baselines(2)
    assert baselines(1) == {"mle", "mle unending"}


def test_pictures_left_out_are_counted_in_the_report(tmp_path: Path) -> None:
    root = three(tmp_path / "set", [("cat", 4, 2, 4, 12)])
    settings = {"data": "voc", "root": root, "image_size": 16, "width": 16, "depth": 1, "most": 3, "batch": 2}
    with pytest.raises(InputError, match="has no area"):
        detection.resolve(detection.Config(**settings))  # type: ignore[arg-type]
    settings |= {"root": str(root), "tuning_batch": 2, "controls": (), "skip_bad": True}
    foveate.train("detection", steps=2, device="cpu", out=tmp_path / "run", **settings)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["left_out"] == 1
