"""The audit over HTTP and on the command line: who did what, from where, with which token; and to whom it is told."""

import asyncio
import json
import secrets
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from api.app import create_app
from api.auditing import IN_TOTAL, OF_ONE
from api.operator import auditing
from api.services import Services
from fabric import keyring
from fabric.audit import Action, By, Entry, Kind
from fabric.identity.issued import IssuedTokens
from fabric.keyring import Keys
from fabric.signing import signing_key
from fabric.sql import Store, migrate, open_store
from tests.harness.device import Device, enroll_request, new_key, own_source
from tests.harness.stack import Document, RunningStack
from tests.integration.sql.values import rows
from topology import enrollment

PATCH = {"Content-Type": "application/merge-patch+json"}


def entries(http: httpx.Client, **query: str) -> list[Document]:
    """All that fit, the oldest first, by pages of two."""
    found: list[Document] = []
    while True:
        page = RunningStack.ok(http.get("/v1/audit", params={"limit": "2", **query}))
        found += page["items"]
        if page["next"] is None:
            return found[::-1]
        query["cursor"] = page["next"]


def mint(stack: RunningStack, *scopes: str, subject: str = "auditor") -> Document:
    return stack.ok(stack.http.post("/v1/tokens", json={"subject": subject, "scopes": scopes}))


