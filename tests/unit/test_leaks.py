"""The search for secrets in logs finds each kind of them, however it was written down, and nothing else."""

import base64
import json
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests.harness import leaks
from tests.harness.device import b64, es256, forge, new_key, public_jwk
from topology import enrollment

KEY = new_key()
PEM = KEY.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
TOKEN = forge({"alg": "ES256", "typ": "at+jwt"}, {"sub": "billing"}, es256(KEY))
CODE = secrets.token_bytes(enrollment.CODE_BYTES)
JWK = {**public_jwk(KEY), "d": b64(KEY.private_numbers().private_value.to_bytes(32, "big"))}
PASSWORD = secrets.token_urlsafe(32)

WRITTEN = {
    "a token": TOKEN,
    "a token without its signature": TOKEN.rpartition(".")[0] + ".",
    "a token in an address": f"GET /v1/events?access_token={TOKEN}&x",
    "a private key": PEM,
    "a private key in one line": json.dumps(PEM),
    "a JWK": json.dumps(JWK),
    "a JWK as Python shows it": repr(JWK),
    "a JWK in a text in JSON": json.dumps({"body": json.dumps(JWK)}),
    "a ticket": enrollment.encode_ticket(enrollment.Ticket(CODE, secrets.token_bytes(32))),
    "a code": f'{{"code":"{enrollment.encode_code(CODE)}"}}',
}
HARMLESS = (
    "2026-01-31T12:00:00.000Z INFO login.allowed device=garage-7 kid="
    f"{enrollment.thumbprint(public_jwk(KEY))} id=0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e {json.dumps(public_jwk(KEY))} "
    f"code_hash={enrollment.code_hash(CODE)} request={secrets.token_hex(16)} -----BEGIN CERTIFICATE----- "
    "ABCDEFGHIJKLMNOPQRSTUVWXY ABCDEFGHIJKLMNOPQRSTUVWXYZABC"
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for name, content in {
        "secrets/fabric.worker": PASSWORD,
        "secrets/tokens/kid.pem": PEM,
        "certificates/api.pem": PEM,
        "broker/.erlang.cookie": "COOKIE" * 6,
        "gateway.log": HARMLESS,
        "broker/log/console.log": HARMLESS,
        "broker/log/restante@localhost.log.1": HARMLESS,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_harmless_logs_hold_nothing(state: Path) -> None:
    assert len(leaks.logs_in(state)) == 3
    leaks.check(leaks.logs_in(state), leaks.kept_in(state))


@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("log", ["gateway.log", "broker/log/restante@localhost.log.1"])
def test_a_secret_of_any_kind_is_found(state: Path, log: str, what: str) -> None:
    (state / log).write_text(f"{HARMLESS}\nsomething: {WRITTEN[what]}\n{HARMLESS}")
    with pytest.raises(AssertionError, match="secrets in logs") as found:
        leaks.check(leaks.logs_in(state), {})
    assert WRITTEN[what] not in str(found.value), "finding it is no reason to spread it"


@pytest.mark.parametrize(
    "kept", [PASSWORD, PEM.splitlines()[1], "COOKIE" * 6], ids=["password", "line of a key", "cookie"]
)
def test_what_the_stack_keeps_is_found(state: Path, kept: str) -> None:
    with (state / "gateway.log").open("a") as log:
        log.write(f"connecting amqp://fabric.worker:{kept}@localhost")
    with pytest.raises(AssertionError, match="what is kept in") as found:
        leaks.check(leaks.logs_in(state), leaks.kept_in(state))
    assert kept not in str(found.value)


def test_an_authorization_header_of_the_broker_is_found() -> None:
    """Basic credentials hide a password from a plain search."""
    basic = base64.b64encode(f"fabric.admin:{PASSWORD}".encode())
    assert leaks.found_in(b"Authorization: Basic " + basic, {})
