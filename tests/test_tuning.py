"""Tuning on a reward: the gradient is that of the expected reward, it learns, and the anchor holds it."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import noise
from foveate.distributions import Categorical
from foveate.geometry import Boxes
from foveate.learn.answers import answering, distinct, frozen, likelihood_loss, repeat, reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.box_tokens import BoxTokens, BoxWriter
from foveate.models.encoder_decoder import EncoderDecoder, Tokens
from foveate.rewards.boxes import DetectionReward
from foveate.rewards.combine import guarded
from foveate.run import Run
from foveate.run.checkpoints import listed, read_part
from foveate.tuning import _check_asked, _check_drawn, _optimizer
from foveate.two_steps import tune_on_reward
from foveate.types import Decisions, InputError, RewardOutput, Sampler, map_tree


def small(length: int = 2, vocabulary: int = 3, end: int | None = None) -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder((1, 4, 4), 2, vocabulary, length, end, width=16, depth=1, heads=2)


def images(batch: int) -> Tensor:
    return noise.uniform(noise.key(0, "images", torch.arange(batch)), 1, 4, 4)


def agreement(predictions: Tokens, targets: Tensor) -> RewardOutput:
    """How many tokens are those of the target, and a first one more than that: parts sum to the total."""
    right = ((predictions.ids == targets[:, : predictions.ids.shape[1]]) & predictions.mask).float()
    parts = {"all": right.sum(1), "first": 0.5 * right[:, 0]}
    credit = right * torch.tensor([1.5, *[1.0] * (right.shape[1] - 1)])
    return RewardOutput(parts["all"] + parts["first"], parts, credit)


ESTIMATORS = [{"baseline": name} for name in ("leave-one-out", "greedy", "moving-average", "learned", "none")]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, {"credit": "to-go"}], ids=lambda how: next(iter(how.values())))
@pytest.mark.parametrize("end", [None, 0])
def test_the_gradient_is_that_of_the_expected_reward(estimator: dict[str, Any], end: int | None) -> None:
    """All answers of two tokens out of three enumerated: Σ p(answer) R(answer), by autograd."""
    model, image, target = small(end=end), images(1), torch.tensor([[1, 2]])
    answers = torch.tensor(list(itertools.product(range(3), repeat=2)))
    mask = torch.ones_like(answers, dtype=torch.bool)
    if end is not None:
        mask[:, 1] = answers[:, 0] != end
        answers, mask = answers[mask[:, 1] | (answers[:, 1] == 0)], mask[mask[:, 1] | (answers[:, 1] == 0)]
    whole = Tokens(answers, mask)
    read = model(image, whole)
    chances = (read.log_probs * mask).sum(1).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    expected = (chances * agreement(whole, target.expand(len(answers), -1)).total).sum()
    weights = [model.score.bias, model.decoder[0].project.bias]
    exact = torch.cat([one.flatten() for one in torch.autograd.grad(expected, weights)])

    settings, average = Tuning(samples=4, **estimator), MovingAverage()
    average.update(torch.tensor([0.7]))
    found = []
    for step in range(60):
        keys = noise.key(step, "rows", torch.arange(64))
        scored = score(model, agreement, image.expand(64, -1, -1, -1), target.expand(64, -1), keys, settings, average)
        decisions = model(image.expand(64, -1, -1, -1), scored.actions)
        loss, parts = reward_loss(decisions, scored, None, settings)
        loss = loss - parts.get("value_loss", 0.0)  # it does not reach these weights
        found.append(torch.cat([one.flatten() for one in torch.autograd.grad(-loss, weights)]))
    samples = torch.stack(found)
    error = samples.std(0) / len(found) ** 0.5
    away = ((samples.mean(0) - exact) / error.clamp(min=1e-6)).abs()
    assert away.max() < 4.5
    assert exact.abs().max() > 5 * error.max(), "there is something to be measured"


def run_in(folder: Path, steps: int) -> Run:
    return Run(folder, system="test", config={}, steps=steps, device="cpu", quiet=True)


def taught(model: EncoderDecoder, targets: Tensor, steps: int = 30) -> EncoderDecoder:
    """Somewhat, by likelihood."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    answer = Tokens(targets, torch.ones_like(targets, dtype=torch.bool))
    for _ in range(steps):
        likelihood_loss(model(images(len(targets)), answer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tuned(
    folder: Path, steps: int, kind: type = torch.optim.Adam, **settings: object
) -> tuple[EncoderDecoder, list[dict[str, float]]]:
    targets = noise.integers(noise.key(0, "targets", torch.arange(16)), 5, 4)
    model = taught(small(4, 5), targets)
    how = Tuning(learning_rate=3e-3, warmup=5, **settings)  # type: ignore[arg-type]
    run = run_in(folder, steps)
    reference, average = frozen(model), MovingAverage()
    optimizer = kind(model.parameters(), how.learning_rate)
    run.track(policy=model, reference=reference, optimizer=optimizer, average=average)
    batches = lambda step: (images(16), targets)  # noqa: E731
    tune_on_reward(run, "reward", 1.0, model, agreement, batches, how, optimizer, average, reference)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return model, [row for row in rows if row["phase"] == "reward"]


def test_it_learns_and_tells_what_happened(tmp_path: Path) -> None:
    _, rows = tuned(tmp_path / "run", 120)
    first, last = rows[0], rows[-1]
    assert last["reward"] > first["reward"] + 0.6
    assert last["part all"] + last["part first"] == pytest.approx(last["reward"], abs=1e-4)
    assert all(row["ratio"] == pytest.approx(1, abs=1e-6) for row in rows)
    assert last["kl"] > first["kl"] >= 0
    assert last["entropy"] < first["entropy"]
    assert first["length"] == 4
    assert 0 <= first["alike"] < last["alike"] <= 1, "answers that are all right leave nothing to learn"


def test_the_anchor_holds_it_near_the_start(tmp_path: Path) -> None:
    free, held = (tuned(tmp_path / name, 120, anchor=anchor)[1][-1] for name, anchor in (("a", 0.0), ("b", 2.0)))
    assert held["kl"] < 0.5 * free["kl"]
    assert held["reward"] < free["reward"]


def test_several_epochs_leave_the_answers_policy_by_no_more_than_the_clip_lets_them(tmp_path: Path) -> None:
    _, rows = tuned(tmp_path / "run", 60, epochs=4, clip=0.2)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5
    assert all(row["ratio"] == pytest.approx(1, abs=1e-6) for row in rows), "told of the first epoch"


def test_dropout_stands_still_while_answering() -> None:
    model = small()
    model.train()
    with answering(model):
        assert not model.training
    assert model.training
    reference = frozen(model)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert reference.score.weight is not model.score.weight


def test_a_temperature_is_that_of_the_answers_and_of_their_scores_and_is_gone_afterwards(tmp_path: Path) -> None:
    model, other = small(), small()
    other.temperature = 0.5
    image, target, keys = images(8), torch.tensor([[1, 2]]).expand(8, -1), torch.arange(8)
    cold = Tuning(samples=4, temperature=0.5)
    found = score(model, agreement, image, target, keys, cold, MovingAverage()).actions
    expected = score(other, agreement, image, target, keys, Tuning(samples=4), MovingAverage()).actions
    assert torch.equal(found.ids, expected.ids)
    with answering(model, temperature=0.5):
        assert torch.equal(model(image, found).log_probs, other(image, found).log_probs)
    assert model.temperature == 1
    greedier, rows = tuned(tmp_path / "run", 60, temperature=0.5)
    assert greedier.temperature == 1
    assert all(row["ratio"] == pytest.approx(1, abs=1e-6) for row in rows)
    assert rows[-1]["reward"] > rows[0]["reward"]
    with pytest.raises(InputError, match=r"^temperature: found 0\.5, but Coins has none"):
        score(Coins(), agreement, torch.zeros(2), torch.zeros(2), torch.arange(2), cold, MovingAverage())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"samples": 1}, "samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"samples": 0, "baseline": "none"}, "samples"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2}, "clip"),
        ({"subset": 0.0}, "subset"),
        ({"samples": 2.5}, "samples"),
        ({"baseline": "leave_one_out"}, "baseline"),
        ({"baseline": "mean"}, "baseline"),
        ({"credit": "togo"}, "credit"),
        ({"anchored": "rewards", "anchor": 0.1}, "anchored"),
        ({"precision": "fp16"}, "precision"),
        *(({"learning_rate": rate}, "learning_rate") for rate in (-1.0, math.nan, math.inf)),
        *(({"anchor": weight}, "anchor") for weight in (-1.0, math.nan, math.inf)),
        *(({"entropy": weight}, "entropy") for weight in (math.nan, -math.inf)),
        *(({"clip": clip, "epochs": 2}, "clip") for clip in (-0.2, 0.0, math.nan)),
        ({"warmup": -5}, "warmup"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"anchor": None}, "anchor"),
        ({"clip": "0.2"}, "clip"),
        ({"chunk": 2.5}, "chunk"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_settings_that_teach_nothing_are_refused(settings: dict[str, object], field: str) -> None:
    made = Tuning()
    for name, value in settings.items():  # as outside the tests, where nobody checks the types of fields
        object.__setattr__(made, name, value)
    with pytest.raises(InputError, match=f"^{field}: "):
        made.__post_init__()


def test_an_anchor_needs_its_reference(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = lambda step: (images(2), torch.zeros(2, 2).long())  # noqa: E731
    settings, average = Tuning(anchor=1.0), MovingAverage()
    with pytest.raises(InputError, match=r"^reference: "):
        tune_on_reward(
            run_in(tmp_path / "run", 1), "reward", 1.0, model, agreement, batches, settings, optimizer, average
        )


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_call_tunes_a_model_and_keeps_what_answers_best_held_out(tmp_path: Path) -> None:
    targets = noise.integers(noise.key(0, "targets", torch.arange(16)), 5, 4)
    model = taught(small(4, 5), targets)
    held_out = [(images(16), targets)]
    before = agreement(model.sample(images(16), 1, True, torch.zeros(16).long()), targets).total.mean()

    def plain(predictions: Tokens, wanted: Tensor) -> Tensor:
        return agreement(predictions, wanted).total

    found = foveate.tune(
        model,
        plain,
        lambda step: (images(16), targets),
        out=tmp_path / "run",
        steps=120,
        held_out=held_out,
        every=40,
        device="cpu",
        learning_rate=1e-2,
        warmup=5,
    )
    assert found is model
    after = agreement(model.sample(images(16), 1, True, torch.zeros(16).long()), targets).total.mean()
    seen = [row["held_out_reward"] for row in rows_of(tmp_path / "run") if "held_out_reward" in row]
    assert len(seen) == 4, "at the start, and three times"
    assert after == pytest.approx(max(seen), abs=1e-5)
    assert after > before + 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The reward of drawn answers w" in page
    assert page.count("data:image/png") == 3


def after_one_step(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after a single update."""
    model, targets = small(4, 5), noise.integers(noise.key(0, "targets", torch.arange(8)), 5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = lambda step: (images(8), targets)  # noqa: E731
    foveate.tune(model, agreement, batches, out=folder, steps=1, device="cpu", warmup=1, **settings)
    return before, model.state_dict()


def test_another_optimizer_learns_what_it_is_given_at_the_rate_of_the_settings(tmp_path: Path) -> None:
    """The step of plain gradient descent is as many times larger as the rate; a group's own rate does not count."""

    def of_the_scores(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters[-4:], lr=100.0)

    steps = []
    for rate in (1e-3, 2e-3):
        before, after = after_one_step(tmp_path / str(rate), learning_rate=rate, optimizer=of_the_scores)
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert changed == ["score.weight", "score.bias"]
        steps.append(after["score.bias"] - before["score.bias"])
    torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-3, atol=1e-7)


def test_an_optimizer_that_is_none_or_of_another_model_is_named(tmp_path: Path) -> None:
    model = small()
    for optimizer, said in (
        (torch.optim.Adam(model.parameters()), "found Adam, expected what makes an optimizer"),
        (lambda parameters: parameters, "found list, expected what makes"),
        (None, "found NoneType, expected what makes"),
        (lambda parameters: torch.optim.Adam(small().parameters()), "has no parameter of the model"),
    ):
        with pytest.raises(InputError, match=f"^optimizer: {said}"):
            _optimizer(optimizer, model)
    with pytest.raises(InputError, match=r"^optimizer: found list"):
        after_one_step(tmp_path / "run", optimizer=lambda parameters: parameters)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, partial(torch.optim.SGD, momentum=0.9)])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.run.loop.CHECKPOINT_SECONDS", 0.0)
    targets = noise.integers(noise.key(0, "targets", torch.arange(8)), 5, 4)

    def go(folder: Path, stop: int | None = None, resume: bool = False, optimizer: Any = optimizer) -> EncoderDecoder:
        model, seen = taught(small(4, 5), targets, 5), [0]

        def batches(step: int) -> tuple[Tensor, Tensor]:
            seen[0] = step
            if stop is not None and step == stop:
                raise KeyboardInterrupt
            return images(8), targets

        settings = {"steps": None if resume else 8, "resume": resume, "learning_rate": 1e-2, "warmup": 1, "samples": 2}
        how: Any = settings | {"optimizer": optimizer}
        return foveate.tune(model, agreement, batches, out=folder, device="cpu", **how)  # type: ignore[return-value]

    whole = go(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", stop=5)
    assert list((tmp_path / "cut" / "checkpoints").glob("[0-9]*"))
    with pytest.raises(InputError, match=r"its optimizer is .*, not 'AdamW'"):
        go(tmp_path / "cut", resume=True, optimizer=torch.optim.AdamW)
    again = go(tmp_path / "cut", resume=True).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def in_parts(folder: Path) -> None:
    """Tune on this process's part of 8 inputs, as `torchrun` starts it."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = slice(8 * rank // processes, 8 * (rank + 1) // processes)
    targets = noise.integers(noise.key(0, "targets", torch.arange(8)), 5, 4)
    how: dict[str, Any] = {"steps": 6, "learning_rate": 0.1, "warmup": 1, "device": "cpu", "optimizer": torch.optim.SGD}
    held_out = [(images(8), targets)]
    batches = lambda step: (images(8)[rows], targets[rows])  # noqa: E731
    foveate.tune(small(4, 5), agreement, batches, out=folder, held_out=held_out, every=3, anchor=0.1, **how)


def test_two_processes_with_parts_of_the_batch_come_to_the_weights_of_one(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from test_tuning import in_parts; in_parts(Path(sys.argv[1]))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two")],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths},
        )
        for rank in "01"
    ]
    in_parts(tmp_path / "one")
    assert [process.wait(90) for process in pair] == [0, 0]
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs | {"seconds": 0} == pytest.approx(ours | {"seconds": 0}, abs=1e-4)
    nets = [read_part(listed(tmp_path / name / "checkpoints")[-1], "policy") for name in ("one", "two")]
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(value, nets[0][name]) for name, value in small(4, 5).state_dict().items())


def test_a_reward_that_is_none_is_named_before_anything_is_written(tmp_path: Path) -> None:
    def constant(predictions: Tokens, targets: Tensor) -> Tensor:
        return torch.ones(len(targets))

    with pytest.raises(InputError, match=r"^reward constant: is 1 for all 64 examples"):
        foveate.tune(small(), constant, lambda step: (images(2), torch.zeros(2, 2)), out=tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_few_answers_get_is_looked_for_among_all_that_are_drawn(tmp_path: Path) -> None:
    """Of two answers to the only input neither may be right, though of 64 some are."""

    def rare(predictions: Tokens, targets: Tensor) -> Tensor:
        return (predictions.ids == targets).all(1).float()

    for seed in range(4):
        keys = noise.key(seed, "check", 0, torch.arange(1))
        drawn = small().sample(images(1), 2, False, keys)
        if not rare(drawn, torch.ones(2, 2).long()).any():
            break
    batches = lambda step: (images(1), torch.ones(1, 2).long())  # noqa: E731
    how: dict[str, Any] = {"samples": 2, "steps": 1, "seed": seed, "device": "cpu"}
    foveate.tune(small(), rare, batches, out=tmp_path / "run", **how)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("given", [torch.distributions.Categorical, lambda logits: None])
def test_a_distribution_of_another_kind_is_named_before_anything_is_written(given: Any, tmp_path: Path) -> None:
    class Foreign(Coins):
        def forward(self, inputs: Tensor, actions: Tensor, steps: slice = slice(None)) -> Decisions:
            found = super().forward(inputs, actions, steps)
            return replace(found, distribution=given(logits=found.distribution.logits))

    says = r"^policy: its forward gives the distribution (Categorical without kl|NoneType without entropy and kl)"
    worth = lambda answers, targets: together(answers)  # noqa: E731
    with pytest.raises(InputError, match=says):
        foveate.tune(Foreign(), worth, lambda step: (torch.zeros(8), None), out=tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_later_is_named_or_left_out_and_counted(tmp_path: Path) -> None:
    now = [0]

    def batches(step: int) -> tuple[Tensor, Tensor]:
        now[0] = step
        return images(2), torch.ones(2, 2).long()

    def failing(predictions: Tokens, targets: Tensor) -> Tensor:
        found = agreement(predictions, targets).total
        return torch.where(torch.arange(len(found)) == 5, float("nan"), found) if now[0] >= 3 else found

    def shrinking(predictions: Tokens, targets: Tensor) -> Tensor:
        found = agreement(predictions, targets).total
        return found[:-1] if now[0] >= 3 else found

    how: dict[str, Any] = {"steps": 5, "device": "cpu", "warmup": 1, "learning_rate": 1e-3}
    with pytest.raises(InputError, match=r"^reward failing: is nan for example 5 \(1 of 16\): .* skip_bad=True"):
        foveate.tune(small(), failing, batches, out=tmp_path / "a", **how)
    foveate.tune(model := small(), failing, batches, out=tmp_path / "b", skip_bad=True, **how)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert rows_of(tmp_path / "b")[-1]["part skipped"] == pytest.approx(2 / 5 / 16)
    with pytest.raises(InputError, match=r"^reward shrinking: its total is \[15\], expected \[16\]"):
        foveate.tune(small(), shrinking, batches, out=tmp_path / "c", **how)


def test_inputs_whose_answers_all_failed_do_not_move_the_reward_that_is_told() -> None:
    totals = torch.tensor([-9.0, -7.0, -8.0, -8.0])  # the guard gave the last two the mean of the others
    output = RewardOutput(totals, {"skipped": torch.tensor([0.0, 0, 1, 1])})
    inputs, keys, tuning = images(2), noise.key(0, torch.arange(2)), Tuning(2)
    scored = score(small(), lambda *_: output, inputs, torch.zeros(2), keys, tuning, MovingAverage())
    assert scored.output.total.tolist() == totals.tolist()
    assert scored.advantages.flatten().tolist() == [-2, 2, 0, 0]


def test_parts_sum_to_the_total_though_answers_failed() -> None:
    totals = torch.tensor([1.0, 3.0, math.nan, 4.0, math.nan, 8.0, 5.0, math.nan])
    worth = lambda *_: RewardOutput(totals, {"third": totals / 3, "rest": 2 * totals / 3})  # noqa: E731
    args = images(2), torch.zeros(2), noise.key(0, torch.arange(2)), Tuning(4), MovingAverage()
    found = score(small(), guarded(worth, skip=True), *args).output
    assert found.parts["skipped"].tolist() == totals.isnan().float().tolist()
    torch.testing.assert_close(found.parts["third"] + found.parts["rest"], found.total)


def test_what_only_gets_worse_ends_as_it_began(tmp_path: Path) -> None:
    """Trained to be wrong, judged by being right: the weights of the start are the best there are."""
    targets = noise.integers(noise.key(0, "targets", torch.arange(16)), 5, 4)
    model = taught(small(4, 5), targets, 60)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def reward(predictions: Tokens, wanted: Tensor) -> RewardOutput:
        found = agreement(predictions, wanted).total
        return RewardOutput(found if len(wanted) == 16 else -found)  # the held-out batch is told by its size

    batches = lambda step: (images(8), targets[:8])  # noqa: E731
    held_out = [(images(16), targets)]
    how = {"steps": 20, "every": 10, "learning_rate": 3e-3, "warmup": 1, "samples": 4, "device": "cpu"}
    foveate.tune(model, reward, batches, out=tmp_path / "run", held_out=held_out, **how)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Coins(Sampler):
    """Independent decisions, one of three each: what credit is for."""

    def __init__(self, count: int = 3, choices: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores = torch.nn.Parameter(torch.randn(count, choices))

    def sample(self, inputs: Tensor, num_samples: int, greedy: bool, keys: Tensor) -> Tensor:
        rows = len(inputs) * num_samples
        streams = noise.fold(keys[:, None], "sample", torch.arange(num_samples)).flatten()
        choice = Categorical(self.scores.expand(rows, -1, -1))
        return choice.mode() if greedy else choice.sample(noise.fold(streams[:, None], torch.arange(len(self.scores))))

    def forward(self, inputs: Tensor, actions: Tensor, steps: slice = slice(None)) -> Decisions:
        choice = Categorical(self.scores.expand(len(actions), -1, -1))
        return Decisions(choice, log_probs=choice.log_prob(actions), mask=torch.ones_like(actions, dtype=torch.bool))

    def decode(self, actions: Tensor) -> Tensor:
        return actions


WORTH = torch.tensor([[0.0, 1.0, -2.0], [0.0, 3.0, 0.5], [0.0, 0.2, 4.0]])


def together(answers: Tensor) -> Tensor:
    """A score in which the decisions interact; choice 0 adds nothing."""
    each = WORTH[torch.arange(3), answers]
    return each.sum(1) + 0.5 * each[:, 0] * each[:, 1] - 0.3 * each[:, 1] * each[:, 2]


def with_difference(answers: Tensor, targets: Tensor) -> RewardOutput:
    """The credit of a decision: the score less that with choice 0 in its place."""
    without = [together(answers * (torch.arange(3) != place)) for place in range(3)]
    return RewardOutput(together(answers), credit=together(answers)[:, None] - torch.stack(without, 1))


def test_an_anchor_in_the_reward_gives_the_gradient_of_whole_answers() -> None:
    """Σ p(answer) (R - anchor · log p / q) over all answers, by autograd; in the loss alone a part is missing."""
    model, image, target = small(), images(1), torch.tensor([[1, 2]])
    reference = frozen(model)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.4 * noise.normal(noise.key("moved", 0), *weight.shape))
    answers = torch.tensor(list(itertools.product(range(3), repeat=2)))
    whole = Tokens(answers, torch.ones_like(answers, dtype=torch.bool))
    logs, theirs = model(image, whole).log_probs.sum(1), reference(image, whole).log_probs.sum(1)
    worth = agreement(whole, target.expand(9, -1)).total - 2.0 * (logs - theirs)
    weights = [model.score.bias, model.decoder[0].project.bias]
    exact = torch.cat([one.flatten() for one in torch.autograd.grad((logs.exp() * worth).sum(), weights)])
    away = {}
    for anchored in ("loss", "reward"):
        settings, found = Tuning(samples=4, anchor=2.0, anchored=anchored), []  # type: ignore[arg-type]
        for step in range(60):
            keys = noise.key(step, "rows", torch.arange(64))
            given = image.expand(64, -1, -1, -1), target.expand(64, -1)
            scored = score(model, agreement, *given, keys, settings, MovingAverage(), reference)
            decisions, anchor = model(given[0], scored.actions), reference(given[0], scored.actions).distribution
            loss, _ = reward_loss(decisions, scored, anchor, settings)
            found.append(torch.cat([one.flatten() for one in torch.autograd.grad(-loss, weights)]))
        samples = torch.stack(found)
        error = samples.std(0) / len(found) ** 0.5
        away[anchored] = float(((samples.mean(0) - exact) / error.clamp(min=1e-6)).abs().max())
    assert away["reward"] < 4.5
    assert away["loss"] > 2 * away["reward"]
    with pytest.raises(InputError, match=r"^anchored: found 'reward', which is of whole answers"):
        Tuning(anchored="reward", credit="to-go")


def test_different_answers_are_counted_exactly() -> None:
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4], [1, 2], [5, 6], [5, 7], [5, 6], [8, 8]])
    assert float(distinct(tokens, 4)) == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert float(distinct({"a": tokens, "b": torch.arange(8.0)}, 4)) == 1.0


def test_credit_of_single_decisions_leaves_the_gradient_and_takes_its_noise() -> None:
    model = Coins()
    answers = torch.tensor(list(itertools.product(range(3), repeat=3)))
    chances = model(answers, answers).log_probs.sum(1).exp()
    exact = torch.autograd.grad((chances * together(answers)).sum(), model.scores)[0]
    spread = {}
    for credit in ("answer", "difference"):
        settings, found = Tuning(samples=4, credit=credit), []  # type: ignore[arg-type]
        for step in range(400):
            keys = noise.key(step, "rows", torch.arange(8))
            scored = score(model, with_difference, torch.zeros(8), torch.zeros(8), keys, settings, MovingAverage())
            loss, _ = reward_loss(model(torch.zeros(8), scored.actions), scored, None, settings)
            found.append(torch.autograd.grad(-loss, model.scores)[0])
        samples = torch.stack(found)
        error = samples.std(0) / len(found) ** 0.5
        assert ((samples.mean(0) - exact) / error.clamp(min=1e-6)).abs().max() < 4
        spread[credit] = float(samples.var(0).sum())
    assert spread["difference"] < 0.7 * spread["answer"]


def test_what_comes_after_a_decision_leaves_the_gradient_and_takes_the_noise_of_what_was_before() -> None:
    """`agreement` is a sum over places, so that late decisions do not answer for early ones."""
    model, image, target = small(4, 5), images(1).expand(16, -1, -1, -1), torch.tensor([[1, 2, 3, 4]]).expand(16, -1)
    spread = {}
    for credit in ("answer", "to-go"):
        found = []
        for step in range(60):
            keys = noise.key(step, "rows", torch.arange(16))
            settings = Tuning(samples=4, credit=credit)  # type: ignore[arg-type]
            scored = score(model, agreement, image, target, keys, settings, MovingAverage())
            loss, _ = reward_loss(model(image, scored.actions), scored, None, settings)
            found.append(torch.autograd.grad(loss, model.score.weight)[0])
        spread[credit] = float(torch.stack(found).var(0).sum())
    assert spread["to-go"] < 0.8 * spread["answer"]


@pytest.mark.parametrize("credit", ["answer", "difference", "to-go"])
def test_an_answer_without_a_score_teaches_nothing_and_is_compared_with_none(credit: Any) -> None:
    """The first input scores low and two of its answers fail, the second high, and all but one of the third fail."""
    totals = torch.tensor([0.1, 0.3, math.nan, math.nan, 0.9, 0.8, 0.7, 0.6, math.nan, math.nan, 5.0, math.nan])

    def worth(predictions: Tensor, targets: Tensor) -> RewardOutput:
        return RewardOutput(totals, credit=totals[:, None] * torch.tensor([1.0, 2.0, 3.0]))

    settings, keys = Tuning(samples=4, credit=credit), noise.key("rows", torch.arange(3))
    careful = guarded(worth, skip=True)
    found = score(Coins(), careful, torch.zeros(3), torch.zeros(3), keys, settings, MovingAverage()).advantages
    failed = totals.isnan()
    assert (found[failed] == 0).all()
    assert (found[10] == 0).all(), "nothing to compare it with"
    first, second = (found[:2, -1] / found[1, -1]), found[4:8, -1]
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))
    assert float(second.sum()) == pytest.approx(0, abs=1e-6)
    assert found[0, -1] < 0 < found[1, -1]
    if credit != "answer":
        alone = Tuning(samples=2, credit=credit)
        good = RewardOutput(totals[:2], credit=totals[:2, None] * torch.tensor([1.0, 2.0, 3.0]))
        args = torch.zeros(1), torch.zeros(1), keys[:1], alone, MovingAverage()
        torch.testing.assert_close(found[:2], score(Coins(), lambda *_: good, *args).advantages)


def test_credit_that_is_not_given_is_asked_for() -> None:
    settings = Tuning(samples=2, credit="difference")
    plain = lambda answers, targets: RewardOutput(together(answers))  # noqa: E731
    with pytest.raises(InputError, match=r"^credit: 'difference' asks the reward for one of each decision, found none"):
        score(Coins(), plain, torch.zeros(2), torch.zeros(2), torch.arange(2), settings, MovingAverage())
    short = lambda answers, targets: replace(with_difference(answers, targets), credit=torch.zeros(4, 2))  # noqa: E731
    scored = score(Coins(), short, torch.zeros(2), torch.zeros(2), torch.arange(2), settings, MovingAverage())
    with pytest.raises(InputError, match=r"^credit: 'difference' asks the reward for one of \[4, 3\], found \[4, 2\]"):
        reward_loss(Coins()(torch.zeros(2), scored.actions), scored, None, settings)
    how = Tuning(baseline="learned")
    with pytest.raises(InputError, match=r"^baseline: found 'learned', but the model has no values"):
        score(Coins(), with_difference, torch.zeros(2), torch.zeros(2), torch.arange(2), how, MovingAverage())


def test_a_batch_in_chunks_is_the_batch(tmp_path: Path) -> None:
    settings = {"kind": torch.optim.SGD, "samples": 4, "anchor": 0.3, "entropy": 0.1, "baseline": "learned"}
    whole, rows = tuned(tmp_path / "whole", 3, **settings)
    parts, others = tuned(tmp_path / "parts", 3, chunk=5, **settings)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for name in ("reward", "part all", "kl", "entropy", "length", "value_loss", "ratio"):
        assert others[-1][name] == pytest.approx(rows[-1][name], rel=1e-3, abs=1e-4), name


def test_half_precision_tunes_too_and_leaves_the_ratio_at_one(tmp_path: Path) -> None:
    _, rows = tuned(tmp_path / "run", 100, precision="bf16")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    assert all(row["ratio"] == pytest.approx(1, abs=1e-6) for row in rows)


def test_a_collapse_is_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward that praises short answers, but falls whatever is done, and is of the other sign on what is held out."""
    model = small(12, 5, end=0)
    with torch.no_grad():
        model.score.bias[0] -= 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = [0]

    def fading(predictions: Tokens, wanted: Tensor) -> RewardOutput:
        calls[0] += 1
        length = predictions.mask.sum(1).float() + 0.01 * torch.arange(len(wanted))
        return RewardOutput(length if len(wanted) == 16 else -length - calls[0])

    batches = lambda step: (images(8), torch.zeros(8))  # noqa: E731
    held_out = [(images(16), torch.zeros(16))]
    how = {"steps": 60, "every": 1000, "learning_rate": 0.02, "warmup": 1, "samples": 4, "device": "cpu"}
    foveate.tune(model, fading, batches, out=tmp_path / "run", held_out=held_out, **how)  # type: ignore[arg-type]
    assert "back to the best weights" in capsys.readouterr().err
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_boxes_in_other_units_than_their_targets_are_named(tmp_path: Path) -> None:
    model = BoxWriter(BoxTokens((16, 16), 2, 3, 16), 8, width=16, depth=1)
    parts = torch.tensor([[[0.1, 0.1, 0.6, 0.7]]])
    targets = Boxes(parts, torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    batches = lambda step: (torch.rand(1, 3, 16, 16), targets)  # noqa: E731
    with pytest.raises(InputError, match=r"^targets: box 0 of image 0 \(0.1, .*\) lies within \[0, 1\]"):
        foveate.tune(model.unending(), DetectionReward(), batches, out=tmp_path / "run", steps=1)
    targets = replace(targets, boxes=30 * parts)
    with pytest.raises(InputError, match=r"^targets: box 0 of image 0 .* reaches beyond the image of 16x16 pixels"):
        foveate.tune(model.unending(), DetectionReward(), batches, out=tmp_path / "run", steps=1)
    targets = replace(targets, boxes=16 * parts)

    class Parts(BoxWriter):
        def decode(self, actions: Tokens) -> Boxes:
            found = super().decode(actions)
            return replace(found, boxes=found.boxes / 16)

    model = Parts(BoxTokens((16, 16), 2, 3, 16), 8, width=16, depth=1)
    with pytest.raises(InputError, match=r"^policy: its boxes lie within \[0, 1\], those of the targets reach 11.2"):
        foveate.tune(model.unending(), DetectionReward(), batches, out=tmp_path / "run", steps=1)
    wide, high = torch.rand(3, 8, 16), torch.rand(3, 16, 16)
    two = r"^inputs: {} images of 3x8x16, 3x16x16, expected one tensor"
    for inputs in ([wide, high], (wide, high), (wide, high, high)):
        some = repeat(map_tree(lambda leaf: leaf[:1], targets), len(inputs))
        with pytest.raises(InputError, match=two.format(len(inputs))):
            foveate.tune(
                model, DetectionReward(), lambda step, each=(inputs, some): each, out=tmp_path / "run", steps=1
            )
    assert not (tmp_path / "run").exists()


PAIR = images(4), torch.ones(4, 2).long()
MIXED = [torch.rand(1, 4, 4), torch.rand(1, 4, 8)]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((PAIR[0], PAIR[1][:3]), "targets: found 3 for 4 inputs, expected one for each"),
        ((PAIR[0], [0, 1, 1, 0]), "targets: found list, expected tensors that begin with the batch"),
        (([], PAIR[1]), "inputs: found list, expected tensors"),
        (PAIR[0], "batches: found Tensor, expected a pair of inputs and targets"),
        (
            ((255 * PAIR[0]).byte(), PAIR[1]),
            "inputs: found images in uint8, expected float32 in .*: divide them by 255",
        ),
        ((MIXED, PAIR[1][:2]), "inputs: 2 images of 1x4x4, 1x4x8, expected one tensor"),
        ((MIXED, None), "inputs: 2 images of 1x4x4, 1x4x8, expected one tensor"),
    ],
)
@pytest.mark.parametrize("where", ["first", "later", "held out"])
def test_a_batch_that_cannot_be_learned_from_is_named_whenever_it_comes(
    batch: Any, says: str, where: str, tmp_path: Path
) -> None:
    batches = lambda step: batch if step == {"first": 0, "later": 2}.get(where) else PAIR  # noqa: E731
    held_out = iter([PAIR, batch] if where == "held out" else [])  # of a list the tests check an item's type at random
    with pytest.raises(InputError, match=f"^{says}"):
        foveate.tune(small(), agreement, batches, out=tmp_path / "run", steps=3, held_out=held_out, device="cpu")


