"""What is subtracted from a return, so that a decision is praised for being better than expected.

Why it is free: E_a[∇log π(a | s) · b] = b ∇Σ_a π(a | s) = 0 for every b that does not depend on the action a (Williams
1992, section 4). A baseline changes no expectation, only the variance; one that looks at the sample it is subtracted
from changes both.

    advantages = reward_to_go(rewards, mask) - baseline          # no baseline: 0

| baseline | gradient |
|---|---|
| `MovingAverage` of earlier batches | unbiased, if updated after use |
| learned value (`value_loss`) | unbiased for any value that does not read the action |
| `leave_one_out` of the other samples of an input | unbiased |
| `self_critical`: the greedy answer's score | unbiased |
| `group_mean`, with the sample itself | (n-1)/n of the gradient |
| `group_normalised`, divided by the standard deviation | biased, see there |

`group` names the input of which a row is a sample: integer ids in any order. All samples of an input must be in the
tensor: a group that is split over processes or chunks is two groups. Results are [batch, 1], to broadcast over time.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.learn.policy_gradient import Count, masked_mean
from foveate.types import InputError

_SMALLEST_STD = 1e-4  # as in TRL: keeps the rounding error of a group of equal scores from becoming an advantage


class MovingAverage(nn.Module):
    """Exponential moving average of the scores of earlier batches: one number for all.

    The first k batches weigh as in an average without a beginning (Kingma and Ba 2015, "Adam", section 3); before the
    first it is 0. Unbiased *only* because it knows no score it is subtracted from: call, then `update`.

        advantages = scores[:, None] - baseline()
        baseline.update(scores)

    A module without parameters: its two numbers go with the checkpoint (`state_dict`) and to the device. With several
    processes, update it with the scores of all of them, or each has its own.

    Args:
        decay: share of the old average in the new one, in [0, 1); remembers about 1 / (1 - decay) batches.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"decay: found {decay}, expected a number in [0, 1); 0.9 remembers about ten batches")
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self) -> Float[Tensor, ""]:
        """The average so far."""
        return self.mean / self.weight.clamp(min=1e-12)

    @torch.no_grad()
    def update(self, scores: Float[Tensor, " batch"]) -> None:
        """Take a batch of scores in, after their advantages were computed."""
        self.mean.lerp_(scores.mean().to(self.mean), 1 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)


def value_loss(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    count: Count | None = None,
) -> Float[Tensor, ""]:
    """Σ (V(s_t) - R_t)² / count over the steps inside the mask: to be *minimised*, by V = E[R_t | s_t].

    That value is close to the baseline of least variance (Greensmith et al. 2004, "Variance reduction techniques for
    gradient estimates in reinforcement learning"). Unbiased for the gradient of the expected squared error, if the
    returns bootstrap nothing; they are read without their graph. As a baseline, subtract the values *detached*. The
    module `policy_gradient` says what `count` makes of it; padding never leaks.
    """
    return masked_mean(torch.where(mask, values - returns.detach(), 0.0).square(), mask, count)


def leave_one_out(scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """Mean score of the *other* samples of the same input, b_i = Σ_{j ≠ i} R_j / (n-1).

    RLOO (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; before it Mnih and Rezende 2016,
    "Variational inference for Monte Carlo objectives"). Unbiased: the others were drawn independently of a_i.
    R_i - b_i is n/(n-1) of R_i - `group_mean`.

    Raises:
        InputError: a group has one row only.
    """
    total, size, _ = _statistics(scores, group)
    _require_two(size, group, "leave_one_out")
    return ((total - scores) / (size - 1))[:, None]


def group_mean(scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """Mean score of the samples of the same input, b_i = Σ_j R_j / n, the sample itself included.

    Biased by its own share R_i / n of the baseline: E[(R_i - b_i) ∇log π(a_i)] = (n-1)/n · ∇E[R]. The direction is
    right and the length is short, which a learning rate hides if all groups are of one size.
    """
    total, size, _ = _statistics(scores, group)
    return (total / size)[:, None]


def group_normalised(scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """*Advantages*, not a baseline: Â_i = (R_i - mean) / (std + 1e-4) over the samples of the same input.

    GRPO (Shao et al. 2024, "DeepSeekMath", section 4.1.2), with the standard deviation over n - 1 and the small
    constant of TRL. Positive for what is better than the mean. A group of equal scores gets 0.

    Biased, in three ways: (n-1)/n as in `group_mean`; the std is a function of the sample it divides; and an input is
    weighed by 1 / std, so what is climbed is not E[R]. For scores of 0 or 1 with success rate p and k successes in a
    group, E[Â ∇log π] = ∇p / (p (1-p)) · E[k (n-k) / n² / (std_k + 1e-4)], which tends to ∇p / √(p (1-p)) for large n:
    the gradient of 2 arcsin √p. Inputs that are nearly always or hardly ever solved count for more than in ∇E[R] (Liu
    et al. 2025, "Understanding R1-Zero-like training", section 3.1).

    Raises:
        InputError: a group has one row only.
    """
    total, size, rows = _statistics(scores, group)
    _require_two(size, group, "group_normalised")
    centred = scores - total / size
    deviation = (_sums(centred.square(), rows) / (size - 1)).sqrt()
    return (centred / (deviation + _SMALLEST_STD))[:, None]


def reward_weights(
    scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"], temperature: float
) -> Float[Tensor, " batch"]:
    """*Weights* of examples, not advantages: exp(Â / temperature) of the normalised advantage, with the mean 1.

    Reward-weighted regression (Peters and Schaal 2007; for denoisers Black et al. 2023, section 4.1): own answers are
    learned as if they were given, the better ones more. No weight is negative: nothing is made less likely but
    by what is made more likely.
    """
    return (group_normalised(scores, group).squeeze(1) / temperature).softmax(0) * len(scores)


def self_critical(
    scores: Float[Tensor, " batch"], greedy_scores: Float[Tensor, " inputs"], group: Int[Tensor, " batch"]
) -> Float[Tensor, "batch 1"]:
    """Score of the greedy answer to the same input: b_i = greedy_scores[group_i], like `scores` in device and dtype.

    SCST (Rennie et al. 2017, "Self-critical sequence training for image captioning", section 3): what is better than
    the answer that would be given in use is made likelier. Unbiased: the greedy answer is no function of the sample.
    Costs one more decoding, and has more variance than the mean where the greedy score is far from it.

    Args:
        scores: of the sampled answers.
        greedy_scores: of the greedy answer to input 0, 1, 2, ...
        group: which of these inputs a row answers.

    Raises:
        InputError: a group id has no greedy score.
    """
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < len(greedy_scores):
        raise InputError(
            f"group: found ids from {int(group.min())} to {int(group.max())}, expected 0 to {len(greedy_scores) - 1}, "
            "the rows of greedy_scores; number the inputs of a batch from 0"
        )
    return greedy_scores.to(scores)[group][:, None]


def _statistics(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the sum and the size of its group, and the group's rank among the ids."""
    rows = group.unique(return_inverse=True)[1]
    return _sums(scores, rows), _sums(torch.ones_like(scores), rows), rows


def _sums(values: Tensor, rows: Tensor) -> Tensor:
    return torch.zeros_like(values).index_add(0, rows, values)[rows]


def _require_two(size: Tensor, group: Tensor, name: str) -> None:
    if bool((size < 2).any()):
        raise InputError(
            f"group: found one row alone in group {int(group[size.argmin()])}, expected at least two samples of each "
            f"input for {name}; draw more samples of an input, or take another baseline"
        )
