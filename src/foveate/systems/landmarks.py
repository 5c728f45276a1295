"""Landmarks: walk through a volume to an anatomical point, from coarse to fine.

| | |
|---|---|
| state | voxels in two cubes around the place, one twice as wide; scale, place, landmark sought, the last places |
| action | one voxel of the present scale to the right, left, anterior, posterior, superior or inferior |
| reward | decrease of the squared distance to the landmark in parts of the squared step, cut to [-1, 1] |
| horizon | at most 100 steps; a place visited again is the end of a scale, and at the finest of the walk |
| learner | double, dueling Q-learning from replayed places, guided exploration |
| corner | values |

Ghesu et al. 2019, "Multi-scale deep reinforcement learning for real-time 3D-landmark detection in CT scans" (TPAMI);
Alansary et al. 2019, "Evaluating reinforcement learning agents for anatomical landmark detection" (Medical Image
Analysis). Here: small cubes, a cut reward, a belief beside the values; why, and the rest: docs/systems/landmarks.md.

    foveate train landmarks --minutes 10
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import noise
from foveate.data.own_volumes import read_volumes, volumes_of
from foveate.data.volumes import WARPS, Part, Volumes, load_volumes
from foveate.envs.landmark_search import answered, away, every_landmark, scores, search, with_belief
from foveate.envs.landmark_walk import LandmarkWalkEnv
from foveate.learn.keeper import Keeper
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.atlas import LEAST, most_usual, registered
from foveate.models.cube_q import CubeQ, VolumeRegressor, stretched
from foveate.parts import restored, tracked
from foveate.pictures.volumes import walk_frames, walk_grid, walk_slices
from foveate.run import Run
from foveate.types import Evaluation, InputError, Tree, check_least, map_tree
from foveate.value_learning import Acting, learn_by_acting


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train landmarks`. What defaults to None is chosen by the data and printed."""

    data: str = "template"
    """template (embedded, under warps), decathlon, afids, or folder (NIfTI files and landmarks.csv)"""
    root: Path | None = None
    """folder of the data; not needed for template"""
    spacing: float | None = None
    """mm between voxels, to which volumes are resampled"""
    warps: int | None = None
    """of each volume to train on"""
    strength: float = 1.0
    """of the warps"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of both phases together"""
    minutes: float | None = None
    """wall-clock budget of both phases together; half of it is the regressor's"""
    cube: int = 9
    """voxels on the side of what is seen"""
    scales: int | None = None
    """levels of the pyramid, each half as fine as the one before"""
    past: int = 8
    """places that are remembered at a scale"""
    horizon: int = 100
    """steps in a walk at most"""
    absent: float = 0.1
    """part of the walks in training whose landmark is not in what is shown"""
    width: int = 24
    """channels of the first layer"""
    hidden: int = 128
    """width of the layers below the heads"""
    copies: int = 128
    """walks in lockstep"""
    rows: int = 2000
    """steps of all copies that the replay holds"""
    batch: int = 256
    """transitions in an update"""
    returns: int = 1
    """steps over which rewards are summed before a value is bootstrapped"""
    discount: float = 0.5
    """of later rewards, a step"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule of Adam, in both phases"""
    starts: int = 5
    """walks to a landmark in use, of whose answers the median is taken"""
    side: int = 32
    """of the cube to which the regressor stretches volumes"""
    registrations: int = 6
    """test volumes on which registration of an atlas is run as a baseline; 0 leaves it out"""
    landmarks: tuple[str, ...] | None = None
    """names of the landmarks; taken from the data"""


Curves: TypeAlias = dict[str, dict[str, list[tuple[float, float]]]]
EVERY = 250  # steps between validations
REGRESSED = 32  # volumes in an update of the regressor
SHOWN = 8  # landmarks of which walks are drawn
PART = "policy"  # the tracked part that holds the policy


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    check_least(config, 1, "copies", "rows", "starts", "side", "width", "hidden")
    check_least(config, 0, "registrations")
    if config.rows <= config.returns:
        raise InputError(f"rows: found {config.rows}, expected more than returns ({config.returns}): raise it")
    _acting(config)
    if config.warps is None:
        config = replace(config, warps=WARPS.get(config.data, 1))
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    longest = int(data.sizes.max())
    scales = config.scales or max(1, min(6, round(math.log2(longest / config.cube))))
    config = replace(config, spacing=data.spacing, scales=scales, landmarks=data.names)
    LandmarkWalkEnv(1, volumes=data, **_how(config))
    build(config)
    return config


