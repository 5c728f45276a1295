"""Every registered environment, and the one the docs teach, held against Gymnasium and against itself."""

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import foveate.envs
from foveate import noise
from foveate.data.classification import Images
from foveate.envs.box_search import BoxSearchEnv, SingleBoxSearchEnv
from foveate.envs.glimpse import FRAME, GlimpseEnv
from foveate.envs.tensor_env import TensorEnv
from foveate.types import InputError, map_tree

PAGE = Path(__file__).parents[1] / "docs" / "environments.md"
BLOCKS = [block.strip() for block in re.findall(r"^```python[^\n]*\n(.*?)^```", PAGE.read_text(), re.M | re.S)]
TAUGHT = {"__name__": "strip"}  # what the page's own environment defines
exec(compile(BLOCKS[-1], str(PAGE), "exec"), TAUGHT)

# Box search for each class in turn: the class is seen too.
EACH = {"entry_point": SingleBoxSearchEnv, "vector_entry_point": BoxSearchEnv, "kwargs": {"target": "each"}}
gymnasium.register("example/EachBoxSearch-v0", **EACH)

NAMES = [*foveate.envs.ENVIRONMENTS, "example/EachBoxSearch-v0", "example/Strip-v0"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}
every = pytest.mark.parametrize("name", NAMES)


def lockstep(name, copies, **options):
    return gymnasium.make_vec(name, num_envs=copies, **options).unwrapped


def actions_of(env, steps, seed=0):
    """Random actions [steps, copies, ...], the same for a copy whatever the number of copies."""
    spaces = [copy.deepcopy(env.single_action_space) for _ in range(env.num_envs)]
    for row, space in enumerate(spaces):
        space.seed(seed + row)
    return [np.stack([space.sample() for space in spaces]) for _ in range(steps)]


def leaves(tree):
    found = []

    def keep(leaf):
        found.append(leaf)
        return leaf

    map_tree(keep, as_tensors(tree))
    return found


def as_tensors(tree):
    if isinstance(tree, dict):
        return {name: as_tensors(leaf) for name, leaf in tree.items()}
    return torch.as_tensor(tree) if isinstance(tree, np.ndarray) else tree


def assert_same(one, other, rows=slice(None), exact=False):
    for left, right in zip(leaves(one), leaves(other), strict=True):
        tolerance = {"rtol": 0, "atol": 0 if exact else 1e-5}
        torch.testing.assert_close(left[rows].cpu().double(), right[rows].cpu().double(), **tolerance)


# ---- against Gymnasium ----


@every
def test_gymnasium_checks_the_single_form(name):
    env = gymnasium.make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Scores reach to 10: clipped at 1, as normalised actions are, the highest of them would often be a tie.
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env.unwrapped)


@every
def test_make_vec_gives_the_lockstep_form(name):
    env = gymnasium.make_vec(name, num_envs=3)
    assert isinstance(env.unwrapped, TensorEnv)
    assert env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, infos = env.reset(seed=0)
    assert all(isinstance(leaf, torch.Tensor) and len(leaf) == 3 for leaf in leaves(observation))
    assert infos == {}


@every
@pytest.mark.parametrize("mode", MODES)
def test_lockstep_is_what_gymnasium_makes_of_single_copies(name, mode):
    """Observations, rewards, ends and infos, over several episodes a copy."""
    options = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": MODES[mode]}}
    theirs = gymnasium.make_vec(name, num_envs=3, **options)
    ours = gymnasium.make_vec(name, num_envs=3, output="numpy", autoreset=mode)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=7)[0], theirs.reset(seed=7)[0])
    ends = 0
    for actions in actions_of(ours, max(40, 3 * (ours.unwrapped.horizon or 0) + 10)):
        got, expected = ours.step(actions), theirs.step(actions)
        assert_same(got[0], expected[0])
        for left, right in zip(got[1:4], expected[1:4], strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)
        assert not (got[2] & got[3]).any()
        assert got[4].keys() == expected[4].keys()
        if "final_obs" in expected[4]:
            for mine, other in zip(got[4]["final_obs"], expected[4]["final_obs"], strict=True):
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert mine in ours.single_observation_space
                    assert_same(mine, other)
            np.testing.assert_array_equal(got[4]["_final_obs"], expected[4]["_final_obs"])
            np.testing.assert_array_equal(got[4]["_final_info"], expected[4]["_final_info"])
        ended = got[2] | got[3]
        ends += ended.sum()
        if mode == "disabled" and ended.any():
            # a dict each: Gymnasium takes the mask out of the one it is given
            one, other = ours.reset(options={"reset_mask": ended}), theirs.reset(options={"reset_mask": ended})
            assert_same(one[0], other[0])
    assert ends > 6


