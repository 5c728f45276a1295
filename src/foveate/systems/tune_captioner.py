"""An image captioner tuned on CIDEr-D: one of Hugging Face, or any that writes tokens.

| | |
|---|---|
| state | the image, and the tokens written so far |
| action | the next token, or the end |
| reward | at the end: CIDEr-D of the words against all references of the image |
| horizon | the tokens of a caption, at most `length` |
| learner | likelihood, then REINFORCE with the mean of the other captions of the image as baseline |
| corner | policy |

Rennie et al. 2017, "Self-critical sequence training" (arXiv 1612.00563), with the baseline of Pinto et al. 2023
(arXiv 2302.08242). What differs here, and how to bring a model: docs/systems/tune-captioner.md.

    foveate train tune-captioner --minutes 10                                      a small model, rendered scenes
    foveate train tune-captioner --model hf:FOLDER --data coco --root FOLDER --minutes 60
"""

from __future__ import annotations

import sys
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
from foveate.data.captions import RESERVED, Captioned, Part, load_captions, not_learned, numbered, vocabulary, words_of
from foveate.data.classification import check_rgb
from foveate.data.picture_folders import read_pictures
from foveate.learn.answers import Reward
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Precision, Tuning
from foveate.models.encoder_decoder import Tokens
from foveate.models.hf_captioner import TextCaptioner
from foveate.models.named_captioners import SMALL, named_captioner
from foveate.parts import restored, tracked
from foveate.rewards.captions import Cider, Words, document_frequency, of_texts
from foveate.rewards.combine import guarded, load_reward
from foveate.run import Run
from foveate.two_steps import check_reward, check_taught, held_out_scores, learn_likelihood, tune_on_reward
from foveate.types import Evaluation, InputError, RewardOutput, check_least, map_tree, split


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train tune-captioner`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), or coco (its captions)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """side in pixels to which pictures are stretched; None: as the model reads them; small: 48 for scenes, else 128"""
    skip_bad: bool = False
    """leave out pictures and captions that are wrong, and captions on which your reward fails, and count them"""
    scenes: int = 8000
    """how many scenes are rendered to train on"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    likelihood_share: float = 0.7
    """part of the budget for maximum likelihood, 0 for a model that has it; the rest is shared by reward and control"""
    model: str = "small"
    """small, small-blip, hf:FOLDER, hf:REPOSITORY (is downloaded), or package.module:function without arguments"""
    prompt: str = ""
    """what every caption of hf:NAME begins with; it is given, and no part of the caption"""
    length: int | None = None
    """tokens of a caption at most, with the end; None: small as the longest of training, hf:NAME 20"""
    least_count: int | None = None
    """small: a word is learned if the training captions have it so often; None: 1 for scenes, 5 for coco"""
    patch: int = 8
    """small: side in pixels of what is read as one vector"""
    width: int = 96
    """small: of the vectors"""
    depth: int = 2
    """small: blocks of the encoder, and of the decoder"""
    heads: int = 4
    """small: of the attention"""
    batch: int = 32
    """images in an update of likelihood, each with all its captions"""
    learning_rate: float = 1e-3
    """peak of its one-cycle schedule; for a model that comes trained some 1e-5"""
    reward: str = "cider"
    """cider, or package.module:function of captions and their references, all of them texts"""
    tuning_batch: int = 32
    """images in an update on the reward"""
    samples: int = 8
    """captions of each of them"""
    temperature: float = 0.5
    """by which scores are divided where captions are drawn for the reward; at 1 they are far from the likeliest"""
    tuning_rate: float = 1e-4
    """learning rate of the reward, which falls evenly to 0; for a large model some 1e-6"""
    anchor: float = 0.0
    """weight of the KL to the start"""
    every: int = 100
    """updates between looks at the validation split"""
    precision: Precision = "fp32"
    """bf16 is faster on processors that compute in it"""
    vocabulary: int | None = None
    """small: words that can be written, with the end and the unknown word; taken from the data"""


PART = "policy"  # the tracked part that holds the tuned captioner
ROWS = {"mle": "likelihood", "control": "control"}  # baseline → its tracked part
AT_ONCE = 100  # images looked at together where nothing is learned
_load = lru_cache(maxsize=6)(load_captions)
_say = partial(print, file=sys.stderr)  # before there is a run


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the model and the data decide.

    Raises:
        InputError: a field is out of its range, the data or the model cannot be read, or they do not fit.
    """
    if not 0 <= config.likelihood_share < 1:
        raise InputError(f"likelihood_share: found {config.likelihood_share}, expected from 0 to less than 1")
    sizes = "patch", "length", "width", "heads"
    check_least(config, 1, "batch", "tuning_batch", "every", "scenes", "least_count", *sizes)
    check_least(config, 0, "learning_rate", "tuning_rate", "anchor")
    _tuning(config)
    if config.reward != "cider":
        load_reward(config.reward)
    found = _small(config) if config.model in SMALL else _brought(config)
    data, *_ = (_data(found, part) for part in ("train", "val", "test"))  # now, not after hours
    if not bool(build(found, data).answers(data.texts)[1].any()):
        raise InputError(f"length: found {found.length}, but no caption of training is so short; raise it")
    return found


def _small(config: Config) -> Config:
    side, least = (48, 1) if config.data == "scenes" else (128, 5)
    config = replace(config, image_size=config.image_size or side, least_count=config.least_count or least)
    data = _data(config, "train")
    _, count = vocabulary(data.sentences, config.least_count or 1)
    if count == len(RESERVED):
        raise InputError(f"least_count: no word occurs {config.least_count} times in training; lower it")
    longest = 1 + max(len(sentence) for sentences in data.sentences for sentence in sentences)
    return replace(config, vocabulary=count, length=config.length or longest)


def _brought(config: Config) -> Config:
    policy = build(config)
    if config.image_size not in (None, policy.side):
        raise InputError(f"image_size: found {config.image_size}, but the model reads {policy.side}; leave it out")
    return replace(config, image_size=policy.side, length=policy.length)


def _data(config: Config, part: Part) -> Captioned:
    return _load(config.data, config.root, part, config.image_size or 0, config.skip_bad, config.scenes, _say)


def _tuning(config: Config) -> Tuning:
    same = {name: getattr(config, name) for name in ("samples", "anchor", "precision", "temperature")}
    return Tuning(learning_rate=config.tuning_rate, anneal=True, **same)


def build(config: Config, data: Captioned | None = None) -> TextCaptioner:
    """The policy of a resolved config: with the weights it comes with, or small, and told the words of `data`."""
    sizes: dict[str, int] = {}
    if config.model in SMALL:
        sizes = {name: getattr(config, name) for name in ("patch", "vocabulary", "width", "depth", "heads")}
        sizes["side"] = config.image_size or 0
    policy = named_captioner(config.model, config.length, config.prompt, **sizes)
    if data is not None and config.model in SMALL:
        words, count = vocabulary(data.sentences, config.least_count or 1)
        policy.spell(words[:count])
    return policy


def _images(pixels: Tensor, device: torch.device) -> Tensor:
    return pixels.to(device).float() / 255


def _numbered(sentences: Any, words: tuple[str, ...], device: torch.device) -> Words:
    return Words(*(tensor.to(device) for tensor in numbered(sentences, words)))


def _reward(references: Words, words: tuple[str, ...]) -> Reward:
    """CIDEr-D of texts; `words` are those of all references, and any other word of a text matches nothing."""
    cider = Cider(document_frequency(references))

    def reward(captions: list[str], targets: Words) -> RewardOutput:
        said = _numbered([[words_of(text)] for text in captions], words, targets.ids.device)
        return cider(Words(said.ids[:, 0], said.mask[:, 0]), targets)

    return reward


def _own(config: Config, words: tuple[str, ...]) -> Reward:
    """What the user's function says of captions and the list of references of each, all of them texts."""
    return of_texts(guarded(load_reward(config.reward), config.skip_bad, config.reward), words)


def _judge(config: Config, data: Captioned, device: torch.device) -> tuple[Words, dict[str, Reward]]:
    """References of a split, and the scores of captions, CIDEr-D with the document frequencies of these alone."""
    words, _ = vocabulary(data.sentences, 1)
    references = _numbered(data.sentences, words, device)
    own = {} if config.reward == "cider" else {"reward": _own(config, words)}
    return references, {"cider": _reward(references, words)} | own


def train(config: Config, run: Run) -> None:
    """Likelihood, then the reward; then more likelihood from the same start. Each ends with the weights best on val."""
    if config.model in SMALL:
        check_taught(run, likelihood_share=config.likelihood_share)
    data, val = _data(config, "train"), _data(config, "val")
    parts: dict[str, tuple[Any, ...]] = {}
    for name in ("likelihood", PART, "control"):
        torch.manual_seed(config.seed)
        policy = build(config, data)
        told = policy.words
        parts[name] = tracked(run, name, policy)
        if policy.words != told:
            raise InputError("from: that run writes other words than this data has; train from the beginning")
    (average,), (start, *_) = run.track(average=MovingAverage()), parts["likelihood"]
    words, _ = vocabulary((*data.sentences, *val.sentences), 1)
    references, targets = (_numbered(part.sentences, words, run.device) for part in (data, val))
    cider, metric = _reward(references, words), _reward(targets, words)  # each with its own document frequencies
    reward = cider if config.reward == "cider" else _own(config, words)
    learned = map_tree(lambda leaf: leaf.to(run.device), start.answers(data.texts))
    for line in not_learned(_left_out(config), references.mask, learned[1]):
        run.say(line)

    def look(policy: TextCaptioner) -> dict[str, Any]:
        parts = ((_images(pixels, run.device), wanted) for pixels, wanted in split((val.pixels, targets), AT_ONCE))
        return held_out_scores(policy, reward, parts, config.seed, config.precision, cider=metric)

    def some(step: int, batch: int, tree: Any) -> tuple[Tensor, Any]:
        here = noise.examples(config.seed, step, batch, len(data))[run.rows(batch)]
        return _images(data.pixels[here], run.device), map_tree(lambda leaf: leaf[here.to(leaf.device)], tree)

    def answered(step: int) -> tuple[Tensor, Tokens]:
        images, (ids, mask) = some(step, config.batch, learned)
        used = slice(max(1, int(mask.sum(2).max())))
        return images, Tokens(ids[..., used].flatten(0, 1), mask[..., used].flatten(0, 1))

    def learn(name: str, share: float, start: TextCaptioner | None = None) -> None:
        policy, optimizer, keeper = parts[name]
        how: Any = {"keeper": keeper, "validate": partial(look, policy), "every": config.every, "start": start}
        learner = policy, answered, optimizer, config.learning_rate
        learn_likelihood(run, name, share, *learner, precision=config.precision, **how)

    scored = partial(some, batch=config.tuning_batch, tree=references)
    _, said = some(0, config.tuning_batch, Tokens(*(each[:, 0] for each in learned)))
    asked = scored(0), config.samples, config.reward, None if config.reward == "cider" else said
    check_reward(run, start, reward, *asked)  # now, not after the first phase
    learn("likelihood", config.likelihood_share)
    share, (policy, optimizer, keeper) = (1 - config.likelihood_share) / 2, parts[PART]
    learner = policy, reward, scored, _tuning(config), optimizer, average, start
    how: Any = {"keeper": keeper, "validate": partial(look, policy), "every": config.every}
    tune_on_reward(run, "reward", share, *learner, **how)
    learn("control", share, start)


def _left_out(config: Config) -> list[str]:
    return [line for part in ("train", "val", "test") for line in _data(config, part).skipped]


def evaluate(config: Config, policy: TextCaptioner, run: Run, elsewhere: bool = False) -> Evaluation:
    """CIDEr-D, from 0 to 10, on the test split; `elsewhere`: on every picture of other data.

    `cider` is that of greedy captions, `sampled_cider` that of one drawn for each image; `reward` and `sampled_reward`
    are those of the user's own. Baselines: `mle`, the start; `control`, the start with more likelihood instead of the
    reward. `left_out` counts what `skip_bad` left out.
    """
    data = _data(config, "all" if elsewhere else "test")
    score = _scorer(config, data, run.device)
    metrics, baselines = score(policy), {}
    if config.skip_bad:
        metrics["left_out"] = float(len(data.skipped if elsewhere else _left_out(config)))
    for name, other in restored(run, ROWS, partial(build, config)).items():
        baselines[name] = score(other)
    return Evaluation(metrics, baselines)


def compared(config: Config, policy: TextCaptioner, run: Run, images: int) -> tuple[Reward, Tensor, Words]:
    """The reward, and the first test images with their references: for `foveate analyse`."""
    test = _data(config, "test")
    references, scores = _judge(config, test, run.device)
    pixels, first = split((test.pixels, references), images)[0]
    return scores.get("reward", scores["cider"]), _images(pixels, run.device), first


def _scorer(config: Config, data: Captioned, device: torch.device) -> Callable[[TextCaptioner], dict[str, float]]:
    references, scores = _judge(config, data, device)
    keys = noise.key(config.seed, "evaluation", torch.arange(len(data))).to(device)

    def score(policy: TextCaptioner) -> dict[str, float]:
        found: dict[str, list[Tensor]] = {}
        for pixels, targets, some in split((data.pixels, references, keys), AT_ONCE):
            for way, greedy in (("", True), ("sampled_", False)):
                written = policy.decode(policy.sample(_images(pixels, device), 1, greedy, some))
                for name, reward in scores.items():
                    found.setdefault(way + name, []).append(reward(written, targets).total)
        return {name: float(torch.cat(totals).mean()) for name, totals in found.items()}

    return score


def predict(
    config: Config, policy: TextCaptioner, images: Float[Tensor, "batch channels height width"]
) -> dict[str, Any]:
    """Say what is in RGB images in [0, 1]: `captions`, a list of texts, and `ids` [batch, tokens], 0 after the end."""
    check_rgb(images, "images")
    device = policy.letters.device
    stretched = F.interpolate(images.to(device), (policy.side, policy.side), mode="bilinear", antialias=True)
    keys = torch.zeros(len(images), dtype=torch.int64, device=device)  # greedy: nothing is drawn
    written = policy.sample(_images((stretched * 255).round().byte(), device), 1, True, keys)
    return {"captions": policy.decode(written), "ids": written.ids}


def picture(
    config: Config, policy: TextCaptioner, run: Run, images: Float[Tensor, "batch channels height width"] | None = None
) -> dict[str, Any]:
    """Test pictures with the captions of the start and of the tuned model and a person's; or pictures of the user."""
    said: dict[str, list[str]] = {}
    if images is None:
        images, texts = _data(config, "test").some()
        said["reference"] = [several[0] for several in texts]
    for start in restored(run, {"mle": "likelihood"}, partial(build, config)).values():
        said = {"mle": predict(config, start, images)["captions"], **said}
    said = {"tuned": predict(config, policy, images)["captions"], **said}
    columns = [[f"{name}: {text}" for text in texts] for name, texts in said.items()]
    return {"captions": pictures.sentence_grid(images.cpu(), list(zip(*columns, strict=True)))}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder."""
    return read_pictures(path, 3, None if path.is_file() else 4 * (config.image_size or 0))


def check(config: Config) -> dict[str, Any]:
    """Pictures of training, each with its captions."""
    return {"data": pictures.sentence_grid(*_data(config, "train").some())}
