"""Policy gradients: exact expectations, PPO's clip, padding, chunks, two processes, entropy and KL."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn

from foveate import noise
from foveate.distributions import Categorical, Gaussian
from foveate.learn.baselines import leave_one_out
from foveate.learn.policy_gradient import (
    entropy_bonus,
    kl_estimate,
    kl_penalty,
    masked_mean,
    policy_gradient,
)
from foveate.types import InputError

NEW = torch.tensor([0.3, -0.5, 1.0, 0.0])
OLD = torch.tensor([0.0, 0.4, 0.7, -0.6])
GAIN = torch.tensor([1.0, -2.0, -0.5, 3.0])


def bandit_gradients(logits: Tensor, actions: Tensor, behaviour: Tensor | None, clip: float | None) -> Tensor:
    """[rows, arms]: what every pull alone adds to the logits, uphill."""
    copies = logits.expand(len(actions), 1, -1).clone().requires_grad_()
    old = None if behaviour is None else behaviour.log_softmax(-1)[actions][:, None]
    log_probs = Categorical(copies).log_prob(actions[:, None])
    mask = torch.ones(len(actions), 1, dtype=torch.bool)
    loss = policy_gradient(log_probs, old, GAIN[actions][:, None], mask, count=1, clip=clip).loss
    return -torch.autograd.grad(loss, copies)[0].squeeze(1)


def exact_gradient(logits: Tensor) -> Tensor:
    """∇Σ π_k g_k = π_k (g_k - E g)."""
    chances = logits.softmax(-1)
    return chances * (GAIN - chances @ GAIN)


def clipped_expectation(clip: float) -> Tensor:
    """Σ_a b(a) ρ(a) Â(a) ∇log π(a) over the arms that are not cut, worked out from the docstring."""
    new, old = NEW.softmax(-1), OLD.softmax(-1)
    total = torch.zeros_like(new)
    for arm, ratio in enumerate((new / old).tolist()):
        cut = ratio > 1 + clip if GAIN[arm] > 0 else ratio < 1 - clip
        total += 0.0 if cut else old[arm] * ratio * GAIN[arm] * (torch.eye(len(new))[arm] - new)
    return total


CASES = {
    "reinforce": (NEW, None, None, exact_gradient(NEW)),
    "ratio": (OLD, OLD, None, exact_gradient(NEW)),
    "clip 0.2": (OLD, OLD, 0.2, clipped_expectation(0.2)),
    "clip 0.5": (OLD, OLD, 0.5, clipped_expectation(0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_decision_has_the_expectation_of_the_docstring(name: str) -> None:
    """Exactly, by enumerating the arms, and within 4.5 standard errors on 50,000 sampled ones."""
    acting, behaviour, clip, expected = CASES[name]
    arms = torch.arange(4)
    exact = (acting.softmax(-1)[:, None] * bandit_gradients(NEW, arms, behaviour, clip)).sum(0)
    torch.testing.assert_close(exact, expected)
    keys = noise.key(3, torch.arange(50_000))
    samples = bandit_gradients(NEW, Categorical(acting.expand(50_000, -1)).sample(keys), behaviour, clip)
    error = samples.std(0) / 50_000**0.5
    assert ((samples.mean(0) - expected).abs() <= 4.5 * error).all()
    if clip is not None:
        assert ((samples.mean(0) - exact_gradient(NEW)).abs() > 4.5 * error).any()


def two_steps(new: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expected gradient and true gradient of a task of two decisions; the second's logits depend on the first.

    `new`, `old`: [3, 2], logits of the first decision and of the second after a 0 and after a 1.
    """
    actions = torch.tensor(list(itertools.product((0, 1), repeat=2)))
    reward = torch.tensor([[1.0, -2.0], [0.5, 3.0]])[actions[:, 0], actions[:, 1]]
    rows = torch.stack((torch.zeros_like(actions[:, 0]), 1 + actions[:, 0]), 1)

    def logs(table: Tensor) -> Tensor:
        return table.log_softmax(-1)[rows, actions]

    leaf = new.clone().requires_grad_()
    truth = torch.autograd.grad((logs(leaf).sum(1).exp() * reward).sum(), leaf)[0]
    chance = logs(new if old is None else old).sum(1, keepdim=True).exp()
    # The weight of a row in the expectation rides on its advantage, in which the loss is linear.
    loss = policy_gradient(
        logs(leaf), None if old is None else logs(old), chance * reward[:, None], torch.ones(4, 2) > 0, count=1
    ).loss
    return -torch.autograd.grad(loss, leaf)[0], truth


