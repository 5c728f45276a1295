"""Denoising as decisions: the schedulers' own Gaussians, pieces that sum to the whole, an anchor that is exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DModel
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import foveate
from foveate import noise
from foveate.judging import CHAINS, Contest
from foveate.learn.answers import answering, decided, divergence, frozen, likelihood_loss, log_prob, reward_loss, score
from foveate.learn.baselines import MovingAverage, group_normalised, reward_weights
from foveate.learn.keeper import Keeper
from foveate.learn.settings import Tuning
from foveate.models.denoising import gaussian_steps
from foveate.models.diffusion import ClassDenoiser, small_unet
from foveate.models.low_rank import Unadapted, add_low_rank, take_start
from foveate.pictures.denoising import along
from foveate.run import Run
from foveate.two_steps import tune_on_reward
from foveate.types import InputError, RewardOutput

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
DDIM: list[dict[str, Any]] = [
    COSINE,
    {"clip_sample": False},
    {"prediction_type": "sample", "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5},
    {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    {"timestep_spacing": "linspace"},
]
DDPM: list[dict[str, Any]] = [
    COSINE,
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log", "clip_sample": False},
    {"prediction_type": "sample"},
]


def draws(*shape: int, name: str = "x") -> Tensor:
    return noise.normal(noise.key(0, name, torch.arange(shape[0])), *shape[1:])


@pytest.mark.parametrize(
    ("kind", "settings", "eta"),
    [(DDIMScheduler, settings, eta) for settings in DDIM for eta in (1.0, 0.4)]
    + [(DDPMScheduler, settings, 1.0) for settings in DDPM],
)
def test_steps_are_those_of_the_scheduler(kind: Any, settings: dict[str, Any], eta: float) -> None:
    """Mean and deviation of every step, from many draws of `scheduler.step` and from its noise taken out."""
    scheduler, count = kind(**settings), 7
    table = gaussian_steps(scheduler, count, eta)
    output, x = draws(count, 2, 4, 4, name="output"), 2 * draws(count, 2, 4, 4)
    means = table.mean(output[None], x[None], slice(None))[0]
    scheduler.set_timesteps(count)
    assert torch.equal(table.times, scheduler.timesteps)
    for step, time in enumerate(scheduler.timesteps):
        how = {"eta": eta} if kind is DDIMScheduler else {}
        again = [
            scheduler.step(output[step : step + 1], time, x[step : step + 1], generator=seeded(seed), **how).prev_sample
            for seed in (0, 1)
        ]
        one, two = (torch.randn(1, 2, 4, 4, generator=seeded(seed)) for seed in (0, 1))
        std = float(((again[0] - again[1]) / (one - two)).median())
        assert float(table.std[step]) == pytest.approx(std, rel=1e-3, abs=2e-5)
        torch.testing.assert_close(means[step], (again[0] - std * one)[0], rtol=1e-3, atol=5e-4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_certain_table_is_ddim_without_noise() -> None:
    scheduler = DDIMScheduler(**COSINE)
    table, output, x = gaussian_steps(scheduler, 5, 0.0), draws(1, 1, 4, 4, name="output"), draws(1, 1, 4, 4)
    assert not bool(table.std.any())
    scheduler.set_timesteps(5)
    for step, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, time, x, eta=0.0).prev_sample
        found = table.mean(output[:, None], x[:, None], slice(step, step + 1))[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def denoiser(steps: int = 5, chunk: int | None = 2, guidance: float = 1.0, kind: Any = DDIMScheduler) -> ClassDenoiser:
    torch.manual_seed(0)
    network = small_unet(8, 1, 3, (8, 16))
    return ClassDenoiser(network, kind(**COSINE), steps, (1, 8, 8), guidance=guidance, chunk=chunk)


LABELS, KEYS = torch.tensor([0, 2]), noise.key(5, torch.arange(2))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_log_probabilities_are_sums_over_pixels_of_the_step_that_was_drawn(kind: Any, guidance: float) -> None:
    policy = denoiser(guidance=guidance, kind=kind)
    chain = policy.sample(LABELS, 3, False, KEYS)
    assert chain.drawn.shape == (6, 5, 1, 8, 8)
    policy.requires_grad_(False)
    found = policy(LABELS, chain)
    labels, before = LABELS.repeat_interleave(3), chain.start
    for step in range(5):
        output = policy.network(before, policy.table.times[step], labels).sample
        free = policy.network(before, policy.table.times[step], torch.full_like(labels, 3)).sample
        output = free + guidance * (output - free)
        mean = policy.table.mean(output[:, None], before[:, None], slice(step, step + 1))[:, 0]
        std = policy.table.std[step]
        if std > 0:
            expected = Normal(mean, std).log_prob(chain.drawn[:, step]).flatten(1).sum(1)
            torch.testing.assert_close(found.log_probs[:, step].float(), expected, rtol=1e-3, atol=1e-2)
            assert found.mask[:, step].all()
            scaled = ((chain.drawn[:, step] - mean) / std).flatten()
            assert abs(float(scaled.mean())) < 5 / math.sqrt(len(scaled))
            assert 0.75 < float(scaled.std()) < 1.25
        else:
            assert not found.mask[:, step].any(), "a certain step is no decision"
            torch.testing.assert_close(chain.drawn[:, step], mean, rtol=1e-3, atol=1e-4)
        before = chain.drawn[:, step]
    assert policy.table.std[-1] == 0
    assert found.mask.sum(1).tolist() == [4] * 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_scored_is_what_was_drawn(precision: Any, guidance: float, clip_sample: bool, training: bool) -> None:
    """Around the mean of the scoring pass lies the noise of the key, whatever the network is like in between."""
    torch.manual_seed(0)
    network = small_unet(8, 1, 3, (8, 16))
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    scheduler = DDIMScheduler(**COSINE, clip_sample=clip_sample)
    policy = ClassDenoiser(network, scheduler, 5, (1, 8, 8), guidance=guidance, chunk=2).train(training)
    assert any(isinstance(module, torch.nn.Dropout) for module in network.modules())
    with torch.no_grad(), answering(policy, precision):
        chain = policy.sample(LABELS, 3, False, KEYS)
    streams = noise.fold(KEYS[:, None], "sample", torch.arange(3)).flatten()
    with answering(policy, precision):
        for steps in policy.pieces(chain):
            found = policy(LABELS, chain, steps)
            for place, step in enumerate(range(steps.start, steps.stop)):
                distribution = found.distribution
                drawn = chain.drawn[:, step].flatten(1)
                around = (drawn - distribution.mean[:, place]) / distribution.std[:, place]
                expected = noise.normal(noise.fold(streams, "step", step), 1, 8, 8).flatten(1)
                torch.testing.assert_close(around, expected, rtol=0, atol=1e-3)
    assert policy.training == training


def test_draws_depend_on_keys_alone() -> None:
    policy = denoiser()
    whole, alone = policy.sample(LABELS, 3, False, KEYS), policy.sample(LABELS[1:], 3, False, KEYS[1:])
    torch.testing.assert_close(whole.drawn[3:], alone.drawn, rtol=1e-3, atol=1e-4)
    assert not torch.equal(whole.drawn[3], whole.drawn[4])
    greedy = [policy.sample(LABELS, 1, True, KEYS) for _ in range(2)]
    assert torch.equal(greedy[0].drawn, greedy[1].drawn)
    images = policy.decode(whole)
    assert images.shape == (6, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ratio_is_exactly_one_before_the_first_update(precision: Any) -> None:
    policy = denoiser()
    tuning = Tuning(samples=2, precision=precision)
    scored = score(policy, brightness, LABELS, LABELS, KEYS, tuning, MovingAverage())
    for steps in policy.pieces(scored.actions):
        with answering(policy, precision):
            first, again = (policy(LABELS, scored.actions, steps).log_probs for _ in range(2))
        assert torch.equal(first, again)
        _, told = reward_loss(policy(LABELS, scored.actions, steps), scored.at(steps), None, tuning)
        assert float(told["ratio"]) == 1.0


def brightness(images: Tensor, targets: Tensor) -> RewardOutput:
    return RewardOutput(images.flatten(1).mean(1))


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_pieces_sum_to_the_whole_and_only_a_piece_is_in_memory(chunk: int | None) -> None:
    policy, tuning = denoiser(chunk=chunk), Tuning(samples=2, anchor=0.3)
    reference = frozen(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    scored = score(policy, brightness, LABELS, LABELS, KEYS, tuning, MovingAverage())
    rows: list[int] = []
    policy.network.register_forward_hook(lambda module, given, made: rows.append(len(given[0])))

    def gradient(pieces: list[slice]) -> Tensor:
        policy.zero_grad()
        for steps in pieces:
            anchor = reference(LABELS, scored.actions, steps).distribution
            loss, _ = reward_loss(policy(LABELS, scored.actions, steps), scored.at(steps), anchor, tuning)
            loss.backward()
        return torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])

    whole = gradient([slice(None)])
    assert whole.isfinite().all(), "the certain step gives no NaN"
    rows.clear()
    parts = gradient(policy.pieces(scored.actions))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert max(rows) == 4 * (chunk or 4)
    assert sum(rows) == 4 * 4, "the certain step costs nothing"


def test_the_anchor_is_the_exact_divergence_in_the_units_of_the_log_probability() -> None:
    policy = denoiser()
    reference = frozen(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
        chain = policy.sample(LABELS, 2, False, KEYS)
        mine, theirs = (model(LABELS, chain).distribution for model in (policy, reference))
    stds = policy.table.std[:4, None]
    expected = kl_divergence(Normal(mine.mean[:, :4], stds), Normal(theirs.mean[:, :4], stds)).sum(2)
    assert expected.min() > 0
    torch.testing.assert_close(mine.kl(theirs)[:, :4], expected, rtol=1e-3, atol=1e-4)
    far = divergence(policy, reference, LABELS, chain)
    torch.testing.assert_close(far, expected.sum(1), rtol=1e-3, atol=1e-3)
    # and the mean of the log-ratio over chains of the policy is the divergence of whole chains
    many = policy.sample(LABELS[:1], 400, False, KEYS[:1])
    with torch.no_grad():
        ratio = log_prob(policy, LABELS[:1], many) - log_prob(reference, LABELS[:1], many)
    error = float(ratio.std()) / 20
    assert float(ratio.mean()) == pytest.approx(
        float(divergence(policy, reference, LABELS[:1], many).mean()), abs=4 * error
    )


def test_a_look_tells_the_divergence_of_a_few_chains() -> None:
    start, policy = denoiser(), denoiser()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    kinds, keys = torch.arange(CHAINS + 4) % 3, noise.key(1, torch.arange(CHAINS + 4))
    for at_once in (100, 3):
        policy.at_once = start.at_once = at_once
        contest = Contest(brightness, None, start, kinds, keys)
        found = contest.look(policy, 0.4)
        chain = policy.sample(kinds[:CHAINS], 1, False, keys[:CHAINS])
        expected = divergence(policy, start, kinds[:CHAINS], chain).mean()
        assert expected > 0
        torch.testing.assert_close(found["held_out_kl"], expected, rtol=1e-3, atol=1e-4)
        assert contest.look(start, 0.4)["held_out_kl"] == 0
        assert contest.model(policy, CHAINS)["kl"] == pytest.approx(float(expected), rel=1e-3)


def test_curves_of_a_log_are_told_apart_by_anchor(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"phase": "likelihood", "held_out_likelihood": -1.0},
        {"phase": "reward", "held_out_reward": 1.0, "held_out_distance": 2.0, "held_out_accuracy": 0.9},
        {"phase": "reward, anchor 0", "held_out_reward": 3.0, "held_out_distance": 4.0, "held_out_kl": 5.0},
        {"phase": "reward", "reward": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"phase": "rew')
    assert along(tmp_path, 0.3) == {
        "frechet distance against reward": {"anchor 0.3 (kept)": [(1.0, 2.0)], "anchor 0": [(3.0, 4.0)]},
        "judge accuracy against reward": {"anchor 0.3 (kept)": [(1.0, 0.9)]},
        "frechet distance against kl": {"anchor 0": [(5.0, 4.0)]},
    }
    assert along(tmp_path / "nowhere", 0.3) == {}


def test_an_adapter_that_is_off_is_the_start() -> None:
    start, policy = denoiser(), denoiser()
    with torch.no_grad():
        for weight in start.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    add_low_rank(policy.network, 2, ("to_q", "to_k", "to_v", "conv1"))
    take_start(policy, start)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    assert 0 < sum(weight.numel() for weight in learning) < 0.2 * sum(weight.numel() for weight in start.parameters())
    chain = start.sample(LABELS, 2, False, KEYS)
    with torch.no_grad():
        expected = start(LABELS, chain).log_probs
        torch.testing.assert_close(policy(LABELS, chain).log_probs, expected, rtol=1e-5, atol=1e-4)
        for weight in learning:
            weight.add_(0.1 * torch.randn_like(weight))
    anchor, copied = Unadapted(policy), denoiser()
    add_low_rank(copied.network, 2, ("to_q", "to_k", "to_v", "conv1"))
    copied.load_state_dict(anchor.state_dict())
    with torch.no_grad():
        assert not torch.allclose(policy(LABELS, chain).log_probs, expected)
        torch.testing.assert_close(anchor(LABELS, chain).log_probs, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(copied(LABELS, chain).log_probs, expected, rtol=1e-5, atol=1e-4)
        copied.load_state_dict(start.state_dict())
        torch.testing.assert_close(copied(LABELS, chain).log_probs, expected, rtol=1e-5, atol=1e-4)
    assert all(weight.requires_grad for weight in learning), "asking the start leaves what learns"
    assert list(anchor.children()) == []


def test_a_light_copy_shares_what_does_not_learn() -> None:
    policy = denoiser()
    add_low_rank(policy.network, 2)
    policy.light = True
    best = Keeper(policy).best
    own = {weight.data_ptr() for weight in policy.parameters()}
    shared = [name for name, weight in best.named_parameters() if weight.data_ptr() in own]
    assert not any("lora_" in name for name in shared)
    assert len(shared) == sum(not weight.requires_grad for weight in policy.parameters())
    assert all("lora_" in name for name in policy.state_dict())
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    best.load_state_dict(policy.state_dict())
    for name, weight in best.state_dict().items():
        assert torch.equal(weight, policy.state_dict()[name])


def test_the_denoising_loss_is_that_of_the_scheduler() -> None:
    for settings in (COSINE, {**COSINE, "prediction_type": "epsilon"}, {**COSINE, "prediction_type": "sample"}):
        torch.manual_seed(0)
        scheduler = DDPMScheduler(**settings)
        policy = ClassDenoiser(small_unet(8, 1, 3, (8, 16)), scheduler, 5, (1, 8, 8))
        images = noise.uniform(noise.key(0, torch.arange(4)), 1, 8, 8)
        given = policy.noised(images, noise.key(1, torch.arange(4)), torch.tensor([1.0, 2.0, 0.0, 1.0]))
        pixels = 2 * images - 1
        x = scheduler.add_noise(pixels, given.noise, given.times)
        labels = torch.tensor([0, 0, 1, 1])
        output = policy.network(x, given.times, labels).sample
        wanted = {"epsilon": given.noise, "sample": pixels}.get(scheduler.config.prediction_type)
        wanted = scheduler.get_velocity(pixels, given.noise, given.times) if wanted is None else wanted
        errors = (output - wanted).square().flatten(1).mean(1)
        expected = (errors * torch.tensor([1.0, 2.0, 0.0, 1.0])).mean()
        torch.testing.assert_close(likelihood_loss(policy(torch.tensor([0, 1]), given)), expected)


def test_the_ratio_of_a_later_epoch_is_to_what_drew_the_answers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped, of half of the steps, two inputs to a backward pass: all that is compared is as before the update."""
    policy, labels = denoiser(steps=9, chunk=2), torch.tensor([0, 2, 1])
    reference = frozen(policy)
    seen: list[tuple[slice, Any, Tensor, dict[str, Tensor]]] = []
    forward, steps_of = policy.forward, []

    def noted(inputs: Any, actions: Any, steps: slice = slice(None)) -> Any:
        steps_of.append((inputs, steps))
        return forward(inputs, actions, steps)

    def compared(decisions: Any, scored: Any, *others: Any) -> Any:
        inputs, steps = steps_of[-1]
        loss, told = reward_loss(decisions, scored, *others)
        with torch.no_grad():
            before = reference(inputs, scored.actions, steps).log_probs
        seen.append((steps, scored.behaviour, before, told))
        return loss, told

    policy.forward = noted  # type: ignore[method-assign]
    monkeypatch.setattr("foveate.two_steps.reward_loss", compared)
    run = Run(tmp_path / "run", system="test", config={}, steps=1, device="cpu", quiet=True)
    tuning = Tuning(samples=2, epochs=2, clip=0.2, subset=0.5, chunk=2, learning_rate=1e-3, warmup=1)
    optimizer = torch.optim.Adam(policy.parameters())
    run.track(policy=policy, optimizer=optimizer)
    batches = lambda step: (labels, labels)  # noqa: E731
    tune_on_reward(run, "reward", 1.0, policy, brightness, batches, tuning, optimizer, MovingAverage(), reference)
    assert len(seen) == 8
    first, second = seen[:4], seen[4:]  # two pieces of four, of two chunks
    assert len({steps.start for steps, *_ in first}) == 2
    assert [steps for steps, *_ in first] == [steps for steps, *_ in second]
    assert all(behaviour is None and float(told["ratio"]) == 1 for _, behaviour, _, told in first)
    for _, behaviour, before, told in second:
        torch.testing.assert_close(behaviour, before, rtol=1e-6, atol=1e-4)
        assert float(told["ratio"]) != 1


