"""Captioners of Hugging Face as samplers, what they are read from, and the system that tunes them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocoevalcap.cider.cider import Cider as OfficialCider
from torch import Tensor, nn

import foveate
from foveate import commands, noise
from foveate.cli import main
from foveate.data.captions import load_captions, words_of
from foveate.learn.answers import reward_loss, score
from foveate.learn.baselines import MovingAverage
from foveate.learn.settings import Tuning
from foveate.models.encoder_decoder import Tokens
from foveate.models.hf_captioner import TextCaptioner, adapted, word_tokenizer
from foveate.models.named_captioners import named_captioner, small_captioner
from foveate.rewards.captions import Words
from foveate.systems import tune_captioner
from foveate.systems.tune_captioner import Config
from foveate.types import InputError, RewardOutput
from test_captioning import few_scenes, folder  # noqa: F401
from test_docs import ROOT, blocks

transformers = pytest.importorskip("transformers")

WORDS = ("", "<unknown>", *["a", "red", "blue", "thing", "on", "grass", "and", "sand"])
SIZES = {"side": 16, "patch": 8, "vocabulary": len(WORDS), "width": 16, "depth": 2, "heads": 2}
TINY = {"width": 16, "depth": 1, "batch": 8, "tuning_batch": 8, "samples": 3, "every": 100, "device": "cpu"}
both = pytest.mark.parametrize("name", ["small", "small-blip"])


@pytest.fixture(autouse=True)
def no_cache(few_scenes: None) -> None:  # noqa: F811
    tune_captioner._load.cache_clear()


def small(name: str, length: int = 6, **how: Any) -> TextCaptioner:
    torch.manual_seed(2)
    model = small_captioner(name, length, **SIZES)
    model.spell(WORDS)
    with torch.no_grad():  # as after training: scores that differ
        for place, weight in model.named_parameters():
            looks = weight.ndim == 4 or "crossattention" in place  # what makes captions depend on the image
            weight.mul_(1 if weight.ndim == 1 else 10 if looks else 4)
    for attribute, value in how.items():
        setattr(model, attribute, value)
    return model.eval()


def images(batch: int = 4, side: int = 16) -> Tensor:
    return noise.uniform(noise.key(0, "images", torch.arange(batch)), 3, side, side)


def keys(batch: int = 4) -> Tensor:
    return noise.key(0, "keys", torch.arange(batch))


# The sampler


@both
def test_greedy_captions_are_those_of_generate(name: str) -> None:
    model = small(name)
    found = model.sample(images(16), 1, True, keys(16))
    shown = (images(16) - model.mean) / model.std
    model.model.generation_config.pad_token_id = 0
    wanted = model.model.generate(shown, do_sample=False, num_beams=1, max_new_tokens=6)[:, 1:]
    assert torch.equal(found.ids, nn.functional.pad(wanted, (0, found.ids.shape[1] - wanted.shape[1])))
    assert model.decode(found) == model.tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert len(found.ids.unique(dim=0)) > 2


@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_drawn_with_a_cache_is_drawn_from_the_parallel_pass(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = small(name, temperature=temperature), list[Tensor]()
    distribution = model._distribution
    monkeypatch.setattr(model, "_distribution", lambda scores: (seen.append(scores), distribution(scores))[1])
    drawn = model.sample(images(), 3, False, keys())
    cached, used = torch.cat(seen, 1), drawn.mask
    found = model(images(), drawn)
    torch.testing.assert_close(found.distribution.logits[used], cached[used] / temperature, rtol=1e-5, atol=1e-5)
    streams = noise.fold(keys()[:, None], "sample", torch.arange(3)).flatten()
    again = found.distribution.sample(noise.fold(streams[:, None], "token", torch.arange(drawn.ids.shape[1])))
    assert torch.equal(again[used], drawn.ids[used])
    torch.testing.assert_close(found.log_probs[used], found.distribution.log_prob(drawn.ids)[used])
    part = model(images(), drawn, slice(1, 3))
    torch.testing.assert_close(part.log_probs, found.log_probs[:, 1:3])
    assert torch.equal(found.mask, used)


@both
def test_after_the_end_nothing_counts_and_a_row_depends_on_its_image_and_key_alone(name: str) -> None:
    model = small(name)
    drawn = model.sample(images(20), 3, False, keys(20))
    lengths = drawn.mask.sum(1)
    assert len(lengths.unique()) > 2
    assert torch.equal(drawn.mask, torch.arange(drawn.ids.shape[1]) < lengths[:, None])
    last = drawn.ids.gather(1, lengths[:, None] - 1).squeeze(1)
    assert ((last == 0) | (lengths == 6)).all()
    other = Tokens(drawn.ids.masked_fill(~drawn.mask, 3), drawn.mask)
    found, changed = (model(images(20), each).log_probs[drawn.mask] for each in (drawn, other))
    torch.testing.assert_close(found, changed)
    part = model.sample(images(20)[5:7], 3, False, keys(20)[5:7])
    assert torch.equal(part.ids, drawn.ids[15:21, : part.ids.shape[1]])


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model = small("small", length=2)
    drawn = model.sample(images(1), 4000, False, keys(1))
    first = model(images(1), drawn).distribution.logits[0, 0].softmax(0)
    counts = drawn.ids[:, 0].bincount(minlength=len(first)) / 4000
    torch.testing.assert_close(counts, first.detach(), rtol=0, atol=0.03)


@both
def test_an_image_is_seen_once_for_all_its_captions(name: str) -> None:
    model, seen = small(name), list[int]()
    eye = model.model.encoder if name == "small" else model.model.vision_model
    eye.register_forward_hook(lambda module, given, found: seen.append(len(found[0])))
    drawn = model.sample(images(), 5, False, keys())
    model(images(), drawn)
    assert seen == [4, 4]


@both
def test_the_ratio_is_one_before_the_first_update(name: str) -> None:
    model = small(name).train()
    tuning = Tuning(samples=3)

    def reward(captions: list[str], targets: Tensor) -> RewardOutput:
        return RewardOutput(torch.tensor([float(len(text)) for text in captions]))

    scored = score(model, reward, images(), torch.zeros(4), keys(), tuning, MovingAverage())
    _, told = reward_loss(model(images(), scored.actions), scored, None, tuning)
    assert float(told["ratio"]) == pytest.approx(1, abs=1e-5)


@both
def test_a_prompt_is_given_and_no_part_of_the_caption(name: str) -> None:
    plain = small(name, length=8)
    model = adapted(plain.model, word_tokenizer(plain.words), 16, 6, "a red").eval()
    assert model.start == [len(WORDS), 2, 3]
    drawn = model.sample(images(), 2, False, keys())
    whole = torch.cat((torch.tensor([[2, 3]]).expand(8, -1), drawn.ids), 1)
    known = torch.cat((torch.ones(8, 2, dtype=torch.bool), drawn.mask), 1)
    expected = plain(images(), Tokens(whole, known)).log_probs[:, 2:]
    torch.testing.assert_close(model(images(), drawn).log_probs, expected)


def test_dropout_stands_still_while_answers_are_scored_and_drops_in_likelihood() -> None:
    model = small("small")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    answers = Tokens(torch.tensor([[2, 3, 5, 0]] * 4), torch.ones(4, 4, dtype=torch.bool))
    assert torch.equal(model(images(), answers).log_probs, model(images(), answers).log_probs)
    model.train()
    assert not torch.equal(model(images(), answers).log_probs, model(images(), answers).log_probs)


# Tokens and words


def test_texts_become_tokens_with_an_end_and_come_back() -> None:
    model = small("small", length=5)
    said = [["a red thing", "a zebra"], ["a blue thing on grass and sand"]]
    ids, mask = model.answers(said)
    assert ids.tolist()[0] == [[2, 3, 5, 0, 0], [2, 1, 0, 0, 0]]
    assert mask.sum(2).tolist() == [[4, 3], [0, 0]]  # one is too long, one does not exist
    assert model.decode(Tokens(ids[0], mask[0])) == ["a red thing", "a"]


def bpe() -> Any:
    """A tokenizer of bytes as GPT-2 has one, of a few merges; its id 0 is a letter, not an end."""
    from tokenizers import ByteLevelBPETokenizer

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(["a red thing on a red grass", "a blue thing"] * 5, vocab_size=290, min_frequency=2)
    inner.add_special_tokens(["<|endoftext|>"])
    tokens = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, **tokens)


def test_pieces_of_words_are_put_together_before_they_are_scored() -> None:
    """Start, end and padding are one token, as in GPT-2's captioners, and id 0 is a letter."""
    tokenizer = bpe()
    end = tokenizer.eos_token_id
    eye = transformers.ViTConfig(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 40, "n_embd": 8, "n_layer": 1, "n_head": 1}
    writer = transformers.GPT2Config(**sizes, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, writer)
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = end
    model = adapted(transformers.VisionEncoderDecoderModel(config), tokenizer, 16, 30)
    assert model.start == model.ends == [end]
    texts = ["a red thing on grass", "a purple zebra"]
    ids, mask = model.answers([texts])
    assert mask.sum() > 12  # more pieces than words
    assert model.decode(Tokens(ids[0], mask[0])) == texts
    references = Words(torch.tensor([[[2, 3, 5, 6, 7]], [[2, 4, 5, 6, 9]]]), torch.ones(2, 1, 5, dtype=torch.bool))
    reward = tune_captioner._reward(references, WORDS)
    found = reward(
        ["A red thing on grass!", "", "zebra zebu"], Words(*(x[[0, 0, 0]] for x in vars(references).values()))
    )
    assert found.total[0] == pytest.approx(10)
    assert found.total[1:].tolist() == [0, 0]


