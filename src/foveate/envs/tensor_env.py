"""Environments as three pure functions on tensors, thousands of copies in lockstep, with Gymnasium's interface on top.

A task is `initial`, `transition` and `observe`; everything else (stepping, autoreset, seeding, final observations,
time limits, NumPy for the libraries of others) stands here, once.

Chance follows from keys (`foveate.noise`). Copy i of `reset(seed=s)` plays the same episodes as copy 0 of
`reset(seed=s + i)`, so lockstep and single form agree and nothing depends on the number of copies.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.types import State, Tree, map_tree


class TensorEnv(VectorEnv):
    """A lockstep environment. A subclass gives the two single spaces, then the three functions.

    Args:
        num_envs: copies in lockstep.
        observation_space: of one copy.
        action_space: of one copy.
        examples: how many examples `initial` can show; ids are drawn from 0 to `examples` - 1.
        horizon: steps after which an episode is truncated; None if the task ends by itself.
        device: where everything lives.
        output: "torch" tensors on the device, or "numpy" arrays for wrappers and libraries that know no tensors.
        autoreset: "next_step" (Gymnasium's default), "same_step" (the last observation is in `infos["final_obs"]`) or
            "disabled": an ended copy stands still until `reset(options={"reset_mask": ...})`; our rollouts use it.
    """

    def __init__(
        self,
        num_envs: int,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        examples: int = 1,
        horizon: int | None = None,
        device: str | torch.device = "cpu",
        output: Literal["torch", "numpy"] = "torch",
        autoreset: Literal["next_step", "same_step", "disabled"] = "next_step",
    ) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.autoreset = AutoresetMode[autoreset.upper()]
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset}
        self.examples, self.horizon = examples, horizon
        self.device, self.output = torch.device(device), output
        self._seeds: Tensor | None = None

    @abstractmethod
    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> State:
        """The first state of an episode on example `ids`: a tree of [batch, ...]."""

    @abstractmethod
    def transition(
        self, state: State, actions: Tree, keys: Int[Tensor, " batch"]
    ) -> tuple[State, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """One step: the next state, the reward, and whether the task has ended. Changes nothing in place."""

    @abstractmethod
    def observe(self, state: State) -> Tree:
        """What is seen of a state: a tree of [batch, ...] within the observation space."""

    @property
    def state(self) -> State:
        """The present state of all copies."""
        return self._state

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tree, dict[str, Any]]:
        """Start episodes.

        Args:
            seed: copy i gets seed + i, or a list gives one for each; None goes on with the next episode of each copy.
            options: "reset_mask" [batch] resets these copies only; "ids" [batch] chooses the examples; "keys" [batch]
                takes the place of seed and episode as the source of chance.
        """
        options = options or {}
        mask = options.get("reset_mask")
        which = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=self.device)
        if "keys" not in options:
            self._reseed(seed, which)
        self._start(which, options.get("ids"), options.get("keys"))
        return self._out(self.observe(self._state)), {}

    def step(self, actions: Tree) -> tuple[Tree, Any, Any, Any, dict[str, Any]]:
        """Take one action in every copy."""
        actions = torch.as_tensor(actions, device=self.device)
        waiting = self._ended
        some_wait = bool(waiting.any())
        keys = noise.key(self._keys, self._steps)
        state, reward, terminated = self.transition(self._state, actions, keys)
        steps = self._steps + 1
        truncated = torch.zeros_like(terminated)
        if self.horizon is not None:
            truncated = (steps >= self.horizon) & ~terminated
        if some_wait:
            state = map_tree(lambda new, old: _select(waiting, old, new), state, self._state)
            steps = torch.where(waiting, self._steps, steps)
            reward, terminated, truncated = reward * ~waiting, terminated & ~waiting, truncated & ~waiting
        self._state, self._steps = state, steps
        ended = terminated | truncated
        infos: dict[str, Any] = {}
        if self.autoreset == AutoresetMode.DISABLED:
            self._ended = ended | waiting
        elif self.autoreset == AutoresetMode.NEXT_STEP:
            if some_wait:
                self._episodes = self._episodes + waiting
                self._start(waiting, None, None)
            self._ended = ended
        elif bool(ended.any()):
            infos = {"final_obs": self._out(self.observe(state)), "_final_obs": self._out(ended)}
            self._episodes = self._episodes + ended
            self._start(ended, None, None)
        observation = self._out(self.observe(self._state))
        return observation, self._out(reward), self._out(terminated), self._out(truncated), infos

    def _reseed(self, seed: int | list[int | None] | None, which: Tensor | None) -> None:
        fresh = self._seeds is None
        if isinstance(seed, list):
            drawn = [int(self.np_random.integers(2**31)) if one is None else one for one in seed]
            seeds = torch.tensor(drawn, device=self.device)
        elif seed is not None or fresh:
            if seed is not None:
                self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
            first = int(self.np_random.integers(2**31)) if seed is None else seed
            seeds = first + torch.arange(self.num_envs, device=self.device)
        else:
            self._episodes = self._episodes + (1 if which is None else which.long())
            return
        zeros = torch.zeros_like(seeds)
        if self._seeds is None or which is None:
            self._seeds, self._episodes = seeds, zeros
        else:
            self._seeds = torch.where(which, seeds, self._seeds)
            self._episodes = torch.where(which, zeros, self._episodes)

    def _start(self, which: Tensor | None, ids: Tensor | None, keys: Tensor | None) -> None:
        if keys is None:
            keys = noise.key(self._seeds, "episode", self._episodes)
        if ids is None:
            ids = noise.integers(noise.fold(keys, "example"), self.examples)
        ids, keys = ids.to(self.device), keys.to(self.device)
        if which is None:
            self._state, self._keys = self.initial(ids, noise.fold(keys, "initial")), keys
            self._steps = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
            self._ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
            return
        fresh = self.initial(ids[which], noise.fold(keys[which], "initial"))
        self._state = map_tree(lambda old, new: _put(old, which, new), self._state, fresh)
        self._keys = torch.where(which, keys, self._keys)
        self._steps = self._steps.masked_fill(which, 0)
        self._ended = self._ended & ~which

    def _out(self, tree: Tree) -> Tree:
        return tree if self.output == "torch" else map_tree(lambda leaf: leaf.cpu().numpy(), tree)


class SingleEnv(gymnasium.Env):
    """One copy of a lockstep environment behind Gymnasium's plain interface: NumPy in and out, no batch dimension."""

    lockstep: ClassVar[type[TensorEnv]]

    def __init__(self, **options: Any) -> None:
        self.copies = self.lockstep(1, output="numpy", autoreset="disabled", **options)
        self.observation_space = self.copies.single_observation_space
        self.action_space = self.copies.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options` as for the lockstep form, with a batch of one."""
        super().reset(seed=seed)
        if seed is None and self.copies._seeds is None:
            seed = int(self.np_random.integers(2**31))
        observation, info = self.copies.reset(seed=seed, options=options)
        return _first(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one action."""
        observation, reward, terminated, truncated, info = self.copies.step(np.asarray(action)[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


def _select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *(1,) * (no.dim() - 1)), yes, no)


def _put(old: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    new = old.clone()
    new[mask] = rows
    return new


def _first(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: _first(leaf) for name, leaf in observation.items()}
    return observation[0]
