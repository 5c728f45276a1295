"""The random walker of many images at once against scikit-image's, image by image."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from benchmarks import best_seconds
from foveate import noise
from foveate.data.scenes import describe, draw
from foveate.models.random_walker import random_walker

IMAGES, CELLS, ROUNDS = 64, 20, 4


def row(side: int) -> tuple[float, float, str]:
    """Images a second, with one seed of each side and four more; scikit-image's in its faster mode at this size."""
    from skimage.segmentation import random_walker as theirs

    keys = noise.key("random walker", torch.arange(IMAGES))
    images = draw(describe(keys), side).images
    dice = noise.uniform(noise.fold(keys, "seeds"), CELLS * CELLS)
    order = dice.argsort(1)
    grid = torch.zeros(IMAGES, CELLS * CELLS, dtype=torch.int64)
    grid.scatter_(1, order[:, :3], 1).scatter_(1, order[:, 3:6], 2)
    cell = torch.arange(side) * CELLS // side
    labels = grid.view(-1, CELLS, CELLS)[:, cell][:, :, cell]
    pairs = [(image.numpy().astype(np.float64), marks.numpy()) for image, marks in zip(images, labels, strict=True)]

    def one_by_one(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its conjugate gradients, which do not converge
            for image, marks in pairs:
                theirs(image, marks, mode=mode, return_full_prob=True, channel_axis=0)

    ours, *peers = best_seconds(
        lambda: random_walker(images, labels == 1, labels == 2),
        lambda: one_by_one("bf"),
        lambda: one_by_one("cg_j"),
        rounds=ROUNDS,
    )
    return IMAGES / ours, IMAGES / min(peers), "images a second"


ROWS = {"random-walker": lambda: row(40), "random-walker-64": lambda: row(64)}
