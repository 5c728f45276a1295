"""Tracking for PettingZoo: all objects of a frame are agents that act in parallel and see where the others are now.

    env = ParallelTracking()
    observations, infos = env.reset(seed=0)
    while env.agents:
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        observations, rewards, terminations, truncations, infos = env.step(actions)

Moves, views and rewards are those of `foveate.envs.box_tracking`. An agent is an object that is in a frame and in the
next one; it leaves when it has stopped, and its box stays for the others to see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch

from foveate import noise
from foveate.envs.box_tracking import ACTIONS, STOP, BoxTrackingEnv, TrackingState, observation_space
from foveate.envs.joint_tracking import together
from foveate.geometry import overlaps
from foveate.types import InputError

try:
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise InputError("pettingzoo: not installed, and this is its interface; pip install 'foveate[tracking]'") from error


class ParallelTracking(ParallelEnv):
    """A parallel environment of one frame and the next.

    Args:
        render_mode: None or "rgb_array".
        horizon: steps after which who has not stopped is truncated.
        **options: of `BoxTrackingEnv`, other than those of a lockstep environment.

    Raises:
        InputError: as `BoxTrackingEnv`.
    """

    metadata: dict[str, Any] = {"name": "foveate_tracking_v0", "render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, horizon: int = 20, **options: Any) -> None:
        self.lockstep = BoxTrackingEnv(1, **options)
        self.render_mode, self.horizon = render_mode, horizon
        found = self.lockstep.pairs
        self._ways = found[:, [0, 2]].unique(dim=0, return_counts=True)
        self.possible_agents = [f"object_{number}" for number in range(int(self._ways[1].max()))]
        sizes = self.lockstep.patch, self.lockstep.past, self.lockstep.neighbours
        self._observations = {agent: observation_space(*sizes) for agent in self.possible_agents}
        self._actions = {agent: gymnasium.spaces.Discrete(ACTIONS) for agent in self.possible_agents}
        self.agents: list[str] = []
        self._seed, self._episode, self._steps = 0, -1, 0
        self._state: TrackingState | None = None

    def observation_space(self, agent: str) -> gymnasium.spaces.Dict:
        """What an agent sees: as in the lockstep form."""
        return self._observations[agent]

    def action_space(self, agent: str) -> gymnasium.spaces.Discrete:
        """The moves, and the stop."""
        return self._actions[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Begin with the objects of a frame that are in the next one too; options: "way", its number."""
        if seed is not None:
            self._seed, self._episode = seed, -1
        self._episode, self._steps = self._episode + 1, 0
        keys = noise.key(self._seed, "episode", self._episode)
        ways = self._ways[0]
        chosen = (options or {}).get("way", int(noise.integers(noise.fold(keys, "way"), len(ways), 1)))
        if not 0 <= chosen < len(ways):
            raise InputError(f"way: found {chosen}, expected 0 to {len(ways) - 1}, the pairs of frames there are")
        ids = (self.lockstep.pairs[:, [0, 2]] == ways[chosen]).all(1).nonzero().flatten()
        single = self.lockstep.initial(ids, noise.fold(keys, "agent", torch.arange(len(ids))))
        groups, sizes = torch.zeros_like(ids), (self.lockstep.past, self.lockstep.neighbours)
        state, self._rows = together(single.before, single.after, groups, single.start, single.box, *sizes)
        self._state = replace(state, target=single.target)
        self.agents = self.possible_agents[: len(ids)]
        return self._seen(self.agents), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        """Take the actions of all agents at once: observations, rewards, terminations, truncations, infos.

        Raises:
            InputError: an agent that is there gives no action.
        """
        if missing := [agent for agent in self.agents if agent not in actions]:
            raise InputError(f"actions: found none of {missing[0]}, expected one of each agent that is there")
        assert self._state is not None
        state, agents, env = self._state, self.agents, self.lockstep
        # who has left does not move any more
        chosen = torch.tensor([int(actions[agent]) if agent in agents else STOP for agent in self._all()])
        after = env.walking.act(state, chosen)
        was, now = (overlaps(box[:, None], state.target[:, None]).flatten() for box in (state.box, after.box))
        right = torch.where(was >= env.threshold, 1.0, -1.0)
        rewards = torch.where(chosen == STOP, right, env.shaping * (now - was).sign())
        self._state = replace(after, near_box=after.box[self._rows])
        self._steps += 1
        place = {agent: row for row, agent in enumerate(self._all())}
        stops = {agent: bool(chosen[place[agent]] == STOP) for agent in agents}
        cut = {agent: self._steps >= self.horizon and not stops[agent] for agent in agents}
        seen = self._seen(agents)
        self.agents = [agent for agent in agents if not stops[agent] and not cut[agent]]
        return (
            seen,
            {agent: float(rewards[place[agent]]) for agent in agents},
            stops,
            cut,
            {agent: {} for agent in agents},
        )

    def render(self) -> np.ndarray | None:
        """The objects side by side, each as in the lockstep form; None without a render mode."""
        if self.render_mode is None or self._state is None:
            return None
        return np.concatenate(list(self.lockstep.draw(self._state).cpu().numpy()), 1)

    def _all(self) -> list[str]:
        """Agents of this episode, those that have left among them."""
        assert self._state is not None
        return self.possible_agents[: len(self._state.box)]

    def _seen(self, agents: list[str]) -> dict[str, Any]:
        assert self._state is not None
        found = {name: leaf.cpu().numpy() for name, leaf in self.lockstep.observe(self._state).items()}
        rows = {agent: row for row, agent in enumerate(self._all())}
        return {agent: {name: leaf[rows[agent]] for name, leaf in found.items()} for agent in agents}
