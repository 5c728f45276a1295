import json
import math
from pathlib import Path

import pytest
import torch
from gymnasium.utils.env_checker import check_env

from foveate import attention, noise
from foveate.attention import Looking
from foveate.envs.foveating_grid import (
    SIDE,
    WHERE,
    BeliefPolicy,
    FoveatingGridEnv,
    SingleFoveatingGridEnv,
    cell_at,
    centre_of,
    half_plane,
    quadrant_of,
)
from foveate.learn.baselines import MovingAverage
from foveate.learn.rollout import rollout
from foveate.models.glimpse import GlimpsePolicy
from foveate.run import Run
from foveate.systems import foveating_grid as system
from foveate.types import InputError

CELLS = torch.arange(SIDE * SIDE)


def env_of(copies, **options):
    return FoveatingGridEnv(copies, autoreset="disabled", **options)


def play(policy, copies=64, **options):
    env = env_of(copies, **options)
    ids = torch.arange(copies)
    trajectory, _ = rollout(env, policy, noise.key(5, ids), ids=ids)
    return env, trajectory


def test_cells_and_locations_agree():
    assert torch.equal(cell_at(centre_of(CELLS)), CELLS)
    assert cell_at(torch.tensor([[-9.0, -9.0], [9.0, 9.0], [1.0, -1.0]])).tolist() == [0, 143, 11]
    assert torch.bincount(quadrant_of(CELLS)).tolist() == [36] * 4
    assert quadrant_of(torch.tensor([0, 11, 132, 143, 65, 66, 77, 78])).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_target_is_even_and_texture_does_not_give_it_away():
    env = env_of(1)
    state = env.initial(torch.arange(40000), noise.key(0, torch.arange(40000)))
    hits = torch.bincount(state.targets, minlength=144)
    assert (hits - 40000 / 144).abs().max() < 5 * math.sqrt(40000 / 144)
    flat = state.grids.flatten(1)
    assert torch.equal(flat.argmax(-1), state.targets)
    # no linear trace of the target's place in the brightness of any other cell
    others = flat.masked_fill(state.targets[:, None] == CELLS, float("nan"))
    means = torch.stack([others[state.labels == label].nanmean(0) for label in range(4)])
    assert (means - means.mean(0)).abs().max() < 5 * 0.4 / math.sqrt(12 * 10000)


def test_glimpse_is_the_neighbourhood():
    env, trajectory = play(BeliefPolicy())
    padded = torch.nn.functional.pad(env.state.grids, (1, 1, 1, 1))
    for row in range(20):
        for step in range(6):
            cell = int(cell_at(trajectory.observations["where"][row, step, :2]))
            r, c = divmod(cell, SIDE)
            assert torch.equal(trajectory.observations["what"][row, step, 0], padded[row, r : r + 3, c : c + 3])


@pytest.mark.parametrize(("flip", "share"), [(0.0, 1.0), (0.2, 0.8), (1.0, 0.0)])
def test_cue_is_right_as_often_as_it_says(flip, share):
    env = env_of(4000, flip=flip)
    env.reset(seed=0)
    before = env.state.cells
    env.step(torch.cat((noise.uniform(noise.key(1, torch.arange(4000)), 2) * 2 - 1, torch.zeros(4000, 4)), -1))
    state = env.state
    target = centre_of(state.targets)
    distances = [(centre_of(cells) - target).square().sum(-1) * 36 for cells in (state.cells, before)]
    warmer = (distances[0] < distances[1] - 0.5).float() * 2 - 1
    agree = (warmer == state.cues).float().mean()
    assert abs(float(agree) - share) < 4 * math.sqrt(0.2 * 0.8 / 4000) * (0 < share < 1) + 1e-9


def test_half_plane_holds_the_place_it_speaks_for():
    here, before = (
        torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.2, 0.2]]),
        torch.tensor([[-0.1, 0.0], [-0.1, 0.0], [0.2, 0.2]]),
    )
    plane = half_plane(here, before, torch.tensor([1.0, -1.0, 1.0]))
    assert torch.allclose(plane, torch.tensor([[1.0, 0, 0.2], [-1.0, 0, -0.2], [0, 0, 0]]), atol=1e-6)


