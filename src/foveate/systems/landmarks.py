"""Landmarks: walk through a volume to an anatomical point, from coarse to fine.

| | |
|---|---|
| state | the voxels in a cube around the place, the scale, which landmark is sought; the last places at this scale |
| action | one voxel of the present scale to the right, left, anterior, posterior, superior or inferior |
| reward | decrease of the squared distance to the landmark in parts of the squared step, cut to [-1, 1] |
| horizon | at most 100 steps; a place visited again is the end of a scale, and at the finest of the walk |
| learner | double, dueling Q-learning from replayed places, guided exploration |
| corner | values |

Ghesu et al. 2019, "Multi-scale deep reinforcement learning for real-time 3D-landmark detection in CT scans" (TPAMI);
Alansary et al. 2019, "Evaluating reinforcement learning agents for anatomical landmark detection" (Medical Image
Analysis). What differs here and why, and the numbers: docs/systems/landmarks.md.

    foveate train landmarks --minutes 10
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate import noise
from foveate.data.volumes import WARPS, Part, Volumes, load_volumes, read_volumes, volumes_of
from foveate.envs.landmark_walk import LandmarkWalkEnv, WalkState
from foveate.learn.replay import Replay
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.atlas import registered
from foveate.models.cube_q import CubeQ, VolumeRegressor, stretched
from foveate.pictures.volumes import walk_frames, walk_grid, walk_slices
from foveate.run import Run
from foveate.two_steps import restored, tracked
from foveate.types import Evaluation, InputError, Tree, map_tree
from foveate.value_learning import Acting, Walk, learn_by_acting, walk


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
    starts: int = 9
    """walks to a landmark in use, of whose answers the median is taken"""
    side: int = 32
    """of the cube to which the regressor stretches volumes"""
    registrations: int = 6
    """test volumes on which registration of an atlas is run as a baseline; 0 leaves it out"""
    landmarks: tuple[str, ...] | None = None
    """names of the landmarks; taken from the data"""


PART = "policy"  # the tracked part that holds the policy
FAILED = 10.0  # mm from which on an answer is a failure


@dataclass(frozen=True)
class Found:
    """Answers for volumes, from several walks each.

    Attributes:
        points: the median of the answers, x, y, z in voxels.
        present: whether not most walks left the volume.
        single: the answer of each walk.
        gone: which walks left.
        walks: the walks, [volumes · landmarks · starts, time, ...].
        env: in which they were made.
    """

    points: Float[Tensor, "volumes landmarks 3"]
    present: Bool[Tensor, "volumes landmarks"]
    single: Float[Tensor, "volumes landmarks starts 3"]
    gone: Bool[Tensor, "volumes landmarks starts"]
    walks: Walk
    env: LandmarkWalkEnv


def resolve(config: Config) -> Config:
    """Check the fields, and fill in what the data decides; raises `InputError` for fields and data that are wrong."""
    for name in ("copies", "rows", "starts", "side", "width", "hidden"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    if config.registrations < 0:
        raise InputError(f"registrations: found {config.registrations}, expected 0 or more")
    _acting(config)
    if config.warps is None:
        config = replace(config, warps=WARPS.get(config.data, 1))
    data, *_ = (_data(config, part) for part in ("train", "val", "test"))  # now, not after hours
    longest = int(data.sizes.max())
    scales = config.scales or max(1, min(6, round(math.log2(longest / config.cube))))
    config = replace(config, spacing=data.spacing, scales=scales, landmarks=data.names)
    _env(config, data, 1, starts="near", absent=config.absent)
    build(config)
    return config


def _data(config: Config, part: Part) -> Volumes:
    return load_volumes(config.data, config.root, part, config.spacing, config.warps or 1, config.strength)


def _env(config: Config, data: Volumes, copies: int, **options: Any) -> LandmarkWalkEnv:
    how = {"cube": config.cube, "scales": config.scales, "past": config.past, "horizon": config.horizon}
    return LandmarkWalkEnv(copies, volumes=data, **how, **options)


def _acting(config: Config) -> Acting:
    return Acting(
        batch=config.batch,
        steps=config.returns,
        discount=config.discount,
        learning_rate=config.learning_rate,
    )


def build(config: Config) -> CubeQ:
    """The policy of a resolved config, untrained."""
    assert config.landmarks is not None
    assert config.scales is not None
    return CubeQ(config.cube, len(config.landmarks), config.scales, config.width, config.hidden)


def _regressor(config: Config) -> VolumeRegressor:
    assert config.landmarks is not None
    return VolumeRegressor(config.side, len(config.landmarks))


def train(config: Config, run: Run) -> None:
    """Learn to walk; then, for as long, to tell the landmarks from the whole volume at once, as the control."""
    data, val = _data(config, "train"), _data(config, "val")
    torch.manual_seed(config.seed)
    policy, target, regressor = build(config), build(config), _regressor(config)
    policy.mean.copy_(data.relative.mean(0))
    policy, optimizer, keeper = tracked(run, PART, policy)
    regressor, *rest = tracked(run, "regressor", regressor)
    env = _env(config, data, config.copies, starts="near", absent=config.absent, device=run.device)
    env.reset(seed=config.seed + run.rank * config.copies)
    target, env, replay = run.track(target=target, env=env, replay=Replay(env.state, config.rows))
    held_out = _walking(config, val, policy.mean, 1, run.device)
    how: dict[str, Any] = {"good": env.rewarded, "keeper": keeper, "every": 250}
    how["validate"] = partial(_validated, policy, held_out, val)
    learn_by_acting(run, PART, 0.5, env, policy, target, optimizer, replay, _acting(config), **how)
    _regress(config, run, regressor, *rest, data, val)


def _validated(policy: CubeQ, env: LandmarkWalkEnv, val: Volumes) -> dict[str, float]:
    policy.eval()
    found = _found(policy, env, val, 1)
    error = float(_errors(found.points, val).mean())
    return {"held_out_reward": -error, "held_out_error_mm": error, "held_out_gone": float(found.gone.float().mean())}


def _regress(
    config: Config,
    run: Run,
    regressor: VolumeRegressor,
    optimizer: torch.optim.Optimizer,
    keeper: Any,
    data: Volumes,
    val: Volumes,
) -> None:
    """The regressor's phase: Huber loss of the distance along each axis, in voxels."""
    seen, shown = (_whole(config, each, run.device) for each in (data, val))
    truth, sizes = data.relative.to(run.device), data.sizes.to(run.device)
    batch = max(1, min(32, config.batch))

    def validate() -> dict[str, float]:
        regressor.eval()
        with torch.no_grad():
            error = float(_errors(_regressed(regressor, shown, val), val).mean())
        return {"held_out_reward": -error, "held_out_error_mm": error}

    for step in run.steps("regressor", 0.5):
        if step == 0:
            keeper.begin()
        rows = noise.examples(config.seed, step, batch * run.processes, len(data))
        rows = rows[run.rows(batch * run.processes)].to(run.device)
        regressor.train()
        away = (regressor(seen[rows].float() / 255) - truth[rows]) * sizes[rows][:, None]
        loss = F.huber_loss(away, torch.zeros_like(away))
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss, optimizer, clip=10.0)
        run.log(loss=loss.detach())
        if (step + 1) % 250 == 0:
            scores = validate()
            keeper.offer(regressor, scores["held_out_reward"])
            run.log(**scores)
    keeper.offer(regressor, validate()["held_out_reward"])
    regressor.load_state_dict(keeper.best.state_dict())
    run.save()


