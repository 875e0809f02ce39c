"""Simulated devices by the thousand: in this process (`Devices`), or in a few of their own (`Fleet`).

Each has a key, a self-signed token for every connection, TLS to the pinned authority, and the agent's own protocol.

    enrolled = await registering.enrolled_on(settings, authority, token, "bench", 1000, say)
    async with Devices(enrolled, Load(rate=500)) as devices:
        await devices.connected(1000, within=60)

    with Fleet(enrolled, Load(), processes=2) as fleet:
        fleet.wait_connected(1000, within=60)
"""

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvloop

from bench.bare import BareDevices
from bench.enrolled import Enrolled, parse
from bench.peers.accounts import Account
from bench.simulated import Simulated, Surroundings, Tally
from device_agent import errors, files
from device_agent.journal import Journal, open_journal
from fabric.amqp import guard

TELL_EVERY = 0.05  # seconds between two lines of a process, while anything changes
BEAT_EVERY = 1.0  # seconds between two looks for heartbeats that are due
STEP = 0.02  # seconds between two handfuls of connects, and of readings
STOP_PATIENCE = 30.0  # seconds for a process to close its connections
OPEN_AT_ONCE = 64  # journals that are opened between two turns of the loop


@dataclass(frozen=True, slots=True)
class Load:
    """What the devices of a run do.

    Attributes:
        rate: first connects a second, of all processes together; later ones follow the agent's own back-off.
        at_once: devices that may be on their way to their first connection at the same time, in each process.
        handler_delay: seconds that a command runs.
        telemetry: readings of each device a second.
        journals: a directory for the agent's journal of each device; None: they are in memory.
        bare: no device logs in: this account does, for each mailbox (`bench.bare`); all else here is then ignored.
    """

    rate: float = 200.0
    at_once: int = 50
    handler_delay: float = 0.0
    telemetry: float = 0.0
    journals: Path | None = None
    bare: Account | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """`at` is by `time.monotonic`. `serving` devices consume their mailbox; of `up` ones the uplink can be written."""

    at: float = 0.0
    serving: int = 0
    up: int = 0
    connects: int = 0
    refused: int = 0
    lost: int = 0
    ran: int = 0
    readings: int = 0


class Devices:
    """Devices on the running loop, from entering until leaving."""

    def __init__(self, enrolled: Enrolled, load: Load) -> None:
        """Raises `fabric.amqp.guard.Unguarded`: this process can't decode what anybody may have sent."""
        guard.install()
        guard.check()
        self._enrolled, self._load = enrolled, load
        self._devices: list[Simulated] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._around: Surroundings | None = None
        self._bare: BareDevices | None = None

    async def __aenter__(self) -> Self:
        around = self._around = Surroundings(self._load.handler_delay)
        around.tally.changed = self._changed.set
        if self._load.bare is not None:
            ids, answer = [own.id for own in self._enrolled.devices], self._enrolled.answer
            self._bare = BareDevices(ids, answer["amqps_url"], answer["authority"], self._load.bare, around.tally)
            await self._bare.start()
            self._tasks = [asyncio.create_task(self._beat())]
            return self
        for number, identity in enumerate(self._enrolled.identities()):
            self._devices.append(Simulated(around, identity, self._journal(identity.device)))
            if number % OPEN_AT_ONCE == 0:
                await asyncio.sleep(0)
        gc.collect()
        gc.freeze()  # thousands of devices that stay: no collection looks at them again
        self._tasks = [asyncio.create_task(work) for work in (self._start(), self._beat(), self._publish())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._bare is not None:
            self._bare.stop()
        await asyncio.gather(*(device.stop() for device in self._devices))

    def counts(self) -> Counts:
        tally = self.tally
        known = {each.name: getattr(tally, each.name) for each in fields(Counts) if each.name != "at"}
        return Counts(time.monotonic(), **known)

    @property
    def tally(self) -> Tally:
        assert self._around is not None
        return self._around.tally

    async def connected(self, many: int, within: float) -> None:
        """Return when so many consume their mailbox. Raises `TimeoutError`."""
        async with asyncio.timeout(within):
            while self.tally.serving < many:
                self._changed.clear()
                await self._changed.wait()

    async def changed(self) -> None:
        """Return when another device serves, or one no more."""
        self._changed.clear()
        await self._changed.wait()

    def cut(self) -> None:
        """All lose their connection without a word, and come back."""
        for device in self._devices:
            device.link.cut()

    def _journal(self, device: str) -> Journal | None:
        if self._load.journals is None:
            return None
        place = self._load.journals / device
        files.private_directory(place)
        return open_journal(place)

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        began, started = loop.time(), 0
        while started < len(self._devices):
            room = self._load.at_once - (started - self.tally.serving)
            due = min(len(self._devices), int((loop.time() - began + STEP) * self._load.rate), started + max(room, 0))
            for device in self._devices[started:due]:
                device.start()
            started = due
            await asyncio.sleep(STEP)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_EVERY)
            now = asyncio.get_running_loop().time()
            for device in self._devices:
                device.link.beat(now)
            if self._bare is not None:
                self._bare.beat(now)

    async def _publish(self) -> None:
        """Readings of all devices in turn, spread evenly over the time. One that is not connected loses its turn."""
        each = self._load.telemetry * len(self._devices)
        if not each:
            return
        loop = asyncio.get_running_loop()
        began, said = loop.time(), 0
        while True:
            await asyncio.sleep(STEP)
            due = int((loop.time() - began) * each)
            for number in range(said, due):
                self._devices[number % len(self._devices)].say()
            said = due


