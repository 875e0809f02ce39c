"""Taking a device's rights away: what is cut off, when, and what a revoked device can still say.

Whoever is cut off here is a device with a live connection, or one that is just making it; the answer to the call says
how many were closed, and until when one may still appear. That none is alive then is looked for at the device's end.
"""

import json
import random
import re
import select
import signal
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime

import httpx
import pika.exceptions
import pytest

from tests.harness import crowd
from tests.harness.another import AnotherGateway, another_gateway
from tests.harness.device import Device, enroll_request, es256, forge, new_key, own_source
from tests.harness.events import Following, following
from tests.harness.inside import channel
from tests.harness.rawamqp import BODY, Closed, RawClient, long, properties, short, table
from tests.harness.stack import Document, RunningStack, eventually
from tests.security.test_enrollment import code_of, events, keys
from tests.security.test_forged_reports import message, outcome, queued, say
from topology import enrollment, layout, names, wire

CLOSED_BY_OPERATOR = 320
HANDSHAKE = 11.0  # seconds
AT_ONCE = 6  # races
LATEST = 0.12  # seconds into a connection that a revocation comes; so many at once take about as long to connect

Cut = Callable[[RunningStack, Device], Document]


def revoke(stack: RunningStack, device: Device) -> Document:
    return stack.ok(stack.http.post(f"/v1/devices/{device.id}/revoke"))


def revoke_key(stack: RunningStack, device: Device) -> Document:
    return stack.ok(stack.http.delete(f"/v1/devices/{device.id}/keys/{device.kid}"))


def suspend(stack: RunningStack, device: Device, enabled: bool = False) -> Document:
    kind = {"Content-Type": "application/merge-patch+json"}
    body = json.dumps({"enabled": enabled})
    return stack.ok(stack.http.patch(f"/v1/devices/{device.id}", content=body, headers=kind))


def delete(stack: RunningStack, device: Device) -> Document:
    return stack.ok(stack.http.delete(f"/v1/devices/{device.id}"))


def cut_off(client: RawClient) -> bool:
    """Has the broker closed the connection? Whatever it had sent before is read first."""
    try:
        while True:
            client.receive(timeout=2.0)
    except TimeoutError:
        return False
    except (Closed, OSError, EOFError, AssertionError):
        return True


def seconds_left(answer: Document) -> float:
    if answer["pending_until"] is None:
        return 0.0
    until = datetime.fromisoformat(answer["pending_until"])
    return (until - datetime.now(UTC)).total_seconds()


def settle(client: RawClient) -> None:
    """Wait until the login is old enough for nothing to be in its handshake."""
    deadline = time.monotonic() + HANDSHAKE
    while time.monotonic() < deadline:
        with suppress(TimeoutError):
            client.receive(timeout=0.5)


# ---- Live connections --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [revoke, revoke_key, suspend, delete])
def test_live_connections_are_closed_when_the_call_returns(stack: RunningStack, cut: Cut) -> None:
    device = Device.enrolled(stack, "cut")
    with device.raw() as first, device.pika() as second:
        answer = cut(stack, device)
        assert cut_off(first)
        with suppress(pika.exceptions.AMQPError):
            second.process_data_events(2.0)
        assert second.is_closed
        assert not device.may_log_in(device.token())
        assert stack.client(device.api_token()).get(f"/v1/devices/{device.id}/keys").status_code == 401
    if cut in (revoke, revoke_key):
        # It had logged in just now, so one more may be on its way.
        assert 1 <= answer["closed_connections"] <= 2
        assert 0 < seconds_left(answer) <= HANDSHAKE


def test_after_an_old_login_nothing_is_pending(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "cut")
    with device.raw() as client:
        settle(client)
        answer = revoke(stack, device)
        assert (answer["closed_connections"], answer["pending_until"]) == (1, None)
        assert cut_off(client)
    again = revoke(stack, device)
    assert (again["closed_connections"], again["pending_until"], again["withdrawn"]) == (0, None, 0)
    unknown = stack.http.post("/v1/devices/nobody-at-all/revoke")
    assert unknown.status_code == 404


