"""Rewards of rewards: weighted sums and products that keep the parts, and functions of the user's own.

A reward is any callable (predictions, targets) -> RewardOutput.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce, wraps
from operator import add, mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from foveate.types import InputError, RewardOutput, in_full, map_tree, rows_of, split

Reward: TypeAlias = Callable[[Any, Any], RewardOutput]

# prefix → the function that makes a reward of what follows it; by name, as what reads runs stands above this floor
MAKERS = {"preference": "foveate.preferring:preference_reward"}


def weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """Σ weight · total.

    `parts`: "name", the weighted totals, which sum to the total, and each reward's own "name/part". `credit` is the
    weighted sum of theirs, if all have one.

    Raises:
        InputError: the names of rewards and weights differ, or there is none.
    """
    _check_names(rewards, weights)

    def reward(predictions: Any, targets: Any) -> RewardOutput:
        found = {name: one(predictions, targets) for name, one in rewards.items()}
        shares = {name: weights[name] * output.total for name, output in found.items()}
        credits = [weights[name] * output.credit for name, output in found.items() if output.credit is not None]
        credit = reduce(add, credits) if len(credits) == len(found) else None
        return RewardOutput(reduce(add, shares.values()), shares | _own(found), credit)

    return reward


def product(rewards: Mapping[str, Reward]) -> Reward:
    """Π total.

    `parts`: "name", the totals, which multiply to the total, and each reward's own "name/part". No credit.

    Raises:
        InputError: there is none.
    """
    _check_names(rewards, rewards)

    def reward(predictions: Any, targets: Any) -> RewardOutput:
        found = {name: one(predictions, targets) for name, one in rewards.items()}
        totals = {name: output.total for name, output in found.items()}
        return RewardOutput(reduce(mul, totals.values()), totals | _own(found))

    return reward


def guarded(reward: Reward, skip: bool = False, name: str = "given") -> Reward:
    """A reward that names the example on which another one fails, instead of failing with the whole batch.

    An example fails if its total, a part or a credit of its decisions is NaN or infinite, or if the reward raises for
    it; only then is it asked an example at a time. With `skip` a failed example gets the mean of the others, in the
    total as in the parts, and the part "skipped" is 1 for it, else 0 (it is no summand), by which
    `foveate.learn.answers.score` knows not to learn from it or compare with it; the credit of its decisions is 0.

    Raises:
        InputError: an example failed and is not to be skipped, or all did (`targets` that are numbers are told); or
            what the reward gives is not one number an example.
    """

    score = told(reward, name)

    def careful(predictions: Any, targets: Any) -> RewardOutput:
        errors: dict[int, Exception] = {}
        try:
            found = score(predictions, targets)
        except InputError:  # it says itself what is wrong, and for all examples
            raise
        except Exception as error:
            found, errors = _one_by_one(score, predictions, targets)
            if not errors:
                raise InputError(
                    f"reward {name}: raises on the batch, but on none of its examples: {error!r}"
                ) from error
        bad = ~torch.stack([values.isfinite() for values in _named(found).values()]).all(0)
        if found.credit is not None:
            bad |= ~found.credit.isfinite().all(1)
        if not skip and not bad.any():
            return found
        if bad.any() and (not skip or bool(bad.all())):
            row = int(bad.nonzero()[0])
            what = f"raises {errors[row]!r}" if row in errors else _broken(found, row)
            of = f", target {targets[row].tolist()}" if isinstance(targets, Tensor) and targets.ndim == 1 else ""
            remedy = "nothing is left to learn from"
            if not skip:
                remedy = "correct the reward, or skip such examples (--skip-bad; from Python skip_bad=True)"
            raise InputError(f"reward {name}: {what} for example {row}{of} ({int(bad.sum())} of {len(bad)}): {remedy}")
        total = torch.where(bad, found.total[~bad].mean(), found.total)
        parts = {part: torch.where(bad, value[~bad].mean(), value) for part, value in found.parts.items()}
        credit = None if found.credit is None else torch.where(bad[:, None], 0.0, found.credit)
        return RewardOutput(total, parts | {"skipped": bad.to(total)}, credit)

    return careful


def _broken(output: RewardOutput, row: int) -> str:
    """What of an example is NaN or infinite."""
    if not math.isfinite(total := float(output.total[row])):
        return f"is {total}"
    for part, values in output.parts.items():
        if not math.isfinite(value := float(values[row])):
            return f"its part {part!r} is {value}"
    return "has no finite credit"


def _one_by_one(reward: Reward, predictions: Any, targets: Any) -> tuple[RewardOutput, dict[int, Exception]]:
    """What each example gets alone, NaN where the reward raises; and what it raised."""
    totals, parts, credits, errors = [], [], [], {}
    ones = _each(predictions)
    for row, (one, wanted) in enumerate(zip(ones, _each(targets, len(ones)), strict=True)):
        try:
            found = reward(one, wanted)
            totals.append(found.total)
            parts.append(found.parts)
            credits.append(found.credit)
        except Exception as error:  # whatever the user's function raises
            errors[row] = error
            totals.append(torch.full((1,), math.nan))
            parts.append({})
            credits.append(None)
    device = next((total.device for total in totals if bool(total.isfinite())), totals[0].device)
    names = next((each for each in parts if each), {})
    none = torch.zeros(1, device=device)
    laid = {part: torch.cat([each.get(part, none) for each in parts]) for part in names}
    like = next((each for each in credits if each is not None), None)
    credit = None if like is None else torch.cat([torch.zeros_like(like) if it is None else it for it in credits])
    return RewardOutput(torch.cat([total.to(device) for total in totals]), laid, credit), errors


def _each(examples: Any, count: int = 0) -> list[Any]:
    """Batches of one; of a tree of tensors, of a list of anything else, sentences say, or of `count` times nothing."""
    if examples is None:
        return [None] * count
    return [[one] for one in examples] if _listed(examples) else split(examples, 1)


def _listed(examples: Any) -> bool:
    return isinstance(examples, list) and not (examples and isinstance(examples[0], Tensor))


def told(reward: Callable[[Any, Any], Any], name: str | None = None) -> Reward:
    """A reward of a function that gives its totals alone, a tensor [batch], or is a reward already.

    It computes in full precision, whatever the model that is scored does.

    Raises:
        InputError: what it gives is not one number an example.
    """
    called = name or str(getattr(reward, "__name__", "given"))

    @wraps(reward)
    def output(predictions: Any, targets: Any) -> RewardOutput:
        rows = len(predictions) if _listed(predictions) else rows_of(predictions)
        with _full_precision():
            return _shaped(reward(in_full(predictions), targets), rows, called)

    return output


@contextmanager
def _full_precision() -> Iterator[None]:
    """What a model that answers in mixed precision has on is no matter of the reward: three digits are too few."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def load_reward(name: str, known: Iterable[str] = ()) -> Reward:
    """The function that `package.module:function` names; it is imported, so its module's code runs.

    It may give a tensor [batch] in place of a `RewardOutput`. `known` are the other names that the caller takes, for
    the message.
    `preference:RUN` is what a run of reward-model learned from comparisons (`foveate.preferring.preference_reward`).

    Raises:
        InputError: no such module, or nothing in it of this name that can be called; no such run.
    """
    module, _, function = name.partition(":")
    if module in MAKERS and function:
        made: Reward = _function(MAKERS[module])(function)
        return made
    return told(_function(name, known), name)


