"""What it costs to be reachable, and how late a command arrives: devices that poll by HTTPS, that poll long, and that
have a mailbox; the same number of each.

Polling every 60 and every 10 seconds, over a kept connection or a new one each time, against a small server that does
nothing else (`bench.peers.mail_server`); long polls of 30 seconds against the same; and mailboxes of a stack, with its
ledger on PostgreSQL. All connections are TLS, all tokens are checked. Costs are taken while there is nothing to do: CPU
of the server's processes (for mailboxes of broker, gateway, worker and database), without what they use when no device
is there; requests; and what went over the wire, from the kernel's counters of each connection (`bench.peers.wire`).

The costs of all are taken in the same seconds: CPU time and counters are each process's own, whatever else runs. Delays
are from a command's acceptance until its device has it, with commands to random devices at random times.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from api.operator.stack import Stack
from bench.cpu import Meter
from bench.devices import Fleet, Load
from bench.enrolled import Enrolled
from bench.peers import pollers, wire
from bench.peers.http import Place
from bench.peers.polled import Polled, Seen, send
from bench.registering import enrolled_on
from bench.results import Bar, Comparison, Result, Series, Table
from bench.run import Budget, Options, databases, percentile, say, stack_on

_T = TypeVar("_T")

BARS: tuple[Bar, ...] = ()
BUDGET = Budget(quick=50.0, full=170.0)

FLEET = 250_000  # devices that the costs are carried forward to
_PER = 1000  # devices that costs are told for
_KEPT, _NEW = "kept connection", "new connection each time"
_WAYS = (
    (f"polling every 60 s, {_NEW}", pollers.RECONNECT, 60.0),
    (f"polling every 60 s, {_KEPT}", pollers.KEEP, 60.0),
    (f"polling every 10 s, {_NEW}", pollers.RECONNECT, 10.0),
    (f"polling every 10 s, {_KEPT}", pollers.KEEP, 10.0),
    ("long polling, 30 s", pollers.LONG, 30.0),
)
_LONG, _MAILBOXES = _WAYS[4][0], "mailboxes"
_SETTLING = 3.0  # seconds after a start
_CONNECTS = 40.0  # logins a second, of mailboxes: a machine that has other work to do keeps up with them
_CONNECTING = 240.0  # seconds for all of them
_LATE = 20.0  # seconds beyond its interval that a poll may take to bring what there is


@dataclass(frozen=True, slots=True)
class _Plan:
    """Seconds: `idle` without devices; `window` in which costs are taken, with whole periods of heartbeats, 15 each;
    `sending` of commands, `rate` a second. `slow`: wait for what is polled for every 60 seconds."""

    devices: int
    idle: float
    window: float
    sending: float
    rate: float
    slow: bool


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of `_PER` devices in a minute: `cpu` in seconds, `size` in bytes. `base`: CPU without any device. `parts`: of
    which processes it is."""

    requests: float
    cpu: float
    base: float
    segments: float
    size: float
    parts: str = ""


def run(options: Options) -> Result:
    plan = (
        _Plan(250, 2.0, 15.0, 4.0, 8.0, slow=False) if options.quick else _Plan(1000, 5.0, 30.0, 15.0, 8.0, slow=True)
    )
    with ExitStack() as cleanup:
        given = cleanup.enter_context(databases(options))
        stack, root = cleanup.enter_context(stack_on(options, given.postgresql()))
        costs, delays = _measure(stack, root, plan, cleanup)
    return _result(plan, costs, delays)


