"""Every distribution against torch.distributions, its samples against its density, and its gradients."""

from dataclasses import fields, replace

import pytest
import torch
from scipy import stats
from torch import distributions as theirs

from foveate import noise
from foveate.distributions import Bernoulli, Categorical, Gaussian, Uniform
from foveate.types import concatenate, map_tree

INF = float("inf")
KEYS = noise.key(0, "draws", torch.arange(60_000))


def logits(seed, choices=6, scale=2.0):
    """Of 4 x 5 distributions, with a forbidden action here and there."""
    generator = torch.Generator().manual_seed(seed)
    found = scale * torch.randn(4, 5, choices, generator=generator)
    found[0, :, 1] = -INF
    found[1, 2, 1:] = -INF
    return found


def categorical(seed=0):
    return Categorical(logits(seed))


def gaussian(seed=0, std=(4, 5, 3)):
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(torch.randn(4, 5, 3, generator=generator), 0.1 + 2 * torch.rand(std, generator=generator))


def uniform(seed=0, inside=False):
    """With `inside`, every interval lies in those of the others."""
    generator = torch.Generator().manual_seed(seed)
    low, width = torch.randn(4, 5, 3, generator=generator), 0.1 + torch.rand(4, 5, 3, generator=generator)
    return Uniform(low, low + width) if not inside else Uniform(-4 - width, 4 + width)


def peer(ours):
    """The same distribution of torch."""
    if isinstance(ours, Categorical):
        return theirs.Categorical(logits=ours.logits)
    if isinstance(ours, Gaussian):
        return theirs.Independent(theirs.Normal(ours.mean, ours.std.expand_as(ours.mean)), 1)
    return theirs.Independent(theirs.Uniform(ours.low, ours.high, validate_args=False), 1, validate_args=False)


PAIRS = {
    "categorical": (categorical(0), categorical(1)),
    "gaussian": (gaussian(0), gaussian(1)),
    "gaussian with one std": (gaussian(0, (1,)), gaussian(1, ())),
    "uniform": (uniform(0), uniform(1, inside=True)),
}
each = pytest.mark.parametrize(("ours", "other"), PAIRS.values(), ids=PAIRS.keys())


def with_graph(distribution):
    return map_tree(lambda leaf: leaf.clone().requires_grad_(), distribution)


def leaves(distribution):
    return [getattr(distribution, entry.name) for entry in fields(distribution)]


# Against torch.distributions


