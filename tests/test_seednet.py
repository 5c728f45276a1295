"""SeedNet: the random walker against scikit-image's, the rules of the seeds counted by hand, and that it learns."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from foveate import noise
from foveate.data.salient import Salient, load_salient
from foveate.data.scenes import describe, draw
from foveate.envs.seed_play import play
from foveate.envs.seeds import ACTIONS, BACKGROUND, CELLS, FOREGROUND, SeedsEnv, regions
from foveate.geometry import mask_boxes
from foveate.learn.replay import Replay
from foveate.models.grab_cut import grab_cut
from foveate.models.random_walker import random_walker
from foveate.models.seed_q import SeedMask, SeedQ
from foveate.run import Run
from foveate.systems import seednet
from foveate.types import InputError, map_tree
from foveate.value_learning import Acting, learn_by_acting, with_belief

SHARED = Path(__file__).parents[2] / "shared" / "data"
AREA = CELLS * CELLS


def marked(count: int, height: int, width: int, seeds: int = 3) -> tuple[Tensor, Tensor]:
    """Seeds of both sides at random places."""
    order = noise.uniform(noise.key("marks", torch.arange(count)), height * width).argsort(1)
    marks = torch.zeros(count, height * width, dtype=torch.int64)
    marks.scatter_(1, order[:, :seeds], 1).scatter_(1, order[:, seeds : 2 * seeds], 2)
    return marks.view(-1, height, width) == 1, marks.view(-1, height, width) == 2


def theirs(image: Tensor, ours: Tensor, other: Tensor) -> Tensor:
    from skimage.segmentation import random_walker as reference

    labels = (ours.int() + 2 * other.int()).numpy()
    found = reference(image.double().numpy(), labels, mode="bf", return_full_prob=True, channel_axis=0)
    return torch.from_numpy(found[0])


# ---- the random walker ----


@pytest.mark.parametrize(("height", "width"), [(24, 24), (17, 26), (26, 17)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("method", ["cholesky", "elimination"])
def test_the_walker_is_scikit_images(height: int, width: int, channels: int, method: Any) -> None:
    images = draw(describe(noise.key("walker", torch.arange(6))), 26).images[:, :channels, :height, :width]
    images[3:] = noise.uniform(noise.key("noise", torch.arange(3)), channels, height, width)
    ours, other = marked(6, height, width)
    found = random_walker(images, ours, other, method=method)
    for row in range(6):
        torch.testing.assert_close(found[row].double(), theirs(images[row], ours[row], other[row]), rtol=0, atol=1e-3)


def test_gradients_come_to_what_the_exact_give_and_sooner_from_near() -> None:
    images = 0.5 + 0.05 * noise.normal(noise.key("soft", torch.arange(4)), 3, 20, 20).double()
    ours, other = marked(4, 20, 20)
    exact = random_walker(images, ours, other)
    found = random_walker(images, ours, other, method="gradients", tolerance=1e-8)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(random_walker(images, ours, other, method="gradients", start=exact), exact)
    alone = random_walker(images[2:3], ours[2:3], other[2:3], method="gradients", tolerance=1e-8)
    torch.testing.assert_close(alone, found[2:3], rtol=0, atol=1e-9)


def test_each_image_is_walked_by_itself() -> None:
    images = noise.uniform(noise.key("many", torch.arange(20)), 3, 12, 12)
    ours, other = marked(20, 12, 12)
    found = random_walker(images, ours, other)
    assert torch.equal(found[7:8], random_walker(images[7:8], ours[7:8], other[7:8]))
    assert torch.equal(found[:5], random_walker(images[:5], ours[:5], other[:5]))
    torch.testing.assert_close(found, 1 - random_walker(images, other, ours), rtol=0, atol=1e-5)
    assert random_walker(images[:0], ours[:0], other[:0]).shape == (0, 12, 12)


def test_seeds_of_one_side_or_none_decide_alone() -> None:
    images, none = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 9, 9).bool()
    ours, other = none.clone(), none.clone()
    ours[0, 4, 4] = other[1, 4, 4] = True
    found = random_walker(images, ours, other)
    assert [set(row.unique().tolist()) for row in found] == [{1.0}, {0.0}, {0.5}]


# ---- the environment ----


def square(count: int = 1, side: int = 40) -> Salient:
    """A white square from 10 to 30 on black."""
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    masks[:, 10:30, 10:30] = True
    return Salient(masks[:, None].expand(-1, 3, -1, -1).byte() * 200, masks, tuple(map(str, range(count))))


def cell(x: int, y: int, kind: int) -> Tensor:
    return torch.tensor([(kind - 1) * AREA + y * CELLS + x])


def test_cells_are_inside_the_border_or_at_it() -> None:
    there, inside = regions(square().masks, 0.05)
    assert there[0, 5:15, 5:15].all()
    assert there.sum() == 100
    assert inside[0, 6:14, 6:14].all(), "a cell of two pixels away from the outline"
    assert not inside[0, 5:15, 5].any()
    assert not inside[0, 4, 4:16].any()
    assert inside[0, 0].all(), "the image's edge is no border"


def test_a_thin_or_tiny_object_has_a_place_for_a_seed() -> None:
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 20] = True
    masks[1, 3, 3] = True
    there, inside = regions(masks, 0.1)
    assert (there & inside).flatten(1).any(1).all()
    assert (~there & inside).flatten(1).any(1).all()
    assert there[1].sum() == 1


def test_rewards_are_those_of_the_paper() -> None:
    env = SeedsEnv(1, salient=square(), autoreset="disabled")
    env.reset(seed=0)
    for place, kind, bonus in (
        ((8, 8), FOREGROUND, 0.0),
        ((5, 8), FOREGROUND, -1.0),
        ((1, 1), BACKGROUND, 0.0),
        ((4, 8), BACKGROUND, -1.0),
    ):
        if env.state.seeds[0, place[1], place[0]] == 0:
            reward = env.step(cell(*place, kind))[1]
            iou = env.iou(env.state)
            gained = (math.exp(5 * float(iou)) - 1) / (math.exp(5) - 1)
            assert reward.item() == pytest.approx(gained + bonus, abs=1e-5)
    assert iou == 1.0
    before = env.state
    assert env.step(cell(8, 8, BACKGROUND))[1] == -1, "on a seed"
    assert torch.equal(env.state.seeds, before.seeds)
    assert env.step(cell(2, 8, FOREGROUND))[1] == -1, "on the wrong side"
    assert env.iou(env.state) < 1


def test_gains_sum_to_what_was_gained() -> None:
    env = SeedsEnv(6, scenes=20, reward="gain", autoreset="disabled")
    env.reset(seed=0)
    first, total = env.iou(env.state), torch.zeros(6)
    for step in range(4):
        actions = noise.integers(noise.key("any", step, torch.arange(6)), ACTIONS)
        free = env.state.seeds.flatten(1).gather(1, actions[:, None] % AREA)[:, 0] == 0
        reward = env.step(actions)[1]
        total = total + torch.where(free, reward, 0.0)
        assert (reward[~free] == -1).all()
    torch.testing.assert_close(total, 5 * (env.iou(env.state) - first))
    assert (total < 0).any(), "a wrong seed is worth what it spoils"
    with pytest.raises(InputError, match=r"^reward: no 'loss'"):
        SeedsEnv(1, scenes=20, reward="loss")


def test_the_belief_is_of_what_is_right_and_values_do_not_teach_it() -> None:
    torch.manual_seed(0)
    env = SeedsEnv(4, scenes=20)
    env.reset(seed=0)
    network = SeedQ(width=8, depth=1)
    values, losses = with_belief(network.both, lambda state: env.right(state.image), env.observe(env.state), env.state)
    torch.testing.assert_close(values, network(env.observe(env.state)))
    values.sum().backward()
    assert network.belief.weight.grad is None
    _, belief = network.both(env.observe(env.state))
    right = env.right(env.state.image)
    wanted = -torch.where(right, belief.sigmoid(), 1 - belief.sigmoid()).log().mean()
    torch.testing.assert_close(losses["belief_loss"], wanted)
    good = env.rewarded(env.state)
    assert (right[good]).all()
    assert int((right & ~good).sum()) == 8, "the user's seeds: right, but not free"


def test_the_users_seeds_lie_well_inside_and_differ_from_user_to_user() -> None:
    env = SeedsEnv(32, salient=square(2))
    env.reset(seed=0)
    seeds, ids = env.state.seeds, env.state.image
    assert ((seeds == FOREGROUND).sum((1, 2)) == 1).all()
    assert ((seeds == BACKGROUND).sum((1, 2)) == 1).all()
    assert (env.inside[ids] & (env.object[ids] == (seeds == FOREGROUND)))[seeds > 0].all()
    assert len({tuple(row.flatten().nonzero().flatten().tolist()) for row in seeds}) > 20


def test_what_is_good_is_rewarded_and_true_seeds_are_always_right() -> None:
    env = SeedsEnv(8, scenes=20, autoreset="disabled")
    env.reset(seed=3)
    told = env.rewarded(env.state)
    for action in torch.randint(2 * AREA, (20,), generator=torch.Generator().manual_seed(0)):
        reward = env.transition(env.state, action.expand(8), torch.zeros(8).long())[1]
        assert ((reward >= 0) == told[:, action]).all()
    played = play(env, torch.arange(8), noise.key("users", torch.arange(8)))
    assert played.right.all()
    assert played.ious.shape == (8, 11)
    assert played.ious[:, -1].mean() > played.ious[:, 0].mean() + 0.1
    share = (played.actions >= AREA).float().mean()
    assert 0.3 < share < 0.7


def test_mirrored_images_are_a_second_half_and_a_state_is_small() -> None:
    env = SeedsEnv(2, salient=square(3), mirrored=True)
    assert env.examples == 6
    assert torch.equal(env.pixels[3:], env.pixels[:3].flip(-1))
    env.reset(seed=0)
    replay = Replay(env.state, 100, 2 * AREA)
    assert replay.size / 200 < 2100, "bytes a transition: 1,600 of the mask, 400 of the grid"


# ---- networks ----


def test_a_seed_on_a_seed_is_never_the_best_and_teaches_nothing() -> None:
    torch.manual_seed(0)
    env = SeedsEnv(4, scenes=20)
    env.reset(seed=0)
    network = SeedQ(width=8, depth=1)
    values = network(env.observe(env.state))
    assert values.shape == (4, 2 * AREA)
    taken = (env.state.seeds > 0).flatten(1).repeat(1, 2)
    assert (values[taken].view(4, -1).amax(1) < values.masked_fill(taken, math.inf).amin(1)).all()
    values[taken].sum().backward()
    assert all(one.grad is None or not one.grad.any() for one in network.parameters())
    alone = network(map_tree(lambda leaf: leaf[1:2], env.observe(env.state)))
    torch.testing.assert_close(alone, values[1:2])


def test_a_control_sees_the_users_seeds_or_does_not() -> None:
    env = SeedsEnv(2, scenes=20)
    seen = env.reset(seed=0)[0]
    other = seen | {"seeds": seen["seeds"].flip(1)}
    for seeds in (False, True):
        network = SeedMask(seeds, width=8, depth=1)
        assert torch.equal(network(seen), network(other)) != seeds


def test_grab_cut_cuts_a_plain_object_out() -> None:
    pytest.importorskip("cv2")
    data = square(2)
    boxes = mask_boxes(data.masks)[0]
    assert boxes.tolist() == [[10, 10, 30, 30]] * 2
    assert torch.equal(grab_cut(data.images, boxes - torch.tensor([3, 3, -3, -3])), data.masks)


# ---- data ----


def folder(tmp_path: Path, count: int = 6, size: tuple[int, int] = (30, 40)) -> Path:
    (tmp_path / "Imgs").mkdir()
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        mask[5:20, 8 : 12 + number] = 255
        Image.fromarray(np.repeat(mask[..., None] // 2 + 40, 3, 2)).save(tmp_path / "Imgs" / f"p{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "Imgs" / f"p{number}.png")
    return tmp_path


def test_pictures_are_stretched_with_their_masks(tmp_path: Path) -> None:
    found = load_salient("pairs", folder(tmp_path), "all", 40)
    assert found.pixels.shape == (6, 3, 40, 40)
    row = found.names.index("p4")
    columns, rows = found.masks[row].any(0).nonzero().flatten(), found.masks[row].any(1).nonzero().flatten()
    assert (columns[0], columns[-1]) == (8, 15)
    assert abs(int(rows[0]) - 7) <= 1
    assert abs(int(rows[-1]) - 26) <= 1
    parts = [load_salient("pairs", tmp_path, part, 40).names for part in ("train", "val", "test")]
    assert sorted(name for part in parts for name in part) == [f"p{k}" for k in range(6)]


def blank(path: Path, value: int) -> None:
    Image.fromarray(np.full((30, 40), value, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: blank(at / "p1.png", 0), r"the mask of p1 has no object"),
        (lambda at: blank(at / "p1.png", 255), r"the mask of p1 is object everywhere"),
        (lambda at: blank(at / "p1.png", 100), r"p1\.png: found the values 100, expected 0, 255"),
        (lambda at: (at / "p1.png").unlink(), r"p1\.jpg: found no mask of it"),
        (lambda at: (at / "p1.jpg").unlink(), r"p1\.png: found no picture of it"),
        (
            lambda at: Image.fromarray(np.zeros((9, 9), np.uint8)).save(at / "p1.png"),
            r"p1\.png: the mask is 9x9, but p1\.jpg is 40x30",
        ),
    ],
)
def test_a_bad_pair_is_named_and_can_be_left_out(tmp_path: Path, spoil: Any, message: str) -> None:
    root = folder(tmp_path)
    spoil(root / "Imgs")
    with pytest.raises(InputError, match=rf"^[^\n]*{message}[^\n]*--skip-bad[^\n]*$") as raised:
        load_salient("pairs", root, "all", 40)
    assert "--classes" not in str(raised.value)
    found = load_salient("pairs", root, "all", 40, skip_bad=True)
    assert len(found) == 5
    assert found.left_out == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "msra"}, r"^data: no 'msra'"),
        ({"data": "pairs"}, r"^root: not given"),
        ({"data": "grabcut", "root": Path("x")}, r"^data: grabcut is a test set"),
        ({"image_size": 16}, r"^image_size: found 16, expected at least 20"),
        ({"border": 0.5}, r"^border: found 0.5"),
        ({"beta": 0.0}, r"^beta: found 0"),
        ({"seeds": 0}, r"^seeds: found 0, expected at least 1"),
        ({"rows": 1}, r"^rows: found 1, expected at least 2"),
        ({"width": 12}, r"^width: found 12"),
        ({"scenes": 2}, r"^scenes: found 2"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        seednet.resolve(seednet.Config(**settings))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout")
def test_real_sets_are_read() -> None:
    parts = [load_salient("pairs", SHARED / "salient_from_coco", part, 40) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 95
    assert len(load_salient("grabcut", SHARED / "grabcut", "test", 40)) == 10


# ---- the system ----

SMALL: dict[str, Any] = {"scenes": 20, "image_size": 20, "copies": 8, "rows": 20, "batch": 8, "width": 8, "depth": 1}


def test_a_users_seeds_begin_what_is_predicted() -> None:
    config = seednet.Config(**SMALL, seeds=4)
    torch.manual_seed(0)
    policy = seednet.build(config)
    images = draw(describe(noise.key("user", torch.arange(2))), 60).images[:, :, :48]
    given = {"foreground": torch.tensor([[30.0, 24], [59, 47]]), "background": torch.tensor([[0.0, 0], [1.0, 40]])}
    found = seednet.predict(config, policy, {"images": images, **given})
    assert found["masks"].shape == (2, 48, 60)
    assert found["steps"].shape == (2, 5, 20, 20)
    assert found["labels"][:, :2].tolist() == [[False, True]] * 2
    for place, name in enumerate(("background", "foreground")):
        away = (found["seeds"][:, place] - given[name]).abs()
        assert (away <= torch.tensor([60, 48]) / CELLS).all(), name
    bare = seednet.predict(config, policy, images)
    torch.testing.assert_close(bare["seeds"][0, 1], torch.tensor([31.5, 25.2]))
    for wrong, message in (
        ({"images": images}, r"^background: found none, expected \[2, 2\]"),
        ({"images": images, **given, "foreground": torch.tensor([[60.0, 1], [1, 1]])}, r"^foreground: .*\[60.0, 1.0\]"),
        ({"images": images, **given, "foreground": given["background"]}, r"^foreground: the seed of image 0"),
        (images[:, :1], r"^images: 1 channels"),
    ):
        with pytest.raises(InputError, match=message):
            seednet.predict(config, policy, wrong)


def test_agent_and_controls_meet_the_same_users_and_every_draw_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seednet, "AT_ONCE", 8)  # with four images the third draw begins a new part
    config, data = seednet.Config(**SMALL, seeds=1), load_salient("scenes", None, "train", 20, scenes=4)
    agent, control = SeedQ(width=8, depth=1).eval(), SeedMask(True, width=8, depth=1)
    seen: dict[nn.Module, list[Tensor]] = {agent: [], control: []}
    for network in seen:
        network.register_forward_pre_hook(lambda network, shown: seen[network].append(shown[0]["seeds"]))
    seednet._score(config, data, 5, "cpu", agent, None)
    seednet._drawn(config, data, 5, "cpu", control, None)
    users, others = (torch.cat(each).view(5, 4, -1) for each in seen.values())
    assert torch.equal(users, others)
    assert [len(users[:, image].unique(dim=0)) for image in range(4)] == [5] * 4


def test_it_learns_which_side_is_which_and_cuts_better_for_it(tmp_path: Path) -> None:
    """On the images it learned from; half of all seeds of an untrained network lie on the wrong side or do nothing."""
    torch.manual_seed(0)
    data, ids = load_salient("scenes", None, "train", 20, scenes=8), torch.arange(8)
    keys = noise.key("users", ids)
    env = SeedsEnv(16, salient=data, horizon=5, reward="gain")
    env.reset(seed=0)
    network, target = SeedQ(width=16, depth=2), SeedQ(width=16, depth=2)
    test = SeedsEnv(8, salient=data, horizon=5, autoreset="disabled")
    before = play(test, ids, keys, network.eval())
    run = Run(tmp_path / "run", system="test", config={}, steps=150, device="cpu", quiet=True)
    optimizer = torch.optim.Adam(network.parameters())
    parts = run.track(
        network=network, target=target, optimizer=optimizer, env=env, replay=Replay(env.state, 100, ACTIONS)
    )
    network, target, optimizer, env, replay = parts
    how, told = (
        Acting(batch=32, discount=0.5, learning_rate=3e-3),
        partial(with_belief, network.both, lambda state: env.right(state.image)),
    )
    learn_by_acting(run, "agent", 1.0, env, network, target, optimizer, replay, how, good=env.rewarded, beside=told)
    after = play(test, ids, keys, network.eval())
    assert after.right.float().mean() > max(0.85, before.right.float().mean() + 0.1)
    assert after.ious[:, -1].mean() > max(before.ious[:, -1].mean(), after.ious[:, 0].mean()) + 0.15
