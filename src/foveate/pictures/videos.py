"""A mask carried through a video, drawn over its frames with the boxes it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from foveate.pictures.canvas import MARGIN, SHARPER, enlarge, grid

MASK, INNER, OUTER, TRUTH = (255, 0, 190), "#ffa000", "#3cc8ff", (255, 255, 255)


def mask_tiles(
    frames: Float[Tensor, "time 3 height width"],
    masks: Bool[Tensor, "time height width"],
    inner: Float[Tensor, "time 4"],
    outer: Float[Tensor, "time 4"],
    truth: Bool[Tensor, "time height width"] | None = None,
    cell: int = 320,
) -> list[Image.Image]:
    """A picture of each frame: the mask pink, the object box orange, the context box blue, the true outline white.

    Args:
        frames: in [0, 1].
        masks: that were made.
        inner: object boxes in pixels.
        outer: context boxes, which may reach beyond the frame.
        truth: the true masks.
        cell: longer side of a frame as drawn.
    """
    tiles = []
    for row in range(len(frames)):
        image = _tinted(frames[row], masks[row], MASK, 0.55)
        if truth is not None:
            image = _tinted(image, _outline(truth[row]), TRUTH, 0.9)
        picture = enlarge(image, SHARPER * cell)
        zoom, draw = SHARPER * cell / max(image.shape[-2:]), ImageDraw.Draw(picture)
        for box, color in ((outer[row], OUTER), (inner[row], INNER)):
            draw.rectangle(tuple((box * zoom).tolist()), None, color, SHARPER * max(1, cell // 160))
        tiles.append(ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER))
    return tiles


def step_frames(
    frames: Float[Tensor, "time 3 height width"],
    made: Mapping[str, Tensor],
    names: Sequence[str],
    truth: Bool[Tensor, "time height width"] | None = None,
    detailed: int = 4,
    cell: int = 320,
) -> list[Image.Image]:
    """The mask of every frame one after the other, as `mask_tiles`; of the first frames, too, how the boxes moved.

    A caption names the action that led to a pair of boxes, and the step from whose pair the mask was made.

    Args:
        frames: in [0, 1].
        made: "masks" [time, height, width]; "boxes" and "contexts" [time, 4], object and context boxes from which they
            were made; "step_frames", the frame of each step; "step_actions", below 0 where a frame begins; "step_boxes"
            and "step_contexts" [steps, 4], the boxes after it.
        names: of the actions.
        truth: the true masks.
        detailed: frames after the first of which the steps are shown.
        cell: longer side of a frame as drawn.
    """
    drawn, bare = [], torch.zeros_like(made["masks"][:1])
    pairs, used = (torch.cat((made[f"{of}boxes"], made[f"{of}contexts"]), 1) for of in ("step_", ""))
    for time, tile in enumerate(mask_tiles(frames, made["masks"], made["boxes"], made["contexts"], truth, cell)):
        rows, told = (made["step_frames"] == time).nonzero().flatten(), f"frame {time}: mask"
        if len(rows) and time <= detailed:
            told += f" from step {int((pairs[rows] - used[time]).abs().sum(1).argmin())}"
            for step, row in enumerate(rows.tolist()):
                action = int(made["step_actions"][row])
                now = f"frame {time}, step {step}: {names[action] if action >= 0 else 'begin'}"
                inner, outer = pairs[row, None].chunk(2, 1)
                drawn.append(grid(mask_tiles(frames[time, None], bare, inner, outer, cell=cell), [now], 1))
        drawn.append(grid([tile], [told], 1))
    return drawn


def tile_grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows; each has the size of the largest."""
    width, height = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    return grid([ImageOps.pad(tile, (width, height), color="white") for tile in tiles], None, columns)


def spread(count: int, shown: int) -> Sequence[int]:
    """Places of `shown` of `count` frames, evenly from the first to the last."""
    return torch.linspace(0, count - 1, min(shown, count)).round().long().tolist()


def _tinted(image: Tensor, where: Tensor, color: tuple[int, int, int], share: float) -> Tensor:
    tint = image.new_tensor(color)[:, None, None] / 255
    return torch.where(where, (1 - share) * image + share * tint, image)


def _outline(mask: Tensor) -> Tensor:
    """Pixels of the mask that touch one that is not."""
    beyond = F.max_pool2d((~mask)[None, None].float(), 3, 1, 1)[0, 0] > 0
    return mask & beyond
