"""Commands a second to 1, 100 and 1,000 connected devices, 32 in flight, each waited for over HTTP until its outcome is
in the ledger, with the ledger on PostgreSQL and on SQLite. (A quick run has 100 devices and PostgreSQL.)

The devices are simulated, with the agent's own code for everything but the connection and the journal, which is in
memory; so many of them could have no disk of their own here. The load comes from one process with 32 kept-alive TLS
connections, a request under way on each. What is counted was durably accepted, in a mailbox on disk, done by the
device, and its outcome committed, before the answer.

The floor takes turns with it, a few seconds each: raw AMQP round trips to as many bare pika clients over TLS, as many
in flight. The same with a C client (librabbitmq) on both ends is the physical limit. The CPU time of each part, for
one command, is taken in the same rounds: it says where the time goes, and other work on the machine changes it least.
"""

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from api.operator.stack import Stack
from bench import registering
from bench.cpu import Meter
from bench.devices import Fleet
from bench.devices import Load as Doing
from bench.load import Load, Requests, load
from bench.raw import NO_LIMIT, PIKA, Raw, native, raw
from bench.results import Bar, Comparison, Curve, Result, Series, Table
from bench.run import Budget, Options, databases, ledger_name, rounds, say, stack_on

RATE = Bar("commands a second over HTTP, 100 devices, 32 in flight, PostgreSQL", 0.4, at_most=False)
RATE_SQLITE = Bar("commands a second over HTTP, 100 devices, 32 in flight, SQLite", 0.4, at_most=False)
BARS = (RATE, RATE_SQLITE)
BUDGET = Budget(quick=16.0, full=240.0)

IN_FLIGHT = 32
DEVICES = (1, 100, 1000)
MOST_ROUNDS = 7
_WARM_UP = 1.0  # seconds
_CONNECTING = 120.0  # seconds for all devices


def run(options: Options) -> Result:
    many = (100,) if options.quick else DEVICES
    bars = (RATE,) if options.quick else (RATE, RATE_SQLITE)
    comparisons, tables, curves, notes = [], [], [], []
    with databases(options) as given, native() as limit:
        if limit is None:
            notes.append(NO_LIMIT)
        parts = len(many) * len(bars)  # of which each gets the same of what is left
        for bar in bars:
            database = given.postgresql() if bar is RATE else given.sqlite()
            ledger = ledger_name(database)
            found: dict[int, _Found] = {}
            with stack_on(options, database) as (stack, _):
                for count in many:
                    try:
                        found[count] = _with(stack, count, limit, options.left / parts)
                    except (TimeoutError, RuntimeError) as error:
                        # What was found with fewer devices stands.
                        notes.append(f"{ledger}, {count:,} devices: not taken: {error}")
                        say(notes[-1])
                    parts -= 1
            for count, one in found.items():
                comparisons += one.compared(ledger, count, bar if count == 100 else None)
            tables += _costs(ledger, found)
            curves += _curves(ledger, found)
    return Result("throughput", f"Commands a second, {IN_FLIGHT} in flight", comparisons, tables, curves, notes)


@dataclass(slots=True)
class _Found:
    """Of each round: commands a second over HTTP, and round trips of the two floors. `cpu`: ms of a command."""

    http: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    pika: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    cpu: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def compared(self, ledger: str, count: int, bar: Bar | None) -> list[Comparison]:
        what = f"{ledger}, {count:,} {'device' if count == 1 else 'devices'}"
        ours = Series("commands", "/s", tuple(self.http))
        found = [Comparison(what, ours, Series("bare pika", "/s", tuple(self.pika)), bar)]
        if self.limit:
            found.append(Comparison(f"{what}, physical limit", ours, Series("bare C", "/s", tuple(self.limit))))
        found.append(Comparison(f"{what}, one command, p50", Series("", "ms", tuple(self.p50))))
        found.append(Comparison(f"{what}, one command, p99", Series("", "ms", tuple(self.p99))))
        return found


def _with(stack: Stack, count: int, limit: tuple[str, ...] | None, seconds: float) -> _Found:
    """So many devices of each kind at once, all connected all the time; their turns, in so many seconds in all."""
    processes = 1 if count == 1 else 2
    token = stack.files.operator_token.read_text().strip()
    enrolled = asyncio.run(
        registering.enrolled_on(stack.settings, stack.files.authority, token, f"throughput-{count}", count, say)
    )
    requests = Requests(
        [f"/v1/devices/{device.id}/commands" for device in enrolled.devices],
        {"Prefer": "wait=30"},
        '{"name": "noop", "args": {}}',
        200,
        '"state":"succeeded"',
    )
    with ExitStack() as cleanup:
        fleet = cleanup.enter_context(Fleet(enrolled, Doing(), processes=processes))
        fleet.wait_connected(within=_CONNECTING)
        sending = cleanup.enter_context(load(stack, requests, IN_FLIGHT))
        pika = cleanup.enter_context(raw(PIKA, stack, count, IN_FLIGHT, processes))
        native_ = None if limit is None else cleanup.enter_context(raw(limit, stack, count, IN_FLIGHT))
        each = min(5.0, max(1.0, seconds / (2 if native_ is None else 3) / 4))
        meter = Meter.of(stack, {"load": [sending.pid], "devices": fleet.pids})
        sending.keep_up(_WARM_UP)
        pika.keep_up(_WARM_UP)
        found = _Found()
        for number in rounds(MOST_ROUNDS, seconds - 2 * _WARM_UP):
            _turns(found, sending, pika, native_, meter, each)
            say(f"{count} devices, round {number}: {found.http[-1]:.0f} /s over HTTP, bare {found.pika[-1]:.0f} /s")
        return found


def _turns(found: _Found, sending: Load, pika: Raw, limit: Raw | None, meter: Meter, each: float) -> None:
    found.pika.append(pika.keep_up(each).rate)
    meter.start()
    sent = sending.keep_up(each)
    for part, seconds in meter.seconds().items():
        found.cpu[part].append(seconds / sent.done * 1000)
    found.http.append(sent.rate)
    found.p50.append(sent.p50)
    found.p99.append(sent.p99)
    if limit is not None:
        found.limit.append(limit.keep_up(each).rate)


def _costs(ledger: str, found: dict[int, _Found]) -> list[Table]:
    if not found:
        return []
    medians = [{part: statistics.median(values) for part, values in one.cpu.items()} for one in found.values()]
    rows: list[tuple[str | float, ...]] = [(part, *(each[part] for each in medians)) for part in medians[0]]
    rows.append(("all", *(sum(each.values()) for each in medians)))
    columns = (f"ledger on {ledger}", *(f"{count:,} devices" for count in found))
    return [Table("CPU of one command, ms", columns, tuple(rows))]


def _curves(ledger: str, found: dict[int, _Found]) -> list[Curve]:
    if len(found) < 2:
        return []

    def medians(taken: Callable[[_Found], list[float]]) -> tuple[float, ...]:
        return tuple(statistics.median(taken(one)) for one in found.values())

    lines = {"over HTTP": medians(lambda one: one.http), "bare pika": medians(lambda one: one.pika)}
    if all(one.limit for one in found.values()):
        lines["bare C"] = medians(lambda one: one.limit)
    title = f"Commands a second, {IN_FLIGHT} in flight, ledger on {ledger}"
    x = tuple(float(count) for count in found)
    return [Curve(f"throughput-{ledger.lower()}", title, "devices", "a second", x, lines, logarithmic=True)]
