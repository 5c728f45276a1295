"""Distributions over actions: drawn with keys instead of a hidden generator, and trees, so that steps can be joined.

All have a batch of shape [batch, time] (or any other) in front and agree with torch.distributions, which tests hold
them against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from foveate import noise


@dataclass(frozen=True)
class Categorical:
    """One of K actions, from logits [..., K]; an action that is not allowed has the logit -inf."""

    logits: Float[Tensor, "*batch choices"]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Draw by inversion of the distribution function, with two draws a row whatever the number of choices."""
        draws = noise.uniform(keys, 2).double()
        draw = draws[..., 0] + (draws[..., 1] - 0.5) * 2.0**-23  # 23 bits and 23 more, for choices that are rare
        below = self.logits.detach().double().softmax(-1).cumsum(-1)
        return torch.searchsorted(below, (draw * below[..., -1])[..., None], right=True).squeeze(-1)

    def mode(self) -> Int[Tensor, "*batch"]:
        """The most likely action."""
        return self.logits.detach().argmax(-1)

    def log_prob(self, actions: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Log-probability in nats."""
        return self.logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """-Σ p log p, where 0 log 0 = 0."""
        logs = self.logits.log_softmax(-1)
        return -(logs.exp() * logs.masked_fill(logs.isneginf(), 0.0)).sum(-1)

    def kl(self, other: Categorical) -> Float[Tensor, "*batch"]:
        """Σ p (log p - log q)."""
        logs, others = self.logits.log_softmax(-1), other.logits.log_softmax(-1)
        return (logs.exp() * (logs - others).masked_fill(logs.isneginf(), 0.0)).sum(-1)


@dataclass(frozen=True)
class Bernoulli:
    """Yes or no, from the finite logit of yes [...]; actions are bool."""

    logits: Float[Tensor, "*batch"]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        """Draw with one number of 23 bits."""
        return noise.uniform(keys) < self.logits.detach().sigmoid()

    def mode(self) -> Bool[Tensor, "*batch"]:
        """Yes where its probability is above 1/2."""
        return self.logits.detach() > 0

    def log_prob(self, actions: Bool[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Log-probability in nats: minus the binary cross-entropy."""
        return functional.logsigmoid(torch.where(actions, self.logits, -self.logits))

    def entropy(self) -> Float[Tensor, "*batch"]:
        """-p log p - (1 - p) log(1 - p)."""
        return functional.softplus(self.logits) - self.logits * self.logits.sigmoid()

    def kl(self, other: Bernoulli) -> Float[Tensor, "*batch"]:
        """p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))."""
        further = functional.softplus(other.logits) - functional.softplus(self.logits)
        return self.logits.sigmoid() * (self.logits - other.logits) + further


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers around a mean [..., D]; `std` broadcasts against it.

    The density is that of the number as drawn: what clamps or rounds it is the environment's business.
    """

    mean: Float[Tensor, "*batch dimensions"]
    std: Float[Tensor, "..."]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dimensions"]:
        """Draw mean + std · ε."""
        return self.mean.detach() + self.std.detach() * noise.normal(keys, self.mean.shape[-1])

    def mode(self) -> Float[Tensor, "*batch dimensions"]:
        """The mean."""
        return self.mean.detach()

    def log_prob(self, actions: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch"]:
        """Log-density, summed over dimensions."""
        scaled = (actions - self.mean) / self.std
        return -(scaled.square() / 2 + self.std.log() + math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Differential entropy, summed over dimensions."""
        return (self.std.log() + (1 + math.log(2 * math.pi)) / 2).expand_as(self.mean).sum(-1)

    def kl(self, other: Gaussian) -> Float[Tensor, "*batch"]:
        """Σ log(σ₂/σ₁) + (σ₁² + (μ₁ - μ₂)²) / 2σ₂² - 1/2."""
        spread = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return ((spread + distance - 1 - spread.log()) / 2).sum(-1)


@dataclass(frozen=True)
class Uniform:
    """Independent numbers, even between `low` and `high` [..., D]; where these are equal, a point of certainty."""

    low: Float[Tensor, "*batch dimensions"]
    high: Float[Tensor, "*batch dimensions"]

    def sample(self, keys: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dimensions"]:
        """Draw low + u (high - low)."""
        low, high = self.low.detach(), self.high.detach()
        return low + (high - low) * noise.uniform(keys, low.shape[-1])

    def mode(self) -> Float[Tensor, "*batch dimensions"]:
        """The middle, since no place is likelier than another."""
        return (self.low + self.high).detach() / 2

    def log_prob(self, actions: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch"]:
        """Log-density: minus the log of the width, summed; -inf outside; 0 at a point of certainty."""
        width = self.high - self.low
        density = -torch.where(width > 0, width, 1.0).log()
        inside = (actions >= self.low) & (actions <= self.high)
        return density.masked_fill(~inside, -torch.inf).sum(-1)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Log of the width, summed; 0 at a point of certainty."""
        width = self.high - self.low
        return torch.where(width > 0, width, 1.0).log().sum(-1)

    def kl(self, other: Uniform) -> Float[Tensor, "*batch"]:
        """Difference of the log-widths where `other` covers self; infinite elsewhere, and of a point in an interval."""
        covered = ((other.low <= self.low) & (self.high <= other.high)).all(-1)
        covered &= ((self.low < self.high) | (other.low == other.high)).all(-1)
        return (other.entropy() - self.entropy()).masked_fill(~covered, torch.inf)
