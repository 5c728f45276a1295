"""Noise: a hash that agrees with SplitMix64 in plain Python, numbers without visible structure, no hidden state."""

import itertools
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foveate import noise

WORD, STEP = 2**64 - 1, 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROWS = torch.arange(100_000)


def splitmix(state, count):
    """The first outputs of SplitMix64 from a state, after the published C code (Vigna 2015, splitmix64.c)."""
    for place in range(1, count + 1):
        word = (state + place * STEP) & WORD
        word = ((word ^ (word >> 30)) * FIRST) & WORD
        word = ((word ^ (word >> 27)) * SECOND) & WORD
        yield word ^ (word >> 31)


def reference_key(*parts):
    """A key in plain Python: each part is added to the state, whose first output is the next state."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = zlib.crc32(part.encode()) | (len(part) << 32)
        (state,) = splitmix(state + part, 1)
    return state


def state_before(output):
    """The state whose first output this is: SplitMix64's hash is one to one."""
    word = output ^ (output >> 31) ^ (output >> 62)
    word = (word * pow(SECOND, -1, 2**64)) & WORD
    word = word ^ (word >> 27) ^ (word >> 54)
    word = (word * pow(FIRST, -1, 2**64)) & WORD
    return (word ^ (word >> 30) ^ (word >> 60)) - STEP & WORD


def signed(word):
    return word - 2**64 if word >= 2**63 else word


def unsigned(number):
    return int(number) & WORD


def assert_flat(counts):
    """Chi-square: the counts are as even as chance makes them, and not more even than that."""
    assert 1e-4 < stats.chisquare(counts.double().numpy().ravel()).pvalue < 1 - 1e-4


# no deadline: the machine may be busy
few = settings(max_examples=40, deadline=None, derandomize=True)
PARTS = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=5)), max_size=4)


# Keys


def test_the_reference_gives_published_outputs():
    assert list(splitmix(0, 3)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert list(splitmix(1234567, 2)) == [6457827717110365317, 3203168211198807973]
    assert [next(splitmix(state_before(word), 1)) for word in (0, 1, WORD, 2**63)] == [0, 1, WORD, 2**63]


@few
@given(PARTS)
def test_keys_are_those_of_the_reference(parts):
    assert unsigned(noise.key(*parts)) == reference_key(*parts)


@few
@given(PARTS, st.integers(0, 4))
def test_a_part_may_be_a_number_or_a_tensor(parts, which):
    """Every part but names may come as a tensor, alone or with others."""
    as_tensors = [torch.tensor(part) if isinstance(part, int) else part for part in parts]
    mixed = [
        tensor if place >= which else part for place, (part, tensor) in enumerate(zip(parts, as_tensors, strict=True))
    ]
    assert noise.key(*as_tensors) == noise.key(*mixed) == noise.key(*parts)


def test_tensor_parts_broadcast():
    keys = noise.key(3, torch.arange(2)[:, None], "a", torch.arange(-1, 2))
    assert keys.dtype == torch.int64
    assert [[unsigned(key) for key in row] for row in keys] == [
        [reference_key(3, first, "a", last) for last in (-1, 0, 1)] for first in (0, 1)
    ]


def test_smaller_integers_name_the_same_keys():
    assert torch.equal(noise.key(3, torch.arange(4, dtype=torch.int32)), noise.key(3, torch.arange(4)))


def test_the_order_and_the_number_of_parts_matter():
    names = [(), (0,), (1,), (3,), (-1,), (0, 0), (1, 2), (2, 1), ("1",), ("a",), ("b",), ("ab",)]
    names += [("a", "b"), ("b", "a"), ("", "ab"), ("a", 1), (1, "a")]
    assert len({int(noise.key(*parts)) for parts in names}) == len(names)
    key = noise.key(7)
    folded = {int(noise.fold(key, *parts)) for parts in names}
    assert len(folded) == len(names)
    assert int(key) not in folded


def test_fold_takes_numbers_one_by_one_or_together():
    keys = noise.key(1, torch.arange(5))
    together = noise.fold(keys[:, None], "action", torch.arange(20))
    assert torch.equal(together, torch.stack([noise.fold(keys, "action", step) for step in range(20)], 1))


def test_fold_opens_the_same_stream_for_every_row():
    keys = noise.key(1, ROWS[:6])
    assert torch.equal(noise.fold(keys.view(2, 3), "a", 4).flatten(), noise.fold(keys, "a", 4))
    assert torch.equal(noise.fold(keys, "a", 4)[2], noise.fold(keys[2], "a", 4))
    assert not torch.equal(noise.fold(noise.fold(keys, "a"), "b"), noise.fold(noise.fold(keys, "b"), "a"))


def test_a_million_neighbouring_names_give_a_million_keys():
    keys = noise.key(torch.arange(10)[:, None, None], "location", torch.arange(100)[:, None], torch.arange(1000))
    both = torch.stack([keys, noise.fold(keys, "clutter")])
    assert len(both.flatten().unique()) == both.numel() == 2_000_000


def test_a_changed_bit_changes_half_of_the_bits():
    bits = 2 ** torch.arange(62)
    names = torch.arange(100)[:, None]
    changed = noise.key(5, names) ^ noise.key(5, names ^ bits)
    share = torch.stack([(changed >> place) & 1 for place in range(64)]).float().mean(1)  # over names: [place, bit]
    assert share.shape == (64, 62)
    assert ((share - 0.5).abs() < 5.5 * 0.05).all()
    assert abs(share.mean() - 0.5) < 0.005


# Numbers


@few
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**31))
def test_draws_are_the_outputs_of_the_generator(key, high):
    words = list(splitmix(key, 6))
    assert noise.uniform(torch.tensor(key), 6).tolist() == [((word >> 41) + 0.5) / 2**23 for word in words]
    assert noise.integers(torch.tensor(key), high, 6).tolist() == [(word >> 33) % high for word in words]
    order = noise.permutation(torch.tensor(key), 6).tolist()
    assert [signed(words[place]) for place in order] == sorted(map(signed, words))


