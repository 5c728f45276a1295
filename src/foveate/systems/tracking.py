"""Tracking: an agent an object, which walks its box from one frame into the next and hears what its neighbours see.

| | |
|---|---|
| state | two frames, the object's box in the first, the box now, the last actions, the neighbours' boxes |
| action | move the box right, left, up or down, make it bigger, smaller, fatter or taller; or stop |
| reward | of stopping: 1 if the IoU with its box in the second frame is 0.7, else -1; of a move: the change's sign |
| horizon | 20 steps a frame |
| learner | double Q-learning with a dueling head, from a replay, explored along rewarded actions |
| corner | value |

Jiang, Hieu, Sun, Wang 2019, "Multi-agent deep reinforcement learning for multi-object tracker" (IEEE Access 7). Tracks
begin and end by a detector's boxes. Here: moves are rewarded (as there: `--shaping 0`); see docs/systems/tracking.md.

    foveate train tracking --minutes 10
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import noise, pictures
from foveate.data.mot import read_sequence, sequences_in
from foveate.data.videos import SIZES, Videos, given, load_videos, on, opening
from foveate.envs.box_tracking import ACTIONS, BoxTrackingEnv, Walking
from foveate.envs.joint_tracking import Proposer, regressed
from foveate.geometry import Boxes, overlaps
from foveate.learn.q_learning import Believing
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.association import Propose, Rules, best_rules, choices_for, follow, moving, rules_tensor, still
from foveate.models.tracker import Follower, TrackingNetwork, offsets_to
from foveate.parts import restored, tracked
from foveate.rewards.tracking import tracking_metrics
from foveate.run import Run
from foveate.types import Evaluation, InputError, map_tree
from foveate.value_learning import Acting, Walk, learn_by_acting, walk, with_belief


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train tracking`. What defaults to None is chosen by the data and printed."""

    data: str = "scenes"
    """scenes (rendered objects that move), or mot (folders of MOTChallenge)"""
    root: Path | None = None
    """folder of the data; not needed for scenes"""
    test: tuple[str, ...] | None = None
    """names of the sequences to test on; the last by name"""
    image_size: int | None = None
    """longer side in pixels to which larger frames are shrunk"""
    scenes: int = 60
    """how many videos are rendered to train on; beside folders too, so that agents meet more than a few people"""
    seed: int = 0
    """of the weights and every draw"""
    steps: int | None = None
    """updates of all phases together"""
    minutes: float | None = None
    """wall-clock budget of all phases together; the agent and the regressor have half of it each"""
    communicate: bool = True
    """agents hear their neighbours"""
    neighbours: int = 2
    """how many others an agent hears: the nearest"""
    patch: int = 20
    """side of a view in pixels"""
    hidden: int = 96
    """width of the features"""
    alpha: float = 0.08
    """part of the box's width or height by which a move changes it"""
    horizon: int = 20
    """steps of an agent in a frame at most"""
    gaps: int = 3
    """frames at most from one to the other in training"""
    threshold: float = 0.7
    """IoU from which on it is right to stop"""
    shaping: float = 1.0
    """reward of a move that raises the IoU; 0 rewards the stop alone"""
    motion: bool = True
    """a walk begins where the track's velocity leads; without it, where the track was"""
    copies: int = 48
    """agents that act in lockstep in training"""
    batch: int = 96
    """steps in an update"""
    learning_rate: float = 2e-3
    """peak of its one-cycle schedule"""


PART = "policy"  # the tracked part that holds the policy
HELD_OUT = 128  # walks that choose the weights
PAST = 8  # actions that an agent remembers
MEMORY = 1000  # steps of all copies in the replay
ROUNDS = 3  # of regression in a frame
SHOWN = 80  # frames of a video in a picture


