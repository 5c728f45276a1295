"""SeedNet: an agent places seeds for a random walker that cuts an object out, from one seed of the user on each side.

| | |
|---|---|
| state | the image, the seeds so far on a 20×20 grid, and the mask that the random walker makes of them |
| action | the next seed: of the background or of the object, at one of 400 cells |
| reward | (exp(5 · IoU) - 1) / (exp(5) - 1) of a seed well inside its side, 1 less near the border, -1 on the wrong side |
| horizon | 10 seeds |
| learner | double Q-learning with dueling heads, explored where seeds are right |
| corner | value |

Song, Myeong, Lee 2018, "SeedNet: automatic seed generation with deep reinforcement learning for robust interactive
segmentation" (CVPR). What differs here and why, and the numbers: docs/systems/seednet.md.

    foveate train seednet --minutes 10
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate import noise, pictures
from foveate.data.classification import check_images
from foveate.data.picture_folders import read_pictures
from foveate.data.salient import Salient, load_salient
from foveate.envs.seeds import BACKGROUND, CELLS, FOREGROUND, SeedsEnv, SeedState
from foveate.learn.keeper import Keeper
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.backbones import EMBEDDED, Pretrained
from foveate.models.grab_cut import boxes_around, grab_cut, has_opencv
from foveate.models.seed_q import FROZEN_SIDE, SeedMask, SeedQ, frozen_features
from foveate.pictures.seeds import seed_frames, seed_grid
from foveate.run import Run
from foveate.two_steps import tracked
from foveate.types import Evaluation, InputError, State, Tree, map_tree
from foveate.value_learning import Acting, Walk, learn_by_acting, walk

Look: TypeAlias = Callable[[State], Tree]


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
    """updates of the agent; each control has as many"""
    minutes: float | None = None
    """wall-clock budget of agent and controls together"""
    agent_share: float = 0.5
    """part of the budget for the agent, if in minutes; of a budget in steps all phases have the whole"""
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
    discount: float = 0.7
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
GOOD = 0.9  # IoU from which a mask counts as a success
_load = lru_cache(maxsize=8)(load_salient)


def resolve(config: Config) -> Config:
    """Check the fields and the data; raises `InputError` for what is wrong."""
    for name in ("seeds", "copies", "batch", "draws", "depth"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if config.width < 8 or config.width % 8:
        raise InputError(f"width: found {config.width}, expected a multiple of 8")
    if not 0 < config.agent_share < 1:
        raise InputError(f"agent_share: found {config.agent_share:g}, expected more than 0 and less than 1")
    _acting(config)
    if config.rows < 2:
        raise InputError(f"rows: found {config.rows}, expected at least 2")
    for part in ("train", "val", "test"):
        _world(config, _data(config, part), 1, "cpu")  # now, not after hours
    build(config)
    return config


def _data(config: Config, part: Literal["train", "val", "test"], side: int | None = None) -> Salient:
    return _load(config.data, config.root, part, side or config.image_size, config.skip_bad, config.scenes)


@lru_cache(maxsize=1)
def _backbone() -> Pretrained:
    return Pretrained(EMBEDDED, 16).eval()


@lru_cache(maxsize=8)
def _frozen(config: Config, part: Literal["train", "val", "test"]) -> Tensor | None:
    """Features of all images of a split, then of all mirrored ones."""
    if config.backbone == "convolutions":
        return None
    images = _data(config, part, FROZEN_SIDE * CELLS).images
    return torch.cat([frozen_features(_backbone(), each, CELLS) for each in (images, images.flip(-1))])


def _world(config: Config, data: Salient, copies: int, device: Any, **options: Any) -> SeedsEnv:
    how: dict[str, Any] = {"border": config.border, "beta": config.beta, "horizon": config.seeds}
    return SeedsEnv(copies, salient=data, device=device, **how, **options)


def _look(env: SeedsEnv, frozen: Tensor | None) -> Look:
    if frozen is None:
        return env.observe
    return lambda state: env.observe(state) | {"frozen": frozen[state.image.to(frozen.device)].to(state.image.device)}


def build(config: Config) -> SeedQ:
    """The policy of a resolved config, untrained."""
    return SeedQ(CELLS, config.width, config.depth, _channels(config))


def _channels(config: Config) -> int:
    return 0 if config.backbone == "convolutions" else sum(_backbone().network.feature_info.channels()[-2:])


def _mask_network(config: Config, part: str) -> SeedMask:
    return SeedMask(CONTROLS[part], CELLS, config.width, config.depth, _channels(config))


def _acting(config: Config) -> Acting:
    numbers = {"batch": config.batch, "discount": config.discount, "learning_rate": config.learning_rate}
    return Acting(**numbers, last=config.explore)


def train(config: Config, run: Run) -> None:
    """Learn the values of seeds; then two networks that draw the mask at once, from the same images."""
    data, val = _data(config, "train"), _data(config, "val")
    torch.manual_seed(config.seed)
    policy, optimizer, keeper = tracked(run, PART, build(config), by="held_out_iou")
    env = _world(config, data, config.copies, run.device, mirrored=True)
    env.reset(seed=config.seed + run.rank * config.copies)
    replay = Replay(env.state, config.rows, 2 * CELLS * CELLS)
    target, env, replay = run.track(target=build(config), env=env, replay=replay)
    parts = {}
    for name in CONTROLS:
        torch.manual_seed(config.seed)
        parts[name] = tracked(run, name, _mask_network(config, name), by="held_out_iou")
    look, frozen = _look(env, _frozen(config, "train")), _frozen(config, "val")
    # A step of each phase is an update, so a budget in steps gives each as many as one in minutes shares the time.
    shares = (1.0, 1.0) if config.minutes is None else (config.agent_share, (1 - config.agent_share) / len(CONTROLS))
    learn_by_acting(
        run,
        "agent",
        shares[0],
        env,
        policy,
        target,
        optimizer,
        replay,
        _acting(config),
        look=look,
        good=env.rewarded if config.guided else None,
        keeper=keeper,
        validate=partial(_held_out, config, policy, val, frozen, run),
        every=200,
    )
    for name, control in parts.items():
        _supervise(config, run, name, shares[1], *control, env, look, val, frozen)


def _held_out(config: Config, policy: SeedQ, val: Salient, frozen: Tensor | None, run: Run) -> dict[str, float]:
    found, *_ = _score(config, val, 1, run.device, policy.eval(), frozen)
    return {"held_out_iou": found["iou"], "held_out_seed_precision": found["seed_precision"]}


def _supervise(
    config: Config,
    run: Run,
    phase: str,
    share: float,
    network: SeedMask,
    optimizer: torch.optim.Optimizer,
    keeper: Keeper,
    env: SeedsEnv,
    look: Look,
    val: Salient,
    frozen: Tensor | None,
) -> None:
    """A control: cross-entropy of every pixel."""
    for step in run.steps(phase, share):
        if step == 0:
            keeper.begin()
        here = run.rows(config.batch)
        rows = noise.examples(config.seed, step, config.batch, env.examples)[here].to(run.device)
        keys = noise.key(config.seed, phase, "user", step, torch.arange(config.batch)[here]).to(run.device)
        scores = network.train()(look(_first(env, rows, keys)))
        loss = F.binary_cross_entropy_with_logits(scores, env.masks[rows].float())
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=10.0)
        run.log(cross_entropy_loss=loss.detach())
        if (step + 1) % 200 == 0:
            keeper.offer(network, _drawn(config, val, 1, run.device, network, frozen)["iou"])
    score = _drawn(config, val, 1, run.device, network, frozen)["iou"]
    keeper.offer(network, score)
    network.load_state_dict(keeper.best.state_dict())
    run.save()


def _first(env: SeedsEnv, ids: Tensor, keys: Tensor) -> SeedState:
    """What a control is shown: the user's seeds, and no mask."""
    return SeedState(ids, env.user_seeds(ids, keys), torch.zeros_like(env.masks[ids]))


