"""Codes of dense maps: words and vectors, what is drawn without words, and the writer of words as a sampler."""

import pytest
import torch
from torch.nn import functional

from foveate import noise
from foveate.learn.answers import answering, distinct, repeat
from foveate.models.codes import Base, Coded, MapCode, Words, kept_words
from foveate.models.encoder_decoder import EncoderDecoder
from foveate.types import InputError

LEVELS = (4, 3, 2)


def small() -> tuple[MapCode, Coded]:
    code = MapCode((1, 8, 16), 2, 3, 4, LEVELS, width=8)
    writer = EncoderDecoder((1, 8, 16), 4, code.words.count, code.length, width=16, depth=1)
    policy = Coded(writer, Words(LEVELS), Base(1, 3, (2, 4), 4, len(LEVELS), 8))
    policy.base.load_state_dict(code.base.state_dict())
    return code, policy


def test_every_word_has_a_vector_and_is_the_nearest_to_it() -> None:
    words = Words(LEVELS)
    ids = torch.arange(words.count)
    assert words.count == 24
    assert len(words.vectors(ids).unique(dim=0)) == words.count
    assert torch.equal(words.nearest(words.vectors(ids)), ids)
    shifted = words.vectors(ids) * 0.9  # less than half a level
    assert torch.equal(words.nearest(shifted), ids)


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    words, vectors = Words(LEVELS), torch.tensor([[0.1, -0.2, 0.9]], requires_grad=True)
    rounded = words.rounded(vectors)
    torch.testing.assert_close(rounded, words.vectors(words.nearest(vectors)))
    rounded.sum().backward()
    assert torch.equal(vectors.grad, torch.ones(1, 3))


@pytest.mark.parametrize("levels", [(), (4, 1)])
def test_levels_that_say_nothing_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="levels"):
        Words(levels)


@pytest.mark.parametrize("patch", [1, 3, 16])
def test_a_patch_that_does_not_fit_is_refused(patch: int) -> None:
    with pytest.raises(InputError, match="code_patch"):
        MapCode((1, 8, 16), 2, 3, patch, LEVELS, width=8)


def test_words_are_kept_in_every_number_alike() -> None:
    kept = kept_words(noise.key(0, torch.arange(4000)), 4)
    counts = kept.sum(1).bincount(minlength=5) / 4000
    torch.testing.assert_close(counts, torch.full((5,), 0.2), atol=0.03, rtol=0)
    torch.testing.assert_close(kept.float().mean(0), torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_without_words_the_map_follows_from_the_image_alone() -> None:
    code, _ = small()
    images, maps = torch.rand(2, 1, 8, 16), torch.rand(2, 2, 8, 16)
    nothing = torch.zeros(2, code.length, dtype=torch.bool)
    assert torch.equal(code(images, maps, nothing), code(images, -maps, nothing))
    assert not torch.equal(code(images, maps), code(images, -maps))


def test_the_code_tells_what_the_image_does_not() -> None:
    torch.manual_seed(0)
    code = MapCode((1, 4, 4), 1, 1, 2, (5, 5), width=8)
    optimizer = torch.optim.Adam(code.parameters(), 1e-2)

    def maps(step: int) -> torch.Tensor:  # one level a word, of which the image knows nothing
        return functional.interpolate(noise.uniform(noise.key(step, torch.arange(32)), 1, 2, 2), scale_factor=2.0) - 0.5

    image = torch.zeros(32, 1, 4, 4)
    for step in range(150):
        loss = functional.mse_loss(code(image, maps(step)), maps(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = maps(1000)
    assert functional.mse_loss(code(image, wanted), wanted) < 0.4 * wanted.var()


def test_answers_are_drawn_by_the_base_model_of_stage_one() -> None:
    code, policy = small()
    images, maps = torch.rand(2, 1, 8, 16), torch.rand(2, 2, 8, 16)
    answers = policy.answers(images, code.encode(images, maps))
    torch.testing.assert_close(policy.decode(answers), code(images, maps))
    decisions = policy(images, answers)
    assert decisions.log_probs.shape == decisions.mask.shape == (2, code.length)
    assert decisions.mask.all()


def test_samples_stand_beside_their_image_and_only_their_words_differ() -> None:
    _, policy = small()
    images, keys = torch.rand(2, 1, 8, 16), noise.key(0, torch.arange(2))
    drawn = policy.sample(images, 3, False, keys)
    assert torch.equal(drawn.images, repeat(images, 3))
    assert policy.decode(drawn).shape == (6, 3, 8, 16)
    assert distinct(drawn, 3) == 1
    assert distinct(policy.sample(images, 3, True, keys), 3) == pytest.approx(1 / 3)


def test_only_the_writer_learns() -> None:
    code, policy = small()
    images, maps = torch.rand(2, 1, 8, 16), torch.rand(2, 2, 8, 16)
    policy(images, policy.answers(images, code.encode(images, maps))).log_probs.sum().backward()
    assert all(parameter.grad is None for parameter in policy.base.parameters())
    assert any(parameter.grad is not None for parameter in policy.writer.parameters())


def test_a_temperature_is_the_writers() -> None:
    _, policy = small()
    with answering(policy, temperature=0.5):
        assert policy.writer.temperature == 0.5
    assert policy.writer.temperature == 1
