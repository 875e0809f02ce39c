"""Results as a person reads them: a table on the terminal, and the list of all bars."""

from collections.abc import Iterator, Mapping, Sequence

from bench.documents import Run
from bench.results import Bar, Comparison, Result, Series

Row = Sequence[str]

HEAD = ("", "here: median", "lowest to highest", "floor or peer", "lowest to highest", "ratio", "lowest to highest")


def show(result: Result) -> None:
    """Everything that one measure found, on standard output."""
    print(f"\n{result.title}\n")
    if result.comparisons:
        _print([HEAD, *(row(comparison) for comparison in result.comparisons)])
        for comparison in result.comparisons:
            if comparison.bar is not None:
                print(f"  {verdict(comparison.bar, comparison)}")
    for table in result.tables:
        print(f"\n  {table.title}")
        _print([table.columns, *(tuple(cell(each) for each in line) for line in table.rows)])
    for note in result.notes:
        print(f"  {note}")


def row(comparison: Comparison) -> tuple[str, ...]:
    """The cells under `HEAD`."""
    floor, ratios = comparison.floor, comparison.ratios
    return (
        comparison.what,
        figure(comparison.subject.median, comparison.subject.unit),
        spread(comparison.subject),
        "" if floor is None else f"{figure(floor.median, floor.unit)} {floor.name}",
        "" if floor is None else spread(floor),
        "" if comparison.ratio is None else f"{number(comparison.ratio)}×",
        f"{number(min(ratios))} to {number(max(ratios))}" if ratios else "",
    )


def show_bars(bars: Mapping[str, Sequence[Bar]], runs: Mapping[str, Run]) -> bool:
    """List every bar as met, NOT met or not run. Returns whether none was missed and nothing failed."""
    print("\nAll bars\n")
    lines = list(bar_lines(bars, runs))
    if lines:
        _print(lines)
    else:
        print("  none: what was measured has no bar")
    failed = [run for run in runs.values() if run.result is None]
    for run in failed:
        print(f"  {run.measure} FAILED: {run.failure}")
    return not failed and not any(line[0] == "NOT met" for line in lines)


def bar_lines(bars: Mapping[str, Sequence[Bar]], runs: Mapping[str, Run]) -> Iterator[tuple[str, str, str, str]]:
    """Of each: whether it is met, what it is about, its bound, and what was found."""
    for measure, wanted in bars.items():
        run = runs.get(measure)
        comparisons = run.result.comparisons if run is not None and run.result is not None else ()
        for bar in wanted:
            held = [comparison for comparison in comparisons if comparison.bar == bar]
            if not held:
                yield "not run", bar.what, bar.bound, ""
            for comparison in held:
                yield "met" if comparison.met else "NOT met", bar.what, bar.bound, figure(comparison.found, bar.unit)


def verdict(bar: Bar, comparison: Comparison) -> str:
    return (
        f"{'met' if comparison.met else 'NOT met'}: {bar.what} {bar.bound} (here {figure(comparison.found, bar.unit)})"
    )


def figure(value: float, unit: str) -> str:
    return f"{number(value)}{'' if unit == '×' else ' '}{unit}".rstrip()


def spread(series: Series) -> str:
    return f"{number(series.low)} to {number(series.high)}" if len(series.values) > 1 else ""


def number(value: float) -> str:
    """With three digits that tell, and none that don't."""
    if value != 0 and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def cell(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def _print(rows: Sequence[Row]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  "
            + "  ".join(
                _aligned(text, width, n) for n, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 or not text[:1].isdigit() else text.rjust(width)
