"""Boxes from files: what is read is what stands there, and what is wrong is named or left out and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import agents, noise
from foveate.data.detection import Detections, chosen, first_shown, load_detections, mirrored, of_class, views
from foveate.geometry import Boxes, check_boxes, overlaps
from foveate.types import InputError

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real data is not beside the checkout")

Object = tuple[str, float, float, float, float]


def picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)


def voc(root: Path, items: dict[str, list[Object]], size: tuple[int, int] = (40, 20)) -> Path:
    """A data set in Pascal VOC's folders; by default without lists."""
    (root / "Annotations").mkdir(parents=True)
    for name, objects in items.items():
        picture(root / "JPEGImages" / f"{name}.png", size)
        told = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
            f"<ymax>{box[3]}</ymax></bndbox></object>"
            for label, *box in objects
        )
        head = f"<filename>{name}.png</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{head}{told}</annotation>")
    return root


def lists(root: Path, **parts: list[str]) -> Path:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    for part, names in parts.items():
        (folder / f"{part}.txt").write_text("\n".join(names) + "\n")
    return root


GOOD: list[Object] = [("cat", 4, 2, 20, 12), ("dog", 0, 0, 40, 20)]


def three(root: Path, objects: list[Object], size: tuple[int, int] = (40, 20)) -> Path:
    """Two good pictures and one with the objects, all to be trained on."""
    voc(root, {"a": GOOD, "b": objects, "c": GOOD, "d": GOOD, "e": GOOD}, size)
    return lists(root, train=["a", "b", "c"], val=["d"], test=["e"])


def test_voc_is_read_and_stretched_with_its_boxes(tmp_path: Path) -> None:
    root = lists(voc(tmp_path / "set", {"a": GOOD, "b": [], "c": GOOD[:1]}), train=["a", "b"], val=["c"], test=["c"])
    found = load_detections("voc", root, "train", 16)
    assert found.pixels.shape == (2, 3, 16, 16)
    assert found.classes == ("cat", "dog")
    assert found.boxes.mask.tolist() == [[True, True], [False, False]], "an image without objects is a lesson too"
    torch.testing.assert_close(found.boxes.boxes[0], torch.tensor([[1.6, 1.6, 8, 9.6], [0, 0, 16, 16]]))
    assert found.boxes.labels[0].tolist() == [0, 1]
    assert len(load_detections("voc", root, "val", 16)) == 1
    root.rename(tmp_path / "VOC2007")
    assert len(load_detections("voc", tmp_path, "train", 16)) == 2, "the set below the folder is found"


def test_what_has_no_list_is_held_out_by_name(tmp_path: Path) -> None:
    root = voc(tmp_path, {f"{place:03}": GOOD for place in range(40)})
    sizes = [len(load_detections("voc", root, part, 8)) for part in ("train", "val", "test")]
    assert sum(sizes) == 40
    assert min(sizes) >= 4
    assert sizes[0] > 20


def test_difficult_objects_are_neither_wanted_nor_blamed(tmp_path: Path) -> None:
    root = three(tmp_path, GOOD)
    path = root / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<name>cat</name>", "<name>cat</name><difficult>1</difficult>"))
    assert load_detections("voc", root, "train", 8).boxes.crowd.tolist()[1] == [True, False]


