"""Captioning: a sentence on an image, first learned from people's sentences, then tuned on CIDEr-D or your own score.

| | |
|---|---|
| state | the image, and the words written so far |
| action | the next word, or the end |
| reward | at the end: CIDEr-D against all references of the image |
| horizon | the words of a sentence, at most `length` |
| learner | likelihood, then REINFORCE with the mean of the other sentences on the image as baseline |
| corner | policy |

Pinto et al. 2023, "Tuning computer vision models with task rewards" (arXiv 2302.08242); the reward is that of Rennie
et al. 2017, "Self-critical sequence training". What differs here, and the numbers: docs/systems/captioning.md.

    foveate train captioning --minutes 10                                    rendered scenes
    foveate train captioning --data coco --root FOLDER --minutes 30          pictures through an ImageNet network
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data import captions
from foveate.data.captions import END, LONGEST, RESERVED, Captioned, Part, load_captions
from foveate.data.classification import check_rgb
from foveate.data.picture_folders import check_memory, read_pictures
from foveate.learn.answers import Reward
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.backbones import EMBEDDED
from foveate.models.captioner import Captioner
from foveate.models.encoder_decoder import Tokens
from foveate.parts import restored, tracked
from foveate.rewards.captions import Cider, Words, document_frequency, of_texts
from foveate.rewards.combine import guarded, load_reward
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, check_least, known, map_tree, split


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train captioning`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), or coco (its captions)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """side in pixels to which pictures are stretched; None: 48 for scenes, 128 for coco"""
    skip_bad: bool = False
    """leave out pictures and captions that are wrong, and captions on which your reward fails, and count them"""
    scenes: int = 8000
    """how many scenes are rendered to train on"""
    least_count: int | None = None
    """a word is learned if the training captions have it so often; None: 1 for scenes, 5 for coco"""
    length: int | None = None
    """words of a caption at most, its end being one; None: as the longest of training"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.5
    """part of the budget for maximum likelihood, 0 with --from; the rest is shared evenly by reward and control"""
    backbone: str | None = None
    """convolutions, efficientnet-lite0 (no download), torchvision:NAME, a name of timm; None: the first for scenes"""
    tune_backbone: bool = False
    """let a pretrained backbone learn too; else what it sees is computed once for each picture"""
    patch: int | None = None
    """pixels of the image, a side, to a vector that is read; None: 8 with convolutions, else 16"""
    width: int = 96
    """of the vectors"""
    depth: int = 2
    """blocks of the encoder, and of the decoder"""
    heads: int = 4
    """of the attention"""
    batch: int = 32
    """images in an update of likelihood, each with all its captions"""
    learning_rate: float = 1e-3
    """peak of its one-cycle schedule"""
    reward: str = "cider"
    """cider, or package.module:function of captions and their references, all of them texts"""
    tuning_batch: int = 32
    """images in an update on the reward"""
    samples: int = 8
    """captions of each of them"""
    temperature: float = 0.5
    """by which scores are divided where these are drawn; at 1 they are far from the likeliest"""
    tuning_rate: float = 1e-4
    """learning rate of the reward, which falls evenly to 0"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    every: int = 100
    """updates between looks at the validation split"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    vocabulary: int | None = None
    """words that can be written, with the end and the unknown word; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
AT_ONCE = 100  # images looked at together where nothing is learned


_load = lru_cache(maxsize=6)(load_captions)
_say = partial(print, file=sys.stderr)  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides.

    Raises:
        InputError: a field is out of its range, or the data cannot be read.
    """
    backbone = config.backbone or ("convolutions" if config.data == "scenes" else EMBEDDED)
    found: dict[str, Any] = {"backbone": backbone, "patch": 8 if backbone == "convolutions" else 16}
    found |= {"image_size": 48, "least_count": 1} if config.data == "scenes" else {"image_size": 128, "least_count": 5}
    config = replace(config, **{name: value for name, value in found.items() if getattr(config, name) is None})
    if not 0 <= config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share}, expected from 0 to less than 1")
    sizes = "patch", "length", "width", "heads"
    check_least(config, 1, "batch", "tuning_batch", "every", "scenes", "least_count", *sizes)
    check_least(config, 0, "learning_rate", "tuning_rate", "anchor")
    if config.tune_backbone and backbone == "convolutions":
        raise InputError("tune_backbone: convolutions are not pretrained and learn anyway; leave it out")
    _tuning(config)
    if config.reward != "cider":
        load_reward(config.reward)
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    _, count = captions.vocabulary(data.sentences, known(config.least_count))
    if count == len(RESERVED):
        raise InputError(f"least_count: no word occurs {config.least_count} times in training; lower it")
    lengths = {1 + len(sentence) for sentences in data.sentences for sentence in sentences}
    if config.length is not None and config.length < min(lengths):
        raise InputError(f"length: found {config.length}, but no caption of training is so short; raise it")
    build(config := replace(config, vocabulary=count, length=config.length or max(lengths)))  # told now
    return config


