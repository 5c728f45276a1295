"""Write rows of docs/results.md from the files of runs: python benchmarks/results.py RUN [RUN ...].

docs/results.json is the source: each run's run.json and evaluation.json, and its minutes, one entry for each system,
data, settings (among them the run it went on from), seed, budget and number of processes, replaced by a later run of
the same. The table between the markers of docs/results.md is made anew from it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.report import format_column
from foveate.run.checkpoints import write_atomically
from foveate.types import InputError

Row = dict[str, Any]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
OWN_COLUMNS = ("data", "root", "variant", "seed", "steps", "minutes", "channels", "classes")
LAYOUTS = ("coco", "folder", "pairs", "voc")  # which say nothing without the name of their folder
KEY = ("system", "data", "variant", "settings", "seed", "budget", "processes")
DOCS = Path(__file__).parents[1] / "docs"


def read_rows(run: Path) -> list[Row]:
    """The entry of a run, and one for each other data that it was scored on (`evaluation-NAME.json`).

    Raises:
        InputError: the folder holds no run, or one that was not scored.
    """
    record = _read_json(run / "run.json", "train it with foveate train")
    evaluation = _read_json(run / "evaluation.json", f"score it with foveate eval {run}")
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    phases: dict[str, float] = {}
    before = 0.0
    for phase in dict.fromkeys(row["phase"] for row in rows):
        until = max(row["seconds"] for row in rows if row["phase"] == phase)
        phases[phase], before = (until - before) / 60, until
    config = {name: _without_folders(value) for name, value in record["config"].items() if name != "root"}
    data, root = config["data"], record["config"].get("root")
    run_of = {**record, "config": config, "source": Path(record["source"]).name if record.get("source") else None}
    row = {
        "system": record["system"],
        "data": f"{data} ({Path(root).name})" if data in LAYOUTS and root else data,
        "variant": config.get("variant"),
        "settings": _settings(run_of),
        "seed": record["seed"],
        "budget": f"{record['minutes']:g} min" if record["minutes"] is not None else f"{record['steps']} steps",
        "processes": record["processes"],
        "minutes": phases,
        "run": run_of,
        "evaluation": evaluation,
    }
    others = {path.stem.removeprefix("evaluation-"): path for path in sorted(run.glob("evaluation-*.json"))}
    tested = {name: _read_json(path, f"score it with foveate eval {run}") for name, path in others.items()}
    found = [row | {"data": f"{row['data']}, tested on {name}", "evaluation": found} for name, found in tested.items()]
    return [row, *found]


def _without_folders(value: Any) -> Any:
    """A setting in which files have no folders, which are those of one machine."""
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return re.sub(r"/[^\s:]*/", "", value) if isinstance(value, str) else value


def merge(known: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The entries of both, sorted; of entries with the same key the last."""
    rows = {tuple(row[name] for name in KEY): row for row in (*known, *new)}
    return sorted(rows.values(), key=lambda row: [str(row[name]) for name in KEY])


def write_tables(rows: Sequence[Row]) -> str:
    """Markdown: a table for each system."""
    tables = [_table(system, [row for row in rows if row["system"] == system]) for system in _distinct(rows, "system")]
    return "\n\n".join(tables) if tables else "No rows yet."


def update(runs: Sequence[Path], docs: Path) -> None:
    """Add runs to results.json and results.md of a folder, and to the pages of systems that have markers.

    Raises:
        InputError: as `read_rows`, or a results.md without markers; all files are then as they were.
    """
    new = [row for run in runs for row in read_rows(run)]
    source = docs / "results.json"
    known = json.loads(source.read_text()) if source.is_file() else []
    for row in known:  # a default may have changed since
        row["settings"] = _settings(row["run"])
    rows = merge(known, new)
    texts = {page: filled(page.read_text(), table) for page, table in tables(rows, docs).items()}
    missing = [page for page, text in texts.items() if text is None]
    if missing:
        raise InputError(
            f"{missing[0]}: found no markers, expected {BEGIN} and {END}; put them around the place of the table"
        )
    write_atomically(source, (json.dumps(rows, indent=1) + "\n").encode())
    for page, text in texts.items():
        assert text is not None
        write_atomically(page, text.encode())


def tables(rows: Sequence[Row], docs: Path) -> dict[Path, str]:
    """What belongs between the markers of results.md and of each system's page that has some."""
    found = {docs / "results.md": write_tables(rows)}
    for system in _distinct(rows, "system"):
        page = docs / "systems" / f"{system}.md"
        if page.is_file() and BEGIN in page.read_text():
            found[page] = _table(system, [row for row in rows if row["system"] == system]).partition("\n\n")[2]
    return found


def filled(text: str, table: str) -> str | None:
    """A page with a table between its markers; None if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}" if begin and end else None


def _settings(run: Row) -> str:
    """The fields that differ from their default, and the run it went on from; fields without one are always told."""
    from foveate.agents import system_module

    config, parts = run["config"], run.get("source_parts") or {}
    default = json.loads(json.dumps(vars(system_module(run["system"]).Config()), default=str))
    changed = {name: value for name, value in config.items() if name not in OWN_COLUMNS and value != default.get(name)}
    if run.get("source"):
        changed["from"] = [run["source"], *(part for first, part in parts.items() if part != first)]
    return ", ".join(
        f"{name} {'none' if value == [] else ' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in changed.items()
    )


def _table(system: str, rows: Sequence[Row]) -> str:
    heads = ["data", "settings", "seed", "budget", "minutes", "processes", "commit", ""]
    told: list[list[str]] = []
    scores: list[dict[str, float]] = []
    for row in rows:
        commit, _, dirty = (row["run"].get("commit") or "\N{EN DASH}").partition("-")
        commit = commit[:7] + (" and uncommitted changes" if dirty else "")
        run = [f"{row['data']} {row['variant'] or ''}".strip(), row["settings"], str(row["seed"]), row["budget"]]
        run += [_minutes(row["minutes"]), str(row["processes"]), commit]
        for who, found in {"**agent**": row["evaluation"]["metrics"], **row["evaluation"]["baselines"]}.items():
            told.append([*run, who])
            scores.append(found)
            run = [""] * len(run)
    columns = [list(column) for column in zip(*told, strict=True)]
    for metric in dict.fromkeys(name for found in scores for name in found):
        heads.append(metric.replace("_", " "))
        columns.append(format_column([found.get(metric, math.nan) for found in scores]))
    lines = [heads, ["---"] * len(heads), *zip(*columns, strict=True)]
    return f"## {system}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _minutes(phases: dict[str, float]) -> str:
    """All phases, and in brackets the first."""
    if not phases:
        return "\N{EN DASH}"
    total, first = sum(phases.values()), next(iter(phases.values()))
    return f"{total:.1f}" if len(phases) == 1 else f"{total:.1f} ({first:.1f})"


def _distinct(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _read_json(path: Path, remedy: str) -> Row:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: found no readable JSON ({error}), expected a run's; {remedy}") from error


def main(words: Sequence[str]) -> int:
    """Exit code 0, or 2 if a run cannot be used."""
    if not words or words[0].startswith("-"):
        print("usage: python benchmarks/results.py RUN [RUN ...]", file=sys.stderr)
        return 2
    try:
        update([Path(word) for word in words], DOCS)
    except InputError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
