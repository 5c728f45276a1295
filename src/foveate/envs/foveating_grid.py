"""Search on a grid: one bright cell among texture, nine cells a glimpse, and a cue that says warmer or colder.

Beside the environment stands what can be known in it: the exact posterior over the target's cell (`believe`), and the
policies that are written on it by hand (`BeliefPolicy`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.distributions import Categorical
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.types import Decisions, InputError, Policy, State

SIDE = 12  # cells
PATCH = 3  # cells seen at a glimpse, a side
MOST = 12  # the largest budget of glimpses
TEXTURE = 0.4  # the texture is drawn evenly from 0 to this, the target from 0.9 to 1
THRESHOLD = 0.65  # what is brighter is the target
GRIDS = 2**20  # different grids in each split
WHERE = 6  # numbers that tell where a glimpse was taken
CLASSES = ("top left", "top right", "bottom left", "bottom right")
SCORE_RANGE = 10.0  # of the action space; libraries of others want finite bounds, the environment itself sets none


def cell_at(locations: Float[Tensor, "*batch 2"]) -> Int[Tensor, "*batch"]:
    """The cell (row · 12 + column) in which a location (x, y) in [-1, 1] falls; beyond the grid, the nearest one."""
    column, row = ((locations + 1) / 2 * SIDE).floor().clamp(0, SIDE - 1).long().unbind(-1)
    return row * SIDE + column


def centre_of(cells: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch 2"]:
    """The location (x, y) of the middle of a cell."""
    return (torch.stack((cells % SIDE, cells // SIDE), -1) * 2 + 1) / SIDE - 1


def quadrant_of(cells: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Which of `CLASSES` a cell lies in."""
    return 2 * (cells // SIDE * 2 // SIDE) + cells % SIDE * 2 // SIDE


def nearer(targets: Int[Tensor, "*#batch"], now: Int[Tensor, "*#batch"], before: Int[Tensor, "*#batch"]) -> Tensor:
    """Whether the cell looked at now is closer to the target than the one before, centre to centre; a tie is not."""
    return _distance(targets, now) < _distance(targets, before)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Squared, in cells: an integer, so that ties are exact."""
    return (one // SIDE - other // SIDE).square() + (one % SIDE - other % SIDE).square()


def half_plane(
    here: Float[Tensor, "batch 2"], before: Float[Tensor, "batch 2"], cues: Float[Tensor, " batch"]
) -> Float[Tensor, "batch 3"]:
    """A cue as the half-plane n · p > offset of places p that are on the side it speaks for: (nx, ny, offset).

    n is the unit normal of the line half-way between the place looked at now and the one before. It points to the
    former if the cue says warmer (1), to the latter if it says colder (-1). All 0 without a move: such a cue is chance.
    """
    move = (here - before) * cues[:, None]
    normal = torch.nn.functional.normalize(move, dim=-1)
    return torch.cat((normal, (normal * (here + before) / 2).sum(-1, keepdim=True)), -1)


@dataclass(frozen=True)
class GridState:
    """The grid and its target's cell, the cell looked at now and the one before, the cue, glimpses taken and allowed.

    The cue is 1 for warmer, -1 for colder, 0 at the first glimpse.
    """

    grids: Float[Tensor, "batch 12 12"]
    targets: Int[Tensor, " batch"]
    cells: Int[Tensor, " batch"]
    before: Int[Tensor, " batch"]
    cues: Float[Tensor, " batch"]
    taken: Int[Tensor, " batch"]
    budgets: Int[Tensor, " batch"]

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """The quadrant of the target."""
        return quadrant_of(self.targets)


class FoveatingGridEnv(TensorEnv):
    """`foveate/FoveatingGrid-v0`: in which quadrant of a 12×12 grid is the target?

    Observation: `what` [1, 3, 3], the brightness of the cells around the one looked at, 0 beyond the grid; `where` [6]:
    that cell's place (x, y); the cue as the half of the grid it speaks for, (nx, ny, offset), see `half_plane`; and the
    share of 12 glimpses that is still to come. Action: the next location (x, y), of which only the cell it falls in
    matters, then a score for each quadrant (`CLASSES`). After the last glimpse the scores are the guess: reward 1 if
    the highest is at the right quadrant.

    The texture is drawn cell by cell, alike everywhere, and darker than the target: a glimpse that covers the target
    shows it for sure, any other tells nothing but that it is not there. The cue is warmer if the present cell is nearer
    to the target than the one before (a tie is not), and wrong with probability `flip`.

    Args:
        num_envs: copies in lockstep.
        glimpses: the budget, 1 to 12, the first one included; None draws it anew for each episode, as the larger of
            two even draws: a long episode teaches what a short one does, and more.
        flip: probability that a cue is the wrong one.
        first: where the first glimpse falls, (x, y); None: anywhere, which is not the agent's choice.
        split: which of three sets of 2^20 grids is shown.
        grids: show these instead, [size, 1, 12, 12] in [0, 1]; the brightest cell is the target.
        **options: of `TensorEnv`.

    Raises:
        InputError: a budget or a probability that is out of range, grids of another size.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        glimpses: int | None = 6,
        flip: float = 0.2,
        first: tuple[float, float] | None = None,
        split: Literal["train", "val", "test"] = "train",
        grids: Float[Tensor, "size 1 height width"] | None = None,
        **options: Any,
    ) -> None:
        if glimpses is not None and not 1 <= glimpses <= MOST:
            raise InputError(f"glimpses: found {glimpses}, expected 1 to {MOST}; or none, to draw a budget an episode")
        if not 0 <= flip <= 1:
            raise InputError(f"flip: found {flip}, expected a probability from 0 to 1, e.g. 0.2")
        if grids is not None and grids.shape[-2:] != (SIDE, SIDE):
            raise InputError(f"grids: found {list(grids.shape)}, expected [size, 1, {SIDE}, {SIDE}]: resize them")
        self.glimpses, self.flip, self.first, self.split = glimpses, flip, first, split
        bounds = torch.tensor([1.0, 1.0] + [SCORE_RANGE] * len(CLASSES)).numpy()
        low, high = torch.tensor([[-1.0, -1, -1, -1, -1.5, 0], [1, 1, 1, 1, 1.5, 1]]).numpy()
        super().__init__(
            num_envs,
            gymnasium.spaces.Dict(
                what=gymnasium.spaces.Box(0.0, 1.0, (1, PATCH, PATCH)), where=gymnasium.spaces.Box(low, high)
            ),
            gymnasium.spaces.Box(-bounds, bounds),
            examples=GRIDS if grids is None else len(grids),
            **options,
        )
        self.grids = None if grids is None else grids.to(self.device)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> GridState:
        """Grids follow from split and id; where the first glimpse falls, budget and cues from the keys."""
        if self.grids is None:
            of_grid = noise.key("grid", self.split, ids)
            grids = noise.uniform(noise.fold(of_grid, "texture"), SIDE * SIDE) * TEXTURE
            targets = noise.integers(noise.fold(of_grid, "target"), SIDE * SIDE)
            bright = 0.9 + 0.1 * noise.uniform(noise.fold(of_grid, "brightness"), 1)
            grids = grids.scatter(1, targets[:, None], bright)
        else:
            grids = self.grids[ids].flatten(1)
            targets = grids.argmax(-1)
        if self.first is None:
            cells = noise.integers(noise.fold(keys, "first"), SIDE * SIDE)
        else:
            cells = cell_at(torch.tensor(self.first, device=ids.device)).expand_as(ids)
        if self.glimpses is None:
            budgets = noise.integers(noise.fold(keys, "budget"), MOST, 2).amax(-1) + 1
        else:
            budgets = torch.full_like(ids, self.glimpses)
        nothing = torch.zeros(len(ids), device=ids.device)
        return GridState(
            grids.unflatten(1, (SIDE, SIDE)), targets, cells, cells, nothing, torch.ones_like(ids), budgets
        )

    def transition(
        self, state: GridState, actions: Float[Tensor, "batch action"], keys: Int[Tensor, " batch"]
    ) -> tuple[GridState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Look at the cell of the location and get a cue, or, after the last glimpse, judge the scores."""
        terminated = state.taken >= state.budgets
        right = (actions[:, 2:].argmax(-1) == state.labels).float()
        cells = cell_at(actions[:, :2])
        wrong = noise.uniform(noise.fold(keys, "cue")) < self.flip
        warmer = nearer(state.targets, cells, state.cells) ^ wrong
        moved = GridState(
            state.grids, state.targets, cells, state.cells, warmer.float() * 2 - 1, state.taken + 1, state.budgets
        )
        return moved, right * terminated, terminated

    def observe(self, state: GridState) -> dict[str, Tensor]:
        """The nine cells, and what goes with them."""
        padded = torch.nn.functional.pad(state.grids, (1, 1, 1, 1)).flatten(1)
        across = torch.arange(PATCH, device=padded.device)
        corners = state.cells // SIDE * (SIDE + 2) + state.cells % SIDE
        index = (across[:, None] * (SIDE + 2) + across).flatten() + corners[:, None]
        here, remaining = centre_of(state.cells), (state.budgets - state.taken).clamp(min=0) / MOST
        cue = half_plane(here, centre_of(state.before), state.cues)
        return {
            "what": padded.gather(1, index).unflatten(1, (1, PATCH, PATCH)),
            "where": torch.cat((here, cue, remaining[:, None]), -1),
        }


class SingleFoveatingGridEnv(SingleEnv):
    """One copy of `FoveatingGridEnv`."""

    lockstep = FoveatingGridEnv


def believe(
    logs: Float[Tensor, "batch 144"],
    what: Float[Tensor, "batch 1 3 3"],
    where: Float[Tensor, "batch 6"],
    flip: float,
) -> Float[Tensor, "batch 144"]:
    """Bayes' rule for one glimpse: log-posterior of the target's cell, normalised.

    p(c | glimpse) ∝ p(c) · [the nine cells show c's target, or none and c is not among them] · p(cue | c), where a cue
    is right with probability 1 - flip. Texture is drawn alike in every cell, so its brightness cancels.

    Args:
        logs: log-probability of each cell before the glimpse; -log 144 everywhere before the first.
        what: the cells seen, as observed.
        where: as observed: place, half-plane of the cue, remaining share.
        flip: probability that a cue is the wrong one.
    """
    everywhere = torch.arange(SIDE * SIDE, device=logs.device)
    here, normal = where[:, :2], where[:, 2:4]
    beyond = (here * normal).sum(-1, keepdim=True) - where[:, 4:5]  # of the line, on the side the cue speaks for
    # the place before is that of now mirrored in the line; back on cells the comparison is exact, ties included
    cells, before = cell_at(here)[:, None], cell_at(here - 2 * beyond * normal)[:, None]
    rows, columns = everywhere // SIDE - cells // SIDE, everywhere % SIDE - cells % SIDE
    inside = (rows.abs() <= 1) & (columns.abs() <= 1)
    place = ((rows + 1) * PATCH + columns + 1).clamp(0, PATCH * PATCH - 1)
    shows = inside & (what.flatten(1).gather(1, place) > THRESHOLD)
    found = shows.any(-1, keepdim=True)
    logs = logs.masked_fill(torch.where(found, ~shows, inside), -math.inf)
    agrees = nearer(everywhere, cells, before) == (beyond > 0)
    cued = torch.where(agrees, 1 - flip, flip).log()
    return torch.where(cells == before, logs, logs + cued).log_softmax(-1)


@dataclass(frozen=True)
class CellGlance:
    """An action made of a cell, which is drawn, and class scores, which are not: [..., 2 + classes]."""

    cells: Categorical
    scores: Float[Tensor, "*batch classes"]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch action"]:
        """Draw a cell and look at its centre; the scores stand behind."""
        return torch.cat((centre_of(self.cells.sample(keys)), self.scores), -1)

    def mode(self) -> Float[Tensor, "*batch action"]:
        """The most likely cell, and the scores."""
        return torch.cat((centre_of(self.cells.mode()), self.scores), -1)

    def log_prob(self, actions: Float[Tensor, "*batch action"]) -> Float[Tensor, "*batch"]:
        """Log-probability of the cell."""
        return self.cells.log_prob(cell_at(actions[..., :2]))


class BeliefPolicy(Policy):
    """Knows the exact posterior over cells, guesses its most probable quadrant, and looks by a rule.

    Scores are the log-probabilities of the quadrants.

    Args:
        rule: "sampled": at a cell drawn from the posterior; "greedy": where the nine cells seen hold most of it.
        tiling: look at these cells one after the other instead, blindly; the first is that of the second glimpse.
        flip: that of the environment.
    """

    def __init__(
        self, rule: Literal["sampled", "greedy"] = "sampled", tiling: tuple[int, ...] | None = None, flip: float = 0.2
    ) -> None:
        super().__init__()
        self.rule, self.tiling, self.flip = rule, tiling, flip

    def forward(
        self, observations: dict[str, Tensor], state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Update the belief glimpse by glimpse; decide."""
        beliefs, times = [], []
        for step in range(starts.shape[1]):
            start = starts[:, step]
            if state is None:
                state = {"logs": start.new_zeros((len(start), SIDE * SIDE), dtype=torch.float32), "time": start.long()}
            logs = state["logs"].masked_fill(start[:, None], -math.log(SIDE * SIDE))
            logs = believe(logs, observations["what"][:, step], observations["where"][:, step], self.flip)
            time = torch.where(start, 0, state["time"] + 1)
            state = {"logs": logs, "time": time}
            beliefs.append(logs)
            times.append(time)
        belief = torch.stack(beliefs, 1)
        everywhere = torch.arange(SIDE * SIDE, device=belief.device)
        quadrants = torch.nn.functional.one_hot(quadrant_of(everywhere), len(CLASSES)).float()
        scores = (belief.exp() @ quadrants).clamp(min=1e-30).log()
        return Decisions(CellGlance(Categorical(self._next(belief, torch.stack(times, 1))), scores)), state

    def _next(self, belief: Tensor, times: Tensor) -> Tensor:
        """Logits of the cell to look at next; those of a rule that draws nothing are 0 at one cell, -inf elsewhere."""
        if self.tiling is not None:
            order = torch.tensor(self.tiling, device=belief.device)
            chosen = order[times.clamp(max=len(order) - 1)]
        elif self.rule == "greedy":
            mass = belief.exp().unflatten(-1, (SIDE, SIDE)).flatten(0, 1)[:, None]
            seen = torch.nn.functional.avg_pool2d(mass, PATCH, 1, PATCH // 2)
            chosen = seen.flatten(1).argmax(-1).view_as(times)
        else:
            return belief
        return torch.full_like(belief, -math.inf).scatter(-1, chosen[..., None], 0.0)
