"""Returns: against hand-written references, Stable-Baselines3, and the expectations derived in the docstrings."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import noise
from foveate.learn.returns import episode_return, generalised_advantage, reward_to_go
from foveate.types import InputError

_spec = importlib.util.spec_from_file_location(
    "gradient_variance", Path(__file__).parents[1] / "benchmarks" / "gradient_variance.py"
)
walks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(walks)

NAN = float("nan")
HORIZON = 3


def random_rows(seed: int, batch: int = 4, time: int = 7, holes: bool = False) -> tuple[Tensor, Tensor]:
    """Rewards with NaN outside the mask, and the mask: padded at the end, or with holes anywhere."""
    keys = noise.key(seed, torch.arange(batch))
    rewards = noise.normal(keys, time)
    mask = torch.arange(time) < 1 + noise.integers(noise.key(keys, "length"), time)[:, None]
    if holes:
        mask = noise.uniform(noise.key(keys, "holes"), time) < 0.6
    return rewards.masked_fill(~mask, NAN), mask


def every_walk() -> tuple[object, Tensor]:
    """All walks of three steps, and the probability of each; what follows an end sums to one."""
    actions = torch.tensor(list(itertools.product(range(walks.MOVES), repeat=HORIZON)))
    trajectory = walks.replay(actions)
    logs = walks.table().log_softmax(-1)[trajectory.observations, actions]
    return trajectory, logs.sum(1).exp()


def expectation(advantages: Tensor) -> Tensor:
    """Exact expected gradient of the policy's table, by enumeration."""
    trajectory, chance = every_walk()
    return (chance[:, None, None] * walks.gradients(walks.table(), trajectory, advantages)).sum(0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), discount=st.sampled_from([0.0, 0.5, 0.97, 1.0]), holes=st.booleans())
def test_returns_are_the_sums_they_say(seed: int, discount: float, holes: bool) -> None:
    rewards, mask = random_rows(seed, holes=holes)
    ahead, whole = reward_to_go(rewards, mask, discount), episode_return(rewards, mask, discount)
    for row in range(len(rewards)):
        taken = rewards[row][mask[row]].tolist()
        sums = [sum(r * discount**k for k, r in enumerate(taken[start:])) for start in range(len(taken))]
        torch.testing.assert_close(ahead[row][mask[row]], torch.tensor(sums), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole[row][mask[row]], torch.tensor(sums[:1] * len(sums)), atol=1e-5, rtol=1e-5)
    assert not ahead[~mask].any()
    assert not whole[~mask].any()


def by_hand(rewards, values, last, terminated, discount, lam):
    """GAE of one episode from its definition: a sum over the temporal differences that follow."""
    after = [*values[1:], 0.0 if terminated else last]
    errors = [r + discount * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum(e * (discount * lam) ** k for k, e in enumerate(errors[start:])) for start in range(len(errors))]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    discount=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.7, 1.0]),
    holes=st.booleans(),
    ending=st.sampled_from(["terminated", "truncated", "both", "neither"]),
)
def test_gae_is_its_definition(seed: int, discount: float, lam: float, holes: bool, ending: str) -> None:
    rewards, mask = random_rows(seed, holes=holes)
    values = noise.normal(noise.key(seed, "values", torch.arange(4)), 7).masked_fill(~mask, NAN)
    last = noise.normal(noise.key(seed, "last", torch.arange(4)))
    final = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    ended = ending in ("terminated", "both")
    # Flags in the padding mean nothing either.
    terminated = (final if ended else torch.zeros_like(mask)) | ~mask
    truncated = (final if ending in ("truncated", "both") else torch.zeros_like(mask)) | ~mask
    found, returns = generalised_advantage(
        rewards, values, torch.full_like(last, NAN) if ended else last, mask, terminated, truncated, discount, lam
    )
    for row in range(4):
        here = mask[row]
        if not here.any():
            continue
        expected = by_hand(
            rewards[row][here].tolist(), values[row][here].tolist(), last[row].item(), ended, discount, lam
        )
        torch.testing.assert_close(found[row][here], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns[mask], (found + values)[mask])
    assert not found[~mask].any()
    assert not returns[~mask].any()


def test_gae_is_that_of_stable_baselines3() -> None:
    from stable_baselines3.common.buffers import RolloutBuffer

    time, copies, discount, lam = 16, 5, 0.98, 0.9
    box = gymnasium.spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(time, box, box, device="cpu", gae_lambda=lam, gamma=discount, n_envs=copies)
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(2, time, copies)).astype(np.float32)
    starts = generator.random((time + 1, copies)) < 0.2
    last = generator.normal(size=copies).astype(np.float32)
    for step in range(time):
        blank = np.zeros((copies, 1), np.float32)
        buffer.add(blank, blank, rewards[step], starts[step], torch.tensor(values[step]), torch.zeros(copies))
    buffer.compute_returns_and_advantage(torch.tensor(last), starts[time])

    def rows(array: np.ndarray) -> Tensor:
        return torch.tensor(array.T.copy())

    nothing = torch.zeros(copies, time, dtype=torch.bool)
    advantages, returns = generalised_advantage(
        rows(rewards), rows(values), torch.tensor(last), ~nothing, rows(starts[1:]), nothing, discount, lam
    )
    torch.testing.assert_close(advantages, rows(buffer.advantages), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, rows(buffer.returns), atol=1e-5, rtol=1e-5)


def test_gae_bootstraps_at_truncation_and_never_at_termination() -> None:
    rewards, values, mask = torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    end = torch.tensor([[False, True], [False, False]])
    advantages, _ = generalised_advantage(rewards, values, torch.full((2,), 10.0), mask, end, end.flip(0), 0.5, 1.0)
    assert advantages.tolist() == [[1.5, 1.0], [4.0, 6.0]]


