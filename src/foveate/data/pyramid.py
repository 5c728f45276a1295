"""Volumes at several scales as one line of bytes, of which only the voxels around a place are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor


class Pyramid:
    """Scale k has every 2^k-th voxel of volumes that were smoothed as often.

    Each volume of each scale has an empty rim that a cube can reach into.

    Args:
        voxels: of the volumes, padded to one size; the pyramid stays on their device.
        scales: how many, the finest among them.
        cube: voxels on the side of what is read at once; odd.
    """

    def __init__(self, voxels: UInt8[Tensor, "size depth height width"], scales: int, cube: int) -> None:
        rim = cube // 2 + 2
        level, parts, first, begins, strides = voxels[:, None].float(), [], 0, [], []
        self.sides = voxels.shape[1:]
        for scale in range(scales):
            if scale:
                level = halved(level)
            padded = F.pad(level[:, 0], (rim,) * 6).round().to(torch.uint8)
            depth, height, width = padded.shape[1:]
            begins.append(first + rim * (height * width + width + 1))
            strides.append((1, width, height * width, depth * height * width))
            parts.append(padded.flatten())
            first += padded.numel()
        self.line = torch.cat(parts)
        self.begins = torch.tensor(begins, device=voxels.device)
        self.strides = torch.tensor(strides, device=voxels.device)  # [scales, (x, y, z, volume)]
        self.reach = torch.arange(cube, device=voxels.device) - cube // 2

    def cubes(
        self,
        volume: Int[Tensor, " batch"],
        scale: Int[Tensor, " batch"],
        place: Int[Tensor, "batch 3"],
        low: Int[Tensor, "batch 3"],
        high: Int[Tensor, "batch 3"],
    ) -> Float[Tensor, "batch cube cube cube"]:
        """Voxels in [0, 1] around places.

        Args:
            volume: its number.
            scale: of each.
            place: x, y, z in voxels of the scale.
            low: first voxel of the finest scale that is shown, x, y, z; before it everything is 0.
            high: the last one.
        """
        strides = self.strides[scale]  # [batch, (x, y, z, volume)]
        first = self.begins[scale] + (place * strides[:, :3]).sum(1) + volume * strides[:, 3]
        x, y, z = (self.reach * strides[:, axis, None] for axis in range(3))
        index = (first[:, None] + z)[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :]
        voxels = self.line.index_select(0, index.flatten()).view(index.shape).float()
        step = 2 ** scale.int()[:, None, None]
        full = (place[:, None] + self.reach[:, None]) * step  # [batch, cube, (x, y, z)]
        inside = ((full >= low[:, None]) & (full <= high[:, None])).float()
        x, y, z = inside.unbind(2)
        return voxels.mul_((z / 255)[:, :, None, None]).mul_(y[:, None, :, None] * x[:, None, None, :])

    def slices(
        self, volume: Int[Tensor, " batch"], place: Int[Tensor, "batch 3"], across: int, up: int
    ) -> UInt8[Tensor, "batch rows columns"]:
        """Slices of the finest scale through places, axis `across` to the right and `up` downwards."""
        depth, height, width = self.sides
        lines = [torch.arange(count, device=self.line.device) for count in (width, height, depth)]
        first = self.begins[0] + volume.long() * self.strides[0, 3]
        through = 3 - across - up
        index = lines[up][:, None] * self.strides[0, up] + lines[across] * self.strides[0, across]
        return self.line.take((first + place[:, through] * self.strides[0, through])[:, None, None] + index)


def halved(
    volumes: Float[Tensor, "size 1 depth height width"],
) -> Float[Tensor, "size 1 halfdepth halfheight halfwidth"]:
    """Every second voxel of smoothed volumes: 1, 4, 6, 4, 1 along each axis (Burt and Adelson 1983)."""
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=volumes.device) / 16
    for dim in (2, 3, 4):
        line = volumes.movedim(dim, -1)
        shape = line.shape
        padded = F.pad(line.reshape(-1, 1, shape[-1]), (2, 2), mode="replicate")
        half = F.conv1d(padded, weights[None, None], stride=2)
        volumes = half.view(*shape[:-1], -1).movedim(-1, dim)
    return volumes