def test_shapes():
    assert noise.uniform(noise.key(0)).shape == noise.integers(noise.key(0), 5).shape == ()
    keys = noise.key(0, torch.arange(6).view(2, 3))
    for draw in (noise.uniform, noise.normal, lambda keys, *shape: noise.integers(keys, 1000, *shape)):
        assert draw(keys).shape == (2, 3)
        assert draw(keys, 0).shape == (2, 3, 0)
        assert torch.equal(draw(keys, 4, 5).flatten(2), draw(keys, 20))
        assert torch.equal(draw(keys), draw(keys, 1)[..., 0])
        # further draws leave the first as they are
        assert torch.equal(draw(keys, 7)[..., :2], draw(keys, 2))


def test_the_interval_is_open_and_the_extremes_are_finite():
    keys = torch.tensor([signed(state_before(word)) for word in (0, WORD)])
    low, high = noise.uniform(keys).tolist()
    assert (low, high) == (2.0**-24, 1 - 2.0**-24)
    small, large = noise.normal(keys).tolist()
    assert small == -large
    assert large == pytest.approx(stats.norm.ppf(1 - 2.0**-24), abs=0.02)
    assert noise.integers(keys, 10).tolist() == [0, (2**31 - 1) % 10]


@pytest.mark.parametrize("many", ["keys", "draws"])
def test_uniform_numbers_are_flat(many):
    """Over the first draws of neighbouring keys as over the draws of one key, alone and in pairs."""
    numbers = noise.uniform(noise.key(3, "a", ROWS)) if many == "keys" else noise.uniform(noise.key(3, "a"), len(ROWS))
    assert_flat((numbers * 500).long().bincount(minlength=500))
    assert_flat(((numbers * 2**23).long() % 512).bincount(minlength=512))
    first, second = (numbers.view(-1, 2) * 20).long().unbind(1)
    assert_flat((first * 20 + second).bincount(minlength=400))


def test_normal_numbers():
    numbers = noise.normal(noise.key(0, "normal", ROWS), 2).flatten().double()
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    scale = len(numbers) ** -0.5
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(numbers.pow(power).mean() - expected) < 4 * scale * variance**0.5


