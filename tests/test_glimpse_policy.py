"""The glimpse policy and the hybrid loss: who remembers what, and which loss reaches which weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import noise
from foveate.attention import Baseline, Looking, answer, hybrid_loss
from foveate.data.classification import Images
from foveate.distributions import Gaussian, Uniform
from foveate.envs.glimpse import GlimpseEnv
from foveate.learn.baselines import MovingAverage
from foveate.learn.rollout import rollout
from foveate.models.glimpse import Glance, GlimpsePolicy
from foveate.types import Decisions, Trajectory

BATCH, TIME, CLASSES, PATCH = 6, 4, 3, 8
KINDS = list(itertools.product(["mlp", "cnn"], ["rnn", "lstm"]))
BASELINES: list[Baseline] = ["none", "moving-average", "learned", "leave-one-out", "group", "greedy"]


def policy(**options: object) -> GlimpsePolicy:
    torch.manual_seed(1)
    return GlimpsePolicy((1, PATCH, PATCH), 2, CLASSES, **({"hidden": 32} | options))  # type: ignore[arg-type]


def observations(batch: int = BATCH, time: int = TIME) -> dict[str, Tensor]:
    keys = noise.key(3, torch.arange(batch))
    where = noise.uniform(noise.fold(keys, "where"), time, 2) * 2 - 1
    return {"what": noise.uniform(keys, time, 1, PATCH, PATCH), "where": where}


def starts_at(*steps: int) -> Tensor:
    starts = torch.zeros(BATCH, TIME, dtype=torch.bool)
    starts[:, list(steps)] = True
    return starts


def part(seen: dict[str, Tensor], steps: slice) -> dict[str, Tensor]:
    return {name: leaf[:, steps] for name, leaf in seen.items()}


def weights_with_gradient(module: nn.Module) -> set[str]:
    """Names of the submodules that some gradient has reached."""
    reached = set()
    for name, weight in module.named_parameters():
        if weight.grad is not None and bool((weight.grad != 0).any()):
            reached.add(name.split(".")[0])
    return reached


@pytest.mark.parametrize(("eye", "core"), KINDS)
def test_many_steps_at_once_are_single_steps(eye: str, core: str) -> None:
    """Also where episodes start anew in the middle of some rows, and where the sequence is cut in two."""
    agent, seen, starts = policy(glimpse_network=eye, core=core), observations(), starts_at(0)
    starts[::2, 2] = True
    whole, last = agent(seen, None, starts)
    for cuts in ([0, 1, 2, 3, 4], [0, 3, 4]):
        state, made = None, []
        for begin, end in itertools.pairwise(cuts):
            decisions, state = agent(part(seen, slice(begin, end)), state, starts[:, begin:end])
            made.append(decisions)
        for pick in (lambda d: d.distribution.scores, lambda d: d.distribution.location.mean, lambda d: d.values):
            torch.testing.assert_close(torch.cat([pick(d) for d in made], 1), pick(whole))
        torch.testing.assert_close(state, last)


@pytest.mark.parametrize("core", ["rnn", "lstm"])
def test_a_start_clears_the_memory(core: str) -> None:
    """Of its row alone; and no state before the first step is a cleared one."""
    agent, seen = policy(core=core), observations()
    starts = starts_at(0)
    starts[:3, 2] = True
    decisions, _ = agent(seen, None, starts)
    fresh, _ = agent(part(seen, slice(2, 4)), None, starts_at(0)[:, :2])
    torch.testing.assert_close(decisions.distribution.scores[:3, 2:], fresh.distribution.scores[:3])
    assert not torch.isclose(decisions.distribution.scores[3:, 2:], fresh.distribution.scores[3:]).all(-1).any()
    _, used = agent(seen, None, starts)
    after_used, _ = agent(part(seen, slice(0, 1)), used, starts_at(0)[:, :1])
    after_none, _ = agent(part(seen, slice(0, 1)), None, starts_at(0)[:, :1])
    torch.testing.assert_close(after_used.distribution.scores, after_none.distribution.scores)


def test_memory_matters_and_the_future_does_not() -> None:
    agent, seen = policy(), observations()
    scores = agent(seen, None, starts_at(0))[0].distribution.scores
    changed = {name: leaf.clone() for name, leaf in seen.items()}
    changed["what"][:, 1] = 0
    others = agent(changed, None, starts_at(0))[0].distribution.scores
    assert torch.equal(scores[:, 0], others[:, 0])
    assert not torch.isclose(scores[:, 3], others[:, 3]).all(-1).any()


@pytest.mark.parametrize(("eye", "core"), KINDS)
def test_heads_of_reinforcement_do_not_shape_the_memory(eye: str, core: str) -> None:
    agent = policy(glimpse_network=eye, core=core)
    decisions, _ = agent(observations(), None, starts_at(0))
    assert decisions.values is not None
    location = decisions.distribution.location
    (location.mean.sum() + location.log_prob(torch.zeros(BATCH, TIME, 2)).sum()).backward(retain_graph=True)
    assert weights_with_gradient(agent) == {"locate"}
    agent.zero_grad()
    decisions.values.sum().backward(retain_graph=True)
    assert weights_with_gradient(agent) == {"value"}
    agent.zero_grad()
    decisions.distribution.scores[:, -1].square().sum().backward()
    assert weights_with_gradient(agent) == {"what", "where", "join", "core", "classify"}


def test_the_answer_trains_every_glimpse() -> None:
    """The last step's class scores reach back to the first glimpse."""
    seen = observations()
    seen["what"].requires_grad_()
    policy()(seen, None, starts_at(0))[0].distribution.scores[:, -1].sum().backward()
    assert seen["what"].grad is not None
    assert seen["what"].grad.flatten(2).abs().sum(-1).gt(0).all()