def test_a_revoked_device_has_no_key_ticket_or_mail_and_can_be_enrolled_again(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "cut")
    held, waiting = queued(stack, device), queued(stack, device)
    ticket = stack.ok(stack.http.post(f"/v1/devices/{device.id}/enrollment"))["ticket"]
    with device.raw() as client:
        say(client, f"receipt.{device.id}", running(device, held))
        eventually(lambda: stack.command(held)["state"] == "running", "picked up")
        answer = revoke(stack, device)
    assert (answer["withdrawn"], answer["in_hand"]) == (1, 1)
    assert (stack.command(waiting)["state"], stack.command(waiting)["reason"]) == ("cancelled", "revoked")
    assert keys(stack, device.id) == []
    with own_source(stack) as http:
        assert http.post("/v1/enroll", json=enroll_request(code_of(ticket), new_key())).status_code == 410
        fresh = stack.ok(stack.http.post(f"/v1/devices/{device.id}/enrollment"))["ticket"]
        peering = stack.ok(http.post("/v1/enroll", json=enroll_request(code_of(fresh), device.key)))
    assert peering["generation"] == device.peering["generation"] + 1
    assert device.may_log_in(device.token())


def running(device: Device, command: str) -> bytes:
    return message(device, "receipt", correlation=command, user_id=device.id, state="running")


def test_a_suspended_device_loses_no_mail(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "suspended")
    ticket = stack.ok(stack.http.post(f"/v1/devices/{device.id}/enrollment"))["ticket"]
    before = queued(stack, device)
    suspend(stack, device)
    assert not device.may_log_in(device.token())
    with own_source(stack) as http:
        assert http.post("/v1/enroll", json=enroll_request(code_of(ticket), new_key())).status_code == 410
    during = queued(stack, device)
    suspend(stack, device, enabled=True)
    with device.raw() as client:
        client.consume(device.mailbox)
        assert {_id(client), _id(client)} == {before, during}
        assert not cut_off(client), "nothing of the suspension is left"


