"""Tokens: one verifier for each, one key, one audience, a short life; whatever else a token says is ignored."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.harness.device import (
    DROP,
    Device,
    b64,
    es256,
    forge,
    hs256,
    new_key,
    public_jwk,
    public_pem,
    rs256,
    unsigned,
)
from tests.harness.stack import Document, RunningStack
from topology import access, enrollment

Make = Callable[[Device, Device], str]
"""A token for the audience that the first device's `token` gives it: (forger's device, another device)."""


def claimed(**claims: object) -> Make:
    return lambda me, you: me.token(claims={name: _at(value) for name, value in claims.items()})


def headed(**header: object) -> Make:
    return lambda me, you: me.token(header=header)


def _at(value: object) -> object:
    """A number in a one-tuple is seconds from now."""
    return int(time.time()) + value[0] if isinstance(value, tuple) else value


def _text(device: Device, payload: Callable[[Document], str]) -> str:
    return forge(device.header(), payload(device.claims()), es256(device.key))


def _repeated(name: str, value: str) -> Make:
    """The claims as JSON with one member twice, the second time with another value."""
    return lambda me, you: _text(me, lambda claims: json.dumps(claims)[:-1] + f', "{name}": {value}}}')


def _raw(name: str, value: str) -> Make:
    """The claims with a value that `json.dumps` would not write."""

    def payload(claims: Document) -> str:
        del claims[name]
        return json.dumps(claims)[:-1] + f', "{name}": {value}}}'

    return lambda me, you: _text(me, payload)


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _embedded(member: str) -> Make:
    """Signed by a key that only the header knows."""

    def make(me: Device, you: Device) -> str:
        key = new_key()
        value: object = {
            "jwk": public_jwk(key),
            "jku": "https://127.0.0.1:9/jwks.json",
            "x5u": "https://127.0.0.1:9/cert.pem",
            "x5c": [b64(public_pem(key))],
        }[member]
        return me.token(header={member: value}, sign=es256(key))

    return make


def _stretched(me: Device, you: Device) -> str:
    return me.token(claims={"pad": "x" * 3000})


def _tampered(me: Device, you: Device) -> str:
    head, _, signature = me.token().split(".")
    return f"{head}.{b64(json.dumps(me.claims()).encode())}.{signature}"


def _without_signature(me: Device, you: Device) -> str:
    return me.token().rpartition(".")[0] + "."


FORGED: dict[str, Make] = {
    # Whose word is it?
    "alg none": lambda me, you: me.token(header={"alg": "none"}, sign=unsigned),
    "alg None": lambda me, you: me.token(header={"alg": "None"}, sign=unsigned),
    "alg none, ES256 signed": headed(alg="none"),
    "no alg": headed(alg=DROP),
    "no signature": _without_signature,
    "HS256 with the public key as PEM": lambda me, you: me.token(
        header={"alg": "HS256"}, sign=hs256(public_pem(me.key))
    ),
    "HS256 with the public key as JWK": lambda me, you: me.token(
        header={"alg": "HS256"}, sign=hs256(json.dumps(me.jwk).encode())
    ),
    "HS256 with the kid": lambda me, you: me.token(header={"alg": "HS256"}, sign=hs256(me.kid.encode())),
    "HS256 with nothing": lambda me, you: me.token(header={"alg": "HS256"}, sign=hs256(b"")),
    "RS256": lambda me, you: me.token(header={"alg": "RS256"}, sign=rs256(_rsa_key())),
    "ES384 by name": headed(alg="ES384"),
    "es256 in lower case": headed(alg="es256"),
    "another key": lambda me, you: me.token(sign=es256(new_key())),
    "another device's kid": lambda me, you: me.token(header={"kid": you.kid}),
    "another device's kid and key": lambda me, you: me.token(header={"kid": you.kid}, sign=es256(you.key)),
    "unknown kid": headed(kid="A" * 43),
    "no kid": headed(kid=DROP),
    "kid as a path": headed(kid="../../secrets/tokens.pem"),
    "kid as SQL": headed(kid="' OR 1=1 --"),
    "kid as a list": lambda me, you: me.token(header={"kid": [me.kid]}),
    "kid as an object": headed(kid={"$ne": None}),
    "embedded jwk": _embedded("jwk"),
    "embedded jku": _embedded("jku"),
    "embedded x5u": _embedded("x5u"),
    "embedded x5c": _embedded("x5c"),
    "the right key embedded": lambda me, you: me.token(header={"jwk": me.jwk}),
    "crit": headed(crit=["exp"]),
    "crit of nothing": headed(crit=[]),
    "b64 false": headed(b64=False, crit=["b64"]),
    "zip": headed(zip="DEF"),
    "payload exchanged": _tampered,
    # What kind of token?
    "no typ": headed(typ=DROP),
    "typ JWT": headed(typ="JWT"),
    "typ in capitals": headed(typ=enrollment.DEVICE_TOKEN_TYPE.upper()),
    "typ with a prefix": headed(typ=f"application/{enrollment.DEVICE_TOKEN_TYPE}"),
    "typ of issued tokens": headed(typ="at+jwt"),
    "typ of proofs": headed(typ=enrollment.PROOF_TYPE),
    "typ with a space": headed(typ=enrollment.DEVICE_TOKEN_TYPE + " "),
    # Of whom?
    "sub of another": lambda me, you: me.token(claims={"sub": you.id}),
    "iss of another": lambda me, you: me.token(claims={"iss": you.id}),
    "iss and sub of another": lambda me, you: me.token(claims={"iss": you.id, "sub": you.id}),
    "iss of the fabric": claimed(iss=enrollment.issuer("restante")),
    "iss in capitals": lambda me, you: me.token(claims={"iss": me.id.upper()}),
    "sub with a newline": lambda me, you: me.token(claims={"sub": f"{me.id}\n"}),
    "no iss": claimed(iss=DROP),
    "no sub": claimed(sub=DROP),
    "iss as a list": lambda me, you: me.token(claims={"iss": [me.id]}),
    # For whom?
    "no aud": claimed(aud=DROP),
    "aud as a list": lambda me, you: me.token(claims={"aud": [me.peering["audience"]["mq"]]}),
    "aud as a list of all": lambda me, you: me.token(claims={"aud": list(me.peering["audience"].values())}),
    "aud of another cell": claimed(aud="restante/mq/elsewhere"),
    "aud with a slash": lambda me, you: me.token(claims={"aud": me.peering["audience"]["mq"] + "/"}),
    "aud in capitals": lambda me, you: me.token(claims={"aud": me.peering["audience"]["mq"].upper()}),
    "aud empty": claimed(aud=""),
    # When?
    "exp in the past": claimed(iat=(-300,), exp=(-61,)),
    "iat in the future": claimed(iat=(90,), exp=(120,)),
    "nbf in the future": claimed(nbf=(90,)),
    "nbf as a text": claimed(nbf="0"),
    "no exp": claimed(exp=DROP),
    "no iat": claimed(iat=DROP),
    "no jti": claimed(jti=DROP),
    "empty jti": claimed(jti=""),
    "jti as a number": claimed(jti=7),
    "life of 601 s": claimed(exp=(602,)),
    "life of years": claimed(exp=(10**9,)),
    "life without end": claimed(exp=10**18),
    "iat of 1970": claimed(iat=0),
    "iat below 0": claimed(iat=-1),
    "exp before iat": claimed(iat=(30,), exp=(20,)),
    "exp as a text": lambda me, you: me.token(claims={"exp": str(int(time.time()) + 60)}),
    "exp as true": claimed(exp=True),
    "exp null": claimed(exp=None),
    "exp NaN": _raw("exp", "NaN"),
    "exp Infinity": _raw("exp", "Infinity"),
    "exp 1e999": _raw("exp", "1e999"),
    "iat NaN": _raw("iat", "NaN"),
    "iat -Infinity": _raw("iat", "-Infinity"),
    "nbf NaN": lambda me, you: _text(me, lambda claims: json.dumps(claims)[:-1] + ', "nbf": NaN}'),
    # In what form?
    "sub twice": lambda me, you: _repeated("sub", f'"{you.id}"')(me, you),
    "exp twice": _repeated("exp", "99999999999"),
    "aud twice": _repeated("aud", '"restante/api"'),
    "alg twice": lambda me, you: forge(json.dumps(me.header())[:-1] + ', "alg": "ES256"}', me.claims(), es256(me.key)),
    "over 3 KB": _stretched,
    "payload a list": lambda me, you: forge(me.header(), "[]", es256(me.key)),
    "payload no JSON": lambda me, you: forge(me.header(), "claims", es256(me.key)),
    "payload nested deep": lambda me, you: forge(me.header(), "[" * 1500, es256(me.key)),
    "header a list": lambda me, you: forge("[]", me.claims(), es256(me.key)),
    "header null": lambda me, you: forge("null", me.claims(), es256(me.key)),
    "two parts": lambda me, you: me.token().rpartition(".")[0],
    "four parts": lambda me, you: me.token() + ".AAAA",
    "five parts": lambda me, you: "a.b.c.d.e",
    "DER signature": lambda me, you: me.token(sign=lambda signed: me.key.sign(signed, ec.ECDSA(_sha256()))),
    "zero signature": lambda me, you: me.token(sign=lambda _: bytes(64)),
    "short signature": lambda me, you: me.token(sign=lambda _: b"\1"),
}


def _sha256() -> object:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


class _Api:
    """The same device, whose `token` is for HTTP."""

    def __init__(self, device: Device) -> None:
        self._device = device
        audience = device.peering["audience"]
        self.peering = {"audience": {"mq": audience["api"], "api": audience["mq"]}}

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def token(self, audience: str | None = None, **changed: object) -> str:
        return self._device.token(audience or self.peering["audience"]["mq"], **changed)  # type: ignore[arg-type]

    def claims(self, audience: str | None = None, life: int = 60, **changed: object) -> Document:
        return self._device.claims(audience or self.peering["audience"]["mq"], life, **changed)


@pytest.fixture(scope="module")
def broker_auth(stack: RunningStack) -> httpx.Client:
    """The broker's own question, as the broker asks it: a tenth of the price of a TLS connection."""
    settings = stack.stack.settings
    return httpx.Client(base_url=f"http://{settings.auth_host}:{settings.auth_port}", timeout=10)


