"""Segments of lockstep copies: what they hold, what they bootstrap, and that a recurrent policy learns from them."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor, nn

from foveate import noise
from foveate.distributions import Categorical
from foveate.envs.tensor_env import TensorEnv
from foveate.learn.actor_critic import Memory, act, actor_critic_loss, begin, segment_advantage
from foveate.learn.returns import generalised_advantage
from foveate.types import Decisions, InputError, Policy
from test_q_learning import LENGTH, RIGHT, Chain


class Recall(TensorEnv):
    """A cue is shown once; four steps later, the action that names it earns 1."""

    chance = False

    def __init__(self, num_envs: int, **options: Any) -> None:
        seen = gymnasium.spaces.Box(0.0, 1.0, (3,))
        super().__init__(num_envs, seen, gymnasium.spaces.Discrete(2), examples=2, **options)

    def initial(self, ids: Tensor, keys: Tensor) -> dict[str, Tensor]:
        return {"cue": ids, "time": torch.zeros_like(ids)}

    def transition(self, state: Any, actions: Tensor, keys: Tensor) -> tuple[Any, Tensor, Tensor]:
        over = state["time"] == 4
        return {"cue": state["cue"], "time": state["time"] + 1}, (over & (actions == state["cue"])).float(), over

    def observe(self, state: Any) -> Tensor:
        shown = nn.functional.one_hot(state["cue"], 2) * (state["time"] == 0)[:, None]
        return torch.cat((shown, (state["time"] == 4)[:, None]), 1).float()


class Recurrent(Policy):
    def __init__(self, inputs: int, actions: int = 2, hidden: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.head, self.worth = nn.GRUCell(inputs, hidden), nn.Linear(hidden, actions), nn.Linear(hidden, 1)

    def forward(self, observations: Tensor, state: Tensor | None, starts: Tensor) -> tuple[Decisions, Tensor]:
        found = []
        state = observations.new_zeros(len(observations), self.core.hidden_size) if state is None else state
        for seen, begins in zip(observations.unbind(1), starts.unbind(1), strict=True):
            state = self.core(seen, state.masked_fill(begins[:, None], 0.0))
            found.append(state)
        features = torch.stack(found, 1)
        return Decisions(Categorical(self.head(features)), self.worth(features).squeeze(-1)), state


def fresh(env: TensorEnv) -> Memory:
    env.reset(seed=0)
    return begin(env)


def test_segments_go_on_where_the_one_before_ended() -> None:
    """Read in one pass, with what is remembered cleared where an episode began, all is as it was step by step."""
    env, policy, keys = Chain(5, 4), Recurrent(LENGTH), noise.key("keys", torch.arange(5))
    memory, pieces, made = fresh(env), [], []
    for number in range(3):
        piece, decisions, memory = act(env, policy, memory, 3, noise.fold(keys, number))
        assert memory.state.grad_fn is None, "gradients stop at the seam"
        assert decisions.values.grad_fn is not None
        pieces.append(piece)
        made.append(decisions.values)
    seen, taken = (torch.cat([getattr(piece, name) for piece in pieces], 1) for name in ("observations", "mask"))
    starts = torch.cat((torch.ones(5, 1).bool(), ~taken), 1)
    read, _ = policy(torch.cat((seen, memory.observation[:, None]), 1), None, starts)
    torch.testing.assert_close(read.values[:, :-1], torch.cat(made, 1))
    torch.testing.assert_close(read.values[:, -1], pieces[-1].last_value)
    env = Chain(5, 4)
    again, _, _ = act(env, policy, fresh(env), 3, noise.fold(keys, 0))
    assert torch.equal(again.actions, pieces[0].actions), "the same keys, the same segment"
    assert torch.equal(again.rewards, pieces[0].rewards)


def test_the_step_of_an_autoreset_is_no_decision() -> None:
    env = Chain(3, 4)
    trajectory, decisions, _ = act(env, Recurrent(LENGTH), fresh(env), 10, noise.key("keys", torch.arange(3)))
    ended = (trajectory.terminated | trajectory.truncated)[:, :-1]
    assert torch.equal(trajectory.mask[:, 1:], ~ended)
    loss, told = actor_critic_loss(trajectory, decisions)
    values = decisions.values
    (gradient,) = torch.autograd.grad(loss, values)
    assert not gradient[~trajectory.mask].any()
    assert gradient[trajectory.mask].all()
    assert set(told) == {"reward", "entropy", "value_loss"}


def test_advantages_are_those_of_each_episode_alone() -> None:
    """Cut by a limit: the value of its own last observation, not of the next episode's first."""
    env = Chain(6, 4)
    trajectory, _, _ = act(env, Recurrent(LENGTH), fresh(env), 13, noise.key("keys", torch.arange(6)))
    advantages, returns = segment_advantage(trajectory, 0.9, 0.8)
    seen = 0
    for row in range(6):
        first = 0
        for step in range(13):
            over = trajectory.terminated[row, step] or trajectory.truncated[row, step]
            if not over and step < 12:
                continue
            here = slice(first, step + 1)
            last = trajectory.values[row, step + 1] if step < 12 else trajectory.last_value[row]
            parts = (trajectory.values[row, here], last, trajectory.mask[row, here], trajectory.terminated[row, here])
            alone, theirs = generalised_advantage(
                trajectory.rewards[row : row + 1, here],
                parts[0][None],
                parts[1][None],
                parts[2][None],
                parts[3][None],
                trajectory.truncated[row : row + 1, here],
                0.9,
                0.8,
            )
            torch.testing.assert_close(advantages[row, here], alone[0])
            torch.testing.assert_close(returns[row, here], theirs[0])
            first, seen = step + 2, seen + 1
    assert seen > 12
    assert trajectory.truncated.any()


def learned(env: TensorEnv, policy: Policy, updates: int, steps: int, **how: float) -> float:
    """Mean reward a step over the last tenth of the updates."""
    optimizer, memory, found = torch.optim.Adam(policy.parameters(), 1e-2), fresh(env), []
    for update in range(updates):
        keys = noise.key("segment", update, torch.arange(env.num_envs))
        trajectory, decisions, memory = act(env, policy, memory, steps, keys)
        loss, told = actor_critic_loss(trajectory, decisions, **how)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(told["reward"]))
    return sum(found[-updates // 10 :]) / (updates // 10)


def test_it_remembers_a_cue() -> None:
    """A fifth of the steps can earn 1; without memory half of them do."""
    assert learned(Recall(32), Recurrent(3), 150, 5, discount=0.9) > 0.19


def test_it_walks_to_the_end_of_a_chain() -> None:
    policy = Recurrent(LENGTH)
    assert learned(Chain(32, 12), policy, 120, 4, discount=0.9) > 0.17, "five steps to a reward of 1: at best 0.2"
    decisions, _ = policy(torch.eye(LENGTH)[None, :-1], None, torch.tensor([[True] + [False] * 4]))
    assert (decisions.distribution.mode() == RIGHT).all()


def test_an_environment_that_stands_still_is_refused() -> None:
    env = Chain(2, 4, autoreset="disabled")
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"^env: found autoreset 'disabled'"):
        begin(env)
