"""Tune a diffusion model on a score of its finished images: denoising as a sequence of decisions.

| | |
|---|---|
| state | the noisy image, the step, and what the image is to show: a class or a prompt |
| action | the next, less noisy image, drawn from the scheduler's Gaussian |
| reward | at the end: any score of the finished image |
| horizon | the steps of the scheduler that have a variance |
| learner | denoising loss, then REINFORCE or PPO's clipped ratio, advantages normalised in each class or prompt |
| corner | policy |

Black et al. 2023, "Training diffusion models with reinforcement learning" (DDPO, arXiv 2305.13301); the anchor is that of
Fan et al. 2023, "DPOK" (arXiv 2305.16381), exact at every step. Rewards that are not optimised stand beside the one that
is. What differs here and why, and the numbers: docs/systems/diffusion.md and docs/results.md.

    foveate train diffusion --minutes 10                                        embedded digits, compressibility
    foveate train diffusion --reward class --likelihood-share 0.15 --minutes 10
    foveate train diffusion --model hf:FOLDER --prompts prompts.txt --lora 4 --reward colorfulness --minutes 60
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate import noise
from foveate.data.classification import Images, check_images, check_kind, evaluation_split, held_out_split, load_images
from foveate.data.picture_folders import read_pictures
from foveate.judging import Judge, Thumbnails, Watch, drawn_images, learn_to_judge, mix
from foveate.learn.answers import Precision, Reward, Tuning, answering, divergence, repeat
from foveate.learn.baselines import MovingAverage, group_normalised
from foveate.models.diffusion import Denoiser, Noised
from foveate.models.low_rank import Unadapted, take_start
from foveate.models.named_denoisers import SMALL, named_denoiser, read_prompts
from foveate.pictures import denoising
from foveate.rewards.named_images import image_reward
from foveate.run import Run
from foveate.two_steps import learn_likelihood, restored, tracked, tune_on_reward
from foveate.types import Evaluation, InputError


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train diffusion`. What defaults to None is chosen by the data and printed."""

    data: str = "digits"
    """digits (embedded), mnist, fashion-mnist, or folder; with prompts: not used"""
    root: Path | None = None
    """folder of the data; not needed for digits"""
    image_size: int | None = None
    """side in pixels; None: 16 for digits, else 32; hf:NAME says it itself"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    judge_share: float = 0.05
    """part of the budget in which the classifiers learn that watch and reward"""
    likelihood_share: float = 0.4
    """part for the denoising loss, 0 for a model that has it; the rest is shared by the anchors and the control"""
    model: str = SMALL
    """small, hf:FOLDER, or hf:REPOSITORY (is downloaded): a pipeline of diffusers"""
    prompts: Path | None = None
    """file with a prompt a line, for a pipeline with a text encoder"""
    lora: int = 0
    """rank of the low-rank update that is tuned instead of all weights; 0: all"""
    widths: tuple[int, ...] = (32, 64, 64)
    """small: features of each level of the U-Net, each half as large as the one before"""
    scheduler: Literal["own", "ddim", "ddpm"] = "own"
    """whose steps are drawn; own: what the pipeline has, or DDIM"""
    denoising: int = 12
    """steps from noise to image"""
    eta: float = 1.0
    """how random DDIM's steps are, above 0; 1: as DDPM's"""
    guidance: float = 1.0
    """classifier-free guidance; 1: none"""
    batch: int = 64
    """images in an update of the denoising loss"""
    learning_rate: float = 2e-3
    """peak of its one-cycle schedule"""
    reward: tuple[str, ...] = ("compressibility",)
    """compressibility, incompressibility, colorfulness, sharpness, class, clip, aesthetic, or package.module:function"""
    weights: tuple[float, ...] = ()
    """of several rewards, which are added; 1 each if not given"""
    clip: Path | None = None
    """folder of a CLIPModel for the rewards clip and aesthetic"""
    aesthetic: Path | None = None
    """safetensors with the linear layers of a head on its embeddings"""
    skip_bad: bool = False
    """leave out images for which the reward raises or is NaN, and count them, instead of stopping"""
    estimator: Literal["score", "clipped", "weighted"] = "score"
    """score: one update on the images of a batch (DDPO-SF); clipped: several with PPO's clip (DDPO-IS); weighted: denoising
    loss of own images, weighed by their reward (RWR)"""
    inputs: int = 10
    """classes or prompts in an update on the reward"""
    samples: int = 8
    """images of each of them"""
    epochs: int = 4
    """clipped: updates on the images of a batch"""
    ratio_clip: float = 0.2
    """clipped: of the ratio, whose log-probabilities are sums over pixels"""
    temperature: float = 0.5
    """weighted: weights are exp(advantage / temperature)"""
    tuning_rate: float = 1e-4
    """learning rate of the reward, constant after a warm-up"""
    piece: int = 2
    """steps of denoising in a backward pass: the memory is that of a piece"""
    subset: float = 0.5
    """share of the steps that an update learns from, drawn anew for each"""
    anchor: float = 0.01
    """weight of the KL to the start, in standard deviations of the reward a nat"""
    anchored: Literal["loss", "reward"] = "loss"
    """where the KL stands: in the loss, or in the reward too (then the gradient is that of whole chains)"""
    anchors: tuple[float, ...] = (0.0, 0.1)
    """other weights of the anchor that are tried beside, each as long"""
    strict: float = 1.0
    """how much weighs, in choosing weights, what is lost in scores that are not optimised"""
    every: int = 25
    """updates between looks at held-out scores"""
    looks: int = 160
    """images drawn for each look"""
    images: int = 500
    """images drawn of each model to evaluate it"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    channels: int | None = None
    """of the images; taken from the data"""
    classes: tuple[str, ...] | None = None
    """taken from the data"""


