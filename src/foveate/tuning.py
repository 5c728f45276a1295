"""Tune a model of your own on a score of your own, in one call: `foveate.tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from foveate import noise
from foveate.analysis import curve_page
from foveate.geometry import Boxes, check_boxes
from foveate.learn.answers import Reward, answering, decided, frozen, log_prob, repeat
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.learn.settings import Tuning
from foveate.rewards.combine import check_output, guarded
from foveate.run import Run
from foveate.two_steps import Batches, held_out_scores, tune_on_reward
from foveate.types import InputError, RewardOutput, Sampler, Tree, map_tree, rows_of

ENOUGH = 64  # answers that are looked at before the first update, at least


def tune(
    policy: Sampler,
    reward: Reward,
    batches: Batches,
    *,
    out: Path | str,
    steps: int | None = None,
    minutes: float | None = None,
    held_out: Iterable[tuple[Tree, Tree]] = (),
    every: int = 100,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.Adafactor,
    **settings: Any,
) -> Sampler:
    """Tune a model on a score: `foveate.tune`.

        foveate.tune(model, DetectionReward(), lambda step: (images, targets), out="runs/tuned", minutes=10)

    The reward is watched throughout: it gives one finite number for each answer, or the run stops and names the
    example. Before the first update at least `ENOUGH` answers to the first inputs are looked at: their rewards differ;
    they come from the distribution that scores them, and scoring them twice gives the same; boxes and targets share
    their units, those of the image. With `held_out` the model is given the weights that answered best there, greedily,
    those of the start among them. In the end the folder has a page that says whether the curve is normal
    (`foveate.analysis.curve_page`).

    Args:
        policy: what answers: a `foveate.types.Sampler`. It is moved to the device and changed.
        reward: (predictions, targets) → `RewardOutput`, or a tensor with a number for each.
        batches: step → (inputs, targets), trees of tensors that begin with the batch, on any device; targets may be
            None, if the reward needs none. The same step must give the same batch, or a resumed run sees other data
            than one that was not interrupted. Of several processes each gives its own part, as many rows in each.
        out: folder of the run.
        steps: budget in steps.
        minutes: budget in minutes.
        held_out: batches that are never trained on.
        every: steps between looks at them.
        seed: of the answers that are drawn.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: go on with the run in `out`; pass the model as it was at the start.
        overwrite: delete the run that is there.
        skip_bad: an answer for which the reward raises, or is not finite in its total, a part or a credit, teaches
            nothing and is counted ("part skipped"), instead of stopping the run.
        optimizer: what makes the optimizer of a list of parameters: a class of torch.optim, or a function, e.g.
            `partial(torch.optim.AdamW, weight_decay=0.1)`; Adafactor as in the paper. The learning rate of all its
            groups is the setting `learning_rate`, whatever it was made with.
        **settings: fields of `foveate.learn.settings.Tuning`.

    Returns:
        The policy, tuned.

    Raises:
        InputError: settings that teach nothing, a reward or an optimizer that is none, other units, images of several
            sizes, in whole numbers or not finite, more or fewer targets than inputs, a model whose scores are random or
            not those of what it draws, a folder in use.
    """
    _check_asked(batches, every, settings)
    tuning, held_out = Tuning(**settings), list(held_out)
    config = asdict(tuning)
    if optimizer is not torch.optim.Adafactor:
        config["optimizer"] = getattr(getattr(optimizer, "func", optimizer), "__name__", type(optimizer).__name__)
    run = Run(
        Path(out),
        system="tune",
        config=config,
        seed=seed,
        steps=steps,
        minutes=minutes,
        device=device,
        resume=resume,
        overwrite=overwrite,
    )
    policy.to(run.device)
    reference, keeper, average = frozen(policy), Keeper(policy), MovingAverage()
    learner = _optimizer(optimizer, policy)
    run.track(policy=policy, reference=reference, keeper=keeper, optimizer=learner, average=average)

    def ready(batch: Any) -> tuple[Tree, Tree]:
        _check_batch(batch)
        moved: tuple[Tree, Tree] = map_tree(lambda leaf: leaf.to(run.device), batch)
        return moved

    name = getattr(reward, "__name__", "given")
    checked = guarded(reward, skip_bad, name)
    if not resume:  # what was checked may since have learned to answer all alike
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
        learner,
        average,
        reference,
        keeper=keeper,
        validate=look if held_out else None,
        every=every,
    )
    if run.is_main:
        run.say(f"is the curve normal? {curve_page(run.folder, config)}")
    return policy


def _optimizer(make: Any, policy: Sampler) -> Optimizer:
    own = list(policy.parameters())
    made = make(own) if callable(make) else make
    if made is make or not isinstance(made, Optimizer):
        raise InputError(
            f"optimizer: found {type(made).__name__}, expected what makes an optimizer of a list of parameters: pass a "
            "class like torch.optim.AdamW, or a function"
        )
    if not {id(each) for group in made.param_groups for each in group["params"]} & set(map(id, own)):
        raise InputError("optimizer: has no parameter of the model; make it of the list of parameters it is given")
    return made


@torch.no_grad()
def _check_start(
    policy: Sampler, reward: Reward, name: str, batch: tuple[Tree, Tree], seed: int, tuning: Tuning
) -> None:
    """Look at answers to the first inputs, at least `ENOUGH` of them, before anything is learned from them."""
    inputs, targets = batch
    _check_finite(inputs)
    rows = rows_of(inputs)
    device, wanted = next(policy.parameters()).device, repeat(targets, tuning.samples)
    drawn, outputs = [], []
    with answering(policy, tuning.precision, tuning.temperature):
        for draw in range(-(-ENOUGH // (rows * tuning.samples))):
            keys = noise.key(seed, "check", draw, torch.arange(rows)).to(device)
            drawn.append(policy.sample(inputs, tuning.samples, False, keys))
            answers = policy.decode(drawn[-1])
            if draw == 0:
                _check_units(inputs, answers, wanted)
            outputs.append(reward(answers, wanted))
        totals = torch.cat([output.total for output in outputs])
        check_output(RewardOutput(totals), len(totals), name)  # the guard has looked at the rest
        if tuning.credit == "answer" and tuning.baseline in ("leave-one-out", "normalised"):
            _check_compared(torch.cat([output.total.view(rows, -1) for output in outputs], 1), name)
        _check_distribution(policy, inputs, drawn[0])
        _check_repeatable(policy, inputs, drawn[0])
        _check_drawn(policy, inputs, drawn)


def _check_asked(batches: Any, every: int, settings: Mapping[str, Any]) -> None:
    names = [entry.name for entry in fields(Tuning)]
    for strange in sorted(settings.keys() - names):
        raise InputError(f"settings: found {strange!r}, expected of {', '.join(names)}; correct or leave it out")
    if every < 1:
        raise InputError(f"every: found {every}, expected at least 1 step; to look at nothing, leave held_out out")
    if not callable(batches):
        raise InputError(f"batches: found {type(batches).__name__}, expected a function of the step that gives a batch")


def _check_batch(batch: Any) -> None:
    """What shapes and types tell of a batch; cheap, as every one is looked at."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"batches: found {type(batch).__name__}, expected a pair of inputs and targets")
    inputs, targets = batch
    rows = None if targets is None else _rows(targets, "targets")
    _check_stacked(inputs, rows)
    if rows not in (None, found := _rows(inputs, "inputs")):
        raise InputError(f"targets: found {rows} for {found} inputs, expected one for each")
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8 and inputs.ndim == 4:
        raise InputError("inputs: found images in uint8, expected float32 in [0, 1]: divide them by 255")


