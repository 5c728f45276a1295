"""How a policy learns from an expert's moves, and how it registers pictures once it has learned.

That is a greedy walk, then Monte Carlo look-ahead by its own values. Nobody tells it when the pictures lie together, so
no walk ends early; what is known of landmarks is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.envs.registration import RegistrationEnv, RegistrationState
from foveate.types import Decisions, State, map_tree

SHARP = 10.0  # how much values count when rollouts are averaged
AT_ONCE = 50  # pairs registered side by side
SOFT = 0.2  # of a step, by which moves may differ as if they were one to the expert


class Expert:
    """An environment that notes before every step what an expert knows of it: the right transform."""

    def __init__(self, env: RegistrationEnv) -> None:
        self.env, self._gains, self._left = env, list[Tensor](), list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def advance(self, actions: Int[Tensor, " batch"]) -> Any:
        """As the environment's."""
        self._gains.append(self.env.gains(self.env.state))
        self._left.append(self.env.left(self.env.state))
        return self.env.advance(actions)

    def told(self) -> tuple[Float[Tensor, "batch time moves"], Float[Tensor, "batch time 4"]]:
        """What each move would have gained, and what was left to do, at each step since it was made."""
        return torch.stack(self._gains, 1), torch.stack(self._left, 1)


def expert_loss(
    gains: Float[Tensor, "batch time moves"],
    left: Float[Tensor, "batch time 4"],
    decisions: Decisions,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of a policy with an expert who takes what gains most, and the error of what it says is left.

    The expert's move is soft, softmax(gain / `SOFT`), so that nothing is made of moves that are as good. How much is
    left (`decisions.extras["left"]`) teaches the eyes sooner than which step comes next.
    """
    apart = -((gains / SOFT).softmax(-1) * decisions.distribution.logits.log_softmax(-1)).sum(-1)
    apart = apart + F.smooth_l1_loss(decisions.extras["left"], left, reduction="none").sum(-1)
    return apart.mean() if mask is None else (apart * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def steps(
    env: RegistrationEnv,
    policy: Callable[..., Any],
    state: RegistrationState,
    memory: State,
    count: int,
    keys: Int[Tensor, " batch"] | None = None,
) -> tuple[RegistrationState, State, Float[Tensor, "batch states 4"], Float[Tensor, "batch states"]]:
    """Take some steps.

    Args:
        env: whose transitions are taken, on copies: its own state stays as it is.
        policy: a `Policy` with values.
        state: where to begin.
        memory: what the policy remembers; None at the first step of a walk.
        count: how many steps.
        keys: from which moves are drawn; None: the likeliest are taken.

    Returns:
        The state after them, what is then remembered, and transforms and values of all states on the way, the first and
        the last included.
    """
    transforms, values = [], []
    for step in range(count + 1):
        seen = map_tree(lambda leaf: leaf[:, None], env.observe(state))
        starts = torch.full((len(state.pair), 1), memory is None, device=state.pair.device)
        decisions, later = policy(seen, memory, starts)
        transforms.append(state.transform)
        values.append(decisions.values.squeeze(1))
        if step == count:
            break
        if keys is None:
            moves = decisions.distribution.mode()
        else:
            moves = decisions.distribution.sample(noise.fold(keys, "rollout", step)[:, None])
        state, memory = replace(state, transform=env.moved_by(state.transform, moves.squeeze(1))), later
    return state, memory, torch.stack(transforms, 1), torch.stack(values, 1)


def walk(
    env: RegistrationEnv,
    policy: Callable[..., Any],
    state: RegistrationState,
    keys: Int[Tensor, " batch"],
    horizon: int,
    rollouts: int,
    depth: int,
) -> Float[Tensor, "batch states 4"]:
    """Transforms on the way of a greedy walk of `horizon` steps, and after it what look-ahead makes of its end.

    Twice, `rollouts` walks of `depth` steps are drawn from where it stands. The first time it goes on from the end that
    has the highest value; the second time, the best state of each rollout is averaged, weighted by its value. The
    average lies between the steps.
    """
    state, memory, path, _ = steps(env, policy, state, None, horizon)
    if not rollouts:
        return path
    for turn in range(2):
        many, kept = (map_tree(lambda leaf: leaf.repeat_interleave(rollouts, 0), tree) for tree in (state, memory))
        draws = noise.fold(keys[:, None], turn, torch.arange(rollouts, device=keys.device)).flatten()
        ends, kept, transforms, values = steps(env, policy, many, kept, depth, draws)
        if turn == 0:
            best = values[:, -1].view(-1, rollouts).argmax(1)
            rows = best + rollouts * torch.arange(len(best), device=best.device)
            state, memory = ends.rows(rows), map_tree(lambda leaf: leaf[rows], kept)  # noqa: B023
            path = torch.cat((path, transforms[rows, 1:]), 1)
    worth, place = values.max(1)
    found = transforms.gather(1, place[:, None, None].expand(-1, 1, 4)).view(-1, rollouts, 4)
    weight = (SHARP * worth.view(-1, rollouts)).softmax(1)
    return torch.cat((path, (weight[..., None] * found).sum(1, keepdim=True)), 1)


def walked(
    env: RegistrationEnv, policy: Callable[..., Any], seed: int, horizon: int, rollouts: int = 0, depth: int = 1
) -> Float[Tensor, "size states 4"]:
    """Walks over all pairs of an environment that displaces nothing; the last transform is what was found."""
    paths = []
    for ids in torch.arange(env.examples, device=env.device).split(AT_ONCE):
        keys = noise.key(seed, "look ahead", ids)
        paths.append(walk(env, policy, env.initial(ids, keys), keys, horizon, rollouts, depth))
    return torch.cat(paths).cpu()


@torch.no_grad()
def said(
    env: RegistrationEnv, regressor: Callable[[Tensor, Tensor], Tensor], looks: int = 1
) -> Float[Tensor, "size states 4"]:
    """The same of a regressor of what is left to do, which looks as often."""
    paths = []
    for ids in torch.arange(env.examples, device=env.device).split(AT_ONCE):
        state = env.initial(ids, ids)
        path = [state.transform]
        for _ in range(looks):
            seen = env.observe(state)
            state = replace(state, transform=state.transform + regressor(seen["fixed"], seen["moving"]))
            path.append(state.transform)
        paths.append(torch.stack(path, 1))
    return torch.cat(paths).cpu()
