"""What each variance reduction of the classic lecture is worth, on a walk small enough to know the truth exactly.

    python benchmarks/gradient_variance.py        # writes docs/figures/gradient_variance.png, a few seconds

The walk: six places on a line, three moves (left, stay, right), a reward at each place, an end at the right. The
policy is a table of logits. The expected return, its gradient, the values, and the expectation of every biased
estimator follow by recursion over time; the variance is measured on sampled episodes, each with its own copy of the
table, so that one backward pass gives the gradient of every episode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from foveate import noise
from foveate.distributions import Categorical
from foveate.learn.baselines import leave_one_out
from foveate.learn.policy_gradient import policy_gradient
from foveate.learn.returns import episode_return, generalised_advantage, reward_to_go
from foveate.types import Trajectory

PLACES, MOVES, START = 6, 3, 3
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "gradient_variance.png"


def rewards_at() -> Tensor:
    """[places]: what arriving at a place pays."""
    return torch.tensor([0.0, 1.0, 0.5, 1.5, 0.5, 3.0])


def arrivals() -> Tensor:
    """[places, moves]: where a move leads."""
    return (torch.arange(PLACES)[:, None] + torch.arange(MOVES) - 1).clamp(0, PLACES - 1)


def table() -> Tensor:
    """[places, moves]: logits of a policy that is neither uniform nor sure of itself."""
    return torch.sin(torch.arange(PLACES * MOVES) * 1.7).view(PLACES, MOVES) * 0.8


def replay(actions: Tensor) -> Trajectory:
    """Walk along given moves, [batch, time]; the observation is the place."""
    place = torch.full_like(actions[:, 0], START)
    places, arrived = [], []
    for move in actions.unbind(1):
        places.append(place)
        place = torch.where(place == PLACES - 1, place, arrivals()[place, move])
        arrived.append(place)
    before, after = torch.stack(places, 1), torch.stack(arrived, 1)
    mask = before != PLACES - 1
    return Trajectory(
        observations=before,
        actions=actions,
        log_probs=torch.zeros(actions.shape),
        rewards=torch.where(mask, rewards_at()[after], 0.0),
        mask=mask,
        # The horizon belongs to the task, so that its end is one too; nothing follows it.
        terminated=mask & ((after == PLACES - 1) | (torch.arange(actions.shape[1]) == actions.shape[1] - 1)),
        truncated=torch.zeros_like(mask),
    )


def walk(logits: Tensor, horizon: int, keys: Tensor) -> Trajectory:
    """Sample one episode a key."""
    place, actions = torch.full_like(keys, START), []
    for step in range(horizon):
        actions.append(Categorical(logits[place]).sample(noise.key(keys, "move", step)))
        place = torch.where(place == PLACES - 1, place, arrivals()[place, actions[-1]])
    return replay(torch.stack(actions, 1))


def values(logits: Tensor, horizon: int, discount: float = 1.0) -> Tensor:
    """[horizon + 1, places]: exact expected return from each step and place on."""
    chances, found = logits.softmax(-1), [torch.zeros(PLACES)]
    inside = (torch.arange(PLACES) != PLACES - 1).float()
    for _ in range(horizon):
        after = (rewards_at() + discount * found[-1])[arrivals()]
        found.append((chances * after).sum(-1) * inside)
    return torch.stack(found[::-1])


def visits(logits: Tensor, horizon: int) -> Tensor:
    """[horizon, places]: probability of deciding at a place at a step."""
    inside = (torch.arange(PLACES) != PLACES - 1).float()
    here, found = torch.eye(PLACES)[START], []
    for _ in range(horizon):
        found.append(here * inside)
        moved = (found[-1][:, None] * logits.softmax(-1)).flatten()
        here = torch.zeros(PLACES).index_add(0, arrivals().flatten(), moved)
    return torch.stack(found)


def exact_gradient(logits: Tensor, horizon: int, discount: float = 1.0) -> Tensor:
    """[places, moves]: gradient of the expected (discounted) return from the start."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(values(leaf, horizon, discount)[0, START], leaf)[0]


def expected_gradient(logits: Tensor, critic: Tensor, discount: float, lam: float) -> Tensor:
    """[places, moves]: what the gradient with GAE's advantages is on average, for a critic of [horizon + 1, places].

    Σ_t P(s_t = s) Σ_a ∇π(a | s) (Q^λ - V)(s, a), where Q^λ(s, a) = r + γ [(1-λ) V(s') + λ Σ π Q^λ(s', ·)].
    """
    horizon = len(critic) - 1
    chances, ahead, inside = logits.softmax(-1), torch.zeros(PLACES), (torch.arange(PLACES) != PLACES - 1).float()
    total = torch.zeros_like(logits)
    for step, here in reversed(list(enumerate(visits(logits, horizon)))):
        mixed = (1 - lam) * critic[step + 1] * inside * (step < horizon - 1) + lam * ahead
        quality = (rewards_at() + discount * mixed)[arrivals()]
        ahead = (chances * quality).sum(-1) * inside
        advantage = quality - critic[step][:, None]
        total += here[:, None] * chances * (advantage - (chances * advantage).sum(-1, keepdim=True))
    return total


