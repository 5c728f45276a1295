"""Two that learn from each other: what makes images, and what tells them from real ones. Both are told a kind.

The discriminator is a projection discriminator (Miyato and Koyama 2018, "cGANs with projection discriminator", arXiv
1802.05637); the generator is the plain one of a GAN (Radford et al. 2016, "Unsupervised representation learning with
deep convolutional generative adversarial networks").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.types import InputError

LATENT = 64  # numbers of noise that an image is made from
AT_ONCE = 100  # images drawn together
REMEMBERED = 0.98  # of the scores' mean and deviation, at each update


class Discriminator(nn.Module):
    """How real an image looks as one of its kind: a score, higher is more real, whose unit is the network's own.

    As a reward it has a unit: the deviation of the scores it gave of late (`reward`).

    Args:
        side: of the images in pixels.
        kinds: of images.
        width: of the first convolution; the second has twice as many.
        hidden: of the last layer.

    Attributes:
        mean: of the scores it gave of late to real and made images.
        deviation: the same.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, side: int, kinds: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        if side % 4:
            raise InputError(f"image_size: found {side}, expected a multiple of 4, e.g. 16 or 28")
        self.see = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, hidden),
            nn.LeakyReLU(0.2),
        )
        self.real, self.kind = nn.Linear(hidden, 1), nn.Embedding(kinds, hidden)
        nn.init.normal_(self.kind.weight, std=hidden**-0.5)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(
        self, images: Float[Tensor, "batch 1 side side"], kinds: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Scores of images in [0, 1]."""
        seen = self.see(images)
        return self.real(seen).squeeze(1) + (self.kind(kinds) * seen).sum(1)

    def every(self, images: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch kinds"]:
        """Scores of images as each kind."""
        seen = self.see(images)
        return self.real(seen) + seen @ self.kind.weight.mT

    @torch.no_grad()
    def reward(
        self, images: Float[Tensor, "batch 1 side side"], kinds: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Scores in deviations of those it gave of late, so that a learning rate goes with any discriminator."""
        return (self(images, kinds) - self.mean) / self.deviation

    @torch.no_grad()
    def rewards(self, images: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch kinds"]:
        """The same as each kind."""
        return (self.every(images) - self.mean) / self.deviation

    def notice(self, mean: Float[Tensor, ""], deviation: Float[Tensor, ""]) -> None:
        """Take in those of the scores of an update."""
        self.mean.lerp_(mean, 1 - REMEMBERED)
        self.deviation.lerp_(deviation.clamp(min=1e-3), 1 - REMEMBERED)


class ImageGenerator(nn.Module):
    """An image from noise and a kind, whose every pixel can be differentiated.

    Args:
        side: of the images in pixels, a multiple of 4.
        kinds: of images.
        width: of the features at a quarter of the side; half as many at half of it, and so on.
    """

    def __init__(self, side: int, kinds: int, width: int = 128) -> None:
        super().__init__()
        self.kinds, self.shape = kinds, (width, side // 4, side // 4)
        self.begin = nn.Linear(LATENT + kinds, width * (side // 4) ** 2)
        self.draw = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width // 2, width // 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 4, 1, 3, padding=1),
        )

    def forward(self, kinds: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 side side"]:
        """Images in [0, 1] of these kinds, from the noise of these keys."""
        given = torch.cat((noise.normal(keys, LATENT), F.one_hot(kinds, self.kinds).float()), 1)
        return self.draw(self.begin(given).unflatten(1, self.shape)).sigmoid()

    @torch.no_grad()
    def drawn(self, kinds: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 side side"]:
        """Any number of images, without a graph."""
        return torch.cat([self(*some) for some in zip(kinds.split(AT_ONCE), keys.split(AT_ONCE), strict=True)])


class Adversaries(nn.Module):
    """One that makes images and one that judges them, kept together.

    Args:
        generator: a `Painter`, or an `ImageGenerator`.
        discriminator: of its images.
    """

    def __init__(self, generator: nn.Module, discriminator: Discriminator) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
