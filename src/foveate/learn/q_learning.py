"""Values of actions, learned from transitions: targets, the loss, and how to act on what is not known yet.

Watkins and Dayan 1992, "Q-learning"; Mnih et al. 2015, "Human-level control through deep reinforcement learning". With
a transition of n steps that began with state s and action a,

    target = Σ_{k<n} γ^k r_k + γ^n max_a' Q⁻(s_n, a'),        loss = Huber(Q(s, a) - target)

Q⁻ is a copy of the network that follows it (`follow`). Nothing is bootstrapped where the task ended; where a limit cut
the episode, its last state is (`foveate.learn.replay.Transitions.discounts`). Rewards are best of order one: the loss
is linear in errors above 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise


@torch.no_grad()
def td_target(
    returns: Float[Tensor, " batch"],
    discounts: Float[Tensor, " batch"],
    after: Float[Tensor, "batch actions"],
    chosen_by: Float[Tensor, "batch actions"] | None = None,
) -> Float[Tensor, " batch"]:
    """What the value of an action should have been. No graph.

    Args:
        returns: rewards of the steps taken, discounted.
        discounts: of what came after; 0 where the task ended.
        after: values of the target network in the state that came after.
        chosen_by: those of the network that learns, which then chooses the action that the target network values: the
            maximum of noisy values is too high, the value of another's choice is not (van Hasselt et al. 2016, "Deep
            reinforcement learning with double Q-learning", equation 4). None: the plain maximum.
    """
    best = (after if chosen_by is None else chosen_by).argmax(1, keepdim=True)
    return returns + discounts * after.gather(1, best).squeeze(1)


def q_loss(
    values: Float[Tensor, "batch actions"],
    actions: Int[Tensor, " batch"],
    targets: Float[Tensor, " batch"],
    delta: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean Huber loss of the values of the actions taken; to be minimised. Quadratic up to an error of `delta`."""
    return F.huber_loss(values.gather(1, actions[:, None]).squeeze(1), targets, delta=delta)


class Dueling(nn.Module):
    """A head that tells how good a state is from how much better an action is than the others.

    Q(s, a) = V(s) + A(s, a) - mean A(s, ·) (Wang et al. 2016, "Dueling network architectures", equation 9).

    Args:
        features: of the state.
        actions: how many.
        hidden: width of the layer of each part.
    """

    def __init__(self, features: int, actions: int, hidden: int = 128) -> None:
        super().__init__()
        self.worth = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.gain = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, actions))

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch actions"]:
        """Values of all actions."""
        gain = self.gain(features)
        return self.worth(features) + gain - gain.mean(-1, keepdim=True)


class Believing(nn.Module):
    """A dueling head with a belief beside it: of each action, whether an expert would call it good.

    The belief is learned by cross-entropy (`foveate.value_learning.with_belief`) from the same features; the values are
    told it and do not teach it.

    Args:
        features: of the state.
        actions: how many.
        hidden: width of the layers of the values.
    """

    def __init__(self, features: int, actions: int, hidden: int = 128) -> None:
        super().__init__()
        self.belief = nn.Linear(features, actions)
        self.values = Dueling(features + actions, actions, hidden)

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch actions"]:
        """Values of all actions."""
        return self.both(features)[0]

    def both(
        self, features: Float[Tensor, "*batch features"]
    ) -> tuple[Float[Tensor, "*batch actions"], Float[Tensor, "*batch actions"]]:
        """Values, and the belief as log-odds."""
        belief = self.belief(features)
        return self.values(torch.cat((features, 2 * belief.detach().sigmoid() - 1), -1)), belief


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, rate: float = 1.0) -> None:
    """Move the target network's weights this part of the way to the network's: all now and then, or a little often."""
    for mine, theirs in zip(target.state_dict().values(), network.state_dict().values(), strict=True):
        if rate == 1.0 or not mine.is_floating_point():
            mine.copy_(theirs)
        else:
            mine.lerp_(theirs, rate)


def epsilon(progress: float, first: float = 1.0, last: float = 0.1, share: float = 0.5) -> float:
    """Part of the actions that explore: falls evenly from `first` to `last` within this share of the training."""
    return first + (last - first) * min(1.0, progress / share)


@torch.no_grad()
def explore(
    values: Float[Tensor, "batch actions"],
    part: float,
    keys: Int[Tensor, " batch"],
    good: Bool[Tensor, "batch actions"] | None = None,
) -> Int[Tensor, " batch"]:
    """Take the best action, or with probability `part` any.

    Args:
        values: of the actions.
        part: epsilon.
        keys: one a row.
        good: actions of which an expert says that they are rewarded: then one of these is drawn, if there is one
            (guided exploration: Caicedo and Lazebnik 2015, "Active object localization with deep reinforcement
            learning", section 4.2). A demonstrator who knew the *best* action would be copied; this one only spares
            the agent the many steps that lead nowhere.
    """
    dice = noise.uniform(noise.fold(keys, "action"), values.shape[1])
    if good is not None:
        dice = dice + good
    explores = noise.uniform(noise.fold(keys, "explore")) < part
    return torch.where(explores, dice.argmax(1), values.argmax(1))
