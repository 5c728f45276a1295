"""Actor-critic over lockstep copies: a few steps of all of them, an update, and on from where they stand.

Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning" (A3C): many actors in parallel so that what one
update sees is not one episode's story, without a replay. The actors there are processes that update shared weights each
in its own time; here they are the copies of one lockstep environment and the update waits for all (A2C). That serves
the purpose, needs no worker processes, uses the device for all copies at once, and no gradient is of older weights.

    memory = begin(env)
    while ...:
        trajectory, decisions, memory = act(env, policy, memory, steps=8, keys=keys)
        loss = actor_critic_loss(trajectory, decisions, discount=0.99, lam=0.95)

A recurrent policy remembers from one segment to the next; gradients stop at the seam (truncated backpropagation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.learn.baselines import value_loss
from foveate.learn.policy_gradient import entropy_bonus, policy_gradient
from foveate.learn.returns import generalised_advantage
from foveate.types import Decisions, InputError, Trajectory, Tree, concatenate, map_tree


@dataclass(frozen=True)
class Memory:
    """Where all copies stand: a tree of [copies, ...].

    Attributes:
        observation: what is seen now.
        state: what the policy remembers; None before anything was seen.
        starts: true where an episode begins now.
    """

    observation: Tree
    state: Tree
    starts: Bool[Tensor, " copies"]


def begin(env: Any) -> Memory:
    """Look at an environment (`foveate.envs.TensorEnv`) that has just been reset.

    Raises:
        InputError: it gives arrays, or does not start ended copies again by itself, a step later.
    """
    if env.autoreset.name != "NEXT_STEP" or env.output != "torch":
        raise InputError(
            f"env: found autoreset {env.autoreset.name.lower()!r} and output {env.output!r}, expected 'next_step' and "
            "'torch', which are the defaults"
        )
    return Memory(env.observe(env.state), None, ~env.waiting)


def act(
    env: Any, policy: nn.Module, memory: Memory, steps: int, keys: Int[Tensor, " copies"]
) -> tuple[Trajectory, Decisions, Memory]:
    """Let a policy act for some steps in every copy, through ends of episodes and on.

    The step in which an ended copy begins anew is no decision and stands outside the mask; what the policy sees there
    is the last observation of the episode that ended.

    Args:
        env: in lockstep.
        policy: a `Policy` with values.
        memory: from `begin`, or of the segment before.
        steps: of the segment.
        keys: one a copy, others for each segment.

    Returns:
        The segment, the decisions with their graph, and where the copies stand after it. `last_value` is the value of
        what is seen then.
    """
    rows: list[dict[str, Tree]] = []
    made: list[Decisions] = []
    draws = noise.fold(keys[:, None], "action", torch.arange(steps, device=keys.device))
    for step in range(steps):
        seen = map_tree(lambda leaf: leaf[:, None], memory.observation)
        decisions, state = policy(seen, memory.state, memory.starts[:, None])
        taken = ~env.waiting
        with torch.no_grad():
            action = decisions.distribution.sample(draws[:, step : step + 1])
            reward, terminated, truncated, _ = env.advance(map_tree(lambda leaf: leaf[:, 0], action))
            row = {"observations": seen, "actions": action, "values": decisions.values.detach()}
            flags = {"rewards": reward, "mask": taken, "terminated": terminated, "truncated": truncated}
            rows.append(row | {name: flag[:, None] for name, flag in flags.items()})
        made.append(decisions)
        memory = Memory(env.observe(env.state), state, ~taken)
    joined, decided = concatenate(rows, 1), concatenate(made, 1)
    with torch.no_grad():
        after, _ = policy(
            map_tree(lambda leaf: leaf[:, None], memory.observation), memory.state, memory.starts[:, None]
        )
    log_probs = decided.distribution.log_prob(joined["actions"]).detach()
    trajectory = Trajectory(**joined, log_probs=log_probs, last_value=after.values.detach().squeeze(1))
    return trajectory, decided, replace(memory, state=map_tree(lambda leaf: leaf.detach(), memory.state))


def segment_advantage(
    trajectory: Trajectory, discount: float, lam: float
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """`generalised_advantage` of a segment with several episodes a row, and the returns for the critic.

    Where a limit cut an episode, the value of its last observation, which the step after it saw, is part of its reward.
    """
    assert trajectory.values is not None
    assert trajectory.last_value is not None
    after = torch.cat((trajectory.values[:, 1:], trajectory.last_value[:, None]), 1)
    cut = trajectory.truncated & ~trajectory.terminated & trajectory.mask
    rewards = trajectory.rewards + discount * after * cut
    ends = trajectory.terminated | cut
    given = trajectory.values, trajectory.last_value, trajectory.mask, ends, torch.zeros_like(cut)
    return generalised_advantage(rewards, *given, discount, lam)


def actor_critic_loss(
    trajectory: Trajectory,
    decisions: Decisions,
    discount: float = 0.99,
    lam: float = 0.95,
    entropy: float = 0.01,
    value_weight: float = 0.5,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """REINFORCE with the critic's advantages, the critic's squared error, and the entropy; to be minimised.

    -Σ log π(a_t | s_t) Â_t / steps + value_weight · Σ (V(s_t) - R_t)² / steps - entropy · mean H(π(· | s_t))

    Args:
        trajectory: of `act`.
        decisions: of `act`, with their graph.
        discount: γ.
        lam: λ of the advantage (`generalised_advantage`).
        entropy: weight of the entropy, which is sought.
        value_weight: of the critic's error.

    Returns:
        The loss, and its parts for a log.
    """
    assert decisions.values is not None
    advantages, returns = segment_advantage(trajectory, discount, lam)
    log_probs = decisions.distribution.log_prob(trajectory.actions)
    gain = policy_gradient(log_probs, None, advantages, trajectory.mask).loss
    error = value_loss(decisions.values, returns, trajectory.mask)
    spread = entropy_bonus(decisions.distribution, trajectory.mask)
    taken = trajectory.mask.sum().clamp(min=1)
    told = {
        "reward": (trajectory.rewards * trajectory.mask).sum() / taken,
        "entropy": spread.detach(),
        "value_loss": error.detach(),
    }
    return gain + value_weight * error - entropy * spread, told
