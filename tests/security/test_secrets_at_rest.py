"""What is stored lets nobody in: the database, the logs and the broker's files hold no secret in the clear."""

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.harness.device import Device, enroll_request, new_key, own_source
from tests.harness.stack import RunningStack
from topology import access, enrollment

Secrets = dict[str, bytes]


def spelled(what: str, raw: bytes) -> Secrets:
    """A secret of bytes in the ways that one might write it down."""
    return {
        what: raw,
        f"{what} in hex": raw.hex().encode(),
        f"{what} in base64": base64.b64encode(raw).rstrip(b"="),
        f"{what} in base64url": base64.urlsafe_b64encode(raw).rstrip(b"="),
        f"{what} in base32": base64.b32encode(raw).rstrip(b"="),
    }


def token_parts(what: str, token: str) -> Secrets:
    """A token, and its signature: the header and claims alone open nothing."""
    return {what: token.encode(), f"{what}'s signature": token.rpartition(".")[2].encode()}


def private(what: str, key: ec.EllipticCurvePrivateKey) -> Secrets:
    raw = key.private_numbers().private_value.to_bytes(32, "big")
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).splitlines()
    return {**spelled(what, raw), f"{what} in PEM": pem[1]}


@pytest.fixture(scope="module")
def secrets(stack: RunningStack) -> Secrets:
    """Everything secret, each once used in the right way and once in a way that is refused and logged."""
    found: Secrets = {}
    device, ticket = stack.create_device("at-rest")
    again = stack.ok(stack.http.post(f"/v1/devices/{device}/enrollment"))
    for what, each in (("voided ticket", ticket), ("ticket", again["ticket"])):
        code = enrollment.decode_ticket(each).code
        found |= spelled(f"{what}'s code", code) | {what: each.encode()}
    key, code = new_key(), enrollment.decode_ticket(again["ticket"]).code
    with own_source(stack) as http:
        request = enroll_request(code, key)
        found["proof"] = request["proof"].rpartition(".")[2].encode()
        # Refused as voided, as another's, as malformed; then used.
        http.post("/v1/enroll", json=enroll_request(enrollment.decode_ticket(ticket).code, key))
        http.post("/v1/enroll", json=request | {"code": request["code"] + "A"})
        http.post("/v1/enroll", json=request | {"proof": request["proof"] + "A"})
        http.post("/v1/enroll", content=again["ticket"].encode())
        enrolled = Device(stack, device, key, stack.ok(http.post("/v1/enroll", json=request)))
        http.post("/v1/enroll", json=enroll_request(code, new_key()))
        http.get(f"/v1/devices/{again['ticket']}", headers={"Authorization": f"Bearer {stack.token}"})
    found |= private("device key", key)
    login, expired, http_token = enrolled.token(), enrolled.token(claims={"exp": 1, "iat": 0}), enrolled.api_token()
    assert enrolled.may_log_in(login)
    assert not enrolled.may_log_in(expired)
    bearer = {"Authorization": f"Bearer {http_token}"}
    stack.ok(stack.http.post(f"/v1/devices/{device}/telemetry/probe", json=1, headers=bearer))
    assert stack.http.get("/v1/devices", headers=bearer).status_code == 403
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "at-rest", "scopes": ["devices:read"]}))
    with stack.client(made["token"]) as caller:
        stack.ok(caller.get("/v1/devices"))
        assert caller.delete(f"/v1/devices/{device}").status_code == 403
        caller.get("/v1/devices", params={"cursor": made["token"]})
    stack.http.delete(f"/v1/tokens/{made['jti']}")
    for what, token in (
        ("device token", login),
        ("refused device token", expired),
        ("device's HTTP token", http_token),
        ("issued token", made["token"]),
        ("operator's token", stack.token),
    ):
        found |= token_parts(what, token)
    files = stack.stack.files
    for what, path in (
        ("authority's key", files.authority_key),
        ("API's key", files.certificate),
        ("broker's key", files.broker_certificate),
    ):
        # A server's key is behind its certificate.
        content = path.read_bytes()
        loaded = serialization.load_pem_private_key(content[content.index(b"-----BEGIN PRIVATE KEY") :], None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        found |= private(what, loaded)
    found |= private("tokens' key", stack.signing_key(files.token_keys).private)
    found |= private("commands' key", stack.signing_key(files.command_keys).private)
    found["secret of cursors"] = files.cursor_secret.read_bytes()
    broker = stack.stack.broker
    assert broker is not None
    found |= {f"{account.name}'s password": broker.password(account.name).encode() for account in access.ACCOUNTS}
    return found


def found_in(secrets: Secrets, content: bytes) -> list[str]:
    return [what for what, secret in secrets.items() if secret in content]


def test_a_dump_of_the_database_lets_nobody_in(stack: RunningStack, secrets: Secrets) -> None:
    """As SQL, and as the files it lies in: what was deleted, and what waits in the log ahead, are there too."""
    path = stack.stack.files.state_dir / "ledger.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        dump = "\n".join(ledger.iterdump()).encode()
        columns = [
            value if isinstance(value, bytes) else str(value).encode()
            for (table,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for row in ledger.execute(f'SELECT * FROM "{table}"')
            for value in row
        ]
    assert b"at-rest" in dump, "the control: the dump holds what the secrets belong to"
    assert found_in(secrets, dump) == []
    assert found_in(secrets, b"\0".join(columns)) == []
    for file in path.parent.glob("ledger.sqlite*"):
        assert found_in(secrets, file.read_bytes()) == [], file


def logs(stack: RunningStack) -> Iterator[Path]:
    state = stack.stack.files.state_dir
    yield from state.rglob("*.log")
    yield from (path for path in (state / "broker" / "log").rglob("*") if path.is_file())


def test_no_log_holds_a_secret(stack: RunningStack, secrets: Secrets) -> None:
    """At the level `debug`, the broker's own logs too."""
    read = {path: path.read_bytes() for path in set(logs(stack))}
    assert any(b"at-rest" in content for content in read.values()), "the control: what happened was logged"
    assert {path.name for path in read} >= {"gateway.log", "worker.log"}
    assert {path: found for path, content in read.items() if (found := found_in(secrets, content))} == {}


def test_the_broker_stores_no_password(stack: RunningStack, secrets: Secrets) -> None:
    """Its database and definitions hold hashes; the tokens of devices pass through it, and leave nothing."""
    home = stack.stack.files.state_dir / "broker"
    kept = {"broker's key in PEM"}  # its own certificate's, which it serves
    for path in (path for path in home.rglob("*") if path.is_file() and not path.is_symlink()):
        found = set(found_in(secrets, path.read_bytes()))
        assert found <= (kept if path.suffix == ".pem" else set()), path


def test_files_with_secrets_are_their_owners(stack: RunningStack, secrets: Secrets) -> None:
    """Nothing in the state directory is open to others, and each secret lies where it is meant to."""
    files = stack.stack.files
    state = files.state_dir
    assert state.stat().st_mode & 0o777 == 0o700
    holders: dict[str, set[str]] = {}
    for path in (path for path in state.rglob("*") if path.is_file() and not path.is_symlink()):
        for what in found_in(secrets, path.read_bytes()):
            holders.setdefault(str(path.relative_to(state)), set()).add(what)
            assert path.stat().st_mode & 0o077 == 0, path
    expected = {
        "authority/ca.key",
        "certificates/api.pem",
        "certificates/broker.pem",
        "operator.token",
        "secrets/cursors",
        *(
            str(keys.pem(stack.signing_key(keys).kid).relative_to(state))
            for keys in (files.token_keys, files.command_keys)
        ),
        *(f"secrets/{account.name}" for account in access.ACCOUNTS),
    }
    assert {holder for holder in holders if not holder.startswith("broker/")} == expected


def test_secrets_are_in_no_process_table(stack: RunningStack, secrets: Secrets) -> None:
    """Neither arguments nor environments: both are read by others more easily than files."""
    broker = stack.stack.broker
    assert broker is not None
    for pid in (broker.pid, stack.stack.service_pid("gateway"), stack.stack.service_pid("worker")):
        assert found_in(secrets, Path(f"/proc/{pid}/cmdline").read_bytes()) == []
        assert found_in(secrets, Path(f"/proc/{pid}/environ").read_bytes()) == []


def test_what_was_shown_once_is_not_shown_again(stack: RunningStack, secrets: Secrets) -> None:
    for path in ("/v1/devices", "/v1/tokens", "/.well-known/jwks.json", "/v1/commands"):
        for page in (stack.http.get(path), stack.http.get(path, params={"limit": "100"})):
            assert found_in(secrets, page.content) == [], path