def _rows(tree: Tree, name: str) -> int:
    try:
        return rows_of(tree)
    except (IndexError, TypeError) as error:  # without a tensor, or with one that has no rows
        raise InputError(f"{name}: found {type(tree).__name__}, expected tensors that begin with the batch") from error


def _check_finite(inputs: Tree) -> None:
    if isinstance(inputs, Tensor) and inputs.ndim >= 4 and not (fine := inputs.isfinite().flatten(1).all(1)).all():
        row = int((~fine).nonzero()[0])
        count = f"{int((~fine).sum())} of {len(fine)}"
        raise InputError(f"inputs: image {row} of the first batch has NaN or infinite pixels ({count}); correct it")


def _check_stacked(inputs: Tree, rows: int | None) -> None:
    images: Any = inputs
    listed = isinstance(inputs, list | tuple) and all(isinstance(each, Tensor) and each.ndim == 3 for each in images)
    if listed and images and (rows not in (None, len(images[0])) or len({each.shape for each in images}) > 1):
        sizes = ", ".join(dict.fromkeys("x".join(map(str, each.shape)) for each in images))
        raise InputError(
            f"inputs: {len(images)} images of {sizes}, expected one tensor [batch, channels, height, width]: "
            "scale or pad them to one size, and stack them"
        )