def test_a_truncated_episode_inside_a_row_is_refused_and_the_remedy_is_right() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    mask, none = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    cut, last, final_value = torch.tensor([[False, True, False]]), torch.tensor([5.0]), 7.0
    with pytest.raises(InputError, match=r"truncated: .*mark that step as terminated"):
        generalised_advantage(rewards, values, last, mask, none, cut, 0.9, 0.8)
    folded = rewards + 0.9 * final_value * cut
    found, _ = generalised_advantage(folded, values, last, mask, cut, none, 0.9, 0.8)
    expected = by_hand([1.0, 2.0], [0.1, 0.2], final_value, False, 0.9, 0.8) + by_hand(
        [4.0], [0.3], 5.0, False, 0.9, 0.8
    )
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_gae_that_does_not_trust_its_critic_is_reward_to_go_less_the_value() -> None:
    rewards, mask = random_rows(3)
    values = noise.normal(noise.key(4, torch.arange(4)), 7)
    final = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    found, returns = generalised_advantage(
        rewards, values, torch.ones(4), mask, final, torch.zeros_like(mask), 0.9, 1.0
    )
    ahead = reward_to_go(rewards, mask, 0.9)
    torch.testing.assert_close(found, torch.where(mask, ahead - values, 0.0))
    torch.testing.assert_close(returns, ahead)


def test_the_recursions_of_the_walk_agree_with_enumeration() -> None:
    """The exact gradients that everything below is held against, by two roads."""
    leaf = walks.table().requires_grad_()
    trajectory, chance = every_walk()
    assert chance.sum().item() == pytest.approx(1, abs=1e-6)
    logs = leaf.log_softmax(-1)[trajectory.observations, trajectory.actions].sum(1)
    for discount in (1.0, 0.8):
        gained = (trajectory.rewards * discount ** torch.arange(HORIZON)).sum(1)
        by_enumeration = torch.autograd.grad((logs.exp() * gained).sum(), leaf, retain_graph=True)[0]
        by_recursion = walks.exact_gradient(walks.table(), HORIZON, discount)
        torch.testing.assert_close(by_enumeration, by_recursion, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_whole_returns_give_the_gradient_of_the_discounted_return(discount: float) -> None:
    trajectory, _ = every_walk()
    found = expectation(episode_return(trajectory.rewards, trajectory.mask, discount))
    torch.testing.assert_close(found, walks.exact_gradient(walks.table(), HORIZON, discount), atol=1e-5, rtol=1e-4)


def test_reward_to_go_is_unbiased_and_its_discount_is_not() -> None:
    trajectory, _ = every_walk()
    truth = walks.exact_gradient(walks.table(), HORIZON)
    torch.testing.assert_close(
        expectation(reward_to_go(trajectory.rewards, trajectory.mask)), truth, atol=1e-5, rtol=1e-4
    )
    found = expectation(reward_to_go(trajectory.rewards, trajectory.mask, 0.8))
    derived = walks.expected_gradient(walks.table(), torch.zeros(HORIZON + 1, walks.PLACES), 0.8, 1.0)
    torch.testing.assert_close(found, derived, atol=1e-5, rtol=1e-4)
    assert (found - truth).norm() > 0.05 * truth.norm()
    discounted = walks.exact_gradient(walks.table(), HORIZON, 0.8)
    assert (found - discounted).norm() > 0.05 * discounted.norm()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("discount", [0.8, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_gae_has_the_expectation_of_its_docstring(discount: float, lam: float, scale: float) -> None:
    critic = scale * walks.values(walks.table(), HORIZON)
    trajectory, _ = every_walk()
    found = expectation(walks.advantage(trajectory, critic, discount, lam))
    derived = walks.expected_gradient(walks.table(), critic, discount, lam)
    torch.testing.assert_close(found, derived, atol=1e-5, rtol=1e-4)
    truth = walks.exact_gradient(walks.table(), HORIZON)
    unbiased = discount == 1.0 and (lam == 1.0 or scale == 1.0)
    assert ((found - truth).norm() < 1e-4 * truth.norm()) == unbiased


def test_sampled_gradients_meet_their_expectation_and_each_reduction_lowers_their_variance() -> None:
    """Every estimator of the figure, on 20,000 sampled walks: means in their intervals, variances in order."""
    horizon, episodes, logits = 8, 20_000, walks.table()
    trajectory = walks.walk(logits, horizon, noise.key(1, torch.arange(episodes)))
    variance = {}
    for name, (advantages, expected) in walks.estimators(logits, horizon).items():
        samples = walks.gradients(logits, trajectory, advantages(trajectory))
        error = samples.std(0) / episodes**0.5
        # 4.5 standard errors: one in 8,000 for any of the 18 numbers.
        assert ((samples.mean(0) - expected).abs() <= 4.5 * error + 1e-5).all(), name
        variance[name] = samples.var(0).sum().item()
    for larger, smaller in [
        ("whole return", "reward-to-go"),
        ("whole return", "whole return - mean of others"),
        ("reward-to-go", "reward-to-go, discount 0.9"),
        ("reward-to-go", "reward-to-go - mean of others"),
        ("whole return - mean of others", "reward-to-go - mean of others"),
        ("reward-to-go - mean of others", "GAE 0.9, exact value"),
        ("reward-to-go - exact value", "discount 0.9 - exact value"),
        ("reward-to-go - exact value", "GAE 0.9, exact value"),
    ]:
        assert variance[smaller] < 0.9 * variance[larger], (smaller, larger, variance)
