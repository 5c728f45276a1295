"""Place the pair of boxes from which the mask of a moving object is made (Han et al. 2018, "Reinforcement cutting-agent
learning for video object segmentation").

| | |
|---|---|
| state | the frame, the object box, which context box, the last actions, the mask's IoU now and at the start |
| observation | `view`: the region twice the object box; `history`; `context`; `place` of the box in the frame |
| action | move the box right, left, up, down, bigger, smaller, fatter, taller; context wider, tighter; or stop |
| reward | ten times the change of the mask's IoU, within -1 and 1; of stop 3 times that since the start |
| horizon | 10 steps; it ends with the stop |

The paper, for a change D of the IoU: a above 0.1, -a below -0.1, 10 · a · D between (one summary prints "10 - a·D";
only the product is continuous); a is 3 for the stop, 1 otherwise. A stop moves nothing, so that its D would be 0 and
the 3 dead: the change taken there is the one since the frame began.

The mask is made by whatever is handed in: `execute(frames, boxes, contexts)` gives for each pair of boxes a square mask
in the region of the context box. Without it a pixel of the object box belongs to the mask if its colour is more
frequent in the object of the first frame than in the rest of it, which needs no training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.masked_videos import Videos, load_videos
from foveate.envs.box_moves import MOVES, moves
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.geometry import enlarged, mask_boxes, overlaps
from foveate.models.appearance import color_likeness, stacked
from foveate.models.regions import counted, cut, jittered, kept_inside, within
from foveate.types import InputError

WIDER, TIGHTER, STOP = len(MOVES), len(MOVES) + 1, len(MOVES) + 2
NAMES = (*MOVES, "wider", "tighter", "stop")  # of the actions
ACTIONS = len(NAMES)
PAST = 6  # actions remembered
FACTORS = (1.2, 1.5, 2.0)
LARGE = 0.1  # a change of the IoU from which on its reward rises no more
SEEN = 2.0  # the view's side, in sides of the object box
GOOD = 0.85  # IoU of boxes from which on guided exploration may stop
INNER, OUTER = (255, 160, 0), (60, 200, 255)  # colours of the boxes in a picture
Execute: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CuttingState:
    """Coordinates, actions and frame numbers: a tree of [batch, ...] that a replay can hold.

    Attributes:
        frame: its number among all frames.
        box: of the object, in pixels.
        context: which factor the context box has.
        history: the last actions, the latest first; 0 where there was none, else 1 more than the action.
        iou: of the mask that is made from these boxes.
        start_iou: of the mask made from those the frame began with.
    """

    frame: Int[Tensor, "*batch"]
    box: Float[Tensor, "*batch 4"]
    context: Int[Tensor, "*batch"]
    history: UInt8[Tensor, "*batch past"]
    iou: Float[Tensor, "*batch"]
    start_iou: Float[Tensor, "*batch"]


class CuttingEnv(TensorEnv):
    """`foveate/Cutting-v0`. An example is a frame, but for the first of each video.

    An episode begins at the true box of one of the `gap` frames before it, moved and scaled at random as if it was
    fitted to a mask that is not quite right.

    Args:
        num_envs: copies in lockstep.
        videos: frames and masks; None loads `data` from `root`.
        data: name of a set (`foveate.data.masked_videos.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        image_size: height in pixels.
        scenes: how many videos are rendered, for rendered data.
        length: frames of each of them.
        planes: of the frames' pixels (`foveate.models.appearance.stacked`); None: colours, and their likeness.
        execute: (frames, boxes, contexts) → masks [batch, side, side] in the regions of the context boxes.
        factors: sizes of the context box there are to choose from, in sides of the object box.
        patch: side of the view in pixels.
        alpha: part of the box's width or height by which a move changes it.
        history: how many actions are remembered.
        jitter: of the first box, in parts of its sides.
        gap: frames since the box an episode begins with, at most.
        stop_factor: of the reward of the stop.
        **options: of `TensorEnv`; `horizon` is 10 if not given.

    Raises:
        InputError: as `load_videos`; a number out of its range; no frame to begin with.
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
        scenes: int = 10,
        length: int = 8,
        planes: UInt8[Tensor, "frames height width planes"] | None = None,
        execute: Execute | None = None,
        factors: tuple[float, ...] = FACTORS,
        patch: int = 20,
        alpha: float = 0.1,
        history: int = PAST,
        jitter: float = 0.15,
        gap: int = 2,
        stop_factor: float = 3.0,
        horizon: int | None = 10,
        **options: Any,
    ) -> None:
        for name, number in ("patch", patch), ("history", history), ("gap", gap):
            if number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        if not 0 < alpha < 1:
            raise InputError(f"alpha: found {alpha:g}, expected more than 0 and less than 1")
        if not jitter >= 0:
            raise InputError(f"jitter: found {jitter:g}, expected at least 0")
        check_factors(factors)
        if videos is None:
            place = None if root is None else Path(root)
            videos = load_videos(data, place, split, image_size, scenes, length)
        (boxes, _), shown = true_boxes(videos), frames_to_cut(videos)
        self.patch, self.alpha, self.past, self.jitter, self.gap = patch, alpha, history, jitter, gap
        self.stop_factor, self.size = stop_factor, videos.size
        if planes is None:
            masks = videos.masks[videos.first]
            planes = stacked(videos.pixels, color_likeness(videos.pixels, videos.video, videos.first, masks))
        view = gymnasium.spaces.Box(0.0, 1.0, (planes.shape[3], patch, patch))
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(
                context=gymnasium.spaces.Box(0.0, 1.0, (len(factors),)),
                history=gymnasium.spaces.Box(0.0, 1.0, (history, ACTIONS)),
                place=gymnasium.spaces.Box(0.0, 1.0, (4,)),
                view=view,
            ),
            gymnasium.spaces.Discrete(ACTIONS),
            examples=len(shown),
            horizon=horizon,
            **options,
        )
        self.planes, self.boxes, self.shown = (leaf.to(self.device) for leaf in (planes, boxes, shown))
        self.first, self.video = videos.first.to(self.device), videos.video.to(self.device)
        self.truth = (videos.masks.to(self.device).to(torch.uint8) * 255)[..., None]
        self.wanted = videos.masks.to(self.device).sum((1, 2)).float()
        self.factors = torch.tensor(factors, device=self.device)
        self.limit = torch.tensor([self.size[1], self.size[0]] * 2, device=self.device)
        self.execute: Execute = execute or self.by_color

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> CuttingState:
        """About where the object was some frames before, nothing done."""
        state = self.opened(ids, keys)
        iou = self.score(state.frame, state.box, state.context)
        return replace(state, iou=iou, start_iou=iou)

    def opened(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> CuttingState:
        """The same without the mask and its IoU."""
        frame = self.shown[ids]
        before = 1 + noise.integers(noise.fold(keys, "gap"), self.gap)
        before = torch.maximum(frame - before, self.first[self.video[frame]])
        box = jittered(self.boxes[before], keys, self.jitter, self.size)
        return self.begun(frame, box, noise.integers(noise.fold(keys, "context"), len(self.factors)))

    def begun(
        self, frame: Int[Tensor, " batch"], box: Float[Tensor, "batch 4"], context: Int[Tensor, " batch"]
    ) -> CuttingState:
        """The state in which a frame begins with these boxes, before a mask is made."""
        past = torch.zeros(len(frame), self.past, dtype=torch.uint8, device=frame.device)
        return CuttingState(frame, box, context, past, torch.zeros_like(box[:, 0]), torch.zeros_like(box[:, 0]))

    def score(
        self, frame: Int[Tensor, " batch"], box: Float[Tensor, "batch 4"], context: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """IoU of the masks that are made from these boxes."""
        regions = enlarged(box, self.factors[context])
        masks = self.execute(frame, box, context)
        masks = masks & within(regions, masks.shape[-1], self.size)
        truth = cut(self.truth, frame, regions, masks.shape[-1])[:, 0] > 0.5
        return counted(masks, truth, self.wanted[frame], regions).iou

    def acted(self, state: CuttingState, actions: Int[Tensor, " batch"]) -> CuttingState:
        """The boxes after an action, and the actions remembered; the IoU is still the one before."""
        chosen = actions.clamp(max=len(MOVES) - 1)[:, None, None].expand(-1, 1, 4)
        box = self.moved(state.box).gather(1, chosen)[:, 0]
        context = state.context + (actions == WIDER).long() - (actions == TIGHTER).long()
        return replace(
            state,
            box=torch.where((actions < len(MOVES))[:, None], box, state.box),
            context=context.clamp(0, len(self.factors) - 1),
            history=torch.cat(((actions + 1).to(torch.uint8)[:, None], state.history[:, :-1]), 1),
        )

    def transition(
        self, state: CuttingState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[CuttingState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Change the boxes and make the mask anew, or stop."""
        after, stops = self.acted(state, actions), actions == STOP
        iou = torch.where(stops, state.iou, self.score(after.frame, after.box, after.context))
        change = iou - torch.where(stops, state.start_iou, state.iou)
        reward = (change / LARGE).clamp(-1, 1) * torch.where(stops, self.stop_factor, 1.0)
        return replace(after, iou=iou), reward, stops

    def observe(self, state: CuttingState) -> dict[str, Tensor]:
        """The region around the object box, which is the middle of it, the context's choice, and the last actions."""
        return {
            "context": F.one_hot(state.context, len(self.factors)).float(),
            "history": F.one_hot(state.history.long(), ACTIONS + 1)[..., 1:].float(),
            "place": (state.box / self.limit).clamp(0, 1),
            "view": cut(self.planes, state.frame, enlarged(state.box, SEEN), self.patch),
        }

    def moved(self, boxes: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch moves 4"]:
        """Boxes after each of the moves, within the frame."""
        return kept_inside(moves(boxes, self.alpha), self.size)

    def rewarded(self, state: CuttingState) -> Bool[Tensor, "batch actions"]:
        """What guided exploration draws from, which looks at boxes alone.

        Moves that bring the box nearer to the true one (IoU); a wider context where the object reaches beyond it, a
        tighter one where the object has room in that; the stop at an IoU of `GOOD`, or where no move brings it nearer.
        """
        true = self.boxes[state.frame]
        now = overlaps(state.box[:, None], true[:, None])[:, 0]
        nearer = overlaps(self.moved(state.box), true[:, None])[..., 0] > now + 1e-4
        last = len(self.factors) - 1
        wider = ~self._holds(state.box, state.context, true) & (state.context < last)
        tighter = self._holds(state.box, (state.context - 1).clamp(min=0), true) & (state.context > 0)
        stop = (now[:, 0] >= GOOD) | ~nearer.any(1)
        return torch.cat((nearer, wider[:, None], tighter[:, None], stop[:, None]), 1)

    def _holds(self, box: Tensor, context: Tensor, true: Tensor) -> Tensor:
        region = kept_inside(enlarged(box, self.factors[context]), self.size)
        return ((true[:, :2] >= region[:, :2]) & (true[:, 2:] <= region[:, 2:])).all(1)

    def by_color(
        self, frames: Int[Tensor, " batch"], boxes: Float[Tensor, "batch 4"], contexts: Int[Tensor, " batch"]
    ) -> Bool[Tensor, "batch side side"]:
        """Masks without a network: what has the object's colours in the object box."""
        side = 32
        seen = cut(self.planes, frames, enlarged(boxes, self.factors[contexts]), side)[:, 3]
        place = ((torch.arange(side, device=boxes.device) + 0.5) / side * 2 - 1).abs()
        inside = place <= 1 / self.factors[contexts][:, None]
        return (seen > 0.5) & inside[:, :, None] & inside[:, None]

    def draw(self, state: CuttingState) -> UInt8[Tensor, "batch height width 3"]:
        """The frame and both boxes."""
        height, width = self.size
        picture = self.planes[state.frame][..., :3]
        x = (torch.arange(width, device=state.box.device) + 0.5).expand(len(state.box), height, -1)
        y = (torch.arange(height, device=state.box.device) + 0.5)[:, None].expand(len(state.box), -1, width)
        regions = kept_inside(enlarged(state.box, self.factors[state.context]), self.size)
        for boxes, color in ((regions, OUTER), (state.box, INNER)):
            left, top, right, bottom = boxes[:, :, None, None].unbind(1)
            inside = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
            edge = ((inside >= 0) & (inside <= 1))[..., None]
            picture = torch.where(edge, torch.tensor(color, dtype=torch.uint8, device=x.device), picture)
        return picture


def true_boxes(videos: Videos) -> tuple[Float[Tensor, "frames 4"], Bool[Tensor, " frames"]]:
    """The box of each frame's mask, of the last frame before it that has one where it has none; and whether it has."""
    boxes, there = mask_boxes(videos.masks)
    last = torch.where(there, torch.arange(len(there), device=there.device), -1).cummax(0).values
    return boxes[last.clamp(min=0)], there


def frames_to_cut(videos: Videos, name: str = "videos") -> Int[Tensor, " frames"]:
    """The frames with the object, but for the first of each video.

    Raises:
        InputError: there are none, under this name.
    """
    there, first = true_boxes(videos)[1], videos.first[videos.video]
    found = (there & (torch.arange(len(there), device=there.device) > first)).nonzero().squeeze(1)
    if not len(found):
        raise InputError(f"{name}: found no frame with the object after a first one, expected two frames a video")
    return found


def check_factors(factors: tuple[float, ...]) -> None:
    """Check the sizes of context boxes.

    Raises:
        InputError: none, below 1, or not rising.
    """
    rising = all(low < high for low, high in itertools.pairwise(factors))
    if not factors or factors[0] < 1 or not rising:
        raise InputError(f"factors: found {factors}, expected rising numbers from 1 on, e.g. 1.2 1.5 2.0")


class SingleCuttingEnv(SingleEnv):
    """One copy of `CuttingEnv`."""

    lockstep = CuttingEnv
