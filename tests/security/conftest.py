"""Two sides and a witness: an attacker with a device of its own, a victim, and the broker's administrator."""

import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness.broker import evaluate
from tests.harness.device import Device, at_once
from tests.harness.rawamqp import Got, RawClient
from tests.harness.stack import RunningStack, eventually
from topology import access, names

LOOPBACK = "127.0.0.1"


class Witness:
    """Sees everything on the broker: what exists, what lies in queues, and every message that is routed.

    A spy queue is bound to each exchange, so that what was published anywhere leaves a trace.
    """

    def __init__(self, stack: RunningStack, *keys: str) -> None:
        """`keys` are those that are watched on direct exchanges, `mail` above all."""
        broker = stack.stack.broker
        assert broker is not None
        self.client = at_once(RawClient(LOOPBACK, broker.amqp_port))
        self.client.login(access.WORKER, broker.password(access.WORKER))
        self.client.open_channel(confirms=True)
        self._api = httpx.Client(
            base_url=f"http://{LOOPBACK}:{broker.management_port}",
            auth=(access.ADMIN, broker.password(access.ADMIN)),
            timeout=10,
        )
        self._spy = f"spy-{secrets.token_hex(4)}"
        self.client.declare(self._spy, durable=False, exclusive=True)
        for exchange in self.exchanges():
            for key in ("#", *keys):
                self.client.bind(self._spy, exchange, key)

    def exchanges(self) -> list[str]:
        """Those that a queue can be bound to: all but the default one."""
        return [each["name"] for each in self._get("exchanges") if each["name"]]

    def all_exchanges(self) -> list[str]:
        return [each["name"] for each in self._get("exchanges")]

    def exists(self) -> dict[str, list[Any]]:
        """What exists in the vhost, as comparable values."""
        return {
            "queues": sorted(each["name"] for each in self._get("queues")),
            "exchanges": sorted(self.all_exchanges()),
            "bindings": sorted(
                [each["source"], each["destination"], each["routing_key"]] for each in self._get("bindings")
            ),
        }

    def depth(self, queue: str) -> int:
        return self.client.declare(queue, passive=True)

    def passed(self) -> list[Got]:
        """What was routed since the last look. Whatever was published and settled before this call is in it."""
        sentinel = secrets.token_hex(8).encode()
        self.client.publish(names.UPLINK, f"sentinel.{sentinel.decode()}", sentinel)
        assert self.client.confirmed()
        seen: list[Got] = []
        while True:
            got = self.client.get(self._spy, no_ack=True)
            assert got is not None, "the sentinel is lost"
            if got.body == sentinel:
                return seen
            seen.append(got)

    def close(self) -> None:
        self.client.close()
        self._api.close()

    def _get(self, what: str) -> list[dict[str, Any]]:
        answer = self._api.get(f"/api/{what}/{names.VHOST}", params={"disable_stats": "true"})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found


@pytest.fixture(scope="session")
def attacker(stack: RunningStack) -> Device:
    """A device with a valid key of its own, and bad intentions."""
    return Device.enrolled(stack, "attacker")


@pytest.fixture(scope="session")
def victim(stack: RunningStack) -> Device:
    return Device.enrolled(stack, "victim")


@pytest.fixture(scope="module")
def amqp_1_0(stack: RunningStack) -> Iterator[None]:
    """AMQP 1.0 switched on for the rest of a module: the broker's rights must hold in it, too, as a second line."""
    broker = stack.stack.broker
    assert broker is not None
    set_sessions = "application:set_env(rabbit, session_max_per_connection, {})."
    evaluate(broker, set_sessions.format(4))
    yield
    evaluate(broker, set_sessions.format(0))


@pytest.fixture
def witness(stack: RunningStack, attacker: Device, victim: Device) -> Iterator[Witness]:
    seen = Witness(stack, attacker.id, victim.id, attacker.mailbox, victim.mailbox)
    yield seen
    seen.close()


@pytest.fixture
def waiting(stack: RunningStack, victim: Device) -> str:
    """A command (its id) that waits in the victim's mailbox."""
    command = stack.send(victim.id, "door.open", {}, ttl=600)
    assert command["state"] in ("accepted", "queued")
    eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
    return str(command["id"])
