"""More views of images with boxes: parts enlarged, or the whole made smaller, drawn anew each time."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate import noise
from foveate.geometry import Boxes, areas

CLOSEST, FARTHEST = 0.6, 1.3  # side of what is shown, in parts of the image's
LEFT = 0.4  # of an object: with less it is neither to be found nor to be blamed for


def zoomed(
    images: Float[Tensor, "batch channels height width"], boxes: Boxes, keys: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch channels height width"], Boxes]:
    """A window of each image, stretched to its size, and the boxes therein; beyond the image the window is grey.

    Width and height of the window are drawn within a tenth of each other, its place so that it covers what it can.
    Boxes are cut off at the window; an object of which less than `LEFT` remains becomes a crowd.
    """
    draws = noise.uniform(keys, 4)
    scale = CLOSEST + (FARTHEST - CLOSEST) * draws[:, :1]
    scale = scale * (0.95 + 0.1 * draws[:, 1:2].mul(scale.new_tensor([1.0, -1.0])).remainder(1.0))
    middle = (1 - scale) * (draws[:, 2:] * 2 - 1)  # of the window, as a location
    theta = torch.cat((torch.diag_embed(scale), middle[..., None]), -1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images)
    shown = F.grid_sample(images - 0.5, grid, padding_mode="zeros", align_corners=False) + 0.5
    size = boxes.boxes.new_tensor([images.shape[-1], images.shape[-2]])
    corners = boxes.boxes.unflatten(-1, (2, 2)) / size * 2 - 1
    corners = (corners - middle[:, None, None]) / scale[:, None, None]
    moved = ((corners + 1) / 2 * size).flatten(-2)
    cut = torch.minimum(moved.clamp(min=0), size.repeat(2))
    share = areas(cut) / areas(moved).clamp(min=1e-6)
    crowd = torch.zeros_like(boxes.mask) if boxes.crowd is None else boxes.crowd
    return shown, replace(boxes, boxes=cut, mask=boxes.mask & (share > 0), crowd=crowd | (share < LEFT))
