"""A sampler's own answers into a loss: REINFORCE on whole answers, with a baseline and an anchor.

    loss = -Σ log π(decision) · (reward - baseline) / answers  +  anchor · KL(π || start)  -  entropy · H(π)

The sums are over the decisions of an answer (`mask`), so that the gradient is that of the expected reward of whole
answers; with the leave-one-out baseline it is unbiased (`foveate.learn.baselines`). KL and entropy are exact at every
decision, summed over the answer.

Where the reward says what each decision was worth (`credit`), each is weighed by its own share, if decisions do not
depend on each other, or by that and all after it, if they do. That leaves the expectation and takes away the noise of
the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.learn.baselines import MovingAverage, leave_one_out, self_critical, value_loss
from foveate.learn.policy_gradient import entropy_bonus, kl_penalty, masked_mean, policy_gradient
from foveate.types import Decisions, InputError, RewardOutput, Sampler, Tree, map_tree

T = TypeVar("T")
Baseline = Literal["leave-one-out", "greedy", "moving-average", "learned", "none"]
Credit = Literal["answer", "to-go", "difference", "flip"]
Precision = Literal["fp32", "bf16"]
Reward: TypeAlias = Callable[[Any, Any], RewardOutput]


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes:
        samples: answers to each input of a batch.
        baseline: what is subtracted from a reward: the mean of the other answers, that of the greedy answer, a moving
            average, the model's own expectation (`values` of its decisions), or nothing.
        credit: what a decision is weighed by. "answer": the reward of the whole answer, less the baseline. The others
            take the reward's `credit` [rows, time]. "to-go": what this decision and those after it gained, if the
            credits sum to the reward, less the mean of that over the other answers. "difference" and "flip" are for
            decisions that are independent of each other: how much more the answer is worth than without the decision,
            less the mean of that over the other answers; how much more than with the other of two choices, times the
            probability of that choice.
        anchor: weight of the KL to the model as it was at the start, in nats of a whole answer.
        entropy: weight of the entropy, which is sought.
        epochs: updates on the answers of one batch; with more than one, give a `clip`.
        clip: of the importance ratio in later epochs (PPO).
        learning_rate: constant after the warm-up.
        warmup: steps over which it rises from 0.
        anneal: the learning rate falls evenly to 0 at the end of the phase, which leaves less noise in the weights.
        chunk: inputs to a backward pass, if a batch is too large for the memory; the gradient is the same.
        precision: "bf16" runs the model in mixed precision; rewards and losses stay in fp32.
    """

    samples: int = 8
    baseline: Baseline = "leave-one-out"
    anchor: float = 0.0
    entropy: float = 0.0
    epochs: int = 1
    clip: float | None = None
    learning_rate: float = 1e-5
    warmup: int = 20
    anneal: bool = False
    credit: Credit = "answer"
    chunk: int | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Refuse what cannot be learned from.

        Raises:
            InputError: a number out of its range, or settings that do not go together.
        """
        for name in ("samples", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk: found {self.chunk}, expected at least 1 input; leave it out for all at once")
        compares = self.credit in ("to-go", "difference") or (
            self.credit == "answer" and self.baseline == "leave-one-out"
        )
        if compares and self.samples < 2:
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
        advantages: reward less baseline, [rows, 1], or one for each decision.
    """

    actions: Tree
    behaviour: Float[Tensor, "rows time"]
    output: RewardOutput
    advantages: Float[Tensor, "rows #time"]


