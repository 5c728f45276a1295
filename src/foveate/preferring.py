"""Preferences as a reward: pairs of a model's answers to ask about, a scripted judge, and the reward that was learned.

Christiano et al. 2017, "Deep reinforcement learning from human preferences" (arXiv 1706.03741), for pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate import noise
from foveate.colors import coloured, light_and_chroma
from foveate.data.comparisons import ANSWERS, Answer, Compared, Comparisons, Proposal
from foveate.data.photographs import load_photographs
from foveate.learn.answers import Reward, answering, repeat
from foveate.learn.preferences import bootstrap_counts, bradley_terry_loss, chances, information
from foveate.learn.schedule import set_learning_rate
from foveate.models.picture_judges import PictureJudges
from foveate.rewards.colors import colorfulness
from foveate.rewards.combine import check_output, guarded
from foveate.run import Run
from foveate.run import folder as run_folder
from foveate.types import InputError, RewardOutput, Sampler, Tree, map_tree, rows_of

Choose = Literal["random", "uncertain"]

FOLDER = "preferences"  # of a run's folder
AT_ONCE = 25  # pairs drawn together
CANDIDATES = 8  # pairs that are looked at for each that is asked about
FIRST = 20  # comparisons from which uncertainty is told; random before
STEPS = 100  # of the members that tell it


@dataclass(frozen=True)
class Asked:
    """What is compared: a model's answers to inputs, two to one input.

    Attributes:
        policy: what answers.
        inputs: a tree whose tensors begin with the batch.
        shown: (answers as the reward takes them, their inputs) → RGB in [0, 1], [batch, 3, height, width].
        seed: of the draws: pair number n of a seed is always the same.
    """

    policy: Sampler
    inputs: Tree
    shown: Callable[[Any, Any], Tensor]
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures of number `ids`, uint8, and which input they answer."""

    ids: Int[Tensor, " pairs"]
    inputs: Int[Tensor, " pairs"]
    left: UInt8[Tensor, "pairs 3 height width"]
    right: UInt8[Tensor, "pairs 3 height width"]


