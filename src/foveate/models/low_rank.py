"""Low-rank updates of a sampler's network (LoRA, through peft): few weights learn, and the start is never far.

Hu et al. 2022, "LoRA: low-rank adaptation of large language models". With its adapter off a network is what it was at
the start, so that the anchor of a tuned model needs no copy: `Unadapted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from foveate.types import Decisions, InputError, Sampler, Tree

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")
MARK = "lora_"  # in the names of its weights


def add_low_rank(network: nn.Module, rank: int, targets: tuple[str, ...] = ATTENTION) -> None:
    """Put an adapter of a rank on layers of these names; only it learns. At first it changes nothing.

    Raises:
        InputError: peft is missing, a rank below 1, or no layer of these names.
    """
    if rank < 1:
        raise InputError(f"lora: found rank {rank}, expected at least 1")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"lora: needs peft ({error}); pip install 'foveate[diffusion]'") from error
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    try:
        inject_adapter_in_model(config, network)
    except ValueError as error:
        raise InputError(f"lora: the network has no layer named {' or '.join(targets)}") from error


def take_start(policy: nn.Module, start: nn.Module) -> None:
    """Give an adapted module the weights of one without adapters; the adapters stay as they are."""
    own, theirs = nn.Module.state_dict(policy), nn.Module.state_dict(start)
    plain = {name: theirs[name.replace(".base_layer.", ".")] for name in own if MARK not in name}
    nn.Module.load_state_dict(policy, own | plain)


@contextmanager
def unadapted(module: nn.Module) -> Iterator[None]:
    """The module as it was before it was tuned."""
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "base_layer")]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in learning:  # peft lets an adapter that is off not learn
            parameter.requires_grad_(True)


class Unadapted(Sampler):
    """A sampler with its adapters off: the reference of an anchor, with no weights of its own.

    Its state is that of the policy at the start: adapters that change nothing.
    """

    def __init__(self, policy: Sampler) -> None:
        super().__init__()
        self._policy = [policy]  # in a list, or it would be a part of this one
        self.chunk = policy.chunk

    def state_dict(self, *arguments: Any, **how: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the policy, with adapters that change nothing."""
        state = self._policy[0].state_dict(*arguments, **how)
        return {name: 0 * value if f"{MARK}B" in name else value for name, value in state.items()}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the policy, which tell the device."""
        return self._policy[0].parameters(recurse)

    def sample(self, inputs: Tree, num_samples: int, greedy: bool, keys: Int[Tensor, " batch"]) -> Tree:
        """What the policy answered at the start."""
        with unadapted(self._policy[0]):
            return self._policy[0].sample(inputs, num_samples, greedy, keys)

    def forward(self, inputs: Tree, actions: Tree, steps: slice = slice(None)) -> Decisions:
        """How it scored answers then."""
        policy = self._policy[0]
        was_training = policy.training
        with unadapted(policy):
            found = policy.eval()(inputs, actions, steps)
        policy.train(was_training)
        return found

    def decode(self, actions: Tree) -> Tree:
        """As the policy."""
        return self._policy[0].decode(actions)

    def pieces(self, actions: Tree) -> list[slice]:
        """As the policy."""
        return self._policy[0].pieces(actions)
