"""Cut a moving object out of a video: place a pair of boxes in each frame, and make the mask from what they hold.

| | |
|---|---|
| state | the frame, the object box and the context box around it, the last actions |
| action | move or reshape the object box (8), make the context box wider or tighter, or stop |
| reward | ten times the change of the mask's IoU, within -1 and 1; of the stop 3 times that since the start |
| horizon | `horizon` actions a frame; the next frame begins at the box of the mask made in this one |
| learner | Q-learning with guided exploration; cross-entropy and Dice for the masks |
| corner | value |

Han, Yang, Zhang, Chang, Liang 2018, "Reinforcement cutting-agent learning for video object segmentation" (CVPR). Here:
the stop is paid for the change since the frame began; why, and the rest: docs/systems/cutting.md.

    foveate train cutting --data davis --root DAVIS --minutes 30
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from foveate import noise, pictures
from foveate.data.masked_videos import Videos, as_video, load_videos, read_video, views
from foveate.envs import following
from foveate.envs.cutting import ACTIONS, FACTORS, NAMES, PAST, CuttingEnv, check_factors, frames_to_cut, true_boxes
from foveate.envs.following import Clips, Step, acting, clips_of, follow, mask_iou, shown, truth
from foveate.geometry import enlarged
from foveate.learn.keeper import Keeper
from foveate.learn.q_learning import Dueling
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.cutting import Cutting, Executor, Placer, mask_loss, recolored
from foveate.models.regions import Place, changes, cut, jittered
from foveate.parts import ADAM, restored
from foveate.rewards.videos import davis_scores, overlap
from foveate.run import Run
from foveate.types import Evaluation, InputError, check_least
from foveate.value_learning import Acting, learn_by_acting


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train cutting`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered), or davis (JPEGImages, Annotations, ImageSets)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    image_size: int | None = None
    """height in pixels to which frames are scaled; None: 120 for davis, 64 for scenes"""
    scenes: int = 60
    """videos rendered to train on"""
    length: int = 16
    """frames of a rendered video"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together"""
    execution_share: float = 0.5
    """part of the budget for the masks; the rest is shared evenly by the agent and the regressor, its control"""
    likeness: Literal["colors", "efficientnet-lite0"] = "colors"
    """what a pixel is compared with the first mask by: its colour, or also features of ImageNet (extra backbones)"""
    crop: int = 32
    """side in pixels of the square a mask is made in"""
    width: int = 12
    """features of the mask's network at full size"""
    factors: tuple[float, ...] = FACTORS
    """sizes of the context box, in sides of the object box; frames begin with the middle one"""
    jitter: float = 0.15
    """by which boxes are moved and scaled in training, in parts of their sides"""
    gap: int = 2
    """frames since the box an episode begins with, at most"""
    patch: int = 20
    """side in pixels of the agent's view, which shows twice the object box"""
    hidden: int = 128
    """width of the agent's layers"""
    alpha: float = 0.1
    """part of the box's sides by which an action changes it"""
    horizon: int = 10
    """actions in a frame at most"""
    copies: int = 32
    """of the environment in lockstep"""
    discount: float = 0.9
    """of rewards, an action"""
    batch: int = 64
    """boxes, or transitions, in an update"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of every phase"""
    every: int = 250
    """updates between looks at the val split"""


REPLAY = 1000  # steps of all copies that are kept
PLANES = {"colors": 4, "efficientnet-lite0": 5}  # of a frame and what it is compared with the first mask by
PART = "policy"  # the tracked part that holds both networks
_videos = lru_cache(maxsize=8)(load_videos)


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    if not 0 < config.execution_share < 1:
        raise InputError(f"execution_share: found {config.execution_share}, expected more than 0 and less than 1")
    check_least(config, 1, "scenes", "length", "hidden", "horizon", "copies", "batch", "every", "patch", "gap")
    check_factors(config.factors)
    Acting(config.batch, discount=config.discount)
    config = replace(config, image_size=config.image_size or (120 if config.data == "davis" else 64))
    for part in ("train", "val", "test"):
        frames_to_cut(_loaded(config, part), f"{config.root or config.data}, {part} videos")  # now, not after hours
    build(config)
    return config


