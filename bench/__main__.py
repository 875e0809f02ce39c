"""`make bench`: what the fabric costs and how exact it is, each figure beside a floor or a peer from the same run.

Measures run one after another, each in a process of its own. Progress is on standard error; each measure's table, and
at the end the list of all bars, on standard output. Exits 1 if a bar is not met or a measure failed.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import documents, page, report
from bench.documents import Run
from bench.measures import MEASURES
from bench.one import DATABASE
from bench.results import Result
from bench.run import Options, say

DEFAULT_JSON = Path(".local/bench.json")
_QUICK = 160.0  # seconds for all of a quick run, so that it is under 3 minutes
_LEAST = 0.4  # of its budget, below which a measure would find nothing
_OVERDUE = 60.0  # seconds beyond twice its budget that a measure is given: a slow machine is no failure
_LATE = 10.0  # seconds beyond the end of a quick run that its last measure is given
_CLEANING = 45.0  # seconds that an overdue measure is given to stop what it started


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        epilog="\n\n".join(f"{name}: {measure.__doc__}" for name, measure in MEASURES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measure", nargs="*", choices=[*MEASURES, []], help="(default: all)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="only what has a bar, in under 3 minutes")
    length.add_argument(
        "--budget", type=_seconds, metavar="SECONDS", help="for each measure, not its own: for more devices, say"
    )
    parser.add_argument(
        "--database", default="", help="PostgreSQL server to make databases on (default: a private one)"
    )
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="write the figures there (%(default)s)")
    parser.add_argument("--write-docs", action="store_true", help="put figures and plots into docs/")
    given = parser.parse_args()

    names = given.measure or [name for name, measure in MEASURES.items() if measure.BARS or not given.quick]
    budgets = _Budgets(names, given.quick, given.budget)
    runs = {}
    for name in names:
        if (budget := budgets.next(name)) is None:
            say(f"{name}: not run: the others have taken its time")
        else:
            runs[name] = _run(name, Options(given.quick, budget, given.database), budgets.patience(budget))
    documents.write(given.json, runs)
    say(f"all figures are in {given.json}")
    if given.write_docs:
        page.write(runs)
    bars = {name: MEASURES[name].BARS for name in MEASURES if not given.measure or name in given.measure}
    return 0 if report.show_bars(bars, runs) else 1


def _seconds(text: str) -> float:
    if not (text.isdecimal() and 30 <= int(text) <= 7_200):
        raise argparse.ArgumentTypeError("a whole number of seconds, 30 to 7200")
    return float(text)


class _Budgets:
    """Seconds for each measure. In a quick run, one that took longer leaves the others less."""

    def __init__(self, names: Sequence[str], quick: bool, each: float | None) -> None:
        own = {name: MEASURES[name].BUDGET for name in names}
        self._own = {name: it.quick if quick else each or it.full for name, it in own.items()}
        self._until = time.monotonic() + (_QUICK if quick else math.inf)

    def next(self, name: str) -> float | None:
        """None: there is not enough left."""
        left = self._until - time.monotonic()
        part = min(1.0, left / sum(self._own.values()))
        own = self._own.pop(name)
        return part * own if part >= _LEAST else None

    def patience(self, budget: float) -> float:
        """Seconds until a measure is overdue."""
        return min(2 * budget + _OVERDUE, max(self._until - time.monotonic(), 0.0) + _LATE)


def _run(name: str, options: Options, patience: float) -> Run:
    say(f"{name}: about {options.budget:.0f} s")
    when, began, load = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic(), os.getloadavg()[0]
    result, failure = _result(name, options, patience)
    taken = time.monotonic() - began
    if result is None:
        say(f"{name} FAILED after {taken:.0f} s: {failure}")
    else:
        say(f"{name}: took {taken:.0f} s")
        report.show(result)
    return Run(name, when, options.quick, round(taken, 1), (load, os.getloadavg()[0]), result, failure)


def _result(name: str, options: Options, patience: float) -> tuple[Result | None, str]:
    """What it found; or None, and why."""
    with tempfile.TemporaryDirectory(prefix="restante-bench-") as directory:
        file = Path(directory) / "result.json"
        argv = [sys.executable, "-m", "bench.one", name, str(file), f"--budget={options.budget}"]
        argv += ["--quick"] * options.quick
        child = subprocess.Popen(argv, env={**os.environ, DATABASE: options.database})  # noqa: S603
        try:
            code = _ended(child, patience)
        except subprocess.TimeoutExpired:
            return None, f"it was overdue after {patience:.0f} s"
        if code != 0:
            return None, f"it exited {code}; what it said is above"
        return documents.from_document(json.loads(file.read_text())), ""


def _ended(child: "subprocess.Popen[bytes]", within: float) -> int:
    """Its exit code. However this ends, the child has ended, and had the time to stop what it started."""
    try:
        return child.wait(within)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(_CLEANING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


if __name__ == "__main__":
    sys.exit(main())
