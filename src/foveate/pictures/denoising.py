"""Drawings of generated images: models beside each other on the same noise, and chains step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from foveate.pictures.canvas import image_grid

CELL = 96
AXES = {
    "frechet distance against reward": ("reward", "distance"),
    "judge accuracy against reward": ("reward", "accuracy"),
    "frechet distance against kl": ("kl", "distance"),
}
Along = dict[str, dict[str, list[tuple[float, float]]]]


def rows(images: Mapping[str, Float[Tensor, "batch channels height width"]], names: Sequence[str]) -> Image.Image:
    """A row a model, every image from the same noise as the one above it; as many of each name, next to each other."""
    each = len(next(iter(images.values()))) // max(1, len(names))
    captions = [f"{name}: {model}"[:40] for model in images for name in names for _ in range(each)]
    return image_grid(torch.cat([one.cpu() for one in images.values()]), captions, each * len(names), CELL)


def columns(images: Mapping[str, Float[Tensor, "batch channels height width"]]) -> Image.Image:
    """A column a model, a row an image."""
    tiles = torch.stack([one.cpu() for one in images.values()], 1)
    return image_grid(tiles.flatten(0, 1), list(images) * tiles.shape[0], len(images), 2 * CELL)


def frames(
    chains: Mapping[str, Sequence[Float[Tensor, "batch channels height width"]]], names: Sequence[str]
) -> list[Image.Image]:
    """A frame a step of denoising, a row a model."""
    return [
        rows({model: states[step] for model, states in chains.items()}, names)
        for step in range(len(next(iter(chains.values()))))
    ]


def labelled(images: Float[Tensor, "batch channels height width"], names: Sequence[str]) -> Image.Image:
    """Images with what they show."""
    return image_grid(images, list(names), 10, CELL)


def along(folder: Path, anchor: float) -> Along:
    """Points of every look in the log of a run, a curve an anchor: what the reward costs, and what the KL tells."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    plots: Along = {}
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        phase = str(row.get("phase"))
        name = f"anchor {anchor:g} (kept)" if phase == "reward" else phase.removeprefix("reward, ")
        for title, axes in AXES.items():
            x, y = (row.get(f"held_out_{axis}") for axis in axes)
            if phase.startswith("reward") and x is not None and y is not None:
                plots.setdefault(title, {}).setdefault(name, []).append((x, y))
    return plots
