"""Volumes with landmarks: a brain template under warps, or NIfTI files with their points, in memory at one spacing.

Every volume is turned to right-anterior-superior axes and resampled to the same spacing in all directions; volumes of
different sizes stand at the first voxels of equally large boxes, and `sizes` says where they end. Splits are fixed:
they depend on the data alone, never on the seed of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.data.nifti import (
    Grid,
    Points,
    check_alike,
    files_in,
    in_voxels,
    isotropic,
    line_of,
    read_csv,
    read_fcsv,
    stem,
)
from foveate.data.nifti import read_volume as read_grid
from foveate.data.picture_folders import check_memory
from foveate.data.warps import moved, random_warps, warped
from foveate.types import InputError

DATASETS: dict[str, str] = {
    "template": "the brain template inside nilearn under random warps, nothing to download",
    "decathlon": "ROOT/imagesTr/*.nii.gz and ROOT/landmarks.csv (Medical Segmentation Decathlon)",
    "afids": "ROOT/NAME_T1w.nii.gz and ROOT/NAME_afids.fcsv, under random warps",
    "folder": "ROOT/*.nii.gz (or ROOT/images/) and ROOT/landmarks.csv",
}
SPACING = {"template": 3.0, "decathlon": 1.0, "afids": 2.0}  # mm
WARPS = {"template": 64, "decathlon": 4, "afids": 24, "folder": 4}  # of each volume to train on
WARPED = {"val": 12, "test": 24}  # warps of a template to choose by and to test on
TEMPLATE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
# mm to the right, anterior and superior in the space of MNI152NLin2009 symmetric, rounded to 0.1: the placements of Lau
# et al. 2019, "A framework for evaluating correspondence between brain images using anatomical fiducials" (CC BY 4.0)
MNI_POINTS: Points = {
    "AC": (-0.1, 2.6, -4.8),
    "PC": (0.1, -25.1, -2.1),
    "pontomesencephalic junction": (0.0, -23.4, -21.9),
    "genu of corpus callosum": (0.0, 33.4, 2.5),
    "splenium of corpus callosum": (0.1, -37.6, 6.4),
    "right ventricle at AC": (15.2, 6.0, 25.2),
}
Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Volumes:
    """Volumes of one spacing, in memory, with their landmarks.

    Attributes:
        voxels: 0 to 255; beyond a volume's own size 0.
        sizes: voxels along x, y, z of each.
        landmarks: (x, y, z) in voxels; the first voxel's centre is 0, 0, 0.
        names: of the landmarks.
        files: of the volumes.
        spacing: mm between voxels, in all directions.
        name: of the data set, one of `DATASETS`.
        split: which part of it this is.
    """

    voxels: UInt8[Tensor, "size depth height width"]
    sizes: Int[Tensor, "size 3"]
    landmarks: Float[Tensor, "size landmarks 3"]
    names: tuple[str, ...]
    files: tuple[str, ...]
    spacing: float
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.voxels)

    def first(self, count: int) -> Volumes:
        """The first volumes alone."""
        kept = {name: getattr(self, name)[:count] for name in ("voxels", "sizes", "landmarks", "files")}
        return replace(self, **kept)

    def cut(self, row: int) -> Float[Tensor, "mydepth myheight mywidth"]:
        """A volume without its padding, in [0, 1]."""
        width, height, depth = self.sizes[row].tolist()
        return self.voxels[row, :depth, :height, :width].float() / 255

    @property
    def relative(self) -> Float[Tensor, "size landmarks 3"]:
        """Landmarks in parts of their volume's size: 0 at its first voxel, 1 at its last."""
        return self.landmarks / (self.sizes[:, None] - 1).clamp(min=1)