BAD: dict[str, tuple[list[Object], str]] = {
    "no area": ([("cat", 4, 2, 4, 12)], "b.xml: object 0 .cat: 4, 2, 4, 12. has no area"),
    "no area within": ([("cat", 40, 2, 41, 12)], "b.xml: object 0 .cat: 40, 2, 41, 12. has no area within the image"),
    "no area before": ([("cat", -0.9, 2, 0, 12)], "b.xml: object 0 .cat: -0.9, 2, 0, 12. has no area within the image"),
    "inverted": ([*GOOD, ("cat", 20, 12, 4, 2)], "b.xml: object 2 .* ends before it begins"),
    "beyond": ([("cat", 4, 2, 60, 12)], "b.xml: object 0 .* reaches beyond the image of 40x20"),
    "normalised": ([("cat", 0.1, 0.1, 0.5, 0.6), ("dog", 0, 0, 1, 1)], "b.xml: object 0 .* in parts of the image"),
    "nameless": ([("", 4, 2, 20, 12)], "b.xml: object 0 has no name"),
    "no number": ([("cat", "nan?", 2, 20, 12)], "b.xml: object 0 .cat.: bndbox/xmin is 'nan.'"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_box_is_named_or_its_picture_left_out_and_counted(tmp_path: Path, name: str) -> None:
    objects, message = BAD[name]
    root = three(tmp_path, objects)
    with pytest.raises(InputError, match=message):
        load_detections("voc", root, "train", 8)
    found = load_detections("voc", root, "train", 8, skip_bad=True)
    assert (len(found), found.skipped) == (2, 1)


def test_the_pixel_in_the_corner_is_a_box(tmp_path: Path) -> None:
    found = load_detections("voc", three(tmp_path, [("cat", 0, 0, 1, 1)]), "train", 8)
    torch.testing.assert_close(found.boxes.boxes[1, 0], torch.tensor([0, 0, 8 / 40, 8 / 20]))


def test_a_missing_or_broken_file_is_named_or_left_out(tmp_path: Path) -> None:
    root = three(tmp_path, GOOD)
    (root / "JPEGImages" / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"b\.png: cannot be read as a picture"):
        load_detections("voc", root, "train", 8)
    assert load_detections("voc", root, "train", 8, skip_bad=True).skipped == 1
    (root / "JPEGImages" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.xml: its picture .* does not exist"):
        load_detections("voc", root, "train", 8)
    (root / "Annotations" / "b.xml").write_text("<annotation><object>")
    with pytest.raises(InputError, match=r"b\.xml: is no readable XML"):
        load_detections("voc", root, "train", 8)
    assert load_detections("voc", root, "train", 8, skip_bad=True).skipped == 1
    (root / "Annotations" / "b.xml").unlink()
    with pytest.raises(InputError, match=r"train\.txt: names 'b', of which there is no annotation"):
        load_detections("voc", root, "train", 8)


def test_a_picture_of_another_size_than_told_is_named(tmp_path: Path) -> None:
    root = three(tmp_path, GOOD)
    picture(root / "JPEGImages" / "b.png", (20, 40))
    with pytest.raises(InputError, match=r"b\.xml: says 40x20, but .* is 20x40"):
        load_detections("voc", root, "train", 8)


def test_files_may_not_lead_out_of_the_folder_nor_define_entities(tmp_path: Path) -> None:
    root = three(tmp_path / "set", GOOD)
    picture(tmp_path / "secret.png", (40, 20))
    path = root / "Annotations" / "b.xml"
    good = path.read_text()
    path.write_text(good.replace("b.png", "../../secret.png"))
    with pytest.raises(InputError, match="lies outside of"):
        load_detections("voc", root, "train", 8)
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + good)
    with pytest.raises(InputError, match="entities"):
        load_detections("voc", root, "train", 8)


def coco(root: Path, **changes: Any) -> Path:
    """Two parts of three pictures each."""
    for part in ("train2017", "val2017"):
        entries = [
            {"id": 10 + place, "image_id": place, "category_id": 7, "bbox": [4, 2, 16, 10], "iscrowd": 0}
            for place in range(3)
        ]
        content = {
            "images": [{"id": place, "file_name": f"{place}.png", "width": 40, "height": 20} for place in range(3)],
            "annotations": entries + changes.get("more", []),
            "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
        }
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for place in range(3):
            picture(root / part / f"{place}.png", (40, 20))
    return root


def test_coco_is_read_with_its_classes_in_their_order(tmp_path: Path) -> None:
    crowd = {"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 0, 40, 20], "iscrowd": 1}
    root = coco(tmp_path, more=[crowd])
    found = load_detections("coco", root, "test", 20)
    assert found.classes == ("cat", "dog")
    assert found.boxes.boxes[0, 0].tolist() == [2, 2, 10, 12]
    assert found.boxes.crowd.tolist() == [[False, False], [False, True], [False, False]]
    parts = [load_detections("coco", root, part, 20) for part in ("train", "val")]
    assert [len(part) for part in parts] == [2, 1], "val is held out of train where val is the test"


def test_unknown_classes_and_images_of_coco_are_named(tmp_path: Path) -> None:
    odd = {"id": 1, "image_id": 1, "category_id": 8, "bbox": [0, 0, 40, 20]}
    root = coco(tmp_path / "class", more=[odd])
    with pytest.raises(InputError, match=r"image 1: object 1 .id 8: .* is of an unknown class; known are cat, dog"):
        load_detections("coco", root, "test", 8)
    assert load_detections("coco", root, "test", 8, skip_bad=True).skipped == 1
    with pytest.raises(InputError, match="annotation 1 is of image 5, unknown"):
        load_detections("coco", coco(tmp_path / "image", more=[{**odd, "image_id": 5}]), "test", 8)
    (root / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(InputError, match=r"instances_val2017\.json: is no COCO file of boxes"):
        load_detections("coco", root, "test", 8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no area": ({"bbox": [4, 2, 0, 10]}, r"image 1: object 1 .cat: 4, 2, 4, 12. has no area"),
    "inverted": ({"bbox": [20, 12, -16, -10]}, "image 1: object 1 .* ends before it begins"),
    "in parts": ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "image 1: object 1 .* is in parts of the image, expected pixels"),
    "beyond": ({"bbox": [4, 2, 60, 10]}, "image 1: object 1 .* reaches beyond the image of 40x20"),
    "no box": ({"bbox": None}, r"image 1: object 1 has the bbox None, expected \[left, top, width, height\]"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"image 1: object 1 has the bbox \[1, 2, 3\]"),
    "words": ({"bbox": ["1", 2, 3, 4]}, r"image 1: object 1 has the bbox \['1'"),
    "no class": ({"category_id": None}, r"image 1: object 1 has the category_id None, expected one of \[9, 7\]"),
    "unlisted": ({"image_id": 77}, "annotation 1 is of image 77, unknown: add the image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_box_of_coco_is_named_or_left_out_and_counted(tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    entry = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 2, 16, 10], "iscrowd": 0} | changes
    root = coco(tmp_path, more=[entry])
    with pytest.raises(InputError, match=message):
        load_detections("coco", root, "test", 8)
    found = load_detections("coco", root, "test", 8, skip_bad=True)
    assert (len(found), found.skipped) == (3 if name == "unlisted" else 2, 1)
    parts = [load_detections("coco", root, part, 8, skip_bad=True) for part in ("train", "val")]
    assert sum(part.skipped for part in parts) == 1, "both are of one file, which is counted once"


def changed(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("field", "value", "left"), [("id", 1, 1), ("file_name", "1.png", 1)])
def test_a_picture_of_coco_that_is_listed_twice_is_named_or_left_out_and_counted(
    tmp_path: Path, field: str, value: Any, left: int
) -> None:
    """Of two sets put together whose numbers start anew: nobody knows which boxes are whose."""
    root = coco(tmp_path)
    changed(root, lambda content: content["annotations"].pop(2))
    changed(root, lambda content: content["images"][2].update({field: value}))
    with pytest.raises(InputError, match=rf"val2017.json: images with the {field} {value!r} are listed twice"):
        load_detections("coco", root, "test", 8)
    found = load_detections("coco", root, "test", 8, skip_bad=True)
    assert len(found) == left
    assert found.skipped == (2 if field == "id" else 1), "pictures, by their names"


@pytest.mark.parametrize("number", ["nan", "inf", "wide"])
def test_a_width_that_is_no_number_is_named_or_left_out(tmp_path: Path, number: str) -> None:
    root = three(tmp_path / "set", GOOD)
    path = root / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<width>40<", f"<width>{number}<"))
    with pytest.raises(InputError, match=rf"b.xml: size/width is '{number}', expected a number"):
        load_detections("voc", root, "train", 8)
    assert load_detections("voc", root, "train", 8, skip_bad=True).skipped == 1


@pytest.mark.parametrize("where", ["images", "annotations", "categories"])
def test_a_list_of_coco_that_holds_something_else_is_named(tmp_path: Path, where: str) -> None:
    root = coco(tmp_path)
    changed(root, lambda content: content[where].append(7))
    with pytest.raises(
        InputError, match=rf"val2017.json: is no COCO file of boxes \('{where}' is no list of objects\)"
    ):
        load_detections("coco", root, "test", 8)


def test_classes_of_one_name_are_one_and_of_one_number_are_refused(tmp_path: Path) -> None:
    """As some exports have it: a category for the set, of the name of its only class."""
    root = coco(tmp_path)
    changed(root, lambda content: content["categories"].append({"id": 0, "name": "cat"}))
    found = load_detections("coco", root, "test", 8)
    assert found.classes == ("cat", "dog")
    assert of_class(found, "cat").boxes.mask.sum() == 3
    changed(root, lambda content: content["categories"].append({"id": 7, "name": "cow"}))
    with pytest.raises(InputError, match=r"val2017.json: category 7 is listed twice"):
        load_detections("coco", root, "test", 8)


def test_parts_of_coco_are_the_same_wherever_it_lies(tmp_path: Path) -> None:
    """Of one file; told apart by the boxes, of which each picture has its own number."""
    parts = []
    for name in ("here", "there", "anywhere", "else"):
        root = coco(tmp_path / name, more=[{"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9]}] * 2)
        parts.append([load_detections("coco", root, part, 8).boxes.mask.sum(1).tolist() for part in ("train", "val")])
    assert all(part == parts[0] for part in parts)
    assert sorted(count for part in parts[0] for count in part) == [1, 1, 3]


def test_boxes_cut_at_the_edge_are_counted(tmp_path: Path) -> None:
    root = three(tmp_path / "set", [("cat", -0.5, 0, 41, 20), ("cat", 0, 0, 40, 20)])
    told: list[str] = []
    found = load_detections("voc", root, "train", 16, say=told.append)
    assert found.clipped == 1
    assert told == [f"{root}: 1 boxes of train reach up to a pixel beyond their picture, and are cut at its edge"]
    check_boxes(found.boxes, "boxes", (16, 16))


@pytest.mark.parametrize("system", ["detection", "tune-detector", "sequential-detection"])
def test_a_split_without_any_object_is_told_before_training(system: str, tmp_path: Path) -> None:
    root = lists(voc(tmp_path / "set", {"a": GOOD, "b": GOOD, "c": []}), train=["a"], val=["b"], test=["c"])
    module = agents.system_module(system)
    with pytest.raises(InputError, match=r"set: split 'test' \(1 pictures\) has no object to be found"):
        module.resolve(module.Config(data="voc", root=root, image_size=32))


@pytest.mark.parametrize(
    ("name", "message"),
    [("cocoa", "^data: found 'cocoa', expected one of scenes, voc, coco"), ("voc", "^root: not given")],
)
def test_what_cannot_be_read_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_detections(name, None, "train", 32)


def test_scenes_are_the_same_each_time_and_apart_from_each_other() -> None:
    train, test = (load_detections("scenes", None, part, 24, scenes=70) for part in ("train", "test"))
    again = load_detections("scenes", None, "train", 24, scenes=70)
    assert torch.equal(train.pixels, again.pixels)
    assert len(train) == 70
    assert not (train.pixels[:, None] == test.pixels[None, :70]).flatten(2).all(2).any()
    check_boxes(train.boxes, "scenes", (24, 24))


def test_a_mirrored_image_has_its_boxes_mirrored() -> None:
    data = load_detections("scenes", None, "train", 24, scenes=8)
    images, boxes = chosen(data, torch.arange(8))
    flip = torch.arange(8) % 2 == 0
    turned, moved = mirrored(images, boxes, flip)
    assert torch.equal(turned[0], images[0].flip(-1))
    assert torch.equal(turned[1], images[1])
    again, back = mirrored(turned, moved, flip)
    assert torch.equal(again, images)
    torch.testing.assert_close(back.boxes[boxes.mask], boxes.boxes[boxes.mask])
    assert (overlaps(moved.boxes, moved.boxes).diagonal(dim1=1, dim2=2)[boxes.mask] > 0.99).all()


@real
@pytest.mark.parametrize(
    ("name", "folder", "sizes", "classes"),
    [
        ("voc", "BCCD", (168, 59, 57), 3),
        ("voc", "raccoon", (109, 23, 24), 1),
        ("voc", "voc_from_coco", (193, 69, 82), 20),
        ("coco", "coco", (189, 33, 216), 80),
    ],
)
def test_real_sets_are_read(name: str, folder: str, sizes: tuple[int, ...], classes: int) -> None:
    parts = [load_detections(name, REAL / folder, part, 32) for part in ("train", "val", "test")]
    assert tuple(map(len, parts)) == sizes
    assert all(len(part.classes) == classes for part in parts)
    for part in parts:
        check_boxes(part.boxes, folder, (32, 32))
        assert part.skipped == 0


def test_views_are_new_windows_and_digits_are_not_mirrored() -> None:
    data = load_detections("scenes", None, "train", 32, scenes=40)
    rows, keys = torch.arange(40), noise.key("views", torch.arange(40))
    images, boxes = views(data, rows, keys)
    again, _ = views(data, rows[:7], keys[:7])
    assert torch.equal(images[:7], again), "a view depends on its own key alone"
    assert not torch.equal(images, views(data, rows, keys + 1)[0])
    check_boxes(boxes, "views", (32, 32))
    flip = noise.uniform(noise.fold(keys, "flip")) < 0.5
    asymmetric = replace(data, pixels=(torch.arange(32) < 16).to(torch.uint8).mul(255).expand(40, 3, 32, 32))
    bright = views(asymmetric, rows, keys)[0][..., :8].mean((1, 2, 3)) > views(asymmetric, rows, keys)[0][
        ..., 24:
    ].mean((1, 2, 3))
    assert torch.equal(bright, ~flip)
    unturned = views(replace(asymmetric, name="digits"), rows, keys)[0]
    assert (unturned[..., :8].mean((1, 2, 3)) >= unturned[..., 24:].mean((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([10, 12], [0, 1, 10, 12]),  # where the first show nothing, later ones take part
        ([0, 1, 2, 3, 9], [0, 1, 2, 3]),
        ([1, 7], [0, 1, 2, 7]),
        ([], [0, 1, 2, 3]),
    ],
)
def test_what_is_looked_at_first_shows_objects_if_there_are_any(shown: list[int], expected: list[int]) -> None:
    wanted = torch.zeros(14, 1, dtype=torch.bool)
    wanted[shown] = True
    boxes = Boxes(torch.zeros(14, 1, 4), torch.zeros(14, 1, dtype=torch.int64), wanted)
    pixels = torch.arange(14, dtype=torch.uint8)[:, None, None, None].expand(14, 3, 2, 2)
    found = first_shown(Detections(pixels, boxes, ("thing",), "scenes", "val"), 4)
    assert found.pixels[:, 0, 0, 0].tolist() == expected
