"""The commands as a user types them. What must survive a kill runs as a process of its own, the rest in this one."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import foveate
from foveate.cli import main
from foveate.run import Run
from foveate.terminal import print_table
from foveate.types import InputError

QUICK = ["--batch", "32", "--glimpses", "3", "--hidden", "32", "--variant", "plain", "--device", "cpu"]


def foveate_process(*words: str | Path, **options: object) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "foveate", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **options,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def weights(run: Path, part: str = "learned") -> bytes:
    return (sorted((run / "checkpoints").glob("[0-9]*"))[-1] / f"{part}.safetensors").read_bytes()


def curve(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with every control."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "ram", "--steps", "4", "--out", str(folder), *QUICK]) == 0
    return folder


def seconds(*words: str) -> tuple[float, str]:
    """Processor seconds of a command, so that a busy machine does not count, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, err = finish(foveate_process(*words))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0, err
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, out


def test_help_and_list_answer_within_two_seconds_and_without_torch() -> None:
    for words in (["--help"], ["list"], ["--version"]):
        took, out = seconds(*words)
        assert out.strip()
        assert took < 2
    check = "import sys, foveate.cli; foveate.cli.main(['list']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], stdout=subprocess.DEVNULL).returncode == 0


def test_help_of_a_system_names_its_fields_within_five_seconds() -> None:
    took, out = seconds("train", "ram", "--help")
    assert took < 5
    for field in (
        "--glimpses",
        "--minutes",
        "--seed",
        "--out",
        "--from",
        "--config",
        "--processes",
        "--data",
        "--root",
    ):
        assert field in out


def test_a_run_leaves_scores_pictures_and_a_report(trained: Path) -> None:
    for name in ("report.html", "evaluation.json", "metrics.jsonl", "run.json", "pictures/glimpse-paths.png"):
        assert (trained / name).stat().st_size > 0
    assert (trained / "pictures" / "glimpses.gif").stat().st_size > 0
    found = json.loads((trained / "evaluation.json").read_text())
    assert set(found["baselines"]) == {"random", "centre", "cnn"}
    assert "learned" in json.dumps(found["curves"])


def test_eval_prints_one_json_object_and_nothing_else(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"metrics", "baselines"}
    assert 0 <= printed["metrics"]["error"] <= 100
    assert printed == {k: v for k, v in json.loads((trained / "evaluation.json").read_text()).items() if k in printed}
    assert main(["eval", str(trained)]) == 0
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "first"), [("80", "found"), ("20", "found"), ("400", "the tuned model")])
def test_a_table_is_turned_on_its_side_and_never_cut_off(
    terminal: str, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", terminal)
    rows = {name: {f"metric {place}": 0.1234 + place for place in range(12)} for name in ("the tuned model", "start")}
    print_table({"the tuned model": {"found": "words"} | rows["the tuned model"], "start": rows["start"]})
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines)
    assert len(set(map(len, lines))) == 1  # no line is broken
    assert lines[3].split("│")[1].strip() == first
    assert all(f"{number:.4g}" in "".join(lines) for row in rows.values() for number in row.values())


