"""How long after a revocation began the device's connection is closed, with 200 live devices.

From the start of `POST /v1/devices/{id}/revoke` to the moment at which the device has read the broker's close. Each
device then tries to connect again, with a fresh token of its old key, and must be refused.

The floor takes turns with it in the same run: the bare call to the broker's management API that closes all connections
of a user, for a device that is connected the same way. What lies between the two is the gateway's request, the ledger's
commit, and the way to a worker and back.
"""

import asyncio
import http.client
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from api.operator.stack import Stack
from bench.caller import Caller
from bench.live import LiveDevice
from bench.results import Bar, Comparison, Result, Series
from bench.run import Budget, Options, databases, percentile, say, stack_on
from fabric.sql import open_store
from topology import access
from topology.names import DeviceId

P99 = Bar("a revoked device's connection is closed, p99", 100.0, at_most=True, unit="ms")
AGAIN = Bar("revoked devices that could connect again", 0.0, at_most=True, unit="")
OPEN = Bar("revoked devices not known to be closed when the call returned", 0.0, at_most=True, unit="")
BARS = (P99, AGAIN, OPEN)
BUDGET = Budget(quick=10.0, full=60.0)

WARM_UP = 2  # pairs that don't count
ROUNDS = 5  # parts of the revoked devices, so that a spread is seen


def run(options: Options) -> Result:
    many = 40 if options.quick else 200
    with databases(options) as given, stack_on(options, given.postgresql()) as (stack, _):
        caller = Caller(stack)
        say(f"connecting {2 * many} devices, half of them for the floor")
        devices = asyncio.run(_enrolled(stack, caller, 2 * (many + WARM_UP)))
        for device in devices:
            device.connect()
        return _result(_measure(stack, devices[::2], devices[1::2]))


@dataclass(slots=True)
class _Found:
    """Milliseconds. `again`: devices that could connect again. `open`: the answer did not say that it had closed the
    one connection."""

    floor: list[float] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    again: int = 0
    open: int = 0


async def _enrolled(stack: Stack, caller: Caller, many: int) -> list[LiveDevice]:
    store = await open_store(stack.settings.database)
    try:
        devices = [LiveDevice(DeviceId(f"revocation-{number}"), stack) for number in range(many)]
        for device in devices:
            await device.enroll(store, await asyncio.to_thread(caller.create_device, device.id))
        return devices
    finally:
        await store.close()


def _measure(stack: Stack, devices: list[LiveDevice], spare: list[LiveDevice]) -> _Found:
    # A caller of its own: the gateway has closed the connection of the one that made the devices, idle since then.
    found, caller, closer = _Found(), Caller(stack), _Closer(stack)
    with ThreadPoolExecutor(1) as watcher:
        for number, (device, other) in enumerate(zip(devices, spare, strict=True)):
            floor, _, _ = _cut(watcher, other, closer.close)
            closed, answered, document = _cut(watcher, device, caller.revoke)
            if number >= WARM_UP:
                found.floor.append(floor)
                found.closed.append(closed)
                found.answered.append(answered)
            found.open += document["closed_connections"] != 1
            found.again += not device.is_refused()
    return found


def _cut(
    watcher: ThreadPoolExecutor, device: LiveDevice, call: Callable[[str], dict[str, object]]
) -> tuple[float, float, dict[str, object]]:
    """Milliseconds until the device has read the close, and until the call has returned; what it returned."""
    cut_at = watcher.submit(device.cut_at)
    began = time.perf_counter()
    document = call(device.id)
    answered = time.perf_counter()
    return (cut_at.result() - began) * 1000, (answered - began) * 1000, document


class _Closer:
    """The management API, over one kept-alive connection."""

    def __init__(self, stack: Stack) -> None:
        if stack.broker is None:
            raise RuntimeError("the stack has no broker of its own")
        place = urlsplit(stack.settings.management_url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        credential = b64encode(f"{access.ADMIN}:{stack.broker.password(access.ADMIN)}".encode()).decode()
        self._headers = {"Authorization": f"Basic {credential}"}

    def close(self, username: str) -> dict[str, object]:
        self._connection.request("DELETE", f"/api/connections/username/{username}", headers=self._headers)
        answer = self._connection.getresponse()
        said = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{answer.status}: {said!r}")
        return {}


def _result(found: _Found) -> Result:
    many = len(found.closed)

    def p50(values: list[float], name: str) -> Series:
        size = many // ROUNDS
        return Series(name, "ms", tuple(percentile(values[at : at + size], 0.5) for at in range(0, many, size)))

    def p99(values: list[float], name: str) -> Series:
        return Series(name, "ms", (percentile(values, 0.99),))

    floor, closed = "bare broker call", "closed"
    return Result(
        "revocation",
        f"Revocation of {many} live devices, one by one",
        [
            Comparison("closed, p50", p50(found.closed, closed), p50(found.floor, floor)),
            Comparison("closed, p99 of all", p99(found.closed, closed), p99(found.floor, floor), P99),
            Comparison("closed, the latest", Series(closed, "ms", (max(found.closed),))),
            Comparison("the call has returned, p50", p50(found.answered, "answered")),
            Comparison("the call has returned, p99 of all", p99(found.answered, "answered")),
            Comparison("connected again", Series("", "", (found.again,)), bar=AGAIN),
            Comparison("not known to be closed when the call returned", Series("", "", (found.open,)), bar=OPEN),
        ],
    )
