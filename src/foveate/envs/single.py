"""One copy of a lockstep environment for libraries that expect that: no batch dimension, NumPy in and out."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np

from foveate.envs.tensor_env import TensorEnv


class SingleEnv(gymnasium.Env):
    """One copy of a lockstep environment behind Gymnasium's plain interface: NumPy in and out, no batch dimension.

    Args:
        **options: of the lockstep environment, without `num_envs`, `output` and `autoreset`.
    """

    lockstep: ClassVar[type[TensorEnv]]

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # Gymnasium reads the class before it makes one.
        cls.metadata = cls.lockstep.metadata

    def __init__(self, **options: Any) -> None:
        self.copies = self.lockstep(1, output="numpy", autoreset="disabled", **options)
        self.observation_space = self.copies.single_observation_space
        self.action_space = self.copies.single_action_space
        self.render_mode = self.copies.render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options` as for the lockstep form, with a batch of one."""
        super().reset(seed=seed)
        observation, info = self.copies.reset(seed=seed, options=options)
        return _first(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one action. After the end the copy stands still, with reward 0, until it is reset."""
        observation, reward, terminated, truncated, info = self.copies.step(np.asarray(action)[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> Any:
        """A picture, uint8 [height, width, 3]; None without a render mode."""
        pictures = self.copies.render()
        return None if pictures is None else pictures[0]


def _first(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: _first(leaf) for name, leaf in observation.items()}
    return observation[0]
