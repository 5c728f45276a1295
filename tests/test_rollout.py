"""What a rollout writes down is what happened, whatever the batch, and whenever a row ends."""

from dataclasses import dataclass, replace

import gymnasium
import pytest
import torch
from torch import nn

from foveate import noise
from foveate.data.classification import Images
from foveate.distributions import Categorical
from foveate.envs.foveating_grid import FoveatingGridEnv
from foveate.envs.glimpse import GlimpseEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.learn.rollout import rollout
from foveate.models.glimpse import GlimpsePolicy
from foveate.types import Decisions, InputError, map_tree


@dataclass(frozen=True)
class Walk:
    place: torch.Tensor


class WalkEnv(TensorEnv):
    """A noisy walk from the middle of a line: it ends at either wall; the reward is the place reached."""

    def __init__(self, num_envs=1, *, wall=3, **options):
        self.wall, self.looks = wall, 0
        box = gymnasium.spaces.Box(-wall - 2, wall + 2, (1,))
        super().__init__(num_envs, box, gymnasium.spaces.Discrete(2), autoreset="disabled", **options)

    def initial(self, ids, keys):
        return Walk(noise.uniform(keys, 1) - 0.5)

    def transition(self, state, actions, keys):
        place = state.place + actions[:, None] * 2 - 1 + 0.5 * noise.normal(keys, 1)
        place = place.clamp(-self.wall - 2, self.wall + 2)
        return Walk(place), place[:, 0], place[:, 0].abs() > self.wall

    def observe(self, state):
        self.looks += 1
        return state.place


class Walker(nn.Module):
    """Remembers everything: its critic's value is a recurrent function of all that was seen."""

    def __init__(self, critic=True):
        super().__init__()
        torch.manual_seed(1)
        self.core = nn.GRU(1, 5, batch_first=True)
        self.act, self.value = nn.Linear(5, 2), nn.Linear(5, 1)
        self.critic = critic

    def forward(self, observations, state, starts):
        assert starts[:, 0].all() == (state is None)
        memory, state = self.core(observations, None if state is None else state.transpose(0, 1).contiguous())
        values = self.value(memory).squeeze(-1) if self.critic else None
        return Decisions(Categorical(self.act(memory) * 3), values), state.transpose(0, 1)


def keys_of(rows, seed=0):
    return noise.key(seed, "rollout", torch.arange(rows))


def glimpses(copies, **options):
    pixels = noise.integers(noise.key(0, torch.arange(12)), 256, 1, 10, 10).byte()
    images = Images(pixels, torch.arange(12) % 3, ("a", "b", "c"), "small", "all")
    return GlimpseEnv(copies, images=images, glimpses=4, patch=5, autoreset="disabled", **options)


def grids(copies):
    return FoveatingGridEnv(copies, glimpses=None, autoreset="disabled")


def eye(what, where, classes):
    torch.manual_seed(1)
    return GlimpsePolicy(what, where[0], classes, hidden=16)


def glimpse_policy():
    return eye((1, 5, 5), (2,), 3)


def assert_same(one, other, rows=slice(None)):
    """Equal to tolerance, tensor by tensor."""

    def compare(left, right):
        torch.testing.assert_close(left, right[rows], rtol=1e-5, atol=1e-5)
        return left

    map_tree(compare, one, other)


@pytest.fixture(params=["walk", "limited walk", "glimpse", "grid"])
def setting(request):
    """An environment by its number of copies, and a policy for it: ends by the task, by a limit or both."""
    if request.param == "glimpse":
        return glimpses, glimpse_policy()
    if request.param == "grid":  # every copy draws its own number of glimpses
        return grids, eye(*(part.shape for part in grids(1).single_observation_space.values()), 4)
    return (lambda copies: WalkEnv(copies, horizon=6 if request.param == "limited walk" else None)), Walker()


def test_rows_follow_from_their_keys_alone(setting):
    make, policy = setting
    whole, _ = rollout(make(12), policy, keys_of(12))
    assert_same(rollout(make(12), policy, keys_of(12))[0], whole)
    other, _ = rollout(make(12), policy, keys_of(12, seed=1))
    assert not torch.equal(other.log_probs[:, 0], whole.log_probs[:, 0])
    part, _ = rollout(make(5), policy, keys_of(12)[4:9])
    steps = part.mask.shape[1]
    cut = map_tree(lambda leaf: leaf[:, :steps] if leaf.dim() > 1 else leaf, whole)
    assert not whole.mask[4:9, steps:].any()
    # where a row has ended, how it is padded does not matter
    assert_same(part.mask, cut.mask, slice(4, 9))
    for name in ("log_probs", "rewards", "values"):
        assert_same(getattr(part, name) * part.mask, getattr(cut, name) * cut.mask, slice(4, 9))
    for name in ("terminated", "truncated", "last_value"):
        assert_same(getattr(part, name), getattr(cut, name), slice(4, 9))


