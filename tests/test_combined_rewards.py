"""Sums and products of rewards keep the parts; a function of the user's own is checked on its first batch."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate
from foveate.geometry import Boxes
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


def test_whole_numbers_and_answers_to_yes_or_no_are_a_reward_as_they_are():
    for counts in (torch.tensor([3, -1]), torch.tensor([True, False])):
        total = guarded(lambda predictions, targets, counts=counts: counts)(torch.zeros(2), None).total
        assert total.mean() == counts.float().mean()
        whole = unchecked(total=counts, parts={"right": counts}, credit=counts[:, None])
        for found in (guarded(lambda *_, whole=whole: whole)(torch.zeros(2), None), check_output(whole, 2, "mine")):
            for values in (found.total, found.parts["right"], found.credit[:, 0]):
                assert torch.equal(values, counts.float())


def test_a_reward_is_computed_in_full_precision_whatever_the_model_that_is_scored_does() -> None:
    """By a network, as the score of another system is; 1.001 is no number of bfloat16."""
    judge = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(judge.weight, 1.001)
    answers = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 3.0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (answers, answers.bfloat16()):
            found = guarded(lambda predictions, _: judge(predictions)[:, 0])(given, torch.zeros(2)).total
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.tensor([7.007, 6.006]))
        assert torch.is_autocast_enabled("cpu")


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
        (
            unchecked(total=torch.arange(4.0), parts={}, credit=torch.rand(4)),
            r"credit is \[4\], expected \[4, decisions",
        ),
        (unchecked(total=torch.arange(4.0), parts={}, credit=torch.rand(4, 2, 1)), r"credit is \[4, 2, 1\]"),
    ],
)
def test_what_a_reward_gives_is_checked(output, says):
    with pytest.raises(InputError, match=f"^reward mine: .*{says}"):
        check_output(output, 4, "mine")


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1)])
def test_a_guard_names_credit_of_another_shape(shape):
    whole = unchecked(total=torch.arange(4.0), parts={}, credit=torch.rand(shape))
    with pytest.raises(InputError, match=r"^reward mine: its credit is \[4.*expected \[4, decisions\]"):
        guarded(lambda *_: whole, name="mine")(torch.zeros(4), None)


def test_good_outputs_pass():
    numbers = torch.arange(4.0)
    assert torch.equal(check_output(numbers, 4, "mine").total, numbers)
    whole = RewardOutput(numbers, {"near": numbers}, torch.rand(4, 2))
    found = check_output(whole, 4, "mine")
    assert found.total is numbers
    assert found.parts["near"] is numbers
    assert found.credit is whole.credit
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


def test_a_guard_leaves_credit_as_it_is_and_takes_that_of_a_failed_example() -> None:
    def worth(predictions: Tensor, targets: Tensor) -> RewardOutput:
        if (predictions < 0).any():
            raise ValueError("below 0")
        return RewardOutput(predictions.sum(1), credit=predictions)

    fine = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(guarded(worth, skip=True)(fine, fine).credit, fine)
    assert torch.equal(guarded(worth)(fine, fine).credit, fine)
    for broken in (-1.0, float("inf")):
        found = guarded(worth, skip=True)(torch.where(fine == 4, broken, fine), fine)
        assert found.total.tolist() == [3, 7, 11]
        assert found.credit.tolist() == [[1, 2], [0, 0], [5, 6]]


def test_a_failed_example_moves_neither_the_mean_of_the_total_nor_those_of_the_parts() -> None:
    """However it fails: by a total, by a part, or by raising."""

    def worth(predictions: Tensor, targets: Tensor) -> RewardOutput:
        if (predictions == -9).any():
            raise ValueError("-9")
        part = torch.where(predictions == -8, torch.nan, predictions)
        return RewardOutput(torch.where(predictions == -7, torch.nan, 2 * predictions), {"half": part})

    for failing in (-9.0, -8.0, -7.0):
        values = torch.tensor([1.0, failing, 2.0, 6.0])
        found = guarded(worth, skip=True)(values, None)
        assert found.parts["half"].tolist() == [1, 3, 2, 6]
        assert found.total.tolist() == [2, 6, 4, 12]
        assert found.parts["skipped"].tolist() == [0, 1, 0, 0]
    with pytest.raises(InputError, match=r"^reward mine: its part 'half' is nan for example 1 \(1 of 4\): correct"):
        guarded(worth, name="mine")(torch.tensor([1.0, -8.0, 2.0, 6.0]), None)


def test_a_function_that_gives_another_number_of_scores_is_told() -> None:
    with pytest.raises(InputError, match=r"^reward short: its total is \[2\], expected \[3\]: one an example"):
        guarded(lambda predictions, targets: predictions[1:, 0], name="short")(torch.ones(3, 2), None)


def test_a_guard_asks_one_by_one_where_there_are_no_targets() -> None:
    def small(predictions: Tensor, targets: None) -> Tensor:
        if (predictions > 2).any():
            raise ValueError("too large")
        return predictions.sum(1)

    values = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    with pytest.raises(InputError, match=r"^reward small: raises ValueError\('too large'\) for example 3 \(1 of 4\)"):
        guarded(small, name="small")(values, None)
    assert guarded(small, skip=True)(values, None).total.tolist() == [0, 1, 2, 1]


def few(predictions, targets):
    """A reward of the user's own, of sets of boxes or of segments: the fewer the better; 100 less, to be known by."""
    found = predictions.mask if isinstance(predictions, Boxes) else predictions.ids.flatten(1) > 0
    return -100.0 - found.float().mean(1)


def picky(predictions, targets):
    """The same, but it cannot judge pictures of one object (for maps: in which the first segment is a disk)."""
    beyond = targets.mask.sum(1) == 1 if isinstance(targets, Boxes) else targets.labels[:, 0] == 0
    return torch.where(beyond, torch.nan, few(predictions, targets))


SYSTEMS = {
    "detection": {"image_size": 24, "patch": 4, "objects": 2, "most": 4, "controls": (), "width": 16, "depth": 1},
    "sequential-detection": {"image_size": 32, "patch": 6, "hidden": 16, "objects": 2, "controls": ()},
    "panoptic": {"image_size": 16, "width": 16, "depth": 1, "code_width": 8},
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_tuned_on_a_reward_of_the_users_own(system: str, tmp_path: Path) -> None:
    how = {"steps": 6, "device": "cpu", "scenes": 24, "batch": 8, "samples": 2, **SYSTEMS[system]}
    how |= {"reward": "test_combined_rewards:picky"}
    with pytest.raises(InputError, match=r"^reward test_combined_rewards:picky: .*is nan for example \d+ .*skip-bad"):
        foveate.train(system, out=tmp_path / "a", **how)
    assert system == "sequential-detection" or not (tmp_path / "a").exists(), "told before the first phase"
    foveate.train(system, out=tmp_path / "b", skip_bad=True, **how)
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").open()]
    tuned = [row for row in rows if row["phase"] in ("reward", "policy")]
    assert all(row["reward"] < -90 for row in tuned)
    assert any(0 < row["part skipped"] < 1 for row in tuned)
    scored = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert scored["metrics"]["reward"] < -90, "what it was tuned on is told of test images too"
    with pytest.raises(InputError, match=r"^reward: found 'mapp', expected (map|pq), .*package.module:function"):
        foveate.train(system, out=tmp_path / "c", **how | {"reward": "mapp"})
