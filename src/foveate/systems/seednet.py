"""SeedNet: an agent places seeds for a random walker that cuts an object out, from one seed of the user on each side.

| | |
|---|---|
| state | the image, the seeds so far on a 20×20 grid, and what the random walker makes of them |
| action | the next seed: of the background or of the object, at one of 400 cells |
| reward | 5 times what the seed gains of IoU; or as published |
| horizon | 10 seeds |
| learner | double Q-learning with dueling heads, explored where seeds are right |
| corner | value |

Song, Myeong, Lee 2018, "SeedNet: automatic seed generation with deep reinforcement learning for robust interactive
segmentation" (CVPR). Here: paid for what a seed gains (`--reward level`: as published), seeds of the right side
explored, a belief beside the values; why, and the rest: docs/systems/seednet.md.

    foveate train seednet --minutes 10
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_rgb
from foveate.data.picture_folders import read_pictures
from foveate.data.salient import Salient, load_salient
from foveate.envs import seed_play
from foveate.envs.seeds import ACTIONS, CELLS, SeedsEnv
from foveate.geometry import mask_boxes
from foveate.learn.keeper import Keeper
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.backbones import EMBEDDED, Pretrained
from foveate.models.grab_cut import grab_cut, has_opencv
from foveate.models.seed_q import FROZEN_SIDE, SeedMask, SeedQ, frozen_features
from foveate.parts import tracked
from foveate.pictures.seeds import seed_frames, seed_grid
from foveate.run import Run
from foveate.types import Evaluation, InputError, State, Tree, map_tree
from foveate.value_learning import Acting, learn_by_acting, with_belief

Look: TypeAlias = Callable[[State], Tree]
Part: TypeAlias = Literal["train", "val", "test"]
Scores: TypeAlias = dict[str, float]
Tracked: TypeAlias = tuple[SeedMask, torch.optim.Optimizer, Keeper]


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train seednet`."""

    data: str = "scenes"
    """scenes (rendered), pairs (MSRA10K's layout, or images/ and masks/); grabcut is for `foveate eval` only"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int = 40
    """side in pixels to which pictures are stretched for the random walker; a multiple of 20 has even cells"""
    skip_bad: bool = False
    """leave out pictures whose masks cannot be used, and count them, instead of stopping"""
    scenes: int = 400
    """how many scenes are rendered to train on"""
    backbone: Literal["convolutions", "efficientnet-lite0"] = "convolutions"
    """what sees the image: layers that learn, or beside them a network that knows ImageNet and stands still"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of the agent and of its two controls together"""
    minutes: float | None = None
    """wall-clock budget of all three together, a third each"""
    seeds: int = 10
    """that the agent places"""
    border: float = 0.05
    """how far from the outline a seed is well inside, in parts of the image's side"""
    beta: float = 130.0
    """of the random walker: the larger, the less it crosses edges"""
    copies: int = 32
    """of the environment in lockstep"""
    rows: int = 400
    """steps of all copies in the replay"""
    batch: int = 32
    """transitions, or images of a control, in an update"""
    reward: Literal["gain", "level"] = "gain"
    """of a seed: what it gains of IoU; or as published: the IoU that there is, if it is well inside its side"""
    discount: float = 0.5
    """of what later seeds bring, a seed"""
    guided: bool = True
    """explore with seeds that lie well inside their side; without it with any"""
    explore: float = 0.1
    """part of the actions that explore in the end; all do at first"""
    learning_rate: float = 1e-3
    """of Adam, at its peak"""
    width: int = 32
    """features of a cell, a multiple of 8"""
    depth: int = 5
    """residual blocks"""
    draws: int = 3
    """of the user's seeds for each test image"""


PART = "policy"  # the tracked part that holds the policy
CONTROLS = {"supervised": False, "supervised_seeds": True}  # tracked part → whether it sees the user's seeds
AT_ONCE = 256  # episodes played together where nothing is learned
SHARE = 1 / (1 + len(CONTROLS))  # of the budget, for the agent and for each control
EVERY = 200  # updates between looks at the held-out images
_load = lru_cache(maxsize=8)(load_salient)


