"""What is believed of an external provider's token: real signatures, and one thing wrong with each."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from fabric.errors import Unauthenticated
from fabric.identity import jwks, providers, tokens
from fabric.identity.issued import Caller
from fabric.identity.jwks import Key
from fabric.identity.providers import Provider
from fabric.identity.scopes import Target
from tests.harness import provider as idp
from tests.harness.device import DROP, forge, hs256, unsigned

NOW = 1_800_000_000  # seconds
KEYS = {alg: make() for alg, make in idp.MAKE.items()}
PUBLISHED = [idp.jwk(key, alg) for alg, key in KEYS.items()]
PROVIDER = Provider(
    issuer=idp.ISSUER,
    audience=idp.AUDIENCE,
    jwks_url="https://idp.example/keys",
    max_scope="devices:read commands:send@group:garage tokens:write",
    algorithms=("RS256", "PS256", "ES256", "ES384", "EdDSA"),
)


def key(alg: str) -> Key:
    return jwks.read(json.dumps({"keys": PUBLISHED}).encode(), PROVIDER.algorithms).keys[alg]


def made(claims: dict[str, Any] | None = None, alg: str = "ES256", kid: str = "ES256", **header: object) -> str:
    return idp.token(KEYS[kid], kid, alg, {"iat": NOW, "exp": NOW + 300, **(claims or {})}, **header)


def verify(token: str, known: Provider = PROVIDER, now: int = NOW) -> Caller:
    examined = tokens.examine(token)
    return providers.verify(known, examined, key(examined.kid), now)


def may(caller: Caller, action: str = "devices:read") -> bool:
    return caller.rights.may(action)


@pytest.mark.parametrize(
    ("alg", "kid"),
    [("RS256", "RS256"), ("PS256", "RS256"), ("ES256", "ES256"), ("ES384", "ES384"), ("EdDSA", "EdDSA")],
)
def test_a_good_token_is_a_caller(alg: str, kid: str) -> None:
    caller = verify(made(alg=alg, kid=kid))
    assert (caller.issuer, caller.subject, caller.jti) == (idp.ISSUER, "alice", "0")
    assert caller.identity == f"{idp.ISSUER}#alice"
    assert (caller.issued_at, caller.ends) == (NOW, NOW + 300)
    assert caller.device is None
    assert may(caller)


def public_pem() -> bytes:
    return (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


CLAIMS = {"iss": idp.ISSUER, "sub": "alice", "aud": idp.AUDIENCE, "iat": NOW, "exp": NOW + 300, "scope": "devices:read"}


def forged(sign: Callable[[bytes], bytes], **header: object) -> str:
    return forge({"typ": "at+jwt", "kid": "RS256", **header}, CLAIMS, sign)


REFUSED: dict[str, Callable[[], str]] = {
    "alg none": lambda: forged(unsigned, alg="none"),
    "HS256 with the public key": lambda: forged(hs256(public_pem()), alg="HS256"),
    "HS256 said to be RS256": lambda: forged(hs256(public_pem()), alg="RS256"),
    "alg not pinned, signed": lambda: made(alg="RS512", kid="RS256"),
    "no typ": lambda: made(typ=DROP),
    "typ JWT": lambda: made(typ="JWT"),
    "typ in capitals": lambda: made(typ="AT+JWT"),
    "typ of a device": lambda: made(typ="restante-device+jwt"),
    "no kid": lambda: forged(unsigned, alg="RS256", kid=""),
    "crit": lambda: forged(unsigned, alg="RS256", crit=["exp"]),
    "jku": lambda: forged(unsigned, alg="RS256", jku="https://idp.example/keys"),
    "jwk": lambda: forged(unsigned, alg="RS256", jwk=PUBLISHED[0]),
    "another audience": lambda: made({"aud": "another"}),
    "audience a prefix": lambda: made({"aud": idp.AUDIENCE + "x"}),
    "no audience": lambda: made({"aud": DROP}),
    "audiences of others": lambda: made({"aud": ["a", "b"]}),
    "audience an object": lambda: made({"aud": {idp.AUDIENCE: 1}}),
    "expired": lambda: made({"iat": NOW - 600, "exp": NOW - 60}),
    "no exp": lambda: made({"exp": DROP}),
    "exp a text": lambda: made({"exp": str(NOW + 300)}),
    "exp before iat": lambda: made({"exp": NOW}),
    "no iat": lambda: made({"iat": DROP}),
    "iat null": lambda: made({"iat": None}),
    "future iat": lambda: made({"iat": NOW + 61, "exp": NOW + 300}),
    "future nbf": lambda: made({"nbf": NOW + 61}),
    "nbf null": lambda: made({"nbf": None}),
    "lives for a day, an hour ago": lambda: made({"iat": NOW - 3660, "exp": NOW + 86400}),
    "no sub": lambda: made({"sub": DROP}),
    "sub a number": lambda: made({"sub": 1}),
    "sub with a newline": lambda: made({"sub": "a\nb"}),
    "sub not ASCII": lambda: made({"sub": "ålice"}),
    "long sub": lambda: made({"sub": "x" * (200 - len(idp.ISSUER))}),
    "for another key": lambda: made({"cnf": {"jkt": "x"}}),
    "on behalf of somebody": lambda: made({"act": {"sub": "bob"}}),
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused(make: Callable[[], str]) -> None:
    with pytest.raises(Unauthenticated):
        verify(make())


def test_a_key_is_good_for_its_own_algorithm_only() -> None:
    token = tokens.examine(made())
    for other in ("RS256", "ES384", "EdDSA"):
        with pytest.raises(Unauthenticated):
            providers.verify(PROVIDER, token, key(other), NOW)


@pytest.mark.parametrize("audience", [idp.AUDIENCE, [idp.AUDIENCE], ["account", idp.AUDIENCE]], ids=["text", "1", "2"])
def test_the_audience_may_be_one_of_several(audience: object) -> None:
    assert may(verify(made({"aud": audience})))


def test_the_typ_is_the_providers() -> None:
    assert may(verify(made(typ="JWT"), replace(PROVIDER, typ="JWT")))
    with pytest.raises(Unauthenticated):
        verify(made(), replace(PROVIDER, typ="JWT"))
    with pytest.raises(Unauthenticated):
        verify(made(typ=DROP), replace(PROVIDER, typ="JWT"))


def test_a_token_may_have_no_id() -> None:
    assert verify(made({"jti": DROP})).jti is None


def test_times_have_the_providers_leeway() -> None:
    late, early = made({"exp": NOW + 10}), made({"iat": NOW + 5})
    exact = replace(PROVIDER, leeway=0)
    assert may(verify(late, now=NOW + 69))
    assert may(verify(late, exact, NOW + 9))
    assert may(verify(early, replace(PROVIDER, leeway=5)))
    for known, token, now in ((PROVIDER, late, NOW + 70), (exact, late, NOW + 10), (exact, early, NOW)):
        with pytest.raises(Unauthenticated):
            verify(token, known, now)


def test_a_token_ends_an_hour_after_its_issue_whatever_it_says() -> None:
    token, exact = made({"exp": NOW + 86_400}), replace(PROVIDER, leeway=0)
    assert verify(token, exact).ends == NOW + 3600
    assert may(verify(token, exact, NOW + 3599))
    with pytest.raises(Unauthenticated, match="3600"):
        verify(token, exact, NOW + 3600)


def test_rights_end_at_the_ceiling() -> None:
    wide = verify(made({"scope": "devices:read devices:write commands:send tokens:write"}))
    assert wide.rights.whole == {"devices:read", "tokens:write"}
    assert wide.rights.may("commands:send", Target("a", ("garage",)))
    assert not wide.rights.may("commands:send", Target("a", ("house",)))
    assert not verify(made({"scope": "devices:write"})).rights.may_some("devices:write")


@pytest.mark.parametrize(
    ("prefix", "scope", "good"),
    [
        ("", "devices:read", True),
        ("", "openid devices:read profile", True),
        ("", ["openid", "devices:read"], True),
        ("", ["openid devices:read"], False),
        ("", [["devices:read"]], False),
        ("", {"devices:read": True}, False),
        ("", None, False),
        ("", "Devices:read", False),
        ("", "devices:read\u00a0x", False),
        ("restante/", "restante/devices:read", True),
        ("restante/", "devices:read", False),
        ("restante/", "restante/restante/devices:read", False),
        ("restante/", "x restante/devices:read y", True),
        ("api://restante/", ["api://restante/devices:read"], True),
    ],
)
def test_scopes_are_in_the_claim_behind_the_prefix(prefix: str, scope: object, good: bool) -> None:
    known = replace(PROVIDER, scope_claim="roles", scope_prefix=prefix)
    assert may(verify(made({"roles": scope, "scope": "devices:read"}), known)) is good
    assert not may(verify(made({"scope": "devices:read"}), known)), "it is in no other claim"


def test_others_scopes_do_not_count_among_the_hundred() -> None:
    claim = " ".join(["x"] * 150 + ["r/devices:read"])
    assert may(verify(made({"scope": claim}), replace(PROVIDER, scope_prefix="r/")))
    assert not may(verify(made({"scope": claim})))