def _data(config: Config, part: Part) -> Volumes:
    return load_volumes(config.data, config.root, part, config.spacing, config.warps or 1, config.strength)


def _how(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("cube", "scales", "past", "horizon", "absent")}


def _walking(config: Config, data: Volumes, policy: CubeQ, starts: int, absent: float = 0.0) -> LandmarkWalkEnv:
    return every_landmark(data, policy.mean, starts, policy.mean.device, **_how(config) | {"absent": absent})


def _acting(config: Config) -> Acting:
    return Acting(config.batch, steps=config.returns, discount=config.discount, learning_rate=config.learning_rate)


def build(config: Config) -> CubeQ:
    """The policy of a resolved config, untrained."""
    assert config.scales
    return CubeQ(config.cube, len(config.landmarks or ()), config.scales, config.width, config.hidden)


def _regressor(config: Config) -> VolumeRegressor:
    return VolumeRegressor(config.side, len(config.landmarks or ()))


def train(config: Config, run: Run) -> None:
    """Learn to walk; then, for as long, to tell the landmarks from the whole volume at once, as the control."""
    data, val = _data(config, "train"), _data(config, "val")
    torch.manual_seed(config.seed)
    policy, target = build(config), build(config)
    policy.mean.copy_(data.relative.mean(0))
    policy, optimizer, keeper = tracked(run, PART, policy)
    control = tracked(run, "regressor", _regressor(config))
    env = LandmarkWalkEnv(config.copies, volumes=data, device=run.device, **_how(config))
    env.reset(seed=config.seed + run.rank * config.copies)
    target, env, replay = run.track(target=target, env=env, replay=Replay(env.state, config.rows))
    held_out = _walking(config, val, policy, 1)
    how: dict[str, Any] = {"good": env.rewarded, "beside": partial(with_belief, policy.both, env)}
    how |= {"keeper": keeper, "every": EVERY, "validate": partial(_validated, policy, held_out, val)}
    learn_by_acting(run, PART, 0.5, env, policy, target, optimizer, replay, _acting(config), **how)
    _regress(config, run, *control, data, val)


def _validated(policy: CubeQ, env: LandmarkWalkEnv, val: Volumes) -> dict[str, float]:
    policy.eval()
    found = search(policy, env, val, 1)
    error = float(away(found.points, val).mean())
    return {"held_out_reward": -error, "held_out_error_mm": error, "held_out_gone": float(found.gone.float().mean())}


def _regress(
    config: Config,
    run: Run,
    regressor: VolumeRegressor,
    optimizer: torch.optim.Optimizer,
    keeper: Keeper,
    data: Volumes,
    val: Volumes,
) -> None:
    """The regressor's phase: Huber loss of the distance along each axis, in voxels."""
    seen, shown = (stretched(one.voxels.to(run.device), one.sizes.to(run.device), config.side) for one in (data, val))
    truth, sizes = data.relative.to(run.device), data.sizes.to(run.device)
    for step in run.steps("regressor", 0.5):
        if step == 0:
            keeper.begin()
        rows = noise.examples(config.seed, step, REGRESSED * run.processes, len(data))
        rows = rows[run.rows(REGRESSED * run.processes)].to(run.device)
        regressor.train()
        off = (regressor(seen[rows]) - truth[rows]) * sizes[rows][:, None]
        loss = F.huber_loss(off, torch.zeros_like(off))
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=10.0)
        run.log(loss=loss.detach())
        if (step + 1) % EVERY == 0:
            error = float(away(regressor.points(shown, val.sizes.to(run.device)), val).mean())
            keeper.offer(regressor, -error)
            run.log(held_out_error_mm=error)
    keeper.finish(regressor, -float(away(regressor.points(shown, val.sizes.to(run.device)), val).mean()))
    run.save()


