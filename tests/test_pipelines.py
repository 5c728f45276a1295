"""Pipelines of diffusers as they lie in folders: read whole, without unpickling, with text encoder, VAE and LoRA."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

import foveate
from foveate import commands, noise
from foveate.agents import Agent, policy_of
from foveate.cli import main
from foveate.judging import drawn_images
from foveate.learn.answers import divergence
from foveate.models.diffusion import ClassDenoiser, small_unet
from foveate.models.named_denoisers import read_prompts
from foveate.models.pipelines import TextDenoiser, read_pipeline
from foveate.parts import restored
from foveate.rewards.images import ClipMatch
from foveate.run import Run
from foveate.systems import diffusion
from foveate.types import InputError
from test_image_rewards import tiny_clip, tokenizer

KEYS = noise.key(0, torch.arange(2))
TINY = {"steps": 4, "inputs": 2, "samples": 2, "looks": 4, "images": 6, "denoising": 3, "device": "cpu"}


def text_pipeline(folder: Path, scheduler: Any = None, vae: bool = True) -> Path:
    """A Stable Diffusion of a few thousand weights, built from configs and saved."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=50, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4 if vae else 3,
        out_channels=4 if vae else 3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    coder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    tokenizer(folder / "words")
    words = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    StableDiffusionPipeline(
        vae=coder,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    if not vae:
        shutil.rmtree(folder / "vae")
        relisted(folder, vae=[None, None])
    return folder


def relisted(folder: Path, **parts: Any) -> Path:
    """With other entries in its index."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | parts))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a bad cab\nfeed a face\ndead beef\n")
    return path


def test_without_chance_it_draws_what_the_pipeline_draws(text: Path) -> None:
    """Greedy: the same latents, prompt and guidance, DDIM's steps with eta 0."""
    policy = read_pipeline(str(text), ["a bad cab", "feed a face"], 4, guidance=3.0)
    assert isinstance(policy, TextDenoiser)
    chain = policy.sample(torch.tensor([1, 0]), 1, True, KEYS)
    pipeline = StableDiffusionPipeline.from_pretrained(text, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        ["feed a face", "a bad cab"],
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=chain.start,
        output_type="pt",
        height=16,
        width=16,
    ).images
    torch.testing.assert_close(policy.decode(chain), drawn, rtol=1e-3, atol=1e-3)
    assert policy.image == (3, 16, 16)


def test_scores_guidance_and_codes_go_through(text: Path) -> None:
    policy = read_pipeline(str(text), ["a bad cab", "feed a face"], 4, guidance=2.0, chunk=2)
    inputs = torch.tensor([0, 1])
    chain = policy.sample(inputs, 2, False, KEYS)
    images = policy.decode(chain)
    assert images.shape == (4, 3, 16, 16)
    assert policy(inputs, chain).log_probs.isfinite().all()
    coded = policy.encode(images)
    assert coded.shape == (4, 4, 8, 8)
    none = policy.without(policy.conditions(inputs))
    torch.testing.assert_close(none[0], none[1])
    assert not torch.allclose(none[0], policy.conditions(inputs)[0])
    assert not any("vae" in name or "prompts" in name for name in policy.state_dict())


def test_large_images_are_drawn_and_decoded_a_few_at_a_time(text: Path) -> None:
    policy = read_pipeline(str(text), ["a bad cab", "feed a face"], 4, guidance=2.0, chunk=2)
    rows: list[int] = []
    policy.network.register_forward_hook(lambda module, given, made: rows.append(len(given[0])))
    vae = policy._vae[0]
    whole = (vae.decode, vae.encode)
    for name, call in zip(("decode", "encode"), whole, strict=True):
        setattr(vae, name, lambda x, call=call, **how: rows.append(2 * len(x)) or call(x, **how))
    inputs, found = torch.tensor([0, 1]), []
    for at_once in (100, 3):
        policy.at_once = at_once
        rows.clear()
        with torch.no_grad():
            chain = policy.sample(inputs, 4, False, KEYS)
            images = policy.decode(chain)
            found.append((chain.drawn, images, policy.encode(images)))
            assert max(rows) == 2 * min(8, at_once)
            far = divergence(policy, policy, inputs, chain)
            assert max(rows) == 2 * 2 * min(8, at_once), "of both steps of a piece"
        assert far.shape == (8,)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    rows.clear()
    policy(inputs, chain, slice(0, 1))
    assert max(rows) == 16, "with a graph the batch is whole: `Tuning.chunk` is what makes it smaller"
    policy.at_once = None
    for side, most in ((16, 100), (64, 100), (128, 25), (512, 1), (1024, 1)):
        policy.image = (3, side, side)
        assert policy.together() == most
    config = diffusion.Config(samples=4)
    chunks = [diffusion._tuning(replace(config, at_once=at_once), 0.0).chunk for at_once in (1, 4, 9, 100)]
    assert chunks == [1, 1, 2, 25]


def test_a_pipeline_without_text_is_told_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = small_unet(8, 1, 10, (8, 16))
    DDPMPipeline(network, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "digits")
    policy = read_pipeline(str(tmp_path / "digits"), None, 4)
    assert isinstance(policy, ClassDenoiser)
    assert policy.table.target == "v_prediction"
    for name, weight in network.state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], weight)
    found = foveate.train(
        "diffusion", model=f"hf:{tmp_path / 'digits'}", likelihood_share=0.0, anchors=(), out=tmp_path / "run", **TINY
    )
    evaluation = json.loads((found.folder / "evaluation.json").read_text())
    assert set(evaluation["baselines"]) == {"start", "data"}
    assert "judge_accuracy" in evaluation["metrics"]
    DDPMPipeline(small_unet(8, 1, 7, (8, 16)), DDPMScheduler()).save_pretrained(tmp_path / "seven")
    with pytest.raises(InputError, match="is told 8 classes, expected 10, or one more"):
        foveate.train("diffusion", model=f"hf:{tmp_path / 'seven'}", out=tmp_path / "other", **TINY)


