"""Copies of an environment in lockstep against the same environment one by one, and keys against generators."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import torch

from benchmarks import best_seconds
from foveate import noise
from foveate.data.classification import Images
from foveate.envs.glimpse import GlimpseEnv, SingleGlimpseEnv

COPIES, CLASSES, SIDE, GLIMPSES = 256, 10, 28, 6
Rates = tuple[float, float, str]


def images() -> Images:
    keys = noise.key(0, torch.arange(1024))
    pixels = noise.integers(keys, 256, 1, SIDE, SIDE).to(torch.uint8)
    return Images(pixels, noise.integers(noise.fold(keys, "label"), CLASSES), tuple("0123456789"), "synthetic", "train")


def actions(copies: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (copies, 2 + CLASSES)).astype(np.float32)


def lockstep(copies: int) -> Callable[[], None]:
    """One whole cycle of an episode, the step that resets the copies included."""
    env = GlimpseEnv(copies, images=images(), glimpses=GLIMPSES)
    chosen = torch.from_numpy(actions(copies))
    env.reset(seed=0)

    def work() -> None:
        for _ in range(GLIMPSES + 1):
            env.step(chosen)

    return work


def one_by_one(copies: int) -> Callable[[], None]:
    shown = images()
    envs = [SingleGlimpseEnv(images=shown, glimpses=GLIMPSES) for _ in range(copies)]
    chosen = actions(copies)
    for seed, env in enumerate(envs):
        env.reset(seed=seed)

    def work() -> None:
        for step in range(GLIMPSES + 1):
            for env, action in zip(envs, chosen, strict=True):
                if step == GLIMPSES:
                    env.reset()
                else:
                    env.step(action)

    return work


def sync_vector(copies: int) -> Callable[[], None]:
    shown = images()
    env = gymnasium.vector.SyncVectorEnv([lambda: SingleGlimpseEnv(images=shown, glimpses=GLIMPSES)] * copies)
    chosen = actions(copies)
    env.reset(seed=0)

    def work() -> None:
        for _ in range(GLIMPSES + 1):
            env.step(chosen)

    return work


def compare_loop(copies: int = COPIES, rounds: int = 3) -> Rates:
    """Steps/s of all copies: lockstep, and the single form in a Python loop."""
    return _steps(lockstep(copies), one_by_one(copies), copies, rounds)


def compare_sync(copies: int = COPIES, rounds: int = 3) -> Rates:
    """Steps/s of all copies: lockstep, and Gymnasium's vector of single forms."""
    return _steps(lockstep(copies), sync_vector(copies), copies, rounds)


def compare_noise(rows: int = COPIES, draws: int = 20, rounds: int = 20) -> Rates:
    """Draws/s: one tensor of keys, and a generator a row."""
    keys = noise.key(0, torch.arange(rows))
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]

    def ours() -> None:
        noise.uniform(keys, draws)

    def peer() -> None:
        torch.stack([torch.rand(draws, generator=generator) for generator in generators])

    hashed, drawn = best_seconds(ours, peer, rounds=rounds, repeats=5)
    return rows * draws / hashed, rows * draws / drawn, f"uniform draws/s, {rows} rows of {draws}"


def _steps(ours: Callable[[], None], peer: Callable[[], None], copies: int, rounds: int) -> Rates:
    fast, slow = best_seconds(ours, peer, rounds=rounds)
    steps = copies * (GLIMPSES + 1)
    return steps / fast, steps / slow, f"steps/s, {copies} copies"


ROWS: dict[str, Callable[[], Rates]] = {
    "glimpse-env": compare_loop,
    "glimpse-env-sync": compare_sync,
    "noise": compare_noise,
}