def _id(client: RawClient) -> str:
    got = client.delivery()
    found = re.search(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", got.header)
    assert found is not None
    return found.group().decode()


# ---- Connections that are being made -----------------------------------------------------------------


def test_a_token_replayed_in_the_middle_of_the_handshake(stack: RunningStack) -> None:
    """Allowed before the revocation, opened after it: it is refused, or closed within the answer's time; and the same
    token opens nothing afterwards."""
    device = Device.enrolled(stack, "halfway")
    token = device.token()
    with device.socket() as client:
        tune = _start(client, device, token)
        answer = revoke(stack, device)
        assert (answer["closed_connections"], seconds_left(answer) > 0) == (0, True)
        assert not device.may_log_in(token)
        with suppress(Closed, OSError, EOFError):
            client.method(0, (10, 31), tune)
            client.method(0, (10, 40), short(names.VHOST) + short("") + b"\0")
            client.expect(0, (10, 41))
        _wait_until(answer)
        assert cut_off(client)
    assert not device.may_log_in(token)


def _start(client: RawClient, device: Device, token: str) -> bytes:
    """The handshake up to the broker's answer to the login: what it tuned."""
    client.socket.sendall(b"AMQP\x00\x00\x09\x01")
    client.expect(0, (10, 10))
    plain = b"\0" + device.id.encode() + b"\0" + token.encode()
    client.method(0, (10, 11), table({}) + short("PLAIN") + long(plain) + short("en_US"))
    return client.expect(0, (10, 30)).payload[4:]


def _wait_until(answer: Document) -> None:
    time.sleep(max(seconds_left(answer), 0) + 0.5)  # and a sweep


@pytest.mark.timeout(480)
@pytest.mark.parametrize("races", [60, pytest.param(500, marks=pytest.mark.soak)])
def test_revoking_while_connecting_leaves_nobody_connected(stack: RunningStack, races: int) -> None:
    """When the last `pending_until` has passed, and the sweep before it is done, nobody is connected, and what comes
    then into their mailboxes is had by nobody."""
    devices = crowd.register(stack, "racing", races, Device.enrolled(stack, "racing").peering)
    _post(stack, devices, b"early")
    chance = random.Random(20261121)
    raced = [_Race(device, chance.uniform(0, LATEST)) for device in devices]
    clients = threading.local()

    def run(race: "_Race") -> Document:
        if not hasattr(clients, "http"):
            clients.http = stack.client(stack.token)
        return race.run(clients.http)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(run, raced))
    _wait_until(max(answers, key=seconds_left))
    for race in raced:
        assert race.is_over(), race.device.id
    _post(stack, devices, b"late")
    assert {body for race in raced for body in race.got} == {b"early"}, "some came in time, and read their mail"
    assert not any(crowd.at_once(lambda device: device.may_log_in(device.token()), devices[:: races // 20]))
    with channel(stack) as opened:
        for device in devices:
            opened.queue_delete(device.mailbox)


def _post(stack: RunningStack, devices: Sequence[Device], body: bytes) -> None:
    """Put something into these mailboxes, past the ledger."""
    with channel(stack) as opened:
        for device in devices:
            queue = layout.mailbox(names.DeviceId(device.id))
            opened.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
            opened.basic_publish("", queue.name, body)


class _Race:
    """A device that connects, reads its mail and stays, until it is cut off; and is revoked `offset` seconds after it
    began. `got` is what it read."""

    def __init__(self, device: Device, offset: float) -> None:
        self.device, self._offset = device, offset
        self.got: list[bytes] = []
        self._connecting = threading.Thread(target=self._connect, daemon=True)

    def run(self, http: httpx.Client) -> Document:
        self._connecting.start()
        time.sleep(self._offset)
        return RunningStack.ok(http.post(f"/v1/devices/{self.device.id}/revoke"))

    def is_over(self) -> bool:
        """Was it refused or cut off? What was on its way is read."""
        self._connecting.join(20.0)
        return not self._connecting.is_alive()

    def _connect(self) -> None:
        with suppress(Closed, OSError, EOFError, AssertionError), self.device.raw() as client:
            client.consume(self.device.mailbox)
            while True:
                with suppress(TimeoutError):
                    frame = client.receive(timeout=60.0)
                    if frame.kind == BODY:
                        self.got.append(frame.payload)


# ---- Reports -----------------------------------------------------------------------------------------


@contextmanager
def without_a_worker(stack: RunningStack) -> Iterator[None]:
    """Nothing is read, and no connection is closed."""
    stack.stack.kill_service("worker")
    try:
        yield
    finally:
        stack.stack.start_service("worker")


def test_without_a_worker_the_call_does_not_lie_and_the_brokers_stamp_decides(stack: RunningStack) -> None:
    """What the device said before the revocation counts, though it is read after it. What it says on a connection that
    nobody could close yet is kept, and moves nothing, whatever time it claims."""
    device = Device.enrolled(stack, "stamped")
    before, after = queued(stack, device), queued(stack, device)
    with device.raw() as client:
        for command in (before, after):
            say(client, f"receipt.{device.id}", running(device, command))
        eventually(lambda: stack.command(after)["state"] == "running", "picked up")
        with without_a_worker(stack):
            say(client, f"outcome.{device.id}", outcome(device, before))
            time.sleep(0.01)  # the stamp has whole milliseconds
            answer = revoke(stack, device)
            assert answer["closed_connections"] is None
            assert 0 < seconds_left(answer) <= HANDSHAKE
            assert answer["in_hand"] == 2
            assert not device.may_log_in(device.token())
            say(client, f"outcome.{device.id}", _stamped(device, after, at=time.time() - 60))
        eventually(lambda: cut_off(client), "closed by the next worker", within=30)
    assert stack.settled(before)["state"] == "succeeded"
    eventually(lambda: "after the device's revocation" in _quarantined(stack, device), "kept")
    assert stack.command(after)["state"] == "running"


def _stamped(device: Device, command: str, at: float) -> bytes:
    """An outcome that says itself when the broker had it."""
    ms = int(at * 1000)
    told = {"v": wire.VERSION, "at": ms, "agent": device.agent, "status": "succeeded", "timestamp_in_ms": ms}
    return properties(
        content_type=short(wire.JSON),
        headers=table(told),
        correlation_id=short(command),
        timestamp=struct.pack(">Q", int(at)),
        type=short("outcome"),
        user_id=short(device.id),
    )


def _quarantined(stack: RunningStack, device: Device) -> str:
    path = stack.stack.files.state_dir / "ledger.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        found = ledger.execute("SELECT reason FROM quarantine WHERE device = ?", (device.id,)).fetchall()
    return " ".join(reason for (reason,) in found)


def test_an_id_made_again_hears_nothing_of_the_one_before(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "again")
    command = queued(stack, device)
    with device.raw() as client:
        say(client, f"receipt.{device.id}", running(device, command))
        eventually(lambda: stack.command(command)["state"] == "running", "picked up")
        with without_a_worker(stack):
            # Said before the deletion, by a device that is no more when it is read.
            say(client, f"outcome.{device.id}", outcome(device, command))
            delete(stack, device)
            made = stack.ok(stack.http.post("/v1/devices", json={"id": device.id}))
    key = new_key()
    with own_source(stack) as http:
        request = enroll_request(code_of(made["enrollment"]["ticket"]), key)
        renewed = Device(stack, device.id, key, stack.ok(http.post("/v1/enroll", json=request)))
    assert not device.may_log_in(device.token())
    fresh = queued(stack, renewed)

    # The closure of the deletion may close the newcomer's first connections: it comes again, as agents do.
    def says() -> bool:
        with suppress(Closed, OSError, EOFError), renewed.raw() as client:
            say(client, f"outcome.{renewed.id}", outcome(renewed, command))
            say(client, f"outcome.{renewed.id}", outcome(renewed, fresh))
            return True
        return False

    eventually(says, "said", within=30)
    assert stack.settled(fresh)["state"] == "succeeded"
    assert stack.command(command)["state"] == "unanswered"


# ---- HTTP --------------------------------------------------------------------------------------------


def minted(stack: RunningStack, *scopes: str) -> tuple[str, str]:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "short-lived", "scopes": list(scopes)}))
    return made["token"], made["jti"]


