"""The page of `foveate prefer`: its windows, what it refuses, and a browser that clicks and types."""

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from foveate import noise
from foveate.cli import main
from foveate.data.comparisons import FILE, Comparisons
from foveate.preferring import Asked
from foveate.studio import prefer
from foveate.types import InputError, Sampler

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Noisy(Sampler):
    """Answers with a picture of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def sample(self, inputs: Tensor, num_samples: int, greedy: bool, keys: Tensor) -> Tensor:
        return noise.uniform(keys, num_samples, 3, 8, 8).flatten(0, 1)

    def forward(self, inputs: Tensor, actions: Tensor, steps: slice = slice(None)) -> object:
        raise NotImplementedError

    def decode(self, actions: Tensor) -> Tensor:
        return actions


def page_of(folder: Path, comparisons: int = 50, question: str | None = None) -> prefer.Page:
    store = Comparisons(folder, "a", question, make=True)
    page = prefer.Page(store, Asked(Noisy(), torch.zeros(5), lambda answers, _: answers), comparisons)
    page.supply()
    return page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[prefer.Page, str]]:
    page = page_of(tmp_path_factory.mktemp("page"), question="Which <b>one</b>?")
    blocks, address = prefer.launch(page, port=0)
    yield page, address
    blocks.close(verbose=False)


def ask(address: str, function: int, data: list[Any], window: str) -> list[Any]:
    """What the browser does for an event: put it into the queue, and wait for the outcome."""
    with httpx.Client(base_url=address, timeout=60) as client:
        event = {"data": data, "fn_index": function, "session_hash": window, "trigger_id": None, "event_data": None}
        assert client.post("gradio_api/queue/join", json=event).status_code == 200
        with client.stream("GET", "gradio_api/queue/data", params={"session_hash": window}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]
    raise AssertionError("no outcome")


LOAD, LEFT, TIE, SKIP, RIGHT = range(5)


def test_a_click_is_stored_once_and_the_next_pair_comes(served: tuple[prefer.Page, str]) -> None:
    page, address = served
    before = page.store.counts()
    shown, number, _ = ask(address, LOAD, [], "one")
    assert shown.count("data:image/png;base64,") == 2
    assert "Which &lt;b&gt;one&lt;/b&gt;?" in shown
    other = ask(address, LOAD, [], "two")[1]
    assert other != number, "two windows show two pairs"
    assert ask(address, LOAD, [], "one")[1] == number, "loaded again"
    _, following, told = ask(address, RIGHT, [number, "Ann"], "one")
    assert following not in (number, other)
    assert f"{before['right'] + 1} of 50" in told
    assert ask(address, LEFT, [number, "Ann"], "one")[1] == following, "a click on what is gone does not count"
    assert ask(address, LEFT, [other, "Ann"], "one")[1] == following, "nor one on another window's pair"
    assert ask(address, LEFT, ["../../etc", "x" * 10_000], "one")[1] == following
    assert page.store.counts()["right"] == before["right"] + 1
    assert page.store.counts()["left"] == before["left"]


def test_files_large_requests_and_other_hosts_are_refused(served: tuple[prefer.Page, str], tmp_path: Path) -> None:
    _, address = served
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with httpx.Client(base_url=address, timeout=60) as client:
        page = client.get("")
        assert page.status_code == 200
        assert "answer-left" in page.text
        assert not re.findall(r'(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*(?:font|script|\.js|\.css)', page.text)
        for path in (f"gradio_api/file={secret}", f"gradio_api/file/{secret}", "gradio_api/proxy=http://example.org/"):
            assert client.get(path).status_code == 404
        for path in ("gradio_api/upload", "upload"):
            assert client.post(path, files={"files": b"x"}).status_code == 404
        assert client.post("gradio_api/queue/join", content=b"x" * 100_000).status_code == 413
        assert client.post("gradio_api/queue/join", content=iter([b"x"])).status_code == 411
        assert client.get("", headers={"host": "elsewhere.example"}).status_code == 421
    config = httpx.get(f"{address}config", timeout=60).json()
    assert {part["type"] for part in config["components"]}.isdisjoint({"file", "image", "uploadbutton", "gallery"})


def test_a_page_for_all_who_reach_the_machine_says_so_and_lets_in_no_more_than_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(tmp_path)
    store, asked = page.store, page.asked
    monkeypatch.setattr(prefer.commands, "preferences", lambda *_: (store, asked))
    told: list[int] = []

    def asks(seconds: float) -> None:
        """In place of waiting for ever: a reader who comes by another name, and Ctrl-C."""
        address = f"http://127.0.0.1:{ports[0]}/"
        with httpx.Client(base_url=address, timeout=60, headers={"host": "elsewhere.example"}) as client:
            told.append(client.get("").status_code)
            told.append(client.get(f"gradio_api/file={tmp_path / FILE}").status_code)
        raise KeyboardInterrupt

    ports: list[int] = []
    launch = prefer.launch

    def launched(*given: Any) -> tuple[Any, str]:
        blocks, address = launch(*given)
        ports.append(blocks.server_port)
        return blocks, address

    monkeypatch.setattr(prefer, "launch", launched)
    monkeypatch.setattr(prefer, "time", SimpleNamespace(sleep=asks))
    prefer.serve(tmp_path, host="0.0.0.0", port=0)
    assert told == [200, 404]
    assert "whoever reaches 0.0.0.0 can look and answer; there is no password" in capsys.readouterr().err


def test_it_ends_when_enough_is_compared_and_goes_on_for_more(tmp_path: Path) -> None:
    page = page_of(tmp_path, comparisons=3)
    shown = page.show("w")
    for _ in range(3):
        assert "<img" in shown[0]
        shown = page.press("tie", "w", shown[1], "")
        page.supply()
    assert "Thank you" in shown[0]
    assert shown[1:] == ("", "3 of 3 comparisons")
    assert page.press("tie", "w", "-1", "")[1:] == shown[1:]
    more = page_of(tmp_path, comparisons=4)
    assert "<img" in more.show("w")[0]


def test_what_goes_wrong_with_the_model_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, comparisons=50)
    while page.store.counts()["waiting"]:
        page.press("skip", "w", page.show("w")[1], "")
    page.trouble = "all look <alike>"
    assert "all look &lt;alike&gt;" in page.show("w")[0]


def test_a_port_that_is_taken_is_named(served: tuple[prefer.Page, str], tmp_path: Path) -> None:
    port = int(served[1].rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be had"):
        prefer.launch(page_of(tmp_path), port=port)


@contextmanager
def serving(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`foveate prefer` as a process that Ctrl-C reaches, also where the tests run in the background; its address."""
    words = ["prefer", str(run), "--port", "0", "--device", "cpu", "--inputs", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "foveate", *words],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        yield process, found.group() + "/"
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


