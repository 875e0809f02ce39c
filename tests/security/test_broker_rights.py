"""A device reads its own mailbox and writes its own keys on `uplink`; whatever else it tries, nothing happens.

Each attack is made over a real connection, refused with the broker's own code, and leaves no trace: what
exists is the same, the victim's mail lies where it lay, and no message passed any exchange.
"""

import secrets
from collections.abc import Callable, Iterator

import proton
import pytest

from tests.harness.device import Device, One, Refused
from tests.harness.rawamqp import ChannelClosed, ConnectionClosed, Got, RawClient, long, properties, short, table
from tests.harness.stack import RunningStack, eventually
from tests.security.conftest import Witness
from topology import access, layout, names

REFUSED = 403
FALSE_USER_ID = 406
CRASHED = 541  # the broker's own channel stumbles over its refusal, and takes the attacker's connection with it
SHARED = tuple(queue.name for queue in layout.QUEUES)
EVENTS = names.BROKER_EVENTS.encode()

Act = Callable[[RawClient, Device, Device], object]
Act10 = Callable[[One, Device, Device], object]


def uplink(kind: str, device: Device) -> str:
    """A routing key of each kind; `telemetry` and `inquiry` have a name of their own at the end."""
    return f"{kind}.{device.id}.probe" if kind in ("telemetry", "inquiry") else f"{kind}.{device.id}"


def exchange_bind(client: RawClient, source: str, destination: str) -> None:
    client.method(1, (40, 30), b"\0\0" + short(destination) + short(source) + short("#") + b"\0" + table())
    client.expect(1, (40, 31))


def published(client: RawClient, exchange: str, key: str | bytes, raw_properties: bytes | None = None) -> bool:
    client.publish(exchange, key, secrets.token_bytes(8), raw_properties)
    return client.confirmed()


# ---- What a device may do ----------------------------------------------------------------------------


KINDS = ("receipt", "outcome", "claim", "hello", "telemetry", "inquiry")


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_keys_are_its_right(attacker: Device, watching: Witness, kind: str) -> None:
    """The control of all refusals below: the same acts, on what is its own."""
    key, user = uplink(kind, attacker), properties(user_id=short(attacker.id))
    watching.passed()
    with attacker.raw() as client:
        assert published(client, names.UPLINK, key, user)
    passed = [got.key.decode() for got in watching.passed() if got.exchange == names.UPLINK.encode()]
    assert passed == [key]


def test_its_own_mailbox_is_its_right(stack: RunningStack, attacker: Device) -> None:
    command = stack.send(attacker.id, "note", {}, ttl=600)
    eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
    with attacker.raw() as client:
        assert client.declare(attacker.mailbox, passive=True) == 1
        client.consume(names.DIRECT_REPLY_TO, tag="replies", no_ack=True)
        client.consume(attacker.mailbox)
        assert command["id"].encode() in client.delivery().header
    with attacker.raw() as client:
        client.purge(attacker.mailbox)
        assert client.get(attacker.mailbox) is None


# ---- AMQP 0-9-1 --------------------------------------------------------------------------------------


