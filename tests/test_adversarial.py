"""Strokes against a fine grid, the rules of painting, a learned reward, and that painters learn."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from foveate import commands, noise
from foveate.data.classification import Images, load_images
from foveate.envs.painting import FINER, PaintingEnv, apart, shown, stroke
from foveate.envs.painting_play import painted, traced
from foveate.learn.actor_critic import actor_critic_loss
from foveate.learn.adversarial import discriminator_loss, generator_loss, gradient_penalty, telling_loss
from foveate.learn.rollout import rollout
from foveate.models.adversaries import Discriminator, ImageGenerator
from foveate.models.painter import Painter, Scribbler
from foveate.run import Run
from foveate.systems import adversarial
from foveate.types import InputError

SIDE, LIFTED, THIN, THICK = 16, 0, 64, 128  # the first action of each pen on a grid of 8
place = st.floats(-2, 18, width=32)


def pictures(count: int, side: int = SIDE, channels: int = 1) -> Images:
    pixels = (255 * noise.uniform(noise.key("pictures", torch.arange(count)), channels, side, side)).byte()
    return Images(pixels, torch.arange(count) % 3, ("a", "b", "c"), "folder", "train")


def inkiness(images: Tensor, kinds: Tensor) -> Tensor:
    """A score that depends on all of an image, and on the kind."""
    return images.flatten(1).square().mean(1) * (1 + kinds) + images[:, 0, 3, 4]


def strokes_of(env: PaintingEnv, steps: int, name: str = "strokes") -> Tensor:
    return noise.integers(noise.key(name, torch.arange(env.num_envs)), env.actions, steps)


# ---- strokes ----


@settings(max_examples=25, deadline=None)
@given(start=st.tuples(place, place), end=st.tuples(place, place), width=st.floats(0.5, 4))
def test_a_stroke_is_the_share_of_each_pixel_within_half_its_width(start: Any, end: Any, width: float) -> None:
    """Against points of a grid 12 times finer, the distance of each worked out by itself."""
    found = stroke(torch.tensor([start]), torch.tensor([end]), torch.tensor([width]), SIDE)[0].double()
    times = 12
    line = (torch.arange(FINER * SIDE * times, dtype=torch.float64) + 0.5) / (FINER * times)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    a, b = torch.tensor(start, dtype=torch.float64), torch.tensor(end, dtype=torch.float64)
    along = b - a
    part = ((points - a) @ along / along.square().sum().clamp(min=1e-12)).clamp(0, 1)
    covered = ((points - a - part[..., None] * along).norm(dim=-1) <= width / 2).double()
    expected = F.avg_pool2d(covered[None, None], times)[0, 0]
    # an edge is taken to run along or across the pixel that it cuts; it may cut it at a slant, or be a corner
    assert (found - expected).abs().max() < 0.25
    assert (found - expected).abs().mean() < 0.01
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_stroke_does_not_depend_on_its_direction_and_lies_where_it_was_drawn() -> None:
    keys = noise.key("ends", torch.arange(50))
    start, end = (16 * noise.uniform(noise.fold(keys, name), 2) for name in ("start", "end"))
    width = 0.5 + 2 * noise.uniform(noise.fold(keys, "width"))
    torch.testing.assert_close(stroke(start, end, width, SIDE), stroke(end, start, width, SIDE), atol=2e-5, rtol=0)
    across = stroke(torch.tensor([[2.0, 5.0]]), torch.tensor([[14.0, 5.0]]), torch.tensor([2.0]), SIDE)[0]
    rows, columns = (across > 0.5).nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (8, 11)  # x is to the right, y down
    assert (columns.min(), columns.max()) == (2, 29)  # its ends are round


def test_wider_pens_leave_more_ink_and_a_lifted_one_none() -> None:
    env = PaintingEnv(3, images=pictures(3), autoreset="disabled")
    env.reset(seed=0)
    env.step(torch.tensor([LIFTED + 10, THIN + 10, THICK + 10]))
    ink = env.state.canvas.sum((1, 2))
    assert ink[0] == 0
    assert 0 < ink[1] < ink[2]
    assert env.state.pen.tolist() == [10, 10, 10]
    before = env.state.canvas
    env.step(torch.tensor([LIFTED + 10] * 3))  # where it is already
    assert torch.equal(env.state.canvas, before)


def test_a_stroke_begins_where_the_pen_is_and_ends_in_the_middle_of_the_cell() -> None:
    env = PaintingEnv(1, images=pictures(3), grid=4, margin=0.0, pens=(0.1,), autoreset="disabled")
    env.reset(seed=0)
    assert env.observe(env.state)["pen"][0, 0].nonzero().tolist() == [[2, 2]]
    for action in (0, 16 + 3):  # lifted to the first cell, and down to the last of its row
        env.step(torch.tensor([action]))
    straight = stroke(torch.tensor([[2.0, 2.0]]), torch.tensor([[14.0, 2.0]]), torch.tensor([1.6]), SIDE)
    torch.testing.assert_close(env.state.canvas, straight)


def test_ink_only_grows_and_never_beyond_one() -> None:
    env = PaintingEnv(40, images=pictures(3), strokes=20, autoreset="disabled")
    env.reset(seed=0)
    for actions in strokes_of(env, 20).unbind(1):
        before = env.state.canvas
        env.step(actions)
        assert (env.state.canvas >= before).all()
        assert env.state.canvas.max() <= 1
    assert env.state.left.eq(0).all()
    assert env.state.canvas.max() == 1


# ---- rewards ----


@pytest.mark.parametrize("score", [inkiness, None])
def test_gains_sum_to_what_the_painting_is_worth_more_than_a_blank_and_so_does_the_end(score: Any) -> None:
    images = pictures(7)
    totals, blanks = {}, {}
    for credit in ("gains", "end"):
        env = PaintingEnv(20, images=images, score=score, credit=credit, autoreset="disabled")  # type: ignore[arg-type]
        env.reset(seed=4)
        blanks[credit], rewards, ends = env.state.worth.clone(), [], []
        for actions in strokes_of(env, 12).unbind(1):
            _, reward, terminated, truncated, _ = env.step(actions)
            rewards.append(reward)
            ends.append(terminated)
            assert not truncated.any()
        totals[credit] = torch.stack(rewards, 1)
        assert torch.stack(ends, 1).long().argmax(1).tolist() == [11] * 20
    final = shown(env.state.canvas)
    if score is None:
        worth = -apart(final, images.pixels[env.state.target].float() / 255)
        assert torch.equal(blanks["gains"], torch.full((20,), -1.0)) or blanks["gains"].sub(-1).abs().max() < 1e-5
    else:
        worth = inkiness(final, env.state.kind)
        assert blanks["gains"].eq(0).all()
    torch.testing.assert_close(totals["gains"].sum(1), worth - blanks["gains"])
    torch.testing.assert_close(totals["end"].sum(1), totals["gains"].sum(1))
    assert totals["end"][:, :-1].eq(0).all()
    assert totals["gains"][:, :-1].ne(0).any()


def test_a_score_needs_no_data_and_an_example_is_a_kind() -> None:
    env = PaintingEnv(4, score=inkiness, kinds=5, data="folder", root="nowhere", autoreset="disabled")
    seen, _ = env.reset(options={"ids": torch.tensor([4, 0, 2, 2])})
    assert "target" not in seen
    assert seen["kind"].argmax(1).tolist() == [4, 0, 2, 2]
    assert env.examples == 5


def test_tracing_copies_better_than_scribbling_and_what_is_blank_stays_blank() -> None:
    digits = load_images("digits", None, "val", SIDE)
    env = PaintingEnv(12, score=inkiness, kinds=10, autoreset="disabled")
    targets = digits.pixels[::42][:12].float() / 255
    images = traced(env, torch.cat((targets, torch.zeros(1, 1, SIDE, SIDE))))
    assert apart(images[:12], targets).mean() < 0.35
    assert images[12].sum() == 0
    keys = noise.key(0, torch.arange(12))
    scribbled, strokes = painted(env, Scribbler(env.actions), torch.arange(12) % 10, keys)
    assert apart(scribbled, targets).mean() > 1
    assert strokes.shape == (12, 12)
    torch.testing.assert_close(shown(env.played(torch.arange(12) % 10, strokes)[-1].canvas), scribbled)


# ---- a learned reward ----


def test_the_discriminators_loss_is_the_cross_entropy_and_the_penalty_the_norm_of_its_gradient() -> None:
    real, made = noise.normal(noise.key("scores", torch.arange(2)), 30)
    theirs = F.binary_cross_entropy_with_logits
    expected = theirs(real, torch.ones(30)) + theirs(made, torch.zeros(30))
    torch.testing.assert_close(discriminator_loss(real, made), expected)
    torch.testing.assert_close(generator_loss(made), theirs(made, torch.ones(30)))
    linear = nn.Linear(12, 1)
    samples = noise.normal(noise.key("samples"), 5, 3, 4).requires_grad_()
    penalty = gradient_penalty(linear(samples.flatten(1)).squeeze(1), samples)
    torch.testing.assert_close(penalty, linear.weight.square().sum())
    (slope,) = torch.autograd.grad(penalty, linear.weight)  # it can be learned from
    torch.testing.assert_close(slope, 2 * linear.weight)


def test_telling_flows_into_the_discriminator_alone() -> None:
    discriminator, kinds = Discriminator(8, 3, width=4, hidden=8), torch.tensor([0, 2])
    made = noise.uniform(noise.key("made"), 2, 1, 8, 8).requires_grad_()
    loss, told = telling_loss(discriminator, torch.zeros(2, 1, 8, 8), made, kinds, 2.0)
    loss.backward()
    assert made.grad is None
    assert all(each.grad is not None for each in discriminator.parameters())
    torch.testing.assert_close(loss.detach(), told["discriminator_loss"] + told["gradient_penalty"])


def test_a_discriminator_scores_every_kind_as_it_scores_one_and_has_a_unit() -> None:
    discriminator = Discriminator(SIDE, 4)
    images = noise.uniform(noise.key("images", torch.arange(3)), 1, SIDE, SIDE)
    every = discriminator.every(images)
    for kind in range(4):
        torch.testing.assert_close(every[:, kind], discriminator(images, torch.full((3,), kind)))
    assert every.std(1).min() > 0
    for _ in range(600):  # until the start is forgotten
        discriminator.notice(every.mean().detach(), every.T.flatten().std().detach())
    rewards = torch.cat([discriminator.reward(images, torch.full((3,), kind)) for kind in range(4)])
    assert rewards.mean().abs() < 0.01
    assert rewards.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("side", [16, 28])
def test_painter_and_generator_are_of_like_size(side: int) -> None:
    painter, generator = Painter(side, 8, 3, 10), ImageGenerator(side, 10)
    weights = [sum(each.numel() for each in model.parameters()) for model in (painter, generator)]
    assert 0.7 < weights[0] / weights[1] < 1.4
    images = generator(torch.tensor([3, 3, 1]), noise.key(0, torch.tensor([5, 6, 5])))
    assert images.shape == (3, 1, side, side)
    alone = generator(torch.tensor([1]), noise.key(0, torch.tensor([5])))
    torch.testing.assert_close(images[2:], alone, atol=1e-5, rtol=0)  # each image depends on its row alone
    assert (images[0] - images[1]).abs().max() > 1e-3


# ---- that painters learn ----


def learn_to_paint(env: PaintingEnv, painter: Painter, updates: int, ids: int) -> tuple[float, float]:
    """Mean return of the first ten updates and of the last."""
    optimizer, returns = torch.optim.Adam(painter.parameters(), 3e-3), []
    for update in range(updates):
        keys = noise.key("learn", update, torch.arange(env.num_envs))
        trajectory, decisions = rollout(env, painter, keys, ids=torch.arange(env.num_envs) % ids, grad=True)
        assert decisions is not None
        loss, _ = actor_critic_loss(trajectory, decisions, 1.0, 0.95, 0.01, 0.5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimizer.step()
        returns.append(float(trajectory.rewards.sum(1).mean()))
    return sum(returns[:10]) / 10, sum(returns[-10:]) / 10


def test_a_painter_learns_to_copy_a_digit() -> None:
    """From the environment's own reward: a scribble is farther from a 7 than nothing, its copy much nearer."""
    digits = load_images("digits", None, "train", SIDE)
    seven = (digits.labels == 7).nonzero()[3]
    one = Images(digits.pixels[seven], digits.labels[seven], digits.classes, "digits", "train")
    env = PaintingEnv(32, images=one, strokes=6, autoreset="disabled")
    torch.manual_seed(0)
    first, last = learn_to_paint(env, Painter(SIDE, 8, 3, 10, copies=True), 110, 1)
    assert first < 0
    assert last > 0.3


