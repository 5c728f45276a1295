"""Training steps of agents that learn by acting, beside the time their networks alone take of them.

Environment, exploration, replay, what the networks are shown, clipping and the optimizer's step are all that is not
"networks"; the ratio is the part of a step that its networks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from foveate.models.cutting import Executor
from foveate.run import Run
from foveate.systems import cutting, landmarks, localization, registration, seednet, tracking

Rates = tuple[float, float, str]
WARM = 12  # steps before the time is taken: by then what fills up first has filled


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


def compare_step(
    system: ModuleType,
    steps: int = 150,
    learn: str = "learn_by_acting",
    asked: type[nn.Module] | None = None,
    **settings: Any,
) -> Rates:
    """Steps/s of a phase of a system as it is trained, and if there were nothing but its networks.

    Args:
        system: whose `train` calls the phase.
        steps: that are timed.
        learn: the function of the system that is the phase: Q-learning, or a function of (config, run, ..., parts).
        asked: a kind of network that the environment asks; its time is the networks', too.
        **settings: of the system.
    """
    clock, found, phase = _Clock(), {"begun": 0.0, "before": 0.0, "ended": 0.0}, getattr(system, learn)

    def measured(*parts: Any, **how: Any) -> None:
        (run,) = (part for part in parts if isinstance(part, Run))
        counted, networks = run.steps, parts[4:6] if learn == "learn_by_acting" else parts[-1][:1]

        def counting(name: str, _: float) -> Iterator[int]:
            for step in counted(name, 1.0):
                if step == WARM:
                    found.update(begun=perf_counter(), before=clock.seconds)
                yield step
                found["ended"] = perf_counter()  # before the checkpoint that ends the phase
            raise _Taken

        with ExitStack() as patched:
            patched.enter_context(mock.patch.object(run, "steps", counting))
            for kind, name in ((Tensor, "backward"), *(((asked, "forward"),) if asked else ())):
                patched.enter_context(mock.patch.object(kind, name, clock.around(getattr(kind, name))))
            for each in networks:
                each.forward = clock.around(each.forward)
            if beside := how.get("beside"):  # partial(with_belief, network.both, ...): it calls no `forward`
                both, *others = beside.args
                how["beside"] = partial(beside.func, clock.around(both), *others)
            phase(*parts, **{name: value for name, value in how.items() if name not in ("keeper", "validate")})

    with TemporaryDirectory() as folder, mock.patch.object(system, learn, measured):
        config = system.resolve(system.Config(steps=WARM + steps, **settings))
        run = Run(Path(folder) / "run", system="bench", config={}, steps=WARM + steps, device="cpu", quiet=True)
        with suppress(_Taken):
            system.train(config, run)
    seconds, networks = found["ended"] - found["begun"], clock.seconds - found["before"]
    threads = torch.get_num_threads()
    return steps / seconds, steps / networks, f"training steps/s, peer its networks alone, {threads} threads"


ROWS: dict[str, Callable[[], Rates]] = {
    "localization-step": partial(compare_step, localization, scenes=400),
    "registration-step": partial(
        compare_step, registration, 20, "_learn_to_move", pairs=64, start_share=0.0, mutual_information=False
    ),
    "cutting-step": partial(compare_step, cutting, asked=Executor, scenes=20, execution_share=0.05),
    "landmarks-step": partial(compare_step, landmarks, spacing=4.0, warps=4),
    "seednet-step": partial(compare_step, seednet, scenes=100),
    "tracking-step": partial(compare_step, tracking, scenes=10),
}