def _refusals() -> dict[str, tuple[int, Act]]:
    """Every refused act: the reply code, and what is done as (client, attacker, victim)."""
    acts: dict[str, tuple[int, Act]] = {}

    def refused(what: str, act: Act, code: int = REFUSED) -> None:
        acts[what] = (code, act)

    refused("victim's mailbox: consume", lambda it, me, you: it.consume(you.mailbox))
    refused("victim's mailbox: get", lambda it, me, you: it.get(you.mailbox))
    refused("victim's mailbox: purge", lambda it, me, you: it.purge(you.mailbox))
    refused("victim's mailbox: passive", lambda it, me, you: it.declare(you.mailbox, passive=True))
    refused("victim's mailbox: declare", lambda it, me, you: it.declare(you.mailbox))
    refused("victim's mailbox: delete", lambda it, me, you: it.delete(you.mailbox))
    refused("victim's mailbox: bind", lambda it, me, you: it.bind(you.mailbox, names.UPLINK, "#"))
    refused("victim's mailbox: unbind", lambda it, me, you: it.unbind(you.mailbox, names.MAIL, you.id))
    refused("mailbox of nobody: passive", lambda it, me, you: it.declare("mailbox.nobody", passive=True))
    refused("mailbox of nobody: declare", lambda it, me, you: it.declare("mailbox.nobody"))
    refused("own mailbox: declare", lambda it, me, you: it.declare(me.mailbox, {"x-single-active-consumer": True}))
    refused("own mailbox: delete", lambda it, me, you: it.delete(me.mailbox))
    refused("own mailbox: bind to mail", lambda it, me, you: it.bind(me.mailbox, names.MAIL, you.id))
    refused("own mailbox: bind to uplink", lambda it, me, you: it.bind(me.mailbox, names.UPLINK, "#"))
    refused("own mailbox: bind to notices", lambda it, me, you: it.bind(me.mailbox, names.NOTICES, "group.vip"))
    refused("own mailbox: bind to events", lambda it, me, you: it.bind(me.mailbox, "amq.rabbitmq.event", "#"))
    refused("own mailbox: unbind", lambda it, me, you: it.unbind(me.mailbox, names.MAIL, me.id))
    refused("queue: declare", lambda it, me, you: it.declare(f"mine-{me.id}"))
    refused("queue: declare exclusive, unnamed", lambda it, me, you: it.declare("", durable=False, exclusive=True))
    refused("queue: declare, like a reply address", lambda it, me, you: it.declare("amq.rabbitmq.reply-to.x"), CRASHED)
    refused(
        "another's reply address: consume", lambda it, me, you: it.consume("amq.rabbitmq.reply-to.g1h2", no_ack=True)
    )
    refused("exchange: declare", lambda it, me, you: it.declare_exchange(f"mine-{me.id}"))
    refused("exchange: delete", lambda it, me, you: it.delete_exchange(names.MAIL))
    refused("exchange: bind", lambda it, me, you: exchange_bind(it, names.MAIL, names.UPLINK))
    refused("uplink: declare", lambda it, me, you: it.declare_exchange(names.UPLINK, "topic"))
    refused("uplink: delete", lambda it, me, you: it.delete_exchange(names.UPLINK))
    refused("exchange: passive", lambda it, me, you: it.declare_exchange(names.MAIL, passive=True))
    for queue in SHARED:
        refused(f"{queue}: passive", lambda it, me, you, queue=queue: it.declare(queue, passive=True))
        refused(f"{queue}: get", lambda it, me, you, queue=queue: it.get(queue))
        refused(f"{queue}: purge", lambda it, me, you, queue=queue: it.purge(queue))
        refused(f"{queue}: delete", lambda it, me, you, queue=queue: it.delete(queue))
        refused(f"{queue}: consume", lambda it, me, you, queue=queue: (it.qos(1), it.consume(queue)))
        refused(f"{queue}: bind", lambda it, me, you, queue=queue: it.bind(queue, names.UPLINK, "#"))
    for kind in KINDS:
        refused(f"victim's {kind}", lambda it, me, you, kind=kind: published(it, names.UPLINK, uplink(kind, you)))
        for header in ("CC", "BCC"):

            def copied(it: RawClient, me: Device, you: Device, header: str = header, kind: str = kind) -> object:
                entries = short(header) + b"A" + long(b"S" + long(uplink(kind, you)))
                return published(it, names.UPLINK, uplink(kind, me), properties(headers=long(entries)))

            refused(f"{header} to the victim's {kind}", copied)
    for header in ("CC", "BCC"):

        def posted(it: RawClient, me: Device, you: Device, header: str = header) -> object:
            entries = short(header) + b"A" + long(b"S" + long(you.mailbox))
            return published(it, "", me.mailbox, properties(headers=long(entries)))

        refused(f"{header} to the victim's mailbox", posted)
    for what, key in BAD_KEYS.items():
        code = CRASHED if what == "255 bytes of 0xff" else REFUSED
        refused(f"key: {what}", lambda it, me, you, key=key: published(it, names.UPLINK, key(me, you)), code)
    for what, user in {"victim": None, "worker": access.WORKER, "gateway": access.GATEWAY, "guest": "guest"}.items():

        def as_another(it: RawClient, me: Device, you: Device, user: str | None = user) -> object:
            return published(it, names.UPLINK, uplink("outcome", me), properties(user_id=short(user or you.id)))

        refused(f"user_id: {what}", as_another, FALSE_USER_ID)
    refused(
        "user_id: its own, in capitals",
        lambda it, me, you: published(
            it, names.UPLINK, uplink("outcome", me), properties(user_id=short(me.id.upper()))
        ),
        FALSE_USER_ID,
    )
    return acts


