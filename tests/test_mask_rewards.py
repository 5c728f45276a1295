"""Rewards of segmentation and colouring against official implementations and loops written out from docstrings."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import color, morphology
from torch import Tensor
from torchmetrics.functional.detection import panoptic_quality as official_quality
from torchmetrics.functional.segmentation import dice_score

from foveate import noise
from foveate.colors import to_lab
from foveate.geometry import Segments
from foveate.rewards.colors import HUES, VIVID, colorfulness, vivid_and_varied
from foveate.rewards.masks import boundary_reward, dice_effects, dice_reward, iou_effects, iou_reward
from foveate.rewards.panoptic import matched_less_unmatched, panoptic_quality
from foveate.types import InputError

CLASSES = 4


def blobs(seed: int, name: str, batch: int, classes: int, side: int = 20) -> Tensor:
    """Smooth random masks, some of them empty or full."""
    keys = noise.key(seed, name, torch.arange(batch))
    field = torch.nn.functional.interpolate(noise.normal(keys, classes, 5, 5), (side, side), mode="bilinear")
    level = noise.normal(noise.fold(keys, "level"), classes, 1, 1)
    return field > level


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_iou_and_dice_are_those_of_counts_and_of_torchmetrics(seed: int) -> None:
    found, wanted = blobs(seed, "found", 4, 3), blobs(seed, "wanted", 4, 3)
    ious, dices = iou_reward(found, wanted), dice_reward(found, wanted)
    official = dice_score(found, wanted, num_classes=3, average="none", input_format="one-hot")
    for row in range(4):
        present = []
        for place in range(3):
            one, other = (
                set(found[row, place].flatten().nonzero().flatten().tolist()),
                set(wanted[row, place].flatten().nonzero().flatten().tolist()),
            )
            if not one | other:
                assert ious.parts[f"class{place}"][row] == 1
                continue
            expected = len(one & other) / len(one | other)
            present.append(expected)
            assert ious.parts[f"class{place}"][row] == pytest.approx(expected)
            assert dices.parts[f"class{place}"][row] == pytest.approx(2 * expected / (1 + expected))
            assert dices.parts[f"class{place}"][row] == pytest.approx(float(official[row, place]), abs=1e-6)
        assert ious.total[row] == pytest.approx(sum(present) / len(present) if present else 1)


@pytest.mark.parametrize(("reward", "effects"), [(iou_reward, iou_effects), (dice_reward, dice_effects)])
def test_effects_are_those_of_flipping_each_pixel(reward: Any, effects: Any) -> None:
    found, wanted = blobs(3, "found", 6, 2, 6), blobs(3, "wanted", 6, 2, 6)
    found[0], wanted[0] = False, False
    found[1, 0, 0, 0] = wanted[1, 0, 0, 0] = True
    told = effects(found, wanted)
    now = torch.stack(list(reward(found, wanted).parts.values()), 1)
    for row, column in itertools.product(range(6), repeat=2):
        other = found.clone()
        other[:, :, row, column] ^= True
        flipped = torch.stack(list(reward(other, wanted).parts.values()), 1)
        torch.testing.assert_close(told[:, :, row, column], now - flipped, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("reward", "effects"), [(iou_reward, iou_effects), (dice_reward, dice_effects)])
def test_credit_of_pixels_is_unbiased_and_varies_less(reward: Any, effects: Any) -> None:
    """All 64 masks of 2x3 pixels: the expectation of the estimator is the exact gradient, to rounding."""
    logits = torch.tensor([[0.3, -1.0, 0.8], [0.0, 2.0, -0.4]], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[True, False, True], [True, False, False]])
    masks = torch.tensor(list(itertools.product([False, True], repeat=6))).view(64, 1, 2, 3)
    target = wanted.expand(64, 1, 2, 3)
    log_probs = torch.nn.functional.logsigmoid(torch.where(masks[:, 0], logits, -logits))
    chances = log_probs.sum((1, 2)).exp()
    score = reward(masks, target).total.double()
    (exact,) = torch.autograd.grad((chances * score).sum(), logits, retain_graph=True)
    signs = torch.where(masks[:, 0], 1.0, -1.0) * (1 - log_probs.exp())  # ∇log π of each pixel's own logit
    single = signs * (1 - log_probs.exp()) * effects(masks, target)[:, 0]
    whole = signs * (score - (chances * score).sum())[:, None, None]
    weights = chances[:, None, None]
    torch.testing.assert_close((weights * single).sum(0), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((weights * whole).sum(0), exact, rtol=1e-5, atol=1e-6)
    variances = [(weights * (one - exact).square()).sum() for one in (single, whole)]
    assert variances[0] < 0.2 * variances[1]


def davis_f(found: np.ndarray, wanted: np.ndarray, radius: int) -> float:
    """F of one mask by SciPy's and scikit-image's operations, in the order of DAVIS' published code."""

    def outline(mask: np.ndarray) -> np.ndarray:
        east, south, corner = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
        east[:, :-1], south[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        border = mask ^ east | mask ^ south | mask ^ corner
        border[-1], border[:, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1]
        border[-1, -1] = False
        return border

    one, other = outline(found), outline(wanted)
    near = [ndimage.binary_dilation(border, morphology.disk(radius)) for border in (one, other)]
    if not one.any() and not other.any():
        return 1.0
    if not one.any() or not other.any():
        return 0.0
    precision, recall = (one & near[1]).sum() / one.sum(), (other & near[0]).sum() / other.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_boundary_f_is_that_of_davis(seed: int, radius: int) -> None:
    found, wanted = blobs(seed, "found", 3, 2, 24), blobs(seed, "wanted", 3, 2, 24)
    rewards = boundary_reward(found, wanted, radius)
    for row in range(3):
        for place in range(2):
            expected = davis_f(found[row, place].numpy(), wanted[row, place].numpy(), radius)
            assert rewards.parts[f"class{place}"][row] == pytest.approx(expected, abs=1e-6)


def test_masks_without_anything_and_perfect_ones() -> None:
    nothing, some = torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    some[:, :, 2:5, 3] = True
    for reward in (iou_reward, dice_reward, boundary_reward):
        assert reward(nothing, nothing).total.tolist() == [1, 1]
        assert reward(nothing, some).total.tolist() == [0, 0]
        assert reward(some, nothing).total.tolist() == [0, 0]
        torch.testing.assert_close(reward(some, some).total, torch.ones(2))


def random_segments(seed: int, name: str, batch: int, segments: int, crowds: bool = False, side: int = 12) -> Segments:
    keys = noise.key(seed, name, torch.arange(batch))
    field = noise.normal(keys, segments + 1, 4, 4)
    ids = torch.nn.functional.interpolate(field, (side, side), mode="bilinear").argmax(1)
    labels = noise.integers(noise.fold(keys, "labels"), CLASSES, segments)
    crowd = noise.uniform(noise.fold(keys, "crowd"), segments) < 0.3 if crowds else None
    return Segments(ids, labels, crowd)


def shifted(targets: Segments, seed: int) -> Segments:
    """The targets a pixel further, and one segment of another class."""
    labels = targets.labels.clone()
    labels[:, 0] = (labels[:, 0] + seed % 2) % CLASSES
    return Segments(targets.ids.roll(1, 2), labels)


def panopticapi(predictions: Segments, targets: Segments, row: int) -> dict[int, list[float]]:
    """[sum of IoU, TP, FP, FN] of each class by the rules of panopticapi's pq_compute_single_core, pixel by pixel."""
    pixels = list(zip(predictions.ids[row].flatten().tolist(), targets.ids[row].flatten().tolist(), strict=True))
    seen, shown = set(predictions.ids[row].unique().tolist()), set(targets.ids[row].unique().tolist())
    own = {k: label for k, label in enumerate(predictions.labels[row].tolist(), 1) if k in seen}
    true = {k: label for k, label in enumerate(targets.labels[row].tolist(), 1) if k in shown}
    crowd = set() if targets.crowd is None else {k for k, one in enumerate(targets.crowd[row].tolist(), 1) if one}
    stat: dict[int, list[float]] = {label: [0.0, 0, 0, 0] for label in range(CLASSES)}
    taken_own, taken_true = set(), set()
    for p in own:
        for t in true:
            both = pixels.count((p, t))
            if not both or t in crowd or own[p] != true[t]:
                continue
            area, true_area = sum(x == p for x, _ in pixels), sum(y == t for _, y in pixels)
            iou = both / (area + true_area - both - pixels.count((p, 0)))
            if iou > 0.5:
                stat[true[t]][0] += iou
                stat[true[t]][1] += 1
                taken_own.add(p)
                taken_true.add(t)
    for t in true:
        if t not in taken_true and t not in crowd:
            stat[true[t]][3] += 1
    for p in own:
        if p in taken_own:
            continue
        excused = pixels.count((p, 0)) + sum(pixels.count((p, t)) for t in crowd & set(true) if true[t] == own[p])
        if excused / sum(x == p for x, _ in pixels) <= 0.5:
            stat[own[p]][2] += 1
    return stat


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_panoptic_quality_is_panopticapis_on_the_image(seed: int, crowds: bool, near: bool) -> None:
    targets = random_segments(seed, "targets", 3, 5, crowds)
    predictions = shifted(targets, seed) if near else random_segments(seed, "predictions", 3, 4)
    found, additive = panoptic_quality(predictions, targets), matched_less_unmatched(predictions, targets)
    for row in range(3):
        stat = panopticapi(predictions, targets, row)
        there = [one for one in stat.values() if one[1] + one[2] + one[3]]
        size = [one[1] + one[2] / 2 + one[3] / 2 for one in there]
        expected = [one[0] / of for one, of in zip(there, size, strict=True)]
        recognition = [one[1] / of for one, of in zip(there, size, strict=True)]
        segmentation = [one[0] / one[1] if one[1] else 0 for one in there]
        for value, each in (found.total, expected), (found.parts["rq"], recognition), (found.parts["sq"], segmentation):
            assert value[row] == pytest.approx(sum(each) / len(each) if each else 1, abs=1e-5)
        overlap, *counts = (sum(one[place] for one in there) for place in range(4))
        assert [found.parts[name][row] for name in ("tp", "fp", "fn")] == counts
        assert additive.total[row] == pytest.approx(overlap - 0.5 * (counts[1] + counts[2]), abs=1e-5)


def test_panoptic_quality_is_torchmetrics_where_nothing_is_void_or_crowd() -> None:
    targets = random_segments(1, "targets", 6, 5)
    targets = replace(targets, ids=targets.ids.clamp(min=1))
    predictions = shifted(targets, 1)
    found = panoptic_quality(predictions, targets)
    for row in range(6):

        def pairs(segments: Segments) -> Tensor:
            ids = segments.ids[row]  # noqa: B023
            return torch.stack((segments.labels[row][ids - 1], ids), -1)[None]  # noqa: B023

        things = set(range(CLASSES))
        value = official_quality(pairs(predictions), pairs(targets), things, set(), return_per_class=True)
        present = set(targets.labels[row][targets.ids[row].unique() - 1].tolist())
        present |= set(predictions.labels[row][predictions.ids[row].unique() - 1].tolist())
        expected = value.flatten()[sorted(present)].mean()
        assert found.total[row] == pytest.approx(float(expected), abs=1e-5)


def test_perfect_and_empty_maps_and_an_id_without_a_segment() -> None:
    targets = random_segments(2, "targets", 4, 5)
    assert panoptic_quality(targets, targets).total.eq(1).all()
    nothing = replace(targets, ids=torch.zeros_like(targets.ids))
    assert panoptic_quality(nothing, targets).total.eq(0).all()
    assert panoptic_quality(targets, nothing).total.eq(1).all(), "nobody labelled a pixel: nothing is wrong"
    with pytest.raises(InputError, match=r"^predictions: found ids from 0 to 9, but 5 labels"):
        panoptic_quality(replace(targets, ids=targets.ids.masked_fill(targets.ids == 3, 9)), targets)


def photographs(seed: int) -> Tensor:
    keys = noise.key(seed, "photographs", torch.arange(4))
    images = noise.uniform(keys, 3, 8, 8)
    return torch.cat((images, images.mean(1, keepdim=True).expand(-1, 3, -1, -1), images.round(), images * 0.02))


def test_lab_is_that_of_scikit_image() -> None:
    images = photographs(0)
    expected = torch.from_numpy(color.rgb2lab(images.permute(0, 2, 3, 1).double().numpy())).permute(0, 3, 1, 2)
    torch.testing.assert_close(to_lab(images), expected.float(), rtol=0, atol=2e-2)
    torch.testing.assert_close(to_lab(images.double()), expected, rtol=0, atol=1e-2)


def test_vivid_and_varied_is_the_rule_of_its_docstring() -> None:
    images = photographs(1)
    found = vivid_and_varied(images)
    lab = color.rgb2lab(images.permute(0, 2, 3, 1).double().numpy())
    for row in range(len(images)):
        a, b = lab[row, ..., 1].ravel(), lab[row, ..., 2].ravel()
        vivid = a**2 + b**2 > VIVID
        counts, _ = np.histogram(np.arctan2(b[vivid], a[vivid]), HUES, (-math.pi, math.pi))
        shares = counts[counts > 0] / max(1, counts.sum())
        entropy = -(shares * np.log(shares)).sum() / math.log(HUES)
        assert found.parts["vividness"][row] == pytest.approx(vivid.mean())
        assert found.parts["diversity"][row] == pytest.approx(entropy, abs=1e-5)
        assert found.total[row] == pytest.approx(vivid.mean() * entropy, abs=1e-5)
    assert not found.total[4:8].any(), "grey is worth nothing"
    one_hue = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(1, 3, 8, 8)
    assert vivid_and_varied(one_hue).total.item() == pytest.approx(0, abs=1e-6)
    assert vivid_and_varied(one_hue).parts["vividness"].item() == 1


def test_colorfulness_is_that_of_hasler_and_suesstrunk() -> None:
    images = photographs(2)
    found = colorfulness(images)
    for row, image in enumerate((255 * images.double()).numpy()):
        rg, yb = image[0] - image[1], (image[0] + image[1]) / 2 - image[2]
        expected = math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())
        assert found.total[row] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    torch.testing.assert_close(found.parts["spread"] + found.parts["shift"], found.total)
    assert found.total[4:8].abs().max() < 1e-3