@pytest.mark.parametrize("path", ["send", "read"])
def test_a_waiting_request_ends_with_its_token(stack: RunningStack, path: str) -> None:
    token, jti = minted(stack, "commands:send", "commands:read")
    device, _ = stack.create_device("unwaited")
    command = stack.send(device, "note", {}, ttl=600)["id"]
    wait = {"Prefer": "wait=60"}
    with stack.client(token) as http, ThreadPoolExecutor(1) as pool:
        if path == "send":
            body = {"name": "note", "ttl": 600}
            answer = pool.submit(http.post, f"/v1/devices/{device}/commands", json=body, headers=wait)
        else:
            answer = pool.submit(http.get, f"/v1/commands/{command}", headers=wait)
        time.sleep(0.3)  # it waits
        assert not answer.done()
        stack.ok(stack.http.delete(f"/v1/tokens/{jti}"))
        assert answer.result(10).status_code == 401


def test_a_body_on_its_way_is_refused_when_its_token_is_revoked(stack: RunningStack) -> None:
    token, jti = minted(stack, "commands:send")
    device, _ = stack.create_device("slow")
    with _uploading(stack, f"/v1/devices/{device}/commands", token) as client:
        stack.ok(stack.http.delete(f"/v1/tokens/{jti}"))
        assert _status(client) == 401, "though half of it has not come"
    assert stack.ok(stack.http.get("/v1/commands", params={"device": device}))["items"] == []


