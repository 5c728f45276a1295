"""Cutting: videos, crops, rewards and scores, counted by hand or by written-out references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import foveate
from foveate import noise, pictures
from foveate.data.masked_videos import Videos, as_video, load_videos, read_video, views
from foveate.envs.box_moves import moves
from foveate.envs.cutting import ACTIONS, MOVES, NAMES, STOP, TIGHTER, WIDER, CuttingEnv
from foveate.envs.following import acting, clips_of, fixed, follow, knowing, truth, unmoved
from foveate.geometry import enlarged, mask_boxes, overlaps
from foveate.models.appearance import color_likeness, stacked
from foveate.models.cutting import Executor, mask_loss
from foveate.models.regions import changed, changes, counted, cut, jittered, kept_inside, pasted, within
from foveate.rewards.videos import accuracy, davis_scores, decay, overlap
from foveate.systems import cutting
from foveate.types import InputError, map_tree
from foveate.value_learning import walk

SIZE = 30, 40


def boxed(*boxes: list[int]) -> Tensor:
    """Masks that are boxes, in frames of `SIZE`."""
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for row, (left, top, right, bottom) in enumerate(boxes):
        masks[row, top:bottom, left:right] = True
    return masks


def video(*boxes: list[int]) -> Videos:
    """A red box that moves over blue."""
    masks = boxed(*boxes)
    pixels = torch.where(masks[:, None], torch.tensor([200, 20, 20])[:, None, None], torch.tensor(20)[None, None, None])
    pixels[:, 2] = torch.where(masks, 20, 200)
    return Videos(pixels.byte(), masks, torch.tensor([0]), torch.tensor([len(masks)]), ("red",))


def whole(env: CuttingEnv) -> Any:
    """Makes the truth, cut off at the object box: the IoU then is that of box and truth, if the truth is a box."""

    def execute(frames: Tensor, boxes: Tensor, contexts: Tensor) -> Tensor:
        seen = cut(env.truth, frames, enlarged(boxes, env.factors[contexts]), 60)[:, 0] > 0.5
        place = ((torch.arange(60) + 0.5) / 60 * 2 - 1).abs() <= 1 / env.factors[contexts][:, None]
        return seen & place[:, :, None] & place[:, None]

    return execute


def episode(box: list[float], context: int = 1, **options: Any) -> CuttingEnv:
    """The second frame of a video, begun at a box."""
    env = CuttingEnv(1, videos=video([10, 8, 20, 18], [10, 8, 20, 18]), autoreset="disabled", **options)
    env.execute = whole(env)
    env.reset(seed=0)
    state = env.begun(torch.tensor([1]), torch.tensor([box]), torch.tensor([context]))
    iou = env.score(state.frame, state.box, state.context)
    env._state = type(state)(state.frame, state.box, state.context, state.history, iou, iou)
    return env


# ---- boxes and masks ----


def test_the_box_of_a_mask_is_tight_and_trimming_forgets_stray_pixels() -> None:
    masks = boxed([3, 4, 9, 20], [0, 0, 40, 30], [5, 5, 25, 25], [7, 7, 7, 7])
    found, there = mask_boxes(masks)
    assert found.tolist() == [[3, 4, 9, 20], [0, 0, 40, 30], [5, 5, 25, 25], [0, 0, 0, 0]]
    assert there.tolist() == [True, True, True, False]
    masks[2, 29, 39] = True
    assert mask_boxes(masks)[0][2].tolist() == [5, 5, 40, 30]
    assert mask_boxes(masks, 0.01)[0][2].tolist() == [5, 5, 25, 25]


def test_what_is_cut_out_at_its_own_size_is_the_pixels_and_black_beyond_the_frame() -> None:
    planes = noise.integers(noise.key(0, torch.arange(2)), 256, *SIZE, 3).byte()
    seen = cut(planes, torch.tensor([1]), torch.tensor([[6.0, 5, 14, 13]]), 8)
    torch.testing.assert_close(seen[0], planes[1, 5:13, 6:14].permute(2, 0, 1) / 255)
    region = torch.tensor([[-4.0, -4, 4, 4]])
    seen = cut(planes, torch.tensor([0]), region, 8)
    assert (seen[0, :, :4] == 0).all()
    assert (seen[0, :, :, :4] == 0).all()
    torch.testing.assert_close(seen[0, :, 4:, 4:], planes[0, :4, :4].permute(2, 0, 1) / 255)
    assert within(region, 8, SIZE)[0].sum() == 16


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_cut_out_is_what_grid_sample_reads(count: int) -> None:
    """The textbook way, which makes floats of whole frames, with black beyond the frame."""
    planes, keys = (
        noise.integers(noise.key(0, torch.arange(3)), 256, *SIZE, count).byte(),
        noise.key(1, torch.arange(90)),
    )
    low = (noise.uniform(keys, 2) * 1.4 - 0.4) * torch.tensor([SIZE[1], SIZE[0]])
    regions = torch.cat((low, low + 4 + 30 * noise.uniform(noise.fold(keys, "sides"), 2)), 1)
    frames, share = noise.integers(keys, 3), (torch.arange(12) + 0.5) / 12
    x, y = (regions[:, k, None] + share * (regions[:, k + 2] - regions[:, k])[:, None] for k in (0, 1))
    places = (
        torch.stack((x[:, None].expand(-1, 12, -1) / SIZE[1], y[:, :, None].expand(-1, -1, 12) / SIZE[0]), -1) * 2 - 1
    )
    images = planes[frames].permute(0, 3, 1, 2) / 255
    seen = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    expected = seen * (places.abs() <= 1).all(-1)[:, None]
    torch.testing.assert_close(cut(planes, frames, regions, 12), expected, atol=1e-4, rtol=0)


def test_masks_are_put_back_where_they_were_cut_out() -> None:
    """Also from a region that reaches beyond the frame; what is counted in the square stands in the frame."""
    masks = boxed([10, 8, 22, 20], [30, 0, 40, 12])
    truths = boxed([12, 8, 26, 20], [28, 2, 40, 12])
    planes = (torch.stack((masks, truths), 3) * 255).byte()
    regions = torch.tensor([[4.0, 2, 28, 26], [24, -6, 48, 18]])
    squares = cut(planes, torch.arange(2), regions, 24) > 0.5
    back = pasted(squares[:, 0].float(), regions, SIZE) > 0.5
    assert torch.equal(back, masks)
    wanted = truths.sum((1, 2)).float()
    found = counted(squares[:, 0], squares[:, 1], wanted, regions).iou
    torch.testing.assert_close(found, overlap(masks[None], truths[None])[0])
    missed = counted(squares[:, 0], squares[:, 1], wanted + 100, regions).iou
    assert (missed < found).all(), "truth beyond the region is missed"


def test_changes_are_undone_and_jittered_boxes_stay_in_the_frame() -> None:
    keys = noise.key(0, torch.arange(200))
    boxes = jittered(torch.tensor([[5.0, 5, 25, 20]]).expand(200, -1), keys, 0.15, SIZE)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([40.0, 30, 40, 30])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 4 - 1e-4).all()
    torch.testing.assert_close(changed(boxes, changes(boxes, boxes.flip(0)), SIZE), boxes.flip(0))
    assert boxes.std(0).min() > 1


# ---- the environment ----


def test_a_reward_is_ten_times_the_change_and_of_the_stop_three_times_that() -> None:
    env = episode([12.0, 8, 22, 18], alpha=0.2)
    start = float(env.state.iou)
    assert start == pytest.approx(0.8, abs=0.03)
    reward = env.step(torch.tensor([MOVES.index("left")]))[1]
    assert float(env.state.iou) == pytest.approx(1.0, abs=0.03)
    assert float(reward) == 1.0, "0.2 is more than 0.1"
    env.step(torch.tensor([MOVES.index("bigger")]))
    now = float(env.state.iou)
    _, reward, ended, _, _ = env.step(torch.tensor([STOP]))
    assert float(reward) == pytest.approx(3 * min(1, 10 * (now - start)), abs=1e-4)
    assert ended.item()
    small = episode([10.4, 8, 20.4, 18], alpha=0.04)
    before = float(small.state.iou)
    reward = small.step(torch.tensor([MOVES.index("left")]))[1]
    assert 0 < float(small.state.iou) - before < 0.1
    assert float(reward) == pytest.approx(10 * (float(small.state.iou) - before), abs=1e-4)
    away = episode([12.0, 8, 22, 18], alpha=0.2)
    assert float(away.step(torch.tensor([MOVES.index("right")]))[1]) == -1.0


def test_contexts_change_within_their_choices_and_boxes_do_not() -> None:
    env = episode([11.0, 8, 21, 18])
    box = env.state.box.clone()
    for action, context in ((WIDER, 2), (WIDER, 2), (TIGHTER, 1), (TIGHTER, 0), (TIGHTER, 0)):
        env.step(torch.tensor([action]))
        assert env.state.context.item() == context
        assert torch.equal(env.state.box, box)
    assert env.state.history[0, :2].tolist() == [TIGHTER + 1, TIGHTER + 1]
    assert env.observe(env.state)["context"].tolist() == [[1, 0, 0]]


def test_guided_moves_bring_the_box_nearer_and_then_stop() -> None:
    env = CuttingEnv(32, videos=video([10, 8, 20, 18], [14, 10, 26, 20]), jitter=0.3, autoreset="disabled", gap=1)
    env.reset(seed=0)

    def score() -> Tensor:
        return overlaps(env.state.box[:, None], env.boxes[env.state.frame][:, None])[:, 0, 0]

    first = score()
    for _ in range(8):
        good = env.rewarded(env.state)
        assert good.any(1).all()
        before = score()
        actions = good[:, : len(MOVES)].float().argmax(1)
        moving = good[:, : len(MOVES)].any(1) & ~env.waiting
        env.step(torch.where(moving, actions, STOP))
        assert (score()[moving] > before[moving]).all()
    assert score().mean() > first.mean() + 0.15
    assert env.rewarded(env.state)[score() > 0.85][:, STOP].all()


def test_a_state_is_coordinates() -> None:
    env = CuttingEnv(3)
    env.reset(seed=0)

    def small(leaf: Tensor) -> Tensor:
        assert leaf[0].numel() <= 6
        return leaf

    map_tree(small, env.state)
    assert env.single_action_space.n == ACTIONS == 11


# ---- scores ----


def reference_boundary(mask: np.ndarray, other: np.ndarray) -> float:
    """DAVIS' F pixel by pixel: outlines, disks of 0.8 % of the diagonal, precision and recall."""
    radius = math.ceil(0.008 * math.hypot(*mask.shape))

    def outline(found: np.ndarray) -> list[tuple[int, int]]:
        height, width = found.shape
        places = []
        for y in range(height):
            for x in range(width):
                down, right = min(y + 1, height - 1), min(x + 1, width - 1)
                if any(found[y, x] != found[place] for place in ((down, x), (y, right), (down, right))):
                    places.append((y, x))
        return places

    def near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some)

    one, two = outline(mask), outline(other)
    if not one and two:
        precision, recall = 1.0, 0.0
    elif one and not two:
        precision, recall = 0.0, 1.0
    elif not one:
        precision, recall = 1.0, 1.0
    else:
        precision, recall = near(one, two) / len(one), near(two, one) / len(two)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def test_j_and_f_are_those_of_a_written_out_reference() -> None:
    coarse = noise.uniform(noise.key(1, torch.arange(2), "masks")[:, None] + torch.arange(4), 6, 8)
    masks = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear") > 0.5
    masks = torch.cat((masks, torch.zeros(2, 1, *SIZE, dtype=torch.bool)), 1)
    others = masks.roll(1, 1)
    found = accuracy(masks, others), overlap(masks, others)
    for video in range(2):
        for time in range(5):
            one, two = masks[video, time].numpy(), others[video, time].numpy()
            assert float(found[0][video, time]) == pytest.approx(reference_boundary(one, two), abs=1e-5)
            either = (one | two).sum()
            expected = (one & two).sum() / either if either else 1.0
            assert float(found[1][video, time]) == pytest.approx(expected, abs=1e-6)