Key = Callable[[Device, Device], str | bytes]

BAD_KEYS: dict[str, Key] = {
    "empty": lambda me, you: "",
    "no device": lambda me, you: "receipt",
    "empty device": lambda me, you: "receipt.",
    "unknown kind": lambda me, you: f"command.{me.id}",
    "capital kind": lambda me, you: f"Receipt.{me.id}",
    "star for the device": lambda me, you: "receipt.*",
    "hash for the device": lambda me, you: "receipt.#",
    "star behind": lambda me, you: f"telemetry.{me.id}.*",
    "hash behind": lambda me, you: f"telemetry.{me.id}.#",
    "hash": lambda me, you: "#",
    "newline behind": lambda me, you: f"receipt.{me.id}\n",
    "newline, then another": lambda me, you: f"telemetry.{me.id}.ch\nreceipt.{you.id}",
    "NUL behind": lambda me, you: f"receipt.{me.id}\0",
    "0xff": lambda me, you: f"telemetry.{me.id}.".encode() + b"\xff",
    "0xff alone": lambda me, you: b"\xff",
    "over-long UTF-8": lambda me, you: f"receipt.{me.id}".encode() + b"\xc0\xae",
    "255 bytes": lambda me, you: f"telemetry.{me.id}.".ljust(255, "a"),
    "255 bytes of dots": lambda me, you: f"telemetry.{me.id}".ljust(255, "."),
    "255 bytes of 0xff": lambda me, you: b"\xff" * 255,
    "more behind": lambda me, you: f"receipt.{me.id}.{you.id}",
    "another before": lambda me, you: f"receipt.{you.id}.{me.id}",
    "no channel": lambda me, you: f"telemetry.{me.id}",
    "empty channel": lambda me, you: f"telemetry.{me.id}.",
    "capital channel": lambda me, you: f"telemetry.{me.id}.Door",
    "space before": lambda me, you: f" receipt.{me.id}",
    "form in the key": lambda me, you: f"telemetry.{you.id}.x&routing_key=telemetry.{me.id}.x",
    "percent": lambda me, you: f"receipt%2e{me.id}",
    "full width": lambda me, you: f"telemetry.{me.id}.ａ",
}

REFUSALS = _refusals()


@pytest.mark.parametrize("what", REFUSALS)
def test_refused(line: "Line", attacker: Device, victim: Device, traces: "Traces", what: str) -> None:
    code, act = REFUSALS[what]
    with pytest.raises(ConnectionClosed if code == CRASHED else ChannelClosed) as refused:
        act(line.client(), attacker, victim)
    assert refused.value.code == code, refused.value
    traces.none()


def test_no_exchange_but_uplink_is_written(line: "Line", attacker: Device, victim: Device, traces: "Traces") -> None:
    exchanges = traces.witness.all_exchanges()
    assert {"", "amq.topic", names.BROKER_EVENTS, *(each.name for each in layout.EXCHANGES)} < set(exchanges)
    exchanges.remove(names.UPLINK)
    for exchange in (*exchanges, "amq.default", "nowhere"):
        for key in (victim.mailbox, victim.id, "all", names.REPORTS):
            with pytest.raises(ChannelClosed) as refused:
                published(line.client(), exchange, key)
            assert refused.value.code == REFUSED, (exchange, key, refused.value)
    traces.none()


