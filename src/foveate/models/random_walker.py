"""Segmentation from seeds by a random walker, many images at once, on any device.

Grady 2006, "Random walks for image segmentation" (IEEE Transactions on Pattern Analysis and Machine Intelligence).
Pixels are the nodes of a grid; a step to one of the four neighbours is as likely as the two are alike:

    w = exp(-beta · |ΔI|² / (10 · σ · √channels)) + 1e-10,        σ: of all channels and pixels of the image

which is scikit-image's scaling. The probability that a walker who starts at a pixel comes to a seed of the foreground
before one of the background solves a linear system with the graph's Laplacian, for all images in lockstep:

- "cholesky", exact, on the processor: LAPACK's factorisation of banded matrices, image after image, in float64. For n²
  pixels it costs about n⁴ operations, all of them in one call;
- "elimination", exact, for other devices: row after row of pixels of all images is eliminated. The system is
  block tridiagonal, and blocks of the shorter side are inverted: n⁴ operations as well;
- "gradients", for large images there: conjugate gradients with Jacobi's preconditioner (the system is scaled by its
  diagonal to begin with). An image that has converged is left as it is and costs nothing more. Regions without seeds
  behind sharp edges hang on weights of order 1e-10, for which no tolerance within reach is enough.

All treat each image by itself: its result does not depend on the others.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.linalg.lapack import dpbsv
from torch import Tensor

LEAST = 1e-10  # added to every weight, as scikit-image does
CHECK = 8  # iterations between looks at who has converged: each look waits for the device
MOST = 3000  # iterations
LARGE = 128  # pixels of the shorter side from which on elimination takes longer than gradients
TOGETHER = 16  # images eliminated at once: more of them leave the cache
Method: TypeAlias = Literal["cholesky", "elimination", "gradients"]


@torch.no_grad()
def random_walker(
    images: Float[Tensor, "batch channels height width"],
    foreground: Bool[Tensor, "batch height width"],
    background: Bool[Tensor, "batch height width"],
    *,
    beta: float = 130.0,
    method: Method | None = None,
    tolerance: float = 1e-4,
    start: Float[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch height width"]:
    """Probability of the foreground at every pixel: 1 and 0 at the seeds, between them elsewhere.

    scikit-image's `random_walker(..., return_full_prob=True, channel_axis=0)` with the labels 1 and 2, for many images.
    An image with seeds of one side only is all of that side; one without seeds is 1/2 everywhere.

    Args:
        images: in [0, 1].
        foreground: its seeds.
        background: its seeds; where both are, the pixel is of the foreground.
        beta: the larger, the less a walker crosses an edge.
        method: None chooses by the device, and by the shorter side (`LARGE`).
        tolerance: of "gradients": an image has converged when its residual is
            so small a part of the right-hand side (both norms weighted by the diagonal).
        start: of "gradients": probabilities from which to begin, for example those before the last seed was added.
    """
    if not len(images):
        return images.new_zeros(foreground.shape)
    if images.shape[3] > images.shape[2]:  # the blocks of the elimination are of the shorter side
        turned = (leaf.mT for leaf in (images, foreground, background))
        start = None if start is None else start.mT
        return random_walker(*turned, beta=beta, method=method, tolerance=tolerance, start=start).mT
    shape, width = foreground.shape, images.shape[3]
    if method is None:
        method = "cholesky" if images.device.type == "cpu" else "elimination" if width < LARGE else "gradients"
    # Apple's devices have no float64.
    exact = images.dtype if images.device.type == "mps" else torch.float64
    known, wanted = (foreground | background).flatten(1), foreground.flatten(1).to(exact)
    across, down = edge_weights(images.to(exact), beta)
    degree = _neighbours(across, down, torch.ones_like(wanted), width)
    free = torch.where(known, 0.0, degree.rsqrt())  # of the scaled unknowns: probability = free · unknown
    right = free * _neighbours(across, down, wanted, width)
    # the operator on unknowns that are scaled: ones on the diagonal, and nothing beside it where a seed is
    across, down = across * free[:, :-1] * free[:, 1:], down * free[:, :-width] * free[:, width:]
    if method == "cholesky":
        found = _factorised(across, down, right, width)
    elif method == "elimination":
        parts = zip(*(leaf.split(TOGETHER) for leaf in (across, down, right)), strict=True)
        found = torch.cat([_eliminated(*part, width=width) for part in parts])
    else:
        guess = torch.full_like(wanted, 0.5) if start is None else start.flatten(1).to(wanted)
        guess = torch.where(known, 0.0, guess * degree.sqrt())
        found = _conjugate_gradients(across, down, right, guess, width, tolerance)
    walker = torch.where(known, wanted, free * found).clamp(0, 1)
    # With one side only the system is singular or nearly so, and its solution is known.
    ours, theirs = foreground.flatten(1).any(1), (background & ~foreground).flatten(1).any(1)
    alone = torch.where(ours, 1.0, torch.where(theirs, 0.0, 0.5)).to(wanted)
    return torch.where((ours & theirs)[:, None], walker, alone[:, None]).to(images.dtype).view(shape)


def edge_weights(
    images: Float[Tensor, "batch channels height width"], beta: float = 130.0
) -> tuple[Float[Tensor, "batch across"], Float[Tensor, "batch down"]]:
    """Weights between neighbours, pixels in the order of reading.

    `across` has height · width - 1: of a pixel and the next, 0 at the end of a row. `down` has (height - 1) · width: of
    a pixel and the one below.
    """
    channels = images.shape[1]
    flat = images.flatten(1)  # not `std`, which warns of an empty batch
    spread = (flat - flat.mean(1, keepdim=True)).square().mean(1).sqrt().clamp(min=1e-12)
    scale = (-beta / (10 * spread * channels**0.5))[:, None, None]
    aside = torch.exp(scale * (images[..., 1:] - images[..., :-1]).square().sum(1)) + LEAST
    below = torch.exp(scale * (images[..., 1:, :] - images[..., :-1, :]).square().sum(1)) + LEAST
    across = F.pad(aside, (0, 1)).flatten(1)[:, :-1]
    return across, below.flatten(1)


def _neighbours(across: Tensor, down: Tensor, values: Tensor, width: int) -> Tensor:
    """Sum over the neighbours of each pixel, weighted."""
    total = torch.zeros_like(values)
    total[:, :-1].addcmul_(across, values[:, 1:])
    total[:, 1:].addcmul_(across, values[:, :-1])
    total[:, :-width].addcmul_(down, values[:, width:])
    total[:, width:].addcmul_(down, values[:, :-width])
    return total


def _factorised(across: Tensor, down: Tensor, right: Tensor, width: int) -> Tensor:
    """Solve z - (neighbours of z) = right for each row, one after the other, on the processor."""
    band = torch.empty(right.shape[1], width + 1, dtype=torch.float64)  # of a column: the diagonal, then below it
    found = torch.empty_like(right, device="cpu")
    for row, (aside, below, wanted) in enumerate(zip(across.cpu(), down.cpu(), right.cpu(), strict=True)):
        band.zero_()[:, 0] = 1
        band[: len(aside), 1].sub_(aside)
        band[: len(below), width].sub_(below)
        _, answer, _ = dpbsv(band.numpy().T, wanted.numpy(), lower=1, overwrite_ab=1)
        found[row] = torch.from_numpy(answer)
    return found.to(right.device)


def _eliminated(across: Tensor, down: Tensor, right: Tensor, *, width: int) -> Tensor:
    """Solve z - (neighbours of z) = right for each row, one line of pixels after the other."""
    lines, below = (leaf.view(len(right), -1, width).unbind(1) for leaf in (right, down))
    aside = F.pad(across, (0, 1)).view(len(right), -1, width)[..., :-1].unbind(1)
    block = right.new_zeros(len(right), width, width)
    inverses: list[Tensor] = []
    sums: list[Tensor] = []
    for place, line in enumerate(lines):
        if place:
            above = inverses[-1] * below[place - 1][:, :, None]
            line = line + (above @ sums[-1][..., None])[..., 0]
            block = above.mul_(-below[place - 1][:, None])
        block.diagonal(0, 1, 2).add_(1)
        for side in (-1, 1):
            block.diagonal(side, 1, 2).sub_(aside[place])
        inverses.append(torch.linalg.inv_ex(block)[0])
        sums.append(line)
    found = [(inverses[-1] @ sums[-1][..., None])[..., 0]]
    for inverse, line, weight in zip(inverses[-2::-1], sums[-2::-1], below[::-1], strict=True):
        found.append((inverse @ (line + weight * found[-1])[..., None])[..., 0])
    return torch.stack(found[::-1], 1).flatten(1)


def _conjugate_gradients(
    across: Tensor, down: Tensor, right: Tensor, guess: Tensor, width: int, tolerance: float
) -> Tensor:
    """Solve z - (neighbours of z) = right for each row, from a guess."""
    answer = guess.clone()
    limit = (tolerance * right.norm(dim=1)).square().clamp(min=1e-30)
    rows = torch.arange(len(right), device=right.device)
    here, residual = guess, right - guess + _neighbours(across, down, guess, width)
    direction, size = residual.clone(), residual.square().sum(1)
    for turn in range(MOST):
        if turn % CHECK == 0:
            going = size > limit[rows]
            if not bool(going.all()):  # who has converged leaves
                answer[rows[~going]] = here[~going]
                if not bool(going.any()):
                    return answer
                rows, here, residual, direction, size, across, down = (
                    each[going] for each in (rows, here, residual, direction, size, across, down)
                )
        image = direction - _neighbours(across, down, direction, width)
        # A row that converged since the last look would divide by nothing.
        step = (size / (direction * image).sum(1).clamp(min=1e-30))[:, None]
        here = here.addcmul(direction, step)
        residual = residual.addcmul_(image, step, value=-1)
        before, size = size, residual.square().sum(1)
        direction = direction.mul_((size / before.clamp(min=1e-30))[:, None]).add_(residual)
    answer[rows] = here
    return answer
