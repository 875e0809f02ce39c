"""One mail server and the devices that poll it: started, looked at, sent commands to, ended."""

import asyncio
import json
import random
import secrets
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from api.operator.sockets import free_port
from bench.peers import mail_server, pollers, processes, wire
from bench.peers.http import Connection, Place
from bench.peers.wire import Traffic

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Seen:
    """What had happened at `at`, by `time.monotonic`; `cpu` are the server's seconds."""

    at: float
    cpu: float
    requests: int
    traffic: Traffic


class Polled:
    """A server of its own for one way of polling, and its devices in a process of their own."""

    def __init__(self, root: Path, name: str, mode: str, every: float, count: int) -> None:
        """`root`: an empty folder; `every`: seconds between two polls of a device."""
        self.name, self.mode, self.every, self.count = name, mode, every, count
        self._root = root
        self._tokens = [(secrets.token_urlsafe(32), f"device-{number}") for number in range(count)]
        self._backend = secrets.token_urlsafe(32)
        self._port = 0
        self._authority = ""
        self.sent = 0

    def start_server(self, certificate: Path, authority: Path) -> None:
        self._root.mkdir(mode=0o700)
        self._port = free_port(LOOPBACK, besides=set())
        self._authority = str(authority)
        database = self._root / "mail.sqlite"
        mail_server.make_database(database, [*self._tokens, (self._backend, mail_server.BACKEND)])
        log = self._root / "server.log"
        told = {"port": self._port, "certificate": str(certificate), "database": str(database)}
        self._server = processes.start_python("bench.peers.mail_server", self._root, "server", told)
        processes.wait(self._server, log, lambda: processes.listens(self._port))

    def start_devices(self) -> None:
        """Return when they are connected, where they stay so."""
        told = {
            "port": self._port,
            "authority": self._authority,
            "tokens": [token for token, _ in self._tokens],
            "mode": self.mode,
            "every": self.every,
        }
        self._devices = processes.start_device("bench.peers.pollers", self._root, "devices", told)

    def cpu(self) -> float:
        """The server's CPU seconds since it was started."""
        return busy(self._server.pid)

    def look(self) -> Seen:
        last = next(told for told in reversed(self._told()) if "at" in told)
        if last["failed"]:
            raise RuntimeError(f"{self.name}: {last['failed']:.0f} polls failed")
        if self.mode == pollers.RECONNECT:
            traffic = Traffic(int(last["payload"]), int(last["segments"]), self.count)
        else:
            traffic = wire.at(self._port)
        return Seen(last["at"], self.cpu(), int(last["polls"]), traffic)

    def delays(self) -> list[float]:
        """Milliseconds from each command's acceptance until its device had it."""
        return [told["delay"] for told in self._told() if "delay" in told]

    async def send(self, rate: float, seconds: float) -> None:
        """Commands to random devices, at random times."""
        place = Place("localhost", self._port, ssl.create_default_context(cafile=self._authority))
        headers = {"Authorization": f"Bearer {self._backend}"}
        body = {"name": "noop", "args": {}}
        made = [place.request("POST", f"/v1/devices/{device}/commands", headers, body) for _, device in self._tokens]
        self.sent += await send(place, made, rate, seconds)

    def stop(self) -> None:
        for process in ("_devices", "_server"):
            if (child := getattr(self, process, None)) is not None:
                processes.end(child)

    def _told(self) -> list[dict[str, float]]:
        return list(_documents(self._root / "devices.log"))


def busy(pid: int) -> float:
    """CPU seconds of a process and its threads, to the nanosecond: an idle server uses less than a tick."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def send(place: Place, requests: Sequence[bytes], rate: float, seconds: float) -> int:
    """One of the requests at a time, at random, `rate` a second on average; how many."""
    connection = Connection(place)
    await connection.open()
    count, loop = round(rate * seconds), asyncio.get_running_loop()
    moments = sorted(random.uniform(0, seconds) for _ in range(count))  # noqa: S311 - a moment
    began = loop.time()
    for moment in moments:
        await asyncio.sleep(began + moment - loop.time())
        answer = await connection.ask(random.choice(requests))  # noqa: S311 - a device
        if answer.status not in (200, 202):  # the gateway's answer is 200 if it is settled by then
            raise RuntimeError(f"a command is answered with {answer.status}: {answer.body[:500]!r}")
    connection.close()
    return count


def _documents(path: Path) -> Iterator[dict[str, float]]:
    """The whole lines that are documents: the last one may still be being written."""
    text = path.read_text() if path.exists() else ""
    for line in text.rpartition("\n")[0].splitlines():
        if line.startswith("{"):
            yield json.loads(line)