PART = "policy"  # the tracked part that holds the tuned denoiser
ROWS = {"start": "likelihood", "control": "control"}  # baseline → its tracked part
UNTOLD = 0.1  # of the images, those whose class is left out, so that there is guidance
NOISED = 4  # times an image is noised for an update of the weighted estimator
load = lru_cache(maxsize=6)(load_images)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the model and the data decide.

    Raises:
        InputError: a field is out of its range, data, prompts or model cannot be read, or they do not fit.
    """
    for name in ("batch", "inputs", "every", "looks", "images", "denoising"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if not (config.judge_share >= 0 <= config.likelihood_share and config.judge_share + config.likelihood_share < 1):
        raise InputError(
            "judge_share, likelihood_share: found less than 0, or nothing is left for the reward; lower one"
        )
    if config.temperature <= 0:
        raise InputError(f"temperature: found {config.temperature:g}, expected more than 0")
    _tuning(config, config.anchor)
    if config.prompts is not None:
        if config.model == SMALL:
            raise InputError("prompts: given, but model small is told classes; give a pipeline: --model hf:FOLDER")
        config = replace(config, classes=read_prompts(config.prompts), judge_share=0.0, likelihood_share=0.0)
    else:
        size = config.image_size or (16 if config.data == "digits" else 32)
        if config.model != SMALL and config.image_size is None:
            size = named_denoiser(config.model, **_how(config)).shape[1]
        train, *_ = (load(config.data, config.root, split, size) for split in _splits(config))
        classes, channels = train.classes, train.pixels.shape[1]
        config = replace(config, image_size=size, classes=classes, channels=channels)
        if config.model == SMALL and not (config.likelihood_share and config.judge_share):
            raise InputError("likelihood_share, judge_share: found 0, but model small knows nothing yet; give it some")
    shape = build(config).shape
    config = replace(config, image_size=config.image_size or shape[1], channels=config.channels or shape[0])
    _reward(config, None, torch.device("cpu"))
    return config


def _splits(config: Config) -> tuple[Any, ...]:
    return "train", "val", held_out_split(config.data, config.root)


def _how(config: Config) -> dict[str, Any]:
    names = ("denoising", "eta", "guidance", "piece", "scheduler", "lora", "widths", "channels", "classes", "prompts")
    return {name: getattr(config, name) for name in (*names, "image_size")}


def build(config: Config, tuned: bool = True) -> Denoiser:
    """The denoiser of a resolved config, untrained or as its pipeline has it; tuned: with the adapter that learns."""
    return named_denoiser(config.model, **_how(config if tuned else replace(config, lora=0)))


def _tuning(config: Config, anchor: float) -> Tuning:
    many = {"epochs": config.epochs, "clip": config.ratio_clip} if config.estimator == "clipped" else {}
    how: dict[str, Any] = {"anchor": anchor, "anchored": config.anchored, "subset": config.subset, **many}
    how |= {"learning_rate": config.tuning_rate, "precision": config.precision}
    return Tuning(config.samples, "normalised", **how)


def _reward(config: Config, judge: Any, device: torch.device) -> Reward:
    """What is optimised; `judge` is the classifier of the reward "class"."""
    texts = config.classes or ()
    return image_reward(
        config.reward, config.weights, judge, texts, config.clip, config.aesthetic, config.skip_bad, device
    )


def _judge(config: Config) -> Judge:
    assert config.channels is not None
    assert config.classes is not None
    return Judge(config.channels, len(config.classes))


def _pixels(config: Config, split: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    found: Images = load(config.data, config.root, split, config.image_size)
    check_kind(found, config.classes or (), config.channels or 1)
    order = noise.permutation(noise.key("shuffled"), len(found))  # data may come sorted by class
    return found.pixels[order].to(device).float() / 255, found.labels[order].to(device)


def _kinds(config: Config, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) % len(config.classes or ())


def _watch(config: Config, judge: Any, start: Denoiser, split: Any, device: torch.device) -> Watch:
    """What is not optimised: beside real images, or without data beside those of the start."""
    if config.prompts is None:
        return Watch(judge, *_pixels(config, split, device))
    kinds = _kinds(config, config.looks, device)
    keys = noise.key(config.seed, "real", torch.arange(config.looks)).to(device)
    return Watch(Thumbnails(), drawn_images(start, kinds, keys, config.precision), kinds)


def train(config: Config, run: Run) -> None:
    """Judges, denoising loss, the reward with each anchor, then the control; each ends with its best held-out weights."""
    torch.manual_seed(config.seed)
    start, *learner = tracked(run, "likelihood", build(config, False), by="held_out_likelihood")
    names = {PART: config.anchor} | {f"anchor {weight:g}": weight for weight in config.anchors}
    parts = {name: tracked(run, name, build(config), by="held_out_mix") for name in names}
    (average,) = run.track(average=MovingAverage())
    judge: Any = None
    rewarder: Any = None
    if config.prompts is None:
        images, labels = _pixels(config, "train", run.device)
        seen = _pixels(config, "val", run.device)
        judges = {name: tracked(run, name, _judge(config))[:2] for name in ("judge", "rewarder")}
        if config.judge_share:
            learn_to_judge(run, config.judge_share, judges, images, labels, config.batch)
        (judge, _), (rewarder, _) = judges.values()

        def exercises(step: int) -> tuple[Tensor, Noised]:
            rows = noise.examples(config.seed, step, config.batch, len(images))[run.rows(config.batch)].to(run.device)
            keys = noise.key(config.seed, "noised", step, rows)
            untold = noise.uniform(noise.fold(keys, "untold")) < UNTOLD
            none = len(config.classes or ())
            return torch.where(untold, none, labels[rows]), start.noised(images[rows], keys)

        def likely(policy: Denoiser) -> dict[str, Any]:
            given = policy.noised(seen[0], noise.key(config.seed, "val", torch.arange(len(seen[0]))).to(run.device))
            with torch.no_grad(), answering(policy, config.precision):
                return {"held_out_likelihood": policy(seen[1], given).log_probs.mean()}

        def learn(name: str, share: float, first: Any, policy: Any, optimizer: Any, keeper: Any) -> None:
            how: Any = {
                "keeper": keeper,
                "validate": partial(likely, policy),
                "start": first,
                "precision": config.precision,
            }
            learn_likelihood(run, name, share, policy, exercises, optimizer, config.learning_rate, **how)

        if config.likelihood_share:
            learn("likelihood", config.likelihood_share, None, start, *learner)
    reward = _reward(config, rewarder, run.device)
    watch = _watch(config, judge, start, "val", run.device)
    look = _look(config, reward, watch, start, run.device)
    control = config.prompts is None and config.likelihood_share > 0
    share = (1 - config.judge_share - config.likelihood_share) / (len(parts) + control)
    for name, (policy, optimizer, keeper) in parts.items():
        if config.lora:
            for each in (policy, keeper.best):
                take_start(each, start)
        reference = Unadapted(policy) if config.lora else start
        how: Any = {"keeper": keeper, "validate": partial(look, policy), "every": config.every}
        phase = "reward" if name == PART else f"reward, {name}"
        if config.estimator == "weighted":
            batches = partial(_weighed, config, run, policy, reward)
            learn_likelihood(run, phase, share, policy, batches, optimizer, config.tuning_rate, start=reference, **how)
        else:
            tuning = _tuning(config, names[name])
            some = partial(_asked, config, run)
            tune_on_reward(run, phase, share, policy, reward, some, tuning, optimizer, average, reference, **how)
    if control:
        learn("control", share, start, *tracked(run, "control", build(config, False), by="held_out_likelihood"))


def _asked(config: Config, run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Which classes or prompts an update asks for: each once before any comes again."""
    count = len(config.classes or ())
    inputs = noise.examples(config.seed, step, config.inputs, count)[run.rows(config.inputs)].to(run.device)
    return inputs, inputs


