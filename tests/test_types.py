"""Trees: mapped and joined place by place, whatever they are made of."""

from dataclasses import dataclass

import pytest
import torch

from foveate.distributions import Categorical, Gaussian
from foveate.types import Decisions, InputError, Trajectory, check_least, concatenate, map_tree


@dataclass(frozen=True)
class Leaf:
    pixels: torch.Tensor
    extra: object = None


def tree(seed=0, time=2):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(3, time, *shape, generator=generator)  # noqa: E731
    return {
        "state": (draw(4), [draw(), None]),
        "leaf": Leaf(draw(2), {"inner": Leaf(draw()), "count": 7 + seed}),
        "name": f"seed {seed}",
        "none": None,
        "empty": (),
    }


def tensors(some):
    """All tensors of a tree, in order."""
    found = []
    map_tree(lambda leaf: found.append(leaf) or leaf, some)
    return found


def test_every_tensor_is_reached_once_and_containers_keep_their_kind():
    before = tree()
    doubled = map_tree(lambda leaf: 2 * leaf, before)
    assert len(tensors(before)) == 4
    for old, new in zip(tensors(before), tensors(doubled), strict=True):
        assert torch.equal(new, 2 * old)
    assert list(doubled) == list(before)
    assert isinstance(doubled["state"], tuple)
    assert isinstance(doubled["state"][1], list)
    assert isinstance(doubled["leaf"], Leaf)
    assert isinstance(doubled["leaf"].extra["inner"], Leaf)
    assert torch.equal(before["leaf"].pixels, tree()["leaf"].pixels)


def test_leaves_that_are_no_tensors_are_the_first_trees():
    joined = map_tree(lambda *leaves: sum(leaves), tree(0), tree(1), tree(2))
    assert joined["leaf"].extra["count"] == 7
    assert joined["name"] == "seed 0"
    assert joined["none"] is joined["state"][1][1] is joined["leaf"].extra["inner"].extra is None
    assert joined["empty"] == ()
    for found, *parts in zip(tensors(joined), *map(tensors, map(tree, range(3))), strict=True):
        assert torch.equal(found, sum(parts))


@pytest.mark.parametrize("leaf", [None, 3, "word", torch.nn.ReLU, torch.Size([2])])
def test_a_leaf_alone_is_left_as_it_is(leaf):
    assert map_tree(lambda tensor: 1 / 0, leaf) == leaf


def test_a_tensor_alone_is_a_tree():
    assert map_tree(lambda first, second: (first - second).item(), torch.tensor(5), torch.tensor(3)) == 2


def test_trees_of_another_shape_are_noticed():
    tensor = torch.zeros(1)
    for first, second, error in (
        ((tensor,), (tensor, tensor), ValueError),
        ((tensor, tensor), (tensor,), ValueError),
        ({"a": tensor, "b": tensor}, {"a": tensor}, ValueError),
        (Leaf(tensor), (tensor,), AttributeError),
        ({"a": tensor}, {"a": None}, TypeError),
    ):
        with pytest.raises(error):
            map_tree(torch.add, first, second)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concatenate_is_cat_of_every_tensor(dim):
    parts = [tree(seed) for seed in range(3)]
    for found, *pieces in zip(tensors(concatenate(parts, dim)), *map(tensors, parts), strict=True):
        assert torch.equal(found, torch.cat(pieces, dim))


def test_concatenate_one_tree_or_trees_of_several_lengths():
    for lengths in ([2], [1, 4, 2]):
        joined = concatenate([tree(time=length) for length in lengths], 1)
        assert all(leaf.shape[:2] == (3, sum(lengths)) for leaf in tensors(joined))


def test_decisions_are_joined_along_time_with_their_graph():
    logits = torch.randn(4, 3, 5, requires_grad=True)
    means = torch.randn(4, 3, 2, requires_grad=True)
    steps = [
        Decisions(
            {"class": Categorical(one), "place": Gaussian(mean, torch.full_like(mean, 0.1))}, extras={"scores": one}
        )
        for one, mean in zip(logits.split(1, 1), means.split(1, 1), strict=True)
    ]
    joined = concatenate(steps, 1)
    assert joined.values is None
    assert torch.equal(joined.extras["scores"], logits)
    assert torch.equal(joined.distribution["class"].logits, logits)
    joined.distribution["class"].entropy().sum().backward()
    joined.distribution["place"].log_prob(torch.zeros(4, 3, 2)).sum().backward()
    assert logits.grad.abs().sum() > 0
    assert torch.allclose(means.grad, -means / 0.1**2)


def test_trajectories_are_joined_along_the_batch():
    def trajectory(rows):
        step = torch.rand(rows, 3)
        flags = step > 0.5
        return Trajectory(
            {"glimpse": torch.rand(rows, 3, 8)},
            torch.rand(rows, 3, 2),
            step,
            step,
            flags,
            flags,
            flags,
            last_value=torch.rand(rows),
            group=torch.arange(rows),
            extras={"expert": step},
        )

    joined = concatenate([trajectory(2), trajectory(5)], 0)
    assert {len(leaf) for leaf in tensors(joined)} == {7}
    assert joined.values is None
    assert joined.group.tolist() == [0, 1, 0, 1, 2, 3, 4]
    on_meta = map_tree(lambda leaf: leaf.to("meta"), joined)
    assert all(leaf.device.type == "meta" for leaf in tensors(on_meta))


def test_shapes_of_a_trajectory_are_checked_in_tests():
    step = torch.rand(2, 3)
    with pytest.raises(Exception, match="rewards"):
        Trajectory({}, step, step, step[:, :2], step > 0, step > 0, step > 0)


@pytest.mark.parametrize("found", [0, -1, 0.5, float("nan")])
def test_numbers_that_are_too_small_are_named(found):
    check_least(Leaf(torch.zeros(1), 1), 1, "extra")
    check_least(Leaf(torch.zeros(1), None), 1, "extra")
    with pytest.raises(InputError, match=f"^extra: found {found:g}, expected at least 1$"):
        check_least(Leaf(torch.zeros(1), found), 1, "extra")


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)
