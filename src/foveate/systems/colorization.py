"""Colouring grey pictures: chroma as a short text, first learned from photographs, then tuned to be vivid and varied.

| | |
|---|---|
| state | the picture's luminance, and the words written so far |
| action | the next word of the code of its chroma |
| reward | at the end: share of vivid pixels times the diversity of their hues, of the picture as coloured |
| horizon | one word a square of 8×8 pixels: 16 words for 32×32 |
| learner | maximum likelihood, then REINFORCE with the mean of the other answers as baseline |
| corner | policy |

Pinto et al. 2023, "Tuning computer vision models with task rewards" (arXiv 2302.08242), section 4.3, on the codes of
Kolesnikov et al. 2022, "UViM" (arXiv 2205.10337). Luminance is never touched: only chroma is written. What differs
here and why, and the numbers: docs/systems/colorization.md and docs/results.md.

    foveate train colorization --minutes 5                                      crops of embedded photographs
    foveate train colorization --data cifar10 --root FOLDER --minutes 10
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.coding import learn_code
from foveate.colors import CHROMA, coloured, light_and_chroma
from foveate.data.classification import check_shape
from foveate.data.photographs import evaluation_split, held_out_split, load_photographs
from foveate.data.picture_folders import Split, read_pictures
from foveate.learn.answers import Reward, answering, likelihood_loss
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.backbones import convolutions
from foveate.models.codes import Base, Coded, CodedAnswers, MapCode, Words
from foveate.models.encoder_decoder import EncoderDecoder
from foveate.parts import restored, tracked
from foveate.rewards.colors import colorfulness, vivid_and_varied
from foveate.rewards.combine import guarded
from foveate.rewards.named_images import picture_score
from foveate.rewards.telling import FEW, check_tells_apart
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, check_least, known


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train colorization`. What defaults to None is chosen by the data and printed."""

    data: str = "photographs"
    """photographs (embedded), cifar10, or folder"""
    root: Path | None = None
    """folder of the data; not needed for photographs"""
    image_size: int | None = None
    """side in pixels; None: that of the pictures"""
    skip_bad: bool = False
    """leave out colourings on which the reward fails, and count them, instead of stopping"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    code_share: float = 0.25
    """part of the budget that learns the code of chroma; 0: take it from the run given by --from"""
    likelihood_share: float = 0.35
    """part for maximum likelihood, 0 as above; the rest is shared evenly by the reward and the control"""
    code_patch: int = 8
    """side in pixels of the square that a word is about"""
    levels: tuple[int, ...] = (8, 6, 5)
    """of the numbers that make a word; their product is the number of words"""
    code_width: int = 16
    """features at full size of what draws chroma from words"""
    code_rate: float = 3e-3
    """peak of the one-cycle schedule of the code"""
    patch: int = 8
    """pixels of the picture, a side, to a vector that is read"""
    width: int = 128
    """of the vectors"""
    depth: int = 2
    """blocks of the encoder, and of the decoder"""
    heads: int = 4
    """of the attention"""
    batch: int = 32
    """pictures in an update of code and likelihood"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of likelihood"""
    reward: str = "vivid"
    """vivid (and varied, the paper's), colorfulness, preference:RUN, or package.module:function of pictures"""
    tuning_batch: int = 8
    """pictures in an update on the reward"""
    samples: int = 8
    """colourings of each of them"""
    tuning_rate: float = 1e-3
    """learning rate of the reward, constant after a warm-up"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""


PART = "policy"  # the tracked part that holds the policy
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
HELD_OUT = 200  # pictures on which weights are chosen
_load = lru_cache(maxsize=4)(load_photographs)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, or the data cannot be read.
    """
    check_least(config, 0, "code_share", "likelihood_share")
    if config.code_share + config.likelihood_share >= 1:
        raise InputError("code_share, likelihood_share: together they leave nothing for the reward; lower one")
    check_least(config, 1, "batch", "tuning_batch", "image_size", "code_patch", "code_width", "patch", "width", "heads")
    check_least(config, 0, "code_rate", "learning_rate", "tuning_rate", "anchor")
    _tuning(config)
    _reward(config)
    splits = "train", "val", held_out_split(config.data, config.root)
    train, *_ = (_load(config.data, config.root, split, config.image_size) for split in splits)  # now, not after hours
    height, width = train.shape[2:]
    if height != width:
        raise InputError(f"image_size: pictures of {width}x{height} are not square; give one, e.g. 64")
    return replace(config, image_size=height)


