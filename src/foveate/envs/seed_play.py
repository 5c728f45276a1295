"""Episodes of seeds: played by a network or with true labels, and begun by a user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.envs.seeds import BACKGROUND, CELLS, FOREGROUND, SeedsEnv, SeedState, in_bytes
from foveate.types import InputError, State, Tree, map_tree
from foveate.value_learning import walk

AREA = CELLS * CELLS
GOOD = 0.9  # IoU from which a mask counts as a success


@dataclass(frozen=True)
class Played:
    """What came of episodes.

    Attributes:
        ious: of the mask before the first seed and after each.
        actions: the seeds.
        right: true where a seed is on its own side.
    """

    ious: Float[Tensor, "batch steps"]
    actions: Int[Tensor, "batch time"]
    right: Bool[Tensor, "batch time"]


def play(
    env: SeedsEnv,
    ids: Int[Tensor, " batch"],
    keys: Int[Tensor, " batch"],
    network: Callable[[Tree], Tensor] | None = None,
    look: Callable[[State], Tree] | None = None,
) -> Played:
    """Play one episode on each of these examples, begun by the user of each key, whom `draw` meets too.

    Args:
        env: with as many copies, and autoreset "disabled".
        ids: the examples.
        keys: of the users, and of the true seeds.
        network: (what `look` makes) → values. None: seeds with true labels, of either side as often, anywhere well
            inside it.
        look: (state) → the network's input; None: `env.observe`.
    """
    if network is None:
        network, look = partial(_true_seeds, env, noise.fold(keys, "true seeds")), lambda state: state
    found = walk(env, network, ids, look, keys)
    states = [map_tree(lambda leaf, at=time: leaf[:, at], found.states) for time in range(found.actions.shape[1] + 1)]
    there = env.object[ids].flatten(1).gather(1, found.actions % AREA)
    return Played(torch.stack([env.iou(each) for each in states], 1), found.actions, there == (found.actions >= AREA))


def _true_seeds(env: SeedsEnv, keys: Tensor, state: SeedState) -> Tensor:
    """Values under which a seed of either side, drawn evenly among those that are right, is the best."""
    dice = noise.uniform(noise.fold(keys, (state.seeds > 0).flatten(1).sum(1)), 2 * AREA + 1)
    side = (torch.arange(2, device=dice.device) == (dice[:, -1:] < 0.5)).repeat_interleave(AREA, 1)
    return dice[:, :-1] + 2.0 * env.rewarded(state) + side


def shown_first(env: SeedsEnv, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> SeedState:
    """The user's seeds drawn from the keys, and no mask: what a network is shown that draws the mask at once."""
    return SeedState(ids, env.user_seeds(ids, keys), torch.zeros_like(env.masks[ids], dtype=torch.uint8))


@torch.no_grad()
def draw(
    env: SeedsEnv,
    ids: Int[Tensor, " batch"],
    keys: Int[Tensor, " batch"],
    network: nn.Module,
    look: Callable[[State], Tree],
) -> Float[Tensor, " batch"]:
    """IoU of masks that a network draws at once: (what `look` makes) → scores of pixels, above 0 for the object."""
    state = shown_first(env, ids, noise.fold(keys, "initial"))  # as an environment's reset does: the users of `play`
    return env.iou(replace(state, walker=(network.eval()(look(state)) > 0).byte() * 255))


def iou_scores(ious: Float[Tensor, " batch"]) -> dict[str, float]:
    """Their mean, and how many are a success."""
    return {"iou": float(ious.mean()), "success": float((ious >= GOOD).float().mean())}


def seed_scores(played: Played) -> dict[str, float]:
    """Those of the last masks and of the seeds.

    "seed_precision" is the share of the seeds that are on their own side; "side_diversity" is 1 if as many are of the
    object as of the background, 0 if all are of one.
    """
    balance = 1 - (2 * (played.actions >= AREA).float().mean() - 1).abs()
    seeds = {"seed_precision": float(played.right.float().mean()), "side_diversity": float(balance)}
    return iou_scores(played.ious[:, -1]) | seeds


