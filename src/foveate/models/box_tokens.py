"""Sets of boxes as texts, six tokens a box: top, left, bottom, right, class, confidence; then an end.

Chen et al. 2022, "Pix2seq: a language modeling framework for object detection"; with the confidence token of Pinto et
al. 2023, "Tuning computer vision models with task rewards", section 4.2, which says whether the box before it is right.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import batched_nms

from foveate import noise
from foveate.geometry import Boxes, check_boxes, overlaps
from foveate.models.encoder_decoder import SPREAD, EncoderDecoder, Tokens, waves
from foveate.types import InputError, RewardOutput, map_tree

END, WRONG, RIGHT = 0, 1, 2
_FIRST_BIN = 3
EACH = 6  # tokens a box


@dataclass(frozen=True)
class BoxTokens:
    """How boxes in images of one size are written.

    Tokens: the end, two confidences, then the bins of the coordinates, then the classes.

    Attributes:
        size: (height, width) of the images in pixels.
        classes: how many there are.
        most: boxes in an answer at most.
        bins: into which a side of the image is divided.
    """

    size: tuple[int, int]
    classes: int
    most: int
    bins: int = 1000

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return _FIRST_BIN + self.bins + self.classes

    @property
    def length(self) -> int:
        """Tokens in an answer at most."""
        return EACH * self.most + 1

    def allowed(self) -> Bool[Tensor, "length vocabulary"]:
        """Which tokens may stand at each place: a coordinate or the end, coordinates, a class, a confidence."""
        token, place = torch.arange(self.vocabulary), torch.arange(self.length)[:, None] % EACH
        is_class, is_confidence = token >= _FIRST_BIN + self.bins, (token == WRONG) | (token == RIGHT)
        is_bin = (token >= _FIRST_BIN) & ~is_class
        found = torch.where(place < 4, is_bin, torch.where(place == 4, is_class, is_confidence))
        found = found | ((token == END) & (place == 0))
        found[-1] = token == END
        return found

    def encode(self, boxes: Boxes, keys: Int[Tensor, " batch"] | None = None) -> Tokens:
        """Write boxes, with the confidence "right": in the order of random draws of the keys, or row by row.

        The texts are as long as the longest of them.

        Raises:
            InputError: an image with more than `most` boxes, a class out of range, or a box beyond the image.
        """
        check_boxes(boxes, "boxes", self.size)
        counts = boxes.mask.sum(1)
        if counts.numel() and int(counts.max()) > self.most:
            row = int(counts.argmax())
            raise InputError(f"boxes: image {row} has {int(counts[row])}, expected at most {self.most}: raise most")
        labels = boxes.labels[boxes.mask]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise InputError(
                f"boxes: classes from {int(labels.min())} to {int(labels.max())}, expected 0 to {self.classes - 1}"
            )
        scale = self._scale(boxes.boxes)
        bins = (boxes.boxes[..., [1, 0, 3, 2]] / scale * self.bins).floor().clamp(0, self.bins - 1).long()
        if keys is None:
            rank = (bins[..., 0] * self.bins + bins[..., 1]).float()
        else:
            rank = noise.uniform(keys, boxes.mask.shape[1])
        order = rank.masked_fill(~boxes.mask, torch.inf).argsort(dim=1, stable=True)[:, : self.most]
        bins = bins.gather(1, order[..., None].expand(-1, -1, 4))
        label, there = boxes.labels.gather(1, order), boxes.mask.gather(1, order)
        right = torch.full_like(label, RIGHT)
        text = torch.cat((bins + _FIRST_BIN, (label + _FIRST_BIN + self.bins)[..., None], right[..., None]), 2)
        ids = torch.full((len(counts), self.length), END, device=text.device)
        written = torch.where(there[..., None], text, END).flatten(1)
        ids[:, : written.shape[1]] = written
        mask = torch.arange(self.length, device=ids.device) <= EACH * counts[:, None]
        longest = int(mask.sum(1).max())
        return Tokens(ids[:, :longest], mask[:, :longest])

    def decode(self, tokens: Tokens) -> Boxes:
        """Read boxes: the middles of their bins; those up to the end, and a last one only if it is whole.

        What stands where it may not (`allowed`) is read as the nearest that may. A box that ends before it begins is
        turned round. There are as many places as the texts have room for.
        """
        count = tokens.ids.shape[1] // EACH
        ids = tokens.ids[:, : EACH * count].unflatten(1, (count, EACH))
        whole = tokens.mask[:, : EACH * count].unflatten(1, (count, EACH)).all(2)
        there = whole & (ids[..., 0] != END)
        bins = (ids[..., :4] - _FIRST_BIN).clamp(0, self.bins - 1)
        corners = (bins + 0.5) / self.bins * self._scale(tokens.ids)
        corners = corners.unflatten(2, (2, 2)).sort(dim=2).values.flatten(2)[..., [1, 0, 3, 2]]
        labels = (ids[..., 4] - _FIRST_BIN - self.bins).clamp(0, self.classes - 1)
        return Boxes(corners, labels, there)

    def given(self) -> Int[Tensor, " length"]:
        """The token "right" where a confidence stands: it is learned, but not drawn, and nothing depends on it."""
        place = torch.arange(self.length)
        return torch.where(place % EACH == EACH - 1, RIGHT, -1)

    def confidences(self, logits: Float[Tensor, "batch length vocabulary"]) -> Float[Tensor, "batch count"]:
        """How sure the model is that each box is right: the share of "right" among the two confidences."""
        return self._sureness(logits).sigmoid()

    def _sureness(self, logits: Tensor) -> Tensor:
        places = logits[:, EACH - 1 :: EACH]
        return places[..., RIGHT] - places[..., WRONG]

    def confidence_loss(
        self,
        logits: Float[Tensor, "batch length vocabulary"],
        boxes: Boxes,
        ious: Float[Tensor, "batch count"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the two confidences with the IoU of each sampled box: learns its expectation. To minimise.

        Args:
            logits: of the model on the texts of the boxes.
            boxes: as read from these texts (`decode`).
            ious: of each with its target, 0 where there is none (`foveate.rewards.boxes.matched_iou`).
        """
        each = F.binary_cross_entropy_with_logits(self._sureness(logits), ious, reduction="none")
        return (each * boxes.mask).sum() / boxes.mask.sum().clamp(min=1)

    def _scale(self, like: Tensor) -> Tensor:
        return torch.tensor([*self.size, *self.size], dtype=torch.float32, device=like.device)


