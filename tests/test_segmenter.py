"""Segmenters as samplers, the credit of single pixels, and the system that tunes them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import foveate
from foveate import noise
from foveate.data import segmentation
from foveate.learn.answers import answering, likelihood_loss, reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.backbones import EMBEDDED
from foveate.models.dense import UNet, dense_network
from foveate.models.segmenter import Labels, Segmenter, tiled_logits
from foveate.parts import restored
from foveate.rewards.masks import credited, dice_reward, effects_on_total, iou_effects, iou_reward
from foveate.run import Run
from foveate.systems import tune_segmenter
from foveate.systems.tune_segmenter import Config
from foveate.two_steps import tune_on_reward
from foveate.types import InputError


class Fixed(nn.Module):
    """The same scores for every image: each is a weight."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores.expand(len(images), *self.scores.shape)


def images(batch: int, side: int = 16, columns: int | None = None) -> Tensor:
    return noise.uniform(noise.key(0, "images", torch.arange(batch)), 3, side, columns or side)


def small(classes: int = 2, exclusive: bool = False) -> Segmenter:
    torch.manual_seed(1)
    return Segmenter(UNet(3, classes + exclusive, 8, 2), classes, exclusive)


def keys_of(rows: int, seed: int = 0) -> Tensor:
    return noise.key(seed, "rows", torch.arange(rows))


# The sampler


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_log_probabilities_are_minus_the_cross_entropy(temperature: float) -> None:
    model, shown = small(), images(3)
    model.temperature = temperature
    masks = noise.uniform(keys_of(3), 2, 16, 16) < 0.4
    known = noise.uniform(keys_of(3, 1), 1, 16, 16) < 0.8
    decisions = model(shown, model.labels(masks, known))
    scores = model.logits(shown) / temperature
    expected = F.binary_cross_entropy_with_logits(scores, masks.float(), reduction="none")
    torch.testing.assert_close(decisions.log_probs, -expected.flatten(1))
    loss = (expected * known).sum() / (2 * known.sum())
    torch.testing.assert_close(likelihood_loss(decisions), loss)


def test_log_probabilities_of_exclusive_classes_are_minus_the_softmax_cross_entropy() -> None:
    model, shown = small(exclusive=True), images(3)
    ids = noise.integers(keys_of(3), 3, 16, 16)
    masks = torch.stack([ids == 1, ids == 2], 1)
    labels = model.labels(masks)
    assert torch.equal(labels.values[:, 0], ids)
    assert torch.equal(model.decode(labels), masks)
    expected = F.cross_entropy(model.logits(shown), ids, reduction="none")
    torch.testing.assert_close(model(shown, labels).log_probs, -expected.flatten(1))


@pytest.mark.parametrize(("exclusive", "temperature"), [(False, 1.0), (False, 0.5), (True, 1.0), (True, 0.5)])
def test_samples_follow_the_probabilities(exclusive: bool, temperature: float) -> None:
    model = Segmenter(Fixed(torch.tensor([[[0.5, -1.0]], [[2.0, 0.0]]])), 1 if exclusive else 2, exclusive)
    model.temperature = temperature
    drawn = model.decode(model.sample(images(1, 1, 2), 20_000, False, keys_of(1)))
    scores = model.network.scores / temperature
    expected = scores.softmax(0)[1:] if exclusive else scores.sigmoid()
    torch.testing.assert_close(drawn.float().mean(0), expected.detach(), rtol=0, atol=0.015)
    greedy = model.decode(model.sample(images(1, 1, 2), 1, True, keys_of(1)))
    assert torch.equal(greedy[0], expected > 0.5)


def test_the_network_runs_once_for_all_samples_and_rows_do_not_depend_on_the_batch() -> None:
    model, shown, seen = small(), images(3), []
    model.network.register_forward_hook(lambda module, given, found: seen.append(len(given[0])))
    drawn = model.sample(shown, 4, False, keys_of(3))
    assert seen == [3]
    assert drawn.values.shape == (12, 2, 16, 16)
    assert torch.equal(model.sample(shown[1:2], 4, False, keys_of(3)[1:2]).values, drawn.values[4:8])
    assert model(shown, drawn).log_probs.shape == (12, 512)
    assert seen == [3, 1, 3]
    assert not torch.equal(drawn.values[0], drawn.values[1])
    part = model(shown, drawn, slice(100, 300)).log_probs
    assert torch.equal(part, model(shown, drawn).log_probs[:, 100:300])


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_networks_of_others_and_their_smaller_maps(kind: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 4, stride=4)

        def forward(self, pixel_values: Tensor) -> Any:
            found = self.layer(pixel_values)
            return {"out": found, "aux": None} if kind == "dict" else SimpleNamespace(logits=found)

    model = Segmenter(Other(), 2)
    assert model.sample(images(2), 1, True, keys_of(2)).values.shape == (2, 2, 16, 16)


