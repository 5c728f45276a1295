"""Similarity transforms of the plane: parameters, matrices, points and pixels, in one convention.

Parameters are (tx, ty, rotation, log scale): pixels, pixels, degrees, natural logarithm. They act as

    x → c + exp(log scale) · R(rotation) · (x - c) + (tx, ty),        c the centre of the picture,

so a picture is turned and scaled about its own centre first and shifted then. R turns the x axis towards the y axis:
on a screen, where y points down, clockwise. Matrices [..., 2, 3] map points (x, y, 1) in pixels (`foveate.geometry`:
the middle of the first pixel is at 0.5).

A matrix moves points forward; `warp` moves the pixels the same way, for which it asks the inverse where each pixel
comes from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def matrices(parameters: Float[Tensor, "*batch 4"], side: int) -> Float[Tensor, "*batch 2 3"]:
    """The matrices of parameters, for pictures of `side`×`side` pixels."""
    shift, angle, scale = parameters[..., :2], parameters[..., 2].deg2rad(), parameters[..., 3].exp()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return _assembled(cos, sin, shift, side / 2)


def parameters_of(matrix: Float[Tensor, "*batch 2 3"], side: int) -> Float[Tensor, "*batch 4"]:
    """The parameters of similarity matrices, the other way of `matrices`; rotations from -180 to 180 degrees."""
    cos, sin, centre = matrix[..., 0, 0], matrix[..., 1, 0], matrix.new_full((2,), side / 2)
    shift = apply(matrix, centre.expand(*matrix.shape[:-2], 1, 2)).squeeze(-2) - centre
    turned = torch.stack((torch.atan2(sin, cos).rad2deg(), torch.hypot(cos, sin).log()), -1)
    return torch.cat((shift, turned), -1)


def compose(second: Float[Tensor, "*batch 2 3"], first: Float[Tensor, "*batch 2 3"]) -> Float[Tensor, "*batch 2 3"]:
    """The map that does `first`, then `second`."""
    joined = second[..., :2] @ first
    return torch.cat((joined[..., :2], joined[..., 2:] + second[..., 2:]), -1)


def inverse(matrix: Float[Tensor, "*batch 2 3"]) -> Float[Tensor, "*batch 2 3"]:
    """The way back, of any invertible map."""
    a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    back = torch.stack((torch.stack((d, -b), -1), torch.stack((-c, a), -1)), -2) / (a * d - b * c)[..., None, None]
    return torch.cat((back, -back @ matrix[..., 2:]), -1)


def apply(matrix: Float[Tensor, "*batch 2 3"], points: Float[Tensor, "*batch count 2"]) -> Float[Tensor, "..."]:
    """Points (x, y) where a matrix takes them, [*batch, count, 2]."""
    return points @ matrix[..., :2].mT + matrix[..., 2][..., None, :]


def fitted(
    points: Float[Tensor, "batch count 2"], others: Float[Tensor, "batch count 2"], mask: Bool[Tensor, "batch count"]
) -> Float[Tensor, "batch 2 3"]:
    """The similarity that brings points nearest to others, by least squares.

    Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", which in the
    plane has a closed form. It never mirrors. A row needs two different points at least.
    """
    weight = mask[..., None].to(points)
    weight = weight / weight.sum(1, keepdim=True)
    middle, other = ((weight * place).sum(1, keepdim=True) for place in (points, others))
    here, there = points - middle, others - other
    spread = (weight * here.square()).sum((1, 2)).clamp(min=1e-12)
    cos = (weight * here * there).sum((1, 2)) / spread
    sin = (weight[..., 0] * (here[..., 0] * there[..., 1] - here[..., 1] * there[..., 0])).sum(1) / spread
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return torch.cat((turn, (other - middle @ turn.mT).mT), -1)


def warp(
    images: Float[Tensor, "batch channels height width"],
    matrix: Float[Tensor, "batch 2 3"],
    size: tuple[int, int] | None = None,
    frame: Float[Tensor, "batch 2 3"] | None = None,
    ground: Float[Tensor, "batch channels"] | None = None,
) -> Float[Tensor, "batch channels rows columns"]:
    """Move pictures: what stands at x comes to stand at matrix(x).

    Beyond the picture there is the median colour of its edge, by which little is told of where it ends.

    Args:
        images: the originals; interpolated once, bilinearly.
        matrix: from their pixels to those of the result.
        size: (height, width) of the result; None: the same.
        frame: (a map into the result) what would lie outside of the result's own frame before this map is not there
            either: the picture was cut off there once.
        ground: what `edge_colors` finds in them, if it is known already.
    """
    height, width = images.shape[2:]
    size = size or (height, width)
    ground = (edge_colors(images) if ground is None else ground)[..., None, None]
    places = _origins(matrix, size, (height, width)).permute(0, 2, 3, 1)
    moved = F.grid_sample(images - ground, places, "bilinear", align_corners=False)
    if frame is not None:
        moved *= (_origins(frame, size, size).abs_() <= 1).all(1, keepdim=True)
    return moved.add_(ground).clamp_(0, 1)  # in place: pictures of a batch are megabytes, and fresh ones cost more


def edge_colors(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels"]:
    """The median of the pixels at the edge of pictures, of each channel by itself."""
    edge = torch.cat((images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]), 2)
    return edge.median(2).values


def _origins(matrix: Tensor, size: tuple[int, int], source: tuple[int, int]) -> Float[Tensor, "batch 2 rows columns"]:
    """Where in a source (height, width) the pixels of a result come from that a matrix fills: (x, y) in [-1, 1]."""
    rows, columns = size
    scale = 2 / matrix.new_tensor([source[1], source[0]])[:, None]
    back = inverse(matrix) * scale - matrix.new_tensor([0.0, 0.0, 1.0])
    y, x = (torch.arange(count, device=matrix.device) + 0.5 for count in size)
    pixels = torch.stack((x.repeat(rows), y.repeat_interleave(columns), torch.ones_like(x).repeat(rows)))
    return (back.flatten(0, 1) @ pixels).view(-1, 2, rows, columns)


def _assembled(cos: Tensor, sin: Tensor, shift: Tensor, centre: float) -> Tensor:
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    rest = centre - turn.sum(-1) * centre + shift
    return torch.cat((turn, rest[..., None]), -1)