@lru_cache(maxsize=6)
def load_volumes(
    name: str, root: Path | None, split: Part, spacing: float | None = None, warps: int = 64, strength: float = 1.0
) -> Volumes:
    """Read one split of a data set into memory.

    - template: `warps` warps of nilearn's brain template to train on, up to `WARPED` others to choose by and to test
      on, with the points of `MNI_POINTS`.
    - afids: as many warps of every template in the folder, with the points of its file.
    - decathlon, folder: files are split by the hash of their names, 20 % test and 15 % of the rest val; each volume to
      train on is there as it is and in `warps` - 1 weaker warps.

    Args:
        name: one of `DATASETS`.
        root: the folder of the data; not needed for template.
        split: which part.
        spacing: mm between voxels; None: `SPACING`, or the finest spacing of the folder's first volume.
        warps: of each volume to train on.
        strength: of the warps, see `foveate.data.warps.random_warps`.

    Raises:
        InputError: unknown name; missing packages, folders or files; files as `read_volume`, `read_csv` and `read_fcsv`
            refuse them; a landmark outside of its volume; too few volumes to hold some out.
    """
    if name not in DATASETS:
        raise InputError(f"data: found {name!r}, expected one of {', '.join(DATASETS)}")
    if warps < 1:
        raise InputError(f"warps: found {warps}, expected at least 1")
    if spacing is not None and not spacing > 0:
        raise InputError(f"spacing: found {spacing:g} mm, expected more than 0")
    if name == "template":
        path = _template()
        return _of_template({"template": (path, MNI_POINTS)}, name, split, spacing, warps, strength)
    if root is None:
        raise InputError(f"root: not given; data {name!r} needs the folder in which it lies: --root FOLDER")
    if not root.is_dir():
        raise InputError(f"root: {root} is no folder; correct the path")
    if name == "afids":
        return _of_template(_templates(root), name, split, spacing, warps, strength)
    return _of_files(root, name, split, spacing, warps, strength)


def _template() -> Path:
    try:
        import nilearn
    except ImportError as error:
        raise InputError("data: the template lies in nilearn; install it: pip install 'foveate[volumes]'") from error
    path = Path(nilearn.__file__).parent / "datasets" / "data" / TEMPLATE
    if not path.is_file():
        raise InputError(f"{path}: does not exist; this nilearn has no such template: pip install 'nilearn>=0.11'")
    return path


@lru_cache(maxsize=2)
def _whole(path: Path, spacing: float) -> Grid:
    """A template at one spacing: all splits are warped from it."""
    return isotropic(read_grid(path), spacing)


def _templates(root: Path) -> dict[str, tuple[Path, Points]]:
    found = {}
    for path in files_in(root):
        name = stem(path).removesuffix("_T1w")
        points = root / f"{name}_afids.fcsv"
        if stem(path).endswith("_T1w"):
            if not points.is_file():
                raise InputError(f"{points}: does not exist, but {path.name} does; add it or remove the volume")
            found[name] = path, read_fcsv(points)
    if not found:
        raise InputError(f"{root}: no NAME_T1w.nii.gz in it, expected a volume and NAME_afids.fcsv; correct the path")
    check_alike({name: points for name, (_, points) in found.items()}, root)
    return found


def _of_template(
    templates: dict[str, tuple[Path, Points]],
    name: str,
    split: Part,
    spacing: float | None,
    warps: int,
    strength: float,
) -> Volumes:
    spacing = spacing or SPACING[name]
    names = tuple(next(iter(templates.values()))[1])
    count = warps if split == "train" else min(WARPED[split], warps)
    parts = []
    for volume, (path, points) in templates.items():
        grid = _whole(path, spacing)
        check_memory(str(path), (count, *grid.voxels.shape), 1)
        table = path.parent / f"{volume}_afids.fcsv"
        where = located(grid, points, names, table if name == "afids" else path)
        keys = noise.key("volumes", name, volume, split, torch.arange(count))
        parts.append((grid, where, keys, [f"{volume} {split} {row}" for row in range(count)]))
    made = [_varied(grid, where, keys, strength) for grid, where, keys, _ in parts]
    files = tuple(file for *_, several in parts for file in several)
    return gathered([one for one, _ in made], [points for _, points in made], names, files, spacing, name, split)