def cli(stack: RunningStack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    state = str(stack.stack.files.state_dir)
    program = [sys.executable, "-m", "api.operator.cli", "--state-dir", state, *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)


def test_what_is_done_to_a_device_is_told_with_who_did_it(stack: RunningStack) -> None:
    token = mint(stack, "devices:write", "groups:write", "commands:send", "devices:read", subject="janitor")
    id, ticket = stack.create_device("audited", labels={"site": "harbour"})
    with own_source(stack) as http:
        code = enrollment.decode_ticket(ticket).code
        key = new_key()
        enrolled = Device(stack, id, key, stack.ok(http.post("/v1/enroll", json=enroll_request(code, key))))
    with stack.client(token["token"]) as http:
        http.headers["X-Request-Id"] = "audit-test-request"
        path = f"/v1/devices/{id}"
        stack.ok(http.patch(path, content='{"groups": ["yard"], "labels": {"site": null}}', headers=PATCH))
        sent = stack.ok(http.post(f"{path}/commands", json={"name": "door.open", "args": {"pin": "8731"}, "ttl": 600}))
        stack.ok(http.delete(f"/v1/commands/{sent['id']}"))
        stack.ok(http.delete(f"{path}/keys/{enrolled.kid}"))
        stack.ok(http.delete(path))
    told = entries(stack.http, device=id)
    command = {"command": sent["id"], "name": "door.open"}
    assert [(each["action"], each["detail"]) for each in told] == [
        ("device.created", {"groups": [], "labels": ["site"], "generation": 1}),
        ("device.enrolled", {"kid": enrolled.kid, "generation": 1}),
        ("device.updated", {"joined": ["yard"], "labels": ["site"]}),
        ("command.sent", command),
        ("command.cancelled", command),
        ("key.revoked", {"kid": enrolled.kid, "with": []}),
        ("device.deleted", {"generation": 1, "settled": 0}),
    ]
    assert {each["outcome"] for each in told} == {"done"}
    made, joined, *others = (each["by"] for each in told)
    assert (made["kind"], made["subject"], made["address"]) == ("caller", "operator", "127.0.0.1")
    assert (joined["kind"], joined["subject"], joined["jti"]) == ("device", id, None)
    assert joined["address"].startswith("127.")
    issuer = enrollment.issuer(stack.stack.settings.fabric)
    janitor = {"kind": "caller", "subject": "janitor", "issuer": issuer, "jti": token["jti"], "address": "127.0.0.1"}
    assert others == [janitor] * 5
    assert {each["request"] for each in told[2:]} == {"audit-test-request"}
    (created,) = [each for each in entries(stack.http, subject="operator") if each["detail"].get("jti") == token["jti"]]
    assert (created["action"], created["detail"]["scopes"]) == ("token.created", token["scopes"])
    (first,) = entries(stack.http, action="schema.migrated")
    assert first["by"]["address"] is None


def test_filters_and_pages(stack: RunningStack) -> None:
    id, _ = stack.create_device("filtered")
    for _ in range(3):
        stack.ok(stack.http.post(f"/v1/devices/{id}/enrollment"))
    first, second, *_ = told = entries(stack.http, device=id)
    assert [each["action"] for each in told] == ["device.created", *["enrollment.issued"] * 3]
    assert entries(stack.http, device=id, action="enrollment.issued") == told[1:]
    assert entries(stack.http, device=id, since=second["at"]) == told[1:]
    assert entries(stack.http, device=id, until=second["at"]) == [first]
    assert entries(stack.http, device=id, subject="operator") == told
    assert entries(stack.http, device=id, subject="nobody") == []
    for wrong in ({"action": "device.*"}, {"since": "yesterday"}, {"device": "A"}, {"limit": "0"}, {"what": "x"}):
        assert stack.http.get("/v1/audit", params=wrong).status_code == 422
    cursor = stack.http.get("/v1/audit", params={"device": id, "limit": "1"}).json()["next"]
    assert stack.http.get("/v1/audit", params={"limit": "1", "cursor": cursor}).status_code == 422


def test_a_narrowed_reader_sees_its_devices_only(stack: RunningStack) -> None:
    group = f"seen-{secrets.token_hex(3)}"
    mine, _ = stack.create_device("mine", groups=[group])
    other, _ = stack.create_device("other")
    for scope in (f"audit:read@device:{mine}", f"audit:read@group:{group}"):
        with stack.client(mint(stack, scope)["token"]) as http:
            assert {each["device"] for each in entries(http)} == {mine}
            assert entries(http, device=mine)
            assert entries(http, device=other) == entries(http, device="nobody") == []
            assert entries(http, action="token.created") == []
    with stack.client(mint(stack, "audit:read")["token"]) as http:
        assert {None, mine, other} <= {each["device"] for each in entries(http, since=_since(stack, mine))}
    with stack.client(mint(stack, "devices:read", "tokens:write")["token"]) as http:
        assert http.get("/v1/audit").status_code == 403


def _since(stack: RunningStack, device: str) -> str:
    return str(entries(stack.http, device=device)[0]["at"])


def test_it_holds_no_secret(stack: RunningStack) -> None:
    """Of all that is given out or sent in: tickets, codes, tokens, proofs, keys, arguments and labels' values."""
    id, ticket = stack.create_device("discreet", labels={"pin": "label-55501"})
    again = stack.ok(stack.http.post(f"/v1/devices/{id}/enrollment"))
    key, code = new_key(), enrollment.decode_ticket(again["ticket"]).code
    request = enroll_request(code, key)
    with own_source(stack) as http:
        device = Device(stack, id, key, stack.ok(http.post("/v1/enroll", json=request)))
        assert http.post("/v1/enroll", json=enroll_request(code, new_key())).status_code == 410
        http.get(f"/v1/devices/{again['ticket']}", headers={"Authorization": f"Bearer {again['code']}"})
    stack.send(id, "door.open", {"pin": "argument-55501"}, ttl=600)
    made = mint(stack, "devices:read@device:nobody")
    with stack.client(made["token"]) as http:
        http.get(f"/v1/devices/{id}", headers={"X-Api-Key": made["token"]})
    bearer = device.api_token()
    stack.http.get("/v1/devices", headers={"Authorization": f"Bearer {bearer}"})
    text = "\n".join(str(tuple(row)) for row in rows(stack.stack.settings.database, "SELECT * FROM audit"))
    hidden = [ticket, again["ticket"], again["code"], request["proof"], made["token"], bearer, stack.token]
    hidden += [request["public_key"]["x"], "55501", code.hex()]
    assert made["jti"] in text, "the control: what happened is there"
    assert [secret for secret in hidden if secret in text or secret.rpartition(".")[2] in text] == []


def test_the_next_request_of_a_connection_is_nobodys_yet(stack: RunningStack) -> None:
    """Pipelined: the second is served when the first has been answered, and has no token."""
    id, ticket = stack.create_device("pipelined")
    key = new_key()
    body = json.dumps(enroll_request(enrollment.decode_ticket(ticket).code, key)).encode()
    head = "GET /v1/devices?limit=1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + stack.token
    then = "POST /v1/enroll HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    url = httpx.URL(stack.stack.settings.api_url)
    context = ssl.create_default_context(cafile=str(stack.stack.files.authority))
    with (
        socket.create_connection((url.host, url.port or 443), 10, source_address=("127.0.0.77", 0)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        peer.settimeout(30)
        peer.sendall(f"{head}\r\n\r\n{then}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while got := peer.recv(65536):
            answer += got
    assert answer.count(b"HTTP/1.1 200") == 2
    (enrolled,) = entries(stack.http, device=id, action="device.enrolled")
    assert enrolled["by"] == {"kind": "device", "subject": id, "issuer": None, "jti": None, "address": "127.0.0.77"}


# ---- The command line --------------------------------------------------------------------------------


def test_the_command_line_shows_it(stack: RunningStack) -> None:
    id, _ = stack.create_device("shown")
    stack.ok(stack.http.post(f"/v1/devices/{id}/enrollment"))
    names, newest, oldest = cli(stack, "audit", "--device", id).stdout.splitlines()
    assert names.split() == ["AT", "ACTION", "DEVICE", "BY", "ADDRESS", "JTI", "DETAIL"]
    assert newest.split()[1:5] == ["enrollment.issued", id, "caller:operator", "127.0.0.1"]
    assert oldest.split()[1:3] == ["device.created", id]
    (line,) = cli(stack, "audit", "--device", id, "--json", "--limit", "1").stdout.splitlines()
    assert [json.loads(line)] == entries(stack.http, device=id)[1:]


def test_what_others_have_said_is_escaped() -> None:
    """Whatever it is that the gateway lets through."""
    evil = "\x1b]0;owned\x07\x1b[2J\r\nfake line\u202e\u009b31m"
    by = dict.fromkeys(("kind", "subject", "issuer", "jti", "address"), evil)
    entry = dict.fromkeys(("at", "action", "device", "outcome", "request"), evil)
    shown = auditing.line({**entry, "position": 1, "by": by, "detail": {"x": evil, "y": [evil]}})
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.count("owned") == 10


def test_what_an_operator_does_to_the_database_is_recorded_by_name(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "api.operator.cli", "--state-dir", str(tmp_path), "migrate"]
    subprocess.run(program, capture_output=True, timeout=60, check=True)
    ((action, kind, subject),) = rows(
        f"sqlite:///{tmp_path / 'ledger.sqlite'}", "SELECT action, kind, subject FROM audit"
    )
    assert (action, kind, subject) == ("schema.migrated", "operator", auditing.operator().subject)


# ---- Refusals ----------------------------------------------------------------------------------------


class Gateway:
    """An app on a database of its own, of which requests see no more than who they are."""

    def __init__(self, store: Store) -> None:
        clock, key = store.clock, signing_key(ec.generate_private_key(ec.SECP256R1()))
        keys = Keys(keyring.ring(key, 0), {key.kid: key}, clock.now)
        self.tokens = IssuedTokens(store.registry, clock, "urn:restante:test", "test/api", keys)
        self.registry, self.audit, self.ledger = store.registry, store.audit, store.ledger
        self.lasting = SimpleNamespace(rounds=0)
        transport = httpx.ASGITransport(create_app(cast("Services", self)), client=("192.0.2.1", 1))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def ask(self, path: str, token: str | None, method: str = "GET") -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return await self.http.request(method, path, headers=headers)

    async def refused(self) -> list[Entry]:
        return (await self.audit.entries(action=Action.REQUEST_REFUSED, limit=1000))[::-1]


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    await asyncio.to_thread(migrate, url)
    store = await open_store(url)
    yield Gateway(store)
    await store.close()


async def test_who_was_turned_away_is_recorded(gateway: Gateway) -> None:
    token, kept = await gateway.tokens.mint("nosy", ("devices:read@device:mine",), 60)
    unknown = "0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e"
    for path, method, given, status in (
        ("/v1/devices/other", "GET", token, 404),
        ("/v1/devices/other", "DELETE", token, 403),
        (f"/v1/commands/{unknown}", "GET", token, 403),
        ("/v1/devices/other", "GET", f"{token}x", 401),
        ("/v1/devices/other", "GET", None, 401),  # not recorded, as what follows
        ("/v1/nothing", "GET", token, 404),
        ("/v1/devices?limit=x", "GET", token, 422),
    ):
        assert (await gateway.ask(path, given, method)).status_code == status
    one, two, three, four = await gateway.refused()
    assert [each.deed.outcome for each in (one, two, three, four)] == [
        "not-found", "forbidden", "forbidden", "unauthenticated",
    ]  # fmt: skip
    assert [each.deed.device for each in (one, two, three, four)] == ["other", "other", None, "other"]
    assert [each.deed.detail for each in (one, two, three)] == [
        {"operation": "GET /v1/devices/{id}"},
        {"operation": "DELETE /v1/devices/{id}"},
        {"operation": "GET /v1/commands/{id}"},
    ]
    known = By(Kind.CALLER, "nosy", "urn:restante:test", kept.jti, "192.0.2.1")
    assert {replace(each.by, request=None) for each in (one, two, three)} == {known}
    assert replace(four.by, request=None) == By(Kind.ANONYMOUS, address="192.0.2.1")


async def test_a_flood_of_refusals_is_counted_and_hides_no_caller(gateway: Gateway) -> None:
    token, _ = await gateway.tokens.mint("nosy", ("devices:read@device:mine",), 60)
    for _ in range(4 * IN_TOTAL):
        assert (await gateway.ask("/v1/devices", "x.y.z")).status_code == 401
    assert len(await gateway.refused()) == OF_ONE
    assert (await gateway.ask("/v1/devices/other", token)).status_code == 404
    last = (await gateway.refused())[-1]
    assert last.by.subject == "nosy"
    assert last.deed.detail == {"operation": "GET /v1/devices/{id}", "unrecorded": 4 * IN_TOTAL - OF_ONE}
