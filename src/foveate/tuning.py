"""Tune a model on a score that has no gradient: REINFORCE on its own answers, by their reward.

The second of the two steps of Pinto et al. 2023, "Tuning computer vision models with task rewards": the first, maximum
likelihood, has taught the model to answer; here it answers `samples` times to each input, every answer is scored, and
the log-probability of its decisions is weighed by how much better it was than the others (`foveate.learn.answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from foveate import noise
from foveate.learn.answers import Reward, Scored, Tuning, answering, frozen, reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.schedule import set_learning_rate
from foveate.rewards.combine import check_output
from foveate.run import Run
from foveate.types import InputError, RewardOutput, Sampler, Tree, map_tree

Batches: TypeAlias = Callable[[int], tuple[Tree, Tree]]  # the inputs and targets of a step


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
    **settings: Any,
) -> Sampler:
    """Tune a model on a score: `foveate.tune`.

        foveate.tune(model, DetectionReward(), lambda step: (images, targets), out="runs/tuned", minutes=10)

    Before the first update the reward is checked on the first batch: one finite number an answer, and not the same one
    for all. The optimizer is Adafactor, as in the paper. With `held_out` the model is given the weights that answered
    best there, greedily, those of the start among them; the run keeps them as the part "best", the last as "policy".

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
        **settings: fields of `foveate.learn.answers.Tuning`.

    Returns:
        The policy, tuned.

    Raises:
        InputError: settings that teach nothing, a reward that is none, a folder in use.
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
    reference, best, average = frozen(policy), frozen(policy), MovingAverage()
    optimizer = torch.optim.Adafactor(policy.to(run.device).parameters(), tuning.learning_rate)
    record = MovingAverage(decay=0.0)  # of the best answers so far: nothing, or their reward
    run.track(policy=policy, reference=reference, best=best, optimizer=optimizer, average=average, best_reward=record)

    def ready(tree: Tree) -> Tree:
        return map_tree(lambda leaf: leaf.to(run.device), tree)

    def checked(predictions: Any, targets: Any) -> RewardOutput:
        output = reward(predictions, targets)
        return output if isinstance(output, RewardOutput) else RewardOutput(output)

    inputs, targets = ready(batches(0))
    with torch.no_grad(), answering(policy):
        keys = noise.key(seed, "check", torch.arange(_rows(inputs))).to(run.device)
        answers = policy.decode(policy.sample(inputs, tuning.samples, False, keys))
        repeated = map_tree(lambda leaf: leaf.repeat_interleave(tuning.samples, 0), targets)
        check_output(reward(answers, repeated), _rows(inputs) * tuning.samples, getattr(reward, "__name__", "given"))

    def validate() -> dict[str, float]:
        totals = []
        with torch.no_grad(), answering(policy):
            for some, wanted in map(ready, held_out):
                keys = noise.key(seed, "held out", torch.arange(_rows(some))).to(run.device)
                totals.append(checked(policy.decode(policy.sample(some, 1, True, keys)), wanted).total)
        found = torch.cat(totals).mean()
        if not bool(record.weight) or bool(found > record()):
            record.update(found[None])
            best.load_state_dict(policy.state_dict())
        return {"held_out_reward": float(found)}

    if held_out and not bool(record.weight):  # the start is the first to be beaten
        run.say(f"held-out reward at the start: {validate()['held_out_reward']:.4g}")
    look = validate if held_out else None
    with_device = lambda step: ready(batches(step))  # noqa: E731
    tune_on_reward(run, "reward", 1.0, policy, checked, with_device, tuning, optimizer, average, reference, look, every)
    if bool(record.weight):
        policy.load_state_dict(best.state_dict())
    return policy


def tune_on_reward(
    run: Run,
    phase: str,
    share: float,
    policy: Sampler,
    reward: Reward,
    batches: Batches,
    tuning: Tuning,
    optimizer: Optimizer,
    average: MovingAverage,
    reference: Sampler | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    every: int = 100,
) -> None:
    """Tune a sampler for one phase of a run.

    Logged: the reward and its parts; "kl" to the reference and "entropy", of whole answers in nats; "length", decisions
    an answer; "alike", the share of inputs whose answers all scored the same, from which nothing is learned; "ratio",
    which is 1 at the first epoch.

    Args:
        run: owns the loop.
        phase: its name in the logs.
        share: of the run's budget.
        policy: as `run.track` returned it.
        reward: (predictions, targets) → a score for each answer; targets are repeated, one for each answer.
        batches: the inputs and targets of a step: trees whose tensors begin with this process's part of the batch.
        tuning: how.
        optimizer: as `run.track` returned it.
        average: the moving-average baseline, tracked.
        reference: the model at the start, frozen and tracked; needed by an anchor, and for logging the KL.
        validate: scores on held-out inputs, logged every `every` steps.
        every: steps between validations.

    Raises:
        InputError: an anchor without a reference.
    """
    if tuning.anchor and reference is None:
        raise InputError(f"reference: not given, but the anchor is {tuning.anchor:g}; pass a frozen copy of the model")
    for step in run.steps(phase, share):
        inputs, targets = batches(step)
        rows = _rows(inputs)
        place = torch.arange(rows) + run.rank * rows
        keys = noise.key(run.seed, phase, step, place).to(run.device)
        scored = score(policy, reward, inputs, targets, keys, tuning, average)
        anchor = None
        if reference is not None:
            with torch.no_grad(), answering(reference):
                anchor = reference(inputs, scored.actions).distribution
        set_learning_rate(optimizer, tuning.learning_rate * min(1.0, (step + 1) / max(1, tuning.warmup)))
        for epoch in range(tuning.epochs):
            with answering(policy):
                decisions = policy(inputs, scored.actions)
            loss, parts = reward_loss(decisions, scored, anchor, tuning, run.mean)
            run.optimise(loss, optimizer)
            if epoch == 0:
                run.log(**parts, **_told(scored, tuning.samples))
        average.update(run.mean(scored.output.total.mean())[None])
        if validate is not None and (step + 1) % every == 0:
            run.log(**validate())


def _told(scored: Scored, samples: int) -> dict[str, Tensor]:
    groups = scored.output.total.view(-1, samples)
    alike = (groups == groups[:, :1]).all(1).float().mean()
    return {"alike": alike} if samples > 1 else {}


def _rows(tree: Tree) -> int:
    sizes: list[int] = []

    def note(leaf: Tensor) -> Tensor:
        sizes.append(len(leaf))
        return leaf

    map_tree(note, tree)
    return sizes[0]
