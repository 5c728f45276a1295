"""Tune a diffusion model on a score of its finished images: denoising as a sequence of decisions.

| | |
|---|---|
| state | the noisy image, the step, and what the image is to show: a class or a prompt |
| action | the next, less noisy image, drawn from the scheduler's Gaussian |
| reward | at the end: any score of the finished image |
| horizon | the steps of the scheduler that have a variance |
| learner | denoising loss, then REINFORCE or PPO's clipped ratio, advantages normalised in each class or prompt |
| corner | policy |

Black et al. 2023, "Training diffusion models with reinforcement learning" (DDPO, arXiv 2305.13301); the anchor is that
of Fan et al. 2023, "DPOK" (arXiv 2305.16381), exact at every step. More is told in docs/systems/diffusion.md.

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
from foveate.data.classification import Images, check_shape, evaluation_split, held_out_split, load_images, shuffled
from foveate.data.picture_folders import read_pictures
from foveate.generation import kinds_asked, learn_to_denoise, own_examples
from foveate.judging import Contest, Judge, Watch, learn_to_judge
from foveate.learn.answers import Precision, Reward, Tuning, answering
from foveate.learn.baselines import MovingAverage
from foveate.models.diffusion import Denoiser
from foveate.models.low_rank import Unadapted, take_start
from foveate.models.named_denoisers import SMALL, check_drawn, named_denoiser, read_prompts
from foveate.parts import learning, restored, tracked
from foveate.pictures import denoising
from foveate.rewards.named_images import image_reward, onlooker, try_reward
from foveate.run import Run
from foveate.two_steps import learn_likelihood, tune_on_reward
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
    """part of the budget in which the classifiers learn that watch and reward, 0 if they come by --from"""
    likelihood_share: float = 0.4
    """part for the denoising loss, 0 for a model that has it; the anchors and the control share the rest"""
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
    """compressibility, colorfulness, sharpness, class, clip, ..., preference:RUN, or package.module:function"""
    weights: tuple[float, ...] = ()
    """of several rewards, which are added; 1 each if not given"""
    clip: Path | None = None
    """folder of a CLIPModel for the rewards clip and aesthetic; if neither is optimised, it watches beside prompts"""
    aesthetic: Path | None = None
    """safetensors with the linear layers of a head on its embeddings"""
    skip_bad: bool = False
    """leave out images for which the reward raises or is NaN, and count them, instead of stopping"""
    estimator: Literal["score", "clipped", "weighted"] = "score"
    """score: an update on the images of a batch (DDPO-SF); clipped: several (DDPO-IS); weighted: denoising (RWR)"""
    inputs: int | None = None
    """classes or prompts in an update on the reward; None: 10, or all if there are fewer"""
    samples: int = 8
    """images of each of them"""
    epochs: int = 4
    """clipped: updates on the images of a batch"""
    ratio_clip: float = 0.2
    """clipped: of the ratio, whose log-probabilities are sums over pixels"""
    temperature: float = 0.5
    """weighted: weights are exp(advantage / temperature)"""
    tuning_rate: float = 2e-4
    """learning rate of the reward after five updates; it falls evenly to 0"""
    piece: int = 2
    """steps of denoising in a backward pass: the memory is that of a piece"""
    subset: float = 0.34
    """share of the steps that an update learns from, drawn anew for each"""
    anchor: float = 0.3
    """weight of the KL to the start, in standard deviations of the reward a nat"""
    anchored: Literal["loss", "reward"] = "loss"
    """where the KL stands: in the loss, or in the reward too (then the gradient is that of whole chains)"""
    anchors: tuple[float, ...] = (0.0, 1.0)
    """other weights of the anchor that are tried beside, each as long"""
    strict: float = 0.4
    """how much weighs, in choosing weights, what is lost in scores that are not optimised"""
    every: int = 10
    """updates between looks at held-out scores"""
    looks: int = 200
    """images drawn for each look"""
    images: int = 500
    """images drawn of each model to evaluate it"""
    at_once: int | None = None
    """images in one pass through the networks; None: 100 of at most 64x64 pixels, fewer of larger ones"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    channels: int | None = None
    """of the images; taken from the data"""
    classes: tuple[str, ...] | None = None
    """taken from the data"""