def test_a_painter_learns_from_a_discriminators_score_alone() -> None:
    """One that has learned to tell scribbles from ones and sevens, and then stands still."""
    digits = load_images("digits", None, "train", SIDE)
    chosen = (digits.labels == 1) | (digits.labels == 7)
    real, kinds = digits.pixels[chosen].float() / 255, (digits.labels[chosen] == 7).long()
    torch.manual_seed(0)
    discriminator = Discriminator(SIDE, 2, width=16, hidden=64)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    env = PaintingEnv(32, score=discriminator.reward, kinds=2, strokes=6, autoreset="disabled")
    painter = Painter(SIDE, 8, 3, 2)
    for update in range(60):
        rows = noise.examples(0, update, 32, len(real))
        made, _ = painted(env, painter, kinds[rows], noise.key("tell", update, torch.arange(32)))
        optimizer.zero_grad()
        loss, told = telling_loss(discriminator, real[rows], made, kinds[rows], 1.0)
        loss.backward()
        optimizer.step()
        discriminator.notice((told["real"] + told["made"]) / 2, told["deviation"])
    assert told["discriminator_loss"] < 1.0
    before = discriminator.reward(made, kinds[rows]).mean()
    _, last = learn_to_paint(env, painter, 90, 2)
    after, _ = painted(env, painter, kinds[rows], noise.key("after", torch.arange(32)))
    reached = discriminator.reward(after, kinds[rows]).mean()
    there = discriminator.reward(real[rows], kinds[rows]).mean()
    assert reached > before + 0.5 * (there - before)
    assert last > 0