def _follower(config: Config, outputs: int) -> Follower:
    sizes = config.patch, PAST, ACTIONS
    head = Believing if outputs == ACTIONS else nn.Linear
    return Follower(TrackingNetwork(*sizes, head, outputs, config.communicate, config.hidden))


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    for name in ("copies", "batch", "horizon", "hidden"):
        if (found := getattr(config, name)) < 1:
            raise InputError(f"{name}: found {found}, expected at least 1")
    if config.communicate and config.neighbours < 1:
        raise InputError("neighbours: found 0, expected at least 1 to hear; or give --no-communicate")
    _acting(config)
    if config.image_size is None and config.data in SIZES:
        config = replace(config, image_size=SIZES[config.data])
    for part in ("train", "val"):
        _env(config, part, 1)  # now, not after hours
    _videos(config, "test")
    return config


def _videos(config: Config, part: Any) -> Videos:
    return load_videos(config.data, config.root, part, config.image_size, config.scenes, config.test, part == "train")


def _env(config: Config, part: str, copies: int, device: Any = "cpu", **options: Any) -> BoxTrackingEnv:
    return BoxTrackingEnv(
        copies,
        videos=_videos(config, part),
        patch=config.patch,
        alpha=config.alpha,
        history=PAST,
        neighbours=config.neighbours if config.communicate else 0,
        gaps=config.gaps if part == "train" else 1,
        threshold=config.threshold,
        shaping=config.shaping,
        horizon=config.horizon,
        device=device,
        **options,
    )


def _acting(config: Config) -> Acting:
    return Acting(config.batch, discount=0.5, learning_rate=config.learning_rate, share=0.6, follow=0.05)


def build(config: Config) -> Follower:
    """The policy of a resolved config, untrained."""
    return _follower(config, ACTIONS)


def train(config: Config, run: Run) -> None:
    """Learn to walk; a regressor sees the same for as long; then the rules of tracks are chosen on held-out frames."""
    torch.manual_seed(config.seed)
    policy, optimizer, keeper = tracked(run, PART, build(config), by="held_out_iou")
    env = _env(config, "train", config.copies, run.device)
    env.reset(seed=config.seed + run.rank * config.copies)
    target, _, replay = run.track(target=copy.deepcopy(policy), env=env, replay=Replay(env.state, MEMORY))
    held = _walker(config, "val", run.device)
    validate = partial(_held_out, config, held, policy)
    phase: tuple[Any, ...] = run, "walk", 0.5, env, policy, target, optimizer, replay, _acting(config)
    beside = partial(with_belief, policy.network.both, env.rewarded)
    learn_by_acting(*phase, good=env.rewarded, beside=beside, keeper=keeper, validate=validate)
    torch.manual_seed(config.seed)
    other, optimizer, keeper = tracked(run, "regressor", _follower(config, 4), by="held_out_iou")
    _regress(config, run, env, other, optimizer, keeper, partial(_held_out, config, held, other))
    val = on(_videos(config, "val"), run.device)
    policy.rules.copy_(rules_tensor(_rules(val, _proposer(config, policy.eval(), val))))
    run.save()


def _regress(config: Config, run: Run, env: Any, other: Follower, optimizer: Any, keeper: Any, validate: Any) -> None:
    """Supervised control: the offsets to the object's box, from boxes on the way to it."""
    for step in run.steps("regressor", 0.5):
        if step == 0:
            keeper.begin()
        keys = noise.key(config.seed, "regressor", step, run.rank, torch.arange(config.batch)).to(run.device)
        state = env.initial(noise.integers(noise.fold(keys, "example"), env.examples), noise.fold(keys, "initial"))
        box = torch.lerp(state.box, state.target, noise.uniform(noise.fold(keys, "way"), 1).expand(-1, 4))
        other.train()
        offsets = other(env.observe(replace(state, box=box)))
        loss = F.smooth_l1_loss(offsets, offsets_to(box, state.target), beta=0.05)
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=10.0)
        run.log(loss=loss.detach())
        if (step + 1) % 500 == 0:
            found = validate()
            keeper.offer(other, found["held_out_iou"])
            run.log(**found)
    keeper.finish(other, validate()["held_out_iou"])
    run.save()


def _walker(config: Config, part: str, device: Any) -> BoxTrackingEnv:
    """Some walks from one frame to the next, spread over a split."""
    env = _env(config, part, 1)
    return _env(config, part, min(HELD_OUT, env.examples), device, autoreset="disabled")