def _of_files(root: Path, name: str, split: Part, spacing: float | None, warps: int, strength: float) -> Volumes:
    places = [root / "imagesTr"] if name == "decathlon" else [root / "imagesTr", root / "images", root]
    folder = next((place for place in places if place.is_dir() and files_in(place)), None)
    if folder is None:
        raise InputError(f"{places[0]}: no volumes (*.nii.gz, *.nii) in it; correct the path")
    volumes = {stem(path): path for path in files_in(folder)}
    table = root / "landmarks.csv"
    points = read_csv(table, volumes)
    names = tuple(next(iter(points.values())))
    mine = held_out(tuple(volumes))[split]
    if not mine:
        raise InputError(f"{folder}: {len(volumes)} volumes are too few to hold out split {split!r}; add some")
    if spacing is None:
        spacing = SPACING.get(name) or round(min(read_grid(volumes[min(volumes)]).spacing), 3)
    count = warps if split == "train" else 1
    found, landmarks, files = [], [], []
    for volume in mine:
        grid = isotropic(read_grid(volumes[volume]), spacing)
        check_memory(str(folder), (len(mine) * count, *grid.voxels.shape), 1)
        where = located(grid, points[volume], names, table, volume)
        keys = noise.key("volumes", volume, torch.arange(1, count))
        others, moved_points = _varied(grid, where, keys, strength / 2)
        found.append(torch.cat((as_bytes(grid.voxels[None]), others)))
        landmarks.append(torch.cat((where[None], moved_points)))
        files += [volume] * count
    return gathered(found, landmarks, names, tuple(files), spacing, name, split)


def held_out(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Names of each split, by the order of their hashes: a fifth test, 15 % of the rest val, at least one each."""
    order = sorted(names, key=lambda name: (int(noise.key("split of volumes", name)), name))
    test = max(1, round(0.2 * len(order))) if len(order) > 2 else 0
    val = max(1, round(0.15 * (len(order) - test))) if len(order) > 2 else 0
    return {"test": sorted(order[:test]), "val": sorted(order[test : test + val]), "train": sorted(order[test + val :])}


def located(
    grid: Grid, points: Points, names: tuple[str, ...], table: Path, volume: str = ""
) -> Float[Tensor, "landmarks 3"]:
    """Landmarks in voxels of a grid.

    Raises:
        InputError: one lies outside of it, by more than half a voxel.
    """
    where = in_voxels(grid, torch.tensor([points[name] for name in names]))
    last = torch.tensor(grid.size) - 1
    for name, place in zip(names, where, strict=True):
        if bool(((place < -0.5) | (place > last + 0.5)).any()):
            said = ", ".join(f"{number:.1f}" for number in place.tolist())
            size, line = ", ".join(map(str, grid.size)), line_of(table, name, volume)
            raise InputError(
                f"{table}{line}: {name!r} of {volume or 'its volume'} lies at voxel {said}, outside of the volume of "
                f"{size}; expected mm to the right, anterior and superior: correct the point or its coordinates"
            )
    return torch.minimum(where.clamp(min=0), last)


def _varied(grid: Grid, where: Tensor, keys: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Warps of a volume and its points. A point that would leave the volume is kept in by a weaker warp."""
    volumes, points = [torch.empty(0, *grid.voxels.shape, dtype=torch.uint8)], [where.new_empty(0, *where.shape)]
    last = torch.tensor(grid.size) - 1
    for some in keys.split(1) if len(keys) else ():  # a warp of a whole brain takes some hundred megabytes at work
        for weaker in (1.0, 0.5, 0.25, 0.0):
            warps = random_warps(some, grid.size, strength * weaker)
            there = moved(warps, where[None])
            if bool(((there >= 0) & (there <= last)).all()):
                break
        volumes.append(as_bytes(warped(warps, grid.voxels)))
        points.append(torch.minimum(there.clamp(min=0), last))
    return torch.cat(volumes), torch.cat(points)


def as_bytes(values: Tensor) -> UInt8[Tensor, "..."]:
    """Values in [0, 1] as they are kept."""
    return (values * 255).round().to(torch.uint8)


def gathered(
    volumes: list[Tensor],
    landmarks: list[Tensor],
    names: tuple[str, ...],
    files: tuple[str, ...],
    spacing: float,
    name: str,
    split: str,
) -> Volumes:
    """Volumes [count, depth, height, width] of several sizes in one tensor."""
    most = [max(one.shape[dim] for one in volumes) for dim in (1, 2, 3)]
    padded = []
    for one in volumes:
        depth, height, width = (side - mine for side, mine in zip(most, one.shape[1:], strict=True))
        padded.append(F.pad(one, (0, width, 0, height, 0, depth)))
    sizes = torch.cat([torch.tensor([one.shape[:0:-1]]).expand(len(one), 3) for one in volumes])
    return Volumes(torch.cat(padded), sizes, torch.cat(landmarks), names, files, spacing, name, split)