def test_a_new_secret_changes_no_rights(attacker: Device, victim: Device, traces: "Traces") -> None:
    """`update-secret` asks nobody; it must not make somebody else of a connection."""
    with attacker.raw() as client:
        client.method(0, (10, 70), long(victim.token()) + short("renewal"))
        client.expect(0, (10, 71))
        with pytest.raises(ChannelClosed) as refused:
            published(client, names.UPLINK, uplink("receipt", victim))
        assert refused.value.code == REFUSED
    traces.none()


# ---- AMQP 1.0 ----------------------------------------------------------------------------------------

# Switched off; what follows would hold if it were not.

UNAUTHORIZED = "amqp:unauthorized-access"
UPLINK_ADDRESS = f"/exchanges/{names.UPLINK}"


@pytest.mark.usefixtures("amqp_1_0")
def test_its_own_keys_and_mailbox_are_its_right_in_1_0(
    stack: RunningStack, attacker: Device, watching: Witness
) -> None:
    """The control of all refusals below."""
    keys = [uplink(kind, attacker) for kind in KINDS]
    watching.passed()
    with One(attacker) as one:
        for key in keys:
            assert one.send(f"{UPLINK_ADDRESS}/{key}", b"1.0", user_id=attacker.id.encode())
            assert one.send(None, b"null target", address=f"{UPLINK_ADDRESS}/{key}")
    passed = [got.key.decode() for got in watching.passed() if got.exchange == names.UPLINK.encode()]
    assert passed == [key for key in keys for _ in range(2)]
    command = stack.send(attacker.id, "note", {}, ttl=600)
    eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
    with One(attacker) as one:
        assert one.manage("GET", f"/queues/{attacker.mailbox}") == 200
    with One(attacker) as one:
        assert one.receiver(f"/queues/{attacker.mailbox}").receive(10).id == command["id"]
    with One(attacker) as one:
        assert one.manage("DELETE", f"/queues/{attacker.mailbox}/messages") == 200
    with attacker.raw() as client:
        assert client.get(attacker.mailbox) is None