def _loaded(config: Config, part: Any) -> Videos:
    return _videos(config.data, config.root, part, config.image_size, config.scenes, config.length)


@lru_cache(maxsize=4)
def _clips(config: Config, part: str, device: torch.device) -> Clips:
    """Videos and what is seen of them; those to train on also backwards and mirrored."""
    videos = _loaded(config, part)
    return clips_of((views(videos) if part == "train" else videos).to(device), config.likeness)


def build(config: Config) -> Cutting:
    """Both networks of a resolved config, untrained."""
    executor = Executor(PLANES[config.likeness], config.factors, config.crop, config.width)
    return Cutting(executor, _placer(config, Dueling(config.hidden, ACTIONS, config.hidden)))


def _first_context(config: Config) -> int:
    return len(config.factors) // 2


def _placer(config: Config, head: nn.Module) -> Placer:
    return Placer(PLANES[config.likeness], config.patch, PAST, ACTIONS, len(config.factors), config.hidden, head)


def _env(config: Config, clips: Clips, executor: Executor, copies: int = 1) -> CuttingEnv:
    make = executor.maker(clips[1])

    def execute(frames: Tensor, boxes: Tensor, contexts: Tensor) -> Tensor:
        return make(frames, boxes, contexts) > 0.5

    how = {name: getattr(config, name) for name in ("factors", "patch", "alpha", "jitter", "gap", "horizon")}
    return CuttingEnv(copies, videos=clips[0], planes=clips[1], execute=execute, device=clips[1].device, **how)


def train(config: Config, run: Run) -> None:
    """Learn to make masks from boxes; then to place the boxes by acting, and as long by regression."""
    torch.manual_seed(config.seed)
    untrained, policy, regressor = build(config).placer, build(config), _placer(config, nn.Linear(config.hidden, 4))
    target = copy.deepcopy(policy.placer).requires_grad_(False)
    run.track(**{PART: policy, "untrained": untrained, "regressor": regressor, "target": target})
    (clips, (val, planes)), executor = (_clips(config, part, run.device) for part in ("train", "val")), policy.executor
    env, held_out = _env(config, clips, executor, config.copies), _env(config, (val, planes), executor)
    env.reset(seed=config.seed + run.rank * config.copies)
    replay, share = Replay(env.state, REPLAY), (1 - config.execution_share) / 2
    run.track(env=env, replay=replay)

    def score(place: Place) -> dict[str, float]:
        masks = follow(val, place, executor.maker(planes), executor.factors, _first_context(config)).masks
        return {"held_out_j": davis_scores(masks, *truth(val), boundary=False)["j"]}

    def kept(name: str, part: nn.Module) -> tuple[Adam, Keeper]:
        by = "held_out_iou" if name == "executor" else "held_out_j"
        adam, keeper = run.track(**{f"{name}_optimizer": ADAM(part.parameters()), f"{name}_keeper": Keeper(part, by)})
        return adam, keeper

    networks = {"executor": executor, "agent": policy.placer, "regressor": regressor}
    of = {name: kept(name, part) for name, part in networks.items()}
    _learn(config, run, "executor", config.execution_share, env, executor, *of["executor"], partial(mask_iou, held_out))
    if not int(replay.written):  # its first states know the masks of a network that had learned nothing
        env.reset(seed=config.seed + run.rank * config.copies)
    how = Acting(config.batch, discount=config.discount, learning_rate=config.learning_rate)
    (adam, keeper), acts = of["agent"], partial(score, acting(held_out, policy.placer, config.horizon))
    looks: dict[str, Any] = {"keeper": keeper, "validate": acts, "every": config.every}
    learn_by_acting(run, "agent", share, env, policy.placer, target, adam, replay, how, good=env.rewarded, **looks)
    moves = partial(score, following.regressing(held_out, regressor, 1))
    _learn(config, run, "regressor", share, env, regressor, *of["regressor"], moves)


