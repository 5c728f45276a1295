"""Rewards of captioning: CIDEr-D and CIDEr from n-grams of word ids.

Vedantam et al. 2015, "CIDEr: consensus-based image description evaluation". A caption and a reference are vectors over
n-grams, each the number of times it occurs times log(documents / documents in which it occurs); compared by cosine, n
from 1 to 4, the mean over n and over the references, times 10. What is said of every picture is worth nothing.

Words are ids from 0 to 65,535, so that four of them fit a 64-bit number: n-grams are compared as such, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.types import InputError, RewardOutput, map_tree

LONGEST = 4  # words in an n-gram
VOCABULARY = 2**16
SIGMA = 6.0  # of the penalty on a difference in length


@dataclass(frozen=True)
class Words:
    """Texts as word ids, padded: a tree of [batch, length], or of [batch, references, length].

    Attributes:
        ids: of the words; the padding may hold any id.
        mask: true where there is a word; it must have no gaps. A reference without a word does not exist.
    """

    ids: Int[Tensor, "batch ..."]
    mask: Bool[Tensor, "batch ..."]


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many documents (the references of an image together) each n-gram occurs.

    Attributes:
        keys: for each n the n-grams that occur, sorted.
        counts: in how many documents.
        documents: how many there are.
    """

    keys: tuple[Int[Tensor, "..."], ...]
    counts: tuple[Int[Tensor, "..."], ...]
    documents: int

    def weights(self, keys: Int[Tensor, "..."], n: int) -> Float[Tensor, "..."]:
        """log(documents / documents with it) of n-grams; one that never occurs counts as if it did once."""
        known, counts = self.keys[n - 1].to(keys.device), self.counts[n - 1].to(keys.device)
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        occurs = torch.where(known[place] == keys, counts[place], 1)
        return math.log(self.documents) - occurs.double().log()


def document_frequency(references: Words) -> DocumentFrequency:
    """Count n-grams over the references of a training set, [images, references, length]; once an image.

    Raises:
        InputError: ids out of range, or no n-gram at all.
    """
    keys, counts = [], []
    for n in range(1, LONGEST + 1):
        grams, there = _grams(references, n)
        image = torch.arange(len(grams), device=grams.device)[:, None, None].expand_as(grams)
        once = torch.stack((image[there], grams[there])).unique(dim=1)
        found, occurs = once[1].unique(return_counts=True)
        if not len(found):
            found, occurs = grams.new_zeros(1), grams.new_ones(1)  # no text is so long: any key does, at a count of 1
        keys.append(found)
        counts.append(occurs)
    return DocumentFrequency(tuple(keys), tuple(counts), len(references.ids))


@dataclass(frozen=True)
class Cider:
    """CIDEr-D of each caption, from 0 to 10, or plain CIDEr.

    CIDEr-D clips what a caption repeats to what the reference says, and multiplies by exp(-(difference in length)² /
    2 · 6²). It is what pycocoevalcap computes under the name "Cider", to its last digits but for one thing: there the
    document frequencies come from the references of the very corpus that is scored, here from a table made once.
    `parts` "cider1" to "cider4" are those of each n; the total is their mean.

    To the corpus metric: that is the mean of this over captions.

    Attributes:
        table: `document_frequency` of the training references.
        plain: CIDEr as first defined: without clipping and without the penalty.
    """

    table: DocumentFrequency
    plain: bool = False

    def __call__(self, predictions: Words, targets: Words) -> RewardOutput:
        """Score captions [batch, length] against references [batch, references, length].

        Raises:
            InputError: ids out of range, or an image without a reference.
        """
        exists = targets.mask.any(-1)
        if not exists.any(1).all():
            row = int((~exists.any(1)).nonzero()[0])
            raise InputError(f"targets: image {row} has no reference, expected at least one: leave the image out")
        lengths, others = predictions.mask.sum(-1), targets.mask.sum(-1)
        # pycocoevalcap takes the number of word pairs for the length
        apart = (lengths - 1).clamp(min=0)[:, None] - (others - 1).clamp(min=0)
        penalty = 1.0 if self.plain else torch.exp(-apart.double().square() / (2 * SIGMA**2))
        each = [(self._similarity(predictions, targets, n) * penalty * exists).sum(1) for n in range(1, LONGEST + 1)]
        scores = 10 * torch.stack(each, 1) / exists.sum(1, keepdim=True)
        parts = {f"cider{n}": scores[:, n - 1].float() for n in range(1, LONGEST + 1)}
        return RewardOutput(scores.mean(1).float(), parts)

    def _similarity(self, predictions: Words, targets: Words, n: int) -> Float[Tensor, "batch references"]:
        grams, there = _grams(predictions, n)
        others, present = _grams(targets, n)
        if not grams.shape[-1] or not others.shape[-1]:
            return torch.zeros(others.shape[:2], dtype=torch.float64, device=grams.device)
        weights = self.table.weights(grams, n)
        own, theirs = _counts(grams, there), _counts(others, present)
        # a sum over different n-grams is one over places, each with its share of the n-gram that stands there
        share = there / own.clamp(min=1)
        said = own * weights
        length = (theirs * self.table.weights(others, n).square()).sum(-1).sqrt()
        shared = _matches(grams[:, None], others, present) * weights[:, None]
        said_each = said[:, None].expand_as(shared)
        product = ((said_each if self.plain else torch.minimum(said_each, shared)) * shared * share[:, None]).sum(-1)
        norm = (said * weights).sum(-1).sqrt()[:, None] * length
        return torch.where(norm > 0, product / norm, 0.0)


def _grams(words: Words, n: int) -> tuple[Int[Tensor, "..."], Bool[Tensor, "..."]]:
    """The n-grams at each place as numbers, and whether there is one: [..., length - n + 1]."""
    ids = words.ids.long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY:
        raise InputError(
            f"words: found ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {VOCABULARY - 1}; "
            "padding too, where the mask tells it"
        )
    length = max(0, ids.shape[-1] - n + 1)
    key = torch.zeros_like(ids[..., :length])
    for place in range(n):
        key = key * VOCABULARY + ids[..., place : place + length]
    return key, words.mask[..., n - 1 :][..., :length]


def _counts(grams: Int[Tensor, "*batch places"], there: Bool[Tensor, "*batch places"]) -> Int[Tensor, "*batch places"]:
    """How often the n-gram of each place occurs in its text; 0 where there is none."""
    return _matches(grams, grams, there) * there


def _matches(
    grams: Int[Tensor, "*#batch places"], others: Int[Tensor, "*#batch more"], there: Bool[Tensor, "*#batch more"]
) -> Int[Tensor, "*batch places"]:
    """How often the n-gram of each place occurs in another text."""
    return ((grams[..., :, None] == others[..., None, :]) & there[..., None, :]).sum(-1)


def of_texts(
    score: Callable[[list[str], list[list[str]]], RewardOutput], words: Sequence[str]
) -> Callable[[list[str], Words], RewardOutput]:
    """A score of captions and the references of each, all of them texts, as a reward whose targets are `Words`.

    Args:
        score: of strings; the references are words with spaces between.
        words: what the ids of the targets say.
    """

    def reward(captions: list[str], targets: Words) -> RewardOutput:
        rows = zip(targets.ids.cpu(), targets.mask.cpu(), strict=True)
        known = [[ids[mask].tolist() for ids, mask in zip(*row, strict=True)] for row in rows]
        texts = [[" ".join(words[word] for word in ids) for ids in row if ids] for row in known]
        return map_tree(lambda leaf: leaf.to(targets.ids.device), score(captions, texts))  # of texts it is on the CPU

    return reward
