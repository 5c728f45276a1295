"""Classification by glimpses: the recurrent attention model (RAM).

| | |
|---|---|
| state | hidden vector of the glimpses so far |
| action | where to look next: a location (x, y) drawn around a learned mean |
| reward | at the last glimpse: the probability given to the right class (or, as published, 1 and 0) |
| horizon | the number of glimpses (6 or 8) |
| learner | REINFORCE with a learned baseline for the locations, cross-entropy for the rest |
| corner | policy |

Mnih, Heess, Graves, Kavukcuoglu 2014, "Recurrent models of visual attention" (arXiv 1406.6247). What differs here and
why, the published tables and ours with minutes and seeds: docs/systems/ram.md and docs/results.md.

    foveate train ram --variant plain --minutes 3                           the embedded digits, with every control
    foveate train ram --data mnist --root FOLDER --minutes 30 --controls    28×28, the agent alone
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate import attention, noise, pictures
from foveate.attention import Looking
from foveate.data.classification import (
    Images,
    Split,
    check_images,
    check_kind,
    evaluation_split,
    held_out_split,
    load_images,
    read_pictures,
)
from foveate.data.variants import canvas_size, render
from foveate.envs.glimpse import GlimpseEnv
from foveate.learn.baselines import MovingAverage
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.classifier import ImageClassifier
from foveate.models.glimpse import GlimpsePolicy
from foveate.run import Run
from foveate.types import Evaluation, InputError, known

Control = Literal["random", "centre", "cnn"]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train ram`. What defaults to None is chosen by the data and printed."""

    data: str = "digits"
    """digits (embedded), mnist, fashion-mnist, or folder"""
    root: Path | None = None
    """folder of the data; not needed for digits"""
    variant: Literal["plain", "translated60", "cluttered60", "cluttered100"] | None = None
    """how a picture is placed on the canvas; None: cluttered60 for digits, plain for the rest"""
    image_size: int | None = None
    """resize and crop pictures of a folder to this many pixels"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    controls: tuple[Control, ...] = ("random", "centre", "cnn")
    """trained beside the agent, each with as much time: looking at random places, at the centre, a CNN that sees all"""
    control_share: float | None = None
    """part of the budget that trains each of them; None: as much as trains the agent"""
    glimpses: int | None = None
    """number of glimpses; None: 8 with clutter, else 6"""
    patch: int | None = None
    """side of a glimpse in pixels; None: 8 up to 40 pixels, else 12"""
    scales: int | None = None
    """patches in a glimpse, each wider than the one before; None: 1 up to 40 pixels, 3 up to 80, else 4"""
    factor: int = 2
    """how much wider"""
    glimpse_network: Literal["mlp", "cnn"] | None = None
    """what looks at a glimpse; None: cnn up to 40 pixels, else mlp, which is quicker there"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of a cnn glimpse network; bf16 is faster on processors that compute in it, far slower on others"""
    core: Literal["rnn", "lstm"] = "rnn"
    """what remembers: a rectified recurrent layer or an LSTM"""
    hidden: int = 256
    """width of the core"""
    std: float = 0.05
    """standard deviation of the location; half the image is 1"""
    explore: float = 3.0
    """how many times wider it is at the start of training; it falls evenly to 1"""
    first: Literal["random", "centre"] = "random"
    """the first location; random ones leave less to learn by heart"""
    classify: Literal["last", "every"] = "every"
    """cross-entropy at the last glimpse, as published, or at every one"""
    reward: Literal["right", "likelihood"] = "likelihood"
    """1 for the right class, as published, or the probability given to it"""
    samples: int = 1
    """episodes of each image in an update"""
    baseline: attention.Baseline = "learned"
    """what is subtracted from the reward"""
    batch: int = 256
    """images in an update"""
    learning_rate: float = 2e-3
    """peak of the one-cycle schedule"""
    channels: int | None = None
    """of the pictures; taken from the data"""
    classes: tuple[str, ...] | None = None
    """names of the classes; taken from the data"""