@every
def test_a_list_of_seeds_is_what_gymnasium_makes_of_it(name):
    theirs = gymnasium.make_vec(name, num_envs=3, vectorization_mode="sync")
    ours = gymnasium.make_vec(name, num_envs=3, output="numpy")
    for seed in (5, None, [9, None, 11], None, [None, 4, None]):
        assert_same(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])


@every
def test_arrays_are_of_the_spaces_type_and_copies(name):
    env = lockstep(name, 4, output="numpy")
    observation, _ = env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert reward.dtype == np.float32
    assert terminated.dtype == truncated.dtype == np.bool_
    flat = gymnasium.spaces.flatten_space(env.single_observation_space)
    for leaf, box in zip(leaves(observation), leaves_of_space(env.observation_space), strict=True):
        assert leaf.numpy().dtype == box.dtype
    assert flat.shape
    before = map_tree(torch.clone, env.state)
    observation, *_ = env.step(env.action_space.sample())
    before = map_tree(torch.clone, env.state)
    for leaf in leaves(observation):
        leaf.numpy()[:] = 0
    assert_same(env.state, before, exact=True)


def leaves_of_space(space):
    return [one for part in space.values() for one in leaves_of_space(part)] if hasattr(space, "values") else [space]


@every
@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_gymnasium_records_episodes(name, mode):
    env = gymnasium.make_vec(name, num_envs=4, output="numpy", autoreset=mode)
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    lengths = []
    for _ in range(30):
        *_, infos = env.step(env.action_space.sample())
        if "episode" in infos:
            lengths += infos["episode"]["l"][infos["_episode"]].tolist()
    assert lengths
    horizon = env.unwrapped.horizon or env.unwrapped.glimpses
    assert all(1 <= length <= horizon for length in lengths)


# ---- against itself ----


@every
@pytest.mark.parametrize("device", DEVICES)
def test_ten_thousand_random_steps_stay_in_the_space(name, device):
    env = lockstep(name, 40, device=device, output="numpy")
    observation, _ = env.reset(seed=1)
    env.action_space.seed(1)
    ends = 0
    for _ in range(250):
        assert observation in env.observation_space  # which no NaN is
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isfinite(reward).all()
        assert not (terminated & truncated).any()
        ends += (terminated | truncated).sum()
    assert ends > 40


@every
def test_trajectories_do_not_depend_on_the_number_of_copies(name):
    few, many = lockstep(name, 2), lockstep(name, 5)
    first = slice(0, 2)
    one, other = few.reset(seed=3)[0], many.reset(seed=3)[0]
    for actions in actions_of(many, 30):
        assert_same(one, map_tree(lambda leaf: leaf[first], other))
        (one, *ours, _), (other, *theirs, _) = few.step(actions[first]), many.step(actions)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right[first])


@every
@pytest.mark.parametrize("mode", MODES)
def test_a_partial_reset_touches_the_copies_named_and_no_other(name, mode):
    disturbed, other = lockstep(name, 4, autoreset=mode), lockstep(name, 4, autoreset=mode)
    disturbed.reset(seed=3), other.reset(seed=3)
    mask = torch.tensor([False, True, False, True])
    steps = actions_of(other, 16)
    seen, over = None, torch.zeros(4, dtype=torch.bool)
    for step, actions in enumerate(steps):
        if step == 2:
            before = map_tree(torch.clone, disturbed.state)
            shown = map_tree(torch.clone, got[0])
            seen, _ = disturbed.reset(options={"reset_mask": mask.numpy()})
            assert_same(got[0], shown, exact=True)  # what was shown before may be the state's own tensor
            assert_same(disturbed.state, before, ~mask, exact=True)
            assert any((new[mask] != old[mask]).any() for new, old in zip(leaves(seen), leaves(last), strict=True))
        (last, _, terminated, truncated, _), got = other.step(actions), disturbed.step(actions)
        if step < 2:
            over |= terminated | truncated
        assert_same(got[0], last, slice(None) if step < 2 else ~mask)
    # what was reset in its first episode plays the second one of its seed
    assert (mask & ~over).any()
    second = lockstep(name, 4)
    second.reset(seed=3)
    assert_same(seen, second.reset()[0], mask & ~over)


