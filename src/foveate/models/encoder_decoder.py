"""An answer written token by token: a Transformer that reads an image and one that writes.

Dosovitskiy et al. 2021, "An image is worth 16x16 words" (the encoder); Vaswani et al. 2017, "Attention is all you
need", with layer norms before the blocks (the decoder). Boxes, words and codes of dense maps are all written so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.distributions import Categorical
from foveate.types import Decisions, InputError, Sampler

ROOM = 32  # steps by which the memory of what was written grows: less to copy than a step at a time
SPREAD = 0.5  # of embeddings at first; at the usual 0.02 patches drown them, and small models learn places late


@dataclass(frozen=True)
class Tokens:
    """Answers: a tree of [batch, time].

    Attributes:
        ids: of the tokens; 0 after the end.
        mask: true up to and with the end token.
    """

    ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]


class EncoderDecoder(Sampler):
    """Reads images, writes tokens.

    Samples of one image are rows next to each other. The image is encoded once for all of them, and its keys and values
    are not repeated: in cross-attention the samples are queries of one sequence.

    Args:
        image: channels, height and width of the images.
        patch: side of the square patches in which an image is read; it divides height and width.
        vocabulary: number of tokens.
        length: tokens in an answer at most.
        end: the token that ends an answer; None: all answers have the full length.
        allowed: which tokens may stand at each place, [length, vocabulary]; None: all.
        given: the token that stands at a place whatever the model says, [length], -1 where it decides; None: it decides
            everywhere. What is given is no decision (`mask` of the result), but is scored, so that it can be learned.
        width: of the vectors.
        depth: blocks of the encoder, and of the decoder.
        heads: of the attention.
        temperature: by which scores are divided, in sampling and in `forward` alike.
        stem: what sees the image first, [batch, channels, height, width] to [batch, width, height / patch, width /
            patch], e.g. `foveate.models.backbones`; None: a linear layer of each patch.

    Raises:
        InputError: sizes that do not go into each other.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        patch: int,
        vocabulary: int,
        length: int,
        end: int | None = None,
        allowed: Bool[Tensor, "length vocabulary"] | None = None,
        given: Int[Tensor, " length"] | None = None,
        width: int = 192,
        depth: int = 4,
        heads: int = 4,
        temperature: float = 1.0,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if image[1] % patch or image[2] % patch:
            raise InputError(f"image_size: {image[2]}x{image[1]} pixels cannot be cut into patches of {patch}")
        if width % heads or width % 4:
            raise InputError(f"width: {width} is no multiple of 4 and of the {heads} heads")
        self.vocabulary, self.length, self.end, self.temperature = vocabulary, length, end, temperature
        self.patches = stem or nn.Conv2d(image[0], width, patch, stride=patch)
        rows, columns = ((torch.arange(side // patch) + 0.5) / (side // patch) for side in image[1:])
        across = waves(columns, width // 2).expand(len(rows), -1, -1)
        down = waves(rows, width // 2)[:, None].expand(-1, len(columns), -1)
        self.where = nn.Parameter(SPREAD * math.sqrt(2) * torch.cat((down, across), 2).flatten(0, 1))
        self.encoder: Any = nn.ModuleList(_Block(width, heads, cross=False) for _ in range(depth))
        self.read = nn.LayerNorm(width)
        self.embed = nn.Embedding(vocabulary + 1, width)  # the last is what stands before the first token
        nn.init.normal_(self.embed.weight, std=SPREAD)
        self.when = nn.Parameter(torch.randn(length, width) * SPREAD)
        self.decoder: Any = nn.ModuleList(_Block(width, heads, cross=True) for _ in range(depth))
        self.written = nn.LayerNorm(width)
        self.score = nn.Linear(width, vocabulary)
        self.worth = nn.Linear(width, 1)
        self.allowed: Tensor | None
        self.register_buffer("allowed", allowed, persistent=False)
        self.given = [-1] * length if given is None else given.tolist()

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch places features"]:
        """What is seen in each patch."""
        seen = self.patches(images).flatten(2).mT + self.where
        for block in self.encoder:
            seen = block(seen)
        return self.read(seen)

    @torch.no_grad()
    def sample(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        num_samples: int,
        greedy: bool,
        keys: Int[Tensor, " batch"],
    ) -> Tokens:
        """Write `num_samples` answers to each image, a token a step, with the keys and values of the steps before.

        They are as long as the longest of them.
        """
        seen = self.encode(inputs)
        memories = [block.remember(seen) for block in self.decoder]
        rows = len(inputs) * num_samples
        sample = torch.arange(num_samples, device=keys.device)
        streams = noise.fold(keys[:, None], "sample", sample).flatten()
        pasts = [memory.empty(rows) for memory in memories]
        last = torch.full((rows,), self.vocabulary, device=keys.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=keys.device)
        ids, mask = [], []
        for step in range(self.length):
            if step % ROOM == 0:
                pasts = [past.longer(min(ROOM, self.length - step)) for past in pasts]
            state = (self.embed(last) + self.when[step])[:, None]
            for block, memory, past in zip(self.decoder, memories, pasts, strict=True):
                state = block.step(state, memory, past, step)
            choice = self._distribution(self.written(state), slice(step, step + 1))
            if self.given[step] >= 0:
                last = torch.full_like(last, self.given[step])
            else:
                last = choice.mode() if greedy else choice.sample(noise.fold(streams[:, None], "token", step))
                last = last.squeeze(1)
            ids.append(last.masked_fill(ended, 0))
            mask.append(~ended)
            if self.end is not None:
                ended = ended | (last == self.end)
                if bool(ended.all()):
                    break
        return Tokens(torch.stack(ids, 1), torch.stack(mask, 1))

    def forward(
        self,
        inputs: Float[Tensor, "batch channels height width"],
        actions: Tokens,
        steps: slice = slice(None),
    ) -> Decisions:
        """Score all tokens of answers in one pass; `actions` has rows · n rows, n answers to each image.

        They may be shorter than `length`: cut off what no answer of a batch uses, and it costs nothing.
        """
        seen = self.encode(inputs)
        before = F.pad(actions.ids[:, :-1], (1, 0), value=self.vocabulary)
        state = self.embed(before) + self.when[: before.shape[1]]
        for block in self.decoder:
            state = block(state, block.remember(seen))
        state = self.written(state[:, steps])
        distribution = self._distribution(state, steps)
        log_probs = distribution.log_prob(actions.ids[:, steps])
        decided = torch.tensor(self.given[: before.shape[1]], device=before.device)[steps] < 0
        values = self.worth(state.detach()).squeeze(-1).float()
        return Decisions(distribution, values, log_probs, actions.mask[:, steps] & decided)

    def decode(self, actions: Tokens) -> Tokens:
        """The tokens themselves."""
        return actions

    def _distribution(self, state: Tensor, steps: slice) -> Categorical:
        logits = self.score(state).float() / self.temperature
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed[steps][: logits.shape[1]], -torch.inf)
        return Categorical(logits)


def waves(places: Float[Tensor, " count"], width: int) -> Float[Tensor, "count {width}"]:
    """Sines and cosines of places in [0, 1], wavelengths from 2 down to 1/32: near places look alike, far ones do not.

    Where images are read and where boxes are written, places begin with these: a linear layer then turns the one into
    the other, which from random vectors takes thousands of steps to be found.
    """
    rates = math.pi * torch.logspace(0, 6, width // 2, base=2.0)
    angles = places[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)


class _Past(NamedTuple):
    """Keys and values, [rows, heads, length, width / heads]: whole tensors, which products take without a copy."""

    keys: Tensor
    values: Tensor

    def empty(self, rows: int) -> _Past:
        """No places yet, of the same shape and precision otherwise: then none is converted at a step."""
        return _Past(*(part.new_zeros(rows, part.shape[1], 0, part.shape[3]) for part in self))

    def longer(self, places: int) -> _Past:
        """With room for so many more."""
        return _Past(*(F.pad(part, (0, 0, 0, places)) for part in self))


class _Block(nn.Module):
    """Self-attention, attention to what was read, and a layer for each place; a norm before each, a sum after."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        self.norm, self.project, self.join = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        if cross:
            self.norm_cross, self.ask = nn.LayerNorm(width), nn.Linear(width, width)
            self.offer, self.join_cross = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_each = nn.LayerNorm(width)
        self.each = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, state: Tensor, memory: _Past | None = None) -> Tensor:
        """All places at once; with a memory each place sees the ones before it only."""
        query, key, value = (self._split(part) for part in self.project(self.norm(state)).chunk(3, -1))
        mask = None
        if self.cross:
            count = state.shape[1]
            mask = torch.ones(count, count, dtype=torch.bool, device=state.device).tril()
        return self._finish(state + self.join(self._merge(_attend(query, key, value, mask))), memory)

    def remember(self, seen: Tensor) -> _Past:
        """Keys and values of what was read, as matrix products take them: they are not copied at every step."""
        key, value = self.offer(seen).chunk(2, -1)
        return _Past(self._split(key).contiguous(), self._split(value).contiguous())

    def step(self, state: Tensor, memory: _Past, past: _Past, step: int) -> Tensor:
        """One place, with the keys and values of those before it, which it joins."""
        query, key, value = (self._split(part) for part in self.project(self.norm(state)).chunk(3, -1))
        past.keys[:, :, step], past.values[:, :, step] = key.squeeze(2), value.squeeze(2)
        written = torch.arange(past.keys.shape[2], device=state.device) <= step
        seen = _attend(query, past.keys, past.values, written)
        return self._finish(state + self.join(self._merge(seen)), memory)

    def _finish(self, state: Tensor, memory: _Past | None) -> Tensor:
        if memory is not None:
            # the samples of an image stand one behind the other as its queries
            rows, time, width = state.shape
            asked = self.ask(self.norm_cross(state)).view(len(memory.keys), -1, width)
            found = self._merge(_attend(self._split(asked), memory.keys, memory.values, None))
            state = state + self.join_cross(found).view(rows, time, width)
        return state + self.each(self.norm_each(state))

    def _split(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, vectors: Tensor) -> Tensor:
        return vectors.transpose(1, 2).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # Written out: the fused kernel's backward in bf16 is several times slower than this on a CPU.
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    with torch.autocast(scores.device.type, enabled=False):  # else bf16 is copied to fp32 and back; the sums are fp32
        chances = scores.softmax(-1)
    return chances @ value