@pytest.fixture(scope="module", autouse=True)
def used(attacker: Device) -> tuple[str, float]:
    """A token used twice when this module began, and when that was: its time passes while other tests run."""
    token = attacker.token(life=120)
    first_use = time.monotonic()
    assert attacker.may_log_in(token)
    assert attacker.may_log_in(token)
    return token, first_use


def answers(broker_auth: httpx.Client, device: Device, token: str) -> bytes:
    return broker_auth.post("/broker/auth/user", data={"username": device.id, "password": token}).content


def post_telemetry(stack: RunningStack, device: Device, token: str, to: Device | None = None) -> httpx.Response:
    with_token = {"Authorization": f"Bearer {token}"}
    return stack.http.post(f"/v1/devices/{(to or device).id}/telemetry/probe", json=1, headers=with_token)


def test_the_controls(stack: RunningStack, broker_auth: httpx.Client, attacker: Device) -> None:
    assert answers(broker_auth, attacker, attacker.token(life=120)) == b"allow"
    assert attacker.may_log_in(attacker.token(life=120))
    assert post_telemetry(stack, attacker, attacker.api_token(life=600)).status_code == 200
    # Within the leeway of clocks that differ, and with claims that mean nothing here.
    for claims in (
        {"iat": (50,), "exp": (80,)},
        {"iat": (-80,), "exp": (-20,)},
        {"nbf": (50,)},
        {"scope": "x", "x": 1},
    ):
        assert answers(broker_auth, attacker, claimed(**claims)(attacker, attacker)) == b"allow", claims


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_token_opens_nothing(
    stack: RunningStack, broker_auth: httpx.Client, attacker: Device, victim: Device, what: str
) -> None:
    assert answers(broker_auth, attacker, FORGED[what](attacker, victim)) == b"deny"
    for_http = FORGED[what](_Api(attacker), victim)  # type: ignore[arg-type]
    answer = post_telemetry(stack, attacker, for_http)
    assert answer.status_code in (401, 404), answer.text
    if answer.status_code == 404:
        pytest.fail("it was believed to be another device's")
    assert answer.headers["content-type"] == "application/problem+json"
    assert for_http not in answer.text