@pytest.fixture
def driven() -> Iterator[Any]:
    """A page of a headless browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no chromium here; .ci/run installs Debian's")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_browser_compares_by_keys_and_clicks_and_nothing_is_lost_on_a_kill(driven: Any, tmp_path: Path) -> None:
    """From the command to the database: arrows, space, s, the buttons, the pictures; two windows; a kill; again."""
    run = tmp_path / "run"
    quick = ["--image-size", "8", "--width", "16", "--depth", "1", "--code-width", "8", "--batch", "4"]
    assert main(["train", "colorization", "--steps", "4", "--out", str(run), "--device", "cpu", *quick]) == 0

    def opened(address: str) -> Any:
        tab = driven.new_page()
        tab.goto(address)
        tab.wait_for_selector("#pictures img")
        return tab

    def after(tab: Any, act: Any) -> None:
        before = tab.locator("#pictures .pair").get_attribute("data-pair")
        act()
        tab.wait_for_selector(f'#pictures .pair:not([data-pair="{before}"])')

    with serving(run) as (process, address):
        tab, other = opened(address), opened(address)
        pairs = [each.locator("#pictures .pair").get_attribute("data-pair") for each in (tab, other)]
        assert pairs[0] != pairs[1]
        tab.locator("textarea, input[type=text]").locator("visible=true").first.fill("Ann")
        tab.locator("#pictures h2").click()
        for key in ("ArrowLeft", "ArrowRight", " ", "s"):
            after(tab, lambda key=key: tab.keyboard.press(key))
        after(other, lambda: other.locator("#answer-left").click())
        after(other, lambda: other.keyboard.press(" "))  # the button has the focus: a tie, not another left
        after(other, lambda: other.locator('#pictures img[data-side="right"]').click())
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with sqlite3.connect(run / "preferences" / FILE) as database:
        found = database.execute("SELECT answer, judge FROM answers ORDER BY id").fetchall()
    expected = [
        ("left", "Ann"),
        ("right", "Ann"),
        ("tie", "Ann"),
        ("skip", "Ann"),
        ("left", ""),
        ("tie", ""),
        ("right", ""),
    ]
    assert found == expected
    with serving(run) as (process, address):
        tab = opened(address)
        assert "7 of 300" in tab.locator("#told").inner_text()
        after(tab, lambda: tab.keyboard.press("ArrowLeft"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_the_command_serves_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = ["--image-size", "8", "--width", "16", "--depth", "1", "--code-width", "8", "--batch", "4"]
    assert main(["train", "colorization", "--steps", "4", "--out", str(run), "--device", "cpu", *quick]) == 0
    with serving(run) as (process, address):
        number = ask(address, LOAD, [], "w")[1]
        ask(address, LEFT, [number, ""], "w")
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "1 left" in process.stdout.read()
