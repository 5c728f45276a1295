"""A reward from comparisons: which of two pictures is better, said by people or by a script, as a score of pictures.

| | |
|---|---|
| state | two pictures that answer one input |
| action | none is learned: an answer (left, right, tie) is given by a judge |
| reward | what is learned: a score of a picture whose differences are the log-odds of being preferred |
| horizon | one comparison |
| learner | maximum likelihood of Bradley and Terry's model, an ensemble on resamples of the comparisons |
| corner | reward: what the other corners are then trained on |

Christiano et al. 2017, "Deep reinforcement learning from human preferences" (arXiv 1706.03741), for single pictures
instead of clips of an agent's behaviour. What differs here and why, and how a model is tuned on it: docs/preferences.md
and docs/systems/reward-model.md.

    foveate prefer RUN                                                          people compare a run's answers
    foveate train reward-model --data comparisons --root RUN --minutes 2        learns from that
    foveate train reward-model --minutes 1                                      a scripted judge of recoloured pictures
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_images
from foveate.data.comparisons import Compared
from foveate.data.picture_folders import read_pictures
from foveate.learn.answers import answering
from foveate.learn.preferences import TIE, accuracy, bootstrap_counts, bradley_terry_loss, calibration_error, chances
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.picture_judges import PictureJudges, colour_statistics
from foveate.parts import tracked
from foveate.preferring import chosen, comparison_loss, judges_of, opened, recoloured
from foveate.rewards.colors import colorfulness
from foveate.run import Run
from foveate.types import Evaluation, InputError, check_least


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train reward-model`."""

    data: str = "photographs"
    """photographs (embedded, recoloured, compared by a script), or comparisons (of a run, made by foveate prefer)"""
    root: Path | None = None
    """folder of the run whose answers were compared; not needed for photographs"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates"""
    minutes: float | None = None
    """wall-clock budget"""
    pairs: int = 300
    """photographs: comparisons by the script"""
    noise: float = 0.1
    """photographs: probability that the script answers the other way round"""
    members: int = 5
    """networks, each trained on a resample of the comparisons; their disagreement is the uncertainty"""
    width: int = 4
    """features of a network at half size"""
    batch: int = 32
    """comparisons in an update"""
    learning_rate: float = 2e-3
    """peak of the one-cycle schedule"""
    decay: float = 1.0
    """of the weights (AdamW): few comparisons are soon known by heart"""
    flip: bool = True
    """mirror half of the pairs"""
    every: int = 25
    """updates between looks at the val split"""
    caution: float = 0.0
    """as a reward: standard deviations of the members that are taken off their mean"""
    picture_size: tuple[int, int] | None = None
    """width and height of the pictures; taken from the data"""


