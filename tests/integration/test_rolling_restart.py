"""Gateways and workers are restarted one after the other, while callers go on: no request fails, nothing runs twice."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.harness.another import AnotherGateway, another_gateway, another_worker
from tests.harness.inside import management
from tests.harness.stack import RunningStack, eventually
from tests.harness.truth import settled_states
from topology import names

CALLERS = 3
PAUSE = 0.05  # seconds between a caller's commands
BEHIND_AN_EDGE = {"RESTANTE_TLS_CERTIFICATE": ""}  # which watches who is ready
LONGEST_END = 15.0  # seconds


class Edge:
    """What a load balancer does: asks the gateways whether they are ready, and sends requests to those who are."""

    def __init__(self, gateways: Sequence[AnotherGateway]) -> None:
        self._gateways = gateways
        self._ready = set(gateways)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(each,)) for each in gateways]

    def pick(self, number: int) -> AnotherGateway:
        ready = [each for each in self._gateways if each in self._ready]
        assert ready, "no gateway is ready"
        return ready[number % len(ready)]

    def _watch(self, gateway: AnotherGateway) -> None:
        while not self._ended.wait(0.1):
            (self._ready.add if gateway.is_ready() else self._ready.discard)(gateway)

    def __enter__(self) -> "Edge":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def callers(edge: Edge, device: str) -> Iterator[list[httpx.Response | BaseException]]:
    """Each sends one command after the other and waits for its outcome; the answers, in the end."""
    ended = threading.Event()
    answers: list[httpx.Response | BaseException] = []

    def call(caller: int) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            try:
                with edge.pick(caller + number).client(None) as http:
                    headers = {"Prefer": "wait=30", "Authorization": edge.pick(0).http.headers["Authorization"]}
                    body = {"name": "note", "args": {"text": f"{caller}-{number}"}, "ttl": 120, "response_timeout": 60}
                    answers.append(http.post(f"/v1/devices/{device}/commands", json=body, headers=headers))
            except BaseException as error:  # noqa: BLE001 - it is what must not be
                answers.append(error)
            ended.wait(PAUSE)

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.soak
@pytest.mark.timeout(480)
def test_no_request_fails_while_all_are_restarted(stack: RunningStack, home: Path) -> None:
    with ExitStack() as entered:
        agent = entered.enter_context(stack.agent(home))
        worker = entered.enter_context(another_worker(stack))
        gateways = [entered.enter_context(another_gateway(stack, **BEHIND_AN_EDGE)) for _ in range(2)]
        agent.start()
        eventually(lambda: _workers(stack) == 2, "two workers", within=60)
        edge = entered.enter_context(Edge(gateways))
        with callers(edge, agent.id) as answers:
            for gateway in gateways:
                before = len(answers)
                assert gateway.process.restart() < LONGEST_END
                eventually(gateway.is_ready, "the gateway to be back", within=60)
                eventually(lambda: edge.pick(0) is not edge.pick(1), "the edge to see it", within=20)
                assert len(answers) > before
            assert worker.restart() < LONGEST_END
            eventually(lambda: _workers(stack) == 2, "two workers again", within=60)
            stack.stack.stop_service("worker")
            stack.stack.start_service("worker")
            eventually(lambda: _workers(stack) == 2, "two workers again", within=60)
        documents = []
        for answer in answers:
            assert isinstance(answer, httpx.Response), answer
            assert answer.status_code == 200, answer.text
            documents.append(answer.json())
        assert {tuple(settled_states(document)) for document in documents} == {("succeeded",)}
        assert sorted(agent.record()) == sorted(document["args"]["text"] for document in documents)


@pytest.mark.timeout(240)
def test_what_waits_at_a_gateway_that_stops_is_answered(stack: RunningStack, home: Path) -> None:
    absent, _ = stack.create_device("absent")
    with stack.agent(home) as agent, another_gateway(stack, **BEHIND_AN_EDGE) as gateway:
        agent.start()
        answers: dict[str, httpx.Response] = {}

        def wait(what: str, device: str, name: str, args: dict[str, object]) -> None:
            body = {"name": name, "args": args, "ttl": 120}
            with gateway.client(gateway.token) as http:
                answers[what] = http.post(f"/v1/devices/{device}/commands", json=body, headers={"Prefer": "wait=60"})

        def follow() -> None:
            with gateway.client(gateway.token) as http, http.stream("GET", "/v1/events") as stream:
                for _ in stream.iter_bytes():
                    following.set()
                answers["events"] = stream

        following = threading.Event()
        threads = [
            threading.Thread(target=wait, args=("done", agent.id, "slow", {"text": "slow", "seconds": 3})),
            threading.Thread(target=wait, args=("open", absent, "note", {"text": "never"})),
            threading.Thread(target=follow),
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: agent.record() == ["slow"], "the command to run")
        eventually(lambda: bool(_waiting(stack, absent)), "the other to wait")
        assert following.wait(20)
        began = time.monotonic()
        gateway.process.stop()
        assert time.monotonic() - began < LONGEST_END
        for thread in threads:
            thread.join(20)
        assert (answers["done"].status_code, answers["done"].json()["state"]) == (200, "succeeded")
        assert (answers["open"].status_code, answers["open"].json()["state"]) == (202, "queued")
        assert answers["events"].status_code == 200, "and ended without an error"


def _workers(running: RunningStack) -> int:
    found: int = management(running, "GET", f"/queues/{names.VHOST}/{names.REPORTS}").json().get("consumers", 0)
    return found


def _waiting(running: RunningStack, device: str) -> list[object]:
    items: list[object] = running.ok(running.http.get(f"/v1/commands?device={device}&state=queued"))["items"]
    return items