@every
def test_a_mask_of_nobody_changes_nothing(name):
    env = lockstep(name, 2)
    observation, _ = env.reset(seed=0)
    assert_same(env.reset(options={"reset_mask": np.zeros(2, bool)})[0], observation, exact=True)


@every
def test_transition_and_observe_are_pure(name):
    env = lockstep(name, 6)
    env.reset(seed=5)
    keys = noise.key(0, torch.arange(6))
    for actions in actions_of(env, 8):
        actions = torch.as_tensor(actions)
        state, before, given = env.state, map_tree(torch.clone, env.state), actions.clone()
        once, again = env.transition(state, actions, keys), env.transition(state, actions, keys)
        assert_same(once, again, exact=True)
        assert_same(env.observe(state), env.observe(state), exact=True)
        assert_same(state, before, exact=True)
        assert torch.equal(actions, given)
        env.step(actions)


@every
def test_an_ended_copy_stands_still_until_it_is_reset(name):
    env = lockstep(name, 5, autoreset="disabled")
    env.reset(seed=2)
    ended = torch.zeros(5, dtype=torch.bool)
    observation = None
    for actions in actions_of(env, 48):
        before, seen = env.state, observation
        observation, reward, terminated, truncated, infos = env.step(actions)
        assert infos == {}
        assert_same(env.state, before, ended, exact=True)
        if seen is not None:
            assert_same(observation, seen, ended)
        assert not (reward[ended] != 0).any()
        assert not (terminated | truncated)[ended].any()
        ended |= terminated | truncated
    assert ended.all()
    env.reset(options={"reset_mask": ended})
    *_, terminated, truncated, _ = env.step(actions)
    assert not (terminated | truncated).all()


@every
def test_keys_and_ids_take_the_place_of_seed_and_episode(name):
    env, fresh = lockstep(name, 3), lockstep(name, 3)
    env.reset(seed=1)
    env.step(env.action_space.sample())
    options = {"keys": noise.key(8, torch.arange(3)), "ids": torch.tensor([2, 0, 1])}
    assert_same(env.reset(options=options)[0], fresh.reset(options=options)[0], exact=True)
    for actions in actions_of(env, 4):
        assert_same(env.step(actions)[:4], fresh.step(actions)[:4], exact=True)
    assert_same(env.state, fresh.state, exact=True)
    turned = {name: value.flip(0) for name, value in options.items()}
    reverse = lockstep(name, 3)
    flipped = map_tree(lambda leaf: leaf.flip(0), reverse.reset(options=turned)[0])
    assert_same(env.reset(options=options)[0], flipped)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every
def test_cuda_plays_what_the_cpu_plays(name):
    cpu, cuda = lockstep(name, 8), lockstep(name, 8, device="cuda")
    assert_same(cpu.reset(seed=0)[0], cuda.reset(seed=0)[0])
    for actions in actions_of(cpu, 20):
        assert_same(cpu.step(actions)[:4], cuda.step(actions)[:4])


# ---- ends ----


def strip(copies, **options):
    return lockstep("example/Strip-v0", copies, **options)


def test_the_task_ends_by_termination_and_the_limit_by_truncation():
    env = strip(4, horizon=3, autoreset="disabled")
    env.reset(seed=0)
    env._state = TAUGHT["Strip"](torch.eye(9)[[2, 3, 0, 8]], torch.tensor([0, 0, 8, 0]))
    right = torch.full((4,), 2)
    flags = [env.step(right)[2:4] for _ in range(4)]
    terminated, truncated = (torch.stack(found, 1).tolist() for found in zip(*flags, strict=True))
    # found at the second step; found at the very step of the limit, which counts as found; never found, twice
    assert terminated == [[False, True, False, False], [False, False, True, False], [False] * 4, [False] * 4]
    assert truncated == [[False] * 4, [False] * 4, [False, False, True, False], [False, False, True, False]]


def test_final_obs_of_tensors_is_a_batch():
    env = strip(3, horizon=2, autoreset="same_step")
    env.reset(seed=0)
    env._state = TAUGHT["Strip"](torch.eye(9)[[8, 8, 8]], torch.tensor([0, 1, 2]))
    stay = torch.ones(3, dtype=torch.int64)
    _, _, _, _, infos = env.step(stay)
    assert infos == {}
    observation, _, _, truncated, infos = env.step(stay)
    assert truncated.all()
    assert infos["_final_obs"].all()
    torch.testing.assert_close(infos["final_obs"], torch.tensor([[0, 0], [0, 1 / 8], [0, 2 / 8]]))
    assert not torch.equal(observation, infos["final_obs"])


