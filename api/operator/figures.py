"""Which metrics there are, and where each is read (docs/metrics.md)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.operator import certificates
from api.operator.metrics import Look, Metrics
from fabric.amqp.publisher import AmqpPublisher
from fabric.errors import Temporary
from fabric.guarding import FloodGuard
from fabric.measures import Figures, Lives
from fabric.sql.figures import SqlFigures
from fabric.uplink import Inbox
from fabric.worker.closing import Closures
from fabric.worker.reports import Recorder

PROBLEMS = ("ledger", "broker-publishing", "broker-consuming", "signing-keys", "topology")
"""What a process may lack to do its work."""

Ready = Callable[[], Awaitable[Mapping[str, str]]]


class Readiness:
    """What was missing at the last look."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self._found: Mapping[str, str] | None = None

    async def look(self) -> None:
        self._found = None
        with suppress(Temporary):
            self._found = await self._ready()

    def problems(self) -> Mapping[str, float]:
        found = self._found
        # When nothing is known in time, it is the ledger that did not answer: all else has shorter limits.
        return {each: float(each == "ledger" if found is None else each in found) for each in PROBLEMS}


class LedgerFigures:
    """What was read of the ledger at the last look."""

    def __init__(self, source: SqlFigures) -> None:
        self._source = source
        self._read: Figures | None = None

    async def look(self) -> None:
        self._read = None
        with suppress(Temporary):
            self._read = await self._source.read()

    def show(self, metrics: Metrics) -> None:
        def of(values: Callable[[Figures], Mapping[Any, float]]) -> Callable[[], Mapping[Any, float]]:
            return lambda: {} if self._read is None else values(self._read)

        metrics.gauge("commands_open", "Commands that are not settled.", ("state",), of(lambda read: read.open))
        metrics.gauge(
            "oldest_waiting_seconds",
            "Since the oldest command that waits for its device was accepted.",
            (),
            of(lambda read: {(): read.oldest_waiting}),
        )
        metrics.gauge(
            "outbox_events",
            "Events without a position yet, and those with one that the stream does not have yet.",
            ("stage",),
            of(lambda read: {"unsequenced": read.unsequenced, "unpublished": read.unpublished}),
        )
        metrics.gauge(
            "events_published",
            "The position of the last event in the stream.",
            (),
            of(lambda read: {(): read.published}),
        )
        metrics.gauge("sessions", "Live connections of devices.", (), of(lambda read: {(): read.sessions}))
        metrics.gauge(
            "closures", "Devices whose connections are to be closed.", (), of(lambda read: {(): read.closures})
        )


class Expiries:
    """When the certificates in the state directory end, as it was at the last look."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.found: Mapping[str, float] = {}

    async def look(self) -> None:
        found = await asyncio.to_thread(certificates.expiries, self._state_dir)
        self.found = {name: at.timestamp() for name, at in found.items()}


@dataclass(frozen=True, slots=True)
class Everywhere:
    """What gateways and workers measure alike."""

    state_dir: Path
    ready: Ready
    lives: Lives
    publisher: AmqpPublisher
    flood: FloodGuard

    def metrics(self, *looks: Look) -> Metrics:
        """Those metrics, to which others may be added; `looks` are what those read."""
        readiness, expiries = Readiness(self.ready), Expiries(self.state_dir)
        metrics = Metrics([readiness.look, expiries.look, *looks])
        metrics.gauge("problem", "1: it can't do all of its work for this reason.", ("problem",), readiness.problems)
        metrics.gauge(
            "certificate_expiry_timestamp_seconds",
            "When a certificate expires, since the epoch.",
            ("certificate",),
            lambda: expiries.found,
        )
        metrics.histogram(
            "command_state_seconds",
            "From a command's acceptance until it came into a state.",
            ("state",),
            self.lives.entered,
        )
        metrics.histogram(
            "deadline_lateness_seconds",
            "From a deadline, or the end of a response time, until it was committed.",
            ("promise",),
            self.lives.late,
        )
        metrics.histogram("publish_seconds", "Publishes that wait for their confirm.", ("fate",), self.publisher.fates)
        metrics.counter(
            "flood_exceeded", "Times that a device went over a limit.", ("meter",), lambda: self.flood.exceeded
        )
        metrics.counter(
            "flood_throttled", "Times that this got a device refused.", ("meter",), lambda: self.flood.throttled
        )
        return metrics


def of_worker(
    everywhere: Everywhere,
    source: SqlFigures,
    inboxes: Sequence[Inbox],
    recorder: Recorder,
    closures: Closures,
    clock_open: Callable[[], bool],
) -> Metrics:
    """All that a worker measures."""
    held = LedgerFigures(source)
    metrics = everywhere.metrics(held.look)
    held.show(metrics)
    time = asyncio.get_running_loop().time

    def counted(of: Callable[[Inbox], Mapping[str, int]]) -> Callable[[], Mapping[Any, float]]:
        return lambda: {(inbox.queue, key): count for inbox in inboxes for key, count in list(of(inbox).items())}

    def unclosed() -> Mapping[Any, float]:
        return {(): 0.0 if closures.oldest is None else time() - closures.oldest}

    metrics.counter("uplink_taken", "Messages of devices.", ("queue", "kind"), counted(lambda inbox: inbox.taken))
    metrics.counter(
        "uplink_refused", "Messages that were not taken.", ("queue", "reason"), counted(lambda inbox: inbox.refused)
    )
    metrics.counter(
        "odd_reports", "Reports that did not count, or should not have come.", ("reason",), lambda: recorder.odd
    )
    metrics.gauge("closure_oldest_seconds", "Since the oldest closure that is not done was seen.", (), unclosed)
    metrics.gauge("deadline_clock_open", "1: deadlines are announced.", (), lambda: {(): float(clock_open())})
    return metrics