def test_what_is_no_image_is_not_blamed_on_the_reward(tmp_path: Path) -> None:
    broken = torch.where(torch.arange(4)[:, None, None, None] == 2, torch.nan, PAIR[0])
    with pytest.raises(InputError, match=r"^inputs: image 2 of the first batch has NaN .* pixels \(1 of 4\)"):
        foveate.tune(small(), agreement, lambda step: (broken, PAIR[1]), out=tmp_path / "run", steps=1)
    with pytest.raises(InputError, match=r"^batches: found list, expected a function of the step"):
        _check_asked([PAIR], 1, {})
    with pytest.raises(InputError, match=r"^settings: found 'lr', expected of samples, .* learning_rate"):
        foveate.tune(small(), agreement, lambda step: PAIR, out=tmp_path / "run", steps=1, lr=1e-3)
    with pytest.raises(InputError, match=r"^every: found 0, expected at least 1"):
        foveate.tune(small(), agreement, lambda step: PAIR, out=tmp_path / "run", steps=1, every=0)
    assert not (tmp_path / "run").exists()


def test_a_reward_may_need_no_targets_and_what_is_held_out_may_be_read_once(tmp_path: Path) -> None:
    looks = [0]

    def early(predictions: Tokens, targets: None) -> Tensor:
        looks[0] += len(predictions.ids) == 4  # one answer to each
        return predictions.ids.float().sum(1)

    batches = lambda step: (images(4), None)  # noqa: E731
    held_out: Any = ((images(4), None) for _ in range(2))
    how: dict[str, Any] = {"steps": 4, "every": 2, "chunk": 3, "device": "cpu"}
    foveate.tune(small(), early, batches, out=tmp_path / "run", held_out=held_out, **how)
    assert looks[0] == 2 * 4, "two batches at the start, at steps 2 and 4, and when the weights are chosen"


