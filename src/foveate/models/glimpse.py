"""The recurrent attention model: what was seen and where, remembered; where to look next, and what it is.

Mnih, Heess, Graves, Kavukcuoglu 2014, "Recurrent models of visual attention", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.distributions import Gaussian, Uniform
from foveate.types import Decisions, Policy, State, map_tree

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Glance:
    """An action made of a location, which is drawn, and class scores, which are not: [..., 2 + classes].

    The log-probability is that of the location alone, as drawn; the environment clamps it into the image.
    """

    location: Gaussian | Uniform
    scores: Float[Tensor, "*batch classes"]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch action"]:
        """Draw a location and put the scores behind it."""
        return torch.cat((self.location.sample(keys), self.scores.detach()), -1)

    def mode(self) -> Float[Tensor, "*batch action"]:
        """The most likely location, and the scores."""
        return torch.cat((self.location.mode(), self.scores.detach()), -1)

    def log_prob(self, actions: Float[Tensor, "*batch action"]) -> Float[Tensor, "*batch"]:
        """Log-density of the location."""
        return self.location.log_prob(actions[..., :2])

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Entropy of the location."""
        return self.location.entropy()

    def kl(self, other: Glance) -> Float[Tensor, "*batch"]:
        """KL between the locations' distributions."""
        return self.location.kl(other.location)  # type: ignore[arg-type]


class GlimpsePolicy(Policy):
    """Glimpse network, core, location head, class head, learned baseline.

    Args:
        what: channels and side of a glimpse, (scales · channels, patch, patch).
        where: numbers that tell where it was taken (2: its location).
        classes: number of classes.
        hidden: width of the core.
        glimpse_network: "mlp" as published, or "cnn".
        core: "rnn", rectified linear as published, or "lstm".
        std: standard deviation of the location, in units in which half the image is 1.
        looking: "learned"; "random" draws locations evenly over the image, "centre" never moves (the controls).
        detach: the hidden vector is detached before the location head, as published: what is remembered serves the
            answer alone. Without it REINFORCE shapes the memory too, which then may also hold where it has looked.
        precision: of the convolutional glimpse network; everything else computes in fp32, and so are all weights.

    The hidden vector is detached before the baseline in any case. `spread` widens the locations while they are learned.
    """

    def __init__(
        self,
        what: tuple[int, int, int],
        where: int,
        classes: int,
        hidden: int = 256,
        glimpse_network: Literal["mlp", "cnn"] = "mlp",
        core: Literal["rnn", "lstm"] = "rnn",
        std: float = 0.1,
        looking: Literal["learned", "random", "centre"] = "learned",
        detach: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.looking, self.spread, self.detach = looking, 1.0, detach
        self.what: nn.Module = _mlp_eye(what) if glimpse_network == "mlp" else ConvolutionalEye(what, precision)
        self.where = nn.Sequential(nn.Linear(where, 128), nn.ReLU())
        self.join = nn.Linear(128 + 128, hidden)
        self.core: nn.Module = _RectifiedCell(hidden, hidden) if core == "rnn" else nn.LSTMCell(hidden, hidden)
        self.classify = nn.Linear(hidden, classes)
        if looking == "learned":
            self.locate = nn.Sequential(nn.Linear(hidden, 128), nn.ReLU(), nn.Linear(128, 2), nn.Tanh())
            self.value = nn.Linear(hidden, 1)
        self.std: Tensor
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(
        self, observations: dict[str, Tensor], state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Take in glimpses `what` [batch, time, channels, patch, patch] and `where` [batch, time, where]; decide."""
        seen = self.what(observations["what"].flatten(0, 1)), self.where(observations["where"].flatten(0, 1))
        glimpses = F.relu(self.join(torch.cat(seen, -1))).unflatten(0, starts.shape)
        hidden = []
        for glimpse, start in zip(glimpses.unbind(1), starts.unbind(1), strict=True):
            if state is not None:
                state = map_tree(lambda memory: memory * ~start[:, None], state)  # noqa: B023
            state = self.core(glimpse, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        memory = torch.stack(hidden, 1)
        scores = self.classify(memory)
        if self.looking == "learned":
            watched = memory.detach() if self.detach else memory
            look: Gaussian | Uniform = Gaussian(self.locate(watched), (self.std * self.spread).expand(*starts.shape, 2))
            return Decisions(Glance(look, scores), self.value(memory.detach()).squeeze(-1)), state
        reach = torch.full((*starts.shape, 2), float(self.looking == "random"), device=scores.device)
        return Decisions(Glance(Uniform(-reach, reach), scores)), state


class _RectifiedCell(nn.Module):
    """h ← relu(W h + U g), the core of the paper's classification experiments."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.see = nn.Linear(inputs, hidden)
        self.keep = nn.Linear(hidden, hidden, bias=False)  # nothing remembered adds nothing

    def forward(self, inputs: Tensor, memory: Tensor | None) -> Tensor:
        seen = self.see(inputs)
        return F.relu(seen if memory is None else self.keep(memory) + seen)


def _mlp_eye(what: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(what[0] * what[1] * what[2], 128), nn.ReLU())


class ConvolutionalEye(nn.Module):
    """Two convolutions and a layer: glimpses [batch, channels, patch, patch] to [batch, 128].

    `normalised` puts group norms behind the convolutions, for pictures of which more is to be told than ink from paper.
    """

    def __init__(self, what: tuple[int, int, int], precision: Precision = "fp32", normalised: bool = False) -> None:
        super().__init__()
        self.precision = precision
        # The first layer strides: at full resolution a few channels cost five times the rest of the network on a CPU.
        side = (what[1] // 2) * (what[2] // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(what[0], 32, 4, stride=2, padding=1),
            *([nn.GroupNorm(8, 32)] if normalised else []),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            *([nn.GroupNorm(8, 32)] if normalised else []),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side, 128),
            nn.ReLU(),
        )

    def forward(self, glimpses: Tensor) -> Tensor:
        """See glimpses."""
        with torch.autocast(glimpses.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.layers(glimpses).float()
