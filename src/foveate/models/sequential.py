"""Boxes found by glimpses: at each a candidate, whether to emit it, and where to look next, or that it is enough.

Yeung, Russakovsky, Mori, Fei-Fei 2016, "End-to-end learning of action detection from frame glimpses in videos", section
3, carried from frames of a video to places of an image, which the retina of Mnih et al. 2014 looks at.

    detector = SequentialDetector(...)
    walk = detector.sample(images, 4, False, keys)      # 4 walks over each image
    decisions = detector(images, walk)                  # log-probabilities of the decisions; candidates
    walk.found                                          # the boxes that were emitted
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.distributions import Bernoulli, Gaussian
from foveate.geometry import Boxes, overlaps, to_locations, to_pixels
from foveate.models.glimpse import ConvolutionalEye
from foveate.models.retina import Pyramid, build_pyramid, look
from foveate.types import Decisions, Sampler, Tree, map_tree

FACTOR = 2  # of the retina's scales
CLAIMED = 0.5  # IoU with an object from which on an emitted box has taken it
EDGE = 0.1  # of the distance to an object's middle, beside that to its edge: of two that hold the place, the nearer


@dataclass(frozen=True)
class Walk:
    """Glimpses of images in order, and what was decided at each: a tree of [batch, time, ...]. Carries no graph.

    Attributes:
        places: where the glimpses fell, (x, y) as drawn; the eye stays within [-1, 1].
        boxes: the candidate of each, in pixels.
        labels: its class.
        scores: how sure the detector is that it is a new box of the right class, in [0, 1].
        emitted: true where it was emitted.
        stopped: true where this was to be the last glimpse.
        mask: true where a glimpse was taken.
    """

    places: Float[Tensor, "batch time 2"]
    boxes: Float[Tensor, "batch time 4"]
    labels: Int[Tensor, "batch time"]
    scores: Float[Tensor, "batch time"]
    emitted: Bool[Tensor, "batch time"]
    stopped: Bool[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]

    @property
    def found(self) -> Boxes:
        """The emitted boxes."""
        return Boxes(self.boxes, self.labels, self.mask & self.emitted, self.scores)


@dataclass(frozen=True)
class Steps:
    """Two decisions a glimpse, [batch, 2 · time]: emit or decline; then stop, or the next place.

    Attributes:
        emit: whether to emit the candidate.
        stop: whether to stop.
        place: where to look next, in going on.
    """

    emit: Bernoulli
    stop: Bernoulli
    place: Gaussian

    def log_prob(self, walk: Walk) -> Float[Tensor, "batch decisions"]:
        """Log-probability (of a place: log-density) in nats; what is drawn after the last glimpse is no decision."""
        nexts = torch.cat((walk.places[:, 1:], walk.places[:, -1:]), 1)
        move = self.stop.log_prob(walk.stopped) + ~walk.stopped * self.place.log_prob(nexts)
        return _alternating(self.emit.log_prob(walk.emitted), move)

    def entropy(self) -> Float[Tensor, "batch decisions"]:
        """Of each decision, in nats."""
        move = self.stop.entropy() + (-self.stop.logits).sigmoid() * self.place.entropy()
        return _alternating(self.emit.entropy(), move)

    def kl(self, other: Steps) -> Float[Tensor, "batch decisions"]:
        """Of each decision, in nats."""
        move = self.stop.kl(other.stop) + (-self.stop.logits).sigmoid() * self.place.kl(other.place)
        return _alternating(self.emit.kl(other.emit), move)


def _alternating(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), -1).flatten(1)


class SequentialDetector(Sampler):
    """Eye, core, and heads: candidate box, class, confidence; emit, stop, next place.

    The eye sees the retina's scales and, as one more channel over the widest of them, the boxes emitted so far. To emit
    begins as the confidence, to which its head adds what the reward teaches.

    Args:
        side: of the images, in pixels.
        classes: how many.
        glimpses: at most.
        patch: samples of a scale, a side.
        scales: of the retina, each twice as wide as the one before.
        hidden: width of the core.
        std: standard deviation of a place; half the image is 1.
        emits: "drawn" by the policy, or "all" candidates.
    """

    def __init__(
        self,
        side: int,
        classes: int,
        glimpses: int,
        patch: int = 12,
        scales: int = 3,
        hidden: int = 192,
        std: float = 0.15,
        emits: Literal["drawn", "all"] = "drawn",
    ) -> None:
        super().__init__()
        self.side, self.glimpses, self.patch, self.scales = side, glimpses, patch, scales
        self.emits, self.std = emits, std
        self.eye = ConvolutionalEye((3 * scales + 1, patch, patch), normalised=True)
        self.where = nn.Linear(3, 128)
        self.core = nn.GRUCell(128, hidden)
        # the heads read the present glimpse too: what it shows is learned far sooner than through the core
        self.candidate = nn.Sequential(nn.Linear(hidden + 128, 128), nn.ReLU(), nn.Linear(128, 4 + 1))
        self.classify = nn.Linear(hidden + 128, classes)
        last = nn.Linear(128, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.decide = nn.Sequential(nn.Linear(hidden + 128, 128), nn.ReLU(), last)

    @torch.no_grad()
    def sample(self, inputs: Tree, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Walk:
        """Walk over images [batch, 3, side, side] in [0, 1].

        Args:
            inputs: images, or a pair of them and the places to look at, [batch, time, 2]: then neither these nor
                stopping is decided, and all glimpses are taken.
            num_samples: walks over each.
            greedy: emit and stop where it is the likelier, look at the mean place, first in the middle of the image;
                otherwise all is drawn, the first place evenly.
            keys: one an image.
        """
        images, given = _parted(inputs)
        pyramid, given = map_tree(lambda leaf: leaf.repeat_interleave(num_samples, 0), (self._pyramid(images), given))
        keys = noise.fold(keys[:, None], "walk", torch.arange(num_samples, device=keys.device)).flatten()
        walk = self._untaken(len(keys), keys.device)
        memory, going = None, torch.ones_like(keys, dtype=torch.bool)
        place = noise.uniform(noise.fold(keys, "first"), 2) * (0 if greedy else 2) - (0 if greedy else 1)
        for step in range(self.glimpses):
            place = place if given is None else given[:, step]
            walk.places[:, step], walk.mask[:, step] = place, going
            glimpse = self._see(self._glimpse(pyramid, walk, step), place, step)
            memory = self.core(glimpse, memory)
            boxes, scores, labels, ways = self._heads(torch.cat((memory, glimpse), -1), place)
            walk.boxes[:, step], walk.scores[:, step], walk.labels[:, step] = boxes, scores.sigmoid(), labels.argmax(-1)
            emit, stop, place = (
                way.mode() if greedy else way.sample(noise.fold(keys, name, step))
                for name, way in (("emit", ways.emit), ("stop", ways.stop), ("place", ways.place))
            )
            walk.emitted[:, step] = (emit | (self.emits == "all")) & going
            walk.stopped[:, step] = stop & going & (given is None)
            going = going & ~walk.stopped[:, step]
        return walk

    def _untaken(self, size: int, device: torch.device) -> Walk:
        numbers = torch.zeros(5, size, self.glimpses, 4, device=device)
        flags = torch.zeros(4, size, self.glimpses, dtype=torch.bool, device=device)
        return Walk(numbers[0, ..., :2], numbers[1], flags[0].long(), numbers[2, ..., 0], flags[1], flags[2], flags[3])

    def forward(self, inputs: Tree, actions: Walk, steps: slice = slice(None)) -> Decisions:
        """Follow walks over the images: decisions [batch, 2 · time] as `Steps`, and the candidates as `extras`.

        `extras`: "boxes" [batch, time, 4] in pixels, logits "labels" [batch, time, classes], "scores" [batch, time].
        """
        images, given = _parted(inputs)
        walk, count = actions, len(actions.mask) // len(images)
        pyramid = tuple(level.repeat_interleave(count, 0) for level in self._pyramid(images))
        glimpses = torch.stack([self._glimpse(pyramid, walk, step) for step in range(self.glimpses)], 1)
        numbers = torch.arange(self.glimpses, device=images.device).expand_as(walk.mask)
        seen = self._see(glimpses.flatten(0, 1), walk.places.flatten(0, 1), numbers.flatten()[:, None])
        memory, remembered = None, []
        for glimpse in seen.unflatten(0, walk.mask.shape).unbind(1):
            memory = self.core(glimpse, memory)
            remembered.append(torch.cat((memory, glimpse), -1))
        boxes, scores, labels, ways = self._heads(torch.stack(remembered, 1), walk.places)
        moves = walk.mask & (numbers < self.glimpses - 1) & (given is None)
        mask = _alternating(walk.mask & (self.emits == "drawn"), moves)
        extras = {"boxes": boxes, "labels": labels, "scores": scores}
        return Decisions(ways, log_probs=ways.log_prob(walk), mask=mask, extras=extras)

    @property
    def reach(self) -> float:
        """How far from its middle the retina sees, in pixels."""
        return self.patch * FACTOR ** (self.scales - 1) / 2

    def decode(self, actions: Walk) -> Walk:
        """A walk is its own prediction: what it cost counts beside what it found."""
        return actions

    def _pyramid(self, images: Tensor) -> Pyramid:
        return build_pyramid(images - 0.5, self.scales, FACTOR)

    def _glimpse(self, pyramid: Pyramid, walk: Walk, step: int) -> Tensor:
        """What the retina sees at a step, and over its widest scale the boxes emitted before."""
        place = walk.places[:, step].clamp(-1, 1)
        offsets = ((torch.arange(self.patch, device=place.device) + 0.5) / self.patch * 2 - 1) * self.reach
        x, y = (to_pixels(place, (self.side, self.side))[:, :, None] + offsets).unbind(1)  # [batch, patch] each
        left, top, right, bottom = walk.boxes[:, :step, :, None].unbind(2)
        columns = (x[:, None] > left) & (x[:, None] < right)
        rows = (y[:, None] > top) & (y[:, None] < bottom)
        there = rows[..., None] & columns[:, :, None] & walk.emitted[:, :step, None, None]
        seen = look(pyramid, place, self.patch, FACTOR)
        return torch.cat((seen, there.any(1, keepdim=True).to(seen)), 1)

    def _see(self, glimpses: Tensor, places: Tensor, step: int | Tensor) -> Tensor:
        passed = torch.zeros_like(places[:, :1]) + step / self.glimpses
        return F.relu(self.eye(glimpses) + self.where(torch.cat((places.clamp(-1, 1), passed), 1)))

    def _heads(self, memory: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Steps]:
        """Boxes in pixels; logits of the confidence and the classes; the decisions."""
        box, score = self.candidate(memory).split((4, 1), -1)
        middle = to_pixels(places.clamp(-1, 1), (self.side, self.side)) + self.side / 8 * box[..., :2]
        half = self.side / 8 * box[..., 2:].clamp(-3, 2).exp()
        score, decided = score.squeeze(-1), self.decide(memory)
        place = Gaussian(decided[..., 2:].tanh(), decided.new_full((*decided.shape[:-1], 2), self.std))
        ways = Steps(Bernoulli(score.detach() + decided[..., 0]), Bernoulli(decided[..., 1] - 3), place)
        return torch.cat((middle - half, middle + half), -1), score, self.classify(memory), ways


def _parted(inputs: Tree) -> tuple[Tensor, Tensor | None]:
    """Images, and the places to look at if they are given."""
    return (inputs, None) if isinstance(inputs, Tensor) else inputs


def raster(count: int) -> Float[Tensor, "count 2"]:
    """So many places in rows, evenly over the image."""
    rows = max(1, round(math.sqrt(count)))
    sizes = [count // rows + (row < count % rows) for row in range(rows)]
    return torch.tensor(
        [
            ((2 * column + 1) / size - 1, (2 * row + 1) / rows - 1)
            for row, size in enumerate(sizes)
            for column in range(size)
        ]
    )


@torch.no_grad()
def assigned(walk: Walk, targets: Boxes, side: int) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Which object each candidate of a walk should be, and where there is one: the nearest that no earlier box took.

    An emitted box takes the object with which its IoU is largest, from `CLAIMED` on, whatever its class. Near is an
    object that holds the place, or whose edge is near.
    """
    free, found = targets.wanted, []
    middle = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    places = to_pixels(walk.places.clamp(-1, 1), (side, side))
    ious = overlaps(walk.boxes, targets.boxes)
    for step in range(walk.mask.shape[1]):
        place = places[:, step, None]
        outside = torch.maximum(targets.boxes[..., :2] - place, place - targets.boxes[..., 2:]).clamp(min=0)
        distance = outside.norm(dim=-1) + EDGE * (middle - place).norm(dim=-1)
        nearest = distance.masked_fill(~free, torch.inf).argmin(1)
        found.append((nearest, free.any(1) & walk.mask[:, step]))
        iou, taken = (ious[:, step] * free).max(1)
        claims = walk.emitted[:, step] & (iou >= CLAIMED)
        free = free & ~(F.one_hot(taken, free.shape[1]).bool() & claims[:, None])
    places_, there = zip(*found, strict=True)
    return torch.stack(places_, 1), torch.stack(there, 1)


