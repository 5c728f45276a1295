"""Tune a model of your own on a score of your own, in one call: `foveate.tune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import noise
from foveate.analysis import curve_page
from foveate.geometry import Boxes
from foveate.learn.answers import Reward, Tuning, answering, decided, frozen, repeat
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.rewards.combine import check_output, guarded
from foveate.run import Run
from foveate.two_steps import Batches, held_out_scores, tune_on_reward
from foveate.types import InputError, Sampler, Tree, map_tree, rows_of


def tune(
    policy: Sampler,
    reward: Reward,
    batches: Batches,
    *,
    out: Path | str,
    steps: int | None = None,
    minutes: float | None = None,
    held_out: Sequence[tuple[Tree, Tree]] = (),
    every: int = 100,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    **settings: Any,
) -> Sampler:
    """Tune a model on a score: `foveate.tune`.

        foveate.tune(model, DetectionReward(), lambda step: (images, targets), out="runs/tuned", minutes=10)

    The reward is watched throughout: it gives one finite number for each answer, or the run stops and names the
    example. Before the first update the first answers are looked at: their rewards are not all the same; scoring them
    twice gives the same probabilities; boxes and targets share their units. The optimizer is Adafactor, as in the
    paper. With `held_out` the model is given the weights that answered best there, greedily, those of the start among
    them. In the end the folder has a page that says whether the curve is normal (`foveate.analysis.curve_page`).

    Args:
        policy: what answers: a `foveate.types.Sampler`. It is moved to the device and changed.
        reward: (predictions, targets) → `RewardOutput`, or a tensor with a number for each.
        batches: step → (inputs, targets), trees of tensors that begin with the batch, on any device. The same step must
            give the same batch, or a resumed run sees other data than one that was not interrupted.
        out: folder of the run.
        steps: budget in steps.
        minutes: budget in minutes.
        held_out: batches that are never trained on.
        every: steps between looks at them.
        seed: of the answers that are drawn.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: go on with the run in `out`; pass the model as it was at the start.
        overwrite: delete the run that is there.
        skip_bad: an answer for which the reward raises or is not finite teaches nothing and is counted ("part
            skipped"), instead of stopping the run.
        **settings: fields of `foveate.learn.answers.Tuning`.

    Returns:
        The policy, tuned.

    Raises:
        InputError: settings that teach nothing, a reward that is none, other units, a model whose scores are random, a
            folder in use.
    """
    tuning = Tuning(**settings)
    run = Run(
        Path(out),
        system="tune",
        config=asdict(tuning),
        seed=seed,
        steps=steps,
        minutes=minutes,
        device=device,
        resume=resume,
        overwrite=overwrite,
    )
    policy.to(run.device)
    reference, keeper, average = frozen(policy), Keeper(policy), MovingAverage()
    optimizer = torch.optim.Adafactor(policy.parameters(), tuning.learning_rate)
    run.track(policy=policy, reference=reference, keeper=keeper, optimizer=optimizer, average=average)

    def ready(tree: Tree) -> Tree:
        return map_tree(lambda leaf: leaf.to(run.device), tree)

    name = getattr(reward, "__name__", "given")
    checked = guarded(reward, skip_bad, name)
    _check_start(policy, checked, name, ready(batches(0)), seed, tuning)

    def look() -> dict[str, Tensor]:
        return held_out_scores(policy, checked, map(ready, held_out), seed, tuning.precision)

    tune_on_reward(
        run,
        "reward",
        1.0,
        policy,
        checked,
        lambda step: ready(batches(step)),
        tuning,
        optimizer,
        average,
        reference,
        keeper=keeper if held_out else None,
        validate=look if held_out else None,
        every=every,
    )
    if run.is_main:
        config = asdict(tuning)
        run.say(f"is the curve normal? {curve_page(run.folder, config)}")
    return policy


@torch.no_grad()
def _check_start(
    policy: Sampler, reward: Reward, name: str, batch: tuple[Tree, Tree], seed: int, tuning: Tuning
) -> None:
    """Look at the first answers before anything is learned from them."""
    inputs, targets = batch
    rows = rows_of(inputs)
    with answering(policy, tuning.precision):
        keys = noise.key(seed, "check", torch.arange(rows)).to(next(policy.parameters()).device)
        actions = policy.sample(inputs, tuning.samples, False, keys)
        answers, wanted = policy.decode(actions), repeat(targets, tuning.samples)
        once, again = (list(decided(policy, inputs, actions)) for _ in range(2))
    if isinstance(answers, Boxes) and isinstance(wanted, Boxes) and wanted.mask.any() and answers.mask.any():
        reach, wanted_reach = (float(boxes.boxes[boxes.mask].max()) for boxes in (answers, wanted))
        if wanted_reach <= 1 < reach:
            raise InputError(
                f"targets: their boxes lie within [0, 1], the model's reach {reach:g}: multiply by width and height"
            )
    check_output(reward(answers, wanted), rows * tuning.samples, name)
    off = 0.0
    for first, second in zip(once, again, strict=True):
        if first.log_probs is None or first.mask is None or second.log_probs is None:
            raise InputError("policy: its forward gives no log_probs or no mask, which a Sampler's must")
        off = max(off, float(torch.where(first.mask, first.log_probs - second.log_probs, 0.0).abs().max()))
    if off > 1e-5:
        raise InputError(
            f"policy: scores the same answers differently by {off:.2g} nats from one pass to the next, so no ratio "
            "would be 1: draw nothing at random in forward"
        )
