"""Videos with what was followed in them: a colour an identity, its number, and the way it came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from foveate.geometry import Boxes
from foveate.pictures.canvas import SHARPER, enlarge, font_of, grid


def track_frames(
    frames: Float[Tensor, "time 3 height width"], tracks: Boxes, trail: int = 20, cell: int = 448
) -> list[Image.Image]:
    """Draw tracks over a video, a picture a frame.

    Args:
        frames: in [0, 1].
        tracks: boxes of each frame in its pixels; `labels` are identities.
        trail: frames for which the way of a track is drawn.
        cell: longer side of a picture.
    """
    zoom, unit = SHARPER * cell / max(frames.shape[-2:]), SHARPER * cell / 300
    feet = torch.stack((tracks.boxes[..., [0, 2]].mean(-1), tracks.boxes[..., 3]), -1)
    font, drawn = font_of(round(10 * unit), True), []
    for now, frame in enumerate(frames):
        picture = enlarge(frame, SHARPER * cell)
        pen = ImageDraw.Draw(picture)
        for place in tracks.mask[now].nonzero().flatten().tolist():
            identity = int(tracks.labels[now, place])
            colour = _colour(identity)
            way = []
            for then in range(max(0, now - trail), now + 1):
                here = (tracks.mask[then] & (tracks.labels[then] == identity)).nonzero()
                if len(here):
                    way.append(tuple((feet[then, int(here[0])] * zoom).tolist()))
            if len(way) > 1:
                pen.line(way, colour, round(1.6 * unit), joint="curve")
            left, top, right, bottom = (tracks.boxes[now, place] * zoom).tolist()
            pen.rectangle((left, top, max(left, right), max(top, bottom)), None, colour, round(1.6 * unit))
            corner, text = (left, max(top, 11 * unit)), str(identity + 1)
            pen.rectangle(pen.textbbox(corner, text, font, anchor="lb"), colour)
            pen.text(corner, text, "white", font, anchor="lb")
        drawn.append(picture.reduce(SHARPER))
    return drawn


def track_grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures of `track_frames`, row below row, each with a caption."""
    tiles = [tile for row in rows for tile in row]
    return grid(tiles, [text for row in captions for text in row], len(rows[0]))


def _colour(identity: int) -> tuple[int, ...]:
    """Neighbouring numbers look different, and each stays what it is."""
    return ImageColor.getrgb(f"hsv({identity * 137 % 360},{80 - identity % 3 * 15}%,{85 - identity % 2 * 20}%)")