PART = "learned"  # the tracked part that holds the policy
_load = lru_cache(maxsize=4)(load_images)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, or the data cannot be read.
    """
    attention.check(config)
    splits = "train", "val", held_out_split(config.data, config.root)
    images, *_ = (_load(config.data, config.root, split, config.image_size) for split in splits)  # now, not after hours
    variant = config.variant or ("cluttered60" if config.data == "digits" else "plain")
    channels, height, width = images.pixels.shape[1:]
    side = min(canvas_size(variant, (height, width)))
    found: dict[str, Any] = {
        "variant": variant,
        "glimpses": 8 if variant.startswith("cluttered") else 6,
        "patch": 8 if side <= 40 else 12,
        "glimpse_network": "cnn" if side <= 40 and config.patch != 1 else "mlp",
        "scales": 1 if side <= 40 else 3 if side <= 80 else 4,
    }
    config = replace(config, **{name: value for name, value in found.items() if getattr(config, name) is None})
    if known(config.patch) > side:
        raise InputError(f"patch: {config.patch} pixels are more than the image's {side}; choose a smaller patch")
    if (config.control_share or 0) * len(config.controls) >= 1:
        raise InputError(f"control_share: {config.control_share} for each control leaves nothing for the agent")
    if "cnn" in config.controls and side < 4:
        raise InputError(f"controls: cnn takes at least 4 pixels, not {side}; name other controls")
    return replace(config, channels=channels, classes=images.classes)


def _images(config: Config, split: Split) -> Images:
    images = _load(config.data, config.root, split, config.image_size)
    check_kind(images, known(config.classes), known(config.channels))
    return images


def build(config: Config) -> GlimpsePolicy:
    """The policy of a resolved config, untrained."""
    return _policy(config, "learned")


def _policy(config: Config, looking: Literal["learned", "random", "centre"]) -> GlimpsePolicy:
    patch, eye = known(config.patch), known(config.glimpse_network)
    what = known(config.channels) * known(config.scales), patch, patch
    sizes = what, 2, len(known(config.classes)), config.hidden
    return GlimpsePolicy(*sizes, eye, config.core, config.std, looking, precision=config.precision)  # type: ignore[arg-type]


def _env(config: Config, images: Images, copies: int, looking: str, device: torch.device) -> GlimpseEnv:
    return GlimpseEnv(
        copies,
        images=images,
        variant=known(config.variant),
        glimpses=known(config.glimpses),
        patch=known(config.patch),
        scales=known(config.scales),
        factor=config.factor,
        first="centre" if looking == "centre" else config.first,
        reward=config.reward,
        device=device,
        autoreset="disabled",
    )


def train(config: Config, run: Run) -> None:
    """Train the agent, then every control for as long."""
    train_images, val_images = _images(config, "train"), _images(config, "val")
    rows = run.rows(config.batch)
    share = config.control_share or 1 / (1 + len(config.controls))
    average, prepared = MovingAverage(), {}
    for name in ("learned", *config.controls):
        torch.manual_seed(config.seed)
        learner = _control(config, name).to(run.device)
        optimizer = torch.optim.Adam(learner.parameters(), config.learning_rate, fused=True)
        prepared[name] = run.track(**{name: learner, f"{name}_optimizer": optimizer})
    run.track(average=average)
    for name, (learner, optimizer) in prepared.items():
        if name == "cnn":
            _train_cnn(config, run, share, train_images, learner, optimizer)
            continue
        env = _env(config, train_images, (rows.stop - rows.start) * config.samples, name, run.device)
        held_out = _env(config, val_images, min(1000, len(val_images)), name, run.device)
        validate = partial(_errors, held_out, learner)
        part = 1 - share * len(config.controls) if name == "learned" else share
        attention.learn_to_look(run, name, part, env, learner, optimizer, average, Looking.of(config), validate)


def _control(config: Config, name: str) -> nn.Module:
    if name == "cnn":
        return ImageClassifier(known(config.channels), len(known(config.classes)))
    return _policy(config, name)  # type: ignore[arg-type]


def _train_cnn(
    config: Config, run: Run, share: float, images: Images, learner: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    pixels, labels = images.pixels.to(run.device), images.labels.to(run.device)
    rows = run.rows(config.batch)
    for step in run.steps("cnn", share):
        index = torch.arange(config.batch)[rows]
        ids = noise.examples(config.seed, step, config.batch, len(images))[rows].to(run.device)
        keys = noise.key(config.seed, "cnn", step, index).to(run.device)
        scores = learner(render(pixels, ids, keys, known(config.variant)))
        loss = F.cross_entropy(scores, labels[ids])
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer)
        run.log(cross_entropy=loss.detach())


def _errors(env: GlimpseEnv, policy: nn.Module) -> dict[str, float]:
    tries = ("val_error", False), ("val_greedy_error", True)
    return {name: attention.answer(env, policy, 0, len(env.images), greedy).error() for name, greedy in tries}


def evaluate(config: Config, policy: GlimpsePolicy, run: Run, elsewhere: bool = False) -> Evaluation:
    """Error in percent of the agent and its controls on held-out data; `elsewhere`: on other data than it trained on.

    `error` is that of single samples: no averaging over tries. `greedy_error` takes the mean of every location's
    distribution. The curve is the error of the answer after each glimpse.
    """
    images = _images(config, (evaluation_split if elsewhere else held_out_split)(config.data, config.root))
    metrics, curves = _score(config, policy, "learned", images, run)
    baselines: dict[str, dict[str, float]] = {}
    series = {"learned places": curves}
    for name in config.controls:
        control = _control(config, name).to(run.device)
        if not run.restore(name, control):
            continue
        if name == "cnn":
            baselines[name] = {"error": _cnn_error(config, control, images, run)}
        else:
            baselines[name], series[f"{name} places"] = _score(config, control, name, images, run)
    return Evaluation(metrics, baselines, {"error in percent against glimpses": series})


def _score(
    config: Config, policy: nn.Module, looking: str, images: Images, run: Run
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    env = _env(config, images, min(1000, len(images)), looking, run.device)
    drawn = attention.answer(env, policy, config.seed, len(images))
    scores = {"error": drawn.error()}
    if looking == "learned":
        scores["greedy_error"] = attention.answer(env, policy, config.seed, len(images), greedy=True).error()
    return scores, [(float(step), drawn.error(step)) for step in range(1, env.glimpses + 1)]


def _cnn_error(config: Config, control: nn.Module, images: Images, run: Run) -> float:
    pixels = images.pixels.to(run.device)
    wrong = 0
    for ids in torch.arange(len(images), device=run.device).split(1000):
        # the very canvases that the environment shows the agent
        keys = noise.fold(noise.fold(noise.key(config.seed, "evaluation", ids), "initial"), "canvas")
        with torch.no_grad():
            scores = control(render(pixels, ids, keys, known(config.variant)))
        wrong += int((scores.argmax(-1).cpu() != images.labels[ids.cpu()]).sum())
    return 100 * wrong / len(images)


def predict(
    config: Config, policy: GlimpsePolicy, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Look at images in [0, 1]: `classes` [batch], `scores` [batch, classes], `locations` [batch, time, 2].

    Raises:
        InputError: the images break the convention, or have another number of channels than the agent was trained on.
    """
    check_images(images, "images")
    if images.shape[1] != known(config.channels):
        raise InputError(f"images: {images.shape[1]} channels, but this agent was trained on {known(config.channels)}")
    device = next(policy.parameters()).device
    pixels = (images * 255).round().byte()
    shown = Images(pixels, torch.zeros(len(images), dtype=torch.int64), known(config.classes), "images", "all")
    env = _env(replace(config, variant="plain"), shown, len(images), "learned", device)
    found = attention.answer(env, policy, config.seed, len(images), greedy=True)
    return {
        "classes": found.scores[:, -1].argmax(-1),
        "scores": found.scores[:, -1],
        "locations": found.locations,
    }


