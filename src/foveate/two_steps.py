"""The two steps of tuning, as phases of a run: maximum likelihood, then REINFORCE on the model's own answers.

Pinto et al. 2023, "Tuning computer vision models with task rewards". Likelihood teaches the model to answer; then it
answers `samples` times to each input, every answer is scored, and the log-probability of its decisions is weighed by
how much better it was than the others (`foveate.learn.answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from foveate import noise
from foveate.learn.answers import Reward, Scored, answering, distinct, likelihood_loss, repeat, reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.learn.settings import Precision, Tuning
from foveate.parts import look_at
from foveate.rewards.combine import check_output
from foveate.run import Run
from foveate.types import Decisions, InputError, RewardOutput, Sampler, Tree, in_full, rows_of, split

Batches: TypeAlias = Callable[[int], tuple[Tree, Tree]]  # the inputs and targets of a step
Losses: TypeAlias = dict[str, Tensor]  # name → loss, to be added and logged
SUMS = ("entropy", "kl", "value_loss")  # divided by the answers of the whole batch, of which a chunk has its part
WATCHED = 10  # updates between two looks at the KL to a reference that nothing holds on to
LONG = (*SUMS, "length")  # sums over decisions, of which a piece has its part


def check_taught(run: Run, **shares: float) -> None:
    """Check that a start which is not learned in the run comes from another one.

    Raises:
        InputError: a share of the budget is 0, and there is no source.
    """
    if run.source is None and (none := [name for name, share in shares.items() if not share]):
        raise InputError(f"{', '.join(none)}: 0, but no run to take it from; add --from RUN")


@torch.no_grad()
def check_reward(
    run: Run,
    policy: Sampler,
    reward: Reward,
    batch: tuple[Tree, Tree],
    samples: int,
    name: str = "given",
    said: Tree | None = None,
) -> RewardOutput:
    """Ask a reward for answers of a policy that has learned nothing yet: what is wrong with it is then said at once.

    Args:
        run: whose policy it is.
        policy: what answers.
        reward: guarded (`foveate.rewards.combine.guarded`).
        batch: inputs and targets.
        samples: answers to each input.
        name: of the reward, for the message.
        said: an answer of people to each input, as actions; the reward must tell some of all these answers apart.

    Raises:
        InputError: what a guarded reward says; or it is the same for all answers, those of people among them.
    """
    inputs, targets = batch
    with answering(policy):
        answers = policy.decode(policy.sample(inputs, samples, False, _keys(run, "check", 0, rows_of(inputs))))
        found = reward(answers, repeat(targets, samples))
        if said is not None:
            totals = torch.cat((found.total, reward(policy.decode(said), targets).total))
            check_output(totals, len(totals), name)
    return found


def held_out_scores(
    policy: Sampler,
    reward: Reward,
    batches: Iterable[tuple[Tree, Tree]],
    seed: int,
    precision: Precision = "fp32",
    **metrics: Reward,
) -> dict[str, Tensor]:
    """Mean reward of greedy answers and its parts, "held_out_reward" and "held_out part ...".

    And of the same answers what nothing is tuned on: "held_out_NAME" of every metric.
    """
    outputs, others = [], dict[str, list[Tensor]]()
    with torch.no_grad():
        for inputs, targets in batches:
            keys = noise.key(seed, "held out", torch.arange(rows_of(inputs))).to(next(policy.parameters()).device)
            with answering(policy, precision):
                answers = in_full(policy.decode(policy.sample(inputs, 1, True, keys)))
            outputs.append(reward(answers, targets))
            for name, metric in metrics.items():
                others.setdefault(f"held_out_{name}", []).append(metric(answers, targets).total)
    found = {"held_out_reward": torch.cat([output.total for output in outputs]).mean()}
    found |= {name: torch.cat(totals).mean() for name, totals in others.items()}
    names = outputs[0].parts
    return found | {
        f"held_out part {name}": torch.cat([output.parts[name] for output in outputs]).mean() for name in names
    }


def learn_likelihood(
    run: Run,
    phase: str,
    share: float,
    policy: Sampler,
    batches: Batches,
    optimizer: Optimizer,
    learning_rate: float,
    *,
    start: Sampler | None = None,
    beside: Callable[[Tree, Tree, Int[Tensor, " batch"]], Losses] | None = None,
    keeper: Keeper | None = None,
    validate: Callable[[], dict[str, Any]] | None = None,
    every: int = 200,
    precision: Precision = "fp32",
) -> None:
    """Teach a sampler the answers that people gave, for one phase of a run: the first step, and its control later.

    Args:
        run: owns the loop.
        phase: its name in the logs.
        share: of the run's budget; with 0 there is no such phase, and the policy stays as it is.
        policy: as `run.track` returned it.
        batches: step → inputs and their answers, trees whose tensors begin with this process's part of the batch.
        optimizer: as `run.track` returned it.
        learning_rate: peak of the one-cycle schedule.
        start: whose weights the policy takes at the first step of the phase; None: it keeps its own.
        beside: further losses of a batch, from its inputs, answers and keys.
        keeper: keeps the weights of the best `validate()[keeper.by]`, those of the start and of the end among
            them, and gives them to the policy in the end. It needs `validate`.
        validate: scores on held-out inputs, logged every `every` steps.
        every: steps between validations.
        precision: "bf16" runs the model in mixed precision.
    """
    if not share:
        return
    for step in run.steps(phase, share):
        if step == 0:
            if start is not None:
                policy.load_state_dict(start.state_dict())
            if keeper is not None:
                keeper.begin()
                look_at(run, policy, keeper, validate)
        inputs, answers = batches(step)
        policy.train()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = likelihood_loss(policy(inputs, answers))
        losses = {"negative_log_likelihood": loss}
        if beside is not None:
            losses |= beside(inputs, answers, _keys(run, phase, step, rows_of(inputs)))
        set_learning_rate(optimizer, one_cycle(run.progress, learning_rate))
        run.optimise(torch.stack(list(losses.values())).sum(), optimizer, clip=1.0)
        run.log(**{name: value.detach() for name, value in losses.items()})
        if (step + 1) % every == 0:
            look_at(run, policy, keeper, validate)
    if keeper is not None and validate is not None:
        keeper.finish(policy, validate()[keeper.by])
        run.save()


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
    *,
    beside: Callable[[Decisions, Scored, Tree], Losses] | None = None,
    keeper: Keeper | None = None,
    validate: Callable[[], dict[str, Any]] | None = None,
    every: int = 100,
) -> None:
    """Tune a sampler for one phase of a run; with a reference it begins with the weights of that.

    Logged: the reward and its parts; "kl" to the reference (without an anchor, of every tenth update) and "entropy", of
    whole answers in nats; "length", decisions an answer; "distinct", the share of different answers to an input;
    "alike", the share of inputs whose answers all scored the same, from which nothing is learned; "ratio", which is 1
    at the first epoch.

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
        beside: further losses of the decisions on the answers, from their targets (repeated, one for each answer).
        keeper: keeps the weights of the best `validate()[keeper.by]`, those of the start and of the end among
            them, goes back to them after a collapse, and gives them to the policy in the end. Without `validate` it
            only says that there was one.
        validate: scores on held-out inputs, logged at the start and every `every` steps.
        every: steps between validations.

    Raises:
        InputError: an anchor without a reference.
    """
    if tuning.anchor and reference is None:
        raise InputError(f"reference: not given, but the anchor is {tuning.anchor:g}; pass a frozen copy of the model")
    for step in run.steps(phase, share):
        if step == 0:
            if reference is not None:
                policy.load_state_dict(reference.state_dict())
            if keeper is not None:
                keeper.begin()
            look_at(run, policy, keeper, validate)  # the start is the first to be beaten
        inputs, targets = batches(step)
        keys = _keys(run, phase, step, rows_of(inputs))
        scored = score(policy, reward, inputs, targets, keys, tuning, average, reference)
        rate = tuning.learning_rate * min(1.0, (step + 1) / max(1, tuning.warmup))
        rate *= 1 - run.progress if tuning.anneal else 1.0
        set_learning_rate(optimizer, rate * (1.0 if keeper is None else float(keeper.rate)))
        some = _subset(run, phase, step, tuning.subset)
        watched = reference if tuning.anchor or step % WATCHED == 0 else None
        for epoch in range(tuning.epochs):
            now, behaviour = _update(run, policy, watched, inputs, targets, scored, tuning, optimizer, beside, some)
            if epoch == 0:
                told = now | _told(scored, tuning.samples)
                run.log(**told)
                scored = replace(scored, behaviour=behaviour)
        average.update(run.mean(scored.output.total.mean())[None])
        if (step + 1) % every == 0:
            look_at(run, policy, keeper, validate)
        if keeper is not None:
            reward_now, length, various = (run.mean(told[name]) for name in ("reward", "length", "distinct"))
            if collapsed := keeper.notice(reward_now, length, various, tuning.samples):
                told_so = f"{phase}, step {step + 1}: {collapsed}, and the reward is no better"
                if validate is None:
                    run.say(f"{told_so}; nothing is held out, so that no weights are known to be better")
                    keeper.begin()  # said once
                else:
                    keeper.go_back(policy, optimizer)
                    run.say(f"{told_so}: back to the best weights")
    if keeper is not None and validate is not None:
        keeper.finish(policy, validate()[keeper.by])
        run.save()


def _update(
    run: Run,
    policy: Sampler,
    reference: Sampler | None,
    inputs: Tree,
    targets: Tree,
    scored: Scored,
    tuning: Tuning,
    optimizer: Optimizer,
    beside: Callable[[Decisions, Scored, Tree], Losses] | None,
    chosen: Callable[[list[slice]], list[slice]],
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of the optimizer on scored answers, in chunks of inputs and in pieces of their steps if asked.

    Returns:
        What to log of it, and the log-probabilities of the decisions as they were before it (0 where not looked at).
    """
    rows, samples = rows_of(inputs), tuning.samples
    size = tuning.chunk or rows
    logged: dict[str, Tensor] = {}
    known = []
    loss = None
    both = split((inputs, targets), size)  # targets may be None
    for (some, wanted), part in zip(both, split(scored, size * samples), strict=True):
        share, whole = rows_of(some) / rows, policy.pieces(part.actions)
        pieces = chosen(whole)
        scale = len(whole) / len(pieces)
        behaviour: dict[int, Tensor] = {}
        for steps in pieces:
            if loss is not None:
                loss.backward()
            anchor = None
            if reference is not None:
                with torch.no_grad(), answering(reference, tuning.precision, tuning.temperature):
                    anchor = reference(some, part.actions, steps).distribution
            with answering(policy, tuning.precision, tuning.temperature):
                decisions = policy(some, part.actions, steps)
            loss, told = reward_loss(decisions, part.at(steps), anchor, tuning, rows * samples)
            loss = scale * loss if scale > 1 else loss
            assert decisions.log_probs is not None
            behaviour[steps.start or 0] = decisions.log_probs.detach()
            if beside is not None:
                losses = beside(decisions, part, repeat(wanted, samples))
                loss = torch.stack([loss, *(share / len(pieces) * value for value in losses.values())]).sum()
                told |= {name: value.detach() for name, value in losses.items()}
            for name, value in told.items():
                value = value if name in SUMS else share * value
                value = scale * value if name in LONG else value / len(pieces)
                logged[name] = logged.get(name, 0.0) + value
        known.append(_laid_out(behaviour, whole))
    assert loss is not None
    run.optimise(loss, optimizer)
    return logged, torch.cat(known)


