"""Detection by glimpses: what is decided carries a log-probability, what is taught goes to the right object."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate
from foveate import agents, noise
from foveate.cli import main
from foveate.data.detection import load_detections
from foveate.geometry import Boxes
from foveate.learn.answers import Scored
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.sequential import SequentialDetector, Walk, assigned, candidate_losses, near_objects, raster
from foveate.rewards.boxes import average_precision
from foveate.run import Run
from foveate.systems import sequential_detection
from foveate.systems.sequential_detection import WalkReward
from foveate.two_steps import tune_on_reward
from foveate.types import Decisions, InputError, map_tree
from test_detection_data import three

SIDE = 24


def detector(**settings: object) -> SequentialDetector:
    torch.manual_seed(0)
    made = SequentialDetector(SIDE, 3, 4, patch=6, scales=2, hidden=16, **settings)  # type: ignore[arg-type]
    with torch.no_grad():  # decisions that differ from each other, some of them to stop
        made.decide[2].weight.normal_()
        made.decide[2].bias.copy_(torch.tensor([0.0, 2.0, 0.0, 0.0]))
    return made.eval()


def pictures(count: int = 5) -> Tensor:
    return noise.uniform(noise.key(0, "pictures", torch.arange(count)), 3, SIDE, SIDE)


def test_following_a_walk_gives_what_was_decided_on_it() -> None:
    model, keys = detector(), noise.key(1, torch.arange(5))
    walk = model.sample(pictures(), 6, False, keys)
    decisions = model(pictures(), walk)
    torch.testing.assert_close(decisions.extras["boxes"][walk.mask], walk.boxes[walk.mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decisions.extras["scores"].sigmoid()[walk.mask], walk.scores[walk.mask])
    emitted = decisions.distribution.emit.logits.sigmoid()[walk.mask]
    drawn = walk.emitted[walk.mask].float()
    assert (emitted - drawn).mean().abs() < 0.2, "boxes are emitted about as often as the policy says"


def test_what_carries_a_log_probability() -> None:
    model, keys = detector(), noise.key(2, torch.arange(5))
    walk = model.sample(pictures(), 40, False, keys)
    emit, move = model(pictures(), walk).mask.unflatten(1, (4, 2)).unbind(2)
    assert torch.equal(emit, walk.mask), "every glimpse has a candidate to be emitted or declined"
    assert torch.equal(move[:, :-1], walk.mask[:, :-1])
    assert not move[:, -1].any(), "what is drawn after the last glimpse leads nowhere"
    lengths = walk.mask.sum(1)
    assert 1 <= int(lengths.min()) < int(lengths.max())
    stops = walk.stopped.long().cumsum(1)
    assert torch.equal(walk.mask[:, 1:], stops[:, :-1] == 0), "nothing comes after the stop"
    assert not (walk.emitted & ~walk.mask).any()


def test_given_places_are_looked_at_and_only_emission_is_decided() -> None:
    model, keys = detector(), noise.key(2, torch.arange(5))
    places = raster(4).expand(5, -1, -1)
    walk = model.sample((pictures(), places), 2, False, keys)
    assert torch.equal(walk.places, places.repeat_interleave(2, 0))
    assert walk.mask.all()
    emit, move = model((pictures(), places), walk).mask.unflatten(1, (4, 2)).unbind(2)
    assert emit.all()
    assert not move.any()
    everything = detector(emits="all")
    walk = everything.sample((pictures(), places), 1, False, keys)
    assert walk.emitted.all()
    assert not everything((pictures(), places), walk).mask.any(), "then there is nothing to learn a decision from"


def test_nothing_behind_the_stop_is_learned_from() -> None:
    model, keys = detector(), noise.key(2, torch.arange(5))
    walk = model.sample(pictures(), 8, False, keys)
    assert not walk.mask.all()
    targets = Boxes(
        torch.tensor([[[2.0, 2, 10, 10]]]).repeat(40, 1, 1), torch.zeros(40, 1).long(), torch.ones(40, 1).bool()
    )

    def gradients(walk: Walk) -> list[Tensor]:
        decisions = model(pictures(), walk)
        losses = candidate_losses(decisions.extras, walk, targets, SIDE, 12.0)
        policy = torch.where(decisions.mask, decisions.log_probs, 0.0).sum()
        return list(torch.autograd.grad(policy + sum(losses.values()), list(model.parameters())))

    padding = ~walk.mask[..., None]
    other = replace(walk, places=torch.where(padding, 0.5, walk.places), boxes=torch.where(padding, 7.0, walk.boxes))
    for mine, same in zip(gradients(walk), gradients(other), strict=True):
        torch.testing.assert_close(mine, same, atol=1e-4, rtol=1e-4)


def test_a_walk_depends_on_its_key_alone() -> None:
    model, keys = detector(), noise.key(3, torch.arange(5))
    whole = model.sample(pictures(), 2, False, keys)
    alone = model.sample(pictures()[2:3], 2, False, keys[2:3])
    part = map_tree(lambda leaf: leaf[4:6], whole)
    torch.testing.assert_close(part.places, alone.places, atol=1e-5, rtol=1e-5)
    assert torch.equal(part.emitted, alone.emitted)


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """REINFORCE on many drawn walks of one glimpse, against the derivative of Σ p(emit) · reward."""
    torch.manual_seed(0)
    model = SequentialDetector(SIDE, 3, 1, patch=6, scales=2, hidden=16).eval()
    image, place = pictures(1), torch.tensor([[[0.2, -0.3]]])
    walk = model.sample((image, place), 4000, False, noise.key(5, torch.arange(1)))
    decisions = model((image, place), walk)
    reward = torch.where(walk.emitted[:, 0], 0.7, 0.2)
    masked = torch.where(decisions.mask, decisions.log_probs, 0.0).sum(1)
    estimate = torch.autograd.grad((reward * masked).mean(), model.decide[2].bias)[0][0]
    share = float(decisions.distribution.emit.logits[0, 0].detach().sigmoid())
    assert estimate == pytest.approx(0.5 * share * (1 - share), rel=0.15)


def walk_of(places: list[list[float]], boxes: list[list[float]], emitted: list[bool], labels: list[int]) -> Walk:
    """One walk, in pixels of an image of 100."""
    count = len(places)
    flags = torch.zeros(1, count, dtype=torch.bool)
    where = torch.tensor([places]) / 50 - 1
    scores = torch.linspace(0.9, 0.5, count)[None]
    return Walk(where, torch.tensor([boxes]), torch.tensor([labels]), scores, torch.tensor([emitted]), flags, ~flags)


TRUE = Boxes(
    torch.tensor([[[0.0, 0, 20, 20], [60, 60, 90, 90], [0, 0, 99, 99]]]),
    torch.tensor([[0, 1, 2]]),
    torch.tensor([[True, True, True]]),
    crowd=torch.tensor([[False, False, True]]),
)


def test_candidates_belong_to_the_nearest_object_that_no_box_took() -> None:
    near_first = [[10.0, 10.0], [10.0, 10.0], [10.0, 10.0]]
    right, wrong = [0.0, 0, 20, 22], [30.0, 30, 50, 50]
    declined = walk_of(near_first, [right, right, right], [False, False, False], [0, 0, 0])
    assert assigned(declined, TRUE, 100)[0].tolist() == [[0, 0, 0]], "a declined box takes nothing"
    emitted = walk_of(near_first, [right, right, right], [True, False, False], [0, 0, 0])
    assert assigned(emitted, TRUE, 100)[0].tolist() == [[0, 1, 1]]
    missed = walk_of(near_first, [wrong, right, wrong], [True, True, False], [0, 0, 0])
    assert assigned(missed, TRUE, 100)[0].tolist() == [[0, 0, 1]]
    both = walk_of(near_first, [right, [60.0, 60, 90, 90], right], [True, True, True], [0, 1, 0])
    _, there = assigned(both, TRUE, 100)
    assert there.tolist() == [[True, True, False]], "crowds are nobody's, and what is found is not sought again"


def test_losses_are_none_for_a_perfect_candidate() -> None:
    walk = walk_of([[10.0, 10.0]], [[0.0, 0, 20, 20]], [True], [0])
    logits = torch.tensor([[[30.0, 0, 0]]])
    made = {"boxes": walk.boxes, "labels": logits, "scores": torch.tensor([[30.0]])}
    losses = candidate_losses(made, walk, TRUE, 100, 50.0)
    assert all(float(loss) == pytest.approx(0, abs=1e-4) for loss in losses.values())
    doubled = {**made, "scores": torch.tensor([[30.0, 30.0]]), "boxes": walk.boxes.repeat(1, 2, 1)}
    doubled["labels"] = logits.repeat(1, 2, 1)
    twice = walk_of([[10.0, 10.0]] * 2, [[0.0, 0, 20, 20]] * 2, [True, True], [0, 0])
    assert candidate_losses(doubled, twice, TRUE, 100, 50.0)["confidence_loss"] > 5, (
        "the second box at an object is none"
    )


def test_gains_sum_to_the_average_precision_and_credit_is_what_followed() -> None:
    boxes = [[0.0, 0, 20, 20], [60.0, 60, 90, 90], [0.0, 0, 20, 20], [5.0, 5, 9, 9]]
    walk = walk_of([[10.0, 10.0]] * 4, boxes, [True, True, True, False], [0, 1, 0, 0])
    worth = partial(average_precision, thresholds=(0.5,))
    output = WalkReward(worth, 0.01, 0.02, 1.0)(walk, TRUE)
    assert output.total.item() == pytest.approx(1 - 4 * 0.01 - 3 * 0.02)
    emit, move = output.credit[0].unflatten(0, (4, 2)).unbind(1)
    assert emit.tolist() == pytest.approx([0.9, 0.43, -0.04, -0.01], abs=1e-5)
    assert move.tolist() == pytest.approx([*emit.tolist()[1:], 0])
    near_sighted = WalkReward(worth, 0.01, 0.02, 0.0)(walk, TRUE).credit[0]
    assert near_sighted[::2].tolist() == pytest.approx([0.47, 0.47, -0.03, -0.01], abs=1e-5)


def test_places_to_learn_at_are_half_near_objects_and_a_raster_is_even() -> None:
    many = map_tree(lambda leaf: leaf.repeat(200, *(1,) * (leaf.ndim - 1)), TRUE)
    places = (near_objects(many, noise.key(0, torch.arange(200)), 4, 100) + 1) * 50
    inside = (places[..., None, :] >= TRUE.boxes[0, :2, :2]) & (places[..., None, :] <= TRUE.boxes[0, :2, 2:])
    assert 0.4 < inside.all(-1).any(-1).float().mean() < 0.75
    empty = replace(many, mask=torch.zeros_like(many.mask))
    assert near_objects(empty, noise.key(0, torch.arange(200)), 4, 100).abs().max() <= 1
    for count in (1, 4, 6, 8, 9):
        assert raster(count).shape == (count, 2)
        assert raster(count).mean(0).abs().max() < 0.1
        assert len(raster(count).unique(dim=0)) == count


def squares(step: int, size: int = 16) -> tuple[Tensor, Boxes]:
    """One bright square of 8 pixels in one of nine places of an image of 48."""
    cell = noise.integers(noise.key(0, "squares", step, torch.arange(size)), 9, 1)
    corner = torch.cat((cell % 3, cell // 3), 1) * 16 + 4
    place = torch.arange(48)
    inside = [(place >= corner[:, axis, None]) & (place < corner[:, axis, None] + 8) for axis in (0, 1)]
    images = (inside[1][:, :, None] & inside[0][:, None]).float()[:, None].expand(-1, 3, -1, -1)
    boxes = torch.cat((corner, corner + 8), 1).float()[:, None]
    return images, Boxes(boxes, torch.zeros(size, 1, dtype=torch.int64), torch.ones(size, 1, dtype=torch.bool))


def test_it_learns_where_to_look(tmp_path: Path) -> None:
    """Two glimpses after a first one in the middle: chosen places find more than as many anywhere, by the same eyes."""
    torch.manual_seed(0)
    model = SequentialDetector(48, 1, 3, patch=8, scales=3, hidden=32, std=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    average = MovingAverage()
    run = Run(tmp_path / "run", system="test", config={}, steps=400, device="cpu", quiet=True)
    run.track(policy=model, optimizer=optimizer, average=average)
    reward = WalkReward(partial(average_precision, thresholds=(0.3, 0.5)), 0.0, 0.0, 1.0)

    def near(step: int) -> tuple[tuple[Tensor, Tensor], Boxes]:
        images, targets = squares(step, 32)
        return (images, near_objects(targets, noise.key(0, step, torch.arange(32)), 3, 48)), targets

    def beside(made: Decisions, scored: Scored, targets: Boxes) -> dict[str, Tensor]:
        return candidate_losses(made.extras, scored.actions, targets, 48, model.reach)

    how = Tuning(1, "none", learning_rate=3e-3)
    tune_on_reward(run, "start", 1 / 3, model, reward, near, how, optimizer, average, beside=beside)
    images, targets = squares(9000, 200)
    keys = noise.key(1, torch.arange(200))
    blind = noise.uniform(keys, 3, 2) * 2 - 1
    how = Tuning(8, credit="difference", learning_rate=3e-3)
    tune_on_reward(
        run, "policy", 2 / 3, model, reward, lambda step: squares(step, 16), how, optimizer, average, beside=beside
    )
    agent, random = (
        float(reward(model.sample(inputs, 1, True, keys), targets).total.mean()) for inputs in (images, (images, blind))
    )
    assert agent > 1.2 * random
    assert random > 0.05, "the candidates were learned before"


def test_scenes_of_digits_have_boxes_around_their_ink() -> None:
    data = load_detections("digits", None, "train", 48, scenes=70, most=3)
    assert data.classes == tuple("0123456789")
    assert data.boxes.mask.sum(1).unique().tolist() == [1, 2, 3]
    single = data.boxes.mask.sum(1) == 1
    ink = (data.pixels[single, 0] > 63).float()
    left, top, right, bottom = data.boxes.boxes[single][data.boxes.mask[single]].long().unbind(1)
    for row in range(len(ink)):
        inside = ink[row, top[row] : bottom[row], left[row] : right[row]]
        assert inside.sum() == ink[row].sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    fewer = load_detections("digits", None, "train", 48, scenes=5, most=3)
    assert torch.equal(fewer.pixels, data.pixels[:5]), "a scene does not depend on how many there are"
    assert not torch.equal(load_detections("digits", None, "val", 48, scenes=5, most=3).pixels, fewer.pixels)


QUICK = {"image_size": 32, "scenes": 40, "patch": 6, "hidden": 16, "batch": 4, "samples": 2, "glimpses": 3}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> agents.Agent:
    return foveate.train(
        "sequential-detection", steps=8, out=tmp_path_factory.mktemp("walks") / "run", device="cpu", **QUICK
    )


def test_the_run_has_its_controls_curves_and_pictures(agent: agents.Agent) -> None:
    found = json.loads((agent.folder / "evaluation.json").read_text())
    assert set(found["baselines"]) == {"mle", "control", "all", "random", "raster"}
    assert found["baselines"]["raster"]["glimpses"] == 3
    assert set(found["curves"]) == {
        "map against glimpses",
        "glimpses against objects in the image",
        "boxes against objects in the image",
    }
    assert {path.suffix for path in (agent.folder / "pictures").iterdir()} == {".png", ".gif"}
    rows = [json.loads(line) for line in (agent.folder / "metrics.jsonl").open()]
    assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in rows if row["phase"] not in ("start", "control"))


def test_boxes_are_in_pixels_of_the_users_images(agent: agents.Agent) -> None:
    found = agent(noise.uniform(noise.key(0, torch.arange(2)), 3, 30, 60))
    assert found["boxes"].shape == (2, 3, 4)
    assert found["taken"][:, 0].all()
    assert not (found["mask"] & ~found["taken"]).any()
    assert found["locations"].abs().max() <= 1
    square = agent(noise.uniform(noise.key(0, torch.arange(2)), 3, 30, 60)[..., ::2])
    assert square["boxes"][..., 2].max() < found["boxes"][..., 2].max()
    with pytest.raises(InputError, match=r"^images: 1 channels, expected 3"):
        agent(torch.rand(2, 1, 30, 30))


def test_the_command_analyses_the_run(agent: agents.Agent, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", str(agent.folder), "--samples", "100", "--images", "2"]) == 0
    assert "best of" in capsys.readouterr().out


def test_pictures_of_a_user_are_walked_over(agent: agents.Agent, tmp_path: Path) -> None:
    from torchvision.utils import save_image

    save_image(noise.uniform(noise.key(0, torch.arange(1)), 3, 30, 60), tmp_path / "wide.png")
    assert [path.suffix for path in foveate.commands.show(agent.folder, tmp_path / "wide.png")] == [".png", ".gif"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_share": 1.0}, "^start_share: found 1"),
        ({"glimpses": 0}, "^glimpses: found 0, expected at least 1"),
        ({"patch": 64}, "^patch: found 64, expected 2 to the image's 32 pixels"),
        ({"std": 0.0}, "^std: found 0"),
        ({"samples": 1}, "^samples: found 1"),
        ({"data": "coco"}, "^root: not given"),
        ({"data": "numbers"}, "^data: found 'numbers', expected one of scenes, voc, coco, digits"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sequential_detection.resolve(sequential_detection.Config(**(QUICK | settings)))  # type: ignore[arg-type]


def test_bad_boxes_are_left_out_and_counted(tmp_path: Path) -> None:
    root = three(tmp_path / "set", [("cat", 4, 2, 4, 12)])
    settings = QUICK | {"data": "voc", "root": root, "image_size": 16, "batch": 2}
    with pytest.raises(InputError, match="has no area"):
        sequential_detection.resolve(sequential_detection.Config(**settings))  # type: ignore[arg-type]
    settings |= {"root": str(root), "controls": (), "skip_bad": True}
    foveate.train("sequential-detection", steps=2, device="cpu", out=tmp_path / "run", **settings)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["left_out"] == 1