def evaluate(config: Config, policy: CubeQ, run: Run, elsewhere: bool = False) -> Evaluation:
    """Distance in mm between answers and landmarks on the test split.

    `failures`: answers more than 10 mm off, or that a landmark which is there is not. `milliseconds_a_landmark`: what
    all volumes took, with pyramids and all `starts` walks, by the number of their landmarks. So is a registration's,
    which finds all of a volume at once and takes as long for one. `presence accuracy` is of single walks through parts
    of the volumes, of which half hold the landmark. Baselines: `mean position`, no image at all; `untrained`;
    `regressor`; `registration` of the training volume most like the mean, to the first `registrations` test volumes.
    """
    data = _data(config, "test")
    if elsewhere and data.names != config.landmarks:
        raise InputError(f"data: its landmarks are {', '.join(data.names)}; the agent knows {config.landmarks}")
    metrics, curves = _walked(config, policy, data)
    baselines = {"mean position": scores(policy.mean.cpu() * (data.sizes[:, None] - 1), data)}
    torch.manual_seed(config.seed)
    fresh = build(config).to(run.device).eval()
    fresh.mean.copy_(policy.mean)
    baselines["untrained"], _ = _walked(config, fresh, data)
    for name, regressor in restored(run, {"regressor": "regressor"}, partial(_regressor, config)).items():
        began, sizes = time.perf_counter(), data.sizes.to(run.device)
        points = regressor.points(stretched(data.voxels.to(run.device), sizes, config.side), sizes)
        baselines[name] = scores(points, data, seconds=time.perf_counter() - began)
    tested = data.first(0 if elsewhere else config.registrations)
    if thin := [file for file, side in zip(tested.files, tested.sizes.amin(1), strict=True) if side < LEAST]:
        run.say(f"registration is left out: {thin[0]} has fewer than {LEAST} voxels along an axis, too few for it")
    elif len(tested):
        baselines["registration"] = _registered(config, tested)
    return Evaluation(metrics, baselines, curves)


def _walked(config: Config, policy: CubeQ, data: Volumes) -> tuple[dict[str, float], Curves]:
    """Metrics of a network's walks, and how the error falls with the steps and with the number of walks."""
    began = time.perf_counter()
    found = search(policy, _walking(config, data, policy, config.starts), data, config.starts)
    seconds = time.perf_counter() - began
    env = _walking(config, data, policy, 1)
    one = search(policy, env, data, 1)
    metrics = scores(found.points, data, found.present, seconds)
    metrics["single_walk_error_mm"] = scores(one.points, data)["error_mm"]
    metrics["steps"] = float(found.walks.taken.sum(1).float().mean())
    if config.absent:
        parts = _walking(config, data, policy, config.starts, absent=0.5)
        told = search(policy, parts, data, config.starts)
        hidden = parts.hidden(map_tree(lambda leaf: leaf[:, 0], told.walks.states)).view(told.gone.shape).cpu()
        metrics["presence_accuracy"] = float((told.gone == hidden).float().mean())
    states, length = one.walks.states, one.walks.states.place.shape[1]
    ways = [env.distance(map_tree(lambda leaf, step=step: leaf[:, step], states)) for step in range(length)]
    curve = [(float(step), float(each.mean())) for step, each in enumerate(ways)]
    medians = []
    for n in (*range(1, config.starts, 2), config.starts):
        points, _ = answered(found.single[:, :, :n], found.gone[:, :, :n], data.sizes)
        medians.append((float(n), float(away(points, data).mean())))
    return metrics, {"error (mm) against steps": {"agent": curve}, "error (mm) against walks": {"agent": medians}}


def _registered(config: Config, data: Volumes) -> dict[str, float]:
    known = _data(config, "train")
    atlas = most_usual(known.relative)
    whole, points, began = known.cut(atlas), known.landmarks[atlas], time.perf_counter()
    found = torch.stack([registered(whole, data.cut(row), points, data.spacing) for row in range(len(data))])
    return scores(found, data, seconds=time.perf_counter() - began)


