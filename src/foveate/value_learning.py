"""Q-learning as a phase of a run: lockstep copies act and fill a replay, and a network learns from what is drawn of it.

Every step of the run is a few steps of all copies and one update. What is stored is the environment's state
(coordinates, histories, numbers of images), and what a network is shown of it is made anew when it is drawn: an
environment that looks into images, or features of them that are learned along, needs no stored pixel.

    network, target, optimizer, env, replay = run.track(...)          # a copy of the network follows it as target
    learn_by_acting(run, "agent", 1.0, env, network, target, optimizer, replay, Acting(), good=env.rewarded)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from foveate import noise
from foveate.learn.keeper import Keeper
from foveate.learn.q_learning import epsilon, explore, follow, q_loss, td_target
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.parts import look_at
from foveate.run import Run
from foveate.types import InputError, State, Tree, map_tree


@dataclass(frozen=True)
class Acting:
    """How values are learned.

    Attributes:
        batch: transitions in an update.
        acts: steps of all copies before each update.
        steps: over which rewards are summed before a value is bootstrapped.
        discount: γ, a step.
        learning_rate: peak of its one-cycle schedule.
        follow: part of the way that the target goes to the network; 1: it becomes the network.
        period: updates from one time that it does to the next.
        first: part of the actions that explore at the start.
        last: the same, in the end.
        share: of the phase, in which it falls from the one to the other.
        warmup: steps of all copies in the replay before the first update.
        double: the learning network chooses the action that the target values.
    """

    batch: int = 128
    acts: int = 1
    steps: int = 1
    discount: float = 0.9
    learning_rate: float = 1e-3
    follow: float = 0.01
    period: int = 1
    first: float = 1.0
    last: float = 0.1
    share: float = 0.5
    warmup: int = 10
    double: bool = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: a number out of its range.
        """
        for name in ("batch", "acts", "steps", "period"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("discount", "first", "last"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: found {getattr(self, name):g}, expected 0 to 1")
        for name in ("follow", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}: found {getattr(self, name):g}, expected more than 0 and at most 1")


@dataclass(frozen=True)
class Walk:
    """Episodes, one a row, of one length; what comes after an end is padding.

    Attributes:
        states: a tree of [batch, time + 1, ...]: before each step, and after the last.
        actions: that were taken.
        values: of the actions taken, as the network saw them.
        rewards: that followed.
        taken: true where a step was taken.
    """

    states: State
    actions: Int[Tensor, "batch time"]
    values: Float[Tensor, "batch time"]
    rewards: Float[Tensor, "batch time"]
    taken: Bool[Tensor, "batch time"]


@torch.no_grad()
def walk(
    env: Any,
    network: Callable[[Tree], Tensor],
    ids: Int[Tensor, " batch"],
    look: Callable[[State], Tree] | None = None,
    keys: Int[Tensor, " batch"] | None = None,
) -> Walk:
    """Play one episode on each of these examples, always taking the best action.

    Args:
        env: a `TensorEnv` of as many copies, with autoreset "disabled" and tensors out, whose episodes end.
        network: (what `look` makes) → values [batch, actions]; any function that says what it would do.
        ids: the examples.
        look: (state) → the network's input; None: `env.observe`.
        keys: of what chance decides in each episode; None: those of the seeds 0, 1, 2, ...
    """
    look = look or env.observe
    env.reset(seed=0, options={"ids": ids} if keys is None else {"ids": ids, "keys": keys})
    states, rows = [env.state], []
    while not bool(env.waiting.all()):
        taken = ~env.waiting
        some = map_tree(lambda leaf, going=taken: leaf[going], env.state)  # what has ended is not looked at
        values, actions = torch.zeros(len(ids), device=ids.device), torch.zeros_like(ids)
        values[taken], actions[taken] = network(look(some)).max(1)
        reward, _, _, _ = env.advance(actions)
        states.append(env.state)
        rows.append((actions, values, reward, taken))
    stacked = map_tree(lambda *leaves: torch.stack(leaves, 1), *states)
    return Walk(stacked, *(torch.stack(row, 1) for row in zip(*rows, strict=True)))


def with_belief(
    both: Callable[[Tree], tuple[Tensor, Tensor]],
    good: Callable[[State], Bool[Tensor, "batch actions"]],
    seen: Tree,
    state: State,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A network's values, and the "belief_loss" of what it says of each action from the same pass.

    A transition tells what one action is worth. An expert who knows the truth, as guided exploration has it, knows of
    every action whether it is good: the features learn from all of them. What acts later asks no expert.

    Args:
        both: (what the network is shown) → values, and log-odds [batch, actions] that an action is good.
        good: (state) → the actions that are.
        seen: what the network is shown of the states.
        state: the states.
    """
    values, belief = both(seen)
    return values, {"belief_loss": F.binary_cross_entropy_with_logits(belief, good(state).float())}


def learn_by_acting(
    run: Run,
    phase: str,
    share: float,
    env: Any,
    network: nn.Module,
    target: nn.Module,
    optimizer: Optimizer,
    replay: Replay,
    how: Acting,
    *,
    look: Callable[[State], Tree] | None = None,
    good: Callable[[State], Bool[Tensor, "batch actions"]] | None = None,
    beside: Callable[[Tree, State], tuple[Tensor, Mapping[str, Tensor]]] | None = None,
    keeper: Keeper | None = None,
    validate: Callable[[], dict[str, Any]] | None = None,
    every: int = 500,
) -> None:
    """Learn the values of an environment's actions, for one phase of a run.

    Logged: "reward" of a step and "explores", the part of the actions that are not the network's; "loss"; "value", the
    mean of the best action's.

    Args:
        run: owns the loop.
        phase: its name in the logs.
        share: of the run's budget.
        env: a `TensorEnv` of some copies that was reset, with next-step autoreset and tensors out; tracked, or a
            resumed run starts its episodes anew.
        network: (what `look` makes) → values [batch, actions], as `run.track` returned it.
        target: another of the kind, tracked. It takes the network's weights at the first step.
        optimizer: of the network, tracked.
        replay: of `env`'s state, tracked.
        how: see `Acting`.
        look: (state) → the network's input; None: `env.observe`.
        good: (state) → the actions that an expert knows to be rewarded: guided exploration.
        beside: (what `look` made, of these states) → the network's values, and further losses from the same pass.
        keeper: keeps the weights of the best `validate()[keeper.by]` and gives them to the network in the end.
        validate: scores on held-out inputs, logged every `every` steps.
        every: steps between validations.

    Raises:
        InputError: the environment does not begin again by itself, a step later.
    """
    if env.autoreset.name != "NEXT_STEP" or env.output != "torch":
        raise InputError(
            f"env: found autoreset {env.autoreset.name.lower()!r} and output {env.output!r}, expected 'next_step' and "
            "'torch', which are the defaults"
        )
    look = look or env.observe
    copies = torch.arange(env.num_envs, device=run.device) + run.rank * env.num_envs
    for step in run.steps(phase, share):
        if step == 0:
            follow(target, network)
            if keeper is not None:
                keeper.begin()
        part = epsilon(run.progress, how.first, how.last, how.share)
        network.eval()
        for turn in range(how.acts):
            _act(env, network, replay, part, noise.key(run.seed, phase, "act", step, turn, copies), look, good, run)
        set_learning_rate(optimizer, one_cycle(run.progress, how.learning_rate))
        if int(replay.written) >= max(how.warmup, how.steps + 1):
            key = noise.key(run.seed, phase, "draw", step, run.rank).to(run.device)
            drawn = replay.draw(key, how.batch, how.steps, how.discount)
            network.train()
            after = look(drawn.next_states)
            with torch.no_grad():
                chosen_by = network(after) if how.double else None
                wanted = td_target(drawn.returns, drawn.discounts, target(after), chosen_by)
            seen = look(drawn.states)
            values, losses = (network(seen), {}) if beside is None else beside(seen, drawn.states)
            losses = {"loss": q_loss(values, drawn.actions, wanted), **losses}
            run.optimise(torch.stack(list(losses.values())).sum(), optimizer, clip=10.0)
            if (step + 1) % how.period == 0:
                follow(target, network, how.follow)
            run.log(value=values.detach().amax(1).mean(), **{name: loss.detach() for name, loss in losses.items()})
        run.log(explores=part)
        if validate is not None and (step + 1) % every == 0:
            look_at(run, network, keeper, validate)
    if keeper is not None and validate is not None:
        keeper.finish(network, validate()[keeper.by])
        run.save()


@torch.no_grad()
def _act(
    env: Any,
    network: nn.Module,
    replay: Replay,
    part: float,
    keys: Tensor,
    look: Callable[[State], Tree],
    good: Callable[[State], Tensor] | None,
    run: Run,
) -> None:
    """One step of all copies into the replay."""
    state, taken = env.state, ~env.waiting
    actions = explore(network(look(state)), part, keys, None if good is None else good(state))
    reward, terminated, truncated, _ = env.advance(actions)
    replay.write(state, actions, reward, terminated, truncated, taken)
    run.log(reward=(reward * taken).sum() / taken.sum().clamp(min=1))
