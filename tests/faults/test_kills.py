"""Kill −9 of each part while commands flow, on both databases: everything accepted ends in a true state."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.harness.fleet import has_told
from tests.harness.stack import AgentProcess, RunningStack, eventually
from tests.harness.truth import check_truth

TTL = 20
RESPONSE_TIMEOUT = 5


class Flow:
    """Sends numbered commands, one every 30 ms, from a thread of its own; keeps what was accepted (2xx)."""

    def __init__(self, running: RunningStack, agent: AgentProcess) -> None:
        self._running, self._agent = running, agent
        self.accepted: dict[str, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_all)

    def __enter__(self) -> "Flow":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def wait_for_more(self, count: int) -> None:
        wanted = len(self.accepted) + count
        eventually(lambda: len(self.accepted) >= wanted, f"{count} more accepted commands", within=40)

    def _send_all(self) -> None:
        http = self._running.client(self._running.token)
        number = 0
        while not self._ended.wait(0.03):
            number += 1
            body = {
                "name": "note",
                "args": {"text": f"n{number}"},
                "ttl": TTL,
                "response_timeout": RESPONSE_TIMEOUT,
            }
            try:
                answer = http.post(f"/v1/devices/{self._agent.id}/commands", json=body, timeout=10)
            except httpx.TransportError:
                http = self._running.client(self._running.token)
                time.sleep(0.1)
                continue
            if answer.is_success:
                self.accepted[answer.json()["id"]] = f"n{number}"
            else:
                # 429: the device has them, and only a worker can say so.
                assert answer.status_code in (429, 503), answer.text


def kill_broker(running: RunningStack, _: AgentProcess) -> None:
    broker = running.stack.broker
    assert broker is not None
    broker.kill9()
    time.sleep(0.5)
    broker.start()


def kill_gateway(running: RunningStack, _: AgentProcess) -> None:
    running.stack.kill_service("gateway")
    running.stack.start_service("gateway")


def kill_worker(running: RunningStack, _: AgentProcess) -> None:
    running.stack.kill_service("worker")
    time.sleep(0.5)
    running.stack.start_service("worker")


def kill_agent(_: RunningStack, agent: AgentProcess) -> None:
    agent.kill()
    time.sleep(0.5)
    agent.start()


@pytest.mark.timeout(360)
@pytest.mark.parametrize("kill", [kill_broker, kill_gateway, kill_worker, kill_agent])
def test_everything_accepted_ends_in_a_true_state(
    own_stack: RunningStack, home: Path, kill: Callable[[RunningStack, AgentProcess], None]
) -> None:
    with own_stack.agent(home) as agent:
        agent.start()
        own_stack.http = own_stack.client(own_stack.token)
        own_stack.send(agent.id, "note", {"text": "warm"}, wait=20)
        with Flow(own_stack, agent) as flow:
            flow.wait_for_more(20)
            kill(own_stack, agent)
            flow.wait_for_more(20)
        own_stack.stack.wait_until_ready()
        # An agent that waits for its next try to connect may yet correct what the fabric's clock has said.
        eventually(lambda: has_told(agent.state), "the agent to have told all", within=60)
        settled = {id: own_stack.settled(id, within=TTL + RESPONSE_TIMEOUT + 30) for id in flow.accepted}
        ran = Counter(agent.record())
        assert [text for text, times in ran.items() if times > 1] == [], "no command ran twice"
        check_truth(settled.values(), {id: ran[text] for id, text in flow.accepted.items()})
        assert sum(command["state"] == "succeeded" for command in settled.values()) >= 20, "it went on afterwards"
