"""The recurrent attention model learns where to look, and says so when it cannot be asked what was typed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import agents, commands
from foveate.systems import ram
from foveate.types import InputError


def test_learned_places_beat_random_ones(tmp_path: Path) -> None:
    """From this seed, in half a minute."""
    settings = {"variant": "plain", "glimpses": 4, "patch": 6, "scales": 2, "glimpse_network": "mlp", "batch": 64}
    commands.train(
        "ram", steps=400, controls=("random",), out=tmp_path / "run", device="cpu", learning_rate=3e-3, **settings
    )
    found = commands.evaluate(tmp_path / "run", device="cpu")
    learned, blind = found.metrics["error"], found.baselines["random"]["error"]
    assert learned < 45
    assert blind > learned + 25
    curve = found.curves["error in percent against glimpses"]["learned places"]
    assert curve[-1][1] == learned
    assert curve[0][1] > learned + 25, "one glimpse at a random place is not enough"


def test_what_the_data_decides_is_filled_in() -> None:
    plain = ram.resolve(ram.Config(variant="plain"))
    assert (plain.glimpses, plain.patch, plain.scales, plain.channels) == (6, 8, 1, 1)
    assert plain.classes == tuple("0123456789")
    cluttered = ram.resolve(ram.Config())
    assert (cluttered.variant, cluttered.glimpses, cluttered.patch, cluttered.scales) == ("cluttered60", 8, 12, 3)
    large = ram.resolve(ram.Config(variant="cluttered100", glimpses=5))
    assert (large.glimpses, large.scales) == (5, 4)
    assert ram.resolve(plain) == plain


@pytest.mark.parametrize(
    "field", ["glimpses", "patch", "scales", "factor", "hidden", "samples", "batch", "std", "explore"]
)
def test_a_field_out_of_its_range_is_named(field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: found 0"):
        ram.resolve(ram.Config(**{field: 0.0 if field in ("std", "explore") else 0}))


def write_pictures(root: Path, classes: tuple[str, ...] = ("dark", "light"), mode: str = "L") -> None:
    """Twenty pictures of 12x12 a class."""
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(20):
            shade = 10 * number if mode == "L" else (10 * number, 100 * place % 256, 0)
            Image.new(mode, (12, 12), shade).save(root / name / f"{number}.png")


def train_on(root: Path, out: Path, **settings: Any) -> agents.Agent:
    small = {"data": "folder", "batch": 8, "hidden": 8, "glimpses": 2, "patch": 4, "steps": 2, "controls": ()}
    return commands.train("ram", root=root, out=out, device="cpu", **small | settings)


def test_a_folder_without_a_test_split_is_scored_on_what_was_held_out(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures" / "train")
    agent = train_on(tmp_path / "pictures", tmp_path / "run")
    assert (agent.folder / "report.html").is_file()
    found = commands.evaluate(agent.folder, device="cpu").metrics["error"]
    held_out = ram.load_images("folder", tmp_path / "pictures", "val")
    assert found * len(held_out) / 100 == pytest.approx(round(found * len(held_out) / 100))
    assert commands.show(agent.folder, device="cpu")


def test_a_broken_test_split_is_found_before_training(tmp_path: Path, shared_data: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(shared_data / "MNIST" / "raw", raw)
    test = raw / "t10k-images-idx3-ubyte"
    test.chmod(0o644)
    test.write_bytes(test.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        commands.train("ram", data="mnist", root=tmp_path, steps=1, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_data_than_the_agents_is_refused_in_one_line(tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey")
    write_pictures(tmp_path / "colour", mode="RGB")
    write_pictures(tmp_path / "three", ("dark", "light", "middle"))
    agent = train_on(tmp_path / "grey", tmp_path / "run")
    with pytest.raises(InputError, match=r"^data: 3 channels, but .* 1"):
        commands.evaluate(agent.folder, root=tmp_path / "colour", device="cpu")
    with pytest.raises(InputError, match=r"^data: classes dark, light, middle"):
        commands.evaluate(agent.folder, root=tmp_path / "three", device="cpu")
    write_pictures(tmp_path / "grey", ("new",))
    ram._load.cache_clear()
    shutil.rmtree(agent.folder / "checkpoints")
    with pytest.raises(InputError, match=r"^data: classes dark, light, new"):
        commands.resume(agent.folder, device="cpu")


def test_settings_of_another_run_take_classes_and_channels_from_the_data(tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey")
    write_pictures(tmp_path / "three", ("dark", "light", "middle"), mode="RGB")
    first = train_on(tmp_path / "grey", tmp_path / "run")
    file = first.folder / "run.json"
    settings = vars(agents.config_from_file("ram", file)) | {"root": tmp_path / "three", "out": tmp_path / "other"}
    second = commands.train("ram", device="cpu", **settings)
    assert (second.config.classes, second.config.channels) == (("dark", "light", "middle"), 3)


def test_shares_of_the_budget(tmp_path: Path) -> None:
    agent = commands.train(
        "ram", variant="plain", glimpses=2, batch=8, steps=20, controls=("random", "centre"), control_share=0.1,
        out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    lines = (agent.folder / "metrics.jsonl").read_text().splitlines()
    steps = {row["phase"]: row["step"] for row in map(json.loads, lines)}
    assert steps == {"learned": 16, "random": 2, "centre": 2}
    with pytest.raises(InputError, match="control_share"):
        ram.resolve(ram.Config(controls=("random", "centre"), control_share=0.5))
