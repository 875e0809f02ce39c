"""Plots as SVG, by matplotlib: the same figures make the same file, so that a new run changes only what it found."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report
from bench.documents import Run
from bench.results import Curve

_SIZE = (7.0, 4.0)  # inches
_WIDTH, _EACH = 8.0, 0.45  # inches: of the overview, and for each of its lines
_TINY = 1e-9  # instead of nothing at all
_NAME = 44  # characters in a line of a bar's name


def draw(curve: Curve, folder: Path) -> Path:
    """The file with the plot."""
    figure, axes = _axes(_SIZE)
    for name, line in curve.lines.items():
        axes.plot(curve.x, line, marker="o" if len(curve.x) <= 20 else None, markersize=4, label=name)
    if curve.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(curve.x, [f"{each:g}" for each in curve.x])
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.set_title(curve.title, fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    return _saved(figure, folder / f"{curve.file}.svg")


def overview(runs: Mapping[str, Run], folder: Path) -> Path | None:
    """How far each figure is from its bar, whether that is a least or a most; None when there is none."""
    held = [
        (comparison.bar, comparison)
        for run in runs.values()
        if run.result is not None
        for comparison in run.result.comparisons
        if comparison.bar is not None and comparison.bar.limit > 0
    ]
    if not held:
        return None
    figure, axes = _axes((_WIDTH, 1.2 + _EACH * len(held)))
    for place, (bar, comparison) in enumerate(reversed(held)):
        part = comparison.found / bar.limit if bar.at_most else bar.limit / max(comparison.found, _TINY)
        axes.barh(place, part, color="tab:green" if comparison.met else "tab:red", alpha=0.8)
        axes.text(part, place, f" {report.figure(comparison.found, bar.unit)}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    names = [textwrap.fill(f"{bar.what} {bar.bound}", _NAME) for bar, _ in reversed(held)]
    axes.set_yticks(range(len(held)), names, fontsize=7)
    axes.set_xlabel("the shorter the better; at 1 is the bar")
    axes.margins(x=0.15)
    return _saved(figure, folder / "bars.svg")


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    # Only where something is drawn: the measures run without it.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "restante", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _saved(figure: Any, file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    return file
