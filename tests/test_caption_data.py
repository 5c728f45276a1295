"""Images with sentences: what is read, what is refused, and what is left out and counted."""

import json

import pytest
import torch
from PIL import Image

from foveate.data import captions
from foveate.data.captions import END, UNKNOWN, answers, load_captions, numbered, part_of, vocabulary, words_of
from foveate.types import InputError

SIDE = 16


def ids_of(part, count):
    return [number for number in range(1, 2000) if part_of(number) == part][:count]


@pytest.fixture
def folder(tmp_path):
    """COCO's layout: 12 pictures for training, 3 for val and 3 for test, in two files."""
    numbers = ids_of("train", 12) + ids_of("val", 3) + ids_of("test", 3)
    for name, some in ("train2017", numbers[:9]), ("val2017", numbers[9:]):
        (tmp_path / name).mkdir()
        for number in some:
            Image.new("RGB", (24, 12), (number % 256, 80, 0)).save(tmp_path / name / f"{number:012}.jpg")
        write(tmp_path, name, some)
    return tmp_path


def write(root, name, numbers, change=None):
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in numbers]
    said = [
        {"id": 10 * number + place, "image_id": number, "caption": sentence}
        for number in numbers
        for place, sentence in enumerate(("A cat, on a mat.", f"the cat number {number}"))
    ]
    content = {"images": images, "annotations": said}
    if change:
        change(content)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))


def broken(root, change):
    """The folder with its file of training pictures changed."""
    write(root, "train2017", ids_of("train", 9), change)
    return root


def test_words_are_lower_case_without_punctuation():
    assert words_of("A man's dog; two cats - 3 Äpfel!") == ("a", "man's", "dog", "two", "cats", "3", "äpfel")
    assert words_of(" ... ") == ()


def test_scenes_are_fixed_differ_between_splits_and_have_five_sentences():
    one, again = (load_captions("scenes", None, "train", SIDE, scenes=70) for _ in range(2))
    assert one.pixels.shape == (70, 3, SIDE, SIDE)
    assert one.pixels.dtype == torch.uint8
    assert torch.equal(one.pixels, again.pixels)
    assert one.sentences == again.sentences
    assert {len(sentences) for sentences in one.sentences} == {5}
    other = load_captions("scenes", None, "val", SIDE)
    assert len(other) == captions.SCENES["val"]
    assert not torch.equal(one.pixels, other.pixels[:70])
    assert torch.equal(load_captions("scenes", None, "train", SIDE, scenes=7).pixels, one.pixels[:7])


def test_drawing_many_scenes_is_said(monkeypatch):
    monkeypatch.setattr(captions, "MANY", 1000)
    told = []
    for scenes in (3, 4):
        load_captions("scenes", None, "train", SIDE, scenes=scenes, say=told.append)
    assert told == ["drawing 4 scenes of 16 pixels"]


def test_coco_is_read_from_all_files_and_split_by_the_hash_of_ids(folder):
    found = {part: load_captions("coco", folder, part, SIDE) for part in ("train", "val", "test", "all")}
    assert [len(each) for each in found.values()] == [12, 3, 3, 18]
    assert found["train"].pixels.shape == (12, 3, SIDE, SIDE)
    assert found["train"].sentences[0][0] == ("a", "cat", "on", "a", "mat")
    for part, each in found.items():
        assert each.skipped == ()
        if part != "all":
            assert [sentences[1][-1] for sentences in each.sentences] == list(map(str, ids_of(part, len(each))))


def test_a_split_depends_on_the_id_alone():
    shares = [part_of(number) for number in range(5000)]
    assert abs(shares.count("test") / 5000 - 0.1) < 0.02
    assert abs(shares.count("val") / 5000 - 0.1) < 0.02


def lose_image(content):
    content["annotations"][0]["image_id"] = 999_999


def no_words(content):
    content["annotations"][0]["caption"] = " . "


def no_text(content):
    content["annotations"][0]["caption"] = None


def no_caption(content):
    first = content["images"][0]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != first]


def no_file(content):
    content["images"][0]["file_name"] = "nowhere.jpg"


def outside(content):
    content["images"][0]["file_name"] = "../../secret.jpg"


def no_name(content):
    del content["images"][0]["file_name"]


def listed_id(content):
    content["annotations"].append({"id": 1, "image_id": [3], "caption": "a dog"})


def twice(content):
    content["images"].append(content["images"][0])


