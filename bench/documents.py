"""Results as JSON documents and back, so that pages and plots are made from what is kept."""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results import Bar, Comparison, Curve, Result, Series, Table

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One measure that was run: what it found, or how it failed.

    `when` is UTC; `load` the machine's load average over a minute, as the measure began and as it ended."""

    measure: str
    when: str
    quick: bool
    seconds: float
    load: tuple[float, float]
    result: Result | None = None
    failure: str = ""


class Taking:
    """A measure that is being taken."""

    def __init__(self, measure: str, *, quick: bool) -> None:
        self._measure, self._quick = measure, quick
        self._when, self._load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
        self._began = time.monotonic()

    def ended(self, result: Result | None, failure: str = "") -> Run:
        seconds = round(time.monotonic() - self._began, 1)
        return Run(self._measure, self._when, self._quick, seconds, (self._load, os.getloadavg()[0]), result, failure)


def to_document(result: Result) -> Document:
    """With what follows from the figures, for readers of the file; `from_document` leaves that out again."""
    made = asdict(result)
    for told, comparison in zip(made["comparisons"], result.comparisons, strict=True):
        told["ratios"] = list(comparison.ratios)
        told["found"], told["met"] = comparison.found, comparison.met
        for each, series in ((told["subject"], comparison.subject), (told["floor"], comparison.floor)):
            if series is not None:
                each["median"] = series.median
    return made


def from_document(told: Document) -> Result:
    """What `to_document` was given."""
    return Result(
        told["measure"],
        told["title"],
        [
            Comparison(
                each["what"],
                _series(each["subject"]),
                None if each["floor"] is None else _series(each["floor"]),
                None if each["bar"] is None else Bar(**each["bar"]),
            )
            for each in told["comparisons"]
        ],
        [
            Table(each["title"], tuple(each["columns"]), tuple(tuple(row) for row in each["rows"]))
            for each in told["tables"]
        ],
        [
            Curve(
                **{
                    **each,
                    "x": tuple(each["x"]),
                    "lines": {name: tuple(line) for name, line in each["lines"].items()},
                }
            )
            for each in told["curves"]
        ],
        told["notes"],
    )


def write(target: Path, runs: Mapping[str, Run]) -> None:
    """One file with all of them, and with what machine they were run on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": _machine(), "measures": {name: _run(run) for name, run in runs.items()}}
    target.write_text(json.dumps(told, indent=1) + "\n")


def read(source: Path) -> dict[str, Run]:
    """What `write` wrote; nothing when there is no such file."""
    if not source.exists():
        return {}
    return {
        name: Run(
            **{
                **told,
                "load": tuple(told["load"]),
                "result": None if told["result"] is None else from_document(told["result"]),
            }
        )
        for name, told in json.loads(source.read_text())["measures"].items()
    }


def _run(run: Run) -> Document:
    return {**asdict(run), "result": None if run.result is None else to_document(run.result)}


def _series(told: Document) -> Series:
    return Series(told["name"], told["unit"], tuple(told["values"]))


def _machine() -> Document:
    return {
        "processors": os.cpu_count(),
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }
