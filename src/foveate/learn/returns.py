"""What followed a decision: the numbers that weigh its log-probability.

The policy gradient theorem (Williams 1992, "Simple statistical gradient-following algorithms", theorem 1; Sutton et
al. 2000, "Policy gradient methods", theorem 1), for J = E[Σ_t r_t] over episodes sampled from the policy π:

    ∇J = E[ Σ_t ∇log π(a_t | s_t) · Ψ_t ]

Everything here is a choice of Ψ (Schulman et al. 2016, "High-dimensional continuous control using generalized
advantage estimation", equation 1). Signs: rewards and returns are to be *maximised*; `policy_gradient` turns them
into a loss.

Steps outside the mask give no reward, whatever their tensors hold (NaN included), and get the value 0. They may stand
anywhere in a row, and do not count as time: the discount of two decisions is γ to the number of decisions between them.
No result carries a graph.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.types import InputError


@torch.no_grad()
def episode_return(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], discount: float = 1.0
) -> Float[Tensor, "batch time"]:
    """Give every decision the return of its whole episode, R = Σ_k γ^k r_k. A row is one episode.

    The plain estimator: ∇E[R] = Σ_τ p(τ) ∇log p(τ) R(τ), and log p(τ) is Σ_t log π(a_t | s_t) plus terms without
    parameters (Williams 1992). Unbiased for the gradient of E[R], with its discount if there is one; of the largest
    variance, since decisions are praised for rewards that came before them.
    """
    return torch.where(mask, (_inside(rewards, mask) * _discounts(mask, discount)).sum(-1, keepdim=True), 0.0)


@torch.no_grad()
def reward_to_go(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], discount: float = 1.0
) -> Float[Tensor, "batch time"]:
    """Give every decision the rewards that followed it, G_t = Σ_{k ≥ t} γ^(k-t) r_k. A row is one episode.

    A decision does not change the rewards before it, and E[∇log π(a_t | s_t) · r_k] = 0 for k < t, since r_k is given
    with s_t and E_a[∇log π(a | s_t)] = ∇Σ_a π(a | s_t) = 0. Leaving them out keeps the expectation and takes their
    variance away (GPOMDP: Baxter and Bartlett 2001, "Infinite-horizon policy-gradient estimation", algorithm 1).
    Nothing is bootstrapped: what a limit cut off counts as 0.

    At discount 1 unbiased for ∇E[Σ r]. With a discount the variance of late rewards shrinks too, at the price of a
    bias: the expectation is E[Σ_t ∇log π(a_t | s_t) Q^γ(s_t, a_t)] over undiscounted visits, which is neither ∇E[Σ r]
    nor ∇E[Σ γ^t r] (Thomas 2014, "Bias in natural actor-critic algorithms").
    """
    inside = _inside(rewards, mask)
    if discount == 1.0:
        return torch.where(mask, inside.flip(-1).cumsum(-1).flip(-1), 0.0)
    ahead, found = torch.zeros_like(inside[:, 0]), []
    for reward, taken in zip(inside.flip(-1).unbind(-1), mask.flip(-1).unbind(-1), strict=True):
        ahead = torch.where(taken, reward + discount * ahead, ahead)
        found.append(ahead)
    return torch.where(mask, torch.stack(found, -1).flip(-1), 0.0)


@torch.no_grad()
def generalised_advantage(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    last_value: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    discount: float,
    lam: float,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """GAE: advantages Â_t = Σ_l (γλ)^l δ_{t+l}, with δ_t = r_t + γ V(s_{t+1}) - V(s_t), and the returns Â_t + V(s_t).

    Schulman et al. 2016, equations 11 to 16. λ = 0 trusts the critic (r + γV' - V), λ = 1 does not (G_t - V: unbiased
    at γ = 1 for any V). Between them: with Q^λ(s, a) = r + γ[(1-λ) V(s') + λ E_a' Q^λ(s', a')], the expectation is
    E[Σ_t ∇log π(a_t | s_t) (Q^λ - V)(s_t, a_t)]; biased for λ < 1 by as much as V is wrong, and for γ < 1 by the
    discount (see `reward_to_go`); unbiased for any λ if γ = 1 and V is exact.

    What comes after a row's last step is worth `last_value`, whether a limit cut the episode (truncated) or the rollout
    only looked no further (neither flag); after a terminated step nothing comes, and `last_value` is not read.

    A row may hold several episodes one after the other, if the inner ones terminated. An inner episode that was
    truncated needs the value of an observation that is no longer in the row: add discount · V(it) to the reward of its
    last step and mark that step as terminated.

    Args:
        rewards: r_t, the reward that followed each action.
        values: V(s_t), before each action.
        last_value: V after the last step of each row.
        mask: true where a step was taken.
        terminated: true where the task itself ended; wins over `truncated` at the same step.
        truncated: true where a limit cut the episode.
        discount: γ in [0, 1].
        lam: λ in [0, 1].

    Returns:
        The advantages, and the λ-returns that the critic is trained on; both 0 outside the mask.

    Raises:
        InputError: a truncated step has steps after it.
    """
    cut = truncated & ~terminated & mask
    if bool((cut & (mask.flip(-1).cumsum(-1).flip(-1) > 1)).any()):
        raise InputError(
            "truncated: found an episode that was truncated before the end of its row, expected the last of a row; "
            "add discount * value of its final observation to its last reward and mark that step as terminated"
        )
    ahead, after, found = torch.zeros_like(last_value), last_value, []
    for step in reversed(range(rewards.shape[1])):
        taken, ended, value = mask[:, step], terminated[:, step], values[:, step]
        error = rewards[:, step] + discount * torch.where(ended, 0.0, after) - value
        ahead = torch.where(taken, error + discount * lam * torch.where(ended, 0.0, ahead), ahead)
        after = torch.where(taken, value, after)
        found.append(ahead)
    advantages = torch.where(mask, torch.stack(found[::-1], -1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _inside(rewards: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, rewards, 0.0)


def _discounts(mask: Tensor, discount: float) -> Tensor:
    return discount ** (mask.cumsum(-1) - 1).clamp(min=0)
