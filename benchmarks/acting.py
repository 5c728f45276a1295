"""Training steps of agents that learn values by acting, beside the time their networks alone take of them.

Environment, exploration, replay, what the networks are shown, clipping and the optimizer's step are all that is not
"networks"; the ratio is the part of a step that its networks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from foveate.run import Run
from foveate.systems import landmarks, localization, seednet, tracking
from foveate.value_learning import learn_by_acting

Rates = tuple[float, float, str]
WARM = 20  # steps before the time is taken


class _Taken(Exception):
    """The phase is over, and nothing after it is wanted."""


class _Clock:
    """Seconds within calls of some modules, and within gradients."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        begun = perf_counter()
        yield
        self.seconds += perf_counter() - begun

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return call(*args, **kwargs)

        return timed


def compare_step(system: ModuleType, steps: int = 150, **settings: Any) -> Rates:
    """Steps/s of a system's Q-learning as it is trained, and if there were nothing but its networks."""
    clock, found = _Clock(), {"begun": 0.0, "before": 0.0, "ended": 0.0}

    def measured(run: Run, phase: str, _: float, *parts: Any, **how: Any) -> None:
        counted, (network, target) = run.steps, parts[1:3]

        def counting(*phase: Any) -> Iterator[int]:
            for step in counted(*phase):
                if step == WARM:
                    found.update(begun=perf_counter(), before=clock.seconds)
                yield step
            found["ended"] = perf_counter()

        timed = mock.patch.object(Tensor, "backward", clock.around(Tensor.backward))
        with mock.patch.object(run, "steps", counting), timed:
            for each in network, target:
                each.forward = clock.around(each.forward)
            if beside := how.get("beside"):  # partial(with_belief, network.both, ...): it calls no `forward`
                both, *others = beside.args
                how["beside"] = partial(beside.func, clock.around(both), *others)
            learn_by_acting(run, phase, 1.0, *parts, **how | {"keeper": None, "validate": None})
        raise _Taken

    with TemporaryDirectory() as folder, mock.patch.object(system, "learn_by_acting", measured):
        config = system.resolve(system.Config(steps=WARM + steps, **settings))
        run = Run(Path(folder) / "run", system="bench", config={}, steps=WARM + steps, device="cpu", quiet=True)
        with suppress(_Taken):
            system.train(config, run)
    seconds, networks = found["ended"] - found["begun"], clock.seconds - found["before"]
    threads = torch.get_num_threads()
    return steps / seconds, steps / networks, f"training steps/s, peer its networks alone, {threads} threads"


ROWS: dict[str, Callable[[], Rates]] = {
    "localization-step": partial(compare_step, localization, scenes=400),
    "landmarks-step": partial(compare_step, landmarks, spacing=4.0, warps=4),
    "seednet-step": partial(compare_step, seednet, scenes=100),
    "tracking-step": partial(compare_step, tracking, scenes=10),
}
