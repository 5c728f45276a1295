"""GrabCut, from a box around the object: OpenCV's, as a reference."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.types import InputError

ROUNDS = 5  # of fitting colours and cutting


def has_opencv() -> bool:
    """Whether OpenCV is installed."""
    return importlib.util.find_spec("cv2") is not None


def grab_cut(
    images: Float[Tensor, "batch 3 height width"], boxes: Float[Tensor, "batch 4"]
) -> Bool[Tensor, "batch height width"]:
    """Rother et al. 2004, "GrabCut: interactive foreground extraction using iterated graph cuts".

    Args:
        images: in [0, 1].
        boxes: x1, y1, x2, y2 in pixels: around the object, and outside of it all is background.

    Raises:
        InputError: OpenCV is missing.
    """
    if not has_opencv():
        raise InputError("grab_cut: needs OpenCV; install it with: pip install 'foveate[references]'")
    import cv2

    found = []
    for image, box in zip(images, boxes.round().int().tolist(), strict=True):
        cv2.setRNGSeed(0)
        pixels = np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).flip(2).cpu().numpy())
        marks: Any = np.zeros(pixels.shape[:2], np.uint8)
        rows, columns = slice(box[1], max(box[3], box[1] + 1)), slice(box[0], max(box[2], box[0] + 1))
        marks[rows, columns] = cv2.GC_PR_FGD
        inside = marks == cv2.GC_PR_FGD
        if not inside.all():  # else there is nothing to tell the background by
            try:
                models = np.zeros((1, 65)), np.zeros((1, 65))  # of the colours of both sides; room to write in
                rect: Any = None
                cv2.grabCut(pixels, marks, rect, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
            except cv2.error:  # too few pixels on one side for its mixtures of colours
                marks[inside] = cv2.GC_PR_FGD
        found.append(torch.from_numpy((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD)))
    return torch.stack(found).to(images.device)
