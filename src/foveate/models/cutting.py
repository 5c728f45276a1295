"""Cutting a moving object out of its frames: one network places a pair of boxes, another makes the mask in them.

The object box lies around the object; the context box has the same centre and is some factor larger. A frame is not
only its colours: every pixel also has what `foveate.models.appearance` says of it after the first frame's mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.geometry import enlarged
from foveate.models.regions import Make, Planes, cut
from foveate.types import InputError


class Executor(nn.Module):
    """The cutting-execution network: from what the context box holds, and where in it the object box lies, the mask.

    A small U-Net: two halvings, group norm, skips.

    Args:
        planes: channels of what is cut out.
        factors: of the context boxes that there are to choose from.
        side: pixels of a side of the cut; a multiple of 4.
        width: features at full size.

    Raises:
        InputError: a side that cannot be halved twice, a width that is no multiple of 4.
    """

    def __init__(self, planes: int, factors: tuple[float, ...], side: int = 32, width: int = 12) -> None:
        super().__init__()
        if side < 8 or side % 4:
            raise InputError(f"crop: found {side}, expected a multiple of 4 from 8 on")
        if width < 4 or width % 4:
            raise InputError(f"width: found {width}, expected a multiple of 4")
        self.side = side
        self.factors: Tensor
        self.register_buffer("factors", torch.tensor(factors), persistent=False)
        self.first = _layers(planes + 1, width)
        self.second, self.third = _layers(width, 2 * width), _layers(2 * width, 4 * width)
        self.fourth, self.fifth = _layers(6 * width, 2 * width), _layers(3 * width, width)
        self.score = nn.Conv2d(width, 1, 1)

    def forward(
        self, seen: Float[Tensor, "batch planes s s"], contexts: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch s s"]:
        """Scores (logits) of the pixels; above 0 is the object."""
        fine = self.first(torch.cat((seen, self.marked(contexts)[:, None]), 1))
        middle = self.second(F.max_pool2d(fine, 2))
        coarse = F.interpolate(self.third(F.max_pool2d(middle, 2)), scale_factor=2.0)
        middle = F.interpolate(self.fourth(torch.cat((middle, coarse), 1)), scale_factor=2.0)
        return self.score(self.fifth(torch.cat((fine, middle), 1)))[:, 0]

    def maker(self, planes: Planes) -> Make:
        """From (frames, boxes, contexts) to how likely each pixel of the context boxes is of the object."""

        @torch.no_grad()
        def make(frames: Tensor, boxes: Tensor, contexts: Tensor) -> Tensor:
            seen = cut(planes, frames, enlarged(boxes, self.factors[contexts]), self.side)
            return self(seen, contexts).sigmoid()

        return make

    def marked(self, contexts: Int[Tensor, " batch"]) -> Float[Tensor, "batch s s"]:
        """1 where the object box lies in the context box, which has the same centre."""
        place = ((torch.arange(self.side, device=contexts.device) + 0.5) / self.side * 2 - 1).abs()
        share = 1 / self.factors[contexts]
        inside = (place <= share[:, None]).float()
        return inside[:, :, None] * inside[:, None]


def _layers(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(4, after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.GroupNorm(4, after),
        nn.ReLU(),
    )


def mask_loss(scores: Float[Tensor, "batch s s"], truth: Bool[Tensor, "batch s s"]) -> Float[Tensor, ""]:
    """Cross-entropy of the pixels plus 1 - Dice of the soft mask; to be minimised."""
    wanted = truth.float()
    entropy = F.binary_cross_entropy_with_logits(scores, wanted)
    shares = scores.sigmoid()
    both, sizes = (shares * wanted).sum((1, 2)), shares.sum((1, 2)) + wanted.sum((1, 2))
    return entropy + (1 - (2 * both + 1) / (sizes + 1)).mean()


def recolored(
    seen: Float[Tensor, "batch planes s s"], keys: Int[Tensor, " batch"]
) -> Float[Tensor, "batch planes s s"]:
    """Contrast and brightness of the first three planes changed by up to a fifth: the colours; the others stay."""
    contrast, brightness = (0.4 * noise.uniform(noise.fold(keys, "colors"), 2, 3, 1, 1) - 0.2).unbind(1)
    colors = ((seen[:, :3] - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)
    return torch.cat((colors, seen[:, 3:]), 1)


class Placer(nn.Module):
    """The cutting-policy network: from a look at the boxes and the last actions, the value of each action.

    Args:
        planes: channels of the view.
        patch: pixels of its side.
        past: actions that are remembered.
        actions: how many there are.
        contexts: sizes of the context box.
        hidden: width of the layer that joins all.
        head: from that layer to what is asked for, e.g. `foveate.learn.q_learning.Dueling`.
    """

    def __init__(
        self, planes: int, patch: int, past: int, actions: int, contexts: int, hidden: int, head: nn.Module
    ) -> None:
        super().__init__()
        side = math.ceil(math.ceil(patch / 2) / 2)
        self.see = nn.Sequential(
            nn.Conv2d(planes, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        known = 32 * side * side + past * actions + contexts + 4
        self.join = nn.Sequential(nn.Linear(known, hidden), nn.ReLU())
        self.head = head

    def forward(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch outputs"]:
        """What the environment shows → numbers."""
        view = self.see(seen["view"] * 2 - 1)
        return self.head(self.join(torch.cat((view, seen["history"].flatten(1), seen["context"], seen["place"]), 1)))


class Cutting(nn.Module):
    """Both networks of an agent."""

    def __init__(self, executor: Executor, placer: Placer) -> None:
        super().__init__()
        self.executor, self.placer = executor, placer
