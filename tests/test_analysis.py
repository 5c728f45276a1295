"""Figures of a tuned model: expectations over subsets, exact, against all subsets written out."""

import itertools

import pytest
import torch

from foveate import noise
from foveate.analysis import best_of, draw_answers, findings, likeliest_of, still_learning
from foveate.models.encoder_decoder import EncoderDecoder, Tokens
from foveate.types import Evaluation, RewardOutput


def test_best_and_likeliest_of_are_means_over_all_subsets() -> None:
    draws = noise.uniform(noise.key(0, torch.arange(2)), 2, 6)
    rewards, log_probs = (draws[:, 0] * 4).floor(), draws[:, 1].log()
    best, likeliest = best_of(rewards), likeliest_of(rewards, log_probs)
    for size in range(1, 7):
        subsets = list(itertools.combinations(range(6), size))
        tops = [[rewards[row, list(some)].max() for some in subsets] for row in range(2)]
        picks = [[rewards[row, some[int(log_probs[row, list(some)].argmax())]] for some in subsets] for row in range(2)]
        assert float(best[size - 1]) == pytest.approx(float(torch.tensor(tops).mean()), abs=1e-5)
        assert float(likeliest[size - 1]) == pytest.approx(float(torch.tensor(picks).mean()), abs=1e-5)
    assert (best.diff() >= -1e-6).all()


def test_ten_thousand_answers_do_not_overflow() -> None:
    rewards = noise.uniform(noise.key(0, torch.arange(1)), 10_000)
    best = best_of(rewards)
    assert float(best[0]) == pytest.approx(float(rewards.mean()), abs=1e-4)
    assert float(best[-1]) == pytest.approx(float(rewards.max()), abs=1e-4)
    assert float(best[1]) == pytest.approx(2 / 3, abs=0.02), "of two uniform numbers the larger"


def test_answers_are_drawn_in_pieces_and_scored_with_their_probability() -> None:
    torch.manual_seed(1)
    model = EncoderDecoder((1, 4, 4), 2, 3, 2, None, width=16, depth=1, heads=2)
    images = noise.uniform(noise.key(0, "images", torch.arange(2)), 1, 4, 4)

    def reward(found: Tokens, targets: torch.Tensor) -> RewardOutput:
        return RewardOutput((3 * found.ids[:, 0] + found.ids[:, 1]).float() + 0 * targets)

    rewards, log_probs = draw_answers(model, reward, images, torch.zeros(2), 600, 0)
    assert rewards.shape == log_probs.shape == (2, 600)
    for row in range(2):
        for answer in range(9):
            here = rewards[row] == answer
            if here.sum() > 50:
                chance = float(log_probs[row][here].exp().mean())
                assert float(here.float().mean()) == pytest.approx(chance, abs=0.08)
                assert float(log_probs[row][here].std()) < 1e-4
    assert len(rewards[0].unique()) > 4


def log(**ends: tuple[float, float]) -> list[dict[str, float]]:
    """Twenty rows of a log in which each value goes evenly from its first to its last."""
    return [
        {name: start + (end - start) * row / 19 for name, (start, end) in ends.items()} | {"step": 20 * row}
        for row in range(20)
    ]


GOOD = {"reward": (1.0, 2.0), "kl": (0.0, 3.0), "alike": (0.1, 0.3), "distinct": (1.0, 0.6), "length": (9.0, 12.0)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "Nothing about the curve is unusual"),
        ({"reward": (2.0, 1.0)}, "It did not rise"),
        ({"held_out_reward": (1.0, 0.5)}, "by heart"),
        ({"alike": (0.5, 1.0)}, "all answers score alike"),
        ({"length": (9.0, 1.0)}, "is that what you want"),
        ({"distinct": (1.0, 0.125)}, "nearly one"),
        ({"ratio": (1.0, 1.1)}, "scores the same answers differently"),
    ],
)
def test_what_is_unusual_about_a_curve_is_said(changed: dict[str, tuple[float, float]], said: str) -> None:
    told = findings(log(**(GOOD | changed)))
    assert told[0].startswith("The reward of drawn answers went from")
    assert len(told) == 2
    assert said in told[1]


def test_one_line_of_a_log_is_no_curve() -> None:
    told = findings(log(**GOOD)[:1])
    assert told == ["The reward of drawn answers was 1, 0 nats an answer from the start.", told[1]]
    assert told[1].startswith("One line of the log says nothing")


@pytest.mark.parametrize(
    ("name", "start", "control", "tuned", "told"),
    [
        ("map", 0.50001, 0.50003, 0.50002, False),  # the same as they are printed
        ("map", 0.5, 0.6, 0.55, True),
        ("map", 0.5, 0.6, 0.65, False),
        ("map", 0.5, 0.49, 0.4, False),
        ("error", 5.0, 4.0, 4.5, True),
        ("error", 5.0, 4.0, 3.5, False),
    ],
)
def test_a_start_that_was_still_learning_is_told(
    name: str, start: float, control: float, tuned: float, told: bool
) -> None:
    evaluation = Evaluation({name: tuned}, {"mle": {name: start}, "control": {name: control}})
    assert bool(still_learning(evaluation)) == told
    assert not still_learning(Evaluation({name: tuned}, {"random": {name: start}}))


def test_a_reward_of_the_users_own_is_the_judge_of_its_tuning() -> None:
    """More likelihood lifts the field's metric further, as it should, and the reward less."""
    rows = {"mle": {"cider": 1.0, "reward": 0.2}, "control": {"cider": 2.0, "reward": 0.3}}
    assert not still_learning(Evaluation({"cider": 1.5, "reward": 0.4}, rows))
    assert "reward 0.2 to 0.3, tuned to 0.25" in still_learning(Evaluation({"cider": 3.0, "reward": 0.25}, rows))[0]
