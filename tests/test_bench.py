"""The benchmarks run, say what they say they say, and compare the same work."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import acting, best_seconds, diffusion, environments, ram, random_walker, retina, rewards, sampling

from foveate import noise
from foveate.models.retina import build_pyramid, look
from foveate.rewards.boxes import DetectionReward
from foveate.rewards.panoptic import panoptic_quality
from foveate.systems import tracking

SMALL = (28, 8, 1, 6)


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foveate", "bench", *words], capture_output=True, text=True, timeout=60
    )


def test_the_command_prints_one_object_and_nothing_else() -> None:
    done = bench("noise", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert list(printed) == ["rows"]
    (row,) = printed["rows"]
    assert list(row) == ["name", "ours", "peer", "ratio", "unit"]
    assert row["name"] == "noise"
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    # far below what it is on any machine, so that a busy one does not fail here
    assert row["ratio"] > 1


def test_a_name_matches_exactly_and_a_mistyped_one_is_told_the_nearest() -> None:
    done = bench("noize", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'noise'?" in done.stderr
    assert "ram-60" in done.stderr  # the others are named


def test_the_page_lists_the_rows_that_there_are_and_no_others() -> None:
    root, rows = Path(__file__).parents[1], list[str]()
    for path in sorted((root / "benchmarks").glob("*.py")):
        rows += getattr(importlib.import_module(f"benchmarks.{path.stem}"), "ROWS", {})
    assert len(rows) == len(set(rows)), "a name is one row's"
    listed = list[str]()
    for line in (root / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            listed += re.findall("`(.+?)`", line.split("|")[1])
    assert sorted(listed) == sorted(rows)


def test_best_seconds_takes_turns_and_keeps_the_best() -> None:
    calls: list[str] = []
    found = best_seconds(lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, repeats=3)
    assert "".join(calls) == "ab" + "aaabbb" * 2
    assert all(0 < seconds < 1 for seconds in found)


@pytest.mark.parametrize("sizes", [SMALL, (60, 12, 3, 8)])
def test_both_training_loops_run_and_learn(sizes: tuple[int, int, int, int]) -> None:
    ours, peer, unit = ram.compare(sizes, rounds=1, repeats=1)
    assert ours > 0
    assert peer > 0
    assert unit == "training images/s"


@pytest.mark.parametrize("sizes", [SMALL, (60, 12, 3, 8)])
def test_the_bound_is_of_the_very_products_that_both_loops_make(sizes: tuple[int, int, int, int]) -> None:
    images = ram.synthetic_images(sizes[0], 256)
    found = []
    for step in (ram.products(sizes), ram.our_step(images, sizes), ram.textbook_step(images, sizes)):
        with FlopCounterMode(display=False) as counter:
            step()
        found.append(counter.get_total_flops())
    alone, ours, peer = found
    assert alone == ours
    # the loop answers at the last glimpse only, and multiplies by the memory of nothing
    assert alone == pytest.approx(peer, rel=0.05)


def test_both_training_loops_change_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: neither loop leaves out a part of the loss."""
    made = []
    network = ram.network
    monkeypatch.setattr(ram, "network", lambda sizes: made.append(network(sizes)) or made[-1])
    images = ram.synthetic_images(28, 256)
    for step in (ram.our_step(images, SMALL), ram.textbook_step(images, SMALL)):
        step()
        step()  # the layer that remembers has its first gradient from the second glimpse on, the heads at once
    before = dict(network(SMALL)[0].named_parameters())
    for policy, _ in made:
        assert all(not torch.equal(weight, before[name]) for name, weight in policy.named_parameters())


@pytest.mark.parametrize(("scales", "places"), [(1, [0, 5, 8, 16]), (3, [0, 8, 16])])
def test_the_textbook_retina_sees_what_ours_sees(scales: int, places: list[int]) -> None:
    """At whole pixels, where they agree: textbook glimpses are the peer's honest work, not less and not more."""
    images = torch.rand(len(places), 1, 16, 16)
    locations = torch.tensor([[x / 8 - 1, y / 8 - 1] for x, y in zip(places, reversed(places), strict=True)])
    expected = ram.cut_glimpse(images, locations, 8, scales)
    torch.testing.assert_close(look(build_pyramid(images, scales, 2), locations, 8, 2), expected)


def test_retina_rows_in_the_small() -> None:
    ours, peer, unit = retina.compare_glimpses(512, rounds=1, repeats=1)
    assert ours > 0
    assert peer > 0
    assert unit.startswith("images/s")
    assert "pyramid" in retina.compare_pyramid(256, rounds=1)[2]


