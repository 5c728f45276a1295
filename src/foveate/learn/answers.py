"""A sampler's own answers into a loss: REINFORCE on whole answers, with a baseline and an anchor.

    loss = -Σ log π(decision) · (reward - baseline) / answers  +  anchor · KL(π || start)  -  entropy · H(π)

The sums are over the decisions of an answer (`mask`), so that the gradient is that of the expected reward of whole
answers; with the leave-one-out baseline it is unbiased (`foveate.learn.baselines`). KL and entropy are exact at every
decision, summed over the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.learn.baselines import MovingAverage, leave_one_out, self_critical
from foveate.learn.policy_gradient import entropy_bonus, kl_penalty, masked_mean, policy_gradient
from foveate.types import Decisions, InputError, RewardOutput, Sampler, Tree, map_tree

Baseline = Literal["leave-one-out", "greedy", "moving-average", "none"]
Reward: TypeAlias = Callable[[Any, Any], RewardOutput]


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes:
        samples: answers to each input of a batch.
        baseline: what is subtracted from a reward: the mean of the other answers, that of the greedy answer, a moving
            average, or nothing.
        anchor: weight of the KL to the model as it was at the start, in nats of a whole answer.
        entropy: weight of the entropy, which is sought.
        epochs: updates on the answers of one batch; with more than one, give a `clip`.
        clip: of the importance ratio in later epochs (PPO).
        learning_rate: constant after the warm-up.
        warmup: steps over which it rises from 0.
    """

    samples: int = 8
    baseline: Baseline = "leave-one-out"
    anchor: float = 0.0
    entropy: float = 0.0
    epochs: int = 1
    clip: float | None = None
    learning_rate: float = 1e-5
    warmup: int = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be learned from.

        Raises:
            InputError: a number out of its range, or settings that do not go together.
        """
        for name in ("samples", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.baseline == "leave-one-out" and self.samples < 2:
            raise InputError(f"samples: found {self.samples}, but leave-one-out compares at least 2; try 8")
        if self.epochs > 1 and self.clip is None:
            raise InputError(f"clip: not given, but {self.epochs} epochs go far from the answers' own policy; try 0.2")


@dataclass(frozen=True)
class Scored:
    """Answers to a batch and what they are worth: what one update learns from. Carries no graph.

    Attributes:
        actions: the answers, `samples` to each input next to each other.
        behaviour: log-probability of their decisions under the model that gave them.
        output: their rewards.
        advantages: reward less baseline, [rows, 1].
    """

    actions: Tree
    behaviour: Float[Tensor, "rows time"]
    output: RewardOutput
    advantages: Float[Tensor, "rows 1"]


def score(
    policy: Sampler,
    reward: Reward,
    inputs: Tree,
    targets: Tree,
    keys: Int[Tensor, " batch"],
    tuning: Tuning,
    average: MovingAverage,
) -> Scored:
    """Let the model answer, and weigh its answers."""
    count = tuning.samples
    repeated = map_tree(lambda leaf: leaf.repeat_interleave(count, 0), targets)
    with torch.no_grad(), answering(policy):
        actions = policy.sample(inputs, count, False, keys)
        output = reward(policy.decode(actions), repeated)
        behaviour = _log_probs(policy(inputs, actions))
        group = torch.arange(len(keys), device=keys.device).repeat_interleave(count)
        if tuning.baseline == "leave-one-out":
            baseline = leave_one_out(output.total, group)
        elif tuning.baseline == "greedy":
            best = policy.decode(policy.sample(inputs, 1, True, keys))
            baseline = self_critical(output.total, reward(best, targets).total, group)
        else:
            value = average() if tuning.baseline == "moving-average" else torch.zeros(())
            baseline = value.to(output.total).expand(len(group), 1)
    return Scored(actions, behaviour, output, output.total[:, None] - baseline)


def reward_loss(
    decisions: Decisions,
    scored: Scored,
    anchor: Any | None,
    tuning: Tuning,
    mean: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of the top of this file, and what to log.

    Args:
        decisions: of the present model on the answers.
        scored: the answers and their advantages.
        anchor: the reference's distributions on them.
        tuning: how.
        mean: over processes.
    """
    log_probs, mask = _log_probs(decisions), decisions.mask
    assert mask is not None
    answers = mean(torch.tensor(float(len(mask)), device=mask.device))
    found = policy_gradient(log_probs, scored.behaviour, scored.advantages, mask, answers, tuning.clip)
    entropy = entropy_bonus(decisions.distribution, mask, answers)
    parts = {
        "reward": scored.output.total.mean(),
        "entropy": entropy.detach(),
        "length": mask.sum(1).float().mean(),
        "ratio": found.ratio_mean,
    }
    parts |= {f"part {name}": value.mean() for name, value in scored.output.parts.items()}
    loss = found.loss - tuning.entropy * entropy
    if anchor is not None:
        distance = kl_penalty(decisions.distribution, anchor, mask, answers)
        parts["kl"] = distance.detach()
        loss = loss + tuning.anchor * distance
    return loss, parts


def likelihood_loss(decisions: Decisions) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of a decision in nats: the first step, on the answers that people gave."""
    assert decisions.mask is not None
    return -masked_mean(_log_probs(decisions), decisions.mask)


@contextmanager
def answering(policy: nn.Module) -> Iterator[None]:
    """Dropout and batch statistics stand still, while answering and while learning from the answers alike."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def frozen(policy: Sampler) -> Sampler:
    """A copy that does not learn: the reference of an anchor."""
    reference = copy.deepcopy(policy).eval()
    return reference.requires_grad_(False)


def _log_probs(decisions: Decisions) -> Float[Tensor, "rows time"]:
    assert decisions.log_probs is not None
    return decisions.log_probs