def _measure(
    stack: Stack, root: Path, plan: _Plan, cleanup: ExitStack
) -> tuple[dict[str, _Cost], dict[str, list[float]]]:
    ways = [Polled(root / f"way-{number}", *way, plan.devices) for number, way in enumerate(_WAYS)]
    for way in ways:
        cleanup.callback(way.stop)
        way.start_server(stack.files.broker_certificate, stack.files.authority)
    enrolled = _run(
        enrolled_on(
            stack.settings,
            stack.files.authority,
            stack.files.operator_token.read_text().strip(),
            "bench",
            plan.devices,
            say,
        )
    )
    time.sleep(_SETTLING)
    servers = {way.name: way.cpu for way in ways}
    meter = Meter.of(stack, {})
    base = _idle(servers, meter, plan.idle)

    say(f"connecting {plan.devices} devices to their mailboxes")
    fleet = cleanup.enter_context(Fleet(enrolled, Load(rate=_CONNECTS), log=root / "fleet.log"))
    fleet.wait_connected(within=_CONNECTING)
    for way in ways:
        say(f"starting {plan.devices} devices: {way.name}")
        way.start_devices()
    time.sleep(_SETTLING)
    costs = _costs(stack, plan, ways, meter, base)

    short = [way for way in ways if way.mode != pollers.LONG]
    _run(_send_all([way for way in short if plan.slow or way.every < 60.0], plan))
    sent_at = time.monotonic()
    for way in sorted(short, key=lambda way: way.every):
        if way.every < 60.0 or not plan.slow:
            _await_all(way, sent_at + way.every + _LATE)
            way.stop()
    long = next(way for way in ways if way.mode == pollers.LONG)
    _run(_send_all([long], plan))
    _await_all(long, time.monotonic() + _LATE)
    mailboxes = _delays_of_mailboxes(stack, plan, enrolled, fleet)
    for way in short:
        _await_all(way, sent_at + way.every + _LATE)
    return costs, {way.name: way.delays() for way in ways} | {_MAILBOXES: mailboxes}


def _idle(servers: Mapping[str, Callable[[], float]], meter: Meter, seconds: float) -> dict[str, float]:
    """CPU seconds in a second, without any device."""
    meter.start()
    before = {name: cpu() for name, cpu in servers.items()}
    time.sleep(seconds)
    used = {name: cpu() - before[name] for name, cpu in servers.items()}
    used[_MAILBOXES] = sum(meter.seconds().values())
    return {name: cpu / seconds for name, cpu in used.items()}


def _costs(stack: Stack, plan: _Plan, ways: list[Polled], meter: Meter, base: Mapping[str, float]) -> dict[str, _Cost]:
    """Of all at once, in the same seconds."""
    assert stack.broker is not None
    port = stack.broker.amqps_port
    meter.start()
    before = {way.name: way.look() for way in ways}
    before[_MAILBOXES] = Seen(time.monotonic(), 0.0, 0, wire.at(port))
    time.sleep(plan.window)
    parts = meter.seconds()
    after = {way.name: way.look() for way in ways}
    after[_MAILBOXES] = Seen(time.monotonic(), sum(parts.values()), 0, wire.at(port))
    costs = {name: _cost(plan, before[name], after[name], base[name]) for name in before}
    told = ", ".join(f"{name} {seconds * 60 / plan.window:.2f} s" for name, seconds in parts.items())
    costs[_MAILBOXES] = replace(costs[_MAILBOXES], parts=told)
    return costs


def _cost(plan: _Plan, before: Seen, after: Seen, base: float) -> _Cost:
    if before.traffic.connections != after.traffic.connections or after.traffic.connections < plan.devices:
        raise RuntimeError(f"connections came or went: {before.traffic.connections}, {after.traffic.connections}")
    seconds = after.at - before.at
    share = 60.0 / seconds * _PER / plan.devices
    traffic = after.traffic - before.traffic
    cpu = max(0.0, after.cpu - before.cpu - base * seconds)
    requests, segments = after.requests - before.requests, traffic.segments
    return _Cost(requests * share, cpu * share, base * 60, segments * share, traffic.size * share)


async def _send_all(ways: list[Polled], plan: _Plan) -> None:
    async with asyncio.TaskGroup() as group:
        for way in ways:
            group.create_task(way.send(plan.rate, plan.sending))


def _await_all(way: Polled, until: float) -> None:
    """Raises `RuntimeError`: its devices don't get all that was sent to them."""
    while (had := len(way.delays())) < way.sent:
        if time.monotonic() > until:
            raise RuntimeError(f"{way.name}: devices have had {had} commands of {way.sent}")
        time.sleep(0.2)