@torch.no_grad()
def near_objects(targets: Boxes, keys: Int[Tensor, " batch"], time: int, side: int) -> Float[Tensor, "batch time 2"]:
    """Places to learn candidates at: half of them around the middle of an object, half anywhere."""
    anywhere = noise.uniform(noise.fold(keys, "anywhere"), time, 2) * 2 - 1
    chances = noise.uniform(noise.fold(keys, "object"), time, targets.mask.shape[1]) * targets.wanted[:, None]
    boxes = targets.boxes.gather(1, chances.argmax(-1)[..., None].expand(-1, -1, 4))
    low, high = boxes.split(2, -1)
    around = (low + high) / 2 + 0.25 * (high - low) * noise.normal(noise.fold(keys, "around"), time, 2)
    near = noise.uniform(noise.fold(keys, "near"), time, 1) < 0.5
    near = near & targets.wanted.any(1)[:, None, None]
    return torch.where(near, to_locations(around, (side, side)), anywhere).clamp(-1, 1)


def candidate_losses(
    candidates: dict[str, Tensor], walk: Walk, targets: Boxes, side: int, reach: float
) -> dict[str, Float[Tensor, ""]]:
    """What is taught by the true boxes: place and class of the assigned object, and how much the candidate is it.

    "box_loss" is 1 - IoU and the distance of the corners in parts of the object's size, where its middle lies within
    `reach` pixels of the place in x and in y, as far as the retina goes; "class_loss" a cross-entropy,
    where the place lies within the object: from afar nothing tells it; "confidence_loss" that of the IoU with the
    assigned object if the class is right, else of 0. Means over glimpses.
    """
    index, there = assigned(walk, targets, side)
    places = to_pixels(walk.places.clamp(-1, 1), (side, side))
    aims = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    labels = targets.labels.gather(1, index)
    within = there & ((places >= aims[..., :2]) & (places <= aims[..., 2:])).all(-1)
    seen = there & ((places - (aims[..., :2] + aims[..., 2:]) / 2).abs() <= reach).all(-1)
    boxes = candidates["boxes"]
    iou = overlaps(boxes.reshape(-1, 1, 4), aims.reshape(-1, 1, 4)).view(there.shape)
    size = (aims[..., 2:] - aims[..., :2]).clamp(min=1).repeat(1, 1, 2)
    distance = ((boxes - aims).abs() / size).mean(-1)
    right = (candidates["labels"].argmax(-1) == labels) & there
    entropies = F.cross_entropy(candidates["labels"].flatten(0, 1), labels.flatten(), reduction="none").view_as(iou)
    sure = F.binary_cross_entropy_with_logits(candidates["scores"], (iou * right).detach(), reduction="none")
    return {
        "box_loss": torch.where(seen, 1 - iou + distance, 0.0).sum() / seen.sum().clamp(min=1),
        "class_loss": torch.where(within, entropies, 0.0).sum() / within.sum().clamp(min=1),
        "confidence_loss": torch.where(walk.mask, sure, 0.0).sum() / walk.mask.sum(),
    }