PART = "policy"  # the tracked part that holds the tuned denoiser
ROWS = {"start": "likelihood", "control": "control"}  # baseline → its tracked part
FIELDS = ("denoising", "eta", "guidance", "piece", "scheduler", "lora", "widths", "channels", "classes", "prompts")
load = lru_cache(maxsize=6)(load_images)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what model and data decide; `InputError` if they do not fit or are not there."""
    for name in ("batch", "inputs", "every", "looks", "images", "at_once", "temperature"):
        if (found := getattr(config, name)) is not None and found <= 0:
            raise InputError(f"{name}: found {found:g}, expected more than 0")
    if min(config.judge_share, config.likelihood_share) < 0 or config.judge_share + config.likelihood_share >= 1:
        raise InputError("judge_share, likelihood_share: one is below 0, or nothing is left for the reward; change one")
    if config.anchor in config.anchors or len(set(config.anchors)) < len(config.anchors):
        raise InputError(f"anchors: found {config.anchors} beside anchor {config.anchor:g}, expected different ones")
    if config.estimator == "weighted" and (config.anchor, *config.anchors) != (0,):
        raise InputError("anchor, anchors: estimator weighted has no KL to weigh; add --anchor 0 --anchors")
    _tuning(config, config.anchor)
    if config.model == SMALL:
        if config.prompts is not None:
            raise InputError("prompts: given, but model small is told classes; give a pipeline: --model hf:FOLDER")
        config = replace(config, image_size=config.image_size or (16 if config.data == "digits" else 32))
    if config.prompts is not None:
        config = replace(config, classes=read_prompts(config.prompts), judge_share=0.0, likelihood_share=0.0)
    else:
        size = config.image_size or build(config).image[1]
        splits = "train", "val", held_out_split(config.data, config.root)
        train, *_ = (load(config.data, config.root, split, size) for split in splits)  # now, not after hours
        config = replace(config, image_size=size, classes=train.classes, channels=train.pixels.shape[1])
    policy, known = build(config), len(config.classes or ())
    check_drawn(policy, config.model, (config.channels, config.image_size, config.image_size))
    if (config.inputs or 0) > known:
        raise InputError(f"inputs: found {config.inputs}, expected at most {known}: each class or prompt once")
    reward = _reward(config, None if config.prompts else _judge(config), torch.device("cpu"))
    if not config.skip_bad:  # on what is no image it may fail and still be right
        try_reward(reward, policy.image, known)
    (channels, size, _), most, inputs = policy.image, policy.together(), config.inputs or min(10, known)
    return replace(config, channels=channels, image_size=size, at_once=most, inputs=inputs)


def build(config: Config, tuned: bool = True) -> Denoiser:
    """The denoiser of a resolved config, untrained or as its pipeline has it; tuned: with the adapter that learns."""
    how = {name: getattr(config, name) for name in (*FIELDS, "image_size", "at_once")} | ({} if tuned else {"lora": 0})
    policy = named_denoiser(config.model, **how)
    policy.light |= config.lora > 0 and not (tuned or config.likelihood_share)  # it stays in its folder
    return policy


def _tuning(config: Config, anchor: float) -> Tuning:
    how: dict[str, Any] = {"learning_rate": config.tuning_rate, "precision": config.precision, "subset": config.subset}
    how |= {"epochs": config.epochs, "clip": config.ratio_clip} if config.estimator == "clipped" else {}
    how |= {"chunk": max(1, (config.at_once or 100) // max(1, config.samples))}
    return Tuning(config.samples, "normalised", anchor, anchored=config.anchored, warmup=5, anneal=True, **how)


def _reward(config: Config, classifier: Any, device: torch.device) -> Reward:
    """What is optimised; the classifier is that of the reward "class"."""
    from_files = config.clip, config.aesthetic, config.skip_bad
    return image_reward(config.reward, config.weights, classifier, config.classes or (), *from_files, device)


def _judge(config: Config) -> Judge:
    return Judge(config.channels or 1, len(config.classes or ()))


def _pixels(config: Config, split: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    found: Images = load(config.data, config.root, split, config.image_size)
    return shuffled(found, config.classes or (), config.channels or 1, device)


def _contest(
    config: Config, judges: dict[str, Any], start: Denoiser, split: Any, count: int, device: torch.device
) -> Contest:
    """Who draws better: beside real images, or, with prompts, beside those of the start."""
    kinds = torch.arange(count, device=device) % len(config.classes or ())
    keys = noise.key(config.seed, split, torch.arange(count)).to(device)
    watch = None if config.prompts else Watch(judges["judge"], *_pixels(config, split, device))
    eyes = onlooker(config.reward, config.classes or (), config.clip, device) if config.prompts else None
    reward = _reward(config, judges.get("rewarder"), device)
    return Contest(reward, watch, start, kinds, keys, config.precision, config.reward, eyes)


def train(config: Config, run: Run) -> None:
    """Judges, denoising loss, the reward with each anchor, then the control; the agent ends with its best weights."""
    needed = {"judge_share": config.prompts is None, "likelihood_share": config.model == SMALL}
    if not run.source and (none := [name for name in needed if needed[name] and not getattr(config, name)]):
        raise InputError(f"{', '.join(none)}: 0, but what it teaches knows nothing yet; raise it, or add --from RUN")
    weights = {PART: config.anchor} | {f"anchor {weight:g}": weight for weight in config.anchors}
    taught = ("likelihood", "control") if config.likelihood_share or config.model == SMALL else ()
    parts: dict[str, tuple[Any, ...]] = {}
    for name in (*taught, *weights):
        torch.manual_seed(config.seed)
        made, by = build(config, name in weights), "held_out_mix" if name == PART else "held_out_likelihood"
        ends = name in weights and name != PART  # as it ends: what another anchor does to images is to be seen
        parts[name] = (*learning(run, name, made), None) if ends else tracked(run, name, made, by=by)
    (average,) = run.track(average=MovingAverage())
    start = parts["likelihood"][0] if taught else run.track(likelihood=build(config, False).requires_grad_(False))[0]
    judges: dict[str, Any] = {}
    if config.prompts is None:
        seen, val = (_pixels(config, split, run.device) for split in ("train", "val"))
        both = {name: learning(run, name, _judge(config)) for name in ("judge", "rewarder")}
        judges = {name: judge for name, (judge, _) in both.items()}
        if config.judge_share:
            learn_to_judge(run, config.judge_share, both, *seen, config.batch)
        how: Any = {"train": seen, "val": val, "batch": config.batch, "learning_rate": config.learning_rate}
        how |= {"none": start.none(len(config.classes or ())), "precision": config.precision}
    if config.likelihood_share:
        learn_to_denoise(run, "likelihood", config.likelihood_share, *parts["likelihood"], **how)
    contest = _contest(config, judges, start, "val", config.looks, run.device)
    share = (1 - config.judge_share - config.likelihood_share) / (len(weights) + bool(taught))
    asked = partial(kinds_asked, run, config.inputs or 10, len(config.classes or ()))
    for name, weight in weights.items():
        policy, optimizer, keeper = parts[name]
        if config.lora:
            for each in (policy, keeper.best) if keeper else (policy,):
                take_start(each, start)
        reference = Unadapted(policy) if config.lora else start
        look: Any = {"keeper": keeper, "validate": partial(contest.look, policy, config.strict), "every": config.every}
        phase = "reward" if name == PART else f"reward, {name}"
        if config.estimator == "weighted":
            own = own_examples(run, policy, contest.reward, asked, config.samples, config.temperature, config.precision)
            learn_likelihood(run, phase, share, policy, own, optimizer, config.tuning_rate, start=reference, **look)
        else:
            learner = policy, contest.reward, asked, _tuning(config, weight), optimizer, average, reference
            tune_on_reward(run, phase, share, *learner, **look)
    if taught:
        learn_to_denoise(run, "control", share, *parts["control"], **how, start=start)


def evaluate(config: Config, policy: Denoiser, run: Run, elsewhere: bool = False) -> Evaluation:
    """Images drawn with the same noise by every model: the reward, and what is not optimised.

    `judge_accuracy`: of a classifier that the reward never saw. `frechet_distance`: to test images in its features;
    `diversity`: of images of a class there, 1 is theirs. With prompts: in colours of regions or CLIP, to the start's.
    `kl`: to the start, nats an image. Rows: start, other anchors' end, more denoising loss (`control`), real `data`.
    """
    split = (evaluation_split if elsewhere else held_out_split)(config.data, config.root)
    known = _others(config, run)
    contest = _contest(config, _judges(config, run), known["start"], split, config.images, run.device)
    metrics, baselines = contest.model(policy), {name: contest.model(other) for name, other in known.items()}
    if config.prompts is None:
        pixels, labels = _pixels(config, "val", run.device)
        baselines["data"] = contest.row(pixels[: config.images], labels[: config.images])
    return Evaluation(metrics, baselines, denoising.along(run.folder, config.anchor))


def _others(config: Config, run: Run) -> dict[str, Denoiser]:
    """The start, the control and the other anchors, those that there are."""
    anchored = {name: name for name in (f"anchor {weight:g}" for weight in config.anchors)}
    return restored(run, ROWS, partial(build, config, False)) | restored(run, anchored, partial(build, config))


def _judges(config: Config, run: Run) -> dict[str, Any]:
    both = {} if config.prompts else {"judge": "judge", "rewarder": "rewarder"}
    return restored(run, both, partial(_judge, config))


def compared(config: Config, policy: Denoiser, run: Run, images: int) -> tuple[Reward, Tensor, Tensor]:
    """The reward, and the first classes or prompts: for `foveate analyse`."""
    kinds, _ = posed(config, run, images)
    return _reward(config, _judges(config, run).get("rewarder"), run.device), kinds, kinds


def posed(config: Config, run: Run, images: int) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Classes or prompts in turn, and images of them as RGB: for `foveate prefer`."""
    kinds = torch.arange(images, device=run.device) % len(config.classes or ())
    return kinds, lambda drawn, kinds: drawn.expand(-1, 3, -1, -1)