def test_eval_on_data_it_never_saw(trained: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "evaluation.json").read_text()
    words = ["eval", str(trained), "--data", "mnist", "--root", str(shared_data), "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["error"] != json.loads(before)["metrics"]["error"]
    assert (trained / "evaluation.json").read_text() == before
    assert main(["eval", str(trained), "--root", str(shared_data)]) == 2  # its own digits lie in no folder
    assert "name what it holds: --data" in capsys.readouterr().err


def test_show_draws_the_users_picture(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    picture = tmp_path / "mine.png"
    Image.effect_noise((40, 40), 60).save(picture)
    assert main(["show", str(trained), str(picture)]) == 0
    files = capsys.readouterr().out.split()
    assert len(files) == 2
    assert all(Path(file).stat().st_size > 0 for file in files)


def test_what_the_users_folder_is_called_does_not_matter(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of the run itself stay, also where "." is shown; a dot in a name is part of it."""
    from PIL import Image

    folder, drawn = tmp_path / "week 1.5", {path: path.read_bytes() for path in (trained / "pictures").glob("*.*")}
    folder.mkdir()
    Image.effect_noise((40, 40), 60).save(folder / "mine.png")
    monkeypatch.chdir(folder)
    assert main(["show", str(trained), "."]) == 0
    assert {Path(line).parent for line in capsys.readouterr().out.splitlines()} == {trained / "pictures" / folder.name}
    assert all(path.read_bytes() == before for path, before in drawn.items())


def test_compare_draws_two_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other")
    out = tmp_path / "both.png"
    assert main(["compare", str(trained), str(tmp_path / "other"), "--out", str(out)]) == 0
    assert out.stat().st_size > 0


def test_data_check_draws_the_first_inputs(tmp_path: Path) -> None:
    assert main(["data", "check", "--variant", "cluttered60", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "data.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps: found a budget of 0"),
        ({}, "found neither"),
        ({"steps": 1, "out": "taken"}, "are not a run's"),
    ],
)
def test_what_needs_no_data_is_said_before_they_are_read(
    settings: dict[str, object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.jpg").write_text("")
    with pytest.raises(InputError, match=says):
        foveate.train("ram", data="mnist", root="nowhere", **settings)


def test_a_run_that_has_not_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A later phase may not have begun: what is shown is then not what the run is for."""
    log, calls = Run.log, []

    def killed(run: Run, **scalars: object) -> None:
        log(run, **scalars)
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", killed)
    settings = {"steps": 4, "controls": (), "batch": 8, "variant": "plain", "glimpses": 2, "hidden": 16}
    with pytest.raises(KeyboardInterrupt):
        foveate.train("ram", **settings, out=tmp_path / "run", device="cpu", checkpoint_steps=1)
    capsys.readouterr()
    foveate.load(tmp_path / "run", "cpu")
    assert "run: has not ended, its checkpoint is in learned after 2 steps" in capsys.readouterr().err
    foveate.resume(tmp_path / "run", "cpu")
    capsys.readouterr()
    foveate.load(tmp_path / "run", "cpu")
    assert capsys.readouterr().err == ""


def test_from_python(trained: Path, tmp_path: Path) -> None:
    agent = foveate.load(trained)
    images = torch.rand(3, 1, 28, 28)
    found = agent(images)
    assert found["classes"].shape == (3,)
    assert found["locations"].shape == (3, 3, 2)
    again = foveate.train("ram", steps=1, controls=(), batch=16, variant="plain", out=tmp_path / "run", device="cpu")
    assert again(images)["scores"].shape == (3, 10)
    with pytest.raises(InputError, match="images: 3 channels"):
        agent(torch.rand(2, 3, 28, 28))
    with pytest.raises(InputError, match=r"glimpse.*did you mean 'glimpses'"):
        foveate.train("ram", glimpse=3)


def test_a_run_starts_from_another_runs_weights(trained: Path, tmp_path: Path) -> None:
    words = ["train", "ram", "--steps", "1", "--controls", "--learning-rate", "0", *QUICK]
    assert main([*words, "--from", str(trained), "--out", str(tmp_path / "run")]) == 0
    there, here = (foveate.load(run, "cpu").policy.state_dict() for run in (trained, tmp_path / "run"))
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert f"--from {trained}" in (tmp_path / "run" / "report.html").read_text()  # the command makes this run again


def test_a_config_file_gives_defaults_and_typed_fields_go_before_it(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"steps": 2, "batch": 8, "glimpses": 2, "controls": [], "variant": "plain"}))
    assert main(["train", "ram", "--config", str(file), "--batch", "16", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (config["batch"], config["glimpses"], config["controls"]) == (16, 2, [])
    file.write_text(json.dumps({"step": 2}))
    assert main(["train", "ram", "--config", str(file), "--out", str(tmp_path / "no")]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "ram"], "did you mean 'train'"),
        (["train", "rma", "--steps", "1"], "did you mean 'ram'"),
        (["train", "ram", "--steps", "0"], "steps"),
        (["train", "ram", "--minutes", "0"], "minutes"),
        (["train", "ram"], "--minutes"),
        (["train", "ram", "--steps", "1", "--variant", "plain", "--patch", "29"], "patch"),
        (["train", "ram", "--steps", "1", "--data", "mnist"], "root"),
        (["train", "ram", "--steps", "1", "--data", "mnist", "--root", "nowhere"], "nowhere"),
        (["train", "ram", "--steps", "1", "--data", "mnits"], "mnist"),
        (["train", "ram", "--steps", "1", "--device", "tpu"], "device"),
        (["train", "ram", "--steps", "1", "--batch", "0"], "batch"),
        (["train", "ram", "--steps", "1", "--glimpses", "0"], "glimpses"),
        (["train", "ram", "--steps", "1", "--samples", "1", "--baseline", "leave-one-out"], "samples"),
        (["train", "ram", "--steps", "1", "--learning-rate", "nan"], "learning_rate"),
        (["train", "ram", "--steps", "1", "--seed", str(2**70)], "seed"),
        (["train", "ram", "--steps", "1", "--processes", "0"], "processes"),
        (["train", "ram", "--steps", "1", "--control-share", "1"], "control_share"),
        (["train", "ram", "--steps", "1", "--glimpse-network", "cnn", "--patch", "1"], "patch"),
        (["train", "ram", "--steps", "1", "--image-size", "2", "--patch", "1", "--variant", "plain"], "controls"),
        (["train", "foveating-grid", "--steps", "1", "--control-share", "0"], "control_share"),
        (["train", "foveating-grid", "--steps", "1", "--hidden", "0"], "hidden"),
        (["train", "foveating-grid", "--steps", "1", "--std", "0"], "std"),
        (["train", "foveating-grid", "--steps", "1", "--batch", "0"], "batch"),
        (
            ["train", "foveating-grid", "--steps", "1", "--credit", "answer", "--baseline", "leave-one-out"],
            "samples",
        ),
        (["eval", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "nowhere"),
        (["show", "nowhere"], "nowhere"),
        (["compare", "nowhere"], "nowhere"),
        (["bench", "rma"], "did you mean"),
        (["data", "chekc"], "data check"),
        (["train", "ram", "--root", "pictures", "--steps", "1"], "root: pictures would not be read"),
        (["train", "tune-detector", "--root", "cells", "--steps", "1"], "data 'scenes' needs no folder"),
        (["data", "check", "colorization", "--root", "holiday"], "name what it holds: --data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "train":
        words = [*words, "--out", "run"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left half-written"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("core", "gru", "rnn, lstm"),
        ("baseline", "foo", "leave-one-out"),
        ("controls", ["rnadom"], "random"),
        ("classify", "first", "last, every"),
        ("batch", "8", "int"),
        ("glimpses", 2.5, "int"),
        ("root", 3, "Path"),
    ],
)
def test_a_config_file_with_a_wrong_value_is_refused(
    name: str, value: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"steps": 1, "minutes": 3, name: value}))  # a whole number of minutes is no mistake
    assert main(["train", "ram", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in (str(file), name, repr(value) if value != ["rnadom"] else "rnadom", expected))
    assert not (tmp_path / "run").exists()


def test_a_single_glimpse_is_trained(tmp_path: Path) -> None:
    """Nothing is chosen then, so there is nothing to reinforce, and nothing to divide by."""
    words = ["train", "ram", "--steps", "2", "--controls", "--out", str(tmp_path / "run"), *QUICK, "--glimpses", "1"]
    assert main(words) == 0


def test_a_mistyped_field_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "ram", "--glimpse", "3", "--steps", "1"])
    assert stopped.value.code == 2
    assert "--glimpses" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unless_asked(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "ram", "--steps", "1", "--controls", "--out", str(folder), *QUICK]
    assert main(words) == 0
    kept = weights(folder)
    assert main(words) == 2
    assert weights(folder) == kept
    assert main([*words, "--overwrite"]) == 0


