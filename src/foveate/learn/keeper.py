"""What is done against a reward that is hunted to death: keep the best weights, notice a collapse, go back.

Nothing tells early that a policy will collapse; these tell when it has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

EARLY = 5  # steps whose answers are those of the start
CALM = 20  # steps over which answers are averaged; nothing is said before
FAR = 4.0  # times longer or shorter than at the start


class Keeper(nn.Module):
    """The weights that answered best on held-out inputs so far, and what the answers were like at the start.

    A part of a run, so that it is saved and restored with it.

    Args:
        policy: whose weights are kept.
        by: which of the held-out scores decides; the larger is the better.

    Attributes:
        best: the module with these weights.
        score: their held-out score; -inf before the first.
        rate: what the learning rate is multiplied by: halved with every collapse.
    """

    score: Tensor
    rate: Tensor
    start: Tensor
    now: Tensor
    seen: Tensor
    looks: Tensor

    def __init__(self, policy: nn.Module, by: str = "held_out_reward") -> None:
        super().__init__()
        self.by = by
        self.best = copy.deepcopy(policy).requires_grad_(False)
        self.register_buffer("score", torch.tensor(-math.inf))
        self.register_buffer("rate", torch.ones(()))
        self.register_buffer("start", torch.zeros(3))  # reward, length, share of different answers
        self.register_buffer("now", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("looks", torch.full((2,), math.nan))  # held-out scores: the first, the latest

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state of before the looks were kept knows none."""
        return super().load_state_dict({"looks": torch.full((2,), math.nan)} | dict(state_dict), strict, assign)

    def begin(self) -> None:
        """Forget every score: those of a run that this one begins from say nothing of this one's held-out inputs."""
        self.score.fill_(-math.inf)
        self.looks.fill_(math.nan)
        self.rate.fill_(1.0)
        self.seen.zero_()

    def offer(self, policy: nn.Module, score: Tensor | float) -> bool:
        """Keep the policy's weights if their held-out score is the best so far."""
        if bool(self.looks[0].isnan()):
            self.looks[0] = float(score)
        self.looks[1] = float(score)
        better = bool(torch.as_tensor(score) > self.score.cpu())
        if better:
            self.score.fill_(float(score))
            self.best.load_state_dict(policy.state_dict())
        return better

    def finish(self, policy: nn.Module, score: Tensor | float) -> None:
        """Offer the last weights, and give the policy the best of all."""
        self.offer(policy, score)
        policy.load_state_dict(self.best.state_dict())

    def notice(self, reward: Tensor, length: Tensor, distinct: Tensor, samples: int) -> str | None:
        """Take the means of a step in, and say what has collapsed, if anything has.

        A collapse is answers that have become far longer or shorter than at the start, or one answer to each input,
        *without* a better reward for it: the reward of drawn answers is lower than at the start, or the latest score on
        held-out inputs is lower than their first. (Where a false positive costs more than a match brings, empty answers
        are better than what was drawn at the start, and worse than what the greedy ones were.) Statistics are averages
        over about `CALM` steps.

        Args:
            reward: mean over the answers.
            length: decisions in an answer.
            distinct: share of different answers to an input (`foveate.learn.answers.distinct`).
            samples: answers to an input; with one, nothing is said of their difference.
        """
        values = torch.stack((reward, length, distinct)).to(self.now)
        self.seen += 1
        self.now.lerp_(values, 1 / float(self.seen.clamp(max=CALM)))
        if float(self.seen) <= EARLY:
            self.start.copy_(self.now)
        if float(self.seen) <= CALM:
            return None
        reward_then, length_then, distinct_then = self.start.tolist()
        reward_now, length_now, distinct_now = self.now.tolist()
        first, latest = self.looks.tolist()
        if reward_now >= reward_then and not latest < first:  # unknown scores compare as false
            return None
        if not length_then / FAR <= length_now <= length_then * FAR:
            return f"answers have {length_now:.3g} decisions, {length_then:.3g} at the start"
        if distinct_now < 1.05 / samples < 1.5 / samples < distinct_then:
            return "all answers to an input are the same"
        return None

    def go_back(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the policy the best weights, forget the optimizer's moments and halve the learning rate."""
        policy.load_state_dict(self.best.state_dict())
        optimizer.state.clear()
        self.rate /= 2
        self.now.copy_(self.start)
        self.looks[1] = self.score
