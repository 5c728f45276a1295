"""The table of results is made from runs' files, and only from them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate.systems.ram import Config
from foveate.types import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def docs(tmp_path: Path, results: ModuleType) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "results.md").write_text(f"# Results\n\n{results.BEGIN}\nold\n{results.END}\n\nlast words\n")
    return folder


def make_run(folder: Path, error: float = 1.25, *, commit: str | None = "0123456789ab", **settings: Any) -> Path:
    """A run's files, in the form in which the library writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {"data": "mnist", "root": "a/place", "variant": "plain", "glimpses": 6, "patch": 8, "scales": 1}
    config = json.loads(json.dumps({**vars(Config()), **resolved, "minutes": 30.0, **settings}))
    record = {"system": "ram", "foveate": "0.1.0", "config": config, "processes": 1, "commit": commit}
    record |= {name: config[name] for name in ("seed", "steps", "minutes")}
    (folder / "run.json").write_text(json.dumps(record))
    evaluation = {"metrics": {"error": error}, "baselines": {"random": {"error": 5.5}}, "curves": {}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [{"phase": "learned", "seconds": 300.0}, {"phase": "learned", "seconds": 600.0}]
    rows += [{"phase": "random", "seconds": 1140.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def cells(docs: Path) -> list[dict[str, str]]:
    table = [line for line in (docs / "results.md").read_text().splitlines() if "|" in line]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_row_says_what_was_run_and_what_came_out(results: ModuleType, docs: Path, tmp_path: Path) -> None:
    results.update([make_run(tmp_path / "a", core="preference:/home/me/runs/lstm", controls=["/home/me/random"])], docs)
    row, control = cells(docs)
    assert control == dict.fromkeys(row, "") | {"": "random", "error": "5.50"}
    assert row == {
        "data": "mnist plain",
        "settings": "controls random, glimpses 6, patch 8, scales 1, core preference:lstm",
        "seed": "0",
        "budget": "30 min",
        "minutes": "19.0 (10.0)",
        "processes": "1",
        "commit": "0123456",
        "": "**agent**",
        "error": "1.25",
    }
    page = (docs / "results.md").read_text()
    assert page.startswith("# Results")
    assert page.endswith("last words\n")
    assert "old" not in page
    assert "a/place" not in page + (docs / "results.json").read_text()
    assert "/home" not in page + (docs / "results.json").read_text()


def test_the_same_run_again_replaces_its_row_and_another_one_is_added(
    results: ModuleType, docs: Path, tmp_path: Path
) -> None:
    results.update([make_run(tmp_path / "a", 1.25)], docs)
    results.update([make_run(tmp_path / "b", 1.5, root="elsewhere", commit=None)], docs)
    assert [(row["error"], row["commit"]) for row in cells(docs)] == [("1.50", "\N{EN DASH}"), ("5.50", "")]
    for number, settings in enumerate(({"seed": 1}, {"std": 0.2}, {"variant": "cluttered60"}, {"minutes": 150.0})):
        results.update([make_run(tmp_path / f"c{number}", **settings)], docs)
        assert len(cells(docs)) == 2 * (2 + number)
    before = (docs / "results.md").read_text()
    results.update([tmp_path / "c0"], docs)
    assert (docs / "results.md").read_text() == before


def test_a_row_names_the_run_that_it_went_on_from(results: ModuleType, docs: Path, tmp_path: Path) -> None:
    starts: tuple[tuple[str, dict[str, str]], ...] = (
        ("first", {"likelihood": "likelihood"}),
        ("first", {"likelihood": "control"}),
        ("second", {}),
    )
    for number, (start, parts) in enumerate(starts):
        run = make_run(tmp_path / f"{number}")
        record = json.loads((run / "run.json").read_text()) | {"source": f"/home/me/{start}", "source_parts": parts}
        (run / "run.json").write_text(json.dumps(record))
        results.update([run], docs)
    told = [row["settings"].partition("from ")[2] for row in cells(docs) if row["settings"]]
    assert told == ["first", "first control", "second"]


def test_what_a_run_scored_on_other_data_is_a_row_of_its_own(results: ModuleType, docs: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1.25)
    other = {"metrics": {"error": 3.5}, "baselines": {"random": {"error": 7.0}}, "curves": {}}
    (run / "evaluation-letters.json").write_text(json.dumps(other))
    results.update([run], docs)
    assert [(row["data"], row["error"]) for row in cells(docs)] == [
        ("mnist plain", "1.25"),
        ("", "5.50"),
        ("mnist, tested on letters plain", "3.50"),
        ("", "7.00"),
    ]


def test_what_is_not_a_scored_run_changes_nothing(results: ModuleType, docs: Path, tmp_path: Path) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    (bad / "evaluation.json").unlink()
    before = (docs / "results.md").read_text()
    with pytest.raises(InputError, match="foveate eval"):
        results.update([good, bad], docs)
    with pytest.raises(InputError, match="foveate train"):
        results.update([tmp_path / "nowhere"], docs)
    assert (docs / "results.md").read_text() == before
    assert not (docs / "results.json").exists()
    assert results.main([str(bad)]) == 2


def test_the_page_is_what_its_source_says(results: ModuleType) -> None:
    source = results.DOCS / "results.json"
    rows = json.loads(source.read_text()) if source.is_file() else []
    pages = results.tables(rows, results.DOCS)
    assert results.DOCS / "systems" / "ram.md" in pages
    for page, table in pages.items():
        assert page.read_text() == results.filled(page.read_text(), table)
