"""The link's own arithmetic, and what a failed connection is called; the broker itself is met in integration."""

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tls_server import Gateway, closed_port, credentials

from api.operator.authority import Credential
from device_agent import errors, identity, link
from device_agent.link import Link, Mail, from_properties, to_properties
from fabric import signing
from topology import names, wire


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_backoff_is_bounded_and_the_first_is_quick(failures: int, part: float) -> None:
    delay = link.backoff(failures, part)
    assert 0 <= delay <= link.MAX_BACKOFF
    assert link.backoff(0, part) <= link.FIRST_BACKOFF


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


def _refusal(tmp_path: Path, issuer: Credential, host: str, port: int) -> errors.AgentError:
    """What the link says after its first failed connection."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    identity.make_key(state)
    answer = {
        "device_id": "garage-7",
        "amqps_url": f"amqps://{host}:{port}/devices",
        "api_url": "https://localhost:1",
        "audience": {"mq": "fabric/mq/one", "api": "fabric/api"},
        "signing_keys": signing.jwks(signing.signing_key(issuer.key)),
    }
    identity.store_peering(state, json.loads(json.dumps(answer)), issuer.certificate_pem.decode())
    tried = Link(identity.load(state), lambda: 1_800_000_000_000, _Deaf())
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