def _whole(config: Config, data: Volumes, device: torch.device) -> Tensor:
    """Volumes as the regressor sees them, in bytes."""
    parts = [
        stretched(voxels[:, None].to(device).float(), sizes.to(device).float(), config.side)
        for voxels, sizes in zip(data.voxels.split(16), data.sizes.split(16), strict=True)
    ]
    return torch.cat(parts).round().to(torch.uint8)


def _regressed(regressor: VolumeRegressor, seen: Tensor, data: Volumes) -> Tensor:
    """Landmarks in voxels."""
    found = torch.cat([regressor(some.float() / 255) for some in seen.split(32)]).cpu()
    return found * (data.sizes[:, None] - 1)


def _errors(points: Tensor, data: Volumes) -> Float[Tensor, "volumes landmarks"]:
    return (points.cpu() - data.landmarks).norm(dim=2) * data.spacing


def _walking(
    config: Config, data: Volumes, mean: Tensor, starts: int, device: torch.device, absent: float = 0.0
) -> LandmarkWalkEnv:
    """An environment for walks to all landmarks of all volumes at once, that many to each."""
    copies = len(data) * data.landmarks.shape[1] * starts
    options: dict[str, Any] = {"starts": "mean", "mean": mean.cpu(), "absent": absent}
    options["around"] = 0.0 if starts == 1 else 0.08  # a single walk begins at the mean place itself
    return _env(config, data, copies, autoreset="disabled", device=device, **options)


