"""A run's folder: its record in run.json, and who may begin, resume or overwrite a run there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from foveate.run.checkpoints import write_atomically
from foveate.types import InputError

RECORD = "run.json"
CONTENTS = ("checkpoints", "tensorboard", "metrics.jsonl", "pictures", "evaluation.json", "report.html", RECORD)
_BUDGET = ("steps", "minutes")


def describe(system: str, config: dict[str, Any], seed: int, others: dict[str, Any]) -> dict[str, Any]:
    """The record of a new run: what it is, and what made it."""
    return {
        "system": system,
        "foveate": version("foveate"),
        "torch": str(torch.__version__),
        "config": json.loads(json.dumps(config, default=str)),
        "seed": seed,
        **others,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def read(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        return {**record, "system": record["system"], "config": record["config"], "seed": record["seed"]}
    except OSError as error:
        raise InputError(
            f"{folder}: found no run ({RECORD} cannot be read); give a folder made by foveate train"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RECORD}: found a damaged record, expected JSON of a run; train anew") from error


def resumed(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of the run in a folder that `record` is to resume; the budget is `record`'s, if that has one.

    Raises:
        InputError: it is another run: of another system, config, seed, number of processes or minor version.
    """
    saved = read(folder)
    if _minor(saved.get("foveate", "?")) != _minor(record["foveate"]):
        versions = f"foveate {saved.get('foveate')}, this is {record['foveate']}"
        raise InputError(f"{folder}: was made by {versions}; install that version, or train anew")
    fields = sorted({*saved["config"], *record["config"]} - {*_BUDGET, "seed"})
    pairs = [(name, saved.get(name), record[name]) for name in ("system", "seed", "processes")]
    pairs += [(name, saved["config"].get(name), record["config"].get(name)) for name in fields]
    for name, before, now in pairs:
        if before != now:
            raise InputError(
                f"{folder}: its {name} is {before!r}, not {now!r}; resume it with its own, or choose another --out"
            )
    if any(record[name] is not None for name in _BUDGET):
        return {**saved, **{name: record[name] for name in _BUDGET}}
    return saved


def check_budget(steps: int | None, minutes: int | float | None) -> None:
    """Check what a run may last.

    Raises:
        InputError: neither is given, or one is not above 0.
    """
    check_positive(steps=steps, minutes=minutes)
    if steps is None and minutes is None:
        raise InputError("steps, minutes: found neither, expected a budget; give one, e.g. --minutes 3")


def check_positive(**budgets: int | float | None) -> None:
    """Check numbers of steps or minutes, by their names; None is none."""
    for field, value in budgets.items():
        if value is not None and not value > 0:
            raise InputError(f"{field}: found a budget of {value:g}, expected more than 0")


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a run may begin in a folder.

    Raises:
        InputError: there is a run already and it is not to be overwritten, there is something else, or nobody may
            write there.
    """
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        if not (folder / RECORD).is_file():
            raise InputError(
                f"{folder}: found files that are not a run's, expected an empty folder; choose another --out"
            )
        if not overwrite:
            raise InputError(
                f"{folder}: holds a run already; choose another --out, delete it with --overwrite, or go on with: "
                f"foveate resume {folder}"
            )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{folder}: cannot be made, {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {existing} is not writable; choose another --out")


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder, delete the run in it if there is one (only what runs are known to write), write the record."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CONTENTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    write(folder, record)


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write the record."""
    write_atomically(folder / RECORD, json.dumps(record, indent=1).encode())


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


def _commit() -> str | None:
    """Of the source that runs, wherever it was started from; None if it is installed rather than checked out."""
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
            found = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=5, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
