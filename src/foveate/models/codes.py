"""A dense map as a short text: first a code for maps is learned, then a model that writes it from the image alone.

Kolesnikov et al. 2022, "UViM: a unified modeling approach for vision with learned guiding codes" (arXiv 2205.10337).
Stage one (`MapCode`): an oracle sees the map and its image and writes n words; a base model sees the image and the
words and draws the map. Whatever the image tells, the words need not. Words are left out at random, so that each has a
meaning of its own. Stage two (`Coded`): an `EncoderDecoder` writes the words, the base model of stage one, frozen,
draws the map. What the map is (colours, depths, scores of classes) is left to whoever chooses channels and loss.

The words are those of finite scalar quantisation (Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made
simple", arXiv 2309.15505) instead of UViM's learned dictionary: a few numbers, each rounded to one of a few levels.
There is no dictionary to keep alive and nothing to average over processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.models.backbones import convolutions
from foveate.models.encoder_decoder import EncoderDecoder, Tokens
from foveate.types import Decisions, InputError, Sampler


class Words(nn.Module):
    """Vectors of a few numbers, each at one of a few levels from -1 to 1: word ↔ vector.

    Args:
        levels: of each number; their product is the number of words.
    """

    table: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise InputError(f"levels: found {', '.join(map(str, levels))}, expected at least 2 of each number")
        self.levels, self.count = tuple(levels), math.prod(levels)
        places = [torch.linspace(-1, 1, level) for level in levels]
        self.register_buffer("table", torch.cartesian_prod(*places).view(self.count, len(levels)), persistent=False)

    def vectors(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch numbers"]:
        """What words stand for."""
        return self.table[ids]

    def nearest(self, vectors: Float[Tensor, "*batch numbers"]) -> Int[Tensor, "*batch"]:
        """The word at a vector of [-1, 1]."""
        ids = torch.zeros(vectors.shape[:-1], dtype=torch.long, device=vectors.device)
        for number, level in zip(vectors.unbind(-1), self.levels, strict=True):
            ids = ids * level + ((number + 1) / 2 * (level - 1)).round().long()
        return ids

    def rounded(self, vectors: Float[Tensor, "*batch numbers"]) -> Float[Tensor, "*batch numbers"]:
        """The vector of the nearest word, with the gradient of the vector itself: straight through."""
        return vectors + (self.vectors(self.nearest(vectors.detach())) - vectors).detach()


class Base(nn.Module):
    """Draws a dense map from an image and the words for it: a U-Net that meets the words at its lowest level.

    Args:
        channels: of the images.
        outputs: channels of the maps.
        grid: rows and columns of the words.
        patch: side of the square of pixels that each word is about; a power of 2.
        numbers: in the vector of a word.
        width: features at full size; twice as many at each halving, up to eight times. A multiple of 8.
        gain: how much louder than by default words are at first, against what the image shows; quiet words are learned
            to be read late.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        grid: tuple[int, int],
        patch: int,
        numbers: int,
        width: int = 16,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.grid = grid
        depth = _halvings(patch)
        widths = [width * 2 ** min(level, 3) for level in range(depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_layer(*pair) for pair in [(channels, width), *pairs])
        self.told = nn.Conv2d(numbers, widths[-1], 1, bias=False)  # a word that is left out is a zero
        with torch.no_grad():
            self.told.weight *= gain
        self.middle = nn.Sequential(_layer(widths[-1], widths[-1]), _layer(widths[-1], widths[-1]))
        self.widen = nn.ModuleList(nn.Conv2d(low, high, 1) for high, low in reversed(pairs))
        self.up = nn.ModuleList(_layer(high, high) for high, _ in reversed(pairs))
        self.draw = nn.Conv2d(width, outputs, 1)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        vectors: Float[Tensor, "batch words numbers"],
    ) -> Float[Tensor, "batch outputs height width"]:
        """The map of each image, from the vectors of its words in the order of rows."""
        state, kept = images, []
        for level, block in enumerate(self.down):
            state = block(F.avg_pool2d(state, 2) if level else state)
            kept.append(state)
        state = self.middle(kept.pop() + self.told(vectors.mT.unflatten(2, self.grid)))
        for widen, block in zip(self.widen, self.up, strict=True):
            state = block(F.interpolate(widen(state), scale_factor=2.0, mode="nearest") + kept.pop())
        return self.draw(state)