def test_torchvisions_segmenters_by_name() -> None:
    model = Segmenter(dense_network("torchvision:lraspp_mobilenet_v3_large", 2), 2).eval()
    assert model(images(1, 32), model.labels(torch.zeros(1, 2, 32, 32, dtype=torch.bool))).log_probs.shape == (1, 2048)


def given() -> nn.Module:
    return nn.Conv2d(3, 1, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:unet", "torchvision has no segmenter 'unet', expected one of .*lraspp_mobilenet_v3_large"),
        ("nowhere:unet", "'nowhere:unet' is not found"),
        ("math:unet", "'math:unet' is not found"),
        ("rnet", "'rnet' is not found"),
        ("test_segmenter:keys", "'test_segmenter:keys' is not found"),
        ("builtins:dict", "gave dict, expected a torch.nn.Module"),
    ],
)
def test_a_model_that_is_none(name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^model: .*{said}"):
        dense_network(name, 1)


def test_a_network_of_the_users_own() -> None:
    assert isinstance(dense_network("test_segmenter:given", 1), nn.Conv2d)


@pytest.mark.parametrize(("outputs", "found"), [(1, r"\[2, 1, 16, 16\]"), (3, r"\[2, 3, 16, 16\]")])
def test_a_network_with_other_outputs(outputs: int, found: str) -> None:
    with pytest.raises(InputError, match=rf"^model: gives {found} for .*expected scores \[2, 2, height, width\]"):
        Segmenter(nn.Conv2d(3, outputs, 1), 2).logits(images(2))
    with pytest.raises(InputError, match=r"^model: gives \[2, 4\]"):
        Segmenter(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), 2).logits(images(2))


def test_the_unet_takes_any_size_and_an_image_does_not_depend_on_its_batch() -> None:
    model, shown = small().network, images(3, 19)
    found = model(shown)
    assert found.shape == (3, 2, 19, 19)
    torch.testing.assert_close(model(shown[:1]), found[:1])


def test_windows_cover_a_large_image() -> None:
    model = Segmenter(nn.Conv2d(3, 1, 1), 1)
    shown = images(2, 50)[:, :, :37]
    with torch.no_grad():
        torch.testing.assert_close(tiled_logits(model, shown, 16), model.logits(shown))
        assert torch.equal(tiled_logits(model, shown, 50), model.logits(shown))


# Credit: every mask of a small image


WEIGHED: dict[str, Any] = {"flip": lambda log_probs: -torch.expm1(log_probs), "expected": torch.exp}


def reward_of(config: Config) -> Any:
    found = tune_segmenter._reward(config)
    return lambda predictions, targets: found(predictions, (targets, torch.ones_like(targets[:, :1])))


def expected_of(model: Segmenter, actions: Tensor, advantages: Any) -> tuple[Tensor, Tensor]:
    """Probability of each answer with its graph, and the expectation of Σ ∇log π · advantage over all of them."""
    log_probs = model(images(1, 2), Labels(actions)).log_probs
    chances, advantages = log_probs.sum(1).exp(), advantages(log_probs.detach())
    assert float(chances.detach().sum()) == pytest.approx(1, abs=1e-5)
    whole = (chances.detach()[:, None] * log_probs * advantages).sum()
    return chances, torch.autograd.grad(whole, model.network.scores, retain_graph=True)[0]