def _weighed(config: Config, run: Run, policy: Denoiser, reward: Reward, step: int) -> tuple[Tensor, Noised]:
    """Own images as examples, weighed by the exponential of their advantage: reward-weighted regression."""
    inputs, _ = _asked(config, run, step)
    keys = noise.key(config.seed, "weighed", step, torch.arange(len(inputs))).to(run.device)
    with torch.no_grad(), answering(policy, config.precision):
        images = policy.decode(policy.sample(inputs, config.samples, False, keys))
    output = reward(images, repeat(inputs, config.samples))
    run.log(reward=output.total.mean(), **{f"part {name}": part.mean() for name, part in output.parts.items()})
    group = repeat(torch.arange(len(inputs), device=run.device), config.samples)
    weight = (group_normalised(output.total, group).squeeze(1) / config.temperature).softmax(0) * len(images)
    rows = repeat(torch.arange(len(images), device=run.device), NOISED)
    each = noise.fold(keys[group][rows], torch.arange(len(rows), device=run.device))
    return inputs, policy.noised(images[rows], each, weight[rows])


def _look(
    config: Config, reward: Reward, watch: Watch, start: Denoiser, device: torch.device
) -> Callable[[Denoiser], Any]:
    """Held-out scores of a policy: images of the same noise at every look."""
    kinds = _kinds(config, config.looks, device)
    keys = noise.key(config.seed, "held out", torch.arange(config.looks)).to(device)
    first: dict[str, Tensor] = {}

    def scores(policy: Denoiser) -> dict[str, Tensor]:
        images = drawn_images(policy, kinds, keys, config.precision)
        total = reward(images, kinds).total
        return {"reward": total.mean(), "spread": total.std(), **watch(images, kinds)}

    def look(policy: Denoiser) -> dict[str, Tensor]:
        if not first:
            first.update(scores(start))
        found = scores(policy)
        best = mix(found, first, config.strict)
        return {f"held_out_{name}": value for name, value in found.items() if name != "spread"} | {"held_out_mix": best}

    return look