class MapCode(nn.Module):
    """Stage one: dense maps ↔ words, given the image.

    Args:
        image: channels, height and width of the images.
        seen: channels of a map as the oracle sees it.
        outputs: channels of a map as it is drawn, e.g. one for each class.
        patch: side of the square of pixels that each word is about; a power of 2 that divides height and width.
        levels: of the numbers of a word (`Words`).
        width: features of the base model at full size; the oracle has eight times as many at its end.
        gain: of the words in the base model (`Base`).
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        seen: int,
        outputs: int,
        patch: int,
        levels: Sequence[int],
        width: int = 16,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, columns = image
        _halvings(patch)
        if height % patch or columns % patch:
            raise InputError(f"code_patch: {patch} pixels do not divide images of {columns}x{height}; choose another")
        grid = height // patch, columns // patch
        self.words, self.length = Words(levels), math.prod(grid)
        self.oracle = nn.Sequential(
            convolutions(channels + seen, 8 * width, patch),
            _layer(8 * width, 8 * width),
            nn.Conv2d(8 * width, len(self.words.levels), 1),
        )
        self.base = Base(channels, outputs, grid, patch, len(self.words.levels), width, gain)

    def encode(
        self,
        images: Float[Tensor, "batch channels height width"],
        maps: Float[Tensor, "batch seen height width"],
    ) -> Int[Tensor, "batch words"]:
        """The words for a map given its image: the answers that stage two learns to write."""
        return self.words.nearest(self._vectors(images, maps))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        maps: Float[Tensor, "batch seen height width"],
        keep: Bool[Tensor, "batch words"] | None = None,
    ) -> Float[Tensor, "batch outputs height width"]:
        """The map as it is drawn again, from the words to `keep` (None: from all)."""
        vectors = self.words.rounded(self._vectors(images, maps))
        return self.base(images, vectors if keep is None else vectors * keep[..., None])

    def _vectors(self, images: Tensor, maps: Tensor) -> Tensor:
        return self.oracle(torch.cat((images, maps), 1)).flatten(2).mT.tanh()


def kept_words(keys: Int[Tensor, " batch"], words: int) -> Bool[Tensor, "batch words"]:
    """Which words of a code to keep in an update: every number of them as often, at random (UViM's code dropout)."""
    share = noise.uniform(noise.fold(keys, "share"))
    return noise.uniform(noise.fold(keys, "word"), words) < share[:, None]


@dataclass(frozen=True)
class CodedAnswers:
    """Words and the images that they are about: a tree, so that it can be cut and repeated as one.

    Attributes:
        tokens: the words.
        images: one for each row of them.
    """

    tokens: Tokens
    images: Float[Tensor, "batch channels height width"]


class Coded(Sampler):
    """Stage two: writes the words for a map from the image alone; they are the decisions.

    Args:
        writer: writes `code.length` words of `code.words.count`; its answers have no end.
        words: what the words stand for: those of stage one.
        base: draws maps from them; it does not learn. Give it the weights of stage one's.
    """

    def __init__(self, writer: EncoderDecoder, words: Words, base: Base) -> None:
        super().__init__()
        self.writer, self.words, self.base = writer, words, base.requires_grad_(False)

    @property
    def temperature(self) -> float:
        """By which the writer's scores are divided."""
        return self.writer.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.writer.temperature = value

    def answers(
        self, images: Float[Tensor, "batch channels height width"], ids: Int[Tensor, "batch words"]
    ) -> CodedAnswers:
        """Words as answers to images."""
        return CodedAnswers(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), images)

    def sample(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        num_samples: int,
        greedy: bool,
        keys: Int[Tensor, " batch"],
    ) -> CodedAnswers:
        """Write words for each image `num_samples` times."""
        tokens = self.writer.sample(inputs, num_samples, greedy, keys)
        return CodedAnswers(tokens, inputs.repeat_interleave(num_samples, 0))

    def forward(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        actions: CodedAnswers,
        steps: slice = slice(None),
    ) -> Decisions:
        """Score all words in one pass."""
        return self.writer(inputs, actions.tokens, steps)

    def decode(self, actions: CodedAnswers) -> Float[Tensor, "rows outputs height width"]:
        """Draw the maps."""
        return self.base(actions.images, self.words.vectors(actions.tokens.ids))


def _halvings(patch: int) -> int:
    halvings = round(math.log2(max(1, patch)))
    if patch < 2 or 2**halvings != patch:
        raise InputError(f"code_patch: found {patch}, expected a power of 2 from 2 on")
    return halvings


def _layer(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU())
