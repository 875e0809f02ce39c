"""The account of back ends reads the streams; whatever else it tries is refused and leaves no trace."""

import base64
from collections.abc import Callable

import httpx
import pytest

from tests.harness.rawamqp import ChannelClosed, ConnectionClosed, RawClient
from tests.harness.stack import RunningStack
from tests.security.conftest import LOOPBACK, Witness
from topology import access, names

REFUSED = 403
NOT_IMPLEMENTED = 540
STREAMS = (names.TELEMETRY, names.EVENTS)
OTHERS = (names.REPORTS, names.CLAIMS, names.INQUIRIES, names.RETURNED)
EXCHANGES = (names.MAIL, names.NOTICES, names.UPLINK, names.RETURNED, names.WAKE, "", "amq.topic")

Act = Callable[[RawClient], object]


def login(stack: RunningStack, password: str | None = None) -> RawClient:
    broker = stack.stack.broker
    assert broker is not None
    client = RawClient(LOOPBACK, broker.amqp_port)
    client.login(access.BACKEND, broker.password(access.BACKEND) if password is None else password)
    client.open_channel(confirms=True)
    return client


@pytest.mark.parametrize("stream", STREAMS)
def test_it_reads_the_streams(stack: RunningStack, stream: str) -> None:
    with login(stack) as client:
        client.qos(10)
        client.consume(stream, {"x-stream-offset": "first"})
        assert client.delivery().header  # each begins with the fabric's own probe


def published(client: RawClient, exchange: str, key: str) -> bool:
    client.publish(exchange, key, b"forged")
    return client.confirmed()


def _refusals() -> dict[str, Act]:
    acts: dict[str, Act] = {"queue: declare": lambda it: it.declare("mine")}
    acts["exchange: declare"] = lambda it: it.declare_exchange("mine")
    for stream in STREAMS:
        acts[f"{stream}: write"] = lambda it, stream=stream: published(it, "", stream)
        acts[f"{stream}: purge"] = lambda it, stream=stream: it.purge(stream)
        acts[f"{stream}: delete"] = lambda it, stream=stream: it.delete(stream)
        acts[f"{stream}: bind"] = lambda it, stream=stream: it.bind(stream, names.UPLINK, "#")
        acts[f"{stream}: unbind"] = lambda it, stream=stream: it.unbind(stream, names.UPLINK, "telemetry.*.#")
    for queue in (*OTHERS, "mailbox.nobody"):
        acts[f"{queue}: consume"] = lambda it, queue=queue: (it.qos(1), it.consume(queue))
        acts[f"{queue}: get"] = lambda it, queue=queue: it.get(queue)
        acts[f"{queue}: purge"] = lambda it, queue=queue: it.purge(queue)
        acts[f"{queue}: passive"] = lambda it, queue=queue: it.declare(queue, passive=True)
    for exchange in EXCHANGES:
        acts[f"exchange '{exchange}': publish"] = lambda it, exchange=exchange: published(it, exchange, "all")
        if exchange:
            acts[f"exchange '{exchange}': delete"] = lambda it, exchange=exchange: it.delete_exchange(exchange)
    return acts


REFUSALS = _refusals()


def test_it_may_do_nothing_else(stack: RunningStack, witness: Witness) -> None:
    before = witness.exists()
    witness.passed()
    codes = {}
    for what, act in REFUSALS.items():
        with login(stack) as client:
            try:
                act(client)
            except (ChannelClosed, ConnectionClosed) as refused:
                codes[what] = refused.code
    # Who may read a queue may purge it, so far as the broker's rights go; but a stream it purges for nobody.
    purges = {f"{stream}: purge": NOT_IMPLEMENTED for stream in STREAMS}
    assert codes == dict.fromkeys(REFUSALS, REFUSED) | purges
    assert b"forged" not in {got.body for got in witness.passed()}
    assert witness.exists() == before


@pytest.mark.parametrize("password", ["", "wrong", access.BACKEND])
def test_a_wrong_password_is_refused(stack: RunningStack, password: str) -> None:
    with pytest.raises(ConnectionClosed) as refused:
        login(stack, password)
    assert refused.value.code == REFUSED


def test_it_has_no_management(stack: RunningStack) -> None:
    broker = stack.stack.broker
    assert broker is not None
    credentials = base64.b64encode(f"{access.BACKEND}:{broker.password(access.BACKEND)}".encode()).decode()
    answer = httpx.get(
        f"http://{LOOPBACK}:{broker.management_port}/api/whoami",
        headers={"Authorization": f"Basic {credentials}"},
        timeout=10,
    )
    assert answer.status_code == 401


def test_what_it_says_is_nobodys_word() -> None:
    assert access.BACKEND not in access.FABRIC_ACCOUNTS
    for kind in ("receipt", "outcome", "claim", "hello", "telemetry", "inquiry"):
        assert not access.sender_is_genuine(kind, "pump-17", access.BACKEND)
