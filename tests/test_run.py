"""Runs: killed, interrupted, short of disk, diverged or split over processes, they end as they should."""

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate import noise
from foveate.learn.replay import Replay
from foveate.run import Run, RunError, checkpoints
from foveate.run import folder as folders
from foveate.types import InputError

SIZE, BATCH = 200, 64
STEPS, LAST = 66, "0-00000066"
SMALL = {"checkpoint_steps": 7, "device": "cpu", "quiet": True}


class Counter:
    """A part whose state differs between processes."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"].clone()


class Stop(Exception):
    pass


def train(
    folder: Path,
    *,
    phases: tuple[str, ...] = ("train",),
    stop_at: tuple[str, int] | None = None,
    nan_at: int | None = None,
    limit_at: int | None = None,
    wait: float = 0.0,
    dropout: float = 0.2,
    bytes: int = 0,
    **budget: Any,
) -> tuple[nn.Module, Counter, Run]:
    """Fit a net of two layers to a noisy sum, through `Run`, in one phase or several."""
    torch.set_num_threads(1)
    run = Run(folder, system="sum", config={"dropout": dropout, "phases": phases}, **{**SMALL, **budget})
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    net, optimizer, counter = run.track(net=net, optimizer=optimizer, counter=Counter())
    (replay,) = run.track(replay=Replay(torch.zeros(BATCH // run.processes, dtype=torch.int64), 80))
    for phase in phases:
        for step in run.steps(phase, 1 / len(phases)):
            rows = noise.examples(run.seed, step, BATCH, SIZE)[run.rows(BATCH)]
            inputs = noise.normal(noise.key("inputs", rows), 4)
            mask = noise.uniform(noise.key(run.seed, phase, step, rows)) < 0.7
            error = (net(inputs).squeeze(-1) - inputs.sum(-1)) ** 2
            loss = (error * mask).sum() / run.count(mask)
            if step == nan_at:
                loss = loss * math.nan
            run.optimise(loss, optimizer, clip=5.0)
            counter.total += rows.sum()
            replay.write(rows, torch.zeros_like(rows), error.detach(), mask, mask, mask)
            run.log(loss=loss, progress=run.progress)
            if stop_at == (phase, step):
                raise Stop
            if step == limit_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
            time.sleep(wait)
    return net, counter, run


def rows(folder: Path, without: str = "seconds") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != without} for line in lines]


def weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def saved(folder: Path) -> list[str]:
    """The checkpoints, all of which must verify."""
    found = checkpoints.listed(folder / "checkpoints")
    for path in found:
        checkpoints.verify(path)
    return [path.name for path in found]


class Child:
    """`train` in a process of its own, forked from a clean one that has imported what takes long."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None, **arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["foveate.run", "accelerate", "tensorboard.compat.proto.event_pb2"])
        self.outputs = [folder.parent / f"{folder.name}.{name}.{time.monotonic_ns()}" for name in ("out", "err")]
        self.process = context.Process(target=_program, args=(self.outputs, environment or {}, folder, arguments))
        self.process.start()

    def end(self) -> tuple[int | None, str, str]:
        """Exit code, stdout and stderr."""
        self.process.join(90)
        out, err = (path.read_text() for path in self.outputs)
        return self.process.exitcode, out, err

    def until_saved(self, folder: Path, name: str) -> None:
        while not any(path.name >= name for path in checkpoints.listed(folder / "checkpoints")):
            assert self.process.is_alive(), self.end()
            time.sleep(0.005)