REAL_CONNECTIONS = (
    "alg none",
    "HS256 with the public key as PEM",
    "RS256",
    "another device's kid",
    "embedded jwk",
    "crit",
    "aud as a list",
    "exp in the past",
    "no exp",
    "sub twice",
    "iss and sub of another",
)


@pytest.mark.parametrize("what", REAL_CONNECTIONS)
def test_the_broker_refuses_it_too(attacker: Device, victim: Device, what: str) -> None:
    assert not attacker.may_log_in(FORGED[what](attacker, victim))


def test_an_amqp_token_lives_two_minutes(broker_auth: httpx.Client, attacker: Device) -> None:
    assert answers(broker_auth, attacker, attacker.token(life=120)) == b"allow"
    assert answers(broker_auth, attacker, attacker.token(life=121)) == b"deny"


def test_audiences_are_not_exchanged(stack: RunningStack, attacker: Device, victim: Device) -> None:
    assert not attacker.may_log_in(attacker.api_token())
    assert post_telemetry(stack, attacker, attacker.token()).status_code == 401
    assert not attacker.may_log_in(stack.token)
    issued = stack.ok(stack.http.post("/v1/tokens", json={"subject": attacker.id, "scopes": ["telemetry:write"]}))
    assert not attacker.may_log_in(issued["token"]), "an issued token whose subject is a device"


