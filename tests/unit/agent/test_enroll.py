"""Enrollment against a real TLS server: who is trusted, and what is sent before that is known."""

import json
import os
import secrets
import stat
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jwt
import pytest
from tls_server import Answer, Gateway, Recorded, closed_port, credentials, problem

from api.operator import authority
from api.operator.authority import Credential
from device_agent import cli, errors, https, identity
from device_agent.enroll import enroll as run
from fabric import signing
from topology import enrollment

CODE = secrets.token_bytes(16)
Start = Callable[..., Gateway]


def ticket(issuer: Credential) -> str:
    return enrollment.encode_ticket(enrollment.Ticket(CODE, authority.fingerprint(issuer.certificate)))


def peering(issuer: Credential, **changed: Any) -> dict[str, Any]:
    fabric_key = signing.signing_key(issuer.key)
    return {
        "device_id": "garage-7",
        "generation": 3,
        "amqps_url": "amqps://localhost:5671/devices",
        "api_url": "https://localhost:8443",
        "audience": {"mq": "fabric/mq/one", "api": "fabric/api"},
        "authority": issuer.certificate_pem.decode(),
        "signing_keys": signing.jwks(fabric_key),
    } | changed


def answers(shown: Credential, answer: Answer | dict[str, Any]) -> dict[str, Answer]:
    enrolls = answer if callable(answer) else lambda _: (200, json.dumps(answer).encode())
    return {"/v1/authority": lambda _: (200, shown.certificate_pem), "/v1/enroll": enrolls}


