"""Captioners of others as samplers: Hugging Face's VisionEncoderDecoder and BLIP, and a base for all that write tokens.

    policy = adapted(VisionEncoderDecoderModel.from_pretrained(FOLDER), tokenizer, side=224, length=20)
    policy.decode(policy.sample(images, 5, greedy=False, keys=keys))      # five sentences on each image

Images are as everywhere, in [0, 1]; the mean and the deviation that a model is used to are taken off inside.
"""

from __future__ import annotations

import inspect
import sys
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.distributions import Categorical
from foveate.models.captioner import spelled, spelling
from foveate.models.encoder_decoder import Tokens
from foveate.types import Decisions, InputError, Sampler

HALF = (0.5, 0.5, 0.5)
TOKENS = 20  # of a sentence at most, where nothing else is said; what BLIP writes by default
LETTERS = 48  # bytes of a word at most, where words are kept with the weights


class TextCaptioner(Sampler):
    """Writes a sentence on a square RGB image, a token of a tokenizer a step.

    A captioner derives from it with two methods: `see` looks at images, once for all samples of each, and `scores` says
    how likely each token is to come next. Tokens the sentence begins with are no decisions: they are put before it and
    are not part of an answer.

    Args:
        tokenizer: as Hugging Face has them; None: one word a token, and `spell` tells which.
        side: of the images, in pixels.
        length: tokens in a sentence at most, with the end.
        start: tokens that stand before every sentence, at least one.
        ends: tokens that end a sentence, at least one; sentences to learn from end with the first.
        vocabulary: number of tokens.
        mean: of each colour, taken off images.
        std: of each colour, by which they are then divided.
        temperature: by which scores are divided, in sampling and in `forward` alike.

    Raises:
        InputError: no start or end, one outside of the vocabulary, or a tokenizer with more tokens than the model.
    """

    letters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tokenizer: Any,
        side: int,
        length: int,
        start: Sequence[int],
        ends: Sequence[int],
        vocabulary: int,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, tokens in (("begins", start), ("ends", ends)):
            if not tokens or not all(0 <= token < vocabulary for token in tokens):
                raise InputError(
                    f"model: the token that {name} a caption is {list(tokens)}, expected one of its {vocabulary:,} "
                    "tokens; set bos_token_id and eos_token_id (BLIP: sep_token_id) in its config.json"
                )
        if tokenizer is not None and len(tokenizer) > vocabulary:
            raise InputError(
                f"model: its tokenizer has {len(tokenizer):,} tokens, the model writes {vocabulary:,}: give the folder "
                "the tokenizer that the model was trained with"
            )
        self.side, self.length, self.temperature = side, length, temperature
        self.start, self.ends = list(start), list(ends)
        self._tokenizer = tokenizer
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values))[:, None, None], persistent=False)
        count = vocabulary if tokenizer is None else 0
        self.register_buffer("letters", torch.zeros(count, LETTERS, dtype=torch.uint8))

    @abstractmethod
    def see(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch places features"]:
        """What a model sees in images that have their mean and deviation taken off."""

    @abstractmethod
    def scores(
        self, ids: Int[Tensor, "rows time"], seen: Float[Tensor, "rows places features"], past: Any
    ) -> Float[Tensor, "rows time vocabulary"]:
        """Logits of what comes after each token, given the ones before.

        With a `past` these tokens come after the ones of earlier calls with it; it takes them in. None: they are first.
        """

    def begin(self) -> Any:
        """A past without a token."""
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of texts, and texts of tokens."""
        return word_tokenizer(self.words) if self._tokenizer is None else self._tokenizer

    @property
    def words(self) -> tuple[str, ...]:
        """How the words of all ids are written, the end first and what stands before a sentence last."""
        return spelled(self.letters)

    def spell(self, words: Sequence[str]) -> None:
        """Be told how words are written, from id 0, the end, to the last but one; for a model without a tokenizer."""
        self.letters.copy_(spelling(("<end>", *words[1:], "<begin>"), LETTERS))

    @torch.no_grad()
    def sample(
        self,
        inputs: Float[Tensor, "batch 3 side side"],
        num_samples: int,
        greedy: bool,
        keys: Int[Tensor, " batch"],
    ) -> Tokens:
        """Write `num_samples` sentences on each image, a token a step, with the model's own keys and values.

        They are as long as the longest of them.
        """
        seen = self._seen(inputs).repeat_interleave(num_samples, 0)
        sample = torch.arange(num_samples, device=keys.device)
        streams = noise.fold(keys[:, None], "sample", sample).flatten()
        here, past = torch.tensor(self.start, device=keys.device).expand(len(seen), -1), self.begin()
        ends = torch.tensor(self.ends, device=keys.device)
        ended = torch.zeros(len(seen), dtype=torch.bool, device=keys.device)
        ids, mask = [], []
        for step in range(self.length):
            choice = self._distribution(self.scores(here, seen, past)[:, -1:])
            here = choice.mode() if greedy else choice.sample(noise.fold(streams[:, None], "token", step))
            ids.append(here.squeeze(1).masked_fill(ended, 0))
            mask.append(~ended)
            ended = ended | torch.isin(here.squeeze(1), ends)
            if bool(ended.all()):
                break
        return Tokens(torch.stack(ids, 1), torch.stack(mask, 1))

    def forward(
        self, inputs: Float[Tensor, "batch 3 side side"], actions: Tokens, steps: slice = slice(None)
    ) -> Decisions:
        """Score all tokens of sentences in one pass; `actions` has batch · n rows, n sentences on each image."""
        seen = self._seen(inputs)
        seen = seen.repeat_interleave(len(actions.ids) // len(seen), 0)
        start = torch.tensor(self.start, device=seen.device).expand(len(seen), -1)
        scores = self.scores(torch.cat((start, actions.ids[:, :-1]), 1), seen, None)
        distribution = self._distribution(scores[:, len(self.start) - 1 :][:, steps])
        return Decisions(distribution, None, distribution.log_prob(actions.ids[:, steps]), actions.mask[:, steps])

    def decode(self, actions: Tokens) -> list[str]:
        """The sentences as texts, without tokens that are no text."""
        ids = actions.ids.masked_fill(~actions.mask, self.ends[0])
        found = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return [text.strip() for text in found]

    def answers(self, sentences: Sequence[Sequence[str]]) -> tuple[Int[Tensor, "..."], Bool[Tensor, "..."]]:
        """Texts to learn from, as many as there are of each image: ids and mask [size, most, time], with the end.

        Masked out whole is one that does not exist, or is longer than `length` with its end.
        """
        gap = " " if len(self.start) > 1 else ""  # behind a prompt
        flat = [gap + text for texts in sentences for text in texts]
        tokens = [[*row, self.ends[0]] for row in self.tokenizer(flat, add_special_tokens=False)["input_ids"]]
        counts = torch.tensor([len(texts) for texts in sentences])
        lengths = torch.tensor([len(row) for row in tokens])
        time = max(1, min(self.length, int(lengths.max())))
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row[:time]) for row in tokens], batch_first=True)
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        ids = torch.zeros(len(counts), int(counts.max()), padded.shape[1], dtype=torch.int64)
        known = lengths.where(lengths <= self.length, 0)
        lasts = torch.zeros(ids.shape[:2], dtype=torch.int64)
        ids[rows, places], lasts[rows, places] = padded, known
        return ids, torch.arange(ids.shape[2]) < lasts[..., None]

    def _seen(self, images: Tensor) -> Tensor:
        return self.see((images - self.mean) / self.std)

    def _distribution(self, scores: Tensor) -> Categorical:
        return Categorical(scores.float() / self.temperature)


class VisionText(TextCaptioner):
    """Hugging Face's `VisionEncoderDecoderModel`; the arguments after `model` are those of `TextCaptioner`."""

    def __init__(
        self, model: Any, tokenizer: Any, side: int, length: int | None, prompt: Sequence[int] = (), **how: Any
    ):
        start = _setting(model, "decoder_start_token_id")
        start = start if start is not None else _setting(model, "bos_token_id")
        super().__init__(
            tokenizer,
            side,
            _short_enough(length, prompt, model.decoder.config),
            [*_several(start), *prompt],
            _several(_setting(model, "eos_token_id")),
            model.decoder.config.vocab_size,
            **how,
        )
        self.model = model
        self.past = _past_name(model.decoder)

    def see(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch places features"]:
        """The last states of the encoder, as wide as the decoder takes them."""
        seen = self.model.encoder(pixel_values=images)[0]
        return self.model.enc_to_dec_proj(seen) if hasattr(self.model, "enc_to_dec_proj") else seen

    def scores(
        self, ids: Int[Tensor, "rows time"], seen: Float[Tensor, "rows places features"], past: Any
    ) -> Float[Tensor, "rows time vocabulary"]:
        """Logits of the decoder."""
        given = {self.past: past, "use_cache": past is not None}
        return self.model.decoder(input_ids=ids, encoder_hidden_states=seen, **given).logits


class Blip(TextCaptioner):
    """Hugging Face's `BlipForConditionalGeneration`; the arguments after `model` are those of `TextCaptioner`."""

    def __init__(
        self, model: Any, tokenizer: Any, side: int, length: int | None, prompt: Sequence[int] = (), **how: Any
    ):
        text = model.config.text_config
        super().__init__(
            tokenizer,
            side,
            _short_enough(length, prompt, text),
            [*_several(text.bos_token_id), *prompt],
            _several(text.sep_token_id),
            text.vocab_size,
            **how,
        )
        self.model = model
        self.past = _past_name(model.text_decoder)

    def see(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch places features"]:
        """The last states of the vision model."""
        return self.model.vision_model(pixel_values=images)[0]

    def scores(
        self, ids: Int[Tensor, "rows time"], seen: Float[Tensor, "rows places features"], past: Any
    ) -> Float[Tensor, "rows time vocabulary"]:
        """Logits of the text decoder."""
        given = {self.past: past, "use_cache": past is not None}
        return self.model.text_decoder(input_ids=ids, encoder_hidden_states=seen, **given).logits


def adapted(model: Any, tokenizer: Any, side: int, length: int | None, prompt: str = "", **how: Any) -> TextCaptioner:
    """A captioner of a known family as one of ours; the other arguments are those of `TextCaptioner`.

    Args:
        model: of the class `VisionEncoderDecoderModel` or `BlipForConditionalGeneration`.
        tokenizer: of the model; None: one word a token.
        side: of the images, in pixels.
        length: tokens in a sentence at most; None: 20, or as many as the model has places for.
        prompt: what every sentence begins with; it is given, and no part of the answer.

    Raises:
        InputError: it is of no known family, or a length that the model has no places for.
    """
    families = {"vision-encoder-decoder": VisionText, "blip": Blip}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in families:
        raise InputError(
            f"model: found {kind!r}, expected one of {', '.join(families)}; or derive it from TextCaptioner"
        )
    begun = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    return families[kind](model, tokenizer, side, length, begun, **how)


@lru_cache(maxsize=8)
def word_tokenizer(words: tuple[str, ...]) -> Any:
    """A tokenizer of one word a token, words apart by spaces: "<end>" first, "<unknown>" second, "<begin>" last."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[1]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": words[-1], "eos_token": words[0], "pad_token": words[0], "unk_token": words[1]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **marks)


def _several(token: Any) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else list(token)


def _setting(model: Any, name: str) -> Any:
    """Newer versions keep what they generate with in a config of its own; older files have it in the others."""
    places = (getattr(model, "generation_config", None), model.config, model.config.decoder)
    return next((found for place in places if (found := getattr(place, name, None)) is not None), None)


def _short_enough(length: int | None, prompt: Sequence[int], config: Any) -> int:
    room = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - len(prompt)
    if (length or 1) > room:
        raise InputError(f"length: found {length or 1}, but the model has places for {room} tokens; lower it")
    return length or min(TOKENS, room)


def _past_name(decoder: nn.Module) -> str:
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