PART = "policy"  # the tracked part that holds the ensemble
SHARES = {"train": 0.65, "val": 0.15, "test": 0.2}  # of the inputs: answers to one input are in one split
LEAST = 20  # comparisons
BINS = 10  # of the curve of calibration


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range; no comparisons, too few, or all ties (`Comparisons.load`).
    """
    check_least(config, 1, "batch", "every", "members", "width")
    check_least(config, 0, "decay", "caution")
    if not 0 <= config.noise < 0.5:
        raise InputError(f"noise: found {config.noise:g}, expected at least 0 and less than 0.5")
    if config.pairs < LEAST:
        raise InputError(f"pairs: found {config.pairs}, expected at least {LEAST}")
    compared = _data(config)
    for split in SHARES:
        if not (_rows(config, compared, split).preferences != TIE).any():
            raise InputError(
                f"{config.root or config.data}: none of the {len(compared)} comparisons that fall into {split} prefers "
                "one of two; compare more of them"
            )
    height, width = compared.pictures.shape[2:]
    return replace(config, picture_size=(width, height))


def _data(config: Config) -> Compared:
    if config.data == "photographs":
        return recoloured(config.pairs, config.noise)
    if config.data != "comparisons":
        raise InputError(f"data: no {config.data!r}, expected photographs or comparisons")
    if config.root is None:
        raise InputError("root: not given, but the data are comparisons; add --root RUN, the run that was compared")
    return opened(config.root).load(LEAST)


def _rows(config: Config, compared: Compared, split: str) -> Compared:
    """The comparisons of a split."""
    place = noise.uniform(noise.key("split", compared.inputs))
    first = sum(list(SHARES.values())[: list(SHARES).index(split)])
    return chosen(compared, ((place >= first) & (place < first + SHARES[split] + 1e-9)).nonzero().flatten())


def build(config: Config) -> PictureJudges:
    """The ensemble of a resolved config, untrained."""
    return judges_of({"members": config.members, "width": config.width})


def train(config: Config, run: Run) -> None:
    """Bradley and Terry's likelihood, each member on its resample; the weights kept are the best on what is unseen.

    Unseen are val, and for each member what its resample left out, about 1/e of train.
    """
    compared = _data(config)
    train, val = (_rows(config, compared, split).to(run.device) for split in ("train", "val"))
    pixels = compared.pictures.to(run.device)
    both, wanted = _joined(train, val), torch.cat((train.preferences, val.preferences))
    torch.manual_seed(config.seed)
    judges = build(config).to(run.device)
    judges.begin(*(pixels[side].float() / 255 for side in (train.left, train.right)))
    kind = partial(torch.optim.AdamW, weight_decay=config.decay)
    judges, optimizer, keeper = tracked(run, PART, judges, kind, by="held_out_score")
    counts = bootstrap_counts(noise.key(config.seed, "resample"), config.members, len(train)).to(run.device)
    unseen = torch.cat((counts == 0, torch.ones(config.members, len(val), device=run.device)), 1)
    size = max(1, min(config.batch, len(train)) // run.processes) * run.processes

    def look() -> dict[str, Tensor]:
        left, right = (_scores(judges, pixels)[:, side] for side in both)
        held = accuracy(chances(left, right).mean(0)[len(train) :], val.preferences)
        return {
            "held_out_score": -bradley_terry_loss(left, right, wanted, unseen).mean(),
            "held_out_accuracy": held,
        }

    for step in run.steps("comparisons", 1.0):
        if step == 0:
            keeper.begin()
        index = torch.arange(size)[run.rows(size)]
        rows = noise.examples(config.seed, step, size, len(train))[index].to(run.device)
        keys = noise.key(config.seed, "mirrored", step, index).to(run.device)
        mirrored = (noise.uniform(keys, 1, 1, 1) < 0.5) & config.flip
        sides = (pixels[side[rows]].float() / 255 for side in (train.left, train.right))
        left, right = (torch.where(mirrored, side.flip(3), side) for side in sides)
        losses = comparison_loss(judges, left, right, train.preferences[rows], counts[:, rows])
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(losses.sum(), optimizer, clip=float(config.members))
        run.log(loss=losses.mean().detach())
        if (step + 1) % config.every == 0:
            found = look()
            keeper.offer(judges, found["held_out_score"])
            run.log(**found)
    keeper.finish(judges, look()["held_out_score"])
    judges.standardise(*(pixels[side].float() / 255 for side in (train.left, train.right)))
    run.save()


def _joined(first: Compared, second: Compared) -> tuple[Tensor, Tensor]:
    return torch.cat((first.left, second.left)), torch.cat((first.right, second.right))


@torch.no_grad()
def _scores(judges: PictureJudges, pixels: Tensor) -> Float[Tensor, "members size"]:
    with answering(judges):
        return torch.cat([judges(some.float() / 255) for some in pixels.split(250)], 1)


def _probabilities(judges: PictureJudges, pixels: Tensor, compared: Compared) -> Float[Tensor, "members pairs"]:
    """That the left one is preferred."""
    scores = _scores(judges, pixels).cpu()
    return chances(scores[:, compared.left], scores[:, compared.right])


def evaluate(config: Config, policy: PictureJudges, run: Run, elsewhere: bool = False) -> Evaluation:
    """Comparisons of held-out inputs, by the mean of the members' probabilities; `elsewhere`: all of another run.

    `accuracy`: share of answers that were thought the likelier, ties left out. `calibration_error`: expected
    calibration error (`foveate.learn.preferences`). `nll`: in nats, log 2 for always 1/2. `hidden_accuracy`, where a
    script answered: share of pairs in the order of its own score, without its errors. Baselines: `constant`, always
    1/2; `untrained`; `single`, a member alone, the mean over the members; and logistic regressions on the same
    comparisons: of means and spreads of the colours (`pixel_statistics`), of `colorfulness` alone.
    """
    compared = _data(config)
    height, width = compared.pictures.shape[2:]
    if (width, height) != config.picture_size:
        expected = "x".join(map(str, config.picture_size or ()))
        raise InputError(f"{config.root}: pictures of {width}x{height}, but the model was trained on {expected}")
    train, test = _rows(config, compared, "train"), compared if elsewhere else _rows(config, compared, "test")
    pixels = compared.pictures.to(run.device)
    members = _probabilities(policy, pixels, test)
    torch.manual_seed(config.seed)
    untrained = _probabilities(build(config).to(run.device), pixels, test)
    single = [_metrics(member, test) for member in members]
    baselines = {
        "constant": _metrics(torch.full_like(test.preferences, 0.5), test),
        "untrained": _metrics(untrained.mean(0), test),
        "single": {name: sum(row[name] for row in single) / len(single) for name in single[0]},
    }
    if not elsewhere:
        images = pixels.cpu().float() / 255
        baselines["pixel_statistics"] = _metrics(_regression(colour_statistics(images), train, test), test)
        baselines["colorfulness"] = _metrics(_regression(colorfulness(images).total[:, None], train, test), test)
    found = members.mean(0)
    curves = {
        "preferred against probability": {"ensemble": _reliability(found, test), "calibrated": [(0.0, 0.0), (1.0, 1.0)]}
    }
    return Evaluation(_metrics(found, test), baselines, curves)


def _metrics(probabilities: Float[Tensor, " pairs"], compared: Compared) -> dict[str, float]:
    wanted, hidden = compared.preferences, compared.hidden
    found = {
        "accuracy": accuracy(probabilities, wanted),
        "calibration_error": calibration_error(probabilities, wanted),
        "nll": F.binary_cross_entropy(probabilities, wanted),
    }
    told = hidden.isfinite().all(1) & (hidden[:, 0] != hidden[:, 1])
    if told.any():
        found["hidden_accuracy"] = accuracy(probabilities[told], (hidden[told, 0] > hidden[told, 1]).float())
    return {name: float(value) for name, value in found.items()}


def _regression(features: Float[Tensor, "size features"], train: Compared, test: Compared) -> Float[Tensor, " pairs"]:
    """The probabilities of a logistic regression on differences of features, with a weak ridge."""
    reach = (features[train.left] - features[train.right]).square().mean(0).sqrt()  # what differs within pairs
    scaled = (features / reach.clamp(min=1e-6)).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = bradley_terry_loss(
            scaled[train.left] @ weights, scaled[train.right] @ weights, train.preferences.double()
        )
        found = found + 1e-3 * weights.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        return chances(scaled[test.left] @ weights, scaled[test.right] @ weights).float()


def _reliability(probabilities: Float[Tensor, " pairs"], compared: Compared) -> list[tuple[float, float]]:
    """How often what had a probability came true, a point for each bin that is not empty; pairs counted both ways."""
    both = torch.cat((probabilities, 1 - probabilities))
    wanted = torch.cat((compared.preferences, 1 - compared.preferences))
    place = (both * BINS).long().clamp(0, BINS - 1)
    inside = [place == number for number in range(BINS)]
    return [(float(both[each].mean()), float(wanted[each].mean())) for each in inside if each.any()]


@torch.no_grad()
def predict(
    config: Config, policy: PictureJudges, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Score images in [0, 1]: `rewards` [batch], which answers to one input have by about 1 apart, and their `doubt`.

    Raises:
        InputError: the images break the convention, or have another size than those that were compared.
    """
    check_images(images, "images")
    assert config.picture_size is not None
    width, height = config.picture_size
    if tuple(images.shape[2:]) != (height, width):
        found = f"{images.shape[3]}x{images.shape[2]}"
        raise InputError(f"images: {found}, but pictures of {width}x{height} were compared: resize them")
    with answering(policy):
        scores = policy.rewards(images.to(next(policy.parameters()).device).expand(-1, 3, -1, -1))
    return {"rewards": scores.mean(0), "doubt": scores.std(0, correction=0)}


