"""Box search: moves, rewards and marks are those of the paper, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import noise
from foveate.data.detection import Detections
from foveate.envs.box_search import ACTIONS, MOVES, TRIGGER, BoxSearchEnv
from foveate.geometry import Boxes, overlaps
from foveate.learn.replay import Replay
from foveate.types import InputError, map_tree

SIDE = 40


def detections(boxes: list[list[float]]) -> Detections:
    """One grey image with these objects, which are white."""
    pixels = torch.full((1, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        pixels[:, :, int(top) : int(bottom), int(left) : int(right)] = 255
    found = Boxes(torch.tensor([boxes]), torch.zeros(1, len(boxes)).long(), torch.ones(1, len(boxes), dtype=torch.bool))
    return Detections(pixels, found, ("thing",), "test", "train")


def search(boxes: list[list[float]], copies: int = 1, **options: Any) -> BoxSearchEnv:
    env = BoxSearchEnv(copies, detections=detections(boxes), autoreset="disabled", **options)
    env.reset(seed=0)
    return env


def act(env: BoxSearchEnv, *names: str) -> list[float]:
    rewards = []
    for name in names:
        action = torch.tensor([TRIGGER if name == "trigger" else MOVES.index(name)] * env.num_envs)
        rewards.append(float(env.step(action)[1][0]))
    return rewards


def test_moves_change_the_box_by_a_fifth_of_its_sides() -> None:
    env = search([[0.0, 0, 10, 10]])
    moved = dict(zip(MOVES, env.moved(torch.tensor([[10.0, 10, 20, 30]]))[0], strict=True))
    expected = {
        "right": [12, 10, 22, 30],
        "left": [8, 10, 18, 30],
        "up": [10, 6, 20, 26],
        "down": [10, 14, 20, 34],
        "bigger": [9, 8, 21, 32],
        "smaller": [11, 12, 19, 28],
        "fatter": [10, 12, 20, 28],
        "taller": [11, 10, 19, 30],
    }
    for name, box in expected.items():
        torch.testing.assert_close(moved[name], torch.tensor(box).float(), msg=name)


def test_boxes_stay_in_the_image_and_keep_some_pixels() -> None:
    env = search([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, SIDE, SIDE], [0, 0, 2, 2], [39, 39, 40, 40], [0, 38, 40, 40]])
    for _ in range(30):
        boxes = env.moved(boxes).flatten(0, 1)
        pick = noise.integers(noise.key(len(boxes), "pick"), len(boxes), 50)
        boxes = boxes[pick]
        assert (boxes >= 0).all()
        assert (boxes <= SIDE).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 2 - 1e-4).all()


def test_rewards_are_the_sign_of_the_change_and_three_for_the_trigger() -> None:
    env = search([[0.0, 0, 20, 40]])
    assert act(env, "taller", "bigger", "right", "left", "left") == [-1, 1, -1, 1, 1]
    assert act(search([[0.0, 0, 40, 25]]), "trigger") == [3.0], "IoU 0.625 of the whole image"
    assert act(search([[0.0, 0, 40, 23]]), "trigger") == [-3.0]
    assert act(search([[0.0, 0, 40, 30]], threshold=0.8, trigger_reward=5.0), "trigger") == [-5.0]


def test_a_search_for_several_begins_again_at_the_corners_and_does_not_find_the_same_twice() -> None:
    first, second = [0.0, 0, 40, 30], [0.0, 30, 40, 40]
    env = search([first, second], triggers=3)
    assert act(env, "trigger") == [3.0]
    assert env.state.free[0].tolist() == [False, True]
    torch.testing.assert_close(env.state.box[0], torch.tensor([0.0, 0, 30, 30]))
    assert act(env, "trigger") == [-3.0], "it lies on what was found"
    torch.testing.assert_close(env.state.box[0], torch.tensor([10.0, 0, 40, 30]))
    assert not env.waiting[0]
    assert act(env, "trigger") == [-3.0]
    assert env.waiting[0], "the third was the last"
    torch.testing.assert_close(env.state.box[0], torch.tensor([10.0, 0, 40, 30]), msg="the last box stays")


def test_a_mark_is_a_black_cross_over_what_was_triggered() -> None:
    env = search([[0.0, 0, 40, 40]], triggers=2, patch=30)
    plain = env.observe(env.state)["view"]
    assert (plain > 0.9).all()
    act(env, "trigger")
    view = env.observe(env.state)["view"][0, 0]  # of the box 0, 0, 30, 30; the cross is from 13.3 to 26.7
    assert (view[:13, :13] > 0.9).all()
    assert (view[14:26] == 0).all()
    assert (view[:, 14:26] == 0).all()
    assert (view[27:, 27:] > 0.9).all()


def test_a_view_is_the_region_of_the_box() -> None:
    env = search([[10.0, 10, 20, 20]], patch=8)
    inside = env.transition(env.state, torch.tensor([0]), torch.zeros(1).long())[0]
    assert inside.history[0].tolist() == [1] + [0] * 9
    for box, share in (([10.0, 10, 20, 20], 1.0), ([10.0, 10, 30, 20], 0.5), ([20.0, 20, 30, 30], 0.0)):
        state = type(env.state)(**(vars(env.state) | {"box": torch.tensor([box])}))
        white = (env.observe(state)["view"] > 0.9).float().mean()
        assert white.item() == pytest.approx(share, abs=0.13)


def test_guided_actions_are_those_that_are_rewarded() -> None:
    torch.manual_seed(0)
    env = search([[4.0, 6, 18, 20], [22, 10, 38, 36]], copies=64)
    for step in range(6):
        state, keys = env.state, torch.zeros(64).long()
        told = env.rewarded(state)
        for action in range(ACTIONS):
            reward = env.transition(state, torch.full((64,), action), keys)[1]
            assert torch.equal(told[:, action], reward > 0), action
        env.step(noise.integers(noise.key(0, step, torch.arange(64)), TRIGGER))
    good = told.float() + noise.uniform(noise.key("any", torch.arange(64)), ACTIONS) * 0.5
    assert told.any(1).float().mean() > 0.9
    best = overlaps(env.state.box[:, None], env.targets[env.state.image]).amax((1, 2)).mean()
    for _ in range(8):
        env.step(good[:, :TRIGGER].argmax(1))
        good = env.rewarded(env.state).float()
    after = overlaps(env.state.box[:, None], env.targets[env.state.image]).amax((1, 2)).mean()
    assert after > best + 0.2


def test_a_state_is_coordinates_and_a_million_of_them_take_little_room() -> None:
    env = search([[4.0, 6, 18, 20]] * 6, copies=250)
    replay = Replay(env.state, 4000)
    assert replay.size < 300e6

    def small(leaf: Tensor) -> Tensor:
        assert leaf[0].numel() <= 10
        return leaf

    map_tree(small, env.state)


def of_two(copies: int = 2, **options: Any) -> BoxSearchEnv:
    """A picture with an object of the first class and one of the second, searched for the first, then the second."""
    data = detections([[0.0, 0, 40, 30], [0, 30, 40, 40]])
    data = replace(data, boxes=replace(data.boxes, labels=torch.tensor([[0, 1]])), classes=("one", "other", "third"))
    searches = torch.tensor([[0, 0], [0, 1], [0, 2]])
    env = BoxSearchEnv(copies, detections=data, searches=searches, autoreset="disabled", **options)
    env.reset(seed=0, options={"ids": torch.arange(copies) % 3})
    return env


def test_of_several_classes_only_the_one_searched_for_is_rewarded_and_it_is_seen() -> None:
    env = of_two(3, triggers=2, spare=1)
    assert env.observe(env.state)["label"].tolist() == [0, 1, 2]
    assert env.state.image.tolist() == [0, 0, 0]
    assert env.rewarded(env.state)[:, TRIGGER].tolist() == [True, False, False], "it is 0.75 of the whole image"
    down = torch.full((3,), MOVES.index("smaller"))
    assert env.transition(env.state, down, torch.zeros(3).long())[1].tolist() == [-1, -1, 0]
    _, reward, terminated, *_ = env.step(torch.full((3,), TRIGGER))
    assert reward.tolist() == [3, -3, -3]
    assert not terminated.any()
    assert env.step(torch.zeros(3, dtype=torch.int64))[2].tolist() == [True, False, True], "nothing is left"
    assert env.state.label.tolist() == [0, 1, 2]


def test_a_class_is_told_only_where_there_are_several() -> None:
    assert set(BoxSearchEnv(target="each").single_observation_space) == {"history", "label", "view"}
    for target in ("any", "ring"):
        env = BoxSearchEnv(target=target)
        assert set(env.single_observation_space) == {"history", "view"}
        env.reset(seed=0)
        assert env.state.label is None
    whole, rings = BoxSearchEnv(), env
    assert 0 < rings.wanted.sum() < whole.wanted.sum()
    with pytest.raises(InputError, match=r"^target: found 'zebra', expected any, each, or a class: disk"):
        BoxSearchEnv(target="zebra")


@pytest.mark.parametrize("several", [False, True])
def test_a_million_states_of_four_objects_take_less_than_300_megabytes(several: bool) -> None:
    boxes = [[4.0, 6, 18, 20]] * 4
    env = of_two(250) if several else search(boxes, copies=250)
    wide = replace(env.state, free=env.state.free[:, :1].expand(-1, 4))
    assert Replay(wide, 4000).size < 300e6
    assert (wide.label is not None) == several


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"^alpha: found 0, expected more than 0"),
        ({"threshold": 1.0}, r"^threshold: found 1"),
        ({"triggers": 0}, r"^triggers: found 0, expected at least 1"),
        ({"history": 0}, r"^history: found 0"),
        ({"data": "voc"}, r"^root: not given"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BoxSearchEnv(**settings)
