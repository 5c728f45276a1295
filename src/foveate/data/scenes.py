"""Scenes of textured objects, drawn from a description: image, boxes, masks, panoptic map, captions and video agree.

    scenes = describe(noise.key(seed, "scenes", ids))         # which objects, where, in front of what
    found = draw(scenes, 64)                                  # image, ids of the visible objects, boxes, segments
    captions(scenes)                                          # five sentences for each
    draw(at(scenes, 3.0), 64)                                 # the same scene three frames later

Row i follows from key i alone. Objects later in the list stand in front of earlier ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate import noise
from foveate.geometry import Boxes, mask_boxes

SHAPES = ("disk", "square", "triangle", "ring", "cross", "flower")
COLORS = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.85, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.55, 0.2, 0.65),
    "pink": (0.95, 0.55, 0.75),
    "white": (0.95, 0.95, 0.95),
}
TEXTURES = ("plain", "striped", "checked")
SKY = (0.6, 0.75, 0.9)
GROUNDS = {
    "grass": (0.35, 0.5, 0.2),
    "sand": (0.76, 0.67, 0.48),
    "water": (0.2, 0.42, 0.55),
    "stone": (0.5, 0.48, 0.47),
}
STUFF = ("sky", *GROUNDS)
LARGE = 0.14  # radius from which an object is called large; the side of the image is 1
_TRIES = 8  # places among which an object takes the one that covers the others least


@dataclass(frozen=True)
class Scenes:
    """Descriptions: a tree of [batch, count, ...]; lengths are parts of the image's side.

    Attributes:
        shapes, colors, textures: places in `SHAPES`, `COLORS` and `TEXTURES`.
        centres: (x, y) in [0, 1].
        radii: of the circle an object fits in.
        angles: by which it is turned, in radians.
        velocities: (x, y) a frame.
        mask: true where there is an object.
        grounds: place in `GROUNDS`, for each scene.
        horizons: height above which there is sky, from the top.
        keys: from which the scene's textures are drawn.
    """

    shapes: Int[Tensor, "batch count"]
    colors: Int[Tensor, "batch count"]
    textures: Int[Tensor, "batch count"]
    centres: Float[Tensor, "batch count 2"]
    radii: Float[Tensor, "batch count"]
    angles: Float[Tensor, "batch count"]
    velocities: Float[Tensor, "batch count 2"]
    mask: Bool[Tensor, "batch count"]
    grounds: Int[Tensor, " batch"]
    horizons: Float[Tensor, " batch"]
    keys: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Drawn:
    """What a scene shows.

    Attributes:
        images: RGB in [0, 1].
        ids: k + 1 where object k is seen, then count + 1 for the sky and count + 2 for the ground.
        boxes: around what is seen of each object, in pixels; an object of which less than `VISIBLE` pixels are seen is
            not there. Labels are places in `SHAPES`.
        labels: of the segments with these ids, count + 2 a scene: `SHAPES`, then `STUFF`.
    """

    images: Float[Tensor, "batch 3 side side"]
    ids: Int[Tensor, "batch side side"]
    boxes: Boxes
    labels: Int[Tensor, "batch segments"]

    @property
    def masks(self) -> Bool[Tensor, "batch count side side"]:
        """Where each object is seen."""
        count = self.boxes.mask.shape[1]
        return self.ids[:, None] == torch.arange(1, count + 1, device=self.ids.device)[:, None, None]


VISIBLE = 8  # pixels


def describe(keys: Int[Tensor, " batch"], least: int = 1, most: int = 6) -> Scenes:
    """Draw descriptions of scenes with `least` to `most` objects that overlap little."""
    draws = noise.uniform(noise.fold(keys, "objects"), most, 6 + 2 * _TRIES)
    count = least + noise.integers(noise.fold(keys, "count"), most - least + 1)
    mask = torch.arange(most, device=keys.device) < count[:, None]
    radii = 0.07 + 0.14 * draws[..., 3]
    tries = draws[..., 6:].unflatten(-1, (_TRIES, 2)) * (1 - 2 * radii[..., None, None]) + radii[..., None, None]
    return Scenes(
        shapes=(draws[..., 0] * len(SHAPES)).long(),
        colors=(draws[..., 1] * len(COLORS)).long(),
        textures=(draws[..., 2] * len(TEXTURES)).long(),
        centres=_apart(tries, radii),
        radii=radii,
        angles=2 * math.pi * draws[..., 4],
        velocities=0.03 * noise.normal(noise.fold(keys, "velocities"), most, 2),
        mask=mask,
        grounds=noise.integers(noise.fold(keys, "ground"), len(GROUNDS)),
        horizons=0.25 + 0.3 * noise.uniform(noise.fold(keys, "horizon"), 1).squeeze(1),
        keys=keys,
    )


def _apart(tries: Tensor, radii: Tensor) -> Tensor:
    """Of the places tried for each object, in turn, the one that lies deepest in the free."""
    chosen: list[Tensor] = []
    for place in range(tries.shape[1]):
        here = tries[:, place]
        if not chosen:
            chosen.append(here[:, 0])
            continue
        distance = (here[:, :, None] - torch.stack(chosen, 1)[:, None]).norm(dim=-1)
        room = (distance - radii[:, None, :place] - radii[:, place, None, None]).amin(2)
        best = room.clamp(max=0).argmax(1)
        chosen.append(here.gather(1, best[:, None, None].expand(-1, 1, 2)).squeeze(1))
    return torch.stack(chosen, 1)


def at(scenes: Scenes, frame: float) -> Scenes:
    """The scenes some frames later: objects move in straight lines and are thrown back by the edges."""
    low, high = scenes.radii[..., None], 1 - scenes.radii[..., None]
    way = scenes.centres - low + scenes.velocities * frame
    folded = way.remainder(2 * (high - low))
    return replace(scenes, centres=low + torch.minimum(folded, 2 * (high - low) - folded))


def draw(scenes: Scenes, side: int) -> Drawn:
    """Draw scenes as images of `side`×`side` pixels, with what is seen in them."""
    grid = (torch.arange(side, device=scenes.keys.device) + 0.5) / side
    place = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
    cover, shade = _objects(scenes, place)
    images, ground = _background(scenes, grid, side)
    palette = images.new_tensor(list(COLORS.values()))[scenes.colors]
    count = cover.shape[1]
    for k in range(count):
        color = palette[:, k, :, None, None] * shade[:, k, None]
        images = torch.lerp(images, color, cover[:, k, None])
    grain = noise.normal(noise.fold(scenes.keys, "grain"), 1, side, side)
    front = (cover > 0.5) * torch.arange(1, count + 1, device=cover.device)[:, None, None]
    ids = front.amax(1)
    ids = torch.where(ids > 0, ids, count + 1 + ground)
    labels = torch.cat(
        (
            scenes.shapes,
            torch.full_like(scenes.grounds, len(SHAPES))[:, None],
            len(SHAPES) + 1 + scenes.grounds[:, None],
        ),
        1,
    )
    return Drawn((images + 0.02 * grain).clamp(0, 1), ids, _boxes(ids, scenes.shapes), labels)


def _objects(scenes: Scenes, place: Tensor) -> tuple[Tensor, Tensor]:
    """Which part of each pixel an object covers, if nothing is in front, and how bright it is there."""
    away = (place - scenes.centres[:, :, None, None]) / scenes.radii[..., None, None, None]
    cos, sin = scenes.angles.cos()[..., None, None], scenes.angles.sin()[..., None, None]
    x, y = away[..., 0] * cos + away[..., 1] * sin, away[..., 1] * cos - away[..., 0] * sin
    out = torch.hypot(x, y)
    wide, high = x.abs(), y.abs()
    # signed distances from the outlines, in radii
    distances = (
        out - 1,
        torch.maximum(wide, high) - 0.7,
        torch.maximum(wide * 0.866 + y * 0.5, -y) - 0.5,
        (out - 0.72).abs() - 0.28,
        torch.minimum(torch.maximum(wide - 1, high - 0.3), torch.maximum(wide - 0.3, high - 1)),
        out - 0.72 - 0.28 * torch.cos(5 * torch.atan2(y, x)),
    )
    distance = distances[0]
    for shape, other in enumerate(distances[1:], 1):
        distance = torch.where((scenes.shapes == shape)[..., None, None], other, distance)
    pixels = place.shape[0] * scenes.radii[..., None, None]
    cover = (0.5 - distance * pixels).clamp(0, 1) * scenes.mask[..., None, None]
    stripes = torch.sign(torch.sin(9 * x))
    checks = stripes * torch.sign(torch.sin(9 * y))
    texture = scenes.textures[..., None, None]
    pattern = torch.where(texture == 1, stripes, torch.where(texture == 2, checks, 1.0))
    light = 1 - 0.15 * (away[..., 0] + away[..., 1]).clamp(-1, 1)  # from the upper left
    return cover, (0.8 + 0.2 * pattern) * light


def _background(scenes: Scenes, grid: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Sky and ground with patches of light, and 1 where it is ground."""
    wave = 0.02 * torch.sin(9 * grid + 6 * noise.uniform(noise.fold(scenes.keys, "wave"), 1))
    ground = (grid[:, None] > (scenes.horizons[:, None] + wave)[:, None]).long()
    colors = scenes.horizons.new_tensor([SKY, *GROUNDS.values()])
    color = torch.where(ground[:, None] > 0, colors[1 + scenes.grounds][..., None, None], colors[0][:, None, None])
    light = torch.zeros(len(scenes.keys), 1, side, side, device=grid.device)
    for scale, strength in ((4, 0.06), (12, 0.05)):
        spots = noise.normal(noise.fold(scenes.keys, "light", scale), 1, scale, scale)
        light = light + strength * F.interpolate(spots, (side, side), mode="bilinear", align_corners=False)
    return color + light, ground


