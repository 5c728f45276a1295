"""What denoisers learn beside the reward, as phases of a run: the denoising loss, plain or weighed by the reward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate import noise
from foveate.learn.answers import Reward, answering, repeat
from foveate.learn.baselines import reward_weights
from foveate.learn.keeper import Keeper
from foveate.learn.settings import Precision
from foveate.models.diffusion import Denoiser, Noised
from foveate.run import Run
from foveate.two_steps import Batches, learn_likelihood
from foveate.types import split

UNTOLD = 0.1  # of the images, those whose class is left out, so that there is guidance
NOISED = 4  # times an own image is noised for an update
Labelled = tuple[Float[Tensor, "size channels height width"], Int[Tensor, " size"]]
Others = tuple[Float[Tensor, "others channels height width"], Int[Tensor, " others"]]


def learn_to_denoise(
    run: Run,
    phase: str,
    share: float,
    policy: Denoiser,
    optimizer: torch.optim.Optimizer,
    keeper: Keeper,
    train: Labelled,
    val: Others,
    *,
    batch: int,
    learning_rate: float,
    none: int | None,
    start: Denoiser | None = None,
    precision: Precision = "fp32",
) -> None:
    """The denoising loss on images in [0, 1]; ends with the weights of the least on `val`.

    Args:
        run: owns the loop.
        phase: its name in the logs.
        share: of the run's budget.
        policy: as `run.track` returned it.
        optimizer: the same.
        keeper: the same; by "held_out_likelihood", the loss with its sign turned.
        train: images and their classes.
        val: others.
        batch: images in an update.
        learning_rate: peak of the one-cycle schedule.
        none: the class that means none, told instead of a tenth; None: the network knows no such class.
        start: whose weights the policy takes first.
        precision: of the network.
    """
    images, labels = train
    exercise = policy.noised(val[0], noise.key(run.seed, "val", torch.arange(len(val[0]))).to(run.device))

    def batches(step: int) -> tuple[Tensor, Noised]:
        rows = noise.examples(run.seed, step, batch, len(images))[run.rows(batch)].to(run.device)
        keys = noise.key(run.seed, "noised", step, rows)
        told = labels[rows]
        if none is not None:
            told = torch.where(noise.uniform(noise.fold(keys, "untold")) < UNTOLD, none, told)
        return told, policy.noised(images[rows], keys)

    def likely() -> dict[str, Any]:
        with torch.no_grad(), answering(policy, precision):
            turns = split((val[1], exercise), policy.together())
            return {"held_out_likelihood": torch.cat([policy(*some).log_probs for some in turns]).mean()}

    how: Any = {"keeper": keeper, "validate": likely, "start": start, "precision": precision}
    learn_likelihood(run, phase, share, policy, batches, optimizer, learning_rate, **how)


def kinds_asked(run: Run, batch: int, count: int, step: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Which of `count` classes or prompts an update asks for, twice: each once before any comes again."""
    inputs = noise.examples(run.seed, step, batch, count)[run.rows(batch)].to(run.device)
    return inputs, inputs


def own_examples(
    run: Run,
    policy: Denoiser,
    reward: Reward,
    asked: Batches,
    samples: int,
    temperature: float,
    precision: Precision = "fp32",
) -> Batches:
    """Own images as examples for `learn_likelihood`, weighed by their reward: reward-weighted regression.

    Black et al. 2023, section 4.1. The reward and its parts are logged.

    Args:
        run: logs.
        policy: draws the images, as it is at each step.
        reward: (images, inputs) → scores.
        asked: step → the classes or prompts of an update, twice.
        samples: images of each.
        temperature: weights are exp(normalised advantage / temperature).
        precision: of the network.
    """

    def batches(step: int) -> tuple[Tensor, Noised]:
        inputs, targets = asked(step)
        places = torch.arange(len(inputs), device=run.device)
        keys = noise.key(run.seed, "weighed", step, run.rank, places)
        with torch.no_grad(), answering(policy, precision):
            images = policy.decode(policy.sample(inputs, samples, False, keys))
        output = reward(images, repeat(targets, samples))
        run.log(reward=output.total.mean(), **{f"part {name}": part.mean() for name, part in output.parts.items()})
        group = repeat(places, samples)
        weight = repeat(reward_weights(output.total, group, temperature), NOISED)
        again, each = repeat(images, NOISED), repeat(keys[group], NOISED)
        return inputs, policy.noised(again, noise.fold(each, torch.arange(len(again), device=run.device)), weight)

    return batches
