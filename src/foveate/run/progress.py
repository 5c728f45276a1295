"""What a run tells while it goes: a live bar or plain lines for people, JSON lines and TensorBoard events for programs.

Everything for people goes to stderr; stdout belongs to results.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.run.processes import Processes
from foveate.types import map_tree

BAR = 20  # characters


class Progress:
    """A live bar when stderr is a terminal, else a plain line every 10 % or 15 seconds; silent if `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def start(self, phase: str, done: float) -> None:
        """Begin a phase of which the share `done` was made before (0 unless it is resumed)."""
        self._phase, self._first, self._started = phase, done, time.monotonic()
        self._told, self._tenth, self._made = self._started, int(done * 10), 0
        if self._quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(BAR),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._bar.add_task(phase, total=1.0, completed=done, text="")
        self._bar.start()

    def update(self, done: float, step: int, latest: dict[str, float | None]) -> None:
        """Tell that `step` steps and the share `done` of the phase are made; `latest` holds the last logged values."""
        self._made += 1
        if self._quiet:
            return
        now = time.monotonic()
        pause = 0.2 if self._bar else 15.0
        if now - self._told < pause and (self._bar or int(done * 10) == self._tenth) and done < 1:
            return
        room = self._bar.console.width - len(self._phase) - BAR - 2 if self._bar else 1000
        text = self._text(done, step, now - self._started, latest, room)
        self._told, self._tenth = now, int(done * 10)
        if self._bar:
            self._bar.update(self._task, completed=done, text=text, refresh=True)
        else:
            print(f"{self._phase} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the phase's bar and give the terminal back."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print one line to stderr, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self, done: float, step: int, seconds: float, latest: dict[str, float | None], room: int) -> str:
        """What is known, the most important first, as much of it as there is room for."""
        rate = (self._made - 1) / seconds if seconds > 0 else 0.0
        left = seconds * (1 - done) / (done - self._first) if done > self._first else math.nan
        remaining = f"{int(left) // 60}:{int(left) % 60:02d} left" if math.isfinite(left) else "-:-- left"
        values = [f"{name} {value:.4g}" for name, value in latest.items() if value is not None][:3]
        words = [f"{done:4.0%}", remaining, f"step {step}", *values, f"{rate:.3g} steps/s"]
        while len(words) > 1 and len(" · ".join(words)) > room:
            words.pop()
        return " · ".join(words)


class Metrics:
    """The rows of `metrics.jsonl`, and the same values as TensorBoard events.

    A part like any other: its state is how long the file is, and the sums of the row to come.

    Args:
        folder: the run's folder.
        group: the processes over which rows are averaged; the main one writes them.

    Attributes:
        latest: the last row's values.
    """

    def __init__(self, folder: Path, group: Processes) -> None:
        self._folder, self._group = folder, group
        self._pending: dict[str, tuple[Any, int]] = {}  # name → sum and count
        self._bytes = 0
        self._rows: int | None = None
        self._events: Any = None
        self.latest: dict[str, float | None] = {}

    def state_dict(self) -> dict[str, Any]:
        """The length of the file, forced to disk, and the sums of the row to come."""
        if self._rows is not None:
            os.fsync(self._rows)
        return {"bytes": self._bytes, "pending": self._pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; `open` then cuts off what was written after it."""
        self._bytes, self._pending = (
            state["bytes"],
            map_tree(lambda tensor: tensor.to(self._group.device), state["pending"]),
        )

    def open(self, purge: int | None) -> None:
        """Open the file in the main process, cut to its length.

        `purge` is the step from which TensorBoard is to forget what earlier sessions of the run wrote, if any.
        """
        self._purge = purge
        self._rows = os.open(self._folder / "metrics.jsonl", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._bytes = min(self._bytes, os.fstat(self._rows).st_size)
        os.ftruncate(self._rows, self._bytes)

    def add(self, scalars: Mapping[str, float | int | Tensor]) -> None:
        """Take values into the row to come. Tensors stay on their device."""
        for name, value in scalars.items():
            if name in ("phase", "step", "seconds"):
                raise ValueError(f"{name!r} is a column of every row already")
            if isinstance(value, Tensor):
                value = value.detach().to(self._group.device, torch.float32).reshape(())
            total, count = self._pending.get(name, (0.0, 0))
            self._pending[name] = (total + value, count + 1)

    def write_row(self, phase: str, step: int, seconds: float, total_steps: int) -> None:
        """Write the means over steps and processes of what was taken in since the last row, if anything was.

        `total_steps` counts over all phases: TensorBoard has one axis only.

        Raises:
            OSError: the disk is full.
        """
        if not self._pending:
            return
        totals, counts = zip(*self._pending.values(), strict=True)
        tensors = [total for total in totals if isinstance(total, Tensor)]
        read = iter(
            torch.stack(tensors).tolist() if tensors else []
        )  # the one moment at which the device is waited for
        sums = self._group.sum(*(next(read) if isinstance(total, Tensor) else total for total in totals), *counts)
        means = [total / count for total, count in zip(sums, sums[len(totals) :], strict=False)]
        self.latest = {
            name: float(f"{mean:.7g}") if math.isfinite(mean) else None
            for name, mean in zip(self._pending, means, strict=True)
        }
        self._pending = {}
        row = {"phase": phase, "step": step, "seconds": round(seconds, 3), **self.latest}
        self._group.together(lambda: self._write(row, total_steps))

    def close(self) -> None:
        """Close the files."""
        if self._rows is not None:
            os.close(self._rows)
            self._rows = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write(self, row: dict[str, Any], total_steps: int) -> None:
        assert self._rows is not None
        line = json.dumps(row).encode() + b"\n"
        while line:  # a nearly full disk takes a part of it, and only then fails
            written = os.pwrite(self._rows, line, self._bytes)
            self._bytes, line = self._bytes + written, line[written:]
        self._write_event(row["phase"], self.latest, total_steps)

    def _write_event(self, phase: str, values: dict[str, float | None], step: int) -> None:
        # tensorboard's own writer works in a thread, where a full disk ends in a traceback instead of an error
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        if self._events is None:
            (self._folder / "tensorboard").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
            self._events = (self._folder / "tensorboard" / name).open("wb", buffering=0)
            first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
            if self._purge is not None:
                first.append(Event(step=self._purge, session_log=SessionLog(status=SessionLog.START)))
            for event in first:
                RecordWriter(self._events).write(event.SerializeToString())
        scalars = [
            Summary.Value(tag=f"{phase}/{name}", simple_value=math.nan if value is None else value)
            for name, value in values.items()
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        RecordWriter(self._events).write(event.SerializeToString())