def score(
    policy: Sampler,
    reward: Reward,
    inputs: Tree,
    targets: Tree,
    keys: Int[Tensor, " batch"],
    tuning: Tuning,
    average: MovingAverage,
) -> Scored:
    """Let the model answer, and weigh its answers.

    Raises:
        InputError: the reward gives no credit, or the model no values, where the settings ask for them.
    """
    count = tuning.samples
    with torch.no_grad(), answering(policy, tuning.precision):
        actions = policy.sample(inputs, count, False, keys)
        output = reward(policy.decode(actions), repeat(targets, count))
        decisions = policy(inputs, actions)
        behaviour = _log_probs(decisions)
        if tuning.credit != "answer":
            return Scored(actions, behaviour, output, _own(output, behaviour, tuning))
        group = torch.arange(len(keys), device=keys.device).repeat_interleave(count)
        if tuning.baseline == "leave-one-out":
            baseline = leave_one_out(output.total, group)
        elif tuning.baseline == "greedy":
            best = policy.decode(policy.sample(inputs, 1, True, keys))
            baseline = self_critical(output.total, reward(best, targets).total, group)
        elif tuning.baseline == "learned":
            baseline = _values(decisions)
        else:
            value = average() if tuning.baseline == "moving-average" else torch.zeros(())
            baseline = value.to(output.total).expand(len(group), 1)
    return Scored(actions, behaviour, output, output.total[:, None] - baseline)


def _own(output: RewardOutput, behaviour: Tensor, tuning: Tuning) -> Float[Tensor, "rows time"]:
    """Advantages from the credit of single decisions."""
    credit = output.credit
    if credit is None or credit.shape != behaviour.shape:
        found = "none" if credit is None else list(credit.shape)
        raise InputError(
            f"credit: {tuning.credit!r} asks the reward for one of {list(behaviour.shape)}, found {found}; use 'answer'"
        )
    if tuning.credit == "flip":
        return -torch.expm1(behaviour) * credit  # 1 - π(a)
    if tuning.credit == "to-go":
        credit = credit.flip(1).cumsum(1).flip(1)
    groups = credit.unflatten(0, (-1, tuning.samples))
    others = (groups.sum(1, keepdim=True) - groups) / (tuning.samples - 1)
    return (groups - others).flatten(0, 1)


def reward_loss(
    decisions: Decisions,
    scored: Scored,
    anchor: Any | None,
    tuning: Tuning,
    answers: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of the top of this file, and what to log.

    Args:
        decisions: of the present model on the answers.
        scored: the answers and their advantages.
        anchor: the reference's distributions on them.
        tuning: how.
        answers: in the whole batch, if these are a chunk of it; every process has as many.
    """
    log_probs, mask = _log_probs(decisions), decisions.mask
    assert mask is not None
    answers = answers or len(mask)
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
    if tuning.baseline == "learned" and tuning.credit == "answer":
        worth = value_loss(_values(decisions), scored.output.total[:, None].expand_as(log_probs), mask, answers)
        parts["value_loss"] = worth.detach()
        loss = loss + worth
    if anchor is not None:
        distance = kl_penalty(decisions.distribution, anchor, mask, answers)
        parts["kl"] = distance.detach()
        loss = loss + tuning.anchor * distance
    return loss, parts


def likelihood_loss(decisions: Decisions) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of a decision in nats: the first step, on the answers that people gave."""
    assert decisions.mask is not None
    return -masked_mean(_log_probs(decisions), decisions.mask)


def repeat(tree: T, times: int) -> T:
    """Every row of a tree so many times, one after the other: targets beside the answers to an input."""
    return map_tree(lambda leaf: leaf.repeat_interleave(times, 0), tree)


def distinct(actions: Tree, samples: int) -> Float[Tensor, ""]:
    """How many of the answers to an input differ from each other, as a share of their number; the mean over inputs."""
    leaves: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        leaves.append(leaf.flatten(1).unflatten(0, (-1, samples)).double())
        return leaf

    map_tree(note, actions)
    whole = torch.cat(leaves, 2)
    alike = (whole[:, :, None] == whole[:, None]).all(-1)
    return (~alike.tril(-1).any(2)).float().mean()


@contextmanager
def answering(policy: nn.Module, precision: Precision = "fp32") -> Iterator[None]:
    """Dropout and batch statistics stand still, while answering and while learning from the answers alike."""
    was_training = policy.training
    policy.eval()
    device = next(policy.parameters()).device.type
    try:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
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


def _values(decisions: Decisions) -> Float[Tensor, "rows time"]:
    if decisions.values is None:
        raise InputError("baseline: found 'learned', but the model has no values; use leave-one-out")
    return decisions.values
