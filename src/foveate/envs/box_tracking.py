"""Follow an object into the next frame by changing its box step by step (Jiang et al. 2019, "Multi-agent deep
reinforcement learning for multi-object tracker", IEEE Access 7).

| | |
|---|---|
| state | two frames, the object's box in the first, the box now, the last actions, the boxes of the nearest others |
| observation | `view`: both frames around the boxes; `history`: the last actions; what the neighbours see, and where |
| action | move right, left, up, down, bigger, smaller, fatter, taller; or stop |
| reward | of stopping: 1 if the IoU with the object is 0.7, else -1; of a move: `shaping` · the sign of the change |
| horizon | 20 steps; it ends with the stop |

An agent is an object; a row of the lockstep form is an agent. There the neighbours go evenly from their boxes in the
first frame to those in the second; agents that act jointly are in `foveate.envs.joint_tracking`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.videos import Videos, crops, load_videos, on, pairs
from foveate.envs.box_moves import MOVES, moves
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.geometry import enlarged, overlaps
from foveate.types import InputError

STOP = len(MOVES)
ACTIONS = len(MOVES) + 1
LEAST = 2.0  # pixels of a side of a box
CONTEXT = 2.0  # side of what is seen, in parts of the box's
WAY = 4  # steps in which a neighbour that does not act is at its box in the second frame
REACH = 4.0  # of `places`: further away is all the same
FRAME, OBJECT = (255, 160, 0), (0, 200, 120)  # colours of the box and of the object in a picture


@dataclass(frozen=True)
class TrackingState:
    """Coordinates, actions and frame numbers: a tree of [batch, ...] that a replay can hold.

    Attributes:
        before: the frame in which the object was last seen.
        after: the frame in which it is looked for.
        start: its box in the first, in pixels.
        box: now.
        target: its box in the second; zeros if nobody knows.
        history: the last actions, the latest first; 0 where there was none, else 1 more than the action.
        steps: how many were taken.
        near_before: the frame in which each neighbour was last seen.
        near_start: its box there.
        near_box: its box now.
        near_end: its box in the second frame.
        near: which neighbours there are.
    """

    before: Int[Tensor, "*batch"]
    after: Int[Tensor, "*batch"]
    start: Float[Tensor, "*batch 4"]
    box: Float[Tensor, "*batch 4"]
    target: Float[Tensor, "*batch 4"]
    history: UInt8[Tensor, "*batch past"]
    steps: Int[Tensor, "*batch"]
    near_before: Int[Tensor, "*batch near"]
    near_start: Float[Tensor, "*batch near 4"]
    near_box: Float[Tensor, "*batch near 4"]
    near_end: Float[Tensor, "*batch near 4"]
    near: Bool[Tensor, "*batch near"]


@dataclass(frozen=True)
class Walking:
    """How boxes are changed and what is seen of them, whether anybody knows where the object is or not.

    Attributes:
        videos: the frames.
        patch: side of a view in pixels.
        alpha: part of the box's width or height by which a move changes it.
    """

    videos: Videos
    patch: int
    alpha: float

    def act(self, state: TrackingState, actions: Int[Tensor, " batch"]) -> TrackingState:
        """The state after actions of the agents themselves; a stop leaves the box."""
        moved = self.moved(state).gather(1, actions.clamp(max=STOP - 1)[:, None, None].expand(-1, 1, 4))[:, 0]
        history = torch.cat(((actions + 1).to(torch.uint8)[:, None], state.history[:, :-1]), 1)
        box = torch.where((actions == STOP)[:, None], state.box, moved)
        return replace(state, box=box, history=history, steps=state.steps + 1)

    def observe(self, state: TrackingState) -> dict[str, Tensor]:
        """`observed` of a state."""
        return observed(self.videos, state, self.patch)

    def moved(self, state: TrackingState) -> Float[Tensor, "batch moves 4"]:
        """Boxes after each of the moves: their middle stays in the frame, their sides keep some pixels."""
        changed = moves(state.box, self.alpha)
        return self.kept(changed.flatten(0, 1), state.after.repeat_interleave(len(MOVES))).view_as(changed)

    def kept(self, boxes: Float[Tensor, "batch 4"], frames: Int[Tensor, " batch"]) -> Float[Tensor, "batch 4"]:
        """Boxes with their middle in the frame and sides of `LEAST` pixels up to twice the frame's."""
        limit = self.videos.sizes[frames, 0].flip(1).float()
        place = torch.minimum(middle(boxes).clamp(min=0), limit)
        half = torch.minimum((boxes[:, 2:] - boxes[:, :2]).clamp(min=LEAST), 2 * limit) / 2
        return torch.cat((place - half, place + half), 1)