def brute_force(env, trajectory, row, steps, flip):
    """The posterior by going through all 144 hypotheses with plain numbers."""
    weights = []
    where = trajectory.observations["where"][row]
    cells = [divmod(int(cell_at(where[step, :2])), SIDE) for step in range(steps)]
    for hypothesis in range(144):
        r, c = divmod(hypothesis, SIDE)
        weight = 1.0
        for step, (y, x) in enumerate(cells):
            patch = trajectory.observations["what"][row, step, 0]
            bright = [(y + i - 1, x + j - 1) for i in range(3) for j in range(3) if patch[i, j] > 0.65]
            covered = abs(r - y) <= 1 and abs(c - x) <= 1
            weight *= float(bright == [(r, c)] if covered else not bright)
            if step:
                py, px = cells[step - 1]
                nearer = (r - y) ** 2 + (c - x) ** 2 < (r - py) ** 2 + (c - px) ** 2
                # the cue speaks for the present cell if that lies in its half-plane
                says = float((where[step, :2] * where[step, 2:4]).sum() - where[step, 4]) > 0
                if (y, x) != (py, px):
                    weight *= 1 - flip if nearer == says else flip
        weights.append(weight)
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@pytest.mark.parametrize("flip", [0.0, 0.2])
def test_belief_is_the_posterior_of_all_hypotheses(flip):
    policy = BeliefPolicy(flip=flip)
    env, trajectory = play(policy, 3, glimpses=7, flip=flip)
    starts = torch.arange(7).expand(3, 7) == 0
    for steps in (2, 7):
        seen = {name: leaf[:, :steps] for name, leaf in trajectory.observations.items()}
        _, state = policy(seen, None, starts[:, :steps])
        for row in range(3):
            expected = brute_force(env, trajectory, row, steps, flip)
            assert torch.allclose(state["logs"][row].exp().double(), expected, atol=1e-5)


@pytest.mark.parametrize("policy", [BeliefPolicy(), BeliefPolicy("greedy"), BeliefPolicy(tiling=system.TILING)])
def test_belief_is_calibrated(policy):
    answers = attention.answer(env_of(2000, glimpses=8, split="test"), policy, 0, 8000)
    sure, guess = answers.scores.exp().max(-1)
    right = (guess == answers.labels[:, None]).float()
    assert (right.mean(0) - sure.mean(0)).abs().max() < 4 * 0.5 / math.sqrt(8000)
    assert (right.mean(0).diff() > -0.01).all()  # more glimpses never hurt


