"""How long it takes until all devices are back after the broker was killed and started again.

The devices are simulated (`bench.devices`): real TLS, a fresh self-signed token for every connection, the agent's own
back-off. One is back when it consumes its mailbox again, for which the fabric has let it in and answered its hello.
The time runs from the moment at which the broker's port for devices takes connections.

The floor is the rate at which the same client makes bare connections to the same broker, just before and just after:
TLS, one internal account whose password the broker checks itself, a channel, and a consumer on the same mailboxes;
64 at a time, so that they never wait and never crowd. As many devices at that rate would be back in the floor's time.

An agent waits up to 30 s between two attempts once the broker has been away for as long, so with few devices their
waits are what is seen; up to five minutes, if it finds the port too busy. A quick run therefore holds the bar only if
the floor alone takes longer; a full one always does. What changes least with the machine's load is the CPU time of a
connect, all parts together.
"""

import asyncio
import resource
import socket
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from api.operator.stack import Stack
from bench import processes, registering
from bench.devices import Counts, Fleet, Load
from bench.enrolled import Enrolled
from bench.peers.accounts import account
from bench.results import Bar, Comparison, Curve, Result, Series, Table
from bench.run import Budget, Options, databases, say, stack_on
from device_agent import backoff

BACK = Bar("all devices back after a broker restart", 1.5, at_most=True)
BARS = (BACK,)
BUDGET = Budget(quick=46.0, full=240.0)

MOST = {True: 500, False: 10_000}  # devices: quick, and in full
_FLOOR = {True: 200, False: 1_000}  # bare connections of one turn
_FIRST = {True: 50, False: 200}  # devices that tell how many there is time for
_SLOWER = 1.6  # times as long as the first ones' connects, that the others' returns may take
_RESERVE = 30.0  # seconds for what is neither: the restart, the second floor, the end
_PROCESSES = 2
_POLL = 0.02  # seconds between two looks whether the broker's port is open
_CONNECTING = 900.0  # seconds, at most
_SETTLING = 3.0  # seconds between the last connect and the restart


@dataclass(frozen=True, slots=True)
class _Turn:
    """So many connected in so many seconds, and CPU seconds of each part meanwhile."""

    count: int
    seconds: float
    cpu: Mapping[str, float]
    memory: int = 0  # KB that the broker grew by

    @property
    def rate(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True, slots=True)
class _Found:
    floors: Sequence[_Turn]
    first: _Turn  # the first connects of the devices, 50 at a time in each process
    back: _Turn
    down: float  # seconds from the kill until the port was open again
    curve: Sequence[tuple[float, int]]  # seconds since then, devices that are back
    counts: Counts  # of the devices, at the end
    missing: int


def run(options: Options) -> Result:
    with databases(options) as given, stack_on(options, given.postgresql()) as (stack, root):
        return _result(options, _measure(options, stack, root))


def _measure(options: Options, stack: Stack, root: Path) -> _Found:
    log = root / "devices.log"
    enrolled = _enrolled(stack, _FLOOR[options.quick])
    before = _floor(stack, enrolled, log)
    say(f"the floor: {before.rate:.0f} bare connections a second")
    count = _affordable(options, stack, enrolled, log)
    enrolled = _enrolled(stack, count, enrolled)
    with Fleet(enrolled, Load(rate=1e6), processes=_PROCESSES, log=log) as fleet:
        try:
            first = _connects(stack, fleet, count)
            say(f"{count} devices are connected, {first.rate:.0f} a second")
            time.sleep(_SETTLING)
            back, down, curve, missing = _restart(options, stack, fleet)
            say(f"{count - missing} of {count} are back after {back.seconds:.1f} s")
            counts = fleet.counts()
        finally:
            fleet.kill()
    after = _floor(stack, enrolled.first(_FLOOR[options.quick]), log)
    say(f"the floor: {after.rate:.0f} bare connections a second")
    return _Found((before, after), first, back, down, curve, counts, missing)


def _enrolled(stack: Stack, count: int, known: Enrolled | None = None) -> Enrolled:
    token = stack.files.operator_token.read_text().strip()
    made = registering.enrolled_on(stack.settings, stack.files.authority, token, "back", count, say, known=known)
    return asyncio.run(made)


def _affordable(options: Options, stack: Stack, enrolled: Enrolled, log: Path) -> int:
    """How many devices there is time for: they connect, and then come back."""
    few = enrolled.first(_FIRST[options.quick])
    with Fleet(few, Load(rate=1e6), processes=_PROCESSES, log=log) as fleet:
        try:
            rate = _connects(stack, fleet, len(few.devices)).rate
        finally:
            fleet.kill()
    return max(len(few.devices), min(MOST[options.quick], int((options.left - _RESERVE) * rate / (1 + _SLOWER))))


def _floor(stack: Stack, enrolled: Enrolled, log: Path) -> _Turn:
    with account(stack, "bench.bare") as bare, Fleet(enrolled, Load(bare=bare), processes=_PROCESSES, log=log) as fleet:
        try:
            return _connects(stack, fleet, len(enrolled.devices))
        finally:
            fleet.kill()


def _connects(stack: Stack, fleet: Fleet, count: int) -> _Turn:
    """From the first attempt until all are connected."""
    memory = _broker_memory(stack)
    began = fleet.wait(lambda counts: counts.connects > 0, "a first attempt", 60.0)
    meter = _Cpu(processes.parts(stack), fleet)  # their processes have started by now
    there = fleet.counts().serving
    ended = fleet.wait_connected(within=_CONNECTING)
    return _Turn(count - there, ended - began, meter.seconds(), _broker_memory(stack) - memory)