def test_environment_rows_in_the_small() -> None:
    for task in (environments.glimpses, environments.boxes, partial(environments.volumes, 24)):
        for peer in (environments.one_by_one, environments.sync_vector):
            ours, theirs, unit = environments.compare(task, peer, copies=16, rounds=1)
            assert ours > theirs
            assert unit == "steps/s, 16 copies"


def test_rewards_are_measured_on_work_that_both_do() -> None:
    """The loop over segments is right, and boxes and captions are such that something matches."""
    found, wanted = rewards.maps("found"), rewards.maps("wanted")
    ours = panoptic_quality(found, wanted).total
    for row in range(4):
        parts = (part[row].numpy() for part in (found.ids, found.labels, wanted.ids, wanted.labels))
        assert rewards.quality_by_loops(*parts) == pytest.approx(float(ours[row]), abs=1e-5)
    assert 0.2 < ours.mean() < 0.98
    score = DetectionReward()(*rewards.boxes())
    assert score.parts["matches@0.5"].mean() > 10
    assert score.parts["duplicates@0.5"].mean() > 10
    words = rewards.texts("found", 8)
    assert [len(one.split()) for one in rewards.sentences(words)] == words.mask.sum(1).tolist()


def test_both_write_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LENGTH", 4)
    monkeypatch.setattr(sampling, "IMAGES", 2)
    model, (images, keys) = sampling.sampler(), sampling.pictures()
    with torch.no_grad():
        assert torch.equal(
            sampling.write_anew(model, images, keys), model.sample(images, sampling.SAMPLES, False, keys).ids
        )


def test_denoising_rows_in_the_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INPUTS": 2, "SAMPLES": 2, "STEPS": 3, "SIDE": 8}.items():
        monkeypatch.setattr(diffusion, name, value)
    for row in (diffusion.update, diffusion.bound):
        ours, peer, unit = row()
        assert ours > 0
        assert peer > 0
        assert unit == "image-steps/s"


def test_both_denoising_loops_have_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published loop averages log-probabilities over pixels; ours is their number times as long, and no other."""
    monkeypatch.setattr(diffusion, "STEPS", 3)
    monkeypatch.setattr(diffusion, "SIDE", 8)
    policy, labels = diffusion.denoiser(), torch.tensor([0, 1])
    chain = policy.sample(labels, 2, False, noise.key(0, torch.arange(2)))
    chains = torch.cat((chain.start[:, None], chain.drawn), 1)
    advantages, rows = torch.tensor([1.0, -1.0, 0.5, -0.5]), labels.repeat_interleave(2)
    with torch.no_grad():
        logs = policy(labels, chain).log_probs.float() / 64
    diffusion.published_gradient(policy, chains[:, :3], logs[:, :2], rows, advantages, 2)  # the random steps
    theirs = torch.cat([weight.grad.flatten() for weight in policy.network.parameters()])
    policy.zero_grad()
    found = policy(labels, chain, slice(0, 2))
    (-(found.log_probs * advantages[:, None]).sum() / 4).backward()
    ours = torch.cat([weight.grad.flatten() for weight in policy.network.parameters()])
    torch.testing.assert_close(64 * theirs, ours, rtol=1e-2, atol=1e-3 * float(ours.abs().max()))


def test_a_replay_of_states_is_a_small_part_of_one_of_what_is_seen() -> None:
    for task, most in ((environments.boxes, 300), (partial(environments.volumes, 24), 200)):
        ours, theirs, unit = environments.compare_memory(task)
        assert ours > 10 * theirs
        assert 1e6 / ours < most, unit


def test_sizes_are_compared_on_the_same_steps() -> None:
    """64 times the pixels, 64 times the voxels: far less than the bound is what a busy machine makes of equal work."""
    for task, large, small in ((partial(environments.boxes, count=4), 512, 64), (environments.volumes, 96, 24)):
        ours, theirs, unit = environments.compare_sizes(task, large, small, rounds=5)
        assert ours > theirs / 4
        assert f"at {large} a side" in unit


def test_steps_and_their_networks_are_both_timed() -> None:
    settings = {"scenes": 1, "image_size": 32, "patch": 12, "hidden": 16, "batch": 8, "copies": 8, "horizon": 2}
    ours, networks, unit = acting.compare_step(tracking, 5, **settings)
    assert 0 < ours < networks, "a network's part of a step is less than the step"
    assert unit.startswith("training steps/s")


def test_a_random_walker_row_in_the_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IMAGES": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(random_walker, name, value)
    ours, theirs, unit = random_walker.row(20)
    assert ours > 0
    assert theirs > 0
    assert unit == "images a second"
