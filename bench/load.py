"""A load of HTTP requests from a process of its own, so that the client is not what is measured.

    with load(place, requests, in_flight) as sending:
        sending.keep_up(seconds=3.0)

Each of its connections is kept alive and has one request under way. The process is spoken to in lines of JSON.
"""

import asyncio
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import uvloop

from api.operator.stack import Stack
from bench.peers.http import Connection, Place
from bench.run import percentile

_STOPPING = 15.0  # seconds


@dataclass(frozen=True, slots=True)
class Requests:
    """One request for each path, in turn. An answer is good that has this status and these characters in it."""

    paths: Sequence[str]
    headers: Mapping[str, str]
    body: str
    status: int
    contains: str = ""


@dataclass(frozen=True, slots=True)
class Sent:
    """`done` good answers in so many seconds; the others are milliseconds of one of them."""

    done: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        return self.done / self.seconds


class Load:
    """The process, from here."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def keep_up(self, seconds: float) -> Sent:
        """Send for so long. Raises `RuntimeError` when one answer was not good: the process has said which."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{seconds}\n")
        self._child.stdin.flush()
        said = self._child.stdout.readline()
        if not said:
            raise RuntimeError("the load died; what it said is above")
        return Sent(**json.loads(said))


@contextmanager
def load(stack: Stack, requests: Requests, in_flight: int) -> Iterator[Load]:
    """To the stack's gateway, with the operator's token."""
    token = stack.files.operator_token.read_text().strip()
    told = asdict(requests)
    told["headers"] = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **requests.headers}
    given = {"url": stack.settings.api_url, "authority": str(stack.files.authority), "in_flight": in_flight, **told}
    child = subprocess.Popen([sys.executable, "-m", "bench.load"], stdin=-1, stdout=-1, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(given) + "\n")
        child.stdin.flush()
        yield Load(child)
    finally:
        child.stdin.close()
        try:
            child.wait(_STOPPING)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


async def _send(
    given: Mapping[str, Any], connections: Sequence[Connection], requests: Iterator[bytes], end: float
) -> list[float]:
    """Milliseconds of each good answer."""
    taken: list[float] = []
    expected = given["contains"].encode()

    async def lane(connection: Connection) -> None:
        while (began := time.perf_counter()) < end:
            answer = await connection.ask(next(requests))
            if answer.status != given["status"] or expected not in answer.body:
                raise RuntimeError(f"{answer.status}: {answer.body[:500]!r}")
            taken.append((time.perf_counter() - began) * 1000)

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(lane(connection))
    return taken


async def _main() -> None:
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    given = json.loads(await reader.readline())
    place = Place.of(given["url"], ssl.create_default_context(cafile=given["authority"]))
    body = given["body"].encode()
    headers = {**given["headers"], "Content-Length": str(len(body))}
    requests = cycle([place.request("POST", path, headers) + body for path in given["paths"]])
    connections = [Connection(place) for _ in range(given["in_flight"])]
    while line := await reader.readline():
        for connection in connections:  # anew each time: the gateway ends those that were idle for a few seconds
            connection.close()
            await connection.open()
        began = time.perf_counter()
        taken = await _send(given, connections, requests, began + float(line))
        seconds = time.perf_counter() - began
        sent = Sent(len(taken), seconds, percentile(taken, 0.5), percentile(taken, 0.99))
        print(json.dumps(asdict(sent)), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main())