@torch.no_grad()
def _held_out(config: Config, env: BoxTrackingEnv, policy: Follower, name: str = "held_out_iou") -> dict[str, Tensor]:
    """Mean IoU with the objects where these walks end."""
    policy.eval()
    ids = _spread(env)
    if _regresses(policy):
        env.reset(seed=0, options={"ids": ids})
        state = env.state
        box = regressed(env.walking, policy, replace(state, near_box=state.near_end), ROUNDS)
        return {name: overlaps(box[:, None], state.target[:, None]).mean()}
    states = walk(env, policy, ids).states
    return {name: overlaps(states.box[:, -1:], states.target[:, -1:]).mean()}


def _spread(env: BoxTrackingEnv) -> Tensor:
    return torch.linspace(0, env.examples - 1, env.num_envs, device=env.device).long()


def _regresses(policy: Follower) -> bool:
    return not isinstance(policy.network.head, Believing)


def _proposer(config: Config, policy: Follower, videos: Videos) -> Propose:
    near = config.neighbours if config.communicate else 0
    sizes = PAST, near, config.horizon, config.motion
    return Proposer(Walking(videos, config.patch, config.alpha), policy, *sizes, ROUNDS if _regresses(policy) else 0)


def _tracks(videos: Videos, propose: Propose, rules: list[Rules]) -> list[Boxes]:
    return follow(videos.detections, videos.sequences, videos.rates, rules, propose)


def _rules(videos: Videos, propose: Propose, plain: bool = False) -> Rules:
    """The rules under which tracks of these videos have the best HOTA; agents begin with those of constant velocity."""

    def score(found: Boxes) -> float:
        return tracking_metrics(videos.truth, found, videos.sequences)["hota"]

    learned = propose not in (still, moving)
    first = replace(_rules(videos, moving), lead=1.0) if learned else Rules(shown=0.0 if plain else Rules.shown)
    fixed = ("shown",) * plain + ("sure",) * (not learned)
    choices = {name: values for name, values in choices_for(videos.detections).items() if name not in fixed}
    return best_rules(partial(_tracks, videos, propose), score, choices, first)[0]


def evaluate(config: Config, policy: Follower, run: Run, elsewhere: bool = False) -> Evaluation:
    """HOTA (with its parts DetA and AssA), MOTA, IDF1 and identity switches of the test sequences, by TrackEval.

    `iou` is that of single walks from an object's shaken box to its box in the next frame. Baselines from the same
    detections: `iou tracker` (boxes that stay, shown where detected), `constant velocity` (as SORT) and `regressor`,
    with rules of their own from the same held-out frames; with the agent's `untrained`; `always led`, its boxes also
    where constant velocity foretold better; `deaf`, the same without hearing neighbours; `no motion`, boxes that stay.
    """
    val, test = (on(_videos(config, part), run.device) for part in ("val", "test"))
    torch.manual_seed(config.seed)
    parts: dict[str, Follower] = {"agent": policy, "untrained": build(config).to(run.device).eval()}
    parts |= restored(run, {"regressor": "regressor"}, lambda: _follower(config, 4))
    held, rows = _walker(config, "test", run.device), {}

    def score(propose: Propose, rules: Rules) -> dict[str, float]:
        return tracking_metrics(test.truth, _tracks(test, propose, [rules])[0], test.sequences)

    for name, network in parts.items():
        rules = _rules(val, _proposer(config, network, val)) if name == "regressor" else policy.chosen
        rows[name] = score(_proposer(config, network, test), rules)
        rows[name] |= {"iou": float(_held_out(config, held, network, "iou")["iou"])}
    always = replace(policy.chosen, lead=0.0)
    rows["always led"] = score(_proposer(config, policy, test), always)
    rows["deaf"] = score(_proposer(replace(config, communicate=False), policy, test), always)
    rows["no motion"] = score(still, always)
    rows["iou tracker"] = score(still, _rules(val, still, plain=True))
    rows["constant velocity"] = score(moving, _rules(val, moving))
    return Evaluation(rows.pop("agent"), rows)