def test_first_and_last_frames_are_not_scored_and_short_videos_weigh_as_much_as_long_ones() -> None:
    long, short = boxed(*[[0, 0, 20, 20]] * 8), boxed(*[[0, 0, 20, 20]] * 8)
    found = torch.stack((long, short))
    found[0, [0, 7]] = False
    found[1, 1] = False  # of the short one's three frames the only one that counts
    scores = davis_scores(found, torch.stack((long, short)), torch.tensor([8, 3]))
    assert scores["j"] == scores["j_recall"] == 0.5
    assert scores["jf"] == pytest.approx((scores["j"] + scores["f"]) / 2)


def test_decay_is_the_fall_from_the_first_quarter_to_the_last() -> None:
    values = torch.arange(10, 0, -1).float()
    # quarters of their code, which share a frame: places 0-2, 2-5 (4.5 rounds up), 5-7, 7-9
    edges = np.round(np.linspace(1, 10, 5) + 1e-10).astype(int) - 1
    parts = [values.numpy()[edges[k] : edges[k + 1] + 1] for k in range(4)]
    assert decay(values) == pytest.approx(parts[0].mean() - parts[3].mean())
    assert decay(values) > 0 > decay(values.flip(0))


# ---- appearance and networks ----


def test_the_colours_of_the_object_look_like_it_in_later_frames() -> None:
    clip = video([10, 8, 20, 18], [14, 10, 26, 20], [2, 2, 9, 9])
    alike = color_likeness(clip.pixels, clip.video, clip.first, clip.masks[:1])
    assert (alike[clip.masks] > 0.8).all()
    assert (alike[~clip.masks] < 0.2).all()
    strange = clip.pixels.clone()
    strange[2] = 128  # a colour of which the first frame says nothing
    torch.testing.assert_close(
        color_likeness(strange, clip.video, clip.first, clip.masks[:1])[2], torch.full(SIZE, 0.5)
    )


