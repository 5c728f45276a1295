"""Tune any segmenter on the Dice or IoU of its masks.

| | |
|---|---|
| state | the image |
| action | for every pixel of every class, whether it belongs to the mask (or, with `exclusive`, which class it has) |
| reward | Dice or IoU of the mask, at the end |
| horizon | one answer of classes · height · width decisions, independent given the image |
| learner | per-pixel cross-entropy, then REINFORCE with the effect of each single pixel as its credit |
| corner | policy |

The two steps of Pinto et al. 2023, "Tuning computer vision models with task rewards" (arXiv 2302.08242). What is ours
is the credit (`--credit flip`): thousands of pixels share one score, and the effect of flipping one has a closed form
(`foveate.rewards.masks.iou_effects`), so that each is weighed by its own part; `--credit answer` gives all pixels of a
mask the same advantage, as the paper does for panoptic maps. Beside the tuned segmenter stand the start ("mle"), as
many minutes of further likelihood from it ("control"), and both at the threshold that is best on the val split: what
Dice asks of a calibrated segmenter.

    foveate train tune-segmenter --data pairs --root CHASEDB1 --minutes 10
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_rgb, read_pictures
from foveate.data.picture_folders import Split
from foveate.data.segmentation import Segmented, crops, load_segmented, masks_of
from foveate.learn.answers import Reward
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.dense import dense_network
from foveate.models.segmenter import Labels, Segmenter, tiled_logits
from foveate.parts import restored, tracked
from foveate.rewards.combine import check_output, guarded, load_reward
from foveate.rewards.masks import credited, dice_reward, iou_reward
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, RewardOutput, check_least, known, split

PIXELS = 2**19  # of images that are scored in one pass
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train tune-segmenter`."""

    data: str = "scenes"
    """scenes (rendered), pairs (pictures and their masks), or voc"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """scale the longer side to this many pixels; None: as they are, scenes 64"""
    classes: tuple[str, ...] | None = None
    """scenes: shapes; voc: which of its classes; pairs: names of the values 1, 2, ... in the masks, if not 0 and 255"""
    skip_bad: bool = False
    """leave unusable items, and masks on which your reward fails, out and count them, instead of stopping"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.5
    """part of the budget for cross-entropy, 0 for a model that has it; the rest is shared by reward and control"""
    model: str = "unet"
    """unet, efficientnet-lite0 (ImageNet, no download), timm:NAME, torchvision:NAME, or package.module:function"""
    pretrained: bool = False
    """begin a torchvision model with an ImageNet backbone, which is downloaded"""
    width: int = 8
    """features of the unet at full size; of what joins the maps of efficientnet-lite0 or timm:NAME, an eighth"""
    exclusive: bool = False
    """a pixel has one class or none (softmax), instead of a yes or no for each class"""
    crop: int = 256
    """side in pixels of the windows it trains on; larger images are scored in such windows"""
    flip: bool = True
    """mirror half of them"""
    jitter: float = 0.2
    """change contrast and brightness of each colour by up to this share"""
    batch: int | None = None
    """windows in an update; None: 2 of 256 pixels, 8 of 128, 16 of less than 96"""
    learning_rate: float | None = None
    """peak of the one-cycle schedule of cross-entropy; None: 5e-3 for the unet, 1e-3 for others"""
    reward: str = "dice"
    """dice, iou, or package.module:function of masks and true masks"""
    credit: Literal["flip", "expected", "answer"] | None = None
    """of a pixel: its own effect on the reward (expected: of less noise), or that of the mask; None: flip, or answer"""
    samples: int = 2
    """masks drawn for each window"""
    temperature: float = 1.0
    """by which scores are divided where masks are drawn for the reward; below 1: nearer to the likeliest mask"""
    tuning_rate: float | None = None
    """learning rate of the reward, which falls evenly to 0; None: a tenth of learning_rate"""
    control_rate: float | None = None
    """peak of the one-cycle schedule of the further cross-entropy, its control; None: two fifths of learning_rate"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    every: int = 25
    """updates between looks at the val split"""
    looks: int = 32
    """windows of it that are looked at"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    names: tuple[str, ...] | None = None
    """of the classes; taken from the data"""
    left_out: int | None = None
    """unusable items that were left out; counted in the data"""