def _program(outputs: list[Path], environment: dict[str, str], folder: Path, arguments: dict[str, Any]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    try:
        train(folder, **arguments)
    except (RunError, InputError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # stderr is a file
        sys.exit(str(error))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing files to disk matters when the power fails, which no test makes happen; children do it all the same."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Counter]:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    net, counter, _ = train(folder, steps=STEPS)
    return folder, net, counter


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    one, two, other = (train(tmp_path / str(name), steps=5, seed=seed)[0] for name, seed in enumerate((3, 3, 4)))
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_what_a_run_leaves_behind(whole: tuple[Path, nn.Module, Counter]) -> None:
    folder = whole[0]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "run.json", "tensorboard"]
    record = json.loads((folder / "run.json").read_text())
    assert record["system"] == "sum"
    assert record["config"] == {"dropout": 0.2, "phases": ["train"]}
    assert (record["seed"], record["steps"], record["minutes"], record["processes"]) == (0, STEPS, None, 1)
    assert record["torch"] == str(torch.__version__)
    assert saved(folder) == ["0-00000063", LAST]
    table = rows(folder)
    assert [row["step"] for row in table] == [20, 40, 60, STEPS]
    assert {row["phase"] for row in table} == {"train"}
    assert table[0]["progress"] == pytest.approx(sum(range(20)) / 20 / STEPS)
    assert table[-1]["progress"] == pytest.approx(sum(range(60, 66)) / 6 / STEPS)
    assert table[-1]["loss"] < table[0]["loss"] / 2
    assert all(not path.read_bytes().startswith(b"\x80") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("step", [6, 29, STEPS - 1])
def test_a_run_that_failed_and_was_resumed_ends_as_if_it_had_not(
    tmp_path: Path, whole: tuple[Path, nn.Module, Counter], step: int
) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "run", steps=STEPS, stop_at=("train", step))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    net, counter, _ = train(tmp_path / "run", resume=True)
    assert torch.equal(weights(net), weights(whole[1]))
    assert counter.total == whole[2].total
    assert rows(tmp_path / "run") == rows(whole[0])
    again, _, run = train(tmp_path / "run", resume=True)  # nothing is left to do
    assert torch.equal(weights(again), weights(net))
    assert run.progress == 1
    assert rows(tmp_path / "run") == rows(whole[0])


def test_phases_share_the_budget_and_resume_where_they_were(tmp_path: Path) -> None:
    phases = ("first", "second", "third")
    net, _, _ = train(tmp_path / "whole", phases=phases, steps=100)
    assert [(row["phase"], row["step"]) for row in rows(tmp_path / "whole")] == [
        (phase, step) for phase in phases for step in (20, 33)
    ]
    for number, stop in enumerate([("first", 30), ("second", 0), ("third", 32)]):
        with pytest.raises(Stop):
            train(tmp_path / str(number), phases=phases, steps=100, stop_at=stop)
        resumed, _, _ = train(tmp_path / str(number), phases=phases, resume=True)
        assert torch.equal(weights(resumed), weights(net))
        assert rows(tmp_path / str(number)) == rows(tmp_path / "whole")


def test_tensorboard_shows_each_row_once_however_often_the_run_was_resumed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    budget: dict[str, Any] = {"phases": ("one", "two"), "steps": 100}
    for stop, resume in ((("one", 45), False), (("two", 25), True), (None, True)):
        with contextlib.suppress(Stop):
            train(tmp_path / "run", **budget, stop_at=stop, resume=resume)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for phase, before in (("one", 0), ("two", 50)):
        shown = [(event.step, event.value) for event in events.Scalars(f"{phase}/loss")]
        written = [(row["step"] + before, row["loss"]) for row in rows(tmp_path / "run") if row["phase"] == phase]
        assert [step for step, _ in shown] == [step for step, _ in written]
        assert [value for _, value in shown] == pytest.approx([value for _, value in written])


@pytest.mark.parametrize("cut", ["state.json", "net.safetensors"])
def test_a_cut_checkpoint_is_passed_over_and_that_is_said(
    tmp_path: Path, whole: tuple[Path, nn.Module, Counter], capfd: pytest.CaptureFixture[str], cut: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        train(folder, steps=STEPS, stop_at=("train", 50))
    file = folder / "checkpoints" / "0-00000049" / cut
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capfd.readouterr()
    net, _, _ = train(folder, resume=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "0-00000049 is damaged" in err
    assert torch.equal(weights(net), weights(whole[1]))
    assert rows(folder) == rows(whole[0])


def test_without_any_checkpoint_a_run_starts_over_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "run", steps=30, stop_at=("train", 2))
    net, _, _ = train(tmp_path / "run", resume=True)
    assert "starting from the beginning" in capfd.readouterr().err
    assert torch.equal(weights(net), weights(train(tmp_path / "other", steps=30)[0]))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = Child(folder, steps=STEPS, limit_at=30, bytes=1500).end()
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert "cannot be written (File too large)" in err
    assert f"foveate resume {folder}" in err
    assert saved(folder) == ["0-00000021", "0-00000028"]
    assert "0-00000028" in err
    net, _, _ = train(folder, resume=True)
    assert torch.equal(weights(net), weights(train(tmp_path / "other", steps=STEPS)[0]))


def test_no_space_left_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run(tmp_path / "run", system="s", config={}, steps=9, **SMALL)
    with pytest.raises(RunError, match=r"No space left on device.*0-00000003"):  # noqa: PT012
        for step in run.steps():
            if step == 2:
                run.save()
                monkeypatch.setattr(os, "fsync", full)
    assert saved(tmp_path / "run") == ["0-00000003"]


def test_nan_stops_the_run_and_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss is nan at step 37 of phase train.*0-00000035") as caught:
        train(tmp_path / "run", steps=STEPS, nan_at=37)
    assert "\n" not in str(caught.value)
    assert saved(tmp_path / "run") == ["0-00000028", "0-00000035"]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))