def test_a_model_that_scores_at_random_is_named(tmp_path: Path) -> None:
    class Noisy(Coins):
        def forward(self, inputs: Tensor, actions: Tensor, steps: slice = slice(None)) -> Decisions:
            found = super().forward(inputs, actions, steps)
            return replace(found, log_probs=found.log_probs + 0.1 * torch.rand(()))

    with pytest.raises(InputError, match=r"^policy: scores the same answers differently by"):
        foveate.tune(Noisy(), with_difference, lambda step: (torch.zeros(4), torch.zeros(4)), out=tmp_path, steps=1)


class Sharper(Coins):
    """Draws at another temperature than it scores."""

    temperature = 1.0

    def sample(self, inputs: Tensor, num_samples: int, greedy: bool, keys: Tensor) -> Tensor:
        kept = self.scores
        try:
            self.scores = torch.nn.Parameter(kept / self.temperature)
            return super().sample(inputs, num_samples, greedy, keys)
        finally:
            self.scores = kept


def drawn(model: Coins, seed: int, rows: int = 64) -> tuple[Coins, Tensor, list[Tensor]]:
    inputs = torch.zeros(rows)
    return model, inputs, [model.sample(inputs, 1, False, noise.key(seed, "drawn", torch.arange(rows)))]


@pytest.mark.parametrize(("temperature", "said"), [(0.5, "more"), (2.0, "less")])
def test_a_model_that_draws_from_another_distribution_than_it_scores_is_named(
    temperature: float, said: str, tmp_path: Path
) -> None:
    model = Sharper()
    for seed in range(100):
        _check_drawn(*drawn(model, seed))
    model.temperature = temperature
    with pytest.raises(InputError, match=rf"^policy: 256 answers it drew are .* nats {said} probable"):
        _check_drawn(*drawn(model, 0, 256))
    model.temperature = 0.5
    with pytest.raises(InputError, match=r"^policy: 64 answers it drew are .* nats more probable"):
        foveate.tune(model, with_difference, lambda step: (torch.zeros(4),) * 2, out=tmp_path / "run", steps=1)


