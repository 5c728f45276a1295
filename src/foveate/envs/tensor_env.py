"""Environments as three pure functions on tensors, thousands of copies in lockstep, with Gymnasium's interface on top.

A task is `initial`, `transition` and `observe`; everything else (stepping, autoreset, seeding, final observations,
time limits, NumPy for the libraries of others) stands here, once.

Chance follows from keys (`foveate.noise`). Copy i of `reset(seed=s)` plays the same episodes as copy 0 of
`reset(seed=s + i)`, so lockstep and single form agree and nothing depends on the number of copies.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, get_args

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.types import InputError, State, Tree, map_tree

Output = Literal["torch", "numpy"]
Autoreset = Literal["next_step", "same_step", "disabled"]
RESET_OPTIONS = ("reset_mask", "ids", "keys")
CLOCKS = ("_seeds", "_keys", "_steps", "_episodes", "_ended")  # of the copies, beside their state


class TensorEnv(VectorEnv):
    """A lockstep environment. A subclass gives the two single spaces, then the three functions.

    Tensors that `reset` and `step` return may be part of the state: read them, do not change them in place. NumPy
    arrays are copies.

    Args:
        num_envs: copies in lockstep.
        observation_space: of one copy; Dict and what it holds, but no Tuple.
        action_space: of one copy; no Dict and no Tuple, which many libraries refuse.
        examples: how many examples `initial` can show; ids are drawn from 0 to `examples` - 1.
        horizon: steps after which an episode is truncated; None if the task ends by itself.
        device: where everything lives.
        output: "torch" tensors on the device, or "numpy" arrays for wrappers and libraries that know no tensors.
        autoreset: "next_step" (Gymnasium's default), "same_step" (the last observation is in `infos["final_obs"]`) or
            "disabled": an ended copy stands still, with reward 0, until `reset(options={"reset_mask": ...})`; our
            rollouts use it.
        render_mode: "rgb_array" if the environment has a `draw`.

    Raises:
        InputError: a number of copies or a horizon below 1, or a mode that does not exist.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's name and place for it)
    chance: ClassVar[bool] = True
    """Whether `transition` draws. If not, its keys are those of the episode, and no step spends time on hashing."""

    def __init__(
        self,
        num_envs: int,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        examples: int = 1,
        horizon: int | None = None,
        device: str | torch.device = "cpu",
        output: Output = "torch",
        autoreset: Autoreset = "next_step",
        render_mode: str | None = None,
    ) -> None:
        check_choice("output", output, get_args(Output))
        check_choice("autoreset", autoreset, get_args(Autoreset))
        check_choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        for name, number in ("num_envs", num_envs), ("horizon", horizon):
            if number is not None and number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.autoreset = AutoresetMode[autoreset.upper()]
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset}
        self.render_mode = render_mode
        self.examples, self.horizon = examples, horizon
        self.device, self.output = torch.device(device), output
        self._action_dtype = torch.from_numpy(np.empty(0, action_space.dtype)).dtype
        self._state: State = None
        self._seeds: Tensor | None = None
        self._keys = self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._episodes = self._steps - 1
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    @abstractmethod
    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> State:
        """The first state of an episode on example `ids`: a tree of [batch, ...]. Row i depends on row i alone."""

    @abstractmethod
    def transition(
        self, state: State, actions: Tensor, keys: Int[Tensor, " batch"]
    ) -> tuple[State, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """One step: the next state, the reward, and whether the task has ended. Changes nothing in place."""

    @abstractmethod
    def observe(self, state: State) -> Tree:
        """What is seen of a state: a tree of [batch, ...] within the observation space."""

    def draw(self, state: State) -> UInt8[Tensor, "batch height width 3"]:
        """A picture of a state, red, green, blue. Optional; `metadata["render_modes"]` then names "rgb_array"."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        """The present state of all copies."""
        return self._state

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tree, dict[str, Any]]:
        """Start episodes.

        Args:
            seed: copy i gets seed + i, or a list gives one for each; a copy without goes on with its next episode.
            options: "reset_mask" [num_envs] resets these copies only; "ids" [num_envs] chooses the examples; "keys"
                [num_envs] takes the place of seed and episode as the source of chance.

        Raises:
            InputError: options that do not exist, or not of this shape and range.
        """
        options = options or {}
        for name in options:
            check_choice("options", name, RESET_OPTIONS)
        mask = self._option(options, "reset_mask", torch.bool)
        ids, keys = self._option(options, "ids", torch.int64), self._option(options, "keys", torch.int64)
        if ids is not None and bool(((ids < 0) | (ids >= self.examples)).any()):
            raise InputError(
                f"ids: found {int(ids.min())} to {int(ids.max())}, expected 0 to {self.examples - 1}, "
                "the examples there are"
            )
        if mask is not None and self._state is None:
            raise InputError("reset_mask: no copy has started yet; reset all of them first")
        if keys is None or self._seeds is None:
            self._reseed(seed, mask)
        self._start(mask, ids, keys)
        return self._out(self.observe(self._state), self.single_observation_space), {}

    def step(self, actions: Tensor | np.ndarray) -> tuple[Tree, Any, Any, Any, dict[str, Any]]:
        """Take one action in every copy: observations, rewards, terminated, truncated, infos.

        Under "same_step", `infos` follows Gymnasium's convention when copies end: `final_obs` (with NumPy, an array of
        objects, the last observation of each copy that ended and None elsewhere; with tensors, the observations of all
        copies in one tree) and the mask `_final_obs`; `final_info` is empty.

        Raises:
            InputError: actions of another shape, or no reset before.
        """
        reward, terminated, truncated, infos = self.advance(actions)
        observation = self._out(self.observe(self._state), self.single_observation_space)
        return observation, self._out(reward), self._out(terminated), self._out(truncated), infos

    def advance(
        self, actions: Tensor | np.ndarray
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"], Bool[Tensor, " batch"], dict[str, Any]]:
        """Do what `step` does without looking: rewards, terminated and truncated as tensors, and infos.

        Nobody looks after the last step of an episode, and what is seen may cost more than the step:
        `foveate.learn.rollout` calls `advance` and then, if it must, `observe(env.state)`.
        """
        if self._state is None:
            raise InputError("step: no copy has started yet; call reset() first")
        actions = torch.as_tensor(actions, dtype=self._action_dtype, device=self.device)
        expected = self.action_space.shape
        if actions.shape != expected:
            raise InputError(f"actions: found {tuple(actions.shape)}, expected {expected}: one action for each copy")
        waiting = self._ended if bool(self._ended.any()) else None
        keys = noise.fold(self._keys + self._steps, "step") if self.chance else self._keys
        state, reward, terminated = self.transition(self._state, actions, keys)
        self._steps = self._steps + 1
        if self.horizon is None:
            truncated = torch.zeros_like(terminated)
        else:
            truncated = (self._steps >= self.horizon) & ~terminated
        if waiting is not None:
            reward, terminated, truncated = reward * ~waiting, terminated & ~waiting, truncated & ~waiting
            if self.autoreset == AutoresetMode.DISABLED:
                # What a transition hands on as it is (an image) needs no copy.
                state = map_tree(lambda new, old: new if new is old else _select(waiting, old, new), state, self._state)
        self._state = state
        return reward, terminated, truncated, self._end(terminated | truncated, waiting)

    @property
    def waiting(self) -> Bool[Tensor, " batch"]:
        """Copies whose episode has ended: their next step is no transition."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is, so that a run can go on exactly there."""
        leaves: list[Tensor] = []

        def note(leaf: Tensor) -> Tensor:
            leaves.append(leaf)
            return leaf

        map_tree(note, self._state)
        return {"state": leaves, **{name: getattr(self, name) for name in CLOCKS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, in an environment of the same arguments."""
        leaves = iter(state["state"])
        self.reset(seed=0)  # for the shape of the tree
        self._state = map_tree(lambda _: next(leaves).to(self.device), self._state)
        for name in CLOCKS:
            setattr(self, name, state[name].to(self.device))

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each copy, uint8 [height, width, 3]; None without a render mode."""
        return None if self.render_mode is None else tuple(self.draw(self._state).cpu().numpy())

    def _end(self, ended: Tensor, waiting: Tensor | None) -> dict[str, Any]:
        """Start again where it is time to."""
        if self.autoreset == AutoresetMode.DISABLED:
            self._ended = ended if waiting is None else ended | waiting
        elif self.autoreset == AutoresetMode.NEXT_STEP:
            if waiting is not None:
                self._episodes = self._episodes + waiting
                self._start(waiting, None, None)
            self._ended = ended
        elif bool(ended.any()):
            final: Any = self._out(self.observe(self._state), self.single_observation_space)
            mask = self._out(ended)
            if self.output == "numpy":
                single = iterate(self.observation_space, final)
                final = np.full(self.num_envs, None, dtype=object)
                for copy, (observation, is_final) in enumerate(zip(single, mask, strict=True)):
                    if is_final:
                        final[copy] = observation
            self._episodes = self._episodes + ended
            self._start(ended, None, None)
            return {"final_obs": final, "_final_obs": mask, "final_info": {}, "_final_info": mask}
        return {}

    def _option(self, options: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor | None:
        if name not in options:
            return None
        value = torch.as_tensor(options[name], device=self.device)
        if value.shape != (self.num_envs,) or value.dtype != dtype:
            raise InputError(
                f"{name}: found {list(value.shape)} of {value.dtype}, expected [{self.num_envs}] of {dtype}: "
                "one for each copy"
            )
        return value

    def _reseed(self, seed: int | list[int | None] | None, mask: Tensor | None) -> None:
        """Give copies new seeds, and go on to the next episode of those that get none."""
        if isinstance(seed, list) and len(seed) != self.num_envs:
            raise InputError(f"seed: found a list of {len(seed)}, expected {self.num_envs}: one for each copy")
        if self._seeds is None:
            self._seeds = self._consecutive(int(self.np_random.integers(2**31)))
        if isinstance(seed, list):
            given = torch.tensor([one is not None for one in seed], device=self.device)
            seeds = torch.tensor([one or 0 for one in seed], device=self.device)
        elif seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
            given, seeds = torch.ones(self.num_envs, dtype=torch.bool, device=self.device), self._consecutive(seed)
        else:
            given, seeds = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device), self._seeds
        episodes = torch.where(given, 0, self._episodes + 1)
        if mask is not None:
            given, episodes = given & mask, torch.where(mask, episodes, self._episodes)
        self._seeds, self._episodes = torch.where(given, seeds, self._seeds), episodes

    def _consecutive(self, first: int) -> Tensor:
        return first + torch.arange(self.num_envs, device=self.device)

    def _start(self, mask: Tensor | None, ids: Tensor | None, keys: Tensor | None) -> None:
        """Begin an episode in the copies of a mask; None: in all."""
        if keys is None:
            assert self._seeds is not None
            keys = noise.key(self._seeds, "episode", self._episodes)
        if ids is None:
            ids = noise.integers(noise.fold(keys, "example"), self.examples)
        if mask is None or bool(mask.all()):
            self._state, self._keys = self.initial(ids, noise.fold(keys, "initial")), keys
            self._steps = torch.zeros_like(keys)
            self._ended = torch.zeros_like(keys, dtype=torch.bool)
            return
        fresh = self.initial(ids[mask], noise.fold(keys[mask], "initial"))
        self._state = map_tree(lambda old, new: _put(old, mask, new), self._state, fresh)
        self._keys = torch.where(mask, keys, self._keys)
        self._steps = self._steps.masked_fill(mask, 0)
        self._ended = self._ended & ~mask

    def _out(self, tree: Tree, space: gymnasium.Space | None = None) -> Tree:
        """The tree as the user wants it; arrays are copies, of the space's type."""
        if self.output == "torch":
            return tree
        if isinstance(space, gymnasium.spaces.Dict):
            return {name: self._out(tree[name], space[name]) for name in tree}
        array = tree.cpu().numpy()
        return array.astype(array.dtype if space is None else space.dtype)


def check_choice(name: str, found: Any, known: tuple[Any, ...]) -> None:
    """Raise an InputError if a field holds none of the values it can."""
    if found not in known:
        raise InputError(f"{name}: found {found!r}, expected one of {', '.join(map(repr, known))}")


def _select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *(1,) * (no.dim() - 1)), yes, no)


def _put(old: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    new = old.clone()
    new[mask] = rows
    return new
