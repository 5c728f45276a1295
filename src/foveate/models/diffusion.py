"""Denoisers as samplers: a chain of Gaussian steps from noise to an image is one answer, each step a decision.

Black et al. 2023, "Training diffusion models with reinforcement learning" (DDPO, arXiv 2305.13301), section 4. The
networks and the schedulers are those of diffusers:

    policy = ClassDenoiser(small_unet(16, channels=1, classes=10), scheduler, steps=12, shape=(1, 16, 16))
    chains = policy.sample(labels, 8, greedy=False, keys=keys)      # eight images of each label
    policy(labels, chains).log_probs                                # [rows, steps], summed over pixels

A chain is stored without a graph and goes through the network again in pieces of `chunk` steps, each with a backward
pass of its own. What decides is the same in both passes: clipping, guidance, precision, no dropout.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate import noise
from foveate.models.denoising import GaussianStep, gaussian_steps, target_of
from foveate.models.low_rank import MARK
from foveate.types import Decisions, InputError, Sampler, Tree, map_tree, split


@dataclass(frozen=True)
class Chain:
    """Denoising chains: a tree of [rows, ...].

    Attributes:
        drawn: what every step drew, the finished image last, as the network has it (pixels in [-1, 1], or latents).
        start: the noise that stood before the first.
    """

    drawn: Float[Tensor, "rows time channels height width"]
    start: Float[Tensor, "rows channels height width"]


@dataclass(frozen=True)
class Noised:
    """Images with noise on them: what a denoiser learns from.

    Attributes:
        image: as the network has it.
        noise: standard normal.
        times: how much of it, from 0 to the scheduler's last.
        weight: of the example in the loss.
    """

    image: Float[Tensor, "rows channels height width"]
    noise: Float[Tensor, "rows channels height width"]
    times: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]


class Denoiser(Sampler):
    """A network that takes noise off, as a sampler of images.

    A kind of it says in `conditions` what an input is to the network, and in `output` how that is called.

    Args:
        network: of diffusers, or any module that `output` can call.
        scheduler: a `DDIMScheduler` or a `DDPMScheduler`.
        steps: from noise to image.
        shape: channels, height and width of what it denoises.
        eta: how random DDIM's steps are; 1 as DDPM's.
        guidance: output = without + guidance · (with - without condition); 1: the condition alone.
        chunk: steps to a backward pass.

    Attributes:
        classes: how many inputs there are, beside the one of this number that means none; None: it is told nothing.
        at_once: images that go through the network together where no graph is kept; None: as `together` says.
        light: what does not learn stays where it came from: states hold what learns, and copies share the rest.

    Raises:
        InputError: steps that decide nothing (eta = 0), a scheduler whose steps are not Gaussian, a chunk below 1.
    """

    light = False
    classes: int | None = None
    at_once: int | None = None

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        steps: int,
        shape: tuple[int, int, int],
        eta: float = 1.0,
        guidance: float = 1.0,
        chunk: int | None = 1,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise InputError(f"piece: found {chunk}, expected at least 1 step of denoising")
        if not eta > 0 and type(scheduler).__name__ == "DDIMScheduler":
            raise InputError(f"eta: found {eta:g}, with which no step is random and nothing is decided; try 1")
        self.network, self.guidance, self.chunk, self.shape = network, guidance, chunk, shape
        self.image = shape  # of the finished images
        self.table, self.certain = gaussian_steps(scheduler, steps, eta), gaussian_steps(scheduler, steps, 0.0)
        if not bool((self.table.std > 0).any()):
            raise InputError(
                f"denoising: {steps} steps of which none is random: nothing is decided; take more steps or a larger eta"
            )
        self.decisions = int((self.table.std > 0).nonzero().max()) + 1  # what comes after is certain
        self.alphas: Tensor
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)

    @abstractmethod
    def conditions(self, inputs: Tree) -> Tree:
        """What the network is told of each input: a tree of [batch, ...]."""

    @abstractmethod
    def without(self, conditions: Tree) -> Tree:
        """The same tree, of no condition."""

    @abstractmethod
    def output(
        self, x: Float[Tensor, "rows channels height width"], times: Int[Tensor, " rows"], conditions: Tree
    ) -> Float[Tensor, "rows channels height width"]:
        """What the network makes of x."""

    def state_dict(self, *arguments: Any, **how: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights; of a `light` one those that learn."""
        state = super().state_dict(*arguments, **how)
        return {name: value for name, value in state.items() if not self.light or MARK in name}

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **how: Any) -> Any:
        """Take the weights of one like this, or of one without adapters: these then change nothing."""
        own = super().state_dict()
        if any(MARK in name for name in own) and not any(MARK in name for name in state_dict):
            still = {name: 0 * value if f"{MARK}B" in name else value for name, value in own.items()}
            plain = {name: state_dict.get(name.replace(".base_layer.", "."), value) for name, value in still.items()}
            return super().load_state_dict(plain, *arguments, **how)
        return super().load_state_dict(own | dict(state_dict) if self.light else state_dict, *arguments, **how)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        """A copy; of a `light` one, what does not learn is shared."""
        if self.light:
            memo |= {id(one): one for one in (*self.parameters(), *self.buffers()) if not one.requires_grad}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def none(self, classes: int) -> int | None:
        """The input that means none of so many classes; None if there is no such input."""
        return self.classes if self.classes == classes else None

    def together(self) -> int:
        """`at_once`, or as many as have the pixels of 100 images of 64×64, and at most 100."""
        return self.at_once or max(1, 100 * 64**2 // max(64**2, self.image[1] * self.image[2]))

    def encode(self, images: Float[Tensor, "rows channels height width"]) -> Tensor:
        """Images in [0, 1] as the network has them."""
        return 2 * images - 1

    def finish(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows colors tall wide"]:
        """Images in [0, 1] of what the network has at the end."""
        return ((x + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def sample(self, inputs: Tree, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Chain:
        """Draw images from noise that the keys give; greedy: the same noise, and DDIM's steps without chance."""
        streams = noise.fold(keys[:, None], "sample", torch.arange(num_samples, device=keys.device)).flatten()
        start = noise.normal(noise.fold(streams, "start"), *self.shape)
        return self.chain(inputs, start, streams, greedy)

    @torch.no_grad()
    def chain(
        self,
        inputs: Tree,
        start: Float[Tensor, "rows channels height width"],
        keys: Int[Tensor, " rows"],
        greedy: bool = False,
        first: int = 0,
    ) -> Chain:
        """Denoise what is given, as many rows for each input, from step `first` on."""
        table = self.certain if greedy else self.table
        known = _repeated(self.conditions(inputs), len(start))
        x, drawn = start, []
        for step in range(first, len(table.times)):
            here = slice(step, step + 1)
            x = table.mean(self._outputs(x[:, None], here, known), x[:, None], here)[:, 0]
            if table.std[step] > 0:
                x = x + table.std[step].to(x) * noise.normal(noise.fold(keys, "step", step), *self.shape)
            drawn.append(x)
        return Chain(torch.stack(drawn, 1), start)

    def pieces(self, actions: Tree) -> list[slice]:
        """The steps in pieces of `chunk`, without what comes after the last random one."""
        size = self.chunk or self.decisions
        return [slice(first, min(first + size, self.decisions)) for first in range(0, self.decisions, size)]

    def forward(self, inputs: Tree, actions: Chain | Noised, steps: slice = slice(None)) -> Decisions:
        """Score chains, n rows for each input: log-probabilities of their steps, summed over pixels, in nats.

        `mask` is false where a step is certain: it is no decision. Of `Noised` images the "log-probability" is the
        denoising loss with its sign turned, the mean over pixels, [rows, 1]: what maximum likelihood bounds.
        """
        if isinstance(actions, Noised):
            return self._denoised(inputs, actions)
        before = torch.cat((actions.start[:, None], actions.drawn[:, :-1]), 1)[:, steps]
        known = _repeated(self.conditions(inputs), len(before))
        mean = self.table.mean(self._outputs(before, steps, known), before, steps)
        std = self.table.std[steps].to(mean.device)[None, :, None]
        random = (std > 0).squeeze(2).expand(len(before), -1)
        # where nothing is random σ = 1 stands, which no mask lets through: 0 / 0 would come back as a gradient
        distribution = GaussianStep(mean.flatten(2), torch.where(std > 0, std, 1.0))
        return Decisions(distribution, None, distribution.log_prob(actions.drawn[:, steps].flatten(2)), random)

    def decode(self, actions: Chain) -> Float[Tensor, "rows colors tall wide"]:
        """The finished images, in [0, 1]."""
        with torch.no_grad():
            return self.finish(actions.drawn[:, -1]).float()

    def noised(
        self,
        images: Float[Tensor, "rows channels height width"],
        keys: Int[Tensor, " rows"],
        weight: Float[Tensor, " rows"] | None = None,
    ) -> Noised:
        """Images in [0, 1] to learn from, each with noise of a time that its key draws."""
        times = noise.integers(noise.fold(keys, "time"), len(self.alphas))
        ready = self.encode(images)
        blur = noise.normal(noise.fold(keys, "noise"), *self.shape)
        return Noised(ready, blur, times, torch.ones(len(images), device=images.device) if weight is None else weight)

    def blurred(
        self, images: Float[Tensor, "rows channels height width"], keys: Int[Tensor, " rows"], step: int
    ) -> Tensor:
        """Images in [0, 1] with as much noise as stands before a step of the chain, as the network has them."""
        alpha = self.table.alpha[step].to(images)
        blur = noise.normal(noise.fold(keys, "blur"), *self.shape)
        return alpha.sqrt() * self.encode(images) + (1 - alpha).sqrt() * blur

    def _denoised(self, inputs: Tree, given: Noised) -> Decisions:
        alpha = self.alphas[given.times].view(-1, 1, 1, 1)
        x = alpha.sqrt() * given.image + (1 - alpha).sqrt() * given.noise
        known = _repeated(self.conditions(inputs), len(x))
        output = self.output(x, given.times, known).float()
        wanted = target_of(given.image, given.noise, alpha, self.table.target)
        error = (output - wanted).square().flatten(1).mean(1)
        mask = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        return Decisions(None, None, -(given.weight * error)[:, None], mask)

    def _outputs(self, x: Float[Tensor, "rows time channels height width"], steps: slice, known: Tree) -> Tensor:
        """What the network makes of several steps of chains at once, in fp32; without a graph, of some in turn."""
        most = self.together()
        if len(x) > most and not torch.is_grad_enabled():
            turns = zip(x.split(most), split(known, most), strict=True)
            return torch.cat([self._outputs(some, steps, told) for some, told in turns])
        rows, count = x.shape[:2]
        times = self.table.times[steps].to(x.device).repeat(rows)
        flat, known = x.flatten(0, 1), map_tree(lambda leaf: leaf.repeat_interleave(count, 0), known)
        if self.guidance == 1:
            return self.output(flat, times, known).float().unflatten(0, (rows, count))
        both = map_tree(lambda one, none: torch.cat((one, none)), known, self.without(known))
        guided, free = self.output(torch.cat((flat, flat)), torch.cat((times, times)), both).float().chunk(2)
        return (free + self.guidance * (guided - free)).unflatten(0, (rows, count))


class ClassDenoiser(Denoiser):
    """A `UNet2DModel` that is told a class, or none: `inputs` are labels, of which `classes` means none.

    The arguments after `network` are those of `Denoiser`. A network without class embedding is told nothing.
    """

    def __init__(self, network: Any, scheduler: Any, *arguments: Any, **how: Any) -> None:
        super().__init__(network, scheduler, *arguments, **how)
        count = network.config.num_class_embeds
        self.classes = None if count is None else count - 1
        if self.classes is None and self.guidance != 1:
            raise InputError(f"guidance: found {self.guidance:g}, but the network is told no class; use 1")

    def conditions(self, inputs: Int[Tensor, " batch"]) -> Tree:
        """The labels."""
        return inputs

    def without(self, conditions: Tree) -> Tree:
        """The label of no class."""
        return torch.full_like(conditions, self.classes or 0)

    def output(
        self, x: Float[Tensor, "rows channels height width"], times: Int[Tensor, " rows"], conditions: Tree
    ) -> Float[Tensor, "rows channels height width"]:
        """What the network makes of x."""
        return self.network(x, times, None if self.classes is None else conditions, return_dict=False)[0]


def small_unet(side: int, channels: int, classes: int | None, widths: tuple[int, ...] = (32, 64, 64)) -> Any:
    """A U-Net of diffusers for small images, about a million weights, with attention at its smallest maps.

    Args:
        side: of the images; a multiple of what the levels halve it to.
        channels: of the images.
        classes: it is told of, beside the one that means none; None: it is told nothing.
        widths: features of each level.

    Raises:
        InputError: diffusers is missing, or a side that cannot be halved so often.
    """
    halvings = len(widths) - 1
    if not widths or side % 2**halvings or any(width % 8 for width in widths):
        raise InputError(
            f"image_size, widths: {side} pixels are halved {halvings} times, widths {widths} must be multiples of 8"
        )
    return diffusers().UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=8,
        attention_head_dim=16,
        add_attention=False,
        down_block_types=("DownBlock2D",) * halvings + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * halvings,
        num_class_embeds=None if classes is None else classes + 1,
    )


def diffusers() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import diffusers as package
    except ImportError as error:
        raise InputError(f"model: denoisers need diffusers ({error}); pip install 'foveate[diffusion]'") from error
    return package


def _repeated(conditions: Tree, rows: int) -> Tree:
    """As many rows for each input, one after the other."""
    repeat: Callable[[Tensor], Tensor] = lambda leaf: leaf.repeat_interleave(rows // len(leaf), 0)  # noqa: E731
    return map_tree(repeat, conditions)
