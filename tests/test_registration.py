"""Registration: points and pixels move alike, pairs are what they say, walks learn, and files are read strictly."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import foveate
from foveate import noise
from foveate.data.pairs import CANVAS, Pairs, Spread, displaced, load_pairs
from foveate.data.registration_files import letterbox, read_pictures_of_pairs
from foveate.data.similarity import apply, compose, edge_colors, fitted, inverse, matrices, parameters_of, warp
from foveate.distributions import Categorical
from foveate.envs.registration import AT_ONCE, MOVES, STEPS, RegistrationEnv
from foveate.envs.registration_walks import SOFT, Expert, expert_loss, steps, walk
from foveate.models.mutual_information import by_mutual_information
from foveate.models.registration import ConvLSTMCell, PairEyes, Recall, RegistrationPolicy
from foveate.run import Run
from foveate.run.processes import shared
from foveate.systems import registration
from foveate.types import Decisions, InputError, map_tree

SIDE = 32


def drawn(count: int = 16, name: str = "any") -> Tensor:
    return Spread().draw(noise.key(name, torch.arange(count)), SIDE)


def spots(points: Tensor, side: int = SIDE) -> Tensor:
    """Pictures with a soft white spot at each point."""
    y, x = torch.meshgrid(*[torch.arange(side) + 0.5] * 2, indexing="ij")
    away = (x - points[..., 0, None, None]).square() + (y - points[..., 1, None, None]).square()
    return torch.exp(-away / 8).amax(1)[:, None].expand(-1, 3, -1, -1)


# ---- transforms ----


def test_parameters_are_pixels_degrees_and_the_logarithm_of_the_scale_about_the_centre() -> None:
    parameters = torch.tensor([[3.0, -2, 0, 0], [0, 0, 90, 0], [1, 0, 0, math.log(2)]])
    points = torch.tensor([[[16.0, 16], [20, 16]]]).expand(3, -1, -1)
    expected = torch.tensor([[[19.0, 14], [23, 14]], [[16, 16], [16, 20]], [[17, 16], [25, 16]]])
    torch.testing.assert_close(apply(matrices(parameters, SIDE), points), expected)


def test_parameters_are_read_back_from_the_matrix() -> None:
    torch.testing.assert_close(parameters_of(matrices(drawn(), SIDE), SIDE), drawn(), atol=1e-4, rtol=1e-4)


def test_composition_and_inverse_are_those_of_the_maps() -> None:
    one, other = matrices(drawn(), SIDE), matrices(drawn(name="other"), SIDE)
    points = noise.uniform(noise.key("points", torch.arange(16)), 5, 2) * SIDE
    torch.testing.assert_close(apply(compose(other, one), points), apply(other, apply(one, points)), atol=1e-3, rtol=0)
    torch.testing.assert_close(apply(inverse(one), apply(one, points)), points, atol=1e-3, rtol=0)


def test_the_fit_is_that_of_scikit_image_and_does_not_look_at_padding() -> None:
    transform = pytest.importorskip("skimage.transform")
    points = noise.uniform(noise.key("points", torch.arange(8)), 6, 2) * SIDE
    others = apply(matrices(drawn(8), SIDE), points) + noise.normal(noise.key("apart", torch.arange(8)), 6, 2)
    mask = torch.arange(6) < torch.tensor([2, 3, 4, 5, 6, 6, 6, 6])[:, None]
    ours = fitted(points, torch.where(mask[..., None], others, 1e3), mask)
    for row in range(8):
        theirs = transform.SimilarityTransform.from_estimate(
            points[row][mask[row]].numpy(), others[row][mask[row]].numpy()
        )
        np.testing.assert_allclose(ours[row].numpy(), theirs.params[:2], atol=1e-3)


def test_landmarks_and_pixels_move_alike() -> None:
    """`grid_sample` wants the inverse of the map of points: a spot must come to lie where its point does."""
    points = torch.tensor([[[12.0, 14.0]]]).expand(16, -1, -1)
    matrix = matrices(drawn() * torch.tensor([0.7, 0.7, 2, 1]), SIDE)
    expected = apply(matrix, points)
    moved = warp(spots(points), matrix)[:, 0]
    y, x = torch.meshgrid(*[torch.arange(SIDE) + 0.5] * 2, indexing="ij")
    weight = moved.pow(2) / moved.pow(2).sum((1, 2), keepdim=True)
    found = torch.stack(((weight * x).sum((1, 2)), (weight * y).sum((1, 2))), -1)
    inside = ((expected[:, 0] > 4) & (expected[:, 0] < SIDE - 4)).all(-1)
    assert inside.sum() > 8
    torch.testing.assert_close(found[inside], expected[inside, 0], atol=0.1, rtol=0)


def test_nothing_done_changes_no_pixel_and_what_was_cut_off_stays_so() -> None:
    images = noise.uniform(noise.key("image", torch.arange(2)), 3, SIDE, SIDE)
    still = torch.eye(2, 3).expand(2, 2, 3)
    torch.testing.assert_close(warp(images, still), images, atol=1e-5, rtol=0)
    right = matrices(torch.tensor([[8.0, 0, 0, 0]]).expand(2, -1), SIDE)
    back = warp(images, still, frame=right)  # came from further left, was cut off there, and has been brought back
    torch.testing.assert_close(back[..., 8:], images[..., 8:], atol=1e-5, rtol=0)
    assert (back[..., :8] == back[..., :1, :1]).all()


def test_warping_is_what_its_formulas_written_out_are() -> None:
    """Each pixel of the result asks the inverse where it comes from; beyond the edge stands its median."""
    images, size = noise.uniform(noise.key("image", torch.arange(40)), 3, 24, 40), (SIDE, 28)
    matrix, frame = matrices(drawn(40), SIDE), matrices(drawn(40, "frame"), SIDE)
    x, y = torch.meshgrid(*(torch.arange(count) + 0.5 for count in size[::-1]), indexing="xy")
    pixels = torch.stack((x, y), -1).view(1, -1, 2).expand(40, -1, -1)
    places = apply(inverse(matrix), pixels) / torch.tensor([40, 24]) * 2 - 1
    edge = torch.cat((images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]), 2)
    ground = edge.median(2).values
    lies = ground[..., None, None]
    seen = F.grid_sample(images - lies, places.view(40, *size, 2), align_corners=False)
    torch.testing.assert_close(warp(images, matrix, size), (seen + lies).clamp(0, 1), atol=1e-4, rtol=0)
    before = apply(inverse(frame), pixels)
    inside = ((before >= 0) & (before <= torch.tensor([28, SIDE]))).all(-1).view(40, 1, *size)
    found = warp(images, matrix, size, frame, edge_colors(images))
    torch.testing.assert_close(found, (seen * inside + lies).clamp(0, 1), atol=1e-4, rtol=0)


def test_what_is_seen_of_many_pairs_at_once_is_what_is_seen_of_few() -> None:
    env = RegistrationEnv(1, image_size=SIDE, count=8)
    ids = torch.arange(AT_ONCE + 3) % 8
    state = env.scattered(ids, noise.key("place", ids))
    whole = env.observe(state)
    assert torch.equal(whole["fixed"], env.fixed[ids].float() / 255)
    for rows in (torch.tensor([0]), torch.arange(AT_ONCE - 1, AT_ONCE + 3)):
        few = env.observe(state.rows(rows))
        torch.testing.assert_close({name: leaf[rows] for name, leaf in whole.items()}, few, atol=1e-4, rtol=0)


# ---- pairs ----


@pytest.mark.parametrize("name", ["scenes", "photographs", "digits"])
def test_rendered_pairs_are_the_same_things_in_another_contrast(name: str) -> None:
    pairs = load_pairs(name, None, "train", SIDE, 6)
    size, rest = (SIDE, SIDE), torch.eye(2, 3).expand(6, 2, 3)
    assert pairs.moving.shape[-1] == CANVAS * SIDE
    there = warp(pairs.moving.float() / 255, pairs.aligned(), size)
    fixed = pairs.fixed.float() / 255
    assert (there - fixed).abs().mean() > 0.1, "another contrast"
    away = warp(pairs.moving.float() / 255, compose(matrices(drawn(6) * 0 + 5, SIDE), pairs.aligned()), size)
    assert related(fixed, there).mean() > related(fixed, away).mean() + 0.1, "but the same things"
    assert pairs.errors(pairs.aligned()).max() < 1e-3
    assert pairs.errors(rest).min() > 1


def related(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the strengths of edges."""
    grey = [image.mean(1) for image in (one, other)]
    edges = [(g.diff(dim=1)[:, :, 1:].square() + g.diff(dim=2)[:, 1:].square()).sqrt().flatten(1) for g in grey]
    return torch.stack([torch.corrcoef(torch.stack(both))[0, 1] for both in zip(*edges, strict=True)])


