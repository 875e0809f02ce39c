"""How long one command takes, from the call until its outcome is answered: over HTTP with `Prefer: wait`, and through
the fabric's Python API; one at a time, to a real agent, with the ledger on PostgreSQL and, in a full run, on SQLite.

The floor is a bare AMQP round trip over the same broker: a confirmed, persistent publish to a durable classic queue, a
bare pika client that consumes it over TLS, acks and answers, and the answer by direct reply-to. The two take turns: a
round of the one, a round of the other, and then half a second of the same with a C client (librabbitmq) on both ends,
the physical limit.

A process that was just busy is faster than one that was not. So the same is done once more with turns of a single round
trip each; there both meet caches that the other has just used.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import uvloop

from bench.caller import Caller
from bench.device import Agent
from bench.floor import Floor
from bench.raw import NO_LIMIT, Throughput, native, raw
from bench.results import Bar, Comparison, Curve, Result, Series
from bench.run import Budget, Options, databases, ledger_name, percentile, rounds, say, stack_on
from bench.service import Service, service

P50 = Bar("command over HTTP, PostgreSQL, p50", 3.0, at_most=True)
P99 = Bar("command over HTTP, PostgreSQL, p99", 4.0, at_most=True)
BARS = (P50, P99)
BUDGET = Budget(quick=14.0, full=200.0)

_DEVICE = "roundtrip-1"
_WARM_UP = 50  # round trips of each that don't count, but tell how many a round may have
_FEWEST, _MOST = 50, 500  # round trips of each in a round
_HTTP, _TURNS, _API = "over HTTP", "over HTTP, single by single", "Python API"
_LIMIT = 0.5  # seconds of the C client in each round
_PARTS = (("p50", 0.5), ("p99", 0.99))
_BARE = "bare AMQP"

Pair = tuple[list[float], list[float]]  # milliseconds of a round of the floor, and of a round of its subject


def run(options: Options) -> Result:
    comparisons: list[Comparison] = []
    ledgers: list[tuple[str, float, Sequence[Bar | None]]]
    curves: list[Curve] = []
    notes: list[str] = []
    with databases(options) as given, native() as limit:
        if limit is None:
            notes.append(NO_LIMIT)
        ledgers = [(given.postgresql(), 1.0 if options.quick else 0.6, BARS)]
        if not options.quick:
            ledgers.append((given.sqlite(), 1.0, (None, None)))
        for database, part, bars in ledgers:
            ledger = ledger_name(database)
            found, limits = _on(database, options, part, limit)
            for what, pairs in found.items():
                comparisons += _compared(f"{ledger}, {what}", pairs, bars if what == _HTTP else (None, None))
            sizes = (f"{len(pairs)} of {len(pairs[0][1])} {what}" for what, pairs in found.items())
            notes.append(f"{ledger}, rounds: {'; '.join(sizes)}.")
            if limits:
                comparisons += _against_limit(ledger, found[_HTTP], limits)
            curves.append(_curve(ledger, found))
    return Result("roundtrip", "Round trip of one command", comparisons, (), curves, notes)


def _on(
    database: str, options: Options, part: float, limit: Sequence[str] | None
) -> tuple[dict[str, list[Pair]], list[Throughput]]:
    """Milliseconds of each variant's rounds, taken in this part of what is left of the budget; and of the C client's,
    beside those over HTTP."""
    with ExitStack() as cleanup:
        stack, root = cleanup.enter_context(stack_on(options, database))
        caller = Caller(stack)
        agent = Agent(root / "device", stack, caller.create_device(_DEVICE))
        cleanup.callback(agent.stop)
        floor = Floor(stack)
        cleanup.callback(floor.stop)
        native_ = None if limit is None else cleanup.enter_context(raw(limit, stack, 1, 1))
        limits: list[Throughput] = []
        over_http = partial(caller.command, _DEVICE)
        began = time.monotonic()
        bare, ours = _round(floor.round_trip, _WARM_UP), _round(over_http, _WARM_UP)
        seconds = options.left * part - (time.monotonic() - began)
        pair = (percentile(bare, 0.5) + percentile(ours, 0.5)) / 1000  # seconds
        least = 3 if options.quick else 5
        count = max(_FEWEST, min(_MOST, int(seconds * 0.5 / least / pair)))
        found: dict[str, list[Pair]] = {_HTTP: [], _TURNS: [], _API: []}
        for _ in rounds(11, seconds * 0.5):
            found[_HTTP].append(_said(_HTTP, (_round(floor.round_trip, count), _round(over_http, count))))
            if native_ is not None:
                limits.append(native_.keep_up(_LIMIT))
        for _ in rounds(5, seconds * 0.25):
            found[_TURNS].append(_said(_TURNS, _by_turns(floor.round_trip, over_http, count // 2)))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            serving = service(stack)
            calling = runner.run(serving.__aenter__())
            try:
                runner.run(_awaited(calling, _WARM_UP))
                for _ in rounds(7, seconds * 0.25):
                    bare, ours = _round(floor.round_trip, count // 2), runner.run(_awaited(calling, count // 2))
                    found[_API].append(_said(_API, (bare, ours)))
            finally:
                runner.run(serving.__aexit__(None, None, None))
    return found, limits


async def _awaited(calling: Service, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await calling.command(_DEVICE)
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _round(call: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each call."""
    return [_timed(call) for _ in range(count)]


def _by_turns(floor: Callable[[], None], subject: Callable[[], None], count: int) -> Pair:
    pairs = [(_timed(floor), _timed(subject)) for _ in range(count)]
    return [bare for bare, _ in pairs], [ours for _, ours in pairs]


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def _compared(what: str, pairs: Sequence[Pair], bars: Sequence[Bar | None]) -> list[Comparison]:
    return [
        Comparison(
            f"{what}, {name}",
            Series("command", "ms", tuple(percentile(ours, part) for _, ours in pairs)),
            Series(_BARE, "ms", tuple(percentile(bare, part) for bare, _ in pairs)),
            bar,
        )
        for (name, part), bar in zip(_PARTS, bars, strict=True)
    ]


def _against_limit(ledger: str, pairs: Sequence[Pair], limits: Sequence[Throughput]) -> list[Comparison]:
    return [
        Comparison(
            f"{ledger}, {_HTTP}, physical limit, {name}",
            Series("command", "ms", tuple(percentile(ours, part) for _, ours in pairs)),
            Series("bare C", "ms", taken),
        )
        for (name, part), taken in zip(
            _PARTS, (tuple(each.p50 for each in limits), tuple(each.p99 for each in limits)), strict=True
        )
    ]


def _curve(ledger: str, found: dict[str, list[Pair]]) -> Curve:
    percents = (1.0, 5.0, *(float(percent) for percent in range(10, 100, 5)), 97.0, 99.0)
    lines = {_BARE: [ms for bare, _ in found[_HTTP] for ms in bare]}
    lines |= {what: [ms for _, ours in pairs for ms in ours] for what, pairs in found.items()}
    return Curve(
        f"roundtrip-{ledger.lower()}",
        f"Round trip of one command, ledger on {ledger}",
        "percentile",
        "ms",
        percents,
        {what: tuple(percentile(values, percent / 100) for percent in percents) for what, values in lines.items()},
    )


def _said(what: str, pair: Pair) -> Pair:
    bare, ours = (percentile(each, 0.5) for each in pair)
    say(f"{what}: p50 {ours:.2f} ms, bare {bare:.2f} ms")
    return pair
