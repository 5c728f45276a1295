"""Rewards of generated images against Pillow, OpenCV, transformers and torchmetrics; failures that are named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import _compute_fid

from foveate import noise
from foveate.judging import Judge, Thumbnails, Watch, mix
from foveate.rewards.combine import guarded
from foveate.rewards.generated import diversity, frechet_distance
from foveate.rewards.images import (
    Aesthetic,
    ClassMatch,
    ClipMatch,
    compressibility,
    incompressibility,
    jpeg_bytes,
    sharpness,
)
from foveate.rewards.named_images import image_reward
from foveate.types import InputError, RewardOutput


def images(count: int, channels: int = 3, side: int = 16) -> Tensor:
    return noise.uniform(noise.key(0, "images", torch.arange(count)), channels, side, side)


@pytest.mark.parametrize(("count", "channels", "side"), [(5, 1, 16), (5, 3, 24), (80, 3, 64)])
def test_bytes_are_those_of_pillow(count: int, channels: int, side: int) -> None:
    given = images(count, channels, side) * torch.linspace(0, 1, count)[:, None, None, None]
    expected = []
    for one in given:
        pixels = (255 * one).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format="JPEG", quality=95)
        expected.append(len(buffer.getvalue()))
    assert jpeg_bytes(given).tolist() == expected
    found = compressibility(given)
    blank = int(jpeg_bytes(torch.zeros(1, channels, side, side)))
    assert found.total.tolist() == [blank - size for size in expected]
    torch.testing.assert_close(found.parts["blank"] + found.parts["file"], found.total)
    assert float(compressibility(torch.zeros(1, channels, side, side)).total) == 0
    assert torch.equal(incompressibility(given).total, -found.total)


def test_sharpness_is_the_variance_of_opencvs_laplacian() -> None:
    cv2 = pytest.importorskip("cv2")
    given = images(4, 1)
    expected = [
        cv2.Laplacian((255 * one[0]).numpy().astype(np.float64), cv2.CV_64F, borderType=cv2.BORDER_REFLECT_101).var()
        for one in given
    ]
    torch.testing.assert_close(1000 * sharpness(given).total, torch.tensor(expected).float(), rtol=1e-4, atol=1e-2)
    grey = given.expand(-1, 3, -1, -1)
    torch.testing.assert_close(sharpness(grey).total, sharpness(given).total, rtol=1e-3, atol=1e-3)
    assert float(sharpness(torch.full((1, 1, 8, 8), 0.5)).total) < 1e-6


def test_a_class_is_matched_by_its_log_probability() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    found = ClassMatch(network)(images(3), torch.tensor([0, 4, 2])).total
    expected = network(images(3)).softmax(1)[[0, 1, 2], [0, 4, 2]].log()
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its processor, as `save_pretrained` writes them."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def tiny_clip(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=12, projection_dim=8, **sizes)
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text.update(marks)
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=8, **sizes)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def tokenizer(folder: Path) -> None:
    import json

    import transformers

    letters = "abcdefghijklmnopqrstuvw"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    made.save_pretrained(folder)


def test_clip_scores_are_those_of_transformers(clip: Path) -> None:
    import transformers

    texts = ("a cab", "bad dad")
    found = ClipMatch(clip, texts)(images(3), torch.tensor([0, 1, 1])).total
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    words = transformers.CLIPTokenizer.from_pretrained(clip)(list(texts), padding=True, return_tensors="pt")
    pixels = images(3)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    ready = (pixels - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
        :, None, None
    ]
    with torch.no_grad():
        logits = model(pixel_values=ready, **words).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(found, 100 * logits[[0, 1, 2], [0, 1, 1]], rtol=1e-3, atol=1e-2)


def test_a_head_on_clip_is_read_from_safetensors(clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.2), nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 1)).eval()
    weights = {f"layers.{name}": value.contiguous() for name, value in head.state_dict().items()}
    save_file(weights, tmp_path / "head.safetensors")
    seeing = ClipMatch(clip, ("a",))
    found = Aesthetic(seeing, tmp_path / "head.safetensors")(images(3)).total
    torch.testing.assert_close(found, head(seeing.embed(images(3))).squeeze(1).detach())
    save_file({"layers.0.weight": torch.zeros(2, 8)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"two.safetensors: its layers are \[\(2, 8\)\], expected linear ones"):
        Aesthetic(seeing, tmp_path / "two.safetensors")
    save_file({"layers.0.weight": torch.zeros(1, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors: takes 7 numbers, but CLIP gives 8"):
        Aesthetic(seeing, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "head.pt")
    with pytest.raises(InputError, match=r"head.pt: cannot be read as safetensors"):
        Aesthetic(seeing, tmp_path / "head.pt")
    with pytest.raises(InputError, match=r"^clip: .*nowhere: does not exist"):
        ClipMatch(tmp_path / "nowhere", ("a",))
    with pytest.raises(InputError, match=r"no \*.safetensors, and nothing is unpickled"):
        ClipMatch(tmp_path / "..", ("a",))


def test_the_frechet_distance_is_torchmetrics() -> None:
    first, second = (noise.normal(noise.key(seed, torch.arange(200)), 6).double() for seed in (0, 1))
    second = 0.5 * second @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double() + 1
    moments = [part for features in (first, second) for part in (features.mean(0), features.T.cov())]
    expected = _compute_fid(*moments)
    torch.testing.assert_close(frechet_distance(first, second), expected, rtol=1e-6, atol=1e-6)
    assert float(frechet_distance(first, first)) == pytest.approx(0, abs=1e-6)
    few = frechet_distance(first[:3], second[:3])  # covariances without an inverse
    assert few.isfinite()


def test_diversity_is_the_mean_distance_within_groups() -> None:
    features, group = noise.normal(noise.key(0, torch.arange(7)), 3), torch.tensor([0, 1, 0, 1, 1, 2, 0])
    means = []
    for kind in (0, 1):
        members = features[group == kind].double()
        distances = torch.pdist(members)
        means.append(distances.mean())
    torch.testing.assert_close(diversity(features, group), torch.stack(means).mean(), rtol=1e-6, atol=1e-6)
    assert float(diversity(torch.ones(4, 3), torch.zeros(4).long())) == 0


def test_what_the_watch_says_of_real_images_and_of_one_image_again_and_again() -> None:
    judge, kinds = Judge(1, 3), torch.arange(60) % 3
    watch = Watch(judge, images(60, 1), kinds)
    same = watch(images(60, 1), kinds)
    assert float(same["distance"]) == pytest.approx(0, abs=1e-4)
    assert float(same["diversity"]) == pytest.approx(1, abs=1e-4)
    collapsed = watch(images(1, 1).expand(60, -1, -1, -1), kinds)
    assert collapsed["distance"] > 10 * same["distance"]
    assert float(collapsed["diversity"]) == pytest.approx(0, abs=1e-3)
    assert set(Watch(Thumbnails(), images(6), torch.zeros(6).long())(images(6), torch.zeros(6).long())) == {
        "distance",
        "diversity",
    }


def test_the_mix_pays_for_the_reward_and_takes_for_what_it_forgot() -> None:
    start = {"reward": -200.0, "spread": 20.0, "distance": 10.0, "diversity": 1.0, "accuracy": 0.9}
    start = {name: torch.tensor(value) for name, value in start.items()}

    def of(**now: float) -> float:
        return float(mix(start | {name: torch.tensor(value) for name, value in now.items()}, start, 1.0))

    assert of() == pytest.approx(0, abs=1e-5)
    assert of(reward=-160.0) == pytest.approx(2, abs=1e-4)
    assert of(accuracy=0.85) == pytest.approx(-1, abs=1e-4)
    assert of(accuracy=1.0, distance=1.0, diversity=2.0) == pytest.approx(0, abs=1e-5), "no gain in what is free"
    assert of(diversity=0.5) == pytest.approx(-1, abs=1e-4)
    assert of(distance=100.0) == pytest.approx(-1, abs=1e-4)
    assert of(reward=0.0, accuracy=0.1, distance=200.0, diversity=0.1) < of(reward=-160.0), "blank images lose"


def broken(predictions: Tensor, targets: Tensor) -> RewardOutput:
    total = predictions.flatten(1).mean(1)
    return RewardOutput(torch.where(targets == 7, torch.nan, total), {"all": total})


def raising(predictions: Tensor, targets: Tensor) -> Tensor:
    if bool((targets == 7).any()):
        raise RuntimeError("no face found")
    return predictions.flatten(1).mean(1)


@pytest.mark.parametrize(("reward", "said"), [(broken, "is nan"), (raising, r"raises RuntimeError\('no face found'\)")])
def test_the_image_on_which_a_reward_fails_is_named_or_skipped(reward: Any, said: str) -> None:
    targets = torch.tensor([1, 2, 7, 3])
    with pytest.raises(InputError, match=rf"^reward mine: {said} for example 2, target 7 \(1 of 4\)"):
        guarded(reward, name="mine")(images(4), targets)
    found = guarded(reward, skip=True)(images(4), targets)
    others = images(4).flatten(1).mean(1)[[0, 1, 3]]
    torch.testing.assert_close(found.total[[0, 1, 3]], others)
    assert float(found.total[2]) == pytest.approx(float(others.mean()))
    assert found.parts["skipped"].tolist() == [0, 0, 1, 0]
    with pytest.raises(InputError, match="nothing is left to learn from"):
        guarded(reward, skip=True)(images(2), torch.tensor([7, 7]))
    fine = guarded(reward)(images(2), torch.tensor([1, 2]))
    torch.testing.assert_close(fine.total, images(2).flatten(1).mean(1))


def fails_on_batches(predictions: Tensor, targets: Tensor) -> Tensor:
    if len(predictions) > 1:
        raise ValueError("one at a time")
    return predictions.flatten(1).mean(1)


def test_a_reward_that_fails_on_a_batch_but_on_no_image_is_told_so() -> None:
    with pytest.raises(InputError, match=r"^reward given: raises on the batch, but on none of its examples"):
        guarded(fails_on_batches)(images(2), torch.tensor([1, 2]))


def test_rewards_by_name_are_weighed_and_keep_their_parts() -> None:
    both = image_reward(("compressibility", "sharpness"), (0.1, 2.0), None, ())
    found = both(images(3), torch.zeros(3).long())
    expected = 0.1 * compressibility(images(3)).total + 2 * sharpness(images(3)).total
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.parts["compressibility"] + found.parts["sharpness"], found.total)
    own = image_reward((f"{__name__}:raising",), (), None, ())
    torch.testing.assert_close(own(images(2), torch.zeros(2)).total, images(2).flatten(1).mean(1))
    grey = image_reward(("colorfulness",), (), None, ())(images(2, 1), None)
    torch.testing.assert_close(grey.total, torch.zeros(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ((), (), r"^reward, weights: found none"),
        (("sharpness", "class"), (1.0,), r"^reward, weights: found sharpness, class with 1 weights"),
        (("sharpnes",), (), r"^reward: no 'sharpnes', .*'sharpness'\?"),
        (("clip",), (), r"^clip: not given, but reward clip needs it"),
        (("aesthetic",), (), r"^clip: not given"),
    ],
)
def test_rewards_that_are_none_are_refused(names: Any, weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_reward(names, weights, None, ())
