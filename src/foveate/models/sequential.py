"""Boxes found by glimpses: at each a candidate, whether to emit it, and where to look next, or that it is enough.

Yeung, Russakovsky, Mori, Fei-Fei 2016, "End-to-end learning of action detection from frame glimpses in videos", section
3, carried from frames of a video to places of an image, which the retina of Mnih et al. 2014 looks at.

    detector = SequentialDetector(...)
    walk = detector.sample(images, 4, False, keys)      # 4 walks over each image
    decisions = detector(images, walk)                  # log-probabilities of what was decided; candidates, with a graph
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
from foveate.geometry import Boxes, overlaps, to_pixels
from foveate.models.glimpse import ConvolutionalEye
from foveate.models.retina import Pyramid, build_pyramid, look
from foveate.types import Decisions, Sampler, map_tree

Looking = Literal["learned", "random", "raster"]
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
        place: where to look next, in going on; None where that is not learned, nor is stopping.
    """

    emit: Bernoulli
    stop: Bernoulli
    place: Gaussian | None

    def log_prob(self, walk: Walk) -> Float[Tensor, "batch decisions"]:
        """Log-probability (of a place: log-density) in nats; what is drawn after the last glimpse is no decision."""
        move = torch.zeros_like(self.stop.logits)
        if self.place is not None:
            nexts = torch.cat((walk.places[:, 1:], walk.places[:, -1:]), 1)
            move = self.stop.log_prob(walk.stopped) + ~walk.stopped * self.place.log_prob(nexts)
        return _alternating(self.emit.log_prob(walk.emitted), move)

    def entropy(self) -> Float[Tensor, "batch decisions"]:
        """Of each decision, in nats."""
        move = torch.zeros_like(self.stop.logits)
        if self.place is not None:
            move = self.stop.entropy() + (-self.stop.logits).sigmoid() * self.place.entropy()
        return _alternating(self.emit.entropy(), move)

    def kl(self, other: Steps) -> Float[Tensor, "batch decisions"]:
        """Of each decision, in nats; other places where both learn them."""
        move = torch.zeros_like(self.stop.logits)
        if self.place is not None and other.place is not None:
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
        scales: of the retina.
        factor: how much wider each is than the one before.
        hidden: width of the core.
        std: standard deviation of a place; half the image is 1.
        looking: "learned"; or "random", even over the image, or "raster", row after row: then it never stops early.
        emits: "drawn" by the policy, or "all" candidates.
    """

    def __init__(
        self,
        side: int,
        classes: int,
        glimpses: int,
        patch: int = 12,
        scales: int = 3,
        factor: int = 2,
        hidden: int = 192,
        std: float = 0.15,
        looking: Looking = "learned",
        emits: Literal["drawn", "all"] = "drawn",
    ) -> None:
        super().__init__()
        self.side, self.glimpses, self.patch, self.scales, self.factor = side, glimpses, patch, scales, factor
        self.looking, self.emits, self.std = looking, emits, std
        self.eye = ConvolutionalEye((3 * scales + 1, patch, patch), "fp32")
        self.where = nn.Linear(3, 128)
        self.core = nn.GRUCell(128, hidden)
        self.candidate = nn.Sequential(nn.Linear(hidden, 128), nn.ReLU(), nn.Linear(128, 4 + 1 + classes))
        self.decide = nn.Sequential(nn.Linear(hidden, 128), nn.ReLU(), nn.Linear(128, 4))
        nn.init.zeros_(self.decide[2].weight)
        nn.init.zeros_(self.decide[2].bias)

    def sample(self, inputs: Tensor, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Walk:
        """Walk over images [batch, 3, side, side] in [0, 1]."""
        pyramid = tuple(level.repeat_interleave(num_samples, 0) for level in self._pyramid(inputs))
        keys = noise.fold(keys[:, None], "walk", torch.arange(num_samples, device=keys.device)).flatten()
        size, most = len(keys), self.glimpses
        ground = inputs.new_zeros(size, most)
        flags = torch.zeros_like(ground, dtype=torch.bool)
        walk = Walk(
            ground[..., None].repeat(1, 1, 2),
            ground[..., None].repeat(1, 1, 4),
            flags.long(),
            ground,
            flags,
            flags.clone(),
            flags.clone(),
        )
        place, memory = self._first(keys, greedy), None
        going = torch.ones_like(flags[:, 0])
        with torch.no_grad():
            for step in range(most):
                walk.places[:, step], walk.mask[:, step] = place, going
                glimpse = self._glimpse(pyramid, walk, step)
                memory = self.core(self._see(glimpse, place, step), memory)
                boxes, scores, labels, decided = self._heads(memory[:, None], place[:, None])
                walk.boxes[:, step], walk.scores[:, step] = boxes[:, 0], scores[:, 0].sigmoid()
                walk.labels[:, step] = labels[:, 0].argmax(-1)
                ways = map_tree(lambda leaf: leaf[:, 0], self._steps(scores, decided))
                draw = [noise.fold(keys, name, step) for name in ("emit", "stop", "place")]
                emit, stop = (
                    way.mode() if greedy else way.sample(key) for way, key in zip((ways.emit, ways.stop), draw)
                )
                walk.emitted[:, step] = (emit | (self.emits == "all")) & going
                if self.looking != "learned":
                    stop = torch.zeros_like(stop)
                walk.stopped[:, step] = stop & going
                going = going & ~stop
                if ways.place is not None:
                    place = ways.place.mode() if greedy else ways.place.sample(draw[2])
                else:
                    place = self._blind(keys, step + 1)
        return walk

    def forward(self, inputs: Tensor, actions: Walk, steps: slice = slice(None)) -> Decisions:
        """Follow walks: decisions [batch, 2 · time] as `Steps`, and the candidates as `extras`.

        `extras`: "boxes" [batch, time, 4] in pixels, "labels" [batch, time, classes] and "scores" [batch, time] as logits.
        """
        walk, count = actions, len(actions.mask) // len(inputs)
        pyramid = tuple(level.repeat_interleave(count, 0) for level in self._pyramid(inputs))
        glimpses = torch.stack([self._glimpse(pyramid, walk, step) for step in range(self.glimpses)], 1)
        numbers = torch.arange(self.glimpses, device=inputs.device).expand_as(walk.mask)
        seen = self._see(glimpses.flatten(0, 1), walk.places.flatten(0, 1), numbers.flatten()[:, None])
        memory, remembered = None, []
        for glimpse in seen.unflatten(0, walk.mask.shape).unbind(1):
            memory = self.core(glimpse, memory)
            remembered.append(memory)
        boxes, scores, labels, decided = self._heads(torch.stack(remembered, 1), walk.places)
        ways = self._steps(scores, decided)
        goes_on = walk.mask & (numbers < self.glimpses - 1) & (self.looking == "learned")
        mask = _alternating(walk.mask & (self.emits == "drawn"), goes_on)
        extras = {"boxes": boxes, "labels": labels, "scores": scores}
        return Decisions(ways, log_probs=ways.log_prob(walk), mask=mask, extras=extras)

    def decode(self, actions: Walk) -> Walk:
        """A walk is its own prediction: what it cost counts beside what it found."""
        return actions

    def _pyramid(self, images: Tensor) -> Pyramid:
        return build_pyramid(images - 0.5, self.scales, self.factor)

    def _glimpse(self, pyramid: Pyramid, walk: Walk, step: int) -> Tensor:
        """What the retina sees at a step, and over its widest scale the boxes emitted before."""
        place = walk.places[:, step].clamp(-1, 1)
        reach = self.patch * self.factor ** (self.scales - 1)
        offsets = (torch.arange(self.patch, device=place.device) + 0.5) / self.patch * reach - reach / 2
        x, y = (to_pixels(place, (self.side, self.side))[:, :, None] + offsets).unbind(1)  # [batch, patch] each
        left, top, right, bottom = walk.boxes[:, :step, :, None].unbind(2)
        columns = (x[:, None] > left) & (x[:, None] < right)
        rows = (y[:, None] > top) & (y[:, None] < bottom)
        there = rows[..., None] & columns[:, :, None] & walk.emitted[:, :step, None, None]
        seen = look(pyramid, place, self.patch, self.factor)
        return torch.cat((seen, there.any(1, keepdim=True).to(seen)), 1)

    def _see(self, glimpses: Tensor, places: Tensor, step: int | Tensor) -> Tensor:
        passed = torch.zeros_like(places[:, :1]) + step / self.glimpses
        return F.relu(self.eye(glimpses) + self.where(torch.cat((places.clamp(-1, 1), passed), 1)))

    def _heads(self, memory: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes in pixels; logits of the confidence and the classes; what the decisions are made of."""
        box, score, labels = self.candidate(memory).tensor_split((4, 5), -1)
        middle = to_pixels(places.clamp(-1, 1), (self.side, self.side)) + self.side / 4 * box[..., :2]
        half = self.side / 8 * box[..., 2:].clamp(-3, 2).exp()
        return torch.cat((middle - half, middle + half), -1), score.squeeze(-1), labels, self.decide(memory)

    def _steps(self, scores: Tensor, decided: Tensor) -> Steps:
        place = None
        if self.looking == "learned":
            place = Gaussian(decided[..., 2:].tanh(), decided.new_full((*decided.shape[:-1], 2), self.std))
        return Steps(Bernoulli(scores.detach() + decided[..., 0]), Bernoulli(decided[..., 1] - 3), place)

    def _first(self, keys: Tensor, greedy: bool) -> Tensor:
        if self.looking == "learned" and greedy:
            return torch.zeros(len(keys), 2, device=keys.device)
        return self._blind(keys, 0)

    def _blind(self, keys: Tensor, step: int) -> Tensor:
        if self.looking == "raster":
            return raster(self.glimpses + 1).to(keys.device)[step].expand(len(keys), 2)
        return noise.uniform(noise.fold(keys, "blind", step), 2) * 2 - 1


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