def test_words_are_kept_with_the_weights() -> None:
    other = small_captioner("small", 6, **SIZES)
    other.load_state_dict(small("small").state_dict())
    assert other.words == ("<end>", *WORDS[1:], "<begin>")
    assert other.tokenizer.decode([2, 3, 0], skip_special_tokens=True) == "a red"


# What is read


def saved(path: Path, name: str = "small", **changes: Any) -> Path:
    """A folder as a user has it."""
    model = small(name)
    model.model.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    size = {"height": 16, "width": 16} | changes
    transformers.ViTImageProcessor(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(
        path
    )
    return path


@both
def test_a_folder_is_read_without_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refused(*arguments: Any, **others: Any) -> None:
        raise AssertionError("asked the network")

    path = saved(tmp_path / "model", name)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    model = named_captioner(f"hf:{path}", 6).eval()
    assert model.side == 16
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    original = small(name)
    shown = images() * model.std + model.mean
    given = images() * original.std + original.mean
    one, other = model.sample(shown, 1, True, keys()), original.sample(given, 1, True, keys())
    assert torch.equal(one.ids, other.ids)
    assert model.decode(one) == original.decode(other)


def remove(*names: str) -> Any:
    return lambda path: [each.unlink() for name in names for each in path.glob(name)]


def changed(name: str, **values: Any) -> Any:
    def change(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | values))

    return change