def identity(folder: Path) -> str:
    """What tells a run from others: its system, settings, seed and when it was begun, hashed.

    Raises:
        InputError: the folder holds no run.
    """
    record = run_folder.read(folder)
    told = {name: record.get(name) for name in ("system", "config", "seed", "created")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def opened(folder: Path, question: str | None = None, make: bool = False) -> Comparisons:
    """The comparisons of a run's answers.

    Raises:
        InputError: the folder holds no run, or what `Comparisons` raises.
    """
    return Comparisons(folder / FOLDER, identity(folder), question, make)


@torch.no_grad()
def draw_pairs(asked: Asked, ids: Int[Tensor, " pairs"]) -> Pairs:
    """Two answers to one input for each number, drawn independently, so that either may stand left."""
    device = next(asked.policy.parameters()).device
    keys = noise.key(asked.seed, "pair", ids)
    rows = noise.integers(noise.fold(keys, "input"), rows_of(asked.inputs))
    pictures = []
    with answering(asked.policy):
        for some, draws in zip(rows.split(AT_ONCE), keys.split(AT_ONCE), strict=True):
            inputs = map_tree(lambda leaf: leaf[some.to(leaf.device)], asked.inputs)  # noqa: B023
            answers = asked.policy.decode(asked.policy.sample(inputs, 2, False, draws.to(device)))
            images = asked.shown(answers, repeat(inputs, 2))
            pictures.append((255 * images).round().clamp(0, 255).byte().cpu())
    left, right = torch.cat(pictures).unflatten(0, (-1, 2)).unbind(1)
    return Pairs(ids, rows, left, right)


def propose(store: Comparisons, asked: Asked, count: int, choose: Choose = "random") -> None:
    """Add pairs to ask about, `count` or somewhat fewer: such as look alike are left out.

    Args:
        store: takes them.
        asked: gives them.
        count: how many.
        choose: "uncertain": of `CANDIDATES` times as many, those about which an ensemble that was fitted to the
            comparisons so far disagrees most (`foveate.learn.preferences.information`).

    Raises:
        InputError: all pairs look alike.
    """
    first = store.next_id()
    many = count * CANDIDATES if choose == "uncertain" else count
    pairs = draw_pairs(asked, first * CANDIDATES + torch.arange(many))
    differ = (pairs.left != pairs.right).flatten(1).any(1)
    if not differ.any():
        raise InputError(
            f"answers: {many} times two answers to one input were drawn, and all look alike: there is nothing to "
            "compare; choose another --part, or train it on likelihood for longer"
        )
    pairs = map_tree(lambda leaf: leaf[differ], pairs)
    chosen: Choose = "random"
    if choose == "uncertain" and sum(store.counts()[answer] for answer in ("left", "right", "tie")) >= FIRST:
        judges = fit(store.load(), noise.key(asked.seed, "judges", first))
        with torch.no_grad():
            probabilities = chances(judges(pairs.left.float() / 255), judges(pairs.right.float() / 255))
        order = information(probabilities).argsort(descending=True, stable=True)
        pairs, chosen = map_tree(lambda leaf: leaf[order], pairs), "uncertain"
    pairs = map_tree(lambda leaf: leaf[:count], pairs)
    store.propose(
        [
            Proposal(first + place, int(pairs.inputs[place]), pairs.left[place], pairs.right[place], chosen)
            for place in range(len(pairs.ids))
        ]
    )


def comparison_loss(
    judges: PictureJudges,
    left: Float[Tensor, "pairs 3 height width"],
    right: Float[Tensor, "pairs 3 height width"],
    preferences: Float[Tensor, " pairs"],
    weights: Float[Tensor, "members pairs"] | None = None,
) -> Float[Tensor, " members"]:
    """The Bradley-Terry loss of each member on comparisons of pictures."""
    scores = judges(torch.cat((left, right)))
    return bradley_terry_loss(scores[:, : len(left)], scores[:, len(left) :], preferences, weights)


def fit(
    compared: Compared, key: Int[Tensor, ""], members: int = 5, width: int = 4, rate: float = 1e-2
) -> PictureJudges:
    """Judges fitted to comparisons in a second, each to a resample of its own: to tell where they disagree.

    Their convolutions stay as they were drawn, each member's own, and what is read from them is learned. Everything
    follows from the key; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(key) % 2**63)
        judges = PictureJudges(members, width)
    judges.begin(*(compared.pictures[side].float() / 255 for side in (compared.left, compared.right)))
    with torch.no_grad():
        features = torch.cat([judges.features(some.float() / 255) for some in compared.pictures.split(250)])
    learned = [*judges.read.parameters(), *judges.judge.parameters()]
    optimizer = torch.optim.AdamW(learned, rate, weight_decay=0.1)
    counts = bootstrap_counts(key, members, len(compared))
    for step in range(STEPS):
        scores = judges.weigh(features)
        left, right = scores[:, compared.left], scores[:, compared.right]
        loss = bradley_terry_loss(left, right, compared.preferences, counts).sum()
        set_learning_rate(optimizer, rate * (1 - step / STEPS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judges.eval()


def answer_by_script(store: Comparisons, score: Reward, name: str, flip: float, seed: int, count: int) -> int:
    """Let a hidden score answer the pairs that wait, with noise; how many it answered.

    Args:
        store: whose pairs.
        score: of pictures; their targets are None. The larger is preferred, the same is a tie.
        name: of the judge.
        flip: probability that an answer is the other way round, of a judge who errs.
        seed: of the errors.
        count: answer at most so many.

    Raises:
        InputError: the score raises or is NaN; that pair is not answered.
    """
    judge, window = guarded(score, name=name), f"script {name}"
    answered = 0
    while answered < count and (pair := store.claim(window)) is not None:
        pictures = torch.stack([store.picture(pair.left), store.picture(pair.right)]).float() / 255
        left, right = judge(pictures, None).total.tolist()
        wrong = bool(noise.uniform(noise.key(seed, "error", pair.id)) < flip)
        answer: Answer = "tie" if left == right else ("left", "right")[(left < right) != wrong]
        store.answer(pair.id, answer, window, window, (left, right))
        answered += 1
    return answered


def collect_by_script(
    store: Comparisons,
    asked: Asked,
    score: Reward,
    name: str,
    count: int,
    *,
    choose: Choose = "random",
    flip: float = 0.1,
    every: int = 20,
) -> dict[str, int]:
    """Ask a scripted judge until there are `count` answers; goes on where another call was stopped.

    Args:
        store: takes them.
        asked: what is compared.
        score: the judge's hidden score.
        name: of the judge.
        count: answers in the folder at the end, those that are there already among them.
        choose: which pairs (`propose`).
        flip: probability of an error, at least 0 and less than 1/2.
        every: pairs between two choices; those that are left over wait.

    Raises:
        InputError: a field is out of its range, or the score is none.
    """
    if not 0 <= flip < 0.5:
        raise InputError(f"noise: found {flip:g}, expected at least 0 and less than 0.5, where answers say nothing")
    if count < 1:
        raise InputError(f"comparisons: found {count}, expected at least 1")
    sample = draw_pairs(asked, torch.arange(8))
    check_output(guarded(score, name=name)(torch.cat((sample.left, sample.right)).float() / 255, None), 16, name)
    while (have := sum((counts := store.counts())[answer] for answer in ANSWERS)) < count:
        if not counts["waiting"]:
            propose(store, asked, every, choose)
        answer_by_script(store, score, name, flip, asked.seed, count - have)
    return counts


@lru_cache(maxsize=2)
def recoloured(pairs: int, error: float) -> Compared:
    """Crops of embedded photographs, each recoloured twice by chance; a script prefers the more colourful one.

    Args:
        pairs: how many.
        error: probability that it answers the other way round.
    """
    data = load_photographs("photographs", None, "train")
    keys = noise.key("recoloured", torch.arange(pairs))
    images = data[noise.integers(noise.fold(keys, "crop"), len(data))].float() / 255
    light, chroma = (leaf.repeat_interleave(2, 0) for leaf in light_and_chroma(images))
    gain = 2 * noise.uniform(noise.fold(keys, "gain"), 2).flatten()[:, None, None, None]
    shift = 0.2 * noise.normal(noise.fold(keys, "shift"), 2, 2).flatten(0, 1)[:, :, None, None]
    shown = (255 * coloured(light, gain * chroma + shift)).round().byte()
    hidden = colorfulness(shown.float() / 255).total.unflatten(0, (-1, 2))
    wrong = noise.uniform(noise.fold(keys, "error")) < error
    preferences = ((hidden[:, 0] > hidden[:, 1]) != wrong).float()
    left = 2 * torch.arange(pairs)
    return Compared(shown, left, left + 1, preferences, torch.arange(pairs), hidden)


def judges_of(config: dict[str, Any]) -> PictureJudges:
    """The untrained judges of a run of `reward-model`, from its settings."""
    return PictureJudges(config["members"], config["width"])


def preference_reward(run: str) -> Reward:
    """What a run of `reward-model` learned, as a reward of pictures: `--reward preference:RUN`.

    The total is the mean over the members of their standardised scores, less `caution` standard deviations of them.
    `parts` "preferred" and "doubt", which is at most 0, sum to the total. Targets are not used.

    Raises:
        InputError: no run there, of another system, or without a checkpoint. The reward: pictures of another kind or
            size than those that were compared.
    """
    opened = Run.open(Path(run), "cpu")
    if opened.system != "reward-model":
        raise InputError(
            f"reward: {run} is a run of {opened.system}, expected one of reward-model, made of comparisons"
        )
    judges = judges_of(opened.config)
    if not opened.restore("policy", judges):
        raise InputError(f"reward: {run}: its checkpoint holds no reward model; train it anew")
    judges.eval().requires_grad_(False)
    width, height = opened.config["picture_size"]
    caution = opened.config["caution"]

    @torch.no_grad()
    def reward(predictions: Any, targets: Any = None) -> RewardOutput:
        shape = tuple(getattr(predictions, "shape", ()))
        if len(shape) != 4 or shape[1] not in (1, 3) or not predictions.is_floating_point():
            found = f"{list(shape)}" if shape else type(predictions).__name__
            raise InputError(
                f"reward preference:{run}: judges images [batch, 1 or 3, {height}, {width}] in [0, 1], found {found}: "
                "tune a system whose answers are pictures"
            )
        if shape[2:] != (height, width):
            raise InputError(
                f"reward preference:{run}: judges pictures of {width}x{height}, found {shape[3]}x{shape[2]}; compare "
                "pictures of that size, and train a reward model on them"
            )
        judges.to(predictions.device)
        scores = judges.rewards(predictions.float().expand(-1, 3, -1, -1))  # grey as it was shown
        doubt = -caution * scores.std(0, correction=0)
        preferred = scores.mean(0)
        return RewardOutput(preferred + doubt, {"preferred": preferred, "doubt": doubt})

    return reward


def chosen(compared: Compared, rows: Int[Tensor, " some"]) -> Compared:
    """Some of the comparisons; the pictures stay."""
    names = ("left", "right", "preferences", "inputs", "hidden")
    return replace(compared, **{name: getattr(compared, name)[rows] for name in names})
