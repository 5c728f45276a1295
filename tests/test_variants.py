"""Translated and cluttered images: held against a loop over examples that follows the published generator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import noise
from foveate.data.variants import PIECE, VARIANTS, canvas_size, render
from foveate.types import InputError


def pool_of(size=12, channels=1, height=28, width=28, high=256):
    values = noise.integers(noise.key(7, "pool"), high, size, channels, height, width)
    return values.to(torch.uint8)


def keys_of(ids, step=0):
    return noise.key(3, "images", step, torch.arange(len(ids)))


def textbook(pool, ids, keys, variant):
    """Digit and pieces placed one by one with slices; only the numbers drawn are those of `render`."""
    size, channels, height, width = pool.shape
    side, pieces = VARIANTS[variant].canvas, VARIANTS[variant].pieces
    out = torch.zeros(len(ids), channels, side, side)
    highs = [side - height + 1, side - width + 1]
    highs += [size - 1, height - PIECE + 1, width - PIECE + 1, side - PIECE + 1, side - PIECE + 1] * pieces
    draws = noise.integers(noise.fold(keys, "variant"), torch.tensor(highs), len(highs)).tolist()
    for row, (index, (y, x, *rest)) in enumerate(zip(ids.tolist(), draws, strict=True)):
        out[row, :, y : y + height, x : x + width] += pool[index].float() / 255
        for piece in range(pieces):
            donor, top, left, y, x = rest[5 * piece : 5 * piece + 5]
            others = [*range(index + 1, size), *range(index)]
            cut = pool[others[donor], :, top : top + PIECE, left : left + PIECE].float() / 255
            out[row, :, y : y + PIECE, x : x + PIECE] += cut
    return out.clamp(0, 1)


@pytest.mark.parametrize("variant", ["translated60", "cluttered60", "cluttered100"])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 28, 28), (3, 9, 40), (1, 60, 60)])
def test_agrees_with_a_loop_over_examples(variant, channels, height, width):
    pool = pool_of(channels=channels, height=height, width=width)
    ids = torch.arange(40) % len(pool)
    found = render(pool, ids, keys_of(ids), variant)
    assert found.shape == (40, channels, *canvas_size(variant, (height, width)))
    torch.testing.assert_close(found, textbook(pool, ids, keys_of(ids), variant), atol=1e-6, rtol=0)


@given(order=st.permutations(range(10)), cut=st.integers(1, 9), variant=st.sampled_from(list(VARIANTS)))
@settings(max_examples=20, deadline=None)
def test_a_row_does_not_depend_on_its_batch(order, cut, variant):
    pool, ids = pool_of(), torch.arange(10)
    keys = keys_of(ids)
    whole = render(pool, ids, keys, variant)
    chosen = torch.tensor(order[:cut])
    assert torch.equal(render(pool, ids[chosen], keys[chosen], variant), whole[chosen])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_lie_in_the_unit_interval_and_the_keys_alone_decide(variant):
    pool, ids = pool_of(), torch.zeros(64, dtype=torch.long)
    first = render(pool, ids, keys_of(ids), variant)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, render(pool, ids, keys_of(ids), variant))
    if variant != "plain":
        assert not torch.equal(first, render(pool, ids, keys_of(ids, step=1), variant))
        assert len(first.flatten(1).unique(dim=0)) > 60


def test_plain_is_the_image():
    pool, ids = pool_of(), torch.tensor([3, 3, 0])
    assert torch.equal(render(pool, ids, keys_of(ids), "plain"), pool[ids] / 255)


def test_every_place_is_equally_likely():
    pool = torch.full((1, 1, 58, 58), 255, dtype=torch.uint8)
    ids = torch.zeros(1800, dtype=torch.long)
    images = render(pool, ids, keys_of(ids), "translated60")[:, 0]
    top, left = images.any(2).float().argmax(1), images.any(1).float().argmax(1)
    assert (images.sum((1, 2)) == 58 * 58).all()
    counts = torch.bincount(top * 3 + left, minlength=9)
    assert ((counts - 200).abs() < 5 * (1800 / 9 * 8 / 9) ** 0.5).all()


@pytest.mark.parametrize(("variant", "pieces"), [("cluttered60", 4), ("cluttered100", 8)])
def test_clutter_comes_from_other_images_and_in_the_papers_amount(variant, pieces):
    # image 0 is black and all others white: what is lit on a canvas of image 0 is clutter
    pool = torch.full((50, 1, 28, 28), 255, dtype=torch.uint8)
    pool[0] = 0
    ids = torch.zeros(2000, dtype=torch.long)
    images = render(pool, ids, keys_of(ids), variant)
    lit = images.sum((1, 2, 3))
    assert lit.max() == pieces * PIECE**2
    assert (lit == pieces * PIECE**2).float().mean() > 0.2  # most overlap a little
    # and on a canvas of the only white image, black pieces show nothing
    pool = 255 - pool
    images = render(pool, ids, keys_of(ids), variant)
    assert (images.sum((1, 2, 3)) == 28 * 28).all()


def test_the_same_key_puts_the_image_at_the_same_place_with_and_without_clutter():
    pool, ids = pool_of(), torch.arange(12)
    with_clutter = render(pool, ids, keys_of(ids), "cluttered60")
    assert (with_clutter >= render(pool, ids, keys_of(ids), "translated60") - 1e-6).all()


def test_a_pool_of_one_image_is_cluttered_with_itself():
    pool, ids = pool_of(size=1), torch.zeros(2, dtype=torch.long)
    assert render(pool, ids, keys_of(ids), "cluttered60").shape == (2, 1, 60, 60)


def test_canvas_size():
    assert [canvas_size(name, (28, 28)) for name in VARIANTS] == [(28, 28), (60, 60), (60, 60), (100, 100)]
    assert canvas_size("plain", (500, 3)) == (500, 3)


@pytest.mark.parametrize(
    ("variant", "size", "words"),
    [
        ("translated60", (61, 10), ["10x61", "60x60", "'plain'", "image_size 60"]),
        ("cluttered100", (28, 101), ["101x28", "100x100"]),
        ("cluttered60", (28, 7), ["7x28", "8x8"]),
        ("clutered60", (28, 28), ["'clutered60'", "did you mean 'cluttered60'"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(variant, size, words):
    pool = torch.zeros(2, 1, *size, dtype=torch.uint8)
    ids = torch.zeros(2, dtype=torch.long)
    for refuse in (lambda: canvas_size(variant, size), lambda: render(pool, ids, keys_of(ids), variant)):
        with pytest.raises(InputError) as caught:
            refuse()
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words)