def test_nothing_is_stepped_or_saved_after_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=9, **SMALL)
    net = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    run.track(net=net, optimizer=optimizer)
    before = net.weight.item()
    for _ in run.steps():
        with pytest.raises(RunError, match=r"the gradient's norm is inf at step 0"):
            run.optimise(torch.sqrt(net(torch.ones(1, 1)).sum() - before), optimizer)
        assert net.weight.item() == before
        with pytest.raises(RunError, match="nothing is saved after"):
            run.save()
        break
    assert saved(tmp_path / "run") == []


def test_ctrl_c_twice_saves_and_says_how_to_go_on(tmp_path: Path, whole: tuple[Path, nn.Module, Counter]) -> None:
    folder = tmp_path / "run"
    child = Child(folder, steps=STEPS, wait=0.02)
    child.until_saved(folder, "0-00000007")
    for _ in range(2):
        os.kill(child.process.pid or 0, signal.SIGINT)
        time.sleep(0.005)
    code, out, err = child.end()
    assert code == 130, err
    assert out == ""
    assert err.rstrip().endswith(f"to go on: foveate resume {folder}")
    assert "Traceback" not in err
    assert saved(folder)
    net, _, _ = train(folder, resume=True)
    assert torch.equal(weights(net), weights(whole[1]))
    assert rows(folder) == rows(whole[0])


def test_ctrl_c_while_saving_waits_and_a_late_second_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=9, **SMALL)
    write = checkpoints.write_part

    def pressed(*arguments: Any) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_part", pressed)
    with pytest.raises(SystemExit, match="130"):  # noqa: PT012
        for step in run.steps():
            if step == 3:
                run.save()
    assert saved(tmp_path / "run")[0] == "0-00000004"

    monkeypatch.setattr(checkpoints, "write_part", write)
    run = Run(tmp_path / "run", system="s", config={}, resume=True, **SMALL)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for _ in run.steps():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second Ctrl-C was swallowed")
    assert saved(tmp_path / "run")


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def together(folder: Path, **arguments: Any) -> list[Child]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    return [Child(folder, {**shared, "RANK": rank, "LOCAL_RANK": rank}, **arguments) for rank in "01"]


def test_two_processes_are_one_with_the_same_batch_even_if_interrupted(tmp_path: Path) -> None:
    _, whole, _ = train(tmp_path / "one", steps=60, dropout=0.0)
    pair = together(tmp_path / "two", steps=60, dropout=0.0, wait=0.02)
    pair[0].until_saved(tmp_path / "two", "0-00000007")
    os.kill(pair[0].process.pid or 0, signal.SIGINT)  # the other stops at the same step without having been asked
    for child in pair:
        code, _, err = child.end()
        assert code == 130, err
    assert saved(tmp_path / "two")[-1] < "0-00000060"

    with pytest.raises(InputError, match="its processes is 2, not 1"):
        train(tmp_path / "two", dropout=0.0, resume=True)
    for child in together(tmp_path / "two", dropout=0.0, resume=True):
        code, _, err = child.end()
        assert code == 0, err
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [20, 40, 60]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    last = checkpoints.listed(tmp_path / "two" / "checkpoints")[-1]
    nets = [checkpoints.read_part(checkpoints.listed(tmp_path / n / "checkpoints")[-1], "net") for n in ("one", "two")]
    for name in nets[0]:
        torch.testing.assert_close(nets[1][name], nets[0][name], atol=1e-5, rtol=1e-5)
    seen = [checkpoints.read_part(last, name)["total"] for name in ("counter", "counter.1")]
    assert seen[0] != seen[1]
    assert sum(seen) == whole.total
    ours = checkpoints.read_part(checkpoints.listed(tmp_path / "one" / "checkpoints")[-1], "replay")
    parts = [checkpoints.read_part(last, name) for name in ("replay", "replay.1")]
    for name in ("state_0", "taken"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), ours[name]), "each process's own go on"


def test_what_belongs_to_a_process_is_found_where_only_the_main_one_had_saved_it(tmp_path: Path) -> None:
    """As runs of several processes were saved once; and a network is the main process's in all."""
    train(tmp_path / "run", steps=3)
    run, replay, net = Run.open(tmp_path / "run"), Replay(torch.zeros(BATCH).long(), 80), nn.Linear(4, 8)
    run._group.rank = 1
    assert run.restore("replay", replay)
    assert int(replay.written) == 3
    assert run._group.file("replay", replay) == "replay.1"
    assert run._group.file("net", net) == "net"


