"""What sees an image first: the sizes of maps, and weights that are ImageNet's."""

import copy
from functools import partial

import pytest
import torch

from foveate import noise
from foveate.models import backbones
from foveate.models.backbones import Pretrained, convolutions
from foveate.models.cells import Cells
from foveate.types import InputError


@pytest.mark.parametrize("patch", [2, 8, 16])
def test_convolutions_make_a_map_of_patches(patch: int) -> None:
    assert convolutions(3, 32, patch)(torch.zeros(2, 3, 32, 48)).shape == (2, 32, 32 // patch, 48 // patch)


@pytest.mark.parametrize("patch", [1, 6])
def test_a_patch_that_is_no_power_of_two_is_refused(patch: int) -> None:
    with pytest.raises(InputError, match=rf"^patch: found {patch}, expected a power of 2"):
        convolutions(3, 32, patch)


def photograph(size: int = 128) -> torch.Tensor:
    from skimage import data
    from skimage.transform import resize

    return torch.from_numpy(resize(data.astronaut(), (size, size))).float().permute(2, 0, 1)[None]


def test_the_embedded_weights_are_those_of_imagenet() -> None:
    """With ImageNet's weights the batch statistics of a photograph are about those that the network has stored."""
    network = Pretrained(stride=32).eval()
    seen: dict[str, tuple[torch.Tensor, torch.nn.BatchNorm2d]] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: (inputs[0], module)}))
    with torch.no_grad():
        network(photograph())
    ratios = [float(values.var((0, 2, 3)).mean() / layer.running_var.mean()) for values, layer in seen.values()]
    assert len(ratios) > 30
    assert 0.3 < torch.tensor(ratios).median() < 3
    blank = [float((values.mean((0, 2, 3)) - layer.running_mean).abs().mean()) for values, layer in seen.values()]
    spread = [float(layer.running_var.sqrt().mean()) for _, layer in seen.values()]
    assert torch.tensor(blank).div(torch.tensor(spread)).median() < 1


@pytest.mark.parametrize(("stride", "channels"), [(4, 24), (8, 40), (16, 112), (32, 320)])
def test_maps_of_every_stride(stride: int, channels: int) -> None:
    network = Pretrained(stride=stride)
    assert network.channels == channels
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, channels, 64 // stride, 64 // stride)


def test_features_do_not_depend_on_the_batch_in_training_either() -> None:
    network = Pretrained(stride=16, width=8).train()
    images = noise.uniform(noise.key(0, torch.arange(2)), 3, 64, 64)
    torch.testing.assert_close(network(images)[:1], network(images[:1]), rtol=1e-4, atol=1e-4)
    assert network(images).shape == (2, 8, 4, 4)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", (64, 128, 256, 512)), ("mobilenet_v3_small", None)])
def test_maps_of_a_network_of_torchvision(
    name: str, channels: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, as nothing is fetched here; the maps are those of the network itself."""
    monkeypatch.setattr(backbones, "_of_torchvision", partial(backbones._of_torchvision, weights=None))
    images = noise.uniform(noise.key(0, torch.arange(2)), 3, 64, 96)
    for place, stride in enumerate((4, 8, 16, 32)):
        network = Pretrained(f"torchvision:{name}", stride)
        found = network.train().maps(images)
        assert [each.shape[2:] for each in found][-1] == (64 // stride, 96 // stride)
        assert found[-1].shape[1] == network.channels
        if channels is not None:
            assert network.channels == channels[place]
        torch.testing.assert_close(copy.deepcopy(network)(images[:1]), found[-1][:1], rtol=1e-4, atol=1e-4)
    assert Pretrained(f"torchvision:{name}", 16, width=8)(images).shape == (2, 8, 4, 6)


def test_a_map_of_torchvision_is_that_of_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import get_model

    monkeypatch.setattr(backbones, "_of_torchvision", partial(backbones._of_torchvision, weights=None))
    network, whole = Pretrained("torchvision:resnet18", 32), get_model("resnet18", weights=None).eval()
    missing = whole.load_state_dict(network.network.network.state_dict(), strict=False).missing_keys
    assert missing == ["fc.weight", "fc.bias"]
    images = noise.uniform(noise.key(0, torch.arange(2)), 3, 64, 64)
    pooled = network(images).mean((2, 3))
    expected = whole((images - network.mean) / network.std)
    torch.testing.assert_close(whole.fc(pooled), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stride", "field"),
    [("efficientnet-lite0", 5, "stride"), ("no-such-network", 16, "backbone"), ("torchvision:no", 16, "backbone")],
)
def test_what_is_not_there_is_named(name: str, stride: int, field: str) -> None:
    with pytest.raises(InputError, match=rf"^{field}: "):
        Pretrained(name, stride)


def test_cells_say_that_they_read_timm() -> None:
    with pytest.raises(InputError, match=r"^backbone: found 'torchvision:resnet18', but cells read networks of timm"):
        Cells(2, "torchvision:resnet18")
