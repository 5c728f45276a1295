"""The report of a run: one HTML file that needs nothing else, no network and no scripts, on a desk or on a phone."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.types import Evaluation, InputError

LOWER_IS_BETTER = frozenset(
    (
        "decay",
        "deviation",
        "distance",
        "error",
        "failures",
        "glimpses",
        "kl",
        "loss",
        "milliseconds",
        "minutes",
        "nll",
        "regions",
        "regret",
        "seconds",
        "steps",
        "switches",
    )
)
HIGHER_IS_BETTER = frozenset(
    (
        "accuracy",
        "ap",
        "ar",
        "assa",  # of HOTA: association, as deta is detection
        "cider",
        "colorfulness",
        "deta",
        "dice",
        "diversity",
        "f",  # of f1
        "fps",
        "hota",
        "idf",  # of idf1
        "iou",
        "j",
        "jf",
        "map",
        "mota",
        "pq",
        "precision",
        "recall",
        "return",
        "reward",
        "rq",
        "score",
        "sq",
        "success",
        "vividness",
    )
)

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --paper: #ffffff; --line: #d9dee3;
  --card: #f6f8fa; --best: #00694a; --mark: #e3f5ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --paper: #0d1117; --line: #30363d;
  --card: #161b22; --best: #56d3a0; --mark: #12261e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
p { margin: .5rem 0; max-width: 44rem; }
.note { color: var(--quiet); font-size: .9rem; }
.wide { width: fit-content; max-width: 100%; overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { min-width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--card); color: var(--quiet); font-size: .85rem; font-weight: 600; }
tbody th, thead th:first-child { text-align: left; font-weight: 400; }
tbody tr.ours th, tbody tr.ours td { font-weight: 650; }
td.best { background: var(--mark); color: var(--best); font-weight: 650; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .6rem; background: #ffffff; }
figure.broad { grid-column: 1 / -1; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; color: #59636e; font-size: .9rem; text-align: center; }
pre, code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; padding: .8rem 1rem; overflow-x: auto; border-radius: .6rem; background: var(--card); }
details { margin-top: 2.5rem; border: 1px solid var(--line); border-radius: .6rem; }
summary { padding: .6rem 1rem; cursor: pointer; font-weight: 600; }
details table { font-size: .9rem; }
details td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(
    path: Path,
    title: str,
    summary: str,
    table: Evaluation,
    pictures: Mapping[str, Image.Image | Path],
    config: Mapping[str, Any],
    command: str,
) -> None:
    """Write the report of a run; an older one is replaced whole or not at all.

    Args:
        path: the HTML file.
        title: its heading.
        summary: what was done and how well it went, as plain text; an empty line begins a new paragraph.
        table: the metrics, the trained policy's in the first row and the baselines' below. The best value of a column
            is marked if a word of the metric's name is in `LOWER_IS_BETTER` or `HIGHER_IS_BETTER`.
        pictures: caption → a Pillow image, or a GIF, PNG or JPEG file, in the order of the page.
        config: the fields of the run.
        command: what was typed.

    Raises:
        InputError: a picture is not there, or is a file of another kind.
    """
    paragraphs = "\n".join(f"<p>{html.escape(part)}</p>" for part in re.split(r"\n\s*\n", summary) if part.strip())
    figures = "\n".join(_figure(caption, picture) for caption, picture in pictures.items())
    fields = "\n".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(_plain(value))}</td></tr>"
        for name, value in config.items()
    )
    sections = {
        "Scores": metric_table({"trained": table.metrics, **table.baselines}) if table.metrics else "",
        "Pictures": f'<div class="pictures">\n{figures}\n</div>' if figures else "",
        "Command": f"<pre>{html.escape(command)}</pre>",
    }
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in sections.items() if content)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{paragraphs}
{body}
<details>
<summary>All fields of the run</summary>
<table><tbody>
{fields}
</tbody></table>
</details>
</body>
</html>
"""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def metric_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format rows, name → metric → value, as an HTML table: the first row is ours, the best of each column marked.

    A value that is missing or NaN is shown as a dash and is never the best. Of equal values all are marked.
    """
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    values = {name: [float(metrics.get(name, math.nan)) for metrics in rows.values()] for name in columns}
    texts = {name: format_column(column) for name, column in values.items()}
    signs = {name: direction(name) for name in columns}
    best = {
        name: max((sign * value for value in values[name] if math.isfinite(value)), default=math.nan)
        for name, sign in signs.items()
    }
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    head = "".join(f"<th>{html.escape(_spoken(name))}{arrows[signs[name]]}</th>" for name in columns)
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for name in columns:
            wins = len(rows) > 1 and signs[name] and signs[name] * values[name][index] == best[name]
            cells.append(f"<td class='best'>{texts[name][index]}</td>" if wins else f"<td>{texts[name][index]}</td>")
        start = "<tr class='ours'>" if index == 0 else "<tr>"
        lines.append(f"{start}<th scope='row'>{html.escape(_spoken(row))}</th>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    note = '<p class="note">↓ lower is better, ↑ higher is better; the best value of a column is marked.</p>'
    return (
        f'<div class="wide"><table>\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        + (f"\n{note}" if any(signs.values()) else "")
    )


def direction(metric: str) -> int:
    """Tell whether higher (1) or lower (-1) is better, by the words of a metric's name; 0 if neither is known.

    The last word that is known decides: "reward_loss" is a loss.
    """
    for word in reversed(re.findall(r"[a-z]+", metric.lower())):
        if word in LOWER_IS_BETTER or word in HIGHER_IS_BETTER:
            return -1 if word in LOWER_IS_BETTER else 1
    return 0


def format_column(values: Sequence[float]) -> list[str]:
    """Write numbers with the same number of decimals: four up to 1 (shares), two up to 1,000 (percent), then one.

    Whole numbers stay whole, a column below 0.001 is written with exponents, and NaN is a dash.
    """
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest = max(finite, default=0.0)
    if all(value == round(value) for value in finite):
        form = ".0f"
    elif largest < 1e-3:
        form = ".2e"
    else:
        form = ".4f" if largest <= 1 else ".2f" if largest < 1000 else ".1f"
    return [_number(value, form) for value in values]


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:,{form}}".replace("inf", "∞").replace("-", "\N{MINUS SIGN}")


def _figure(caption: str, picture: Image.Image | Path) -> str:
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        content, size, kind = buffer.getvalue(), picture.size, "PNG"
    else:
        try:
            with Image.open(picture) as image:
                size, kind = image.size, image.format or ""
            content = picture.read_bytes()
        except OSError as error:
            raise InputError(
                f"{picture}: found no picture ({error}), expected a GIF, PNG or JPEG; draw it again"
            ) from None
        if kind not in ("GIF", "PNG", "JPEG"):
            raise InputError(f"{picture}: found a {kind} picture, expected GIF, PNG or JPEG; convert it first")
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    text, broad = html.escape(caption), ' class="broad"' if size[0] > 700 else ""
    image_tag = f'<img src="{source}" alt="{text}" width="{size[0]}" height="{size[1]}">'
    return f"<figure{broad}>{image_tag}<figcaption>{text}</figcaption></figure>"


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return str(value)


def command(system: str, config: Any, source: str | None = None, part: str | None = None) -> str:
    """The command line that makes a run of this config, begun from a `part` of the run `source`."""
    words = ["foveate", "train", system]
    for entry in dataclasses.fields(config):
        value, name = getattr(config, entry.name), entry.name.replace("_", "-")
        if isinstance(value, bool) and value != entry.default:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != entry.default:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--from", source] if source else []
    return shlex.join(words + (["--from-part", part] if part else []))
