"""Advantages into a loss: REINFORCE, importance ratios, PPO's clip, entropy, and KL to a reference.

Signs: `policy_gradient` and `kl_penalty` are to be *minimised*, an `entropy_bonus` is to be *maximised*:

    loss = policy_gradient(...).loss - 0.01 * entropy_bonus(...) + 0.05 * kl_penalty(...)

Every function sums over the steps inside the mask and divides by `count`, which says what is averaged:

- count = the number of *episodes*: the gradient is that of the expected return, ∇E[Σ_t r_t];
- count = the number of *steps* (the default: those of this very call): the same direction, shorter by the mean length
  of an episode. The length varies with the draw, which makes it a ratio of means, biased by O(1 / batch); and
  batches of long episodes get a smaller step.

A batch that is split into chunks, one backward pass each, must pass the count of the *whole* batch to each. Several
processes whose gradients are *averaged* (DistributedDataParallel, Accelerate) must pass the count over all of them
divided by their number; the average is then the sum over all steps of all processes divided by all of their counts.

Padding may hold anything, NaN and infinities included: the loss does not read it and its gradient with respect to
the log-probabilities there is exactly 0. (A network that computes NaN from its padding still makes NaN of that 0 on the
way back to its weights: observations must be finite.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.types import InputError

Count: TypeAlias = int | float | Tensor


@dataclass(frozen=True)
class Loss:
    """A loss, and what to watch while it goes down.

    Attributes:
        loss: to minimise; carries the graph.
        ratio_mean: mean of π / behaviour over the steps of this call; 1 before the first update, and near 1 after.
        clipped: share of the steps of this call whose gradient the clip cut off.
        kl: estimate of KL(behaviour || π) in nats a step (k3, see `kl_estimate`), to stop the epochs by.
    """

    loss: Float[Tensor, ""]
    ratio_mean: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def masked_mean(
    values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], count: Count | None = None
) -> Float[Tensor, ""]:
    """Sum over the steps inside the mask, divided by `count` (default: their number in this call, at least 1)."""
    return torch.where(mask, values, 0.0).sum() / (mask.sum().clamp(min=1) if count is None else count)


def policy_gradient(
    log_probs: Float[Tensor, "batch time"],
    behaviour: Float[Tensor, "batch time"] | None,
    advantages: Float[Tensor, "batch #time"],
    mask: Bool[Tensor, "batch time"],
    count: Count | None = None,
    clip: float | None = None,
) -> Loss:
    """Weigh the log-probabilities of what was done by how good it was. The loss is to minimise.

    - **REINFORCE** (`behaviour` None): -Σ log π(a_t | s_t) Â_t / count. Its value means nothing; its gradient is minus
      that of the expected return (Williams 1992, theorem 1), as unbiased as the advantages are, if the actions were
      sampled from the present policy.
    - **Importance ratio** (`behaviour` given, `clip` None): -Σ ρ_t Â_t / count with ρ_t = π(a_t | s_t) / b(a_t | s_t).
      Since E_b[ρ f] = E_π[f] and ∇ρ = ρ ∇log π, unbiased for ∇E_{a~π}[Â] *in the states that b visited*, so for the
      true gradient if there is one decision an episode, or while π = b, where it equals REINFORCE; elsewhere it
      leaves out how π changes the states visited (Schulman et al. 2015, "Trust region policy optimization",
      equations 3 and 4).
    - **PPO** (`behaviour` and `clip` ε): -Σ min(ρ_t Â_t, clip(ρ_t, 1-ε, 1+ε) Â_t) / count (Schulman et al. 2017,
      "Proximal policy optimization algorithms", equation 7; GRPO's too: Shao et al. 2024, "DeepSeekMath", equation 3).
      Biased: steps with ρ > 1+ε and Â > 0, or ρ < 1-ε and Â < 0, add nothing to the gradient; its expectation is
      E_b[ρ Â ∇log π · 1(not cut)], a pessimistic bound's gradient.

    Args:
        log_probs: log π(a | s) of the actions taken, with the graph.
        behaviour: the same under the policy that took them; no graph. The ratio is exactly 1 before the first update
            if both come from the same `forward` in the same mode.
        advantages: Â, positive where the action was better than expected; read without its graph. [batch, 1] gives
            every step of a row the same.
        mask: true where a decision was taken.
        count: what the sum is divided by (see the top of this file).
        clip: ε > 0.

    Raises:
        InputError: a clip is given without the behaviour's log-probabilities.
    """
    weights = torch.where(mask, advantages.detach(), 0.0)
    if behaviour is None:
        if clip is not None:
            raise InputError(
                f"clip: found {clip} without behaviour, expected the log-probabilities of the policy that acted; "
                "pass them as behaviour, or clip=None"
            )
        loss = -masked_mean(log_probs * weights, mask, count)
        zero = torch.zeros_like(loss.detach())
        return Loss(loss, ratio_mean=zero + 1, clipped=zero, kl=zero)
    # The mask goes before exp: behind it, the gradient at a padding of NaN would be 0 * exp(NaN).
    logs = torch.where(mask, log_probs - behaviour.detach(), 0.0)
    ratio = logs.exp()
    surrogate, cut = ratio * weights, torch.zeros_like(mask)
    if clip is not None:
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - clip, 1 + clip) * weights)
        cut = ((ratio > 1 + clip) & (weights > 0)) | ((ratio < 1 - clip) & (weights < 0))
    return Loss(
        -masked_mean(surrogate, mask, count),
        ratio_mean=masked_mean(ratio.detach(), mask),
        clipped=masked_mean(cut.to(ratio.dtype), mask),
        kl=masked_mean(torch.expm1(logs.detach()) - logs.detach(), mask),
    )


def entropy_bonus(distribution: Any, mask: Bool[Tensor, "batch time"], count: Count | None = None) -> Float[Tensor, ""]:
    """Σ H(π(· | s_t)) / count, exact, in nats: to be *maximised*, so it is subtracted from a loss.

    Keeps a policy from settling before it has looked around (Williams and Peng 1991, "Function optimization using
    connectionist reinforcement learning algorithms"; Mnih et al. 2016, "Asynchronous methods for deep reinforcement
    learning", section 4). A regulariser: the policy it leads to is not the one of the largest return. Its gradient is
    exact in the states visited, and leaves out how π changes which states these are.

    Args:
        distribution: a `foveate.types.Distribution`, with the graph.
        mask: true where a decision was taken.
        count: what the sum is divided by.
    """
    return masked_mean(distribution.entropy(), mask, count)


def kl_penalty(
    distribution: Any, reference: Any, mask: Bool[Tensor, "batch time"], count: Count | None = None
) -> Float[Tensor, ""]:
    """Σ KL(π(· | s_t) || reference(· | s_t)) / count, exact, in nats: to be *minimised*, so it is added to a loss.

    The anchor of a tuned model (Jaques et al. 2017, "Sequence tutor"; Ziegler et al. 2019, "Fine-tuning language
    models from human preferences", equation 2). With states sampled from π and count = episodes its value is unbiased
    for the KL of whole episodes (chain rule). Its gradient is exact in the states visited, and biased for that KL's,
    since it leaves out how π changes which states these are; taking log(π / reference) off the rewards does not.

    Args:
        distribution: π, a `foveate.types.Distribution`, with the graph.
        reference: one of the same kind, without.
        mask: true where a decision was taken.
        count: what the sum is divided by.
    """
    return masked_mean(distribution.kl(reference), mask, count)


def kl_estimate(
    log_probs: Float[Tensor, "batch time"],
    reference_log_probs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Estimate KL(π || reference) of each step from the action taken alone, where there is no exact form: k3 >= 0.

    k3 = r - 1 - log r with r = reference(a) / π(a) (Schulman 2020, "Approximating KL divergence"; GRPO: Shao et al.
    2024, equation 4). Actions sampled from π give E[-log r] = KL and E[r - 1] = 0, so that it is unbiased (unless π
    never takes what the reference may take), and the second term takes variance off; never below 0: log r <= r - 1.

    The *gradient* of its mean is not that of KL(π || reference): E_π[∇k3] = E_π[(1 - r) ∇log π] = ∇KL(reference || π),
    the other way round, with the same minimum and the same second derivative there. For the gradient of
    KL(π || reference), take β · log(π / reference), without its graph, off the rewards, or use `kl_penalty`.

    Args:
        log_probs: of the actions taken, under π.
        reference_log_probs: the same under the reference.
        mask: give it if the padding may hold NaN or infinities; the estimate and its gradient are 0 there.
    """
    logs = reference_log_probs - log_probs
    logs = logs if mask is None else torch.where(mask, logs, 0.0)
    return torch.expm1(logs) - logs
