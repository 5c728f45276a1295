"""The retina against crops cut out one by one, at the edges, and in what it passes gradients to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import noise
from foveate.geometry import to_locations
from foveate.models.retina import build_pyramid, look


def crop(image: Tensor, left: int, top: int, side: int) -> Tensor:
    """[channels, side, side] of one image from its pixel (left, top) on, zeros around it."""
    channels, height, width = image.shape
    cut = torch.zeros(channels, side, side)
    for row in range(side):
        for column in range(side):
            y, x = top + row, left + column
            if 0 <= y < height and 0 <= x < width:
                cut[:, row, column] = image[:, y, x]
    return cut


def reference(image: Tensor, centre: tuple[int, int], patch: int, scales: int, factor: int) -> Tensor:
    """The paper's retina at a whole pixel corner: wider and wider crops around it, averaged down to `patch`."""
    x, y = centre
    cuts = []
    for scale in range(scales):
        side = patch * factor**scale
        wide = crop(image, x - side // 2, y - side // 2, side)
        cuts.append(F.avg_pool2d(wide[None], factor**scale)[0])
    return torch.cat(cuts)


def pictures(*shape: int) -> Tensor:
    """Positive everywhere, so that what is zero is outside; multiples of 1/256, so that sums of them are exact."""
    return (1 + noise.integers(noise.key(5), 256, *shape)).float() / 256


# (height, width), patch, scales, factor: blocks of the coarsest scale divide patch / 2 and the centres, so that the
# pyramid's blocks and the crops' blocks are the same ones
ALIGNED = [
    ((28, 28), 8, 1, 2),
    ((32, 32), 8, 3, 2),
    ((33, 47), 8, 3, 2),
    ((17, 25), 6, 2, 3),
    ((5, 9), 8, 3, 2),
]


@pytest.mark.parametrize(("size", "patch", "scales", "factor"), ALIGNED)
@pytest.mark.parametrize("channels", [1, 3])
def test_aligned_glimpses_are_the_written_out_crops(
    size: tuple[int, int], patch: int, scales: int, factor: int, channels: int
) -> None:
    block = factor ** (scales - 1)
    centres = [(x, y) for y in range(0, size[0] + 1, block) for x in range(0, size[1] + 1, block)][::5]
    images = pictures(len(centres), channels, *size)
    locations = to_locations(torch.tensor(centres, dtype=torch.float32), size)
    expected = torch.stack([reference(images[row], at, patch, scales, factor) for row, at in enumerate(centres)])
    found = look(build_pyramid(images, scales, factor), locations, patch, factor)
    assert found.shape == (len(centres), scales * channels, patch, patch)
    # exact but for the rounding of a location to float32, which moves a sample by some 1e-6 of a pixel
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_power_of_two_sizes_are_exact() -> None:
    """With 2^n pixels a location is exact in float32, and then so is the glimpse, to the last bit."""
    centres = [(x, y) for x in (0, 4, 16, 28, 32) for y in (0, 12, 32)]
    images = pictures(len(centres), 2, 32, 32)
    locations = to_locations(torch.tensor(centres, dtype=torch.float32), (32, 32))
    found = look(build_pyramid(images, 3, 2), locations, 8, 2)
    assert torch.equal(found, torch.stack([reference(images[i], at, 8, 3, 2) for i, at in enumerate(centres)]))


@pytest.mark.parametrize("patch", [7, 8])
def test_an_odd_patch_is_centred_on_a_pixel(patch: int) -> None:
    images = pictures(1, 1, 32, 32)
    centre = torch.tensor([[12.0, 20.0]]) + (patch % 2) / 2
    found = look(build_pyramid(images, 1, 2), to_locations(centre, (32, 32)), patch, 2)
    assert torch.equal(found[0], crop(images[0], 12 - patch // 2, 20 - patch // 2, patch))


@pytest.mark.parametrize("scales", [1, 3])
def test_between_pixels_it_is_the_bilinear_mixture(scales: int) -> None:
    """Along the way from one aligned place of the coarsest scale to the next, corners are mixed by nearness."""
    images, factor, patch = pictures(1, 2, 64, 64), 2, 8
    block = factor ** (scales - 1)
    pyramid = build_pyramid(images, scales, factor)
    coarsest = slice((scales - 1) * 2, scales * 2)
    right, down = 0.25, 0.625

    def at(x: float, y: float) -> Tensor:
        return look(pyramid, to_locations(torch.tensor([[float(x), float(y)]]), (64, 64)), patch, factor)[:, coarsest]

    mixed = (
        (1 - right) * (1 - down) * at(24, 32)
        + right * (1 - down) * at(24 + block, 32)
        + (1 - right) * down * at(24, 32 + block)
        + right * down * at(24 + block, 32 + block)
    )
    torch.testing.assert_close(at(24 + right * block, 32 + down * block), mixed)


@pytest.mark.parametrize(("x", "y"), [(-1, -1), (1, -1), (-1, 1), (1, 1)])
def test_a_corner_shows_a_quarter_and_zeros(x: int, y: int) -> None:
    images = pictures(1, 1, 16, 16)
    glimpse = look(build_pyramid(images, 2, 2), torch.tensor([[float(x), float(y)]]), 8, 2)[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[(slice(4, 8) if y < 0 else slice(0, 4)), (slice(4, 8) if x < 0 else slice(0, 4))] = True
    assert torch.equal(glimpse != 0, inside.expand(2, 8, 8))


def test_far_outside_there_is_nothing() -> None:
    pyramid = build_pyramid(pictures(2, 1, 16, 16), 2, 2)
    assert look(pyramid, torch.tensor([[3.0, 0.0], [0.0, -4.5]]), 8, 2).eq(0).all()


def test_odd_sizes_round_up_and_count_the_outside_as_zero() -> None:
    images = torch.ones(1, 1, 5, 7)
    fine, coarse, coarsest = build_pyramid(images, 3, 2)
    assert fine is images
    assert torch.equal(coarse[0, 0, -1], torch.tensor([0.5, 0.5, 0.5, 0.25]))
    assert torch.equal(coarse[0, 0, :-1, -1], torch.tensor([0.5, 0.5]))
    assert coarsest.shape == (1, 1, 2, 2)
    assert coarsest.sum() * 16 == images.sum()


def test_channels_of_the_finest_scale_come_first() -> None:
    images = torch.stack((torch.full((32, 32), 0.25), torch.full((32, 32), 0.75)))[None]
    glimpse = look(build_pyramid(images, 2, 2), torch.zeros(1, 2), 4, 2)
    assert glimpse[0, :, 2, 2].tolist() == [0.25, 0.75, 0.25, 0.75]
    sharp = torch.zeros(1, 1, 32, 32)
    sharp[..., ::2] = 1  # stripes of one pixel: seen at the finest scale, gray at the coarser one
    glimpse = look(build_pyramid(sharp, 2, 2), torch.zeros(1, 2), 4, 2)[0]
    assert glimpse[0].unique().tolist() == [0.0, 1.0]
    assert glimpse[1].unique().tolist() == [0.5]


def test_gradients_reach_pixels_and_not_locations() -> None:
    images = pictures(2, 1, 16, 16).requires_grad_()
    locations = torch.tensor([[0.1, -0.3], [0.7, 0.2]], requires_grad=True)
    look(build_pyramid(images, 2, 2), locations, 4, 2).sum().backward()
    assert locations.grad is None
    assert images.grad is not None
    assert images.grad.flatten(1).abs().sum(1).gt(0).all()


def test_rows_are_independent() -> None:
    """A glimpse depends on its own image and location alone, to the last bit."""
    images, locations = pictures(4, 3, 24, 31), noise.uniform(noise.key(2), 4, 2) * 2 - 1
    together = look(build_pyramid(images, 3, 2), locations, 6, 2)
    for row in range(4):
        alone = look(build_pyramid(images[row : row + 1], 3, 2), locations[row : row + 1], 6, 2)
        assert torch.equal(together[row], alone[0])