def _data(config: Config, split: Split, device: torch.device) -> Tensor:
    return _load(config.data, config.root, split, config.image_size).to(device)


def _code(config: Config) -> MapCode:
    side = known(config.image_size)
    return MapCode((1, side, side), 2, 2, config.code_patch, config.levels, config.code_width)


def build(config: Config) -> Coded:
    """The policy of a resolved config, untrained."""
    image, words = (1, known(config.image_size), known(config.image_size)), Words(config.levels)
    side = image[1] // config.code_patch
    sizes: dict[str, Any] = {"width": config.width, "depth": config.depth, "heads": config.heads}
    sizes["stem"] = convolutions(1, config.width, config.patch)
    writer = EncoderDecoder(image, config.patch, words.count, side * side, **sizes)
    return Coded(writer, words, Base(1, 2, (side, side), config.code_patch, len(config.levels), config.code_width))


def _tuning(config: Config) -> Tuning:
    return Tuning(config.samples, anchor=config.anchor, learning_rate=config.tuning_rate, precision=config.precision)


def _reward(config: Config) -> Reward:
    """Of chroma, given the light: the score of the pictures as coloured."""
    score = guarded(picture_score(config.reward), config.skip_bad, config.reward)
    return lambda chroma, light: score(coloured(light, chroma), None)


def train(config: Config, run: Run) -> None:
    """Code, likelihood, reward, then the control from the start of the reward; each keeps its best weights on val."""
    check_taught(run, code_share=config.code_share, likelihood_share=config.likelihood_share)
    data, val = _data(config, "train", run.device), _data(config, "val", run.device)
    torch.manual_seed(config.seed)
    code, code_optimizer, code_keeper = tracked(run, "code", _code(config), by="held_out_explained")
    parts: dict[str, tuple[Any, ...]] = {}
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        by = "held_out_likelihood" if name == "likelihood" else "held_out_reward"  # noise is colourful, too
        kind = torch.optim.Adafactor if name == PART else torch.optim.Adam
        parts[name] = tracked(run, name, build(config), kind, by)
    (average,) = run.track(average=MovingAverage())
    (light, chroma), reward = light_and_chroma(val.float() / 255), _reward(config)
    held_out = [(some, some) for some in light[:HELD_OUT].split(50)]

    def maps(step: int) -> tuple[Tensor, Tensor, Tensor]:
        light, chroma = _batch(config, data, run, "codes", step, config.batch)
        return light, chroma, chroma

    def answers(step: int) -> tuple[Tensor, CodedAnswers]:
        light, chroma = _batch(config, data, run, "likelihood", step, config.batch)
        with torch.no_grad():
            return light, start.answers(light, code.encode(light, chroma))

    def inputs(step: int) -> tuple[Tensor, Tensor]:
        light, _ = _batch(config, data, run, "reward", step, config.tuning_batch)
        return light, light

    def kept() -> dict[str, Any]:
        with torch.no_grad(), answering(code):
            return {"held_out_explained": 1 - F.mse_loss(code(light, chroma), chroma) / chroma.var()}

    def likely() -> dict[str, Any]:
        some = light[:HELD_OUT]
        with torch.no_grad(), answering(start, config.precision):
            words = start.answers(some, code.encode(some, chroma[:HELD_OUT]))
            return arguments("likelihood")["validate"]() | {"held_out_likelihood": -likelihood_loss(start(some, words))}

    def compare(drawn: Tensor, chroma: Tensor) -> dict[str, Tensor]:
        return {"chroma_loss": F.mse_loss(drawn, chroma)}

    found = check_reward(run, parts[PART][0], reward, inputs(0), config.samples)  # now, not after the first phase
    if ":" in config.reward:  # of the user's own
        seen, colours = light_and_chroma(data[:FEW].float() / 255)
        check_tells_apart(reward, config.reward, found.total, colours, torch.zeros_like(colours), seen)
    learn_code(run, config.code_share, code, maps, compare, code_optimizer, config.code_rate, code_keeper, kept)
    for policy, _, keeper in parts.values():  # all draw with the base model as it is from now on
        for coded in (policy, keeper.best):
            coded.base.load_state_dict(code.base.state_dict())

    def arguments(name: str) -> dict[str, Any]:
        policy, optimizer, keeper = parts[name]
        metric = {"colorfulness": lambda chroma, light: colorfulness(coloured(light, chroma))}
        look = partial(held_out_scores, policy, reward, held_out, config.seed, config.precision, **metric)
        return {"policy": policy, "optimizer": optimizer, "keeper": keeper, "validate": look}

    share, start = (1 - config.code_share - config.likelihood_share) / 2, parts["likelihood"][0]
    how: dict[str, Any] = {"learning_rate": config.learning_rate, "precision": config.precision}
    own = how | arguments("likelihood") | {"validate": likely}
    learn_likelihood(run, "likelihood", config.likelihood_share, batches=answers, **own)
    tuned = {"reward": reward, "batches": inputs, "tuning": _tuning(config), "average": average, "reference": start}
    tune_on_reward(run, "reward", share, **tuned, **arguments(PART), every=25)
    learn_likelihood(run, "control", share, batches=answers, start=start, **arguments("control"), **how)