@pytest.mark.parametrize("tiling", [system.TILING, system.BY_ROWS])
def test_tiling_looks_at_tiles_that_do_not_overlap(tiling):
    _, trajectory = play(BeliefPolicy(tiling=tiling), 8, glimpses=12)
    cells = cell_at(trajectory.observations["where"][:, 1:, :2])
    assert torch.equal(cells, torch.tensor(tiling).expand(8, 11))
    assert len(set(tiling)) == 11
    assert all(cell % SIDE % 3 == 1 and cell // SIDE % 3 == 1 for cell in tiling)


def test_budgets_are_drawn_and_visible():
    env, trajectory = play(BeliefPolicy(), 600, glimpses=None)
    lengths = trajectory.mask.sum(1)
    assert torch.equal(lengths, env.state.budgets)
    assert set(lengths.tolist()) == set(range(1, 13))
    remaining = trajectory.observations["where"][:, :, 5]
    assert torch.allclose(remaining[:, 0] * 12, lengths - 1.0, atol=1e-5)
    assert torch.allclose(remaining.gather(1, lengths[:, None] - 1), torch.zeros(600, 1))


def test_loss_reads_the_answer_at_each_episode_s_own_end():
    policy = GlimpsePolicy((1, 3, 3), WHERE, 4, 32)
    env = env_of(64, glimpses=None)
    ids = torch.arange(64)
    trajectory, decisions = rollout(env, policy, noise.key(0, ids), ids=ids, grad=True)
    for classify in ("last", "every"):
        looking = Looking(64, classify=classify)
        _, parts = attention.hybrid_loss(
            trajectory, decisions, env.state.labels, looking, MovingAverage(), None, lambda mask: mask.sum().float()
        )
        assert float(parts["train_error"]) == pytest.approx(
            100 * (1 - float(trajectory.rewards.sum(1).mean())), abs=1e-3
        )


def test_single_form_passes_gymnasium_s_checker():
    check_env(SingleFoveatingGridEnv(), skip_render_check=True)


def test_observations_stay_in_space():
    env = FoveatingGridEnv(32, glimpses=None)
    env.reset(seed=1)
    for step in range(100):
        action = noise.normal(noise.key(2, step, torch.arange(32)), 6)
        observation, *_ = env.step(action)
        assert env.observation_space.contains({name: leaf.numpy() for name, leaf in observation.items()})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"glimpses": 0}, "glimpses"),
        ({"glimpses": 13}, "glimpses"),
        ({"flip": 1.5}, "flip"),
        ({"flip": float("nan")}, "flip"),
    ],
)
def test_bad_options_are_named(options, field):
    with pytest.raises(InputError, match=field):
        FoveatingGridEnv(1, **options)


def test_bad_input_is_named():
    config = system.Config()
    policy = system.build(config)
    with pytest.raises(InputError, match="12, 12"):
        system.predict(config, policy, torch.rand(1, 1, 10, 10))
    with pytest.raises(InputError, match="expected 1"):
        system.predict(config, policy, torch.rand(1, 3, 12, 12))
    for field, value in {"data": "mnist", "episodes": 0, "baseline": "greedy"}.items():
        with pytest.raises(InputError, match=field):
            system.resolve(system.Config(**{field: value}))


def test_system_runs_whole(tmp_path: Path):
    config = system.Config(steps=2, batch=8, hidden=16, episodes=50)
    run = Run(tmp_path / "run", system="foveating-grid", config={}, steps=2, quiet=True, device="cpu")
    system.train(config, run)
    policy = system.build(config)
    assert run.restore(system.PART, policy)
    found = system.evaluate(config, policy, run)
    keys = {f"accuracy_{budget}" for budget in range(1, 13)}
    assert set(found.metrics) == keys
    assert {name: set(row) for name, row in found.baselines.items()} == dict.fromkeys(
        ("random", "tiling", "tiling by rows", "belief", "greedy belief"), keys
    )
    json.dumps(found.metrics)
    assert set(system.picture(config, policy, run)) == {"glimpse paths", "glimpses"}
    assert "data" in system.check(config)
    assert system.predict(config, policy, torch.rand(3, 1, 12, 12))["locations"].shape == (3, 12, 2)


class AnyCell(BeliefPolicy):
    """Looks anywhere, and guesses by the exact posterior: the best that is possible at random places."""

    def _next(self, belief, times):
        return torch.zeros_like(belief)


def test_learning_to_look_beats_the_best_guess_at_random_places(tmp_path: Path):
    torch.set_num_threads(1)
    policy = system.build(system.Config(hidden=64))
    run = Run(tmp_path / "run", system="foveating-grid", config={}, steps=300, quiet=True, device="cpu")
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    looking = Looking(128, classify="every", learning_rate=1e-2, credit="gains", explore=4.0)
    exact = {"glimpses": 4, "flip": 0.0}
    attention.learn_to_look(
        run, "learned", 1.0, env_of(128, **exact), policy, optimizer, MovingAverage(), looking, dict
    )
    env = env_of(4000, split="test", **exact)
    anywhere = attention.answer(env, AnyCell(flip=0.0), 0, 4000).error()
    assert 20 < anywhere < 27
    assert attention.answer(env, policy, 0, 4000).error() < anywhere - 5
