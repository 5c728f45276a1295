"""Baselines: exact expectations by enumerating every group of a bandit, and within their intervals by sampling."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from foveate import noise
from foveate.distributions import Categorical
from foveate.learn.baselines import (
    MovingAverage,
    group_mean,
    group_normalised,
    leave_one_out,
    self_critical,
    value_loss,
)
from foveate.learn.policy_gradient import policy_gradient
from foveate.types import InputError

LOGITS = torch.tensor([0.3, -0.5, 1.0, 0.0])
PAYS = torch.tensor([1.0, 3.0, 0.5, 2.0])
SOLVED = torch.tensor([0.0, 1.0, 0.0, 1.0])
SIZE = 3


def exact_gradient(pays: Tensor) -> Tensor:
    """Gradient of the expected pay: π_k (r_k - E r)."""
    chances = LOGITS.softmax(-1)
    return chances * (pays - chances @ pays)


def row_gradients(actions: Tensor, advantages: Tensor) -> Tensor:
    """[rows, arms]: what every row alone adds to the logits, uphill."""
    copies = LOGITS.expand(len(actions), 1, -1).clone().requires_grad_()
    mask = torch.ones(len(actions), 1, dtype=torch.bool)
    loss = policy_gradient(Categorical(copies).log_prob(actions[:, None]), None, advantages, mask, count=1).loss
    return -torch.autograd.grad(loss, copies)[0].squeeze(1)


def every_group() -> tuple[Tensor, Tensor, Tensor]:
    """All groups of `SIZE` samples, their rows shuffled: actions, group ids, probability of the group of each row."""
    actions = torch.tensor(list(itertools.product(range(len(LOGITS)), repeat=SIZE)))
    chances = LOGITS.log_softmax(-1)[actions].sum(1).exp()
    ids = noise.integers(noise.key(5), 10**9, len(actions))  # any ids, in any order
    order = noise.permutation(noise.key(6), actions.numel())
    spread = [column.repeat_interleave(SIZE)[order] for column in (ids, chances)]
    return actions.flatten()[order], spread[0], spread[1]


def expectation(advantages: Tensor) -> Tensor:
    """Mean over a group, expected over groups."""
    actions, _, chances = every_group()
    return (chances[:, None] * row_gradients(actions, advantages)).sum(0) / SIZE


def test_leave_one_out_is_unbiased() -> None:
    actions, group, _ = every_group()
    scores = PAYS[actions]
    torch.testing.assert_close(expectation(scores[:, None] - leave_one_out(scores, group)), exact_gradient(PAYS))


def test_self_critical_is_unbiased() -> None:
    actions, _, _ = every_group()
    scores, greedy = PAYS[actions], PAYS[LOGITS.argmax()][None].double()
    baseline = self_critical(scores, greedy, torch.zeros_like(actions))
    assert baseline.dtype == scores.dtype
    torch.testing.assert_close(expectation(scores[:, None] - baseline), exact_gradient(PAYS))


def test_a_mean_that_includes_the_sample_shortens_the_gradient_by_one_part_in_n() -> None:
    actions, group, _ = every_group()
    scores = PAYS[actions]
    found = expectation(scores[:, None] - group_mean(scores, group))
    torch.testing.assert_close(found, (SIZE - 1) / SIZE * exact_gradient(PAYS))


def test_group_normalised_has_the_expectation_of_its_own_definition() -> None:
    """Every group worked out alone, in double precision, with torch's own standard deviation."""
    actions, group, _ = every_group()
    logits = LOGITS.double()
    derived = torch.zeros_like(logits)
    for taken in itertools.product(range(len(LOGITS)), repeat=SIZE):
        arms = torch.tensor(taken)
        pays = PAYS.double()[arms]
        weights = (pays - pays.mean()) / (pays.std() + 1e-4)
        scores = torch.eye(len(LOGITS), dtype=torch.double)[arms] - logits.softmax(-1)
        derived += logits.log_softmax(-1)[arms].sum().exp() * (weights[:, None] * scores).mean(0)
    found = expectation(group_normalised(PAYS[actions], group))
    torch.testing.assert_close(found, derived.float())
    cosine = torch.cosine_similarity(found, exact_gradient(PAYS), dim=0)
    assert cosine < 0.999  # not even the direction is that of the gradient