def test_integers_below_highs_of_their_own():
    highs = torch.tensor([1, 2, 7, 100])
    drawn = noise.integers(noise.key(0, "integers", ROWS), highs, 4)
    for column, high in zip(drawn.unbind(1), highs.tolist(), strict=True):
        counts = column.bincount(minlength=high)
        assert len(counts) == high
        assert high == 1 or assert_flat(counts) is None
    rows = torch.arange(1, 101)
    assert (noise.integers(noise.key(0, rows), rows) < rows).all()


def test_streams_are_uncorrelated():
    """Neighbouring seeds, steps, names, sub-streams, draws, and rows one or several places later."""
    key = noise.key(0, "a", 0, ROWS)
    others = [noise.key(1, "a", 0, ROWS), noise.key(0, "a", 1, ROWS), noise.key(0, "b", 0, ROWS), noise.key(ROWS, 0)]
    others += [noise.fold(key, "a"), noise.fold(key, "b"), noise.fold(key, "a", 1), noise.key(0, "a", 0, ROWS + 2)]
    numbers = torch.cat([noise.normal(key, 3).T, torch.stack([noise.normal(other) for other in others])])
    for streams in (numbers, numbers.square() - 1):
        found = torch.corrcoef(streams) - torch.eye(len(streams))
        assert found.abs().max() < 4.5 * len(ROWS) ** -0.5
    shifted = torch.corrcoef(numbers[0].unfold(0, len(ROWS) - 8, 1))[0, 1:]
    assert shifted.abs().max() < 4.5 * len(ROWS) ** -0.5


def test_how_rows_are_split_over_batches_changes_nothing():
    keys = noise.key(3, "a", 5, ROWS[:64])
    for draw in (lambda keys: noise.uniform(keys, 3), lambda keys: noise.integers(noise.fold(keys, "b"), 9, 2)):
        for size in (1, 7, 32):
            split = [noise.key(3, "a", 5, rows) for rows in ROWS[:64].split(size)]
            assert torch.equal(torch.cat([draw(some) for some in split]), draw(keys))
        assert torch.equal(draw(keys.flip(0)), draw(keys).flip(0))
        assert torch.equal(draw(keys[::2]), draw(keys)[::2])
    assert torch.equal(noise.normal(keys[:5], 2), noise.normal(keys, 2)[:5])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    noise.normal(noise.key(0, ROWS[:5]), 4)
    noise.examples(0, 0, 10, 100)
    assert torch.equal(torch.get_rng_state(), before)


# Orders


def test_permutations():
    for size in (0, 1, 2, 1000):
        assert torch.equal(noise.permutation(noise.key(3, size), size).sort().values, torch.arange(size))
    orders = [tuple(noise.permutation(noise.key("order", seed), 3).tolist()) for seed in range(1200)]
    assert_flat(torch.tensor([orders.count(order) for order in itertools.permutations(range(3))]))


@pytest.mark.parametrize(("batch", "size"), [(4, 20), (7, 20), (20, 20), (50, 20), (1, 3)])
def test_every_example_is_seen_equally_often(batch, size):
    steps = [noise.examples(5, step, batch, size) for step in range(2 * size)]
    seen = torch.cat(steps)
    assert all(len(step) == batch for step in steps)
    assert (seen.bincount(minlength=size) == 2 * batch).all()
    epochs = seen.view(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand_as(epochs))
    assert size < 20 or len(epochs.unique(dim=0)) == len(epochs)


def test_examples_are_the_same_however_the_batch_is_split():
    for step in (0, 3, 11):
        whole = noise.examples(1, step, 64, 100)
        assert torch.equal(torch.cat([noise.examples(1, 4 * step + part, 16, 100) for part in range(4)]), whole)
    # asked for out of order, as after a resume
    assert torch.equal(
        noise.examples(1, 3, 64, 100), torch.cat([noise.examples(1, step, 1, 100) for step in range(192, 256)])
    )
    assert not torch.equal(noise.examples(2, 0, 64, 100), noise.examples(1, 0, 64, 100))


def test_examples_are_not_shared_with_the_caller():
    before = noise.examples(8, 0, 10, 10).clone()
    noise.examples(8, 0, 10, 10).zero_()
    assert torch.equal(noise.examples(8, 0, 10, 10), before)
