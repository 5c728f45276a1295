"""Pictures beside their masks: the layouts, the splits, and what is said of what cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import noise
from foveate.data.scenes import SHAPES
from foveate.data.segmentation import VOC, VOID, crops, load_segmented, masks_of
from foveate.types import InputError


def save(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def mask(side: int = 20, value: int = 255) -> np.ndarray[Any, Any]:
    found = np.zeros((side, side), np.uint8)
    found[4:9, 6:15] = value
    return found


def picture(side: int = 20) -> np.ndarray[Any, Any]:
    return np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)


def folders(root: Path, count: int = 10) -> Path:
    for place in range(count):
        save(root / "images" / f"p{place}.png", picture())
        save(root / "masks" / f"p{place}.png", mask())
    return root


def names(root: Path, name: str = "pairs", **settings: Any) -> list[set[str]]:
    return [set(load_segmented(name, root, split, **settings).names) for split in ("train", "val", "test")]


def test_scenes_hold_their_classes_and_repeat() -> None:
    one, again = (load_segmented("scenes", None, "val", 24, ("ring", "cross")) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels)
    assert one.pixels.shape == (200, 3, 24, 24)
    assert one.classes == ("ring", "cross")
    assert (one.labels > 0).flatten(1).any(1).all()
    assert set(one.labels.unique().tolist()) == {0, 1, 2}
    other = load_segmented("scenes", None, "val", 24, ("cross",))
    assert other.labels.max() == 1
    assert len(set(SHAPES) & {"ring", "cross"}) == 2


def test_folders_of_images_and_masks(tmp_path: Path) -> None:
    root = folders(tmp_path)
    parts = names(root)
    assert [len(part) for part in parts] == [6, 2, 2]
    assert set.union(*parts) == {f"p{place}" for place in range(10)}
    data = load_segmented("pairs", root, "all")
    assert torch.equal(data.pixels[0].permute(1, 2, 0), torch.from_numpy(picture()))
    assert torch.equal(data.labels[0], torch.from_numpy(mask(value=1)))
    assert (data.classes, data.left_out) == (("foreground",), 0)


def test_pictures_beside_their_masks_as_in_msra10k(tmp_path: Path) -> None:
    for place in range(5):
        save(tmp_path / "Imgs" / f"{place}.jpg", picture())
        save(tmp_path / "Imgs" / f"{place}.png", mask())
    assert len(load_segmented("pairs", tmp_path, "all")) == 5


def test_both_eyes_of_a_child_are_in_one_part(tmp_path: Path) -> None:
    for child in range(1, 9):
        for eye in "LR":
            save(tmp_path / f"Image_{child:02d}{eye}.jpg", picture())
            Image.fromarray(mask() > 0).save(tmp_path / f"Image_{child:02d}{eye}_1stHO.png")
            save(tmp_path / f"Image_{child:02d}{eye}_2ndHO.png", mask(value=7))
    parts = names(tmp_path)
    children = [{name[:-1] for name in part} for part in parts]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert not children[0] & children[1] | children[0] & children[2] | children[1] & children[2]


def test_class_ids_and_what_nobody_labelled(tmp_path: Path) -> None:
    values = mask(value=2)
    values[0], values[1] = VOID, 1
    save(tmp_path / "images" / "a.png", picture())
    save(tmp_path / "masks" / "a.png", values)
    data = load_segmented("pairs", tmp_path, "all", classes=("cat", "dog"))
    masks, known = masks_of(data.labels, 2)
    assert torch.equal(masks[0], torch.from_numpy(np.stack([values == 1, values == 2])))
    assert torch.equal(known[0, 0], torch.from_numpy(values != VOID))


def test_masks_of_0_and_255_are_not_taken_for_ids(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no mask of split 'all' holds one of the values 1 to 1, .*leave --classes out"
    ):
        load_segmented("pairs", folders(tmp_path), "all", classes=("cat",))


def test_the_longer_side_is_scaled_and_the_rest_is_nobodys(tmp_path: Path) -> None:
    folders(tmp_path, 3)
    save(tmp_path / "images" / "wide.png", picture(40)[:20])
    save(tmp_path / "masks" / "wide.png", mask(40)[:20])
    with pytest.raises(InputError, match=r"p0 is 20x20, but wide is 40x20 .*--image-size 40$"):
        load_segmented("pairs", tmp_path, "all")
    data = load_segmented("pairs", tmp_path, "all", 10)
    wide = data.labels[data.names.index("wide")]
    assert (wide[5:] == VOID).all()
    assert (wide[:5] != VOID).all()
    assert not data.pixels[data.names.index("wide"), :, 5:].any()


def voc(root: Path, lists: dict[str, int]) -> Path:
    year = root / "VOCdevkit" / "VOC2012"
    for part, count in lists.items():
        members = [f"{part}{place}" for place in range(count)]
        (year / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (year / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(members) + "\n")
        for name in members:
            save(year / "JPEGImages" / f"{name}.jpg", picture())
            values = mask(value=VOC.index("person") + 1)
            values[12], values[13] = VOID, VOC.index("cat") + 1
            marks = Image.fromarray(values, "P")
            marks.putpalette([place % 256 for place in range(768)])
            (year / "SegmentationClass").mkdir(exist_ok=True)
            marks.save(year / "SegmentationClass" / f"{name}.png")
    return root


def test_vocs_lists_are_its_splits(tmp_path: Path) -> None:
    full = voc(tmp_path / "a", {"train": 5, "val": 2, "test": 3})
    assert names(full, "voc") == [
        {f"{part}{k}" for k in range(n)} for part, n in (("train", 5), ("val", 2), ("test", 3))
    ]
    assert len(load_segmented("voc", full, "all")) == 10
    lacking = voc(tmp_path / "b", {"train": 10, "val": 3})
    parts = names(lacking, "voc")
    assert parts[2] == {"val0", "val1", "val2"}
    assert [len(part) for part in parts] == [8, 2, 3]
    assert not parts[0] & parts[1]


def test_vocs_classes_may_be_chosen(tmp_path: Path) -> None:
    root = voc(tmp_path, {"train": 1, "val": 1, "test": 1})
    everything = load_segmented("voc", root, "test")
    assert set(everything.labels.unique().tolist()) == {0, VOC.index("cat") + 1, VOC.index("person") + 1, VOID}
    people = load_segmented("voc", root, "test", classes=("person",))
    assert set(people.labels.unique().tolist()) == {0, 1, VOID}
    with pytest.raises(InputError, match=r"^classes: no 'persons'.*did you mean 'person'"):
        load_segmented("voc", root, "test", classes=("persons",))


def test_windows_agree_with_their_labels() -> None:
    data = load_segmented("scenes", None, "val", 24)
    ids, keys = torch.arange(8), noise.key(0, "windows", torch.arange(8))
    images, labels = crops(data, ids, keys, 10, flip=False)
    assert images.shape == (8, 3, 10, 10)
    for row in range(8):
        places = [
            (top, left)
            for top in range(15)
            for left in range(15)
            if torch.equal(data.pixels[row, :, top : top + 10, left : left + 10].float() / 255, images[row])
        ]
        assert len(places) == 1
        (top, left) = places[0]
        assert torch.equal(data.labels[row, top : top + 10, left : left + 10], labels[row])
    mirrored, marks = crops(data, ids, keys, 10, flip=True)
    same = (mirrored == images).flatten(1).all(1)
    assert 0 < same.sum() < 8
    assert torch.equal(mirrored[~same].flip(3), images[~same])
    assert torch.equal(marks[~same].flip(2), labels[~same])
    whole, _ = crops(data, ids, keys, 100, flip=False)
    assert torch.equal(whole, data.pixels[:8].float() / 255)
    assert torch.equal(crops(data, ids[3:4], keys[3:4], 10, True)[0], mirrored[3:4])


def no_mask(root: Path) -> None:
    (root / "masks" / "p3.png").unlink()


def no_picture(root: Path) -> None:
    (root / "images" / "p3.png").unlink()


def another_size(root: Path) -> None:
    save(root / "masks" / "p3.png", mask(24))


def smoothed(root: Path) -> None:
    save(root / "masks" / "p3.png", mask() // 2)


def colours(root: Path) -> None:
    save(root / "masks" / "p3.png", picture())


def broken(root: Path) -> None:
    (root / "masks" / "p3.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_mask, r"images/p3\.png: found no mask of it: add the mask"),
        (no_picture, r"masks/p3\.png: found no picture of it"),
        (another_size, r"masks/p3\.png: the mask is 24x24, but p3\.png is 20x20"),
        (smoothed, r"masks/p3\.png: found the values 127, expected 0, 255: .*--classes"),
        (colours, r"masks/p3\.png: cannot be read as a picture \(a mask of mode RGB"),
        (broken, r"masks/p3\.png: cannot be read as a picture"),
    ],
)
def test_unusable_items_are_named_or_left_out(tmp_path: Path, spoil: Any, said: str) -> None:
    spoil(folders(tmp_path))
    with pytest.raises(InputError, match=rf"{said}.*; or leave it out with --skip-bad$") as error:
        load_segmented("pairs", tmp_path, "all")
    assert "\n" not in str(error.value)
    data = load_segmented("pairs", tmp_path, "all", skip_bad=True)
    assert "p3" not in data.names
    assert (len(data), data.left_out) == (9, 1)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    cases: list[tuple[str, Path | None, str]] = [
        ("pair", tmp_path, r"^data: no 'pair', .*did you mean 'pairs'"),
        ("pairs", None, r"^root: not given"),
        ("pairs", tmp_path / "none", r"none: does not exist"),
        ("pairs", tmp_path, r"found no pairs, expected the folders images/ and masks/"),
        ("voc", tmp_path, r"found no VOCdevkit/VOC\*"),
    ]
    for name, root, said in cases:
        with pytest.raises(InputError, match=said):
            load_segmented(name, root, "train")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="its folders hold no pictures"):
        load_segmented("pairs", tmp_path, "train")
    folders(tmp_path, 2)
    with pytest.raises(InputError, match="2 items are too few"):
        load_segmented("pairs", tmp_path, "train")


def test_the_real_sets(shared_data: Path) -> None:
    retinas = load_segmented("pairs", shared_data / "CHASEDB1", "test")
    assert retinas.pixels.shape == (6, 3, 960, 999)
    assert 0.03 < (retinas.labels == 1).float().mean() < 0.15
    assert len(load_segmented("pairs", shared_data / "grabcut", "all", 64)) == 10
    assert len(load_segmented("pairs", shared_data / "salient_from_coco", "val", 64)) > 10
    people = load_segmented("voc", shared_data / "voc_from_coco", "test", 64, ("person",))
    assert len(people) == 74
    assert {0, 1, VOID} == set(people.labels.unique().tolist())
