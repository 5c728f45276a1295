"""Landmarks by registration: an atlas whose landmarks are known is laid over a volume, and its landmarks with it.

The classical way, by SimpleITK: an affine transform, then cubic B-splines, each from coarse to fine, led by the mutual
information of the intensities (Mattes et al. 2003, "PET-CT image registration in the chest using free-form
deformations").
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.types import InputError

BINS, SAMPLED = 32, 0.2  # of the histogram; part of the voxels that are compared
MESH = 5  # B-splines along each axis
LEAST = 4  # voxels along each axis of a volume: with fewer SimpleITK takes no gradients of it


def registered(
    atlas: Float[Tensor, "adepth aheight awidth"],
    volume: Float[Tensor, "depth height width"],
    points: Float[Tensor, "landmarks 3"],
    spacing: float,
    elastic: bool = True,
) -> Float[Tensor, "landmarks 3"]:
    """Where the points of an atlas lie in a volume.

    Args:
        atlas: in [0, 1].
        volume: in [0, 1], at least `LEAST` voxels along each axis.
        points: x, y, z in voxels of the atlas.
        spacing: of both, mm.
        elastic: B-splines after the affine transform.

    Returns:
        x, y, z in voxels of the volume. They may lie outside of it.

    Raises:
        InputError: SimpleITK is not installed.
    """
    sitk = _simple_itk()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    fixed, moving = (_image(sitk, each, spacing) for each in (atlas, volume))
    # the transform leads from the fixed image's places to the moving one's: the atlas is fixed
    first = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    found = _method(sitk, fixed, (4, 2, 1), first)
    found.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100, 0.5)
    found.SetOptimizerScalesFromPhysicalShift()
    affine = found.Execute(fixed, moving)
    transform = affine
    if elastic:
        splines = sitk.BSplineTransformInitializer(fixed, [MESH] * 3, 3)
        found = _method(sitk, fixed, (2, 1), splines)
        found.SetMovingInitialTransform(affine)
        found.SetOptimizerAsLBFGSB(1e-5, 30)
        transform = sitk.CompositeTransform([affine, found.Execute(fixed, moving)])
    places = [transform.TransformPoint([float(at) * spacing for at in point]) for point in points.cpu()]
    return torch.tensor(places) / spacing


def most_usual(points: Float[Tensor, "volumes landmarks 3"]) -> int:
    """Which volume's landmarks are nearest to their mean over all: the one to make an atlas of."""
    return int((points - points.mean(0)).norm(dim=2).mean(1).argmin())


def _method(sitk: Any, fixed: Any, shrink: tuple[int, ...], first: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLED, 1)
    method.SetInterpolator(sitk.sitkLinear)
    most = max(1, min(fixed.GetSize()) // 8)  # a volume of few voxels is not shrunk to nothing
    shrink = tuple(min(each, most) for each in shrink)
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel([each / 2 if each > 1 else 0.0 for each in shrink])
    method.SetInitialTransform(first, inPlace=False)
    return method


def _image(sitk: Any, voxels: Tensor, spacing: float) -> Any:
    image = sitk.GetImageFromArray(voxels.float().cpu().numpy())
    image.SetSpacing((spacing,) * 3)
    return image


def _simple_itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            "registrations: the baseline needs SimpleITK; install it: pip install 'foveate[references]', or give 0"
        ) from error
    return SimpleITK
