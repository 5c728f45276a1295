"""A code of dense maps, learned before anything writes its words: a phase of a run.

Kolesnikov et al. 2022, "UViM: a unified modeling approach for vision with learned guiding codes" (arXiv 2205.10337).
What is coded, and by what, is in `foveate.models.codes`; words of an answer are then learned in two steps
(`foveate.two_steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from foveate import noise
from foveate.learn.keeper import Keeper
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.codes import MapCode, kept_words
from foveate.parts import look_at
from foveate.run import Run
from foveate.types import Tree


def learn_code(
    run: Run,
    share: float,
    code: MapCode,
    batches: Callable[[int], tuple[Tensor, Tensor, Tree]],
    losses: Callable[[Tensor, Tree], dict[str, Tensor]],
    optimizer: Optimizer,
    learning_rate: float,
    keeper: Keeper,
    validate: Callable[[], dict[str, Any]],
    *,
    every: int = 200,
) -> None:
    """Teach a code to say what its maps are, before anything writes it: the phase "codes" of a run.

    Args:
        run: owns the loop.
        share: of the run's budget; with 0 there is no such phase, and the code stays as it is.
        code: as `run.track` returned it.
        batches: step → images, their maps as the oracle sees them, and what the losses compare with.
        losses: of maps as they are drawn again; they are added, and logged.
        optimizer: as `run.track` returned it.
        learning_rate: peak of the one-cycle schedule.
        keeper: keeps the weights of the best `validate()[keeper.by]`, and gives them to the code in the end.
        validate: scores on held-out inputs, logged every `every` steps.
        every: steps between validations.
    """
    if not share:
        return
    for step in run.steps("codes", share):
        if step == 0:
            keeper.begin()
            look_at(run, code, keeper, validate)
        images, maps, targets = batches(step)
        keys = noise.key(run.seed, "codes", step, torch.arange(len(images)) + run.rank * len(images)).to(run.device)
        keep = kept_words(noise.fold(keys, "kept"), code.length)
        found = losses(code(images, maps, keep), targets)
        set_learning_rate(optimizer, one_cycle(run.progress, learning_rate))
        run.optimise(torch.stack(list(found.values())).sum(), optimizer, clip=1.0)
        run.log(**{name: value.detach() for name, value in found.items()})
        if (step + 1) % every == 0:
            look_at(run, code, keeper, validate)
    keeper.finish(code, validate()[keeper.by])
    run.save()