def test_features_tell_the_object_from_the_rest() -> None:
    pytest.importorskip("timm")
    clip = video([10, 8, 26, 24], [14, 6, 30, 22])
    planes = clips_of(clip, "efficientnet-lite0")[1]
    assert planes.shape == (2, *SIZE, 5)
    alike = planes[1, ..., 4].float()
    assert alike[clip.masks[1]].mean() > alike[~clip.masks[1]].mean() + 20


def test_an_executor_learns_to_cut_by_the_box_it_is_given() -> None:
    """Two objects of one look: only the box tells which is meant."""
    torch.manual_seed(0)
    masks, others = boxed([6, 6, 16, 16]), boxed([22, 14, 32, 24])
    planes = stacked(((masks | others)[:, None].expand(-1, 3, -1, -1) * 255).byte())
    wanted = (torch.stack((masks, others), 3) * 255).byte()
    executor = Executor(3, (1.5, 2.5), 16, 8)
    optimizer = torch.optim.Adam(executor.parameters(), 5e-3)
    targets = torch.tensor([[6.0, 6, 16, 16], [22, 14, 32, 24]])

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = noise.key("batch", step, torch.arange(16))
        which, contexts = torch.arange(16) % 2, noise.integers(noise.fold(keys, "context"), 2)
        regions = enlarged(jittered(targets[which], keys, 0.1, SIZE), executor.factors[contexts])
        frames = torch.zeros(16).long()
        truths = cut(wanted, frames, regions, 16)[torch.arange(16), which] > 0.5
        return cut(planes, frames, regions, 16), contexts, truths

    for step in range(60):
        seen, contexts, truths = batch(step)
        mask_loss(executor(seen, contexts), truths).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen, contexts, truths = batch(1000)
    made = executor(seen, contexts) > 0
    both, either = (made & truths).sum((1, 2)), (made | truths).sum((1, 2))
    assert (both / either).mean() > 0.75