def _rows(size: int, draws: int, device: Any) -> tuple[Tensor, ...]:
    """Test images, each as often as the user's seeds are drawn, in parts."""
    return torch.arange(size, device=device).repeat(draws).split(AT_ONCE)


@torch.no_grad()
def _score(
    config: Config,
    data: Salient,
    draws: int,
    device: Any,
    network: Callable[[Tree], Tensor] | None,
    frozen: Tensor | None,
) -> tuple[dict[str, float], list[tuple[float, float]], Walk]:
    """Metrics after all seeds and the IoU after each, and the first episodes. Without a network: seeds with true labels.

    These fall on either side alike, anywhere well inside of it.
    """
    ious, right, first = [], [], None
    for part, ids in enumerate(_rows(len(data), draws, device)):
        env = _world(config, data, len(ids), device, autoreset="disabled")
        keys = noise.key(config.seed, "true seeds", part, torch.arange(len(ids), device=device))
        played = (
            walk(env, partial(_true_seed, env, keys), ids, lambda state: state)
            if network is None
            else walk(env, network, ids, _look(env, frozen))
        )
        times = range(played.states.image.shape[1])
        ious.append(torch.stack([env.iou(map_tree(lambda leaf: leaf[:, time], played.states)) for time in times], 1))  # noqa: B023
        cells = env.object[ids].flatten(1).gather(1, played.actions % CELLS**2)
        right.append(cells == (played.actions >= CELLS**2))
        first = first or played
    assert first is not None
    iou = torch.cat(ious)
    scores = {"iou": iou[:, -1].mean(), "success": (iou[:, -1] >= GOOD).float().mean()}
    scores["seed_precision"] = torch.cat(right).float().mean()
    curve = [(float(step), float(value)) for step, value in enumerate(iou.mean(0))]
    return {name: float(value) for name, value in scores.items()}, curve, first


