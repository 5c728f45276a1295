"""The words every room speaks: what happened, what the present policy thinks of it, and how good it was.

How the five kinds of learner use `Trajectory` and `Decisions`:

- a recurrent policy walks an environment; time is the environment's step, `starts` marks where its state is cleared;
- a token sampler emits a whole answer; time is the token's position, `mask` ends after the end token;
- a denoiser takes T stochastic steps; time is the denoising step, `mask` is false where a step has no variance;
- PPO and GRPO read one `Trajectory` several times: it carries no graph, each epoch makes new `Decisions`;
- DAgger keeps the expert's actions in `extras`; with many processes each holds its own rows, and masked means divide
  by the count over all of them.

Q-learning stores transitions, not trajectories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Tree: TypeAlias = Any  # a Tensor, None, or a dict, tuple, list or dataclass of trees
State: TypeAlias = Any  # a tree whose tensors begin with the batch
T = TypeVar("T")


class InputError(ValueError):
    """The user's file, field or folder is not usable. One line: what was found, what was expected, the remedy."""


def known(value: T | None) -> T:
    """What was None until somebody decided: a field of a config that `resolve` has filled in."""
    assert value is not None
    return value


def check_least(config: Any, least: int, *names: str) -> None:
    """Check that these numbers of a config are `least` or more; None is nothing wrong.

    Raises:
        InputError: one is less, or NaN.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and not value >= least:
            raise InputError(f"{name}: found {value:g}, expected at least {least}")


def map_tree(function: Callable[..., Any], first: T, *rest: T) -> T:
    """Apply `function` to the tensors at the same place of one or several trees of the same shape.

    Leaves that are not tensors (None, numbers, strings) are taken from the first tree.

    Raises:
        ValueError: another tree has a tensor where the first has none, or other names.
    """
    if isinstance(first, Tensor):
        return cast(T, function(first, *rest))
    if isinstance(first, dict):
        if any(set(tree) != set(first) for tree in rest):  # type: ignore[call-overload]
            raise ValueError(f"trees with different names: {[list(tree) for tree in (first, *rest)]}")  # type: ignore[call-overload]
        return cast(T, {name: map_tree(function, first[name], *(tree[name] for tree in rest)) for name in first})  # type: ignore[index]
    if isinstance(first, (tuple, list)):
        return cast(T, type(first)(map_tree(function, *leaves) for leaves in zip(first, *rest, strict=True)))
    if is_dataclass(first) and not isinstance(first, type):
        changed = {
            entry.name: map_tree(function, getattr(first, entry.name), *(getattr(tree, entry.name) for tree in rest))
            for entry in fields(first)
        }
        return cast(T, replace(first, **changed))
    if any(isinstance(tree, Tensor) for tree in rest):
        raise ValueError(f"trees of different shape: {first!r} in the first, a tensor in another")
    return first


def in_full(tree: T) -> T:
    """Tensors of half precision as float32, anything else as it is."""
    half = torch.bfloat16, torch.float16
    return map_tree(lambda leaf: leaf.float() if leaf.dtype in half else leaf, tree)


def concatenate(trees: list[T], dim: int) -> T:
    """Join trees of the same shape along one dimension of their tensors, e.g. the steps of a rollout along time."""
    return map_tree(lambda *leaves: torch.cat(leaves, dim), *trees)


def rows_of(tree: Tree) -> int:
    """How many rows the tensors of a tree have."""
    sizes: list[int] = []

    def note(leaf: Tensor) -> Tensor:
        sizes.append(len(leaf))
        return leaf

    map_tree(note, tree)
    return sizes[0]


def time_of(tree: Tree) -> int:
    """How many steps the first tensor of a tree of [batch, time, ...] has."""
    sizes: list[int] = []

    def note(leaf: Tensor) -> Tensor:
        sizes.append(leaf.shape[1])
        return leaf

    map_tree(note, tree)
    return sizes[0]


def split(tree: T, size: int) -> list[T]:
    """A tree in pieces of `size` rows each, the last one maybe shorter: what `concatenate` joins along the first."""

    def piece(first: int) -> T:
        return map_tree(lambda leaf: leaf[first : first + size], tree)

    return [piece(first) for first in range(0, rows_of(tree), size)]


@runtime_checkable
class Distribution(Protocol):
    """A distribution over actions with a batch of shape [batch, time]; a dataclass of tensors, so that it is a tree."""

    def sample(self, keys: Int[Tensor, "batch time"]) -> Tree:
        """Draw actions. The draw is a function of the keys (see `foveate.noise`) and carries no graph."""

    def mode(self) -> Tree:
        """The most likely actions, without a graph."""

    def log_prob(self, actions: Tree) -> Float[Tensor, "batch time"]:
        """Log-probability (or density) of actions, in nats."""

    def entropy(self) -> Float[Tensor, "batch time"]:
        """Entropy in nats."""

    def kl(self, other: Any) -> Float[Tensor, "batch time"]:
        """Exact KL(self || other) in nats, for another distribution of the same kind."""


@dataclass(frozen=True)
class Trajectory:
    """What happened. Carries no graph.

    Attributes:
        observations: tree of [batch, time, ...], what the policy saw before each action.
        actions: tree of [batch, time, ...], what it did, as sampled.
        log_probs: log-probability of the actions under the policy that took them, in nats.
        rewards: reward that followed each action.
        mask: true where a step was taken; everything else in the row is padding.
        terminated: true at the step that ended the task itself: nothing is to come, so nothing is bootstrapped.
        truncated: true at the step at which a limit cut the episode: its value is bootstrapped.
        values: the critic's estimate of the return before each action, if there is a critic.
        last_value: its estimate after the last step, for bootstrapping.
        group: which input a row is a sample of; rows of one group are compared by group baselines.
        extras: further [batch, time] tensors: an expert's actions, a reference policy's log-probabilities.
    """

    observations: Tree
    actions: Tree
    log_probs: Float[Tensor, "batch time"]
    rewards: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    terminated: Bool[Tensor, "batch time"]
    truncated: Bool[Tensor, "batch time"]
    values: Float[Tensor, "batch time"] | None = None
    last_value: Float[Tensor, " batch"] | None = None
    group: Int[Tensor, " batch"] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """What the present policy thinks of the steps of a trajectory. Carries the graph.

    Attributes:
        distribution: over the actions, batch shape [batch, time].
        values: [batch, time], the critic's estimates, if there is a critic.
        log_probs: of the actions that were given, in nats: a `Sampler` scores whole answers, so it knows them; a
            `Policy` is asked before there is an action.
        mask: which steps were decisions, where the answer itself tells (what follows the end of a text was none).
        extras: whatever else the policy computed on the way, [batch, time, ...] (class scores, features).
    """

    distribution: Any
    values: Float[Tensor, "batch time"] | None = None
    log_probs: Float[Tensor, "batch time"] | None = None
    mask: Bool[Tensor, "batch time"] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


class Policy(nn.Module, ABC):
    """Acts step by step in an environment.

    `forward` takes any number of steps at once, so that the same weights act one step at a time and are trained on
    whole trajectories. Gradients flow only through `forward`: under several processes only that call is synchronised.
    """

    @abstractmethod
    def forward(
        self, observations: Tree, state: State | None, starts: Bool[Tensor, "batch time"]
    ) -> tuple[Decisions, State]:
        """Decide at each of `time` steps.

        Args:
            observations: tree of [batch, time, ...].
            state: what was remembered from the steps before; None before anything was seen.
            starts: true at the first step of an episode; the state is cleared before it.
        """


class Sampler(nn.Module, ABC):
    """Emits a whole answer: tokens, a set of boxes, a denoising chain.

    `chunk` is the number of decisions to put through one backward pass (None: all of them); a diffusion chain sets it
    to keep memory flat in its number of steps.
    """

    chunk: int | None = None

    @abstractmethod
    def sample(self, inputs: Tree, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Tree:
        """Draw answers without a graph, rows of one input next to each other: [batch * num_samples, time, ...]."""

    @abstractmethod
    def forward(self, inputs: Tree, actions: Tree, steps: slice = slice(None)) -> Decisions:
        """Score the decisions of given answers in one parallel pass (or those of some steps only).

        `log_probs` and `mask` of the result are set. Answers to one input stand next to each other, as many to each.
        """

    def pieces(self, actions: Tree) -> list[slice]:
        """The steps of answers, in pieces of `chunk`: each goes through a pass of its own."""
        if self.chunk is None:
            return [slice(None)]
        time = time_of(actions)
        return [slice(first, min(first + self.chunk, time)) for first in range(0, time, self.chunk)]

    @abstractmethod
    def decode(self, actions: Tree) -> Tree:
        """Turn decisions into predictions in the units of the reward."""


@dataclass(frozen=True)
class RewardOutput:
    """A score for each example.

    Attributes:
        total: what is maximised.
        parts: named components; the reward's docstring says whether they sum or multiply to the total.
        credit: the share of single decisions in the score, where it can be told.
    """

    total: Float[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    credit: Float[Tensor, "batch time"] | None = None

    @property
    def skipped(self) -> Bool[Tensor, " batch"] | None:
        """Which examples have no score and are not to be learned from (`foveate.rewards.combine.guarded`), if any."""
        found = [value > 0 for name, value in self.parts.items() if name.split("/")[-1] == "skipped"]
        return torch.stack(found).any(0) if found else None


@dataclass(frozen=True)
class Evaluation:
    """How good a trained system is, never without what makes the number readable.

    Attributes:
        metrics: the field's own metrics of the trained policy.
        baselines: name of a control → the same metrics of it.
        curves: name of a curve → {label: [(x, y), ...]}, e.g. accuracy against the number of glimpses.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