def resolve(config: Config) -> Config:
    """Check the fields and the data; raises `InputError` for what is wrong."""
    for name, least in {"seeds": 1, "copies": 1, "batch": 1, "draws": 1, "depth": 1, "rows": 2}.items():
        if getattr(config, name) < least:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least {least}")
    if config.width < 8 or config.width % 8:
        raise InputError(f"width: found {config.width}, expected a multiple of 8")
    _acting(config)
    for part in ("train", "val", "test"):
        _world(config, _data(config, part), 1, "cpu")  # now, not after hours
    build(config)
    return config


def _data(config: Config, part: Part, side: int | None = None) -> Salient:
    return _load(config.data, config.root, part, side or config.image_size, config.skip_bad, config.scenes)


@lru_cache
def _backbone() -> Pretrained:
    return Pretrained(EMBEDDED, 16).eval()


@lru_cache(maxsize=8)
def _frozen(config: Config, part: Part) -> Tensor | None:
    """Features of all images of a split, then of all mirrored ones."""
    if config.backbone == "convolutions":
        return None
    images = _large(config, part)
    return torch.cat([frozen_features(_backbone(), each, CELLS) for each in (images, images.flip(-1))])


def _large(config: Config, part: Part) -> Tensor:
    large = _data(config, part, FROZEN_SIDE * CELLS)  # with --skip-bad it may have more of them
    return large.images[[large.names.index(name) for name in _data(config, part).names]]


def _world(config: Config, data: Salient, copies: int, device: Any, **options: Any) -> SeedsEnv:
    how: dict[str, Any] = {name: getattr(config, name) for name in ("border", "beta", "reward")}
    return SeedsEnv(copies, salient=data, device=device, horizon=config.seeds, **how, **options)


def _look(env: SeedsEnv, frozen: Tensor | None) -> Look:
    if frozen is None:
        return env.observe
    features = frozen.to(env.device)
    return lambda state: env.observe(state) | {"frozen": features[state.image]}


def build(config: Config) -> SeedQ:
    """The policy of a resolved config, untrained."""
    return SeedQ(CELLS, config.width, config.depth, _channels(config))


def _mask_network(config: Config, part: str) -> SeedMask:
    return SeedMask(CONTROLS[part], CELLS, config.width, config.depth, _channels(config))


def _channels(config: Config) -> int:
    return 0 if config.backbone == "convolutions" else sum(_backbone().network.feature_info.channels()[-2:])


def _acting(config: Config) -> Acting:
    rate = config.learning_rate
    return Acting(batch=config.batch, discount=config.discount, learning_rate=rate, last=config.explore)


def train(config: Config, run: Run) -> None:
    """Learn the values of seeds; then two networks that draw the mask at once, from the same images."""
    data, val = _data(config, "train"), _data(config, "val")
    torch.manual_seed(config.seed)
    policy, optimizer, keeper = tracked(run, PART, build(config), by="held_out_iou")
    env = _world(config, data, config.copies, run.device, mirrored=True)
    env.reset(seed=config.seed + run.rank * config.copies)
    replay = Replay(env.state, config.rows, ACTIONS)
    target, env, replay = run.track(target=build(config), env=env, replay=replay)
    parts = {}
    for name in CONTROLS:
        torch.manual_seed(config.seed)
        parts[name] = tracked(run, name, _mask_network(config, name), by="held_out_iou")
    look, frozen, good = _look(env, _frozen(config, "train")), _frozen(config, "val"), env.rewarded
    how: dict[str, Any] = {"look": look, "keeper": keeper, "every": EVERY, "good": good if config.guided else None}
    how["beside"] = partial(with_belief, policy.both, lambda state: env.right(state.image))
    how["validate"] = partial(_held_out, config, policy, val, frozen, run)
    learn_by_acting(run, "agent", SHARE, env, policy, target, optimizer, replay, _acting(config), **how)
    for name, control in parts.items():
        held_out = partial(_drawn, config, val, 1, run.device, control[0], frozen)
        _supervise(config, run, name, control, env, look, held_out)


