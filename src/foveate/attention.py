"""Learning where to look by the answer's reward: the hybrid loss of hard attention, for any glimpse environment.

The environment shows glimpses and rewards the answer after the last one; its state names the right `labels`. The policy
draws locations and computes class scores (`foveate.models.glimpse`). What can be differentiated is: cross-entropy goes
through class head, core and glimpse network. The locations are decisions: REINFORCE, with the answer's reward less a
baseline (Mnih et al. 2014, section 3.1, equation 1, and "hybrid supervised loss").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from foveate import noise
from foveate.envs.tensor_env import TensorEnv
from foveate.learn.baselines import MovingAverage, group_normalised, leave_one_out, value_loss
from foveate.learn.policy_gradient import masked_mean, policy_gradient
from foveate.learn.returns import reward_to_go
from foveate.learn.rollout import rollout
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.glimpse import GlimpsePolicy
from foveate.run import Run
from foveate.types import Decisions, InputError, Trajectory, concatenate

Baseline = Literal["none", "moving-average", "learned", "leave-one-out", "group", "greedy"]


@dataclass(frozen=True)
class Looking:
    """How to learn where to look.

    Attributes:
        batch: images in an update, over all processes.
        samples: episodes of each image in an update (Monte Carlo samples, M in the paper).
        baseline: what is subtracted from the reward.
        classify: take the cross-entropy at the "last" glimpse or at "every" one (their mean).
        learning_rate: peak of the one-cycle schedule, for Adam.
        credit: what a location is praised for: the reward of the "answer", or the "gains", how much each glimpse from
            the next on raised the probability given to the right class. Their sum is the last probability less the
            present one: for the locations that is the reward "likelihood", told step by step.
        discount: of the gains, a glimpse. Below 1 it is near-sighted, which is biased, and takes most variance away.
        explore: how many times wider than in the end locations are drawn at first; it falls evenly to 1.
    """

    batch: int = 256
    samples: int = 1
    baseline: Baseline = "learned"
    classify: Literal["last", "every"] = "last"
    learning_rate: float = 2e-3
    credit: Literal["answer", "gains"] = "answer"
    discount: float = 1.0
    explore: float = 1.0

    @classmethod
    def of(cls, config: Any) -> Looking:
        """What a system's config says of it, by fields of the same names; defaults for the rest."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(cls) if hasattr(config, one.name)})


def check(config: Any) -> None:
    """Check the fields that systems which learn to look share.

    Raises:
        InputError: a number out of its range, or a baseline that compares samples where there is one of each input.
    """
    for name in ("glimpses", "patch", "scales", "factor", "hidden", "samples", "batch", "episodes"):
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise InputError(f"{name}: found {value}, expected at least 1")
    for name in ("std", "explore"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}: found {getattr(config, name)}, expected a number above 0")
    if not 0 <= config.learning_rate < math.inf:
        raise InputError(f"learning_rate: found {config.learning_rate}, expected 0 or more")
    if getattr(config, "glimpse_network", "mlp") == "cnn" and config.patch == 1:
        raise InputError("patch: found 1, but glimpse_network cnn takes at least 2; choose 2, or mlp")
    if config.control_share is not None and not 0 < config.control_share < 1:
        raise InputError(
            f"control_share: found {config.control_share}, expected a part of the budget, above 0, below 1"
        )
    if config.baseline in ("leave-one-out", "group") and config.samples < 2:
        raise InputError(
            f"samples: found {config.samples}, but baseline {config.baseline!r} compares at least 2 of each image"
        )


def learn_to_look(
    run: Run,
    phase: str,
    share: float,
    env: TensorEnv,
    policy: nn.Module,
    optimizer: Optimizer,
    average: MovingAverage,
    looking: Looking,
    validate: Callable[[], dict[str, float]],
    every: int = 500,
) -> None:
    """Train a glimpse policy for one phase of a run; a policy that draws its places blindly learns to classify only.

    Args:
        run: owns the loop.
        phase: its name in the logs.
        share: of the run's budget.
        env: `rows · samples` copies without autoreset, `rows` being this process's part of the batch.
        policy: as `run.track` returned it.
        optimizer: as `run.track` returned it.
        average: the moving-average baseline, tracked.
        looking: how.
        validate: scores on held-out examples, logged every `every` steps.
        every: steps between validations.
    """
    rows = torch.arange(looking.batch)[run.rows(looking.batch)].repeat_interleave(looking.samples)
    copy = torch.arange(len(rows)) % looking.samples
    for step in run.steps(phase, share):
        if isinstance(policy, GlimpsePolicy):
            policy.spread = looking.explore + (1 - looking.explore) * run.progress
        ids = noise.examples(run.seed, step, looking.batch, env.examples)[rows].to(run.device)
        keys = noise.key(run.seed, phase, step, rows, copy).to(run.device)
        trajectory, decisions = rollout(env, policy, keys, ids=ids, grad=True, group=rows.to(run.device))
        assert decisions is not None
        labels = env.state.labels
        greedy = None
        if looking.baseline == "greedy":
            greedy = rollout(env, policy, keys, ids=ids, greedy=True)[0].rewards.sum(1)
        loss, parts = hybrid_loss(trajectory, decisions, labels, looking, average, greedy, run.count)
        set_learning_rate(optimizer, one_cycle(run.progress, looking.learning_rate))
        run.optimise(loss, optimizer)
        average.update(run.mean(parts["reward"])[None])
        run.log(**parts)
        if (step + 1) % every == 0:
            if isinstance(policy, GlimpsePolicy):
                policy.spread = 1.0
            run.log(**validate())