def test_masks_follow_the_box_that_is_placed() -> None:
    clip = video([10, 8, 20, 18], [12, 8, 22, 18], [14, 8, 24, 18], [20, 12, 32, 24])
    env = CuttingEnv(1, videos=clip)

    def make(frames: Tensor, boxes: Tensor, contexts: Tensor) -> Tensor:
        return whole(env)(frames, boxes, contexts).float()

    def j(place: Any) -> float:
        return davis_scores(follow(clip, place, make, env.factors, 1).masks, *truth(clip))["j"]

    assert j(fixed(env.boxes)) > 0.95
    assert j(unmoved) < j(knowing(env, 1)) <= j(knowing(env, 3))
    assert j(fixed(env.boxes)) > j(fixed(env.boxes[[0, 0, 0, 0]])) + 0.1
    assert j(unmoved) < j(fixed(env.boxes))

    def stops(seen: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(seen["place"]),), STOP), ACTIONS).float()

    class Stops(torch.nn.Module):
        def forward(self, seen: dict[str, Tensor]) -> Tensor:
            return stops(seen)

    assert j(acting(env, Stops(), 5)) == j(unmoved), "an agent that stops at once leaves the boxes where they were"

    class Right(torch.nn.Module):
        """Two steps to the right, after each of which stopping is worth so much more."""

        def __init__(self, worth: float) -> None:
            super().__init__()
            self.worth = worth

        def forward(self, seen: dict[str, Tensor]) -> Tensor:
            done = seen["history"].flatten(1).sum(1)
            values = 10.0 * torch.nn.functional.one_hot(torch.where(done < 2, 0, STOP), ACTIONS)
            values[:, STOP] = self.worth * done
            return values

    assert j(acting(env, Right(0.1), 5)) != j(unmoved)
    assert j(acting(env, Right(-0.1), 5)) == j(unmoved), "a way that leads off costs nothing"


