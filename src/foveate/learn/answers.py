"""A sampler's own answers into a loss: REINFORCE on whole answers, with a baseline and an anchor.

    loss = -Σ log π(decision) · (reward - baseline) / answers  +  anchor · KL(π || start)  -  entropy · H(π)

The sums are over the decisions of an answer (`mask`), so that the gradient is that of the expected reward of whole
answers; with the leave-one-out baseline it is unbiased (`foveate.learn.baselines`). KL and entropy are exact at every
decision, summed over the answer. With `anchored` "reward" the KL is taken off the reward as well, which makes the
gradient that of E[reward] - anchor · KL of whole answers.

Where the reward says what each decision was worth (`credit`), each is weighed by its own share, if decisions do not
depend on each other, or by that and all after it, if they do. That leaves the expectation and takes away the noise of
the others.

Long answers (a denoising chain) go through the model in pieces of `Sampler.chunk` decisions, a backward pass each, so
that the memory is that of a piece; sums over decisions are sums over pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.learn.baselines import MovingAverage, group_normalised, leave_one_out, self_critical, value_loss
from foveate.learn.policy_gradient import entropy_bonus, kl_penalty, masked_mean, policy_gradient
from foveate.learn.settings import Precision, Tuning
from foveate.types import Decisions, InputError, RewardOutput, Sampler, Tree, in_full, map_tree

T = TypeVar("T")
Reward: TypeAlias = Callable[[Any, Any], RewardOutput]
OF_TWO = ("flip", "expected")  # credits of decisions between two choices


@dataclass(frozen=True)
class Scored:
    """Answers to a batch and what they are worth: what one update learns from. Carries no graph.

    Attributes:
        actions: the answers, `samples` to each input next to each other.
        behaviour: log-probability of their decisions under the model that gave them; None where that is the present
            model, which then says so itself.
        output: their rewards.
        advantages: reward less baseline, [rows, 1], or one for each decision; with credit "flip" or "expected" only
            the effect of its choice, which the loss weighs by a probability.
    """

    actions: Tree
    behaviour: Float[Tensor, "rows time"] | None
    output: RewardOutput
    advantages: Float[Tensor, "rows #time"]

    def at(self, steps: slice) -> Scored:
        """What belongs to these steps; the answers stay whole."""
        behaviour = None if self.behaviour is None else self.behaviour[:, steps]
        advantages = self.advantages if self.advantages.shape[1] == 1 else self.advantages[:, steps]
        return replace(self, behaviour=behaviour, advantages=advantages)


def score(
    policy: Sampler,
    reward: Reward,
    inputs: Tree,
    targets: Tree,
    keys: Int[Tensor, " batch"],
    tuning: Tuning,
    average: MovingAverage,
    reference: Sampler | None = None,
) -> Scored:
    """Let the model answer, and weigh its answers. The reference is asked only if the anchor is in the reward.

    Raises:
        InputError: the reward gives no credit, or the model no values, where the settings ask for them.
    """
    count, learned = tuning.samples, tuning.baseline == "learned" and tuning.credit == "answer"
    behaviour = values = best = None
    with torch.no_grad(), answering(policy, tuning.precision, tuning.temperature):
        actions = policy.sample(inputs, count, False, keys)
        answers = in_full(policy.decode(actions))
        if learned:
            decisions = list(decided(policy, inputs, actions))
            behaviour = torch.cat([_log_probs(some) for some in decisions], 1)
            values = torch.cat([_values(some) for some in decisions], 1)
        if tuning.baseline == "greedy" and tuning.credit == "answer":
            best = in_full(policy.decode(policy.sample(inputs, 1, True, keys)))
    with torch.no_grad():  # in full precision
        output = reward(answers, repeat(targets, count))
        if tuning.credit != "answer":
            return Scored(actions, None, output, _own(output, tuning))
        output = _among_scored(output, count)
        group = torch.arange(len(keys), device=keys.device).repeat_interleave(count)
        worth = output.total
        if tuning.anchored == "reward" and tuning.anchor and reference is not None:
            worth = worth - tuning.anchor * divergence(
                policy, reference, inputs, actions, tuning.precision, tuning.temperature
            )
        if tuning.baseline == "normalised":
            return Scored(actions, behaviour, output, _learned_from(group_normalised(worth, group), output))
        if tuning.baseline == "leave-one-out":
            baseline = leave_one_out(worth, group)
        elif best is not None:
            baseline = self_critical(worth, reward(best, targets).total, group)
        elif values is not None:
            baseline = values
        else:
            value = average() if tuning.baseline == "moving-average" else torch.zeros(())
            baseline = value.to(worth).expand(len(group), 1)
    return Scored(actions, behaviour, output, _learned_from(worth[:, None] - baseline, output))


def decided(policy: Sampler, inputs: Tree, actions: Tree) -> Iterator[Decisions]:
    """The decisions of answers, a piece of steps at a time: what long answers are read by."""
    for steps in policy.pieces(actions):
        yield policy(inputs, actions, steps)


def log_prob(policy: Sampler, inputs: Tree, actions: Tree) -> Float[Tensor, " rows"]:
    """Log-probability of whole answers in nats."""
    return torch.stack(
        [torch.where(_mask(some), _log_probs(some), 0.0).sum(1) for some in decided(policy, inputs, actions)]
    ).sum(0)


def divergence(
    policy: Sampler,
    reference: Sampler,
    inputs: Tree,
    actions: Tree,
    precision: Precision = "fp32",
    temperature: float | None = None,
) -> Float[Tensor, " rows"]:
    """Exact KL(policy || reference) at every decision of answers, summed over each, in nats; without a graph.

    Answers drawn from the policy make its mean unbiased for the KL of whole answers (chain rule).
    """
    found = []
    with torch.no_grad():
        for steps in policy.pieces(actions):
            with answering(reference, precision, temperature):
                anchor = reference(inputs, actions, steps).distribution
            with answering(policy, precision, temperature):
                decisions = policy(inputs, actions, steps)
            found.append(torch.where(_mask(decisions), decisions.distribution.kl(anchor), 0.0).sum(1))
    return torch.stack(found).sum(0)


def _own(output: RewardOutput, tuning: Tuning) -> Float[Tensor, "rows time"]:
    """Advantages from the credit of single decisions; of two choices without the probability that weighs them."""
    credit = output.credit
    if credit is None:
        raise InputError(
            f"credit: {tuning.credit!r} asks the reward for one of each decision, found none; use 'answer'"
        )
    if tuning.credit in OF_TWO:
        return credit
    if tuning.credit == "to-go":
        credit = credit.flip(1).cumsum(1).flip(1)
    groups = credit.unflatten(0, (-1, tuning.samples))
    scored = torch.ones_like(groups[:, :, :1])
    if (skipped := output.skipped) is not None:  # their credit is 0
        scored = (~skipped).to(credit).view(-1, tuning.samples, 1)
    count = scored.sum(1, keepdim=True)
    others = (groups.sum(1, keepdim=True) - groups) / (count - 1).clamp(min=1)
    return torch.where(count > 1, scored * (groups - others), 0.0).flatten(0, 1)


def _among_scored(output: RewardOutput, samples: int) -> RewardOutput:
    """An answer without a score takes the mean of its input's others, so that these are compared with each other.

    In the parts too, so that these still sum to the total.
    """
    if (skipped := output.skipped) is None:
        return output
    missing = skipped.view(-1, samples)
    there = (~missing).sum(1, keepdim=True)

    def filled(values: Tensor) -> Tensor:
        groups = values.view(-1, samples)
        mean = torch.where(missing, 0.0, groups).sum(1, keepdim=True) / there.clamp(min=1)
        return torch.where(missing & (there > 0), mean, groups).flatten()

    parts = {name: one if name.split("/")[-1] == "skipped" else filled(one) for name, one in output.parts.items()}
    return replace(output, total=filled(output.total), parts=parts)


def _learned_from(advantages: Float[Tensor, "rows #time"], output: RewardOutput) -> Float[Tensor, "rows #time"]:
    skipped = output.skipped
    return advantages if skipped is None else torch.where(skipped[:, None], 0.0, advantages)


def _check_credit(credit: Tensor, decided: Tensor, tuning: Tuning) -> None:
    if credit.shape != decided.shape:
        found = f"asks the reward for one of {list(decided.shape)}, found {list(credit.shape)}"
        raise InputError(f"credit: {tuning.credit!r} {found}; use 'answer'")


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

    Raises:
        InputError: the reward's credit has another shape than the decisions.
    """
    log_probs, mask = _log_probs(decisions), _mask(decisions)
    if tuning.credit != "answer":
        _check_credit(scored.advantages, log_probs, tuning)
    answers = answers or len(mask)
    behaviour = log_probs.detach() if scored.behaviour is None else scored.behaviour
    advantages = scored.advantages
    if tuning.credit in OF_TWO:  # times the probability, when they were drawn, of the other choice or of their own
        advantages = advantages * (behaviour.exp() if tuning.credit == "expected" else -torch.expm1(behaviour))
    found = policy_gradient(log_probs, behaviour, advantages, mask, answers, tuning.clip)
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
    return -masked_mean(_log_probs(decisions), _mask(decisions))