class Draws(TensorEnv):
    """Shows the number that its last step drew."""

    def __init__(self, num_envs, **options):
        box = gymnasium.spaces.Box(0.0, 1.0, (1,))
        super().__init__(num_envs, box, gymnasium.spaces.Discrete(2), horizon=9, **options)

    def initial(self, ids, keys):
        return noise.uniform(keys, 1)

    def transition(self, state, actions, keys):
        return noise.uniform(keys, 1), torch.zeros(len(keys)), torch.zeros(len(keys), dtype=torch.bool)

    def observe(self, state):
        return state


def test_every_step_of_every_episode_and_copy_draws_anew():
    """From the seed alone: copy i of seed s is copy i - 1 of seed s + 1, through the autoreset."""

    def draws(seed):
        env = Draws(32)
        seen = [env.reset(seed=seed)[0]]
        return torch.cat(seen + [env.step(torch.zeros(32))[0] for _ in range(40)], 1)

    one = draws(0)
    assert len(one.unique()) > 0.999 * one.numel()
    assert torch.equal(one, draws(0))
    assert torch.equal(one[1:], draws(1)[:-1])


# ---- the glimpse environment ----


def small_images(size=6, side=8):
    pixels = noise.integers(noise.key(0, torch.arange(size)), 256, 1, side, side).byte()
    return Images(pixels, torch.arange(size) % 3, ("a", "b", "c"), "small", "all")


def test_glimpses_are_rewarded_for_the_right_class_at_the_end_only():
    env = GlimpseEnv(6, images=small_images(), glimpses=3, patch=4, autoreset="disabled")
    env.reset(seed=0, options={"ids": torch.arange(6)})
    assert torch.equal(env.state.labels, torch.arange(6) % 3)
    right = torch.nn.functional.one_hot(env.state.labels, 3).float()
    right[5] = 1 - right[5]
    actions = torch.cat((torch.full((6, 2), 3.0), right), 1)
    rewards = torch.stack([env.step(actions)[1] for _ in range(3)], 1)
    assert rewards.tolist() == [[0, 0, 1]] * 5 + [[0, 0, 0]]
    assert torch.equal(env.state.locations, torch.ones(6, 2))


def test_likelihood_is_the_softmax_at_the_right_class():
    env = GlimpseEnv(6, images=small_images(), glimpses=1, patch=4, reward="likelihood")
    env.reset(seed=0)
    scores = noise.normal(noise.key(1, torch.arange(6)), 3)
    entropy = torch.nn.functional.cross_entropy(scores, env.state.labels, reduction="none")
    reward = env.step(torch.cat((torch.zeros(6, 2), scores), 1))[1]
    torch.testing.assert_close(reward, torch.exp(-entropy))


def test_a_glimpse_from_the_centre_as_large_as_the_image_is_the_image():
    images = small_images()
    env = GlimpseEnv(6, images=images, patch=8, first="centre")
    observation, _ = env.reset(options={"ids": torch.arange(6)})
    torch.testing.assert_close(observation["what"], images.pixels / 255, rtol=0, atol=1e-6)


def test_the_picture_shows_what_each_scale_sees():
    options = {"images": small_images(side=20), "patch": 4, "scales": 2, "first": "centre", "render_mode": "rgb_array"}
    env = gymnasium.make("foveate/Glimpse-v0", **options)
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (20, 20, 3)
    assert picture.dtype == np.uint8
    squares = (picture == FRAME).all(-1)
    assert squares.sum() == 12 + 28
    assert squares[8:12, 8:12].sum() == 12
    assert squares[6:14, 6:14].sum() == 12 + 28
    assert len(GlimpseEnv(3, **options).reset(seed=0)) == 2
    vector = GlimpseEnv(3, **options)
    vector.reset(seed=0)
    assert [frame.shape for frame in vector.render()] == [(20, 20, 3)] * 3
    assert gymnasium.make("foveate/Glimpse-v0", images=small_images(), patch=4).unwrapped.render() is None


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"patch": 9}, "patch"),
        ({"patch": 0}, "patch"),
        ({"glimpses": 0}, "glimpses"),
        ({"scales": 0}, "scales"),
        ({"factor": 0}, "factor"),
        ({"variant": "clutter60"}, "variant"),
        ({"num_envs": 0}, "num_envs"),
        ({"horizon": 0}, "horizon"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_a_mistake_in_the_making_names_the_field(options, field):
    with pytest.raises(InputError, match=rf"^{field}: [^\n]+$"):
        GlimpseEnv(**{"images": small_images(), "patch": 4} | options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reset_masks": [True, False]}, "options"),
        ({"reset_mask": [True]}, "reset_mask"),
        ({"reset_mask": [0, 1]}, "reset_mask"),
        ({"ids": [0, 9]}, "ids"),
        ({"ids": [-1, 0]}, "ids"),
        ({"ids": [0.0, 1.0]}, "ids"),
        ({"keys": [1, 2, 3]}, "keys"),
    ],
)
def test_a_mistake_in_a_reset_names_the_option(options, field):
    env = strip(2)
    env.reset(seed=0)
    with pytest.raises(InputError, match=rf"^{field}: [^\n]+$"):
        env.reset(options=options)