def _true_seed(env: SeedsEnv, keys: Tensor, state: SeedState) -> Tensor:
    """Values under which a seed of either side, drawn evenly among those that are right, is best."""
    dice = noise.uniform(noise.fold(keys, (state.seeds > 0).flatten(1).sum(1)), 2 * CELLS**2 + 1)
    side = (torch.arange(2, device=dice.device) == (dice[:, -1:] < 0.5)).repeat_interleave(CELLS**2, 1)
    return dice[:, :-1] + 2.0 * env.rewarded(state) + side


@torch.no_grad()
def _drawn(
    config: Config, data: Salient, draws: int, device: Any, network: SeedMask, frozen: Tensor | None
) -> dict[str, float]:
    """Metrics of masks that are drawn at once."""
    env, ious = _world(config, data, 1, device), []
    for part, ids in enumerate(_rows(len(data), draws, device)):
        keys = noise.key(config.seed, "drawn", part, torch.arange(len(ids), device=device))
        state = _first(env, ids, keys)
        masks = network.eval()(_look(env, frozen)(state)) > 0
        ious.append(env.iou(replace(state, mask=masks)))
    return _iou_scores(torch.cat(ious))


def _iou_scores(iou: Tensor) -> dict[str, float]:
    return {"iou": float(iou.mean()), "success": float((iou >= GOOD).float().mean())}


def evaluate(config: Config, policy: SeedQ, run: Run, elsewhere: bool = False) -> Evaluation:
    """Mean IoU after the agent's seeds, at the walker's size, on the test split with `draws` users for each image.

    `success` is the share of masks from 0.9 on; `seed_precision` that of the seeds on their own side. Baselines:
    `initial`, the user's seeds alone; `random`, as many seeds with true labels at random places, as many for each side;
    `untrained`; `supervised`, the trunk trained to draw the mask at once, and `supervised_seeds`, which sees the user's
    seeds; `grabcut_box`, OpenCV's GrabCut from the true box, which no other row is told.
    """
    data, frozen = _data(config, "test"), _frozen(config, "test")
    score = partial(_score, config, data, config.draws, run.device)
    metrics, curve, _ = score(policy.eval(), frozen)
    torch.manual_seed(config.seed)
    untrained, random = score(build(config).to(run.device).eval(), frozen), score(None, None)
    env = _world(config, data, 1, run.device)
    baselines = {"initial": {"iou": curve[0][1]}, "random": random[0], "untrained": untrained[0]}
    for name in CONTROLS:
        network = _mask_network(config, name).to(run.device)
        if run.restore(name, network):
            baselines[name] = _drawn(config, data, config.draws, run.device, network, frozen)
    if has_opencv():
        cut = grab_cut(env.pixels.float() / 255, boxes_around(env.masks))
        ids = torch.arange(len(data), device=run.device)
        baselines["grabcut_box"] = _iou_scores(env.iou(SeedState(ids, env.pixels.new_zeros(len(ids), 1, 1), cut)))
    else:
        run.say("grabcut_box is left out: it needs OpenCV, pip install 'foveate[references]'")
    if config.skip_bad:
        metrics["left_out"] = float(data.left_out)
    series = {"agent": curve, "random": random[1], "untrained": untrained[1]}
    return Evaluation(metrics, baselines, {"iou against seeds": series})