def _restart(options: Options, stack: Stack, fleet: Fleet) -> tuple[_Turn, float, Sequence[tuple[float, int]], int]:
    assert stack.broker is not None
    curve: list[tuple[float, int]] = []
    port = _Port(stack)
    killed = time.monotonic()
    stack.broker.kill9()
    port.start()
    meter = _Cpu(processes.service_parts(stack), fleet)
    stack.broker.start()
    opened = port.opened()
    missing = 0
    patience = max(options.left - _RESERVE / 2, _RESERVE)
    try:
        ended = fleet.wait(lambda counts: _noted(curve, counts, opened) >= fleet.count, "all are back", patience)
    except TimeoutError:
        ended, missing = time.monotonic(), fleet.count - fleet.counts().serving
    cpu = {**meter.seconds(), "broker": processes.cpu(processes.parts(stack)["broker"]) - port.cpu}
    return _Turn(fleet.count - missing, ended - opened, cpu), opened - killed, curve, missing


def _noted(curve: list[tuple[float, int]], counts: Counts, opened: float) -> int:
    if counts.at >= opened:
        curve.append((counts.at - opened, counts.serving))
    return counts.serving if counts.at >= opened else 0


def _broker_memory(stack: Stack) -> int:
    return processes.usage(processes.parts(stack)["broker"]).pss


class _Cpu:
    """CPU seconds of the parts of a stack, and of the devices."""

    def __init__(self, parts: Mapping[str, Sequence[int]], fleet: Fleet) -> None:
        self._pids = {**parts, "devices": fleet.pids}
        self._before = {name: processes.cpu(pids) for name, pids in self._pids.items()}

    def seconds(self) -> dict[str, float]:
        return {name: processes.cpu(pids) - self._before[name] for name, pids in self._pids.items()}


class _Port:
    """Notes when somebody listens, and what CPU time its start has taken, from a thread."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._at, self.cpu = stack, 0.0, 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def opened(self) -> float:
        self._thread.join(60.0)
        return self._at

    def _look(self) -> None:
        port = urlsplit(self._stack.settings.amqps_url).port
        while not self._at:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                self._at = time.monotonic()
                self.cpu = processes.cpu(processes.parts(self._stack)["broker"])
                return
            time.sleep(_POLL)


def _result(options: Options, found: _Found) -> Result:
    rate = statistics.fmean(turn.rate for turn in found.floors)
    count = found.back.count + found.missing
    enough = count / rate >= backoff.LONGEST
    turns = {
        "bare, before": found.floors[0],
        "bare, after": found.floors[1],
        "devices, first connect": found.first,
        "devices, after the restart": found.back,
    }
    parts = list(dict.fromkeys(name for turn in turns.values() for name in turn.cpu))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    notes = [
        f"{count} devices in {_PROCESSES} processes; a process may open {files} files here.",
        f"The broker was killed, and took connections again after {found.down:.1f} s, all mailboxes recovered.",
        f"The devices made {found.counts.connects} attempts in all; {found.counts.refused} logins were refused.",
        f"As many as there was time for: {MOST[options.quick]} were wanted." if count < MOST[options.quick] else "",
        ""
        if enough
        else f"Few devices: the agents' waits, {backoff.LONGEST:.0f} s at most, are longer than the floor.",
        f"NOT all came back in the time there was: {found.missing} were missing." if found.missing else "",
    ]
    rows: list[tuple[str | float, ...]] = [
        (name, float(turn.count), f"{turn.rate:.0f} /s", *(_each(turn, part) for part in parts))
        for name, turn in turns.items()
    ]
    memory = [
        ("a bare connection", f"{found.floors[0].memory / found.floors[0].count:.0f} KB"),
        ("a device's connection", f"{found.first.memory / found.first.count:.0f} KB"),
    ]
    return Result(
        "reconnect",
        "All devices back after a broker restart",
        [
            Comparison(
                f"{count} devices back",
                Series(
                    "until all are back" if not found.missing else "at the rate of those that came",
                    "s",
                    (_all_back(found),),
                ),
                Series("at the bare rate", "s", (count / rate,)),
                BACK if enough or not options.quick else None,
            ),
            Comparison(
                "CPU of a first connect, all parts",
                Series("a device", "ms", (_all_parts(found.first),)),
                Series("bare", "ms", (statistics.fmean(_all_parts(turn) for turn in found.floors),)),
            ),
        ],
        (
            Table(
                "Connects, and what each costs in CPU",
                ("", "connected", "rate", *(f"{part}, ms" for part in parts)),
                tuple(rows),
            ),
            Table("Memory of the broker (Pss)", ("", "each"), tuple(memory)),
        ),
        [
            Curve(
                "reconnect",
                f"{count} devices after a broker restart",
                "seconds since its port is open",
                "devices",
                tuple(at for at, _ in found.curve),
                {
                    "back": tuple(float(there) for _, there in found.curve),
                    "at the bare rate": tuple(min(float(count), at * rate) for at, _ in found.curve),
                },
            )
        ],
        [note for note in notes if note],
    )


def _all_back(found: _Found) -> float:
    """Seconds; at the rate so far, if some were missing in the end."""
    return found.back.seconds * (found.back.count + found.missing) / max(1, found.back.count)


def _all_parts(turn: _Turn) -> float:
    """Milliseconds of CPU that each took."""
    return sum(turn.cpu.values()) * 1000 / turn.count


def _each(turn: _Turn, part: str) -> str:
    return f"{turn.cpu[part] * 1000 / turn.count:.2f}" if part in turn.cpu and turn.count else "–"
