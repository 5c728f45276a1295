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
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from PIL import ImageColor
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_images, read_pictures
from foveate.data.picture_folders import Split
from foveate.data.segmentation import Segmented, crops, load_segmented, masks_of
from foveate.learn.answers import Reward, Tuning, answering, repeat
from foveate.learn.baselines import MovingAverage
from foveate.learn.keeper import Keeper
from foveate.models.dense import dense_network
from foveate.models.segmenter import Labels, Segmenter, tiled_logits
from foveate.rewards.combine import check_output, load_reward
from foveate.rewards.masks import dice_effects, dice_reward, effects_on_total, iou_effects, iou_reward
from foveate.run import Run
from foveate.tuning import Batches, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, RewardOutput

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
    """leave unusable items out and count them, instead of stopping at the first"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.5
    """part of the budget for cross-entropy; the rest is shared evenly by the reward and its control"""
    model: str = "unet"
    """unet, torchvision:NAME (e.g. lraspp_mobilenet_v3_large), or package.module:function, which takes no arguments"""
    pretrained: bool = False
    """begin a torchvision model with an ImageNet backbone, which is downloaded"""
    width: int = 8
    """features of the unet at full size"""
    exclusive: bool = False
    """a pixel has one class or none (softmax), instead of a yes or no for each class"""
    crop: int = 128
    """side in pixels of the windows it trains on; larger images are scored in such windows"""
    flip: bool = True
    """mirror half of them"""
    batch: int = 8
    """windows in an update"""
    learning_rate: float = 5e-3
    """peak of the one-cycle schedule of cross-entropy"""
    reward: str = "dice"
    """dice, iou, or package.module:function of masks and true masks"""
    credit: Literal["flip", "answer"] = "flip"
    """weigh a pixel by its own effect on the reward, or by the reward of the whole mask"""
    samples: int = 4
    """masks drawn for each window"""
    tuning_rate: float = 1e-3
    """constant learning rate of the reward"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    every: int = 25
    """updates between looks at the val split"""
    looks: int = 64
    """windows of it that are looked at"""
    names: tuple[str, ...] | None = None
    """of the classes; taken from the data"""
    left_out: int | None = None
    """unusable items that were left out; counted in the data"""


