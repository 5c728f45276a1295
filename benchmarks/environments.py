"""Copies of an environment in lockstep against the same environment one by one, and keys against generators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch

from benchmarks import best_seconds
from foveate import noise
from foveate.data.classification import Images
from foveate.data.detection import Detections
from foveate.data.masked_videos import load_videos
from foveate.data.volumes import Volumes
from foveate.envs import box_tracking, cutting, landmark_walk, registration
from foveate.envs.box_search import TRIGGER, BoxSearchEnv, SingleBoxSearchEnv
from foveate.envs.box_tracking import BoxTrackingEnv, SingleBoxTrackingEnv
from foveate.envs.cutting import CuttingEnv, SingleCuttingEnv
from foveate.envs.glimpse import GlimpseEnv, SingleGlimpseEnv
from foveate.envs.landmark_walk import LandmarkWalkEnv, SingleLandmarkWalkEnv
from foveate.envs.painting import PaintingEnv, SinglePaintingEnv
from foveate.envs.registration import RegistrationEnv, SingleRegistrationEnv
from foveate.envs.seeds import SeedsEnv, SingleSeedsEnv
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.geometry import Boxes
from foveate.learn.replay import Replay

COPIES, CLASSES, SIDE, GLIMPSES = 256, 10, 28, 6
STEPS = GLIMPSES + 1  # one whole cycle of an episode, the step that resets the copies included
Rates = tuple[float, float, str]
Task = Callable[[], tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]]


def glimpses() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Small images, and places and scores drawn once."""
    keys = noise.key(0, torch.arange(1024))
    pixels = noise.integers(keys, 256, 1, SIDE, SIDE).to(torch.uint8)
    labels = noise.integers(noise.fold(keys, "label"), CLASSES)
    images = Images(pixels, labels, tuple("0123456789"), "synthetic", "train")
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, COPIES, 2 + CLASSES)).astype(np.float32)
    return GlimpseEnv, SingleGlimpseEnv, {"images": images, "glimpses": GLIMPSES}, actions


def boxes(side: int = 128, count: int = 256) -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Images of `side` pixels with four objects each, and moves drawn once; an episode ends before the last step."""
    keys = noise.key(0, torch.arange(count))
    corners = noise.uniform(keys, 4, 4) * side
    corners = torch.cat((corners[..., :2] / 2, side / 2 + corners[..., 2:] / 2), -1)
    found = Boxes(corners, torch.zeros(count, 4).long(), torch.ones(count, 4, dtype=torch.bool))
    pixels = noise.integers(keys, 256, 3, side, side).to(torch.uint8)
    shown = Detections(pixels, found, ("thing",), "synthetic", "train")
    actions = np.random.default_rng(0).integers(0, TRIGGER, (STEPS, COPIES))
    actions[-2] = TRIGGER
    return BoxSearchEnv, SingleBoxSearchEnv, {"detections": shown}, actions


def volumes(side: int) -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """A volume of `side` voxels a side with four landmarks, and steps drawn once."""
    keys = noise.key(0, torch.arange(1))
    where = (0.2 + 0.6 * noise.uniform(keys, 4, 3)) * side
    voxels = noise.integers(keys, 256, side, side, side).to(torch.uint8)
    names = tuple("abcd")
    shown = Volumes(voxels, torch.full((1, 3), side), where, names, ("one",), 1.0, "synthetic", "train")
    actions = np.random.default_rng(0).integers(0, len(landmark_walk.MOVES), (STEPS, COPIES))
    return LandmarkWalkEnv, SingleLandmarkWalkEnv, {"volumes": shown, "horizon": STEPS - 1}, actions


def compare_sizes(task: Callable[[int], Any], large: int, small: int, rounds: int = 5) -> Rates:
    """Steps/s of all copies in large images or volumes, and in small ones: the cost is the same."""
    ours, theirs = (lockstep(partial(task, side), COPIES) for side in (large, small))
    fast, slow = best_seconds(ours, theirs, rounds=rounds)
    return COPIES * STEPS / fast, COPIES * STEPS / slow, f"steps/s at {large} a side, peer {small}"


def compare_memory(task: Task) -> Rates:
    """Transitions in a megabyte of replay: states, which are coordinates, and what is seen in them."""
    kind, _, options, _ = task()
    env = kind(COPIES, **options)
    seen, _ = env.reset(seed=0)
    ours, theirs = (Replay(each, 40).size / 1e6 for each in (env.state, seen))
    count = 40 * COPIES
    return count / ours, count / theirs, f"transitions/MB; a million take {1e6 * ours / count:.0f} MB"


def seeds() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Rendered scenes of 40 pixels, and seeds drawn once: the random walker walks anew at each."""
    actions = np.random.default_rng(0).integers(0, 800, (STEPS, COPIES))
    return SeedsEnv, SingleSeedsEnv, {"scenes": 20, "horizon": STEPS - 1}, actions


