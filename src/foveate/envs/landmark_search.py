"""Answers of walks to landmarks: all those of all volumes at once, from several starts; and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.data.volumes import Volumes
from foveate.envs.landmark_walk import AROUND, LandmarkWalkEnv, WalkState
from foveate.types import Tree, map_tree
from foveate.value_learning import Walk, walk

SIGHT = 6.0  # steps: about what the wider of the two cubes shows
FAILED = 10.0  # mm from which on an answer is a failure


@dataclass(frozen=True)
class Found:
    """Answers for volumes, from several walks each.

    Attributes:
        points: the median of the answers along each axis, x, y, z in voxels.
        present: whether no more than half of the walks left the volume.
        single: the answer of each walk.
        gone: which walks left.
        walks: the walks, [volumes · landmarks · starts, time, ...].
    """

    points: Float[Tensor, "volumes landmarks 3"]
    present: Bool[Tensor, "volumes landmarks"]
    single: Float[Tensor, "volumes landmarks starts 3"]
    gone: Bool[Tensor, "volumes landmarks starts"]
    walks: Walk


def with_belief(
    both: Callable[[Tree], tuple[Tensor, Tensor]], env: LandmarkWalkEnv, seen: Tree, state: WalkState
) -> tuple[Tensor, dict[str, Tensor]]:
    """The values of steps from some states, and the "belief_loss": Huber loss of where the landmark is believed to be.

    A reward tells of one step; where the landmark lies tells of all six, and how far. Farther than `SIGHT` steps away
    counts as that; where the landmark is not shown nothing is taught.

    Args:
        both: (what the network is shown) → values, and steps to the landmark [batch, 3].
        env: of the states.
        seen: what the network is shown of the states.
        state: the states.
    """
    values, belief = both(seen)
    loss = F.huber_loss(belief, env.far(state).clamp(-SIGHT, SIGHT), reduction="none").mean(1)
    shown = (~env.hidden(state)).float()
    return values, {"belief_loss": (loss * shown).sum() / shown.sum().clamp(min=1)}


def every_landmark(
    volumes: Volumes, mean: Float[Tensor, "landmarks 3"], starts: int, device: Any, **how: Any
) -> LandmarkWalkEnv:
    """An environment for walks to all landmarks of all volumes at once, that many to each; one alone begins at `mean`.

    Args:
        volumes: in which to walk.
        mean: where to begin, in parts of what is shown.
        starts: walks to each landmark.
        device: where everything lives.
        **how: further arguments of `LandmarkWalkEnv`.
    """
    copies = len(volumes) * volumes.landmarks.shape[1] * starts
    how |= {"starts": "mean", "mean": mean.cpu(), "around": 0.0 if starts == 1 else AROUND}
    return LandmarkWalkEnv(copies, volumes=volumes, autoreset="disabled", device=device, **how)


def search(network: Callable[[Tree], Tensor], env: LandmarkWalkEnv, volumes: Volumes, starts: int) -> Found:
    """Walk, and take the median of the answers of those walks that did not leave.

    Args:
        network: values of the steps.
        env: of `every_landmark`, with the same volumes and starts.
        volumes: in which to walk.
        starts: walks to each landmark.
    """
    count, landmarks = volumes.landmarks.shape[:2]
    walks = walk(env, network, torch.arange(count * landmarks, device=env.device).repeat_interleave(starts))
    last = map_tree(lambda leaf: leaf[:, -1], walks.states)
    single = env.answer(last).view(count, landmarks, starts, 3).cpu()
    gone = env.left(last).view(count, landmarks, starts).cpu()
    return Found(*answered(single, gone, volumes.sizes), single, gone, walks)


def answered(
    single: Float[Tensor, "volumes landmarks starts 3"],
    gone: Bool[Tensor, "volumes landmarks starts"],
    sizes: Int[Tensor, "volumes 3"],
) -> tuple[Float[Tensor, "volumes landmarks 3"], Bool[Tensor, "volumes landmarks"]]:
    """The median inside of the volume of those answers whose walks did not leave, and whether half of them or more did.

    Where most left it is the median of all.
    """
    present = gone.float().mean(2) <= 0.5
    stayed = torch.where((gone & present[..., None])[..., None], math.nan, single)
    points = stayed.nanquantile(0.5, dim=2)
    return torch.minimum(points.clamp(min=0), (sizes - 1.0)[:, None]), present


def away(points: Float[Tensor, "volumes landmarks 3"], volumes: Volumes) -> Float[Tensor, "volumes landmarks"]:
    """Distance of points, in voxels, from the landmarks, in mm."""
    return (points.cpu() - volumes.landmarks).norm(dim=2) * volumes.spacing


def scores(
    points: Float[Tensor, "volumes landmarks 3"],
    volumes: Volumes,
    present: Bool[Tensor, "volumes landmarks"] | None = None,
    seconds: float | None = None,
) -> dict[str, float]:
    """`error_mm`, its median, and `failures`: the part that is more than `FAILED` mm off, or said not to be there.

    With the seconds that all of the answers took also `milliseconds_a_landmark`, their time by their number.
    """
    errors = away(points, volumes)
    failed = errors > FAILED if present is None else (errors > FAILED) | ~present
    found = {"error_mm": errors.mean(), "median_error_mm": errors.median(), "failures": failed.float().mean()}
    told = {name: float(value) for name, value in found.items()}
    return told if seconds is None else told | {"milliseconds_a_landmark": 1000 * seconds / errors.numel()}