def test_group_normalised_of_right_or_wrong_climbs_the_arcsine() -> None:
    """The closed form of the docstring, and its limit for large groups."""
    actions, group, _ = every_group()
    p, gradient = LOGITS.softmax(-1) @ SOLVED, exact_gradient(SOLVED)

    def factor(n: int) -> Tensor:
        k = torch.arange(1.0, n)
        logs = torch.lgamma(torch.tensor(n + 1.0)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        chance = (logs + k * p.log() + (n - k) * (1 - p).log()).exp()
        deviation = (k * (n - k) / (n * (n - 1))).sqrt()
        return (chance * k * (n - k) / n**2 / (deviation + 1e-4)).sum() / (p * (1 - p))

    torch.testing.assert_close(expectation(group_normalised(SOLVED[actions], group)), gradient * factor(SIZE))
    assert float(factor(1000)) == pytest.approx(float((p * (1 - p)) ** -0.5), rel=1e-2)


def test_a_moving_average_is_unbiased_only_if_it_is_updated_after_use() -> None:
    actions, group, _ = every_group()
    scores, earlier = PAYS[actions], torch.tensor([0.5, 4.0])
    known = MovingAverage(0.9)
    known.update(earlier)
    torch.testing.assert_close(known(), earlier.mean())
    torch.testing.assert_close(expectation(scores[:, None] - known()), exact_gradient(PAYS))

    hasty = torch.zeros_like(scores)
    for number in group.unique():
        baseline = MovingAverage(0.9)
        baseline.update(earlier)
        baseline.update(scores[group == number])
        hasty[group == number] = baseline()
    share = 0.1 / (0.1 + 0.9 * 0.1)  # of the newest batch in the average
    torch.testing.assert_close(expectation((scores - hasty)[:, None]), (1 - share / SIZE) * exact_gradient(PAYS))


def test_sampled_groups_meet_their_expectations_and_have_less_variance() -> None:
    groups, size = 8_000, 4
    keys = noise.key(0, torch.arange(groups * size))
    actions = Categorical(LOGITS.expand(len(keys), -1)).sample(keys)
    scores, group = PAYS[actions] + 5, torch.arange(groups).repeat_interleave(size).flip(0)
    average = MovingAverage()
    average.update(PAYS + 5)
    truth = exact_gradient(PAYS)
    rows: dict[str, tuple[Tensor, Tensor]] = {
        "none": (scores[:, None], truth),
        "moving average": (scores[:, None] - average(), truth),
        "leave one out": (scores[:, None] - leave_one_out(scores, group), truth),
        "self-critical": (
            scores[:, None] - self_critical(scores, (PAYS[LOGITS.argmax()] + 5).expand(groups), group),
            truth,
        ),
        "group mean": (scores[:, None] - group_mean(scores, group), truth * (size - 1) / size),
    }
    variance = {}
    for name, (advantages, expected) in rows.items():
        # A group is the unit of independence.
        samples = row_gradients(actions, advantages).view(groups, size, -1).mean(1)
        error = samples.std(0) / groups**0.5
        assert ((samples.mean(0) - expected).abs() <= 4.5 * error).all(), name
        if name == "group mean":
            assert ((samples.mean(0) - truth).abs() > 4.5 * error).any(), "too few samples to see the bias"
        variance[name] = samples.var(0).sum().item()
    assert all(variance[name] < 0.5 * variance["none"] for name in rows if name != "none"), variance


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(-3, 3), min_size=1, max_size=12), seed=st.integers(0, 10**6))
def test_groups_are_what_a_loop_over_them_makes(ids: list[int], seed: int) -> None:
    group = torch.tensor(ids + ids)  # at least two of each
    scores = noise.normal(noise.key(seed), len(group))
    for row in range(len(group)):
        same = scores[group == group[row]]
        others = torch.cat((scores[:row], scores[row + 1 :]))[torch.cat((group[:row], group[row + 1 :])) == group[row]]
        torch.testing.assert_close(leave_one_out(scores, group)[row, 0], others.mean(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(group_mean(scores, group)[row, 0], same.mean(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            group_normalised(scores, group)[row, 0],
            (scores[row] - same.mean()) / (same.std() + 1e-4),
            atol=1e-3,
            rtol=1e-3,
        )


def test_a_group_of_equal_scores_is_neither_praised_nor_blamed() -> None:
    advantages = group_normalised(torch.tensor([0.1] * 7 + [0.3] * 3), torch.tensor([1] * 7 + [2] * 3))
    assert advantages.abs().max() < 1e-2


@pytest.mark.parametrize("baseline", [leave_one_out, group_normalised])
def test_a_row_alone_is_refused(baseline) -> None:
    with pytest.raises(InputError, match=r"one row alone in group 70.*draw more samples"):
        baseline(torch.ones(3), torch.tensor([4, 70, 4]))


def test_a_row_without_a_greedy_score_is_refused() -> None:
    with pytest.raises(InputError, match=r"group: found ids from 0 to 2, expected 0 to 1"):
        self_critical(torch.ones(3), torch.ones(2), torch.tensor([0, 2, 1]))


def test_self_critical_finds_the_greedy_score_of_each_row() -> None:
    found = self_critical(torch.zeros(4), torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2, 0, 1, 2]))
    assert found.squeeze(1).tolist() == [30, 10, 20, 30]


def test_a_moving_average_goes_through_a_checkpoint() -> None:
    first, second = MovingAverage(0.7), MovingAverage(0.7)
    assert float(first()) == 0
    for step in range(3):
        first.update(noise.normal(noise.key(step), 5))
    second.load_state_dict(load(save(first.state_dict())))
    for average in (first, second):
        average.update(torch.tensor([1.0, 2.0]))
    assert float(first()) == float(second())
    with pytest.raises(InputError, match="decay: found 1"):
        MovingAverage(1.0)


def test_value_loss_is_the_mean_squared_error_of_what_is_inside() -> None:
    values = noise.normal(noise.key(1, torch.arange(3)), 5)
    returns = noise.normal(noise.key(2, torch.arange(3)), 5).requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    clean, dirty = (values.masked_fill(~mask, fill).requires_grad_() for fill in (0.0, float("nan")))
    for leaf, target in ((clean, returns), (dirty, returns.masked_fill(~mask, float("inf")))):
        value_loss(leaf, target, mask).backward()
    torch.testing.assert_close(clean.grad, dirty.grad, atol=0, rtol=0)
    assert not dirty.grad[~mask].any()
    assert returns.grad is None
    torch.testing.assert_close(
        value_loss(clean, returns, mask), torch.nn.functional.mse_loss(clean[mask], returns[mask])
    )
    halves = value_loss(clean[:1], returns[:1], mask[:1], 10) + value_loss(clean[1:], returns[1:], mask[1:], 10)
    torch.testing.assert_close(halves, value_loss(clean, returns, mask))
