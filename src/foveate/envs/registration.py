"""Lay one picture over another by moving it step by step (Sun et al. 2018, "Robust multimodal image registration using
deep recurrent reinforcement learning").

| | |
|---|---|
| state | the pair, the transform so far, the transform that would be right |
| observation | `fixed`, and `moving` as the transform so far has moved it |
| action | right, left, down or up by 1 pixel; clockwise or back by 1 degree; larger or smaller by 0.05 |
| reward | minus the mean distance of the landmarks, in halves of the side; and 1 when it is 2 pixels or less |
| horizon | 40 steps; it ends when the landmarks lie together |

A transform is (tx, ty, rotation, log scale), as `foveate.data.similarity` has it: each action adds to one of the four,
so that the picture is turned and scaled about its own centre, wherever it has been shifted to. The picture as seen is
made from the original by one interpolation, however many steps there were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.pairs import Pairs, Spread, distances, load_pairs
from foveate.data.similarity import apply, compose, edge_colors, inverse, matrices, parameters_of, warp
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv, check_choice
from foveate.types import InputError, map_tree

MOVES = ("right", "left", "down", "up", "clockwise", "back", "larger", "smaller")
STEPS = (1.0, 1.0, 1.0, 0.05)  # pixels, pixels, degrees, logarithm of the scale
AT_ONCE = 32  # pairs that are looked at together: what more of them need is too large for a processor's cache
TILES = 6  # of the checkerboard of a picture, in a row
Reward = Literal["landmarks", "transform"]


@dataclass(frozen=True)
class RegistrationState:
    """Numbers only: a tree of [batch, ...].

    Attributes:
        pair: its number.
        transform: so far.
        truth: the transform that is right; the moving picture stands where its inverse has carried it.
    """

    pair: Int[Tensor, " batch"]
    transform: Float[Tensor, "batch 4"]
    truth: Float[Tensor, "batch 4"]

    def rows(self, which: Int[Tensor, " some"]) -> RegistrationState:
        """Some rows, in this order."""
        return map_tree(lambda leaf: leaf[which], self)


class RegistrationEnv(TensorEnv):
    """`foveate/Registration-v0`.

    Args:
        num_envs: copies in lockstep.
        pairs: pictures and landmarks; None loads `data` from `root`.
        data: name of a set (`foveate.data.pairs.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        image_size: side of the pictures in pixels.
        count: how many pairs are rendered, for rendered data.
        displace: draw anew in every episode how far the moving picture is off, as `train` needs it; None: for split
            "train" and not for the others, nor for `pairs` that are given.
        spread: how far.
        reward: the distance of the landmarks, or of the transform from the right one, in steps.
        reached: distance, in pixels or steps, at which it is done.
        bonus: reward when it is done.
        **options: of `TensorEnv`; `horizon` is 40 if not given.

    Raises:
        InputError: as `load_pairs`; a number out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        pairs: Pairs | None = None,
        data: str = "scenes",
        root: str | Path | None = None,
        split: Any = "train",
        image_size: int = 32,
        count: int = 40,
        displace: bool | None = None,
        spread: Spread | None = None,
        reward: Reward = "landmarks",
        reached: float = 2.0,
        bonus: float = 1.0,
        horizon: int | None = 40,
        **options: Any,
    ) -> None:
        check_choice("reward", reward, ("landmarks", "transform"))
        if reached < 0:
            raise InputError(f"reached: found {reached:g}, expected a distance of 0 or more")
        self.spread = spread or Spread()
        self.displace = displace if displace is not None else pairs is None and split == "train"
        if pairs is None:
            place = None if root is None else Path(root)
            pairs = load_pairs(data, place, split, image_size, count, self.spread)
        self.side, self.reward, self.reached, self.bonus = pairs.side, reward, reached, bonus
        picture = gymnasium.spaces.Box(0.0, 1.0, (3, self.side, self.side))
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(fixed=picture, moving=picture),
            gymnasium.spaces.Discrete(len(MOVES)),
            examples=len(pairs),
            horizon=horizon,
            **options,
        )
        self.fixed, self.moving = pairs.fixed.to(self.device), pairs.moving.to(self.device)
        self.ground = edge_colors(self.moving.float()) / 255
        self.points = pairs.moving_points.to(self.device)
        self.targets, self.mask = pairs.fixed_points.to(self.device), pairs.mask.to(self.device)
        self.aligned = pairs.aligned().to(self.device)
        self.moves = torch.diag(torch.tensor(STEPS)).repeat_interleave(2, 0).to(self.device)
        self.moves[1::2] *= -1

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> RegistrationState:
        """Nothing done yet."""
        truth = self.spread.draw(keys, self.side) if self.displace else parameters_of(self.aligned[ids], self.side)
        return RegistrationState(ids, torch.zeros_like(truth), truth)

    def scattered(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> RegistrationState:
        """Independent places to learn from: half as they begin, half with a part of each number done, or overdone."""
        state = self.initial(ids, keys)
        aside = 2 * noise.normal(noise.fold(keys, "aside"), 4) * state.truth.new_tensor(STEPS)
        way = noise.uniform(noise.fold(keys, "way"), 4) * state.truth + aside
        begins = noise.uniform(noise.fold(keys, "begins"), 1) < 0.5
        return replace(state, transform=torch.where(begins, state.transform, way))

    def transition(
        self, state: RegistrationState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[RegistrationState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """One step of one of the four numbers."""
        moved = replace(state, transform=self.moved_by(state.transform, actions))
        left = self.distance(moved)
        done = left <= self.reached
        return moved, done * self.bonus - left * 2 / self.side, done

    def observe(self, state: RegistrationState) -> dict[str, Tensor]:
        """Both pictures, the moving one where it is now."""
        parts = torch.arange(len(state.pair), device=self.device).split(AT_ONCE)
        return map_tree(lambda *leaves: torch.cat(leaves), *(self._seen(state.rows(part)) for part in parts))

    def _seen(self, state: RegistrationState) -> dict[str, Tensor]:
        own, size = matrices(state.transform, self.side), (self.side, self.side)
        fixed, moving = (each.index_select(0, state.pair).float().div_(255) for each in (self.fixed, self.moving))
        return {"fixed": fixed, "moving": warp(moving, self.total(state), size, own, self.ground[state.pair])}

    def moved(self, transform: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch moves 4"]:
        """Transforms after each of the moves; shifts stay within a side, the scale from 0.7 to 1.4."""
        most = transform.new_tensor([self.side, self.side, 180.0, 0.35])
        return torch.minimum(torch.maximum(transform[:, None] + self.moves, -most), most)

    def moved_by(self, transform: Float[Tensor, "batch 4"], actions: Int[Tensor, " batch"]) -> Float[Tensor, "batch 4"]:
        """Transforms after one move each."""
        return self.moved(transform).gather(1, actions[:, None, None].expand(-1, 1, len(STEPS)))[:, 0]

    def total(self, state: RegistrationState) -> Float[Tensor, "batch 2 3"]:
        """From the pixels of the original to where they are seen: displaced, then moved by the transform so far."""
        start = compose(inverse(matrices(state.truth, self.side)), self.aligned[state.pair])
        return compose(matrices(state.transform, self.side), start)

    def errors(self, state: RegistrationState) -> Float[Tensor, " batch"]:
        """Target registration error: mean distance of the landmarks, in pixels."""
        places = apply(self.total(state), self.points[state.pair])
        return distances(places, self.targets[state.pair], self.mask[state.pair])

    def distance(self, state: RegistrationState) -> Float[Tensor, " batch"]:
        """What is rewarded: the error in pixels, or how many steps the transform is away from the right one."""
        return self.errors(state) if self.reward == "landmarks" else _away(state.transform, state.truth)

    def left(self, state: RegistrationState) -> Float[Tensor, "batch 4"]:
        """What is left to do, in tens of steps."""
        return (state.truth - state.transform) / (10 * state.truth.new_tensor(STEPS))

    def gains(self, state: RegistrationState) -> Float[Tensor, "batch moves"]:
        """How many steps nearer to the right transform each move would lead: what an expert goes by.

        Not how much nearer the landmarks: those of a picture far off are soonest brought nearer by making it smaller,
        which has to be undone later.
        """
        before = _away(state.transform, state.truth)
        return before[:, None] - _away(self.moved(state.transform), state.truth[:, None])

    def draw(self, state: RegistrationState) -> UInt8[Tensor, "batch height width 3"]:
        """A checkerboard of the two: where they lie together, edges go on from tile to tile."""
        seen = self.observe(state)
        tile = torch.arange(self.side, device=state.pair.device) * TILES // self.side
        shown = torch.where((tile[:, None] + tile) % 2 == 0, seen["fixed"], seen["moving"])
        return (255 * shown).round().byte().permute(0, 2, 3, 1).contiguous()


def _away(transform: Tensor, truth: Tensor) -> Tensor:
    """Distance in steps."""
    return ((truth - transform) / truth.new_tensor(STEPS)).norm(dim=-1)


class SingleRegistrationEnv(SingleEnv):
    """One copy of `RegistrationEnv`."""

    lockstep = RegistrationEnv
