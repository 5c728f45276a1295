"""A writer of sentences that knows how its words are spelled, so that a checkpoint needs no list of words beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from foveate.models.backbones import Pretrained, stem
from foveate.models.encoder_decoder import EncoderDecoder


class Captioner(EncoderDecoder):
    """Writes sentences on square RGB images, a word a token.

    A pretrained backbone stands still, unless told otherwise. Then `sample` and `forward` take what it sees of the
    images (`look`), which need be computed only once for each image.

    Args:
        side: of the images, in pixels.
        patch: pixels of the image, a side, to a vector that is read; the stride of a backbone.
        vocabulary: number of words, the end of a sentence among them.
        length: words in a sentence at most, with the end.
        end: the id of the end.
        letters: bytes of a word at most, in UTF-8.
        backbone: "convolutions", or a name as `Pretrained` takes it.
        tune_backbone: whether a pretrained backbone learns too.
        width: of the vectors.
        depth: blocks of the encoder, and of the decoder.
        heads: of the attention.
    """

    letters: Tensor

    def __init__(
        self,
        side: int,
        patch: int,
        vocabulary: int,
        length: int,
        end: int = 0,
        letters: int = 48,
        backbone: str = "convolutions",
        tune_backbone: bool = False,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        seen = None if tune_backbone or backbone == "convolutions" else Pretrained(backbone, patch)
        read = stem(backbone, width, patch) if seen is None else nn.Conv2d(seen.channels, width, 1)
        image = 3, side, side
        super().__init__(image, patch, vocabulary, length, end, width=width, depth=depth, heads=heads, stem=read)
        self.backbone = None if seen is None else seen.requires_grad_(False)
        self.register_buffer("letters", torch.zeros(vocabulary, letters, dtype=torch.uint8))

    def look(self, pixels: UInt8[Tensor, "batch 3 side side"]) -> Tensor:
        """What `sample` and `forward` take of images: these in [0, 1], or their feature maps, without a graph."""
        images = pixels.float() / 255
        if self.backbone is None:
            return images
        with torch.no_grad():
            return self.backbone(images)

    def spell(self, words: Sequence[str]) -> None:
        """Be told how the words of all ids are written, in their order."""
        self.letters.copy_(spelling(words, self.letters.shape[1]))

    @property
    def words(self) -> tuple[str, ...]:
        """How the words of all ids are written."""
        return spelled(self.letters)

    def sentences(self, ids: Int[Tensor, "batch length"]) -> list[str]:
        """Sentences as texts, up to their ends."""
        words, rows = self.words, ids.tolist()
        return [" ".join(words[number] for number in row[: (*row, self.end).index(self.end)]) for row in rows]


def spelling(words: Sequence[str], letters: int) -> UInt8[Tensor, "words letters"]:
    """Words as bytes in UTF-8, so many each at most: what a checkpoint can hold."""
    return torch.tensor([list(word.encode().ljust(letters, b"\0")) for word in words], dtype=torch.uint8)


def spelled(letters: UInt8[Tensor, "words letters"]) -> tuple[str, ...]:
    """The words again."""
    return tuple(bytes(row).rstrip(b"\0").decode() for row in letters.tolist())
