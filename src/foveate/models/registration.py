"""Networks that compare two pictures: an actor-critic that remembers, and a regressor of the same eyes.

    pictures → the same convolutions on both → how alike each place of the one is to the places around it in the other
    → convolutions → (agent) a convolutional LSTM, and heads for policy and value; (regressor) a transform

Where the pictures are alike is a correlation of normalised features of every place with every other, as in Teed and
Deng 2020, "RAFT", laid out by how far the two are apart, as in Dosovitskiy et al. 2015, "FlowNet". The memory is that
of Shi et al. 2015, "Convolutional LSTM network".
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.distributions import Categorical
from foveate.types import Decisions, InputError, Policy, State, map_tree

Core = Literal["convlstm", "none"]
STRIDE = 8  # of the features that are compared, in pixels
REACH = 5  # places around it with which a place is compared, either way: 40 pixels


class ConvLSTMCell(nn.Module):
    """An LSTM whose state is a map and whose products are 3×3 convolutions; without peepholes."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)
        self.hidden = hidden
        with torch.no_grad():
            assert self.gates.bias is not None
            self.gates.bias[hidden : 2 * hidden] = 1.0  # remembers to begin with

    def forward(
        self, seen: Float[Tensor, "batch inputs rows columns"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """One step: hidden state and cell, [batch, hidden, rows, columns] each."""
        if state is None:
            nothing = seen.new_zeros(len(seen), self.hidden, *seen.shape[2:])
            state = nothing, nothing
        into, keep, out, fresh = self.gates(torch.cat((seen, state[0]), 1)).chunk(4, 1)
        cell = keep.sigmoid() * state[1] + into.sigmoid() * fresh.tanh()
        return out.sigmoid() * cell.tanh(), cell


class PairEyes(nn.Module):
    """Two pictures as one map of features, a quarter as fine as what is compared.

    Args:
        side: of the pictures in pixels.
        width: of the features.

    Raises:
        InputError: a side that is no multiple of 16, a width that is none of 4.
    """

    def __init__(self, side: int, width: int = 32) -> None:
        super().__init__()
        if side % (2 * STRIDE):
            raise InputError(f"image_size: found {side}, expected a multiple of {2 * STRIDE}, e.g. 64 or 96")
        if width % 4:
            raise InputError(f"width: found {width}, expected a multiple of 4")
        self.see = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(24, width, 3, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.cells = side // STRIDE
        offsets, index = _offsets(self.cells)
        self.index: Tensor
        self.register_buffer("index", index, persistent=False)
        self.join = nn.Sequential(
            nn.Conv2d(offsets, 2 * width, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
        )
        self.shape = 2 * width, self.cells // 2, self.cells // 2

    def forward(self, fixed: Float[Tensor, "batch 3 side side"], moving: Float[Tensor, "batch 3 side side"]) -> Tensor:
        """[batch, *shape]."""
        both = torch.cat((fixed, moving))
        level, spread = both.mean((1, 2, 3), keepdim=True), both.std((1, 2, 3), keepdim=True)
        seen = self.see((both - level) / (spread + 0.05)).flatten(2)
        seen = F.normalize(seen - seen.mean(2, keepdim=True), dim=1)
        one, other = seen.chunk(2)
        alike = (one.mT @ other).flatten(1)  # [batch, place of the fixed · place of the moving]
        alike = F.pad(alike, (0, 1))[:, self.index]  # the last is 0, where there is no such place
        return self.join(alike.unflatten(2, (self.cells, self.cells)))


def _offsets(cells: int) -> tuple[int, Tensor]:
    """How many offsets are compared, and for each of them and each place the number of the pair, [offsets, places]."""
    reach = min(REACH, cells - 1)
    steps = torch.arange(-reach, reach + 1)
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    row, column = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    rows, columns = row.flatten() + down.flatten()[:, None], column.flatten() + across.flatten()[:, None]
    inside = (rows >= 0) & (rows < cells) & (columns >= 0) & (columns < cells)
    places = cells * cells
    number = torch.arange(places) * places + rows * cells + columns
    return len(down.flatten()), torch.where(inside, number, places * places)


class RegistrationPolicy(Policy):
    """Which way to move next, and how much reward is to come.

    Args:
        side: of the pictures in pixels.
        actions: how many moves.
        core: "convlstm" remembers, "none" sees the present only.
        width: of the features.
    """

    def __init__(self, side: int, actions: int, core: Core = "convlstm", width: int = 32) -> None:
        super().__init__()
        self.eyes = PairEyes(side, width)
        channels, rows, columns = self.eyes.shape
        self.core = ConvLSTMCell(channels, width) if core == "convlstm" else None
        kept = channels + (width if self.core else 0)  # the present past the memory too: it is learned from sooner
        self.think = nn.Sequential(nn.Flatten(), nn.Linear(kept * rows * columns, 128), nn.ReLU())
        self.choose, self.value = nn.Linear(128, actions), nn.Linear(128, 1)
        self.left = nn.Linear(128, 4)
        nn.init.normal_(self.choose.weight, std=0.01)

    def forward(
        self, observations: dict[str, Tensor], state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Take in `fixed` and `moving`, [batch, time, 3, side, side]; the state is that of the ConvLSTM.

        `extras["left"]` is how much it believes is left of each of the four numbers, in tens of steps: an expert
        teaches that beside the moves.
        """
        seen = self.eyes(observations["fixed"].flatten(0, 1), observations["moving"].flatten(0, 1))
        if self.core is None:
            kept = seen
        else:
            hidden = []
            for now, start in zip(seen.unflatten(0, starts.shape).unbind(1), starts.unbind(1), strict=True):
                if state is not None:
                    state = map_tree(lambda memory: memory * ~start[:, None, None, None], state)  # noqa: B023
                state = self.core(now, state)
                hidden.append(state[0])
            kept = torch.cat((torch.stack(hidden, 1).flatten(0, 1), seen), 1)
        thought = self.think(kept)
        values = self.value(thought).squeeze(-1).unflatten(0, starts.shape)
        extras = {"left": self.left(thought).unflatten(0, starts.shape)}
        return Decisions(Categorical(self.choose(thought).unflatten(0, starts.shape)), values, extras=extras), state


class Recall(nn.Module):
    """What a policy remembers of its walks from one update to the next: a part of a run, so that it is resumed exactly.

    Args:
        policy: whose memory.
        copies: walks side by side.
    """

    of_process = True  # a run saves each process's own
    hidden: Tensor
    cell: Tensor
    starts: Tensor

    def __init__(self, policy: RegistrationPolicy, copies: int) -> None:
        super().__init__()
        cells = policy.eyes.cells // 2
        shape = (copies, policy.core.hidden, cells, cells) if policy.core else (0,)
        for name in ("hidden", "cell"):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("starts", torch.ones(copies, dtype=torch.bool))

    @property
    def state(self) -> tuple[Tensor, Tensor] | None:
        """As the policy takes it."""
        return (self.hidden, self.cell) if self.hidden.numel() else None

    def keep(self, state: State, starts: Bool[Tensor, " copies"]) -> None:
        """Take in what was remembered after an update's steps, and where a walk begins next."""
        self.starts.copy_(starts)
        if state is not None:
            self.hidden.copy_(state[0])
            self.cell.copy_(state[1])


class Regressor(nn.Module):
    """The transform in one look: the same eyes, a convolution where the agent has its memory, and a layer.

    Args:
        side: of the pictures in pixels.
        width: of the features.
        units: of its four outputs, by which what the layer says is multiplied.
    """

    units: Tensor

    def __init__(self, side: int, width: int, units: tuple[float, float, float, float]) -> None:
        super().__init__()
        self.eyes = PairEyes(side, width)
        channels, rows, columns = self.eyes.shape
        self.say = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * rows * columns, 128),
            nn.ReLU(),
            nn.Linear(128, 4),
        )
        self.register_buffer("units", torch.tensor(units), persistent=False)

    def forward(
        self, fixed: Float[Tensor, "batch 3 side side"], moving: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch 4"]:
        """Parameters that bring the moving picture to the fixed one."""
        return self.say(self.eyes(fixed, moving)) * self.units
