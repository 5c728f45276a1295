"""Any network with scores for every pixel as a `Sampler`: each pixel of each class is a decision.

segmenter = Segmenter(network, classes=1)               # scores [batch, 1, height, width]
foveate.tune(segmenter, reward, batches, out="runs/tuned", credit="flip", minutes=10)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.distributions import Bernoulli, Categorical
from foveate.types import Decisions, InputError, Sampler

Images = Float[Tensor, "batch channels height width"]
Masks = Bool[Tensor, "rows classes height width"]


@dataclass(frozen=True)
class Labels:
    """The decisions of an answer: a tree.

    Attributes:
        values: for each class, whether a pixel is of it; of exclusive classes, which one, 0 for the background.
        known: which pixels somebody labelled, the others are no decisions; None: all.
    """

    values: Masks | Int[Tensor, "rows 1 height width"]
    known: Bool[Tensor, "rows 1 height width"] | None = None


class Segmenter(Sampler):
    """Decides for every pixel, independently of the others, given the image.

    By default the classes are yes/no decisions of their own (a sigmoid each, masks may overlap), so that the answer has
    classes · height · width decisions and `Tuning.credit` "flip" fits. With `exclusive` a pixel has one class or none
    (softmax; height · width decisions), and "difference" fits, where a decision's credit is what it adds to leaving
    the pixel to the background.

    The log-probability of a mask is minus the cross-entropy summed over pixels, so that maximum likelihood is the usual
    training. The network is run once for all samples of an image.

    Args:
        network: from images to scores (logits) [batch, classes, ...], one more with `exclusive`: the first is the
            background's. A tensor, a dict with "out" as torchvision's networks give, or an object with `.logits` as
            Hugging Face's give; a smaller map is enlarged bilinearly to the image.
        classes: how many.
        exclusive: a pixel has one class at most.

    Attributes:
        temperature: by which scores are divided, in sampling and in `forward` alike.
    """

    def __init__(self, network: nn.Module, classes: int, exclusive: bool = False) -> None:
        super().__init__()
        self.network, self.classes, self.exclusive = network, classes, exclusive
        self.temperature = 1.0

    def logits(self, images: Images) -> Float[Tensor, "batch scores height width"]:
        """Scores of every pixel.

        Raises:
            InputError: the network gives something else.
        """
        found: Any = self.network(images)
        found = found["out"] if isinstance(found, dict) and "out" in found else getattr(found, "logits", found)
        wanted = self.classes + self.exclusive
        if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[:2] != (len(images), wanted):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"model: gives {shape} for {list(images.shape)}, expected scores [{len(images)}, {wanted}, height, "
                f"width]; build it with {wanted} outputs a pixel"
            )
        if found.shape[2:] != images.shape[2:]:
            found = F.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)
        return found.float()

    def labels(self, masks: Masks, known: Bool[Tensor, "rows 1 height width"] | None = None) -> Labels:
        """True masks as decisions; of exclusive classes that overlap, the last one."""
        if not self.exclusive:
            return Labels(masks, known)
        ids = torch.arange(1, self.classes + 1, device=masks.device)[:, None, None]
        return Labels((masks * ids).amax(1, keepdim=True), known)

    @torch.no_grad()
    def sample(self, inputs: Images, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Labels:
        """Draw `num_samples` labels of each pixel; greedy: those of probability above 1/2, or the likeliest class."""
        logits = self.logits(inputs)
        shape = len(inputs) * num_samples, 1 if self.exclusive else self.classes, *logits.shape[2:]
        if greedy:
            return Labels(self._distribution(logits).mode().repeat_interleave(num_samples, 0).view(shape))
        sample = torch.arange(num_samples, device=keys.device)
        streams = noise.fold(keys[:, None], "sample", sample).flatten()
        places = torch.arange(math.prod(shape[1:]), device=keys.device)
        distribution = self._distribution(logits.repeat_interleave(num_samples, 0))
        return Labels(distribution.sample(noise.fold(streams[:, None], places)).view(shape))

    def forward(self, inputs: Images, actions: Labels, steps: slice = slice(None)) -> Decisions:
        """Score labels; rows of one image stand next to each other."""
        logits = self.logits(inputs)
        distribution = self._distribution(logits.repeat_interleave(len(actions.values) // len(logits), 0), steps)
        log_probs = distribution.log_prob(actions.values.flatten(1)[:, steps])
        mask = torch.ones_like(log_probs, dtype=torch.bool)
        if actions.known is not None:
            mask = actions.known.expand_as(actions.values).flatten(1)[:, steps]
        return Decisions(distribution, None, log_probs, mask)

    def decode(self, actions: Labels) -> Masks:
        """The mask of each class."""
        if not self.exclusive:
            return actions.values
        return actions.values == torch.arange(1, self.classes + 1, device=actions.values.device)[:, None, None]

    def _distribution(self, logits: Tensor, steps: slice = slice(None)) -> Bernoulli | Categorical:
        logits = logits / self.temperature
        if self.exclusive:
            return Categorical(logits.flatten(2).mT[:, steps])
        return Bernoulli(logits.flatten(1)[:, steps])


def tiled_logits(segmenter: Segmenter, images: Images, side: int) -> Float[Tensor, "batch scores height width"]:
    """Scores of images that are larger than what a network was trained on: from windows of at most `side` pixels.

    They overlap by at least a quarter; where they do, scores are averaged with weights that fall towards a window's
    edge.
    """
    tops, lefts = (_starts(length, side) for length in images.shape[2:])
    if len(tops) == len(lefts) == 1:
        return segmenter.logits(images)
    ramps = [torch.linspace(-1, 1, min(side, length) + 2)[1:-1] for length in images.shape[2:]]
    weight = ((1 - ramps[0].abs())[:, None] * (1 - ramps[1].abs())).to(images.device)
    total = images.new_zeros(len(images), segmenter.classes + segmenter.exclusive, *images.shape[2:])
    weights = images.new_zeros(images.shape[2:])
    for top in tops:
        for left in lefts:
            window = ..., slice(top, top + side), slice(left, left + side)
            total[window] += segmenter.logits(images[window]) * weight
            weights[window] += weight
    return total / weights


def _starts(length: int, side: int) -> list[int]:
    """First pixels of windows that cover a length."""
    if length <= side:
        return [0]
    count = 1 + math.ceil((length - side) / (side * 3 // 4))
    return torch.linspace(0, length - side, count).round().int().tolist()
