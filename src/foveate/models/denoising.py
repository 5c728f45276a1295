"""The Gaussian steps of a denoising chain, from the schedulers of diffusers.

A step draws x' ~ N(μ, σ²) with μ = image · x₀ + noise · ε + state · x: x₀ and ε are what the network makes of the
noisy x, the rest is a table. Ho et al. 2020, "Denoising diffusion probabilistic models", equation 7; Song et al. 2021,
"Denoising diffusion implicit models", equations 12 and 16. The tests hold it against `scheduler.step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.distributions import Gaussian
from foveate.types import InputError

LEAST_STD = 1e-6  # a smaller one is rounding: the step is certain, and no decision
KINDS = ("DDIMScheduler", "DDPMScheduler")
FIXED = ("fixed_small", "fixed_small_log", "fixed_large")


@dataclass(frozen=True)
class Steps:
    """What a chain does at each of its steps.

    Attributes:
        times: of the noise, as the network is told them, falling.
        alpha: share of the image's variance in x, ᾱ.
        image: what the mean takes of the clean image, x₀.
        noise: of the noise, ε.
        state: of x itself.
        std: σ; 0 where a step is certain.
        target: what the network predicts: "epsilon", "sample" or "v_prediction".
        clip: x₀ is kept within ± this; None: it is not.
        quantile: of |x₀| at which x₀ is cut and scaled instead (dynamic thresholding, Saharia et al. 2022); None: it is
            not.
        most: the largest such quantile.
    """

    times: Int[Tensor, " time"]
    alpha: Float[Tensor, " time"]
    image: Float[Tensor, " time"]
    noise: Float[Tensor, " time"]
    state: Float[Tensor, " time"]
    std: Float[Tensor, " time"]
    target: str
    clip: float | None = None
    quantile: float | None = None
    most: float = 1.0

    def mean(
        self, output: Float[Tensor, "rows time *shape"], x: Float[Tensor, "rows time *shape"], steps: slice
    ) -> Float[Tensor, "rows time *shape"]:
        """Mean of what comes after x, from what the network makes of it, at these steps."""
        alpha, image, noise, state = (
            column[steps].to(x.device).view(1, -1, *(1,) * (x.ndim - 2))
            for column in (self.alpha, self.image, self.noise, self.state)
        )
        clean, blur = clean_and_noise(output, x, alpha, self.target)
        if self.quantile is not None:
            sizes = clean.abs().flatten(2).quantile(self.quantile, dim=2).clamp(1, max(1.0, self.most))
            sizes = sizes.view(*sizes.shape, *(1,) * (x.ndim - 2))
            clean = clean.clamp(-sizes, sizes) / sizes
        elif self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        return image * clean + noise * blur + state * x


@dataclass(frozen=True)
class GaussianStep(Gaussian):
    """Many pixels around their means with one σ a step, [rows, time, pixels] and [rows or 1, time, 1].

    Log-probabilities are sums over pixels; a mean would be that of another, far flatter distribution. They are summed
    in float64: of a large image they are some 10⁴ nats, of which float32 loses what a ratio is made of.
    """

    def log_prob(self, actions: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch"]:
        """Log-density in nats, summed over pixels."""
        scaled = ((actions - self.mean) / self.std).square().sum(-1, dtype=torch.float64)
        constant = self.std.squeeze(-1).double().log() + math.log(2 * math.pi) / 2
        return -(scaled / 2 + self.mean.shape[-1] * constant)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Differential entropy in nats: the same for all pixels."""
        each = self.std.squeeze(-1).log() + (1 + math.log(2 * math.pi)) / 2
        return (self.mean.shape[-1] * each).expand(self.mean.shape[:-1])

    def kl(self, other: Gaussian) -> Float[Tensor, "*batch"]:
        """Exact: Σ (μ₁ - μ₂)² / 2σ² over pixels, as the table gives both the same σ."""
        return ((self.mean - other.mean) / self.std).square().sum(-1) / 2


def gaussian_steps(scheduler: Any, count: int, eta: float = 1.0) -> Steps:
    """The table of `count` steps of a scheduler of diffusers.

    Args:
        scheduler: a `DDIMScheduler` or a `DDPMScheduler`.
        count: steps from noise to image.
        eta: how random DDIM's steps are: 1 as DDPM's. With 0 nothing is decided, and the table is that of certain steps
            of DDIM, whatever the scheduler: what a chain is without chance.

    Raises:
        InputError: a scheduler of another kind, one of a variance that the network learns, a count it has no times for.
    """
    kind = type(scheduler).__name__
    if kind not in KINDS:
        raise InputError(
            f"scheduler: found {kind}, with no Gaussian steps, expected {' or '.join(KINDS)}; add --scheduler ddim"
        )
    config = scheduler.config
    if not 1 <= count <= config.num_train_timesteps:
        raise InputError(
            f"denoising: found {count} steps, expected 1 to {config.num_train_timesteps}, those of training"
        )
    scheduler.set_timesteps(count)
    times = scheduler.timesteps.long()
    ddpm = kind == "DDPMScheduler"
    if ddpm and config.variance_type not in FIXED:
        raise InputError(f"scheduler: its variance is {config.variance_type!r}, expected one of {', '.join(FIXED)}")
    before = torch.tensor(
        [int(scheduler.previous_timestep(t)) if ddpm else int(t) - config.num_train_timesteps // count for t in times]
    )
    last = 1.0 if ddpm else float(scheduler.final_alpha_cumprod)
    alphas = scheduler.alphas_cumprod.double()
    alpha = alphas[times]
    after = torch.where(before >= 0, alphas[before.clamp(min=0)], last)
    beta = (1 - alpha / after).clamp(min=0)  # of this step
    variance = (1 - after) / (1 - alpha) * beta
    if ddpm and eta:
        variance = torch.where(
            times > 0, beta if config.variance_type == "fixed_large" else variance.clamp(min=1e-20), 0
        )
        image, noise = after.sqrt() * beta / (1 - alpha), torch.zeros_like(alpha)
        state = (alpha / after).sqrt() * (1 - after) / (1 - alpha)
    else:
        variance = eta**2 * variance
        image, noise, state = after.sqrt(), (1 - after - variance).clamp(min=0).sqrt(), torch.zeros_like(alpha)
    std = torch.where(variance.sqrt() > LEAST_STD, variance.sqrt(), 0.0)
    cut = config.thresholding
    return Steps(
        times,
        alpha.float(),
        image.float(),
        noise.float(),
        state.float(),
        std.float(),
        config.prediction_type,
        float(config.clip_sample_range) if config.clip_sample and not cut else None,
        float(config.dynamic_thresholding_ratio) if cut else None,
        float(config.sample_max_value),
    )


def clean_and_noise(output: Tensor, x: Tensor, alpha: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a network sees in x, by what it predicts."""
    signal, blur = alpha.sqrt(), (1 - alpha).sqrt()
    if target == "epsilon":
        return (x - blur * output) / signal, output
    if target == "sample":
        return output, (x - signal * output) / blur
    return signal * x - blur * output, signal * output + blur * x


def target_of(image: Tensor, noise: Tensor, alpha: Tensor, target: str) -> Tensor:
    """What the network is to predict of an image with so much noise."""
    if target == "epsilon":
        return noise
    return image if target == "sample" else alpha.sqrt() * noise - (1 - alpha).sqrt() * image
