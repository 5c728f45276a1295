"""A token sampler: what it samples with a cache is what it scores in one pass, and it learns to read."""

import pytest
import torch

from foveate import noise
from foveate.distributions import Categorical
from foveate.learn.policy_gradient import masked_mean
from foveate.models.encoder_decoder import EncoderDecoder, Tokens


def sampler(end: int | None = 0, **options: object) -> EncoderDecoder:
    torch.manual_seed(1)
    settings = {"width": 32, "depth": 2, "heads": 4} | options
    model = EncoderDecoder((1, 8, 8), 4, 7, 6, end, **settings)
    with torch.no_grad():  # as after training: scores that differ
        model.score.weight.mul_(3)
        model.score.bias[0] -= 3  # the end is rare
    return model


def images(batch: int = 5) -> torch.Tensor:
    return noise.uniform(noise.key(0, "images", torch.arange(batch)), 1, 8, 8)


def keys(batch: int = 5) -> torch.Tensor:
    return noise.key(0, "keys", torch.arange(batch))


@pytest.mark.parametrize("end", [0, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_with_a_cache_is_sampling_from_the_parallel_pass(end: int | None, temperature: float) -> None:
    model = sampler(end, temperature=temperature)
    drawn = model.sample(images(), 3, False, keys())
    assert drawn.ids.shape == drawn.mask.shape == (15, 6)
    choice = model(images(), drawn).distribution
    streams = noise.fold(keys()[:, None], "sample", torch.arange(3)).flatten()
    draws = noise.fold(streams[:, None], "token", torch.arange(6))
    again = choice.sample(draws)
    assert torch.equal(again[drawn.mask], drawn.ids[drawn.mask])
    greedy = model.sample(images(), 1, True, keys())
    best = model(images(), greedy).distribution.mode()
    assert torch.equal(best[greedy.mask], greedy.ids[greedy.mask])
    assert len(drawn.ids.unique(dim=0)) > 5


def test_cached_scores_agree_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = sampler(None), []
    distribution = model._distribution
    monkeypatch.setattr(model, "_distribution", lambda *parts: seen.append(distribution(*parts)) or seen[-1])
    drawn = model.sample(images(), 2, False, keys())
    cached = torch.cat([one.logits for one in seen], 1)
    torch.testing.assert_close(model(images(), drawn).distribution.logits, cached, rtol=1e-5, atol=1e-5)


def test_the_mask_ends_with_the_end_token() -> None:
    drawn = sampler().sample(images(40), 2, False, keys(40))
    lengths = drawn.mask.sum(1)
    assert torch.equal(drawn.mask, torch.arange(6) < lengths[:, None])
    last = drawn.ids.gather(1, lengths[:, None] - 1).squeeze(1)
    assert ((last == 0) | (lengths == 6)).all()
    assert not (drawn.ids == 0)[drawn.mask & (torch.arange(6) < lengths[:, None] - 1)].any()
    assert len(lengths.unique()) > 2


def test_a_row_depends_on_its_image_and_key_alone_and_samples_differ() -> None:
    model = sampler(None)
    whole = model.sample(images(), 2, False, keys())
    part = model.sample(images()[2:4], 2, False, keys()[2:4])
    assert torch.equal(part.ids, whole.ids[4:8])
    more = model.sample(images(), 4, False, keys())
    assert torch.equal(more.ids.view(5, 4, 6)[:, :2].flatten(0, 1), whole.ids)


def test_no_place_sees_what_comes_after_it_and_padding_is_never_read() -> None:
    model = sampler(None)
    drawn = model.sample(images(), 1, False, keys())
    scores = model(images(), drawn).distribution.logits
    for step in range(6):
        other = Tokens(drawn.ids.clone(), drawn.mask)
        other.ids[:, step] = (other.ids[:, step] + 1) % 7
        changed = model(images(), other).distribution.logits
        torch.testing.assert_close(changed[:, : step + 1], scores[:, : step + 1])
        assert step == 5 or not torch.equal(changed[:, step + 1], scores[:, step + 1])


def test_some_steps_only() -> None:
    model = sampler(None)
    drawn = model.sample(images(), 2, False, keys())
    whole, part = model(images(), drawn), model(images(), drawn, slice(2, 4))
    torch.testing.assert_close(part.distribution.logits, whole.distribution.logits[:, 2:4])


def test_large_vocabularies_are_sampled_by_their_frequencies() -> None:
    """A tail of rare tokens gets its share, token by token."""
    logits = torch.cat((torch.tensor([5.0, 3.0]), torch.full((998,), -6.0)))
    rows = noise.key(0, torch.arange(40_000))
    counts = Categorical(logits.expand(40_000, -1)).sample(rows).bincount(minlength=1000).double()
    expected = logits.double().softmax(0) * 40_000
    assert (counts[:2] - expected[:2]).abs().max() < 5 * expected[:2].sqrt().max()
    tail = expected[2:].sum()
    assert abs(counts[2:].sum() - tail) < 5 * tail.sqrt()
    assert (counts[2:] > 0).sum() > 0.8 * (1 - torch.exp(-expected[2])) * 998, "none is left out"


def test_it_learns_to_read() -> None:
    """From this seed, in seconds: a picture of two bright cells is written as their places, in order."""
    torch.manual_seed(0)
    model = EncoderDecoder((1, 8, 8), 2, 17, 3, end=16, width=64, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def batch(step: int) -> tuple[torch.Tensor, Tokens]:
        rows = noise.key(0, "places", step, torch.arange(64))
        places = noise.uniform(rows, 16).argsort(1)[:, :2].sort(1).values
        cells = torch.zeros(64, 16).scatter(1, places, 1.0).view(64, 1, 4, 4)
        pictures = torch.nn.functional.interpolate(cells, scale_factor=2) + 0.1 * noise.uniform(rows, 1, 8, 8)
        ids = torch.cat((places, torch.full((64, 1), 16)), 1)
        return pictures, Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    for step in range(150):
        pictures, answer = batch(step)
        read = model(pictures, answer)
        loss = -masked_mean(read.log_probs, read.mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pictures, answer = batch(1000)
    found = model.sample(pictures, 1, True, keys(64))
    assert (found.ids == answer.ids).all(1).float().mean() > 0.8