def test_what_is_rare_and_was_not_drawn_is_no_mistake() -> None:
    """64 draws of a decision of 98 % may all be the same."""
    for most in (2.0, 3.0, 4.0, 5.0, 6.0):
        model = Coins()
        with torch.no_grad():
            model.scores.copy_(torch.tensor([[9.0, 0.0, 0.0], [most, 0.0, -9.0], [0.0, 0.0, 9.0]]))
        for seed in range(100):
            _check_drawn(*drawn(model, seed))


def test_answers_that_score_alike_for_every_input_are_named(tmp_path: Path) -> None:
    def of_the_input(answers: Tensor, targets: Tensor) -> Tensor:
        return targets

    batches = lambda step: (torch.zeros(4), torch.arange(4.0))  # noqa: E731
    with pytest.raises(InputError, match=r"^reward of_the_input: all 16 answers to an input score alike"):
        foveate.tune(Coins(), of_the_input, batches, out=tmp_path / "run", steps=1)
    foveate.tune(Coins(), of_the_input, batches, out=tmp_path / "run", steps=1, baseline="moving-average")


def test_a_run_whose_answers_have_become_alike_goes_on(tmp_path: Path) -> None:
    def tune(steps: int, **how: Any) -> Coins:
        batches = lambda step: (torch.zeros(4), torch.zeros(4))  # noqa: E731
        return foveate.tune(Coins(), with_difference, batches, out=tmp_path / "run", steps=steps, **how)  # type: ignore[return-value]

    hard: dict[str, Any] = {"credit": "answer", "learning_rate": 5.0, "warmup": 1}
    alike = tune(60, **hard)
    assert (alike.scores.softmax(1).amax(1) > 0.99).all(), "one answer is left"
    tune(61, resume=True, **hard)


def test_a_collapse_is_told_though_nothing_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(12, 5, end=0)
    with torch.no_grad():
        model.score.bias[0] -= 3
    now = [0]

    def batches(step: int) -> tuple[Tensor, Tensor]:
        now[0] = step
        return images(8), torch.zeros(8)

    def fading(predictions: Tokens, wanted: Tensor) -> Tensor:
        return -predictions.mask.sum(1).float() - 5.0 * now[0]

    how: dict[str, Any] = {"steps": 60, "learning_rate": 0.02, "warmup": 1, "samples": 4, "device": "cpu"}
    foveate.tune(model, fading, batches, out=tmp_path / "run", **how)
    told = [line for line in capsys.readouterr().err.splitlines() if "nothing is held out" in line]
    assert len(told) == 1
    assert "decisions" in told[0]
    assert model.sample(images(8), 1, False, torch.arange(8)).mask.sum(1).float().mean() < 3, "it is left as it is"
