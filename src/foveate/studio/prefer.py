"""The page of `foveate prefer`: two answers to one input side by side, and four keys.

It binds to this machine alone unless told otherwise. It has no upload and takes no path: pictures are within the page,
the browser sends which pair it shows, which button was pressed and a name, and whatever else is asked of the server is
refused (`Gate`). Every click is on the disk before the next pair is shown (`foveate.data.comparisons`).
"""

from __future__ import annotations

import base64
import html
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from foveate import commands
from foveate.data.comparisons import ANSWERS, LONGEST, Answer, Comparisons, Pair
from foveate.preferring import Asked, Choose, propose
from foveate.types import InputError

QUESTION = "Which one is better?"
BUTTONS: dict[Answer, str] = {"left": "← Left", "tie": "Tie (space)", "skip": "Skip (s)", "right": "Right →"}
AHEAD = 10  # pairs that wait when all is well, so that nobody waits for the model
WINDOWS = 1000  # of which is remembered what they show
BODY = 2**16  # bytes of a request at most
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOSED = ("/upload", "/file", "/proxy", "/stream", "/component_server", "/login", "/dev", "/mcp", "/run-history")

STYLE = """
#pictures .pair { display: flex; gap: 1rem; justify-content: center; }
#pictures img { width: min(42vw, 26rem); image-rendering: pixelated; cursor: pointer; border-radius: .4rem; }
#pictures p, #pictures h2 { text-align: center; }
footer { display: none !important; }
"""
# A key that is held down answers once. Space also presses a button that has the focus: that is prevented.
SCRIPT = """<script>
(() => {
  const KEYS = { ArrowLeft: "left", ArrowRight: "right", " ": "tie", s: "skip", S: "skip" };
  const typing = event => event.target.closest && event.target.closest("input, textarea");
  const press = (event, act) => {
    const name = KEYS[event.key];
    if (!name || typing(event) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (act && !event.repeat) document.getElementById("answer-" + name)?.click();
  };
  document.addEventListener("keydown", event => press(event, true), true);
  document.addEventListener("keyup", event => press(event, false), true);
  document.addEventListener("click", event => {
    const picture = event.target.closest && event.target.closest("#pictures img");
    if (picture) document.getElementById("answer-" + picture.dataset.side)?.click();
  });
})();
</script>"""


class Gate:
    """Lets through what the page needs; refuses files, large bodies and, on loopback, the names of other hosts.

    Args:
        app: what is behind it.
        loopback: whether the page is for this machine alone: a request by another name comes from a page that means to
            reach through the reader's browser (DNS rebinding).
    """

    def __init__(self, app: Callable[..., Awaitable[None]], loopback: bool = True) -> None:
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "http" and (status := self._refusal(scope)):
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: dict[str, Any]) -> int | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]")
        if self.loopback and host not in LOOPBACK:
            return 421
        if any(scope["path"].removeprefix("/gradio_api").startswith(start) for start in CLOSED):
            return 404
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit():
            return 411
        return 413 if int(length) > BODY else None


class Page:
    """What the windows of a page show, and what comes of their clicks.

    Args:
        store: of the comparisons.
        asked: what gives more pairs.
        comparisons: how many there are to be.
        choose: which pairs are asked about.
    """

    def __init__(self, store: Comparisons, asked: Asked, comparisons: int, choose: Choose = "random") -> None:
        self.store, self.asked, self.comparisons, self.choose = store, asked, comparisons, choose
        self._shown: OrderedDict[str, int] = OrderedDict()
        self._lock, self._wanted = threading.Lock(), threading.Event()
        self.trouble: str | None = None

    def supply(self) -> None:
        """See that enough pairs wait.

        Raises:
            InputError: the model's answers all look alike.
        """
        counts = self.store.counts()
        missing = self.comparisons - sum(counts.values())
        if counts["waiting"] < AHEAD and missing > 0:
            propose(self.store, self.asked, min(2 * AHEAD, missing), self.choose)

    def supply_for_ever(self) -> None:
        """Do so after every answer: for a thread of its own. What goes wrong is shown on the page."""
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                self.supply()
                self.trouble = None
            except Exception as error:  # the thread must live: the next answer tries again
                self.trouble = str(error)

    def show(self, window: str) -> tuple[str, str, str]:
        """The pair that a window is to show: pictures as HTML, its number ("" if none), and how far all has come."""
        counts = self.store.counts()
        have = sum(counts[answer] for answer in ANSWERS)
        pair = self.store.claim(window) if have < self.comparisons else None
        with self._lock:
            self._shown[window] = -1 if pair is None else pair.id
            self._shown.move_to_end(window)
            while len(self._shown) > WINDOWS:
                self._shown.popitem(last=False)
        told = f"{have} of {self.comparisons} comparisons"
        if pair is None:
            if have >= self.comparisons:
                note = "All is compared. Thank you!"
            else:
                note = self.trouble or "The next pair is being made; press any of the buttons in a moment."
            return f"<p>{html.escape(note)}</p>", "", told
        return self._pictures(pair), str(pair.id), told

    def press(self, answer: Answer, window: str, shown: str, who: str) -> tuple[str, str, str]:
        """Store a click, and show the next pair.

        Args:
            answer: which button.
            window: where.
            shown: the number of the pair that the browser shows: a click that was made before the next pair came does
                not count for that.
            who: as the reader calls themselves.
        """
        with self._lock:
            expected = self._shown.get(window, -1)
        if expected >= 0 and shown == str(expected):
            self.store.answer(expected, answer, who or "", window)
        self._wanted.set()
        return self.show(window)

    def _pictures(self, pair: Pair) -> str:
        tiles = []
        for side, name in (("left", pair.left), ("right", pair.right)):
            encoded = base64.b64encode(self.store.png(name)).decode()
            tiles.append(f'<img data-side="{side}" alt="{side} picture" src="data:image/png;base64,{encoded}">')
        question = html.escape(self.store.question or QUESTION)
        return f'<h2>{question}</h2><div class="pair" data-pair="{pair.id}">{"".join(tiles)}</div>'


