"""Drawings: geometry first (what is drawn lies where the glimpse was), then that every shape of input can be drawn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import pictures, plots
from foveate.geometry import Boxes
from foveate.types import InputError

SIDE, CELL, ZOOM = 32, 192, 6  # an image enlarged by a whole number: geometry can be counted in pixels


def changed(images, locations, patch, scales, **options):
    """Where the path changes the picture, as rows and columns relative to the image's upper left corner."""
    with_path = pictures.glimpse_paths(images, locations, patch, scales, cell=CELL, **options)
    without = pictures.image_grid(images, cell=CELL)
    assert with_path.size == without.size
    differs = (np.asarray(with_path, int) != np.asarray(without, int)).any(-1)
    rows, cols = differs.nonzero()
    return rows - pictures.MARGIN, cols - pictures.MARGIN


@pytest.mark.parametrize(("patch", "scales"), [(8, 1), (8, 2), (7, 2), (5, 3)])
def test_square_of_a_central_glimpse_is_centred_and_as_large_as_the_coarsest_patch(patch, scales):
    rows, cols = changed(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, 2), patch, scales)
    side = patch * 2 ** (scales - 1) * ZOOM
    for found in (rows, cols):
        assert (found.min() + found.max() + 1) / 2 == CELL / 2
        assert found.max() + 1 - found.min() == pytest.approx(side, abs=4)


@pytest.mark.parametrize("corner", [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0)])
def test_corners_of_the_range_are_the_outer_edges_of_the_image(corner):
    # a patch of one pixel hides under the numbered point, whose middle is the location
    rows, cols = changed(torch.zeros(1, 1, SIDE, SIDE), torch.tensor([[corner]]), 1, 1)
    for found, place in ((cols, corner[0]), (rows, corner[1])):
        assert (found.min() + found.max() + 1) / 2 == pytest.approx((place + 1) / 2 * CELL, abs=0.5)


def test_x_is_to_the_right_and_y_is_down_in_an_image_that_is_not_square():
    rows, cols = changed(torch.zeros(1, 3, 16, SIDE), torch.tensor([[[0.5, -0.5]]]), 2, 1)
    assert (cols.min() + cols.max() + 1) / 2 == pytest.approx(0.75 * CELL, abs=0.5)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(0.25 * CELL / 2, abs=0.5)


def test_a_location_beyond_the_image_is_drawn_where_the_glimpse_was_taken():
    image = torch.rand(1, 1, SIDE, SIDE)
    beyond = pictures.glimpse_paths(image, torch.tensor([[[3.0, -1.5]]]), 8, 2)
    clamped = pictures.glimpse_paths(image, torch.tensor([[[1.0, -1.0]]]), 8, 2)
    assert np.array_equal(np.asarray(beyond), np.asarray(clamped))


def test_path_runs_from_a_light_to_a_strong_colour():
    locations = torch.tensor([[[-0.75, 0.0], [0.0, 0.0], [0.75, 0.0]]])
    page = np.asarray(pictures.glimpse_paths(torch.zeros(1, 1, SIDE, SIDE), locations, 2, 1, cell=CELL), int)
    row = page[pictures.MARGIN + CELL // 2]
    quarter, three_quarters = row[pictures.MARGIN + 3 * CELL // 10], row[pictures.MARGIN + 7 * CELL // 10]
    assert quarter.sum() > three_quarters.sum() > 200  # the line is drawn at both places and darkens
    assert quarter[1] > three_quarters[1] + 50


def test_the_path_of_one_image_leaves_its_neighbours_alone():
    images, locations = torch.rand(3, 1, SIDE, SIDE), torch.zeros(3, 2, 2)
    moved = locations.clone()
    moved[1] = 0.9
    first, second = (
        np.asarray(pictures.glimpse_paths(images, where, 16, 3, columns=2), int) for where in (locations, moved)
    )
    rows, cols = (first != second).any(-1).nonzero()
    assert len(rows)
    assert rows.max() < 212
    assert cols.min() >= 212


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 5), (5, 1), (6, 4)])
@pytest.mark.parametrize("size", [(28, 28), (100, 60), (300, 200)])
def test_every_shape_is_drawn(channels, batch, time, size):
    images, locations = torch.rand(batch, channels, *size), torch.rand(batch, time, 2) * 2 - 1
    captions, correct = [f"{row} → {row}" for row in range(batch)], [row % 2 == 0 for row in range(batch)]
    page = pictures.glimpse_paths(images, locations, 8, 2, 2, captions, 4, 96, correct)
    assert page.mode == "RGB"
    width = round(96 * min(1, size[1] / size[0])) + 2 * pictures.MARGIN
    assert page.width == min(batch, 4) * width
    frames = pictures.glimpse_frames(images[0], locations[0], 8, 2, cell=96)
    assert len(frames) == time
    assert len({frame.size for frame in frames}) == 1


