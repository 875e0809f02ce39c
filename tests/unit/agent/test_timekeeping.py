"""A device whose clock is wrong: who is believed about the time, and what is sent before that."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from tls_server import Answer, Gateway, Recorded, closed_port, credentials, problem

from api.operator import authority
from api.operator.authority import Credential
from device_agent import enroll, errors, https, timekeeping, tls
from device_agent.clock import FabricClock, wall_ms
from device_agent.timekeeping import MADE, Asker, Times
from fabric import signing
from topology import enrollment

HOUR = 3_600_000  # ms
DAY = 24 * HOUR
IN_1970 = 12 * HOUR
IN_2099 = 4_084_000_000_000


def times(wall: int, stored: int = 0, boot: float = 5.0) -> Times:
    return Times(FabricClock(lambda: boot), stored, lambda: wall)


def tells(at: int) -> Answer:
    text = datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return lambda _: (200, json.dumps({"time": text}).encode())


@pytest.fixture
def issuer() -> Iterator[tuple[Credential, Credential]]:
    return credentials()


def served(tmp_path: Path, server: Credential, **answers: Answer) -> Gateway:
    return Gateway(server, {f"/v1/{name}": answer for name, answer in answers.items()}).start(tmp_path / "server")


def service(gateway: Gateway) -> https.Service:
    return https.Service("localhost", gateway.port, "")


# ---- The floor ---------------------------------------------------------------------------------------


def test_the_floor_is_the_latest_of_clock_build_and_stored_time() -> None:
    assert times(IN_1970).floor() == times(IN_1970).now() == MADE
    assert times(MADE + DAY).floor() == MADE + DAY
    assert times(IN_1970, stored=MADE + DAY).floor() == MADE + DAY
    assert times(IN_2099, stored=MADE + DAY).floor() == IN_2099
    assert wall_ms() > MADE


def test_an_answer_moves_the_floor_forward_only() -> None:
    behind = times(IN_1970, stored=MADE + 2 * DAY)
    behind.told(MADE + DAY)
    assert behind.floor() == behind.now() == MADE + 2 * DAY
    behind.told(MADE + 3 * DAY)
    assert behind.floor() == behind.now() == MADE + 3 * DAY
    behind.told(MADE + 2 * DAY)
    assert behind.floor() == behind.now() == MADE + 3 * DAY


def test_a_clock_that_is_ahead_stays_the_floor_and_signs_with_the_right_time() -> None:
    ahead = times(MADE + 3 * DAY)
    ahead.told(MADE + DAY)
    assert ahead.floor() == MADE + 3 * DAY
    assert ahead.now() == MADE + DAY


def test_what_was_told_goes_on() -> None:
    at = [5.0]
    behind = Times(FabricClock(lambda: at[0]), 0, lambda: IN_1970)
    behind.told(MADE + DAY)
    at[0] += 7_000.0
    assert behind.now() == behind.floor() == MADE + DAY + 7_000


def test_the_fabrics_own_time_goes_before_all() -> None:
    clock = FabricClock(lambda: 5.0)
    known = Times(clock, 0, lambda: IN_2099)
    clock.adjust(MADE + DAY, 5.0, 5.0)
    assert known.now() == known.floor() == MADE + DAY


# ---- Asking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wall", [IN_1970, MADE])
def test_a_device_behind_asks_without_a_credential_and_then_connects(
    tmp_path: Path, issuer: tuple[Credential, Credential], wall: int
) -> None:
    ca, server = issuer
    with served(tmp_path, server, time=tells(wall_ms()), other=lambda _: (200, b"{}")) as gateway:
        known, pem = times(wall), ca.certificate_pem.decode()

        def attempt() -> int:
            context = tls.pinned(pem, known.floor)
            return https.exchange(service(gateway), context, "POST", "/v1/other", {"token": "secret"})[0]

        with pytest.raises(errors.CertificateNotYetValid):
            attempt()
        assert gateway.requests == [], "something was sent before the certificate was checked"
        assert timekeeping.with_right_time(service(gateway), pem, known, attempt) == 200
        assert [(asked.method, asked.path, asked.body) for asked in gateway.requests] == [
            ("GET", "/v1/time", b""),
            ("POST", "/v1/other", b'{"token": "secret"}'),
        ]
        assert abs(known.now() - wall_ms()) < 5_000


def test_an_authority_that_has_ended_does_not_spoil_its_successor(
    tmp_path: Path, issuer: tuple[Credential, Credential]
) -> None:
    """A device is pinned to both for a while; what the one before has issued is refused."""
    ca, server = issuer
    begun = datetime.now(UTC) - timedelta(days=20)
    before = authority.make_authority("before", ["localhost"], now=begun, validity=timedelta(days=10))
    pem = (before.certificate_pem + ca.certificate_pem).decode()
    context = tls.pinned(pem, wall_ms)
    with served(tmp_path, server, other=lambda _: (200, b"{}")) as gateway:
        assert https.exchange(service(gateway), context, "GET", "/v1/other")[0] == 200
    late = authority.issue(before, ["localhost"], now=datetime.now(UTC))
    with (
        served(tmp_path, late, other=lambda _: (200, b"{}")) as gateway,
        pytest.raises(errors.CertificateExpired),
    ):
        https.exchange(service(gateway), context, "GET", "/v1/other")


def test_a_clock_in_2099_is_not_talked_back(tmp_path: Path, issuer: tuple[Credential, Credential]) -> None:
    """Whoever holds an old key of the service would say that it is still that time."""
    ca, server = issuer
    with served(tmp_path, server, time=tells(wall_ms()), other=lambda _: (200, b"{}")) as gateway:
        known, pem = times(IN_2099), ca.certificate_pem.decode()

        def attempt() -> int:
            return https.exchange(service(gateway), tls.pinned(pem, known.floor), "GET", "/v1/other")[0]

        with pytest.raises(errors.CertificateExpired, match="clock is ahead"):
            timekeeping.with_right_time(service(gateway), pem, known, attempt)
        assert [asked.path for asked in gateway.requests] == ["/v1/time"]
        assert known.floor() == IN_2099


def test_a_time_server_that_moves_back_is_not_followed(tmp_path: Path, issuer: tuple[Credential, Credential]) -> None:
    ca, server = issuer
    now = wall_ms()
    with served(tmp_path, server, time=tells(now - HOUR // 2)) as gateway:
        known = times(IN_1970, stored=now)
        timekeeping.ask(service(gateway), ca.certificate_pem.decode(), known)
        assert known.now() == known.floor() == now


@pytest.mark.parametrize("told", [DAY, -40 * DAY, 400 * DAY])
def test_an_old_key_of_the_service_does_not_lead_anywhere(tmp_path: Path, told: int) -> None:
    """The certificate was good from 20 to 10 days ago; a time outside is not believed, and today's floor stands."""
    ca, server = credentials(expired=True)
    now = wall_ms()
    with served(tmp_path, server, time=tells(now + told)) as gateway:
        known, pem = times(now), ca.certificate_pem.decode()
        with pytest.raises((errors.CertificateExpired, errors.CertificateNotYetValid)):
            timekeeping.ask(service(gateway), pem, known)
        assert known.now() == known.floor() == now
        with pytest.raises(errors.CertificateExpired):
            https.exchange(service(gateway), tls.pinned(pem, known.floor), "GET", "/v1/time")