def build(page: Page) -> Any:
    """The page as Gradio's blocks.

    Raises:
        InputError: Gradio is not installed.
    """
    gradio = _gradio()

    def show(request: Any) -> tuple[str, str, str]:
        return page.show(request.session_hash or "")

    def press(answer: Answer) -> Callable[..., Any]:
        def pressed(shown: str, who: str, request: Any) -> tuple[str, str, str]:
            return page.press(answer, request.session_hash or "", str(shown)[:20], str(who or ""))

        return _asking(pressed)

    with gradio.Blocks(title="Foveate: compare", analytics_enabled=False) as blocks:
        pictures = gradio.HTML(elem_id="pictures")
        with gradio.Row():
            buttons = {name: gradio.Button(label, elem_id=f"answer-{name}") for name, label in BUTTONS.items()}
        told = gradio.Markdown(elem_id="told")
        who = gradio.Textbox(label="Your name, kept with your answers (may stay empty)", max_length=LONGEST)
        shown = gradio.Textbox(visible="hidden", elem_id="shown")
        outputs = [pictures, shown, told]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        blocks.load(_asking(show), None, outputs, **quiet)
        for name, button in buttons.items():
            button.click(press(name), [shown, who], outputs, trigger_mode="once", **quiet)
    return blocks


def _asking(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a handler as one that is told of the request: Gradio looks for its own class among the annotations."""
    handler.__annotations__ = {"request": _gradio().Request}
    return handler


def launch(page: Page, host: str = "127.0.0.1", port: int = 7860) -> tuple[Any, str]:
    """Serve the page from threads of this process; what to close in the end, and its address.

    Raises:
        InputError: Gradio is not installed, or the address cannot be had.
    """
    from starlette.middleware import Middleware

    gradio = _gradio()
    blocks = build(page).queue(max_size=64, default_concurrency_limit=1)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fetches no fonts
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port or None,
            app_kwargs={"middleware": [Middleware(Gate, loopback=host in LOOPBACK)]},
            max_file_size=1,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            theme=theme,
            css=STYLE,
            head=SCRIPT,
        )
    except OSError as error:
        raise InputError(f"host, port: {host}:{port} cannot be had ({error}); give another --port, or 0") from error
    threading.Thread(target=page.supply_for_ever, daemon=True).start()
    return blocks, address


def serve(
    folder: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    comparisons: int = 300,
    choose: Choose = "random",
    part: str | None = None,
    question: str | None = None,
    inputs: int = 500,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Serve the page until Ctrl-C; the fields are those of `foveate.commands.prefer`.

    Raises:
        InputError: as there; Gradio is not installed; the address cannot be had.
    """
    _gradio()
    if comparisons < 1:
        raise InputError(f"comparisons: found {comparisons}, expected at least 1")
    if not 0 <= port < 2**16:
        raise InputError(f"port: found {port}, expected 0 to {2**16 - 1}")
    store, asked = commands.preferences(folder, part, question, inputs, seed, device)
    page = Page(store, asked, comparisons, choose)
    page.supply()
    blocks, address = launch(page, host, port)
    if host not in LOOPBACK:
        print(f"foveate: whoever reaches {host} can look and answer; there is no password", file=sys.stderr)
    print(f"compare at {address}   (Ctrl-C ends; every answer is on the disk)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        counts = store.counts()
        print(", ".join(f"{count} {name}" for name, count in counts.items()))
    finally:
        blocks.close(verbose=False)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing asks the network
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise InputError("prefer: the page needs Gradio: pip install 'foveate[preferences]'") from error
    return gradio