def candidate_losses(
    candidates: dict[str, Tensor], walk: Walk, targets: Boxes, side: int
) -> dict[str, Float[Tensor, ""]]:
    """What is taught by the true boxes: place and class of the assigned object, and how much the candidate is it.

    "box_loss" is 1 - IoU and the distance of the corners in parts of the object's size, "class_loss" a cross-entropy,
    "confidence_loss" that of the IoU with the assigned object if the class is right, else of 0. Means over glimpses.
    """
    index, there = assigned(walk, targets, side)
    aims = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    labels = targets.labels.gather(1, index)
    boxes, count = candidates["boxes"], there.sum().clamp(min=1)
    iou = overlaps(boxes.reshape(-1, 1, 4), aims.reshape(-1, 1, 4)).view(there.shape)
    size = (aims[..., 2:] - aims[..., :2]).clamp(min=1).repeat(1, 1, 2)
    distance = ((boxes - aims).abs() / size).mean(-1)
    right = (candidates["labels"].argmax(-1) == labels) & there
    entropies = F.cross_entropy(candidates["labels"].flatten(0, 1), labels.flatten(), reduction="none").view_as(iou)
    sure = F.binary_cross_entropy_with_logits(candidates["scores"], (iou * right).detach(), reduction="none")
    return {
        "box_loss": torch.where(there, 1 - iou + distance, 0.0).sum() / count,
        "class_loss": torch.where(there, entropies, 0.0).sum() / count,
        "confidence_loss": torch.where(walk.mask, sure, 0.0).sum() / walk.mask.sum(),
    }
