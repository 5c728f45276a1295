"""Colouring keeps the structure: luminance is that of the input; what is read, refused, and begun from another run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import color

import foveate
from foveate import noise
from foveate.agents import Agent
from foveate.colors import coloured, light_and_chroma, to_lab, to_rgb
from foveate.data.photographs import load_photographs
from foveate.run import Run
from foveate.systems import colorization
from foveate.types import InputError

QUICK = {"image_size": 16, "width": 16, "depth": 1, "code_width": 8, "batch": 4, "tuning_batch": 2, "device": "cpu"}


def pictures() -> torch.Tensor:
    return noise.uniform(noise.key("pictures", torch.arange(4)), 3, 16, 16)


def test_lab_and_back_is_the_same_picture() -> None:
    images = torch.cat((pictures(), pictures().round(), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)))
    torch.testing.assert_close(to_rgb(to_lab(images)), images, atol=2e-3, rtol=0)


def test_back_is_that_of_scikit_image_where_a_screen_shows_the_colour() -> None:
    lab = to_lab(pictures() * 0.6 + 0.2)
    expected = color.lab2rgb(lab.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(to_rgb(lab).permute(0, 2, 3, 1), torch.from_numpy(expected), atol=2e-3, rtol=0)


@pytest.mark.parametrize("folders", [("",), ("train", "test"), ("cats", "dogs"), ("train/cats", "train/dogs", "test")])
def test_pictures_need_no_classes(folders: tuple[str, ...], tmp_path: Path) -> None:
    """Directly in the folder, in its parts, in classes: each is in one split, and nothing of a part test is learned."""
    for number in range(20):
        folder = tmp_path / folders[number % len(folders)]
        folder.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20 + number, 16), (10 * number, 200, 0)).save(folder / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    shades = {split: load_photographs("folder", tmp_path, split, 16)[:, 0, 0, 0] for split in ("train", "val", "test")}
    assert sorted(torch.cat(list(shades.values())).tolist()) == [10 * number for number in range(20)]
    if "test" in folders:
        last = folders.index("test")
        assert all(shade // 10 % len(folders) == last for shade in shades["test"])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 10.0])
def test_any_chroma_leaves_luminance_and_hue(scale: float) -> None:
    light, chroma = light_and_chroma(pictures())
    images = coloured(light, scale * chroma)
    assert images.min() >= 0
    assert images.max() <= 1
    again, shown = light_and_chroma(images)
    torch.testing.assert_close(again, light, atol=3e-4, rtol=0)  # 0.015 of L's 100
    across = shown[:, 0] * chroma[:, 1] - shown[:, 1] * chroma[:, 0]
    assert across.abs().max() < 2e-3  # parallel
    assert (shown * chroma).sum(1).min() > -1e-3  # not to the other side


def test_a_colour_beyond_the_screen_is_as_strong_as_it_can_be() -> None:
    light, chroma = light_and_chroma(torch.tensor([1.0, 0.0, 0.0])[None, :, None, None])
    torch.testing.assert_close(
        coloured(light, 3 * chroma), torch.tensor([1.0, 0.0, 0.0])[None, :, None, None], atol=0.01, rtol=0
    )


def test_photographs_are_crops_and_parts_share_none() -> None:
    parts = {split: load_photographs("photographs", None, split) for split in ("train", "val", "test")}
    assert [tuple(part.shape) for part in parts.values()] == [(4000, 3, 32, 32), (250, 3, 32, 32), (250, 3, 32, 32)]
    assert len(parts["train"].flatten(1).unique(dim=0)) > 3500
    assert torch.equal(parts["test"], load_photographs("photographs", None, "test"))
    assert load_photographs("photographs", None, "all", 16).shape == (4500, 3, 16, 16)


def test_data_that_cannot_be_coloured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load_photographs("cifar", None, "train")
    with pytest.raises(InputError, match="image_size"):
        load_photographs("photographs", None, "train", 500)
    with pytest.raises(InputError, match="--root"):
        load_photographs("cifar10", None, "train")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(np.full((16, 16), 40 * number, np.uint8)).save(tmp_path / name / f"{name}{number}.png")
    with pytest.raises(InputError, match="grayscale"):
        load_photographs("folder", tmp_path, "train")


@pytest.mark.parametrize(
    "settings",
    [
        {"code_share": 0.0},
        {"likelihood_share": 1.0},
        {"code_share": 0.5, "likelihood_share": 0.5},
        {"samples": 1},
        {"levels": (4, 1)},
        {"code_patch": 5},
        {"patch": 3},
        {"heads": 3},
    ],
)
def test_settings_that_teach_nothing_are_refused_before_anything_is_written(settings: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        foveate.train("colorization", steps=4, out=tmp_path / "run", **{**QUICK, **settings})
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return foveate.train("colorization", steps=8, out=tmp_path_factory.mktemp("colours") / "run", **QUICK)


def test_only_the_colours_of_a_picture_change(agent: Agent) -> None:
    images = pictures()
    found = agent(images)["images"]
    assert found.shape == images.shape
    assert (to_lab(found)[:, 0] - to_lab(images)[:, 0]).abs().max() < 0.02
    grey = to_lab(images)[:, :1] / 100
    assert agent(grey)["images"].shape == images.shape
    with pytest.raises(InputError, match="32x32"):
        agent(torch.rand(1, 3, 32, 32))


def test_all_rows_draw_with_the_same_base_model_and_luminance_stays(agent: Agent) -> None:
    run = Run.open(agent.folder)
    parts = [colorization.build(agent.config) for _ in range(2)]
    for name, part in zip(("likelihood", "control"), parts, strict=True):
        assert run.restore(name, part)
        assert all(
            torch.equal(value, part.base.state_dict()[key]) for key, value in agent.policy.base.state_dict().items()
        )
    found = foveate.evaluate(agent.folder)
    assert set(found.baselines) == {"mle", "control", "chroma x 2", "truth"}
    rows = {"tuned": found.metrics, **found.baselines}
    assert all(row["luminance_error"] < 0.02 for row in rows.values())
    assert rows["truth"]["color_error"] < 0.1
    assert rows["chroma x 2"]["colorfulness"] > rows["mle"]["colorfulness"]


def test_a_run_begins_with_the_parts_of_another(agent: Agent, tmp_path: Path) -> None:
    before, after = (colorization._code(agent.config) for _ in range(2))
    Run.open(agent.folder).restore("code", before)
    more = foveate.train("colorization", steps=4, out=tmp_path / "more", source=agent.folder, **QUICK)
    Run.open(more.folder).restore("code", after)
    changed = max(float((value - after.state_dict()[name]).abs().max()) for name, value in before.state_dict().items())
    assert 0 < changed < 0.02  # one update, at most of a rate or two