def another(kind: str) -> Any:
    def change(path: Path) -> None:
        settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        if kind == "bert":
            transformers.BertModel(transformers.BertConfig(vocab_size=12, **settings)).save_pretrained(path)
        else:  # BLIP for questions has the same type
            text, eye = {**settings, "vocab_size": 12, "encoder_hidden_size": 8}, {**settings, "image_size": 16}
            config = transformers.BlipConfig(text_config=text, vision_config={**eye, "patch_size": 8})
            transformers.BlipForImageTextRetrieval(config).save_pretrained(path)

    return change


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def endless(path: Path) -> None:
    content = json.loads((path / "config.json").read_text())
    for place in (content, content["decoder"]):
        place["eos_token_id"] = None
    (path / "config.json").write_text(json.dumps(content))
    (path / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("config.json"), "has no config.json, expected config.json: put there what save_pretrained writes"),
        (remove("tokenizer*"), "has no tokenizer.json or vocab.txt .*expected a tokenizer"),
        (remove("preprocessor_config.json", "processor_config.json"), "expected an image processor"),
        (another("bert"), "is a 'bert', expected a captioner: vision-encoder-decoder or blip"),
        (another("blip"), "lacks the weights 'text_decoder"),
        (pickled, "has pytorch_model.bin, expected model.safetensors, as nothing is unpickled: save it anew"),
        (remove("*.safetensors"), "has no weights, expected model.safetensors"),
        (
            changed("preprocessor_config.json", size={"height": 32, "width": 32}),
            "makes pictures of 32x32 pixels, the model reads 16x16",
        ),
        (endless, r"the token that ends a caption is \[\], expected one of its 11 tokens"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "model.safetensors").write_bytes(b"cut"), "cannot be read"),
        (lambda path: bpe().save_pretrained(path), "its tokenizer has 277 tokens, the model writes 11"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_no_captioner_is_told_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    change(saved(tmp_path / "model"))
    with pytest.raises(InputError, match=f"^model: .*{said}") as found:
        named_captioner(f"hf:{tmp_path / 'model'}")
    assert "\n" not in str(found.value)


def of_the_user() -> TextCaptioner:
    return small("small")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("large", "'large' is not found .*expected small, small-blip, hf:FOLDER_OR_REPOSITORY or package"),
        ("hf:", "'hf:' is not found"),
        ("hf:./nowhere", r"\./nowhere is no folder, and no repository OWNER/NAME"),
        ("hf:some/where/else", "is no folder, and no repository"),
        ("math:captioner", "'math:captioner' is not found"),
        ("builtins:dict", "gave dict, expected a TextCaptioner"),
    ],
)
def test_a_model_that_is_none(name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^model: .*{said}"):
        named_captioner(name)
    assert isinstance(named_captioner("test_tune_captioner:of_the_user"), TextCaptioner)


def test_a_folder_that_is_not_there_is_not_looked_for_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*_: Any, **__: Any) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", nowhere)
    with pytest.raises(InputError, match=r"^model: models/blip is no folder, and cannot be had .*there is no network$"):
        named_captioner("hf:models/blip")
    assert "models/blip is no folder: asking Hugging Face" in capsys.readouterr().err