@each
def test_values_are_those_of_torch(ours, other):
    actions = peer(ours).sample()
    assert ours.log_prob(actions).shape == (4, 5)
    torch.testing.assert_close(ours.log_prob(actions), peer(ours).log_prob(actions))
    torch.testing.assert_close(ours.entropy(), peer(ours).entropy())
    torch.testing.assert_close(ours.kl(other), theirs.kl_divergence(peer(ours), peer(other)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.kl(ours), torch.zeros(4, 5), rtol=0, atol=1e-6)


@each
def test_gradients_are_those_of_torch(ours, other):
    if isinstance(ours, Categorical):
        # with -inf torch's own gradients are NaN
        ours, other = (Categorical(some.logits.clamp(min=-3)) for some in (ours, other))
    actions = peer(ours).sample()
    for value, expected in (
        (lambda p, q: p.log_prob(actions), lambda p, q: p.log_prob(actions)),
        (lambda p, q: p.entropy(), lambda p, q: p.entropy()),
        (lambda p, q: p.kl(q), theirs.kl_divergence),
    ):
        found = []
        for call, view in ((value, lambda some: some), (expected, peer)):
            first, second = with_graph(ours), with_graph(other)
            call(view(first), view(second)).sum().backward()
            found.append([leaf.grad for leaf in leaves(first) + leaves(second)])
        for mine, expected_gradient in zip(*found, strict=True):
            if mine is None or expected_gradient is None:
                # what has no influence may be left out or have a gradient of zero
                assert all(gradient is None or not gradient.any() for gradient in (mine, expected_gradient))
            else:
                torch.testing.assert_close(mine, expected_gradient, rtol=1e-4, atol=1e-5)


@each
def test_samples_carry_no_graph_and_densities_do(ours, other):
    ours = with_graph(ours)
    actions = ours.sample(noise.key(0, torch.arange(20).view(4, 5)))
    assert not actions.requires_grad
    assert not ours.mode().requires_grad
    assert actions.shape == ours.mode().shape == peer(ours).sample().shape
    for value in (ours.log_prob(actions), ours.entropy(), ours.kl(other)):
        assert value.shape == (4, 5)
        assert value.requires_grad
    assert ours.log_prob(actions).isfinite().all()


@each
def test_the_mode_is_most_likely(ours, other):
    for _ in range(5):
        assert (ours.log_prob(ours.mode()) >= ours.log_prob(peer(ours).sample()) - 1e-6).all()


@each
def test_samples_follow_the_keys_and_nothing_else(ours, other):
    keys = noise.key(3, torch.arange(20).view(4, 5))
    drawn = ours.sample(keys)
    state = torch.get_rng_state()
    assert torch.equal(ours.sample(keys), drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ours.sample(keys + 1), drawn)
    if all(leaf.ndim == 3 for leaf in leaves(ours)):
        # step by step, as in a rollout, and joined
        steps = [map_tree(lambda leaf, step=step: leaf[:, step : step + 1], ours) for step in range(5)]
        assert torch.equal(torch.cat([one.sample(keys[:, [step]]) for step, one in enumerate(steps)], 1), drawn)
        joined = concatenate(steps, 1)
        assert torch.equal(joined.log_prob(drawn), ours.log_prob(drawn))


@each
def test_the_mean_log_density_of_samples_is_minus_the_entropy(ours, other):
    ours, other = (
        map_tree(lambda leaf: leaf[2, 3].expand(len(KEYS), -1) if leaf.ndim == 3 else leaf, some)
        for some in (ours, other)
    )
    drawn = ours.sample(KEYS)
    for values, expected in (
        (-ours.log_prob(drawn), ours.entropy()[0]),
        (ours.log_prob(drawn) - other.log_prob(drawn), ours.kl(other)[0]),
    ):
        assert abs(values.mean() - expected) < 4 * values.std() * len(KEYS) ** -0.5 + 1e-5


def test_yes_or_no_is_that_of_torch():
    first, second = (3 * noise.normal(noise.key(seed, "logits"), 4, 5) for seed in range(2))
    first[0, 0], first[1, 1] = 40.0, -40.0
    ours, other, yes = with_graph(Bernoulli(first)), with_graph(Bernoulli(second)), first > torch.randn(4, 5)
    mine, peers = (ours, other), [theirs.Bernoulli(logits=one.logits) for one in (ours, other)]
    for found, expected in (
        (mine[0].log_prob(yes), peers[0].log_prob(yes.float())),
        (mine[0].entropy(), peers[0].entropy()),
        (mine[0].kl(mine[1]), theirs.kl_divergence(*peers)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        inputs = [ours.logits, other.logits]
        pairs = (
            torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in (found, expected)
        )
        for gradient, peer_gradient in zip(*pairs, strict=True):
            torch.testing.assert_close(gradient, peer_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.kl(ours), torch.zeros(4, 5), rtol=0, atol=1e-6)
    assert torch.equal(ours.mode(), first > 0)
    assert not ours.mode().requires_grad


def test_frequencies_of_yes():
    ours = Bernoulli(torch.tensor([0.0, -4.0, 2.0]).expand(len(KEYS), 3))
    keys = noise.fold(KEYS[:, None], torch.arange(3))
    drawn = ours.sample(keys)
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn[:10], Bernoulli(ours.logits[:10]).sample(keys[:10]))
    chances = ours.logits[0].sigmoid()
    error = (chances * (1 - chances) / len(KEYS)).sqrt()
    assert ((drawn.float().mean(0) - chances).abs() < 4 * error).all()
    assert torch.corrcoef(drawn.float().T).triu(1).abs().max() < 4.5 * len(KEYS) ** -0.5


# Samples against the density


@pytest.mark.parametrize("row", [(0, 0), (2, 1), (3, 4)])
def test_frequencies_of_choices(row):
    one = categorical().logits[row]
    counts = Categorical(one.expand(len(KEYS), -1)).sample(KEYS).bincount(minlength=len(one)).double()
    allowed = ~one.isneginf()
    assert not counts[~allowed].any()
    expected = one.double().softmax(-1)[allowed] * len(KEYS)
    assert stats.chisquare(counts[allowed].numpy(), expected.numpy()).pvalue > 1e-3


def test_rare_choices_are_neither_lost_nor_frequent():
    rare = torch.tensor([0.0, -9.0, -9.0])
    counts = Categorical(rare.expand(1_000_000, -1)).sample(noise.key(1, torch.arange(1_000_000))).bincount()
    expected = 1e6 * rare.double().softmax(-1)[1]
    assert ((counts[1:] - expected).abs() < 4 * expected.sqrt()).all()


def test_normal_and_uniform_samples_follow_their_distribution():
    normal, flat = gaussian(), uniform()
    rows = normal.mean[1, 1].expand(len(KEYS), -1), normal.std[1, 1]
    for drawn, mean, std in zip(Gaussian(*rows).sample(KEYS).double().T, rows[0][0], rows[1], strict=True):
        assert stats.kstest(drawn.numpy(), "norm", (mean.item(), std.item())).pvalue > 1e-3
    low, high = flat.low[1, 1], flat.high[1, 1]
    drawn = Uniform(low.expand(len(KEYS), -1), high.expand(len(KEYS), -1)).sample(KEYS)
    for column, least, most in zip(drawn.double().T, low.double(), high.double(), strict=True):
        assert stats.kstest(column.numpy(), "uniform", (least.item(), (most - least).item())).pvalue > 1e-3
    assert torch.corrcoef(drawn.T).triu(1).abs().max() < 4.5 * len(KEYS) ** -0.5


# Actions that are not allowed


def test_forbidden_actions():
    ours, other = categorical(0), categorical(1)
    assert ours.log_prob(torch.ones(4, 5, dtype=torch.int64))[0].eq(-INF).all()
    assert ours.entropy().isfinite().all()
    assert ours.entropy()[1, 2] == 0
    assert ours.mode()[1, 2] == 0
    assert ours.kl(other).isfinite().all()
    free = Categorical(logits(0).nan_to_num(neginf=1.0))
    assert ours.kl(free).isfinite().all()
    assert free.kl(ours)[0].eq(INF).all()
    assert free.kl(ours)[2:].isfinite().all()


def test_gradients_past_forbidden_actions_are_finite_and_zero_there():
    ours, other = with_graph(categorical(0)), with_graph(categorical(1))
    actions = ours.sample(noise.key(0, torch.arange(20).view(4, 5)))
    (ours.log_prob(actions).sum() + ours.entropy().sum() + ours.kl(other).sum()).backward()
    for some in (ours, other):
        assert some.logits.grad.isfinite().all()
        assert not some.logits.grad[some.logits.isneginf()].any()
        assert some.logits.grad[2:].all()


def test_the_expected_score_is_zero():
    """Σ p ∇ log p = 0: what lets a baseline be subtracted without bias."""
    ours = with_graph(categorical())
    choices = torch.arange(6).expand(4, 5, 6)
    scores = Categorical(ours.logits[..., None, :].expand(-1, -1, 6, -1)).log_prob(choices)
    weights = scores.detach().exp()
    (gradient,) = torch.autograd.grad((weights * scores).masked_fill(weights == 0, 0.0).sum(), ours.logits)
    assert gradient.abs().max() < 1e-6


# Edges of the uniform distribution


def test_uniform_outside_and_at_its_edges():
    ours = Uniform(torch.tensor([[0.0, -1.0]]), torch.tensor([[2.0, 1.0]]))
    inside = -torch.tensor([4.0]).log()
    for action in ([1.0, 0.0], [0.0, -1.0], [2.0, 1.0]):
        torch.testing.assert_close(ours.log_prob(torch.tensor([action])), inside)
    for action in ([-0.1, 0.0], [1.0, 1.1], [3.0, 3.0]):
        assert ours.log_prob(torch.tensor([action])) == -INF
    assert ours.kl(replace(ours, high=ours.high - 0.1)) == INF
    assert ours.kl(replace(ours, high=ours.high + 0.1)) > 0


def test_a_point_of_certainty():
    point = torch.tensor([[0.3, -0.5]], requires_grad=True)
    ours = Uniform(point, point + 0)
    drawn = ours.sample(noise.key(0, torch.arange(1)))
    assert torch.equal(drawn, point.detach())
    assert torch.equal(ours.mode(), point.detach())
    assert ours.log_prob(drawn) == ours.entropy() == ours.kl(ours) == 0
    assert ours.log_prob(drawn + 1e-3) == -INF
    (ours.log_prob(drawn) + ours.entropy() + ours.kl(ours)).sum().backward()
    assert point.grad.isfinite().all()


def test_a_point_has_no_density_in_an_interval():
    point = torch.tensor([[0.3, -0.5]])
    assert Uniform(point, point).kl(Uniform(point - 0.1, point + 0.1)) == INF


@pytest.mark.parametrize("extreme", [2.0**-24, 1 - 2.0**-24])
def test_uniform_samples_never_leave_the_interval(monkeypatch, extreme):
    monkeypatch.setattr(noise, "uniform", lambda keys, *shape: torch.full((*keys.shape, *shape), extreme))
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(len(KEYS), 8, generator=generator)
    for scale in (1e-7, 1e-3, 1, 1e3):
        ours = Uniform(low, low + scale * torch.rand(low.shape, generator=generator))
        assert ours.log_prob(ours.sample(KEYS)).isfinite().all()