def evaluate(config: Config, policy: Denoiser, run: Run, elsewhere: bool = False) -> Evaluation:
    """Images drawn with the same noise by every model: the reward, and what is not optimised.

    `judge_accuracy`: of a classifier that the reward never saw. `frechet_distance`: to the test images in its features,
    `diversity`: mean distance of two images of a class there, 1 is that of test images (with prompts: regions' colours,
    and images of the start). `kl`: to the start, nats an image. Rows: the start, other anchors, more of the denoising loss
    instead of the reward (`control`), real validation images (`data`). The curves show each look along the training.
    """
    split = (evaluation_split if elsewhere else held_out_split)(config.data, config.root)
    others = restored(run, {"start": "likelihood"}, partial(build, config, False))
    judges = (
        restored(run, {"judge": "judge", "rewarder": "rewarder"}, partial(_judge, config)) if not config.prompts else {}
    )
    reward = _reward(config, judges.get("rewarder"), run.device)
    watch = _watch(config, judges.get("judge"), others["start"], split, run.device)
    kinds = _kinds(config, config.images, run.device)
    keys = noise.key(config.seed, "evaluation", torch.arange(config.images)).to(run.device)

    def score(images: Tensor, shown: Tensor) -> dict[str, float]:
        found, beside = reward(images, shown), watch(images, shown)
        row = {"reward": float(found.total.mean()), "frechet_distance": float(beside["distance"])}
        row |= {"diversity": float(beside["diversity"])}
        row |= {"judge_accuracy": float(beside["accuracy"])} if "accuracy" in beside else {}
        return row | {
            f"{name}_reward": float(found.parts[name].mean()) for name in config.reward if name in found.parts
        }

    def scores(other: Denoiser) -> dict[str, float]:
        some = slice(min(config.images, 100))
        chains = other.sample(kinds[some], 1, False, keys[some])
        far = divergence(other, others["start"], kinds[some], chains, config.precision).mean()
        return score(drawn_images(other, kinds, keys, config.precision), kinds) | {"kl": float(far)}

    rows = {name: name for name in (f"anchor {weight:g}" for weight in config.anchors)}
    others |= restored(run, rows, partial(build, config))
    others |= restored(run, {"control": "control"}, partial(build, config, False))
    metrics, baselines = scores(policy), {name: scores(other) for name, other in others.items()}
    if config.prompts is None:
        pixels, labels = _pixels(config, "val", run.device)
        baselines["data"] = score(pixels[: config.images], labels[: config.images])
    return Evaluation(metrics, baselines, denoising.along(run.folder, config.anchor))


