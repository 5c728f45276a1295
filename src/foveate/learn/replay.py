"""The last steps of lockstep copies, from which transitions of one or several steps are drawn.

What stands in it is what an environment can look at again: coordinates, histories, image indices, never pixels. A step
of all copies is a row, in the order in which they were taken, so that the state after a step is the row after it and
nothing is stored twice. With Gymnasium's next-step autoreset the row after the end of an episode holds its last state;
the step taken there only begins the next episode, and is no transition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.types import InputError, Tree, map_tree


@dataclass(frozen=True)
class Transitions:
    """Drawn transitions of up to n steps: a tree of [batch, ...].

    Attributes:
        states: before the action.
        actions: the first action.
        returns: Σ γ^k r_k of the steps taken, n or fewer if the episode ended.
        discounts: of the value of what came after them: γ to their number, 0 if the task itself ended there.
        next_states: after them; where a limit cut the episode, its last state.
    """

    states: Tree
    actions: Int[Tensor, " batch"]
    returns: Float[Tensor, " batch"]
    discounts: Float[Tensor, " batch"]
    next_states: Tree


class Replay(nn.Module):
    """A ring of rows; a module, so that a run tracks it and resumes it exactly, each process its own.

    Args:
        example: a tree of [copies, ...], what a state to be stored looks like.
        rows: steps of all copies that are kept: rows · copies transitions.
        choices: how many actions there are; beyond 256 a number takes two bytes, beyond 32,768 four.

    Raises:
        InputError: fewer than 2 rows.
    """

    of_process = True
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    taken: Tensor
    written: Tensor

    def __init__(self, example: Tree, rows: int, choices: int = 256) -> None:
        super().__init__()
        if rows < 2:
            raise InputError(f"rows: found {rows}, expected at least 2: a step and what came after it")
        self.rows, self._names, self._empty = rows, list[str](), map_tree(lambda leaf: leaf[:0], example)
        copies, device = 0, torch.device("cpu")

        def room(leaf: Tensor) -> Tensor:
            nonlocal copies, device
            copies, device = len(leaf), leaf.device
            self._names.append(f"state_{len(self._names)}")
            self.register_buffer(self._names[-1], leaf.new_zeros(rows, *leaf.shape))
            return leaf

        map_tree(room, example)
        for name, kind in (
            ("actions", torch.uint8 if choices <= 256 else torch.int16 if choices <= 2**15 else torch.int32),
            ("rewards", torch.float32),
            ("terminated", torch.bool),
            ("truncated", torch.bool),
            ("taken", torch.bool),
        ):
            self.register_buffer(name, torch.zeros(rows, copies, dtype=kind, device=device))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Steps in it that were taken."""
        return int(self.taken.sum())

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @torch.no_grad()
    def write(
        self,
        states: Tree,
        actions: Int[Tensor, " copies"],
        rewards: Float[Tensor, " copies"],
        terminated: Bool[Tensor, " copies"],
        truncated: Bool[Tensor, " copies"],
        taken: Bool[Tensor, " copies"],
    ) -> None:
        """Add a step of all copies; the oldest is overwritten.

        Args:
            states: what the actions were decided on.
            actions: numbers below `choices`.
            rewards: that followed.
            terminated: true where the task ended.
            truncated: true where a limit cut the episode.
            taken: false where a copy only began its next episode, or stood still.
        """
        row, names = int(self.written) % self.rows, iter(self._names)

        def put(leaf: Tensor) -> Tensor:
            getattr(self, next(names))[row] = leaf
            return leaf

        map_tree(put, states)
        self.actions[row], self.rewards[row], self.taken[row] = actions.to(self.actions.dtype), rewards, taken
        self.terminated[row], self.truncated[row] = terminated & taken, truncated & taken
        self.written += 1

    @torch.no_grad()
    def draw(self, key: Int[Tensor, ""], batch: int, steps: int = 1, discount: float = 0.99) -> Transitions:
        """Draw transitions evenly, with replacement, among the steps that were taken and have `steps` rows after them.

        Args:
            key: of the draw.
            batch: how many.
            steps: n, over which rewards are summed; fewer where an episode ends.
            discount: γ.

        Raises:
            InputError: nothing can be drawn yet.
        """
        first = max(0, int(self.written) - self.rows)
        last = int(self.written) - steps  # rows from `first` up to this one have what comes after them
        if last <= first:
            raise InputError(f"replay: found {int(self.written)} rows, expected more than {steps}; act first")
        rows = torch.arange(first, last, device=self.actions.device) % self.rows
        counts = self.taken[rows].sum(1).cumsum(0)
        if not int(counts[-1]):
            raise InputError("replay: found no step that was taken; act first")
        rank = noise.integers(key.to(rows.device), counts[-1], batch)
        place = torch.searchsorted(counts, rank, right=True)
        rank = rank - torch.where(place > 0, counts[place - 1], 0)
        row = rows[place]
        copy = (self.taken[row].cumsum(1) > rank[:, None]).int().argmax(1)
        window = (row[:, None] + torch.arange(steps, device=row.device)) % self.rows
        ends = (self.terminated | self.truncated)[window, copy[:, None]]
        going = (ends.cumsum(1) - ends.long()) == 0  # the step at which it ended counts, those after it do not
        powers = discount ** torch.arange(steps + 1, dtype=torch.float32, device=row.device)
        count = going.sum(1)
        over = (self.terminated[window, copy[:, None]] & going).any(1)
        return Transitions(
            self._states(row, copy),
            self.actions[row, copy].long(),
            (self.rewards[window, copy[:, None]] * going * powers[:-1]).sum(1),
            powers[count] * ~over,
            self._states((row + count) % self.rows, copy),
        )

    def _states(self, row: Tensor, copy: Tensor) -> Any:
        names: Iterator[str] = iter(self._names)
        return map_tree(lambda leaf: getattr(self, next(names))[row, copy], self._empty)