def test_a_subset_of_the_steps_has_the_expectation_of_all(tmp_path: Any) -> None:
    """Every subset of one piece of two once: the mean of the updates is that of all pieces."""
    steps: dict[str, list[Tensor]] = {"all": [], "some": []}
    for name, subset, seeds in (("all", 1.0, (0,)), ("some", 0.5, range(6))):
        for seed in seeds:
            policy = denoiser()
            reference = frozen(policy)
            optimizer = torch.optim.SGD(policy.parameters(), 1.0)
            run = Run(
                tmp_path / f"{name}{seed}", system="test", config={}, seed=seed, steps=1, device="cpu", quiet=True
            )
            tuning = Tuning(samples=2, learning_rate=1.0, warmup=1, subset=subset)
            fixed = policy.sample(LABELS, 2, False, KEYS)
            policy.sample = lambda *_, fixed=fixed: fixed  # type: ignore[method-assign]
            run.track(policy=policy)
            batches = lambda step: (LABELS, LABELS)  # noqa: E731
            tune_on_reward(
                run, "reward", 1.0, policy, brightness, batches, tuning, optimizer, MovingAverage(), reference
            )
            before = torch.cat([weight.flatten() for weight in reference.parameters()])
            steps[name].append(torch.cat([weight.detach().flatten() for weight in policy.parameters()]) - before)
    kinds = torch.stack(steps["some"]).round(decimals=7).unique(dim=0)
    assert len(kinds) == 2
    torch.testing.assert_close(kinds.mean(0), steps["all"][0], rtol=1e-2, atol=1e-5)


