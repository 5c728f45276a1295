"""Colours as people see them: sRGB to CIE Lab under D65 and back, and what fits a screen.

Images are [batch, 3, height, width]; sRGB is in [0, 1], L in [0, 100], a (green to red) and b (blue to yellow) about
-110 to 110. L is a function of the luminance alone: who changes a and b changes colours and keeps the structure.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# of drawings: they tell apart under the common kinds of colour blindness (Okabe and Ito 2008, "Color Universal Design")
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MATRIX = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
CHROMA = 50.0  # of a and b to 1 in a network
ROUNDING = 1e-5  # of linear red, green and blue in fp32
HALVINGS = 16  # of the chroma that is looked for


def to_lab(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """sRGB in [0, 1] to Lab."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).clamp(min=0) ** 2.4, images / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", linear.new_tensor(MATRIX), linear)
    xyz = xyz / linear.new_tensor(WHITE)[:, None, None]
    curved = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = curved.unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def to_rgb(lab: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Lab to sRGB in [0, 1]. A colour that no screen shows keeps L and hue and loses chroma until one does.

    Cutting red, green and blue off at 0 and 1 instead would change the luminance, and with it the structure.
    """
    linear = _linear(lab.movedim(1, -1))
    outside = ~_shown(linear)
    if bool(outside.any()):
        linear[outside] = _linear(_faded(lab.movedim(1, -1)[outside]))
    linear = linear.clamp(0, 1)
    curved = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return curved.movedim(-1, 1)


def light_and_chroma(
    images: Float[Tensor, "batch 3 height width"],
) -> tuple[Float[Tensor, "batch 1 height width"], Float[Tensor, "batch 2 height width"]]:
    """sRGB in [0, 1] as networks take it: L from -1 (black) to 1 (white), a and b divided by `CHROMA`."""
    lab = to_lab(images)
    return lab[:, :1] / 50 - 1, lab[:, 1:] / CHROMA


def coloured(
    light: Float[Tensor, "batch 1 height width"], chroma: Float[Tensor, "batch 2 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """sRGB in [0, 1] of what `light_and_chroma` gives, with the luminance of `light` whatever the chroma (`to_rgb`)."""
    return to_rgb(torch.cat((50 * (light + 1), CHROMA * chroma), 1).float())


def _faded(lab: Float[Tensor, "pixels 3"]) -> Float[Tensor, "pixels 3"]:
    """The same L and hue with the most chroma that was found within the gamut, by halving; none is always within."""
    low, high = torch.zeros_like(lab[:, :1]), torch.ones_like(lab[:, :1])
    light, chroma = lab[:, :1].clamp(0, 100), lab[:, 1:]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        linear = _linear(torch.cat((light, middle * chroma), 1))
        inside = _shown(linear)[:, None]
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.cat((light, low * chroma), 1)


def _shown(linear: Float[Tensor, "*pixels 3"]) -> Bool[Tensor, "*pixels"]:
    """Whether a screen shows the colour; pure colours stand at the rim, where rounding decides."""
    return ((linear > -ROUNDING) & (linear < 1 + ROUNDING)).all(-1)


def _linear(lab: Float[Tensor, "*pixels 3"]) -> Float[Tensor, "*pixels 3"]:
    """Linear red, green and blue; outside of [0, 1] where no screen shows the colour."""
    light, green_red, blue_yellow = lab.unbind(-1)
    y = (light + 16) / 116
    curved = torch.stack((y + green_red / 500, y, y - blue_yellow / 200), -1)
    xyz = torch.where(curved > 0.008856 ** (1 / 3), curved**3, (curved - 16 / 116) / 7.787)
    inverse = torch.linalg.inv(torch.tensor(MATRIX, dtype=torch.float64)).to(lab)
    return (xyz * lab.new_tensor(WHITE)) @ inverse.mT
