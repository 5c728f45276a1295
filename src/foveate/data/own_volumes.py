"""Volumes of the user's own, without landmarks: from files, or as tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.data.nifti import Grid, files_in, isotropic
from foveate.data.nifti import read_volume as read_grid
from foveate.data.volumes import Volumes, as_bytes, gathered
from foveate.types import InputError


def read_volumes(path: Path, spacing: float) -> dict[str, Tensor]:
    """The user's NIfTI file, or those of a folder, at one spacing.

    Returns:
        `volume` [batch, 1, depth, height, width] in [0, 1], `spacing` [batch, 3] in mm, `size` [batch, 3] in voxels
        (x, y, z; the rest is padding), and `affine` [batch, 4, 4] from voxels to mm.

    Raises:
        InputError: nothing there, or a file as `read_volume` refuses it.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist, expected a NIfTI file or a folder of them: correct the path")
    paths = files_in(path) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no volumes (*.nii.gz, *.nii) directly in it: name another folder or file")
    grids = [isotropic(read_grid(each), spacing) for each in paths]
    none = [torch.zeros(1, 0, 3)] * len(grids)
    found = gathered([as_bytes(grid.voxels[None]) for grid in grids], none, (), (), spacing, "folder", "all")
    return {
        "volume": found.voxels[:, None].float() / 255,
        "spacing": torch.full((len(grids), 3), spacing),
        "size": found.sizes,
        "affine": torch.stack([grid.affine for grid in grids]),
    }


def volumes_of(
    volumes: Float[Tensor, "..."],
    spacing: Float[Tensor, "..."],
    wanted: float,
    names: tuple[str, ...],
    sizes: Int[Tensor, "batch 3"] | None = None,
) -> Volumes:
    """Volumes of the user, resampled to one spacing; of their landmarks only the names are known.

    Args:
        volumes: [batch, 1, depth, height, width] in [0, 1]; axes right, anterior, superior for width, height, depth.
        spacing: [batch, 3], mm between voxels, x, y, z.
        wanted: the spacing to resample to.
        names: of the landmarks.
        sizes: voxels along x, y, z where the rest of a volume is padding.

    Raises:
        InputError: another shape, values outside of [0, 1], no volume, or a spacing that is not above 0.
    """
    if volumes.ndim != 5 or volumes.shape[1] != 1:
        raise InputError(
            f"volumes: found {list(volumes.shape)}, expected [batch, 1, depth, height, width]: reshape them"
        )
    if spacing.shape != (len(volumes), 3):
        raise InputError(f"spacing: found {list(spacing.shape)}, expected [{len(volumes)}, 3]: x, y, z of each volume")
    if not len(volumes) or not bool(((volumes >= 0) & (volumes <= 1)).all()):
        said = f"{float(volumes.min()):g} to {float(volumes.max()):g}" if len(volumes) else "no volume"
        raise InputError(f"volumes: found values of {said}, expected [0, 1]; stretch them, or read files by `read`")
    if not bool((spacing > 0).all()):
        raise InputError(f"spacing: found {float(spacing.min()):g} mm, expected more than 0")
    found, eye = [], torch.eye(4)
    for row, (volume, sides) in enumerate(zip(volumes, spacing.tolist(), strict=True)):
        depth, height, width = volume.shape[1:] if sizes is None else sizes[row].tolist()[::-1]
        grid = Grid(volume[0, :depth, :height, :width], (sides[0], sides[1], sides[2]), eye)
        found.append(as_bytes(isotropic(grid, wanted).voxels[None]))
    none = [torch.zeros(1, len(names), 3)] * len(found)
    return gathered(found, none, names, tuple(map(str, range(len(found)))), wanted, "folder", "all")
