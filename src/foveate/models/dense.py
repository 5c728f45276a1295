"""Networks with scores for every pixel: a small U-Net, one that begins from ImageNet, torchvision's, the user's own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.models.backbones import EMBEDDED, Pretrained, Pyramid
from foveate.models.users import made_by
from foveate.types import InputError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its colours


def dense_network(name: str, outputs: int, width: int = 16, pretrained: bool = False) -> nn.Module:
    """A network from RGB images in [0, 1] to `outputs` scores a pixel, or what `Segmenter` makes such scores of.

    Args:
        name: "unet"; "efficientnet-lite0", whose ImageNet weights are in a package, or "timm:NAME" of any network that
            `Pretrained` knows, joined by a `Pyramid`; "torchvision:NAME", NAME as in torchvision.models.segmentation;
            or "package.module:function", a function without arguments that gives a module: it is imported, so its
            module's code runs.
        outputs: scores a pixel.
        width: features of the unet at full size, an eighth of those of a pyramid.
        pretrained: begin torchvision's with a backbone that knows ImageNet; torchvision fetches it.

    Raises:
        InputError: no such network, or the backbone cannot be had.
    """
    where, _, which = name.partition(":")
    if name == "unet":
        return UNet(3, outputs, width)
    if name == EMBEDDED or where == "timm":
        wide, stride = 8 * width, 4
        seen = Pyramid(Pretrained(which or name, 32), stride, wide)
        return nn.Sequential(seen, _block(wide, wide), nn.Conv2d(wide, outputs, 1))
    if where == "torchvision":
        import torchvision

        known = torchvision.models.list_models(torchvision.models.segmentation)
        if which not in known:
            raise InputError(f"model: torchvision has no segmenter {which!r}, expected one of {', '.join(known)}")
        backbone = "DEFAULT" if pretrained else None
        try:
            found: Any = torchvision.models.get_model(
                which, weights=None, weights_backbone=backbone, num_classes=outputs
            )
        except OSError as error:
            raise InputError(
                f"model: the backbone of {which} cannot be had ({error}); leave --pretrained out"
            ) from error
        return nn.Sequential(torchvision.transforms.Normalize(*IMAGENET), found)
    made = made_by(name, f"unet, {EMBEDDED}, timm:NAME, torchvision:NAME or package.module:function")
    if not isinstance(made, nn.Module):
        raise InputError(f"model: {name} gave {type(made).__name__}, expected a torch.nn.Module")
    return made


class UNet(nn.Module):
    """Scores of each pixel, from features of the image and of the image halved `depth` times.

    Ronneberger et al. 2015, "U-Net: convolutional networks for biomedical image segmentation", with group norms, so
    that the scores of an image do not depend on its batch, and padded, so that they are as many as its pixels.

    Args:
        channels: of the images.
        outputs: scores a pixel.
        width: features at full size; twice as many at each halving. A multiple of 8.
        depth: halvings.
    """

    def __init__(self, channels: int, outputs: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(*pair) for pair in itertools.pairwise([channels, *widths]))
        self.up = nn.ModuleList(_block(low + high, high) for high, low in reversed([*itertools.pairwise(widths)]))
        self.score = nn.Conv2d(width, outputs, 1)
        self.multiple = 2**depth

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        """Scores of images in [0, 1] of any size."""
        height, width = images.shape[-2:]
        state = F.pad(images - 0.5, (0, -width % self.multiple, 0, -height % self.multiple))
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            state = block(F.max_pool2d(state, 2) if level else state)
            kept.append(state)
        kept.pop()
        for block in self.up:
            larger = F.interpolate(state, scale_factor=2.0, mode="nearest")
            state = block(torch.cat((larger, kept.pop()), 1))
        return self.score(state)[..., :height, :width]


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers)