def test_weights_of_rewards_are_positive_and_normalised_advantages_are_of_no_unit() -> None:
    scores, group = noise.uniform(noise.key(0, torch.arange(8))), torch.arange(2).repeat_interleave(4)
    weights = reward_weights(scores, group, 0.5)
    assert (weights > 0).all()
    assert float(weights.mean()) == pytest.approx(1)
    assert torch.equal(weights[:4].argsort(), scores[:4].argsort())
    policy = denoiser()
    tuning = Tuning(samples=4, baseline="normalised")
    one = score(policy, brightness, LABELS, LABELS, KEYS, tuning, MovingAverage())
    large = lambda images, targets: RewardOutput(100 * brightness(images, targets).total + 7)  # noqa: E731
    other = score(policy, large, LABELS, LABELS, KEYS, tuning, MovingAverage())
    torch.testing.assert_close(one.advantages, group_normalised(one.output.total, group))
    torch.testing.assert_close(one.advantages, other.advantages, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match=r"^samples: found 1, but normalised"):
        Tuning(samples=1, baseline="normalised")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassDenoiser(small_unet(8, 1, 3, (8,)), DDIMScheduler(), 5, (1, 8, 8), eta=0.0), r"^eta: found 0"),
        (lambda: ClassDenoiser(small_unet(8, 1, 3, (8,)), PNDMScheduler(), 5, (1, 8, 8)), r"^scheduler: found PNDM"),
        (lambda: gaussian_steps(DDPMScheduler(variance_type="learned"), 5), r"^scheduler: its variance is 'learned'"),
        (lambda: gaussian_steps(DDIMScheduler(), 2000), r"^denoising: found 2000 steps, expected 1 to 1000"),
        (lambda: denoiser(chunk=0), r"^piece: found 0"),
        (lambda: denoiser(steps=1), r"^denoising: 1 steps of which none is random"),
        (lambda: small_unet(9, 1, 3), r"^image_size, widths: 9 pixels"),
        (
            lambda: ClassDenoiser(small_unet(8, 1, None, (8,)), DDIMScheduler(), 5, (1, 8, 8), guidance=2.0),
            r"^guidance: found 2, but the network is told no class",
        ),
        (lambda: add_low_rank(denoiser().network, 0), r"^lora: found rank 0"),
        (lambda: add_low_rank(denoiser().network, 1, ("nowhere",)), r"^lora: the network has no layer named nowhere"),
    ],
)
def test_what_decides_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_network_of_diffusers_that_is_told_nothing_is_a_sampler_too() -> None:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    policy = ClassDenoiser(network, DDPMScheduler(), 4, (3, 8, 8), chunk=1)
    chain = policy.sample(LABELS, 2, False, KEYS)
    logs = torch.cat([some.log_probs for some in decided(policy, LABELS, chain)], 1)
    assert logs.shape == (4, 3)
    assert logs.isfinite().all()


