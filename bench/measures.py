"""All measures, in the order in which they run. A module joins them by being named here."""

from collections.abc import Mapping
from typing import Protocol

from bench import (
    deadlines,
    idle,
    messaging,
    polling,
    publishing,
    reconnect,
    revocation,
    roundtrip,
    telemetry,
    throughput,
)
from bench.results import Bar, Result
from bench.run import Budget, Options


class Measure(Protocol):
    """What a measure's module has; its docstring tells how it measures."""

    @property
    def BARS(self) -> tuple[Bar, ...]:  # noqa: N802 - a module's constant
        """What it holds its figures against, so that a run can say which bars it did not get to."""

    @property
    def BUDGET(self) -> Budget: ...  # noqa: N802 - a module's constant

    def run(self, options: Options) -> Result: ...


MEASURES: Mapping[str, Measure] = {
    "roundtrip": roundtrip,
    "throughput": throughput,
    "messaging": messaging,
    "publishing": publishing,
    "telemetry": telemetry,
    "revocation": revocation,
    "deadlines": deadlines,
    "polling": polling,
    "idle": idle,
    "reconnect": reconnect,
}