def _learn(
    config: Config,
    run: Run,
    name: str,
    share: float,
    env: CuttingEnv,
    network: nn.Module,
    optimizer: Adam,
    keeper: Keeper,
    validate: Callable[[], dict[str, float]],
) -> None:
    """A supervised phase, of masks or of boxes, which ends with the weights that were best on val."""
    for step in run.steps(name, share):
        if step == 0:
            keeper.begin()
        network.train()
        here = run.rows(config.batch)
        ids = noise.examples(config.seed, step, config.batch, env.examples)[here].to(run.device)
        keys = noise.key(run.seed, name, step, torch.arange(config.batch)[here]).to(run.device)
        state = env.opened(ids, keys)
        if name == "executor":
            boxes = jittered(env.boxes[state.frame], keys, config.jitter, env.size)
            regions = enlarged(boxes, env.factors[state.context])
            truth = cut(env.truth, state.frame, regions, config.crop)[:, 0] > 0.5
            seen = recolored(cut(env.planes, state.frame, regions, config.crop), keys)
            loss = mask_loss(network(seen, state.context), truth)
        else:
            wanted = changes(state.box, env.boxes[state.frame])
            loss = F.smooth_l1_loss(network(env.observe(state)), wanted, beta=0.1)
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=1.0)
        run.log(**{f"{name}_loss": loss.detach()})
        if (step + 1) % config.every == 0:
            keeper.offer(network, (found := validate())[keeper.by])
            run.log(**found)
    network.eval()
    keeper.finish(network, validate()[keeper.by])
    run.save()


def evaluate(config: Config, policy: Cutting, run: Run, elsewhere: bool = False) -> Evaluation:
    """DAVIS' J and F on the test split, in [0, 1]: the first mask is given, all others are made from the one before.

    Baselines make masks by the same network, at boxes placed otherwise: `untrained` by values that were not learned;
    `unchanged` where the first mask was; `refitted` at the mask before; `regressor` where a regression moves that to,
    learned as long; `true box` at the true one, and `best actions` where the agent's actions lead if each is the one
    that raises the true IoU most, both of which nobody knows. `color` is `refitted` with masks of what has the object's
    colours in the box. Their context box, and how often it is regressed, are what was best on val.
    """
    found: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    val, test = (_Played(config, policy, run, part) for part in ("val", "test"))
    for name, places in test.places.items():
        tries = [(number, context) for number in range(len(places)) for context in range(len(config.factors))]
        if name in ("agent", "untrained"):  # which go on to choose the context themselves
            tries = [(0, _first_context(config))]
        scores = [val.score(val.masks(name, *each)) for each in tries]
        masks, (wanted, lengths) = test.masks(name, *tries[scores.index(max(scores))]), truth(test.videos)
        found[name] = davis_scores(masks, wanted, lengths)
        alive = torch.arange(masks.shape[1], device=masks.device) < lengths[:, None]
        means = (overlap(masks, wanted) * alive).sum(0) / alive.sum(0)
        curves[name] = [(float(time), float(value)) for time, value in enumerate(means)][1:]
    return Evaluation(found.pop("agent"), found, {"j against frame": curves})


class _Played:
    """A split, and the ways to place boxes in it: name → one or several, among which val decides."""

    def __init__(self, config: Config, policy: Cutting, run: Run, part: str) -> None:
        self.videos, self.planes = _clips(config, part, run.device)
        self.executor, self.env = policy.executor, _env(config, (self.videos, self.planes), policy.executor)
        env, horizon = self.env, config.horizon
        self.places: dict[str, list[Place]] = {"agent": [acting(env, policy.placer, horizon)]}
        for other in restored(run, {"untrained": "untrained"}, lambda: build(config).placer).values():
            self.places["untrained"] = [acting(env, other, horizon)]
        self.places["unchanged"] = [following.fixed(env.boxes[self.videos.first][self.videos.video])]
        self.places |= {"refitted": [following.unmoved], "color": [following.unmoved]}
        fresh = partial(_placer, config, nn.Linear(config.hidden, 4))
        for other in restored(run, {"regressor": "regressor"}, fresh).values():
            self.places["regressor"] = [following.regressing(env, other, rounds) for rounds in (1, 2, 3)]
        self.places["true box"] = [following.fixed(env.boxes)]
        self.places["best actions"] = [following.knowing(env, horizon)]

    def masks(self, name: str, number: int, context: int) -> Tensor:
        make = following.color_maker(self.env) if name == "color" else self.executor.maker(self.planes)
        return follow(self.videos, self.places[name][number], make, self.executor.factors, context).masks

    def score(self, masks: Tensor) -> float:
        return davis_scores(masks, *truth(self.videos), boundary=False)["j"]