def _function(name: str, known: Iterable[str] = ()) -> Any:
    module, _, function = name.partition(":")
    if not (module and function):
        raise InputError(f"reward: found {name!r}, expected {', '.join((*known, 'package.module:function'))}")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise InputError(f"reward: {name!r} is not found ({error}); is it on PYTHONPATH?") from error
    except AttributeError as error:
        raise InputError(f"reward: {module} has no {function!r}; correct the name after the colon") from error
    if not callable(found):
        raise InputError(
            f"reward: {name!r} is a {type(found).__name__}, expected a function of predictions and targets"
        )
    return found


def check_output(output: Any, batch: int, name: str) -> RewardOutput:
    """What a reward gave, as a `RewardOutput`: to be called on the first batch of a function that is not ours.

    A tensor [batch] is taken for the total.

    Raises:
        InputError: another type or shape, a part or credit of another shape, NaN or infinity, or the same number for
            all of a batch of two or more, from which nothing can be learned. The message names shape and range.
    """
    found = _shaped(output, batch, name)
    for what, values in _named(found).items():
        broken = ~values.isfinite()
        if broken.any():
            rows = broken.nonzero().flatten().tolist()
            good = values[~broken].tolist() or [math.nan]
            raise InputError(
                f"reward {name}: its {what} is {float(values[rows[0]])} for example {rows[0]} ({len(rows)} of {batch}; "
                f"the others lie in {min(good):g} to {max(good):g}): look at that example, or give it a number"
            )
    if batch > 1 and bool((found.total == found.total[0]).all()):
        raise InputError(
            f"reward {name}: is {float(found.total[0]):g} for all {batch} examples: nothing can be learned from it; do "
            "predictions and targets share one convention?"
        )
    return found


def _shaped(output: Any, batch: int, name: str) -> RewardOutput:
    """What a reward gave, if it is one number an example."""
    if not isinstance(output, Tensor | RewardOutput):
        raise InputError(f"reward {name}: found {type(output).__name__}, expected RewardOutput, or a tensor [{batch}]")
    for what, values in _named(output).items():
        if values.shape != (batch,):
            raise InputError(f"reward {name}: its {what} is {list(values.shape)}, expected [{batch}]: one an example")
    if isinstance(output, Tensor):
        return RewardOutput(_real(output))
    if (credit := output.credit) is not None and (credit.ndim != 2 or len(credit) != batch):
        raise InputError(f"reward {name}: its credit is {list(credit.shape)}, expected [{batch}, decisions]")
    return map_tree(_real, output)


def _real(values: Tensor) -> Tensor:
    return in_full(values) if values.is_floating_point() else values.float()  # counts have no mean


def _named(output: Tensor | RewardOutput) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"total": output}
    return {"total": output.total} | {f"part {part!r}": value for part, value in output.parts.items()}


def _own(found: Mapping[str, RewardOutput]) -> dict[str, Tensor]:
    return {f"{name}/{part}": value for name, output in found.items() for part, value in output.parts.items()}


def _check_names(rewards: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    if not rewards or set(rewards) != set(weights):
        raise InputError(
            f"rewards: found {', '.join(rewards) or 'none'} with weights for {', '.join(weights) or 'none'}, "
            "expected a weight for each"
        )