def predict(config: Config, policy: SeedQ, images: Tree) -> dict[str, Tensor]:
    """Cut out what a user means.

    Args:
        config: of the run.
        policy: its weights.
        images: {"images": [batch, 3, height, width] in [0, 1], "foreground": [batch, 2], "background": [batch, 2]}, the
            user's seeds as (x, y) in pixels. Bare images are taken to mean what is in the middle, and no longer at the
            upper left corner.

    Returns `masks` [batch, height, width] and `probabilities`; `seeds` [batch, 2 + seeds, 2], (x, y) in pixels, the
    user's first (background, foreground), and `labels`, true for the object; `steps` [batch, 1 + seeds, side, side],
    the masks before and after each seed, at the walker's size.

    Raises:
        InputError: the images break the convention or are not RGB; seeds of another shape or outside of the image.
    """
    shown = images["images"] if isinstance(images, dict) else images
    check_images(shown, "images")
    if shown.shape[1] != 3:
        raise InputError(f"images: {shown.shape[1]} channels, expected 3: pass images.expand(-1, 3, -1, -1)")
    device = next(policy.parameters()).device
    shown, (height, width) = shown.to(device), shown.shape[2:]
    size = torch.tensor([width, height], device=device)
    middle = {"background": torch.zeros_like(size), "foreground": size / 2}
    given = images if isinstance(images, dict) else {name: at.expand(len(shown), 2) for name, at in middle.items()}
    cells = [_cell(name, given, size, len(shown)) for name in ("background", "foreground")]
    small = F.interpolate(shown, (config.image_size, config.image_size), mode="bilinear", antialias=True)
    pixels = (small.clamp(0, 1) * 255).round().byte()
    env = _world(config, Salient(pixels, pixels[:, 0] > 255, ("",) * len(pixels)), len(pixels), device)
    frozen = None if config.backbone == "convolutions" else frozen_features(_backbone().to(device), shown, CELLS)
    ids = torch.arange(len(shown), device=device)
    grid = torch.zeros(len(shown), CELLS**2, dtype=torch.uint8, device=device)
    for cell, kind in zip(cells, (BACKGROUND, FOREGROUND), strict=True):
        grid[ids, cell] = kind
    grid = grid.view(-1, CELLS, CELLS)
    state, actions = SeedState(ids, grid, env.walked(ids, grid) >= 0.5), [cells[0], cells[1] + CELLS**2]
    steps = [state.mask]
    for _ in range(config.seeds):
        with torch.no_grad():
            actions.append(policy.eval()(_look(env, frozen)(state)).argmax(1))
        state, *_ = env.transition(state, actions[-1], ids)
        steps.append(state.mask)
    found = env.walked(ids, state.seeds)
    found = F.interpolate(found[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    placed = torch.stack(actions, 1)
    return {
        "masks": found >= 0.5,
        "probabilities": found,
        "seeds": _places(placed) * size,
        "labels": placed >= CELLS**2,
        "steps": torch.stack(steps, 1),
    }


def _places(actions: Tensor) -> Tensor:
    """(x, y) of the middle of each cell, in parts of the image's sides."""
    cell = actions % CELLS**2
    return (torch.stack((cell % CELLS, cell // CELLS), -1) + 0.5) / CELLS


def _cell(name: str, given: Tree, size: Tensor, count: int) -> Tensor:
    """The cell in which each of the user's seeds lies."""
    if name not in given or list(given[name].shape) != [count, 2]:
        found = list(given[name].shape) if name in given else "none"
        raise InputError(f"{name}: found {found}, expected [{count}, 2], a seed (x, y) in pixels for each image")
    place = given[name].to(size.device)
    if not bool(((place >= 0) & (place < size)).all()):
        worst = place[~((place >= 0) & (place < size)).all(1)][0].tolist()
        raise InputError(f"{name}: found a seed at {worst}, expected x and y within {size.tolist()} pixels")
    cells = (place * CELLS / size).long()
    return cells[:, 1] * CELLS + cells[:, 0]


def picture(config: Config, policy: SeedQ, run: Run, images: Tree = None) -> dict[str, Any]:
    """Test pictures after 0, 1, 3 and all seeds beside the truth, or pictures of the user; the first one seed by seed."""
    truth, captions = None, None
    if images is None:
        data = _data(config, "test")
        images, truth = data.images[:6], data.masks[:6]
        env = _world(config, data, len(images), "cpu", autoreset="disabled")
        env.reset(seed=0, options={"ids": torch.arange(len(images))})
        places = [(env.state.seeds == kind).flatten(1).int().argmax(1) for kind in (BACKGROUND, FOREGROUND)]
        size = config.image_size
        images = {"images": images} | {
            name: _places(place) * size for name, place in zip(("background", "foreground"), places, strict=True)
        }
    found = {name: leaf.cpu() for name, leaf in predict(config, policy, images).items()}
    shown = (images["images"] if isinstance(images, dict) else images).cpu()
    steps = sorted({0, min(1, config.seeds), min(3, config.seeds), config.seeds})
    if truth is not None:
        both = (found["steps"] & truth[:, None]).sum((2, 3)) / (found["steps"] | truth[:, None]).sum((2, 3))
        captions = [
            text for row in both for text in [*(f"{step} seeds: IoU {row[step]:.2f}" for step in steps), "truth"]
        ]
    drawn = shown[:8], found["steps"][:8], found["seeds"][:8], found["labels"][:8]
    frames = seed_frames(*(leaf[0] for leaf in drawn))
    return {"seeds": seed_grid(*drawn, steps, captions, truth), "first picture": frames}


def read(config: Config, path: Path) -> Float[Tensor, "batch channels height width"]:
    """The user's picture, or the pictures of a folder: what is meant is what is in the middle."""
    return read_pictures(path, 3, None if path.is_file() else 4 * config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pictures with what is meant."""
    data = _data(config, "train")
    return {"data": pictures.image_grid(pictures.painted(data.images[:8], data.masks[:8, None]), data.names[:8])}
