"""Any detector that proposes candidates, as a policy: for each candidate it decides which class, or none.

A detector's answer is a set, and the set is what is scored: so every candidate is a decision, drawn from the detector's
own class probabilities, and the set of those that were given a class is the answer. With `jitter` the box is drawn too,
from a normal distribution around the one that the detector predicts.

    policy = Candidates(cells)                                # any `Detector`: ours, or `models.adapters`
    sets = policy.decode(policy.sample(images, 8, False, keys))   # 8 sets of boxes to each image

Which candidates there are is no decision: they are those most surely objects, less those that overlap a surer one. An
answer names its candidates (`places`), so that other weights, of a later epoch or of an anchor, score the same ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import batched_nms

from foveate import noise
from foveate.distributions import Categorical, Gaussian
from foveate.geometry import Boxes, areas
from foveate.types import Decisions, InputError, Sampler, Tree, map_tree

MANY = 8  # so many times more candidates than are kept go into the suppression


@dataclass(frozen=True)
class Proposals:
    """What a detector proposes: a tree of [batch, count, ...]. Boxes and logits carry the graph.

    Attributes:
        boxes: left, top, right, bottom in pixels of the images.
        logits: of the classes, and last of being none of them.
        mask: true where there is a candidate; everything else is padding.
        places: what names the candidates within their image, as the detector needs it to find them again.
    """

    boxes: Float[Tensor, "batch count 4"]
    logits: Float[Tensor, "batch count choices"]
    mask: Bool[Tensor, "batch count"]
    places: Tree


class Detector(nn.Module, ABC):
    """A network with candidates.

    Attributes:
        count: candidates of an image at most.
        overlap: IoU with a surer one from which a candidate is left out.
        least: probability of being anything from which on there is a candidate.
    """

    count: int = 100
    overlap: float = 0.6
    least: float = 0.01

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "batch 3 height width"], places: tuple[Tree, Bool[Tensor, "batch count"]] | None
    ) -> Proposals:
        """Propose candidates in images in [0, 1]; or score those of given `places` and mask."""

    @abstractmethod
    def loss(self, images: Float[Tensor, "batch 3 height width"], targets: Boxes) -> dict[str, Float[Tensor, ""]]:
        """The detector's own supervised losses, which are to be added up."""

    @abstractmethod
    def backbone(self) -> Iterator[nn.Parameter]:
        """The weights of what sees the image first: all that `--tune heads` leaves alone."""


@dataclass(frozen=True)
class Chosen:
    """Answers: a tree of [batch, count, ...].

    Attributes:
        choices: the class of each candidate; the number of classes for none.
        numbers: the box: centre x, y in pixels, and the logarithms of width and height.
        scores: the probability of the choice.
        mask: true where there is a candidate.
        places: what names it.
    """

    choices: Int[Tensor, "batch count"]
    numbers: Float[Tensor, "batch count 4"]
    scores: Float[Tensor, "batch count"]
    mask: Bool[Tensor, "batch count"]
    places: Tree


class Candidates(Sampler):
    """Decides for every candidate of a detector which class, or none.

    Args:
        detector: what proposes them.
        classes: how many there are.
        jitter: standard deviation with which boxes are drawn: of the centre in parts of the box's sides, and of the
            logarithms of these; 0: boxes are as predicted, and only classes are decided.

    Raises:
        InputError: once it is asked: the detector's logits are not of so many classes and none.
    """

    def __init__(self, detector: Detector, classes: int, jitter: float = 0.0) -> None:
        super().__init__()
        self.detector, self.classes, self.jitter = detector, classes, jitter

    @torch.no_grad()
    def sample(
        self,
        inputs: Float[Tensor, "batch 3 height width"],
        num_samples: int,
        greedy: bool,
        keys: Int[Tensor, " batch"],
    ) -> Chosen:
        """Draw `num_samples` sets for each image in [0, 1]; the detector looks once."""
        found = _repeated(self._proposed(inputs), num_samples)
        distribution = self._distribution(found)
        if greedy:
            drawn = distribution.mode()
        else:
            rows = noise.fold(keys[:, None], "sample", torch.arange(num_samples, device=keys.device)).flatten()
            places = torch.arange(found.mask.shape[1], device=keys.device)
            drawn = distribution.sample(noise.fold(rows[:, None], "candidate", places))
        choices, numbers = drawn if self.jitter else (drawn, to_numbers(found.boxes))
        scores = found.logits.softmax(-1).gather(-1, choices[..., None]).squeeze(-1)
        return Chosen(choices, numbers, scores, found.mask, found.places)

    def forward(
        self, inputs: Float[Tensor, "batch 3 height width"], actions: Chosen, steps: slice = slice(None)
    ) -> Decisions:
        """Score the decisions of given sets, as many to each image, on the candidates that they are about.

        `extras` has their "boxes" as they are now, with the graph: what is differentiable need not be drawn.
        """
        samples = len(actions.mask) // len(inputs)
        places, mask = map_tree(lambda leaf: leaf[::samples], (actions.places, actions.mask))
        found = _repeated(self._proposed(inputs, (places, mask)), samples)
        distribution = self._distribution(found)
        taken: Any = (actions.choices, actions.numbers) if self.jitter else actions.choices
        log_probs = distribution.log_prob(taken)[:, steps]
        distribution = map_tree(lambda leaf: leaf[:, steps], distribution)
        return Decisions(distribution, None, log_probs, actions.mask[:, steps], {"boxes": found.boxes[:, steps]})

    def decode(self, actions: Chosen) -> Boxes:
        """The sets: candidates that were given a class, with its probability as score."""
        there = actions.mask & (actions.choices < self.classes)
        labels = actions.choices.clamp(max=self.classes - 1)
        return Boxes(to_boxes(actions.numbers), labels, there, actions.scores)

    @torch.no_grad()
    def ranked(self, images: Float[Tensor, "batch 3 height width"]) -> Boxes:
        """All candidates with their likeliest class and its probability: what average precision looks at."""
        found = self._proposed(images)
        scores, labels = found.logits.softmax(-1)[..., :-1].max(-1)
        return Boxes(found.boxes, labels, found.mask, scores)

    def _proposed(self, images: Tensor, places: tuple[Tree, Tensor] | None = None) -> Proposals:
        found: Proposals = self.detector(images, places)
        if (choices := found.logits.shape[-1]) != self.classes + 1:
            raise InputError(
                f"model: its detector has {choices} logits a candidate, expected {self.classes + 1}, of {self.classes} "
                "classes and none: make it for as many classes as the data have"
            )
        return found

    def _distribution(self, found: Proposals) -> Any:
        if not self.jitter:
            return Categorical(found.logits)
        numbers = to_numbers(found.boxes)
        sides = torch.cat((numbers[..., 2:].exp(), torch.ones_like(numbers[..., 2:])), -1)
        return ClassAndBox(found.logits, numbers, self.jitter * sides.detach())


