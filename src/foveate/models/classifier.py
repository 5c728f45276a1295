"""A plain convolutional classifier of whole images: the control that sees everything."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Three convolutions, the first two striding, the highest values of 5×5 regions, two linear layers.

    About 240,000 weights, as many as a `GlimpsePolicy` of default size.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(5),
            nn.Flatten(),
            nn.Linear(64 * 25, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores of images in [0, 1]."""
        return self.layers(images)
