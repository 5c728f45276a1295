"""A training step of the recurrent attention model against the textbook loop on the same network.

The textbook loop is the well-known PyTorch reproduction's way (github.com/kevinzakka/recurrent-visual-attention),
written anew: every image's patch is cut out in Python, the loss is put together from the steps' lists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from benchmarks import best_seconds
from foveate import noise
from foveate.attention import Looking, hybrid_loss
from foveate.data.classification import Images
from foveate.envs.glimpse import GlimpseEnv
from foveate.learn.baselines import MovingAverage
from foveate.learn.rollout import rollout
from foveate.learn.schedule import one_cycle, set_learning_rate
from foveate.models.glimpse import GlimpsePolicy

BATCH, CLASSES = 128, 10
Sizes = tuple[int, int, int, int]  # side of the image, side of a patch, scales, glimpses
Rates = tuple[float, float, str]


def compare(sizes: Sizes, rounds: int = 8, repeats: int = 5) -> Rates:
    """Training images/s of both on one set of synthetic images."""
    shown = synthetic_images(sizes[0])
    ours, peer = best_seconds(our_step(shown, sizes), textbook_step(shown, sizes), rounds=rounds, repeats=repeats)
    return BATCH / ours, BATCH / peer, "training images/s"


def synthetic_images(side: int, size: int = 1024) -> Images:
    """Noise with labels: the cost of a step does not depend on what the images show."""
    keys = noise.key(0, torch.arange(size))
    pixels = noise.integers(keys, 256, 1, side, side).to(torch.uint8)
    return Images(pixels, noise.integers(noise.fold(keys, "label"), CLASSES), tuple("0123456789"), "synthetic", "train")


def our_step(images: Images, sizes: Sizes) -> Callable[[], None]:
    """One update as `foveate.attention.learn_to_look` makes it, without the run's bookkeeping.

    The check that the gradient is finite is part of it; progress, metrics and checkpoints are not.
    """
    _, patch, scales, glimpses = sizes
    env = GlimpseEnv(BATCH, images=images, glimpses=glimpses, patch=patch, scales=scales, autoreset="disabled")
    policy, optimizer = network(sizes)
    average, looking, rows, step = MovingAverage(), Looking(batch=BATCH), torch.arange(BATCH), 0

    def update() -> None:
        nonlocal step
        ids = noise.examples(0, step, BATCH, env.examples)
        keys = noise.key(0, "learned", step, rows, torch.zeros_like(rows))
        trajectory, decisions = rollout(env, policy, keys, ids=ids, grad=True, group=rows)
        assert decisions is not None
        loss, parts = hybrid_loss(trajectory, decisions, env.state.labels, looking, average, None, torch.sum)
        set_learning_rate(optimizer, one_cycle(0.5, looking.learning_rate))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in policy.parameters() if weight.grad is not None])
        assert torch.isfinite(loss + norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(parts["reward"][None])
        step += 1

    return update


def textbook_step(images: Images, sizes: Sizes) -> Callable[[], None]:
    """One update of the textbook loop, with the layers of the same network and the same optimizer."""
    _, patch, scales, glimpses = sizes
    policy, optimizer = network(sizes)
    pixels, labels, step = images.pixels.float() / 255, images.labels, 0
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def update() -> None:
        nonlocal step
        start = step * BATCH % len(labels)
        x, y = pixels[order[start : start + BATCH]], labels[order[start : start + BATCH]]
        optimizer.zero_grad()
        memory = torch.zeros(BATCH, policy.core.keep.in_features)
        location = torch.empty(BATCH, 2).uniform_(-1, 1)
        log_probs, baselines = [], []
        for _ in range(glimpses):
            what = policy.what(cut_glimpse(x, location, patch, scales))
            glimpse = F.relu(policy.join(torch.cat((what, policy.where(location)), 1)))
            memory = policy.core(glimpse, memory)
            mean = policy.locate(memory.detach())
            baselines.append(policy.value(memory.detach()).squeeze(1))
            drawn = (mean + torch.randn_like(mean) * policy.std).detach()
            log_probs.append(Normal(mean, policy.std).log_prob(drawn).sum(1))
            location = drawn.clamp(-1, 1)
        scores = F.log_softmax(policy.classify(memory), 1)
        reward = (scores.detach().argmax(1) == y).float()[:, None].repeat(1, glimpses)
        baseline, log_prob = torch.stack(baselines, 1), torch.stack(log_probs, 1)
        places = -(log_prob * (reward - baseline.detach()))[:, :-1].sum(1).mean()
        loss = F.nll_loss(scores, y) + F.mse_loss(baseline, reward) + places
        loss.backward()
        optimizer.step()
        loss.item()
        step += 1

    return update


def products(sizes: Sizes) -> Callable[[], None]:
    """The matrix products of one update alone, as few and as large as they can be: what no loop can go below.

    Forward they must be made glimpse by glimpse; backward those of all glimpses are joined, but for the memory's.
    """
    policy, _ = network(sizes)
    glimpses, core = sizes[3], policy.core
    heads = [policy.locate[0], policy.locate[2], policy.value, policy.classify]
    layers = [policy.what[1], policy.where[0], policy.join, core.see, core.keep, *heads]
    passed_on = {policy.join, core.see, policy.locate[2], policy.classify}  # layers with weights below them
    times = [glimpses - (layer is core.keep) for layer in layers]  # at first there is nothing to keep
    inputs = [torch.rand(time, BATCH, layer.in_features) for time, layer in zip(times, layers, strict=True)]
    gradients = [torch.rand(time, BATCH, layer.out_features) for time, layer in zip(times, layers, strict=True)]

    @torch.no_grad()
    def update() -> None:
        for step in range(glimpses):
            for layer, seen in zip(layers, inputs, strict=True):
                if step < len(seen):
                    layer(seen[step])
        for layer, seen, gradient in zip(layers, inputs, gradients, strict=True):
            gradient.flatten(0, 1).T @ seen.flatten(0, 1)
            if layer in passed_on:
                gradient.flatten(0, 1) @ layer.weight
            elif layer is core.keep:
                for one in gradient:
                    one @ layer.weight

    return update


def bound(sizes: Sizes, rounds: int = 8, repeats: int = 5) -> Rates:
    """The products alone, as if they were our training step, against the textbook loop."""
    ours, peer = best_seconds(
        products(sizes), textbook_step(synthetic_images(sizes[0]), sizes), rounds=rounds, repeats=repeats
    )
    return BATCH / ours, BATCH / peer, "training images/s"


def cut_glimpse(x: Tensor, location: Tensor, patch: int, scales: int) -> Tensor:
    """Cut every image's patches in Python, then average the wider ones down to `patch`."""
    patches = []
    for scale in range(scales):
        side = patch * 2**scale
        padded = F.pad(x, (side // 2,) * 4)
        low = (0.5 * (location + 1) * x.shape[-1]).long()
        high = low + side
        cut = []
        for row in range(len(x)):
            cut.append(padded[row, :, low[row, 1] : high[row, 1], low[row, 0] : high[row, 0]])
        patches.append(F.avg_pool2d(torch.stack(cut), 2**scale))
    return torch.cat(patches, 1)


def network(sizes: Sizes) -> tuple[GlimpsePolicy, torch.optim.Optimizer]:
    """The same weights every time, and their optimizer."""
    _, patch, scales, _ = sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = GlimpsePolicy((scales, patch, patch), 2, CLASSES)
    return policy, torch.optim.Adam(policy.parameters(), 1e-3, fused=True)


ROWS: dict[str, Callable[[], Rates]] = {
    "ram": partial(compare, (28, 8, 1, 6)),
    "ram-60": partial(compare, (60, 12, 3, 8)),
    "ram-products": partial(bound, (28, 8, 1, 6)),
}