class BoxTrackingEnv(TensorEnv):
    """`foveate/BoxTracking-v0`.

    Args:
        num_envs: copies in lockstep.
        videos: frames, boxes and identities; None loads `data` from `root`.
        data: name of a set (`foveate.data.videos.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        image_size: longer side in pixels to which frames are shrunk; None: what the data is best held at.
        scenes: how many videos are rendered, for rendered data.
        patch: side of a view in pixels.
        alpha: part of the box's width or height by which a move changes it.
        history: how many actions are remembered.
        neighbours: the nearest others that are seen; with 0 none, and `others`, `places` and `near` are left out.
        gaps: frames at most from the first frame to the second.
        threshold: IoU from which on a stop is right.
        shaping: reward of a move that raises the IoU, and cost of one that lowers it; the paper's is 0.
        jitter: standard deviation of the first box, in parts of its sides, from the object's in the first frame.
        drift: the same of the box at which the walk begins, from the first box.
        **options: of `TensorEnv`; `horizon` is 20 if not given.

    Raises:
        InputError: as `load_videos`; a number out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        videos: Videos | None = None,
        data: str = "scenes",
        root: str | Path | None = None,
        split: Any = "train",
        image_size: int | None = None,
        scenes: int = 8,
        patch: int = 20,
        alpha: float = 0.08,
        history: int = 8,
        neighbours: int = 2,
        gaps: int = 1,
        threshold: float = 0.7,
        shaping: float = 0.0,
        jitter: float = 0.05,
        drift: float = 0.1,
        horizon: int | None = 20,
        **options: Any,
    ) -> None:
        for name, number in ("patch", patch), ("history", history), ("gaps", gaps):
            if number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        for name, much in ("neighbours", neighbours), ("shaping", shaping), ("jitter", jitter), ("drift", drift):
            if much < 0:
                raise InputError(f"{name}: found {much:g}, expected 0 or more")
        for name, share in ("alpha", alpha), ("threshold", threshold):
            if not 0 < share < 1:
                raise InputError(f"{name}: found {share:g}, expected more than 0 and less than 1")
        if videos is None:
            videos = load_videos(data, None if root is None else Path(root), split, image_size, scenes)
        self.patch, self.past, self.neighbours = patch, history, neighbours
        self.threshold, self.shaping, self.jitter, self.drift = threshold, shaping, jitter, drift
        found = pairs(videos, gaps)
        super().__init__(
            num_envs,
            observation_space(patch, history, neighbours),
            gymnasium.spaces.Discrete(ACTIONS),
            examples=len(found),
            horizon=horizon,
            **options,
        )
        self.videos, self.pairs = on(videos, self.device), found.to(self.device)
        self.walking = Walking(self.videos, patch, alpha)
        self.near_before, self.near_after, self.near = self._others()

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> TrackingState:
        """The object's box in the first frame, somewhat off, as a detector or the walk before would leave it."""
        before, here, after, there = self.pairs[ids].unbind(1)
        boxes = self.videos.truth.boxes
        start = _shaken(boxes[before, here], self.jitter, noise.fold(keys, "jitter"))
        lanes = noise.fold(keys[:, None], "neighbour", torch.arange(self.neighbours, device=keys.device))
        first, last = (
            _shaken(place[ids], self.jitter, noise.fold(lanes, name))
            for name, place in (("before", self.near_before), ("after", self.near_after))
        )
        return TrackingState(
            before,
            after,
            start,
            self.walking.kept(_shaken(start, self.drift, noise.fold(keys, "drift")), after),
            boxes[after, there],
            torch.zeros(len(ids), self.past, dtype=torch.uint8, device=ids.device),
            torch.zeros_like(ids),
            before[:, None].expand(-1, self.neighbours),
            first,
            first,
            last,
            self.near[ids],
        )

    def transition(
        self, state: TrackingState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[TrackingState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Change the box, or stop; the neighbours go a step on their way."""
        stops = actions == STOP
        after = self.walking.act(state, actions)
        part = (after.steps / WAY).clamp(max=1)[:, None, None]
        near = torch.lerp(state.near_start, state.near_end, part.expand_as(state.near_start))
        after = replace(after, near_box=torch.where(stops[:, None, None], state.near_box, near))
        was, now = (overlaps(box[:, None], state.target[:, None]).flatten() for box in (state.box, after.box))
        right = torch.where(was >= self.threshold, 1.0, -1.0)
        return after, torch.where(stops, right, self.shaping * (now - was).sign()), stops

    def observe(self, state: TrackingState) -> dict[str, Tensor]:
        """Both frames around the boxes, the neighbours' places, and the last actions."""
        return self.walking.observe(state)

    def rewarded(self, state: TrackingState) -> Bool[Tensor, "batch actions"]:
        """Moves that raise the IoU, and the stop if it would be right: what guided exploration draws from."""
        target = state.target[:, None]
        before = overlaps(state.box[:, None], target)[:, 0]
        after = overlaps(self.walking.moved(state), target)[..., 0]
        return torch.cat((after > before, before >= self.threshold), 1)

    def draw(self, state: TrackingState) -> UInt8[Tensor, "batch height width 3"]:
        """The second frame around the object, the box now in orange, the object in green."""
        low, high = state.start[:, :2], state.start[:, 2:]
        region = torch.cat((1.5 * low - 0.5 * high, 1.5 * high - 0.5 * low), 1)
        side = 4 * self.patch
        picture = (crops(self.videos, state.after, region, side) * 255).round().byte().permute(0, 2, 3, 1)
        share = (torch.arange(side, device=low.device) + 0.5) / side
        for box, colour in ((state.target, OBJECT), (state.box, FRAME)):
            place = (box.unflatten(1, (2, 2)) - region[:, None, :2]) / (region[:, None, 2:] - region[:, None, :2])
            x, y = share[None, None, :], share[None, :, None]
            corner = place[..., None, None]
            inside = torch.minimum(
                torch.minimum(x - corner[:, 0, 0], corner[:, 1, 0] - x),
                torch.minimum(y - corner[:, 0, 1], corner[:, 1, 1] - y),
            )
            edge = (inside >= 0) & (inside <= 1.5 / side)
            picture = torch.where(edge[..., None], torch.tensor(colour, dtype=torch.uint8, device=low.device), picture)
        return picture

    def _others(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair the nearest others: boxes in both frames, and which there are. Who leaves stays where it was."""
        truth, (before, here, after, _) = self.videos.truth, self.pairs.unbind(1)
        rows = torch.arange(len(before), device=before.device)
        mask = truth.mask[before].clone()
        mask[rows, here] = False
        away = (middle(truth.boxes[before]) - middle(truth.boxes[before, here])[:, None]).norm(dim=2)
        count = min(self.neighbours, mask.shape[1])
        nearest = away.masked_fill(~mask, torch.inf).topk(count, 1, largest=False).indices
        nearest = F.pad(nearest, (0, self.neighbours - count))
        known = mask.gather(1, nearest) & (torch.arange(self.neighbours, device=rows.device) < count)
        first = truth.boxes[before[:, None], nearest]
        same = truth.labels[before[:, None], nearest][..., None] == truth.labels[after][:, None]
        same &= truth.mask[after][:, None]
        last = truth.boxes[after[:, None], same.int().argmax(2)]
        return first, torch.where(same.any(2)[..., None], last, first), known


class SingleBoxTrackingEnv(SingleEnv):
    """One copy of `BoxTrackingEnv`."""

    lockstep = BoxTrackingEnv


def observation_space(patch: int, history: int, neighbours: int) -> gymnasium.spaces.Dict:
    """What one agent sees."""
    box, half = gymnasium.spaces.Box, (patch + 1) // 2
    found: dict[str, gymnasium.Space[Any]] = {"history": box(0.0, 1.0, (history, ACTIONS))}
    if neighbours:
        found["near"] = box(0.0, 1.0, (neighbours,))
        found["others"] = box(0.0, 1.0, (neighbours, 6, half, half))
        found["places"] = box(-REACH, REACH, (neighbours, 4))
    return gymnasium.spaces.Dict(found | {"view": box(0.0, 1.0, (6, patch, patch))})


def observed(videos: Videos, state: TrackingState, patch: int) -> dict[str, Tensor]:
    """What agents see of a state, and of their neighbours.

    "view" [batch, 6, patch, patch]: the first frame around the start, and the second around the box. "history" [batch,
    past, actions]. With neighbours, "others" [batch, near, 6, half, half]: the same of theirs at half the size, black
    where there is none; "places" [batch, near, 4]: how far a neighbour's middle is away in parts of the agent's sides,
    and the logarithm of how much wider and higher it is; "near" [batch, near].
    """
    found = {"history": F.one_hot(state.history.long(), ACTIONS + 1)[..., 1:].float()}
    if state.near.shape[1]:
        there, half = state.near, (patch + 1) // 2
        after = state.after[:, None].expand_as(there)[there]
        given = state.near_before[there], after, state.near_start[there], state.near_box[there]
        others = torch.zeros(*there.shape, 6, half, half, device=there.device)
        others[there] = _views(videos, *given, half)
        found |= {"near": there.float(), "others": others}
        found["places"] = places(state.box, state.near_box) * there[..., None]
    return found | {"view": _views(videos, state.before, state.after, state.start, state.box, patch)}


def _views(videos: Videos, before: Tensor, after: Tensor, start: Tensor, box: Tensor, patch: int) -> Tensor:
    """Both frames around both boxes, in one reading."""
    both = crops(videos, torch.cat((before, after)), enlarged(torch.cat((start, box)), CONTEXT), patch)
    return torch.cat(both.chunk(2), 1)


def places(boxes: Float[Tensor, "batch 4"], others: Float[Tensor, "batch near 4"]) -> Float[Tensor, "batch near 4"]:
    """Where others are, as seen from a box, within `REACH`."""
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3)[:, None]
    away = (middle(others) - middle(boxes)[:, None]) / sides
    larger = ((others[..., 2:] - others[..., :2]).clamp(min=1e-3) / sides).log()
    return torch.cat((away, larger), 2).clamp(-REACH, REACH)


def middle(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 2"]:
    """Middles (x, y) of boxes."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _shaken(boxes: Tensor, much: float, keys: Tensor) -> Tensor:
    """Boxes moved and stretched by this part of their sides (standard deviation)."""
    draws = much * noise.normal(keys, 4)
    sides = boxes[..., 2:] - boxes[..., :2]
    place = middle(boxes) + draws[..., :2] * sides
    half = sides * draws[..., 2:].exp() / 2
    return torch.cat((place - half, place + half), -1)