def picture(
    config: Config, policy: GlimpsePolicy, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Glimpse paths on test pictures, or on images of the user: name → a picture, or a list of frames."""
    labels = None
    if images is None:
        shown = _images(config, held_out_split(config.data, config.root))
        ids = torch.linspace(0, len(shown) - 1, min(12, len(shown))).long()
        images = render(shown.pixels, ids, noise.key(config.seed, "picture", ids), known(config.variant))
        labels = shown.labels[ids]
    found = {name: value.cpu() for name, value in predict(config, policy, images.to(run.device)).items()}
    sure = found["scores"].softmax(-1).amax(-1)
    guesses = [known(config.classes)[guess] for guess in found["classes"].tolist()]
    captions = [f"{guess} ({share:.2f})" for guess, share in zip(guesses, sure.tolist(), strict=True)]
    correct = None
    if labels is not None:
        captions = [
            f"{known(config.classes)[label]} → {caption}"
            for label, caption in zip(labels.tolist(), captions, strict=True)
        ]
        correct = (labels == found["classes"]).tolist()
    retina: dict[str, Any] = {"patch": known(config.patch), "scales": known(config.scales), "factor": config.factor}
    steps = [f"glimpse {step + 1}" for step in range(found["locations"].shape[1])]
    steps[-1] += f": {captions[0]}"
    return {
        "glimpse paths": pictures.glimpse_paths(
            images.cpu(), found["locations"], **retina, captions=captions, correct=correct
        ),
        "glimpses": pictures.glimpse_frames(images[0].cpu(), found["locations"][0], **retina, captions=steps),
    }


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder, as the agent takes them."""
    return read_pictures(path, known(config.channels), config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures of the data, as the agent will meet them, with their classes."""
    images = _images(config, "train")
    ids = torch.linspace(0, len(images) - 1, min(16, len(images))).long()
    shown = render(images.pixels, ids, noise.key(config.seed, "picture", ids), known(config.variant))
    return {"data": pictures.image_grid(shown, [images.classes[label] for label in images.labels[ids].tolist()])}
