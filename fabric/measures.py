"""What is measured where it happens, as plain numbers: they cost a fraction of a microsecond, and know of no monitoring
system.

Each part keeps its own as attributes, and `api.operator.metrics` shows them. They are keyed by enumerations, so that
there is a bounded number of them; an id of a device, a command or a caller is never a key. Written in the event loop's
thread only, read from any.
"""

import enum
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fabric.command import PICKED_UP, Command, Input, Micros, State
from fabric.model import Accepted, Changed, Result, TimelineRow

# Seconds: upper bounds of what is counted together.
LATENCIES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
AGES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 600.0, 3600.0, 86_400.0)

_SECOND: Micros = 1_000_000


class Histogram:
    """Durations in seconds. `counts[n]` are those of at most `bounds[n]` and more than the bound before; the last one
    those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCIES) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


class Promise(enum.StrEnum):
    """What the clock announces: the end of `ttl`, or of `response_timeout`."""

    DEADLINE = "deadline"
    RESPONSE = "response"


class Lives:
    """What became of commands, as this process wrote it to the ledger.

    Attributes:
        entered: from the acceptance until a command came into each state.
        late: from when something was due until it was committed.
    """

    def __init__(self) -> None:
        self.entered: Mapping[State, Histogram] = {state: Histogram(AGES) for state in State}
        self.late: Mapping[Promise, Histogram] = {promise: Histogram() for promise in Promise}

    def note(self, results: Iterable[Result], now: Micros) -> None:
        """`now` is when they were committed."""
        for result in results:
            if isinstance(result, Changed):
                if result.step.entry is not None and result.step.entry.changed:
                    self._enter(result.step.command, result.step.entry.at)
                    self._measure(result, now)
            elif isinstance(result, Accepted) and not result.repeated:
                self.entered[State.ACCEPTED].observe(0.0)
                for command in result.superseded:
                    self._enter(command, command.settled_at or now)

    def _enter(self, command: Command, at: Micros) -> None:
        self.entered[command.state].observe(max(at - command.accepted_at, 0) / _SECOND)

    def _measure(self, result: Changed, now: Micros) -> None:
        command = result.step.command
        if command.state is State.EXPIRED:
            self.late[Promise.DEADLINE].observe(max(now - command.deadline, 0) / _SECOND)
        elif result.step.given is Input.RESPONSE_DUE:
            picked_up = _picked_up_at(result.timeline)
            if picked_up is not None:
                due = picked_up + command.response_timeout
                self.late[Promise.RESPONSE].observe(max(now - due, 0) / _SECOND)


def _picked_up_at(timeline: Iterable[TimelineRow]) -> Micros | None:
    return next((row.entry.at for row in timeline if row.entry.state in PICKED_UP), None)


@dataclass(frozen=True, slots=True)
class Figures:
    """How full the ledger is. Each is counted up to a bound, as it may be of any size.

    Attributes:
        open: commands that are not settled, by state.
        oldest_waiting: seconds since the oldest command that waits for its device was accepted; 0 when none does.
        unsequenced: events without a position.
        unpublished: events that the stream `events` does not have yet, as far as they have a position.
        published: the position of the last one that it has.
        sessions: live connections of devices.
        closures: devices whose connections are to be closed.
    """

    open: Mapping[State, int]
    oldest_waiting: float
    unsequenced: int
    unpublished: int
    published: int
    sessions: int
    closures: int