def _refusals_1_0() -> dict[str, Act10]:
    acts: dict[str, Act10] = {
        "victim's mailbox: receive": lambda it, me, you: it.receiver(f"/queues/{you.mailbox}"),
        "victim's mailbox: browse": lambda it, me, you: it.receiver(f"/queues/{you.mailbox}", options=_Copy()),
        "victim's mailbox: send": lambda it, me, you: it.sender(f"/queues/{you.mailbox}"),
        "victim's mailbox: send by null target": lambda it, me, you: it.send(
            None, b"x", address=f"/queues/{you.mailbox}"
        ),
        "own mailbox: send": lambda it, me, you: it.sender(f"/queues/{me.mailbox}"),
        "reply address: send": lambda it, me, you: it.send(None, b"x", address="/queues/amq.rabbitmq.reply-to.g1h2"),
        "exchange without key": lambda it, me, you: it.send(UPLINK_ADDRESS, b"x"),
        "victim's key as subject": lambda it, me, you: it.send(UPLINK_ADDRESS, b"x", subject=f"receipt.{you.id}"),
        "x-cc": lambda it, me, you: it.send(
            f"{UPLINK_ADDRESS}/receipt.{me.id}", b"x", annotations={proton.symbol("x-cc"): [f"receipt.{you.id}"]}
        ),
        "x-cc to the mailbox": lambda it, me, you: it.send(
            None, b"x", address=f"/exchanges/{names.MAIL}/{you.id}", annotations={proton.symbol("x-cc"): [you.mailbox]}
        ),
        "user-id: victim": lambda it, me, you: it.send(
            f"{UPLINK_ADDRESS}/outcome.{me.id}", b"x", user_id=you.id.encode()
        ),
        "user-id: worker": lambda it, me, you: it.send(
            f"{UPLINK_ADDRESS}/outcome.{me.id}", b"x", user_id=access.WORKER.encode()
        ),
        "manage: look at the victim's mailbox": lambda it, me, you: it.manage("GET", f"/queues/{you.mailbox}"),
        "manage: purge the victim's mailbox": lambda it, me, you: it.manage(
            "DELETE", f"/queues/{you.mailbox}/messages"
        ),
        "manage: delete the victim's mailbox": lambda it, me, you: it.manage("DELETE", f"/queues/{you.mailbox}"),
        "manage: delete the own mailbox": lambda it, me, you: it.manage("DELETE", f"/queues/{me.mailbox}"),
        "manage: declare a queue": lambda it, me, you: it.manage("PUT", f"/queues/mine-{me.id}", {"durable": True}),
        "manage: declare an exchange": lambda it, me, you: it.manage(
            "PUT", f"/exchanges/mine-{me.id}", {"durable": True}
        ),
        "manage: delete an exchange": lambda it, me, you: it.manage("DELETE", f"/exchanges/{names.MAIL}"),
        "manage: bind the own mailbox": lambda it, me, you: it.manage(
            "POST",
            "/bindings",
            {"source": names.MAIL, "destination_queue": me.mailbox, "binding_key": you.id, "arguments": {}},
        ),
        "manage: bind an exchange": lambda it, me, you: it.manage(
            "POST",
            "/bindings",
            {"source": names.MAIL, "destination_exchange": names.UPLINK, "binding_key": you.id, "arguments": {}},
        ),
        "manage: unbind the victim's mailbox": lambda it, me, you: it.manage(
            "DELETE", f"/bindings/src={names.MAIL};dstq={you.mailbox};key={you.id};args="
        ),
    }
    for queue in SHARED:
        acts[f"{queue}: receive"] = lambda it, me, you, queue=queue: it.receiver(f"/queues/{queue}")
        acts[f"{queue}: send"] = lambda it, me, you, queue=queue: it.sender(f"/queues/{queue}")
        acts[f"{queue}: purge"] = lambda it, me, you, queue=queue: it.manage("DELETE", f"/queues/{queue}/messages")
    for kind in KINDS:
        acts[f"victim's {kind}"] = lambda it, me, you, kind=kind: it.send(f"{UPLINK_ADDRESS}/{uplink(kind, you)}", b"x")
        acts[f"victim's {kind} by null target"] = lambda it, me, you, kind=kind: it.send(
            None, b"x", address=f"{UPLINK_ADDRESS}/{uplink(kind, you)}"
        )
    for what, key in {
        "star": "receipt.*",
        "newline": "receipt.{me}%0A",
        "0xff": "telemetry.{me}.%FF",
        "empty": "",
        "NUL": "receipt.{me}%00",
        "capital": "telemetry.{me}.Door",
    }.items():
        acts[f"key: {what}"] = lambda it, me, you, key=key: it.send(f"{UPLINK_ADDRESS}/{key.format(me=me.id)}", b"x")
    return acts


class _Copy(proton.reactor.LinkOption):  # type: ignore[misc]  # proton carries no types
    """Browse instead of consume."""

    def apply(self, link: proton.Link) -> None:
        link.source.distribution_mode = proton.Terminus.DIST_MODE_COPY


REFUSALS_1_0 = _refusals_1_0()


@pytest.mark.usefixtures("amqp_1_0")
@pytest.mark.parametrize("what", REFUSALS_1_0)
def test_refused_in_1_0(attacker: Device, victim: Device, traces: "Traces", what: str) -> None:
    with One(attacker) as one, pytest.raises(Refused) as refused:
        REFUSALS_1_0[what](one, attacker, victim)
    expected = {UNAUTHORIZED} if what not in INVALID_1_0 else {UNAUTHORIZED, "amqp:invalid-field"}
    assert refused.value.name in expected, refused.value
    traces.none()


INVALID_1_0 = {"key: 0xff", "key: empty"}