def test_and_when_its_device_is_revoked(stack: RunningStack) -> None:
    device, other = Device.enrolled(stack, "slow"), Device.enrolled(stack, "slow")
    path = f"/v1/devices/{device.id}/telemetry/door"
    with (
        _uploading(stack, path, device.api_token()) as client,
        _uploading(stack, f"/v1/devices/{other.id}/telemetry/door", other.api_token()) as unharmed,
    ):
        revoke(stack, device)
        assert _status(client) == 401
        unharmed.sendall(b"}")
        assert _status(unharmed) == 200


@contextmanager
def _uploading(stack: RunningStack, path: str, token: str) -> Iterator[socket.socket]:
    """A request, let in, of whose body (`{}`) the last byte has not been sent."""
    url = stack.http.base_url
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {token}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    plain = socket.create_connection((url.host, url.port or 443), 20)
    with stack.context.wrap_socket(plain, server_hostname=url.host) as client:
        client.sendall(head.encode())
        assert _status(client) == 100
        client.sendall(b"{")
        yield client


def _status(client: socket.socket) -> int:
    return int(client.recv(4096).split()[1])


@pytest.fixture(scope="module")
def second(stack: RunningStack) -> Iterator[AnotherGateway]:
    with another_gateway(stack) as gateway:
        yield gateway


def test_what_is_open_at_any_gateway_has_ended_when_the_call_returns(
    stack: RunningStack, second: AnotherGateway
) -> None:
    """The streams and waits of a token and of the one that was made with it, and of nobody else."""
    token, jti = minted(stack, "tokens:write", "commands:read", "devices:read")
    made = {"subject": "made", "scopes": ["commands:read", "devices:read"]}
    child = stack.ok(stack.client(token).post("/v1/tokens", json=made))["token"]
    other, _ = minted(stack, "commands:read", "devices:read")
    device, _ = stack.create_device("unwaited")
    command = stack.send(device, "note", {}, ttl=600)["id"]
    with (
        following(stack, token=token, device=device, kind="command.cancelled") as here,
        following(second, token=token, device=device, kind="command.cancelled") as there,
        following(second, token=child, device=device, kind="command.cancelled") as of_child,
        following(second, token=other, device=device, kind="command.cancelled") as of_other,
        second.client(child) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.get, f"/v1/commands/{command}", headers={"Prefer": "wait=60"})
        assert second.client(token).get("/v1/devices").is_success, "so that it is believed for a second"
        answer = stack.ok(stack.http.delete(f"/v1/tokens/{jti}"))
        assert (answer["revoked"], answer["pending_until"]) == (2, None)
        assert second.client(token).get("/v1/devices").status_code == 401
        for events in (here, there, of_child):
            assert _has_been_sent(events), "what ends it was sent before the call returned"
            assert json.loads(events.block().data or "")["status"] == 401
            with pytest.raises(StopIteration):
                events.block()
        assert waiting.result(10).status_code == 401
        stack.http.delete(f"/v1/commands/{command}")
        assert of_other.event()["device"] == device


def _has_been_sent(events: Following) -> bool:
    connection = events.answer.extensions["network_stream"].get_extra_info("socket")
    return bool(select.select([connection], [], [], 0.5)[0])


def test_a_gateway_that_stands_still_makes_the_call_say_so(stack: RunningStack, second: AnotherGateway) -> None:
    token, jti = minted(stack, "commands:read", "devices:read")
    with following(second, token=token, kind="no.such") as events:
        second.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            answer = stack.ok(stack.http.delete(f"/v1/tokens/{jti}"))
            took = time.monotonic() - began
            assert answer["revoked"] == 1
            assert answer["pending_until"] is not None
            assert 1.9 < took < 10
        finally:
            second.signal(signal.SIGCONT)
        began = time.monotonic()
        assert json.loads(events.block().data or "")["status"] == 401
        assert time.monotonic() - began < 5
    again = stack.ok(stack.http.delete(f"/v1/tokens/{jti}"))
    assert (again["revoked"], again["pending_until"]) == (0, None), "it has ended now"