PART = "policy"  # the tracked part that holds the tuned segmenter
REWARDS: tuple[Literal["dice", "iou"], ...] = ("dice", "iou")  # with credit; other names are of the user's functions
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
_load = lru_cache(maxsize=6)(load_segmented)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    check_least(config, 1, "batch", "crop", "every", "looks", "width")
    check_least(config, 0, "learning_rate", "tuning_rate", "control_rate", "anchor", "jitter")
    if not 0 <= config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share:g}, expected from 0 to less than 1")
    if config.width % 8:
        raise InputError(f"width: found {config.width}, expected a multiple of 8")
    if config.exclusive and config.credit == "expected":
        raise InputError("credit: found 'expected', which is of two choices, but exclusive classes are more; use flip")
    usual = 5e-3 if config.model == "unet" else 1e-3
    peak = usual if config.learning_rate is None else config.learning_rate
    tuning_rate = peak / 10 if config.tuning_rate is None else config.tuning_rate
    control_rate = peak * 0.4 if config.control_rate is None else config.control_rate
    config = replace(config, learning_rate=peak, tuning_rate=tuning_rate, control_rate=control_rate)
    config = replace(config, credit=config.credit or ("flip" if config.reward in REWARDS else "answer"))
    _tuning(config)
    _reward(config)
    parts = [_data(config, split) for split in ("train", "val", "test")]
    side = min(config.crop, max(parts[0].labels.shape[1:]))
    batch = config.batch or max(2, min(16, 2**17 // side**2))
    found = replace(config, batch=batch, names=parts[0].classes, left_out=sum(part.left_out for part in parts))
    build(found)
    return found


def _data(config: Config, split: Split) -> Segmented:
    return _load(config.data, config.root, split, config.image_size, config.classes, config.skip_bad)


def build(config: Config, pretrained: bool = False) -> Segmenter:
    """The segmenter of a resolved config, untrained but for an ImageNet backbone."""
    assert config.names is not None
    outputs = len(config.names) + config.exclusive
    network = dense_network(config.model, outputs, config.width, pretrained)
    return Segmenter(network, len(config.names), config.exclusive)


def _tuning(config: Config) -> Tuning:
    credit: Any = "difference" if config.exclusive and config.credit == "flip" else config.credit
    same = {name: getattr(config, name) for name in ("samples", "anchor", "precision", "temperature")}
    return Tuning(learning_rate=known(config.tuning_rate), anneal=True, credit=credit, **same)


def _reward(config: Config) -> Reward:
    """Of masks, given the true ones and which pixels are known; the others count for nothing."""
    named: dict[str, Reward] = {name: credited(name, config.exclusive) for name in REWARDS}
    score: Reward = named.get(config.reward) or guarded(load_reward(config.reward), config.skip_bad, config.reward)

    def reward(predictions: Bool[Tensor, "rows classes height width"], targets: tuple[Tensor, Tensor]) -> RewardOutput:
        masks, known = targets
        output = score(predictions & known, masks)
        if output.credit is None:
            return output
        pixels = known.flatten(2)
        return replace(output, credit=(output.credit.unflatten(1, (-1, pixels.shape[2])) * pixels).flatten(1))

    return reward


def train(config: Config, run: Run) -> None:
    """Cross-entropy; from there the reward, and for as long further cross-entropy, its control."""
    if ":" not in config.model:  # what is brought may come trained
        check_taught(run, likelihood_share=config.likelihood_share)
    size = config.batch or 1
    data, val = (_data(config, split).to(run.device) for split in ("train", "val"))
    index = torch.arange(size)[run.rows(size)]
    torch.manual_seed(config.seed)
    untaught, reward = build(config, config.pretrained), _reward(config)
    parts = {name: tracked(run, name, copy.deepcopy(untaught)) for name in ("likelihood", PART, "control")}
    (average,), start = run.track(average=MovingAverage()), parts["likelihood"][0]
    held_out = _windows(config, val, config.looks)
    other = "iou" if config.reward == "dice" else "dice"
    metric = {other: _reward(replace(config, reward=other))}  # looked at beside the reward
    looks = split(held_out, max(1, PIXELS // held_out[0][0, 0].numel()))

    def windows(step: int, phase: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        ids = noise.examples(config.seed, step, size, len(data))[index].to(run.device)
        keys = noise.key(config.seed, phase, step, index).to(run.device)
        images, labels = crops(data, ids, keys, config.crop, config.flip, config.jitter)
        return images, masks_of(labels, len(data.classes))

    def answers(step: int, phase: str) -> tuple[Tensor, Labels]:
        images, targets = windows(step, phase)
        return images, start.labels(*targets)

    def arguments(name: str, phase: str, share: float, batches: Callable[..., Any]) -> dict[str, Any]:
        how: dict[str, Any] = {"run": run, "phase": phase, "share": share, "every": config.every}
        policy, how["optimizer"], how["keeper"] = parts[name]
        look = partial(held_out_scores, policy, reward, looks, config.seed, config.precision, **metric)
        return how | {"policy": policy, "validate": look, "batches": partial(batches, phase=phase)}

    first_scores = check_reward(run, start, reward, windows(0, "reward"), config.samples)  # now, not after a phase
    check_output(first_scores, len(first_scores.total), config.reward)
    if first_scores.credit is None and config.credit != "answer":
        asked = f"{config.credit!r} asks for one of each pixel"
        raise InputError(f"credit: {asked}, found none in reward {config.reward}; use answer")
    rest = (1 - config.likelihood_share) / 2
    first = arguments("likelihood", "likelihood", config.likelihood_share, answers)
    learn_likelihood(**first, learning_rate=known(config.learning_rate), precision=config.precision)
    tuned = arguments(PART, "reward", rest, windows) | {"reward": reward, "tuning": _tuning(config)}
    tune_on_reward(**tuned, average=average, reference=start)
    further = arguments("control", "control", rest, answers) | {"start": start}
    learn_likelihood(**further, learning_rate=known(config.control_rate), precision=config.precision)


def _windows(config: Config, data: Segmented, count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Fixed windows of held-out images."""
    ids = torch.arange(count)
    keys = noise.key("looks", ids).to(data.labels.device)
    images, labels = crops(data, (ids % len(data)).to(keys), keys, config.crop, flip=False)
    return images, masks_of(labels, len(data.classes))


def compared(config: Config, policy: Segmenter, run: Run, images: int) -> tuple[Reward, Tensor, tuple[Tensor, Tensor]]:
    """The reward, and windows of the first test images with their masks: for `foveate analyse`."""
    return _reward(config), *_windows(config, _data(config, "test").to(run.device), images)


def evaluate(config: Config, policy: Segmenter, run: Run, elsewhere: bool = False) -> Evaluation:
    """Dice and IoU of whole test images, each the mean over images of the mean over classes in image or mask.

    Pixels of probability above 1/2 are the mask; `reward` is that of your own, if there is one. Baselines: `mle`, the
    start; `control`, as many minutes of further likelihood; and both with the threshold that is best on the val split,
    which tuning on Dice has to beat. The curve shows every threshold on the test split. `elsewhere`: every image of a
    folder, or VOC's test split.
    """
    split: Split = "all" if elsewhere and config.data == "pairs" else "test"
    test = _data(config, split)
    if test.classes != config.names:
        found, expected = ", ".join(test.classes), ", ".join(config.names or ())
        raise InputError(f"data: classes {found}, but the segmenter was trained on {expected}; name --classes")
    segmenters = {"tuned": policy} | restored(run, ROWS, partial(build, config))
    scores = {name: _scores(config, segmenter, test) for name, segmenter in segmenters.items()}
    baselines = {name: found[0.5] for name, found in scores.items() if name != "tuned"}
    if config.exclusive:
        return Evaluation(scores["tuned"][0.5], baselines)
    if not elsewhere:
        main, val = "iou" if config.reward == "iou" else "dice", _data(config, "val")
        for name in list(baselines):
            chosen = _scores(config, segmenters[name], val)
            best = max(THRESHOLDS, key=lambda threshold: chosen[threshold][main])
            baselines[f"{name}_best_threshold"] = scores[name][best]
    curves = {
        f"{metric} against threshold": {
            name: [(threshold, row[metric]) for threshold, row in found.items()] for name, found in scores.items()
        }
        for metric in ("dice", "iou")
    }
    return Evaluation(scores["tuned"][0.5], baselines, curves)


@torch.no_grad()
def _scores(config: Config, segmenter: Segmenter, data: Segmented) -> dict[float, dict[str, float]]:
    """Threshold → metrics; of exclusive classes those of the likeliest class, as threshold 0.5."""
    device = next(segmenter.parameters()).device
    sums: dict[float, dict[str, float]] = {}
    for ids in torch.arange(len(data)).split(max(1, PIXELS // data.labels[0].numel())):
        images = data.pixels[ids].to(device).float() / 255
        masks, known = masks_of(data.labels[ids].to(device), len(data.classes))
        logits = tiled_logits(segmenter, images, config.crop)
        for threshold in (0.5,) if config.exclusive else THRESHOLDS:
            found = _masks(segmenter, logits, threshold) & known
            row = sums.setdefault(threshold, {"dice": 0.0, "iou": 0.0})
            for metric, score in (("dice", dice_reward), ("iou", iou_reward)):
                row[metric] += float(score(found, masks).total.double().sum()) / len(data)
            if threshold == 0.5 and config.reward not in REWARDS:  # no other has been looked at, where it may fail
                own = float(_reward(config)(found, (masks, known)).total.double().sum()) / len(data)
                row["reward"] = row.get("reward", 0.0) + own
    return sums


def _masks(segmenter: Segmenter, logits: Tensor, threshold: float = 0.5) -> Bool[Tensor, "batch classes height width"]:
    if segmenter.exclusive:
        return segmenter.decode(Labels(logits.argmax(1, keepdim=True)))
    return logits.sigmoid() > threshold


@torch.no_grad()
def predict(
    config: Config, policy: Segmenter, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Tensor]:
    """Segment images in [0, 1]: `masks` bool [batch, classes, height, width], and their `probabilities`.

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    logits = tiled_logits(policy, images.to(next(policy.parameters()).device), config.crop)
    chances = logits.softmax(1)[:, 1:] if policy.exclusive else logits.sigmoid()
    return {"masks": _masks(policy, logits), "probabilities": chances}


def picture(
    config: Config, policy: Segmenter, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Image, truth, start and tuned side by side, where test images have labels, or all over images of the user."""
    columns, labelled = dict[str, Tensor](), torch.tensor(True)
    if images is None:
        data = _data(config, "test")
        ids = torch.linspace(0, len(data) - 1, min(5, len(data))).long()
        images, labels = crops(data, ids, noise.key("picture", ids), 3 * config.crop, flip=False)
        columns["truth"], labelled = masks_of(labels, len(data.classes))
    for name, start in restored(run, {"start": "likelihood"}, partial(build, config)).items():
        columns[name] = predict(config, start, images)["masks"].cpu() & labelled
    columns["tuned"] = predict(config, policy, images)["masks"].cpu() & labelled
    tiles = torch.stack([images.cpu(), *(pictures.painted(images.cpu(), masks) for masks in columns.values())], 1)
    captions = ["image", *columns] * len(images)
    return {"masks": pictures.image_grid(tiles.flatten(0, 1), captions, tiles.shape[1], cell=256)}


def read(config: Config, path: Path) -> Float[Tensor, "batch 3 height width"]:
    """The user's picture, or the pictures of a folder, as the segmenter takes them."""
    return read_pictures(path, 3, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first images of the data, each beside its masks."""
    data = _data(config, "train")
    ids = torch.linspace(0, len(data) - 1, min(8, len(data))).long()
    images, (masks, _) = data.pixels[ids].float() / 255, masks_of(data.labels[ids], len(data.classes))
    tiles = torch.stack((images, pictures.painted(images, masks)), 1).flatten(0, 1)
    return {"data": pictures.image_grid(tiles, [text for row in ids.tolist() for text in (data.names[row], "")])}