def by_token(reward: Callable[[Boxes, Boxes], RewardOutput]) -> Callable[[Boxes, Boxes], RewardOutput]:
    """The same reward of boxes read from texts, with its `credit` where their classes are written, 0 at other tokens.

    Then a box is known. The texts end as those of `BoxWriter.sample` do: with one more token. A reward without credit
    of boxes has none of tokens.
    """

    def told(predictions: Boxes, targets: Boxes) -> RewardOutput:
        output = reward(predictions, targets)
        if output.credit is None:
            return output
        tokens = output.credit[..., None] * (torch.arange(EACH, device=output.credit.device) == EACH - 2)
        return replace(output, credit=F.pad(tokens.flatten(1), (0, 1)))

    return told


class BoxWriter(EncoderDecoder):
    """Reads images and writes their boxes.

    Args:
        code: how boxes are written; it has the images' size.
        patch: side of the patches in which an image is read.
        stem: what sees the image first (see `EncoderDecoder`).
        width: of the vectors.
        depth: blocks of the encoder, and of the decoder.
        heads: of the attention.

    Attributes:
        trust: how much the learned confidence counts where boxes are ranked: 0 not at all, 1 as much as the class.
    """

    trust: Tensor

    def __init__(
        self,
        code: BoxTokens,
        patch: int,
        stem: nn.Module | None = None,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__(
            (3, *code.size),
            patch,
            code.vocabulary,
            code.length,
            END,
            code.allowed(),
            code.given(),
            width=width,
            depth=depth,
            heads=heads,
            stem=stem,
        )
        self.code = code
        self.register_buffer("trust", torch.tensor(0.0))
        bins = waves((torch.arange(code.bins) + 0.5) / code.bins, width)
        with torch.no_grad():
            self.embed.weight[_FIRST_BIN : _FIRST_BIN + code.bins] = SPREAD * math.sqrt(2) * bins
            self.score.weight[_FIRST_BIN : _FIRST_BIN + code.bins] = bins / math.sqrt(width)

    def decode(self, actions: Tokens) -> Boxes:  # type: ignore[override]
        """The boxes of texts, without scores."""
        return self.code.decode(actions)

    @torch.no_grad()
    def scored(
        self, images: Float[Tensor, "batch 3 height width"], keys: Int[Tensor, " batch"], greedy: bool = True
    ) -> tuple[Boxes, Boxes]:
        """The boxes of a text for each image, scored by the probability of their class; and by their confidence.

        Args:
            images: in [0, 1].
            keys: of the draws.
            greedy: take the likeliest token at each place.
        """
        texts = self.sample(images, 1, greedy, keys)
        read = self(images, texts)
        assert read.log_probs is not None
        chances = read.log_probs[:, EACH - 2 :: EACH].exp()[:, : texts.ids.shape[1] // EACH]
        written = self.decode(texts)
        return replace(written, scores=chances), replace(
            written, scores=self.code.confidences(read.distribution.logits)
        )

    def detect(
        self, images: Float[Tensor, "batch 3 height width"], keys: Int[Tensor, " batch"], greedy: bool = True
    ) -> Boxes:
        """The boxes of `scored`, ranked by both: class · confidence ** trust, in [0, 1]."""
        return ranked(*self.scored(images, keys, greedy), float(self.trust))

    @torch.no_grad()
    def agreed(
        self,
        images: Float[Tensor, "batch 3 height width"],
        keys: Int[Tensor, " batch"],
        texts: int = 16,
        overlap: float = 0.4,
    ) -> Boxes:
        """The boxes of several drawn texts, scored by how well the texts agree on each; at most `code.most` an image.

        One text says each object once, and what it says of it is one draw. A box's score is the mean over all texts of
        the largest IoU with a box of its class there, in [0, 1]: near 1 where all of them write it, and alike.

        Args:
            images: in [0, 1].
            keys: of the draws.
            texts: drawn for each image.
            overlap: IoU with a surer box of the same class from which one is left out.
        """
        written = self.decode(self.sample(images, texts, False, keys))
        if not written.mask.shape[1]:
            return replace(map_tree(lambda leaf: leaf[::texts], written), scores=written.boxes[::texts, :, 0])
        found = map_tree(lambda leaf: leaf.unflatten(0, (-1, texts)).flatten(1, 2), written)
        alike = (found.labels[:, :, None] == found.labels[:, None]) & found.mask[:, None]
        votes = (overlaps(found.boxes, found.boxes) * alike).unflatten(2, (texts, -1)).amax(3).mean(2)
        kinds = found.labels + self.code.classes * torch.arange(len(images), device=votes.device)[:, None]
        there = found.mask.flatten().nonzero().flatten()
        few = (leaf.flatten(0, 1)[there] for leaf in (found.boxes, votes, kinds))
        stays = torch.zeros_like(found.mask).flatten()
        stays[there[batched_nms(*few, overlap)]] = True
        stays = stays.view_as(found.mask)
        order = torch.where(stays, votes, -1.0).sort(dim=1, descending=True, stable=True).indices[:, : self.code.most]
        kept = map_tree(lambda leaf: leaf.gather(1, order), (found.labels, stays, votes))
        return Boxes(found.boxes.gather(1, order[..., None].expand(-1, -1, 4)), *kept)

    def unending(self) -> BoxWriter:
        """A copy that may not end before all its places are filled."""
        other = copy.deepcopy(self)
        assert other.allowed is not None
        other.allowed[:-1, END] = False
        return other


def ranked(by_class: Boxes, by_confidence: Boxes, trust: float) -> Boxes:
    """Boxes scored by the probability of their class times a power of their confidence."""
    assert by_class.scores is not None
    assert by_confidence.scores is not None
    return replace(by_class, scores=by_class.scores * by_confidence.scores**trust)