PART = "policy"  # the tracked part that holds the tuned segmenter
_load = lru_cache(maxsize=6)(load_segmented)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, the data cannot be read, no such model or reward.
    """
    for name in ("batch", "crop", "every", "looks", "samples", "width"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if not 0 < config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share:g}, expected more than 0, less than 1")
    if config.width % 8:
        raise InputError(f"width: found {config.width}, expected a multiple of 8")
    _tuning(config)
    _reward(config)
    parts = [_data(config, split) for split in ("train", "val", "test")]
    found = replace(config, names=parts[0].classes, left_out=sum(part.left_out for part in parts))
    _network(found, pretrained=False)
    return found


def _data(config: Config, split: Split) -> Segmented:
    return _load(config.data, config.root, split, config.image_size, config.classes, config.skip_bad)


def build(config: Config) -> Segmenter:
    """The segmenter of a resolved config, untrained."""
    return _network(config, pretrained=False)


def _network(config: Config, pretrained: bool) -> Segmenter:
    assert config.names is not None
    outputs = len(config.names) + config.exclusive
    network = dense_network(config.model, outputs, config.width, pretrained)
    return Segmenter(network, len(config.names), config.exclusive)


def _tuning(config: Config) -> Tuning:
    credit: Any = "difference" if config.exclusive and config.credit == "flip" else config.credit
    return Tuning(config.samples, anchor=config.anchor, learning_rate=config.tuning_rate, credit=credit)


def _reward(config: Config) -> Reward:
    """Of masks, (predictions, {"masks", "known"}); pixels that nobody labelled count for nothing."""
    named: dict[str, tuple[Callable[..., RewardOutput], Callable[..., Tensor]]] = {
        "dice": (dice_reward, dice_effects),
        "iou": (iou_reward, iou_effects),
    }
    score, effects = named.get(config.reward) or (load_reward(config.reward), None)

    def reward(predictions: Bool[Tensor, "rows classes height width"], targets: dict[str, Tensor]) -> RewardOutput:
        predictions, masks = predictions & targets["known"], targets["masks"]
        output = score(predictions, masks)
        if effects is None:
            return output if isinstance(output, RewardOutput) else RewardOutput(output)
        credit = effects_on_total(output, effects(predictions, masks), predictions, masks) * targets["known"]
        if config.exclusive:  # what a pixel adds to leaving it to the background
            credit = (credit * predictions).sum(1)
        return replace(output, credit=credit.flatten(1))

    return reward


def train(config: Config, run: Run) -> None:
    """Cross-entropy; from there the reward, and for as long further cross-entropy, its control."""
    train_set, val_set = (_data(config, split).to(run.device) for split in ("train", "val"))
    torch.manual_seed(config.seed)
    start = _network(config, config.pretrained)
    learners = {"likelihood": start, PART: copy.deepcopy(start), "control": copy.deepcopy(start)}
    keepers = {"keeper": Keeper(learners[PART]), "control_keeper": Keeper(learners["control"])}
    average = MovingAverage()
    run.track(**learners, **keepers, average=average)
    optimizers = {name: torch.optim.Adam(learner.parameters()) for name, learner in learners.items()}
    run.track(**{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()})
    reward, tuning, rest = _reward(config), _tuning(config), (1 - config.likelihood_share) / 2
    looks = _looks(config, val_set)

    def batch(phase: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = run.rows(config.batch)
        ids = noise.examples(config.seed, step, config.batch, len(train_set))[rows].to(run.device)
        keys = noise.key(config.seed, phase, step, torch.arange(config.batch)[rows]).to(run.device)
        images, labels = crops(train_set, ids, keys, config.crop, config.flip)
        return images, *masks_of(labels, start.classes)

    def true_labels(phase: str) -> Batches:
        def found(step: int) -> tuple[Tensor, Labels]:
            images, masks, known = batch(phase, step)
            return images, start.labels(masks, known)

        return found

    def targets(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, masks, known = batch("reward", step)
        return images, {"masks": masks, "known": known}

    def look(name: str) -> dict[str, Tensor]:
        return held_out_scores(learners[name], reward, looks, config.seed)

    def look_and_keep() -> dict[str, Tensor]:
        found = look("control")
        keepers["control_keeper"].offer(learners["control"], found["held_out_reward"])
        return found

    _check_reward(config, start, reward, targets(0))
    arguments: dict[str, Any] = {"learning_rate": config.learning_rate, "every": config.every}
    learn_likelihood(
        run,
        "likelihood",
        config.likelihood_share,
        start,
        true_labels("likelihood"),
        optimizers["likelihood"],
        validate=lambda: look("likelihood"),
        **arguments,
    )
    tune_on_reward(
        run,
        "reward",
        rest,
        learners[PART],
        reward,
        targets,
        tuning,
        optimizers[PART],
        average,
        start,
        keeper=keepers["keeper"],
        validate=lambda: look(PART),
        every=config.every,
    )
    kept = keepers["control_keeper"]
    if bool(kept.score.isneginf()):
        kept.offer(start, look("likelihood")["held_out_reward"])  # as for the reward, the start is the first
    learn_likelihood(
        run,
        "control",
        rest,
        learners["control"],
        true_labels("control"),
        optimizers["control"],
        start=start,
        validate=look_and_keep,
        **arguments,
    )
    learners["control"].load_state_dict(kept.best.state_dict())
    run.save()


def _looks(config: Config, data: Segmented) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Fixed windows of held-out images, in batches."""
    ids = torch.arange(config.looks)
    keys = noise.key("looks", ids).to(data.labels.device)
    images, labels = crops(data, (ids % len(data)).to(keys), keys, config.crop, flip=False)
    parts = zip(images.split(config.batch), labels.split(config.batch), strict=True)
    return [
        (some, dict(zip(("masks", "known"), masks_of(marks, len(data.classes)), strict=True))) for some, marks in parts
    ]


def _check_reward(config: Config, segmenter: Segmenter, reward: Reward, batch: tuple[Tensor, Any]) -> None:
    """Now, not after the first phase."""
    images, targets = batch
    with torch.no_grad(), answering(segmenter):
        keys = noise.key(config.seed, "check", torch.arange(len(images))).to(images.device)
        answers = segmenter.decode(segmenter.sample(images, config.samples, False, keys))
        check_output(reward(answers, repeat(targets, config.samples)), len(answers), config.reward)