def hybrid_loss(
    trajectory: Trajectory,
    decisions: Decisions,
    labels: Int[Tensor, " batch"],
    looking: Looking,
    average: MovingAverage,
    greedy: Float[Tensor, " batch"] | None,
    count: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy of the answer, REINFORCE of the locations, squared error of the baseline; and what to log.

    The location drawn after the last glimpse leads nowhere and carries no log-probability; nor does the first one,
    which is the environment's. As published the three terms train disjoint sets of weights, so they are not weighted;
    with a policy that does not detach, REINFORCE shares the core with the cross-entropy.
    """
    scores = decisions.distribution.scores
    last = trajectory.mask.sum(1) - 1
    final = scores[torch.arange(len(last), device=last.device), last]
    if looking.classify == "every":
        entropies = F.cross_entropy(scores.flatten(0, 1), labels.repeat_interleave(scores.shape[1]), reduction="none")
        answer = masked_mean(entropies.view(trajectory.mask.shape), trajectory.mask, count(trajectory.mask))
    else:
        answer = F.cross_entropy(final, labels, reduction="sum") / count(trajectory.mask[:, 0])
    reward = trajectory.rewards.sum(1)
    right = (final.argmax(-1) == labels).float()
    parts = {"cross_entropy": answer.detach(), "reward": reward.mean(), "train_error": 100 * (1 - right.mean())}
    if decisions.values is None:
        return answer, parts
    chosen = trajectory.mask & ~trajectory.terminated
    if looking.credit == "gains":
        returns = reward_to_go(_gains(scores.detach(), labels, trajectory.mask), trajectory.mask, looking.discount)
    else:
        returns = reward_to_go(trajectory.rewards, trajectory.mask)
    value = value_loss(decisions.values, returns, trajectory.mask, count(trajectory.mask))
    log_probs = decisions.distribution.log_prob(trajectory.actions)
    advantages = returns - _baseline(looking.baseline, trajectory, returns, average, greedy)
    if looking.baseline == "group":
        assert trajectory.group is not None
        advantages = group_normalised(reward, trajectory.group)
    # with one glimpse nothing is chosen: a sum of nothing, divided by a speck
    places = policy_gradient(log_probs, None, advantages, chosen, count(chosen).clamp(min=1e-6)).loss
    return answer + places + value, parts | {"value_loss": value.detach()}


def _gains(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """What the glimpse after each step adds to the probability of the right class; 0 after the last."""
    likelihood = scores.softmax(-1).gather(-1, labels[:, None, None].expand(-1, scores.shape[1], 1)).squeeze(-1)
    return F.pad(likelihood.diff(dim=1) * mask[:, 1:], (0, 1))


def _baseline(
    name: Baseline, trajectory: Trajectory, returns: Tensor, average: MovingAverage, greedy: Tensor | None
) -> Tensor | float:
    reward = trajectory.rewards.sum(1)
    if name == "learned":
        assert trajectory.values is not None
        return trajectory.values
    if name == "moving-average":
        return average()
    if name == "leave-one-out":
        assert trajectory.group is not None
        return leave_one_out(reward, trajectory.group)
    if name == "greedy":
        assert greedy is not None
        return greedy[:, None]
    return 0.0


@dataclass(frozen=True)
class Answers:
    """What a policy answered on every example, after each glimpse.

    Attributes:
        scores: class scores after each glimpse.
        locations: where the glimpses fell, (x, y) in [-1, 1].
        labels: the right classes.
    """

    scores: Float[Tensor, "size time classes"]
    locations: Float[Tensor, "size time 2"]
    labels: Int[Tensor, " size"]

    def error(self, glimpses: int | None = None) -> float:
        """Share of wrong answers after so many glimpses (None: all), in percent."""
        step = self.scores.shape[1] if glimpses is None else glimpses
        return float((self.scores[:, step - 1].argmax(-1) != self.labels).float().mean() * 100)


def answer(env: TensorEnv, policy: nn.Module, seed: int, size: int, greedy: bool = False) -> Answers:
    """Let a policy answer examples 0 to `size` - 1, one episode each, `env.num_envs` at a time.

    Without `greedy` every location is drawn once: the policy as it was trained, not averaged over several tries.
    """
    found = []
    was_training = policy.training
    policy.eval()
    for start in range(0, size, env.num_envs):
        ids = torch.arange(start, start + env.num_envs, device=env.device)
        trajectory, _ = rollout(
            env, policy, noise.key(seed, "evaluation", ids), ids=ids.clamp(max=size - 1), greedy=greedy
        )
        keep = slice(0, size - start)
        classes = trajectory.actions.shape[-1] - 2
        found.append(
            Answers(
                trajectory.actions[keep, :, -classes:],
                trajectory.observations["where"][keep, :, :2],
                env.state.labels[keep],
            )
        )
    policy.train(was_training)
    return concatenate(found, 0)