def test_held_out_pairs_are_displaced_once_with_their_landmarks() -> None:
    test = load_pairs("scenes", None, "test", SIDE, 12)
    assert torch.equal(test.moving, load_pairs("scenes", None, "test", SIDE, 12).moving)
    assert not torch.equal(test.fixed, load_pairs("scenes", None, "val", SIDE, 12).fixed)
    assert test.moving.shape == test.fixed.shape
    before, after = test.errors(torch.eye(2, 3).expand(12, 2, 3)), test.errors(test.aligned())
    assert before.mean() > 4
    assert before.max() < 0.5 * SIDE
    assert after.max() < 1e-3
    fixed, moved = test.fixed.float() / 255, warp(test.moving.float() / 255, test.aligned())
    assert related(fixed, moved).mean() > related(fixed, test.moving.float() / 255).mean() + 0.1


def test_the_displacement_is_undone_by_the_truth() -> None:
    env = RegistrationEnv(32, image_size=SIDE, count=8)
    env.reset(seed=0)
    assert env.errors(env.state).mean() > 4
    there = replace(env.state, transform=env.state.truth)
    assert env.errors(there).max() < 1e-3
    near, far = (env.observe(state) for state in (there, env.state))
    assert related(near["fixed"], near["moving"]).mean() > related(far["fixed"], far["moving"]).mean() + 0.1