def test_rows_are_shared_out_equally_or_not_at_all(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=1, **SMALL)
    assert run.rows(7) == slice(0, 7)
    run.processes, run.rank = 4, 2
    assert run.rows(64) == slice(32, 48)
    with pytest.raises(InputError, match="batch: found 66, expected a multiple of the 4 processes"):
        run.rows(66)


def test_minutes_are_shared_by_phases_and_do_not_count_while_the_run_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr("foveate.run.loop.time", SimpleNamespace(monotonic=lambda: clock))
    run = Run(tmp_path / "run", system="s", config={}, minutes=2, device="cpu", quiet=True)
    seen = []
    for step in run.steps("a", 0.25):  # 30 seconds
        seen.append((step, run.progress))
        clock += 4.0
    assert seen == [(step, pytest.approx(step * 4 / 30)) for step in range(8)]
    with pytest.raises(Stop):  # noqa: PT012
        for step in run.steps("b", 0.75):  # 90 seconds
            clock += 10
            if step == 4:
                run.save()
                raise Stop
    clock += 10_000
    run = Run(tmp_path / "run", system="s", config={}, device="cpu", quiet=True, resume=True)
    assert list(run.steps("a", 0.25)) == []
    steps = []
    for step in run.steps("b", 0.75):
        steps.append((step, run.progress))
        clock += 10
    assert [step for step, _ in steps] == [4 + 1, 6, 7, 8, 9]  # the step that saved took no time before it saved
    assert [progress for _, progress in steps] == pytest.approx([4 / 9, 5 / 9, 6 / 9, 7 / 9, 8 / 9])


def test_with_both_budgets_the_first_to_be_used_up_ends_the_phase(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", system="s", config={}, minutes=60, steps=4, **SMALL)
    assert list(run.steps(share=0.5)) == [0, 1]
    assert list(run.steps("one at least", share=0.01)) == [0]
    run = Run(tmp_path / "b", system="s", config={}, minutes=1e-9, steps=4, **SMALL)
    assert list(run.steps()) == [0]


def test_a_checkpoint_every_thirty_seconds_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("foveate.run.loop.time", SimpleNamespace(monotonic=lambda: clock))
    run = Run(tmp_path / "run", system="s", config={}, steps=10, device="cpu", quiet=True)
    times = []
    monkeypatch.setattr(run, "save", lambda save=run.save: (times.append(clock), save()))
    for _ in run.steps():
        clock += 8
    assert times == [32, 64, 80]


def _others(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"system": "other"}, "its system is 's', not 'other'"
    yield {"seed": 1}, "its seed is 0, not 1"
    yield {"config": {"lr": 2}}, "its lr is 1, not 2"
    yield {"config": {"lr": 1, "more": True}}, "its more is None, not True"


def test_another_run_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ours = tmp_path / "run", {"system": "s", "config": {"lr": 1, "steps": 3}, "seed": 0}
    list(Run(folder, **ours, steps=3, **SMALL).steps())
    for change, message in _others(folder):
        with pytest.raises(InputError, match=message):
            Run(folder, **{**ours, **change}, steps=3, resume=True, **SMALL)
    longer = {**ours, "config": {"lr": 1, "steps": 5}}
    Run(folder, **longer, steps=5, resume=True, **SMALL)  # a budget may change
    with pytest.raises(InputError, match="its phase 0 is 'train', not 'warm-up'"):
        next(Run(folder, **ours, resume=True, **SMALL).steps("warm-up"))
    monkeypatch.setattr(folders, "version", lambda name: "0.99.3")
    with pytest.raises(InputError, match=r"made by foveate 0\.\d.*, this is 0\.99\.3; install that version"):
        Run(folder, **ours, resume=True, **SMALL)


def test_a_folder_in_use_is_only_overwritten_if_it_is_a_run_and_only_what_is_of_the_run(tmp_path: Path) -> None:
    folder, ours = tmp_path / "run", {"system": "s", "config": {}, "steps": 3, **SMALL}
    list(Run(folder, **ours).steps())
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a run already; .*--out.*--overwrite.*foveate resume"):
        Run(folder, **ours)
    run = Run(folder, **ours, overwrite=True)
    assert saved(folder) == ["0-00000003"]  # nothing is lost before the first step
    next(run.steps())
    assert saved(folder) == []
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "home" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="files that are not a run's"):
        Run(tmp_path / "home", **ours, overwrite=True)
    with pytest.raises(InputError, match="found no run"):
        Run(tmp_path / "home", system="s", config={}, resume=True)
    (folder / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged record"):
        Run.open(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "steps, minutes: found neither"),
        ({"steps": 0}, "steps: found a budget of 0"),
        ({"minutes": 0}, "minutes: found a budget of 0"),
        ({"minutes": math.nan}, "minutes: found a budget of nan"),
        ({"steps": 5, "minutes": -1.0}, "minutes: found a budget of -1"),
        ({"steps": 5, "checkpoint_steps": 0}, "checkpoint_steps: found a budget of 0"),
        ({"steps": 5, "device": "gpu"}, "device: 'gpu' is unknown; choose auto or one that is here: .*cpu"),
        ({"steps": 5, "device": "cuda:99"}, "device: 'cuda:99' is not on this machine"),
        ({"steps": 5, "device": "meta"}, "device: 'meta' is not on this machine"),
    ],
)
def test_bad_budgets_and_devices_write_nothing(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Run(tmp_path / "run", system="s", config={}, **{"device": "cpu", **given})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "deeper" / "run", tmp_path / "file"):
        with pytest.raises(InputError, match="file is a file; choose another --out"):
            Run(folder, system="s", config={}, steps=1)