def test_every_step_draws_anew():
    blind = GlimpsePolicy((1, 5, 5), 2, 3, hidden=16, looking="random")
    actions = rollout(glimpses(6), blind, keys_of(6))[0].actions[..., :2]
    assert len(actions.unique()) == actions.numel()


def test_draws_of_long_episodes_follow_from_the_step():
    """Beyond the steps whose keys are made together, too."""
    env, policy, keys = WalkEnv(4, wall=100, horizon=40), Walker(), keys_of(4)
    trajectory, decisions = rollout(env, policy, keys, grad=True)
    draws = torch.stack([noise.fold(keys, "action", step) for step in range(40)], 1)
    assert torch.equal(trajectory.actions, decisions.distribution.sample(draws))


def test_the_mask_ends_with_the_episode_and_padding_is_empty(setting):
    make, policy = setting
    trajectory, _ = rollout(make(32), policy, keys_of(32))
    lengths, ends = trajectory.mask.sum(1), trajectory.terminated | trajectory.truncated
    assert torch.equal(trajectory.mask, torch.arange(trajectory.mask.shape[1]) < lengths[:, None])
    assert torch.equal(ends.sum(1), torch.ones(32, dtype=torch.int64))
    assert torch.equal(ends.long().argmax(1) + 1, lengths)
    assert not (trajectory.terminated & trajectory.truncated).any()
    assert not trajectory.rewards[~trajectory.mask].any()
    assert trajectory.mask[:, -1].any()
    assert not trajectory.log_probs.requires_grad
    assert trajectory.values is not None
    assert not trajectory.values.requires_grad


def test_walks_end_at_different_steps_both_ways():
    """Else the tests above would prove little."""
    trajectory, _ = rollout(WalkEnv(32, horizon=6), Walker(), keys_of(32))
    assert trajectory.terminated.any()
    assert trajectory.truncated.any()
    assert len(trajectory.mask.sum(1).unique()) > 2


def test_what_is_written_is_what_the_environment_does(setting):
    make, policy = setting
    trajectory, _ = rollout(make(16), policy, keys_of(16))
    env = make(16)
    observation, _ = env.reset(options={"keys": keys_of(16)})
    for step in range(trajectory.mask.shape[1]):
        mask = trajectory.mask[:, step]
        assert_same(map_tree(lambda leaf: leaf[:, step], trajectory.observations), observation)  # noqa: B023
        observation, reward, terminated, truncated, _ = env.step(trajectory.actions[:, step])
        assert_same(trajectory.rewards[:, step], reward * mask)
        assert torch.equal(trajectory.terminated[:, step], terminated)
        assert torch.equal(trajectory.truncated[:, step], truncated)


def test_log_probs_are_the_decisions_own_and_those_of_one_parallel_pass(setting):
    make, policy = setting
    trajectory, decisions = rollout(make(16), policy, keys_of(16), grad=True)
    assert decisions is not None
    own = decisions.distribution.log_prob(trajectory.actions)
    assert torch.equal(own.detach(), trajectory.log_probs)
    assert torch.equal(decisions.values.detach(), trajectory.values)
    starts = torch.zeros_like(trajectory.mask)
    starts[:, 0] = True
    again, _ = policy(trajectory.observations, None, starts)
    torch.testing.assert_close(again.distribution.log_prob(trajectory.actions), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.values, decisions.values, rtol=0, atol=1e-5)

    def gradient(log_probs):
        policy.zero_grad()
        (log_probs * trajectory.mask).sum().backward()
        return [one.grad.clone() for one in policy.parameters() if one.grad is not None]

    one, other = gradient(own), gradient(again.distribution.log_prob(trajectory.actions))
    assert any(bool(grad.any()) for grad in one)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_decisions_cover_every_step_and_only_they_carry_the_graph(setting):
    make, policy = setting
    trajectory, decisions = rollout(make(8), policy, keys_of(8), grad=True)
    per_step = decisions.distribution.log_prob(trajectory.actions)
    assert per_step.shape == trajectory.mask.shape
    assert per_step.requires_grad
    for step in range(per_step.shape[1]):
        (grad,) = torch.autograd.grad(per_step[:, step].sum(), next(iter(outputs_of(policy))), retain_graph=True)
        assert grad.any()
    without, nothing = rollout(make(8), policy, keys_of(8))
    assert nothing is None
    assert_same(without, trajectory)
    assert not any(leaf.requires_grad for leaf in (trajectory.log_probs, trajectory.actions, trajectory.last_value))


