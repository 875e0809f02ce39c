"""The page of figures: `docs/performance.md` between its two marks, and the plots in it, from `docs/performance.json`.

No figure in it is typed by hand. A run that had only some measures replaces those, and leaves the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import documents, plots, report
from bench.documents import Run
from bench.measures import MEASURES
from bench.results import Result, Table

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
FIGURES = DOCS / "performance.json"
PLOTS = DOCS / "plots"
BEGIN = "<!-- figures: written by `make bench WRITE=1` -->"
END = "<!-- end of the figures -->"


def write(runs: Mapping[str, Run]) -> None:
    """Put what was found into the page, its plots and its JSON."""
    found = {name: run for name, run in runs.items() if run.result is not None}
    kept = documents.read(FIGURES) | found
    kept = {name: kept[name] for name in MEASURES if name in kept}
    documents.write(FIGURES, kept)
    before, mark, rest = PAGE.read_text().partition(BEGIN)
    _, other, after = rest.partition(END)
    if not mark or not other:
        raise RuntimeError(f"{PAGE} has no place for the figures: {BEGIN} … {END}")
    PAGE.write_text("\n".join((f"{before}{BEGIN}", "", *_lines(kept), f"{END}{after}")))


def _lines(runs: Mapping[str, Run]) -> Iterator[str]:
    yield "### Bars"
    yield ""
    yield from _table(
        ("bar", "bound", "found", ""),
        [
            (what, bound, found, verdict)
            for verdict, what, bound, found in report.bar_lines({name: MEASURES[name].BARS for name in MEASURES}, runs)
        ],
    )
    if (overview := plots.overview(runs, PLOTS)) is not None:
        yield from _picture(overview, "how far each figure is from its bar")
    for run in runs.values():
        if run.result is not None:
            yield from _result(run, run.result)


def _result(run: Run, result: Result) -> Iterator[str]:
    yield f"### {result.title}"
    yield ""
    yield from (MEASURES[run.measure].__doc__ or "").strip().splitlines()
    yield ""
    yield (
        f"{'A quick run' if run.quick else 'A full run'} of `make bench MEASURE={run.measure}`, {run.when}, "
        f"{run.seconds:.0f} s; the machine's load was {run.load[0]:.1f} as it began."
    )
    yield ""
    if result.comparisons:
        yield from _table(report.HEAD, [report.row(comparison) for comparison in result.comparisons])
    for table in result.tables:
        yield f"{table.title}:"
        yield ""
        yield from _figures(table)
    for curve in result.curves:
        yield from _picture(plots.draw(curve, PLOTS), curve.title)
    for note in result.notes:
        yield f"- {note}"
    if result.notes:
        yield ""


def _figures(table: Table) -> Iterator[str]:
    yield from _table(table.columns, [[report.cell(each) for each in row] for row in table.rows])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _picture(file: Path, title: str) -> Iterator[str]:
    yield f"![{title}]({file.relative_to(DOCS)})"
    yield ""