def test_transformers_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^model: .*need transformers .*pip install 'foveate\[captioners\]'"):
        named_captioner("small", 5, **SIZES)


# The system


def test_the_score_is_the_official_one_of_the_captions_it_gives(tmp_path: Path) -> None:
    agent = foveate.train(
        "tune-captioner", steps=20, out=tmp_path / "run", scenes=40, image_size=16, learning_rate=5e-3, **TINY
    )
    test = load_captions("scenes", None, "test", 16)
    told = agent(test.pixels.float() / 255)
    references = {row: [" ".join(words) for words in each] for row, each in enumerate(test.sentences)}
    said = {row: [" ".join(words_of(sentence))] for row, sentence in enumerate(told["captions"])}
    found = json.loads((agent.folder / "evaluation.json").read_text())
    expected = OfficialCider().compute_score(references, said)[0]
    assert found["metrics"]["cider"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0.05
    assert set(found["baselines"]) == {"mle", "control"}
    numbers, _ = commands.analyse(agent.folder, samples=100, images=2, device="cpu")
    assert set(numbers) == {"mle", "tuned"}
    assert agent(torch.rand(2, 3, 40, 25))["ids"].shape[0] == 2
    with pytest.raises(InputError, match="images: 1 channels, expected 3"):
        agent(torch.rand(2, 1, 40, 25))


def test_a_folder_is_tuned_without_a_first_step_and_can_be_taken_away(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = saved(tmp_path / "model"), tmp_path / "run"
    words = ["--model", f"hf:{path}", "--data", "coco", "--root", str(folder), "--likelihood-share", "0"]
    words += ["--batch", "8", "--tuning-batch", "4", "--steps", "4", "--length", "6", "--out", str(out)]
    assert main(["train", "tune-captioner", *words]) == 2
    assert "captions_val2017.json: caption 0 of image" in capsys.readouterr().err
    assert main(["train", "tune-captioner", *words, "--skip-bad"]) == 0
    told = capsys.readouterr().err
    assert "image_size = 16 (chosen by the data)" in told
    assert "1 items of the data are left out, the first:" in told
    assert "1 of 41 captions are longer than length: references, but not learned" in told
    found = json.loads((out / "evaluation.json").read_text())
    assert found["metrics"]["left_out"] == 1
    rows = [json.loads(line)["phase"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(rows) == {"reward", "control"}
    policy = foveate.load(out, "cpu").policy
    policy.model.save_pretrained(tmp_path / "tuned")
    policy.tokenizer.save_pretrained(tmp_path / "tuned")
    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "tuned").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in policy.model.state_dict().items())
    with pytest.raises(InputError, match="image_size: found 32, but the model reads 16"):
        tune_captioner.resolve(Config(model=f"hf:{path}", image_size=32))


def test_any_reward_of_texts_tunes_a_captioner(tmp_path: Path) -> None:
    """`foveate.tune`: captions come to hold the word that is asked for."""

    def says_red(captions: list[str], targets: Tensor) -> Tensor:
        return torch.tensor([float("red" in text.split()) for text in captions])

    def share() -> float:
        return float(says_red(model.decode(model.sample(images(8), 16, False, keys(8))), torch.zeros(8)).mean())

    model = small("small")
    before = share()
    batches = lambda step: (images(8), torch.zeros(8))  # noqa: E731
    foveate.tune(model, says_red, batches, out=tmp_path / "run", steps=20, samples=8, learning_rate=1e-2)
    assert share() > before + 0.2


def test_the_reward_of_drawn_captions_rises_above_the_start(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Likelihood says each of two sentences half the time; one of them agrees better with both."""
    settings = TINY | {"tuning_rate": 3e-3, "learning_rate": 1e-2, "samples": 8, "least_count": 2, "length": 6}
    data = {
        "data": "coco",
        "root": folder,
        "skip_bad": True,
        "image_size": 16,
        "likelihood_share": 0.5,
        "temperature": 1.0,
    }
    agent = foveate.train("tune-captioner", steps=160, out=tmp_path / "run", **(settings | {"every": 1000}), **data)
    rows = [json.loads(line) for line in (agent.folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if row["phase"] == "reward" and "reward" in row]
    assert rewards[-1] > 1.03 * rewards[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"likelihood_share": 1.0}, "likelihood_share: found 1.0, expected from 0 to less than 1"),
        ({"batch": 0}, "batch: found 0, expected at least 1"),
        ({"length": 1}, "length: found 1, but no caption of training is so short"),
        ({"image_size": 20}, "image_size: 20x20 pixels cannot be cut into patches of 8"),
        ({"width": 20, "heads": 3}, "width: 20 is no multiple of the 3 heads"),
        ({"samples": 1}, "samples: found 1"),
        ({"least_count": 1000}, "least_count: no word occurs 1000 times"),
        ({"prompt": "a"}, "prompt: found 'a', but model small takes none"),
        ({"data": "flickr"}, "data: found 'flickr', expected one of scenes, coco"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tune_captioner.resolve(Config(**({"scenes": 20, "image_size": 16} | settings)))


def test_a_reward_needs_a_start_that_knows_something(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^likelihood_share: 0, but no run to take it from"):
        foveate.train(
            "tune-captioner", steps=4, out=tmp_path / "run", scenes=40, likelihood_share=0.0, image_size=16, **TINY
        )


def test_the_captioner_of_the_page_is_one() -> None:
    """Another captioner, wrapped as docs/systems/tune-captioner.md shows: cached and parallel scores agree."""
    source = next(block for block in blocks(ROOT / "docs/systems/tune-captioner.md", "python") if "class " in block)
    assert len(source.splitlines()) <= 50
    there: dict[str, Any] = {}
    exec(compile(source, "page", "exec"), there)
    made = re.search(r"^def (\w+)\(\) -> TextCaptioner", source, re.MULTILINE)
    assert made
    torch.manual_seed(0)
    model = there[made[1]]().eval()
    drawn = model.sample(images(3, model.side), 2, False, keys(3))
    streams = noise.fold(keys(3)[:, None], "sample", torch.arange(2)).flatten()
    draws = noise.fold(streams[:, None], "token", torch.arange(drawn.ids.shape[1]))
    again = model(images(3, model.side), drawn).distribution.sample(draws)
    assert torch.equal(again[drawn.mask], drawn.ids[drawn.mask])


SEEN: list[tuple[list[str], list[list[str]]]] = []


def short(captions: list[str], references: list[list[str]]) -> Tensor:
    """Of the user's own: as few words as can be."""
    SEEN.append((captions, references))
    return torch.tensor([-float(len(caption.split())) for caption in captions])


def test_a_reward_of_the_users_own_is_given_texts(tmp_path: Path) -> None:
    SEEN.clear()
    how = {"steps": 4, "scenes": 20, "image_size": 16, "reward": "test_tune_captioner:short"}
    agent = foveate.train("tune-captioner", out=tmp_path / "run", **how, **TINY)
    captions, references = SEEN[0]
    assert len(captions) == len(references)
    assert all(isinstance(text, str) for texts in (captions, *references) for text in texts)
    known = {
        " ".join(words)
        for part in ("train", "val")
        for each in tune_captioner._data(agent.config, part).sentences
        for words in each
    }
    assert {text for texts in references for text in texts} <= known
    found = json.loads((agent.folder / "evaluation.json").read_text())
    assert {"cider", "sampled_cider", "reward", "sampled_reward"} <= found["metrics"].keys()
    assert found["metrics"]["reward"] <= 0
    with pytest.raises(InputError, match=r"^reward: test_tune_captioner has no 'tall'"):
        tune_captioner.resolve(Config(reward="test_tune_captioner:tall", scenes=20, image_size=16))