@pytest.fixture
def start(tmp_path: Path) -> Any:
    running: list[AbstractContextManager[Gateway]] = []

    def begin(server: Credential, served: dict[str, Answer]) -> Gateway:
        directory = tmp_path / f"server-{len(running)}"
        gateway = Gateway(server, served).start(directory)
        running.append(gateway)
        return gateway

    yield begin
    for gateway in running:
        gateway.__exit__(None, None, None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def url(gateway: Gateway, host: str = "localhost") -> str:
    return f"https://{host}:{gateway.port}"


def kept(state: Path) -> set[str]:
    return {path.name for path in state.iterdir()} if state.exists() else set()


def test_a_ticket_becomes_a_peering(start: Start, state: Path) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    known = run(state, url(gateway), ticket(issuer).lower())
    assert (known.device, known.peering.amqps_host, known.peering.vhost) == ("garage-7", "localhost", "devices")
    assert identity.load(state).key.kid == known.key.kid

    fetched, sent = gateway.requests
    assert (fetched.method, fetched.path, fetched.body) == ("GET", "/v1/authority", b"")
    assert (sent.method, sent.path) == ("POST", "/v1/enroll")
    assert fetched.connection != sent.connection
    body = json.loads(sent.body)
    assert body.keys() == {"code", "public_key", "proof"}
    assert enrollment.decode_code(body["code"]) == CODE
    assert body["public_key"] == known.key.jwk
    assert jwt.get_unverified_header(body["proof"])["typ"] == enrollment.PROOF_TYPE
    claims = jwt.decode(body["proof"], known.key.private.public_key(), algorithms=["ES256"])
    assert claims["code_hash"] == enrollment.code_hash(CODE)


def test_everything_kept_is_private_and_the_key_stays(start: Start, state: Path) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    run(state, url(gateway), ticket(issuer))
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert kept(state) == {"device.key", "peering.json"}
    for name in kept(state):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
    secret = (state / "device.key").read_bytes()
    assert all(secret[40:80] not in request.body for request in gateway.requests)


def test_again_with_the_same_ticket_sends_the_same_key(start: Start, state: Path) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    first = run(state, url(gateway), ticket(issuer))
    again = run(state, url(gateway), ticket(issuer))
    assert again.key.kid == first.key.kid
    keys = [json.loads(request.body)["public_key"] for request in gateway.requests if request.method == "POST"]
    assert keys[0] == keys[1]


def test_an_authority_that_is_not_the_tickets_gets_nothing(start: Start, state: Path) -> None:
    issuer, server = credentials()
    other, _ = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    with pytest.raises(errors.WrongAuthority, match="not the one the ticket names"):
        run(state, url(gateway), ticket(other))
    assert {(request.method, request.body) for request in gateway.requests} == {("GET", b"")}
    assert "device.key" not in kept(state)


def test_the_right_authority_shown_by_a_server_without_its_certificate_gets_nothing(start: Start, state: Path) -> None:
    """An interceptor can relay the true authority; it can't hold a connection verified against it."""
    issuer, _ = credentials()
    _, interceptor = credentials()
    gateway = start(interceptor, answers(issuer, peering(issuer)))
    with pytest.raises(errors.WrongAuthority, match="not issued by the authority"):
        run(state, url(gateway), ticket(issuer))
    assert [request.method for request in gateway.requests] == ["GET"]


@pytest.mark.parametrize(
    ("hosts", "options", "used", "error"),
    [
        (("localhost",), {"expired": True}, "localhost", errors.CertificateExpired),
        (("localhost",), {"future": True}, "localhost", errors.CertificateNotYetValid),
        (("localhost",), {}, "127.0.0.1", errors.WrongHostName),
        (("127.0.0.1",), {}, "localhost", errors.WrongHostName),
    ],
    ids=["expired", "not yet valid", "name for an address", "address for a name"],
)
def test_a_bad_certificate_is_named_and_gets_nothing(
    start: Start, state: Path, hosts: tuple[str, ...], options: dict[str, bool], used: str, error: type[Exception]
) -> None:
    issuer, server = credentials(hosts, **options)
    gateway = start(server, answers(issuer, peering(issuer)))
    with pytest.raises(error):
        run(state, url(gateway, used), ticket(issuer))
    assert {(request.method, request.body) for request in gateway.requests} == {("GET", b"")}
    assert "peering.json" not in kept(state)


@pytest.mark.parametrize("swapped", ["other", "absent", "garbage", "both"])
def test_another_authority_in_the_answer_is_an_error(start: Start, state: Path, swapped: str) -> None:
    issuer, server = credentials()
    other, _ = credentials()
    true, false = issuer.certificate_pem.decode(), other.certificate_pem.decode()
    given = {"other": false, "absent": None, "garbage": "-----", "both": true + false}[swapped]
    gateway = start(server, answers(issuer, peering(issuer, authority=given)))
    with pytest.raises(errors.WrongAuthority, match="in the enrollment's answer"):
        run(state, url(gateway), ticket(issuer))
    assert "peering.json" not in kept(state)


def test_redirects_are_not_followed(start: Start, state: Path) -> None:
    issuer, server = credentials()
    target = start(server, answers(issuer, peering(issuer)))

    def elsewhere(request: Recorded) -> tuple[int, bytes]:
        return 307, f"{url(target)}{request.path}".encode()

    for path in ("/v1/authority", "/v1/enroll"):
        gateway = start(server, answers(issuer, peering(issuer)) | {path: elsewhere})
        with pytest.raises(errors.BadAnswer):
            run(state, url(gateway), ticket(issuer))
    assert target.requests == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (410, errors.EnrollmentRefused),
        (403, errors.EnrollmentRefused),
        (429, errors.Unreachable),
        (503, errors.Unreachable),
    ],
)
def test_a_refusal_is_told_and_escaped(start: Start, state: Path, status: int, error: type[Exception]) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, problem(status, "no\x1b[31m")))
    with pytest.raises(error, match=r"no\\u001b\[31m") as caught:
        run(state, url(gateway), ticket(issuer))
    assert enrollment.encode_code(CODE) not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"device_id": "Garage 7"},
        {"device_id": None},
        {"amqps_url": "amqp://localhost:5672/devices"},
        {"amqps_url": "amqps://user:secret@localhost/devices"},
        {"audience": "x"},
        {"generation": None},
        {"generation": "1"},
        {"generation": True},
        {"generation": 0},
        {"signing_keys": {"keys": []}},
        {"signing_keys": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}},
        {"signing_keys": {"keys": ["x"]}},
        {"signing_keys": None},
    ],
)
def test_an_answer_outside_the_contract_is_refused(start: Start, state: Path, changed: dict[str, Any]) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer, **changed)))
    with pytest.raises(errors.BadAnswer):
        run(state, url(gateway), ticket(issuer))
    assert "peering.json" not in kept(state)


@pytest.mark.parametrize("content", [b"x" * 70_000, b"[", b"[]", b"[" * 60_000, b"\xff"])
def test_an_answer_that_is_no_bounded_object_is_refused(start: Start, state: Path, content: bytes) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, lambda _: (200, content)))
    with pytest.raises(errors.BadAnswer):
        run(state, url(gateway), ticket(issuer))


@pytest.mark.parametrize("content", [b"x" * 70_000, b"", b"\xff", b"-----BEGIN CERTIFICATE-----"])
def test_an_authority_that_is_no_certificate_is_refused(start: Start, state: Path, content: bytes) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)) | {"/v1/authority": lambda _: (200, content)})
    with pytest.raises(errors.BadAnswer):
        run(state, url(gateway), ticket(issuer))
    assert [request.method for request in gateway.requests] == ["GET"]


def test_a_slow_answer_ends(start: Start, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "DEADLINE", 0.3)
    issuer, server = credentials()

    def hang(_: Recorded) -> tuple[int, bytes]:
        released.wait(10)
        return 200, b""

    released = threading.Event()
    gateway = start(server, answers(issuer, peering(issuer)) | {"/v1/authority": hang})
    with pytest.raises(errors.AgentError):
        run(state, url(gateway), ticket(issuer))
    released.set()