class Fleet:
    """Devices in processes of their own, from entering until leaving. Synchronous: it has a thread for each process."""

    def __init__(self, enrolled: Enrolled, load: Load, *, processes: int = 1, log: Path | None = None) -> None:
        """`log` is a file for what the processes write to stderr; None: this process's."""
        self._parts = [part for part in enrolled.split(processes) if part.devices]
        self._load, self._log = load, log
        self._children: list[_Child] = []
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        try:
            for part in self._parts:
                self._children.append(_Child(part, self._share(part), self._log, self._news))
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def count(self) -> int:
        return sum(len(part.devices) for part in self._parts)

    @property
    def pids(self) -> list[int]:
        return [child.process.pid for child in self._children]

    def counts(self) -> Counts:
        """The sums of what the processes last told, and when the last one did."""
        told = [child.counts for child in self._children]
        values = {each.name: sum(getattr(one, each.name) for one in told) for each in fields(Counts)}
        return Counts(**{**values, "at": max((one.at for one in told), default=0.0)})

    @property
    def ran(self) -> int:
        return self.counts().ran

    def wait_connected(self, many: int | None = None, *, within: float) -> float:
        """Return when so many (default: all) consume their mailbox: when that was, by `time.monotonic`.

        Raises:
            TimeoutError: they did not; RuntimeError: a process died.
        """
        wanted = self.count if many is None else many
        return self.wait(lambda counts: counts.serving >= wanted, f"{wanted} devices connected", within)

    def wait(self, holds: Callable[[Counts], bool], what: str, within: float) -> float:
        """Return when the counts are so: when that was, by `time.monotonic`. Raises `TimeoutError`, `RuntimeError`."""
        until = time.monotonic() + within
        with self._news:
            while not holds(counts := self.counts()):
                self.check()
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"not within {within:g} s: {what}; {counts}")
                self._news.wait(min(left, 1.0))
            return counts.at

    def check(self) -> None:
        """Raises `RuntimeError` when a process has died."""
        if dead := [child for child in self._children if child.ended]:
            raise RuntimeError(f"a process of devices ended with {dead[0].process.wait()}")

    def latencies(self, within: float = 30.0) -> tuple[list[float], list[float]]:
        """`Tally.delays` and `Tally.confirms` since the last call."""
        for child in self._children:
            child.ask("latencies")
        both = [child.latencies(within) for child in self._children]
        return [each for one in both for each in one[0]], [each for one in both for each in one[1]]

    def cut(self) -> None:
        """All lose their connection without a word, and come back."""
        for child in self._children:
            child.ask("cut")

    def stop(self) -> None:
        """Close all connections cleanly and end the processes. Twice is once."""
        for child in self._children:
            child.ask("stop")
        for child in self._children:
            child.end(STOP_PATIENCE)

    def kill(self) -> None:
        """End the processes as a power cut would end the devices."""
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.end(STOP_PATIENCE)

    def _share(self, part: Enrolled) -> Load:
        share = len(part.devices) / max(1, self.count)
        return replace(self._load, rate=self._load.rate * share)


class _Child:
    """One process of devices, and the thread that reads what it tells."""

    def __init__(self, part: Enrolled, load: Load, log: Path | None, news: threading.Condition) -> None:
        self.counts = Counts()
        self.ended = False
        self._news = news
        self._taken: list[tuple[list[float], list[float]]] = []
        errors_to = log.open("ab") if log is not None else None
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.devices"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors_to, text=True, start_new_session=True,
            )  # fmt: skip
        finally:
            if errors_to is not None:
                errors_to.close()
        self._tell({**part.document(), "load": {**asdict(load), "journals": str(load.journals or "")}})
        self._thread = threading.Thread(target=self._listen, name="fleet", daemon=True)
        self._thread.start()

    def ask(self, what: str) -> None:
        self._tell({"do": what})

    def latencies(self, within: float) -> tuple[list[float], list[float]]:
        """The answer to `latencies`. Raises `TimeoutError`."""
        with self._news:
            if not self._news.wait_for(lambda: self._taken or self.ended, within) or not self._taken:
                raise TimeoutError("a process of devices does not answer")
            return self._taken.pop(0)

    def end(self, patience: float) -> None:
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join(patience)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what could not be written to a dead process
                    pipe.close()

    def _tell(self, what: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            return  # it is dead, and `ended` says so

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            with self._news:
                if "delays" in told:
                    self._taken.append((told["delays"], told["confirms"]))
                else:
                    self.counts = Counts(**told)
                self._news.notify_all()
        with self._news:
            self.ended = True
            self._news.notify_all()


async def _run() -> None:
    """A child: its devices come in one line of standard input, then what to do, until that is closed."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    given = json.loads(await reader.readline())
    told = given["load"]
    told["journals"] = Path(told["journals"]) if told["journals"] else None
    told["bare"] = Account(**told["bare"]) if told["bare"] else None
    load = Load(**told)
    async with Devices(parse(given), load) as devices:
        telling = asyncio.create_task(_tell(devices))
        while line := await reader.readline():
            match json.loads(line)["do"]:
                case "stop":
                    break
                case "cut":
                    devices.cut()
                case "latencies":
                    tally = devices.tally
                    _print({"delays": tally.delays, "confirms": tally.confirms})
                    tally.delays, tally.confirms = [], []
        telling.cancel()
    _print(asdict(devices.counts()))


async def _tell(devices: Devices) -> None:
    before: Counts | None = None
    while True:
        counts = devices.counts()
        if (
            before is None
            or counts.serving != before.serving
            or counts.at - before.at >= 1.0
            or counts.ran != before.ran
        ):
            before = counts
            _print(asdict(counts))
        await asyncio.sleep(TELL_EVERY)


def _print(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _main() -> int:
    import logging
    import resource
    import signal

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("restante.agent").setLevel(logging.ERROR)  # what one agent warns of, thousands would say
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run())
    except (errors.AgentError, guard.Unguarded) as error:
        print(f"bench.devices: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