def compared(config: Config, policy: Denoiser, run: Run, images: int) -> tuple[Reward, Tensor, Tensor]:
    """The reward, and the first classes or prompts: for `foveate analyse`."""
    judge = (
        restored(run, {"rewarder": "rewarder"}, partial(_judge, config)).get("rewarder") if not config.prompts else None
    )
    kinds = _kinds(config, images, run.device)
    return _reward(config, judge, run.device), kinds, kinds


def predict(
    config: Config, policy: Denoiser, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Redraw images in [0, 1]: noise of the middle of the chain is put on them and taken off again, no class told.

    Raises:
        InputError: the images break the convention, or have another size or mode than those of the policy.
    """
    check_images(images, "images")
    expected = (config.channels, config.image_size, config.image_size)
    if tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images: {list(images.shape[1:])} (channels, height, width), but trained on {list(expected)}: resize"
        )
    device = next(policy.parameters()).device
    keys = noise.key(config.seed, "redrawn", torch.arange(len(images))).to(device)
    middle = config.denoising // 2
    with torch.no_grad(), answering(policy, config.precision):
        x = policy.blurred(images.to(device), keys, middle)
        none = policy.without(torch.zeros(len(images), dtype=torch.int64, device=device))
        return {"images": policy.decode(policy.chain(none, x, keys, first=middle))}


def picture(
    config: Config, policy: Denoiser, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Images of the same noise before and after, and the chain of them; or pictures of the user, redrawn."""
    models = restored(run, {"start": "likelihood"}, partial(build, config, False))
    if images is None:
        models |= restored(run, {"anchor 0": "anchor 0"}, partial(build, config))
    models |= {"tuned": policy}
    if images is not None:
        shown = {name: predict(config, model, images)["images"] for name, model in models.items()}
        return {"redrawn": denoising.columns({"given": images} | shown)}
    kinds = _kinds(config, min(10, len(config.classes or ())), run.device)
    keys = noise.key(config.seed, "picture", kinds)
    with torch.no_grad(), answering(policy, config.precision):
        chains = {name: model.sample(kinds, 2, False, keys) for name, model in models.items()}
    drawn = {name: models[name].decode(chain) for name, chain in chains.items()}
    names = [str((config.classes or ())[kind]) for kind in kinds.tolist()]
    whole = {name: [models[name].finish(x[::2]) for x in chain.drawn.unbind(1)] for name, chain in chains.items()}
    return {"before and after": denoising.rows(drawn, names), "denoising": denoising.frames(whole, names)}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder, as the policy takes them."""
    return read_pictures(path, config.channels or 3, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures of the data, with their classes."""
    if config.prompts is not None:
        raise InputError(f"data: {len(config.classes or ())} prompts in {config.prompts}, and no pictures to draw")
    images, labels = _pixels(config, "train", torch.device("cpu"))
    return {"data": denoising.labelled(images[:20], [(config.classes or ())[kind] for kind in labels[:20].tolist()])}