def outputs_of(policy):
    return (policy.act if isinstance(policy, Walker) else policy.locate[2]).parameters()


def test_greedy_takes_the_mode_and_forgets_the_keys():
    env, policy = glimpses(6, first="centre"), glimpse_policy()
    ids = torch.arange(6)
    trajectory, decisions = rollout(env, policy, keys_of(6), ids=ids, greedy=True, grad=True)
    assert torch.equal(trajectory.actions, decisions.distribution.mode())
    other, _ = rollout(env, policy, keys_of(6, seed=1), ids=ids, greedy=True)
    assert_same(other, trajectory)
    drawn, _ = rollout(env, policy, keys_of(6), ids=ids)
    assert not torch.equal(drawn.actions, trajectory.actions)


def test_ids_choose_the_examples_and_groups_are_handed_on():
    env, ids = glimpses(6), torch.tensor([7, 7, 7, 2, 2, 2])
    trajectory, _ = rollout(env, glimpse_policy(), keys_of(6), ids=ids, group=ids)
    assert torch.equal(env.state.labels, ids % 3)
    assert torch.equal(trajectory.group, ids)
    assert len(trajectory.observations["where"][:3, 0].unique(dim=0)) == 3


def test_last_value_is_the_critics_of_what_a_limit_left_unfinished():
    """Row by row, by hand: the whole of the row's own observations, the final one too, through the critic at once."""
    policy, keys = Walker(), keys_of(32)
    trajectory, _ = rollout(WalkEnv(32, horizon=6), policy, keys)
    cut, checked = trajectory.truncated.any(1), 0
    for row in range(32):
        length = int(trajectory.mask[row].sum())
        if not cut[row]:
            assert trajectory.last_value[row] == 0
            continue
        env = WalkEnv(1, horizon=6)
        seen = [env.reset(options={"keys": keys[row, None]})[0]]
        seen += [env.step(trajectory.actions[row, None, step])[0] for step in range(length)]
        starts = torch.tensor([[True] + [False] * length])
        values = policy(torch.stack(seen, 1), None, starts)[0].values
        torch.testing.assert_close(trajectory.last_value[row], values[0, -1].detach(), rtol=0, atol=1e-5)
        checked += 1
    assert 0 < checked < 32


def test_last_value_of_rows_cut_before_the_others():
    """A limit that differs by row: rows wait, and their value is the one of their own end."""

    class Uneven(WalkEnv):
        def advance(self, actions):
            reward, terminated, truncated, infos = super().advance(actions)
            early = (self._steps == 2 + torch.arange(self.num_envs) % 3) & ~terminated
            self._ended = self._ended | early
            return reward, terminated, truncated | early, infos

    policy = Walker()
    trajectory, _ = rollout(Uneven(9, wall=50), policy, keys_of(9))
    lengths = trajectory.mask.sum(1)
    assert lengths.tolist() == [2, 3, 4] * 3
    for length in (2, 3, 4):
        rows = lengths == length
        short, _ = rollout(WalkEnv(int(rows.sum()), wall=50, horizon=length), policy, keys_of(9)[rows])
        torch.testing.assert_close(trajectory.last_value[rows], short.last_value, rtol=0, atol=1e-5)


def test_nothing_is_bootstrapped_where_all_terminate_and_without_a_critic():
    trajectory, _ = rollout(WalkEnv(8), Walker(), keys_of(8))
    assert not trajectory.last_value.any()
    blind, _ = rollout(WalkEnv(8, horizon=2), Walker(critic=False), keys_of(8))
    assert blind.values is None
    assert blind.last_value is None
    seeing, _ = rollout(WalkEnv(8, horizon=2), Walker(), keys_of(8))
    assert_same(blind, replace(seeing, values=None, last_value=None))


def test_nobody_looks_after_the_end_of_the_task():
    env = WalkEnv(8)
    trajectory, _ = rollout(env, Walker(), keys_of(8))
    assert env.looks == trajectory.mask.shape[1]


@pytest.mark.parametrize("options", [{"autoreset": "next_step"}, {"autoreset": "same_step"}, {"output": "numpy"}])
def test_an_environment_that_resets_itself_is_refused(options):
    env = FoveatingGridEnv(2, **{"autoreset": "disabled"} | options)
    with pytest.raises(InputError, match=r"^env: found .* make it with autoreset='disabled'"):
        rollout(env, Walker(), keys_of(2))