def test_another_device_is_not_put_over_the_present_one(start: Start, state: Path) -> None:
    issuer, server = credentials()
    run(state, url(start(server, answers(issuer, peering(issuer)))), ticket(issuer))
    other = start(server, answers(issuer, peering(issuer, device_id="garage-8")))
    with pytest.raises(errors.StateRefused, match="garage-7"):
        run(state, url(other), ticket(issuer))
    assert identity.load(state).device == "garage-7"


def test_a_peering_without_the_generation_asks_to_enroll_again_which_then_works(start: Start, state: Path) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    run(state, url(gateway), ticket(issuer))
    assert identity.load(state).peering.generation == 3
    file = state / "peering.json"
    old = json.loads(file.read_text())
    del old["generation"]
    for content in (json.dumps(old), "{"):
        file.write_text(content)
        with pytest.raises(errors.StateRefused, match="enroll"):
            identity.load(state)
        other = start(server, answers(issuer, peering(issuer, device_id="garage-8")))
        if content != "{":
            with pytest.raises(errors.StateRefused, match="garage-7"):
                run(state, url(other), ticket(issuer))
        run(state, url(gateway), ticket(issuer))
        assert identity.load(state).peering.generation == 3


def test_nobody_there_and_no_ticket(state: Path) -> None:
    issuer, _ = credentials()
    with pytest.raises(errors.Unreachable, match="can't be reached"):
        run(state, f"https://localhost:{closed_port()}", ticket(issuer))
    with pytest.raises(errors.InvalidValue, match="copy it whole"):
        run(state, "https://localhost:1", ticket(issuer)[:-3])


@pytest.mark.parametrize(
    "bad", ["http://localhost", "localhost:8443", "https://", "https://u:p@localhost", "https://x:y"]
)
def test_an_address_that_is_none(state: Path, bad: str) -> None:
    with pytest.raises(errors.InvalidValue):
        run(state, bad, ticket(credentials()[0]))


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_key_that_others_may_read_is_refused(start: Start, state: Path, mode: int) -> None:
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    run(state, url(gateway), ticket(issuer))
    (state / "device.key").chmod(mode)
    with pytest.raises(errors.StateRefused, match="chmod 600"):
        identity.load(state)


def test_a_state_directory_others_may_write_is_refused(state: Path) -> None:
    state.mkdir(mode=0o700)
    state.chmod(0o770)
    with pytest.raises(errors.StateRefused, match="chmod 700"):
        run(state, "https://localhost:1", ticket(credentials()[0]))


def test_of_two_who_make_the_key_at_once_both_get_the_same(state: Path) -> None:
    state.mkdir(mode=0o700)
    children = []
    for _ in range(2):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, identity.make_key(state).kid.encode())
            os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    kids = set()
    for pid, reader in children:
        os.waitpid(pid, 0)
        kids.add(os.read(reader, 100))
        os.close(reader)
    assert kids == {identity.load_key(state).kid.encode()}


def test_the_command_line_reads_the_ticket_from_a_file(
    start: Start, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_log_to_stderr", lambda _: None)
    issuer, server = credentials()
    gateway = start(server, answers(issuer, peering(issuer)))
    file = tmp_path / "ticket"
    file.write_text(ticket(issuer) + "\n")
    argv = ["enroll", "--state-dir", str(state), "--api-url", url(gateway), "--ticket-file", str(file)]
    assert cli.main(argv) == 0
    assert "enrolled as garage-7" in capsys.readouterr().out
    file.write_text("nonsense")
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert "[invalid-value]" in said
    assert "nonsense" not in said


def test_device_tokens(start: Start, state: Path) -> None:
    issuer, server = credentials()
    known = run(state, url(start(server, answers(issuer, peering(issuer)))), ticket(issuer))
    now = 1_800_000_000_123
    tokens = [known.amqp_token(now), known.amqp_token(now), known.api_token(now)]
    decoded = [
        jwt.decode(
            token,
            known.key.private.public_key(),
            algorithms=["ES256"],
            audience=["fabric/mq/one", "fabric/api"],
            options={"verify_exp": False, "verify_iat": False},
        )
        for token in tokens
    ]
    assert len({claims["jti"] for claims in decoded}) == 3
    for claims, life, audience in zip(decoded, (120, 120, 600), ("fabric/mq/one",) * 2 + ("fabric/api",), strict=True):
        assert claims["iss"] == claims["sub"] == "garage-7"
        assert (claims["aud"], claims["iat"], claims["exp"]) == (audience, 1_800_000_000, 1_800_000_000 + life)
    for token in tokens:
        header = jwt.get_unverified_header(token)
        assert header == {"alg": "ES256", "kid": known.key.kid, "typ": "restante-device+jwt"}
        assert len(token) < enrollment.MAX_TOKEN_BYTES