def test_several_decisions_are_unbiased_on_policy_and_only_there() -> None:
    new = torch.tensor([[0.2, -0.3], [0.5, 0.1], [-0.4, 0.6]])
    old = torch.tensor([[-1.0, 0.4], [0.0, 0.9], [0.7, 0.6]])
    for behaviour in (None, new):
        found, truth = two_steps(new, behaviour)
        torch.testing.assert_close(found, truth)
    found, truth = two_steps(new, old)
    assert (found - truth).norm() > 0.1 * truth.norm()


def test_count_of_episodes_gives_the_expected_return_and_of_steps_the_same_over_the_mean_length() -> None:
    log_probs = torch.zeros(2, 4, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    advantages = torch.ones(2, 4)
    per_episode, per_step = (
        torch.autograd.grad(policy_gradient(log_probs, None, advantages, mask, count).loss, log_probs)[0]
        for count in (2, None)
    )
    torch.testing.assert_close(per_episode, mask / -2)
    torch.testing.assert_close(per_step, per_episode / 3)


def random_batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, behaviour, advantages and mask of 4 rows of 6 steps, one row empty."""
    keys = noise.key(seed, torch.arange(4))
    log_probs, change, advantages = noise.normal(keys, 3, 6).unbind(1)
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1])[:, None]
    return -log_probs.abs(), -(log_probs + 0.4 * change).abs(), advantages, mask


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), clip=st.sampled_from([0.1, 0.2, 0.5]))
def test_clipped_loss_is_the_one_of_stable_baselines3(seed: int, clip: float) -> None:
    log_probs, behaviour, advantages, mask = random_batch(seed)
    log_probs.requires_grad_()
    # stable_baselines3/ppo/ppo.py, train()
    ratio = torch.exp(log_probs[mask] - behaviour[mask])
    first = advantages[mask] * ratio
    second = advantages[mask] * torch.clamp(ratio, 1 - clip, 1 + clip)
    theirs = -torch.min(first, second).mean()
    approximate_kl = ((ratio - 1) - (log_probs[mask] - behaviour[mask])).mean()
    ours = policy_gradient(log_probs, behaviour, advantages, mask, clip=clip)
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(ours.ratio_mean, ratio.mean().detach())
    torch.testing.assert_close(ours.kl, approximate_kl.detach(), atol=1e-6, rtol=1e-4)
    gradient, expected = (torch.autograd.grad(loss, log_probs, retain_graph=True)[0] for loss in (ours.loss, theirs))
    torch.testing.assert_close(gradient, expected)
    cut = (gradient == 0) & mask
    torch.testing.assert_close(ours.clipped, cut.sum() / mask.sum())


@pytest.mark.parametrize("clip", [None, 0.2])
def test_before_the_first_update_the_ratio_is_one_and_the_gradient_that_of_reinforce(clip: float | None) -> None:
    _, _, advantages, mask = random_batch(0)
    logits = noise.normal(noise.key(1, torch.arange(4)), 6, 5).requires_grad_()
    actions = Categorical(logits).sample(noise.key(2, torch.arange(24).view(4, 6)))
    with torch.no_grad():
        behaviour = Categorical(logits).log_prob(actions)
    found = policy_gradient(Categorical(logits).log_prob(actions), behaviour, advantages, mask, clip=clip)
    assert (float(found.ratio_mean), float(found.clipped), float(found.kl)) == (1.0, 0.0, 0.0)
    plain = policy_gradient(Categorical(logits).log_prob(actions), None, advantages, mask)
    assert (float(plain.ratio_mean), float(plain.clipped), float(plain.kl)) == (1.0, 0.0, 0.0)
    torch.testing.assert_close(torch.autograd.grad(found.loss, logits), torch.autograd.grad(plain.loss, logits))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_several_epochs_over_one_trajectory_learn_more_of_it_and_the_clip_holds_them_back(clip: float | None) -> None:
    """As in PPO and GRPO: pulls of one policy, sixteen updates on them; the ratio leaves 1, by the clip not far."""
    logits = OLD.clone().requires_grad_()
    behaviour = OLD.log_softmax(-1)
    actions = Categorical(OLD.expand(4000, 1, -1)).sample(noise.key(0, "pulls", torch.arange(4000))[:, None])
    mask, gains = torch.ones(4000, 1, dtype=torch.bool), GAIN[actions] - GAIN[actions].mean()
    values, found = [OLD.softmax(-1) @ GAIN], []
    for _ in range(16):
        log_probs = Categorical(logits.expand(4000, 1, -1)).log_prob(actions)
        found.append(policy_gradient(log_probs, behaviour[actions], gains, mask, clip=clip))
        (gradient,) = torch.autograd.grad(found[-1].loss, logits)
        logits = (logits - 0.3 * gradient).detach().requires_grad_()
        values.append(logits.detach().softmax(-1) @ GAIN)
    assert found[0].ratio_mean == 1
    assert found[0].kl == 0
    assert values[1] > values[0]
    assert values[2] > values[1] + 0.1, "later epochs go on from the first"
    assert values[-1] > values[2]
    farthest = (logits.log_softmax(-1) - behaviour).exp().max()
    if clip is None:
        assert not any(one.clipped for one in found)
        assert found[-1].kl > 0.7
        assert farthest > 5
    else:  # an arm that is cut is still moved by the others, through the softmax, but hardly
        assert found[-1].clipped > 0.5
        assert 0 < found[-1].kl < 0.1
        assert 1.2 < farthest < 1.6


@dataclass(frozen=True)
class Known:
    """A distribution whose entropy and KL are given numbers."""

    numbers: Tensor

    def entropy(self) -> Tensor:
        return self.numbers

    def kl(self, other: Known) -> Tensor:
        return self.numbers - other.numbers


LOSSES = {
    "reinforce": lambda new, old, gain, mask: policy_gradient(new, None, gain, mask).loss,
    "ratio": lambda new, old, gain, mask: policy_gradient(new, old, gain, mask).loss,
    "clip": lambda new, old, gain, mask: policy_gradient(new, old, gain, mask, clip=0.2).loss,
    "entropy": lambda new, old, gain, mask: entropy_bonus(Known(new), mask),
    "kl": lambda new, old, gain, mask: kl_penalty(Known(new), Known(old), mask),
    "k3": lambda new, old, gain, mask: masked_mean(kl_estimate(new, old, mask), mask),
}


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_never_leaks(name: str, fill: float) -> None:
    """Whatever the padding holds, loss and gradient are those of the steps alone, and exactly 0 in the padding."""
    new, old, gain, mask = random_batch(7)
    alone = new[mask][None].requires_grad_()
    expected = LOSSES[name](alone, old[mask][None], gain[mask][None], mask[mask][None])
    for dirty in itertools.product((False, True), repeat=3):
        leaf, *rest = (t.masked_fill(~mask, fill if d else 0.0) for t, d in zip((new, old, gain), dirty, strict=True))
        leaf.requires_grad_()
        found = LOSSES[name](leaf, *rest, mask)
        torch.testing.assert_close(found, expected)
        gradient = torch.autograd.grad(found, leaf)[0]
        torch.testing.assert_close(gradient[mask], torch.autograd.grad(expected, alone, retain_graph=True)[0][0])
        assert not gradient[~mask].any()
        assert gradient.isfinite().all()


def test_one_advantage_a_row_is_that_of_all_its_steps() -> None:
    new, old, gain, mask = random_batch(7)
    row = gain[:, :1]
    for behaviour, clip in ((None, None), (old, 0.2)):
        found = policy_gradient(new, behaviour, row, mask, clip=clip)
        assert found == policy_gradient(new, behaviour, row.expand_as(mask), mask, clip=clip)


def test_nan_inside_the_mask_is_not_hidden() -> None:
    new, old, gain, mask = random_batch(7)
    new[0, 0] = float("nan")
    assert policy_gradient(new, old, gain, mask, clip=0.2).loss.isnan()


def test_an_empty_batch_is_a_loss_of_zero() -> None:
    new, old, gain, mask = random_batch(7)
    found = policy_gradient(new.requires_grad_(), old, gain, torch.zeros_like(mask), clip=0.2)
    assert found.loss.item() == 0
    assert not torch.autograd.grad(found.loss, new)[0].any()


def test_only_the_loss_carries_a_graph_and_advantages_and_behaviour_get_no_gradient() -> None:
    new, old, gain, mask = random_batch(1)
    leaves = [t.requires_grad_() for t in (new, old, gain)]
    found = policy_gradient(*leaves, mask, clip=0.2)
    assert [part.requires_grad for part in (found.ratio_mean, found.clipped, found.kl)] == [False] * 3
    assert [g is None for g in torch.autograd.grad(found.loss, leaves, allow_unused=True)] == [False, True, True]


def test_a_clip_without_behaviour_is_refused() -> None:
    new, _, gain, mask = random_batch(1)
    with pytest.raises(InputError, match=r"clip: found 0\.2 without behaviour"):
        policy_gradient(new, None, gain, mask, clip=0.2)


class Table(nn.Module):
    """A policy small enough to compare gradients of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        with torch.no_grad():
            self.linear.weight.copy_(noise.normal(noise.key(8, torch.arange(4)), 3))
            self.linear.bias.copy_(noise.normal(noise.key(9), 4))

    def forward(self, seen: Tensor) -> Tensor:
        return self.linear(seen)


def whole_loss(policy: nn.Module, rows: slice, steps: slice, count: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """PPO, entropy and KL on a part of a fixed batch; and that part's mask."""
    _, _, gain, mask = random_batch(5)
    seen = noise.normal(noise.key(6, torch.arange(4)), 6, 3)
    actions = noise.integers(noise.key(7, torch.arange(4)), 4, 6)
    reference = Categorical(noise.normal(noise.key(10, torch.arange(4)), 6, 4)[rows, steps])
    behaviour = reference.log_prob(actions[rows, steps])
    inside, logits = mask[rows, steps], policy(seen[rows, steps])
    now = Categorical(logits)
    loss = policy_gradient(
        now.log_prob(actions[rows, steps]), behaviour, gain[rows, steps], inside, count, clip=0.2
    ).loss
    loss = loss - 0.1 * entropy_bonus(now, inside, count) + 0.3 * kl_penalty(now, reference, inside, count)
    return loss, inside


def gradient_of_the_whole() -> list[Tensor]:
    policy = Table()
    whole_loss(policy, slice(None), slice(None), None)[0].backward()
    return [p.grad for p in policy.parameters()]


@pytest.mark.parametrize("by", ["rows", "steps"])
def test_chunks_add_up_to_the_whole(by: str) -> None:
    policy, total = Table(), random_batch(5)[3].sum()
    for part in (slice(0, 1), slice(1, 3), slice(3, None)):
        rows, steps = (part, slice(None)) if by == "rows" else (slice(None), part)
        whole_loss(policy, rows, steps, total)[0].backward()
    torch.testing.assert_close([p.grad for p in policy.parameters()], gradient_of_the_whole())


def _one_of_two(rank: int, folder: str) -> None:
    limit = timedelta(seconds=120)
    distributed.init_process_group("gloo", f"file://{folder}/meet", limit, world_size=2, rank=rank)
    try:
        policy = nn.parallel.DistributedDataParallel(Table())
        rows = slice(0, 1) if rank == 0 else slice(1, None)  # unequal shares: 6 steps and 4
        count = random_batch(5)[3][rows].sum().float()
        distributed.all_reduce(count)
        whole_loss(policy, rows, slice(None), count / 2)[0].backward()
        torch.save([p.grad for p in policy.parameters()], f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    # This process is one of the two: a new one takes seconds to import torch.
    other = torch.multiprocessing.get_context("spawn").Process(target=_one_of_two, args=(1, str(tmp_path)))
    other.start()
    _one_of_two(0, str(tmp_path))
    other.join(120)
    assert other.exitcode == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, gradient_of_the_whole())


def test_a_generator_learns_from_a_discriminators_score_as_it_would_through_the_discriminator() -> None:
    """GAN and policy gradient are one shape: a discriminator is a learned reward.

    With a Gaussian around the generator's output, x = G(z) + σ ε, the gradient of E[D(x)] can be taken through D (the
    path) or by weighing log-probabilities with D's score, which asks nothing of D but numbers. In the mean they are
    the same; a generator that is scored less some baseline, but whose baseline knows its own score, is not.
    """
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    discriminator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1), nn.LogSigmoid()).double()
    batches, inputs, samples = 128, 64, 4
    rows = inputs * samples
    deviation = torch.tensor(0.4, dtype=torch.float64)

    def gradients(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = noise.key(0, "bridge", batch, torch.arange(inputs))
        mean = generator(noise.normal(keys, 2).double().repeat_interleave(samples, 0))
        x = mean + deviation * noise.normal(noise.fold(keys[:, None], torch.arange(samples)).flatten(), 3).double()
        path = torch.autograd.grad(discriminator(x).mean(), list(generator.parameters()), retain_graph=True)
        found = Gaussian(mean[:, None], deviation)
        score = discriminator(x).detach()
        group = torch.arange(inputs).repeat_interleave(samples)
        whole = []
        own = score.view(inputs, samples).mean(1).repeat_interleave(samples)[:, None]  # the group's, itself included
        for baseline in (leave_one_out(score[:, 0], group), own):
            log_probs = found.log_prob(x.detach()[:, None])
            mask = torch.ones(rows, 1, dtype=torch.bool)
            loss = policy_gradient(log_probs, None, score - baseline, mask, count=rows).loss
            whole.append(torch.autograd.grad(-loss, list(generator.parameters()), retain_graph=True))
        flat = [torch.cat([leaf.flatten() for leaf in leaves]) for leaves in (path, *whole)]
        return flat[0], flat[1], flat[2]

    path, scored, biased = (torch.stack(each) for each in zip(*map(gradients, range(batches)), strict=True))

    def apart(one: Tensor, other: Tensor) -> float:
        """Root mean square of the difference of the means in its standard errors: about 1 if they are the same."""
        off = one - other
        return float((off.mean(0) / (off.std(0) / batches**0.5)).square().mean().sqrt())

    assert apart(scored, path) < 1.5
    assert apart(biased, path) > 2.5, "its baseline takes a quarter of the gradient away"
    torch.testing.assert_close(biased.mean(0), 0.75 * scored.mean(0), rtol=1e-6, atol=1e-9)
    assert scored.std(0).mean() > 2 * path.std(0).mean(), "what the path is worth: less noise"


def test_entropy_and_kl_are_those_of_torch() -> None:
    mask = random_batch(2)[3]
    first, second = noise.normal(noise.key(1, torch.arange(4)), 2, 6, 3).unbind(1)
    std = torch.tensor(0.7)
    pairs = [
        (Categorical(first), torch.distributions.Categorical(logits=first)),
        (Gaussian(first, std), torch.distributions.Independent(torch.distributions.Normal(first, std), 1)),
    ]
    others = [
        (Categorical(second), torch.distributions.Categorical(logits=second)),
        (Gaussian(second, std), torch.distributions.Independent(torch.distributions.Normal(second, std), 1)),
    ]
    for (ours, theirs), (other, their_other) in zip(pairs, others, strict=True):
        torch.testing.assert_close(entropy_bonus(ours, mask), theirs.entropy()[mask].mean())
        expected = torch.distributions.kl_divergence(theirs, their_other)[mask]
        torch.testing.assert_close(kl_penalty(ours, other, mask), expected.mean())
        torch.testing.assert_close(kl_penalty(ours, other, mask, count=4), expected.sum() / 4)


def test_signs_bonus_flattens_and_penalty_pulls_to_the_reference() -> None:
    logits, reference = torch.tensor([[[2.0, 0.0]]]), Categorical(torch.tensor([[[0.0, 3.0]]]))
    mask, leaf = torch.ones(1, 1, dtype=torch.bool), logits.clone().requires_grad_()
    down = -torch.autograd.grad(-entropy_bonus(Categorical(leaf), mask), leaf)[0]
    assert entropy_bonus(Categorical(logits + 0.01 * down), mask) > entropy_bonus(Categorical(logits), mask)
    down = -torch.autograd.grad(kl_penalty(Categorical(leaf), reference, mask), leaf)[0]
    closer = kl_penalty(Categorical(logits + 0.01 * down), reference, mask)
    assert closer < kl_penalty(Categorical(logits), reference, mask)


def test_k3_is_unbiased_has_less_variance_than_the_log_ratio_and_the_gradient_of_the_other_kl() -> None:
    leaf = NEW.clone().requires_grad_()
    forward = Categorical(leaf).kl(Categorical(OLD))
    backward = Categorical(OLD).kl(Categorical(leaf))
    chances = NEW.softmax(-1)
    estimates = kl_estimate(leaf.log_softmax(-1)[None], OLD.log_softmax(-1)[None])[0]
    assert (estimates >= 0).all()
    torch.testing.assert_close(chances @ estimates, forward)
    gradient = torch.autograd.grad(chances @ estimates, leaf, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(backward, leaf)[0])
    plain = (leaf.log_softmax(-1) - OLD.log_softmax(-1)).detach()
    assert chances @ (estimates.detach() - forward.detach()).square() < chances @ (plain - forward.detach()).square()

    # The remedy: the log-ratio as a cost, without its graph, gives the gradient of KL(π || reference) itself.
    costs = policy_gradient(leaf.log_softmax(-1)[:, None], None, (chances * plain)[:, None], torch.ones(4, 1) > 0, 1)
    torch.testing.assert_close(-torch.autograd.grad(costs.loss, leaf)[0], torch.autograd.grad(forward, leaf)[0])

    actions = Categorical(NEW.expand(50_000, -1)).sample(noise.key(4, torch.arange(50_000)))
    sampled = estimates.detach()[actions]
    assert (sampled.mean() - forward).abs() < 4.5 * sampled.std() / 50_000**0.5