@torch.no_grad()
def cut_out(
    env: SeedsEnv,
    network: Callable[[Tree], Tensor],
    look: Callable[[State], Tree],
    background: Float[Tensor, "batch 2"],
    foreground: Float[Tensor, "batch 2"],
    count: int,
) -> dict[str, Tensor]:
    """Place `count` seeds after those of a user, in every example of the environment.

    Args:
        env: with the user's images; its masks are not looked at.
        network: (what `look` makes) → values.
        look: (state) → the network's input.
        background: the user's seed, (x, y) in parts of the image's sides.
        foreground: the same for the object.
        count: of seeds.

    Returns `steps` [batch, 1 + count, side, side], the masks; `probabilities` [batch, side, side] in the end; `seeds`
    [batch, 2 + count, 2], (x, y) in parts of the sides, the user's first; `labels`, true for the object.
    """
    ids = torch.arange(len(background), device=background.device)
    grid = torch.zeros(len(ids), AREA, dtype=torch.uint8, device=ids.device)
    chosen = []
    for place, kind in ((background, BACKGROUND), (foreground, FOREGROUND)):
        cells = (place * CELLS).long().clamp(0, CELLS - 1)
        chosen.append(cells[:, 1] * CELLS + cells[:, 0])
        grid[ids, chosen[-1]] = kind
    chosen[1] = chosen[1] + AREA
    seeds = grid.view(-1, CELLS, CELLS)
    state = SeedState(ids, seeds, in_bytes(env.walked(ids, seeds)))
    steps = [state.mask]
    for _ in range(count):
        chosen.append(network(look(state)).argmax(1))
        state, *_ = env.transition(state, chosen[-1], ids)
        steps.append(state.mask)
    actions = torch.stack(chosen, 1)
    return {
        "steps": torch.stack(steps, 1),
        "probabilities": env.walked(ids, state.seeds),
        "seeds": places_of(actions),
        "labels": actions >= AREA,
    }


def places_of(actions: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(x, y) of the middle of each seed's cell, in parts of the image's sides."""
    cell = actions % AREA
    return (torch.stack((cell % CELLS, cell // CELLS), -1) + 0.5) / CELLS


def user_places(state: SeedState) -> dict[str, Float[Tensor, "batch 2"]]:
    """ "background" and "foreground": the first seed of each side on the grid, as `places_of`."""
    kinds = {"background": BACKGROUND, "foreground": FOREGROUND}
    return {name: places_of((state.seeds == kind).flatten(1).int().argmax(1)) for name, kind in kinds.items()}


def given_places(given: Tree, count: int, width: int, height: int) -> dict[str, Float[Tensor, "batch 2"]]:
    """A user's seeds, "background" and "foreground" (x, y) in pixels, in parts of the image's sides.

    Raises:
        InputError: one is missing, of another shape or outside of the image; both are in one cell.
    """
    found = {}
    size = torch.tensor([width, height], dtype=torch.float32)
    for name in ("background", "foreground"):
        if name not in given or list(given[name].shape) != [count, 2]:
            there = list(given[name].shape) if name in given else "none"
            raise InputError(f"{name}: found {there}, expected [{count}, 2], a seed (x, y) in pixels for each image")
        place = given[name].float().cpu()
        inside = ((place >= 0) & (place < size)).all(1)
        if not bool(inside.all()):
            raise InputError(
                f"{name}: found a seed at {place[~inside][0].tolist()}, expected x below {width} and y below {height} "
                "pixels, and none below 0"
            )
        found[name] = place / size
    same = ((found["background"] * CELLS).long() == (found["foreground"] * CELLS).long()).all(1)
    if bool(same.any()):
        row = int(same.int().argmax())
        raise InputError(f"foreground: the seed of image {row} is where that of the background is; move one of them")
    return found


def enlarged(
    probabilities: Float[Tensor, "batch rows columns"], height: int, width: int
) -> Float[Tensor, "batch height width"]:
    """Probabilities at another size."""
    return F.interpolate(probabilities[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