def _found(policy: CubeQ, env: LandmarkWalkEnv, data: Volumes, starts: int) -> Found:
    """Walk, and take the median of the answers of those walks that did not leave."""
    volumes, landmarks = data.landmarks.shape[:2]
    ids = torch.arange(volumes * landmarks, device=env.device).repeat_interleave(starts)
    walks = walk(env, policy, ids)
    last = map_tree(lambda leaf: leaf[:, -1], walks.states)
    single = env.answer(last).view(volumes, landmarks, starts, 3).cpu()
    gone = env.left(last).view(volumes, landmarks, starts).cpu()
    present = gone.float().mean(2) <= 0.5
    kept = torch.where((gone & present[..., None])[..., None], math.nan, single)
    points = kept.nanquantile(0.5, dim=2)
    last_voxel = (data.sizes - 1)[:, None].float()
    return Found(torch.minimum(points.clamp(min=0), last_voxel), present, single, gone, walks, env)


def evaluate(config: Config, policy: CubeQ, run: Run, elsewhere: bool = False) -> Evaluation:
    """Distance in mm between answers and landmarks on the test split.

    `failures` are answers of more than `FAILED` mm, or that a landmark which is there is not; `seconds` a volume, all
    landmarks together, the pyramid included. `presence accuracy` is of walks through parts of the volumes, of which half
    hold the landmark. Baselines: `mean position`, no image at all; `untrained`, the same network that has learned
    nothing; `regressor`; `registration` of the training volume that is most like the mean, on the first `registrations`
    test volumes.
    """
    data, known = _data(config, "test"), config
    if elsewhere and data.names != known.landmarks:
        raise InputError(f"data: its landmarks are {', '.join(data.names)}; the agent knows {known.landmarks}")
    metrics, curves = _walked(config, policy, data, run.device)
    mean = policy.mean.cpu() * (data.sizes[:, None] - 1)
    baselines = {"mean position": _score(mean, data)}
    torch.manual_seed(config.seed)
    fresh = build(config).to(run.device).eval()
    fresh.mean.copy_(policy.mean)
    baselines["untrained"], _ = _walked(config, fresh, data, run.device)
    for name, regressor in restored(run, {"regressor": "regressor"}, partial(_regressor, config)).items():
        began = time.perf_counter()
        with torch.no_grad():
            points = _regressed(regressor, _whole(config, data, run.device), data)
        baselines[name] = _score(points, data) | {"seconds": (time.perf_counter() - began) / len(data)}
    if config.registrations and not elsewhere:
        baselines["registration"] = _registered(config, data)
    return Evaluation(metrics, baselines, curves)


def _score(points: Tensor, data: Volumes, present: Tensor | None = None) -> dict[str, float]:
    errors = _errors(points, data)
    failed = errors > FAILED if present is None else (errors > FAILED) | ~present
    found = {"error_mm": errors.mean(), "median_error_mm": errors.median(), "failures": failed.float().mean()}
    return {name: float(value) for name, value in found.items()}


def _walked(
    config: Config, policy: CubeQ, data: Volumes, device: torch.device
) -> tuple[dict[str, float], dict[str, dict[str, list[tuple[float, float]]]]]:
    """Metrics of a network's walks, and how the error falls with the steps and with the number of starts."""
    began = time.perf_counter()
    found = _found(policy, _walking(config, data, policy.mean, config.starts, device), data, config.starts)
    seconds = (time.perf_counter() - began) / len(data)
    one = _found(policy, _walking(config, data, policy.mean, 1, device), data, 1)
    metrics = _score(found.points, data, found.present)
    metrics |= {"single_walk_error_mm": float(_errors(one.points, data).mean()), "seconds": seconds}
    metrics["steps"] = float(found.walks.taken.sum(1).float().mean())
    if config.absent:
        env = _walking(config, data, policy.mean, config.starts, device, absent=0.5)
        parts = _found(policy, env, data, config.starts)
        hidden = env.hidden(map_tree(lambda leaf: leaf[:, 0], parts.walks.states)).view(parts.gone.shape)
        metrics["presence_accuracy"] = float((parts.gone == hidden.cpu()).float().mean())
    states, times = one.walks.states, one.walks.states.place.shape[1]
    away = [one.env.distance(map_tree(lambda leaf, t=t: leaf[:, t], states)) for t in range(times)]
    curve = [(float(step), float(each.mean())) for step, each in enumerate(away)]
    counts = [(float(n), float(_errors(found.single[:, :, :n].median(2)[0], data).mean())) for n in _odd(config.starts)]
    return metrics, {"error (mm) against steps": {"agent": curve}, "error (mm) against walks": {"agent": counts}}


def _odd(most: int) -> list[int]:
    return list(range(1, most + 1, 2))


def _registered(config: Config, data: Volumes) -> dict[str, float]:
    """The training volume whose landmarks are nearest to their mean is laid over the first test volumes."""
    known = _data(config, "train")
    atlas = int((known.relative - known.relative.mean(0)).norm(dim=2).mean(1).argmin())
    count = min(config.registrations, len(data))
    began, points = time.perf_counter(), []
    for row in range(count):
        points.append(registered(_cut(known, atlas), _cut(data, row), known.landmarks[atlas], data.spacing))
    seconds = (time.perf_counter() - began) / count
    some = replace(data, landmarks=data.landmarks[:count])
    return _score(torch.stack(points), some) | {"seconds": seconds}