@pytest.mark.parametrize("credit", WEIGHED)
@pytest.mark.parametrize("name", ["dice", "iou"])
@pytest.mark.parametrize("classes", [1, 2])
def test_credit_is_exactly_unbiased(name: str, classes: int, credit: str) -> None:
    """16 masks of one class and 256 of two, whose mean knows which classes are there: E[estimator] = ∇E[R]."""
    model = Segmenter(Fixed(noise.normal(noise.key(3, "scores"), classes, 2, 2)), classes)
    masks = torch.tensor(list(itertools.product([False, True], repeat=4 * classes))).view(-1, classes, 2, 2)
    wanted = torch.zeros(classes, 2, 2, dtype=torch.bool)
    wanted[0, 0] = True  # a second class is not in the image
    output = reward_of(Config(reward=name))(masks, wanted.expand_as(masks))
    chances, found = expected_of(model, masks, lambda behaviour: WEIGHED[credit](behaviour) * output.credit)
    (exact,) = torch.autograd.grad((chances * output.total).sum(), model.network.scores)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_credit_of_exclusive_classes_is_exactly_unbiased() -> None:
    """All 81 answers of 2x2 pixels with two classes or none."""
    model = Segmenter(Fixed(noise.normal(noise.key(3, "scores"), 3, 2, 2)), 2, exclusive=True)
    ids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    masks = model.decode(Labels(ids))
    output = reward_of(Config(exclusive=True))(masks, masks[25].expand_as(masks))
    chances, found = expected_of(model, ids, lambda behaviour: output.credit)
    (exact,) = torch.autograd.grad((chances * output.total).sum(), model.network.scores)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def gradients(credit: Any, side: int, samples: int, repeats: int) -> Tensor:
    """Gradients of the tuning loss on one image with an ellipse, from draws of their own."""
    grid = torch.linspace(-1, 1, side)
    wanted = (grid[:, None] ** 2 + 2 * grid**2 < 0.5)[None, None]
    model = Segmenter(Fixed(3.0 * (wanted[0].float() - 0.5) + noise.normal(noise.key(0, "off"), 1, side, side)), 1)
    reward, found = reward_of(Config()), []
    tuning = Tuning(samples=samples, credit=credit)
    for step in range(repeats):
        scored = score(model, reward, images(1, side), wanted, keys_of(1, step), tuning, MovingAverage())
        loss, _ = reward_loss(model(images(1, side), scored.actions), scored, None, tuning)
        found.append(torch.autograd.grad(-loss, model.network.scores)[0])
    return torch.stack(found)


def test_credit_takes_the_noise_of_all_other_pixels_away() -> None:
    """The same expectation; with 4 masks of 32x32 pixels the variance is hundreds of times smaller."""
    own, whole = gradients("flip", 32, 4, 200), gradients("answer", 32, 4, 200)
    ratio = whole.var(0).sum() / own.var(0).sum()
    assert ratio > 100
    error = (whole.var(0) / 200 + own.var(0) / 200).sqrt()
    assert ((own.mean(0) - whole.mean(0)) / error).abs().max() < 5


def test_an_expected_credit_takes_the_noise_of_a_pixels_own_draw_away_too() -> None:
    """The same expectation; of one single pixel it is exact, whatever is drawn."""
    expected, drawn = gradients("expected", 32, 4, 200), gradients("flip", 32, 4, 200)
    assert drawn.var(0).sum() > 10 * expected.var(0).sum()
    error = (drawn.var(0) / 200 + expected.var(0) / 200).sqrt()
    assert ((expected.mean(0) - drawn.mean(0)) / error).abs().max() < 5
    assert gradients("expected", 1, 1, 50).std(0) < 1e-6 < gradients("flip", 1, 1, 50).std(0)


@pytest.mark.parametrize("credit", WEIGHED)
def test_an_update_runs_the_network_twice(credit: Any) -> None:
    """Once to draw and once to learn: the probabilities that weigh the credit are those it learns with."""
    model, calls = small(1), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    masks, tuning = torch.zeros(2, 1, 16, 16, dtype=torch.bool), Tuning(samples=2, credit=credit)
    scored = score(model, reward_of(Config()), images(2), masks, keys_of(2), tuning, MovingAverage())
    loss, _ = reward_loss(model(images(2), scored.actions), scored, None, tuning)
    assert len(calls) == 2
    decisions = model(images(2), scored.actions)
    weights = WEIGHED[credit](decisions.log_probs.detach())
    expected = -(weights * scored.output.credit * decisions.log_probs).sum() / len(scored.output.total)
    torch.testing.assert_close(loss, expected)


def test_effects_on_the_mean_of_classes_are_those_of_flipping_each_pixel() -> None:
    masks = noise.uniform(keys_of(6), 3, 4, 4) < torch.tensor([0.5, 0.1, 0.0])[:, None, None]
    wanted = noise.uniform(keys_of(6, 1), 3, 4, 4) < torch.tensor([0.5, 0.0, 0.1])[:, None, None]
    masks[0], wanted[0] = False, False
    masks[1], wanted[1] = False, False
    masks[1, 2, 1, 1] = True
    output = iou_reward(masks, wanted)
    told = effects_on_total(output, iou_effects(masks, wanted), masks, wanted)
    for place, row, column in itertools.product(range(3), range(4), range(4)):
        other = masks.clone()
        other[:, place, row, column] ^= True
        expected = output.total - iou_reward(other, wanted).total
        torch.testing.assert_close(told[:, place, row, column], expected, rtol=0, atol=1e-6)