def test_another_authority_or_name_is_not_asked(tmp_path: Path, issuer: tuple[Credential, Credential]) -> None:
    _, server = issuer
    with served(tmp_path, server, time=tells(wall_ms())) as gateway:
        with pytest.raises(errors.WrongAuthority):
            timekeeping.ask(service(gateway), credentials()[0].certificate_pem.decode(), times(IN_1970))
        with pytest.raises(errors.WrongHostName):
            timekeeping.ask(
                https.Service("127.0.0.1", gateway.port, ""), issuer[0].certificate_pem.decode(), times(IN_1970)
            )
        assert gateway.requests == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"time": 5}', b'{"time": "now"}', b'{"time": "2026-02-30T00:00:00.000000Z"}',
                b'{"time": "2026-01-01T00:00:00.000000"}', b'{"time": "' + b"9" * 1000 + b'"}'],
)  # fmt: skip
def test_an_answer_that_is_no_time_is_none(
    tmp_path: Path, issuer: tuple[Credential, Credential], content: bytes
) -> None:
    ca, server = issuer
    with served(tmp_path, server, time=lambda _: (200, content)) as gateway, pytest.raises(errors.BadAnswer):
        timekeeping.ask(service(gateway), ca.certificate_pem.decode(), times(IN_1970))