def predict(config: Config, policy: Follower, images: dict[str, Any]) -> dict[str, Tensor]:
    """Follow what was detected through a video.

    Args:
        config: of the run.
        policy: its agent.
        images: "frames" [time, 3, height, width] in [0, 1]; what a detector found in them, "boxes" [time, count, 4] in
            pixels of the frames, "scores" [time, count] as those trained on, and "mask" [time, count], true where there
            is a box (if not given: where the score is not 0); "rate", frames a second (25).

    Returns:
        "boxes" [time, tracks, 4] in pixels of the frames, "ids" [time, tracks], the same number for the same object,
        and "mask", true where there is a track.

    Raises:
        InputError: something is missing, or breaks the convention; no frames.
    """
    videos, scale = given(images, config.image_size or SIZES[config.data])
    videos = on(videos, policy.rules.device)
    (tracks,) = _tracks(videos, _proposer(config, policy, videos), [policy.chosen])
    return {"boxes": tracks.boxes / scale, "ids": tracks.labels, "mask": tracks.mask}


def picture(config: Config, policy: Follower, run: Run, images: dict[str, Any] | None = None) -> dict[str, Any]:
    """A test sequence, or the user's, with its tracks, still and moving; and agents' walks into the next frame."""
    drawn, rows = dict[str, Any](), dict[str, Boxes]()
    if images is None:
        videos = on(_videos(config, "test"), run.device)
        frames, truth = opening(videos, videos.truth, SHOWN)
        (tracks,) = _tracks(videos, _proposer(config, policy, videos), [policy.chosen])
        rows = {"tracks": opening(videos, tracks, SHOWN)[1], "truth": truth}
        held = _walker(config, "test", run.device)
        drawn["walks"] = [pictures.image_grid(four) for four in _drawn(held, walk(held, policy, _spread(held)))]
    else:
        frames, made = images["frames"], predict(config, policy, images)
        rows["tracks"] = Boxes(made["boxes"], made["ids"], made["mask"])
    drawings = {name: pictures.track_frames(frames.cpu(), boxes) for name, boxes in rows.items()}
    shown = torch.linspace(0, len(frames) - 1, min(4, len(frames))).long().tolist()
    names = [[f"{name}, frame {number + 1}" for number in shown] for name in drawings]
    tiles = [[row[number] for number in shown] for row in drawings.values()]
    return {"tracks": pictures.track_grid(tiles, names), "video": drawings["tracks"], **drawn}


def _drawn(env: BoxTrackingEnv, found: Walk) -> Tensor:
    """The longest four of some walks as images [step, walk, 3, height, width]."""
    rows = found.taken.sum(1).argsort(descending=True)[:4]
    last = int(found.taken[rows[0]].sum()) + 1
    drawn = env.draw(map_tree(lambda leaf: leaf[rows, :last].flatten(0, 1), found.states))
    return (drawn.permute(0, 3, 1, 2).float() / 255).unflatten(0, (len(rows), last)).transpose(0, 1)


def read(config: Config, path: Path) -> dict[str, Any]:
    """The user's sequence, a folder as MOTChallenge's with img1, det/det.txt and seqinfo.ini, as `predict` takes it."""
    (folder, *others) = sequences_in(path)
    if others:
        raise InputError(f"{path}: holds {1 + len(others)} sequences ({folder.name}, {others[0].name}, ...); name one")
    clip = read_sequence(folder, config.image_size or SIZES[config.data], truth=False)
    found = {name: getattr(clip.detections, name) for name in ("boxes", "scores", "mask")}
    return {"frames": clip.pixels.float() / 255, **found, "rate": clip.rate}


def check(config: Config) -> dict[str, Any]:
    """Frames of the first sequence to train on, with the true tracks and with what was detected."""
    videos = _videos(config, "train")
    frames, truth = opening(videos, videos.truth, SHOWN)
    found = opening(videos, videos.detections, SHOWN)[1]
    shown = torch.linspace(0, len(frames) - 1, 4).long().tolist()
    detected = pictures.track_frames(frames, found, trail=0)
    drawings = {"truth": pictures.track_frames(frames, truth), "detected": detected}
    names = [[f"{name}, frame {number + 1}" for number in shown] for name in drawings]
    return {"data": pictures.track_grid([[row[number] for number in shown] for row in drawings.values()], names)}
