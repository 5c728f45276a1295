"""Models as parts of a run: with their optimizer and the keeper of their best weights, and read back to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from foveate.learn.keeper import Keeper
from foveate.run import Run

M = TypeVar("M", bound=nn.Module)
ADAM = partial(torch.optim.Adam, fused=True)  # all weights in one pass: a third of the time of one after another


def tracked(
    run: Run,
    name: str,
    model: M,
    kind: Callable[..., Optimizer] = ADAM,
    by: str = "held_out_reward",
) -> tuple[M, Optimizer, Keeper]:
    """A model, the optimizer of what it learns, and the keeper of its best weights by this score, as parts of the run.

    Phases of a run set the optimizer's learning rate themselves.
    """
    model = model.to(run.device)
    optimizer, keeper = kind([each for each in model.parameters() if each.requires_grad]), Keeper(model, by)
    model, optimizer, keeper = run.track(**{name: model, f"{name}_optimizer": optimizer, f"{name}_keeper": keeper})
    return model, optimizer, keeper


def learning(run: Run, name: str, model: M, kind: Callable[..., Optimizer] = ADAM) -> tuple[M, Optimizer]:
    """A model and the optimizer of what it learns, as parts of the run: as `tracked`, for one that ends as it ends."""
    model = model.to(run.device)
    optimizer = kind([each for each in model.parameters() if each.requires_grad])
    model, optimizer = run.track(**{name: model, f"{name}_optimizer": optimizer})
    return model, optimizer


def look_at(run: Run, model: nn.Module, keeper: Keeper | None, validate: Callable[[], dict[str, Any]] | None) -> None:
    """Log what a model scores on held-out inputs, if any, and keep its weights if they are the best so far."""
    if validate is None:
        return
    found = validate()
    if keeper is not None:
        keeper.offer(model, found[keeper.by])
    run.log(**found)


def restored(run: Run, parts: Mapping[str, str], build: Callable[[], M]) -> dict[str, M]:
    """The models of those parts, name → tracked part, that the run's checkpoint holds: what an evaluation compares."""
    found = {}
    for name, part in parts.items():
        model = build().to(run.device).eval()
        if run.restore(part, model):
            found[name] = model
    return found
