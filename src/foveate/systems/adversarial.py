"""Paint digits with strokes, rewarded by a discriminator: a GAN whose generator cannot be differentiated.

| | |
|---|---|
| state | the canvas, the cell the pen is at, the strokes left, and what is to be painted: a class |
| action | a pen and a cell: go there lifted, or down in one of several widths, which leaves a straight stroke |
| reward | what the stroke adds to the score of a discriminator, which learns to tell paintings from real pictures |
| horizon | 12 strokes |
| learner | actor-critic (A2C) for the painter; cross-entropy with a gradient penalty for the discriminator |
| corner | policy and reward |

After SPIRAL: Ganin et al. 2018, "Synthesizing programs for images using reinforced adversarial learning" (arXiv
1804.01118), and Mellor et al. 2019, "Unsupervised doodling and painting with improved SPIRAL" (arXiv 1910.01007).
Beside it a plain GAN of like size, against a discriminator of the same kind, for as long. What differs here and why,
and the numbers: docs/systems/adversarial.md.

    foveate train adversarial --minutes 20
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate import noise
from foveate.data.classification import Images, check_shape, evaluation_split, held_out_split, load_images, shuffled
from foveate.data.picture_folders import read_pictures
from foveate.envs.painting import MARGIN, PENS, Credit, PaintingEnv, Score, check_grey, shown
from foveate.envs.painting_play import painted, traced
from foveate.judging import Judge, Watch, learn_to_judge
from foveate.learn.actor_critic import actor_critic_loss
from foveate.learn.adversarial import generator_loss, telling_loss
from foveate.learn.keeper import Keeper
from foveate.learn.rollout import rollout
from foveate.learn.schedule import level, set_learning_rate
from foveate.models.adversaries import Adversaries, Discriminator, ImageGenerator
from foveate.models.painter import Painter, Scribbler
from foveate.parts import learning, restored
from foveate.pictures import denoising, painting
from foveate.run import Run
from foveate.types import Evaluation, InputError, check_least


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train adversarial`."""

    data: str = "digits"
    """digits (embedded), mnist, fashion-mnist, or folder, of grey pictures"""
    root: Path | None = None
    """folder of the data; not needed for digits"""
    image_size: int = 16
    """side in pixels, a multiple of 4"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together; the painter and the GAN share evenly what the judge leaves"""
    judge_share: float = 0.05
    """part of the budget in which the classifier learns that watches both and that nothing optimises"""
    strokes: int = 12
    """of a painting"""
    grid: int = 8
    """cells a side where the pen can go"""
    margin: float = MARGIN
    """around them, in sides of the picture"""
    pens: tuple[float, ...] = PENS
    """widths in sides of the picture; the lifted pen is there beside"""
    credit: Credit = "gains"
    """gains: each stroke is rewarded with what it changes in the score; end: the last with all of it"""
    batch: int = 64
    """paintings, and as many real pictures, in an update"""
    learning_rate: float = 3e-3
    """of the painter; as all rates it falls evenly to 0 in the second half"""
    generator_rate: float = 5e-4
    """of the GAN's generator"""
    discriminator_rate: float = 5e-4
    """of both discriminators"""
    penalty: float = 1.0
    """weight of the squared norm of the painter's discriminator's gradient at real pictures (R1)"""
    gan_penalty: float = 0.1
    """the same of the GAN's"""
    blur: float = 0.1
    """standard deviation of noise on the pictures that a discriminator learns from"""
    lam: float = 0.95
    """λ of the advantages; nothing is discounted"""
    entropy: float = 0.01
    """weight of the entropy of a stroke, in nats; it falls as the rates do"""
    every: int = 100
    """updates between looks at held-out scores"""
    looks: int = 200
    """images made for each look"""
    images: int = 500
    """images made of each model to evaluate it"""
    classes: tuple[str, ...] | None = None
    """taken from the data"""


Parts: TypeAlias = tuple[Adversaries, torch.optim.Optimizer, torch.optim.Optimizer, Keeper]
PART = "painter"  # the tracked part that holds the policy: the painter and its discriminator
load = lru_cache(maxsize=6)(load_images)


