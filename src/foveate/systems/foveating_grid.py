"""Search by glimpses on a grid: where to look next, when a noisy cue says warmer or colder.

| | |
|---|---|
| state | hidden vector of the glimpses and cues so far, and how many glimpses are left |
| action | where to look next: a location (x, y) drawn around a learned mean; the cell it falls in is looked at |
| reward | at the last glimpse: 1 if the target's quadrant is guessed, else 0 |
| horizon | the budget of glimpses, 1 to 12, drawn anew for each episode: one agent serves every budget |
| learner | REINFORCE with a learned baseline for the locations, cross-entropy for the rest |
| corner | policy |

The learning is that of `ram` (`foveate.attention`; Mnih et al. 2014, "Recurrent models of visual attention", arXiv
1406.6247); the task is small enough for Bayes' rule to be worked out beside it (`foveate.envs.foveating_grid`). Three
options differ from `ram`'s defaults: a location is praised for what later glimpses add to the probability of the right
class (`credit`), its gradient shapes the memory too (`detach`), and it is drawn more widely at first (`explore`).

    foveate train foveating-grid --minutes 5 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate import attention, noise, pictures
from foveate.attention import Looking
from foveate.data.classification import check_images, read_pictures
from foveate.envs.foveating_grid import (
    CLASSES,
    MOST,
    PATCH,
    SIDE,
    WHERE,
    BeliefPolicy,
    FoveatingGridEnv,
    quadrant_of,
)
from foveate.learn.baselines import MovingAverage
from foveate.models.glimpse import GlimpsePolicy
from foveate.run import Run
from foveate.types import Evaluation, InputError, Policy

COPIES = 2000  # episodes played in lockstep when scoring


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train foveating-grid`."""

    data: str = "grid"
    """grids are made on the fly; there is no other data"""
    root: Path | None = None
    """not used"""
    seed: int = 0
    """of the weights, the order of the grids and every draw"""
    steps: int | None = None
    """updates of the agent and its control together"""
    minutes: float | None = None
    """wall-clock budget of both together"""
    control_share: float = 0.2
    """part of the budget that trains the control; at 0.5 it has as long as the agent"""
    flip: float = 0.2
    """probability that a cue is the wrong one"""
    core: Literal["rnn", "lstm"] = "rnn"
    """what remembers: a rectified recurrent layer or an LSTM"""
    hidden: int = 128
    """width of the core"""
    std: float = 0.1
    """standard deviation of the location; a cell is 0.167 wide"""
    explore: float = 4.0
    """how many times wider it is at the start of training"""
    detach: bool = False
    """keep the location's gradient out of the core, as published"""
    credit: Literal["answer", "gains"] = "gains"
    """what a location is praised for: the answer's reward, or how much later glimpses raised the right class"""
    discount: float = 0.5
    """of the gains, a glimpse"""
    classify: Literal["last", "every"] = "every"
    """cross-entropy at the last glimpse or at every one"""
    samples: int = 1
    """episodes of each grid in an update"""
    baseline: attention.Baseline = "learned"
    """what is subtracted from the reward"""
    batch: int = 256
    """grids in an update"""
    learning_rate: float = 1e-2
    """peak of the one-cycle schedule"""
    episodes: int = 20000
    """scored at each budget"""


PART = "learned"  # the tracked part that holds the policy

# Tiles of 3×3 cells that do not overlap, by their middles (row · 12 + column). TILING is the order chosen tile after
# tile for the guess that the exact posterior makes best of it on the val split at flip 0.2: its jumps across the grid
# put the lines that the cues speak about between the quadrants. BY_ROWS knows nothing of cues.
TILING = (94, 58, 49, 55, 52, 16, 13, 22, 19, 91, 127)
BY_ROWS = (13, 16, 19, 22, 49, 52, 55, 58, 85, 88, 91)


def resolve(config: Config) -> Config:
    """Check what cannot be trained.

    Raises:
        InputError: other data than the grid, nothing to score, a baseline that does not go with the credit.
    """
    if config.data != "grid":
        raise InputError(f"data: found {config.data!r}, but foveating-grid makes its own grids: leave --data out")
    attention.check(config)
    if config.credit == "gains" and config.baseline not in ("learned", "none"):
        raise InputError(f"baseline: found {config.baseline!r}, but gains take learned or none; or add --credit answer")
    return config


def build(config: Config) -> GlimpsePolicy:
    """The policy of a config, untrained."""
    return _policy(config, "learned")


def _policy(config: Config, looking: Literal["learned", "random"]) -> GlimpsePolicy:
    return GlimpsePolicy(
        (1, PATCH, PATCH),
        WHERE,
        len(CLASSES),
        config.hidden,
        core=config.core,
        std=config.std,
        looking=looking,
        detach=config.detach,
    )


def _env(config: Config, copies: int, glimpses: int | None, device: torch.device, **options: Any) -> FoveatingGridEnv:
    return FoveatingGridEnv(copies, glimpses=glimpses, flip=config.flip, device=device, autoreset="disabled", **options)


def train(config: Config, run: Run) -> None:
    """Train the agent, then the same network on random places; the budget is drawn for each episode."""
    looking = Looking.of(config)
    rows = run.rows(config.batch)
    learners: dict[str, Any] = {}
    for name in ("learned", "random"):
        torch.manual_seed(config.seed)
        learner = _policy(config, name)
        optimizer = torch.optim.Adam(learner.to(run.device).parameters(), config.learning_rate, fused=True)
        learners[name] = run.track(**{name: learner, f"{name}_optimizer": optimizer})
    average = MovingAverage()
    run.track(average=average)
    env = _env(config, (rows.stop - rows.start) * config.samples, None, run.device)
    for name, (learner, optimizer) in learners.items():
        validate = partial(_accuracies, config, learner, run.device, 1000, "val", (1, 6, 12))
        share = config.control_share if name == "random" else 1 - config.control_share
        attention.learn_to_look(run, name, share, env, learner, optimizer, average, looking, validate)