def test_the_commands_of_a_revoked_caller_are_counted_and_purged(stack: RunningStack) -> None:
    """Those of whoever a token was made for with it, too; by callers who may withdraw them only."""
    subject, made_for = f"caller-{time.time_ns()}", f"made-{time.time_ns()}"
    scopes = ["tokens:write", "commands:send"]
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": subject, "scopes": scopes}))
    with stack.client(made["token"]) as http:
        body = {"subject": made_for, "scopes": ["commands:send"]}
        child = stack.ok(http.post("/v1/tokens", json=body))["token"]
    device, _ = stack.create_device("purged")
    path = f"/v1/devices/{device}/commands"
    sent = []
    for token in (made["token"], made["token"], child, stack.token):
        with stack.client(token) as http:
            sent.append(stack.ok(http.post(path, json={"name": "note", "ttl": 600}))["id"])
    counts = ("revoked", "queued", "purged")

    def revoked(**query: object) -> tuple[int, ...]:
        answer = stack.ok(stack.http.delete(f"/v1/tokens/{made['jti']}", params=query))  # type: ignore[arg-type]
        return tuple(answer[name] for name in counts)

    may_not, _ = minted(stack, "tokens:write")
    with stack.client(may_not) as http:
        for where in (f"/v1/tokens/{made['jti']}?purge=true", f"/v1/tokens?subject={subject}&purge=true"):
            assert http.delete(where).status_code == 403
    other, _ = minted(stack, "commands:read", "devices:read")
    with following(stack, token=other, kind="no.such"):  # whose token is looked at by the way
        assert revoked() == (2, 3, 0)
        assert revoked(purge=True) == (0, 0, 3)
        assert revoked(purge=True) == (0, 0, 0)
    found = [stack.command(id) for id in sent]
    assert [(it["state"], it["reason"]) for it in found[:3]] == [("cancelled", "purged")] * 3
    assert found[3]["state"] == "queued"
    audited = stack.ok(stack.http.get("/v1/audit", params={"device": device}))["items"]
    by = {entry["action"]: entry["by"]["subject"] for entry in audited}
    assert by["command.cancelled"] == by["device.created"], "the operator did it"
    of_subject = stack.ok(stack.http.delete("/v1/tokens", params={"subject": made_for, "purge": True}))
    assert tuple(of_subject[name] for name in counts) == (0, 0, 0)


# ---- Keys --------------------------------------------------------------------------------------------


def test_a_revoked_key_takes_those_under_it_along(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "lineage")
    child = next_key(device)
    grandchild = next_key(child)
    with grandchild.raw() as client, device.raw() as own:
        assert seconds_left(revoke_key(stack, child)) > 0
        assert cut_off(client)
        assert cut_off(own), "the connections of a device are closed, whichever key they were made with"
    assert keys(stack, device.id) == [device.kid]
    for gone in (child, grandchild):
        assert not gone.may_log_in(gone.token())
        assert stack.client(gone.api_token()).get(f"/v1/devices/{device.id}/keys").status_code == 401
    assert device.may_log_in(device.token())
    assert events(stack, device.id).count("device.key-revoked") == 2


def next_key(device: Device, stack: RunningStack | None = None) -> Device:
    """The same device with a key that it registered under its present one."""
    renewed = Device(stack or device.stack, device.id, new_key(), device.peering)
    answer = add(device, renewed)
    assert answer.status_code == 201, answer.text
    return renewed