def test_a_run_shows_how_its_paintings_come_about(tmp_path: Path) -> None:
    """A frame a stroke after the empty canvas, and the same as a row a class."""
    config = adversarial.resolve(adversarial.Config(strokes=3, batch=4, steps=3, looks=10))
    run = Run(tmp_path / "run", system="adversarial", config=asdict(config), steps=3, device="cpu", quiet=True)
    adversarial.train(config, run)
    policy = adversarial.build(config)
    assert run.restore(adversarial.PART, policy)
    drawn = adversarial.picture(config, policy, run)
    assert set(drawn) == {"paintings", "step by step", "painting"}
    assert len(drawn["painting"]) == 1 + config.strokes
    assert len({frame.size for frame in drawn["painting"]}) == 1
    assert drawn["painting"][0].tobytes() != drawn["painting"][-1].tobytes()
    files = commands._save_pictures(tmp_path / "pictures", drawn)
    with Image.open(files["painting"]) as moving:
        assert moving.format == "GIF"
        assert moving.n_frames == 1 + config.strokes
    with Image.open(files["step by step"]) as steps:
        assert steps.size[1] > steps.size[0] / 2, "ten classes below each other"


# ---- what a user may do wrong ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": 0}, "grid: found 0, expected at least 1"),
        ({"grid": 17}, "grid: found 17 cells a side, expected at most the 16 pixels"),
        ({"strokes": 0}, "strokes: found 0, expected at least 1"),
        ({"pens": ()}, "pens: found 0, expected at least 1"),
        ({"pens": (0.1, 0.0)}, "pens: found a width of 0, expected more than 0"),
        ({"margin": 0.5}, "margin: found 0.5, expected 0 to less than 0.5"),
        ({"image_size": 18}, "image_size: found 18, expected a multiple of 4"),
        ({"image_size": 0}, "image_size: found 0"),
        ({"looks": 0}, "looks: found 0"),
        ({"batch": 0}, "batch: found 0"),
        ({"judge_share": 1.0}, "judge_share: found 1, expected"),
        ({"penalty": -1.0}, "penalty: found -1, expected 0"),
        ({"data": "folder", "root": Path("nowhere")}, "nowhere: does not exist"),
        ({"data": "digit"}, "data: no 'digit'"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adversarial.resolve(adversarial.Config(**fields))


def test_coloured_pictures_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0))):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{number}.png")
    with pytest.raises(InputError, match=r"3 channels, but strokes are grey: .*convert\('L'\)"):
        adversarial.resolve(adversarial.Config(data="folder", root=tmp_path))
    with pytest.raises(InputError, match="3 channels"):
        PaintingEnv(2, images=pictures(3, channels=3))


def test_a_score_of_another_shape_is_refused() -> None:
    env = PaintingEnv(2, score=lambda images, kinds: images.mean((2, 3)), kinds=3)
    with pytest.raises(InputError, match=r"score: found \[2, 1\] of 2 images, expected a number each: \[2\]"):
        env.reset(seed=0)


def test_pictures_of_another_size_are_refused() -> None:
    config = adversarial.Config(classes=("a", "b"))
    policy = adversarial.build(config)
    with pytest.raises(InputError, match=r"images: \[1, 20, 20\] .*trained on \[1, 16, 16\]"):
        adversarial.predict(config, policy, torch.zeros(2, 1, 20, 20))
    found = adversarial.predict(config, policy, noise.uniform(noise.key("given"), 3, 1, 16, 16))
    assert found["scores"].shape == (3, 2)
    assert torch.equal(found["kinds"], found["scores"].argmax(1))
    assert found["paintings"].shape == (3, 1, 16, 16)
    assert found["strokes"].shape == (3, 12)