def test_every_step_to_a_mask_is_told_and_drawn_before_it() -> None:
    config = cutting.resolve(cutting.Config(image_size=48, scenes=4, length=4, crop=16, width=8, patch=12, horizon=3))
    torch.manual_seed(0)
    policy = cutting.build(config)
    clip = load_videos("scenes", None, "test", 48, 4, 4)
    inputs = {"frames": clip.pixels[:4] / 255, "mask": clip.masks[:1]}
    inputs["frames"] = F.interpolate(inputs["frames"], (96, 96))  # boxes are in the user's pixels
    inputs["mask"] = clip.masks[:1].repeat_interleave(2, 1).repeat_interleave(2, 2)
    made = cutting.predict(config, policy, inputs)
    assert made["step_frames"].unique().tolist() == [1, 2, 3], "the first mask is given"
    for time in (1, 2, 3):
        rows = (made["step_frames"] == time).nonzero().flatten()
        assert made["step_actions"][rows].tolist()[0] == -1
        assert STOP not in made["step_actions"][rows]
        assert len(rows) <= 4
        pairs = torch.cat((made["step_boxes"], made["step_contexts"]), 1)[rows]
        assert (pairs - torch.cat((made["boxes"], made["contexts"]), 1)[time]).abs().amax(1).min() < 1e-3
        for row in rows.tolist()[1:]:
            before, action = made["step_boxes"][row - 1, None], int(made["step_actions"][row])
            if action < len(MOVES):
                expected = kept_inside(moves(before, config.alpha)[:, action], (96, 96))
                torch.testing.assert_close(made["step_boxes"][row, None], expected, atol=1e-3, rtol=0)
            else:
                torch.testing.assert_close(made["step_boxes"][row, None], before)
    shown = pictures.step_frames(inputs["frames"], made, NAMES, detailed=2)
    assert len(shown) == 4 + int((made["step_frames"] <= 2).sum())
    assert len({frame.size for frame in shown}) == 1
    assert len(pictures.step_frames(inputs["frames"], made, NAMES, clip.masks[:4].repeat(1, 2, 2), detailed=0)) == 4


# ---- data ----


def test_scenes_move_and_their_object_stays_visible() -> None:
    clips = load_videos("scenes", None, "train", 48, 6, 8)
    assert clips.pixels.shape == (48, 3, 48, 48)
    assert clips.masks.flatten(1).any(1).all()
    boxes = mask_boxes(clips.masks)[0].view(6, 8, 4)
    assert ((boxes[:, 1:] - boxes[:, :-1]).abs().amax((1, 2)) >= 1).all()
    again = load_videos("scenes", None, "train", 48, 6, 8)
    assert torch.equal(clips.pixels, again.pixels)
    assert not torch.equal(clips.pixels[:16], load_videos("scenes", None, "test", 48, 6, 8).pixels[:16])


def test_views_are_the_videos_backwards_and_mirrored() -> None:
    clip = views(video([10, 8, 20, 18], [12, 8, 22, 18], [14, 8, 24, 18]))
    assert clip.lengths.tolist() == [3, 3, 3, 3]
    boxes = mask_boxes(clip.masks)[0][:, 0].tolist()
    assert boxes == [10, 12, 14, 14, 12, 10, 20, 18, 16, 16, 18, 20]
    assert clip.frames(9).tolist() == [2, 5, 8, 11]