def add(device: Device, renewed: Device, /, token: str | None = None, **claims: object) -> httpx.Response:
    """Ask for the registration of a key; `claims` replace those of the proof, `typ` its type."""
    typ = claims.pop("typ", enrollment.KEY_PROOF_TYPE)
    said = {"device": device.id, "parent": device.kid, "iat": int(time.time()), **claims}
    proof = forge({"alg": "ES256", "typ": typ}, said, es256(renewed.key))
    with device.stack.client(token or device.api_token()) as http:
        body = {"public_key": renewed.jwk, "proof": proof}
        return http.post(f"/v1/devices/{device.id}/keys", json=body)


def test_a_new_key_needs_the_old_ones_token_and_its_own_proof(stack: RunningStack, attacker: Device) -> None:
    device = Device.enrolled(stack, "rotating")
    renewed = Device(stack, device.id, new_key(), device.peering)
    for refused, status in (
        (add(device, renewed, typ=enrollment.PROOF_TYPE), 422),
        (add(device, renewed, typ="JWT"), 422),
        (add(device, renewed, device=attacker.id), 422),
        (add(device, renewed, parent=renewed.kid), 422),
        (add(device, renewed, parent=[device.kid]), 422),
        (add(device, renewed, iat=int(time.time()) - enrollment.PROOF_LIFE - 5), 422),
        (add(device, renewed, iat=float("nan")), 422),
        (add(device, renewed, token=device.token()), 401),  # for the broker
        (add(device, renewed, token=renewed.api_token()), 401),  # of a key that nobody knows
        (add(device, renewed, token=attacker.api_token()), 404),
        (add(device, renewed, token=stack.token), 403),
    ):
        assert refused.status_code == status, refused.text
    with stack.client(device.api_token()) as http:
        said = {"device": device.id, "parent": device.kid, "iat": int(time.time())}
        forged = forge({"alg": "ES256", "typ": enrollment.KEY_PROOF_TYPE}, said, es256(device.key))
        body = {"public_key": renewed.jwk, "proof": forged}
        assert http.post(f"/v1/devices/{device.id}/keys", json=body).status_code == 422, "another key's proof"
    assert add(device, attacker).status_code == 409, "another device's key"
    assert keys(stack, device.id) == [device.kid]

    assert [add(device, renewed).status_code for _ in range(2)] == [201, 200]
    listed = stack.ok(stack.http.get(f"/v1/devices/{device.id}/keys"))["items"]
    assert [(key["kid"], key["parent"]) for key in listed] == [(device.kid, None), (renewed.kid, device.kid)]
    assert listed[0]["last_used"] is None
    assert renewed.may_log_in(renewed.token())
    assert add(device, next_key(renewed)).status_code == 200
    assert add(device, Device(stack, device.id, new_key(), device.peering)).status_code == 409, "a fourth"
    assert events(stack, device.id).count("device.key-added") == 2


def test_a_device_drops_only_what_its_key_descends_from(stack: RunningStack, attacker: Device) -> None:
    device = Device.enrolled(stack, "rotating")
    renewed, stolen = next_key(device), next_key(device)
    for who, kid, status in (
        (device, renewed.kid, 403),
        (device, device.kid, 403),
        (stolen, renewed.kid, 403),
        (renewed, attacker.kid, 404),
        (attacker, device.kid, 404),
    ):
        assert drop(who, device.id, kid).status_code == status
    with device.raw() as client:
        answer = drop(renewed, device.id, device.kid)
        assert (answer.status_code, answer.json()["closed_connections"]) == (200, 1)
        assert cut_off(client)
    assert not device.may_log_in(device.token())
    assert drop(device, device.id, device.kid).status_code == 401
    assert keys(stack, device.id) == [renewed.kid, stolen.kid]
    # Whatever was registered under the old key is still found when that turns out to have been stolen.
    revoke_key(stack, device)
    assert keys(stack, device.id) == []


def drop(who: Device, device: str, kid: str) -> httpx.Response:
    with who.stack.client(who.api_token()) as http:
        return http.delete(f"/v1/devices/{device}/keys/{kid}")
