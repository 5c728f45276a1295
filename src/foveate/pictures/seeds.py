"""Seeds as they were placed, and the outline of the mask that came of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from foveate.pictures.canvas import MARGIN, SHARPER, enlarge, font_of, grid, size_of

SIDES = ("#2563eb", "#dc2626")  # a seed of the background, of the foreground
OUTLINE = (255, 214, 0)


def seed_tile(
    image: Float[Tensor, "channels height width"],
    mask: Bool[Tensor, "height width"],
    places: Float[Tensor, "seeds 2"],
    labels: Bool[Tensor, " seeds"],
    given: int = 2,
    cell: int = 224,
) -> Image.Image:
    """An image, darkened outside of the mask; seeds are discs, blue for the background and red for the object.

    Args:
        image: in [0, 1].
        mask: of the image's size, or of another of the same shape.
        places: (x, y) in pixels of the image.
        labels: true for the object.
        given: so many of the first seeds are the user's and carry a cross instead of a number.
        cell: longer side as drawn.
    """
    rows, columns = size_of(image, SHARPER * cell)
    fine = F.interpolate(mask[None, None].float(), (rows, columns), mode="bilinear", align_corners=False)[0, 0] > 0.5
    width = SHARPER * 2 + 1
    rim = F.max_pool2d(fine[None].float(), width, 1, width // 2)[0] > 0.5
    shown = torch.from_numpy(np.array(enlarge(image, SHARPER * cell)))
    shown = torch.where(fine[..., None], shown, (shown * 0.55).byte())
    shown = torch.where((rim & ~fine)[..., None], torch.tensor(OUTLINE, dtype=torch.uint8), shown)
    picture = Image.fromarray(shown.numpy())
    draw, zoom, radius = ImageDraw.Draw(picture), SHARPER * cell / max(image.shape[-2:]), 7 * SHARPER
    font = font_of(round(9 * SHARPER), True)
    for number, ((x, y), label) in enumerate(zip((places * zoom).tolist(), labels.tolist(), strict=True)):
        around = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(around, SIDES[int(label)], "white", round(1.2 * SHARPER))
        text = "+" if number < given else str(number - given + 1)
        draw.text((x, y), text, "white", font, anchor="mm")
    return ImageOps.expand(picture, SHARPER * MARGIN, "white").reduce(SHARPER)


def seed_grid(
    images: Float[Tensor, "batch channels height width"],
    masks: Bool[Tensor, "batch steps rows columns"],
    places: Float[Tensor, "batch seeds 2"],
    labels: Bool[Tensor, "batch seeds"],
    steps: Sequence[int],
    truth: Bool[Tensor, "batch rows columns"] | None = None,
    given: int = 2,
) -> Image.Image:
    """A row an image: the mask after each of these numbers of seeds, with the seeds so far, and the true mask."""
    tiles, captions = [], []
    for row, image in enumerate(images):
        for step in steps:
            count = given + step
            tiles.append(seed_tile(image, masks[row, step], places[row, :count], labels[row, :count], given))
            told = f"{step} seed{'' if step == 1 else 's'}"
            if truth is not None:
                both, either = (masks[row, step] & truth[row]).sum(), (masks[row, step] | truth[row]).sum()
                told += f": IoU {both / either:.2f}"
            captions.append(told)
        if truth is not None:
            captions.append("truth")
            tiles.append(seed_tile(image, truth[row], places[row, :0], labels[row, :0], given))
    return grid(tiles, captions, len(steps) + (truth is not None))


def seed_frames(
    image: Float[Tensor, "channels height width"],
    masks: Bool[Tensor, "steps rows columns"],
    places: Float[Tensor, "seeds 2"],
    labels: Bool[Tensor, " seeds"],
    given: int = 2,
) -> list[Image.Image]:
    """The same image seed by seed, to be saved as an animation."""
    return [
        seed_tile(image, mask, places[: given + step], labels[: given + step], given, 320)
        for step, mask in enumerate(masks)
    ]