def test_a_run_opened_for_reading_gives_its_parts(whole: tuple[Path, nn.Module, Counter]) -> None:
    folder, trained, _ = whole
    run = Run.open(folder, "cpu")
    assert (run.system, run.seed, run.config["dropout"]) == ("sum", 0, 0.2)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 1))
    assert run.restore("net", net)
    assert torch.equal(weights(net), weights(trained))
    assert not run.restore("critic", net)
    with pytest.raises(InputError, match=r"0-00000066: its net does not fit"):
        run.restore("net", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="opened for reading"):
        next(run.steps())


def test_two_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=1, **SMALL)
    (part,) = run.track(part=Counter())
    run.track(part=part)
    with pytest.raises(ValueError, match="another part is tracked as 'part'"):
        run.track(part=Counter())


def test_gradients_of_chunks_add_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=1, **SMALL)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    inputs, before = torch.randn(6, 3), net.weight.detach().clone()
    (net(inputs[:2]).sum() / 6).backward()
    run.optimise(net(inputs[2:]).sum() / 6, optimizer)
    torch.testing.assert_close(before - net.weight, inputs.mean(0, keepdim=True))
    assert net.weight.grad is None


def test_rows_are_means_over_twenty_steps_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", system="s", config={}, steps=25, **SMALL)
    for step in run.steps():
        run.log(a=torch.tensor(step), b=step, c=math.inf)
        run.log(a=torch.tensor(step + 1.0, dtype=torch.bfloat16))
        if step == 7:
            run.log(rare=0.1)
    first, second = rows(tmp_path / "run")
    assert first == {"phase": "train", "step": 20, "a": 10.0, "b": 9.5, "c": None, "rare": 0.1}
    assert second == {"phase": "train", "step": 25, "a": 22.5, "b": 22.0, "c": None}
    with pytest.raises(ValueError, match="'step' is a column"):
        run.log(step=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_goes_to_stderr_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: type[io.StringIO]
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := stream())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run = Run(tmp_path / "run", system="s", config={}, steps=40, device="cpu")
    for step in run.steps("looking"):
        run.log(reward=step)
        if step == 30:
            run.say("a [bold] word about /a/long/path/" + 30 * "deep/")
        if step == 20 and stream is Terminal:
            time.sleep(0.25)
    text = shown.getvalue()
    assert capsys.readouterr().out == ""
    assert "a [bold] word about /a/long/path/" + 30 * "deep/" in text
    assert "100% · 0:00 left · step 40" in text
    assert "reward 29.5" in text
    assert "steps/s" in text
    assert "left" in text
    if stream is io.StringIO:
        assert text.count("looking") == 10
        assert "\x1b" not in text
    else:
        assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_the_terminal_is_given_back_when_the_body_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(Stop):
        train(tmp_path / "run", steps=9, stop_at=("train", 2), quiet=False)
    assert shown.getvalue().count("\x1b[?25h") == 1


def test_heavy_libraries_are_not_imported_with_the_module() -> None:
    code = "import sys, foveate.run; print({'accelerate', 'rich', 'tensorboard', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_record_names_the_commit_of_the_source_wherever_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folders.describe("test", {}, 0, {})["commit"]
    monkeypatch.chdir(tmp_path)
    assert folders.describe("test", {}, 0, {})["commit"] == here
    asked = ["git", "-C", Path(__file__).parent, "rev-parse", "--is-inside-work-tree"]
    inside = subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "true"
    assert (here is not None) == inside