def _delays_of_mailboxes(stack: Stack, plan: _Plan, enrolled: Enrolled, fleet: Fleet) -> list[float]:
    place = Place.of(stack.settings.api_url, ssl.create_default_context(cafile=stack.files.authority))
    headers = {"Authorization": f"Bearer {stack.files.operator_token.read_text().strip()}"}
    body = {"name": "noop", "args": {}}
    made = [place.request("POST", f"/v1/devices/{own.id}/commands", headers, body) for own in enrolled.devices]
    sent = _run(send(place, made, plan.rate, plan.sending))
    fleet.wait(lambda counts: counts.ran >= sent, f"{sent} commands run", within=_LATE)
    delays, _ = fleet.latencies()
    if len(delays) != sent:
        raise RuntimeError(f"{sent} commands were sent to mailboxes, and {len(delays)} have arrived")
    return delays


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _result(plan: _Plan, costs: Mapping[str, _Cost], delays: Mapping[str, list[float]]) -> Result:
    ours, late = costs[_MAILBOXES], percentile(delays[_MAILBOXES], 0.5)
    comparisons = []
    for name, cost in costs.items():
        if name == _MAILBOXES:
            continue
        for what, unit, mine, their in (
            ("CPU of an idle device", "ms/min", ours.cpu, cost.cpu),
            ("bytes of an idle device", "B/min", ours.size / _PER, cost.size / _PER),
            ("delay of a command, p50", "ms", late, percentile(delays[name], 0.5) if delays.get(name) else 0.0),
        ):
            if their > 0:
                subject, peer = Series(_MAILBOXES, unit, (mine,)), Series(name, unit, (their,))
                comparisons.append(Comparison(f"{what}, against {name}", subject, peer))
    return Result(
        "polling",
        f"Being reachable: mailboxes beside polling, {plan.devices} devices each",
        comparisons,
        [
            Table(
                f"With nothing to do, for {_PER} devices in a minute; and how late a command is",
                (
                    "reached by",
                    "requests",
                    "segments",
                    "KB on the wire",
                    "CPU, s",
                    "delay p50, ms",
                    "p99, ms",
                    "commands",
                ),
                tuple(_row(name, cost, delays.get(name, [])) for name, cost in costs.items()),
            ),
            Table(
                f"Carried forward to {FLEET:,} devices, in proportion",
                ("reached by", "requests a second", "Mbit/s", "GB a day", "processors busy"),
                tuple(_forward(name, cost) for name, cost in costs.items()),
            ),
        ],
        notes=(
            "CPU is what the devices cause; with none there, "
            + ", ".join(f"{name}: {cost.base:.2f} s a minute" for name, cost in costs.items()),
            f"CPU of mailboxes in a minute, with {plan.devices} devices and all that runs without any: {ours.parts}",
            f"bytes are TCP's own and {wire.HEADERS} of headers a segment, both directions, without the layer below",
            "heartbeats are all that goes over the wire for an idle mailbox",
            f"the figures for {FLEET:,} devices are the measured ones times {FLEET // _PER}, not measured themselves",
            *([] if plan.slow else ["what is polled for every 60 s is not waited for in a quick run"]),
        ),
    )


def _row(name: str, cost: _Cost, delays: list[float]) -> tuple[str | float, ...]:
    p50, p99 = (round(percentile(delays, part), 1) if delays else "–" for part in (0.5, 0.99))
    size, cpu = round(cost.size / 1000, 1), round(cost.cpu, 3)
    return name, round(cost.requests), round(cost.segments), size, cpu, p50, p99, len(delays)


def _forward(name: str, cost: _Cost) -> tuple[str | float, ...]:
    """Of a minute and `_PER` devices to a second and all of them."""
    share = FLEET / _PER / 60
    megabits, gigabytes = cost.size * share * 8 / 1e6, cost.size * share * 86_400 / 1e9
    return name, round(cost.requests * share), round(megabits, 2), round(gigabytes, 1), round(cost.cpu * share, 2)