def test_it_learns_to_draw_what_is_asked(tmp_path: Any) -> None:
    """A denoiser that knows nothing is tuned to draw dark images for one class and bright ones for another."""
    policy = denoiser(steps=4, chunk=3)
    reference = frozen(policy)
    signs = torch.tensor([-1.0, 0.0, 1.0])

    def reward(images: Tensor, targets: Tensor) -> RewardOutput:
        return RewardOutput(signs[targets] * images.flatten(1).mean(1))

    run = Run(tmp_path / "run", system="test", config={}, steps=40, device="cpu", quiet=True)
    tuning = Tuning(samples=8, baseline="normalised", learning_rate=1e-2, warmup=1)
    optimizer = torch.optim.Adam(policy.parameters())
    run.track(policy=policy, optimizer=optimizer)
    batches = lambda step: (LABELS, LABELS)  # noqa: E731

    def worth(model: ClassDenoiser) -> float:
        chain = model.sample(LABELS, 50, False, noise.key(9, torch.arange(2)))
        return float(reward(model.decode(chain), LABELS.repeat_interleave(50)).total.mean())

    before = worth(policy)
    tune_on_reward(run, "reward", 1.0, policy, reward, batches, tuning, optimizer, MovingAverage(), reference)
    assert worth(policy) > before + 0.08, "two standard deviations of an image's brightness"


def test_one_call_tunes_a_denoiser(tmp_path: Any) -> None:
    policy, held_out = denoiser(), [(LABELS, LABELS)]
    batches = lambda step: (LABELS, LABELS)  # noqa: E731
    how = {"steps": 2, "held_out": held_out, "samples": 2, "anchor": 0.1, "device": "cpu", "every": 1}
    found = foveate.tune(policy, brightness, batches, out=tmp_path / "run", **how)
    assert found is policy
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The reward of drawn answers w" in page
