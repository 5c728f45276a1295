"""What decides on the next stroke: the canvas, where the pen is, how many strokes are left, and what to paint."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.distributions import Categorical
from foveate.types import Decisions, Policy, State


class Painter(Policy):
    """Actor and critic over one view of `foveate/Painting-v0`; it remembers nothing, since the canvas does.

    Two striding convolutions of the canvas, flattened beside the map of the pen, the strokes left and the kind; two
    layers; a logit for each pen and cell, and the value.

    Args:
        side: of the canvas in pixels.
        grid: cells a side.
        pens: how many there are, with the lifted one.
        kinds: of pictures.
        width: of the first convolution; the second has twice as many.
        hidden: of the two layers.
        copies: whether it sees a picture to copy.
    """

    def __init__(
        self, side: int, grid: int, pens: int, kinds: int, width: int = 16, hidden: int = 256, copies: bool = False
    ) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(2 if copies else 1, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        seen = 2 * width * (side // 4) ** 2
        self.think = nn.Sequential(
            nn.Linear(seen + grid * grid + 1 + kinds, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.choose, self.value = nn.Linear(hidden, pens * grid * grid), nn.Linear(hidden, 1)
        nn.init.normal_(self.choose.weight, std=0.01)

    def forward(
        self, observations: dict[str, Tensor], state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Logits of the strokes and values; there is no state."""
        flat = {name: leaf.flatten(0, 1) for name, leaf in observations.items()}
        canvas = torch.cat([flat[name] for name in ("canvas", "target") if name in flat], 1)
        beside = [flat["pen"].flatten(1), flat["left"], flat["kind"]]
        thought = self.think(torch.cat([self.see(canvas), *beside], 1))
        values = self.value(thought).squeeze(-1).unflatten(0, starts.shape)
        return Decisions(Categorical(self.choose(thought).unflatten(0, starts.shape)), values), None


class Scribbler(Policy):
    """Every stroke as likely as any other: the control that knows nothing."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.actions = actions

    def forward(
        self, observations: dict[str, Tensor], state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Logits of 0."""
        canvas: Float[Tensor, "batch time 1 side side"] = observations["canvas"]
        return Decisions(Categorical(canvas.new_zeros(*starts.shape, self.actions))), None
