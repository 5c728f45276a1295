"""Random affine and elastic warps of volumes, and where they take points.

A warp says for every place of the new volume where in the old one its value is from: p ↦ A (p - c) + c + t + u(p),
with c the middle of the volume and u a sum of waves, smooth everywhere. A point of the old volume lies where the warp
leads to it, found by iteration: the waves are long and low, so that u moves less than the place it is taken at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate import noise

WAVES = 6
ROUNDS = 40  # of the iteration; every one leaves at most half of the error


@dataclass(frozen=True)
class Warps:
    """A tree of [batch, ...]; lengths are in voxels.

    Attributes:
        matrix: A, rotation and stretching.
        middle: c, of the new volume.
        shift: t.
        waves: wave vectors k of u(p) = Σ amplitude · sin(k · p + phase), radians a voxel.
        amplitude: of the waves, a vector each.
        phase: of the waves.
        gamma: power to which values are raised: the contrast.
    """

    matrix: Float[Tensor, "batch 3 3"]
    middle: Float[Tensor, "batch 3"]
    shift: Float[Tensor, "batch 3"]
    waves: Float[Tensor, "batch waves 3"]
    amplitude: Float[Tensor, "batch waves 3"]
    phase: Float[Tensor, "batch waves"]
    gamma: Float[Tensor, " batch"]


def random_warps(
    keys: Int[Tensor, " batch"],
    size: tuple[int, int, int],
    strength: float = 1.0,
    turn: float = 15.0,
    stretch: float = 0.12,
    move: float = 0.08,
    bend: float = 0.02,
    contrast: float = 0.4,
) -> Warps:
    """Draw warps for volumes of one size.

    Args:
        keys: one a warp.
        size: voxels along x, y, z.
        strength: by which all of the following is multiplied; 0 changes nothing.
        turn: largest angle about each axis in degrees.
        stretch: largest relative change of length along each axis.
        move: largest shift along each axis, in parts of the size.
        bend: amplitude of the elastic part, in parts of the mean size; its waves are 0.6 to 1.5 mean sizes long.
        contrast: largest logarithm of `gamma`.
    """

    def even(name: str, *shape: int) -> Tensor:
        return strength * (noise.uniform(noise.fold(keys, name), *shape) * 2 - 1)

    sides = torch.tensor(size, dtype=torch.float32, device=keys.device)
    angles = even("turn", 3) * math.radians(turn)
    matrix = _rotation(angles) @ torch.diag_embed(torch.exp(even("stretch", 3) * stretch))
    direction = F.normalize(noise.normal(noise.fold(keys, "direction"), WAVES, 3), dim=-1)
    length = (0.6 + 0.9 * noise.uniform(noise.fold(keys, "length"), WAVES, 1)) * sides.mean()
    amplitude = noise.normal(noise.fold(keys, "amplitude"), WAVES, 3).clamp(-2, 2)
    return Warps(
        matrix,
        ((sides - 1) / 2).expand(len(keys), 3),
        even("move", 3) * move * sides,
        direction * 2 * math.pi / length,
        amplitude * strength * bend * sides.mean() / math.sqrt(WAVES),
        noise.uniform(noise.fold(keys, "phase"), WAVES) * 2 * math.pi,
        torch.exp(even("contrast") * contrast),
    )


def sources(warps: Warps, places: Float[Tensor, "batch count 3"]) -> Float[Tensor, "batch count 3"]:
    """Where in the old volume the values at these places of the new one are from."""
    turned = (places - warps.middle[:, None]) @ warps.matrix.transpose(1, 2)
    return turned + (warps.middle + warps.shift)[:, None] + _bent(warps, places)


def moved(warps: Warps, points: Float[Tensor, "batch count 3"]) -> Float[Tensor, "batch count 3"]:
    """Where points of the old volume lie in the new one: the inverse of `sources`."""
    inverse = torch.linalg.inv(warps.matrix).transpose(1, 2)
    straight = points - (warps.middle + warps.shift)[:, None]
    places = straight @ inverse + warps.middle[:, None]
    for _ in range(ROUNDS):
        places = (straight - _bent(warps, places)) @ inverse + warps.middle[:, None]
    return places


def warped(warps: Warps, volume: Float[Tensor, "depth height width"]) -> Float[Tensor, "batch depth height width"]:
    """New volumes of the same size, 0 where nothing was."""
    depth, height, width = volume.shape
    line = [torch.arange(count, dtype=torch.float32, device=volume.device) for count in (depth, height, width)]
    z, y, x = torch.meshgrid(*line, indexing="ij")
    places = torch.stack((x, y, z), -1).view(1, -1, 3).expand(len(warps.gamma), -1, -1)
    scale = torch.tensor([width - 1, height - 1, depth - 1], device=volume.device).clamp(min=1)
    where = (sources(warps, places) / scale * 2 - 1).view(-1, depth, height, width, 3)
    old = volume.expand(len(where), 1, -1, -1, -1)
    found = F.grid_sample(old, where, align_corners=True, padding_mode="zeros")[:, 0]
    return found.clamp(0, 1) ** warps.gamma[:, None, None, None]


def _bent(warps: Warps, places: Tensor) -> Tensor:
    angle = places @ warps.waves.transpose(1, 2) + warps.phase[:, None]
    return torch.sin(angle) @ warps.amplitude


def _rotation(angles: Tensor) -> Tensor:
    """About x, then y, then z; [batch, 3] radians to [batch, 3, 3]."""
    turned = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        part = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        cos, sin = angles[:, axis].cos(), angles[:, axis].sin()
        part[:, one, one], part[:, other, other] = cos, cos
        part[:, one, other], part[:, other, one] = -sin, sin
        turned = part @ turned
    return turned