def test_what_is_missing_or_of_another_kind_is_named(text: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, words: Any = ("a",), **how: Any) -> None:
        with pytest.raises(InputError, match=message):
            read_pipeline(str(folder), words, 4, **how)

    for part in ("unet", "scheduler", "text_encoder", "tokenizer", "vae"):
        copied = shutil.copytree(text, tmp_path / part)
        shutil.rmtree(copied / part)
        refused(copied, rf"has no '{part}', expected unet, scheduler, text_encoder, tokenizer")
    (tmp_path / "unet" / "model_index.json").unlink()
    refused(tmp_path / "unet", "has no readable model_index.json")
    pickled = shutil.copytree(text, tmp_path / "pickled")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    refused(pickled, r"unet has diffusion_pytorch_model.bin, expected safetensors, as nothing is unpickled")
    cut = shutil.copytree(text, tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused(cut, "its unet cannot be read")
    for number, (entry, message) in enumerate(
        (
            ({"unet": ["diffusers", "UNet1DModel"]}, "has the denoiser 'UNet1DModel', expected one of UNet2DModel, UN"),
            ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, r"draws by 'text_encoder_2' too"),
            ({"vqvae": ["diffusers", "VQModel"]}, r"draws by 'vqvae' too, a VQModel, expected unet, .* alone"),
            ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder of .* is a T5Enc.*expected CLIPTextM"),
            ({"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "vae of .* is a Asym.*, expected AutoencoderKL"),
            ({"scheduler": [None, None]}, "has no 'scheduler', expected unet, scheduler, text_encoder, tokenizer"),
            ({"vae": [None, None]}, "denoises 4 channels and has no 'vae' that makes images of them, expected 1 or 3"),
        )
    ):
        refused(relisted(shutil.copytree(text, tmp_path / f"other{number}"), **entry), message)
    unused = {"safety_checker": ["diffusers", "Checker"], "requires_safety_checker": True, "image_encoder": [None] * 2}
    read_pipeline(str(relisted(shutil.copytree(text, tmp_path / "unused"), **unused)), ["a"], 4)
    refused(text, r"^prompts: .* reads prompts: add --prompts FILE", None)
    refused(text, r"^eta: found 0", eta=0.0)
    refused(tmp_path / "nowhere", "is no folder, and no repository OWNER/NAME")


def test_a_text_pipeline_of_pixels_is_tuned_as_one_of_latents(prompts: Path, tmp_path: Path) -> None:
    folder = text_pipeline(tmp_path / "pixels", vae=False)
    policy = read_pipeline(str(folder), ["a bad cab", "feed a face"], 4)
    assert policy.image == policy.shape == (3, 8, 8)
    chain = policy.sample(torch.tensor([1, 0]), 1, False, KEYS)
    torch.testing.assert_close(policy.decode(chain), ((chain.drawn[:, -1] + 1) / 2).clamp(0, 1))
    *_, rows = trained(tmp_path / "run", model=f"hf:{folder}", prompts=prompts, anchors=(), **TINY)
    assert any(row["phase"] == "reward" and row["reward"] < 0 for row in rows)


def test_of_a_repository_only_what_is_read_is_fetched(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository with what Stable Diffusion's has beside: copies in half precision, a checker, one large file."""
    repository = shutil.copytree(text, tmp_path / "repository")
    relisted(repository, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    beside = ["v1-5-pruned.safetensors", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin"]
    for part in ("unet", "vae"):
        beside += [f"{part}/diffusion_pytorch_model.{copy}.safetensors" for copy in ("fp16", "non_ema")]
    for name in beside:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("large")
    fetched: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "owner/name"
        paths = [str(path.relative_to(repository)) for path in sorted(repository.rglob("*")) if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / path, tmp_path / "cache" / path)
            fetched.append(path)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    policy = read_pipeline("owner/name", ["a"], 4)
    assert fetched[0] == "model_index.json", "what cannot be read is refused before the weights come"
    assert not set(fetched) & set(beside)
    for name, weight in read_pipeline(str(text), ["a"], 4).state_dict().items():
        assert torch.equal(policy.state_dict()[name], weight)
    fetched.clear()
    relisted(repository, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(InputError, match=r"^model: owner/name draws by 'text_encoder_2' too"):
        read_pipeline("owner/name", ["a"], 4)
    assert fetched == ["model_index.json"]

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("\nthere is no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(
        InputError, match=r"^model: owner/name is no folder, and cannot be fetched: there is no network$"
    ):
        read_pipeline("owner/name", ["a"], 4)


def test_a_scheduler_without_chance_is_named_and_replaced_if_asked(text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text, tmp_path / "pndm")
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True).save_pretrained(folder / "scheduler")
    with pytest.raises(
        InputError, match=r"^scheduler: found PNDMScheduler, with no Gaussian steps, .* --scheduler ddim"
    ):
        read_pipeline(str(folder), ["a"], 4)
    policy = read_pipeline(str(folder), ["a"], 4, scheduler="ddim")
    expected = PNDMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(policy.alphas, expected)


def test_prompts_are_read_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red square\n a café \n", encoding="utf-8")
    assert read_prompts(path) == ("a red square", "a café")
    for content, message in (
        ("one\n\nthree\n", r"prompts.txt: line 2 is empty"),
        ("one\n \n", r"prompts.txt: line 2 is empty"),
        ("one\ntwo\n\n\n", r"prompts.txt: line 3 is empty"),
        ("", r"prompts.txt: is empty"),
        ("\n", r"prompts.txt: is empty"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_prompts(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        read_prompts(path)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(("content", "said"), [("one\n\nthree\n", "line 2 is empty"), ("one\n\n\n", "line 2 is empty")])
def test_an_empty_prompt_stops_the_command(
    content: str, said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(content)
    words = ["--model", f"hf:{text}", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "4"]
    assert main(["train", "diffusion", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"prompts.txt: {said}, expected a prompt a line" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tuned(text: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Agent:
    """A text pipeline with LoRA, tuned for a few steps."""
    return foveate.train(
        "diffusion",
        model=f"hf:{text}",
        prompts=prompts,
        lora=2,
        guidance=2.0,
        reward=("colorfulness",),
        anchors=(),
        out=tmp_path_factory.mktemp("tuned") / "run",
        **TINY,
    )


def test_a_text_pipeline_is_tuned_by_its_adapter_alone(tuned: Agent, text: Path, capsys: Any) -> None:
    state = tuned.policy.state_dict()
    assert state
    assert all("lora_" in name for name in state)
    saved = sorted((tuned.folder / "checkpoints").glob("[0-9]*"))[-1] / "policy.safetensors"
    assert saved.stat().st_size < 40_000 < (text / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    kept = {path.name: path.stat().st_size for path in saved.parent.glob("*.safetensors")}
    assert kept.get("likelihood.safetensors", 0) < 1000, "the start stays in its folder"
    start = diffusion.build(tuned.config, False)
    for name, weight in start.network.state_dict().items():
        own = tuned.policy.network.state_dict()
        assert torch.equal(own.get(name, own.get(name.replace(".weight", ".base_layer.weight"), weight)), weight)
    evaluation = json.loads((tuned.folder / "evaluation.json").read_text())
    assert set(evaluation["metrics"]) == {"reward", "frechet_distance", "diversity", "kl"}
    assert set(evaluation["baselines"]) == {"start"}
    assert evaluation["baselines"]["start"]["kl"] == 0
    assert tuned(torch.rand(2, 3, 16, 16))["images"].shape == (2, 3, 16, 16)
    assert main(["eval", str(tuned.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == evaluation["metrics"]
    assert main(["analyse", str(tuned.folder), "--samples", "100", "--images", "1"]) == 0


def trained(folder: Path, **settings: Any) -> tuple[diffusion.Config, Run, list[dict[str, Any]]]:
    """A run without its evaluation and report: its settings, itself, and its log."""
    config = diffusion.resolve(
        diffusion.Config(**{name: value for name, value in settings.items() if name != "device"})
    )
    run = Run(folder, system="diffusion", config=asdict(config), steps=config.steps, device="cpu", quiet=True)
    diffusion.train(config, run)
    return config, run, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_clip_rewards_read_the_prompts(text: Path, prompts: Path, tmp_path: Path) -> None:
    how = {"reward": ("clip", "colorfulness"), "weights": (1.0, 0.1), "clip": tiny_clip(tmp_path / "clip")}
    config, run, rows = trained(tmp_path / "run", model=f"hf:{text}", prompts=prompts, anchors=(), **how, **TINY)
    row = next(row for row in rows if row["phase"] == "reward")
    assert row["part clip"] + row["part colorfulness"] == pytest.approx(row["reward"], abs=1e-3)
    found = diffusion.evaluate(config, policy_of(diffusion, config, run), run).metrics
    assert found["clip_reward"] + found["colorfulness_reward"] == pytest.approx(found["reward"], abs=1e-3)


def test_clip_watches_beside_prompts_unless_it_is_what_is_optimised(text: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    watched = {}
    for name, reward, clip in (
        ("plain", "colorfulness", None),
        ("seen", "colorfulness", folder),
        ("sought", "clip", folder),
    ):
        config = diffusion.resolve(
            diffusion.Config(model=f"hf:{text}", prompts=prompts, denoising=3, reward=(reward,), clip=clip)
        )
        start = diffusion.build(config)
        contest = diffusion._contest(config, {}, start, "val", 6, torch.device("cpu"))
        watched[name] = contest.watch.real
        if name == "seen":
            images, _ = drawn_images(start, contest.kinds, noise.fold(contest.keys, "real"))
            own = ClipMatch(folder, ("a",)).embed(images)
            torch.testing.assert_close(contest.watch.real, own)
            assert contest.look(start, 0.4)["held_out_distance"].isfinite()
    assert torch.equal(watched["plain"], watched["sought"])
    assert watched["plain"].shape == (6, 108), "colours of 6x6 regions"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": 0.0}, r"^anchors: found .* expected different ones"),
        ({"inputs": 0}, r"^inputs: found 0"),
        ({"likelihood_share": 0.99}, r"^judge_share, likelihood_share: "),
        ({"temperature": 0.0}, r"^temperature: found 0"),
        ({"samples": 1}, r"^samples: found 1, but normalised"),
        ({"eta": 0.0}, r"^eta: found 0, with which no step is random"),
        ({"model": "large"}, r"^model: no 'large', expected small or hf:"),
        ({"prompts": Path("prompts.txt")}, r"^prompts: given, but model small is told classes"),
        ({"reward": ("clip",)}, r"^clip: not given"),
        ({"reward": ("sharp",)}, r"^reward: no 'sharp'"),
        ({"image_size": 10}, r"^image_size, widths: 10 pixels"),
        ({"data": "digit"}, r"^data: no 'digit'"),
        ({"estimator": "weighted"}, r"^anchor, anchors: estimator weighted has no KL .* add --anchor 0 --anchors$"),
        ({"estimator": "weighted", "anchor": 0.0, "anchors": (1.0,)}, r"^anchor, anchors: estimator weighted"),
        ({"inputs": 11}, r"^inputs: found 11, expected at most 10: each class or prompt once"),
        ({"at_once": 0}, r"^at_once: found 0"),
        ({"judge_share": 0.0}, r"^judge_share: 0, but what it teaches knows nothing yet; raise it, or add --from RUN"),
        ({"reward": (f"{__name__}:dim",)}, r"^dim: found 16x16, expected 4x4"),
    ],
)
def test_settings_that_teach_nothing_are_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        foveate.train("diffusion", out=tmp_path / "run", **{**TINY, **settings})
    assert not (tmp_path / "run").exists()


def dim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if images.shape[2:] != (4, 4):
        raise InputError(f"dim: found {images.shape[3]}x{images.shape[2]}, expected 4x4")
    return -images.flatten(1).mean(1)


def test_a_reward_that_prompts_do_not_have_is_refused(text: Path, prompts: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"reward": ("class",)}, r"^reward: 'class' needs classes"),
        ({"inputs": 4}, r"^inputs: found 4, expected at most 3"),
    ):
        with pytest.raises(InputError, match=message):
            foveate.train(
                "diffusion", model=f"hf:{text}", prompts=prompts, out=tmp_path / "run", **{**TINY, **settings}
            )
        assert not (tmp_path / "run").exists()
    config = diffusion.Config(model=f"hf:{text}", prompts=prompts)
    assert diffusion.resolve(config).inputs == 3, "as many as there are, if nothing is said"


def test_a_start_of_another_run_is_tuned_without_learning_it_again(tmp_path: Path) -> None:
    """And its answers are compared, and what was learned of them is the reward."""
    other = tmp_path / "other"
    foveate.train("diffusion", out=other, **{**SMALL, "steps": 20})
    found = commands.prefer(other, judge="sharpness", comparisons=60, noise=0.0, inputs=100, device="cpu")
    assert found["left"] + found["right"] + found["tie"] == 60
    assert min(found["left"], found["right"]) > 0
    foveate.train("reward-model", data="comparisons", root=other, steps=4, out=tmp_path / "taste", device="cpu")
    own = {**SMALL, "likelihood_share": 0.0, "judge_share": 0.0, "reward": (f"preference:{tmp_path / 'taste'}",)}
    agent = foveate.train("diffusion", source=other, out=tmp_path / "run", **own)
    mine, theirs = (
        restored(Run.open(folder), {"start": "likelihood"}, partial(diffusion.build, agent.config, False))["start"]
        for folder in (agent.folder, other)
    )
    for here, there in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(here, there)
    for settings, message in (
        ({}, r"^judge_share, likelihood_share: 0, but what it teaches knows nothing yet"),
        ({"image_size": 16}, r"^reward preference:.*: judges pictures of 8x8, found 16x16"),
    ):
        with pytest.raises(InputError, match=message):
            foveate.train("diffusion", out=tmp_path / "nothing", **{**own, **settings})
        assert not (tmp_path / "nothing").exists()


def dark_fails(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    found = images.flatten(1).mean(1)
    return torch.where(targets == 3, torch.nan, found)


SMALL = {"widths": (8, 16), "image_size": 8, "batch": 4, "anchors": (), **TINY, "inputs": 10}


def test_a_reward_that_fails_stops_the_run_or_skips_the_image(tmp_path: Path) -> None:
    own = {**SMALL, "reward": (f"{__name__}:dark_fails",)}
    with pytest.raises(InputError, match=r"dark_fails: is nan for example \d+, target 3"):
        trained(tmp_path / "stops", **own)
    *_, rows = trained(tmp_path / "skips", skip_bad=True, **own)
    assert [row["part skipped"] for row in rows if "part skipped" in row] == [pytest.approx(0.1)]


@pytest.mark.parametrize(
    "settings", [{"estimator": "clipped", "epochs": 2, "lora": 2}, {"estimator": "weighted", "anchor": 0.0}]
)
def test_every_estimator_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    config, run, rows = trained(tmp_path / "run", **SMALL, **settings)
    (row,) = [row for row in rows if row["phase"] == "reward"]
    assert row["reward"] < 0
    if config.estimator == "clipped":
        assert row["ratio"] == pytest.approx(1, abs=1e-6)
        assert row["kl"] == pytest.approx(0, abs=1e-3)
    for name in ("likelihood", "control"):
        assert run.restore(name, diffusion.build(config, False))
    assert run.restore("policy", diffusion.build(config))


def test_an_evaluation_and_its_pictures_show_every_anchor_on_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**SMALL, "steps": 8, "every": 1, "looks": 4, "anchors": (0.0, 1.0)}
    config, run, rows = trained(tmp_path / "run", **how)
    looks = [row for row in rows if "held_out_kl" in row]
    assert {row["phase"] for row in looks} == {"reward", "reward, anchor 0", "reward, anchor 1"}
    assert max(row["held_out_kl"] for row in looks) > 0
    start = restored(run, {"start": "likelihood"}, partial(diffusion.build, config, False))["start"]
    curves = diffusion.evaluate(config, start, run).curves
    assert set(curves) == {
        "frechet distance against reward",
        "judge accuracy against reward",
        "frechet distance against kl",
    }
    assert all(set(curve) == {"anchor 0.3 (kept)", "anchor 0", "anchor 1"} for curve in curves.values())
    drawn: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(diffusion.denoising, "frames", lambda steps, names: drawn.update(steps) or ["last"])
    assert diffusion.picture(config, start, run)["before and after"] == "last"
    assert list(drawn) == ["start", "control", "anchor 0", "anchor 1", "tuned"]
    for before, after in zip(drawn["start"], drawn["tuned"], strict=True):
        assert torch.equal(before, after), "the same weights on the same noise"
    assert not torch.equal(drawn["start"][0][0], drawn["start"][0][1])
    assert not torch.equal(drawn["start"][-1], drawn["control"][-1])


def test_a_run_on_coloured_pictures(tmp_path: Path) -> None:
    for number in range(60):
        pixels = 255 * noise.uniform(noise.key("coloured", number), 8, 8, 3)
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.byte().numpy()).save(path)
    how = {**SMALL, "data": "folder", "root": tmp_path / "pictures", "inputs": 2, "reward": ("colorfulness",)}
    config, run, rows = trained(tmp_path / "run", **how)
    assert (config.channels, config.classes) == (3, ("a", "b"))
    assert [row["reward"] > 0 for row in rows if "reward" in row] == [True]
    policy = policy_of(diffusion, config, run)
    found = diffusion.evaluate(config, policy, run).metrics
    assert found["reward"] > 0
    assert found["frechet_distance"] > 0
    assert diffusion.predict(config, policy, torch.rand(2, 3, 8, 8))["images"].shape == (2, 3, 8, 8)
    assert diffusion.picture(config, policy, run)["before and after"].mode == "RGB"


CALLS: list[int] = []  # what is left of the calls of `interrupted`; empty: it is never


def interrupted(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if CALLS:
        CALLS[0] -= 1
        if CALLS[0] == 0:
            CALLS.clear()
            raise KeyboardInterrupt
    return images.flatten(1).mean(1)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.run.loop.CHECKPOINT_SECONDS", 0.0)
    how = {**SMALL, "steps": 12, "every": 1, "lora": 2, "subset": 0.5, "reward": (f"{__name__}:interrupted",)}
    config, whole, _ = trained(tmp_path / "whole", **how)
    CALLS.append(8)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", **how)
    assert not CALLS
    again = Run(
        tmp_path / "cut", system="diffusion", config=asdict(config), device="cpu", quiet=True, resume=True, steps=12
    )
    diffusion.train(config, again)
    for name in ("policy", "control"):
        first, second = (diffusion.build(config, name == "policy") for _ in range(2))
        assert whole.restore(name, first)
        assert again.restore(name, second)
        state = second.state_dict()
        assert all(torch.equal(weight, state[key]) for key, weight in first.state_dict().items())


def test_pictures_of_another_size_or_mode_are_refused() -> None:
    config = diffusion.resolve(diffusion.Config(image_size=8, widths=(8, 16), denoising=3))
    policy = diffusion.build(config)
    assert diffusion.predict(config, policy, torch.rand(3, 1, 8, 8))["images"].shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match=r"^images: \[1, 9, 9\] .* but trained on \[1, 8, 8\]"):
        diffusion.predict(config, policy, torch.rand(3, 1, 9, 9))
    with pytest.raises(InputError, match=r"^images: \[3, 8, 8\]"):
        diffusion.predict(config, policy, torch.rand(2, 3, 8, 8))