def picture(
    config: Config, policy: PictureJudges, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Held-out pictures, or the user's, from the lowest reward to the highest; held-out pairs with their answers."""
    drawn = {}
    if images is None:
        compared = _data(config)
        test = _rows(config, compared, "test")
        used = torch.cat((test.left, test.right)).unique()
        images = compared.pictures[used[torch.linspace(0, len(used) - 1, min(32, len(used))).long()]].float() / 255
        first = chosen(test, torch.arange(min(12, len(test))))
        found = _probabilities(policy, compared.pictures.to(run.device), first).mean(0)
        drawn["comparisons"] = _pairs(first, [f"{one:.0%}" for one in found.tolist()])
    rewards = predict(config, policy, images)["rewards"].cpu()
    order = rewards.argsort(stable=True)
    captions = [f"{value:+.2f}" for value in rewards[order].tolist()]
    return {"rewards": pictures.image_grid(images.cpu()[order].expand(-1, 3, -1, -1), captions, 8, 96)} | drawn


def _pairs(compared: Compared, thoughts: list[str]) -> Any:
    """Left and right of each comparison, what was said of it, and what is thought of it."""
    tiles = torch.stack((compared.pictures[compared.left], compared.pictures[compared.right]), 1).flatten(0, 1)
    said = {1.0: ("preferred", ""), 0.0: ("", "preferred"), TIE: ("tie", "tie")}
    captions = []
    for value, thought in zip(compared.preferences.tolist(), thoughts, strict=True):
        left, right = said[value]
        captions += [f"{left} {thought}".strip(), right]
    return pictures.image_grid(tiles.float() / 255, captions, 8, 96)


def read(config: Config, path: Path) -> Float[Tensor, "batch 3 height width"]:
    """The user's picture, or the pictures of a folder, as the ensemble takes them."""
    assert config.picture_size is not None
    width, height = config.picture_size
    return read_pictures(path, 3, width if width == height else None)


def check(config: Config) -> dict[str, Any]:
    """The first comparisons with their answers."""
    compared = _data(config)
    compared = chosen(compared, torch.arange(min(16, len(compared))))
    return {"data": _pairs(compared, [""] * len(compared))}