def _accuracies(
    config: Config,
    policy: Policy,
    device: torch.device,
    episodes: int,
    split: Literal["val", "test"],
    budgets: tuple[int, ...] = tuple(range(1, MOST + 1)),
) -> dict[str, float]:
    found = {}
    for budget in budgets:
        env = _env(config, min(COPIES, episodes), budget, device, split=split)
        found[f"accuracy_{budget}"] = 100 - attention.answer(env, policy, config.seed, episodes).error()
    return found


def _anytime(config: Config, policy: Policy, device: torch.device) -> dict[str, float]:
    """Accuracy at every budget of a policy that does not know the budget: one episode answers for all."""
    env = _env(config, min(COPIES, config.episodes), MOST, device, split="test")
    answers = attention.answer(env, policy, config.seed, config.episodes)
    return {f"accuracy_{budget}": 100 - answers.error(budget) for budget in range(1, MOST + 1)}


def evaluate(config: Config, policy: GlimpsePolicy, run: Run, elsewhere: bool = False) -> Evaluation:
    """Accuracy in percent at each budget from 1 to 12, each place drawn once, on grids of the test set.

    Every row plays the same episodes, with the same first glimpse, which is nobody's choice. Baselines: `random`, the
    same network trained on random places; `tiling`, tiles that do not overlap, in the best order found; `tiling by
    rows`; `belief`, looking at a cell drawn from the exact posterior; `greedy belief`, looking where the nine cells
    seen hold most of it. All but the first guess the most probable quadrant by the exact posterior of what they saw,
    cues included. There is no data `elsewhere`.
    """
    resolve(config)
    control = _policy(config, "random").to(run.device)
    metrics = _accuracies(config, policy, run.device, config.episodes, "test")
    baselines = {}
    if run.restore("random", control):
        baselines["random"] = _accuracies(config, control, run.device, config.episodes, "test")
    by_hand = {
        "tiling": BeliefPolicy(tiling=TILING, flip=config.flip),
        "tiling by rows": BeliefPolicy(tiling=BY_ROWS, flip=config.flip),
        "belief": BeliefPolicy(flip=config.flip),
        "greedy belief": BeliefPolicy("greedy", flip=config.flip),
    }
    baselines |= {name: _anytime(config, rule, run.device) for name, rule in by_hand.items()}
    series = {
        name: [(float(budget), row[f"accuracy_{budget}"]) for budget in range(1, MOST + 1)]
        for name, row in {"learned places": metrics, **baselines}.items()
    }
    return Evaluation(metrics, baselines, {"accuracy in percent against glimpses": series})


def predict(
    config: Config, policy: GlimpsePolicy, images: Float[Tensor, "batch channels height width"], glimpses: int = MOST
) -> dict[str, Tensor]:
    """Search grids of brightness, [batch, 1, 12, 12] in [0, 1], for their brightest cell.

    Returns `classes` [batch], `scores` [batch, 4] and `locations` [batch, glimpses, 2].

    Raises:
        InputError: the grids break the convention, are not grey, or not 12×12.
    """
    check_images(images, "images")
    if images.shape[1] != 1:
        raise InputError(f"images: {images.shape[1]} channels, expected 1: pass images.mean(1, keepdim=True)")
    device = next(policy.parameters()).device
    env = _env(config, len(images), glimpses, device, grids=images)
    found = attention.answer(env, policy, config.seed, len(images), greedy=True)
    return {"classes": found.scores[:, -1].argmax(-1), "scores": found.scores[:, -1], "locations": found.locations}


def picture(
    config: Config, policy: GlimpsePolicy, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Glimpse paths of budget 6 on test grids, or on grids of the user: name → a picture, or a list of frames."""
    if images is None:
        images = _grids(config, 12, "test")
    found = {name: value.cpu() for name, value in predict(config, policy, images.to(run.device), 6).items()}
    images = images.cpu()
    labels = quadrant_of(images.flatten(1).argmax(-1))
    sure = found["scores"].softmax(-1).max(-1).values.tolist()
    captions = [f"{CLASSES[guess]} ({share:.2f})" for guess, share in zip(found["classes"].tolist(), sure, strict=True)]
    steps = [f"glimpse {step + 1}" for step in range(found["locations"].shape[1])]
    steps[-1] += f": {captions[0]}"
    retina: dict[str, Any] = {"patch": PATCH, "scales": 1}
    return {
        "glimpse paths": pictures.glimpse_paths(
            images,
            found["locations"],
            **retina,
            captions=captions,
            correct=(labels == found["classes"]).tolist(),
        ),
        "glimpses": pictures.glimpse_frames(images[0], found["locations"][0], **retina, captions=steps),
    }


def _grids(config: Config, count: int, split: Literal["train", "test"]) -> Float[Tensor, "count 1 12 12"]:
    env = _env(config, count, MOST, torch.device("cpu"), split=split)
    ids = torch.arange(count)
    return env.initial(ids, noise.key(config.seed, "picture", ids)).grids[:, None]


def read(config: Config, path: Path) -> Float[Tensor, "batch 1 12 12"]:
    """The user's picture, or the pictures of a folder, as grey 12×12 grids."""
    return read_pictures(path, 1, SIDE)


def check(config: Config) -> dict[str, Any]:
    """The first grids, with the quadrant of their target."""
    grids = _grids(config, 16, "train")
    labels = quadrant_of(grids.flatten(1).argmax(-1))
    return {"data": pictures.image_grid(grids, [CLASSES[label] for label in labels.tolist()])}
