"""Agents of one frame that walk into the next one jointly: each sees where its neighbours have got to.

They look for their objects; nobody knows where those are. `foveate.models.association.follow` makes tracks of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate.envs.box_tracking import STOP, TrackingState, Walking, middle
from foveate.models.association import Asked, moving
from foveate.models.tracker import shifted
from foveate.types import Tree


def together(
    before: Int[Tensor, " batch"],
    after: Int[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    start: Float[Tensor, "batch 4"],
    box: Float[Tensor, "batch 4"],
    past: int,
    neighbours: int,
) -> tuple[TrackingState, Int[Tensor, "batch near"]]:
    """Agents that act jointly: their state, and the row of each of their neighbours, the nearest of the same group.

    Args:
        before: frame in which each was last seen.
        after: frame in which all of a group are looked for.
        groups: agents see those of their own group only.
        start: boxes in the first.
        box: where the walk begins.
        past: how many actions are remembered.
        neighbours: how many others each sees.
    """
    count, device = len(box), box.device
    away = (middle(box)[:, None] - middle(box)).norm(dim=2)
    apart = (groups[:, None] != groups) | torch.eye(count, dtype=torch.bool, device=device)
    most = min(neighbours, count)
    nearest = away.masked_fill(apart, torch.inf).topk(most, 1, largest=False)
    rows = F.pad(nearest.indices, (0, neighbours - most))
    near = F.pad(nearest.values.isfinite(), (0, neighbours - most))
    history = torch.zeros(count, past, dtype=torch.uint8, device=device)
    steps = torch.zeros(count, dtype=torch.int64, device=device)
    others = before[rows], start[rows], box[rows], box[rows], near
    return TrackingState(before, after, start, box, torch.zeros_like(box), history, steps, *others), rows


@torch.no_grad()
def walk_together(
    walking: Walking,
    network: Callable[[Tree], Tensor],
    state: TrackingState,
    rows: Int[Tensor, "batch near"],
    horizon: int,
) -> tuple[Float[Tensor, "batch 4"], Float[Tensor, " batch"]]:
    """Let agents act jointly, each taking its best action, until all have stopped.

    Args:
        walking: moves and views.
        network: (what `observed` makes) → values [batch, actions].
        state: of `together`.
        rows: of `together`.
        horizon: steps after which who has not stopped is stopped.

    Returns:
        Their boxes, and the value of their stop, about 2 P(right) - 1: how sure each is; -1 for who was stopped.
    """
    going = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    sure = torch.full((len(rows),), -1.0, device=rows.device)  # of who never stops
    for _ in range(horizon):
        here = going.nonzero().flatten()
        if not len(here):
            break
        some = TrackingState(**{name: leaf[here] for name, leaf in vars(state).items()})
        values, actions = network(walking.observe(some)).max(1)
        after = walking.act(some, actions)
        box, history, steps = state.box.clone(), state.history.clone(), state.steps.clone()
        box[here], history[here], steps[here] = after.box, after.history, after.steps
        state = replace(state, box=box, history=history, steps=steps, near_box=box[rows])
        stops = actions == STOP
        sure[here[stops]], going[here] = values[stops], ~stops
    return state.box, sure


@torch.no_grad()
def regressed(
    walking: Walking, network: Callable[[Tree], Tensor], state: TrackingState, rounds: int
) -> Float[Tensor, "batch 4"]:
    """Boxes of agents that do not decide: a network says by how much to change them, some times."""
    for _ in range(rounds):
        offsets = network(walking.observe(state))
        state = replace(state, box=walking.kept(shifted(state.box, offsets), state.after))
    return state.box


@dataclass(frozen=True)
class Proposer:
    """Where a network takes tracks: what `foveate.models.association.follow` asks.

    Attributes:
        walking: moves and views.
        network: (what `observed` makes) → values of the actions; with `rounds` offsets of the box.
        past: actions that are remembered.
        neighbours: how many others each agent sees.
        horizon: steps in a frame at most.
        motion: a walk begins where the track's velocity leads; without it, where the track was.
        rounds: of regression; 0: agents walk.
    """

    walking: Walking
    network: Callable[[Tree], Tensor]
    past: int
    neighbours: int
    horizon: int
    motion: bool = True
    rounds: int = 0

    def __call__(self, asked: Asked) -> tuple[Float[Tensor, "tracks 4"], Float[Tensor, " tracks"]]:
        """Boxes in the frame that is asked for, and how sure of each; all tracks of a group walk jointly."""
        box = self.walking.kept(moving(asked)[0] if self.motion else asked.box, asked.after)
        sizes = self.past, self.neighbours
        state, rows = together(asked.before, asked.after, asked.groups, asked.start, box, *sizes)
        if self.rounds:
            found = regressed(self.walking, self.network, state, self.rounds)
            return found, torch.zeros(len(box), device=box.device)
        found, sure = walk_together(self.walking, self.network, state, rows, self.horizon)
        return torch.where((sure > 0)[:, None], found, box), sure  # who is lost stays where the walk began
