"""Paintings made in `foveate.envs.painting`: by a painter, and greedily, as a copy of a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.envs.painting import FINER, PaintingEnv, apart, shown, stroke
from foveate.learn.rollout import rollout

AT_ONCE = 16  # pictures traced together


def painted(
    env: PaintingEnv, painter: nn.Module, kinds: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch 1 side side"], Int[Tensor, "batch time"]]:
    """Paintings of these kinds, drawn with these keys, and the strokes that made them. Autoreset must be disabled."""
    trajectory, _ = rollout(env, painter, keys, ids=kinds)
    return shown(env.state.canvas), trajectory.actions


def traced(env: PaintingEnv, targets: Float[Tensor, "size 1 side side"]) -> Float[Tensor, "size 1 side side"]:
    """Pictures copied by the stroke that helps most, again and again: what straight strokes can show of them.

    Greedy, so not the best that they can. Where no stroke from where the pen is helps, it is lifted to where most ink
    is missing.
    """
    return torch.cat([_traced(env, some) for some in targets.split(AT_ONCE)])


def _traced(env: PaintingEnv, targets: Float[Tensor, "size 1 side side"]) -> Float[Tensor, "size 1 side side"]:
    size, cells = len(targets), env.grid**2
    canvas = torch.zeros(size, FINER * env.side, FINER * env.side, device=env.device)
    pen = _lacking(env, canvas, targets)  # the first stroke: to where it begins
    each = torch.arange(len(env.pens) * cells, device=env.device)
    for _ in range(env.strokes - 1):
        start = env.places[pen].repeat_interleave(len(each), 0)
        end, width = env.places[each % cells].repeat(size, 1), env.widths[each // cells].repeat(size)
        tried = torch.maximum(canvas.repeat_interleave(len(each), 0), stroke(start, end, width, env.side))
        errors = apart(shown(tried), targets.repeat_interleave(len(each), 0)).view(size, -1)
        least, best = errors.min(1)
        helps = least < apart(shown(canvas), targets) - 1e-3
        chosen = tried.view(size, -1, *tried.shape[1:])[torch.arange(size, device=env.device), best]
        pen = torch.where(helps, best % cells, _lacking(env, canvas, targets))
        canvas = torch.where(helps[:, None, None], chosen, canvas)
    return shown(canvas)


def _lacking(env: PaintingEnv, canvas: Tensor, targets: Tensor) -> Int[Tensor, " size"]:
    places = (2 * env.places / env.side - 1).expand(len(targets), 1, -1, -1)
    missing = F.avg_pool2d((targets - shown(canvas)).clamp(min=0), 3, 1, 1)
    return F.grid_sample(missing, places, align_corners=False).flatten(1).argmax(1)
