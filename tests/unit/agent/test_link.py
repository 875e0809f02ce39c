"""The link's own arithmetic, and what a failed connection is called; the broker itself is met in integration."""

import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import pika
import pytest
from pika import exceptions, spec
from tls_server import Gateway, closed_port, credentials

from api.operator.authority import Credential
from device_agent import backoff, errors, identity, link, pins
from device_agent.clock import FabricClock
from device_agent.link import Link, Mail, from_properties, to_properties
from device_agent.timekeeping import Times
from fabric import signing
from topology import names, wire


def test_messages_keep_everything_through_pika() -> None:
    outcome = wire.Outcome(
        names.CommandId("0199c0de-0000-7000-8000-000000000001"), "a" * 24, "failed", "because", b"\x00", "x/y", 7
    )
    message = wire.encode_outcome(outcome, names.DeviceId("garage-7"))
    assert wire.decode_outcome(from_properties(to_properties(message), message.body)) == outcome
    assert to_properties(message).user_id == "garage-7"
    assert to_properties(message).delivery_mode == 2


class _Deaf:
    def link_up(self) -> None: ...
    def link_down(self) -> None: ...
    def answer(self, message: wire.Message) -> None: ...
    def mail(self, mail: Mail) -> None: ...


def _identity(tmp_path: Path, issuer: Credential, host: str, port: int) -> identity.Identity:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    identity.make_key(state)
    answer = {
        "device_id": "garage-7",
        "generation": 1,
        "amqps_url": f"amqps://{host}:{port}/devices",
        "api_url": "https://localhost:1",
        "audience": {"mq": "fabric/mq/one", "api": "fabric/api"},
        "signing_keys": signing.jwks(signing.signing_key(issuer.key)),
    }
    identity.store_peering(state, json.loads(json.dumps(answer)), pins.one(issuer.certificate_pem.decode()))
    return identity.load(state)


def _refusal(tmp_path: Path, issuer: Credential, host: str, port: int) -> errors.AgentError:
    """What the link says after its first failed connection."""
    who = _identity(tmp_path, issuer, host, port)
    tried = Link(who, lambda: who, lambda _: None, Times(FabricClock(), 0), _Deaf())
    tried.start()
    waited = threading.Event()
    for _ in range(500):
        if tried.last_error is not None:
            break
        waited.wait(0.01)
    tried.call(tried.stop)
    assert tried.join(5)
    assert tried.last_error is not None
    return tried.last_error


@pytest.mark.parametrize(
    ("options", "host", "error"),
    [
        ({}, "127.0.0.1", errors.WrongHostName),
        ({"expired": True}, "localhost", errors.CertificateExpired),
        ({"future": True}, "localhost", errors.CertificateNotYetValid),
    ],
)
def test_a_bad_certificate_is_named(
    tmp_path: Path, options: dict[str, bool], host: str, error: type[Exception]
) -> None:
    issuer, server = credentials(**options)  # type: ignore[arg-type]  # no hosts among them
    with Gateway(server, {}).start(tmp_path / "server") as gateway:
        assert isinstance(_refusal(tmp_path, issuer, host, gateway.port), error)
        assert gateway.requests == []


def test_another_authority_is_named(tmp_path: Path) -> None:
    issuer, _ = credentials()
    _, server = credentials()
    with Gateway(server, {}).start(tmp_path / "server") as gateway:
        assert isinstance(_refusal(tmp_path, issuer, "localhost", gateway.port), errors.WrongAuthority)


def test_nobody_there_is_said(tmp_path: Path) -> None:
    issuer, _ = credentials()
    error = _refusal(tmp_path, issuer, "localhost", closed_port())
    assert isinstance(error, errors.Unreachable)
    assert "can't be reached" in str(error)


class _Channel:
    """pika's channel as far as the link uses it; the real one is met in integration."""

    def __init__(self) -> None:
        self.is_open = True
        self.acked: list[int] = []
        self.published = 0
        self.consumers: list[Any] = []
        self._on_close: list[Any] = []

    def close(self) -> None:
        self.is_open = False

    def closed_by_broker(self, code: int, text: str) -> None:
        self.is_open = False
        for callback in self._on_close:
            callback(self, exceptions.ChannelClosedByBroker(code, text))

    def add_on_close_callback(self, callback: Any) -> None:
        self._on_close.append(callback)

    def add_on_cancel_callback(self, callback: Any) -> None:
        self.cancelled_by_broker = callback

    def add_on_return_callback(self, callback: Any) -> None: ...

    def confirm_delivery(self, callback: Any) -> None: ...
    def basic_qos(self, prefetch_count: int) -> None: ...

    def basic_consume(self, queue: str, delivered: Any, auto_ack: bool = False, callback: Any = None) -> None:
        self.consumers.append(delivered)
        if callback is not None:
            callback(None)

    def basic_ack(self, tag: int) -> None:
        self.acked.append(tag)

    def basic_publish(self, *_: object, mandatory: bool) -> None:
        assert self.is_open, "pika raises"
        self.published += 1