def _payload(token: str) -> bytes:
    import base64

    part = token.split(".")[1]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


# ---- Over HTTP ---------------------------------------------------------------------------------------


NO_KEY = "A" * 43


def routes(device: Device, command: str) -> list[tuple[str, str, Mapping[str, object]]]:
    """Every route that asks for a token, with a request that is right but for the token."""
    patch = {"content": "{}", "headers": {"Content-Type": "application/merge-patch+json"}}
    return [
        ("POST", "/v1/devices", {"json": {"id": "not-to-be-made"}}),
        ("GET", "/v1/devices", {}),
        ("GET", f"/v1/devices/{device.id}", {}),
        ("PATCH", f"/v1/devices/{device.id}", patch),
        ("DELETE", f"/v1/devices/{device.id}", {}),
        ("POST", f"/v1/devices/{device.id}/enrollment", {}),
        ("GET", f"/v1/devices/{device.id}/keys", {}),
        ("POST", f"/v1/devices/{device.id}/keys", {"json": {}}),
        ("DELETE", f"/v1/devices/{device.id}/keys/{NO_KEY}", {}),
        ("POST", f"/v1/devices/{device.id}/revoke", {}),
        ("POST", f"/v1/devices/{device.id}/commands", {"json": {"name": "door.open", "args": {}}}),
        ("GET", f"/v1/commands/{command}", {}),
        ("DELETE", f"/v1/commands/{command}", {}),
        ("GET", "/v1/commands", {}),
        ("GET", "/v1/events", {}),
        ("POST", f"/v1/devices/{device.id}/telemetry/probe", {"json": 1}),
        ("GET", "/v1/telemetry", {}),
        ("POST", "/v1/tokens", {"json": {"subject": "x", "scopes": ["devices:read"]}}),
        ("GET", "/v1/tokens", {}),
        ("GET", "/v1/audit", {}),
        ("DELETE", "/v1/tokens", {"params": {"subject": "nobody"}}),
        ("DELETE", "/v1/tokens/01990000-0000-7000-8000-000000000000", {}),
    ]


def statuses(
    stack: RunningStack, token: str | None, asked: list[tuple[str, str, Mapping[str, object]]]
) -> dict[str, int]:
    with stack.client(token) as http:
        return {f"{method} {path}": http.request(method, path, **given).status_code for method, path, given in asked}  # type: ignore[arg-type]


def test_the_list_of_routes_is_complete(stack: RunningStack, attacker: Device, waiting: str) -> None:
    document = stack.ok(stack.http.get("/openapi.json"))
    guarded = {
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, described in methods.items()
        if described.get("security")
    }
    listed = set()
    for method, path, _ in routes(attacker, waiting):
        named = path.replace(attacker.id, "{id}").replace(waiting, "{id}").replace("/probe", "/{channel}")
        named = named.replace(NO_KEY, "{kid}")
        listed.add(f"{method} {named.replace('01990000-0000-7000-8000-000000000000', '{jti}')}")
    assert listed == guarded


def _issued(stack: RunningStack, **changed: object) -> str:
    """A token of the fabric with any claims: signed with its own key, and listed (a `jti` that exists)."""
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "probe", "scopes": ["devices:read"]}))
    key = stack.signing_key(stack.stack.files.token_keys).private
    head, payload = (json.loads(_payload(f".{part}.")) for part in made["token"].split(".")[:2])
    payload = {name: value for name, value in {**payload, **changed}.items() if value is not DROP}
    return forge(head, payload, es256(key))


