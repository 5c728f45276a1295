"""Curves: how an agent learned, and how runs compare. Everything is a Pillow image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from foveate.colors import PALETTE

QUIET = "#6e7681"  # of axes
PANELS = 24  # curves on a page at most; TensorBoard has all

Points = Sequence[tuple[int | float, int | float]]


def line_plot(
    series: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    title: str = "",
    logy: bool = False,
    bands: Mapping[str, Sequence[tuple[int | float, int | float, int | float]]] | None = None,
    logx: bool = False,
    dots: bool = False,
) -> Image.Image:
    """Draw curves of points (x, y), named beside the plot in the order of their last values.

    `bands` are (x, low, high), shaded in the colour of the curve of the same name; a single point is a dot, and with
    `dots` all are, without a line.
    """
    figure = _figure(6.6, 3.8)
    axes = figure.add_subplot()
    lines = []
    for index, (name, points) in enumerate(series.items()):
        colour = PALETTE[index % len(PALETTE)]
        x, y = np.array(points, float).reshape(-1, 2).T
        marker = "o" if dots or len(x) <= 20 else None
        lines += axes.plot(x, y, color=colour, linewidth=0 if dots else 2, marker=marker, markersize=4, label=name)
        if bands and name in bands:
            axes.fill_between(*np.array(bands[name], float).reshape(-1, 3).T, color=colour, alpha=0.15, linewidth=0)
    scales = {"xscale": "log" if logx else "linear", "yscale": "log" if logy else "linear"}
    axes.set(xlabel=xlabel, ylabel=ylabel, **scales)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    lines.sort(key=lambda line: np.nan_to_num(line.get_ydata()[-1:], nan=-np.inf).sum(), reverse=True)
    figure.legend(handles=lines, loc="outside right upper", frameon=False, labelcolor="linecolor")
    return _render(figure)


def histogram(values: Mapping[str, Sequence[float]], xlabel: str, title: str = "", bins: int = 40) -> Image.Image:
    """Draw how sets of values are distributed; a dashed line marks the best hundredth of each."""
    figure = _figure(6.6, 3.8)
    axes = figure.add_subplot()
    whole = np.concatenate([np.asarray(each, float) for each in values.values()])
    edges = np.linspace(whole.min(), whole.max() + 1e-9, bins + 1)
    for index, (name, each) in enumerate(values.items()):
        colour = PALETTE[index % len(PALETTE)]
        shares = np.full(len(each), 1 / len(each))
        axes.hist(each, edges, weights=shares, color=colour, alpha=0.45, label=name)
        axes.axvline(float(np.quantile(np.asarray(each, float), 0.99)), color=colour, linestyle="--", linewidth=1.5)
    axes.set(xlabel=xlabel, ylabel="share of answers")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.legend(loc="outside right upper", frameon=False)
    return _render(figure)


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Draw the log of a run: a panel a metric, phases one after the other in their colours, smoothed over raw.

    `rows` are the lines of metrics.jsonl: {"phase", "step", "seconds", name: value, ...}. None if nothing was logged.
    """
    return _panels(_curves(rows))


def compare_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Image.Image | None:
    """Lay the logs of several runs over each other: a panel for each metric that at least two of them logged.

    `runs` is name → lines of metrics.jsonl. None if they have no metric in common; a single run shows all of its own.
    """
    panels: dict[str, dict[str, Points]] = {}
    for name, rows in runs.items():
        for metric, phases in _curves(rows).items():
            panels.setdefault(metric, {})[name] = [point for points in phases.values() for point in points]
    return _panels({metric: curves for metric, curves in panels.items() if len(curves) >= min(2, len(runs))})


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Metric → phase → points; a phase whose steps begin anew is moved behind the one before."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    phase, offset, last = "", 0.0, 0.0
    for row in rows:
        if row["phase"] != phase:
            phase, offset = row["phase"], last if row["step"] < last else 0.0
        last = row["step"] + offset
        for name, value in row.items():
            if name not in ("phase", "step", "seconds") and isinstance(value, int | float):
                curves.setdefault(name, {}).setdefault(phase, []).append((last, float(value)))
    return curves


def _panels(panels: Mapping[str, Mapping[str, Points]]) -> Image.Image | None:
    """Small multiples: panel → line → points, each line smoothed over its raw values."""
    if not panels:
        return None
    # what stands at one of many thresholds comes last: a page that shows all shows nothing
    panels = {name: panels[name] for name in sorted(panels, key=lambda name: "@" in name)[:PANELS]}
    columns, names = min(3, len(panels)), list(dict.fromkeys(name for curves in panels.values() for name in curves))
    lines = -(-len(panels) // columns)
    figure = _figure(max(4.2, 3.4 * columns), 2.4 * lines + 0.5)
    handles: dict[str, Any] = {}
    for index, (metric, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        reach: list[float] = []
        for name, points in curves.items():
            x, y = np.array(points, float).T
            smooth, colour = _smooth(y), PALETTE[names.index(name) % len(PALETTE)]
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            marker = "o" if len(x) == 1 else None
            (handles[name],) = axes.plot(x, smooth, color=colour, linewidth=1.8, marker=marker, markersize=4)
            if np.isfinite(y).any():
                reach += [*np.nanpercentile(smooth, (1, 99)), *np.percentile(y[np.isfinite(y)], (1, 99))]
        # a spike of the first steps must not flatten all that follows
        if reach and (height := max(reach) - min(reach)) > 0:
            axes.set_ylim(min(reach) - 0.08 * height, max(reach) + 0.08 * height)
        axes.set_title(metric, loc="left", fontsize=10, fontweight="bold")
        if index >= len(panels) - columns:
            axes.set_xlabel("step")
    if len(names) > 1:
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False)
    return _render(figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a fifteenth of the curve, shorter at its ends; skips what is not finite."""
    window, finite = np.ones(len(values) // 30 * 2 + 1), np.isfinite(values)
    number = np.convolve(finite, window, "same").round()
    return np.convolve(np.where(finite, values, 0), window, "same") / np.where(number > 0, number, np.nan)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and asks for a screen

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _render(figure: Any) -> Image.Image:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET, labelsize=9)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
