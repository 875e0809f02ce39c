"""`make bench`: what the fabric costs and how exact it is, each figure beside a floor or a peer from the same run.

Measures run one after another, each in a process and on a stack of its own; those of a quick run share both. Progress
is on standard error; each measure's table, and at the end the list of all bars, on standard output. Exits 1 if a bar is
not met or a measure failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import documents, page, report
from bench.budgets import QUICK
from bench.documents import Run, Taking
from bench.measures import MEASURES
from bench.one import DATABASE
from bench.run import Options, say

DEFAULT_JSON = Path(".local/bench.json")
_OVERDUE = 60.0  # seconds beyond twice its budget that a measure is given: a slow machine is no failure
_LATE = 10.0  # seconds beyond its end that a quick run is given
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
    failure = ""
    if given.quick:
        runs, failure = _quick(names, given.database)
    else:
        budgets = {name: given.budget or MEASURES[name].BUDGET.full for name in names}
        runs = {name: _run(name, Options(False, budget, given.database)) for name, budget in budgets.items()}
    documents.write(given.json, runs)
    say(f"all figures are in {given.json}")
    if given.write_docs:
        page.write(runs)
    bars = {name: MEASURES[name].BARS for name in MEASURES if not given.measure or name in given.measure}
    met = report.show_bars(bars, runs)
    if failure:
        say(f"the run FAILED: {failure}")
    return 0 if met and not failure else 1


def _seconds(text: str) -> float:
    if not (text.isdecimal() and 30 <= int(text) <= 7_200):
        raise argparse.ArgumentTypeError("a whole number of seconds, 30 to 7200")
    return float(text)


def _run(name: str, options: Options) -> Run:
    """One measure, in a process of its own."""
    say(f"{name}: about {options.budget:.0f} s")
    taking = Taking(name, quick=False)
    with _file() as file:
        argv = ["bench.one", name, str(file), f"--budget={options.budget}"]
        failure = _failure(argv, options.database, 2 * options.budget + _OVERDUE)
        result = None if failure else documents.from_document(json.loads(file.read_text()))
    run = taking.ended(result, failure)
    if result is None:
        say(f"{name} FAILED after {run.seconds:.0f} s: {failure}")
    else:
        say(f"{name}: took {run.seconds:.0f} s")
        report.show(result)
    return run


def _quick(names: Sequence[str], database: str) -> tuple[dict[str, Run], str]:
    """All of them in one process, on one stack: those that were run, and why the process failed, if it did."""
    with _file() as file:
        failure = _failure(["bench.quick", str(file), *names], database, QUICK + _LATE)
        return documents.read(file), failure


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="restante-bench-") as directory:
        yield Path(directory) / "result.json"


def _failure(argv: Sequence[str], database: str, patience: float) -> str:
    """Run one of our programs; why it failed, if it did."""
    environment = {**os.environ, DATABASE: database}
    child = subprocess.Popen([sys.executable, "-m", *argv], env=environment)  # noqa: S603 - our own program
    try:
        code = _ended(child, patience)
    except subprocess.TimeoutExpired:
        return f"it was overdue after {patience:.0f} s"
    return f"it exited {code}; what it said is above" if code else ""


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