def resolve(config: Config) -> Config:
    """Check the fields and the data, of which it takes the classes; raises `InputError`."""
    check_least(config, 1, "image_size", "batch", "every", "looks", "images")
    if not 0 < config.judge_share < 1:
        raise InputError(f"judge_share: found {config.judge_share:g}, expected more than 0 and less than 1")
    for name in ("penalty", "gan_penalty", "blur", "entropy"):
        if getattr(config, name) < 0:
            raise InputError(f"{name}: found {getattr(config, name):g}, expected 0 (none) or more")
    for split in ("train", "val", held_out_split(config.data, config.root)):  # now, not after hours
        check_grey(images := load(config.data, config.root, split, config.image_size))
    config = replace(config, classes=images.classes)
    _env(config, 1, torch.device("cpu"))  # says what is wrong with strokes, grid and pens
    build(config)  # and with the image's size
    return config


def _kinds(config: Config) -> int:
    return len(config.classes or ())


def build(config: Config) -> Adversaries:
    """Painter and discriminator of a resolved config, untrained."""
    side, kinds = config.image_size, _kinds(config)
    return Adversaries(Painter(side, config.grid, 1 + len(config.pens), kinds), Discriminator(side, kinds))


def _gan(config: Config) -> Adversaries:
    given = config.image_size, _kinds(config)
    return Adversaries(ImageGenerator(*given), Discriminator(*given))


def _unscored(images: Tensor, kinds: Tensor) -> Tensor:
    return images.new_zeros(len(images))


def _env(config: Config, copies: int, device: torch.device, score: Score = _unscored) -> PaintingEnv:
    how: dict[str, Any] = {name: getattr(config, name) for name in ("image_size", "grid", "margin", "strokes", "pens")}
    how |= {"credit": "end" if score is _unscored else config.credit, "kinds": _kinds(config)}
    return PaintingEnv(copies, score=score, device=device, autoreset="disabled", **how)


