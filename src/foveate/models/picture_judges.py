"""What scores a picture: a few small networks side by side, learned from comparisons (`foveate.learn.preferences`)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.types import InputError

COLOURS = 8  # mixtures of red, green and blue of which mean and spread are taken


class PictureJudges(nn.Module):
    """An ensemble of small convolutional networks: RGB → a score from each member.

    A member sees means and spreads over the picture, of mixtures of the colours and of features at 1/2, 1/4 and 1/8 of
    its size: a few hundred comparisons teach that, and pictures of any size have it. There is no normalisation layer,
    which would take away how strong colours are. All members are one pass of grouped convolutions.

    Args:
        members: how many.
        width: features of a member at half size; twice as many at each further halving.

    Attributes:
        middle, reach: of the features, set by `begin`: what differs within a pair is then of size 1 at the start.
        centre, scale: of each member's scores, set by `standardise`: then rewards are about 0, and answers to one
            input differ by about 1, whatever the scale of a member.
    """

    middle: Tensor
    reach: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, members: int = 5, width: int = 8) -> None:
        super().__init__()
        if members < 1 or width < 1:
            raise InputError(f"members, width: found {members} and {width}, expected at least 1 of each")
        self.members = members
        widths = (3, width, 2 * width, 4 * width)
        self.colours = nn.Conv2d(3 * members, COLOURS * members, 1, groups=members)
        self.layers = nn.ModuleList(
            nn.Conv2d(low * members, high * members, 3, padding=1, groups=members)
            for low, high in itertools.pairwise(widths)
        )
        features = 2 * (COLOURS + sum(widths[1:]))
        self.read = nn.Conv1d(features * members, 32 * members, 1, groups=members)
        self.judge = nn.Conv1d(32 * members, members, 1, groups=members)
        self.register_buffer("middle", torch.zeros(features * members, 1))
        self.register_buffer("reach", torch.ones(features * members, 1))
        self.register_buffer("centre", torch.zeros(members))
        self.register_buffer("scale", torch.ones(members))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "members batch"]:
        """Scores of images in [0, 1], as each member scales them: differences are log-odds of being preferred."""
        return self.weigh(self.features(images))

    def weigh(self, features: Float[Tensor, "batch numbers 1"]) -> Float[Tensor, "members batch"]:
        """Scores from what `features` gave."""
        hidden = self.read((features - self.middle) / self.reach)
        return self.judge(F.gelu(hidden)).squeeze(2).T

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch numbers 1"]:
        """What the members see of images, one member's numbers after the other's."""
        state = (images - 0.5).repeat(1, self.members, 1, 1)
        seen = [self._spread(self.colours(state))]
        for layer in self.layers:
            state = F.gelu(layer(F.avg_pool2d(state, 2, ceil_mode=True)))
            seen.append(self._spread(state))
        return torch.cat(seen, 2).flatten(1)[:, :, None]

    def _spread(self, state: Tensor) -> Tensor:
        """Means and standard deviations over the picture, [batch, members, features]."""
        grouped = state.flatten(2).unflatten(1, (self.members, -1))
        variance, mean = torch.var_mean(grouped, 3, correction=0)
        return torch.cat((mean, (variance + 1e-6).sqrt()), 2)

    @torch.no_grad()
    def begin(self, left: Float[Tensor, "pairs 3 height width"], right: Float[Tensor, "pairs 3 height width"]) -> None:
        """Before the first update: centre the features, and divide each by how much it differs within pairs.

        Answers to one input differ by far less than inputs do, and only these differences are learned from.
        """
        first, second = self.features(left), self.features(right)
        self.middle.copy_((first + second).mean(0) / 2)
        self.reach.copy_((first - second).square().mean(0).sqrt().clamp(min=1e-4))

    @torch.no_grad()
    def standardise(
        self, left: Float[Tensor, "pairs 3 height width"], right: Float[Tensor, "pairs 3 height width"]
    ) -> None:
        """Let each member's rewards of these have mean 0, and answers to one input a standard deviation of 1.

        What sets inputs apart from each other was never compared, so it is not what scores are measured by.
        """
        first, second = (torch.cat([self(some) for some in side.split(250)], 1) for side in (left, right))
        self.centre.copy_((first + second).mean(1) / 2)
        self.scale.copy_((first - second).square().mean(1).div(2).sqrt().clamp(min=1e-6))

    def rewards(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "members batch"]:
        """Scores of images, standardised."""
        return (self(images) - self.centre[:, None]) / self.scale[:, None]


def colour_statistics(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 6"]:
    """Means and standard deviations of red, green and blue: what a linear model may see."""
    flat = images.flatten(2)
    return torch.cat((flat.mean(2), flat.std(2, correction=0)), 1)
