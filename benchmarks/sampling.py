"""Tokens written with the keys and values of the steps before, against scoring all anew at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import best_seconds
from foveate import noise
from foveate.models.encoder_decoder import EncoderDecoder, Tokens

IMAGES, SAMPLES, LENGTH = 8, 8, 36
Rates = tuple[float, float, str]


def sampling() -> Rates:
    """8 answers of 36 tokens to each of 8 images of 64×64; the peer encodes the image for each, at each step."""
    model = sampler()
    images, keys = pictures()

    @torch.no_grad()
    def anew() -> None:
        write_anew(model, images, keys)

    ours, peer = best_seconds(lambda: model.sample(images, SAMPLES, False, keys), anew, rounds=2)
    return IMAGES * SAMPLES / ours, IMAGES * SAMPLES / peer, "answers/s"


def sampler() -> EncoderDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EncoderDecoder((3, 64, 64), 8, 1100, LENGTH)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    keys = noise.key(0, torch.arange(IMAGES))
    return noise.uniform(keys, 3, 64, 64), keys


def write_anew(model: EncoderDecoder, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The same tokens, by `forward` on the whole of what is written so far."""
    repeated = images.repeat_interleave(SAMPLES, 0)
    streams = noise.fold(keys[:, None], "sample", torch.arange(SAMPLES)).flatten()
    ids = torch.zeros(len(repeated), 0, dtype=torch.int64)
    for step in range(LENGTH):
        so_far = torch.cat((ids, ids.new_zeros(len(ids), 1)), 1)
        choice = model(repeated, Tokens(so_far, torch.ones_like(so_far, dtype=torch.bool)), slice(step, None))
        ids = torch.cat((ids, choice.distribution.sample(noise.fold(streams[:, None], "token", step))), 1)
    return ids


ROWS: dict[str, Callable[[], Rates]] = {"sampling": sampling}