def cuttings() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Rendered videos of 64 pixels, masks by colours, and moves drawn once; an episode ends before the last step."""
    actions = np.random.default_rng(0).integers(0, cutting.STOP, (STEPS, COPIES))
    actions[-2] = cutting.STOP
    return CuttingEnv, SingleCuttingEnv, {"videos": load_videos("scenes", None, "train", 64, 20, 8)}, actions


def pairs() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Pictures of 64 pixels from canvases twice as large, and moves drawn once."""
    actions = np.random.default_rng(0).integers(0, len(registration.MOVES), (STEPS, COPIES))
    return RegistrationEnv, SingleRegistrationEnv, {"image_size": 64, "count": 20, "horizon": STEPS - 1}, actions


def tracks() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Rendered videos, and moves drawn once; an episode ends before the last step."""
    actions = np.random.default_rng(0).integers(0, box_tracking.STOP, (STEPS, COPIES))
    actions[-2] = box_tracking.STOP
    return BoxTrackingEnv, SingleBoxTrackingEnv, {}, actions


def paintings() -> tuple[type[TensorEnv], type[SingleEnv], dict[str, Any], np.ndarray]:
    """Pictures of 16 pixels to be copied, and strokes drawn once."""
    pixels = noise.integers(noise.key(0, torch.arange(256)), 256, 1, 16, 16).to(torch.uint8)
    images = Images(pixels, torch.arange(256) % CLASSES, tuple("0123456789"), "synthetic", "train")
    actions = np.random.default_rng(0).integers(0, 3 * 64, (STEPS, COPIES))
    return PaintingEnv, SinglePaintingEnv, {"images": images, "strokes": STEPS - 1}, actions


def lockstep(task: Task, copies: int) -> Callable[[], None]:
    kind, _, options, actions = task()
    env = kind(copies, **options)
    chosen = torch.from_numpy(actions[:, :copies])
    env.reset(seed=0)

    def work() -> None:
        for each in chosen:
            env.step(each)

    return work


def one_by_one(task: Task, copies: int) -> Callable[[], None]:
    _, kind, options, actions = task()
    envs = [kind(**options) for _ in range(copies)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)

    def work() -> None:
        for step, chosen in enumerate(actions[:, :copies]):
            for env, action in zip(envs, chosen, strict=True):
                if step == STEPS - 1:
                    env.reset()
                else:
                    env.step(action)

    return work


def sync_vector(task: Task, copies: int) -> Callable[[], None]:
    _, kind, options, actions = task()
    env = gymnasium.vector.SyncVectorEnv([lambda: kind(**options)] * copies)
    env.reset(seed=0)

    def work() -> None:
        for chosen in actions[:, :copies]:
            env.step(chosen)

    return work


def compare(
    task: Task, peer: Callable[[Task, int], Callable[[], None]], copies: int = COPIES, rounds: int = 3
) -> Rates:
    """Steps/s of all copies: lockstep, and a peer made of single forms."""
    fast, slow = best_seconds(lockstep(task, copies), peer(task, copies), rounds=rounds)
    return copies * STEPS / fast, copies * STEPS / slow, f"steps/s, {copies} copies"


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


ROWS: dict[str, Callable[[], Rates]] = {
    "glimpse-env": partial(compare, glimpses, one_by_one),
    "glimpse-env-sync": partial(compare, glimpses, sync_vector),
    "box-search-env": partial(compare, boxes, one_by_one),
    "box-search-env-sync": partial(compare, boxes, sync_vector),
    "landmark-env": partial(compare, partial(volumes, 48), one_by_one),
    "landmark-env-sync": partial(compare, partial(volumes, 48), sync_vector),
    "box-search-env-size": partial(compare_sizes, partial(boxes, count=32), 512, 128),
    "landmark-env-size": partial(compare_sizes, volumes, 192, 48),
    "box-search-replay": partial(compare_memory, boxes),
    "landmark-replay": partial(compare_memory, partial(volumes, 48)),
    "seeds-env": partial(compare, seeds, one_by_one),
    "cutting-env": partial(compare, cuttings, one_by_one),
    "registration-env": partial(compare, pairs, one_by_one),
    "box-tracking-env": partial(compare, tracks, one_by_one),
    "painting-env": partial(compare, paintings, one_by_one),
    "painting-env-sync": partial(compare, paintings, sync_vector),
    "noise": compare_noise,
}
