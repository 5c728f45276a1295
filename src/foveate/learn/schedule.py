"""Learning rates as functions of a run's progress, so that they follow a budget of steps and one of minutes alike."""

from __future__ import annotations

import math

from torch.optim import Optimizer


def one_cycle(progress: float, peak: float, warmup: float = 0.1, start: float = 0.04) -> float:
    """Learning rate at `progress` in [0, 1]: half a cosine up from `start` · peak, then half a cosine down to zero.

    Smith and Topin 2018, "Super-convergence".
    """
    if progress < warmup:
        return peak * (start + (1 - start) * (1 - math.cos(math.pi * progress / warmup)) / 2)
    return peak * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0))) / 2


def level(progress: float, peak: float) -> float:
    """Learning rate at `progress` in [0, 1]: `peak` in the first half, then evenly down to zero."""
    return peak * min(1.0, 2 * (1 - progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
