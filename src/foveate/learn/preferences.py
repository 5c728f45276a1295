"""Which of two is better, into a score: Bradley and Terry's model of comparisons, and how sure it is.

    P(left is preferred) = σ(score(left) - score(right))

Bradley and Terry 1952, "Rank analysis of incomplete block designs"; as a learned reward, Christiano et al. 2017, "Deep
reinforcement learning from human preferences" (arXiv 1706.03741). A preference is a number in [0, 1]: 1 if the
left one was preferred, 0 if the right one was, 1/2 for a tie, which is half a vote for each. Only differences of scores
are determined: adding a number to all scores changes nothing here.

Several members that saw other resamples of the comparisons disagree where these say little: that is the uncertainty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate import noise

LEFT, RIGHT, TIE = 1.0, 0.0, 0.5


def chances(
    left: Float[Tensor, "*members pairs"], right: Float[Tensor, "*members pairs"]
) -> Float[Tensor, "*members pairs"]:
    """The probability that the left one is preferred, from the scores of both."""
    return torch.sigmoid(left - right)


def bradley_terry_loss(
    left: Float[Tensor, "*members pairs"],
    right: Float[Tensor, "*members pairs"],
    preferences: Float[Tensor, " pairs"],
    weights: Float[Tensor, "*#members pairs"] | None = None,
) -> Float[Tensor, " *members"]:
    """Mean negative log-likelihood of the comparisons in nats, for each member.

        -[y log σ(d) + (1 - y) log σ(-d)],   d = score(left) - score(right)

    With scores w·x this is logistic regression, without an intercept, of y on x(left) - x(right).

    Args:
        left: scores of the left ones.
        right: scores of the right ones.
        preferences: y, in [0, 1].
        weights: how often a pair counts, e.g. `bootstrap_counts`; the mean is over their sum. None: once each.
    """
    difference = left - right
    losses = F.binary_cross_entropy_with_logits(difference, preferences.expand_as(difference), reduction="none")
    if weights is None:
        return losses.mean(-1)
    return (weights * losses).sum(-1) / weights.sum(-1).clamp(min=1)


def bootstrap_counts(key: Int[Tensor, ""], members: int, pairs: int) -> Float[Tensor, "members pairs"]:
    """How often each pair is in each member's resample: as many draws with replacement as there are pairs."""
    drawn = noise.integers(noise.fold(key, torch.arange(members, device=key.device)), pairs, pairs)
    counts = torch.zeros(members, pairs, device=key.device)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def accuracy(probabilities: Float[Tensor, " pairs"], preferences: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """The share of comparisons whose preferred one was thought the likelier. Ties do not count; a 1/2 is half right.

    Without any comparison that is not a tie: 1/2.
    """
    decided = preferences != TIE
    if not decided.any():
        return torch.full_like(probabilities.sum(), 0.5)
    found, wanted = probabilities[decided], preferences[decided]
    right = torch.where(found == 0.5, 0.5, ((found > 0.5) == (wanted > TIE)).float())
    return right.mean()


def calibration_error(
    probabilities: Float[Tensor, " pairs"], preferences: Float[Tensor, " pairs"], bins: int = 5
) -> Float[Tensor, ""]:
    """Expected calibration error, in [0, 1]: by how much probabilities differ from how often they came true.

    If p is the probability of "left is preferred" and y the answer, a calibrated model has E[y | p] = p for every p,
    and its error is E|E[y | p] - p| = 0. Comparisons are finitely many, so p is known only up to a bin B (Naeini et al.
    2015, "Obtaining well calibrated probabilities using Bayesian binning"):

        Σ_B  |B| / n · | mean of y in B - mean of p in B |

    Which of two stands left is chance, and exchanging them turns (p, y) into (1 - p, 1 - y). So each pair is turned
    until its p is at least 1/2 (where p is 1/2, both ways count half, and y is 1/2), and the bins go from 1/2 to 1.
    Always saying 1/2 is calibrated, and useless: read it beside the accuracy. Of few comparisons it is biased upwards,
    as |mean of y - p| of a calibrated bin is about √(p (1 - p) / |B|).

    Args:
        probabilities: p.
        preferences: y, in [0, 1]; a tie is 1/2.
        bins: how many, of equal width.
    """
    sure = torch.maximum(probabilities, 1 - probabilities)
    true = torch.where(probabilities > 0.5, preferences, 1 - preferences)
    true = torch.where(probabilities == 0.5, 0.5, true)
    place = ((sure - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, device=sure.device).index_add_(0, place, true - sure)
    return gaps.abs().sum() / max(1, len(sure))


def information(probabilities: Float[Tensor, "members pairs"]) -> Float[Tensor, " pairs"]:
    """What an answer would tell about which member is right, in nats, from 0 to log 2: their disagreement.

        H(mean p) - mean H(p)

    The mutual information of answer and member (Houlsby et al. 2011, "Bayesian active learning for classification and
    preference learning", arXiv 1112.5745). It is 0 where all say the same, be it that they do not know: asking there
    would be asking about noise. Christiano et al. take the variance of the members, which grows alike.
    """
    return (_entropy(probabilities.mean(0)) - _entropy(probabilities).mean(0)).clamp(min=0)


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities) - torch.xlogy(1 - probabilities, 1 - probabilities)
