"""An agent that follows an object, and what it hears from the agents around it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.models.association import Rules, rules_of, rules_tensor

KERNELS = (5, 3, 3)
CHANNELS = (16, 24, 32)


class TrackingNetwork(nn.Module):
    """One network for all agents: features of the own view, messages of the neighbours, a head.

    A message is made of what the neighbour sees, at half the size, and of where it is; how much each counts is told by
    attention (Vaswani et al. 2017): the agent's query against the neighbours' keys. Views are normalised by the mean
    and deviation of their first frame, so that light and contrast of a video do not matter.

    Args:
        patch: side of a view in pixels.
        past: actions that are remembered.
        actions: how many there are.
        head: (features, outputs) → the module that says what is asked for.
        outputs: how many numbers that is.
        communicate: hear the neighbours; without it their views are not looked at.
        hidden: width of the features.
    """

    def __init__(
        self,
        patch: int,
        past: int,
        actions: int,
        head: type[nn.Module],
        outputs: int,
        communicate: bool = True,
        hidden: int = 96,
    ) -> None:
        super().__init__()
        self.look = _eye(patch, CHANNELS, hidden)
        self.past = nn.Sequential(nn.Linear(past * actions, hidden // 2), nn.ReLU())
        self.communicate = communicate
        if communicate:
            self.glance = _eye((patch + 1) // 2, CHANNELS[:2], hidden)
            self.speak = nn.Sequential(nn.Linear(hidden + 4, hidden), nn.ReLU())
            self.key, self.query = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.head = head(hidden + hidden // 2 + communicate * hidden, outputs)

    def forward(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch outputs"]:
        """What the head says of what `foveate.envs.box_tracking.observed` makes."""
        return self.head(self.features(seen))

    def both(self, seen: dict[str, Tensor]) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch actions"]]:
        """Values, and the head's belief (`foveate.learn.q_learning.Believing`)."""
        head: Any = self.head
        values, belief = head.both(self.features(seen))
        return values, belief

    def features(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        """What the head is told."""
        own = self.look(_plain(seen["view"]))
        found = [own, self.past(seen["history"].flatten(1))]
        if self.communicate:
            found.append(self.heard(own, seen))
        return torch.cat(found, 1)

    def heard(self, own: Float[Tensor, "batch hidden"], seen: dict[str, Tensor]) -> Float[Tensor, "batch hidden"]:
        """The neighbours' messages, as much of each as it is attended to; zeros for who is alone."""
        if "near" not in seen:
            return torch.zeros_like(own)
        there = seen["near"] > 0
        theirs = own.new_zeros(*there.shape, own.shape[1])
        theirs[there] = self.glance(_plain(seen["others"][there]))
        messages = self.speak(torch.cat((theirs, seen["places"]), 2))
        fit = (self.query(own)[:, None] * self.key(messages)).sum(2) / own.shape[1] ** 0.5
        weight = fit.masked_fill(~there, -1e9).softmax(1) * there
        return (weight[..., None] * messages).sum(1)


class Follower(nn.Module):
    """A network that says where tracks go, and the rules by which tracks are made of that.

    Args:
        network: (what agents see) → values of their actions, or offsets of their boxes.
    """

    network: Any
    rules: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rules", rules_tensor(Rules()).repeat(2, 1))

    @property
    def chosen(self) -> tuple[Rules, Rules]:
        """The rules that were chosen for it, and those while constant velocity leads."""
        return rules_of(self.rules[0]), rules_of(self.rules[1])

    def forward(self, seen: dict[str, Tensor]) -> Float[Tensor, "batch outputs"]:
        """What the network says."""
        return self.network(seen)


def _eye(side: int, channels: tuple[int, ...], hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 6
    for wide, kernel in zip(channels, KERNELS, strict=False):
        layers += [nn.Conv2d(before, wide, kernel, 2, kernel // 2), nn.ReLU()]
        before, side = wide, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, hidden), nn.ReLU())


def _plain(views: Tensor) -> Tensor:
    """Pairs of views without the first one's light and contrast."""
    first = views[:, :3].flatten(1)
    mean = first.mean(1)
    deviation = (first.square().mean(1) - mean.square()).clamp(min=0.02**2).sqrt()  # faster than `std`
    return (views - mean[:, None, None, None]) / deviation[:, None, None, None]


def shifted(boxes: Float[Tensor, "batch 4"], offsets: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch 4"]:
    """Boxes after regressed offsets: of the middle in parts of the sides, and logarithms of the sides' factors."""
    sides = boxes[:, 2:] - boxes[:, :2]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 + offsets[:, :2] * sides
    half = sides * offsets[:, 2:].clamp(-1, 1).exp() / 2
    return torch.cat((middle - half, middle + half), 1)


def offsets_to(boxes: Float[Tensor, "batch 4"], targets: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch 4"]:
    """The offsets with which `shifted` makes the boxes the targets."""
    sides, wanted = ((each[:, 2:] - each[:, :2]).clamp(min=1e-3) for each in (boxes, targets))
    away = ((targets[:, :2] + targets[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) / 2 / sides
    return torch.cat((away, (wanted / sides).log()), 1)