def repeat(tree: T, times: int) -> T:
    """Every row of a tree so many times, one after the other: targets beside the answers to an input."""
    return map_tree(lambda leaf: leaf.repeat_interleave(times, 0), tree)


def distinct(actions: Tree, samples: int) -> Float[Tensor, ""]:
    """How many of the answers to an input differ from each other, as a share of their number; the mean over inputs."""
    leaves: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        leaves.append(leaf.reshape(-1, samples, leaf[0].numel()))
        return leaf

    map_tree(note, actions)
    new = [torch.ones(len(leaves[0]), dtype=torch.bool, device=leaves[0].device)]
    for place in range(1, samples):  # one against those before it: all against all would not fit for long answers
        alike = [(leaf[:, :place] == leaf[:, place : place + 1]).all(2) for leaf in leaves]
        new.append(~torch.stack(alike).all(0).any(1))
    return torch.stack(new).float().mean()


@contextmanager
def answering(policy: nn.Module, precision: Precision = "fp32", temperature: float | None = None) -> Iterator[None]:
    """Dropout and batch statistics stand still, while answering and while learning from the answers alike.

    Raises:
        InputError: a temperature for a model that has none.
    """
    model: Any = policy
    was_training, own = model.training, getattr(model, "temperature", None)
    if temperature is not None:
        if own is None:
            raise InputError(f"temperature: found {temperature:g}, but {type(policy).__name__} has none; leave it out")
        model.temperature = temperature
    policy.eval()
    device = next(policy.parameters()).device.type
    try:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        policy.train(was_training)
        if temperature is not None:
            model.temperature = own


def frozen(policy: Sampler) -> Sampler:
    """A copy that does not learn: the reference of an anchor."""
    reference = copy.deepcopy(policy).eval()
    return reference.requires_grad_(False)


def _log_probs(decisions: Decisions) -> Float[Tensor, "rows time"]:
    assert decisions.log_probs is not None
    return decisions.log_probs


def _mask(decisions: Decisions) -> Tensor:
    assert decisions.mask is not None
    return decisions.mask


def _values(decisions: Decisions) -> Float[Tensor, "rows time"]:
    if decisions.values is None:
        raise InputError("baseline: found 'learned', but the model has no values; use leave-one-out")
    return decisions.values
