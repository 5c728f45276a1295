"""How much every pixel of a video looks like the object of its first mask: by colours, and by features of ImageNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

BINS = 16  # of each colour
NEAR = 5  # places of the first frame that a place is compared with, of the object's and of the others
Pixels = UInt8[Tensor, "frames 3 height width"]
Masks = Bool[Tensor, "videos height width"]


def color_likeness(
    pixels: Pixels, video: Int[Tensor, " frames"], first: Int[Tensor, " videos"], masks: Masks
) -> Float[Tensor, "frames height width"]:
    """Share of the object among the pixels of this colour in the first frame, if of both there was as much.

    From histograms of `BINS`³ colours, smoothed; 0.5 for a colour that the first frame does not have.

    Args:
        pixels: of all frames of all videos.
        video: of each frame.
        first: the first frame of each video.
        masks: of the first frames.
    """
    cells = _cells(pixels[first])
    inside = torch.stack((~masks, masks), 1).flatten(2).float()
    counts = torch.zeros(len(first), 2, BINS**3, device=pixels.device)
    counts.scatter_add_(2, cells.flatten(1)[:, None].expand(-1, 2, -1), inside)
    cubes = counts.view(-1, 1, BINS, BINS, BINS)
    smooth = F.avg_pool3d(cubes, 3, 1, 1, count_include_pad=False) + 0.5 * cubes
    shares = smooth.view(len(first), 2, -1) / smooth.view(len(first), 2, -1).sum(2, keepdim=True).clamp(min=1e-6)
    floor = 0.02 / BINS**2  # colours that are hardly there say little
    odds = (shares[:, 1] + floor) / (shares.sum(1) + 2 * floor)
    found = [odds[number][_cells(pixels[video == number])] for number in range(len(first))]
    return torch.cat(found)


def _cells(pixels: Tensor) -> Tensor:
    red, green, blue = (pixels // (256 // BINS)).long().unbind(1)
    return (red * BINS + green) * BINS + blue


@torch.no_grad()
def feature_likeness(
    pixels: Pixels,
    video: Int[Tensor, " frames"],
    first: Int[Tensor, " videos"],
    masks: Masks,
    network: nn.Module,
    zoom: float = 2.0,
) -> Float[Tensor, "frames height width"]:
    """Whether the features of a place are nearer to the object's in the first frame (1) or to the rest's (0).

    A place is as near to each as the mean cosine of its `NEAR` nearest places there.

    Args:
        pixels: of all frames of all videos, in the order of the videos.
        video: of each frame.
        first: the first frame of each video.
        masks: of the first frames.
        network: from images in [0, 1] to feature maps, e.g. `foveate.models.backbones.Pretrained`.
        zoom: by which frames are enlarged before, so that the maps are finer.
    """
    found = []
    for number in range(len(first)):  # videos have different numbers of places to compare with
        maps = [_features(some, network, zoom) for some in pixels[video == number].split(8)]
        features = torch.cat(maps)  # [frames, features, rows, columns]
        shares = F.interpolate(masks[number, None, None].float(), features.shape[2:], mode="area").flatten()
        there = shares >= min(0.5, float(shares.max()))
        start, places = features[0].flatten(1), features.flatten(2).mT
        near = [
            (places @ start[:, chosen]).topk(min(NEAR, int(chosen.sum())), 2).values.mean(2)
            for chosen in (there, ~there if bool((~there).any()) else there)
        ]
        likeness = torch.sigmoid(8 * (near[0] - near[1])).unflatten(1, features.shape[2:])
        found.append(F.interpolate(likeness[:, None], pixels.shape[2:], mode="bilinear")[:, 0])
    return torch.cat(found)


def _features(pixels: Tensor, network: nn.Module, zoom: float) -> Tensor:
    images = F.interpolate(pixels.float() / 255, scale_factor=zoom, mode="bilinear")
    maps = network(images)
    maps = maps - maps.mean((2, 3), keepdim=True)
    return F.normalize(maps, dim=1)


def stacked(
    pixels: Pixels, *likenesses: Float[Tensor, "frames height width"]
) -> UInt8[Tensor, "frames height width p"]:
    """Colours and likenesses as planes, a pixel's together: what `foveate.models.cutting.cut` reads."""
    more = [(likeness[:, None] * 255).round().byte() for likeness in likenesses]
    return torch.cat((pixels, *more), 1).permute(0, 2, 3, 1).contiguous()
