"""How generated images lie beside real ones: what a reward that is hunted does not look at.

They work on features [images, width] that a classifier sees; which one is the caller's choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frechet_distance(
    found: Float[Tensor, "images features"], wanted: Float[Tensor, "others features"]
) -> Float[Tensor, ""]:
    """Squared Fréchet distance of two Gaussians fitted to features: |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½).

    Heusel et al. 2017, "GANs trained by a two time-scale update rule" (FID, there in Inception's features). In float64.
    Biased upwards, the more so the fewer images: compare equal numbers only.
    """
    means, covariances = zip(*(_moments(features.double()) for features in (found, wanted)), strict=True)
    # Tr (Σ₁ Σ₂)^½ = Tr (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * shared).clamp(min=0)


def diversity(features: Float[Tensor, "images features"], group: Int[Tensor, " images"]) -> Float[Tensor, ""]:
    """Mean distance between two images of a group in features, the mean over groups of two or more; 0: all alike."""
    distances = torch.cdist(features.double(), features.double())
    same = group[:, None] == group
    sizes = same.sum(1).double()
    mean = (distances * same).sum(1) / (sizes - 1).clamp(min=1)  # of each image to the others of its group
    weight = torch.where(sizes > 1, 1 / sizes, 0.0)  # so that each group counts once
    return (weight * mean).sum() / weight.sum().clamp(min=1e-12)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / max(1, len(features) - 1)
