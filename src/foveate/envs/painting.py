"""Paint a picture with straight strokes through a renderer that nobody differentiates (after SPIRAL: Ganin et al. 2018,
"Synthesizing programs for images using reinforced adversarial learning", arXiv 1804.01118).

| | |
|---|---|
| state | the canvas, the cell the pen is at, the strokes left, what the picture is to show, what the canvas is worth |
| observation | `canvas`; `pen`, a map of its cell; `left`, the share of strokes; `kind`; `target`, to be copied |
| action | a pen and a cell: go there with the pen lifted, or down in one of several widths, for a straight stroke |
| reward | what the stroke adds to the canvas's worth: nearness to the picture to copy, or any score of images |
| horizon | the number of strokes |

Going with the lifted pen to where it is does nothing: a painter that is done waits. The canvas stands in the state, in
place of the strokes that made it: it is small, and rendering all of them anew at each look would cost as many times
more as there are strokes. Ink is white on black and covers: a place holds the most ink of any stroke, so that painting
twice makes no edge harder, and the order of strokes is no order of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate.data.classification import Images, load_images
from foveate.envs.single import SingleEnv
from foveate.envs.tensor_env import TensorEnv, check_choice
from foveate.types import InputError

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Credit = Literal["gains", "end"]
FINER = 2  # the canvas, a side, than what is shown of it
PENS = (0.04, 0.08)  # widths of the pens, in sides of the picture, chosen by tracing digits of MNIST
MARGIN = 0.125
ENLARGED = 4  # in a picture
PEN = (255, 160, 0)


@dataclass(frozen=True)
class PaintingState:
    """A canvas, and what is asked of it.

    Attributes:
        target: number of the picture to copy; the kind, if there is a score.
        kind: which class it is to show.
        canvas: ink in [0, 1], `FINER` times finer than what is shown.
        pen: the cell it is at, row · grid + column.
        left: strokes.
        worth: of what is shown: minus the squared distance to the target, in those of a blank canvas; or its score.
    """

    target: Int[Tensor, "*batch"]
    kind: Int[Tensor, "*batch"]
    canvas: Float[Tensor, "*batch rows columns"]
    pen: Int[Tensor, "*batch"]
    left: Int[Tensor, "*batch"]
    worth: Float[Tensor, "*batch"]


class PaintingEnv(TensorEnv):
    """`foveate/Painting-v0`.

    Args:
        num_envs: copies in lockstep.
        images: what is to be copied; None loads `data` from `root`.
        data: name of a set (`foveate.data.classification.DATASETS`).
        root: its folder.
        split: "train", "val", "test" or "all".
        image_size: side in pixels of what is shown, to which the data are brought.
        grid: cells a side where the pen can go.
        margin: around the cells, in sides of the picture: digits of MNIST leave a seventh free.
        strokes: of a painting.
        pens: widths in sides of the picture.
        score: (images [batch, 1, side, side] in [0, 1], kinds [batch]) → [batch], higher is better: a discriminator, or
            any other judge. With it nothing is to be copied, and an example is a kind (`ids` are kinds).
        kinds: with a score, how many kinds there are; None: the classes of the data, which are not read otherwise.
        credit: "gains" rewards each stroke with what it changes; "end" the last with all of it. Their sum is the same.
        **options: of `TensorEnv`, without `horizon`.

    Raises:
        InputError: as `load_images`; a number out of its range; pictures with colour, or that are not square; when it
            scores, a score that does not give a number an image.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012
    chance = False

    def __init__(
        self,
        num_envs: int = 1,
        *,
        images: Images | None = None,
        data: str = "digits",
        root: str | Path | None = None,
        split: Literal["train", "val", "test", "all"] = "train",
        image_size: int = 16,
        grid: int = 8,
        margin: float = MARGIN,
        strokes: int = 12,
        pens: tuple[float, ...] = PENS,
        score: Score | None = None,
        kinds: int | None = None,
        credit: Credit = "gains",
        **options: Any,
    ) -> None:
        check_choice("credit", credit, get_args(Credit))
        for name, number in ("strokes", strokes), ("grid", grid), ("pens", len(pens)), ("kinds", kinds or 1):
            if number < 1:
                raise InputError(f"{name}: found {number}, expected at least 1")
        for width in pens:
            if not 0 < width <= 1:
                raise InputError(f"pens: found a width of {width:g}, expected more than 0 and at most 1 side")
        if not 0 <= margin < 0.5:
            raise InputError(f"margin: found {margin:g}, expected 0 to less than 0.5 sides")
        if images is None and (score is None or kinds is None):
            images = load_images(data, None if root is None else Path(root), split, image_size)
        self.targets = None if images is None or score is not None else check_grey(images)
        self.labels = None if images is None else images.labels
        self.side = image_size if images is None else images.pixels.shape[-1]
        self.kinds = (kinds or 1) if images is None else len(images.classes)
        if grid > self.side:
            raise InputError(f"grid: found {grid} cells a side, expected at most the {self.side} pixels of the picture")
        self.grid, self.strokes, self.pens, self.score, self.credit = grid, strokes, pens, score, credit
        self.actions = (1 + len(pens)) * grid * grid
        unit, spaces = (1, self.side, self.side), gymnasium.spaces
        seen: dict[str, Any] = {
            "canvas": spaces.Box(0.0, 1.0, unit),
            "kind": spaces.Box(0.0, 1.0, (self.kinds,)),
            "left": spaces.Box(0.0, 1.0, (1,)),
            "pen": spaces.Box(0.0, 1.0, (1, grid, grid)),
            **({} if self.targets is None else {"target": spaces.Box(0.0, 1.0, unit)}),
        }
        super().__init__(
            num_envs,
            spaces.Dict(seen),
            spaces.Discrete(self.actions),
            examples=self.kinds if self.targets is None else len(self.targets),
            horizon=strokes,
            **options,
        )
        self.widths = torch.tensor(pens, device=self.device) * self.side
        self.places = centres(grid, self.side, margin).to(self.device)
        if self.targets is not None and self.labels is not None:
            self.targets, self.labels = self.targets.to(self.device), self.labels.to(self.device)

    def initial(self, ids: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]) -> PaintingState:
        """A blank canvas, the pen in its middle."""
        return self._valued(self._blank(ids))

    def transition(
        self, state: PaintingState, actions: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
    ) -> tuple[PaintingState, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Take the pen to a cell: action = pen · grid² + cell, where pen 0 is the lifted one."""
        after = self.moved(state, actions)
        ended = after.left == 0
        if self.credit == "gains":
            after = self._valued(after)
            return after, after.worth - state.worth, ended
        # `worth` stays that of the blank canvas, and only what is finished is looked at
        if not bool(ended.any()):
            return after, torch.zeros_like(state.worth), ended
        return after, torch.where(ended, self._valued(after).worth - state.worth, 0.0), ended

    def observe(self, state: PaintingState) -> dict[str, Tensor]:
        """The canvas as it is shown, and what the painter knows beside it."""
        seen = {
            "canvas": shown(state.canvas),
            "kind": F.one_hot(state.kind, self.kinds).float(),
            "left": state.left[:, None] / self.strokes,
            "pen": F.one_hot(state.pen, self.grid**2).float().view(-1, 1, self.grid, self.grid),
        }
        return seen if self.targets is None else seen | {"target": self.targets[state.target].float() / 255}

    def played(self, ids: Int[Tensor, " batch"], actions: Int[Tensor, "batch time"]) -> list[PaintingState]:
        """The states before the first of these strokes and after each, their worth not looked at."""
        states = [self._blank(ids)]
        for action in actions.unbind(1):
            states.append(self.moved(states[-1], action))
        return states

    def moved(self, state: PaintingState, actions: Int[Tensor, " batch"]) -> PaintingState:
        """The state after a stroke, its worth not looked at."""
        pen, cell = actions // self.grid**2, actions % self.grid**2
        ink = stroke(self.places[state.pen], self.places[cell], self.widths[(pen - 1).clamp(min=0)], self.side)
        canvas = torch.where((pen > 0)[:, None, None], torch.maximum(state.canvas, ink), state.canvas)
        return replace(state, canvas=canvas, pen=cell, left=(state.left - 1).clamp(min=0))

    def draw(self, state: PaintingState) -> UInt8[Tensor, "batch height width 3"]:
        """The canvas with the pen on it; beside it the picture to copy, if there is one."""
        fine = enlarged(state.canvas[:, None], ENLARGED).expand(-1, 3, -1, -1).clone()
        points = torch.arange(fine.shape[-1], device=fine.device) + 0.5
        away = self.places[state.pen] * FINER * ENLARGED
        dot = (points - away[:, :1]).square()[:, None] + (points - away[:, 1:]).square()[:, :, None]
        colour = fine.new_tensor(PEN)[:, None, None] / 255
        fine = torch.where((dot <= (2 * ENLARGED) ** 2)[:, None], colour, fine)
        if self.targets is not None:
            target = self.targets[state.target].float() / 255
            fine = torch.cat((enlarged(target, FINER * ENLARGED).expand_as(fine), fine), 3)
        return (fine * 255).round().byte().permute(0, 2, 3, 1)

    def _blank(self, ids: Tensor) -> PaintingState:
        kind = ids if self.targets is None or self.labels is None else self.labels[ids]
        canvas = torch.zeros(len(ids), FINER * self.side, FINER * self.side, device=ids.device)
        pen = torch.full_like(ids, self.grid // 2 * self.grid + self.grid // 2)
        return PaintingState(ids, kind, canvas, pen, torch.full_like(ids, self.strokes), canvas.new_zeros(len(ids)))

    def _valued(self, state: PaintingState) -> PaintingState:
        images = shown(state.canvas)
        if self.score is not None:
            worth = self.score(images, state.kind)
            if worth.shape != state.worth.shape:
                found = list(worth.shape)
                raise InputError(
                    f"score: found {found} of {len(images)} images, expected a number each: [{len(images)}]"
                )
            return replace(state, worth=worth.detach())
        assert self.targets is not None
        return replace(state, worth=-apart(images, self.targets[state.target].float() / 255))


def stroke(
    start: Float[Tensor, "batch 2"], end: Float[Tensor, "batch 2"], width: Float[Tensor, " batch"], side: int
) -> Float[Tensor, "batch rows columns"]:
    """A straight stroke with round ends as ink in [0, 1] on a canvas `FINER` times finer than `side`, antialiased.

    Args:
        start: (x, y) in pixels of the picture.
        end: the same; a dot, if it is the start.
        width: in pixels of the picture.
        side: of the picture.
    """
    points = (torch.arange(FINER * side, device=start.device) + 0.5) / FINER
    x, y = (points - start[:, axis, None] for axis in (0, 1))  # from the start, [batch, points]
    along = end - start
    length = along.square().sum(1).clamp(min=1e-12)[:, None, None]
    part = (((x * along[:, :1])[:, None] + (y * along[:, 1:])[:, :, None]) / length).clamp(0, 1)
    away = (x[:, None] - part * along[:, :1, None]).square() + (y[:, :, None] - part * along[:, 1:, None]).square()
    # the edge is one pixel of the canvas wide
    return ((width[:, None, None] / 2 - away.sqrt()) * FINER + 0.5).clamp(0, 1)


def shown(canvas: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 1 side side"]:
    """The canvas as a picture: the means of its blocks."""
    return F.avg_pool2d(canvas[:, None], FINER)


def apart(
    images: Float[Tensor, "batch 1 side side"], targets: Float[Tensor, "#batch 1 side side"]
) -> Float[Tensor, " batch"]:
    """Squared distance to the targets, in that of a blank canvas: 0 for a copy, 1 for nothing."""
    ink = targets.square().flatten(1).sum(1).clamp(min=1.0)
    return (images - targets).square().flatten(1).sum(1) / ink


def centres(grid: int, side: int, margin: float) -> Float[Tensor, "cells 2"]:
    """(x, y) in pixels of the cells' middles, row after row; around the cells is a margin, in sides."""
    middles = side * (margin + (1 - 2 * margin) * (torch.arange(grid) + 0.5) / grid)
    return torch.stack((middles.repeat(grid), middles.repeat_interleave(grid)), 1)


def enlarged(images: Float[Tensor, "batch 1 rows columns"], times: int) -> Float[Tensor, "batch 1 height width"]:
    """Every pixel as a square."""
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def check_grey(images: Images) -> UInt8[Tensor, "size 1 side side"]:
    """The pixels of pictures that can be painted.

    Raises:
        InputError: they have colour, or are not square.
    """
    channels, height, width = images.pixels.shape[1:]
    if channels != 1:
        raise InputError(
            f"data: pictures of {images.name!r} have {channels} channels, but strokes are grey: convert them to "
            "grayscale, e.g. Image.open(path).convert('L').save(path)"
        )
    if height != width:
        raise InputError(f"data: pictures of {height}x{width} (rows, columns), expected squares: give --image-size")
    return images.pixels


class SinglePaintingEnv(SingleEnv):
    """One copy of `PaintingEnv`."""

    lockstep = PaintingEnv