# The system


def test_a_reward_tunes_a_segmenter_of_the_users_own(tmp_path: Path) -> None:
    """`foveate.tune`: half-sure scores become the masks that Dice asks for."""
    wanted = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    wanted[:, :, 4:10, 5:12] = True
    torch.manual_seed(0)
    model = Segmenter(UNet(3, 1, 8, 2), 1)
    shown = images(4) * 0.5 + 0.5 * wanted

    with answering(model):
        before = dice_reward(model.decode(model.sample(shown, 1, True, keys_of(4))), wanted).total.mean()
    batches = lambda step: (shown, wanted)  # noqa: E731
    foveate.tune(
        model, credited("dice"), batches, out=tmp_path / "run", steps=60, credit="flip", samples=2, learning_rate=3e-2
    )
    with answering(model):
        after = dice_reward(model.decode(model.sample(shown, 1, True, keys_of(4))), wanted).total.mean()
    assert after > before + 0.2


def test_the_learning_rate_of_a_reward_may_fall_to_nothing(tmp_path: Path) -> None:
    model, shown = small(1), images(2)
    optimizer, rates = torch.optim.Adam(model.parameters()), []
    run = Run(tmp_path / "run", system="test", config={}, steps=10, device="cpu", quiet=True)
    tuning = Tuning(samples=2, credit="flip", learning_rate=1.0, warmup=1, anneal=True)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rates.append(optimizer.param_groups[0]["lr"])
        return shown * 0, torch.ones(2, 1, 16, 16, dtype=torch.bool)

    tune_on_reward(run, "reward", 1.0, model, credited("dice"), batches, tuning, optimizer, MovingAverage())
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates[1:] == pytest.approx([1 - step / 10 for step in range(10)])


QUICK = {"batch": 4, "looks": 4, "image_size": 24, "width": 8, "every": 2, "device": "cpu"}