def _cut(data: Volumes, row: int) -> Tensor:
    """A volume without its padding, in [0, 1]."""
    width, height, depth = data.sizes[row].tolist()
    return data.voxels[row, :depth, :height, :width].float() / 255


def predict(config: Config, policy: CubeQ, volumes: Tree) -> dict[str, Tensor]:
    """Find all landmarks in volumes.

    Args:
        config: of the policy.
        policy: the network.
        volumes: [batch, 1, depth, height, width] in [0, 1] of 1 mm, axes right, anterior, superior; or a dict of
            `volume` and `spacing` [batch, 3], mm along x, y, z, as `read` gives it.

    Returns:
        `points` [batch, landmarks, 3], x, y, z in voxels of these volumes; `points_mm`, the same in mm from the first
        voxel, or, where `volumes` has an `affine`, in the file's space; `present`; `spread` [batch, landmarks], the mean
        distance in mm of the walks' answers from theirs.

    Raises:
        InputError: volumes of another shape or range, or a spacing that is not above 0.
    """
    given, data = _given(config, volumes)
    found = _found(policy, _walking(config, data, policy.mean, config.starts, policy.mean.device), data, config.starts)
    voxels = found.points * data.spacing / given["spacing"][:, None]
    lengths = (found.single - found.points[:, :, None]).norm(dim=3).mean(2) * data.spacing
    points_mm = found.points * data.spacing
    if "affine" in given:
        points_mm = voxels @ given["affine"][:, :3, :3].transpose(1, 2) + given["affine"][:, None, :3, 3]
    return {"points": voxels, "points_mm": points_mm, "present": found.present, "spread": lengths}


def _given(config: Config, volumes: Tree) -> tuple[dict[str, Tensor], Volumes]:
    assert config.landmarks is not None
    assert config.spacing is not None
    given = {"volume": volumes} if isinstance(volumes, Tensor) else dict(volumes)
    given = {name: value.cpu() for name, value in given.items()}
    given.setdefault("spacing", torch.ones(len(given["volume"]), 3))
    return given, volumes_of(given["volume"], given["spacing"], config.spacing, config.landmarks, given.get("size"))


def picture(config: Config, policy: CubeQ, run: Run, images: Tree | None = None) -> dict[str, Any]:
    """Walks to every landmark of a volume, of the test split or of the user; one of them as an animation."""
    data = _data(config, "test") if images is None else _given(config, images)[1]
    known, device = images is None, policy.mean.device
    data = replace(data, **{name: getattr(data, name)[:1] for name in ("voxels", "sizes", "landmarks", "files")})
    found = _found(policy, _walking(config, data, policy.mean, 1, device), data, 1)
    env, volume = found.env, _cut(data, 0)
    tiles, lines, paths = [], [], []
    for number, name in enumerate(data.names[:8]):
        states = map_tree(lambda leaf, row=number: leaf[row], found.walks.states)
        taken = int(found.walks.taken[number].sum())
        states = map_tree(lambda leaf, upto=taken + 1: leaf[:upto], states)
        path, truth = env.voxel(states).cpu(), data.landmarks[0, number] if known else None
        answer = found.points[0, number]
        told = f"{name}: {taken} steps"
        if truth is not None:
            told += f", {float(_errors(found.points, data)[0, number]):.1f} mm from it"
        tiles.append(walk_slices(volume, torch.cat((path, answer[None])), truth))
        lines.append(told + ("" if found.present[0, number] else ", left: not there"))
        paths.append((path, states.scale.cpu(), truth))
    path, scale, truth = max(paths, key=lambda each: len(each[0]))
    steps = [f"step {step}, {2 ** int(one)} voxels a step" for step, one in enumerate(scale)]
    frames = walk_frames(volume, path, config.cube * 2.0**scale, steps, truth)
    return {"walks": walk_grid(tiles, lines), "a walk": frames}


def read(config: Config, path: Path) -> Tree:
    """The user's NIfTI file, or those of a folder."""
    assert config.spacing is not None
    return read_volumes(path, config.spacing)


def check(config: Config) -> dict[str, Any]:
    """The first volumes with their first landmarks."""
    data, tiles, lines = _data(config, "train"), [], []
    for row in range(min(4, len(data))):
        for number in range(min(2, len(data.names))):
            where = data.landmarks[row, number]
            tiles.append(walk_slices(_cut(data, row), where[None]))
            lines.append(f"{data.files[row]}: {data.names[number]}")
    return {"data": walk_grid(tiles, lines)}