def test_resuming_another_system_or_version_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"foveate": "99.0.0"}))
    assert main(["resume", str(folder)]) == 2
    assert "99.0" in capsys.readouterr().err
    (folder / "run.json").write_text(json.dumps(record | {"system": "seednet"}))
    assert main(["resume", str(folder)]) == 2
    assert "seednet" in capsys.readouterr().err


def test_damaged_files_and_bad_places_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "run", tmp_path / "file"
    file.write_text("")
    shutil.copytree(trained, folder)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"phase": "learned", "st')  # as a kill leaves it
    assert main(["compare", str(trained), str(folder), "--out", str(tmp_path / "curves.png")]) == 0
    assert main(["compare", str(trained), str(folder), "--out", str(tmp_path / "curves")]) == 2
    assert "curves.png" in capsys.readouterr().err
    assert main(["data", "check", "--out", str(file)]) == 1
    assert str(file) in capsys.readouterr().err
    (folder / "run.json").write_text((folder / "run.json").read_text()[:50])
    assert main(["resume", str(folder)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_full_disk_while_scoring_keeps_the_scores_there_are(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    code, _, err = finish(foveate_process("eval", folder, "--device", "cpu", preexec_fn=small_disk))
    assert code == 1
    assert err.count("\n") == 1, err
    assert (folder / "evaluation.json").read_bytes() == (trained / "evaluation.json").read_bytes()


def test_weights_of_another_run_survive_a_kill_before_the_first_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "ram", "--steps", "1", "--controls", "--learning-rate", "0", *QUICK]
    source = shutil.copytree(trained, tmp_path / "source")
    assert main([*words, "--from", str(source), "--out", str(folder)]) == 0
    source.rename(tmp_path / "gone")
    assert main(["resume", str(folder), "--device", "cpu"]) == 0, "a checkpoint needs no source"
    (tmp_path / "gone").rename(source)
    shutil.rmtree(folder / "checkpoints")
    assert main(["resume", str(folder), "--device", "cpu"]) == 0
    there, here = (foveate.load(run, "cpu").policy.state_dict() for run in (trained, folder))
    assert all(torch.equal(there[name], here[name]) for name in there)


LONG = ["--steps", "80", "--checkpoint-steps", "5", "--controls", "random", *QUICK]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = finish(foveate_process("train", "ram", *LONG, "--out", folder))
    assert code == 0, err
    return folder


def killed(folder: Path) -> None:
    """Begin the same run and kill it at a random moment after its second checkpoint."""
    process = foveate_process("train", "ram", *LONG, "--out", folder)
    while len(list((folder / "checkpoints").glob("[0-9]*"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(time.time_ns()).uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    finish(process)


def test_killed_and_resumed_ends_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed(folder)
    code, _, err = finish(foveate_process("resume", folder))
    assert code == 0, err
    assert weights(folder) == weights(uninterrupted)
    assert weights(folder, "random") == weights(uninterrupted, "random")
    assert curve(folder) == curve(uninterrupted)


def test_a_checkpoint_cut_in_half_is_passed_over_and_said_so(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed(folder)
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    file = newest / "learned.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    code, _, err = finish(foveate_process("resume", folder))
    assert code == 0, err
    assert newest.name in err
    assert weights(folder) == weights(uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = foveate_process("train", "ram", *LONG, "--out", folder)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert f"foveate resume {folder}" in err
    assert "Traceback" not in err
    code, _, err = finish(foveate_process("resume", folder))
    assert code == 0, err
    assert weights(folder) == weights(uninterrupted)


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    # A small learning rate: Adam turns the rounding of a sum into steps of full size, and sampling then spreads them.
    words = ["train", "ram", "--steps", "40", "--controls", "--batch", "64", "--variant", "plain", "--device", "cpu"]
    words += ["--learning-rate", "2e-4"]
    code, _, err = finish(foveate_process(*words, "--out", tmp_path / "one"))
    assert code == 0, err
    code, _, err = finish(foveate_process(*words, "--out", tmp_path / "two", "--processes", "2"))
    assert code == 0, err
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", "ram", *LONG, "--out", folder]
    process = foveate_process(*words)
    while not list((folder / "checkpoints").glob("[0-9]*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finish(process)
    kept = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, _, err = finish(foveate_process("resume", folder, preexec_fn=small_disk))
    assert code == 1, err
    assert "Traceback" not in err
    assert str(folder) in err.splitlines()[-1]
    assert kept.is_dir()
    assert foveate.load(folder, "cpu")(torch.rand(1, 1, 28, 28))["classes"].shape == (1,)


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code = main(["train", "ram", "--steps", "1", "--out", str(tmp_path / "file" / "run"), *QUICK])
    assert code in (1, 2)
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_diverged_run_names_step_and_last_good_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["train", "ram", "--steps", "200", "--checkpoint-steps", "1", "--learning-rate", "1e30", *QUICK]
    assert main([*words, "--out", str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    kept = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    assert "step" in said
    assert kept.name in said