@pytest.mark.parametrize(
    "scope",
    [
        DROP,
        "",
        " ",
        None,
        ["devices:read"],
        "DEVICES:READ",
        "devices",
        "devices:*",
        "*",
        "devices:read\u0085commands:send",
        "devices:read\u00a0commands:send",
        "devices:read\tcommands:send",
        "devices:read,commands:send",
        "devices:read@",
        "commands:send@group:garage/door.*x",
        " ".join(["devices:read"] * 101),
    ],
    ids=repr,
)
def test_without_a_scope_there_is_no_right(stack: RunningStack, victim: Device, waiting: str, scope: object) -> None:
    token = _issued(stack, scope=scope)
    assert set(statuses(stack, token, routes(victim, waiting)).values()) == {403}
    assert stack.ok(stack.http.get(f"/v1/devices/{victim.id}"))["enabled"] is True


def test_an_issued_token_with_a_scope_has_that_right(stack: RunningStack, victim: Device) -> None:
    """The control of the test above: the same forgery with a scope in the right form."""
    with stack.client(_issued(stack, scope="devices:read")) as http:
        assert http.get(f"/v1/devices/{victim.id}").status_code == 200


def test_a_device_may_publish_its_own_telemetry_change_its_own_keys_and_nothing_else(
    stack: RunningStack, attacker: Device, victim: Device, waiting: str
) -> None:
    """Whatever `scope` it signs itself."""
    everything = " ".join(sorted(_actions()))
    for claims in ({}, {"scope": everything}, {"scope": everything.split()}, {"scp": everything, "roles": ["admin"]}):
        token = attacker.api_token(claims=claims)
        own = statuses(stack, token, routes(attacker, waiting))
        its_own = {
            "POST /v1/devices/{}/telemetry/probe": 200,
            "GET /v1/devices/{}/keys": 200,
            "POST /v1/devices/{}/keys": 422,
            f"DELETE /v1/devices/{{}}/keys/{NO_KEY}": 404,
        }
        for route, status in its_own.items():
            assert own.pop(route.format(attacker.id)) == status
        assert set(own.values()) == {403}
        others = statuses(stack, token, routes(victim, waiting))
        assert {others.pop(route.format(victim.id)) for route in its_own} == {404}
        assert set(others.values()) == {403}
    unknown = post_telemetry(stack, attacker, attacker.api_token(), victim)
    nobody = stack.http.post(
        "/v1/devices/nobody/telemetry/probe", json=1, headers={"Authorization": f"Bearer {attacker.api_token()}"}
    )
    assert (unknown.status_code, nobody.status_code) == (404, 404)
    assert unknown.json()["detail"].replace(victim.id, "nobody") == nobody.json()["detail"]


def _actions() -> frozenset[str]:
    from fabric.identity.scopes import ACTIONS

    return ACTIONS


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "restante/mq/local"},
        {"aud": ["restante/api"]},
        {"aud": DROP},
        {"exp": 1},
        {"exp": DROP},
        {"exp": 10**12},
        {"iat": 10**11},
        {"nbf": 10**11},
        {"iss": "urn:restante:other"},
        {"iss": "https://login.example"},
        {"iss": DROP},
        {"sub": DROP},
        {"jti": "01990000-0000-7000-8000-000000000000"},
        {"jti": DROP},
    ],
    ids=repr,
)
def test_issued_tokens_are_checked_too(stack: RunningStack, changed: dict[str, object]) -> None:
    with stack.client(_issued(stack, scope="devices:read", **changed)) as http:
        assert http.get("/v1/devices").status_code == 401