def _held_out(config: Config, policy: SeedQ, val: Salient, frozen: Tensor | None, run: Run) -> Scores:
    found, _ = _score(config, val, 1, run.device, policy.eval(), frozen)
    return {"held_out_iou": found["iou"], "held_out_seed_precision": found["seed_precision"]}


def _supervise(
    config: Config, run: Run, phase: str, control: Tracked, env: SeedsEnv, look: Look, held_out: Callable[[], Scores]
) -> None:
    """A control: cross-entropy of every pixel."""
    network, optimizer, keeper = control
    for step in run.steps(phase, SHARE):
        if step == 0:
            keeper.begin()
        here = run.rows(config.batch)
        rows = noise.examples(config.seed, step, config.batch, env.examples)[here].to(run.device)
        keys = noise.key(config.seed, phase, "user", step, torch.arange(config.batch)[here]).to(run.device)
        scores = network.train()(look(seed_play.shown_first(env, rows, keys)))
        loss = F.binary_cross_entropy_with_logits(scores, env.masks[rows].float())
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=10.0)
        run.log(cross_entropy_loss=loss.detach())
        if (step + 1) % EVERY == 0:
            keeper.offer(network, held_out()["iou"])
    keeper.finish(network, held_out()["iou"])
    run.save()


def _users(data: Salient, draws: int, device: Any) -> list[tuple[Tensor, Tensor]]:
    """Images and keys of their users, `AT_ONCE` together: the same for all networks and all seeds of a run."""
    ids = torch.arange(len(data), device=device).repeat(draws)
    keys = noise.key("user", ids, torch.arange(draws, device=device).repeat_interleave(len(data)))
    return list(zip(ids.split(AT_ONCE), keys.split(AT_ONCE), strict=True))