def _boxes(ids: Tensor, shapes: Tensor) -> Boxes:
    seen = ids[:, None] == torch.arange(1, shapes.shape[1] + 1, device=ids.device)[:, None, None]
    mask = seen.sum((2, 3)) >= VISIBLE
    return Boxes(torch.where(mask[..., None], mask_boxes(seen)[0], 0.0), shapes, mask)


def captions(scenes: Scenes) -> list[list[str]]:
    """Five sentences a scene: on its largest object, how it stands to the next, how many there are, and where."""
    names, told = list(COLORS), []
    for row in range(len(scenes.keys)):
        places = scenes.mask[row].nonzero().flatten().tolist()
        places.sort(key=lambda place: -float(scenes.radii[row, place]))
        words = []
        for place in places:
            size = "large" if scenes.radii[row, place] >= LARGE else "small"
            texture = TEXTURES[scenes.textures[row, place]]
            middle = "" if texture == "plain" else f"{texture} "
            color, shape = names[scenes.colors[row, place]], SHAPES[scenes.shapes[row, place]]
            words.append((size, f"{color} {shape}", f"{size} {middle}{color} {shape}"))
        ground = list(GROUNDS)[scenes.grounds[row]]
        other = (
            f"{_relation(scenes, row, places[0], places[1])} a {words[1][1]}" if len(places) > 1 else f"over {ground}"
        )
        much = _NUMBERS[len(places)] if len(places) < len(_NUMBERS) else "many"
        told.append(
            [
                f"a {words[0][2]} {other}",
                f"a {words[0][1]} {other}",
                f"{much} {'object' if len(places) == 1 else 'objects'} over {ground} with a {words[0][1]}",
                f"there is a {words[0][2]} over {ground}",
                f"a {' and a '.join(part[1] for part in words[:3])}",
            ]
        )
    return told


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def _relation(scenes: Scenes, row: int, one: int, other: int) -> str:
    right, down = (scenes.centres[row, one] - scenes.centres[row, other]).tolist()
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"
