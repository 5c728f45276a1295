"""The processes that share a run: which device each has, how they add up and agree, and how Ctrl-C reaches them.

One process needs none of it, and then nothing here imports Accelerate or starts a process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.types import InputError

T = TypeVar("T")


def shared(part: Any) -> bool:
    """Whether a part is the same in all processes: optimizers, and modules unless their `of_process` is true."""
    return isinstance(part, nn.Module | torch.optim.Optimizer) and not getattr(part, "of_process", False)


class RunError(RuntimeError):
    """A run cannot go on: the disk is full, the loss diverged. One line: what happened, what is safe, the remedy."""


class Processes:
    """This process among those that WORLD_SIZE, RANK and LOCAL_RANK tell of, and its device.

    Args:
        device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        InputError: the device is unknown or not there.
    """

    def __init__(self, device: str) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = _find(device)
        if self.count > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            self.device = PartialState(cpu=self.device.type == "cpu").device

    def seed(self, seed: int) -> None:
        """Seed PyTorch's global generator and the device's. (`torch.manual_seed` does so too, but slowly.)"""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def writes(self, part: Any) -> bool:
        """Whether this process saves its copy of a part: the main one all, the others what is not the same in all."""
        return self.rank == 0 or not shared(part)

    def file(self, name: str, part: Any) -> str:
        """The name under which this process finds its copy of a part."""
        return f"{name}.{self.rank}" if self.rank > 0 and self.writes(part) else name

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The "sum" or "mean" of a tensor over processes."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce  # type: ignore[import-untyped]

        return reduce(tensor, how)

    def sum(self, *values: float | int) -> tuple[float | int, ...]:
        """Sums of numbers over processes."""
        if self.count == 1:
            return values
        return tuple(self.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum").tolist())

    def from_main(self, *values: float | int) -> tuple[float | int, ...]:
        """The main process's values, in all processes."""
        if self.count == 1:
            return values
        from accelerate.utils import broadcast

        return tuple(broadcast(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist())

    def copy_from_main(self, module: nn.Module) -> None:
        """Give a module the main process's parameters and buffers in all processes."""
        if self.count > 1:
            from accelerate.utils import broadcast

            for tensor in (*module.parameters(), *module.buffers()):
                broadcast(tensor.data)

    def together(self, action: Callable[[], T], main_only: bool = True) -> T | None:
        """Do something in the main process, or in all; return when all have done it; if one fails all do.

        Raises:
            RunError: it failed in another process; in that one, whatever it raised.
        """
        failure, result = None, None
        if self.rank == 0 or not main_only:
            try:
                result = action()
            except Exception as error:
                failure = error
        failures = self.reduce(torch.tensor([failure is not None], dtype=torch.float32, device=self.device), "sum")
        if failure is not None:
            raise failure
        if self.count > 1 and failures.item():
            raise RunError("stopped: another process of this run failed and says why")
        return result

    def mean_gradients(self, parameters: list[nn.Parameter], loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Average gradients over processes in one reduction; returns the mean loss.

        A parameter that took part in the loss of some processes only counts as zero in the others; one that took part
        nowhere keeps no gradient, as in a single process.
        """
        if self.count == 1:
            return loss
        pieces = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        used = torch.tensor([one.grad is not None for one in parameters], dtype=loss.dtype, device=loss.device)
        flat = self.reduce(torch.cat([*(piece.flatten() for piece in pieces), used, loss.view(1)]), "mean")
        *means, used, loss = flat.split([*(piece.numel() for piece in pieces), len(parameters), 1])
        for one, mean, part in zip(parameters, means, used.tolist(), strict=True):
            one.grad = mean.view_as(one).to(one.dtype) if part else None
        return loss.squeeze(0)


class Interrupt:
    """Inside `with`, Ctrl-C is noted rather than raised, so that a step can be ended and saved.

    Attributes:
        asked: Ctrl-C was pressed. A second one raises KeyboardInterrupt at once, except inside `held`.
    """

    def __init__(self) -> None:
        self.asked = self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing in here is broken off."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def __enter__(self) -> None:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # only that one may set handlers
            self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = True, now
            if os.environ.get("RANK", "0") == "0":  # not by print, which may be what was interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, back to the last checkpoint\n")
        elif not self._held and now - self._first > 1:  # launchers may pass on one Ctrl-C twice
            raise KeyboardInterrupt


def _find(name: str) -> torch.device:
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, number in present.items() if number))
    there = ", ".join(kind for kind, number in present.items() if number)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is unknown; choose auto or one that is here: {there}") from error
    if (device.index or 0) >= present.get(device.type, 0):
        raise InputError(f"device: {name!r} is not on this machine; choose auto or one that is here: {there}")
    return device
