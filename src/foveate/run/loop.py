"""A run: a folder, a device, a seed, and the loop that every system is trained in.

    run = Run(folder, system="ram", config={...}, steps=1000)
    policy, optimizer = run.track(policy=policy, optimizer=optimizer)     # anything with state_dict
    for step in run.steps("reward"):                                      # resume, budget, progress, checkpoint, Ctrl-C
        run.optimise(loss, optimizer)                                     # reduce, NaN guard, clip, step
        run.log(loss=loss, reward=reward)

A run that was killed at any moment and resumed ends with the weights of one that was not, bit for bit, if its budget is
in steps and machine and thread count are the same. What makes it so: the tracked parts are saved whole, the rows of
`metrics.jsonl` are cut back to the checkpoint, and before every step PyTorch's global generator is seeded with (seed,
phase, step, process), so that even what draws from it (dropout, other people's layers) needs no hidden state.

Under several processes (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as `torchrun` and `accelerate launch`
set them) each works on its own rows of the batch and `optimise` averages the gradients. Modules are not wrapped, so
that any method may carry gradients, some parameters may sit out a step, and one process may evaluate alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate import noise
from foveate.run import checkpoints
from foveate.run import folder as run_folder
from foveate.run.processes import Interrupt, Processes, RunError, shared
from foveate.run.progress import Metrics, Progress
from foveate.types import InputError

__all__ = ["Run", "RunError"]

CHECKPOINT_SECONDS = 30.0
LOG_EVERY = 20  # steps to a row of metrics.jsonl
_METRICS = "run-metrics"  # the name of a part that no keyword of `track` can take
Number: TypeAlias = float | int


class Run:
    """A run and its folder. Nothing is written, cut back or overwritten before the first step.

    Args:
        folder: where the run lives: run.json, metrics.jsonl, tensorboard/, checkpoints/.
        system: the name of what is trained.
        config: its fields; JSON, or what `str` makes JSON of.
        seed: of the initial weights and of everything drawn.
        steps: the budget in steps of a phase of share 1; see `steps`.
        minutes: the budget in minutes of all phases together; with both, whichever ends first.
        device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1" or "mps".
        checkpoint_steps: save every so many steps; every 30 seconds if None (less often if saving is slow).
        resume: go on from the last good checkpoint; a budget of None is then the one the run was begun with.
        overwrite: if the folder holds a run, delete that first.
        source: another run; a module begins with the weights that run has for a part of its name, if it has one.
        source_parts: name of a module → the part of the source it begins with instead, which must be there.
        quiet: show no progress.

    Attributes:
        folder, system, config, seed: as given.
        device: where this process computes.
        rank, processes, is_main: which of how many processes this is; the first is the main one and writes.
        progress: of the current phase, in [0, 1]: max(step / steps, elapsed / minutes); the same in all processes.

    Raises:
        InputError: no budget or one of 0, an absent device, a folder that cannot be used as asked, a run of another
            system, config, seed, number of processes or minor version to resume.
    """

    _resumed: checkpoints.Checkpoint | None = None  # where the run goes on from, until its first step
    _phases: list[dict[str, Any]]  # as in checkpoints: name, steps, seconds, done
    _begun = _broken = _writable = False
    _source: Run | None = None
    stopped: str | None = None  # where, if what was restored is of a run that has not ended

    def __init__(
        self,
        folder: Path,
        *,
        system: str,
        config: dict[str, Any],
        seed: int = 0,
        steps: int | None = None,
        minutes: Number | None = None,
        device: str = "auto",
        checkpoint_steps: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        source: Path | None = None,
        source_parts: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        run_folder.check_positive(steps=steps, minutes=minutes, checkpoint_steps=checkpoint_steps)
        if not 0 <= seed < 2**63:
            raise InputError(f"seed: found {seed}, expected 0 to 2**63 - 1")
        self._set_up(folder, system, config, seed, device, quiet)
        self._checkpoint_steps, self._resume, self._writable = checkpoint_steps, resume, True
        others: dict[str, Any] = {
            "steps": steps,
            "minutes": minutes,
            "processes": self.processes,
            "device": str(self.device),
        }
        others["source"] = None if source is None else str(Path(source).absolute())
        others["source_parts"] = dict(source_parts or {})
        self._record = run_folder.describe(system, config, seed, others)
        if resume:
            self._record = run_folder.resumed(self.folder, self._record)
            self._resumed = checkpoints.newest(self._folder, self._passed_over)
            if self._resumed:
                self._phases = self._resumed.position["phases"]
                self.restore(_METRICS, self._metrics)
            else:
                self.say(f"{self.folder} holds no checkpoint yet: starting from the beginning")
        else:
            run_folder.check_free(self.folder, overwrite)
        if self._record.get("source") and not self._resumed:  # a checkpoint has no more need of where it came from
            self._source = Run.open(Path(self._record["source"]))
        run_folder.check_budget(self._record["steps"], self._record["minutes"])

    @classmethod
    def open(cls, folder: Path, device: str = "auto") -> Run:
        """Open a run for reading its parts (`restore`): for evaluating, drawing, or starting another run from it.

        Raises:
            InputError: the folder holds no run.
        """
        record = run_folder.read(Path(folder))
        run = cls.__new__(cls)
        run._set_up(folder, record["system"], record["config"], record["seed"], device, quiet=True)
        return run

    @property
    def source(self) -> str | None:
        """Folder of the run that the first weights were taken from."""
        found: str | None = self._record.get("source")
        return found

    @property
    def source_part(self) -> str | None:
        """The part of the source that tuning began from; None: the start of its own tuning."""
        return next(iter(self._record.get("source_parts", {}).values()), None)

    def track(self, **parts: Any) -> tuple[Any, ...]:
        """Make parts belong to the run: modules move to its device, all are saved in checkpoints and restored.

        A part is anything with `state_dict` and `load_state_dict` (modules, optimizers, environments, replay); the
        latter is given tensors on the CPU. Returns the parts in the order given. Modules and optimizers are the same
        in all processes and saved once; every process saves its own copy of anything else, and of a module whose
        `of_process` is true.

        Track whatever a later phase starts from (a frozen reference, say), or a resumed run will not have it.

        Raises:
            InputError: what a checkpoint holds does not fit the part, or the source has no part that was asked for.
        """
        for name, part in parts.items():
            if self._parts.setdefault(name, part) is not part:
                raise ValueError(f"another part is tracked as {name!r}")
            if isinstance(part, nn.Module):
                part.to(self.device)
                if shared(part):
                    self._group.copy_from_main(part)
            if self._resumed:
                self.restore(name, part)
            elif self._source and isinstance(part, nn.Module):
                self._take(self._source, name, part)
        return tuple(parts.values())

    def restore(self, name: str, part: Any) -> bool:
        """Give a part the state it has in the last good checkpoint; False if that holds no part of this name.

        Raises:
            InputError: the run has no checkpoint, or what it holds does not fit the part.
        """
        found = self._resumed or checkpoints.newest(self._folder, self._passed_over)
        if found is None:
            raise InputError(f"{self.folder}: found no checkpoint that can be read; train it first")
        file = self._group.file(name, part)
        if file not in found.parts and isinstance(part, nn.Module):
            file = name  # of a run that saved the main process's only
        if file in found.parts:
            checkpoints.restore(found, file, part)
        phase = next(iter(found.position["phases"][-1:]), {"done": True})
        self.stopped = None if phase["done"] else f"in {phase['name']} after {phase['steps']} steps"
        return file in found.parts

    def steps(self, phase: str = "train", share: Number = 1.0) -> Iterator[int]:
        """Go through a phase: yields 0, 1, 2, ... until its budget is used up, from the checkpoint on if resumed.

        With a budget in steps a phase makes max(1, round(steps · share)) of them; with one in minutes it lasts
        share · minutes, not counting the time between a kill and the resumption. Phases of a resumed run are matched
        by order and name; those that were completed yield nothing. A checkpoint is written as often as asked, at the
        end of the phase, and on Ctrl-C, which then exits with code 130. If the body raises, the last one stands.
        """
        if not 0 < share <= 1:
            raise InputError(f"share of phase {phase}: found {share}, expected more than 0 and at most 1")
        self._begin()
        self.progress = 1.0
        if not self._enter(phase):
            return
        now = self._phases[-1]
        began = time.monotonic() - now["seconds"]
        limits = self._record["steps"], self._record["minutes"]
        limit = math.inf if limits[0] is None else max(1, round(limits[0] * share))
        seconds = math.inf if limits[1] is None else limits[1] * 60 * share
        first, self._next_save = now["steps"], time.monotonic() + CHECKPOINT_SECONDS
        with self._interrupt, contextlib.closing(self._bar):
            self._bar.start(phase, max(first / limit, now["seconds"] / seconds))
            while True:
                made = now["steps"]
                due = time.monotonic() > self._next_save
                if self._checkpoint_steps is not None:
                    due = made % self._checkpoint_steps == 0 and made > first
                elapsed, asked, stop = self._group.from_main(time.monotonic() - began, due, self._interrupt.asked)
                now["seconds"], self.progress = elapsed, min(1.0, max(made / limit, elapsed / seconds))
                over = self.progress >= 1 and made > 0
                if made % LOG_EVERY == 0 or over:
                    self._write_row()
                self._bar.update(self.progress, made, self._metrics.latest)
                if over or asked or stop:
                    now["done"] = over
                    self.save()
                if stop:
                    self._bar.close()
                    self.say(f"saved after {made} steps of {phase}; to go on: foveate resume {self.folder}")
                    raise SystemExit(130)
                if over:
                    return
                self._group.seed(int(noise.key(self.seed, phase, made, self.rank)))
                now["steps"] = made + 1
                self._resumed = None  # parts that are tracked from here on start fresh
                yield made

    def optimise(self, loss: Float[Tensor, ""], optimizer: torch.optim.Optimizer, clip: Number | None = None) -> None:
        """Follow the gradient of a loss: backward, mean over processes, clip its norm at `clip`, step, zero_grad.

        Gradients that are there already are added to: to put a batch through in chunks, call `backward` on the loss of
        each but the last.

        Raises:
            RunError: loss or gradient is not finite; the step is not taken, and nothing is saved from then on.
        """
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loss = self._group.mean_gradients(parameters, loss.detach())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(loss + norm)):  # one look at both: each look waits for the device
            self._stop_diverged(float(loss), float(norm))
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def mean(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean of a number over all processes."""
        return self._group.reduce(value, "mean")

    def count(self, mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
        """How many are true, as the mean over processes.

        Divide each process's sum by it: the mean over processes of the gradients is then that of the whole batch.
        """
        return self.mean(mask.sum().float())

    def rows(self, batch: int) -> slice:
        """Which rows of a batch are this process's.

        Raises:
            InputError: the batch cannot be shared out equally.
        """
        if batch % self.processes:
            raise InputError(f"batch: found {batch}, expected a multiple of the {self.processes} processes")
        size = batch // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)

    def log(self, **scalars: Number | Tensor) -> None:
        """Note values of this step; their means over `LOG_EVERY` steps and all processes are a row of `metrics.jsonl`.

        A row also holds phase, step (steps made) and seconds (of training); a mean that is not finite is null there.
        All processes log the same names in the same order. Tensors stay where they are until the row is written.
        """
        self._metrics.add(scalars)

    def save(self) -> Path:
        """Write a checkpoint now. Inside the loop the present step counts as made: call it last in the body.

        Raises:
            RunError: the disk is full, or the run diverged; the earlier checkpoints are intact.
        """
        if self._broken:
            raise RunError(f"nothing is saved after the run diverged; {self._last_good()}")
        self._begin()
        started = time.monotonic()
        step = self._phases[-1]["steps"] if self._phases else 0
        partial = self._folder / f"{checkpoints.PARTIAL}{max(0, len(self._phases) - 1)}-{step:08d}"
        with self._on_disk(), self._interrupt.held():
            self._group.together(lambda: checkpoints.begin(partial))
            self._group.together(lambda: self._write_parts(partial), main_only=False)
            self._group.together(lambda: checkpoints.finish(partial, {"phases": self._phases}))
        ended = time.monotonic()
        self._next_save = ended + max(CHECKPOINT_SECONDS, 20 * (ended - started))
        return checkpoints.listed(self._folder)[-1]

    def say(self, text: str) -> None:
        """Print one line to stderr, from the main process only, above the bar."""
        if self.is_main:
            self._bar.say(text)

    def _set_up(self, folder: Path, system: str, config: dict[str, Any], seed: int, device: str, quiet: bool) -> None:
        self.folder, self.system, self.config, self.seed, self.progress = Path(folder), system, config, seed, 0.0
        self._folder = self.folder / "checkpoints"
        self._group = Processes(device)
        self.device, self.rank, self.processes = self._group.device, self._group.rank, self._group.count
        self.is_main = self.rank == 0
        self._bar, self._metrics = Progress(quiet or not self.is_main), Metrics(self.folder, self._group)
        self._parts: dict[str, Any] = {_METRICS: self._metrics}
        self._interrupt = Interrupt()
        self._phases, self._entered = [], 0
        torch.manual_seed(seed)

    def _take(self, source: Run, name: str, part: nn.Module) -> None:
        """Give a module the weights of the source's part of its name, or of the one that was asked for."""
        asked = self._record.get("source_parts", {}).get(name)
        if not source.restore(asked or name, part) and asked:
            found = checkpoints.newest(source._folder, source._passed_over)
            there = ", ".join(sorted(found.parts - {_METRICS})) if found else "none"
            raise InputError(f"{source.folder}: has no part {asked!r} for {name} to begin with; it has {there}")

    def _begin(self) -> None:
        """Make the folder what the run needs, at the first step: what stops a run before that leaves all as it was."""
        if not self._writable:
            raise ValueError("a run that was opened for reading neither trains nor saves")
        if not self._begun:
            self._group.together(lambda: None)  # the folder may not change before all processes have looked at it
            with self._on_disk():
                self._group.together(self._make_folder)
            self._begun = True

    def _make_folder(self) -> None:
        if self._resume:
            run_folder.write(self.folder, self._record)
            checkpoints.drop_after(self._folder, self._resumed)
        else:
            run_folder.begin(self.folder, self._record)
        self._metrics.open(purge=self._total("steps") + 1 if self._resume else None)

    def _enter(self, phase: str) -> bool:
        """Find the place of a phase in the run; False if it was completed before the run was resumed."""
        order, self._entered = self._entered, self._entered + 1
        if order == len(self._phases):
            self._phases.append({"name": phase, "steps": 0, "seconds": 0.0, "done": False})
        found = self._phases[order]
        if found["name"] != phase:
            raise InputError(f"{self.folder}: its phase {order} is {found['name']!r}, not {phase!r}; train anew")
        return order == len(self._phases) - 1 and not found["done"]

    def _total(self, what: str) -> Any:
        return sum(phase[what] for phase in self._phases)

    def _write_row(self) -> None:
        now = self._phases[-1]
        with self._on_disk():
            self._metrics.write_row(now["name"], now["steps"], self._total("seconds"), self._total("steps"))

    def _write_parts(self, partial: Path) -> None:
        for name, part in self._parts.items():
            if self._group.writes(part):
                checkpoints.write_part(partial, self._group.file(name, part), part.state_dict())

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder}: cannot be written ({error.strerror or error}); {self._last_good()}; make room, then: "
                f"foveate resume {self.folder}"
            ) from error

    def _last_good(self) -> str:
        good = checkpoints.newest(self._folder, lambda path, damage: None)
        return f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"

    def _passed_over(self, path: Path, damage: checkpoints.Damaged) -> None:
        self.say(f"{path} is damaged ({damage}): passed over for the checkpoint before it")

    def _stop_diverged(self, loss: float, norm: float) -> NoReturn:
        self._broken = True
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        at = f"step {self._phases[-1]['steps'] - 1} of phase {self._phases[-1]['name']}" if self._phases else "step 0"
        raise RunError(f"{what} at {at}; {self._last_good()}; train anew with a smaller learning rate or clipping")
