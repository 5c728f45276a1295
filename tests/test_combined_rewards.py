"""Sums and products of rewards keep the parts; a function of the user's own is checked on its first batch."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.rewards.combine import check_output, guarded, load_reward, product, weighted_sum
from foveate.types import InputError, RewardOutput


def length(predictions, targets):
    return RewardOutput(predictions.sum(1), {"first": predictions[:, 0]}, predictions)


def likeness(predictions, targets):
    return RewardOutput(-(predictions - targets).abs().sum(1), {}, -(predictions - targets).abs())


def unchecked(**fields):
    """As outside the tests, where nobody checks the shapes of a RewardOutput when it is made."""
    output = object.__new__(RewardOutput)
    for name, value in fields.items():
        object.__setattr__(output, name, value)
    return output


def test_a_sum_keeps_parts_and_credit():
    found = weighted_sum({"length": length, "likeness": likeness}, {"length": 0.5, "likeness": 2.0})(
        one := torch.rand(4, 3), other := torch.rand(4, 3)
    )
    expected = 0.5 * one.sum(1) - 2 * (one - other).abs().sum(1)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.parts["length"] + found.parts["likeness"], found.total)
    assert torch.equal(found.parts["length/first"], one[:, 0])
    torch.testing.assert_close(found.credit.sum(1), found.total)
    bare = weighted_sum({"bare": lambda p, t: RewardOutput(p[:, 0]), "length": length}, {"bare": 1.0, "length": 1.0})
    assert bare(one, other).credit is None


def test_a_product_keeps_parts():
    one = torch.rand(4, 3)
    found = product({"length": length, "again": length})(one, one)
    torch.testing.assert_close(found.total, one.sum(1) ** 2)
    assert set(found.parts) == {"length", "again", "length/first", "again/first"}
    assert found.credit is None


def test_names_must_agree():
    for weights in ({}, {"other": 1.0}):
        with pytest.raises(InputError, match="weight for each"):
            weighted_sum({"length": length}, weights)
    with pytest.raises(InputError, match="none"):
        product({})


def test_a_reward_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_reward.py").write_text("def score(predictions, targets):\n    return predictions\n\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_reward("my_reward:score")(torch.ones(2), None).total.tolist() == [1, 1]
        for name, says in {
            "my_reward": "package.module:function",
            "my_reward:scores": "has no 'scores'",
            "my_rewards:score": "not found",
            "my_reward:NUMBER": "is a int",
        }.items():
            with pytest.raises(InputError, match=f"^reward: .*{says}"):
                load_reward(name)
    finally:
        sys.modules.pop("my_reward", None)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (0.5, "found float, expected RewardOutput"),
        (torch.rand(4, 1), r"total is \[4, 1\], expected \[4\]"),
        (torch.tensor([0.0, float("nan"), 2.0, 3.0]), "nan for example 1 .*1 of 4; the others lie in 0 to 3"),
        (torch.full((4,), 0.25), "0.25 for all 4 examples"),
        (unchecked(total=torch.arange(4.0), parts={"near": torch.rand(3)}, credit=None), r"part 'near' is \[3\]"),
        (unchecked(total=torch.arange(4.0), parts={}, credit=torch.rand(3, 2)), r"credit is \[3, 2\]"),
    ],
)
def test_what_a_reward_gives_is_checked(output, says):
    with pytest.raises(InputError, match=f"^reward mine: .*{says}"):
        check_output(output, 4, "mine")


def test_good_outputs_pass():
    numbers = torch.arange(4.0)
    assert torch.equal(check_output(numbers, 4, "mine").total, numbers)
    whole = RewardOutput(numbers, {"near": numbers}, torch.rand(4, 2))
    assert check_output(whole, 4, "mine") is whole
    assert check_output(torch.zeros(1), 1, "mine").total.tolist() == [0]


def test_a_guard_asks_sentence_by_sentence_and_passes_on_what_says_itself_what_is_wrong() -> None:
    def lengths(predictions: list[str], targets: Tensor) -> Tensor:
        return torch.tensor([1 / len(words) for words in predictions])

    found = guarded(lengths, skip=True)(["a", "", "abcd"], torch.arange(3))
    assert found.total.tolist() == [1, 0.625, 0.25]
    assert found.parts["skipped"].tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r"reward lengths: raises ZeroDivisionError.* for example 1, target 1"):
        guarded(lengths, name="lengths")(["a", "", "abcd"], torch.arange(3))

    def picky(predictions: Tensor, targets: Tensor) -> Tensor:
        raise InputError("pictures: found 3 channels")

    with pytest.raises(InputError, match=r"^pictures: found 3 channels$"):
        guarded(picky, skip=True)(torch.ones(2), None)