def test_grey_is_drawn_as_equal_channels_and_nan_as_black():
    grey = torch.rand(1, 1, SIDE, SIDE)
    pages = [pictures.image_grid(image) for image in (grey, grey.expand(-1, 3, -1, -1))]
    assert np.array_equal(*map(np.asarray, pages))
    broken = grey.clone()
    broken[0, 0, 3, 4] = math.nan
    page = np.asarray(pictures.image_grid(broken, cell=CELL))
    assert (page[pictures.MARGIN + 3 * ZOOM + 3, pictures.MARGIN + 4 * ZOOM + 3] == 0).all()


def test_other_numbers_of_channels_are_refused_in_one_line():
    with pytest.raises(InputError, match="found 4 channels, expected 1") as error:
        pictures.image_grid(torch.rand(1, 4, 8, 8))
    assert "\n" not in str(error.value)


def test_captions_of_right_and_wrong_answers_are_green_and_red():
    images, locations = torch.zeros(2, 1, SIDE, SIDE), torch.zeros(2, 1, 2)
    page = np.asarray(
        pictures.glimpse_paths(images, locations, 8, 1, 2, ["7 → 7", "7 → 1"], correct=[True, False]), int
    )
    below = page[CELL + 2 * pictures.MARGIN :]
    right, wrong = below[:, : below.shape[1] // 2], below[:, below.shape[1] // 2 :]
    assert (right[..., 1] - right[..., 0]).max() > 40
    assert (right[..., 0] - right[..., 1]).max() <= 0
    assert (wrong[..., 0] - wrong[..., 1]).max() > 40


def test_a_long_caption_stays_in_its_cell():
    page = np.asarray(pictures.image_grid(torch.zeros(1, 1, 8, 8), ["word " * 100], cell=96))
    below = (page[96 + 2 * pictures.MARGIN :] < 200).any(-1)
    assert below.any()
    assert not below[:, :2].any()
    assert not below[:, -2:].any()


def revealed(image, locations, patch, scales, factor=2, cell=CELL):
    """The right-hand panels of the frames, back in pixels of the image."""
    frames = pictures.glimpse_frames(image, torch.tensor(locations), patch, scales, factor, cell=cell)
    zoom, left = cell // image.shape[-1], cell + 3 * pictures.MARGIN
    panels = [np.asarray(frame)[pictures.MARGIN :, left:][:cell:, :cell] for frame in frames]
    return [panel[zoom // 2 :: zoom, zoom // 2 :: zoom] for panel in panels]


def test_frames_reveal_exactly_the_pixels_of_the_finest_scale_and_the_means_of_the_next():
    image = torch.rand(1, SIDE, SIDE)
    (seen,) = revealed(image, [[0.0, 0.0]], 8, 2)
    pixels = (image[0] * 255).numpy()
    assert np.abs(seen[12:20, 12:20, 0] - pixels[12:20, 12:20]).max() <= 1
    blocks = torch.nn.functional.avg_pool2d(image[None], 2)[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    ring = np.zeros((SIDE, SIDE), bool)
    ring[8:24, 8:24], ring[12:20, 12:20] = True, False
    assert np.abs(seen[..., 0] - (blocks * 255).numpy())[ring].max() <= 1
    outside = np.ones((SIDE, SIDE), bool)
    outside[8:24, 8:24] = False
    assert (seen[outside] == pictures.UNSEEN).all()


def test_a_sharp_view_is_kept_when_a_later_glimpse_covers_the_place_coarsely():
    image = torch.rand(1, SIDE, SIDE)
    first, second = revealed(image, [[0.0, 0.0], [0.25, 0.0]], 4, 3)
    pixels = (image[0] * 255).numpy()
    assert np.abs(second[14:18, 14:18, 0] - pixels[14:18, 14:18]).max() <= 1
    assert np.abs(second[14:18, 18:22, 0] - pixels[14:18, 18:22]).max() <= 1
    assert np.abs(first[14:18, 18:22, 0] - pixels[14:18, 18:22]).max() > 5


def test_factor_three_averages_blocks_of_nine_pixels():
    image = torch.rand(3, 33, 33)
    (seen,) = revealed(image, [[0.0, 0.0]], 5, 2, 3, cell=33 * 6)
    blocks = torch.nn.functional.avg_pool2d(image[None, :, 9:12, 9:12], 3)[0, :, 0, 0]
    assert np.abs(seen[9:12, 9:12] - (blocks * 255).numpy()).max() <= 1


def test_gif_keeps_its_frames_sizes_and_pixels(tmp_path):
    frames = pictures.glimpse_frames(torch.rand(1, 28, 28), torch.rand(6, 2) * 2 - 1, 8, 2, cell=112)
    path = tmp_path / "path.gif"
    pictures.save_gif(path, frames, 250)
    with Image.open(path) as animation:
        assert animation.n_frames == 6
        assert animation.info["loop"] == 0
        for step, frame in enumerate(frames):
            animation.seek(step)
            assert animation.info["duration"] == (250 if step < 5 else 750)
            difference = np.asarray(animation.convert("RGB"), int) - np.asarray(frame, int)
            assert animation.size == frame.size
            assert np.abs(difference).mean() < 4
    assert [file.name for file in tmp_path.iterdir()] == ["path.gif"]


def test_gif_of_one_frame_and_of_none(tmp_path):
    pictures.save_gif(tmp_path / "one.gif", [Image.new("RGB", (9, 7), "red")])
    with Image.open(tmp_path / "one.gif") as animation:
        assert animation.n_frames == 1
        assert animation.size == (9, 7)
    with pytest.raises(InputError, match="found no frames"):
        pictures.save_gif(tmp_path / "none.gif", [])
    assert not (tmp_path / "none.gif").exists()


def count(image, colour):
    """Pixels of nearly this colour."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return int((np.abs(np.asarray(image, int) - wanted).max(-1) < 12).sum())


def test_line_plot_draws_every_series_in_its_colour_and_the_band():
    series = {name: [(x, y + 0.1 * x) for x in range(5)] for name, y in (("a", 1.0), ("b", 2.0), ("c", math.nan))}
    plain = plots.line_plot(series, "glimpses", "accuracy", "A title")
    assert count(plain, plots.PALETTE[0]) > 300
    assert count(plain, plots.PALETTE[1]) > 300
    band = plots.line_plot(series, "glimpses", "accuracy", bands={"a": [(x, 0.5, 1.5) for x in range(5)]})
    assert count(band, "#d8e9f3") > 1000 > count(plain, "#d8e9f3")


def test_line_plot_takes_one_point_no_point_and_a_logarithm():
    for series in ({}, {"nothing": []}, {"one": [(1.0, 0.5)]}, {"nan": [(1.0, math.nan)]}):
        assert plots.line_plot(series, "x", "y", logy=True).mode == "RGB"


def rows(phase, steps, **metrics):
    return [{"phase": phase, "step": step, "seconds": 0.1 * step, **metrics} for step in steps]


def test_training_curves_colour_the_phases_and_need_something_to_draw():
    assert plots.training_curves([]) is None
    assert plots.training_curves(rows("train", range(3))) is None
    log = rows("pretrain", range(0, 40, 2), loss=2.0) + rows("reward", range(0, 60, 2), loss=1.0, reward=0.5)
    page = plots.training_curves(log)
    assert count(page, plots.PALETTE[0]) > 100
    assert count(page, plots.PALETTE[1]) > 100
    assert count(page, plots.PALETTE[2]) == 0


def test_training_curves_take_one_row_and_values_that_are_not_finite():
    log = rows("train", [0], loss=math.nan, reward=math.inf, accuracy=0.5, note="a word")
    assert plots.training_curves(log).mode == "RGB"


def test_steps_of_a_phase_that_begins_anew_follow_the_phase_before():
    found = plots._curves(rows("a", (0, 5, 10), loss=1.0) + rows("b", (0, 5), loss=2.0) + rows("c", (15, 20), loss=3.0))
    assert found == {"loss": {"a": [(0, 1), (5, 1), (10, 1)], "b": [(10, 2), (15, 2)], "c": [(15, 3), (20, 3)]}}


def test_compare_draws_the_metrics_that_runs_share():
    runs = {"one": rows("train", range(9), loss=1.0, only=3.0), "two": rows("train", range(9), loss=2.0)}
    shared, alone = plots.compare_curves(runs), plots.compare_curves({"one": runs["one"]})
    assert shared.width < alone.width  # one panel against two
    assert count(shared, plots.PALETTE[0]) > 100
    assert count(shared, plots.PALETTE[1]) > 100
    assert plots.compare_curves({"a": rows("t", [1], x=1.0), "b": rows("t", [1], y=1.0)}) is None
    assert plots.compare_curves({}) is None


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite():
    values = np.full(120, 0.75)
    values[[0, 30, 119]] = math.nan
    assert np.allclose(plots._smooth(values), 0.75)
    assert np.isnan(plots._smooth(np.array([math.nan, math.nan]))).all()
    noisy = np.random.default_rng(0).normal(size=600)
    assert plots._smooth(noisy).std() < noisy.std() / 4


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (11, 4, 3)])
def test_many_pictures_of_the_user_are_no_tower(count: int, columns: int, rows: int) -> None:
    """One set of boxes each fills a square; where there are several sets a row stays an image."""
    none = Boxes(torch.zeros(count, 1, 4), torch.zeros(count, 1, dtype=torch.long), torch.zeros(count, 1, dtype=bool))
    images = torch.zeros(count, 3, 8, 8)
    one = pictures.box_grid(images[:1], {"tuned": none}, ["cup"], columns=1)
    many = pictures.box_grid(images, {"tuned": none}, ["cup"])
    assert [round(a / b) for a, b in zip(many.size, one.size, strict=True)] == [columns, rows]
    both = pictures.box_grid(images, {"start": none, "tuned": none}, ["cup"])
    assert [round(a / b) for a, b in zip(both.size, one.size, strict=True)] == [2, count]