def evaluate(config: Config, policy: Segmenter, run: Run, elsewhere: bool = False) -> Evaluation:
    """Dice and IoU of whole test images, each the mean over images of the mean over classes in image or mask.

    Pixels of probability above 1/2 are the mask. Baselines: `mle`, the start; `control`, as many minutes of further
    likelihood; and both with the threshold that is best on the val split, which tuning on Dice has to beat. The
    curve shows every threshold on the test split. `elsewhere`: every image of a folder, or VOC's test split.
    """
    split: Split = "all" if elsewhere and config.data == "pairs" else "test"
    test = _data(config, split)
    if test.classes != config.names:
        found, expected = ", ".join(test.classes), ", ".join(config.names or ())
        raise InputError(f"data: classes {found}, but the segmenter was trained on {expected}; name --classes")
    segmenters = {"tuned": policy}
    for name, part in (("mle", "likelihood"), ("control", "control")):
        restored = build(config).to(run.device)
        if run.restore(part, restored):
            segmenters[name] = restored.eval()
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
    for ids in torch.arange(len(data)).split(config.batch):
        images = data.pixels[ids].to(device).float() / 255
        masks, known = masks_of(data.labels[ids].to(device), len(data.classes))
        logits = tiled_logits(segmenter, images, config.crop)
        for threshold in (0.5,) if config.exclusive else THRESHOLDS:
            found = _masks(segmenter, logits, threshold) & known
            row = sums.setdefault(threshold, {"dice": 0.0, "iou": 0.0})
            for metric, score in (("dice", dice_reward), ("iou", iou_reward)):
                row[metric] += float(score(found, masks).total.double().sum()) / len(data)
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
    check_images(images, "images")
    if images.shape[1] != 3:
        raise InputError(f"images: {images.shape[1]} channels, expected 3: pass images.expand(-1, 3, -1, -1)")
    logits = tiled_logits(policy, images.to(next(policy.parameters()).device), config.crop)
    chances = logits.softmax(1)[:, 1:] if policy.exclusive else logits.sigmoid()
    return {"masks": _masks(policy, logits), "probabilities": chances}


def picture(
    config: Config, policy: Segmenter, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Image, truth, start and tuned side by side, of test images or images of the user: name → a picture."""
    truth = known = None
    if images is None:
        data = _data(config, "test")
        ids = torch.linspace(0, len(data) - 1, min(5, len(data))).long()
        part = tuple(
            slice((length - size) // 2, (length + size) // 2)
            for length in data.labels.shape[1:]
            for size in (min(length, 3 * config.crop),)
        )
        images = data.pixels[ids][:, :, *part].float() / 255
        truth, known = masks_of(data.labels[ids][:, *part], len(data.classes))
    start = build(config).to(run.device)
    shown = {"start": start.eval()} if run.restore("likelihood", start) else {}
    columns, captions = [images.cpu()], [[""] * len(images)]
    if truth is not None:
        columns.append(_painted(images, truth))
        captions.append(["truth"] * len(images))
    for name, segmenter in (shown | {"tuned": policy}).items():
        masks = predict(config, segmenter, images)["masks"].cpu()
        columns.append(_painted(images.cpu(), masks))
        dice = None if truth is None else dice_reward(masks & known, truth).total.tolist()
        captions.append([name] * len(images) if dice is None else [f"{name}: dice {value:.3f}" for value in dice])
    tiles = torch.stack(columns, 1).flatten(0, 1)
    lines = [line for row in zip(*captions, strict=True) for line in row]
    return {"masks": pictures.image_grid(tiles, lines, len(columns), cell=256)}


def _painted(
    images: Tensor, masks: Bool[Tensor, "batch classes height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Images darkened, with each class in its colour."""
    shown = 0.4 * images.expand(-1, 3, -1, -1)
    for place in range(masks.shape[1]):
        colour = torch.tensor(ImageColor.getrgb(pictures.PALETTE[(place + 4) % len(pictures.PALETTE)])) / 255
        shown = torch.where(masks[:, place, None], 0.3 * shown + 0.7 * colour[:, None, None], shown)
    return shown


def read(config: Config, path: Path) -> Float[Tensor, "batch 3 height width"]:
    """The user's picture, or the pictures of a folder, as the segmenter takes them."""
    return read_pictures(path, 3, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first images of the data, each beside its masks."""
    data = _data(config, "train")
    ids = torch.linspace(0, len(data) - 1, min(8, len(data))).long()
    images = data.pixels[ids].float() / 255
    masks, _ = masks_of(data.labels[ids], len(data.classes))
    tiles = torch.stack((images, _painted(images, masks)), 1).flatten(0, 1)
    return {"data": pictures.image_grid(tiles, [text for row in ids.tolist() for text in (data.names[row], "")])}