def write_davis(root: Path, sequences: dict[str, int], **lists: str) -> None:
    for name, count in sequences.items():
        for folder, kind in (("JPEGImages", "jpg"), ("Annotations", "png")):
            (root / folder / "480p" / name).mkdir(parents=True, exist_ok=True)
            for time in range(count):
                values = np.zeros((24, 32), np.uint8)
                values[4:16, 6 + time : 18 + time] = 255
                image = Image.fromarray(values)
                path = root / folder / "480p" / name / f"{time:05d}.{kind}"
                (image.convert("RGB") if kind == "jpg" else image).save(path)
    (root / "ImageSets" / "2016").mkdir(parents=True, exist_ok=True)
    for part, text in lists.items():
        (root / "ImageSets" / "2016" / f"{part}.txt").write_text(text)


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    write_davis(tmp_path, {"a": 3, "b": 4, "c": 3}, train="a\nb\n", val="c\n")
    return tmp_path


def test_davis_is_read(davis: Path) -> None:
    found = {part: load_videos("davis", davis, part, 24) for part in ("train", "val", "test", "all")}
    assert found["test"].names == ("c",)
    assert {*found["train"].names, *found["val"].names} == {"a", "b"}
    assert found["all"].lengths.tolist() == [3, 4, 3]
    assert found["all"].first.tolist() == [0, 3, 7]
    assert mask_boxes(found["all"].masks)[0][:4].tolist() == [
        [6, 4, 18, 16],
        [7, 4, 19, 16],
        [8, 4, 20, 16],
        [6, 4, 18, 16],
    ]
    assert load_videos("davis", davis, "test", 12).size == (12, 16)
    own = read_video(davis / "JPEGImages" / "480p" / "c")
    assert own["frames"].shape == (3, 3, 24, 32)
    assert own["mask"].sum() == 144


def test_frames_play_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"frame-{number}.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    assert (read_video(tmp_path)["frames"][:, 0, 0, 0] * 255).round().tolist() == [1, 2, 10]


def test_the_real_davis_is_read(shared_data: Path) -> None:
    clips = load_videos("davis", shared_data / "DAVIS", "test", 60)
    assert clips.names == ("car-shadow", "dance-twirl", "horsejump-high", "paragliding-launch", "soapbox")
    assert clips.lengths.tolist() == [32] * 5
    assert 0.02 < clips.masks.float().mean() < 0.3


def resave(path: Path, size: tuple[int, int], value: int = 255) -> None:
    Image.new("L", size, value).convert("RGB" if path.suffix == ".jpg" else "L").save(path)


