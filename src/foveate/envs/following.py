"""Objects followed through videos: what is seen of the frames, and the ways to place boxes in each of them.

A way is (frames, boxes, contexts) → boxes and contexts, from where the mask of the frame before lies to where this
one's is made: by acting in `CuttingEnv`, by regression, or without anything learned.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from foveate import noise
from foveate.data.masked_videos import Videos
from foveate.envs.cutting import STOP, CuttingEnv, CuttingState
from foveate.geometry import enlarged
from foveate.models.appearance import color_likeness, feature_likeness, stacked
from foveate.models.backbones import Pretrained
from foveate.models.regions import Carried, Make, Place, carry, changed, jittered
from foveate.types import map_tree

Clips: TypeAlias = tuple[Videos, UInt8[Tensor, "frames height width planes"]]
Step: TypeAlias = tuple[CuttingState, Int[Tensor, " videos"]]
ROWS = 240  # pixels of a frame's height as a network of ImageNet sees it


def clips_of(videos: Videos, likeness: str = "colors") -> Clips:
    """Videos, and of each pixel its colours and how much it looks like the object of the video's first mask.

    Args:
        videos: of which only the first masks are looked at.
        likeness: "colors", or to compare features too the name of their network (`foveate.models.backbones`).
    """
    given = videos.pixels, videos.video, videos.first, videos.masks[videos.first]
    alike = [color_likeness(*given)]
    if likeness != "colors":
        network = Pretrained(likeness, 8).to(videos.pixels.device).eval()
        alike.append(feature_likeness(*given, network, ROWS / videos.size[0]))
    return videos, stacked(videos.pixels, *alike)


def shown(videos: Videos) -> Int[Tensor, "videos time"]:
    """The frames of all videos; those that are over stay at their last."""
    return torch.stack([videos.frames(time) for time in range(int(videos.lengths.max()))], 1)


def truth(videos: Videos) -> tuple[Bool[Tensor, "videos time height width"], Int[Tensor, " videos"]]:
    """Their masks, and how many there are."""
    return videos.masks[shown(videos)], videos.lengths


def follow(videos: Videos, place: Place, make: Make, factors: Float[Tensor, " contexts"], context: int) -> Carried:
    """Carry the first masks of all videos to their ends."""
    return carry(videos.masks[videos.first], shown(videos), place, make, factors, context)


def color_maker(env: CuttingEnv) -> Make:
    """Masks without a network, from an environment's `by_color`."""

    def make(frames: Tensor, boxes: Tensor, contexts: Tensor) -> Tensor:
        return env.by_color(frames, boxes, contexts).float()

    return make


@torch.no_grad()
def mask_iou(env: CuttingEnv) -> dict[str, float]:
    """Mean IoU of the masks that an environment makes from jittered boxes around the object, the same at every look."""
    ids = torch.arange(env.examples, device=env.device)
    keys = noise.key("held out", ids)
    state = env.opened(ids, keys)
    boxes = jittered(env.boxes[state.frame], keys, env.jitter, env.size)
    return {"held_out_iou": float(env.score(state.frame, boxes, state.context).mean())}


def acting(env: CuttingEnv, placer: nn.Module, horizon: int, way: list[Step] | None = None) -> Place:
    """By the actions of the highest value, until it stops or has taken `horizon` of them.

    The mask is made where on this way stopping was worth most: a way that leads off costs nothing then. `way` is given
    the states of every frame, the first and those after each action, with that action; -1 with the first. Of several
    videos all go on until the last of them has stopped.
    """

    @torch.no_grad()
    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        placer.eval()
        state, going = env.begun(frames, boxes, contexts), torch.ones_like(frames, dtype=torch.bool)
        best, worth, actions = state, torch.full_like(boxes[:, 0], -torch.inf), torch.full_like(frames, -1)
        for turn in range(horizon + 1):
            if way is not None:
                way.append((state, actions))
            values = placer(env.observe(state))
            better = going & (values[:, STOP] > worth)
            worth = torch.where(better, values[:, STOP], worth)
            best = map_tree(partial(_chosen, better), state, best)
            actions = values.argmax(1)
            going = going & (actions != STOP)
            if turn == horizon or not bool(going.any()):
                break
            state = map_tree(partial(_chosen, going), env.acted(state, actions), state)
        return best.box, best.context

    return place


def told_steps(way: list[Step], factors: Float[Tensor, " contexts"], count: int) -> dict[str, Tensor]:
    """What `acting` noted of one video's first `count` frames, in a row: frames, actions, and both boxes after them."""
    joined = map_tree(lambda *leaves: torch.cat(leaves), *way)
    steps, actions = map_tree(lambda leaf: leaf[joined[0].frame < count], joined)
    boxes = {"step_boxes": steps.box, "step_contexts": enlarged(steps.box, factors[steps.context])}
    return {"step_frames": steps.frame, "step_actions": actions, **boxes}


def _chosen(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(which.view(-1, *(1,) * (new.ndim - 1)), new, old)


def regressing(env: CuttingEnv, regressor: nn.Module, rounds: int) -> Place:
    """By regression, so many times one after the other."""

    @torch.no_grad()
    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        regressor.eval()
        for _ in range(rounds):
            boxes = changed(boxes, regressor(env.observe(env.begun(frames, boxes, contexts))), env.size)
        return boxes, contexts

    return place


def knowing(env: CuttingEnv, horizon: int) -> Place:
    """By the action after which the mask's true IoU is highest, as long as it rises: what the actions have to give."""

    @torch.no_grad()
    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        state = env.begun(frames, boxes, contexts)
        iou = env.score(frames, state.box, state.context)
        for _ in range(horizon):
            tries = [env.acted(state, torch.full_like(frames, action)) for action in range(STOP)]
            best, action = torch.stack([env.score(frames, each.box, each.context) for each in tries]).max(0)
            if not bool((better := best > iou).any()):
                break
            state = map_tree(partial(_chosen, better), env.acted(state, action), state)
            iou = torch.where(better, best, iou)
        return state.box, state.context

    return place


def fixed(boxes_of: Tensor) -> Place:
    """At given boxes [frames, 4]: the true ones, or one that does not move."""

    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        return boxes_of[frames], contexts

    return place


def unmoved(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Where they are: at the masks of the frame before."""
    return boxes, contexts
