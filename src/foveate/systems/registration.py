"""Registration step by step: move one picture over another that looks different, a pixel or a degree at a time.

| | |
|---|---|
| state | the fixed picture, and the moving one under the transform so far; what was seen of them before |
| action | right, left, down, up by 1 pixel; clockwise or back by 1 degree; larger or smaller by 0.05 |
| reward | minus the mean distance of the landmarks; a bonus when it is small enough |
| horizon | 60 steps, then Monte Carlo look-ahead |
| learner | actor-critic (A2C) with a convolutional LSTM; an expert's moves are copied at first |
| corner | policy |

Sun, Hu, Yao, Hu, Wu, Song, Hu 2018, "Robust multimodal image registration using deep recurrent reinforcement learning"
(ACCV; arXiv 2002.03733). Here: an expert copied first, features correlated; the rest: docs/systems/registration.md.

    foveate train registration --minutes 60
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate import noise
from foveate.data.pairs import Pairs, Part, Spread, checked_pair, load_pairs, without_landmarks
from foveate.data.registration_files import letterbox, read_pictures_of_pairs
from foveate.data.similarity import compose, inverse, matrices, warp
from foveate.envs.registration import MOVES, RegistrationEnv, RegistrationState, Reward
from foveate.envs.registration_walks import Expert, expert_loss, said, walked
from foveate.learn.actor_critic import Memory, act, actor_critic_loss
from foveate.learn.keeper import Keeper
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.mutual_information import registered, simple_itk
from foveate.models.registration import Core, Recall, RegistrationPolicy, Regressor
from foveate.parts import restored, tracked
from foveate.pictures.registration import frames, overlays
from foveate.rewards.registration import NEAR, registration_scores
from foveate.run import Run
from foveate.types import Evaluation, InputError, check_least, map_tree


@dataclass(frozen=True)
class Config:
    """Settings of `foveate train registration`."""

    data: str = "scenes"
    """scenes (rendered), photographs, digits: a picture and itself in another contrast; or birl, your pairs"""
    root: Path | None = None
    """folder of pairs.csv; not needed for the others"""
    image_size: int = 96
    """side in pixels at which pictures are registered"""
    pairs: int = 600
    """rendered to train on"""
    held_out: int = 200
    """rendered to test on; a quarter as many to choose the weights on"""
    views: int = 20
    """of each held-out pair of birl: as it is, and displaced in other ways"""
    shift: float = 0.36
    """longest displacement, in parts of the side"""
    turn: float = 15.0
    """most degrees"""
    zoom: float = 0.15
    """most of the logarithm of the scale"""
    seed: int = 0
    """of the weights, the order of the data and every draw"""
    steps: int | None = None
    """updates of both phases together"""
    minutes: float | None = None
    """wall-clock budget of both phases together, shared evenly by the agent and the regressor"""
    horizon: int = 60
    """steps of a walk"""
    reward: Reward = "landmarks"
    """what is to become small: the distance of the landmarks, or of the transform from the right one"""
    reached: float = 2.0
    """pixels (or steps) at which a walk of training is done"""
    bonus: float = 1.0
    """reward when it is done"""
    core: Core = "convlstm"
    """what remembers: a convolutional LSTM, or none"""
    look_ahead: int = 8
    """rollouts after a walk, from which the values choose; 0: none"""
    depth: int = 5
    """steps of a rollout"""
    width: int = 32
    """of the features"""
    copies: int = 64
    """walks side by side"""
    segment: int = 4
    """steps of all of them in an update"""
    batch: int = 64
    """pairs in an update of the regressor"""
    discount: float = 0.9
    """of the rewards, a step"""
    lam: float = 0.9
    """λ of the advantages"""
    entropy: float = 0.005
    """weight of the entropy"""
    value_weight: float = 0.25
    """weight of the critic's error"""
    start_share: float = 0.4
    """part of the agent's time in which it copies the expert at independent places, before it walks; 0: none"""
    imitation: float = 1.0
    """weight at first of copying the expert on its walks, who takes the step most needed"""
    imitation_share: float = 0.8
    """part of its phase in which that weight falls evenly to 0"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule"""
    mutual_information: bool = True
    """score the classical baseline too; it needs SimpleITK"""


