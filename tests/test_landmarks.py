"""Volumes, warps and walks to landmarks: places are where the files say, rewards are squared distances, walks learn."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from foveate import noise
from foveate.data.nifti import in_voxels, isotropic, line_of, read_csv, read_fcsv, read_volume
from foveate.data.own_volumes import read_volumes, volumes_of
from foveate.data.pyramid import halved
from foveate.data.volumes import Volumes, held_out, load_volumes
from foveate.data.warps import moved, random_warps, sources, warped
from foveate.envs.landmark_search import away, every_landmark, scores, search, with_belief
from foveate.envs.landmark_walk import MOVES, STEPS, LandmarkWalkEnv, WalkState
from foveate.learn.replay import Replay
from foveate.models.atlas import most_usual, registered
from foveate.models.cube_q import CubeQ, VolumeRegressor, stretched
from foveate.report import direction
from foveate.run import Run
from foveate.systems import landmarks as system
from foveate.types import InputError, map_tree
from foveate.value_learning import Acting, learn_by_acting

SIZE = (24, 28, 20)  # x, y, z


def blobs(centres: Tensor, size: tuple[int, int, int] = SIZE, width: float = 2.0) -> Tensor:
    """A volume with a bright ball at each place, [depth, height, width]."""
    z, y, x = torch.meshgrid(*(torch.arange(float(count)) for count in size[::-1]), indexing="ij")
    grid = torch.stack((x, y, z), -1)[..., None, :]
    return torch.exp(-((grid - centres) ** 2).sum(-1) / (2 * width**2)).amax(-1)


def balls(count: int, landmarks: int = 1, spacing: float = 1.5, split: str = "train") -> Volumes:
    """Grey volumes in which the first landmark is a bright ball, the second a dark one."""
    room = torch.tensor(SIZE) - 1
    where = (0.15 + 0.7 * noise.uniform(noise.key("balls", split, torch.arange(count)), landmarks, 3)) * room
    signs = [0.5, -0.5, 0.25]
    made = [
        0.5 + sum(sign * blobs(one[None], width=3.0) for sign, one in zip(signs, each, strict=False)) for each in where
    ]
    voxels = (torch.stack(made).clamp(0, 1) * 255).round().to(torch.uint8)
    names = tuple(f"ball {number}" for number in range(landmarks))
    return Volumes(voxels, torch.tensor([SIZE]).expand(count, 3), where, names, ("",) * count, spacing, "folder", split)


def of_one(data: Volumes) -> Volumes:
    """The bright ball is the landmark; the dark one is only in the way."""
    return replace(data, landmarks=data.landmarks[:, :1], names=data.names[:1])


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4) if affine is None else affine), path)
    return path


def brightest(voxels: Tensor) -> Tensor:
    """The middle of the brightest voxels, x, y, z."""
    return (voxels >= voxels.max() - 1e-3).nonzero().float().mean(0).flip(0)


# ---- files ----


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "AIL"])
def test_a_volume_is_turned_to_right_anterior_superior(tmp_path: Path, axes: str) -> None:
    values = np.zeros(SIZE, np.float32)
    values[5, 20, 12], values[8, 3, 2] = 100.0, 40.0
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -10, 5, 7
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(nibabel.Nifti1Image(values, affine).as_reoriented(turn), tmp_path / "a.nii.gz")
    grid = read_volume(tmp_path / "a.nii.gz")
    assert grid.voxels.shape == SIZE[::-1]
    assert grid.voxels[12, 20, 5] > 0
    world = torch.tensor([[2.0 * 5 - 10, 2.0 * 20 + 5, 2.0 * 12 + 7]])
    torch.testing.assert_close(in_voxels(grid, world), torch.tensor([[5.0, 20, 12]]), atol=1e-4, rtol=0)


def test_an_anisotropic_volume_becomes_isotropic_and_places_stay(tmp_path: Path) -> None:
    """Thin slices of a ramp and of a ball: the ramp stays one, the ball stands where it was in mm."""
    spacing = np.array([0.5, 1.0, 3.0])
    x, y, z = np.meshgrid(*(np.arange(count) for count in (48, 24, 10)), indexing="ij")
    world = np.stack((x, y, z), -1) * spacing
    ball = np.array([11.0, 9.0, 15.0])
    save(tmp_path / "ball.nii", np.exp(-((world - ball) ** 2).sum(-1) / 32), np.diag([*spacing, 1]))
    save(tmp_path / "ramp.nii", world @ [1.0, 2.0, -0.5], np.diag([*spacing, 1]))
    grid = isotropic(read_volume(tmp_path / "ball.nii"), 1.0)
    assert grid.size == (24, 24, 28)
    place = in_voxels(grid, torch.tensor(ball, dtype=torch.float32)[None])
    torch.testing.assert_close(place[0], torch.tensor(ball).float())
    assert (brightest(grid.voxels) - place[0]).abs().max() <= 1
    ramp = isotropic(read_volume(tmp_path / "ramp.nii"), 1.0).voxels[3:-3, 3:-3, 3:-3]
    for dim in range(3):
        change = ramp.diff(dim=dim)
        assert (change - change.median()).abs().max() < 0.02 * change.median().abs()


def broken(tmp_path: Path, kind: str) -> Path:
    path, values = tmp_path / "v.nii", np.arange(120.0).reshape(4, 5, 6)
    if kind == "4d":
        return save(path, np.zeros((4, 5, 6, 2)))
    if kind == "constant":
        return save(path, np.full((4, 5, 6), 7.0))
    if kind == "nan":
        values[0, 0, 0] = np.nan
    save(path, values)
    if kind == "zero":
        held = bytearray(path.read_bytes())
        held[84:88] = np.float32(0).tobytes()  # pixdim[2]
        path.write_bytes(held)
    if kind == "affine":
        held = bytearray(path.read_bytes())
        held[296:312] = np.zeros(4, np.float32).tobytes()  # srow_y
        path.write_bytes(held)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:500])
    if kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zero", r"its spacing is 1, 0, 1 mm, expected numbers above 0"),
        ("affine", r"its spacing is .*0.* mm, expected numbers above 0"),
        ("4d", r"has 4 dimensions \(4x5x6x2\), expected 3"),
        ("constant", r"has the value 7 everywhere"),
        ("nan", r"holds voxels that are no finite numbers"),
        ("cut", r"is no readable NIfTI file"),
        ("missing", r"does not exist"),
    ],
)
def test_a_broken_volume_is_named(tmp_path: Path, kind: str, message: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(InputError, match=rf"^{path}: {message}[^\n]*$"):
        read_volume(path)


def test_a_last_dimension_of_one_is_none(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "a.nii", np.arange(24.0).reshape(2, 3, 4, 1))).size == (2, 3, 4)


HEAD = "volume,landmark,i,j,k,x_mm,y_mm,z_mm\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,tip,1,1,1,1,1,1\nc,tip,1,1,1,1,1,1\n", r"line 3: names the volume 'c', of which there is no file"),
        ("a,tip,1,1,1,1,x,1\n", r"line 2: found 1, x, 1, expected three numbers"),
        ("a,tip,1,1,1,1,nan,1\n", r"line 2: found 1, nan, 1, expected three finite"),
        ("a,tip,1,1,1,1,1,1\na,tip,1,1,1,2,2,2\n", r"line 3: 'tip' of a is given twice"),
        ("a,tip,1,1,1,1,1,1\n", r"has no landmark of b"),
        ("a,tip,1,1,1,1,1,1\na,end,1,1,1,1,1,1\nb,tip,1,1,1,1,1,1\n", r"b lacks the landmark 'end'"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "landmarks.csv"
    path.write_text(HEAD + rows)
    separator = "," if message.startswith("line") else ":"
    with pytest.raises(InputError, match=rf"^{path}{separator} {message}[^\n]*$"):
        read_csv(path, {"a": tmp_path / "a.nii", "b": tmp_path / "b.nii"})


def test_other_columns_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "landmarks.csv"
    with pytest.raises(InputError, match=r"landmarks\.csv: cannot be read as text"):
        read_csv(path, {})
    path.write_text("volume,name,x,y,z\na,tip,1,2,3\n")
    with pytest.raises(InputError, match=r"its columns are volume, name, x, y, z, expected volume, landmark"):
        read_csv(path, {"a": path})


def folder_of(tmp_path: Path, count: int = 3, point: str = "3,4,5") -> Path:
    lines = ["volume,landmark,i,j,k"]
    for number in range(count):
        save(tmp_path / f"s{number}.nii.gz", blobs(torch.tensor([[3.0, 4, 5]])).numpy().transpose(2, 1, 0))
        lines.append(f"s{number}.nii.gz,tip,{point if number == count - 1 else '3,4,5'}")
    (tmp_path / "landmarks.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_folder_is_read_split_and_resampled(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 7)
    parts = [load_volumes("folder", root, part, None, 2) for part in ("train", "val", "test")]
    assert [len(set(part.files)) for part in parts] == [5, 1, 1]
    assert len(parts[0]) == 10, "each as it is, and warped"
    assert len(set().union(*(part.files for part in parts))) == 7
    for data in parts:
        for row in range(len(data)):
            assert (brightest(data.cut(row)) - data.landmarks[row, 0]).norm() < 1.5
    coarse = load_volumes("folder", root, "test", 2.0, 1)
    torch.testing.assert_close(coarse.landmarks[0, 0], torch.tensor([1.5, 2, 2.5]))
    assert coarse.spacing == 2.0


@pytest.mark.parametrize(
    ("count", "point", "message"),
    [
        (
            3,
            "30,4,5",
            r"landmarks\.csv, line 4: 'tip' of s2 lies at voxel 30\.0, 4\.0, 5\.0, outside of the volume of 24, 28",
        ),
        (2, "3,4,5", r": 2 volumes are too few to hold out split"),
        (0, "3,4,5", r": no volumes \(\*\.nii\.gz, \*\.nii\) in it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, count: int, point: str, message: str) -> None:
    root = folder_of(tmp_path, count, point)
    with pytest.raises(InputError, match=message):
        [load_volumes("folder", root, part, None, 1) for part in ("train", "val", "test")]


def test_mistakes_in_the_asking_are_named(tmp_path: Path) -> None:
    for settings, message in (
        (("brains", None, "train"), r"^data: found 'brains', expected one of template"),
        (("folder", None, "train"), r"^root: not given"),
        (("folder", tmp_path / "no", "train"), r"^root: .* is no folder"),
        (("template", None, "train", 0.0), r"^spacing: found 0 mm"),
        (("template", None, "train", 8.0, 0), r"^warps: found 0"),
        (("afids", tmp_path, "train"), r"no NAME_T1w\.nii\.gz in it"),
    ):
        with pytest.raises(InputError, match=message):
            load_volumes(*settings)


def test_points_of_slicer_are_read_in_both_systems(tmp_path: Path) -> None:
    path, line = tmp_path / "a.fcsv", "node_1,1.5,-2,3,0,0,0,1,1,1,0,1,AC,vol\n"
    path.write_text("# CoordinateSystem = 0\n" + line)
    assert read_fcsv(path) == {"AC": (1.5, -2.0, 3.0)}
    path.write_text("# CoordinateSystem = LPS\n" + line)
    assert read_fcsv(path) == {"AC": (-1.5, 2.0, 3.0)}
    for text, message in (
        (line + line, r"line 2: 'AC' is given twice"),
        ("node,1,2\n", r"line 1: has 3 fields"),
        (line.replace("1.5", "x"), r"line 1: found x, -2, 3"),
        ("# CoordinateSystem = 7\n" + line, r"line 1: the coordinate system '7'"),
        ("# nothing\n", r"has no points"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_fcsv(path)


def test_a_point_outside_is_named_with_its_own_line(tmp_path: Path) -> None:
    for name in ("case_1", "case_10", "case_2"):
        save(tmp_path / f"{name}.nii.gz", blobs(torch.tensor([[3.0, 4, 5]])).numpy().transpose(2, 1, 0))
    lines = ["volume,landmark,i,j,k", "case_10,AC,3,4,5", "case_10,AC2,3,4,5", "case_1,AC2,3,4,5", "case_1,AC,30,4,5"]
    lines += ["case_2,AC,3,4,5", "case_2,AC2,3,4,5"]
    (tmp_path / "landmarks.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"landmarks\.csv, line 5: 'AC' of case_1 lies at voxel 30\.0"):
        [load_volumes("folder", tmp_path, part, None, 1) for part in ("train", "val", "test")]
    slicer = tmp_path / "a_afids.fcsv"
    slicer.write_text("# AC\n" + "".join(f"n,1,2,3,0,0,0,1,1,1,0,{name},,v\n" for name in ("AC2", "AC")))
    assert line_of(slicer, "AC", "") == ", line 3"


def test_held_out_names_depend_on_names_alone() -> None:
    names = tuple(f"v{number}" for number in range(40))
    parts = held_out(names)
    assert {part: len(found) for part, found in parts.items()} == {"test": 8, "val": 5, "train": 27}
    assert held_out(names[::-1]) == parts
    more = held_out((*names, "another"))
    assert len(set(more["test"]) & set(parts["test"])) >= 7


def test_the_hippocampi_are_read_with_the_points_of_their_table(shared_data: Path) -> None:
    root = shared_data / "Task04_Hippocampus"
    data = load_volumes("decathlon", root, "test", None, 1)
    assert data.names[0] == "anterior_centroid"
    assert len(data) == 25
    assert data.spacing == 1.0
    row = data.files[0]
    told = [line.split(",") for line in (root / "landmarks.csv").read_text().splitlines() if line.startswith(f"{row},")]
    torch.testing.assert_close(data.landmarks[0], torch.tensor([[float(n) for n in each[2:5]] for each in told]))
    labels = nibabel.load(root / "labelsTr" / f"{row}.nii.gz").get_fdata()
    i, j, k = data.landmarks[0, 0].round().long().tolist()
    assert labels[i, j, k] == 1, "the anterior part"


def test_experts_points_lie_in_their_templates(shared_data: Path) -> None:
    data = load_volumes("afids", shared_data / "afids_templates", "val", 4.0, 1)
    assert len(data.names) == 32
    assert len(data) == 2


# ---- warps ----


def test_points_go_where_the_warp_takes_the_volume() -> None:
    keys = noise.key("warps", torch.arange(6))
    warps = random_warps(keys, SIZE)
    points = torch.tensor(SIZE) * (0.3 + 0.4 * noise.uniform(noise.fold(keys, "points"), 5, 3))
    torch.testing.assert_close(sources(warps, moved(warps, points)), points, atol=1e-3, rtol=0)
    one = torch.tensor([[11.0, 15, 9]])
    found = warped(warps, blobs(one))
    for row, there in enumerate(moved(warps, one.expand(6, 1, 3))[:, 0]):
        assert (brightest(found[row]) - there).abs().max() <= 1.0
    assert (moved(warps, one.expand(6, 1, 3)) - one).norm(dim=2).mean() > 1, "and it takes it somewhere"
    still = random_warps(keys, SIZE, 0.0)
    torch.testing.assert_close(warped(still, blobs(one))[0], blobs(one), atol=1e-5, rtol=0)


def test_the_template_is_warped_anew_for_every_split() -> None:
    parts = [load_volumes("template", None, part, 8.0, 3) for part in ("train", "test")]
    assert not torch.equal(parts[0].landmarks, parts[1].landmarks)
    data = parts[0]
    order = data.landmarks[:, :, 1].argsort(1)
    assert (order[:, -1] == data.names.index("genu of corpus callosum")).all(), "most anterior"
    assert (order[:, 0] == data.names.index("splenium of corpus callosum")).all(), "most posterior"
    lowest = data.landmarks[:, :, 2].argmin(1)
    assert (lowest == data.names.index("pontomesencephalic junction")).all()


# ---- the walk ----


def walking(copies: int = 32, landmarks: int = 2, **options: Any) -> LandmarkWalkEnv:
    env = LandmarkWalkEnv(
        copies, volumes=balls(4, landmarks), **{"scales": 3, "cube": 5, "autoreset": "disabled"} | options
    )
    env.reset(seed=0)
    return env


def at(env: LandmarkWalkEnv, place: list[int], scale: int = 0, **changes: Any) -> WalkState:
    state = map_tree(lambda leaf: leaf[:1], env.state)
    there = {
        "place": torch.tensor([place], dtype=torch.int16),
        "scale": torch.tensor([scale], dtype=torch.int8),
        "past": torch.full_like(state.past, -(2**15)),
        "low": torch.zeros(1, 3, dtype=torch.int16),
        "high": (torch.tensor([SIZE]) - 1).to(torch.int16),
    }
    return WalkState(**vars(state) | there | changes)


def step(env: LandmarkWalkEnv, state: WalkState, move: str) -> tuple[WalkState, float, bool]:
    count = len(state.volume)
    after, reward, over = env.transition(state, torch.full((count,), MOVES.index(move)), torch.zeros(count).long())
    return after, float(reward[0]), bool(over[0])


def test_rewards_are_the_decrease_of_the_squared_distance_in_squared_steps() -> None:
    env = walking(64)
    for turn in range(6):
        state = env.state
        actions = noise.integers(noise.key(turn, torch.arange(64)), 6)
        after, reward, _ = env.transition(state, actions, torch.zeros(64).long())
        moved_to = (state.place + env.steps[actions]) * 2 ** state.scale.long()[:, None]
        target = env.targets[state.volume.long(), state.landmark.long()]
        before = (env.distance(state) / 1.5) ** 2
        gain = (before - ((moved_to - target) ** 2).sum(1)) / 4.0**state.scale
        stayed = ~env.left(WalkState(**vars(after)))
        torch.testing.assert_close(reward[stayed], gain.clamp(-1, 1)[stayed], atol=1e-3, rtol=0)
        told = env.rewarded(state).gather(1, actions[:, None]).squeeze(1)
        assert torch.equal(told, reward > 0)
        env.step(actions)


def test_a_walk_that_turns_around_goes_on_finer_and_ends_at_the_finest() -> None:
    env = walking()
    state = at(env, [3, 3, 2], 1)
    state, _, over = step(env, state, "right")
    assert not over
    assert state.scale.item() == 1
    state, _, over = step(env, state, "left")
    assert not over
    assert state.scale.item() == 0
    assert state.place[0].tolist() == [6, 6, 4], "the same place"
    assert (state.past == -(2**15)).all()
    for move in ("superior", "anterior", "inferior"):
        state, _, over = step(env, state, move)
        assert not over
    state, _, over = step(env, state, "posterior")
    assert over, "four steps around"
    assert state.place[0].tolist() == [6, 6, 4]
    torch.testing.assert_close(env.answer(state)[0], torch.tensor([6.0, 6.5, 4.5]))


def test_leaving_is_right_where_the_landmark_is_not_shown_and_wrong_where_it_is() -> None:
    env = walking()
    state, reward, over = step(env, at(env, [0, 5, 5]), "left")
    assert (reward, over) == (-1.0, True)
    assert env.left(state).item()
    target = env.targets[int(env.state.volume[0]), int(env.state.landmark[0])]
    low = torch.tensor([[int(target[0]) + 2, 0, 0]], dtype=torch.int16)
    state = at(env, [int(low[0, 0]), 5, 5], low=low)
    assert env.hidden(state).item()
    assert env.rewarded(state)[0, MOVES.index("left")]
    _, reward, over = step(env, state, "left")
    assert (reward, over) == (1.0, True)


def test_half_of_the_parts_show_the_landmark_if_asked() -> None:
    env = walking(800, absent=0.5)
    hidden = env.hidden(env.state)
    assert abs(hidden.float().mean().item() - 0.5) < 0.06
    whole = ((env.state.low == 0) & (env.state.high == torch.tensor(SIZE) - 1)).all(1)
    assert whole.float().mean() < 0.1, "an edge alone says nothing"
    assert (env.state.high - env.state.low > 3).all()
    assert not env.left(env.state).any()
    assert not walking(100).hidden(walking(100).state).any()


def test_a_cube_is_a_part_of_the_pyramid_and_dark_outside() -> None:
    env = walking(64, absent=0.3)
    voxels = balls(4, 2).voxels[:, None].float()
    levels = [voxels, halved(voxels), halved(halved(voxels)), halved(halved(halved(voxels)))]
    seen = env.observe(env.state)["cube"]
    for row, wider in itertools.product(range(64), (0, 1)):
        state = map_tree(lambda leaf, row=row: leaf[row], env.state)
        scale = int(state.scale) + wider
        level, middle = levels[scale][int(state.volume), 0], (state.place / 2**wider).round().int().tolist()
        for index in noise.integers(noise.key(row), 5, 12, 3).tolist():
            z, y, x = index
            place = [middle[0] + x - 2, middle[1] + y - 2, middle[2] + z - 2]
            shown = all(int(a) <= p * 2**scale <= int(b) for a, p, b in zip(state.low, place, state.high, strict=True))
            expected = float(level[place[2], place[1], place[0]]) / 255 if shown else 0.0
            assert seen[row, wider, z, y, x].item() == pytest.approx(expected, abs=0.6 / 255)


def test_time_is_told_a_landmark_and_less_of_it_is_better() -> None:
    volumes = balls(4, 2)
    told = scores(volumes.landmarks.float(), volumes, seconds=2.0)
    assert told["milliseconds_a_landmark"] == pytest.approx(2000 / volumes.landmarks[..., 0].numel())
    assert "milliseconds_a_landmark" not in scores(volumes.landmarks.float(), volumes)
    assert direction("milliseconds_a_landmark") == -1


def test_smoothing_keeps_the_mean_and_every_second_voxel() -> None:
    ramp = torch.arange(16.0)[None, None, None, None].expand(1, 1, 8, 8, 16)
    torch.testing.assert_close(halved(ramp)[0, 0, 2, 2, 1:-1], ramp[0, 0, 0, 0, 2:-2:2])
    assert halved(torch.ones(1, 1, 7, 8, 9)).shape == (1, 1, 4, 4, 5)


def test_guided_steps_lead_to_the_landmark_from_anywhere() -> None:
    env = walking(200, starts="anywhere", horizon=60)
    for turn in range(60):
        dice = noise.uniform(noise.key(turn, torch.arange(200)), 6)
        env.step((dice + env.rewarded(env.state)).argmax(1))
    assert env.waiting.all()
    assert not env.left(env.state).any()
    target = env.targets[env.state.volume.long(), env.state.landmark.long()]
    assert (env.answer(env.state) - target).norm(dim=1).mean() < 1.0, "in voxels"


def test_a_million_states_take_less_than_200_megabytes() -> None:
    env = walking(250)
    assert Replay(env.state, 4000).size < 200e6


def test_the_picture_marks_the_place_and_the_landmark() -> None:
    picture = walking(3).draw(walking(3).state)
    assert picture.shape == (3, 28, 2 * 24 + 28, 3)
    for colour in ((255, 120, 0), (0, 200, 120)):
        assert (picture == torch.tensor(colour)).all(-1).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cube": 4}, r"^cube: found 4, expected an odd number"),
        ({"scales": 0}, r"^scales: found 0"),
        ({"past": 300}, r"^past: found 300"),
        ({"absent": 0.7}, r"^absent: found 0.7"),
        ({"data": "decathlon", "volumes": None}, r"^root: not given"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LandmarkWalkEnv(1, **{"volumes": balls(1)} | settings)


# ---- networks and baselines ----


def test_each_landmark_has_its_own_head_at_each_scale() -> None:
    torch.manual_seed(0)
    env = walking(16, cube=7)
    network = CubeQ(7, 2, 3, width=4, hidden=16)
    seen = env.observe(env.state)
    network(seen)[(env.state.landmark == 0) & (env.state.scale == 2)].sum().backward()
    heads = network.heads.weight.grad.view(2, 3, 7, 19).abs().sum((2, 3))
    assert heads[0, 2] > 0
    assert heads.sum() == heads[0, 2]
    with pytest.raises(InputError, match=r"^cube: found 5"):
        CubeQ(5, 1, 1)


def test_the_belief_is_where_the_landmark_lies_and_values_do_not_teach_it() -> None:
    torch.manual_seed(0)
    env = walking(64, cube=7)
    network = CubeQ(7, 2, 3, width=4, hidden=16)
    seen = env.observe(env.state)
    values, losses = with_belief(network.both, env, seen, env.state)
    torch.testing.assert_close(values, network(seen))
    values.sum().backward()
    assert network.belief.weight.grad is None
    far, hidden = env.far(env.state), env.hidden(env.state)
    step = torch.tensor(STEPS).float()
    inside = ~env._outside(env.state, env.state.place[:, None] + env.steps)
    assert inside.float().mean() > 0.5
    assert torch.equal(env.rewarded(env.state)[inside], ((2 * far @ step.T - 1) > 0)[inside]), "in steps, x, y, z"
    off = network.both(seen)[1] - far.clamp(-6, 6)
    loss = torch.where(off.abs() < 1, 0.5 * off.square(), off.abs() - 0.5).mean(1)
    torch.testing.assert_close(losses["belief_loss"], loss[~hidden].mean())


def test_a_stretched_volume_is_seen_whole_whatever_its_padding() -> None:
    small = blobs(torch.tensor([[5.0, 6, 7]]), (12, 14, 16))
    padded = torch.zeros(2, 30, 32, 34)
    padded[0, :16, :14, :12] = small
    padded[1] = blobs(torch.tensor([[15.0, 15, 15]]), (34, 32, 30))
    sizes = torch.tensor([[12, 14, 16], [34, 32, 30]])
    found = stretched((padded * 255).to(torch.uint8), sizes, 24)
    expected = torch.tensor([[5.0, 6, 7], [15, 15, 15]]) / (sizes - 1) * 23
    for row in range(2):
        assert (brightest(found[row, 0]) - expected[row]).abs().max() <= 1.0
    assert VolumeRegressor(24, 2)(found).shape == (2, 2, 3)


def test_registration_finds_a_shift_and_takes_the_points_along() -> None:
    shape = torch.tensor([[8.0, 9, 7], [15, 18, 12], [10, 20, 8]])
    atlas, volume = blobs(shape, width=3.0), blobs(shape + torch.tensor([2.0, -1.5, 1.0]), width=3.0)
    found = registered(atlas, volume, shape, 1.5, elastic=False)
    assert (found - shape - torch.tensor([2.0, -1.5, 1.0])).norm(dim=1).mean() < 0.7
    assert most_usual(torch.tensor([[[0.0, 0, 0]], [[1, 1, 1]], [[5, 5, 5]]])) == 1


# ---- learning ----


def test_walks_learn_to_find_a_ball_in_volumes_they_have_not_seen(tmp_path: Path) -> None:
    """From this seed, and far better than the mean place, and than before."""
    data, test = (of_one(balls(count, 2, split=split)) for count, split in ((24, "train"), (12, "test")))
    how = {"scales": 3, "cube": 7}
    torch.manual_seed(0)
    policy, target = (CubeQ(7, 1, 3, width=8, hidden=64) for _ in range(2))
    env = LandmarkWalkEnv(32, volumes=data, **how)
    env.reset(seed=0)
    run = Run(tmp_path / "run", system="test", config={}, steps=300, device="cpu", quiet=True)
    optimizer, replay = torch.optim.Adam(policy.parameters()), Replay(env.state, 300)
    run.track(policy=policy, target=target, optimizer=optimizer, env=env, replay=replay)
    settings = Acting(batch=128, discount=0.5, learning_rate=3e-3)
    learn_by_acting(run, "walk", 1.0, env, policy, target, optimizer, replay, settings, good=env.rewarded)
    mean = data.relative.mean(0)
    found = search(policy.eval(), every_landmark(test, mean, 3, "cpu", **how), test, 3)
    start = mean * (test.sizes[:, None] - 1)
    assert away(found.points, test).mean() < 0.35 * away(start, test).mean()
    assert found.present.all()


# ---- the system ----


@pytest.fixture(scope="module")
def config() -> system.Config:
    return system.resolve(system.Config(spacing=8.0, warps=3, side=8, registrations=0, starts=3))


def test_predict_gives_places_in_the_voxels_and_the_space_it_was_given(config: system.Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = system.build(config).eval()
    volume = blobs(torch.tensor([[20.0, 20, 20]]), (44, 40, 48), 9.0)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -50, -60, 10
    path = save(tmp_path / "a.nii.gz", volume.numpy().transpose(2, 1, 0), affine)
    given = read_volumes(path, config.spacing)
    found = system.predict(config, policy, given)
    count = len(config.landmarks)
    assert found["points"].shape == found["points_mm"].shape == (1, count, 3)
    assert found["present"].shape == found["spread"].shape == (1, count)
    torch.testing.assert_close(found["points_mm"], found["points"] * 8 + torch.tensor([-50.0, -60, 10]))
    plain = system.predict(config, policy, {"volume": volume[None, None], "spacing": torch.full((1, 3), 4.0)})
    assert (plain["points_mm"] / plain["points"]).nan_to_num(4.0).sub(4).abs().max() < 1e-3
    assert system.predict(config, policy, volume[None, None])["points"].shape == (1, count, 3)
    run = Run(tmp_path / "run", system="landmarks", config={}, steps=1, device="cpu", quiet=True)
    drawn = system.picture(config, policy, run, given)
    assert drawn["walks"].width > 300
    assert len(drawn["a walk"]) > 1


def test_volumes_that_break_the_convention_are_named(config: system.Config) -> None:
    names = config.landmarks
    with pytest.raises(InputError, match=r"^volume: not given, only spacing"):
        system.predict(config, system.build(config), {"spacing": torch.ones(1, 3)})
    with pytest.raises(InputError, match=r"^volumes: found values of 0 to 300"):
        volumes_of(torch.linspace(0, 300, 60).view(1, 1, 3, 4, 5), torch.ones(1, 3), 1.0, names)
    with pytest.raises(InputError, match=r"^spacing: found 0 mm"):
        volumes_of(torch.rand(1, 1, 3, 4, 5), torch.tensor([[1.0, 0.0, 1.0]]), 1.0, names)
    policy = system.build(config)
    for shape in ((3, 4, 5), (1, 3, 4, 5), (1, 2, 3, 4, 5)):
        with pytest.raises(InputError, match=r"^volumes: found \[.*expected \[batch, 1, depth, height, width\]"):
            system.predict(config, policy, torch.rand(shape))
    with pytest.raises(InputError, match=r"^spacing: found \[3\], expected \[2, 3\]"):
        system.predict(config, policy, {"volume": torch.rand(2, 1, 3, 4, 5), "spacing": torch.ones(3)})
    with pytest.raises(InputError, match=r"no volumes"):
        read_volumes(Path(__file__).parent, 1.0)


@pytest.mark.parametrize("starts", [1, 3, 4])
def test_the_error_against_walks_ends_at_the_error_of_all(config: system.Config, starts: int) -> None:
    torch.manual_seed(1)
    config = replace(config, starts=starts, horizon=20, absent=0.0)
    data, policy = system._data(config, "test"), system.build(config).eval()
    env = system._walking(config, data, policy, starts)
    assert starts == 1 or search(policy, env, data, starts).gone.any()
    metrics, curves = system._walked(config, policy, data)
    assert curves["error (mm) against walks"]["agent"][-1] == (starts, metrics["error_mm"])


def test_registration_is_left_out_where_a_volume_is_too_thin_for_it(
    config: system.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = system._data(config, "test").first(2)
    last = torch.tensor([data.sizes[0].tolist(), [*data.sizes[0, :2].tolist(), 3]])
    thin = replace(data, sizes=last, landmarks=torch.minimum(data.landmarks, last[:, None] - 1.0), files=("a", "thin"))
    parts = {"test": thin, "train": system._data(config, "train")}
    monkeypatch.setattr(system, "_data", lambda config, part: parts[part])
    monkeypatch.setattr(system, "restored", lambda *_: {})
    config = replace(config, registrations=2, horizon=5)
    run = Run(tmp_path / "run", system="landmarks", config={}, steps=1, device="cpu", quiet=True)
    found = system.evaluate(config, system.build(config).eval(), run)
    assert set(found.baselines) == {"mean position", "untrained"}
    assert "registration is left out: thin has fewer than 4 voxels along an axis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"starts": 0}, r"^starts: found 0"),
        ({"registrations": -1}, r"^registrations: found -1"),
        ({"rows": 4, "returns": 6}, r"^rows: found 4, expected more than returns \(6\)"),
        ({"cube": 5}, r"^cube: found 5"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        system.resolve(system.Config(**{"spacing": 8.0, "warps": 3} | settings))