def save(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def folder_of_pairs(root: Path, masks: list[np.ndarray[Any, Any]]) -> Path:
    for place, mask in enumerate(masks):
        save(root / "masks" / f"{place}.png", mask)
        save(root / "images" / f"{place}.png", np.repeat(mask[:, :, None] // 2 + 40, 3, 2).astype(np.uint8))
    return root


def squares(count: int = 8, side: int = 20) -> list[np.ndarray[Any, Any]]:
    masks = [np.zeros((side, side), np.uint8) for _ in range(count)]
    for place, mask in enumerate(masks):
        mask[3 + place % 4 : 12, 4 : 11 + place % 3] = 255
    return masks


@pytest.mark.parametrize("settings", [{"reward": "iou", "credit": "answer"}, {"exclusive": True}])
def test_the_other_settings_train_on_pairs(tmp_path: Path, settings: dict[str, Any]) -> None:
    root = folder_of_pairs(tmp_path / "data", squares())
    options = QUICK | {"image_size": None} | settings
    agent = foveate.train("tune-segmenter", data="pairs", root=root, steps=4, out=tmp_path / "run", crop=16, **options)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"mle", "control"} <= found["baselines"].keys()
    masks = agent(images(2, 40))["masks"]
    assert masks.shape == (2, 1, 40, 40)
    assert masks.dtype == torch.bool


def test_the_start_of_another_run_is_taken(tmp_path: Path) -> None:
    foveate.train("tune-segmenter", steps=2, out=tmp_path / "first", **QUICK)
    foveate.train(
        "tune-segmenter", steps=1, out=tmp_path / "second", source=tmp_path / "first", learning_rate=0.0, **QUICK
    )
    one, other = (tune_segmenter.build(Config(names=("ring",), width=8)) for _ in range(2))
    Run.open(tmp_path / "first").restore("likelihood", one)
    Run.open(tmp_path / "second").restore("likelihood", other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_unusable_items_are_left_out_and_counted(tmp_path: Path) -> None:
    root = folder_of_pairs(tmp_path / "data", squares(9))
    names = segmentation.load_segmented("pairs", root, "train").names
    (root / "masks" / f"{names[0]}.png").unlink()
    save(root / "masks" / f"{names[1]}.png", np.full((20, 20), 7, np.uint8))
    settings = {"data": "pairs", "root": root, "steps": 2, "crop": 16} | QUICK | {"image_size": None}
    with pytest.raises(InputError, match=rf"{names[0]}\.png: found no mask"):
        foveate.train("tune-segmenter", out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    agent = foveate.train("tune-segmenter", out=tmp_path / "run", skip_bad=True, **settings)
    assert agent.config.left_out == 2
    assert "left_out" in (tmp_path / "run" / "report.html").read_text()


def test_a_reward_that_is_the_same_for_all_is_told_before_training(tmp_path: Path) -> None:
    root = folder_of_pairs(tmp_path / "data", [np.zeros((20, 20), np.uint8)] * 8)
    settings = QUICK | {"image_size": None}
    with pytest.raises(InputError, match=r"^reward dice: is 0 for all 8 examples"):
        foveate.train("tune-segmenter", data="pairs", root=root, steps=4, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def always(predictions: Tensor, targets: Tensor) -> Tensor:
    return torch.full((len(predictions),), 0.5)


def no_credit(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions == targets).flatten(1).float().mean(1)


def test_rewards_of_the_users_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward .*always: is 0\.5 for all"):
        foveate.train("tune-segmenter", steps=4, out=tmp_path / "a", reward="test_segmenter:always", **QUICK)
    settings = QUICK | {"reward": "test_segmenter:no_credit"}
    with pytest.raises(InputError, match=r"^credit: found 'expected', which is of two choices, but exclusive"):
        foveate.train("tune-segmenter", steps=4, out=tmp_path / "b", credit="expected", exclusive=True, **QUICK)
    with pytest.raises(InputError, match=r"^credit: 'flip' asks for one of each pixel, found none in reward .*no_cred"):
        foveate.train("tune-segmenter", steps=4, out=tmp_path / "b", credit="flip", **settings)
    assert not (tmp_path / "b").exists(), "told before the first phase"
    assert foveate.train("tune-segmenter", steps=4, out=tmp_path / "c", **settings).config.credit == "answer"
    scored = json.loads((tmp_path / "c" / "evaluation.json").read_text())
    rows = [scored["metrics"], scored["baselines"]["mle"], scored["baselines"]["control"]]
    assert all(0 < row["reward"] <= 1 for row in rows), "what was tuned on is told of test images too"
    for config, credit in ((Config(reward="iou"), "flip"), (Config(credit="answer"), "answer")):
        assert tune_segmenter.resolve(replace(config, image_size=24)).credit == credit


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"batch": 0}, "batch"),
        ({"likelihood_share": 1.0}, "likelihood_share"),
        ({"width": 12}, "width"),
        ({"samples": 1, "credit": "answer"}, "samples"),
        ({"reward": "f1"}, "reward"),
        ({"model": "torchvision:unet"}, "model"),
        ({"classes": ("flour",)}, "classes"),
    ],
)
def test_fields_out_of_range_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        tune_segmenter.resolve(Config(image_size=24, **settings))


def test_the_start_is_what_was_best_on_val(tmp_path: Path) -> None:
    """At a rate that destroys whatever was there, the start of the reward is what was there."""
    agent = foveate.train("tune-segmenter", steps=8, learning_rate=1e6, out=tmp_path / "run", **QUICK)
    run = Run.open(tmp_path / "run")
    start = restored(run, {"mle": "likelihood"}, lambda: tune_segmenter.build(agent.config))["mle"]
    torch.manual_seed(0)
    for found, expected in zip(start.parameters(), tune_segmenter.build(agent.config).parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_network_that_begins_from_imagenet() -> None:
    model, shown = Segmenter(dense_network(EMBEDDED, 2, 8), 2), images(2, 48, 80)
    assert model.logits(shown).shape == (2, 2, 48, 80)
    torch.testing.assert_close(model.logits(shown)[:1], model.logits(shown[:1]), rtol=1e-3, atol=1e-4)
    still = [weight for weight in model.parameters() if not weight.requires_grad]
    likelihood_loss(model(shown, model.labels(shown[:, :2] > 0.5))).backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    assert 0 < len(still) < len(list(model.parameters())) / 2, "what knows edges stands still, the rest learns"


def test_rates_follow_the_network_unless_they_are_given() -> None:
    found = tune_segmenter.resolve(Config(image_size=24))
    assert (found.learning_rate, found.tuning_rate, found.control_rate) == (5e-3, 5e-4, 2e-3)
    found = tune_segmenter.resolve(Config(image_size=24, model="test_segmenter:given", tuning_rate=0.0))
    assert (found.learning_rate, found.tuning_rate, found.control_rate) == (1e-3, 0.0, 4e-4)
    found = tune_segmenter.resolve(Config(image_size=24, learning_rate=1e-2, control_rate=1.0))
    assert (found.learning_rate, found.tuning_rate, found.control_rate) == (1e-2, 1e-3, 1.0)