@dataclass(frozen=True)
class ClassAndBox:
    """A class or none, and with a class a box: independent normal numbers."""

    logits: Float[Tensor, "batch count choices"]
    mean: Float[Tensor, "batch count 4"]
    std: Float[Tensor, "batch count 4"]

    def sample(self, keys: Int[Tensor, "batch count"]) -> tuple[Tensor, Tensor]:
        """Draw choices and numbers."""
        return Categorical(self.logits).sample(keys), self._box().sample(noise.fold(keys, "box"))

    def mode(self) -> tuple[Tensor, Tensor]:
        """The likeliest choices, and the means."""
        return Categorical(self.logits).mode(), self._box().mode()

    def log_prob(self, actions: tuple[Tensor, Tensor]) -> Float[Tensor, "batch count"]:
        """Log-probability of the choice plus, if it is a class, the log-density of the numbers."""
        choices, numbers = actions
        some = choices < self.logits.shape[-1] - 1
        return Categorical(self.logits).log_prob(choices) + torch.where(some, self._box().log_prob(numbers), 0.0)

    def entropy(self) -> Float[Tensor, "batch count"]:
        """That of the choice, plus that of the box as often as there is one."""
        return Categorical(self.logits).entropy() + self._any() * self._box().entropy()

    def kl(self, other: ClassAndBox) -> Float[Tensor, "batch count"]:
        """That of the choice, plus that of the box as often as there is one."""
        return Categorical(self.logits).kl(Categorical(other.logits)) + self._any() * self._box().kl(other._box())

    def _box(self) -> Gaussian:
        return Gaussian(self.mean, self.std)

    def _any(self) -> Tensor:
        return 1 - self.logits.softmax(-1)[..., -1]


def likeliest(
    boxes: Float[Tensor, "batch all 4"],
    logits: Float[Tensor, "batch all choices"],
    count: int,
    overlap: float,
    least: float,
) -> tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
    """Places of the candidates that are most surely something, by falling probability, and which of them there are.

    A candidate goes that overlaps a surer one of its image, of whatever class, by more than `overlap`; so does one
    without area. Nothing is differentiated.
    """
    boxes, sure = boxes.detach().float(), 1 - logits.detach().float().softmax(-1)[..., -1]
    sure = torch.where((areas(boxes) > 0) & boxes.isfinite().all(-1), sure, 0.0)
    sure, places = sure.topk(min(MANY * count, sure.shape[1]))
    boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4))
    rows = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(sure)
    there = sure >= least
    kept = there.flatten().nonzero().flatten()
    kept = kept[batched_nms(boxes.flatten(0, 1)[kept], sure.flatten()[kept], rows.flatten()[kept], overlap)]
    stays = torch.zeros_like(there).flatten().index_fill(0, kept, True).view_as(there)
    # what stays comes first, in the order that it has
    order = torch.where(stays, sure, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return places.gather(1, order), stays.gather(1, order)


def proposed(
    boxes: Float[Tensor, "batch all 4"],
    logits: Float[Tensor, "batch all choices"],
    places: tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]] | None,
    detector: Detector,
) -> Proposals:
    """The likeliest of all candidates, as many as the detector is to have; or those of given places and mask."""
    chosen, mask = places or likeliest(boxes, logits, detector.count, detector.overlap, detector.least)
    return Proposals(at(chosen, boxes), at(chosen, logits), mask, chosen)


def clipped(
    boxes: Float[Tensor, "batch all 4"], images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch all 4"]:
    """What of the boxes lies within the images."""
    limit = boxes.new_tensor([images.shape[-1], images.shape[-2]] * 2)
    return torch.minimum(boxes.clamp(min=0), limit)


def at(
    places: Int[Tensor, "batch count"], values: Float[Tensor, "batch all width"]
) -> Float[Tensor, "batch count width"]:
    """The values at given places."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def to_numbers(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Centre x, y and the logarithms of width and height, these not below that of a hundredth of a pixel."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0.01)
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, sides.log()), -1)


def to_boxes(numbers: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Left, top, right, bottom from centre and logarithms of the sides."""
    half = numbers[..., 2:].clamp(max=math.log(1e5)).exp() / 2
    return torch.cat((numbers[..., :2] - half, numbers[..., :2] + half), -1)


def _repeated(found: Proposals, times: int) -> Proposals:
    return map_tree(lambda leaf: leaf.repeat_interleave(times, 0), found)