# ---- the environment ----


def small(**options: Any) -> RegistrationEnv:
    env = RegistrationEnv(8, image_size=SIDE, count=8, autoreset="disabled", **options)
    env.reset(seed=0)
    return env


def test_actions_add_one_step_to_one_number() -> None:
    env, none = small(), torch.zeros(8).long()
    for place, (name, sign) in enumerate(zip(MOVES, (1, -1) * 4, strict=True)):
        after, _, _ = env.transition(env.state, torch.full((8,), place), none)
        expected = torch.zeros(8, 4)
        expected[:, place // 2] = sign * STEPS[place // 2]
        assert torch.equal(after.transform, expected), name
    assert MOVES[:3] == ("right", "left", "down")
    state = env.state
    for action in noise.integers(noise.key("actions", torch.arange(300)), len(MOVES)):
        state, _, _ = env.transition(state, action.expand(8), none)
    expected = apply(matrices(state.transform, SIDE), apply(env.total(env.state), env.points[state.pair]))
    torch.testing.assert_close(apply(env.total(state), env.points[state.pair]), expected, atol=1e-3, rtol=0)


def test_the_picture_as_seen_is_the_given_one_moved_once() -> None:
    """Train sees moving pictures as they are cut off; a user's are cut off already. Both must look the same."""
    env = small(reached=0.0)
    given = displaced_as(env)
    plain = RegistrationEnv(8, pairs=given, reached=0.0)
    plain.reset(seed=0, options={"ids": torch.arange(8)})
    torch.testing.assert_close(
        env.observe(env.state)["moving"], plain.observe(plain.state)["moving"], atol=0.01, rtol=0
    )
    moves = torch.tensor([0, 2, 4, 6] * 2)
    for _ in range(5):
        env.step(moves)
        plain.step(moves)
    torch.testing.assert_close(env.errors(env.state), plain.errors(plain.state), atol=1e-3, rtol=0)
    apart = (env.observe(env.state)["moving"] - plain.observe(plain.state)["moving"]).abs()
    assert apart.mean() < 0.02
    assert torch.equal(plain.state.transform, env.state.transform)


def displaced_as(env: RegistrationEnv) -> Pairs:
    """The pairs that an environment shows now, as files would hold them."""
    total, pair = env.total(env.state), env.state.pair
    pixels = (255 * env.observe(env.state)["moving"]).round().byte()
    return Pairs(env.fixed[pair], pixels, env.targets[pair], apply(total, env.points[pair]), env.mask[pair])


@pytest.mark.parametrize("reward", ["landmarks", "transform"])
def test_the_reward_is_minus_the_distance_and_a_bonus_where_it_ends(reward: Any) -> None:
    env = small(reward=reward, reached=3.0, bonus=7.0)
    none = torch.zeros(8).long()
    _, far, ended = env.transition(env.state, none, none)
    moved = replace(env.state, transform=env.moved_by(env.state.transform, none))
    torch.testing.assert_close(far, -env.distance(moved) * 2 / SIDE + 7 * ended)
    _, near, ended = env.transition(replace(env.state, transform=env.state.truth), none, none)
    assert ended.all()
    assert (near > 7 - 3 * 2 / SIDE).all()
    steps_left = (env.state.truth / torch.tensor(STEPS)).norm(dim=1)
    expected = steps_left if reward == "transform" else env.errors(env.state)
    torch.testing.assert_close(env.distance(env.state), expected)


def test_gains_are_what_each_move_takes_away_and_following_them_registers() -> None:
    env = small(reward="transform", reached=0.0, horizon=None)
    for action in range(len(MOVES)):
        after, _, _ = env.transition(env.state, torch.full((8,), action), torch.zeros(8).long())
        torch.testing.assert_close(
            env.gains(env.state)[:, action], env.distance(env.state) - env.distance(after), atol=1e-4, rtol=0
        )
    for _ in range(45):
        env.step(env.gains(env.state).argmax(1))
    assert env.errors(env.state).max() < 2


def test_the_expert_notes_before_each_step_and_its_loss_is_least_where_it_is_followed() -> None:
    env = small()
    expert, noted = Expert(env), []
    for _ in range(3):
        noted.append(env.gains(env.state))
        expert.advance(noted[-1].argmax(1))
    gains, left = expert.told()
    assert torch.equal(gains, torch.stack(noted, 1))

    def loss(logits: Tensor, told: Tensor, mask: Tensor | None = None) -> Tensor:
        return expert_loss(gains, left, Decisions(Categorical(logits), extras={"left": told}), mask)

    least = loss(gains / SOFT, left)
    assert least < loss(gains * 0, left)
    assert least < loss(gains / SOFT * 3, left)
    assert least < loss(gains / SOFT, left * 0.9)
    mask = torch.tensor([True, False, True]).expand(8, -1)
    wrong = torch.where(mask[..., None], left, left + 5)
    torch.testing.assert_close(loss(gains * 0, wrong, mask), torch.tensor(math.log(8)))
    assert expert.waiting is env.waiting


def test_a_copy_is_numbers_of_the_pair_and_eight_more() -> None:
    env = small()
    sizes: list[int] = []
    map_tree(lambda leaf: (sizes.append(leaf[0].numel()), leaf)[1], env.state)
    assert sizes == [1, 4, 4]


def test_the_picture_is_a_checkerboard_of_both() -> None:
    env = small()
    picture, seen = env.draw(env.state), env.observe(env.state)
    torch.testing.assert_close(picture[:, 1, 1].float() / 255, seen["fixed"][:, :, 1, 1], atol=0.01, rtol=0)
    torch.testing.assert_close(picture[:, 1, 8].float() / 255, seen["moving"][:, :, 1, 8], atol=0.01, rtol=0)


# ---- the network ----


def test_eyes_see_where_pictures_are_alike_whatever_the_contrast_is_scaled_by() -> None:
    eyes = PairEyes(64, 16).eval()
    pictures = noise.uniform(noise.key("eyes", torch.arange(2)), 3, 64, 64)
    shifted = pictures.roll(16, 3)
    assert torch.allclose(eyes(pictures, shifted), eyes(pictures, 0.6 * shifted + 0.2), atol=0.05)
    seen = {}
    eyes.join = torch.nn.Identity()
    alike = eyes(pictures, shifted)
    assert alike.shape == (2, 121, 8, 8)
    seen = alike[:, :, 3, 3].argmax(1)
    assert (seen == 5 * 11 + 7).all(), "two places to the right of where it was"


def test_a_walk_at_once_is_a_walk_step_by_step() -> None:
    torch.manual_seed(0)
    policy = RegistrationPolicy(SIDE, len(MOVES), width=8)
    pictures = noise.uniform(noise.key("pictures", torch.arange(2)), 2, 5, 3, SIDE, SIDE).unbind(1)
    seen = dict(zip(("fixed", "moving"), pictures, strict=True))
    starts = torch.tensor([[True, False, False, True, False], [True, False, False, False, False]])
    whole, last = policy(seen, None, starts)
    state, rows = None, []
    for step in range(5):
        one, state = policy(map_tree(lambda leaf: leaf[:, step : step + 1], seen), state, starts[:, step : step + 1])  # noqa: B023
        rows.append(one.values)
    torch.testing.assert_close(torch.cat(rows, 1), whole.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[0], last[0], atol=1e-5, rtol=1e-5)
    alone, _ = policy(map_tree(lambda leaf: leaf[:1, 3:], seen), None, starts[:1, 3:])
    torch.testing.assert_close(whole.values[:1, 3:], alone.values, atol=1e-5, rtol=1e-5), "it forgot at the start"
    assert not torch.allclose(
        whole.values[1:, 3:], policy(map_tree(lambda leaf: leaf[1:, 3:], seen), None, starts[:1, 3:])[0].values
    )


def test_a_cell_that_keeps_everything_adds_up() -> None:
    cell = ConvLSTMCell(1, 1)
    with torch.no_grad():
        cell.gates.weight.zero_()
        cell.gates.bias.copy_(torch.tensor([100.0, 100, 100, 0.5]))  # in, keep, out: all open
    state = None
    for step in range(1, 4):
        state = cell(torch.zeros(1, 1, 4, 4), state)
        torch.testing.assert_close(state[1], torch.full((1, 1, 4, 4), step * math.tanh(0.5)))


def test_what_is_remembered_is_a_part_of_the_run() -> None:
    policy = RegistrationPolicy(SIDE, len(MOVES), width=8)
    one, other = Recall(policy, 3), Recall(policy, 3)
    state = torch.randn(3, 8, 2, 2), torch.randn(3, 8, 2, 2)
    one.keep(state, torch.tensor([True, False, True]))
    other.load_state_dict(one.state_dict())
    assert other.state is not None
    assert torch.equal(other.state[1], state[1])
    assert other.starts.tolist() == [True, False, True]
    assert Recall(RegistrationPolicy(SIDE, 8, "none", 8), 3).state is None
    assert not shared(one), "each process has walks of its own"
    assert shared(policy)


# ---- walks ----


class Knows(torch.nn.Module):
    """A policy that reads the state from behind: it takes the best move, or draws any, and its value is exact."""

    def __init__(self, env: RegistrationEnv, sure: float) -> None:
        super().__init__()
        self.env, self.sure, self.state = env, sure, None

    def forward(self, seen: Any, memory: Any, starts: Tensor) -> Any:
        assert self.state is not None
        gains = self.env.gains(self.state)[:, None]
        values = -self.env.distance(self.state)[:, None]
        return Decisions(Categorical(self.sure * gains), values), torch.zeros(len(gains), 1)


def knowing(env: RegistrationEnv, sure: float) -> Knows:
    policy = Knows(env, sure)
    look = env.observe

    def observe(state: Any) -> Any:
        policy.state = state
        return look(state)

    env.observe = observe  # type: ignore[method-assign]
    return policy


def test_look_ahead_finds_what_greedy_walks_pass_by() -> None:
    env = small(reached=0.0)
    policy = knowing(
        env, -0.2
    )  # it prefers what is worse, weakly: drawn rollouts find better ends than its greedy walk
    ids, keys = torch.arange(8), noise.key("look ahead", torch.arange(8))
    found = {}
    for rollouts in (0, 12):
        path = walk(env, policy, env.initial(ids, keys), keys, 3, rollouts, 6)
        assert path.shape == (8, 4 + (7 if rollouts else 0), 4)
        found[rollouts] = env.distance(replace(env.initial(ids, keys), transform=path[:, -1]))
    assert (found[12] < found[0]).float().mean() > 0.8
    again = walk(env, policy, env.initial(ids[2:5], keys[2:5]), keys[2:5], 3, 12, 6)[:, -1]
    torch.testing.assert_close(env.distance(replace(env.initial(ids[2:5], keys[2:5]), transform=again)), found[12][2:5])


def test_steps_end_where_they_say() -> None:
    env = small(reward="transform", reached=0.0)
    policy = knowing(env, 10.0)
    state, _, transforms, values = steps(env, policy, env.state, None, 4)
    assert torch.equal(transforms[:, 0], env.state.transform)
    assert torch.equal(transforms[:, -1], state.transform)
    torch.testing.assert_close(values[:, -1], -env.distance(state))
    assert (values.diff(dim=1) >= 0).float().mean() > 0.9


# ---- mutual information ----


def test_mutual_information_registers_what_is_near() -> None:
    pytest.importorskip("SimpleITK")
    pairs = load_pairs("scenes", None, "train", 64, 3)
    moved = displaced(pairs, noise.key("near", torch.arange(3)), Spread(0.1, 8.0, 0.08))
    before = moved.errors(torch.eye(2, 3).expand(3, 2, 3))
    both = zip(moved.fixed.float() / 255, moved.moving.float() / 255, strict=True)
    found = moved.errors(torch.stack([by_mutual_information(*pair, starts=1) for pair in both]))
    assert before.min() > 1
    assert found.max() < 1, "the map goes from moving to fixed, in pixels"


# ---- files ----


def write(folder: Path, rows: int = 5, **changes: str) -> Path:
    """Pairs of pictures of other sizes in BIRL's layout."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = ["Target image,Source image,Target landmarks,Source landmarks"]
    for row in range(rows):
        for name, size in (("fixed", (40, 30)), ("moving", (60, 20))):
            array = np.random.default_rng(row).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(array).save(folder / "images" / f"{name}{row}.png")
            (folder / f"{name}{row}.csv").write_text(",X,Y\n1,5,6\n2,20,10.5\n3,8,18\n")
        table.append(f"images/fixed{row}.png,images/moving{row}.png,fixed{row}.csv,moving{row}.csv")
    (folder / "pairs.csv").write_text("\n".join(table) + "\n")
    for name, text in changes.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_pairs_of_files_keep_their_landmarks_through_the_letterbox(tmp_path: Path) -> None:
    root = write(tmp_path)
    counts = {part: len(load_pairs("birl", root, part, SIDE)) for part in ("train", "val", "test")}
    assert counts == {"train": 3, "val": 1, "test": 1}
    pairs = load_pairs("birl", root, "train", SIDE)
    torch.testing.assert_close(
        pairs.fixed_points[0], torch.tensor([[5.0, 6], [20, 10.5], [8, 18]]) * 0.8 + torch.tensor([0, 4])
    )
    rows = round(20 * SIDE / 60)
    scale, shift = torch.tensor([SIDE / 60, rows / 20]), torch.tensor([0, (SIDE - rows) // 2])
    torch.testing.assert_close(pairs.moving_points[0], torch.tensor([[5.0, 6], [20, 10.5], [8, 18]]) * scale + shift)
    assert len(load_pairs("birl", root, "test", SIDE, views=4)) == 4


def test_a_status_says_which_part_a_pair_is_in(tmp_path: Path) -> None:
    root = write(tmp_path)
    lines = (root / "pairs.csv").read_text().splitlines()
    marks = ["status", "training", "evaluation", "validation", "training", "evaluation"]
    (root / "pairs.csv").write_text("\n".join(f"{line},{mark}" for line, mark in zip(lines, marks, strict=True)))
    assert [len(load_pairs("birl", root, part, SIDE)) for part in ("train", "val", "test")] == [2, 1, 2]


HEAD = "Target image,Source image,Target landmarks,Source landmarks\n"
ROW = "images/fixed0.png,images/moving0.png,fixed0.csv,moving0.csv\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pairs__csv": "Target,Source\na,b\n"},
            r"pairs\.csv, line 1: found the columns Target, Source, expected Target im",
        ),
        ({"pairs__csv": HEAD + ROW * 2}, r"pairs\.csv: found 2 pairs but none for split 'test'"),
        ({"pairs__csv": HEAD + ROW.replace("moving0.csv", "") * 5}, r"pairs\.csv, line \d: Source landmarks '' is not"),
        (
            {"pairs__csv": HEAD + ROW.replace("moving0.csv", "gone.csv") * 5},
            r"line \d: Source landmarks 'gone\.csv' is",
        ),
        (
            {"pairs__csv": HEAD + ROW.replace("fixed0.png", "gone.png") * 5},
            r"line \d: Target image 'images/gone\.png' is",
        ),
        (
            {"moving0__csv": ",X,Y\n1,5,6\n2,20,10\n"},
            r"line \d: fixed0\.csv has 3 landmarks and moving0\.csv 2, expected",
        ),
        ({"moving0__csv": ",A,B\n1,5,6\n"}, r"moving0\.csv, line 1: found the columns , A, B, expected X, Y"),
        (
            {"moving0__csv": ",X,Y\n1,5,6\n2,61,10\n"},
            r"moving0\.csv, line 3: \(61, 10\) lies outside of the picture of 60x20",
        ),
        ({"moving0__csv": ",X,Y\n1,5,six\n"}, r"moving0\.csv, line 2: found X '5', Y 'six', expected two numbers"),
        ({"moving0__csv": ",X,Y\n1,5,6\n"}, r"moving0\.csv: found 1 different landmarks, expected two at least"),
        ({"images/fixed0__png": "no picture"}, r"fixed0\.png: cannot be read as a picture"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    root = write(tmp_path, **changes)
    if "pairs__csv" not in changes:
        (root / "pairs.csv").write_text(HEAD + ROW * 5)
    with pytest.raises(InputError, match=message):
        load_pairs("birl", root, "test", SIDE)


def test_a_wrong_status_and_a_missing_table_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, pairs__csv=HEAD.strip() + ",status\n" + ROW.strip() + ",maybe\n")
    with pytest.raises(InputError, match=r"pairs\.csv, line 2: status 'maybe', expected one of training"):
        load_pairs("birl", root, "train", SIDE)
    with pytest.raises(InputError, match=r"pairs\.csv: cannot be read"):
        load_pairs("birl", tmp_path / "gone", "train", SIDE)
    with pytest.raises(InputError, match=r"^root: not given"):
        load_pairs("birl", None, "train", SIDE)
    with pytest.raises(InputError, match=r"did you mean 'scenes'"):
        load_pairs("scene", None, "train", SIDE)


def test_pictures_to_register_are_read_from_a_folder_or_a_table(tmp_path: Path) -> None:
    root = write(tmp_path / "table", 2)
    assert {name: len(found) for name, found in read_pictures_of_pairs(root, SIDE).items()} == {"fixed": 2, "moving": 2}
    with pytest.raises(InputError, match=r"found 0 files fixed\.\*, expected a folder with one picture"):
        read_pictures_of_pairs(root / "images", SIDE)
    for name in ("fixed", "moving"):
        (root / "images" / f"{name}0.png").rename(root / "images" / f"{name}.png")
    found = read_pictures_of_pairs(root / "images", SIDE)
    assert found["moving"].shape == (1, 3, SIDE, SIDE)


def test_the_pairs_of_birl_are_read(shared_data: Path) -> None:
    root = shared_data / "registration"
    sizes = [len(load_pairs("birl", root, part, SIDE)) for part in ("train", "val", "test")]
    assert sum(sizes) == 15
    train = load_pairs("birl", root, "train", 96)
    assert train.errors(train.aligned()).max() < 3 < train.errors(torch.eye(2, 3).expand(len(train), 2, 3)).mean()


# ---- the system ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 50}, r"^image_size: found 50, expected a multiple of 16"),
        ({"held_out": 3}, r"^held_out: found 3, expected at least 4"),
        ({"width": 6}, r"^width: found 6, expected a multiple of 4"),
        ({"horizon": 0}, r"^horizon: found 0"),
        ({"start_share": 1.0}, r"^start_share: found 1"),
        ({"look_ahead": -1}, r"^look_ahead: found -1"),
        ({"imitation_share": 0.0}, r"^imitation_share: found 0"),
        ({"data": "birl"}, r"^root: not given"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        registration.resolve(registration.Config(**settings))
    for reward in ("landmarks", "transform"):
        with pytest.raises(InputError, match=r"^reached: found -1"):
            RegistrationEnv(image_size=SIDE, count=2, reward=reward, reached=-1.0)


TINY = registration.Config(image_size=SIDE, pairs=8, held_out=8, horizon=4, width=8, look_ahead=2, depth=2)


def test_predict_takes_pictures_of_two_sizes_and_its_matrix_moves_their_points() -> None:
    torch.manual_seed(0)
    policy = registration.build(TINY)
    fixed, moving = torch.rand(2, 3, 40, 60), torch.rand(2, 3, 64, 32)
    found = registration.predict(TINY, policy, {"fixed": fixed, "moving": moving})
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "transform": (2, 4),
        "matrix": (2, 2, 3),
        "warped": (2, 3, 40, 60),
        "path": (2, 4 + 1 + 2 + 1, 4),
    }
    # a point of the moving picture, by way of the square in which it was registered
    (_, box), (_, own) = letterbox(fixed, SIDE), letterbox(moving, SIDE)
    points = torch.tensor([[10.0, 20.0]]).expand(2, 1, 2)
    square = apply(matrices(found["transform"], SIDE), apply(own.expand(2, 2, 3), points))
    torch.testing.assert_close(apply(box.expand(2, 2, 3), apply(found["matrix"], points)), square, atol=1e-3, rtol=0)
    for wrong, message in (
        ({"fixed": fixed}, r"^images: found fixed, expected a dict of 'fixed' and 'moving'"),
        ({"fixed": fixed, "moving": moving[:1]}, r"^moving: found 1 pictures, expected 2"),
        ({"fixed": fixed[:, :1], "moving": moving}, r"^fixed: 1 channels, expected 3"),
        ({"fixed": fixed * 255, "moving": moving}, r"^fixed: maximum 25"),
    ):
        with pytest.raises(InputError, match=message):
            registration.predict(TINY, policy, wrong)


@pytest.mark.parametrize(
    "changes", [{"core": "none", "reward": "transform"}, {"look_ahead": 0, "imitation": 0.0, "start_share": 0.0}]
)
def test_ablations_run(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(TINY, steps=2, copies=2, segment=2, batch=2, mutual_information=False, **changes)
    settings = {name: value for name, value in asdict(config).items() if name != "root"}
    agent = foveate.train("registration", out=tmp_path / "run", device="cpu", **settings)
    assert foveate.evaluate(agent.folder, device="cpu").metrics.keys() >= {
        "tre_error",
        "median_error",
        "success",
        "seconds",
    }


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = replace(TINY, steps=8, copies=2, segment=2, batch=2, mutual_information=False)
    ends = []
    for name, stop in (("whole", None), ("cut", 3)):
        run = Run(
            tmp_path / name, system="registration", config={}, steps=8, device="cpu", checkpoint_steps=1, quiet=True
        )
        if stop:
            log, seen = run.log, []

            def halt(log: Any = log, seen: list[int] = seen, **told: Any) -> None:
                seen.append(1)
                if len(seen) > 3:
                    raise KeyboardInterrupt
                log(**told)

            run.log = halt  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                registration.train(config, run)
            run = Run(tmp_path / name, system="registration", config={}, device="cpu", resume=True, quiet=True)
        registration.train(config, run)
        policy = registration.build(config)
        assert run.restore("agent", policy)
        ends.append(policy.state_dict())
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def test_its_moves_are_worth_more_than_any_blind_one(tmp_path: Path) -> None:
    """From this seed, on one thread, on scenes it has not seen: a move leads nearer to the right transform."""
    config = replace(
        registration.Config(mutual_information=False),
        image_size=48,
        pairs=200,
        held_out=8,
        horizon=2,
        steps=560,
        start_share=0.98,
        copies=2,
    )
    run = Run(tmp_path / "run", system="registration", config={}, steps=config.steps, device="cpu", quiet=True)
    agent_only(config, run)
    policy = registration.build(config)
    assert run.restore("agent", policy)
    env = RegistrationEnv(1, image_size=48, count=150, split="test")
    unseen = env.scattered(torch.arange(150), noise.key("places", torch.arange(150)))
    with torch.no_grad():
        seen = map_tree(lambda leaf: leaf[:, None], env.observe(unseen))
        moves = policy(seen, None, torch.ones(150, 1, dtype=torch.bool))[0].distribution.mode()
    gains = env.gains(unseen)
    taken, blind, best = gains.gather(1, moves).mean(), gains.mean(0).max(), gains.amax(1).mean()
    assert taken > blind + 0.25 * (best - blind), (taken, blind, best)


def agent_only(config: registration.Config, run: Run) -> None:
    """Train without the regressor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "_learn_to_say", lambda *_: None)
        registration.train(config, run)
