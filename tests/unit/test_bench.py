"""What `make bench` says about what its measures found: nothing that they did not find, and no bar left out."""

import json
from pathlib import Path

import pytest

from bench import documents, page, report
from bench.budgets import QUICK, Budgets
from bench.documents import Run
from bench.measures import MEASURES
from bench.results import Bar, Comparison, Curve, Result, Series, Table

FAST = Bar("fast", 3.0, at_most=True)
MANY = Bar("many", 0.4, at_most=False)
SOON = Bar("soon", 100.0, at_most=True, unit="ms")


def comparison(bar: Bar | None, ours: tuple[float, ...], floor: tuple[float, ...] | None) -> Comparison:
    under = None if floor is None else Series("bare", "ms", floor)
    return Comparison("a command", Series("ours", "ms", ours), under, bar)


RESULT = Result(
    "one",
    "One measure",
    [
        comparison(FAST, (4.0, 6.0, 20.0), (2.0, 2.0, 4.0)),
        comparison(SOON, (50.0,), (1.0,)),
        comparison(None, (1.0,), None),
    ],
    [Table("Costs", ("part", "ms"), (("gateway", 1.5), ("worker", 2.0)))],
    [Curve("one", "One", "devices", "a second", (1.0, 100.0), {"ours": (1.0, 2.0)}, logarithmic=True)],
    ["A note."],
)


def run(result: Result | None, failure: str = "") -> Run:
    return Run("one", "2026-01-01T00:00:00+00:00", True, 1.0, (0.5, 0.6), result, failure)


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    runs = {"one": run(RESULT), "two": run(None, "it exited 1")}
    documents.write(tmp_path / "bench.json", runs)
    assert documents.read(tmp_path / "bench.json") == runs
    told = json.loads((tmp_path / "bench.json").read_text())["measures"]["one"]["result"]["comparisons"][0]
    assert (told["ratios"], told["found"], told["met"]) == ([2.0, 3.0, 5.0], 3.0, True)


def test_a_bar_holds_the_median_of_the_rounds_ratios() -> None:
    assert comparison(FAST, (4.0, 6.0, 20.0), (2.0, 2.0, 4.0)).met  # 2, 3 and 5 times the floor
    assert not comparison(FAST, (8.0, 6.2, 4.0), (2.0, 2.0, 2.0)).met
    assert comparison(MANY, (40.0,), (100.0,)).met
    assert not comparison(MANY, (39.0,), (100.0,)).met


def test_a_bar_in_another_unit_holds_the_figure_and_not_its_ratio() -> None:
    assert comparison(SOON, (99.0,), (1.0,)).met
    assert not comparison(SOON, (101.0,), (100.0,)).met


def test_every_bar_is_listed_as_met_or_not_or_not_run() -> None:
    bars = {"one": (FAST, SOON, MANY), "two": (FAST,), "three": (MANY,)}
    missed = Result("two", "", [comparison(FAST, (7.0,), (2.0,))])
    lines = report.bar_lines(bars, {"one": run(RESULT), "two": run(missed)})
    assert [(line[0], line[1]) for line in lines] == [
        ("met", "fast"),
        ("met", "soon"),
        ("not run", "many"),
        ("NOT met", "fast"),
        ("not run", "many"),
    ]


def test_a_missed_bar_and_a_failed_measure_are_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.show_bars({"one": (FAST,)}, {"one": run(RESULT)})
    assert report.show_bars({"one": (MANY,)}, {"one": run(RESULT)})  # nothing says that it is missed
    assert report.show_bars({"one": ()}, {"one": run(RESULT)})
    assert not report.show_bars({"one": (FAST,)}, {"one": run(None, "it exited 1")})
    assert not report.show_bars({"one": (FAST,)}, {"one": run(Result("one", "", [comparison(FAST, (7.0,), (2.0,))]))})
    assert "one FAILED: it exited 1" in capsys.readouterr().out


def test_a_table_has_the_median_and_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(RESULT)
    said = capsys.readouterr().out
    assert "6 ms" in said
    assert "4 to 20" in said
    assert "2 to 5" in said
    assert "met: fast ≤ 3 × (here 3×)" in said


def test_bars_have_names_of_their_own() -> None:
    names = [bar.what for measure in MEASURES.values() for bar in measure.BARS]
    assert len(set(names)) == len(names)


def test_the_page_has_a_place_for_the_figures() -> None:
    text = page.PAGE.read_text()
    assert text.index(page.BEGIN) < text.index(page.END)


def test_a_measure_that_took_longer_leaves_the_others_less() -> None:
    now = 0.0
    budgets = Budgets({"one": QUICK / 2, "two": QUICK / 4, "three": QUICK / 4}, lambda: now)
    assert budgets.next("one") == QUICK / 2
    now = QUICK * 3 / 4
    assert budgets.next("two") == QUICK / 8
    now = QUICK * 7 / 8
    assert budgets.next("three") == QUICK / 8


def test_a_measure_for_which_too_little_is_left_is_not_run() -> None:
    now = 0.0
    budgets = Budgets({"one": QUICK / 2, "two": QUICK / 2}, lambda: now)
    assert budgets.next("one") == QUICK / 2
    now = QUICK * 0.9
    assert budgets.next("two") is None


def test_what_has_a_bar_fits_into_a_quick_run() -> None:
    assert sum(measure.BUDGET.quick for measure in MEASURES.values() if measure.BARS) <= 1.2 * QUICK
