"""Tracking: metrics are the official ones, files are read as they stand, moves and rewards are counted by hand."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import foveate
from foveate import agents, noise, pictures
from foveate.data.mot import Clip, mot_clips, read_boxes, read_sequence
from foveate.data.videos import Videos, crops, given, load_videos, pairs, stacked, with_mirrored
from foveate.envs.box_tracking import ACTIONS, STOP, BoxTrackingEnv, places
from foveate.envs.joint_tracking import together, walk_together
from foveate.geometry import Boxes, overlaps
from foveate.learn.replay import Replay
from foveate.models.association import (
    CHOICES,
    Asked,
    Rules,
    best_rules,
    choices_for,
    follow,
    moving,
    rules_of,
    rules_tensor,
    still,
)
from foveate.models.tracker import TrackingNetwork, offsets_to, shifted
from foveate.parts import tracked
from foveate.rewards.tracking import tracking_metrics
from foveate.run import Run
from foveate.systems import tracking
from foveate.types import InputError, map_tree
from foveate.value_learning import Acting, learn_by_acting, walk

SIDE = 40


def boxes_of(rows: list[list[list[float]]], labels: list[list[int]] | None = None) -> Boxes:
    """Boxes of some frames, as many in each; identities from 0 if not given."""
    boxes = torch.tensor(rows)
    names = torch.arange(boxes.shape[1]).expand(len(rows), -1) if labels is None else torch.tensor(labels)
    return Boxes(boxes, names, torch.ones(boxes.shape[:2], dtype=torch.bool), torch.ones(boxes.shape[:2]))


def videos(rows: list[list[list[float]]], found: Boxes | None = None, rate: float = 10.0) -> Videos:
    """Grey frames in which objects are white."""
    pixels = torch.full((len(rows), 3, SIDE, SIDE), 100, dtype=torch.uint8)
    for frame, objects in zip(pixels, rows, strict=True):
        for left, top, right, bottom in objects:
            frame[:, int(top) : int(bottom), int(left) : int(right)] = 255
    truth = boxes_of(rows)
    return stacked([Clip("a", pixels, truth, truth if found is None else found, rate)])


TWO = [[[4.0, 4, 14, 24], [20, 4, 30, 24]], [[6.0, 4, 16, 24], [20, 8, 30, 28]]]


def alone(rows: list[list[list[float]]], copies: int = 1, **options: Any) -> BoxTrackingEnv:
    env = BoxTrackingEnv(copies, videos=videos(rows), autoreset="disabled", jitter=0.0, drift=0.0, **options)
    env.reset(seed=0, options={"ids": torch.zeros(copies).long()})
    return env


# ---- metrics, against the official results ----


def test_a_published_tracker_scores_what_the_devkit_says(shared_data: Path) -> None:
    root = shared_data / "MOT15"
    truth = read_boxes(root / "train" / "TUD-Campus" / "gt" / "gt.txt", 71, True)
    found = read_boxes(root / "example_tracker_results" / "TUD-Campus.txt", 71)
    scores = tracking_metrics(truth, found, torch.zeros(71).long())
    assert round(100 * scores["mota"], 1) == 52.6
    assert round(100 * scores["idf1"], 1) == 55.8
    assert scores["switches"] == 7


def test_perfect_tracks_score_one_and_exchanged_identities_do_not() -> None:
    rows = TWO * 3
    truth, frames = boxes_of(rows), torch.zeros(6).long()
    perfect = tracking_metrics(truth, truth, frames)
    assert perfect == pytest.approx({"hota": 1, "mota": 1, "idf1": 1, "switches": 0, "deta": 1, "assa": 1})
    turned = replace(truth, labels=torch.tensor([[0, 1]] * 3 + [[1, 0]] * 3))
    found = tracking_metrics(truth, turned, frames)
    assert found["switches"] == 2
    assert found["idf1"] == pytest.approx(0.5)
    assert found["deta"] == pytest.approx(1.0)
    nothing = replace(truth, mask=torch.zeros_like(truth.mask))
    assert tracking_metrics(truth, nothing, frames)["mota"] == 0.0
    two = tracking_metrics(truth, turned, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert two["switches"] == 0, "identities are those of a sequence"


# ---- data ----


def test_a_sequence_is_read_as_it_stands(shared_data: Path) -> None:
    root = shared_data / "MOT15"
    clip = read_sequence(root / "train" / "TUD-Campus", 1000)
    assert clip.pixels.shape == (71, 3, 360, 480)
    assert (int(clip.truth.mask.sum()), int(clip.detections.mask.sum()), clip.rate) == (359, 321, 25.0)
    torch.testing.assert_close(clip.truth.boxes[0, 0], torch.tensor([299.25, 136.5, 390.0, 308.25]))
    small = read_sequence(root / "train" / "TUD-Campus", 240)
    assert small.pixels.shape == (71, 3, 180, 240), "the frames keep their shape"
    torch.testing.assert_close(small.truth.boxes, clip.truth.boxes / 2)
    train, val, test = (mot_clips(root, part, 96) for part in ("train", "val", "test"))
    assert [clip.name for clip in test] == ["TUD-Campus"]
    assert len(train[0].pixels) + len(val[0].pixels) == 350


def write_sequence(folder: Path, frames: int = 3) -> Path:
    for name in ("img1", "gt", "det"):
        (folder / name).mkdir(parents=True)
    for number in range(1, frames + 1):
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(folder / "img1" / f"{number:06d}.jpg")
    lines = [f"{number},1,{number},2,10,20,1,-1,-1,-1" for number in range(1, frames + 1)]
    (folder / "gt" / "gt.txt").write_text("\n".join(lines))
    (folder / "det" / "det.txt").write_text("\n".join(lines))
    said = f"[Sequence]\nname=a\nframeRate=5\nseqLength={frames}\nimWidth=40\nimHeight=30\n"
    (folder / "seqinfo.ini").write_text(said)
    return folder


def test_frames_play_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_sequence(tmp_path / "a", 11)
    for number, path in enumerate(sorted((folder / "img1").iterdir()), 1):
        path.unlink()
        Image.fromarray(np.full((30, 40, 3), 10 * number, np.uint8)).save(folder / "img1" / f"{number}.png")
    assert read_sequence(folder, 100).pixels[:, 0, 0, 0].tolist() == list(range(10, 120, 10))


def change(path: str, text: str) -> Any:
    return lambda folder: (folder / path).write_text(text)


def other_size(folder: Path) -> None:
    Image.fromarray(np.zeros((31, 40, 3), np.uint8)).save(folder / "img1" / "000002.jpg")


def no_frames(folder: Path) -> None:
    for path in (folder / "img1").glob("*"):
        path.unlink()


INI = "[Sequence]\nframeRate=5\nseqLength=3\nimWidth=40\nimHeight=30\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change("det/det.txt", "1 -1 3 4 5 6 0.9"),
            r"det\.txt, line 1: found '1 -1 3 4 5 6 0.9', expected frame,identity",
        ),
        (change("det/det.txt", "1;-1;3;4;5;6;1"), r"det\.txt, line 1: found '1;-1.*with commas"),
        (change("det/det.txt", "1,-1,3,4,5,6,1\n1,-1,3,4,-5,6,1"), r"det\.txt, line 2: width is -5, expected above 0"),
        (change("det/det.txt", "1,-1,3,4,5,nan,1"), r"det\.txt, line 1: height is 'nan', expected a number"),
        (change("gt/gt.txt", "4,1,3,4,5,6,1"), r"gt\.txt, line 1: frame 4, expected 1 to 3"),
        (change("gt/gt.txt", "1,1,3,4,5,6,1\n1,1,4,4,5,6,1"), r"gt\.txt, line 2: identity 1 is in frame 1 already"),
        (change("seqinfo.ini", INI.replace("seqLength=3", "seqLength=4")), r"seqinfo\.ini: seqLength is 4, but .*3"),
        (change("seqinfo.ini", INI.replace("frameRate=5", "")), r"seqinfo\.ini: frameRate is nothing"),
        (change("seqinfo.ini", "frameRate=5"), r"seqinfo\.ini: cannot be read"),
        (lambda folder: (folder / "seqinfo.ini").unlink(), r"seqinfo\.ini: not found"),
        (lambda folder: (folder / "det" / "det.txt").unlink(), r"det\.txt: not found"),
        (lambda folder: (folder / "img1" / "000001.jpg").write_text("no"), r"000001\.jpg: cannot be read as a picture"),
        (other_size, r"000002\.jpg: is 40x31, but .*seqinfo\.ini says 40x30"),
        (no_frames, r"img1: holds no frame"),
    ],
)
def test_what_is_wrong_with_a_sequence_is_named_with_its_line(damage: Any, message: str, tmp_path: Path) -> None:
    folder = write_sequence(tmp_path / "a")
    assert read_sequence(folder, 100).pixels.shape == (3, 3, 30, 40)
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_sequence(folder, 100)


def test_what_does_not_count_is_left_out_of_the_truth(tmp_path: Path) -> None:
    path = tmp_path / "gt.txt"
    path.write_text("1,1,1,1,5,5,0,1,1\n1,2,1,1,5,5,1,7,1\n1,3,1,1,5,5,1,1,0.5\n")
    assert read_boxes(path, 1, True).labels[0].tolist() == [3]


def test_world_coordinates_are_no_classes(tmp_path: Path) -> None:
    """Ten columns, as in 3D MOT15: what stands where newer sets have a class is a place in metres."""
    path = tmp_path / "gt.txt"
    path.write_text(
        "1,1,1,1,5,5,1,-5.40,-4.24,0\n1,2,9,1,5,5,1,7,2.5,0\n1,3,1,9,5,5,1,-1,-1,-1\n1,4,9,9,5,5,0,7,2.5,0\n"
    )
    assert read_boxes(path, 1, True).labels[0].tolist() == [1, 2, 3]


def test_sequences_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sequence(tmp_path / "train" / name, 8)
    assert [clip.name for clip in mot_clips(tmp_path, "test", 40, ("a",))] == ["a"]
    with pytest.raises(InputError, match=r"^test: 'c' is no sequence in .*; there are a, b"):
        mot_clips(tmp_path, "test", 40, ("c",))
    with pytest.raises(InputError, match="names all sequences"):
        mot_clips(tmp_path, "test", 40, ("a", "b"))
    mixed = load_videos("mot", tmp_path, "train", 40, 2, mirrored=True)
    assert [name.split("-")[0] for name in mixed.names] == ["a", "train", "train", "a mirrored", "train", "train"]
    assert len(mixed) == 2 * (6 + 2 * 24)
    assert load_videos("mot", tmp_path, "val", 40, 2).names == ("a",), "what is rendered is learned from, not judged by"
    pairs(mixed)
    shutil.rmtree(tmp_path / "train" / "b")
    assert [len(mot_clips(tmp_path, part, 40)[0].pixels) for part in ("train", "val", "test")] == [5, 1, 2]
    with pytest.raises(InputError, match="no sequence in it"):
        mot_clips(tmp_path / "train" / "a" / "gt", "test", 40)


def test_rendered_videos_agree_with_their_boxes_and_detections_are_noisy_truth() -> None:
    data = load_videos("scenes", scenes=6)
    assert len(data) == 6 * 24
    near = overlaps(data.truth.boxes, data.detections.boxes[:, :-1]).diagonal(dim1=1, dim2=2)
    there = data.detections.mask[:, :-1]
    assert near[there].mean() > 0.75
    assert 0.7 < float(there.sum() / data.truth.mask.sum()) < 0.95, "about a fifth is missed"
    assert (data.detections.mask[:, -1].float().mean() - 0.3).abs() < 0.12
    found = pairs(data)
    moved = overlaps(*(data.truth.boxes[found[:, k], found[:, k + 1]][:, None] for k in (0, 2))).flatten()
    assert 0.4 < moved.mean() < 0.95
    assert torch.equal(data.pixels, load_videos("scenes", None, "train", None, 6).pixels)


def test_crops_are_regions_whatever_the_level() -> None:
    frames = noise.uniform(noise.key(0, torch.arange(2)), 3, 96, 128)
    smooth = torch.nn.functional.interpolate(frames[..., ::16, ::16], (96, 128), mode="bilinear")
    nothing = boxes_of([[[0.0, 0, 1, 1]]] * 2)
    data = stacked([Clip("a", (smooth * 255).byte(), nothing, nothing, 5.0)])
    torch.testing.assert_close(data.frame(1).float() / 255, smooth[1], atol=1 / 255, rtol=0)
    boxes = torch.tensor([[16.0, 16, 32, 32], [0, 0, 128, 96], [30, 10, 94, 74]])
    found = crops(data, torch.ones(3).long(), boxes, 16)
    torch.testing.assert_close(found[0], smooth[1, :, 16:32, 16:32], atol=2 / 255, rtol=0)
    for row, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        region = smooth[1:, :, top:bottom, left:right]
        expected = torch.nn.functional.interpolate(region, (16, 16), mode="area")[0]
        assert (found[row] - expected).abs().mean() < 0.03


def test_crops_are_what_grid_sample_reads_of_their_level() -> None:
    """The textbook way, which makes floats of whole frames; boxes of all sizes, many of them beyond the edge."""
    frames = (noise.uniform(noise.key(2, torch.arange(3)), 3, 48, 64) * 255).byte()
    nothing, keys = boxes_of([[[0.0, 0, 1, 1]]] * 3), noise.key(3, torch.arange(200))
    data = stacked([Clip("a", frames, nothing, nothing, 5.0)])
    chosen, low = noise.integers(keys, 3), (noise.uniform(keys, 2) * 1.4 - 0.4) * torch.tensor([64, 48])
    boxes = torch.cat((low, low + 2 ** (2 + 5 * noise.uniform(noise.fold(keys, "sides"), 2))), 1)
    found = crops(data, chosen, boxes, 12)
    levels = ((boxes[:, 2:] - boxes[:, :2]) / 12).log2().mean(1).round().clamp(0, 3).long()
    assert levels.unique().tolist() == [0, 1, 2, 3]
    for row, (frame, level) in enumerate(zip(chosen.tolist(), levels.tolist(), strict=True)):
        first, (height, width) = int(data.offsets[frame, level]), data.sizes[frame, level].tolist()
        pixels = data.pixels[first : first + height * width, :3].view(1, height, width, 3).permute(0, 3, 1, 2) / 255
        share = (torch.arange(12) + 0.5) / 12
        x, y = (boxes[row, k] + share * (boxes[row, k + 2] - boxes[row, k]) for k in (0, 1))
        places = torch.stack(torch.meshgrid(x / 64, y / 48, indexing="xy"), -1)[None] * 2 - 1
        seen = F.grid_sample(pixels, places, padding_mode="border", align_corners=False)[0]
        torch.testing.assert_close(found[row], seen, atol=1e-4, rtol=0)


def test_mirrored_sequences_show_the_same_objects() -> None:
    clip = Clip("a", (noise.uniform(noise.key(1), 1, 3, 8, 20) * 255).byte(), *[boxes_of([[[2.0, 1, 8, 6]]])] * 2, 5.0)
    data = stacked(with_mirrored([clip]))
    one, other = crops(data, torch.tensor([0, 1]), data.truth.boxes[:, 0], 6)
    torch.testing.assert_close(one, other.flip(-1), atol=1e-4, rtol=0)


# ---- the environment ----


def test_a_stop_is_right_from_the_threshold_on_and_moves_are_told_their_sign() -> None:
    env = alone([[[4.0, 4, 14, 24]], [[6.0, 4, 16, 24]]], alpha=0.2, shaping=0.5)
    assert env.step(torch.tensor([1]))[1].tolist() == [-0.5]
    assert env.step(torch.tensor([0]))[1].tolist() == [0.5]
    assert env.step(torch.tensor([0]))[1].tolist() == [0.5]
    torch.testing.assert_close(env.state.box[0], torch.tensor([6.0, 4, 16, 24]))
    *_, rewards, terminated, _, _ = (None, *env.step(torch.tensor([STOP]))[1:])
    assert (rewards.tolist(), terminated.tolist()) == ([1.0], [True])
    assert env.state.history[0, :4].tolist() == [STOP + 1, 1, 1, 2]
    early = alone([[[4.0, 4, 14, 24]], [[6.0, 4, 16, 24]]])
    assert early.step(torch.tensor([STOP]))[1].tolist() == [-1.0], "IoU 2/3"
    assert alone(TWO).step(torch.tensor([0]))[1].tolist() == [0.0], "without shaping the stop alone is rewarded"


def test_guided_actions_are_those_that_are_rewarded() -> None:
    env = BoxTrackingEnv(64, shaping=1.0, drift=0.2)
    env.reset(seed=0)
    for step in range(5):
        told, state = env.rewarded(env.state), env.state
        for action in range(ACTIONS):
            reward = env.transition(state, torch.full((64,), action), state.before)[1]
            assert torch.equal(told[:, action], reward > 0), action
        env.step(noise.integers(noise.key(0, step, torch.arange(64)), STOP))


def test_neighbours_are_the_nearest_others_and_go_their_own_way() -> None:
    rows = [[[4.0, 4, 14, 24], [20, 4, 30, 24], [34, 4, 38, 24]], [[6.0, 4, 16, 24], [20, 8, 30, 28], [34, 4, 38, 24]]]
    env = alone(rows)
    torch.testing.assert_close(env.state.near_start[0], torch.tensor([[20.0, 4, 30, 24], [34, 4, 38, 24]]))
    torch.testing.assert_close(env.observe(env.state)["places"][0, 0], torch.tensor([1.6, 0, 0, 0]))
    for _ in range(5):
        env.step(torch.tensor([2]))
    torch.testing.assert_close(env.state.near_box[0, 0], torch.tensor([20.0, 8, 30, 28]))
    lonely = alone([[[4.0, 4, 14, 24]], [[6.0, 4, 16, 24]]])
    seen = lonely.observe(lonely.state)
    assert not seen["near"].any()
    assert not seen["others"].any()
    assert set(alone(TWO, neighbours=0).observe(alone(TWO, neighbours=0).state)) == {"history", "view"}


def test_a_state_is_coordinates_and_takes_little_room() -> None:
    env = alone(TWO, copies=48)
    assert Replay(env.state, 1000).size < 20e6

    def small(leaf: Tensor) -> Tensor:
        assert leaf[0].numel() <= 8
        return leaf

    map_tree(small, env.state)


def test_agents_that_act_jointly_see_each_other_move() -> None:
    env = alone(TWO)
    frame, start = torch.tensor([0, 0, 0]), torch.tensor([[4.0, 4, 14, 24], [20, 4, 30, 24], [22, 4, 32, 24]])
    groups = torch.tensor([0, 0, 1])
    state, rows = together(frame, frame + 1, groups, start, start, 8, 2)
    assert state.near.tolist() == [[True, False], [True, False], [False, False]], "of the same group only"
    assert rows[:2, 0].tolist() == [1, 0]
    seen: list[Tensor] = []

    def right_then_stop(observation: dict[str, Tensor]) -> Tensor:
        seen.append(observation["places"][:, 0, 0])
        went = observation["history"].sum((1, 2))
        values = torch.zeros(len(went), ACTIONS)
        values[:, 0] = torch.where(went < torch.tensor([3.0, 1, 1])[: len(went)], 1.0, 0.0)
        values[:, STOP] = 0.5
        return values

    boxes, sure = walk_together(env.walking, right_then_stop, state, rows, 20)
    torch.testing.assert_close(boxes[:, 0], start[:, 0] + 10 * 0.08 * torch.tensor([3.0, 1, 1]))
    assert sure.tolist() == [0.5] * 3
    assert seen[0][:2].tolist() == pytest.approx([1.6, -1.6])
    assert float(seen[2][0]) == pytest.approx(1.6 - 0.16 + 0.08), "it went two steps, its neighbour one"


def test_the_parallel_form_is_pettingzoos_and_plays_the_same_rewards() -> None:
    from pettingzoo.test import parallel_api_test

    from foveate.envs.parallel_tracking import ParallelTracking

    env = ParallelTracking(videos=videos(TWO), jitter=0.0, drift=0.0, shaping=1.0, render_mode="rgb_array")
    parallel_api_test(env, num_cycles=30)
    seen, _ = env.reset(seed=0)
    assert list(seen) == env.agents == ["object_0", "object_1"]
    assert all(seen[agent] in env.observation_space(agent) for agent in env.agents)
    _, rewards, stops, _, _ = env.step({"object_0": 0, "object_1": STOP})
    assert rewards == {"object_0": 1.0, "object_1": -1.0}, "IoU 2/3 is no 0.7"
    assert stops == {"object_0": False, "object_1": True}
    assert env.agents == ["object_0"]
    picture = env.render()
    assert picture is not None
    assert picture.shape[1] == 2 * picture.shape[0]
    with pytest.raises(InputError, match="found none of object_0"):
        env.step({})


# ---- tracks ----


def walked(count: int = 12, missed: tuple[int, ...] = ()) -> tuple[Boxes, Boxes]:
    """Two objects that pass each other, and what is detected of them."""
    rows = [[[2.0 + 2 * t, 4, 8 + 2 * t, 16], [26.0 - 2 * t, 22, 32 - 2 * t, 34]] for t in range(count)]
    truth = boxes_of(rows)
    mask = truth.mask.clone()
    mask[list(missed), 0] = False
    return truth, replace(truth, mask=mask)


def test_tracks_keep_their_identity_through_misses_if_their_motion_is_known() -> None:
    truth, found = walked(missed=(5, 6, 7))
    frames = torch.zeros(12).long()
    rules = [Rules(births=1, shown=1.0, match=0.3), Rules(births=1, shown=0.0, match=0.3)]
    bridged, hidden = follow(found, frames, [10.0], rules, moving)
    assert tracking_metrics(truth, bridged, frames)["hota"] == pytest.approx(1.0)
    assert [int(row.sum()) for row in hidden.mask] == [2] * 5 + [1] * 3 + [2] * 4
    (staying,) = follow(found, frames, [10.0], rules[:1], still)
    assert tracking_metrics(truth, staying, frames)["switches"] == 1


def test_births_scores_patience_and_doubt_rule_tracks() -> None:
    _, found = walked(8)
    frames = torch.zeros(8).long()
    weak = replace(found, scores=torch.full_like(found.scores, 0.4))
    late, none = follow(found, frames, [10.0], [Rules(births=3), Rules(births=1, score=0.9)], still)
    assert [int(row.sum()) for row in late.mask] == [0, 0] + [2] * 6
    assert not follow(weak, frames, [10.0], [Rules(births=1, score=0.9)], still)[0].mask.any()
    assert int(none.mask.sum()) == 16
    gone = replace(found, mask=found.mask & (torch.arange(8) < 3)[:, None])
    kept, short, doubted = follow(
        gone,
        frames,
        [10.0],
        [Rules(births=1, shown=9.0, patience=9.0), Rules(births=1, shown=9.0, patience=0.2), Rules(births=1, sure=0.5)],
        still,
    )
    assert [int(each.mask[-1].sum()) for each in (kept, short, doubted)] == [2, 0, 0]
    assert int(short.mask[4].sum()) == 2, "two frames are 0.2 s"


def test_who_has_foretold_the_detections_better_leads() -> None:
    """Proposals that run away do no harm, those that know the way are taken: also where velocity turns round."""
    rows = [[[4.0 + 2 * min(t, 12 - t), 4, 10 + 2 * min(t, 12 - t), 16]] for t in range(12)]
    truth, frames = boxes_of(rows), torch.zeros(12).long()
    found = replace(truth, mask=truth.mask.clone())
    found.mask[[7, 8, 9]] = False  # it turns round after frame 6, unseen

    def lost(asked: Asked) -> tuple[Tensor, Tensor]:
        return asked.box + 30.0, torch.zeros(len(asked.box))

    def knowing(asked: Asked) -> tuple[Tensor, Tensor]:
        return truth.boxes[asked.after, 0], torch.zeros(len(asked.box))

    led, always = (Rules(births=1, shown=1.0, match=0.1, lead=lead) for lead in (1.0, 0.0))
    scores = {
        (name, rule.lead): tracking_metrics(truth, follow(found, frames, [10.0], [rule], propose)[0], frames)["hota"]
        for name, propose in (("lost", lost), ("knowing", knowing), ("moving", moving))
        for rule in (led, always)
    }
    assert scores["knowing", 1.0] == scores["knowing", 0.0] == pytest.approx(1.0)
    assert scores["lost", 1.0] == scores["moving", 1.0] > scores["lost", 0.0] + 0.2
    assert scores["moving", 1.0] == scores["moving", 0.0] < 0.95


def test_sequences_and_rules_in_lockstep_are_those_one_by_one() -> None:
    data = load_videos("scenes", scenes=4)
    rules = [Rules(births=births, trust=trust) for births in (1, 2) for trust in (1.0, 0.5)]
    many = follow(data.detections, data.sequences, data.rates, rules, moving)
    for rule, several in zip(rules, many, strict=True):
        for number in range(len(data.names)):
            rows = data.sequences == number
            only = map_tree(lambda leaf, rows=rows: leaf[rows], data.detections)
            (single,) = follow(only, torch.zeros(int(rows.sum())).long(), [data.rates[number]], [rule], moving)
            most = single.mask.shape[1]
            assert torch.equal(several.mask[rows][:, :most], single.mask)
            assert not several.mask[rows][:, most:].any()
            assert torch.equal(several.boxes[rows][:, :most], single.boxes)


def test_rules_are_chosen_by_their_score_and_kept_as_numbers() -> None:
    truth, found = walked(missed=(5, 6))
    frames = torch.zeros(12).long()

    def score(tracks: Boxes) -> float:
        return tracking_metrics(truth, tracks, frames)["hota"]

    rules, worth = best_rules(lambda tried: follow(found, frames, [10.0], tried, moving), score)
    assert worth == pytest.approx(1.0)
    assert rules.births == 1
    assert vars(rules_of(rules_tensor(rules))) == pytest.approx(vars(rules))


@pytest.mark.parametrize(("low", "high"), [(-0.4, -0.1), (20.0, 90.0), (-2.0, 3.0)])
def test_levels_of_scores_suit_detectors_of_another_scale(low: float, high: float) -> None:
    """False detections come and go beside the objects, and are less sure."""
    rows = [[[4.0 + time, 4, 14 + time, 24], [20.0, 4, 30, 24]] for time in range(8)]
    false = [[[2.0 + 6 * (time % 3), 28, 10 + 6 * (time % 3), 38]] for time in range(8)]
    found = boxes_of([true + more for true, more in zip(rows, false, strict=True)])
    found = replace(found, scores=torch.tensor([[high, high, low]] * 8))
    clip = videos(rows, found)
    rules = tracking._rules(clip, moving)
    tracks = follow(found, clip.sequences, [10.0], [rules], moving)[0]
    assert tracking_metrics(clip.truth, tracks, clip.sequences)["hota"] > 0.87, "all but a birth"
    for scores in (torch.rand(8, 3), torch.tensor([0.0, 0.5, 1.0]).expand(8, 3)):
        assert choices_for(replace(found, scores=scores)) == CHOICES, "of probabilities they are as ever"


# ---- networks ----


def test_neighbours_that_are_not_there_are_not_heard() -> None:
    torch.manual_seed(0)
    env = alone(TWO, copies=3)
    seen = env.observe(env.state)
    network = TrackingNetwork(20, 8, ACTIONS, torch.nn.Linear, 4)
    changed = {**seen, "others": seen["others"].clone(), "places": seen["places"].clone()}
    changed["others"][:, 1], changed["places"][:, 1] = 0.7, 2.0
    assert seen["near"][0].tolist() == [1.0, 0.0]
    torch.testing.assert_close(network(changed), network(seen))
    changed["places"][:, 0] += 1
    assert not torch.allclose(network(changed), network(seen))
    deaf = TrackingNetwork(20, 8, ACTIONS, torch.nn.Linear, 4, communicate=False)
    torch.testing.assert_close(deaf(changed), deaf(seen))
    brighter = {**seen, "view": 0.5 * seen["view"] + 0.2, "others": 0.5 * seen["others"] + 0.2}
    torch.testing.assert_close(network(brighter)[:, :4], network(seen), atol=2e-2, rtol=0)


def test_offsets_lead_to_their_targets() -> None:
    boxes, targets = torch.tensor([[4.0, 4, 14, 24]]), torch.tensor([[6.0, 2, 18, 32]])
    torch.testing.assert_close(shifted(boxes, offsets_to(boxes, targets)), targets)
    torch.testing.assert_close(places(boxes, targets[:, None])[:, 0], offsets_to(boxes, targets))


# ---- the system ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> agents.Agent:
    folder = tmp_path_factory.mktemp("tracking") / "run"
    quick = {"scenes": 1, "image_size": 32, "patch": 12, "hidden": 16, "batch": 8, "copies": 8, "horizon": 2}
    return foveate.train("tracking", steps=4, out=folder, device="cpu", **quick)


def test_a_users_video_is_tracked_in_its_own_pixels(trained: agents.Agent, tmp_path: Path) -> None:
    truth, found = walked()
    frames = videos(truth.boxes.tolist())
    shown = torch.stack([frames.frame(number) for number in range(12)]).float() / 255
    images = {"frames": shown, "boxes": found.boxes, "scores": found.scores}
    made = trained(images)
    assert made["boxes"].shape[::2] == (12, 4)
    assert made["ids"].shape == made["mask"].shape == made["boxes"].shape[:2]
    near = overlaps(made["boxes"][-1:], truth.boxes[-1:])[0].amax(0)
    assert (near > 0.5).all(), "in pixels of the frames, though they were shrunk to 32"
    folder = write_sequence(tmp_path / "mine", 6)
    (folder / "gt" / "gt.txt").unlink()  # what a user has no need of
    read = tracking.read(trained.config, folder)
    assert read["frames"].shape == (6, 3, 24, 32)
    drawn = tracking.picture(trained.config, trained.policy, Run.open(trained.folder), read)
    assert len(drawn["video"]) == 6


def test_negative_scores_are_tracked_by_the_rules_they_were_evaluated_by(trained: agents.Agent, tmp_path: Path) -> None:
    """Log-odds, one of them exactly 0: what is read is what was evaluated, and rules mean the same for both."""
    folder, scores = write_sequence(tmp_path / "a", 5), (-2.0, -0.5, 0.0, -3.0, -0.1)
    lines = [f"{at},-1,{2 * at},2,10,20,{score}" for at, score in enumerate(scores, 1)] + ["1,-1,25,5,9,9,-0.9"]
    (folder / "det" / "det.txt").write_text("\n".join(lines))
    found, images = read_sequence(folder, 32).detections, tracking.read(trained.config, folder)
    seen = given(images, 32)[0].detections
    assert torch.equal(seen.mask, found.mask)
    assert seen.scores is not None
    assert found.scores is not None
    assert torch.equal(seen.scores[seen.mask], found.scores[found.mask])
    policy = copy.deepcopy(trained.policy)
    begun = []
    for score in (-4.0, -1.0, -0.3, 0.5):
        policy.rules.copy_(rules_tensor(Rules(score=score, births=1, match=1.0)))
        made = tracking.predict(trained.config, policy, images)
        begun.append(made["ids"][made["mask"]].unique().numel())
    assert begun == [6, 4, 2, 0], "a track begins where the score is above the rule's"
    raw = {name: value for name, value in images.items() if name != "mask"}
    assert given(raw, 32)[0].detections.mask.sum() == 5, "without a mask a score of 0 is no box"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"frames": torch.zeros(0, 3, 8, 8), "boxes": torch.zeros(0, 1, 4), "scores": torch.zeros(0, 1)},
            "frames: found none",
        ),
        ({"boxes": torch.zeros(2, 1, 4), "scores": torch.zeros(2, 1)}, r"boxes, scores: found \(2, 1, 4\)"),
        ({"boxes": torch.tensor([[[5.0, 5, 2, 9]]])}, "boxes: box 0 of image 0 .* ends before it begins"),
        ({"frames": torch.zeros(1, 1, 8, 8)}, "frames: 1 channels, expected 3"),
        ({"mask": torch.ones(1, 2)}, r"mask: found \(1, 2\), expected \(1, 1\)"),
    ],
)
def test_what_is_wrong_with_a_users_video_is_named(change: dict[str, Tensor], message: str) -> None:
    fine = {"frames": torch.zeros(1, 3, 8, 8), "boxes": torch.tensor([[[1.0, 1, 4, 5]]]), "scores": torch.ones(1, 1)}
    assert len(given(fine, 32)[0]) == 1
    with pytest.raises(InputError, match=message):
        given(fine | change, 32)
    with pytest.raises(InputError, match="found no 'scores'"):
        given({name: fine[name] for name in ("frames", "boxes")}, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "davis"}, r"^data: found 'davis'"),
        ({"data": "mot"}, r"^root: not given"),
        ({"neighbours": 0}, r"^neighbours: found 0, expected at least 1"),
        ({"alpha": 0.0}, r"^alpha: found 0"),
        ({"horizon": 0}, r"^horizon: found 0"),
        ({"threshold": 1.0}, r"^threshold: found 1"),
        ({"image_size": 8}, r"^image_size: found 8"),
        ({"scenes": 0}, r"^scenes: found 0"),
    ],
)
def test_what_is_wrong_with_a_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tracking.resolve(tracking.Config(**({"scenes": 4} | settings)))


def test_tracks_are_drawn_in_a_colour_of_their_own() -> None:
    truth, _ = walked(4)
    frames = torch.full((4, 3, SIDE, SIDE), 0.5)
    drawn = pictures.track_frames(frames, truth, cell=160)
    assert len(drawn) == 4
    assert drawn[0].size == (160, 160)
    colours = {drawn[3].getpixel((int(4 * x), int(4 * y))) for x, y in ((8.2, 8), (20.2, 28))}
    assert len(colours) == 2
    assert (128, 128, 128) not in colours


def test_agents_learn_to_walk_to_their_objects(tmp_path: Path) -> None:
    """Two white objects in five frames: from boxes that are well off, 400 updates lead agents nearer to them."""
    rows = [[[4.0 + 3 * t, 4, 14 + 3 * t, 24], [26.0 - 2 * t, 12 + t, 38 - 2 * t, 30 + t]] for t in range(5)]
    options: dict[str, Any] = {"patch": 10, "alpha": 0.12, "neighbours": 0, "drift": 0.2, "shaping": 1.0, "horizon": 10}
    env = BoxTrackingEnv(32, videos=videos(rows), **options)
    held = BoxTrackingEnv(64, videos=videos(rows), autoreset="disabled", **options)
    env.reset(seed=0)
    torch.manual_seed(0)
    config = tracking.Config(patch=10, hidden=32, communicate=False)
    run = Run(tmp_path / "run", system="test", config={}, steps=400, device="cpu", quiet=True)
    policy, optimizer, _ = tracked(run, "policy", tracking.build(config))
    target, replay = run.track(target=tracking.build(config), replay=Replay(env.state, 200))
    ids = torch.arange(64) % held.examples

    def reached(step: int) -> float:
        states = walk(held, policy.eval(), ids).states
        return float(overlaps(states.box[:, step, None], states.target[:, :1]).mean())

    begun, untrained = reached(0), reached(-1)
    how = Acting(64, discount=0.5, learning_rate=3e-3, share=0.6, follow=0.05)
    learn_by_acting(run, "walk", 1.0, env, policy, target, optimizer, replay, how, good=env.rewarded)
    assert reached(-1) > max(begun, untrained) + 0.08
