"""An update of a denoiser on a reward: ours, the published PyTorch loop, and the denoiser alone.

The loop is written anew after what the public PyTorch implementation of DDPO does: chains are drawn with a scheduler's
step and its log-probability, both kept; rewards are normalised; then small batches of rows go through the network one
of denoising at a time, each row with its own order of steps, a backward pass each, gradients added up, norm clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import best_seconds
from foveate import noise
from foveate.learn.answers import score
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.diffusion import ClassDenoiser, small_unet
from foveate.rewards.images import compressibility
from foveate.run import Run
from foveate.two_steps import _update

INPUTS, SAMPLES, STEPS, SIDE, PIECE = 4, 4, 12, 16, 2
ROWS_OF_THE_LOOP = 4  # of a backward pass, as in its settings for a reward of one number an image
Rates = tuple[float, float, str]


def update() -> Rates:
    """Sampling and update of 16 chains of 12 steps, 16x16, a million weights; the peer is the published loop."""
    ours, peer = best_seconds(our_step(denoiser()), published_step(denoiser()), rounds=2)
    return rate(ours), rate(peer), "image-steps/s"


def bound() -> Rates:
    """The same, beside the passes through the denoiser that it cannot do without: 0.85 is 15 % of everything else."""
    ours, peer = best_seconds(our_step(denoiser()), denoiser_alone(denoiser()), rounds=2)
    return rate(ours), rate(peer), "image-steps/s"


def rate(seconds: float) -> float:
    return INPUTS * SAMPLES * STEPS / seconds


def denoiser() -> ClassDenoiser:
    from diffusers import DDIMScheduler

    with torch.random.fork_rng():
        torch.manual_seed(0)
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
        )
        return ClassDenoiser(small_unet(SIDE, 1, 10), scheduler, STEPS, (1, SIDE, SIDE), chunk=PIECE)


def our_step(policy: ClassDenoiser) -> Callable[[], None]:
    """What `tune_on_reward` does of an update, without the run's log and progress."""
    optimizer = torch.optim.Adam(policy.parameters(), 1e-5)
    tuning, average = Tuning(SAMPLES, "normalised"), MovingAverage()
    labels, keys = torch.arange(INPUTS), noise.key(0, torch.arange(INPUTS))

    def optimise(loss: Tensor, optimizer: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    run: Any = Run.__new__(Run)  # nothing else of it is asked for
    run.optimise = optimise

    def step() -> None:
        scored = score(policy, compressibility, labels, labels, keys, tuning, average)
        _update(run, policy, None, labels, labels, scored, tuning, optimizer, None, lambda pieces: pieces)

    return step


def published_step(policy: ClassDenoiser) -> Callable[[], None]:
    """The loop: the same network, schedule, reward, optimizer; one epoch on the chains."""
    network, table = policy.network, policy.table
    optimizer = torch.optim.Adam(network.parameters(), 1e-5)
    labels = torch.arange(INPUTS).repeat_interleave(SAMPLES)

    def step() -> None:
        states, logs = [torch.randn(len(labels), 1, SIDE, SIDE)], []
        with torch.no_grad():
            for place in range(STEPS):
                at = torch.full((len(labels),), place)
                output = network(states[-1], table.times[at], labels, return_dict=False)[0]
                after, log = scheduler_step(policy, output, at, states[-1], None)
                states.append(after)
                logs.append(log)
        rewards = compressibility(((states[-1] + 1) / 2).clamp(0, 1)).total.view(INPUTS, SAMPLES)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)).flatten()
        chains = torch.stack(states, 1)
        published_gradient(policy, chains, torch.stack(logs, 1), labels, advantages, ROWS_OF_THE_LOOP)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def published_gradient(
    policy: ClassDenoiser, chains: Tensor, logs: Tensor, labels: Tensor, advantages: Tensor, rows: int
) -> None:
    """Its backward passes: small batches of shuffled rows, a step at a time, in an order of its own for each row."""
    order = torch.randperm(len(labels))
    times = torch.stack([torch.randperm(logs.shape[1]) for _ in range(len(labels))])
    for some in order.split(rows):
        for place in range(logs.shape[1]):
            at = times[some, place]
            before, after = chains[some, at], chains[some, at + 1]
            output = policy.network(before, policy.table.times[at], labels[some], return_dict=False)[0]
            _, log = scheduler_step(policy, output, at, before, after)
            ratio = (log - logs[some, at]).exp()
            worth = advantages[some]
            loss = torch.maximum(-worth * ratio, -worth * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
            (loss * len(some) / len(labels)).backward()


def scheduler_step(
    policy: ClassDenoiser, output: Tensor, at: Tensor, x: Tensor, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """DDIM's step of each row at its own time, and its log-probability, which that loop averages over pixels."""
    table = policy.table
    alpha, image, blur, std = (
        column[at].view(-1, 1, 1, 1) for column in (table.alpha, table.image, table.noise, table.std)
    )
    clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * output).clamp(-1, 1)
    epsilon = alpha.sqrt() * output + (1 - alpha).sqrt() * x
    mean = image * clean + blur * epsilon
    after = mean + std * torch.randn_like(mean) if after is None else after
    std = std.clamp(min=1e-6)  # that of the last step is 0
    log = -((after.detach() - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return after, log.flatten(1).mean(1)


def denoiser_alone(policy: ClassDenoiser) -> Callable[[], None]:
    """Passes through the network as an update of ours makes them, and nothing else."""
    network, rows = policy.network, INPUTS * SAMPLES
    labels, x = torch.arange(INPUTS).repeat_interleave(SAMPLES), torch.randn(rows, 1, SIDE, SIDE)
    time = torch.full((rows,), 500)

    def step() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                network(x, time, labels)
        for steps in policy.pieces(None):
            count = steps.stop - steps.start
            output = network(x.repeat(count, 1, 1, 1), time.repeat(count), labels.repeat(count)).sample
            output.backward(torch.ones_like(output))
        network.zero_grad()

    return step


ROWS: dict[str, Callable[[], Rates]] = {"ddpo": update, "ddpo-denoiser": bound}
