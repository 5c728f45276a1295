"""Volumes in NIfTI files and points in CSV and 3D Slicer files, checked, as right-anterior-superior grids.

A volume is float32 [depth, height, width]: depth runs to superior, height to anterior, width to right. A point is
(x, y, z) in voxels, width first as in `grid_sample`; the first voxel's centre is 0, 0, 0. Spacings are (x, y, z) in mm.
An oblique grid is turned to the nearest axes and not resampled: distances in it are those of the scanner.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.types import InputError

SUFFIXES = (".nii.gz", ".nii")
SAME = 1e-3  # relative difference of spacings that counts as none
Points = dict[str, tuple[float, float, float]]  # name → (x, y, z) in mm


@dataclass(frozen=True)
class Grid:
    """A volume as it was read.

    Attributes:
        voxels: their values in [0, 1], the 0.5th to the 99.5th percentile stretched to that.
        spacing: mm between voxels, x, y, z.
        affine: from voxels (x, y, z, 1) to mm to the right, anterior and superior.
    """

    voxels: Float[Tensor, "depth height width"]
    spacing: tuple[float, float, float]
    affine: Float[Tensor, "4 4"]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        depth, height, width = self.voxels.shape
        return width, height, depth


def stem(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def files_in(folder: Path) -> list[Path]:
    """The NIfTI files directly in a folder, in the order of their names; hidden ones are passed over."""
    found = (path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith("."))
    return sorted(found)


def read_volume(path: Path) -> Grid:
    """Read a NIfTI file.

    Raises:
        InputError: nibabel is not installed; the file is missing, damaged, not of three dimensions, has a spacing that
            is zero or no number, a voxel that is no number, or the same value everywhere.
    """
    nibabel = _nibabel()
    if not path.is_file():
        raise InputError(f"{path}: does not exist, expected a NIfTI file (.nii or .nii.gz): correct the path")
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
        with nibabel.openers.ImageOpener(path) as file:  # as it stands there: on loading a spacing of 0 becomes 1
            header = type(image.header).from_fileobj(file, check=False)
    except Exception as error:  # nibabel, zlib and the file system each have their own
        raise InputError(f"{path}: is no readable NIfTI file ({str(error).splitlines()[0]}); replace it") from error
    if values.ndim > 3 and values.shape[3:] == (1,) * (values.ndim - 3):
        values = values.reshape(values.shape[:3])
    if values.ndim != 3:
        shape = "x".join(map(str, values.shape))
        raise InputError(f"{path}: has {values.ndim} dimensions ({shape}), expected 3; save one time point or channel")
    sides = np.linalg.norm(image.affine[:3, :3], axis=0), np.asarray(header["pixdim"][1:4], dtype=float)
    for found in sides:
        if not (np.isfinite(found).all() and (np.abs(found) > 1e-6).all()):
            said = ", ".join(f"{side:g}" for side in found)
            raise InputError(f"{path}: its spacing is {said} mm, expected numbers above 0; correct the file's header")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds voxels that are no finite numbers; replace them, e.g. by 0")
    # a header alone is turned: what stands in memory already need not be read again
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, image.affine))
    values = np.asarray(turned.dataobj, dtype=np.float32)
    low, high = map(float, np.percentile(values, (0.5, 99.5)))
    if not high > low:
        low, high = float(values.min()), float(values.max())
    if not high > low:
        raise InputError(f"{path}: has the value {low:g} everywhere, expected an image; replace it")
    stretched = np.clip((values - low) / (high - low), 0, 1, dtype=np.float32)
    voxels = torch.from_numpy(stretched.transpose(2, 1, 0).copy())
    spacing = tuple(float(side) for side in np.linalg.norm(turned.affine[:3, :3], axis=0))
    return Grid(voxels, (spacing[0], spacing[1], spacing[2]), torch.tensor(turned.affine, dtype=torch.float32))


def isotropic(grid: Grid, spacing: float) -> Grid:
    """The same volume with one spacing in all directions: smoothed where that is coarser, then read between voxels.

    The first voxel stays where it is.
    """
    if all(abs(side / spacing - 1) < SAME for side in grid.spacing):
        return grid
    voxels = grid.voxels[None, None]
    for dim, side in zip((4, 3, 2), grid.spacing, strict=True):  # x, y, z
        voxels = _smoothed(voxels, dim, spacing / side)
    steps = [spacing / side for side in grid.spacing]
    counts = [math.floor((count - 1) / step + 1e-4) + 1 for count, step in zip(grid.size, steps, strict=True)]
    places = [
        torch.arange(count) * step / max(1, size - 1) * 2 - 1
        for count, step, size in zip(counts, steps, grid.size, strict=True)
    ]
    z, y, x = torch.meshgrid(places[2], places[1], places[0], indexing="ij")
    where = torch.stack((x, y, z), -1)[None]
    found = F.grid_sample(voxels, where, align_corners=True, padding_mode="border")[0, 0]
    affine = grid.affine.clone()
    affine[:3, :3] *= torch.tensor(steps)
    return Grid(found.clamp(0, 1), (spacing, spacing, spacing), affine)


def _smoothed(voxels: Tensor, dim: int, step: float) -> Tensor:
    """Blurred along one dimension so that every `step`-th voxel stands for those around it."""
    if step <= 1 + SAME or voxels.shape[dim] < 3:
        return voxels
    sigma = 0.5 * math.sqrt(step**2 - 1)
    reach = max(1, math.ceil(2.5 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    line = voxels.movedim(dim, -1)
    shape = line.shape
    padded = F.pad(line.reshape(-1, 1, shape[-1]), (reach, reach), mode="replicate")
    return F.conv1d(padded, (weights / weights.sum())[None, None]).view(shape).movedim(-1, dim)


def in_voxels(grid: Grid, points: Float[Tensor, "count 3"]) -> Float[Tensor, "count 3"]:
    """Points in mm as (x, y, z) in voxels."""
    inverse = torch.linalg.inv(grid.affine.double())
    return (points.double() @ inverse[:3, :3].T + inverse[:3, 3]).float()


def read_csv(path: Path, volumes: dict[str, Path]) -> dict[str, Points]:
    """Read landmarks: columns `volume`, `landmark`, and x_mm, y_mm, z_mm (right, anterior, superior) or i, j, k.

    i, j, k are voxels of the file as it lies there. Every volume has the same landmarks, each once.

    Args:
        path: the file.
        volumes: name → file, the volumes there are.

    Returns:
        Volume → landmark → mm.

    Raises:
        InputError: a missing file or column, a row that names no volume, a number that is none, a landmark given
            twice, a volume without landmarks or without one that the others have.
    """
    rows = _rows(path)
    there = rows[0][1].keys() if rows else ()
    columns = next((each for each in (("x_mm", "y_mm", "z_mm"), ("i", "j", "k")) if set(each) <= set(there)), None)
    if columns is None or not {"volume", "landmark"} <= set(there):
        raise InputError(
            f"{path}: its columns are {', '.join(there) or 'none'}, expected volume, landmark, and x_mm, y_mm, z_mm "
            "or i, j, k; correct its first line"
        )
    found: dict[str, Points] = {name: {} for name in volumes}
    affines: dict[str, Any] = {}
    for line, row in rows:
        name, landmark = stem(Path(row["volume"] or "")), (row["landmark"] or "").strip()
        if name not in found:
            raise InputError(f"{path}, line {line}: names the volume {name!r}, of which there is no file; remove it")
        if landmark in found[name]:
            raise InputError(f"{path}, line {line}: {landmark!r} of {name} is given twice; remove one")
        point = _numbers([row[column] for column in columns], f"{path}, line {line}")
        if columns[0] == "i":
            if name not in affines:
                affines[name] = _nibabel().load(volumes[name]).affine
            point = tuple((affines[name][:3, :3] @ np.asarray(point) + affines[name][:3, 3]).tolist())
        found[name][landmark] = point
    check_alike(found, path)
    return found


def check_alike(found: dict[str, Points], path: Path) -> None:
    """Raise an InputError unless all volumes have the same landmarks."""
    everything = list(dict.fromkeys(name for points in found.values() for name in points))
    for volume, points in found.items():
        if not points:
            raise InputError(f"{path}: has no landmark of {volume}; add its rows or remove the volume")
        lacks = [name for name in everything if name not in points]
        if lacks:
            raise InputError(
                f"{path}: {volume} lacks the landmark {lacks[0]!r}, which others have; add it, or remove it from all"
            )


def read_fcsv(path: Path) -> Points:
    """Read the points of a 3D Slicer file (.fcsv): label → mm to the right, anterior, superior.

    Raises:
        InputError: the file is missing, has no points, a line without numbers, or an unknown coordinate system.
    """
    sign, found = 1.0, Points()
    for line, text in enumerate(_lines(path), 1):
        if text.startswith("# CoordinateSystem"):
            said = text.partition("=")[2].strip()
            if said not in ("0", "1", "RAS", "LPS"):
                raise InputError(f"{path}, line {line}: the coordinate system {said!r}, expected 0 (RAS) or 1 (LPS)")
            sign = -1.0 if said in ("1", "LPS") else 1.0
        if text.startswith("#") or not text.strip():
            continue
        fields = next(csv.reader([text]))
        if len(fields) < 13:
            raise InputError(f"{path}, line {line}: has {len(fields)} fields, expected 13 or more of 3D Slicer's .fcsv")
        x, y, z = _numbers(fields[1:4], f"{path}, line {line}")
        name = fields[12].strip() or fields[11].strip()
        if name in found:
            raise InputError(f"{path}, line {line}: {name!r} is given twice; remove one")
        found[name] = (sign * x, sign * y, z)
    if not found:
        raise InputError(f"{path}: has no points; add them")
    return found


def line_of(path: Path, landmark: str, volume: str) -> str:
    """Where a table, as `read_csv` and `read_fcsv` read it, says where a landmark lies; nothing for other files."""
    if path.suffix == ".csv":
        said = ((line, stem(Path(row["volume"] or "")), (row["landmark"] or "").strip()) for line, row in _rows(path))
    elif path.suffix == ".fcsv":
        texts = ((line, text) for line, text in enumerate(_lines(path), 1) if text.strip() and text[0] != "#")
        fields = ((line, next(csv.reader([text]))) for line, text in texts)
        said = ((line, volume, each[12].strip() or each[11].strip()) for line, each in fields)
    else:
        return ""
    return next((f", line {line}" for line, *names in said if names == [volume, landmark]), "")


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(_lines(path))
    return [(reader.line_num, row) for row in reader]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error.__class__.__name__}); expected landmarks") from error


def _numbers(texts: Sequence[str | None], where: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(text or "") for text in texts)
    except ValueError as error:
        raise InputError(f"{where}: found {', '.join(map(str, texts))}, expected three numbers; correct it") from error
    if not all(map(math.isfinite, (x, y, z))):
        raise InputError(f"{where}: found {x:g}, {y:g}, {z:g}, expected three finite numbers; correct it")
    return x, y, z


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise InputError("data: volumes are read by nibabel; install it: pip install 'foveate[volumes]'") from error
    return nibabel
