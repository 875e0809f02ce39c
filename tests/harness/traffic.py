"""Issuers that send mixed commands to many devices, and go on whatever is killed under them."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import httpx

from tests.harness.fleet import Fleet
from tests.harness.inside import documents
from tests.harness.stack import Document, RunningStack, eventually
from tests.harness.truth import is_answered

PATIENCE = 60.0  # seconds that an issuer goes on trying


@dataclass(frozen=True, slots=True)
class Order:
    """What to send; `cancel`: withdraw it as soon as it is accepted."""

    number: int
    device: str
    body: Document
    cancel: bool


class Traffic:
    """Sends `count` commands from `issuers` threads; what was accepted (2xx) is in `accepted`, by id.

    A tenth each is claimed, lives for a second or two, is withdrawn, or supersedes; some handlers take a while.
    """

    def __init__(
        self, running: RunningStack, devices: Sequence[str], count: int, *, ttl: float, issuers: int = 6
    ) -> None:
        self.accepted: dict[str, Order] = {}
        self.withdrawn: set[str] = set()  # what a DELETE was answered 200 for
        self._running = running
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._failures: list[BaseException] = []
        for number in range(count):
            self._orders.put(_order(number, devices, ttl))
        self._count = count
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(issuers)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_until(self, accepted: int) -> None:
        """Wait until so many are accepted."""
        eventually(
            lambda: bool(self._failures) or len(self.accepted) >= accepted, f"{accepted} accepted", within=PATIENCE
        )
        self._check()

    def finish(self) -> None:
        """Wait until all are sent."""
        for thread in self._threads:
            thread.join(2 * PATIENCE)
        self._check()
        assert len(self.accepted) == self._count

    def _check(self) -> None:
        if self._failures:
            raise self._failures[0]

    def _send_all(self) -> None:
        http = _Patient(self._running)
        try:
            while True:
                try:
                    order = self._orders.get_nowait()
                except Empty:
                    return
                answer = http.request(
                    "POST",
                    f"/v1/devices/{order.device}/commands",
                    json=order.body,
                    headers={"Idempotency-Key": f"traffic-{order.number}"},
                )
                assert answer.is_success, answer.text
                id = answer.json()["id"]
                self.accepted[id] = order
                if order.cancel:
                    answer = http.request("DELETE", f"/v1/commands/{id}")
                    assert answer.status_code in (200, 409), answer.text
                    if answer.status_code == 200:
                        self.withdrawn.add(id)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self._failures.append(error)


class _Patient:
    """A caller that tries again while the gateway is away or says 429 or 503."""

    def __init__(self, running: RunningStack) -> None:
        self._running = running
        self._http = running.client(running.token)

    def request(self, method: str, path: str, **arguments: object) -> httpx.Response:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self._http.request(method, path, timeout=10, **arguments)  # type: ignore[arg-type]
            except httpx.TransportError:
                self._http = self._running.client(self._running.token)
            else:
                if answer.status_code not in (429, 503):
                    return answer
            assert time.monotonic() < until, f"{method} {path}"
            time.sleep(0.1)


def await_settled(
    running: RunningStack, fleet: Fleet, ids: Sequence[str], within: float, incarnation: str | None = None
) -> list[Document]:
    """All these commands, once they are settled and no outcome comes late any more: the devices have told all they know
    (to this incarnation of the fabric, if one is given), and, a second apart, two looks at the commands that no device
    has answered are alike."""
    http = _Patient(running)

    until = time.monotonic() + within
    while any(_open_commands(http)) or not fleet.has_told(incarnation):
        assert time.monotonic() < until, f"not settled within {within} s"
        time.sleep(0.2)
    found = documents(running, ids)
    while True:
        doubtful = [command for command in found if not is_answered(command)]
        time.sleep(1.0)
        again = documents(running, [command["id"] for command in doubtful])
        if again == doubtful:
            return found
        assert time.monotonic() < until, "the commands keep changing"
        changed = {command["id"]: command for command in again}
        found = [changed.get(command["id"], command) for command in found]


def _open_commands(http: "_Patient") -> Iterator[bool]:
    for state in ("accepted", "queued", "delivered", "running"):
        yield bool(http.request("GET", f"/v1/commands?state={state}&limit=1").json()["items"])


def _order(number: int, devices: Sequence[str], ttl: float) -> Order:
    dice = random.Random(number)  # the same mix in each run
    body: Document = {"name": "note", "args": {"text": f"n{number}"}, "ttl": ttl, "response_timeout": 5}
    cancel = False
    match number % 10:
        case 0:
            body["claim"] = True
        case 1:
            body["ttl"] = dice.uniform(1.0, 2.0)
        case 2:
            cancel = True
        case 3:
            body["supersedes"] = "set-point"
        case 4:
            body |= {"name": "slow", "args": {"text": f"n{number}", "seconds": dice.uniform(0.05, 0.3)}}
        case 5:
            body |= {"claim": True, "ttl": dice.uniform(1.0, 2.0)}
        case _:
            pass
    return Order(number, devices[number % len(devices)], body, cancel)
