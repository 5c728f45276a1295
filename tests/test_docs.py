"""What strangers read is true: pages build, commands parse, examples run, links lead somewhere, make installs once."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate import agents, cli, commands
from foveate.systems import SYSTEMS
from foveate.types import Evaluation

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
names = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=names)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def typed(page: Path) -> list[list[str]]:
    """The words of every command line of a page, without comments."""
    lines = "".join(blocks(page, "bash", "sh", "console", "shell")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


def test_the_pages_build_and_fetch_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(?:https?:)?//[^\s\">]+", page.read_text())
        loaded += re.findall(r"<link\b[^>]*\bhref=\"?(?:https?:)?//[^\s\">]+", page.read_text())
        assert not loaded, page


def test_every_system_has_a_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for system in SYSTEMS:
        assert (ROOT / "docs" / "systems" / f"{system}.md").is_file()
        assert f"systems/{system}.md" in navigation


@every_page
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    answers: dict[str, Any] = {
        "train": None,
        "resume": None,
        "evaluate": Evaluation({}, {}),
        "show": [],
        "compare": Path("compare.png"),
        "check_data": [],
        "analyse": ({}, []),
        "bench": [],
        "prefer": {},
    }

    def answer(name: str) -> Any:
        return lambda *_, **settings: (asked.append(settings), answers[name])[1]

    for name in answers:
        monkeypatch.setattr(commands, name, answer(name))
    monkeypatch.setattr("foveate.studio.prefer.serve", lambda *_, **settings: asked.append(settings))
    monkeypatch.setattr(cli, "launch", lambda *_: (asked.append({"steps": 1}), 0)[1])
    monkeypatch.setattr(agents, "processes_of", lambda _: 1)
    monkeypatch.setattr(agents, "config_from_file", lambda system, path: agents.system_module(system).Config())
    makefile = (ROOT / "Makefile").read_text()
    for words in typed(page):
        line = shlex.join(words)
        if words[0] == "foveate":
            asked.clear()
            try:
                code = cli.main(words[1:])
            except SystemExit as stopped:
                code = stopped.code  # type: ignore[assignment]
            assert code == 0, line
            assert asked or words[1] in ("list", "--version", "--help"), line
            if words[1] == "train":
                assert asked[-1].get("steps") or asked[-1].get("minutes"), f"{line}: has no budget"
        elif words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), line


@every_page
def test_examples_run_or_at_least_compile(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = "\n".join(blocks(page, "python"))
    tree = ast.parse(source, str(page))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "foveate":
            assert hasattr(foveate, node.attr) or node.attr in ("envs",), node.attr
    if page.name in ("rewards.md", "tuning.md"):
        monkeypatch.chdir(tmp_path)
        exec(compile(tree, str(page), "exec"), {"__name__": "example"})


@every_page
def test_links_lead_somewhere_and_no_path_is_of_one_machine(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#|mailto:", target):
            assert (page.parent / target.split("#")[0]).exists(), target
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|mnt|Users|usr|var)/\S*", text)


def test_the_names_of_a_system_are_all_told() -> None:
    told = re.findall(r"^\| `(\w+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    for system in SYSTEMS:
        module = agents.system_module(system)
        assert [name for name in told if not hasattr(module, name)] == []


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """`make` on a copy of the Makefile, with a Python whose installations only note that they happened."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    log = tmp_path / "log"
    tools = "foveate ruff mypy lint-imports pytest mkdocs"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
-c*) exec {sys.executable} "$@" ;;
"-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python
  for tool in {tools}; do printf '#!/bin/sh\\n' > .venv/bin/$tool; chmod +x .venv/bin/$tool; done
  echo venv >> {log}; [ ! -e no-venv ] ;;
*"pip install"*) for last; do :; done; echo "$last" >> {log}; [ ! -e no-network ] ;;
esac
"""
    )
    python.chmod(0o755)

    def run(target: str) -> tuple[int, list[str]]:
        log.write_text("")
        code = subprocess.run(["make", target, f"PYTHON={python}"], cwd=tmp_path, capture_output=True).returncode
        return code, log.read_text().split()

    return run


def later(path: Path) -> None:
    """Touch a file so that it is newer than everything, whatever the clock's resolution."""
    newest = max(other.stat().st_mtime_ns for other in path.parent.rglob("*"))
    os.utime(path, ns=(newest + 10**9, newest + 10**9))


def test_make_installs_once(make: Any) -> None:
    assert make("demo") == (0, ["venv", ".[digits]"])
    assert make("demo") == (0, [])
    assert make("test") == (0, [".[dev]"])
    assert make("test") == (0, [])
    assert make("demo") == (0, [])


def test_make_test_installs_all_that_the_demo_needs(make: Any) -> None:
    assert make("test") == (0, ["venv", ".[dev]"])
    assert make("demo") == (0, [])


def test_make_installs_again_when_pyproject_changed(make: Any, tmp_path: Path) -> None:
    make("test")
    later(tmp_path / "pyproject.toml")
    assert make("demo") == (0, [".[digits]"])


@pytest.mark.parametrize("trouble", ["no-network", "no-venv"])
def test_a_half_finished_installation_is_taken_up_again(make: Any, tmp_path: Path, trouble: str) -> None:
    (tmp_path / trouble).touch()
    assert make("demo")[0] != 0
    again = make("demo")
    assert again[0] != 0
    assert again[1]
    (tmp_path / trouble).unlink()
    assert make("demo") == (0, [".[digits]"] if trouble == "no-network" else ["venv", ".[digits]"])
    (tmp_path / "no-network").touch()
    later(tmp_path / "pyproject.toml")
    assert make("demo")[0] != 0
    (tmp_path / "no-network").unlink()
    assert make("demo")[1] == [".[digits]"]
