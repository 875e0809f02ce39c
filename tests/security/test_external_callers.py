"""Callers of an external provider, at a gateway that knows it: real keys over HTTPS, real tokens, and forgeries."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from api.operator import gateway as gateway_process
from api.operator.authority import AuthorityError
from api.settings import Settings
from fabric.identity.providers import Provider
from tests.harness import provider as idp
from tests.harness.another import AnotherGateway, another_gateway
from tests.harness.device import DROP, forge, hs256, unsigned
from tests.harness.provider import AUDIENCE, ISSUER, JwksServer
from tests.harness.stack import Document, RunningStack

KEYS = {alg: make() for alg, make in idp.MAKE.items()}
ROTATED = idp.MAKE["ES256"]()
OPEN, AWAY, PRIVATE = ISSUER, "https://away.example", "https://private.example"
CEILING = "devices:read commands:send@group:garage commands:read tokens:write audit:read"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JwksServer]:
    with JwksServer(tmp_path_factory.mktemp("idp")).running() as running:
        running.document = idp.jwks(*(idp.jwk(key, alg) for alg, key in KEYS.items()))
        yield running


@pytest.fixture(scope="module")
def nobody() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(scope="module")
def gateway(stack: RunningStack, server: JwksServer, nobody: int) -> Iterator[AnotherGateway]:
    known = {
        "audience": AUDIENCE,
        "jwks_url": server.url(),
        "max_scope": CEILING,
        "algorithms": ["RS256", "ES256", "EdDSA"],
        "allow_private": ["127.0.0.0/8", "::1/128"],
        "authority": str(server.authority),
    }
    tables = [
        known | {"issuer": OPEN},
        known | {"issuer": AWAY, "jwks_url": f"https://localhost:{nobody}/"},
        known | {"issuer": PRIVATE, "allow_private": []},
    ]
    with another_gateway(stack, RESTANTE_PROVIDERS=json.dumps(tables)) as running:
        yield running


def token(alg: str = "ES256", claims: Document | None = None, **header: object) -> str:
    return idp.token(KEYS[alg], alg, alg, claims, **header)


def ask(gateway: RunningStack, bearer: str, path: str = "/v1/devices", **query: Any) -> httpx.Response:
    with gateway.client(bearer) as client:
        return client.get(path, params={"limit": 1} | query)


def claims(**more: object) -> Callable[[], str]:
    return lambda: token(claims={name: _at(value) for name, value in more.items()})


def _at(value: object) -> object:
    """A number in a one-tuple is seconds from now."""
    return int(time.time()) + value[0] if isinstance(value, tuple) else value


def forged(sign: Callable[[bytes], bytes], **header: object) -> Callable[[], str]:
    def make() -> str:
        now = int(time.time())
        good = {"iss": ISSUER, "sub": "alice", "aud": AUDIENCE, "iat": now, "exp": now + 300, "scope": "devices:read"}
        return forge({"typ": "at+jwt", "kid": "RS256", **header}, good, sign)

    return make


def public_pem() -> bytes:
    return (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


REFUSED: dict[str, Callable[[], str]] = {
    "iss with another last byte": claims(iss=ISSUER[:-1] + "u"),
    "iss with a slash more": claims(iss=ISSUER + "/"),
    "iss in capitals": claims(iss=ISSUER.replace("idp", "IDP")),
    "iss of the fabric": claims(iss="urn:restante:restante"),
    "iss of a device": claims(iss="alice"),
    "another audience": claims(aud="restante/api"),
    "expired": claims(iat=(-700,), exp=(-100,)),
    "future iat": claims(iat=(120,), exp=(300,)),
    "issued over an hour ago": claims(iat=(-3700,), exp=(3600,)),
    "no iat": claims(iat=DROP),
    "no typ": lambda: token(typ=DROP),
    "typ JWT": lambda: token(typ="JWT"),
    "alg none": forged(unsigned, alg="none"),
    "HS256 with the public key": forged(hs256(public_pem()), alg="HS256"),
    "ES384, which is not accepted": lambda: token("ES384"),
    "another's key": lambda: idp.token(ROTATED, "ES256", "ES256"),
    "jku": lambda: token(jku="https://localhost/keys"),
    "crit": lambda: token(crit=["exp"]),
    "over 3 KB": claims(pad="x" * 3000),
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_providers_word_is_refused(gateway: AnotherGateway, make: Callable[[], str]) -> None:
    answer = ask(gateway, make())
    assert (answer.status_code, answer.json()["type"]) == (401, "urn:restante:problem:unauthenticated")
    assert ask(gateway, token()).is_success


@pytest.mark.parametrize("alg", ["RS256", "ES256", "EdDSA"])
def test_a_token_of_the_provider_is_good_where_it_is_known(
    stack: RunningStack, gateway: AnotherGateway, alg: str
) -> None:
    assert ask(gateway, token(alg)).is_success
    assert ask(stack, token(alg)).status_code == 401, "the other gateway does not know it"


def test_rights_end_at_the_ceiling(stack: RunningStack, gateway: AnotherGateway) -> None:
    mine, _ = stack.create_device(groups=["garage"])
    other, _ = stack.create_device(groups=["house"])
    wide = token(claims={"sub": "wide", "scope": "devices:read devices:write commands:send"})
    with gateway.client(wide) as client:
        assert client.delete(f"/v1/devices/{mine}").status_code == 403
        assert client.post(f"/v1/devices/{other}/commands", json={"name": "open"}).status_code == 404
        assert client.post(f"/v1/devices/{mine}/commands", json={"name": "open"}).status_code == 202
    assert ask(gateway, token(claims={"scope": "openid profile"})).status_code == 403


def test_a_provider_that_is_away_or_not_to_be_called_lets_nobody_in(gateway: AnotherGateway) -> None:
    for issuer in (AWAY, PRIVATE):
        answer = ask(gateway, token(claims={"iss": issuer}))
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:restante:problem:provider-unavailable")
        assert "Retry-After" in answer.headers
        assert "localhost" not in answer.text


def test_an_unknown_key_storm_is_answered_without_asking_the_provider_each_time(
    gateway: AnotherGateway, server: JwksServer
) -> None:
    assert ask(gateway, token()).is_success
    before = len(server.asked)
    for number in range(30):
        unknown = idp.token(ROTATED, f"unknown-{number}", "ES256")
        assert ask(gateway, unknown).status_code == 401
    assert len(server.asked) <= before + 1


def test_an_identity_is_issuer_and_subject(stack: RunningStack, gateway: AnotherGateway) -> None:
    """Nobody whom we sign a token for is taken for somebody of the provider."""
    device, _ = stack.create_device(groups=["garage"])
    scopes = ["commands:send@group:garage", "commands:read", "devices:read"]
    made = stack.http.post("/v1/tokens", json={"subject": f"{ISSUER}#carol", "scopes": scopes})
    assert made.status_code == 422
    ours = stack.ok(stack.http.post("/v1/tokens", json={"subject": "carol", "scopes": scopes}))["token"]
    theirs = token(claims={"sub": "carol", "scope": " ".join(scopes)})
    sent = []
    for bearer in (ours, theirs, theirs):
        with gateway.client(bearer) as client:
            answer = client.post(
                f"/v1/devices/{device}/commands", json={"name": "open"}, headers={"Idempotency-Key": "one"}
            )
            sent.append(gateway.ok(answer))
    assert [each["issuer"] for each in sent] == ["carol", f"{ISSUER}#carol", f"{ISSUER}#carol"]
    assert sent[0]["id"] != sent[1]["id"], "a key of another's names another command"
    assert sent[1]["id"] == sent[2]["id"]
    page = gateway.ok(ask(gateway, theirs, "/v1/commands", device=device))
    assert ask(gateway, theirs, "/v1/commands", device=device, cursor=page["next"]).is_success
    assert ask(gateway, ours, "/v1/commands", device=device, cursor=page["next"]).status_code == 422
    found = gateway.ok(ask(gateway, theirs, "/v1/commands", issuer=f"{ISSUER}#carol"))
    assert [each["id"] for each in found["items"]] == [sent[1]["id"]]


def test_it_makes_tokens_within_its_own(gateway: AnotherGateway) -> None:
    minter = token(claims={"sub": "minter", "scope": "tokens:write devices:read devices:write"})
    with gateway.client(minter) as client:
        refused = client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:write"], "life": 60})
        assert refused.status_code == 403, "it is above the ceiling"
        longer = client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:read"], "life": 301})
        assert longer.status_code == 403
        made = gateway.ok(client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:read"], "life": 60}))
    assert made["parent"] is None
    assert ask(gateway, made["token"]).is_success
    late = token(claims={"sub": "minter", "scope": "tokens:write", "iat": _at((-3580,))})
    with gateway.client(late) as client:
        longer = client.post("/v1/tokens", json={"subject": "x", "scopes": ["tokens:write"], "life": 60})
    assert longer.status_code == 403, "an hour after its issue a token ends, whatever it says"


def test_revoking_a_subject_ends_its_tokens_its_streams_and_what_it_made(
    stack: RunningStack, gateway: AnotherGateway
) -> None:
    mine = token(claims={"sub": "leaver", "scope": "tokens:write devices:read commands:read", "exp": _at((3000,))})
    other = token(claims={"sub": "stayer", "scope": "tokens:write devices:read commands:read"})
    made = []
    for bearer in (mine, other):
        with gateway.client(bearer) as client:
            body = {"subject": "robot", "scopes": ["devices:read", "tokens:write"], "life": 120}
            made.append(gateway.ok(client.post("/v1/tokens", json=body))["token"])
    with gateway.client(made[0]) as client:
        made.append(gateway.ok(client.post("/v1/tokens", json=body | {"life": 60}))["token"])
    with gateway.client(mine) as client, client.stream("GET", "/v1/events", params={"after": 0}) as events:
        assert events.is_success
        program = [sys.executable, "-m", "api.operator.cli", "--state-dir", str(stack.stack.files.state_dir)]
        command = [*program, "token", "revoke", "--subject", "leaver", "--issuer", ISSUER]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        said = json.loads(done.stdout)
        assert (said["revoked"], said["pending_until"]) == (2, None)
        assert "unauthenticated" in events.read().decode()
    assert [ask(gateway, bearer).status_code for bearer in (mine, made[0], made[2])] == [401] * 3
    assert [ask(gateway, bearer).status_code for bearer in (other, made[1])] == [200] * 2
    again = token(claims={"sub": "leaver", "iat": _at((59,)), "exp": _at((300,))})
    assert ask(gateway, again).status_code == 401, "the provider's clock may be ahead"
    with gateway.client(other) as client:
        foreign = client.delete("/v1/tokens", params={"subject": "stayer", "issuer": "http://no"})
        assert foreign.status_code == 422


def test_the_audit_has_issuer_and_subject(stack: RunningStack, gateway: AnotherGateway) -> None:
    minter = token(claims={"sub": "auditee", "scope": "tokens:write devices:read", "jti": "the-token"})
    with gateway.client(minter) as client:
        gateway.ok(client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:read"], "life": 60}))
    (entry,) = stack.ok(stack.http.get("/v1/audit", params={"subject": f"{ISSUER}#auditee"}))["items"]
    assert ISSUER in json.dumps(entry)
    assert "the-token" in json.dumps(entry)


def test_an_authority_that_is_none_stops_the_start() -> None:
    known = Provider(OPEN, AUDIENCE, "https://idp.example", "devices:read", authority=Path("/nowhere.pem"))
    with pytest.raises(AuthorityError, match=r"/nowhere\.pem"):
        gateway_process._external(Settings(providers=(known,)), cast("Any", None), cast("Any", None))