def predict(config: Config, policy: Cutting, images: dict[str, Any]) -> dict[str, Tensor]:
    """Carry the first mask through one video.

    Takes `frames` [time, 3, height, width] in [0, 1] and `mask` [1, height, width], where the object is in the first.
    Returns `masks` [time, height, width]; `boxes` and `contexts` [time, 4], both boxes in pixels of the frames. All
    steps on the way, in a row: `step_frames`, `step_actions` (-1 where a frame begins), and both boxes after the
    action, `step_boxes` and `step_contexts`.

    Raises:
        InputError: one is missing, or as `foveate.data.masked_videos.as_video`.
    """
    assert config.image_size is not None
    if missing := {"frames", "mask"} - set(images):
        raise InputError(f"{min(missing)}: not given; expected frames, and the mask of the first")
    if not isinstance(frames := images["frames"], Tensor) or frames.ndim != 4:
        met = list(frames.shape) if isinstance(frames, Tensor) else f"a {type(frames).__name__}"
        raise InputError(
            f"frames: found {met}, expected a tensor [time, 3, height, width]: stack the frames of a video"
        )
    count, _, height, width = frames.shape
    video = as_video(frames, images["mask"], config.image_size).to(policy.executor.factors.device)
    clips = clips_of(video, config.likeness)
    executor, env = policy.executor, _env(config, clips, policy.executor)
    place = acting(env, policy.placer, config.horizon, way := list[Step]())
    found = follow(video, place, executor.maker(clips[1]), executor.factors, _first_context(config))
    masks = F.interpolate(found.masks[:, :count].float(), (height, width), mode="bilinear")[0] > 0.5
    scale = found.boxes.new_tensor([width / video.size[1], height / video.size[0]] * 2)
    boxes, factors = found.boxes[0, :count], executor.factors
    told = {"boxes": boxes, "contexts": enlarged(boxes, factors[found.contexts[0, :count]])}
    told |= following.told_steps(way, factors, count)
    return {"masks": masks, **{name: leaf * scale if leaf.ndim == 2 else leaf for name, leaf in told.items()}}


def picture(config: Config, policy: Cutting, run: Run, images: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Masks and boxes of some frames of the test videos, or of the user's; the first one's steps as an animation."""
    given: list[tuple[dict[str, Tensor], Tensor | None]] = [] if images is None else [(images, None)]
    if images is None:
        videos = _loaded(config, "test")
        for rows in shown(videos)[:5]:
            given.append(({"frames": videos.pixels[rows] / 255, "mask": videos.masks[rows[:1]]}, videos.masks[rows]))
    tiles, moving = list[Any](), list[Any]()
    for inputs, masks in given:
        found = {name: value.cpu() for name, value in predict(config, policy, inputs).items()}
        drawn: list[Any] = [inputs["frames"].cpu(), found["masks"], found["boxes"], found["contexts"], masks]
        rows, moving = pictures.spread(len(drawn[0]), 4), moving or pictures.step_frames(drawn[0], found, NAMES, masks)
        few: list[Any] = [None if each is None else each[rows] for each in drawn]
        tiles += pictures.mask_tiles(*few)
    return {"videos": pictures.tile_grid(tiles, 4), "first video": moving}


def read(config: Config, path: Path) -> dict[str, Tensor]:
    """The user's video: a folder of frames with mask.png, or a sequence of DAVIS."""
    return read_video(path)


def check(config: Config) -> dict[str, Any]:
    """Some frames of the first videos, with their masks and boxes."""
    videos = _loaded(config, "train")
    rows = shown(videos)[:4, pictures.spread(int(videos.lengths[:4].min()), 4)].flatten()
    boxes = true_boxes(videos)[0][rows]
    outer = enlarged(boxes, config.factors[-1])
    tiles = pictures.mask_tiles(videos.pixels[rows] / 255, videos.masks[rows], boxes, outer)
    return {"data": pictures.tile_grid(tiles, 4)}