def _score(
    config: Config, data: Salient, draws: int, device: Any, network: SeedQ | None, frozen: Tensor | None
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Metrics after all seeds, and the IoU after each. Without a network: of seeds with true labels."""
    episodes = []
    for ids, keys in _users(data, draws, device):
        env = _world(config, data, len(ids), device, autoreset="disabled")
        episodes.append(seed_play.play(env, ids, keys, network, _look(env, frozen)))
    played = map_tree(lambda *parts: torch.cat(parts), *episodes)
    curve = [(float(step), float(value)) for step, value in enumerate(played.ious.mean(0))]
    return seed_play.seed_scores(played), curve


def _drawn(config: Config, data: Salient, draws: int, device: Any, network: SeedMask, frozen: Tensor | None) -> Scores:
    """Metrics of masks that are drawn at once."""
    env = _world(config, data, 1, device)
    how = network, _look(env, frozen)
    return seed_play.iou_scores(torch.cat([seed_play.draw(env, *some, *how) for some in _users(data, draws, device)]))


def evaluate(config: Config, policy: SeedQ, run: Run, elsewhere: bool = False) -> Evaluation:
    """Mean IoU after the agent's seeds, at the walker's size, on the test split with `draws` users for each image.

    The others of its scores: `foveate.envs.seed_play.seed_scores`. Baselines: `initial`, the user's seeds
    alone; `random`, as many seeds with true labels at random places, as many for each side;
    `untrained`; `supervised`, the trunk trained to draw the mask at once, and `supervised_seeds`, which sees the user's
    seeds; `grabcut_box`, OpenCV's GrabCut from the true box, which no other row is told.
    """
    data, frozen = _data(config, "test"), _frozen(config, "test")
    score = partial(_score, config, data, config.draws, run.device)
    metrics, curve = score(policy.eval(), frozen)
    torch.manual_seed(config.seed)
    untrained, random = score(build(config).to(run.device).eval(), frozen), score(None, None)
    baselines = {"initial": {"iou": curve[0][1]}, "random": random[0], "untrained": untrained[0]}
    for name in CONTROLS:
        network = _mask_network(config, name).to(run.device)
        if run.restore(name, network):
            baselines[name] = _drawn(config, data, config.draws, run.device, network, frozen)
    if has_opencv():
        cut, truth = grab_cut(data.images, mask_boxes(data.masks)[0]), data.masks
        baselines["grabcut_box"] = seed_play.iou_scores((cut & truth).sum((1, 2)) / (cut | truth).sum((1, 2)))
    else:
        run.say("grabcut_box is left out: it needs OpenCV, pip install 'foveate[references]'")
    if config.skip_bad:
        metrics["left_out"] = float(data.left_out)
    series = {"agent": curve, "random": random[1], "untrained": untrained[1]}
    return Evaluation(metrics, baselines, {"iou against seeds": series})


def predict(config: Config, policy: SeedQ, images: Tree) -> dict[str, Tensor]:
    """Cut out what a user means.

    `images` is {"images": [batch, 3, height, width] in [0, 1], "foreground": [batch, 2], "background": [batch, 2]}, the
    user's seeds as (x, y) in pixels. Bare images are taken to mean what is in their middle and not in the upper left.

    Returns `masks` [batch, height, width] and `probabilities`; `seeds` [batch, 2 + seeds, 2], (x, y) in pixels, the
    user's first (background, foreground), and `labels`, true for the object; `steps` [batch, 1 + seeds, side, side],
    the masks before and after each seed, at the walker's size. Raises `InputError` for images that break the convention
    or are not RGB, and for seeds of another shape or outside of the image.
    """
    shown = images["images"] if isinstance(images, dict) else images
    check_rgb(shown, "images")
    device = next(policy.parameters()).device
    shown, (height, width) = shown.to(device), shown.shape[2:]
    middle = torch.tensor([width / 2, height / 2]).expand(len(shown), 2)
    given = images if isinstance(images, dict) else {"background": torch.zeros_like(middle), "foreground": middle}
    given = seed_play.given_places(given, len(shown), width, height)
    places = {name: place.to(device) for name, place in given.items()}
    small = F.interpolate(shown, (config.image_size, config.image_size), mode="bilinear", antialias=True)
    pixels = (small.clamp(0, 1) * 255).round().byte()
    env = _world(config, Salient(pixels, pixels[:, 0] > 127, ("",) * len(pixels)), len(pixels), device)
    plain = config.backbone == "convolutions"
    look = _look(env, None if plain else frozen_features(_backbone().to(device), shown, CELLS))
    found = seed_play.cut_out(env, policy.eval(), look, places["background"], places["foreground"], config.seeds)
    found["probabilities"] = seed_play.enlarged(found["probabilities"], height, width)
    found["seeds"] = found["seeds"] * shown.new_tensor([width, height])
    return {"masks": found["probabilities"] >= 0.5, **found}


def picture(config: Config, policy: SeedQ, run: Run, images: Tree = None) -> dict[str, Any]:
    """Test pictures after 0, 1, 3 and all seeds, with the truth, or the user's pictures; the first one seed by seed."""
    truth = None
    if images is None:
        data = _data(config, "test")
        plain = config.data == "scenes" and config.backbone == "convolutions"  # these are rendered at their size
        images, truth = (data.images if plain else _large(config, "test"))[:6], data.masks[:6]
        env = _world(config, data, len(images), "cpu")
        env.reset(seed=0, options={"ids": torch.arange(len(images))})
        places = {name: place * images.shape[-1] for name, place in seed_play.user_places(env.state).items()}
        images = {"images": images, **places}
    found = {name: leaf.cpu() for name, leaf in predict(config, policy, images).items()}
    shown = (images["images"] if isinstance(images, dict) else images).cpu()
    steps = sorted({0, min(1, config.seeds), min(3, config.seeds), config.seeds})
    drawn = shown[:8], found["steps"][:8], found["seeds"][:8], found["labels"][:8]
    frames = seed_frames(drawn[0][0], drawn[1][0], drawn[2][0], drawn[3][0])
    return {"seeds": seed_grid(*drawn, steps, truth), "first picture": frames}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder: what is meant is what is in the middle."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with what is meant."""
    data = _data(config, "train")
    return {"data": pictures.image_grid(pictures.painted(data.images[:8], data.masks[:8, None]), data.names[:8])}