BROKEN: dict[str, tuple[Any, str]] = {
    "empty list": (lambda root: (root / "ImageSets/2016/train.txt").write_text("\n"), r"train\.txt: holds no names"),
    "no list": (lambda root: (root / "ImageSets/2016/val.txt").unlink(), r"val\.txt: not found"),
    "unknown sequence": (
        lambda root: (root / "ImageSets/2016/val.txt").write_text("c\nzebra\n"),
        r"val\.txt, line 2: no sequence 'zebra'",
    ),
    "twice": (lambda root: (root / "ImageSets/2016/val.txt").write_text("c\nc\n"), r"line 2: 'c' is listed twice"),
    "no frames": (
        lambda root: [each.unlink() for each in (root / "JPEGImages/480p/c").iterdir()],
        r"c: holds no frames",
    ),
    "size changes": (
        lambda root: resave(root / "JPEGImages/480p/c/00001.jpg", (20, 24)),
        r"00001\.jpg: is 20x24, but 00000\.jpg is 32x24",
    ),
    "annotation size": (
        lambda root: resave(root / "Annotations/480p/c/00001.png", (16, 24)),
        r"00001\.png: is 16x24, but 00001\.jpg is 32x24",
    ),
    "no annotation": (lambda root: (root / "Annotations/480p/c/00002.png").unlink(), r"00002\.png: not found"),
    "no foreground": (
        lambda root: resave(root / "Annotations/480p/c/00000.png", (32, 24), 0),
        r"00000\.png: found no foreground",
    ),
    "broken": (lambda root: (root / "JPEGImages/480p/c/00001.jpg").write_bytes(b"no"), r"00001\.jpg: cannot be read"),
    "no folder": (lambda root: (root / "JPEGImages").rename(root / "Images"), r"480p: not found"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_set_is_named(davis: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(davis)
    with pytest.raises(InputError, match=message) as told:
        load_videos("davis", davis, "test", 24)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_split_without_a_frame_to_cut_is_named_before_training(davis: Path, part: str) -> None:
    for name in load_videos("davis", davis, part, 24).names:
        for mask in sorted((davis / "Annotations/480p" / name).iterdir())[1:]:
            resave(mask, (32, 24), 0)
    with pytest.raises(InputError, match=rf"^{davis}, {part} videos: found no frame with the object after a first one"):
        cutting.resolve(cutting.Config(data="davis", root=davis, image_size=24))


def test_what_is_wrong_with_a_users_video_is_named(davis: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(InputError, match=r"alone: holds no frames"):
        read_video(alone)
    resave(alone / "0.jpg", (32, 24))
    with pytest.raises(InputError, match=r"mask\.png: not found"):
        read_video(alone)
    resave(alone / "mask.png", (32, 24))
    resave(alone / "1.jpg", (32, 20))
    with pytest.raises(InputError, match=r"1\.jpg: .*32x20.*32x24"):
        read_video(alone)
    (alone / "1.jpg").unlink()
    resave(alone / "mask.png", (32, 24), 0)
    with pytest.raises(InputError, match=r"mask\.png: found no foreground"):
        read_video(alone)
    with pytest.raises(InputError, match=r"gone: does not exist"):
        read_video(tmp_path / "gone")
    frames, mask = torch.rand(3, 3, *SIZE), boxed([4, 4, 20, 20])
    for wrong, message in (
        ((frames[:0], mask), "^frames: found"),
        ((frames * 255, mask), "^frames: found values .* divide by 255"),
        ((frames, mask[:, 1:]), "^mask: found"),
        ((frames, mask & False), "^mask: found no foreground"),
    ):
        with pytest.raises(InputError, match=message):
            as_video(*wrong, 24)
    config = cutting.Config(image_size=24)
    for several, message in ((frames[0], r"\[3, 30, 40\]"), (list(frames), "a list")):
        with pytest.raises(
            InputError, match=rf"^frames: found {message}, expected a tensor \[time, 3, height, width\]"
        ):
            cutting.predict(config, cutting.build(config), {"frames": several, "mask": mask})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": (1.5, 1.2)}, r"^factors: found"),
        ({"alpha": 1.0}, r"^alpha: found 1"),
        ({"jitter": -1.0}, r"^jitter: found -1"),
        ({"gap": 0}, r"^gap: found 0"),
        ({"data": "davies"}, r"^data: no 'davies'.* did you mean 'davis'"),
        ({"data": "davis"}, r"^root: not given"),
        ({"videos": video([3, 3, 9, 9])}, r"^videos: found no frame"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CuttingEnv(**settings)


# ---- the system ----


def test_what_is_learned_beats_the_first_box_and_gains_on_its_way(tmp_path: Path) -> None:
    """Rendered objects among others; the executor that all share is learned first."""
    settings: dict[str, Any] = {"image_size": 48, "scenes": 20, "length": 6, "crop": 16, "width": 8, "patch": 12}
    settings |= {"batch": 32, "copies": 16, "every": 60, "execution_share": 0.4}
    agent = foveate.train("cutting", steps=400, device="cpu", out=tmp_path / "run", **settings)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = {name: row["j"] for name, row in found["baselines"].items()}
    assert rows["true box"] > 0.7
    assert found["metrics"]["j"] > rows["unchanged"] + 0.08
    assert rows["regressor"] > rows["refitted"] + 0.02
    clip = load_videos("scenes", None, "test", 48, 20, 6)
    planes = clips_of(clip)[1]
    make, count = agent.policy.executor.maker(planes), CuttingEnv(videos=clip).examples
    how: dict[str, Any] = {"planes": planes, "execute": lambda *where: make(*where) > 0.5, "patch": 12}
    env = CuttingEnv(count, videos=clip, autoreset="disabled", **how)
    way = walk(env, agent.policy.placer, torch.arange(count))
    assert way.rewards.sum(1).mean() > 0.05, "from shaken boxes the masks get better; who stops at once gains 0"
    made = agent({"frames": clip.pixels[:6] / 255, "mask": clip.masks[:1]})
    assert made["masks"].shape == (6, 48, 48)
    assert torch.equal(made["masks"][0], clip.masks[0])
    assert (made["contexts"][:, 2:] - made["contexts"][:, :2] > made["boxes"][:, 2:] - made["boxes"][:, :2]).all()