def _data(config: Config, part: Part) -> Captioned:
    return _load(config.data, config.root, part, known(config.image_size), config.skip_bad, config.scenes, _say)


def _tuning(config: Config) -> Tuning:
    same = {name: getattr(config, name) for name in ("samples", "anchor", "precision", "temperature")}
    return Tuning(learning_rate=config.tuning_rate, anneal=True, **same)


def build(config: Config) -> Captioner:
    """The policy of a resolved config, untrained."""
    sizes = known(config.image_size), known(config.patch), known(config.vocabulary), known(config.length)
    seen = known(config.backbone), config.tune_backbone
    return Captioner(*sizes, END, LONGEST, *seen, config.width, config.depth, config.heads)


def _seen(policy: Captioner, data: Captioned) -> Tensor:
    """Pixels on the policy's device, or what a backbone that stands still sees of them."""
    pixels = data.pixels.to(policy.letters.device)
    if policy.backbone is None:
        return pixels
    check_memory(data.name, (len(pixels), *policy.look(pixels[:1]).shape[1:]), 4)
    return torch.cat([policy.look(some) for some in pixels.split(AT_ONCE)])


def _inputs(policy: Captioner, seen: Tensor) -> Tensor:
    return policy.look(seen) if seen.dtype == torch.uint8 else seen


def _references(data: Captioned, words: tuple[str, ...], device: torch.device) -> Words:
    return Words(*(tensor.to(device) for tensor in captions.numbered(data.sentences, words)))


def _reward(references: Words) -> Reward:
    cider = Cider(document_frequency(references))
    return lambda written, targets: cider(Words(written.ids, written.mask & (written.ids != END)), targets)


def _own(config: Config, policy: Captioner, words: tuple[str, ...]) -> Reward:
    """What the user's function says of captions and the list of references of each, all of them texts.

    `words` are those of the references; captions are written in the policy's, which come first among them.
    """
    score = of_texts(guarded(load_reward(config.reward), config.skip_bad, config.reward), words)
    return lambda written, targets: score(policy.sentences(written.ids), targets)


def _judge(config: Config, policy: Captioner, data: Captioned) -> tuple[Words, dict[str, Reward]]:
    """References of a split, and the scores of captions, CIDEr-D with the document frequencies of these alone."""
    words = captions.every_word(policy.words, data)
    references = _references(data, words, policy.letters.device)
    own = {} if config.reward == "cider" else {"reward": _own(config, policy, words)}
    return references, {"cider": _reward(references)} | own


def train(config: Config, run: Run) -> None:
    """Learn by likelihood, then by the reward; then by more likelihood from the same start, for as long as the reward.

    Each phase ends with those of its weights that wrote the best captions of the validation split.
    """
    check_taught(run, likelihood_share=config.likelihood_share)
    data, val = _data(config, "train"), _data(config, "val")
    every_word, count = captions.vocabulary(data.sentences, known(config.least_count))
    parts: dict[str, tuple[Any, ...]] = {}
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        policy = build(config)
        policy.spell(every_word[:count])
        parts[name] = tracked(run, name, policy)
    (average,), (start, *_) = run.track(average=MovingAverage()), parts["likelihood"]
    if start.words != every_word[:count]:
        raise InputError("from: that run writes other words than this data has; train from the beginning")
    words = captions.every_word(every_word, val)
    seen, references = _seen(start, data), _references(data, words, run.device)
    learned = captions.answers(references.ids, references.mask, count, known(config.length))
    for line in captions.not_learned(_left_out(config), references.mask, learned[1]):
        run.say(line)
    reward = _reward(references) if config.reward == "cider" else _own(config, start, words)
    held_out = _seen(start, val), _references(val, words, run.device)
    metric = _reward(held_out[1])  # with the document frequencies of what it is scored against, as on test

    def look(policy: Captioner) -> dict[str, Any]:
        some = ((_inputs(policy, seen), references) for seen, references in split(held_out, AT_ONCE))
        return held_out_scores(policy, reward, some, config.seed, config.precision, cider=metric)

    def rows(step: int, batch: int) -> Tensor:
        return noise.examples(config.seed, step, batch, len(data))[run.rows(batch)].to(run.device)

    def learn(name: str, share: float, start: Captioner | None = None) -> None:
        policy, optimizer, keeper = parts[name]

        def batches(step: int) -> tuple[Tensor, Tokens]:
            here = rows(step, config.batch)
            ids, mask = (each[here].flatten(0, 1) for each in learned)
            used = slice(max(1, int(mask.sum(1).max())))
            return _inputs(policy, seen[here]), Tokens(ids[:, used], mask[:, used])

        how = {"keeper": keeper, "validate": lambda: look(policy), "every": config.every, "precision": config.precision}
        learn_likelihood(run, name, share, policy, batches, optimizer, config.learning_rate, start=start, **how)

    def batches(step: int) -> tuple[Tensor, Words]:
        here = rows(step, config.tuning_batch)
        return _inputs(policy, seen[here]), map_tree(lambda leaf: leaf[here], references)

    if config.reward != "cider":  # now, not after the first phase
        said = Tokens(*(each[rows(0, config.tuning_batch)][:, 0] for each in learned))
        check_reward(run, start, reward, batches(0), config.samples, config.reward, said)
    learn("likelihood", config.likelihood_share)
    share, (policy, optimizer, keeper) = (1 - config.likelihood_share) / 2, parts[PART]
    how = {"keeper": keeper, "validate": lambda: look(policy), "every": config.every}
    tune_on_reward(run, "reward", share, policy, reward, batches, _tuning(config), optimizer, average, start, **how)
    learn("control", share, start)


