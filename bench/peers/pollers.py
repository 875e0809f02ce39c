"""Devices that poll, as many as are told of in one process: `python -m bench.peers.pollers FILE`.

Each has a token of its own and an interval whose phase is random. Over a kept connection, or over a new one for each
poll, with a full TLS handshake and a clean end; or with long polls, one after the other. What they did is written to
standard output, a JSON document a line.
"""

import asyncio
import heapq
import json
import random
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from typing import Any

import uvloop

from bench.peers import processes, wire
from bench.peers.http import Answer, Connection, Place
from bench.peers.mail_server import WAIT

KEEP, RECONNECT, LONG = "keep-alive", "reconnect", "long"
_TELL_EVERY = 0.25  # seconds
_THREADS = 8  # polls at once over new connections
_AT_ONCE = 16  # handshakes at once, before anything is measured
_SEGMENT = 1448  # bytes: as on Ethernet; the loopback's would carry a certificate in one segment
_TIMEOUT = 30.0  # seconds


@dataclass(slots=True)
class Tally:
    """Since the process began. `payload` and `segments` of connections that have ended; only `reconnect` has such."""

    polls: int = 0
    payload: int = 0
    segments: int = 0
    had: int = 0  # commands
    failed: int = 0  # polls that were not answered as they should


class Pollers:
    """All devices of this process."""

    def __init__(self, place: Place, tokens: list[str], mode: str, every: float) -> None:
        self._place, self._mode, self._every = place, mode, every
        self._tokens = tokens
        more = {"Connection": "close"} if mode == RECONNECT else {}
        self._requests = [
            place.request("GET", "/v1/mail", {"Authorization": f"Bearer {token}", **more}) for token in tokens
        ]
        self._tally = Tally()
        self._lock = threading.Lock()

    async def run(self) -> None:
        if self._mode == RECONNECT:
            print(processes.READY)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell())
                group.create_task(asyncio.to_thread(self._reconnecting))
            return
        connections = [Connection(self._place) for _ in self._requests]
        gate = asyncio.Semaphore(_AT_ONCE)

        async def opened(connection: Connection) -> None:
            async with gate:
                await connection.open()

        await asyncio.gather(*map(opened, connections))
        print(processes.READY)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell())
            for connection, request, token in zip(connections, self._requests, self._tokens, strict=True):
                poll = (
                    self._long_polling(connection, token) if self._mode == LONG else self._polling(connection, request)
                )
                group.create_task(poll)

    async def _tell(self) -> None:
        while True:
            with self._lock:
                _print({"at": time.monotonic(), **asdict(self._tally)})
            await asyncio.sleep(_TELL_EVERY)

    async def _polling(self, connection: Connection, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + random.uniform(0, self._every)  # noqa: S311 - a phase
        while True:
            await asyncio.sleep(due - loop.time())
            await self._poll(connection, request)
            due += self._every

    async def _long_polling(self, connection: Connection, token: str) -> None:
        """The first one is shorter, as if it had begun before this process: their ends are spread from the start on."""
        for wait in chain([random.uniform(0, WAIT)], repeat(WAIT)):  # noqa: S311 - a phase
            path = f"/v1/mail?wait={wait:.3f}"
            await self._poll(connection, self._place.request("GET", path, {"Authorization": f"Bearer {token}"}))

    async def _poll(self, connection: Connection, request: bytes) -> None:
        try:
            self._count(await connection.ask(request))
        except (OSError, TimeoutError):
            self._tally.failed += 1
            await asyncio.sleep(1)

    def _reconnecting(self) -> None:
        """A heap of who is due when, and threads that poll."""
        now = time.monotonic()
        due = [(now + random.uniform(0, self._every), request) for request in self._requests]  # noqa: S311 - a phase
        heapq.heapify(due)
        with ThreadPoolExecutor(_THREADS) as pool:
            while True:
                when, request = due[0]
                time.sleep(max(0.0, when - time.monotonic()))
                pool.submit(self._poll_anew, request)
                heapq.heapreplace(due, (when + self._every, request))

    def _poll_anew(self, request: bytes) -> None:
        try:
            answer, traffic = _over_a_new_connection(self._place, request)
        except (OSError, ValueError):
            with self._lock:
                self._tally.failed += 1
            return
        with self._lock:
            self._tally.payload += traffic.payload
            self._tally.segments += traffic.segments
            self._count(answer)

    def _count(self, answer: Answer) -> None:
        now = time.time()
        self._tally.polls += 1
        if answer.status == 200:
            for command in json.loads(answer.body)["commands"]:
                self._tally.had += 1
                _print({"delay": (now - command["at"]) * 1000})
        elif answer.status != 204:
            self._tally.failed += 1


def _over_a_new_connection(place: Place, request: bytes) -> tuple[Answer, wire.Traffic]:
    """The answer, and all that went over the wire for it, from the first segment to the last."""
    assert place.tls is not None
    with socket.socket() as plain:
        plain.settimeout(_TIMEOUT)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        plain.connect(("127.0.0.1", place.port))
        with place.tls.wrap_socket(plain, server_hostname=place.host) as secure:
            secure.sendall(request)
            said = b""
            while more := secure.recv(65536):
                said += more
            with suppress(ssl.SSLError):
                secure.unwrap()  # our end of it, too
            secure.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                secure.recv(1)  # until the server has closed it
            traffic = wire.of(secure)
    head, _, body = said.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]), body), traffic


def _print(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _main() -> None:
    told = processes.told(sys.argv)
    context = ssl.create_default_context(cafile=told["authority"])
    place = Place("localhost", told["port"], context)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Pollers(place, told["tokens"], told["mode"], told["every"]).run())


if __name__ == "__main__":
    _main()