def _pixels(config: Config, split: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    found: Images = load(config.data, config.root, split, config.image_size)
    return shuffled(found, config.classes or (), 1, device)


def _asked(config: Config, name: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every kind as often, and a key of each image."""
    places = torch.arange(count)
    return (places % _kinds(config)).to(device), noise.key(config.seed, name, places).to(device)


def train(config: Config, run: Run) -> None:
    """The judge, then painter and discriminator, then generator and discriminator for as long."""
    judge = learning(run, "judge", Judge(1, _kinds(config)))
    painter, gan = (_adversaries(config, run, name, make) for name, make in ((PART, build), ("gan", _gan)))
    data, val = (_pixels(config, split, run.device) for split in ("train", "val"))
    learn_to_judge(run, config.judge_share, {"judge": judge}, *data, config.batch)
    watch, (kinds, keys) = Watch(judge[0], *val), _asked(config, "look", config.looks, run.device)

    def look(parts: Parts, make: Callable[..., Tensor]) -> dict[str, Tensor]:
        found = watch(make(config, parts[0].generator, kinds, keys), kinds)
        parts[3].offer(parts[0], -found["distance"])
        return {f"held_out_{name}": value for name, value in found.items()}

    for name, parts, learn, make in ((PART, painter, _paint_better, _paint), ("gan", gan, _draw_better, _draw)):
        env = _env(config, config.batch // run.processes, run.device, parts[0].discriminator.reward)
        for step in run.steps(name, (1 - config.judge_share) / 2):
            if step == 0:
                parts[3].begin()
            real, asked, own = _batch(config, run, data, name, step)
            made = learn(config, run, parts, env, asked, own)
            _tell_better(config, run, parts, real, made, asked, own)
            if (step + 1) % config.every == 0:
                run.log(**look(parts, make))
        look(parts, make)
        parts[0].load_state_dict(parts[3].best.state_dict())
        run.save()


def _adversaries(config: Config, run: Run, name: str, make: Callable[[Config], Adversaries]) -> Parts:
    torch.manual_seed(config.seed)
    pair = make(config).to(run.device)
    first = torch.optim.Adam(pair.generator.parameters(), betas=(0.9 if name == PART else 0.5, 0.99))
    second = torch.optim.Adam(pair.discriminator.parameters(), betas=(0.5, 0.99))
    keeper = Keeper(pair, by="held_out_distance")
    run.track(**{name: pair, f"{name}_optimizer": first, f"{name}_discriminator": second, f"{name}_keeper": keeper})
    return pair, first, second, keeper


def _batch(config: Config, run: Run, data: tuple[Tensor, Tensor], name: str, step: int) -> tuple[Tensor, ...]:
    """Real pictures, their kinds, which are asked for too, and a key of each."""
    rows = run.rows(config.batch)
    chosen = noise.examples(config.seed, step, config.batch, len(data[1]))[rows].to(run.device)
    keys = noise.key(run.seed, name, step, torch.arange(config.batch)[rows]).to(run.device)
    return data[0][chosen], data[1][chosen], keys


def _paint_better(config: Config, run: Run, parts: Parts, env: PaintingEnv, kinds: Tensor, keys: Tensor) -> Tensor:
    """The painter's update, by the policy gradient of the discriminator's score. Returns the paintings."""
    pair, optimizer, *_ = parts
    trajectory, decisions = rollout(env, pair.generator, keys, ids=kinds, grad=True)
    assert decisions is not None
    loss, told = actor_critic_loss(trajectory, decisions, 1.0, config.lam, level(run.progress, config.entropy))
    set_learning_rate(optimizer, level(run.progress, config.learning_rate))
    run.optimise(loss, optimizer, clip=1.0)
    run.log(**told)
    return shown(env.state.canvas)


def _draw_better(config: Config, run: Run, parts: Parts, env: PaintingEnv, kinds: Tensor, keys: Tensor) -> Tensor:
    """The generator's update: the gradient goes through the discriminator. Returns the images."""
    pair, optimizer, *_ = parts
    images = pair.generator(kinds, keys)
    loss = generator_loss(pair.discriminator(images, kinds))
    set_learning_rate(optimizer, level(run.progress, config.generator_rate))
    run.optimise(loss, optimizer)
    run.log(generator_loss=loss.detach())
    return images.detach()


def _tell_better(
    config: Config, run: Run, parts: Parts, real: Tensor, made: Tensor, kinds: Tensor, keys: Tensor
) -> None:
    """The discriminator's update."""
    discriminator, optimizer = parts[0].discriminator, parts[2]
    optimizer.zero_grad(set_to_none=True)  # the generator's loss went through it
    dust = config.blur * noise.normal(noise.fold(keys, "blur"), 2, *real.shape[1:])
    penalty = config.penalty if isinstance(parts[0].generator, Painter) else config.gan_penalty
    loss, told = telling_loss(discriminator, real + dust[:, 0], made + dust[:, 1], kinds, penalty)
    set_learning_rate(optimizer, level(run.progress, config.discriminator_rate))
    run.optimise(loss, optimizer)
    discriminator.notice(run.mean((told["real"] + told["made"]) / 2), run.mean(told["deviation"]))
    run.log(**told)


def _paint(config: Config, painter: nn.Module, kinds: Tensor, keys: Tensor) -> Float[Tensor, "batch 1 side side"]:
    return painted(_env(config, len(kinds), kinds.device), painter, kinds, keys)[0]


def _draw(config: Config, generator: Any, kinds: Tensor, keys: Tensor) -> Float[Tensor, "batch 1 side side"]:
    return generator.drawn(kinds, keys)


def evaluate(config: Config, policy: Adversaries, run: Run, elsewhere: bool = False) -> Evaluation:
    """As many images of each class by every maker, beside test images, by a classifier that nothing optimised.

    `judge_accuracy`: how often it sees the class that was asked for. `frechet_distance`: to test images in its
    features. `diversity`: distance of two images of a class there, 1 is that of test images. `reward`: what the
    painter's discriminator says, in deviations of its scores. Rows: the plain `gan`; the `untrained` painter; `random`
    strokes; test images `traced` greedily with as many; real validation images (`data`).
    """
    test = _pixels(config, (evaluation_split if elsewhere else held_out_split)(config.data, config.root), run.device)
    judge = restored(run, {"judge": "judge"}, partial(Judge, 1, _kinds(config)))["judge"]
    watch, (kinds, keys) = Watch(judge, *test), _asked(config, "evaluate", config.images, run.device)
    env = _env(config, 1, run.device)
    torch.manual_seed(config.seed)
    made = {
        "painter": (_paint(config, policy.generator, kinds, keys), kinds),
        "untrained": (_paint(config, build(config).to(run.device).generator, kinds, keys), kinds),
        "random": (_paint(config, Scribbler(env.actions), kinds, keys), kinds),
        "traced": (traced(env, test[0][: config.images]), test[1][: config.images]),
    }
    for name, gan in restored(run, {"gan": "gan"}, partial(_gan, config)).items():
        made[name] = _draw(config, gan.generator, kinds, keys), kinds
    real, labels = _pixels(config, "val", run.device)
    made["data"] = real[: config.images], labels[: config.images]
    rows = {name: _row(policy.discriminator, watch, *images) for name, images in made.items()}
    return Evaluation(rows.pop("painter"), rows)


def _row(discriminator: Discriminator, watch: Watch, images: Tensor, kinds: Tensor) -> dict[str, float]:
    found = watch(images, kinds)
    row = {"judge_accuracy": found["accuracy"], "frechet_distance": found["distance"], "diversity": found["diversity"]}
    row["reward"] = discriminator.reward(images, kinds).mean()
    return {name: float(value) for name, value in row.items()}


def predict(
    config: Config, policy: Adversaries, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """What the discriminator thinks of grey pictures in [0, 1], and a painting beside each.

    Returns `scores` [batch, classes]: how real each looks as each class, in deviations of the scores of training;
    `kinds` [batch], the class as which it looks most real; `paintings` [batch, 1, side, side] of these classes, and
    `strokes` [batch, strokes], the actions by which they were painted (`foveate.envs.painting`).
    """
    check_shape(images, "images", (1, config.image_size, config.image_size))
    device = next(policy.parameters()).device
    scores = policy.discriminator.rewards(images.to(device))
    kinds, keys = scores.argmax(1), noise.key(config.seed, "predict", torch.arange(len(images))).to(device)
    paintings, strokes = painted(_env(config, len(kinds), device), policy.generator, kinds, keys)
    return {"scores": scores, "kinds": kinds, "paintings": paintings, "strokes": strokes}


def picture(
    config: Config, policy: Adversaries, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Paintings beside the GAN's images and real ones, and how they come about; or what stands beside the user's."""
    names = (config.classes or ())[:10]
    if images is not None:
        found = predict(config, policy, images)
        known, sure = found["kinds"].tolist(), found["scores"].amax(1).tolist()
        said = [f"{(config.classes or ())[kind]}: {score:.2f}" for kind, score in zip(known, sure, strict=True)]
        return {"judged": painting.pairs(images, found["paintings"], said)}
    kinds, keys = _asked(replace(config, classes=names), "picture", 4 * len(names), run.device)
    env = _env(config, len(kinds), run.device)
    paintings, strokes = painted(env, policy.generator, kinds, keys)
    steps = [env.draw(state) for state in env.played(kinds, strokes)]
    made = {"painter": paintings}
    for name, gan in restored(run, {"gan": "gan"}, partial(_gan, config)).items():
        made[name] = _draw(config, gan.generator, kinds, keys)
    real, labels = _pixels(config, "train", run.device)
    each = [real[labels == kind] for kind in range(len(names))]
    made["real"] = torch.stack([some[place % len(some)] for place in range(4) for some in each])
    return {
        "paintings": painting.beside(made, names, 4),
        "step by step": painting.step_by_step([step[: len(names)] for step in steps], names),
        "painting": painting.frames(steps, names),
    }


def read(config: Config, path: Path) -> Float[Tensor, "batch 1 side side"]:
    """The user's picture, or the pictures of a folder, in grey and of the size of the canvas."""
    return read_pictures(path, 1, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures of the data with their classes."""
    images, labels = _pixels(config, "train", torch.device("cpu"))
    return {"data": denoising.labelled(images[:20], [(config.classes or ())[kind] for kind in labels[:20].tolist()])}