def test_without_an_answer_the_first_refusal_stands(issuer: tuple[Credential, Credential]) -> None:
    nobody = https.Service("localhost", closed_port(), "")

    def attempt() -> None:
        raise errors.CertificateNotYetValid("first")

    with pytest.raises(errors.CertificateNotYetValid, match="first"):
        timekeeping.with_right_time(nobody, issuer[0].certificate_pem.decode(), times(IN_1970), attempt)


def test_a_refusal_with_a_right_clock_is_not_repeated(tmp_path: Path, issuer: tuple[Credential, Credential]) -> None:
    ca, server = issuer
    made: list[int] = []

    def attempt() -> None:
        made.append(1)
        raise errors.LoginRefused("suspended")

    with served(tmp_path, server, time=tells(wall_ms())) as gateway, pytest.raises(errors.LoginRefused):
        timekeeping.with_right_time(service(gateway), ca.certificate_pem.decode(), times(wall_ms()), attempt)
    assert made == [1]


# ---- Enrolling and connecting ------------------------------------------------------------------------


def peering(ca: Credential, port: int) -> dict[str, Any]:
    return {
        "device_id": "garage-7",
        "generation": 1,
        "amqps_url": f"amqps://localhost:{port}/devices",
        "api_url": f"https://localhost:{port}",
        "audience": {"mq": "fabric/mq/one", "api": "fabric/api"},
        "authority": ca.certificate_pem.decode(),
        "signing_keys": signing.jwks(signing.signing_key(ca.key)),
    }


@pytest.mark.parametrize("wall", [IN_1970, None])
def test_enrolling_with_a_clock_in_1970(
    tmp_path: Path, issuer: tuple[Credential, Credential], monkeypatch: pytest.MonkeyPatch, wall: int | None
) -> None:
    ca, server = issuer
    off = 0 if wall is None else wall - wall_ms()
    monkeypatch.setattr(Times.__init__, "__defaults__", (lambda: wall_ms() + off,))

    def enrolled(request: Recorded) -> tuple[int, bytes]:
        claims = jwt.decode(json.loads(request.body)["proof"], options={"verify_signature": False})
        if abs(claims["iat"] - wall_ms() // 1000) > enrollment.PROOF_LIFE:
            return problem(422, "proof was not made now")(request)
        return 200, json.dumps(peering(ca, gateway.port)).encode()

    with served(
        tmp_path, server, authority=lambda _: (200, ca.certificate_pem), time=tells(wall_ms()), enroll=enrolled
    ) as gateway:
        ticket = enrollment.Ticket(b"c" * 16, authority.fingerprint(ca.certificate))
        known = enroll.enroll(tmp_path / "state", f"https://localhost:{gateway.port}", enrollment.encode_ticket(ticket))
        assert known.device == "garage-7"
        asked = [request.path for request in gateway.requests]
        assert asked == ["/v1/authority", *(["/v1/time"] if wall is not None else []), "/v1/enroll"]


def _eventually(holds: Any) -> None:
    until = wall_ms() + 20_000
    while not holds():
        assert wall_ms() < until
        time.sleep(0.01)


def test_asking_again_takes_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Asker, "_ask", lambda self, pem: (asked.append(pem), self._asking.release()))
    asker = Asker("https://localhost:1", times(IN_1970), lambda _: None)
    for error in (errors.Unreachable("x"), errors.LoginRefused("x"), errors.CertificateNotYetValid("x")):
        asker.consider(error, "pem")
    _eventually(lambda: not asker._asking.locked())
    assert asked == ["pem"]
