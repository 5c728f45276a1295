"""Boxes placed in a new frame from those of the frame before: by acting in `CuttingEnv`, or by regression.

Each gives (frames, boxes, contexts) → boxes and contexts, what `foveate.models.regions.carry` asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.envs.cutting import STOP, CuttingEnv
from foveate.models.regions import Place, changed
from foveate.types import map_tree


def acting(env: CuttingEnv, placer: nn.Module, horizon: int) -> Place:
    """By the actions of the highest value, until it stops or has taken `horizon` of them."""

    @torch.no_grad()
    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        placer.eval()
        state, going = env.begun(frames, boxes, contexts), torch.ones_like(frames, dtype=torch.bool)
        for _ in range(horizon):
            actions = placer(env.observe(state)).argmax(1)
            going = going & (actions != STOP)
            if not bool(going.any()):
                break

            def chosen(new: Tensor, old: Tensor, going: Tensor = going) -> Tensor:
                return torch.where(going.view(-1, *(1,) * (new.ndim - 1)), new, old)

            state = map_tree(chosen, env.acted(state, actions), state)
        return state.box, state.context

    return place


def regressing(env: CuttingEnv, regressor: nn.Module, rounds: int) -> Place:
    """By regression, so many times one after the other."""

    @torch.no_grad()
    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        regressor.eval()
        for _ in range(rounds):
            boxes = changed(boxes, regressor(env.observe(env.begun(frames, boxes, contexts))), env.size)
        return boxes, contexts

    return place


def fixed(boxes_of: Tensor) -> Place:
    """At given boxes [frames, 4]: the true ones, or one that does not move."""

    def place(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        return boxes_of[frames], contexts

    return place


def unmoved(frames: Tensor, boxes: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Where they are: at the masks of the frame before."""
    return boxes, contexts
