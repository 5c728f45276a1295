"""Replay draws what happened and nothing else; targets are those counted by hand; a small chain is solved."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from foveate import noise
from foveate.envs.tensor_env import TensorEnv
from foveate.learn.q_learning import Believing, Dueling, epsilon, explore, follow, q_loss, td_target
from foveate.learn.replay import Replay
from foveate.run import Run
from foveate.systems import cutting, tracking
from foveate.types import InputError, map_tree
from foveate.value_learning import Acting, learn_by_acting, walk, with_belief

LENGTH, RIGHT = 6, 1


class Chain(TensorEnv):
    """Steps to the left or right; 1 at the right end, where it is over, and 0.02 for stepping left at the left end."""

    chance = False

    def __init__(self, num_envs: int, horizon: int | None = 12, length: int = LENGTH, **options: Any) -> None:
        self.length = length
        places = gymnasium.spaces.Box(0.0, 1.0, (length,))
        super().__init__(num_envs, places, gymnasium.spaces.Discrete(2), horizon=horizon, **options)

    def initial(self, ids: Tensor, keys: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def transition(self, state: Tensor, actions: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = (state + 2 * actions - 1).clamp(0, self.length - 1)
        over = moved == self.length - 1
        return moved, over + 0.02 * ((state == 0) & (actions == 0)), over

    def observe(self, state: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(state, self.length).float()


def filled(actions: list[list[int]], rows: int = 50, horizon: int | None = 4) -> tuple[Replay, list[Tensor]]:
    """A replay of a chain in which these actions were taken, [steps][copies]; and the places before each."""
    env = Chain(len(actions[0]), horizon)
    env.reset(seed=0)
    replay, places = Replay(env.state, rows), []
    for chosen in actions:
        states, taken = env.state, ~env.waiting
        places.append(states)
        reward, terminated, truncated, _ = env.advance(torch.tensor(chosen))
        replay.write(states, torch.tensor(chosen), reward, terminated, truncated, taken)
    return replay, places


def test_transitions_are_what_happened_and_the_step_of_an_autoreset_is_none() -> None:
    """An episode is cut at its fourth step: what follows is its last place, never the first of the next."""
    replay, places = filled([[1]] * 4 + [[0]] + [[1]] * 4 + [[1]])
    assert [int(place) for place in places] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert len(replay) == 8
    found = replay.draw(noise.key(0, "draw"), 4000, discount=0.5)
    pairs = set(zip(found.states.tolist(), found.next_states.tolist(), strict=True))
    assert pairs == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert (found.discounts == 0.5).all(), "a limit is no end"
    counts = torch.bincount(found.states)
    assert (counts.float() / 4000 - 0.25).abs().max() < 0.03, "every step that was taken is drawn as often"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_rewards_are_summed_up_to_the_end_of_an_episode(steps: int) -> None:
    """Left once at the wall (0.02), then to the right end (1): the whole episode, counted by hand."""
    replay, _ = filled([[0]] + [[1]] * 5 + [[0]] + [[0]] + [[1]] * 5 + [[0]], horizon=None)
    found, again = (replay.draw(noise.key(1, "draw"), 500, steps, 0.5) for _ in range(2))
    assert torch.equal(found.states, again.states), "a draw is a function of its key"
    rewards = torch.tensor([0.02, 0, 0, 0, 0, 1])
    for state, action, returns, discount, after in zip(
        found.states, found.actions, found.returns, found.discounts, found.next_states, strict=True
    ):
        first = 0 if action == 0 else int(state) + 1
        count = min(steps, 6 - first)
        expected = sum(float(rewards[first + k]) * 0.5**k for k in range(count))
        assert float(returns) == pytest.approx(expected)
        over = first + count == 6
        assert float(discount) == pytest.approx(0.0 if over else 0.5**count)
        assert int(after) == first + count - 1


def test_old_steps_make_room() -> None:
    replay, places = filled([[1], [1], [0], [1], [0], [1], [0]], rows=4, horizon=None)
    found = replay.draw(noise.key(0, "draw"), 300)
    assert set(found.states.tolist()) == {int(place) for place in places[3:6]}, "and the newest has nothing after it"
    assert len(replay) == 4
    fresh = Replay(torch.zeros(2), 4)
    with pytest.raises(InputError, match=r"^replay: found 0 rows"):
        fresh.draw(noise.key(0), 1)
    with pytest.raises(InputError, match=r"^rows: found 1"):
        Replay(torch.zeros(2), 1)


def test_a_million_steps_of_coordinates_and_histories_take_little_room() -> None:
    state = {"image": torch.zeros(256).int(), "box": torch.zeros(256, 4), "history": torch.zeros(256, 10).byte()}
    assert Replay(state, 4000).size < 300e6 / 2


@pytest.mark.parametrize(("choices", "width"), [(256, 1), (800, 2), (2**15, 2), (2**16, 4)])
def test_actions_are_kept_whatever_their_number(choices: int, width: int) -> None:
    replay = Replay(torch.zeros(2), 3, choices)
    last, none = torch.tensor([choices - 1, 0]), torch.zeros(2, dtype=torch.bool)
    for _ in range(3):
        replay.write(torch.zeros(2), last, torch.zeros(2), none, none, ~none)
    assert replay.actions.element_size() == width
    assert set(replay.draw(noise.key("drawn"), 64).actions.tolist()) == {0, choices - 1}


def test_targets_are_those_counted_by_hand() -> None:
    returns, discounts = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    after, own = torch.tensor([[1.0, 4.0], [9.0, 9.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    torch.testing.assert_close(td_target(returns, discounts, after), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(td_target(returns, discounts, after, own), torch.tensor([1.5, 2.0]))
    values = torch.tensor([[0.0, 1.0], [5.0, 0.0]], requires_grad=True)
    loss = q_loss(values, torch.tensor([1, 0]), torch.tensor([1.5, 2.0]))
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + (3 - 0.5)) / 2)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.25], [0.5, 0.0]]))


def test_the_gains_of_actions_leave_the_worth_of_a_state() -> None:
    torch.manual_seed(0)
    head = Dueling(4, 3)
    features = torch.randn(5, 2, 4)
    torch.testing.assert_close(head(features).mean(-1, keepdim=True), head.worth(features))


def test_a_belief_is_told_to_the_values_and_not_taught_by_them() -> None:
    torch.manual_seed(0)
    head, features = Believing(5, 3, 8), torch.randn(16, 5, requires_grad=True)
    good = torch.rand(16, 3) < 0.5
    values, losses = with_belief(head.both, lambda state: state, features, good)
    torch.testing.assert_close(values, head(features))
    belief = head.belief(features).sigmoid()
    wanted = -torch.where(good, belief, 1 - belief).log().mean()
    torch.testing.assert_close(losses["belief_loss"], wanted)
    values.sum().backward()
    assert head.belief.weight.grad is None
    with torch.no_grad():
        head.belief.bias += 3.0
    assert not torch.allclose(head(features), values), "the values depend on it"


def test_what_an_expert_knows_of_every_action_is_learned_beside_the_values(tmp_path: Path) -> None:
    """Going right is good everywhere but at the left end; never told by reward alone in an episode of three steps."""
    run = Run(tmp_path / "run", system="test", config={}, steps=150, device="cpu", quiet=True)
    torch.manual_seed(0)
    env = Chain(16, 3)
    env.reset(seed=1)
    head = Believing(LENGTH, 2, 16)
    parts = {"network": head, "target": copy.deepcopy(head), "optimizer": torch.optim.Adam(head.parameters())}
    env, network, target, optimizer, replay = run.track(env=env, **parts, replay=Replay(env.state, 200))

    def good(state: Tensor) -> Tensor:
        return torch.stack((state == 0, state > 0), 1)

    beside = partial(with_belief, network.both, good)
    how = Acting(batch=64, learning_rate=3e-2, share=1.0, last=1.0)
    learn_by_acting(run, "learn", 1.0, env, network, target, optimizer, replay, how, beside=beside)
    places = torch.arange(3)  # from which a step is taken, of three
    assert torch.equal(network.both(torch.eye(LENGTH)[:3])[1] > 0, good(places))


def test_a_target_follows_little_by_little_or_at_once() -> None:
    torch.manual_seed(0)
    network, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = target.weight.clone()
    follow(target, network, 0.25)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * network.weight)
    follow(target, network)
    assert torch.equal(target.weight, network.weight)


def test_exploring_is_as_rare_as_said_and_guided_by_what_is_rewarded() -> None:
    values = torch.tensor([[0.0, 2.0, 1.0, 0.5]]).expand(4000, -1)
    keys = noise.key(0, "explore", torch.arange(4000))
    found = explore(values, 0.4, keys)
    assert abs(float((found == 1).float().mean()) - (0.6 + 0.1)) < 0.03
    good = torch.tensor([[True, False, False, True]]).expand(4000, -1)
    guided = torch.bincount(explore(values, 0.4, keys, good), minlength=4).float() / 4000
    torch.testing.assert_close(guided, torch.tensor([0.2, 0.6, 0.0, 0.2]), atol=0.03, rtol=0)
    assert torch.equal(explore(values, 0.4, keys, torch.zeros_like(good)), found), "no expert knows: any"
    assert [epsilon(at) for at in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def learner(run: Run, horizon: int, length: int = LENGTH) -> tuple[Any, ...]:
    """A chain of 16 copies and what learns it, as parts of a run."""
    torch.manual_seed(0)
    env = Chain(16, horizon, length)
    env.reset(seed=1)
    network = torch.nn.Sequential(torch.nn.Linear(length, 32), torch.nn.ReLU(), Dueling(32, 2, 32))
    optimizer, replay = torch.optim.Adam(network.parameters()), Replay(env.state, 200)
    parts = {"network": network, "target": copy.deepcopy(network), "optimizer": optimizer}
    return run.track(env=env, **parts, replay=replay)


def solve(folder: Path, updates: int, horizon: int, guided: bool = False, length: int = LENGTH, **how: Any) -> Any:
    """Learn the chain; the network, and how many steps of the replay brought the end of the chain."""
    run = Run(folder / f"run{guided}", system="test", config={}, steps=updates, device="cpu", quiet=True)
    env, network, target, optimizer, replay = learner(run, horizon, length)
    acting = Acting(**{"follow": 0.05, **how}, batch=64, learning_rate=5e-3, share=1.0, last=0.1, warmup=20)
    good = (lambda state: torch.nn.functional.one_hot(torch.full_like(state, RIGHT), 2).bool()) if guided else None
    learn_by_acting(run, "learn", 1.0, env, network, target, optimizer, replay, acting, good=good)
    return network, int((replay.rewards == 1).sum())


@pytest.mark.parametrize(("double", "n", "period"), [(False, 1, 1), (True, 1, 1), (True, 3, 1), (True, 1, 20)])
def test_a_chain_is_solved_to_its_optimum(double: bool, n: int, period: int, tmp_path: Path) -> None:
    """The value of going right from place k is 0.9^(4 - k): less than a limit of 12 steps would let through.

    With a target that follows softly, or is a copy of the network every twenty updates.
    """
    network, _ = solve(tmp_path, 450, 12, double=double, steps=n, period=period, follow=0.05 if period == 1 else 1.0)
    values = network(torch.eye(LENGTH)[:-1])
    assert (values.argmax(1) == RIGHT).all()
    torch.testing.assert_close(values[:, RIGHT], 0.9 ** torch.arange(4.0, -1, -1), atol=0.12, rtol=0)


def test_a_limit_is_no_end(tmp_path: Path) -> None:
    """Cut after 3 of the 5 steps that the way takes, episodes never see the reward: values are those of 0.02 a step."""
    network, found = solve(tmp_path, 350, 3)
    assert not found
    values = network(torch.eye(LENGTH)[:1])
    assert values.max().item() > 0.13, "0.02 / (1 - 0.9) = 0.2 is approached, not the 0.05 of three steps"


def test_a_walk_ends_where_each_episode_does() -> None:
    """From the left end the way takes five steps; who always steps left is stopped by the limit."""
    env = Chain(2, 7, autoreset="disabled")
    values = torch.tensor([[0.0, 0.5], [1.0, 0.2]])
    found = walk(env, lambda seen: values[-len(seen) :], torch.tensor([0, 0]))
    assert found.states.tolist() == [[0, 1, 2, 3, 4, 5, 5, 5], [0] * 8]
    assert found.taken.sum(1).tolist() == [5, 7]
    assert found.values[:, 0].tolist() == [0.5, 1.0]
    torch.testing.assert_close(found.rewards.sum(1), torch.tensor([1.0, 0.14]))


def test_guided_exploration_finds_the_reward_sooner(tmp_path: Path) -> None:
    _, blind = solve(tmp_path, 60, 30, length=14)
    _, guided = solve(tmp_path, 60, 30, guided=True, length=14)
    assert guided > 4 * max(blind, 1)


def test_a_learner_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def learn(name: str, resume: bool = False, stop: bool = False) -> dict[str, Tensor]:
        how = {"steps": 40, "device": "cpu", "quiet": True, "checkpoint_steps": 15}
        run = Run(tmp_path / name, system="test", config={}, resume=resume, **how)
        env, network, target, optimizer, replay = learner(run, 5)

        def validate() -> dict[str, float]:
            if stop:
                raise Stopped
            return {}

        acting = Acting(batch=16, warmup=4, steps=2)
        with contextlib.suppress(Stopped):
            learn_by_acting(
                run, "learn", 1.0, env, network, target, optimizer, replay, acting, validate=validate, every=25
            )
        return network.state_dict()

    whole = learn("whole")
    learn("stopped", stop=True)
    again = learn("stopped", resume=True)
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        (tracking, {"scenes": 1, "image_size": 32, "patch": 12, "hidden": 16}),
        (cutting, {"scenes": 4, "image_size": 48, "length": 4, "crop": 16, "width": 8, "patch": 12}),
    ],
)
def test_each_process_begins_with_episodes_of_its_own(
    system: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def begun(run: Run, phase: str, share: float, env: TensorEnv, *others: Any, **how: Any) -> None:
        leaves = list[Tensor]()
        map_tree(lambda leaf: leaves.append(leaf.flatten().float()) or leaf, env.observe(env.state))
        states.append(torch.cat(leaves))
        raise Begun

    states: list[Tensor] = []
    monkeypatch.setattr(system, "learn_by_acting", begun)
    monkeypatch.setattr(system, "_learn", lambda *parts: None, raising=False)  # the phase of cutting before it
    config = system.resolve(system.Config(copies=4, **settings))
    for rank in (0, 1, 1):
        run = Run(tmp_path / f"{len(states)}", system="test", config={}, steps=4, device="cpu", quiet=True)
        run.rank = rank
        with pytest.raises(Begun):
            system.train(config, run)
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])


def test_replay_and_environment_go_on_exactly_where_they_were(tmp_path: Path) -> None:
    def parts() -> tuple[Chain, Replay]:
        env = Chain(4, 5)
        env.reset(seed=3)
        return env, Replay(env.state, 9)

    def act(env: Chain, replay: Replay, steps: range) -> None:
        for step in steps:
            states, taken = env.state, ~env.waiting
            actions = noise.integers(noise.key(0, step, torch.arange(4)), 2)
            reward, terminated, truncated, _ = env.advance(actions)
            replay.write(states, actions, reward, terminated, truncated, taken)

    whole = parts()
    act(*whole, range(20))
    run = Run(tmp_path / "run", system="test", config={}, steps=20, device="cpu", quiet=True)
    env, replay = run.track(**dict(zip(("env", "replay"), parts(), strict=True)))
    for step in run.steps("act"):
        act(env, replay, range(step, step + 1))
        if step == 12:
            run.save()
            break
    again = Run(tmp_path / "run", system="test", config={}, steps=20, device="cpu", quiet=True, resume=True)
    env, replay = again.track(**dict(zip(("env", "replay"), parts(), strict=True)))
    for step in again.steps("act"):
        act(env, replay, range(step, step + 1))
    assert torch.equal(env.state, whole[0].state)
    for mine, theirs in zip(replay.buffers(), whole[1].buffers(), strict=True):
        assert torch.equal(mine, theirs)
