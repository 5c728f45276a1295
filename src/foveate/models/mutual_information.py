"""Registration as it is done without learning: the similarity under which two pictures tell most of each other.

Mattes et al. 2003, "PET-CT image registration in the chest using free-form deformations": mutual information, here by
SimpleITK with a pyramid of three levels and gradient descent from several places.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.types import InputError

# where a search begins, in parts of the side: the middle, then around it, then further out
STARTS = ((0.0, 0.0), *((0.2 * x, 0.2 * y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)))


def simple_itk() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            "mutual_information: needs the package SimpleITK, which is not installed: "
            "pip install 'foveate[references]', or leave the baseline out with --no-mutual-information"
        ) from error
    return SimpleITK


def by_mutual_information(
    fixed: Float[Tensor, "3 side side"],
    moving: Float[Tensor, "3 side side"],
    seconds: float = float("inf"),
    starts: int = len(STARTS),
) -> Float[Tensor, "2 3"]:
    """The map from moving to fixed pixels, the best of the starts that there is time for; one at least is tried.

    Args:
        fixed: in [0, 1]; grey values are the means of the channels.
        moving: is to be laid over it.
        seconds: after which no further start is tried.
        starts: at most so many of `STARTS`.

    Raises:
        InputError: SimpleITK is not installed.
    """
    sitk = simple_itk()
    began, side = time.monotonic(), fixed.shape[-1]
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    pictures = []
    for picture in (fixed, moving):
        made = sitk.GetImageFromArray(picture.mean(0).double().cpu().numpy())
        made.SetOrigin((0.5, 0.5))  # the middle of the first pixel
        pictures.append(made)
    best, found = None, float("inf")
    for shift in STARTS[:starts]:
        if best is not None and time.monotonic() - began >= seconds:
            break
        # of fixed to moving pixels: the way that pictures are resampled, back to front
        transform = sitk.Similarity2DTransform()
        transform.SetCenter((side / 2, side / 2))
        transform.SetTranslation([part * side for part in shift])
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.NONE)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.05, 60, 0.6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        try:
            method.Execute(*pictures)
        except RuntimeError:  # the pictures no longer overlap
            continue
        if method.GetMetricValue() < found:
            found, best = method.GetMetricValue(), sitk.Similarity2DTransform(transform)
    if best is None:
        return torch.eye(2, 3)
    back = best.GetInverse()
    corner, right, down = (torch.tensor(back.TransformPoint(point)) for point in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    return torch.stack((right - corner, down - corner, corner), 1).float()


def registered(
    fixed: Float[Tensor, "batch 3 side side"], moving: Float[Tensor, "batch 3 side side"], seconds: float = float("inf")
) -> Float[Tensor, "batch 2 3"]:
    """The same of many pairs, one after the other; `seconds` for each."""
    pairs = zip(fixed, moving, strict=True)
    return torch.stack([by_mutual_information(one, other, seconds) for one, other in pairs])
