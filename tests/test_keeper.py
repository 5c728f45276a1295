"""The best weights are kept, and a collapse is noticed once it has happened, and not before."""

import math

import pytest
import torch
from torch import nn

from foveate.learn.keeper import CALM, Keeper


def told(keeper: Keeper, steps: int, reward: float, length: float, distinct: float, samples: int = 8) -> str | None:
    found = None
    for _ in range(steps):
        found = keeper.notice(torch.tensor(reward), torch.tensor(length), torch.tensor(distinct), samples)
    return found


def test_the_best_weights_are_kept() -> None:
    policy = nn.Linear(2, 2)
    keeper = Keeper(policy)
    assert float(keeper.score) == -math.inf
    assert keeper.offer(policy, 0.5)
    best = policy.weight.detach().clone()
    with torch.no_grad():
        policy.weight += 1
    assert not keeper.offer(policy, 0.5)
    assert not keeper.offer(policy, math.nan)
    assert torch.equal(keeper.best.weight, best)
    assert keeper.offer(policy, torch.tensor(0.6))
    assert torch.equal(keeper.best.weight, policy.weight)


@pytest.mark.parametrize(
    ("length", "distinct", "what"),
    [(1.0, 1.0, "answers have 1"), (100.0, 1.0, "answers have"), (20.0, 0.125, "all answers to an input are the same")],
)
def test_a_collapse_is_noticed_if_the_reward_fell(length: float, distinct: float, what: str) -> None:
    keeper = Keeper(nn.Linear(1, 1))
    assert told(keeper, CALM, 1.0, 20.0, 1.0) is None
    assert told(keeper, 10, 0.9, 20.0, 0.9) is None, "worse, but no collapse"
    found = told(keeper, 10 * CALM, 0.2, length, distinct)
    assert found is not None
    assert what in found


def test_answers_that_became_one_for_a_better_reward_are_no_collapse() -> None:
    keeper = Keeper(nn.Linear(1, 1))
    told(keeper, CALM, 1.0, 20.0, 1.0)
    assert told(keeper, 10 * CALM, 1.5, 4.0, 0.125) is None
    single = Keeper(nn.Linear(1, 1))
    told(single, CALM, 1.0, 20.0, 1.0, samples=1)
    assert told(single, 10 * CALM, 0.5, 20.0, 1.0, samples=1) is None


def test_answers_that_became_empty_for_a_better_drawn_reward_are_a_collapse_if_the_greedy_ones_lost() -> None:
    """A false positive costs more than a match brings: drawn reward -0.1 rises to 0, held-out reward falls to 0."""
    keeper, policy = Keeper(nn.Linear(1, 1)), nn.Linear(1, 1)
    keeper.offer(policy, 0.3)
    assert told(keeper, CALM, -0.1, 20.0, 1.0) is None
    assert told(keeper, 10 * CALM, 0.0, 1.0, 0.125) is None, "held-out answers were not looked at again"
    keeper.offer(policy, 0.0)
    found = told(keeper, 1, 0.0, 1.0, 0.125)
    assert found is not None
    assert "answers have 1" in found
    keeper.offer(policy, 0.4)
    assert told(keeper, 1, 0.0, 1.0, 0.125) is None
    old = {name: value for name, value in keeper.state_dict().items() if name != "looks"}
    keeper.load_state_dict(old)
    assert keeper.looks.isnan().all()


def test_going_back_takes_the_best_weights_and_half_the_rate() -> None:
    policy = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(policy.parameters())
    keeper = Keeper(policy)
    keeper.offer(policy, 1.0)
    best = policy.weight.detach().clone()
    policy(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state
    told(keeper, CALM, 1.0, 20.0, 1.0)
    assert told(keeper, 10 * CALM, 0.1, 1.0, 1.0)
    keeper.go_back(policy, optimizer)
    assert torch.equal(policy.weight, best)
    assert not optimizer.state
    assert float(keeper.rate) == 0.5
    assert told(keeper, 1, 1.0, 20.0, 1.0) is None


def test_it_is_saved_and_restored_whole() -> None:
    keeper, other = Keeper(nn.Linear(2, 2)), Keeper(nn.Linear(2, 2))
    keeper.offer(nn.Linear(2, 2), 0.3)
    told(keeper, 3, 1.0, 20.0, 1.0)
    other.load_state_dict(keeper.state_dict())
    assert torch.equal(other.best.weight, keeper.best.weight)
    assert (float(other.score), float(other.seen)) == (pytest.approx(0.3), 3)
