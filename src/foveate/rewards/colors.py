"""Rewards of colouring: how colourful a picture is. They look at the prediction alone; the targets are not used."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.colors import to_lab
from foveate.types import RewardOutput

VIVID = 10.0  # a pixel is vivid if a² + b² is above this
HUES = 7  # bins of the hue


def vivid_and_varied(predictions: Float[Tensor, "batch 3 height width"], targets: Any = None) -> RewardOutput:
    """Share of vivid pixels times the diversity of their hues, in [0, 1]: discourages grey, rewards variety.

    Pinto et al. 2023, "Tuning computer vision models with task rewards", section 4.3: in Lab, a pixel is vivid if
    a² + b² > 10; the hues atan2(b, a) of the vivid pixels fall into 7 bins, of which the entropy is taken, here divided
    by log 7. `parts` "vividness" and "diversity" multiply to the total.

    The score of a data set, as in the paper, is the mean over its pictures. It does not say whether a colour is right:
    a rainbow on any picture scores high.

    Args:
        predictions: RGB in [0, 1].
        targets: not used.
    """
    _, green_red, blue_yellow = to_lab(predictions).unbind(1)
    vivid = (green_red.square() + blue_yellow.square() > VIVID).flatten(1)
    angle = torch.atan2(blue_yellow, green_red).flatten(1)
    place = ((angle / (2 * math.pi) + 0.5) * HUES).long().clamp(0, HUES - 1)
    counts = torch.zeros(len(predictions), HUES, device=predictions.device).scatter_add_(1, place, vivid.float())
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    diversity = -torch.xlogy(shares, shares).sum(1) / math.log(HUES)
    vividness = vivid.float().mean(1)
    return RewardOutput(vividness * diversity, {"vividness": vividness, "diversity": diversity})


def colorfulness(predictions: Float[Tensor, "batch 3 height width"], targets: Any = None) -> RewardOutput:
    """Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images", the metric M3, for pixels of 0 to 255.

    With rg = R - G and yb = (R + G) / 2 - B: the length of (σ_rg, σ_yb) plus 0.3 times that of (μ_rg, μ_yb). About 0
    for grey, 33 moderately, 59 quite and 109 extremely colourful. `parts` "spread" and "shift" sum to the total.

    The score of a data set is the mean over its pictures, as papers on colouring report it, where the value nearest to
    that of the true pictures is the best, not the largest: noise is colourful, too.

    Args:
        predictions: RGB in [0, 1].
        targets: not used.
    """
    red, green, blue = (255 * predictions).flatten(2).unbind(1)
    opponents = torch.stack((red - green, (red + green) / 2 - blue), 1)
    spread = opponents.std(2, correction=0).norm(dim=1)
    shift = 0.3 * opponents.mean(2).norm(dim=1)
    return RewardOutput(spread + shift, {"spread": spread, "shift": shift})