Parts = tuple[Any, torch.optim.Optimizer, Keeper]
PART = "agent"  # the tracked part that holds the policy
AGAIN = 4  # times that the iterated regressor looks
_load = lru_cache(maxsize=6)(load_pairs)


def resolve(config: Config) -> Config:
    """Check the fields and the data; raises `InputError`."""
    check_least(config, 1, "pairs", "horizon", "depth", "width", "copies", "segment", "batch", "views")
    if config.held_out < 4:
        raise InputError(f"held_out: found {config.held_out}, expected at least 4: a quarter is for validation")
    if config.look_ahead < 0:
        raise InputError(f"look_ahead: found {config.look_ahead}, expected 0 (none) or more")
    if not 0 <= config.start_share < 1:
        raise InputError(f"start_share: found {config.start_share:g}, expected 0 (none) to less than 1")
    if not 0 < config.imitation_share <= 1:
        raise InputError(f"imitation_share: found {config.imitation_share:g}, expected more than 0 and at most 1")
    build(config)  # which says what is wrong with the image's size
    if config.mutual_information:
        simple_itk()
    for part in ("train", "val", "test"):
        _pairs(config, part)  # now, not after hours
    return config


def _pairs(config: Config, part: Part) -> Pairs:
    count = {"train": config.pairs, "val": config.held_out // 4, "test": config.held_out}[part]
    spread = Spread(config.shift, config.turn, config.zoom)
    return _load(config.data, config.root, part, config.image_size, count, spread, config.views)


def _env(config: Config, pairs: Pairs, copies: int, device: torch.device, displace: bool = False) -> RegistrationEnv:
    how: dict[str, Any] = {"reward": config.reward, "reached": config.reached, "bonus": config.bonus}
    how |= {"spread": Spread(config.shift, config.turn, config.zoom), "displace": displace}
    return RegistrationEnv(copies, pairs=pairs, horizon=config.horizon, device=device, **how)


def build(config: Config) -> RegistrationPolicy:
    """The policy of a config, untrained."""
    return RegistrationPolicy(config.image_size, len(MOVES), config.core, config.width)


def _regressor(config: Config) -> Regressor:
    reach = config.shift * config.image_size
    return Regressor(config.image_size, config.width, (reach, reach, config.turn, config.zoom))


def train(config: Config, run: Run) -> None:
    """Learn to move, first by an expert, then by the reward; and for as long in all to say the transform at once."""
    data, val = _pairs(config, "train"), _pairs(config, "val")
    torch.manual_seed(config.seed)
    agent = tracked(run, PART, build(config))
    torch.manual_seed(config.seed)
    regressor = tracked(run, "regressor", _regressor(config))
    rows = run.rows(config.copies)
    env = _env(config, data, rows.stop - rows.start, run.device, displace=True)
    env.reset(seed=int(noise.key(config.seed, "walks")) % 2**30 + rows.start)
    env, recall = run.track(env=env, recall=Recall(agent[0], env.num_envs))
    if config.start_share:
        _learn_to_copy(config, run, env, *agent[:2])
    _learn_to_move(config, run, env, recall, val, agent)
    _learn_to_say(config, run, env, val, regressor)


def _learn_to_copy(config: Config, run: Run, env: RegistrationEnv, policy: RegistrationPolicy, optimizer: Any) -> None:
    """Take the expert's moves at independent places: far fewer tell what to look for than on walks."""
    for step in run.steps("start", config.start_share / 2):
        state = _scattered(config, run, env, "start", step)
        seen = map_tree(lambda leaf: leaf[:, None], env.observe(state))
        decisions, _ = policy(seen, None, torch.ones_like(state.pair, dtype=torch.bool)[:, None])
        apart = expert_loss(env.gains(state)[:, None], env.left(state)[:, None], decisions)
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(apart, optimizer, clip=5.0)
        run.log(imitation_loss=apart.detach())


def _scattered(config: Config, run: Run, env: RegistrationEnv, phase: str, step: int) -> RegistrationState:
    rows = run.rows(config.batch)
    ids = noise.examples(config.seed, step, config.batch, env.examples)[rows].to(run.device)
    return env.scattered(ids, noise.key(run.seed, phase, step, torch.arange(config.batch)[rows]).to(run.device))


def _learn_to_move(config: Config, run: Run, env: RegistrationEnv, recall: Recall, val: Pairs, parts: Parts) -> None:
    """Actor-critic on what the walks were worth, and less and less the expert's moves."""
    policy, optimizer, keeper = parts
    copies = torch.arange(env.num_envs, device=run.device) + run.rank * env.num_envs
    weights = config.discount, config.lam, config.entropy, config.value_weight
    memory = Memory(env.observe(env.state), recall.state, recall.starts)
    for step in run.steps(PART, (1 - config.start_share) / 2):
        if step == 0:
            keeper.begin()
        expert, keys = Expert(env), noise.key(run.seed, "walk", step, copies)
        trajectory, decisions, memory = act(expert, policy, memory, config.segment, keys)
        recall.keep(memory.state, memory.starts)
        loss, losses = actor_critic_loss(trajectory, decisions, *weights)
        apart = expert_loss(*expert.told(), decisions, trajectory.mask)
        fading = config.imitation * max(0.0, 1 - run.progress / config.imitation_share)
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(loss + fading * apart, optimizer, clip=5.0)
        run.log(**losses, imitation_loss=apart.detach(), walk_error=env.errors(env.state).mean())
        if (step + 1) % 100 == 0:
            _offer(run, keeper, policy, _errors(val, _found(config, policy, val, run.device)))
    _offer(run, keeper, policy, _errors(val, _found(config, policy, val, run.device)), last=True)


def _learn_to_say(config: Config, run: Run, env: RegistrationEnv, val: Pairs, parts: Parts) -> None:
    """Regress what is left to do, by the landmarks."""
    (regressor, optimizer, keeper), held_out = parts, _env(config, val, 1, run.device)
    for step in run.steps("regressor", 0.5):
        if step == 0:
            keeper.begin()
        state = _scattered(config, run, env, "regressor", step)
        seen = env.observe(state)
        there = state.transform + regressor(seen["fixed"], seen["moving"])
        error = env.errors(replace(state, transform=there)).mean()
        set_learning_rate(optimizer, one_cycle(run.progress, config.learning_rate))
        run.optimise(error * 2 / config.image_size, optimizer, clip=5.0)
        run.log(landmark_error=error.detach())
        if (step + 1) % 200 == 0:
            _offer(run, keeper, regressor, _errors(val, said(held_out, regressor)))
    _offer(run, keeper, regressor, _errors(val, said(held_out, regressor)), last=True)


def _offer(run: Run, keeper: Keeper, model: nn.Module, errors: Tensor, last: bool = False) -> None:
    """Keep the weights if their mean error on val is the least so far; in the end, the model goes back to the best."""
    keeper.offer(model, -errors.mean())
    if last:
        model.load_state_dict(keeper.best.state_dict())
        run.save()
    else:
        run.log(held_out_reward=-errors.mean(), held_out_success=(errors < NEAR).float().mean())


def _found(
    config: Config, policy: RegistrationPolicy, data: Pairs, device: torch.device, rollouts: int = 0
) -> Float[Tensor, "size states 4"]:
    """Walks over pairs as they are; the last transform is what was found."""
    policy.eval()
    return walked(_env(config, data, 1, device), policy, config.seed, config.horizon, rollouts, config.depth)


def _errors(data: Pairs, path: Float[Tensor, "size states 4"]) -> Float[Tensor, " size"]:
    return data.errors(matrices(path[:, -1], data.side))


def evaluate(config: Config, policy: RegistrationPolicy, run: Run, elsewhere: bool = False) -> Evaluation:
    """Target registration error in pixels of the working size on `test`, its mean and median; the part below 5 pixels.

    `success_near` and `success_far` are that part of the pairs displaced by less and by more than 25 pixels on average;
    `seconds` is what a pair took. Baselines: `greedy`, the agent without look-ahead; `untrained`; `identity`, nothing
    done; `regressor`, the same eyes trained as long by the true transform; `regressor again`, looking four times;
    `mutual information`, from as many starts as there is time for in the agent's seconds, and `mutual information from
    nine places`, without a limit.
    """
    data, device = _pairs(config, "test"), run.device
    env = _env(config, data, 1, device)
    before = data.errors(torch.eye(2, 3).expand(len(data), 2, 3))
    torch.manual_seed(config.seed)
    fresh = build(config).to(device)
    rows: dict[str, Callable[[], Tensor]] = {
        "agent": lambda: _errors(data, _found(config, policy, data, device, config.look_ahead)),
        "greedy": lambda: _errors(data, _found(config, policy, data, device)),
        "untrained": lambda: _errors(data, _found(config, fresh, data, device)),
        "identity": lambda: before,
    }
    for model in restored(run, {"regressor": "regressor"}, partial(_regressor, config)).values():
        rows["regressor"] = lambda: _errors(data, said(env, model))  # noqa: B023
        rows["regressor again"] = lambda: _errors(data, said(env, model, AGAIN))  # noqa: B023
    told: dict[str, dict[str, float]] = {}
    if config.mutual_information:
        both = data.fixed.float() / 255, data.moving.float() / 255
        rows["mutual information"] = lambda: data.errors(registered(*both, told["agent"]["seconds"]))
        rows["mutual information from nine places"] = lambda: data.errors(registered(*both))
    bins, curves = (before / 5).floor(), {}
    for name, row in rows.items():
        began, errors = time.monotonic(), row()
        told[name] = registration_scores(errors, before) | {"seconds": (time.monotonic() - began) / len(data)}
        hits = (errors < NEAR).float()
        curves[name] = [(5 * place + 2.5, float(hits[bins == place].mean())) for place in bins.unique().tolist()]
    return Evaluation(told.pop("agent"), told, {"success against initial error in px": curves})


def predict(config: Config, policy: RegistrationPolicy, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Register pictures: {"fixed": [batch, 3, height, width], "moving": the same or another size}, in [0, 1].

    Returns `transform` [batch, 4] at the working size (`foveate.data.similarity`), `matrix` [batch, 2, 3] from pixels
    of the moving picture to those of the fixed one, `warped`, the moving pictures laid over the fixed ones, and `path`,
    the transforms on the way.

    Raises:
        InputError: one of the two is missing, breaks the convention, or there are not as many of it.
    """
    fixed, moving = checked_pair(images)
    device = next(policy.parameters()).device
    (small, box), (other, own) = (letterbox(each.to(device), config.image_size) for each in (fixed, moving))
    path = _found(config, policy, without_landmarks(small, other), device, config.look_ahead)
    found = matrices(path[:, -1], config.image_size)
    matrix = compose(inverse(box.cpu()).expand_as(found), compose(found, own.cpu().expand_as(found)))
    warped = warp(moving.float().cpu(), matrix, (fixed.shape[2], fixed.shape[3]))
    return {"transform": path[:, -1], "matrix": matrix, "warped": warped, "path": path}


def picture(
    config: Config, policy: RegistrationPolicy, run: Run, images: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Test pairs, or the user's, before and after as checkerboards; and the walk over the first one, an animation."""
    side, known = config.image_size, images is None
    if images is None:
        data = _pairs(config, "test")
        rows = data.errors(torch.eye(2, 3).expand(len(data), 2, 3)).argsort(descending=True)
        data = map_tree(lambda leaf: leaf[rows[:: max(1, len(data) // 6)][:6]], data)  # from far to near
        images = {"fixed": data.fixed.float() / 255, "moving": data.moving.float() / 255}
    fixed, moving = (letterbox(each.cpu(), side)[0] for each in checked_pair(images))
    path = matrices(predict(config, policy, {"fixed": fixed, "moving": moving})["path"], side)
    before, after = (warp(moving, path[:, place]) for place in (0, -1))
    errors = (data.errors(path[:, 0]), data.errors(path[:, -1])) if known else None
    shown = overlays(fixed, moving, before, after, errors)
    return {"registered": shown, "walk": frames(fixed[:1], warp(moving[:1].expand(path.shape[1], -1, -1, -1), path[0]))}


def read(config: Config, path: Path) -> dict[str, Tensor]:
    """Pictures to be registered: of a pairs.csv, or fixed.* and moving.* in a folder."""
    return read_pictures_of_pairs(path, config.image_size)


def check(config: Config) -> dict[str, Any]:
    """The first pairs as they are given, and after the transform that their landmarks ask for."""
    data = map_tree(lambda leaf: leaf[:6], _pairs(config, "val"))
    fixed, moving = data.fixed.float() / 255, data.moving.float() / 255
    return {"data": overlays(fixed, moving, moving, warp(moving, data.aligned()))}