@pytest.mark.usefixtures("amqp_1_0")
def test_no_exchange_but_uplink_is_written_in_1_0(attacker: Device, victim: Device, traces: "Traces") -> None:
    exchanges = set(traces.witness.all_exchanges()) - {names.UPLINK, ""}
    for exchange in sorted(exchanges):
        for send in (
            lambda it, to: it.send(to, b"x"),
            lambda it, to: it.send(None, b"x", address=to),
        ):
            with One(attacker) as one, pytest.raises(Refused) as refused:
                send(one, f"/exchanges/{exchange}/{victim.id}")
            assert refused.value.name == UNAUTHORIZED, (exchange, refused.value)
    traces.none()


# ---- The witness -------------------------------------------------------------------------------------


class Traces:
    """What there was before all attacks; `none` says that there is nothing more since, and nothing less."""

    def __init__(self, witness: Witness, attacker: Device, victim: Device) -> None:
        self.witness = witness
        self._mailboxes = (attacker.mailbox, victim.mailbox)
        self._before = self._look()
        assert self._before[1] == [0, 1], "without mail in the victim's mailbox nothing could be lost"

    def none(self) -> None:
        assert self._look() == self._before
        # The broker's own events go on, of connections above all; for each new connection of the attacker's, the fabric
        # may close the one before; and what another test has left in a mailbox may expire.
        seen = [
            got
            for got in self.witness.passed()
            if got.exchange != EVENTS and not _is_closing(got) and not _is_expiry(got)
        ]
        assert [(got.exchange, got.key) for got in seen] == []

    def _look(self) -> tuple[object, list[int]]:
        return self.witness.exists(), [self.witness.depth(queue) for queue in self._mailboxes]


class Line:
    """The attacker's connection: one for many attacks, and a new one when an attack has cost it."""

    def __init__(self, attacker: Device) -> None:
        self._attacker = attacker
        self._client: RawClient | None = None
        self._channel = 0

    def client(self) -> RawClient:
        """A connection with an open channel 1."""
        if self._client is not None:
            try:
                # Where an attack has cost the channel, it can be opened; the one that lives answers.
                self._client.open_channel(confirms=True)
            except (ConnectionClosed, TimeoutError):
                self._client.close()
                self._client = None
            else:
                self._client._awaited.clear()
                self._client._settled.clear()
        if self._client is None:
            self._client = self._attacker.raw()
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


@pytest.fixture(scope="module")
def line(attacker: Device) -> Iterator[Line]:
    held = Line(attacker)
    yield held
    held.close()


@pytest.fixture(scope="module")
def watching(stack: RunningStack, attacker: Device, victim: Device) -> Iterator[Witness]:
    """A witness for all attacks, and a command that lies in the victim's mailbox all the while."""
    before = stack.send(victim.id, "door.open", {}, ttl=600)
    eventually(lambda: stack.command(before["id"])["state"] == "queued", "queued")
    queued = stack.command(before["id"])
    seen = Witness(stack, attacker.id, victim.id, attacker.mailbox, victim.mailbox)
    yield seen
    assert stack.command(before["id"]) == queued
    got = seen.client.get(victim.mailbox, no_ack=True)
    assert got is not None
    assert before["id"].encode() in got.header
    assert not got.redelivered, "somebody has had the victim's mail"
    seen.close()


@pytest.fixture(scope="module")
def remembered(watching: Witness, attacker: Device, victim: Device) -> Traces:
    return Traces(watching, attacker, victim)


@pytest.fixture
def traces(remembered: Traces) -> Traces:
    remembered.witness.passed()
    return remembered


def _is_expiry(got: Got) -> bool:
    """Is it a dead letter whose time was up, or the wake-up of those who wait for its command?"""
    return got.exchange.decode() in (names.RETURNED, names.WAKE) and b"expired" in got.header + got.body


def _is_closing(got: Got) -> bool:
    """Is it a gateway's question to the workers to close connections, or a worker's answer?"""
    said = {names.CONTROL: ("close", access.GATEWAY), names.WAKE: ("closed", access.WORKER)}
    kind, user = said.get(got.exchange.decode(), ("", ""))
    # Of these properties, a header holds the type and the account one behind the other.
    return bool(kind) and short(kind) + short(user) in got.header
