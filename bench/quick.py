"""Several measures on one stack, one after the other: there is no time for a stack each in three minutes.

`python -m bench.quick FILE NAME…`: what was found goes to FILE after each of them.
"""

import argparse
import os
import traceback
from contextlib import ExitStack
from pathlib import Path

from bench import documents, report
from bench.budgets import Budgets
from bench.documents import Run, Taking
from bench.measures import MEASURES
from bench.one import DATABASE
from bench.run import Common, Options, common, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("measure", nargs="+", choices=MEASURES)
    given = parser.parse_args()
    budgets = Budgets({name: MEASURES[name].BUDGET.quick for name in given.measure})
    runs: dict[str, Run] = {}
    with _Shared(os.environ.get(DATABASE, "")) as shared:
        for name in given.measure:
            if (budget := budgets.next(name)) is None:
                say(f"{name}: not run: the others have taken its time")
                continue
            runs[name] = _run(name, budget, shared)
            documents.write(given.file, runs)


def _run(name: str, budget: float, shared: "_Shared") -> Run:
    say(f"{name}: about {budget:.0f} s")
    taking = Taking(name, quick=True)
    try:
        result = MEASURES[name].run(Options(True, budget, common=shared.stack()))
    except Exception as error:  # noqa: BLE001 - whatever it is, the others are still to come
        traceback.print_exc()
        shared.close()  # who knows what it has left
        say(f"{name} FAILED: {error!r}")
        return taking.ended(None, f"{error!r}; what it said is above")
    run = taking.ended(result)
    say(f"{name}: took {run.seconds:.0f} s")
    report.show(result)
    return run


class _Shared:
    """The stack that is used by one after the other, started when it is first asked for."""

    def __init__(self, database: str) -> None:
        self._options = Options(quick=True, budget=0.0, database=database)
        self._open = ExitStack()
        self._common: Common | None = None

    def stack(self) -> Common:
        if self._common is None:
            self._common = self._open.enter_context(common(self._options))
        return self._common

    def close(self) -> None:
        self._common = None
        self._open.close()

    def __enter__(self) -> "_Shared":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    main()