@pytest.mark.parametrize(
    ("change", "said", "pictures"),
    [
        (lose_image, "is of image 999999, which is not listed", 12),
        (no_words, r"has no words \(' \. '\)", 12),
        (no_text, r"has no words \(None\)", 12),
        (no_caption, "has no captions", 11),
        (no_file, "nowhere.jpg: cannot be read as a picture", 11),
        (outside, "which lies outside of", 11),
        (twice, "is listed twice", 12),
        (no_name, "has the file_name None: correct it", 11),
        (listed_id, r"caption 1 is of image \[3\], which is not listed", 12),
    ],
)
def test_what_is_wrong_is_named_or_left_out_and_counted(folder, change, said, pictures):
    broken(folder, change)
    with pytest.raises(InputError, match=said) as error:
        load_captions("coco", folder, "train", SIDE)
    assert "\n" not in str(error.value)
    assert str(error.value).count("cannot be read") <= 1, "said once"
    found = load_captions("coco", folder, "train", SIDE, skip_bad=True)
    assert len(found) == pictures
    assert len(found.skipped) == 1
    assert len(load_captions("coco", folder, "test", SIDE)) == 3  # another split is not concerned


def test_a_damaged_picture_is_named_or_left_out(folder):
    path = folder / "train2017" / f"{ids_of('train', 1)[0]:012}.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=path.name):
        load_captions("coco", folder, "train", SIDE)
    found = load_captions("coco", folder, "train", SIDE, skip_bad=True)
    assert len(found) == 11
    assert path.name in found.skipped[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": [', "Expecting value"),
        ('{"images": []}', "no 'annotations'"),
        ('{"images": {}, "annotations": []}', "'images' is no list of objects"),
        ('{"images": [{"id": "a"}], "annotations": []}', "no id that is a whole number"),
        ("[]", "list indices"),
    ],
)
def test_a_damaged_file_is_named_whatever_is_skipped(folder, content, said):
    (folder / "annotations" / "captions_train2017.json").write_text(content)
    for skip in (False, True):
        with pytest.raises(InputError, match=rf"captions_train2017\.json: is no COCO file of captions \(.*{said}"):
            load_captions("coco", folder, "train", SIDE, skip_bad=skip)


def test_what_is_missing_as_a_whole_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="data: found 'cocoa', expected one of scenes, coco"):
        load_captions("cocoa", None, "train", SIDE)
    with pytest.raises(InputError, match="root: not given"):
        load_captions("coco", None, "train", SIDE)
    with pytest.raises(InputError, match="is no folder"):
        load_captions("coco", tmp_path / "nowhere", "train", SIDE)
    with pytest.raises(InputError, match=r"no captions_\*\.json"):
        load_captions("coco", folder / "train2017", "train", SIDE)
    with pytest.raises(InputError, match="image_size: found 4"):
        load_captions("scenes", None, "train", 4)
    write(folder, "val2017", [])
    with pytest.raises(InputError, match="split 'test' has no picture"):
        load_captions("coco", folder, "test", SIDE)


def test_a_vocabulary_ranks_words_and_keeps_long_ones_out():
    url = "x" * (captions.LONGEST + 1)
    said = [[("a", "cat", url, url, url)], [("a", "dog"), ("a", "cat")]]
    words, count = vocabulary(said, 2)
    assert words == ("", "<unknown>", "a", "cat", "dog", url)
    assert count == 4  # the end, the unknown word, a, cat
    assert vocabulary(said, 1)[1] == 5


def test_numbers_of_unseen_words_differ_from_each_other_and_from_all_known():
    words = ("", "<unknown>", "a", "cat")
    ids, mask = numbered([[("a", "bird")], [("a", "fish"), ("cat", "a", "bird")]], words)
    assert ids.tolist() == [[[2, 4, 0], [0, 0, 0]], [[2, 5, 0], [3, 2, 4]]]
    assert mask.tolist() == [[[1, 1, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 1]]]


def test_answers_end_say_unknown_and_leave_out_whole_sentences():
    ids, mask = numbered([[("a", "bird")], [("a", "fish"), ("cat", "a", "bird")]], ("", "<unknown>", "a", "cat"))
    told, learned = answers(ids, mask, 4, 3)
    assert told[0, 0].tolist() == [2, UNKNOWN, END, END]
    assert learned[0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert learned[1].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]  # three words and the end are longer than 3
    assert answers(ids, mask, 4, 4)[1][1].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_the_shared_coco_captions_are_read_whole(shared_data):
    sizes = [len(load_captions("coco", shared_data / "coco", part, SIDE)) for part in ("train", "val", "test")]
    assert sum(sizes) == 332
    assert min(sizes) >= 20