def _left_out(config: Config) -> list[str]:
    return [line for part in ("train", "val", "test") for line in _data(config, part).skipped]


def evaluate(config: Config, policy: Captioner, run: Run, elsewhere: bool = False) -> Evaluation:
    """CIDEr-D, from 0 to 10, on the test split; `elsewhere`: on every picture of other data.

    `cider` is that of greedy captions, `sampled_cider` that of one drawn for each image; `reward` and `sampled_reward`
    are those of the user's own. Document frequencies are those of the references that are scored against, as in
    pycocoevalcap; a word that the policy does not know matches nothing. Baselines: `mle`, the start; `control`, the
    start with more likelihood instead of the reward. `left_out` counts what `skip_bad` left out of the data.
    """
    data = _data(config, "all" if elsewhere else "test")
    (references, scores), seen = _judge(config, policy, data), _seen(policy, data)
    score = partial(_score, config.seed, shown=(seen, references), scores=scores)
    metrics = score(policy)
    if config.skip_bad:
        metrics["left_out"] = float(len(data.skipped if elsewhere else _left_out(config)))
    others = restored(run, ROWS, partial(build, config))
    return Evaluation(metrics, {name: score(other) for name, other in others.items()})


def compared(config: Config, policy: Captioner, run: Run, images: int) -> tuple[Reward, Tensor, Words]:
    """The reward, and the first test images with their references: for `foveate analyse`."""
    test = _data(config, "test")
    references, scores = _judge(config, policy, test)
    some, first = split((_seen(policy, test), references), images)[0]
    return scores.get("reward", scores["cider"]), _inputs(policy, some), first


def _score(seed: int, policy: Captioner, shown: tuple[Tensor, Words], scores: dict[str, Reward]) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {}
    keys = noise.key(seed, "evaluation", torch.arange(len(shown[0]))).to(shown[0].device)
    for seen, references, some in split((*shown, keys), AT_ONCE):
        for way, greedy in (("", True), ("sampled_", False)):
            written = policy.sample(_inputs(policy, seen), 1, greedy, some)
            for name, reward in scores.items():
                found.setdefault(way + name, []).append(reward(written, references).total)
    return {name: float(torch.cat(totals).mean()) for name, totals in found.items()}


def predict(config: Config, policy: Captioner, images: Float[Tensor, "batch channels height width"]) -> dict[str, Any]:
    """Say what is in images in [0, 1]: `captions`, a list of texts, and `ids` [batch, words], 0 after the last word.

    Raises:
        InputError: the images break the convention, or are not RGB.
    """
    check_rgb(images, "images")
    size, device = (known(config.image_size),) * 2, policy.letters.device
    stretched = F.interpolate(images.to(device), size, mode="bilinear", antialias=True)
    keys = torch.zeros(len(images), dtype=torch.int64, device=device)  # greedy: nothing is drawn
    written = policy.sample(policy.look((stretched * 255).round().byte()), 1, True, keys)
    return {"captions": policy.sentences(written.ids), "ids": written.ids}


def picture(
    config: Config, policy: Captioner, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Test pictures with the captions of the start and of the tuned model and a person's; or pictures of the user."""
    said: dict[str, list[str]] = {}
    if images is None:
        images, texts = _data(config, "test").some()
        said["reference"] = [several[0] for several in texts]
    models = {"tuned": policy, **restored(run, {"mle": "likelihood"}, partial(build, config))}
    said = {name: predict(config, model, images)["captions"] for name, model in models.items()} | said
    columns = [[f"{name}: {text}" for text in texts] for name, texts in said.items()]
    return {"captions": pictures.sentence_grid(images.cpu(), list(zip(*columns, strict=True)))}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * known(config.image_size))


def check(config: Config) -> dict[str, Any]:
    """Pictures of training, each with its captions."""
    return {"data": pictures.sentence_grid(*_data(config, "train").some())}