def test_log_prob_of_a_glance_is_the_locations() -> None:
    decisions, _ = policy(std=0.3)(observations(), None, starts_at(0))
    glance = decisions.distribution
    keys = noise.key(7, torch.arange(BATCH))[:, None] + torch.arange(TIME)
    action = glance.sample(keys)
    assert action.shape == (BATCH, TIME, 2 + CLASSES)
    assert not action.requires_grad
    assert torch.equal(action[..., 2:], glance.scores.detach())
    assert torch.equal(action[..., :2], glance.location.sample(keys))
    normal = torch.distributions.Normal(glance.location.mean, 0.3)
    torch.testing.assert_close(glance.log_prob(action), normal.log_prob(action[..., :2]).sum(-1))
    other_scores = torch.cat((action[..., :2], torch.randn(BATCH, TIME, CLASSES)), -1)
    assert torch.equal(glance.log_prob(other_scores), glance.log_prob(action))
    torch.testing.assert_close(glance.entropy(), normal.entropy().sum(-1))
    assert torch.equal(glance.mode()[..., :2], glance.location.mean)
    other = Glance(Gaussian(torch.zeros(BATCH, TIME, 2), torch.tensor(0.3)), glance.scores)
    torch.testing.assert_close(glance.kl(other), glance.location.kl(other.location))


@pytest.mark.parametrize("looking", ["random", "centre"])
def test_controls_never_learn_where(looking: str) -> None:
    agent = policy(looking=looking)
    assert not {"locate", "value"} & {name for name, _ in agent.named_children()}
    decisions, _ = agent(observations(), None, starts_at(0))
    assert decisions.values is None
    glance = decisions.distribution
    assert isinstance(glance.location, Uniform)
    assert not glance.log_prob(glance.mode()).requires_grad
    keys = noise.key(1, torch.arange(BATCH * TIME)).view(BATCH, TIME)
    drawn = glance.sample(keys)[..., :2]
    assert drawn.abs().max() <= 1
    assert drawn.std() > 0.4 if looking == "random" else drawn.eq(0).all()
    trajectory, made, labels = episode(looking=looking)
    loss, _ = hybrid_loss(trajectory, made, labels, Looking(), MovingAverage(), None, torch.sum)
    torch.testing.assert_close(loss, F.cross_entropy(made.distribution.scores[:, -1], labels))