def test_actions_and_seeds_are_one_for_each_copy_and_come_after_a_reset():
    env = strip(2)
    with pytest.raises(InputError, match=r"^step: .*reset"):
        env.step(torch.zeros(2))
    with pytest.raises(InputError, match=r"^reset_mask: .*reset all"):
        env.reset(options={"reset_mask": np.ones(2, bool)})
    with pytest.raises(InputError, match=r"^seed: found a list of 3, expected 2"):
        env.reset(seed=[1, 2, 3])
    env.reset()
    with pytest.raises(InputError, match=r"^actions: found \(3,\), expected \(2,\)"):
        env.step(torch.zeros(3))


# ---- strangers ----


@pytest.mark.parametrize("block", BLOCKS[:-1], ids=lambda block: block[-30:])
def test_the_examples_of_the_page_run(block):
    exec(compile(block, str(PAGE), "exec"), {})


def test_the_page_names_every_environment():
    for name in foveate.envs.ENVIRONMENTS:
        assert f"| `{name}` |" in PAGE.read_text()


STRANGER = """
import json
import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
import foveate.envs
from foveate.types import InputError

torch.set_num_threads(1)

def make():
    return gymnasium.make("foveate/Glimpse-v0", glimpses=1, patch=28, first="centre")

def score(act):
    env, total = make(), 0.0
    for episode in range(200):
        seen, _ = env.reset(seed=10_000 + episode)
        over = False
        while not over:
            seen, reward, terminated, truncated, _ = env.step(act(seen))
            total += reward
            over = terminated or truncated
    return total / 200

space = make().action_space
space.seed(0)
agent = PPO("MultiInputPolicy", DummyVecEnv([make] * 16), n_steps=32, batch_size=128, n_epochs=6,
            learning_rate=1e-3, seed=0, device="cpu")
agent.learn(2_048)

mistakes = {}
for field in ("first", "reward", "output", "autoreset"):
    try:
        gymnasium.make_vec("foveate/Glimpse-v0", **{field: "nonesuch"})
    except InputError as error:
        mistakes[field] = str(error)

print(json.dumps({"mistakes": mistakes, "random": score(lambda seen: space.sample()),
                  "ppo": score(lambda seen: agent.predict(seen, deterministic=True)[0])}))
"""


def test_stable_baselines_learns_on_the_single_form():
    """PPO reads digits from one wide glimpse, judged on fresh episodes.

    In a process of its own, without the checks of shapes and types: they are slow, and see a mistyped choice first.
    """
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", STRANGER], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["random"] < 0.2
    assert found["ppo"] > found["random"] + 0.25
    for field in ("first", "reward", "output", "autoreset"):
        assert re.fullmatch(rf"{field}: found 'nonesuch', expected one of .*", found["mistakes"][field])


AGENTS = ("BoxSearch", "BoxTracking", "LandmarkWalk", "Seeds", "Registration", "Cutting")
DQN = """
import gymnasium
from stable_baselines3 import DQN

import foveate.envs

for name in NAMES:
    env = gymnasium.make(f"foveate/{name}-v0")
    agent = DQN("MultiInputPolicy", env, learning_starts=8, batch_size=8, buffer_size=40, device="cpu", seed=0)
    before = next(agent.q_net.parameters()).clone()
    agent.learn(24)
    assert not (before == next(agent.q_net.parameters())).all(), name
"""


def test_a_learner_of_another_library_takes_every_agent_s_environment() -> None:
    told = DQN.replace("NAMES", repr(AGENTS))
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", told], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
