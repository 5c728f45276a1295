"""Search for an object by changing a box step by step (Caicedo and Lazebnik 2015, "Active object localization with deep
reinforcement learning").

| | |
|---|---|
| state | the image, the box, the last actions, the boxes that were triggered, the objects still to be found |
| observation | `view`: the region of the box; `history`: the last actions, the latest first; `label`: what is sought |
| action | move right, left, up, down, bigger, smaller, fatter, taller; or trigger |
| reward | of a move: the sign of the change in IoU with the best object left; of the trigger: 3 if it is 0.6, else -3 |
| horizon | 40 steps; it ends with the last trigger |

The box begins as the whole image. After a trigger that is not the last, a black cross is laid over the region, so that
nobody returns there, and the search begins again at one of the four corners, with boxes of three quarters of the side;
so it does after `patience` steps without a trigger. Where nothing is left to be found moves are worth nothing.
Objects of any class are sought, or those of one class of several: then its number, `label`, is seen.
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

from foveate.data.detection import Detections, load_detections
from foveate.data.sought import Searches, of_searches, of_target, searches_to_learn
from foveate.envs.box_moves import MOVES, moves
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.geometry import overlaps
from foveate.models.region_q import Regions, crossed
from foveate.models.regions import cut
from foveate.types import InputError, map_tree

TRIGGER = len(MOVES)
ACTIONS = len(MOVES) + 1
CORNER = 0.75  # side of a box at which the search begins again, in parts of the image's
LEAST = 2.0  # pixels of a side of a box
FRAME = (255, 160, 0)  # colour of the box in a picture


@dataclass(frozen=True)
class SearchState:
    """Coordinates, actions and image numbers: a tree of [batch, ...] that a replay can hold, or [batch, time, ...].

    Attributes:
        image: its number.
        box: in pixels.
        history: the last actions, the latest first; 0 where there was none, else 1 more than the action.
        marks: triggered boxes.
        triggered: how many.
        free: objects that are still to be found.
        age: steps since the search began, or began again.
        begun: how often it began again.
        label: the class that is searched for; None if there is only one.
    """

    image: Int[Tensor, "*batch"]
    box: Float[Tensor, "*batch 4"]
    history: UInt8[Tensor, "*batch past"]
    marks: Float[Tensor, "*batch triggers 4"]
    triggered: Int[Tensor, "*batch"]
    free: Bool[Tensor, "*batch objects"]
    age: Int[Tensor, "*batch"]
    begun: Int[Tensor, "*batch"]
    label: Int[Tensor, "*batch"] | None = None


class BoxSearchEnv(TensorEnv):
    """`foveate/BoxSearch-v0`.

    Args:
        num_envs: copies in lockstep.
        detections: pictures and their boxes, which may be none; None loads `data` from `root`.
        searches: in these, the picture and the class of each example, whose objects alone are to be found then; None: a
            picture is an example, its objects of all classes are.
        target: in what is loaded: "any" object, those of the class of this name, or "each" class: an example is a
            picture and a class then, of which it has an object or, in half of them, none.
        data: name of a set (`foveate.data.detection.DATASETS`).
        root: its folder.
        split: "train", "val" or "test".
        image_size: side in pixels to which pictures are stretched.
        scenes: how many are rendered, for rendered data.
        patch: side of the view in pixels.
        alpha: part of the box's width or height by which a move changes it.
        history: how many actions are remembered.
        threshold: IoU from which on a trigger is right.
        trigger_reward: of a right one; a wrong one costs as much.
        triggers: after so many the episode ends.
        patience: steps without a trigger after which a search begins again elsewhere; None: it never does.
        spare: steps of a search for nothing, every object being found, after which the episode ends; None: it goes on.
            Every reward of a move is 0 then, so that nothing is cut off; an agent that learns wastes less time there.
        **options: of `TensorEnv`; `horizon` is 40 if not given.

    Raises:
        InputError: as `load_detections`; what was loaded has no object to be found; a number out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        detections: Detections | None = None,
        searches: Searches | None = None,
        target: str = "any",
        data: str = "scenes",
        root: str | Path | None = None,
        split: Any = "train",
        image_size: int = 48,
        scenes: int = 200,
        patch: int = 16,
        alpha: float = 0.2,
        history: int = 10,
        threshold: float = 0.6,
        trigger_reward: float = 3.0,
        triggers: int = 1,
        patience: int | None = None,
        spare: int | None = None,
        horizon: int | None = 40,
        **options: Any,
    ) -> None:
        numbers = {"patch": patch, "history": history, "triggers": triggers, "patience": patience, "spare": spare}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        for name, share in ("alpha", alpha), ("threshold", threshold):
            if not 0 < share < 1:
                raise InputError(f"{name}: found {share:g}, expected more than 0 and less than 1")
        if detections is None:
            place = None if root is None else Path(root)
            detections = load_detections(data, place, split, image_size, scenes=scenes)
            detections = of_target(detections, target, place or data)
            searches = searches_to_learn(detections)
        elif not detections.boxes.mask.shape[1]:  # a place for an object, so that there is one to compare with
            empty = map_tree(lambda leaf: leaf.new_zeros(len(leaf), 1, *leaf.shape[2:]), detections.boxes)
            detections = replace(detections, boxes=empty)
        self.patience, self.spare = patience, spare
        self.patch, self.alpha, self.past, self.triggers = patch, alpha, history, triggers
        self.threshold, self.trigger_reward = threshold, trigger_reward
        self.side = detections.pixels.shape[-1]
        seen: dict[str, gymnasium.Space] = {
            "history": gymnasium.spaces.Box(0.0, 1.0, (history, ACTIONS)),
            "view": gymnasium.spaces.Box(0.0, 1.0, (3, patch, patch)),
        }
        pictures, wanted, labels = torch.arange(len(detections)), detections.boxes.wanted, None
        if searches is not None:
            pictures, wanted = searches[:, 0], of_searches(detections.boxes, searches).wanted
            if len(detections.classes) > 1:
                labels = searches[:, 1]
                seen["label"] = gymnasium.spaces.Discrete(len(detections.classes))
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(seen),
            gymnasium.spaces.Discrete(ACTIONS),
            examples=len(pictures),
            horizon=horizon,
            **options,
        )
        self.pixels = detections.pixels.permute(0, 2, 3, 1).contiguous().to(self.device)  # a place's colours together
        self.targets = detections.boxes.boxes.to(self.device)
        self.pictures, self.wanted = pictures.to(self.device), wanted.to(self.device)  # of the examples
        self.labels = None if labels is None else labels.to(self.device)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> SearchState:
        """The whole image, nothing done and nothing found."""
        box = torch.tensor([0.0, 0.0, self.side, self.side], device=ids.device).expand(len(ids), 4)
        past = torch.zeros(len(ids), self.past, dtype=torch.uint8, device=ids.device)
        marks = torch.zeros(len(ids), self.triggers, 4, device=ids.device)
        none, label = torch.zeros_like(ids), None if self.labels is None else self.labels[ids]
        return SearchState(self.pictures[ids], box, past, marks, none, self.wanted[ids], none, none, label)

    def transition(
        self, state: SearchState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[SearchState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Change the box, or trigger: then the object is taken, and the search ends or begins again."""
        fires = actions == TRIGGER
        before, best = self.overlap(state, state.box[:, None])[:, 0].max(1)
        moved = self.moved(state.box).gather(1, actions.clamp(max=TRIGGER - 1)[:, None, None].expand(-1, 1, 4))
        change = (self.overlap(state, moved)[:, 0].amax(1) - before).sign()
        right = before >= self.threshold
        reward = torch.where(fires, torch.where(right, self.trigger_reward, -self.trigger_reward), change)
        place = torch.arange(self.triggers, device=actions.device) == state.triggered[:, None]
        marks = torch.where((place & fires[:, None])[..., None], state.box[:, None], state.marks)
        taken = F.one_hot(best, state.free.shape[1]).bool() & (fires & right)[:, None]
        count = state.triggered + fires
        free, age = state.free & ~taken, state.age + 1
        again = fires if self.patience is None else fires | (age >= self.patience)
        after = SearchState(
            state.image,
            torch.where(again[:, None], self._corner(state.begun), moved[:, 0]),
            torch.cat(((actions + 1).to(torch.uint8)[:, None], state.history[:, :-1]), 1),
            marks,
            count,
            free,
            age.masked_fill(again, 0),
            state.begun + again,
            state.label,
        )
        over = fires & (count >= self.triggers)
        kept = torch.where(over[:, None], state.box, after.box)  # the last box stays
        if self.spare is not None:
            over = over | (~state.free.any(1) & ~fires & (age >= self.spare))
        return replace(after, box=kept), reward, over

    def observe(self, state: SearchState) -> dict[str, Tensor]:
        """The region of the box, marks as black crosses, the last actions, and the class if there are several."""
        corners = state.box.unflatten(1, (2, 2))
        share = (torch.arange(self.patch, device=state.box.device) + 0.5) / self.patch
        points = corners[:, :1] + share[:, None] * (corners[:, 1:] - corners[:, :1])  # [batch, patch, (x, y)]
        x = points[:, None, :, 0].expand(-1, self.patch, -1)
        y = points[:, :, None, 1].expand(-1, -1, self.patch)
        view = cut(self.pixels, state.image, state.box, self.patch)
        history = F.one_hot(state.history.long(), ACTIONS + 1)[..., 1:].float()
        seen = {"history": history, "view": view.masked_fill(self._crossed(state, x, y)[:, None], 0.0)}
        return seen if state.label is None else {"history": history, "label": state.label, "view": seen["view"]}

    def regions(self, state: SearchState, maps: Float[Tensor, "images features rows columns"] | None = None) -> Regions:
        """What a network is shown that sees the pictures whole: their maps, or those in play, each of them once."""
        there = self._there(state)
        if maps is not None:
            return Regions(state.image, state.box, state.marks, there, state.history, state.label, maps=maps)
        some, number = state.image.unique(return_inverse=True)
        images = self.pixels[some].permute(0, 3, 1, 2).float() / 255
        return Regions(number, state.box, state.marks, there, state.history, state.label, images=images)

    def _there(self, state: SearchState) -> Bool[Tensor, "batch triggers"]:
        return torch.arange(self.triggers, device=state.box.device) < state.triggered[:, None]

    def moved(self, boxes: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch moves 4"]:
        """Boxes after each of the moves, within the image and not smaller than some pixels."""
        moved = moves(boxes, self.alpha)
        low = moved[..., :2].clamp(0, self.side - LEAST)
        return torch.cat((low, torch.maximum(moved[..., 2:].clamp(max=self.side), low + LEAST)), 2)

    def overlap(
        self, state: SearchState, boxes: Float[Tensor, "batch count 4"]
    ) -> Float[Tensor, "batch count objects"]:
        """IoU of boxes with the objects that are still to be found, 0 for others."""
        return overlaps(boxes, self.targets[state.image]) * state.free[:, None]

    def rewarded(self, state: SearchState) -> Bool[Tensor, "batch actions"]:
        """The actions that would be rewarded now: what guided exploration draws from."""
        before = self.overlap(state, state.box[:, None]).amax((1, 2))
        after = self.overlap(state, self.moved(state.box)).amax(2)
        return torch.cat((after > before[:, None], (before >= self.threshold)[:, None]), 1)

    def draw(self, state: SearchState) -> UInt8[Tensor, "batch height width 3"]:
        """The image with its marks, and the box."""
        step = torch.arange(self.side, device=state.box.device) + 0.5
        x, y = step.expand(len(state.box), self.side, -1), step[:, None].expand(len(state.box), -1, self.side)
        picture = torch.where(self._crossed(state, x, y)[..., None], 0, self.pixels[state.image])
        left, top, right, bottom = state.box[:, :, None, None].unbind(1)
        inside = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
        edge = (inside >= 0) & (inside <= 1)
        return torch.where(edge[..., None], torch.tensor(FRAME, dtype=torch.uint8, device=x.device), picture)

    def _corner(self, number: Int[Tensor, " batch"]) -> Float[Tensor, "batch 4"]:
        """Where the search begins again: the corners in turn."""
        size, rest = CORNER * self.side, (1 - CORNER) * self.side
        low = torch.stack((number % 2, number // 2 % 2), 1) * rest
        return torch.cat((low, low + size), 1)

    def _crossed(
        self, state: SearchState, x: Float[Tensor, "batch rows columns"], y: Float[Tensor, "batch rows columns"]
    ) -> Bool[Tensor, "batch rows columns"]:
        """Which places lie under a mark."""
        return crossed(state.marks, self._there(state), x, y)


class SingleBoxSearchEnv(SingleEnv):
    """One copy of `BoxSearchEnv`."""

    lockstep = BoxSearchEnv
