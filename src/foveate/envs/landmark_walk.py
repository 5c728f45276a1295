"""Walk through a volume to an anatomical landmark, from coarse to fine (Ghesu et al. 2019, "Multi-scale deep
reinforcement learning for real-time 3D-landmark detection in CT scans"; Alansary et al. 2019, "Evaluating reinforcement
learning agents for anatomical landmark detection").

| | |
|---|---|
| state | the volume's and the landmark's number, the scale, the place, the last places at this scale, what is shown |
| observation | `cube`: voxels around the place at its and the next coarser scale; `place`; `landmark`, `scale` |
| action | one voxel of the present scale to the right, left, anterior, posterior, superior or inferior |
| reward | decrease of the squared distance to the landmark in parts of the squared step, cut to [-1, 1] |
| horizon | 100 steps; it ends when a place of the finest scale is visited again, or outside of what is shown |

Places are voxels of a pyramid: at scale k every 2^k-th voxel of a volume that was smoothed as often, so that a step is
2^k voxels long and a cube as many times wider. A place visited again means that the walk turns around: it goes on at
the next finer scale.

With d the landmark's distance along the axis of the action, in steps, a step towards it decreases the squared distance
in mm² by (2|d| - 1) squared steps: from one step away on the reward is 1 or -1, nearer it tells how near.

A part of the volumes can be shown without the landmark (`absent`): then the way leads out of it, and leaving is
rewarded by 1; where the landmark is there, it costs 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.pyramid import Pyramid
from foveate.data.volumes import Volumes, load_volumes
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv, check_choice
from foveate.types import InputError

MOVES = ("right", "left", "anterior", "posterior", "superior", "inferior")
STEPS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))  # x, y, z
NOWHERE = -(2**15)  # a place that was not visited
NEAR = 5.0  # steps from the landmark at which training begins at finer scales, at most, along each axis
AROUND = 0.08  # the same for starts at the mean place, in parts of what is shown
SLACK = 0.5  # steps by which a place may lie outside: the landmark at the edge can be stepped over by as much
CROP = (0.03, 0.2)  # distance of the edge of what is shown from the landmark, in parts of the volume
LEAST = 0.35  # of a volume's side is shown
WHERE, TRUTH = (255, 120, 0), (0, 200, 120)  # colours in a picture
Starts = Literal["near", "anywhere", "mean"]


@dataclass(frozen=True)
class WalkState:
    """Numbers and places: a tree of [batch, ...] that a replay can hold, under 100 bytes a copy. Walks have a time too.

    Attributes:
        volume: its number.
        landmark: its number.
        scale: 0 is the finest; a step is 2^scale voxels.
        place: (x, y, z) in steps of the scale; outside of what is shown once the walk has left.
        past: the last places at this scale, the latest first.
        low, high: first and last voxel that is shown, x, y, z.
    """

    volume: Int[Tensor, "*batch"]
    landmark: Int[Tensor, "*batch"]
    scale: Int[Tensor, "*batch"]
    place: Int[Tensor, "*batch 3"]
    past: Int[Tensor, "*batch past 3"]
    low: Int[Tensor, "*batch 3"]
    high: Int[Tensor, "*batch 3"]


class LandmarkWalkEnv(TensorEnv):
    """`foveate/LandmarkWalk-v0`. Example number v · landmarks + l is landmark l of volume v.

    Args:
        num_envs: copies in lockstep.
        volumes: with their landmarks; None loads `data` from `root`.
        data: name of a set (`foveate.data.volumes.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        spacing: mm between voxels.
        warps: of each volume to train on.
        cube: voxels on the side of what is seen; odd.
        scales: how many.
        past: places that are remembered at a scale.
        starts: "anywhere": at the coarsest scale; "near": at any scale, at finer ones within `NEAR` steps of the
            landmark, as training is in the paper; "mean": at the coarsest, around `mean`.
        mean: landmarks in parts of what is shown, where walks begin; None: their mean over `volumes`.
        around: the largest distance from there along each axis, in parts of what is shown.
        absent: part of the episodes in which the landmark is outside of what is shown. In as many others some of the
            volume is not shown either, so that an edge alone says nothing.
        **options: of `TensorEnv`; `horizon` is 100 if not given.

    Raises:
        InputError: as `load_volumes`; a number out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        volumes: Volumes | None = None,
        data: str = "template",
        root: str | Path | None = None,
        split: Any = "train",
        spacing: float | None = 4.0,
        warps: int = 8,
        cube: int = 9,
        scales: int = 4,
        past: int = 8,
        starts: Starts = "near",
        mean: Float[Tensor, "landmarks 3"] | None = None,
        around: float = AROUND,
        absent: float = 0.0,
        horizon: int | None = 100,
        **options: Any,
    ) -> None:
        check_choice("starts", starts, get_args(Starts))
        if cube < 3 or cube % 2 == 0:
            raise InputError(f"cube: found {cube}, expected an odd number of at least 3")
        for name, number, most in ("scales", scales, 8), ("past", past, 255):
            if not 1 <= number <= most:
                raise InputError(f"{name}: found {number}, expected 1 to {most}")
        if not 0 <= absent <= 0.5 and absent != 1:
            raise InputError(f"absent: found {absent:g}, expected 0 to 0.5, or 1")
        if volumes is None:
            volumes = load_volumes(data, None if root is None else Path(root), split, spacing, warps)
        self.cube, self.scales, self.past = cube, scales, past
        self.starts, self.around, self.absent = starts, around, absent
        self.spacing, self.count = volumes.spacing, len(volumes.names)
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(
                cube=gymnasium.spaces.Box(0.0, 1.0, (2, cube, cube, cube)),
                landmark=gymnasium.spaces.Box(0.0, 1.0, (self.count,)),
                place=gymnasium.spaces.Box(0.0, 1.0, (3,)),
                scale=gymnasium.spaces.Box(0.0, 1.0, (scales,)),
            ),
            gymnasium.spaces.Discrete(len(MOVES)),
            examples=len(volumes) * self.count,
            horizon=horizon,
            **options,
        )
        self.sizes, self.targets = volumes.sizes.to(self.device), volumes.landmarks.to(self.device)
        self.mean = (volumes.relative.mean(0) if mean is None else mean).to(self.device)
        self.steps = torch.tensor(STEPS, device=self.device)
        # around the coarsest place, too, more is seen
        self.pyramid = Pyramid(volumes.voxels.to(self.device), scales + 1, cube)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> WalkState:
        """What is shown, and a place to begin at."""
        volume, landmark = ids // self.count, ids % self.count
        low, high = self._shown(volume, landmark, keys)
        target, chance = self.targets[volume, landmark], noise.uniform(noise.fold(keys, "place"), 3)
        scale = torch.full_like(ids, self.scales - 1)
        if self.starts == "mean":
            begin = low + (self.mean[landmark] + (2 * chance - 1) * self.around) * (high - low)
        else:
            begin = low + chance * (high - low)
            if self.starts == "near":
                scale = noise.integers(noise.fold(keys, "scale"), self.scales)
                close = target + (2 * chance - 1) * NEAR * (2**scale)[:, None]
                begin = torch.where((scale < self.scales - 1)[:, None], close, begin)
        begin = torch.minimum(torch.maximum(begin, low), high)
        place = (begin / (2**scale)[:, None]).round()
        past = torch.full((len(ids), self.past, 3), NOWHERE, dtype=torch.int16, device=ids.device)
        numbers = volume.int(), landmark.to(torch.int16), scale.to(torch.int8), place.to(torch.int16), past
        return WalkState(*numbers, low.to(torch.int16), high.to(torch.int16))

    def _shown(self, volume: Tensor, landmark: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """First and last voxel of what is shown: all, or what is on one side of a plane near the landmark."""
        last = self.sizes[volume] - 1
        low, high = torch.zeros_like(last), last
        if not self.absent:
            return low, high
        target = self.targets[volume, landmark]
        kind = noise.uniform(noise.fold(keys, "kind"))[:, None]
        dice = noise.uniform(noise.fold(keys, "side"), 6)
        far = (CROP[0] + (CROP[1] - CROP[0]) * noise.uniform(noise.fold(keys, "far")))[:, None] * last
        cut, near = (target + far).ceil(), (target - far).floor()  # beyond these the landmark is not shown
        room = torch.cat(((last - cut) / last, near / last), 1)  # what is left above, and below
        gone = (kind < self.absent) & (room > LEAST).any(1, keepdim=True)
        side = torch.where(gone, dice + (room > LEAST), dice).argmax(1, keepdim=True)
        there = torch.arange(6, device=keys.device) == side
        above, below = there.chunk(2, 1)
        low = torch.where(gone & above, cut.long(), low)
        high = torch.where(gone & below, near.long(), high)
        part = ~gone & (kind < 2 * self.absent)
        low = torch.where(part & below, near.long().clamp(min=0), low)
        high = torch.where(part & above, torch.minimum(cut.long(), last), high)
        return low, high

    def transition(
        self, state: WalkState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[WalkState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Go one step; at a place that was visited before go on at the next finer scale, or end at the finest."""
        moved = state.place + self.steps[actions]
        left = self._outside(state, moved[:, None])[:, 0]
        reward = self._gains(state).gather(1, actions[:, None]).squeeze(1).clamp(-1, 1)
        reward = torch.where(left, torch.where(self.hidden(state), 1.0, -1.0), reward)
        again = (state.past == moved[:, None]).all(2).any(1) & ~left
        finer = again & (state.scale > 0)
        past = torch.cat((state.place[:, None], state.past[:, :-1]), 1).masked_fill(finer[:, None, None], NOWHERE)
        after = WalkState(
            state.volume,
            state.landmark,
            state.scale - finer.to(torch.int8),
            torch.where(finer[:, None], moved * 2, moved).to(torch.int16),
            past,
            state.low,
            state.high,
        )
        return after, reward, left | (again & (state.scale == 0))

    def observe(self, state: WalkState) -> dict[str, Tensor]:
        """Voxels around the place, 0 outside of what is shown: only these are read, however large the volume is."""
        scale, place = state.scale.long(), state.place.long()
        cubes = [
            self.pyramid.cubes(state.volume, level, around, state.low, state.high)
            for level, around in ((scale, place), (scale + 1, (place / 2).round().long()))
        ]
        within = (self.voxel(state) - state.low) / (state.high - state.low).clamp(min=1)
        return {
            "cube": torch.stack(cubes, 1),
            "landmark": F.one_hot(state.landmark.long(), self.count).float(),
            "place": within.clamp(0, 1),
            "scale": F.one_hot(scale, self.scales).float(),
        }

    def voxel(self, state: WalkState) -> Float[Tensor, "batch 3"]:
        """The place in voxels of the volume, x, y, z."""
        return state.place.float() * (2.0**state.scale)[:, None]

    def distance(self, state: WalkState) -> Float[Tensor, " batch"]:
        """From the place to the landmark, in mm."""
        return (self.voxel(state) - self._target(state)).norm(dim=1) * self.spacing

    def far(self, state: WalkState) -> Float[Tensor, "batch 3"]:
        """From the place to the landmark along x, y, z, in steps of the scale."""
        return self._target(state) / (2.0**state.scale)[:, None] - state.place

    def hidden(self, state: WalkState) -> Bool[Tensor, " batch"]:
        """Whether the landmark is outside of what is shown."""
        target = self._target(state)
        return ((target < state.low) | (target > state.high)).any(1)

    def left(self, state: WalkState) -> Bool[Tensor, " batch"]:
        """Whether the walk has left what is shown: its answer is that the landmark is not there."""
        return self._outside(state, state.place[:, None])[:, 0]

    def answer(self, state: WalkState) -> Float[Tensor, "batch 3"]:
        """Where a walk that has ended says that the landmark is, in voxels: the middle of where it turned around."""
        again = (state.past == state.place[:, None]).all(2)  # [batch, past]
        since = (again.cumsum(1) - again.long() == 0) & again.any(1, keepdim=True)  # places of the last round
        places = torch.where(since[..., None], state.past, state.place[:, None]).float()
        count = since.sum(1).clamp(min=1)[:, None]
        mean = torch.where(since[..., None], places, 0.0).sum(1) / count
        found = torch.where(again.any(1, keepdim=True), mean, state.place.float())
        return found * (2.0**state.scale)[:, None]

    def rewarded(self, state: WalkState) -> Bool[Tensor, "batch actions"]:
        """Steps that would be rewarded now: what guided exploration draws from."""
        out = self._outside(state, state.place[:, None] + self.steps)
        return torch.where(out, self.hidden(state)[:, None], self._gains(state) > 0)

    def _target(self, state: WalkState) -> Tensor:
        return self.targets[state.volume.long(), state.landmark.long()]

    def _gains(self, state: WalkState) -> Float[Tensor, "batch actions"]:
        """Decrease of the squared distance by each step, in squared steps; spacings cancel."""
        return 2 * self.far(state) @ self.steps.T.float() - 1

    def _outside(self, state: WalkState, places: Tensor) -> Bool[Tensor, "batch count"]:
        step = (2.0**state.scale)[:, None, None]
        full, slack = places * step, SLACK * step
        return ((full < state.low[:, None] - slack) | (full > state.high[:, None] + slack)).any(2)

    def draw(self, state: WalkState) -> UInt8[Tensor, "batch height width 3"]:
        """Axial, coronal and sagittal slice through the place, superior and anterior up; the place and the landmark."""
        depth, height, width = self.pyramid.sides
        at, truth = (self._within(value) for value in (self.voxel(state), self._target(state)))
        side = max(height, depth)
        page = torch.zeros(len(at), side, 2 * width + height, 3, dtype=torch.uint8, device=at.device)
        left = 0
        for across, up in (0, 1), (0, 2), (1, 2):
            slices = self.pyramid.slices(state.volume, at, across, up)[..., None].expand(-1, -1, -1, 3)
            rows, columns = (torch.arange(count, device=at.device) for count in slices.shape[1:3])
            for place, colour in (truth, TRUTH), (at, WHERE):
                marks = ((rows[:, None] - place[:, None, None, up]).abs()).maximum(
                    (columns - place[:, None, None, across]).abs()
                )
                ink = torch.tensor(colour, dtype=torch.uint8, device=at.device)
                slices = torch.where((marks == 2)[..., None], ink, slices)
            page[:, : len(rows), left : left + len(columns)] = slices.flip(1)
            left += len(columns)
        return page

    def _within(self, voxels: Tensor) -> Tensor:
        depth, height, width = self.pyramid.sides
        last = torch.tensor([width, height, depth], device=voxels.device) - 1
        return torch.minimum(voxels.round().long().clamp(min=0), last)


class SingleLandmarkWalkEnv(SingleEnv):
    """One copy of `LandmarkWalkEnv`."""

    lockstep = LandmarkWalkEnv