def predict(
    config: Config, policy: Denoiser, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Redraw images in [0, 1]: noise of the middle of the chain is put on them and taken off again, no class told."""
    check_shape(images, "images", policy.image)
    device, middle = next(policy.parameters()).device, config.denoising // 2
    keys = noise.key(config.seed, "redrawn", torch.arange(len(images))).to(device)
    with torch.no_grad(), answering(policy, config.precision):
        x = policy.blurred(images.to(device), keys, middle)
        none = torch.full((len(images),), policy.classes or 0, device=device)
        return {"images": policy.decode(policy.chain(none, x, keys, first=middle))}


def picture(
    config: Config, policy: Denoiser, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Images of the same noise before and after, and the chains of them; or pictures of the user, redrawn."""
    models = _others(config, run) | {"tuned": policy}
    if images is not None:
        shown = {name: predict(config, model, images)["images"] for name, model in models.items()}
        return {"redrawn": denoising.columns({"given": images} | shown)}
    kinds, names = posed(config, run, min(10, len(config.classes or ())))[0], (config.classes or ())[:10]
    keys = noise.key(config.seed, "picture", kinds)
    with torch.no_grad(), answering(policy, config.precision):
        chains = {name: model.sample(kinds, 1, False, keys).drawn.unbind(1) for name, model in models.items()}
        frames = denoising.frames({name: list(map(policy.finish, states)) for name, states in chains.items()}, names)
    return {"before and after": frames[-1], "denoising": frames}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder, as the policy takes them."""
    return read_pictures(path, config.channels or 3, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures of the data with their classes."""
    if config.prompts is not None:
        raise InputError(f"data: {config.prompts} has prompts, and no pictures to draw; leave prompts out")
    images, labels = _pixels(config, "train", torch.device("cpu"))
    return {"data": denoising.labelled(images[:20], [(config.classes or ())[kind] for kind in labels[:20]])}