def _subset(run: Run, phase: str, step: int, share: float) -> Callable[[list[slice]], list[slice]]:
    """Chooses this share of the pieces of an answer, at least one, the same ones in every epoch of a step."""

    def chosen(pieces: list[slice]) -> list[slice]:
        order = noise.permutation(noise.key(run.seed, phase, "subset", step), len(pieces))
        return [pieces[place] for place in order[: max(1, round(share * len(pieces)))].sort().values.tolist()]

    return chosen


def _laid_out(known: dict[int, Tensor], pieces: list[slice]) -> Tensor:
    """Log-probabilities by the first step of their piece as one tensor; 0 in pieces that were not looked at."""
    like = next(iter(known.values()))
    if len(pieces) == 1:
        return like
    return torch.cat([known.get(one.start, like.new_zeros(len(like), one.stop - one.start)) for one in pieces], 1)


def _told(scored: Scored, samples: int) -> dict[str, Tensor]:
    groups = scored.output.total.view(-1, samples)
    alike = (groups == groups[:, :1]).all(1).float().mean()
    found = {"distinct": distinct(scored.actions, samples)}
    return found | ({"alike": alike} if samples > 1 else {})


def _keys(run: Run, phase: str, step: int, rows: int) -> Int[Tensor, " batch"]:
    """Of this process's rows of a batch."""
    return noise.key(run.seed, phase, step, torch.arange(rows) + run.rank * rows).to(run.device)
