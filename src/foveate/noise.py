"""Randomness that depends on what is drawn, never on how work is split.

A *key* is an int64 tensor. It is made by hashing what names a draw: the seed, the stream, the step, the index of the
example or the environment's copy. The same names give the same numbers on every device, in every batch size, in one
process or in eight, and a resumed run needs no generator state.

    keys = noise.key(seed, "location", step, index)     # index: [batch]  ->  keys: [batch]
    noise.normal(keys, 2)                               # [batch, 2]
    noise.uniform(noise.fold(keys, "clutter"), 4)       # another stream of the same rows: [batch, 4]

The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): a key is the state
of a generator, draw k of a key is output k of that generator.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def key(*parts: int | str | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Hash names into keys: ints, strings and int64 tensors, which broadcast against each other.

    The order of the parts matters.
    """
    state: int | Tensor = 0
    for part in parts:
        state = _absorb(state, part)
    return state if isinstance(state, Tensor) else torch.tensor(_signed(state))


def fold(keys: Int[Tensor, "..."], *parts: int | str | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Open a sub-stream of keys: other keys for every name and number, one hash of them whatever the number of parts.

    A tensor of numbers broadcasts against the keys.
    """
    name: int | Tensor = 0
    for part in parts:
        name = _absorb(name, part)
    return _mix(keys + (name if isinstance(name, Tensor) else _signed(name)))


def uniform(keys: Int[Tensor, "*batch"], *shape: int) -> Float[Tensor, "..."]:
    """Numbers strictly between 0 and 1, float32, [*batch, *shape]; 23 bits each."""
    return (_logical_shift(_bits(keys, shape), 41).float() + 0.5) * 2.0**-23


def normal(keys: Int[Tensor, "*batch"], *shape: int) -> Float[Tensor, "..."]:
    """Standard normal numbers, float32, [*batch, *shape], by inversion of the distribution function."""
    return torch.erfinv(uniform(keys, *shape) * 2 - 1) * math.sqrt(2)


def integers(keys: Int[Tensor, "*batch"], high: int | Tensor, *shape: int) -> Int[Tensor, "..."]:
    """Integers from 0 to `high` - 1, [*batch, *shape]; the bias is below high / 2**31."""
    return _logical_shift(_bits(keys, shape), 33) % high


def permutation(keys: Int[Tensor, ""], size: int) -> Int[Tensor, " size"]:
    """A permutation of 0 to `size` - 1."""
    return torch.argsort(_bits(keys, (size,)), stable=True)


def examples(seed: int, step: int, batch: int, size: int) -> Int[Tensor, " batch"]:
    """Which examples step `step` of a run sees: consecutive batches through a new permutation every epoch.

    An epoch's last batch is filled up from the next epoch's permutation, so that every example is seen equally often.
    """
    position = torch.arange(step * batch, (step + 1) * batch)
    epochs = position // size
    found = torch.empty_like(position)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        found[here] = _epoch(seed, epoch, size)[position[here] % size]
    return found


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, size: int) -> Tensor:
    return permutation(key(seed, "order", epoch), size)


def _bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.arange(1, math.prod(shape) + 1, device=keys.device).view(shape)
    return _mix(keys.view((*keys.shape, *(1,) * len(shape))) + count * _signed(_STEP))


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _logical_shift(state, 30)) * _signed(_FIRST)
    state = (state ^ _logical_shift(state, 27)) * _signed(_SECOND)
    return state ^ _logical_shift(state, 31)


def _absorb(state: int | Tensor, part: int | str | Tensor) -> int | Tensor:
    if isinstance(part, str):
        part = zlib.crc32(part.encode()) | (len(part) << 32)
    if isinstance(state, int) and isinstance(part, int):
        state = (state + part + _STEP) & _WORD
        state = ((state ^ (state >> 30)) * _FIRST) & _WORD
        state = ((state ^ (state >> 27)) * _SECOND) & _WORD
        return state ^ (state >> 31)
    if isinstance(part, Tensor):
        part = part.long()
    start = _signed((state + _STEP) & _WORD) if isinstance(state, int) else state + _signed(_STEP)
    return _mix(torch.as_tensor(start + (_signed(part & _WORD) if isinstance(part, int) else part)))


def _logical_shift(state: Tensor, by: int) -> Tensor:
    return (state >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