def environment(copies: int, size: int = 10) -> GlimpseEnv:
    keys = noise.key(11, torch.arange(size))
    pixels = noise.integers(keys, 256, 1, 16, 16).to(torch.uint8)
    images = Images(pixels, torch.arange(size) % CLASSES, ("a", "b", "c"), "synthetic", "train")
    return GlimpseEnv(copies, images=images, glimpses=TIME, patch=PATCH, autoreset="disabled")


def episode(agent: GlimpsePolicy | None = None, **options: object) -> tuple[Trajectory, Decisions, Tensor]:
    """Two samples of each of three images, with the graph; some answers are made right and some wrong."""
    agent = agent or policy(**options)
    env, group = environment(BATCH), torch.arange(BATCH) // 2
    trajectory, decisions = rollout(env, agent, noise.key(2, torch.arange(BATCH)), ids=group, grad=True, group=group)
    assert decisions is not None
    rewards = trajectory.rewards.clone()
    rewards[:, -1] = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return replace(trajectory, rewards=rewards), decisions, env.state.labels


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_loss_is_the_written_out_one(baseline: Baseline) -> None:
    """Gradients of all weights, for every baseline, against the three terms of the paper put together by hand."""
    agent = policy()
    trajectory, decisions, labels = episode(agent)
    average = MovingAverage()
    average.update(torch.tensor([0.25, 0.75]))
    reward = trajectory.rewards[:, -1]
    greedy = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    location = decisions.distribution.location
    log_probs = torch.distributions.Normal(location.mean, location.std).log_prob(trajectory.actions[..., :2]).sum(-1)
    values = decisions.values
    assert values is not None
    paired = reward.view(3, 2)
    advantage = {
        "none": reward[:, None],
        "moving-average": reward[:, None] - 0.5,
        "learned": reward[:, None] - values.detach(),
        "leave-one-out": reward[:, None] - paired.flip(1).reshape(-1, 1),
        "group": ((paired - paired.mean(1, keepdim=True)) / (paired.std(1, keepdim=True) + 1e-4)).reshape(-1, 1),
        "greedy": (reward - greedy)[:, None],
    }[baseline].expand(BATCH, TIME)
    by_hand = F.cross_entropy(decisions.distribution.scores[:, -1], labels)
    by_hand = by_hand - (log_probs * advantage)[:, :-1].mean() + (values - reward[:, None]).square().mean()
    looking = Looking(samples=2, baseline=baseline)
    loss, _ = hybrid_loss(trajectory, decisions, labels, looking, average, greedy, torch.sum)
    weights = list(agent.parameters())
    expected = torch.autograd.grad(by_hand, weights, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_value_head_learns_from_the_value_loss_alone(baseline: Baseline) -> None:
    agent = policy()
    trajectory, decisions, labels = episode(agent)
    looking, greedy = Looking(samples=2, baseline=baseline), torch.zeros(BATCH)
    loss, _ = hybrid_loss(trajectory, decisions, labels, looking, MovingAverage(), greedy, torch.sum)
    assert decisions.values is not None
    error = (decisions.values - trajectory.rewards.sum(1, keepdim=True)).square().mean()
    head = list(agent.value.parameters())
    expected = torch.autograd.grad(error, head, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(loss, head), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_last_location_carries_no_log_probability() -> None:
    """Whatever was drawn after the last glimpse, the location head learns the same; from any other it does not."""

    def gradient(step: int | None) -> Tensor:
        agent = policy()
        trajectory, decisions, labels = episode(agent)
        if step is not None:
            actions = trajectory.actions.clone()
            actions[:, step, :2] += 0.3
            trajectory = replace(trajectory, actions=actions)
        looking = Looking(samples=2, baseline="leave-one-out")
        hybrid_loss(trajectory, decisions, labels, looking, MovingAverage(), None, torch.sum)[0].backward()
        return torch.cat([weight.grad.flatten() for weight in agent.locate.parameters() if weight.grad is not None])

    assert torch.equal(gradient(TIME - 1), gradient(None))
    assert not torch.allclose(gradient(TIME - 2), gradient(None))


def test_the_density_is_that_of_the_location_as_drawn() -> None:
    """A location drawn outside of the image is looked at at the edge, but its density is the drawn one's."""
    trajectory, decisions, _ = episode(std=2.0)
    drawn = trajectory.actions[:, :-1, :2]
    assert drawn.abs().max() > 1
    torch.testing.assert_close(trajectory.observations["where"][:, 1:], drawn.clamp(-1, 1))
    location = decisions.distribution.location
    density = torch.distributions.Normal(location.mean, 2.0).log_prob(trajectory.actions[..., :2]).sum(-1)
    torch.testing.assert_close(trajectory.log_probs, density.detach())


@pytest.mark.parametrize("classify", ["last", "every"])
def test_cross_entropy_at_the_last_or_at_every_glimpse(classify: str) -> None:
    trajectory, decisions, labels = episode()
    scores = decisions.distribution.scores
    looking = Looking(samples=2, classify=classify)  # type: ignore[arg-type]
    _, parts = hybrid_loss(trajectory, decisions, labels, looking, MovingAverage(), None, torch.sum)
    by_step = torch.stack([F.cross_entropy(scores[:, step], labels) for step in range(TIME)])
    torch.testing.assert_close(parts["cross_entropy"], by_step[-1] if classify == "last" else by_step.mean())


def test_the_loss_reports_the_reward_and_leaves_the_average_alone() -> None:
    """It is updated after use, with the mean over all processes, by the training loop."""
    trajectory, decisions, labels = episode()
    average = MovingAverage()
    looking = Looking(samples=2, baseline="moving-average")
    _, parts = hybrid_loss(trajectory, decisions, labels, looking, average, None, torch.sum)
    assert average() == 0
    torch.testing.assert_close(parts["reward"], torch.tensor(4 / 6))
    wrong = (decisions.distribution.scores[:, -1].argmax(-1) != labels).float().mean()
    torch.testing.assert_close(parts["train_error"], 100 * wrong)


@pytest.mark.parametrize("size", [4, 10, 3])
def test_answers_cover_every_example_once(size: int) -> None:
    """Also where the number of copies does not divide them; and they do not depend on that number."""
    agent = policy().train()
    found = answer(environment(4), agent, 5, size)
    assert agent.training
    assert found.scores.shape == (size, TIME, CLASSES)
    assert found.locations.shape == (size, TIME, 2)
    assert torch.equal(found.labels, torch.arange(size) % CLASSES)
    alone = answer(environment(1), agent, 5, size)
    torch.testing.assert_close(found.scores, alone.scores)
    torch.testing.assert_close(found.locations, alone.locations)
    wrong = (found.scores[:, 1].argmax(-1) != found.labels).float().mean()
    assert found.error(2) == pytest.approx(100 * float(wrong))
    assert found.error() == found.error(TIME)


def test_greedy_answers_take_the_mean_location() -> None:
    agent = policy(std=0.5)
    greedy, again = (answer(environment(5), agent, seed, 10, greedy=True) for seed in (5, 5))
    torch.testing.assert_close(greedy.locations, again.locations)
    drawn = answer(environment(5), agent, 5, 10)
    assert torch.equal(greedy.locations[:, 0], drawn.locations[:, 0])
    assert not torch.isclose(greedy.locations[:, 1], drawn.locations[:, 1]).all(-1).any()


def test_bf16_is_the_same_network_to_its_precision():
    torch.manual_seed(0)
    exact = GlimpsePolicy((3, 12, 12), 2, 10, glimpse_network="cnn")
    quick = GlimpsePolicy((3, 12, 12), 2, 10, glimpse_network="cnn", precision="bf16")
    quick.load_state_dict(exact.state_dict())
    seen = {"what": torch.rand(4, 2, 3, 12, 12), "where": torch.rand(4, 2, 2)}
    starts = torch.tensor([[True, False]] * 4)
    one, other = (policy(seen, None, starts)[0] for policy in (exact, quick))
    assert other.distribution.scores.dtype == torch.float32
    torch.testing.assert_close(other.distribution.scores, one.distribution.scores, rtol=0, atol=2e-2)
    assert not torch.equal(other.distribution.scores, one.distribution.scores)
    other.distribution.scores.logsumexp(-1).sum().backward()
    weight = quick.what.layers[0].weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    assert weight.grad.any()