def predict(config: Config, policy: CubeQ, volumes: Tree) -> dict[str, Tensor]:
    """Find all landmarks in volumes.

    Args:
        config: of the policy.
        policy: the network.
        volumes: [batch, 1, depth, height, width] in [0, 1] of 1 mm, axes right, anterior, superior; or a dict of
            `volume` and `spacing` [batch, 3], mm along x, y, z, as `read` gives it.

    Returns:
        `points` [batch, landmarks, 3], x, y, z in voxels of these volumes; `points_mm`, the same in mm from the first
        voxel, or, with an `affine`, in the file's space; `present` [batch, landmarks]; `spread` [batch, landmarks], how
        far the walks' answers are from it in the mean, mm.

    Raises:
        InputError: volumes of another shape or range, or a spacing that is not above 0.
    """
    given, data = _given(config, volumes)
    found = search(policy, _walking(config, data, policy, config.starts), data, config.starts)
    points, points_mm = found.points * data.spacing / given["spacing"][:, None], found.points * data.spacing
    if "affine" in given:
        points_mm = points @ given["affine"][:, :3, :3].transpose(1, 2) + given["affine"][:, None, :3, 3]
    spread = (found.single - found.points[:, :, None]).norm(dim=3).mean(2) * data.spacing
    return {"points": points, "points_mm": points_mm, "present": found.present, "spread": spread}


def _given(config: Config, volumes: Tree) -> tuple[dict[str, Tensor], Volumes]:
    assert config.landmarks
    assert config.spacing
    given = {"volume": volumes} if isinstance(volumes, Tensor) else map_tree(lambda leaf: leaf.cpu(), dict(volumes))
    if "volume" not in given:
        raise InputError(f"volume: not given, only {', '.join(given)}; add it: [batch, 1, depth, height, width]")
    given.setdefault("spacing", torch.ones(len(given["volume"]), 3))
    return given, volumes_of(given["volume"], given["spacing"], config.spacing, config.landmarks, given.get("size"))


def picture(config: Config, policy: CubeQ, run: Run, images: Tree | None = None) -> dict[str, Any]:
    """Walks to the landmarks of a volume, of the test split or of the user (in mm); the longest one as an animation."""
    data = (_data(config, "test") if images is None else _given(config, images)[1]).first(1)
    env = _walking(config, data, policy, 1)
    found = search(policy, env, data, 1)
    tiles, lines, counts = [], [], found.walks.taken.sum(1).tolist()
    if images is None:
        said = [f"{off:.1f} mm off" for off in away(found.points, data)[0].tolist()]
    else:
        places = predict(config, policy, images)["points_mm"][0].tolist()
        said = ["{:.1f} {:.1f} {:.1f} mm".format(*at) for at in places]
    for number, name in enumerate(data.names[:SHOWN]):
        states = map_tree(lambda leaf, row=number: leaf[row, : counts[row] + 1], found.walks.states)
        path, told = torch.cat((env.voxel(states).cpu(), found.points[:, number])), f"{name}: {counts[number]} steps"
        truth = data.landmarks[0, number] if images is None else None
        tiles.append(walk_slices(data.cut(0), path, truth, through=truth))
        lines.append(f"{told}, {said[number]}" if found.present[0, number] else f"{told}; left")
    row = max(range(len(tiles)), key=counts.__getitem__)
    states = map_tree(lambda leaf: leaf[row, : counts[row] + 1].cpu(), found.walks.states)
    steps = [f"step {step}, {2 ** int(one) * data.spacing:g} mm long" for step, one in enumerate(states.scale)]
    truth = data.landmarks[0, row] if images is None else None
    frames = walk_frames(data.cut(0), env.voxel(states).cpu(), config.cube * 2.0**states.scale, steps, truth)
    return {"walks": walk_grid(tiles, lines), "a walk": frames}


def read(config: Config, path: Path) -> Tree:
    """The user's NIfTI file, or those of a folder."""
    assert config.spacing is not None
    return read_volumes(path, config.spacing)


def check(config: Config) -> dict[str, Any]:
    """The first volumes with their first landmarks."""
    data, tiles, lines = _data(config, "train"), [], []
    for row in range(min(4, len(data))):
        for number, name in enumerate(data.names[:2]):
            tiles.append(walk_slices(data.cut(row), data.landmarks[row, number, None]))
            lines.append(f"{data.files[row]}: {name}")
    return {"data": walk_grid(tiles, lines)}