def _batch(config: Config, data: Tensor, run: Run, phase: str, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """This process's pictures of a step, half of them mirrored."""
    rows = run.rows(batch)
    images = data[noise.examples(config.seed, step, batch, len(data))[rows].to(run.device)].float() / 255
    keys = noise.key(config.seed, phase, "mirrored", step, torch.arange(batch)[rows]).to(run.device)
    return light_and_chroma(torch.where(noise.uniform(keys, 1, 1, 1) < 0.5, images, images.flip(3)))


def evaluate(config: Config, policy: Coded, run: Run, elsewhere: bool = False) -> Evaluation:
    """Colours of held-out pictures, the most likely words of each; `elsewhere`: of other data than it trained on.

    `colorfulness` is Hasler's and Süsstrunk's, `reward` what was tuned on, `vividness` and `diversity` the
    paper's; `sampled_colorfulness` that of words drawn once. `color_error` is the mean distance in Lab to the true
    colours, `luminance_error` the largest difference in L of any pixel, of 100. Beside the tuned policy: its start
    (`mle`), the start with as much more likelihood as the tuning took (`control`), the start's chroma doubled, the
    true colours.
    """
    split = (evaluation_split if elsewhere else held_out_split)(config.data, config.root)
    light, true = light_and_chroma(_data(config, split, run.device).float() / 255)
    metrics = _scores(config, policy, light, true)
    baselines: dict[str, dict[str, float]] = {}
    for name, other in restored(run, ROWS, partial(build, config)).items():
        baselines[name] = _scores(config, other, light, true)
        if name == "mle":
            baselines["chroma x 2"] = _measured(config, light, 2 * _paint(config, other, light, True), true)
    baselines["truth"] = _measured(config, light, true, true)
    return Evaluation(metrics, baselines)


def compared(config: Config, policy: Coded, run: Run, images: int) -> tuple[Reward, Tensor, Tensor]:
    """The reward, and the light of the first held-out pictures: for `foveate analyse`."""
    shown = _data(config, held_out_split(config.data, config.root), run.device)[:images]
    light, _ = light_and_chroma(shown.float() / 255)
    return _reward(config), light, light


def posed(config: Config, run: Run, images: int) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The light of pictures of the train split, and chroma and light as a picture: for `foveate prefer`."""
    data = _data(config, "train", run.device)
    light, _ = light_and_chroma(data[noise.permutation(noise.key("posed"), len(data))[:images]].float() / 255)
    return light, lambda chroma, light: coloured(light, chroma)


def _scores(config: Config, policy: Coded, light: Tensor, true: Tensor) -> dict[str, float]:
    found = _measured(config, light, _paint(config, policy, light, True), true)
    drawn = coloured(light, _paint(config, policy, light, False))
    return found | {"sampled_colorfulness": float(colorfulness(drawn).total.mean())}


def _paint(config: Config, policy: Coded, light: Tensor, greedy: bool) -> Tensor:
    """Chroma for each picture."""
    chroma = []
    with torch.no_grad(), answering(policy, config.precision):
        for ids in torch.arange(len(light), device=light.device).split(250):
            keys = noise.key(config.seed, "evaluation", ids)
            chroma.append(policy.decode(policy.sample(light[ids], 1, greedy, keys)).float())
    return torch.cat(chroma)


def _measured(config: Config, light: Tensor, chroma: Tensor, true: Tensor) -> dict[str, float]:
    images = coloured(light, chroma)
    again, shown = light_and_chroma(images)
    scores = {
        "colorfulness": colorfulness(images).total,
        "reward": picture_score(config.reward)(images, None).total,
        **vivid_and_varied(images).parts,
        "color_error": CHROMA * (shown - true).norm(dim=1),
    }
    return {name: float(value.mean()) for name, value in scores.items()} | {
        "luminance_error": float(50 * (again - light).abs().max())
    }


def predict(config: Config, policy: Coded, images: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
    """Colour images in [0, 1], grey or RGB (of which the luminance is taken): `images` [batch, 3, height, width].

    Raises:
        InputError: the images break the convention, or have another size than those the policy was trained on.
    """
    check_shape(images, "images", (None, config.image_size, config.image_size))
    light, _ = light_and_chroma(images.to(next(policy.parameters()).device).expand(-1, 3, -1, -1))
    return {"images": coloured(light, _paint(config, policy, light, True))}


def picture(
    config: Config, policy: Coded, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Grey, true (of test pictures), as the likelihood model colours it, as the tuned one does: a row a picture."""
    known = images is None
    if images is None:
        shown = _data(config, held_out_split(config.data, config.root), run.device)
        images = shown[torch.linspace(0, len(shown) - 1, min(8, len(shown))).long()].float() / 255
    images = images.to(run.device).expand(-1, 3, -1, -1)
    light, _ = light_and_chroma(images)
    columns = {"grey": coloured(light, torch.zeros_like(light.expand(-1, 2, -1, -1)))}
    if known:
        columns["truth"] = images
    for name, start in restored(run, {"likelihood": "likelihood"}, partial(build, config)).items():
        columns[name] = predict(config, start, images)["images"]
    columns["tuned"] = predict(config, policy, images)["images"]
    tiles = torch.stack(list(columns.values()), 1).flatten(0, 1).cpu()
    return {"colours": pictures.image_grid(tiles, list(columns) * len(images), len(columns), 128)}


def read(config: Config, path: Path) -> Float[Tensor, "batch 3 height width"]:
    """The user's picture, or the pictures of a folder, as the policy takes them."""
    return read_pictures(path, 3, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures of the data, grey and in colour."""
    images = _data(config, "train", torch.device("cpu"))
    images = images[torch.linspace(0, len(images) - 1, min(8, len(images))).long()].float() / 255
    light, chroma = light_and_chroma(images)
    tiles = torch.stack((coloured(light, 0 * chroma), images), 1).flatten(0, 1)
    return {"data": pictures.image_grid(tiles, ["grey", "truth"] * len(images))}