def gradients(logits: Tensor, trajectory: Trajectory, advantages: Tensor) -> Tensor:
    """[batch, places, moves]: for each episode what `policy_gradient` would add to the table, uphill."""
    copies = logits.expand(len(advantages), -1, -1).clone().requires_grad_()
    rows = torch.arange(len(advantages))[:, None]
    log_probs = Categorical(copies[rows, trajectory.observations]).log_prob(trajectory.actions)
    loss = policy_gradient(log_probs, None, advantages, trajectory.mask, count=1).loss
    return -torch.autograd.grad(loss, copies)[0]


def mean_of_others(returns: Tensor, mask: Tensor) -> Tensor:
    """[batch, time]: for each step the mean return of the other episodes that came as far."""
    steps = torch.arange(mask.shape[1]).expand_as(mask)
    baseline = torch.zeros_like(returns)
    baseline[mask] = leave_one_out(returns[mask], steps[mask]).squeeze(1)
    return baseline


def advantage(trajectory: Trajectory, critic: Tensor, discount: float, lam: float) -> Tensor:
    """[batch, time]: GAE with a critic of [horizon + 1, places]."""
    t = trajectory
    before = critic[torch.arange(t.mask.shape[1]), t.observations]
    return generalised_advantage(
        t.rewards, before, torch.zeros(len(before)), t.mask, t.terminated, t.truncated, discount, lam
    )[0]


def estimators(logits: Tensor, horizon: int) -> dict[str, tuple[Callable[[Trajectory], Tensor], Tensor]]:
    """Name -> (advantages of a trajectory, what the gradient with them is on average)."""
    truth, discount, lam = exact_gradient(logits, horizon), 0.9, 0.9
    nothing, known, short = torch.zeros(horizon + 1, PLACES), values(logits, horizon), values(logits, horizon, discount)
    rough = known * 0.5  # a critic in the middle of its training

    def expected(critic: Tensor, discount: float, lam: float) -> Tensor:
        return expected_gradient(logits, critic, discount, lam)

    def less_others(t: Trajectory) -> Tensor:
        returns = reward_to_go(t.rewards, t.mask)
        return returns - mean_of_others(returns, t.mask)

    return {
        "whole return": (lambda t: episode_return(t.rewards, t.mask), truth),
        "whole return - mean of others": (
            lambda t: (whole := episode_return(t.rewards, t.mask)) - mean_of_others(whole, t.mask),
            truth,
        ),
        "reward-to-go": (lambda t: reward_to_go(t.rewards, t.mask), truth),
        "reward-to-go, discount 0.9": (
            lambda t: reward_to_go(t.rewards, t.mask, discount),
            expected(nothing, discount, 1.0),
        ),
        "reward-to-go - mean of others": (less_others, truth),
        "reward-to-go - exact value": (lambda t: advantage(t, known, 1.0, 1.0), truth),
        "discount 0.9 - exact value": (lambda t: advantage(t, short, discount, 1.0), expected(short, discount, 1.0)),
        "GAE 0.9, exact value": (lambda t: advantage(t, known, 1.0, lam), expected(known, 1.0, lam)),
        "GAE 0.9, half the value": (lambda t: advantage(t, rough, 1.0, lam), expected(rough, 1.0, lam)),
    }


def measure(horizon: int, episodes: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Name -> (variance of one episode's gradient, summed over the table; squared length of its bias, exact)."""
    logits, found = table(), {}
    trajectory = walk(logits, horizon, noise.key(seed, torch.arange(episodes)))
    truth = exact_gradient(logits, horizon)
    for name, (advantages, expectation) in estimators(logits, horizon).items():
        samples = gradients(logits, trajectory, advantages(trajectory))
        found[name] = (float(samples.var(0).sum()), float((expectation - truth).square().sum()))
    return found


def draw(rows: dict[str, tuple[float, float]], horizon: int, path: Path) -> None:
    """Two bars an estimator, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    left, number = 0.1, "{:,.0f}".format
    for place, (variance, bias) in enumerate(rows.values()):
        axes.barh(place - 0.2, variance, 0.4, color="#31688e", label="variance of one episode" if place == 0 else None)
        axes.text(variance * 1.08, place - 0.2, number(variance), va="center", fontsize=8)
        if bias > 1e-9:
            axes.barh(place + 0.2, bias, 0.4, color="#e07b39", label="squared bias" if place == 3 else None)
            axes.text(bias * 1.08, place + 0.2, number(bias), va="center", fontsize=8)
        else:
            axes.text(left * 1.08, place + 0.2, "unbiased", va="center", fontsize=8, color="#888888")
    size = float(exact_gradient(table(), horizon).square().sum())
    axes.axvline(size, color="#444444", linestyle=":", label="squared length of the true gradient")
    axes.set(xscale="log", xlabel=f"gradient of the expected return, walk of at most {horizon} steps", xlim=(left, 1e4))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    HORIZON = 20
    results = measure(HORIZON, episodes=20_000)
    for label, (spread, bias) in results.items():
        print(f"{label:32} variance {spread:9.3f}   squared bias {bias:9.5f}")
    draw(results, HORIZON, FIGURE)
    print(f"wrote {FIGURE}")