def test_issued_tokens_by_another_hand(stack: RunningStack, attacker: Device) -> None:
    """Signed by a device, by the commands' key, or with the secret that everybody has."""
    head, payload, _ = stack.token.split(".")
    header, claims = json.loads(_payload(f".{head}.")), json.loads(_payload(f".{payload}."))
    commands = stack.signing_key(stack.stack.files.command_keys).private
    published = stack.ok(stack.http.get("/.well-known/jwks.json"))["keys"][0]
    forged = {
        "none": forge({**header, "alg": "none"}, claims, unsigned),
        "a device": forge(header, claims, es256(attacker.key)),
        "a device by its kid": forge({**header, "kid": attacker.kid}, claims, es256(attacker.key)),
        "the commands' key": forge(header, claims, es256(commands)),
        "the commands' key by its kid": forge(
            {**header, "kid": enrollment.thumbprint(public_jwk(commands))}, claims, es256(commands)
        ),
        "HS256 with the JWK": forge({**header, "alg": "HS256"}, claims, hs256(json.dumps(published).encode())),
        "jwk": forge({**header, "jwk": attacker.jwk}, claims, es256(attacker.key)),
        "device's typ": forge({**header, "typ": enrollment.DEVICE_TOKEN_TYPE}, claims, es256(attacker.key)),
    }
    assert {what: _status(stack, token) for what, token in forged.items()} == dict.fromkeys(forged, 401)
    assert _status(stack, stack.token) == 200


def _status(stack: RunningStack, token: str) -> int:
    with stack.client(token) as http:
        return http.get("/v1/devices").status_code


def test_a_revoked_token_is_refused(stack: RunningStack) -> None:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "billing", "scopes": ["devices:read"]}))
    with stack.client(made["token"]) as http:
        assert http.get("/v1/devices").status_code == 200  # from now on it is remembered as good
        assert stack.http.delete(f"/v1/tokens/{made['jti']}").status_code == 200
        revoked = time.monotonic()
        while http.get("/v1/devices").status_code == 200:
            assert time.monotonic() - revoked < 5
            time.sleep(0.02)
        assert http.get("/v1/devices").status_code == 401
        assert http.get("/v1/devices", headers={"Prefer": "wait=1"}).status_code == 401
    assert Path(stack.stack.files.operator_token).exists()


def test_a_suspended_devices_tokens_are_worth_nothing(stack: RunningStack) -> None:
    device = Device.enrolled(stack, "suspended")
    assert device.may_log_in(device.token())
    kept = device.token(), device.api_token()
    patch = {"Content-Type": "application/merge-patch+json"}
    stack.ok(stack.http.patch(f"/v1/devices/{device.id}", content='{"enabled": false}', headers=patch))
    assert not device.may_log_in(kept[0])
    assert not device.may_log_in(device.token())
    assert post_telemetry(stack, device, kept[1]).status_code == 401


def test_credentials_come_once_and_in_one_way(stack: RunningStack) -> None:
    with stack.client(None) as http:
        for headers in (
            [("Authorization", f"Bearer {stack.token}"), ("Authorization", f"Bearer {stack.token}")],
            [("Authorization", f"Basic {stack.token}")],
            [("Authorization", stack.token)],
            [("Authorization", f"Bearer {stack.token},{stack.token}")],
            [("Authorization", "Bearer")],
            [("X-Authorization", f"Bearer {stack.token}")],
            [("Cookie", f"access_token={stack.token}")],
            [],
        ):
            assert http.get("/v1/devices", headers=headers).status_code == 401, headers
        assert http.get("/v1/devices", params={"access_token": stack.token}).status_code in (401, 422)


def test_the_authoritys_key_signs_no_tokens(stack: RunningStack) -> None:
    """The certificate in front of everything is no key of anything else."""
    content = stack.stack.files.certificate.read_bytes()
    key = serialization.load_pem_private_key(content[content.index(b"-----BEGIN PRIVATE KEY") :], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    published = {each["kid"] for each in stack.ok(stack.http.get("/.well-known/jwks.json"))["keys"]}
    certificate = x509.load_pem_x509_certificate(content)
    assert certificate.public_key() == key.public_key()
    assert enrollment.thumbprint(public_jwk(key)) not in published
    assert access.ADMIN not in published


def test_a_token_is_good_for_one_login(attacker: Device, used: tuple[str, float]) -> None:
    """The broker asks twice, and retries; after 15 s from its first use nobody is let in again."""
    token, first_use = used
    time.sleep(max(0.0, 15.5 - (time.monotonic() - first_use)))  # the rule is about real time
    assert not attacker.may_log_in(token)
    same_jti = attacker.token(life=120, claims={"jti": json.loads(_payload(token))["jti"]})
    assert not attacker.may_log_in(same_jti), "another token with the used id"
    assert attacker.may_log_in(attacker.token(life=120))