class _Connection:
    """pika's connection: closing it takes its channels along at once, and ends later."""

    is_closed = is_closing = False
    made: ClassVar[list["_Connection"]] = []

    def __init__(self, _: object, *, on_open_callback: Any, on_close_callback: Any, **__: object) -> None:
        self.open, self._on_close = on_open_callback, on_close_callback
        self.channels: list[_Channel] = []
        self._opened: list[Any] = []
        self.made.append(self)

    def add_on_connection_blocked_callback(self, callback: Any) -> None: ...
    def add_on_connection_unblocked_callback(self, callback: Any) -> None: ...

    def channel(self, on_open_callback: Any) -> _Channel:
        self.channels.append(_Channel())
        self._opened.append(on_open_callback)
        return self.channels[-1]

    def channel_opens(self, number: int) -> None:
        self._opened[number](self.channels[number])

    def close(self) -> None:
        self.is_closing = True
        for channel in self.channels:
            channel.close()

    def ends(self) -> None:
        self.is_closed = True
        self._on_close(self, exceptions.ConnectionClosedByClient(200, "Normal shutdown"))


class _Ear(_Deaf):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.mails: list[Mail] = []

    def link_up(self) -> None:
        self.heard.append("up")

    def link_down(self) -> None:
        self.heard.append("down")

    def mail(self, mail: Mail) -> None:
        self.mails.append(mail)


@pytest.mark.parametrize("what", ["the mailbox's channel is closed", "the mailbox's consumer is cancelled"])
def test_mail_that_waited_too_long_for_the_broker_comes_again_on_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The broker's `consumer_timeout`: whatever it takes away, the link comes back with all of it."""
    monkeypatch.setattr(link, "GuardedConnection", _Connection)
    monkeypatch.setattr(_Connection, "made", made := [])
    later: list[tuple[float, Any]] = []
    ear = _Ear()
    issuer, _ = credentials()
    who = _identity(tmp_path, issuer, "localhost", 1)
    tried = Link(who, lambda: who, lambda _: None, Times(FabricClock(), 0), ear)
    monkeypatch.setattr(tried._loop, "call_later", lambda delay, call, *_: later.append((delay, call)))

    def comes_up() -> _Connection:
        connection: _Connection = made[-1]
        connection.open(connection)
        connection.channel_opens(0)
        tried.open_mailbox(prefetch=3)
        connection.channel_opens(1)
        return connection

    tried._connect()
    first = comes_up()
    uplink, mailbox = first.channels
    method = spec.Basic.Deliver("tag", 7, False, "mail", "garage-7")
    mailbox.consumers[0](mailbox, method, pika.BasicProperties(), b"")
    confirms: list[bool] = []
    message = wire.encode_hello(wire.Hello("a" * 16, "a" * 24, "1", 1), names.DeviceId("garage-7"))
    assert tried.publish("key", message, confirms.append)

    if what == "the mailbox's channel is closed":
        mailbox.closed_by_broker(406, "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out")
    else:
        mailbox.cancelled_by_broker(spec.Basic.Cancel("tag"))
    assert first.is_closing
    # Until the connection has ended, nothing is sent on it, and nothing raises.
    assert not tried.up
    tried.ack(ear.mails[0])
    assert not tried.publish("key", message, confirms.append)
    assert (mailbox.acked, uplink.published) == ([], 1)

    first.ends()
    assert ear.heard == ["up", "down"]
    assert confirms == [False]
    ((delay, connect),) = later
    assert delay <= backoff.FIRST
    connect()
    second = comes_up()
    assert ear.heard == ["up", "down", "up"]
    assert len(made) == 2
    tried.ack(ear.mails[0])  # of the first connection: it is not this one's to ack
    method = spec.Basic.Deliver("tag", 1, True, "mail", "garage-7")
    second.channels[1].consumers[0](second.channels[1], method, pika.BasicProperties(), b"")
    assert [mail.redelivered for mail in ear.mails] == [False, True]
    tried.ack(ear.mails[1])
    assert second.channels[1].acked == [1]
    tried._loop.close()