def _check_units(inputs: Tree, answers: Any, wanted: Any) -> None:
    if not isinstance(wanted, Boxes):
        return
    image = isinstance(inputs, Tensor) and inputs.ndim == 4
    check_boxes(wanted, "targets", (inputs.shape[2], inputs.shape[3]) if image else None)
    if not isinstance(answers, Boxes) or not wanted.mask.any() or not answers.mask.any():
        return
    reach, wanted_reach = (float(boxes.boxes[boxes.mask].max()) for boxes in (answers, wanted))
    if wanted_reach <= 1 < reach:
        raise InputError(
            f"targets: their boxes lie within [0, 1], the model's reach {reach:g}: multiply by width and height"
        )
    if reach <= 1 < wanted_reach:
        raise InputError(
            f"policy: its boxes lie within [0, 1], those of the targets reach {wanted_reach:g}: let decode multiply "
            "by width and height"
        )


def _check_compared(totals: Float[Tensor, "batch answers"], name: str) -> None:
    rows, count = totals.shape
    if count > 1 and bool((totals == totals[:, :1]).all()):
        raise InputError(
            f"reward {name}: all {count} answers to an input score alike, for each of {rows} inputs, and they are "
            "compared with each other: take a finer score, or begin with a model whose answers differ"
        )


def _check_distribution(policy: Sampler, inputs: Tree, actions: Tree) -> None:
    """What is logged of every tuning, and what an anchor and a weight of the entropy need."""
    given = next(decided(policy, inputs, actions)).distribution
    if missing := [name for name in ("entropy", "kl") if not callable(getattr(given, name, None))]:
        raise InputError(
            f"policy: its forward gives the distribution {type(given).__name__} without {' and '.join(missing)}, "
            "expected one of foveate.distributions, or one with the same methods (torch.distributions have no kl)"
        )


def _check_repeatable(policy: Sampler, inputs: Tree, actions: Tree) -> None:
    off = 0.0
    for first, second in zip(*(decided(policy, inputs, actions) for _ in range(2)), strict=True):
        if first.log_probs is None or first.mask is None or second.log_probs is None:
            raise InputError("policy: its forward gives no log_probs or no mask, which a Sampler's must")
        off = max(off, float(torch.where(first.mask, first.log_probs - second.log_probs, 0.0).abs().max()))
    if off > 1e-5:
        raise InputError(
            f"policy: scores the same answers differently by {off:.2g} nats from one pass to the next, so no ratio "
            "would be 1: draw nothing at random in forward"
        )


@torch.no_grad()
def _check_drawn(policy: Sampler, inputs: Tree, drawn: Sequence[Tree]) -> None:
    """Log-probability plus entropy, summed over an answer, is 0 in the mean if it was drawn from what scores it.

    Answers that hardly vary show little of their own variance, as what is rare is not among them: the entropy is then
    about the least it can be.
    """
    gaps, entropies = [], []
    for actions in drawn:
        pieces = list(decided(policy, inputs, actions))
        if not all(hasattr(piece.distribution, "entropy") for piece in pieces):
            return
        entropies.append(torch.cat([piece.distribution.entropy() * piece.mask for piece in pieces], 1).sum(1))
        gaps.append(log_prob(policy, inputs, actions) + entropies[-1])
    gap, entropy = torch.cat(gaps).double(), torch.cat(entropies).double().mean()
    error = float((gap.var().clamp(min=float(entropy.clamp(0.0, 0.5))) / len(gap)).sqrt())
    if abs(away := float(gap.mean())) > 5 * error + 0.01 * abs(float(entropy)):
        raise InputError(
            f"policy: {len(gap)} answers it drew are {abs(away):.2g} nats {'more' if away > 0 else 'less'} probable "
            "than answers of the distribution that its forward gives: draw from that one, without another temperature, "
            "top-k or top-p, or score with the same in forward"
        )
