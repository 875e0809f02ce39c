"""JWK sets of external providers: which keys count, for which algorithms."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import Invalid
from fabric.identity import jwks
from tests.harness import provider
from tests.harness.device import DROP, b64

ALL = jwks.ALGORITHMS
RSA = provider.MAKE["RS256"]()
P256, P384 = (ec.generate_private_key(curve()) for curve in (ec.SECP256R1, ec.SECP384R1))
ED = ed25519.Ed25519PrivateKey.generate()


def read(*keys: Any, algorithms: frozenset[str] = ALL) -> jwks.KeySet:
    return jwks.read(json.dumps({"keys": keys}).encode(), algorithms)


def test_each_type_is_good_for_its_algorithms() -> None:
    found = read(*(provider.jwk(key, kid) for key, kid in ((RSA, "r"), (P256, "a"), (P384, "b"), (ED, "e"))))
    assert not found.ignored
    assert {kid: key.algorithms for kid, key in found.keys.items()} == {
        "r": {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
        "a": {"ES256"},
        "b": {"ES384"},
        "e": {"EdDSA"},
    }
    assert found.keys["a"].public == P256.public_key()


def test_only_accepted_algorithms_and_those_that_a_key_says_are_left() -> None:
    said = provider.jwk(RSA, "r", alg="PS256")
    assert read(said).keys["r"].algorithms == {"PS256"}
    assert read(provider.jwk(RSA, "r"), algorithms=frozenset({"RS256", "ES256"})).keys["r"].algorithms == {"RS256"}
    assert not read(said, algorithms=frozenset({"RS256"})).keys
    assert not read(provider.jwk(P256, "a"), algorithms=frozenset({"RS256"})).keys


def _wrong(key: str, **members: object) -> dict[str, Any]:
    return {**provider.jwk({"rsa": RSA, "ec": P256, "ed": ED}[key], "x"), **members}  # type: ignore[dict-item]


def _rsa_of(bits: int) -> dict[str, Any]:
    return _wrong("rsa", n=b64(((1 << bits - 1) | 1).to_bytes((bits + 7) // 8, "big")))


_OFF_CURVE = b64(b"\1" * 32)
IGNORED: dict[str, Any] = {
    "symmetric": {"kty": "oct", "k": b64(b"k" * 32), "kid": "x", "alg": "HS256"},
    "symmetric, said to be RSA": _wrong("rsa", k="AAAA"),
    "private EC": _wrong("ec", d="AAAA"),
    "private RSA": _wrong("rsa", p="AAAA"),
    "no kid": provider.jwk(P256, "x", kid=DROP),
    "empty kid": _wrong("ec", kid=""),
    "long kid": _wrong("ec", kid="x" * 256),
    "kid a number": _wrong("ec", kid=1),
    "for encryption": _wrong("ec", use="enc"),
    "for signing only": _wrong("ec", key_ops=["sign"]),
    "key_ops a text": _wrong("ec", key_ops="verify"),
    "alg of a symmetric key": _wrong("rsa", alg="HS256"),
    "alg none": _wrong("rsa", alg="none"),
    "alg of another type": _wrong("ec", alg="RS256"),
    "alg a list": _wrong("ec", alg=["ES256"]),
    "alg null": _wrong("ec", alg=None),
    "RSA of 1024 bits": _rsa_of(1024),
    "RSA of 2047 bits": _rsa_of(2047),
    "RSA of 8193 bits": _rsa_of(8193),
    "RSA with exponent 1": _wrong("rsa", e=b64(b"\1")),
    "RSA with an even exponent": _wrong("rsa", e=b64(b"\4")),
    "RSA with a large exponent": _wrong("rsa", e=b64(b"\1" * 8)),
    "RSA without n": {"kty": "RSA", "e": "AQAB", "kid": "x"},
    "off the curve": _wrong("ec", x=_OFF_CURVE, y=_OFF_CURVE),
    "short coordinate": _wrong("ec", x=b64(b"\1" * 31)),
    "coordinate a number": _wrong("ec", x=1),
    "coordinate no base64": _wrong("ec", x="a"),
    "P-521": provider.jwk(ec.generate_private_key(ec.SECP521R1()), "x"),
    "secp256k1": _wrong("ec", crv="secp256k1"),
    "curve a list": _wrong("ec", crv=["P-256"]),
    "Ed448": _wrong("ed", crv="Ed448"),
    "Ed25519, short": _wrong("ed", x=b64(b"\1" * 31)),
    "no type": _wrong("ec", kty=None),
    "a text": "key",
    "null": None,
    "a list": [],
}


@pytest.mark.parametrize("bad", IGNORED.values(), ids=IGNORED)
def test_what_is_no_good_key_is_ignored_and_takes_no_other_with_it(bad: object) -> None:
    found = read(bad, provider.jwk(P256, "good"))
    assert set(found.keys) == {"good"}
    assert len(found.ignored) == 1
    assert found.ignored[0].startswith("key 0: ")


def test_one_kid_is_one_key() -> None:
    found = read(provider.jwk(P256, "x"), provider.jwk(P384, "x"))
    assert found.keys["x"].public == P256.public_key()
    assert found.ignored == ("key 1: another one has its 'kid'",)


def test_sizes_at_the_bounds_count() -> None:
    assert set(read(provider.jwk(rsa.generate_private_key(65537, 2048), "x")).keys) == {"x"}
    assert set(read(_rsa_of(8192)).keys) == {"x"}


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [], "keys": []}', b"\xff", b"[" * 100_000, b'{"keys": null}'],
    ids=["empty", "list", "no keys", "object", "twice", "no text", "deep", "null"],
)  # fmt: skip
def test_what_is_no_jwk_set_is_refused(raw: bytes) -> None:
    with pytest.raises(Invalid):
        jwks.read(raw, ALL)


def test_a_hundred_keys_and_no_more() -> None:
    keys = [provider.jwk(P256, f"k{number}") for number in range(101)]
    assert len(read(*keys[:100]).keys) == 100
    with pytest.raises(Invalid, match="101"):
        read(*keys)


names = st.sampled_from(["keys", "kty", "kid", "crv", "x", "y", "n", "e", "alg", "use", "key_ops"])
values = (
    st.none() | st.booleans() | st.integers() | st.sampled_from(["RSA", "EC", "P-256", "AQAB"]) | st.text(max_size=9)
)
documents = st.recursive(values, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=9))


@given(documents)
def test_it_takes_any_document(document: object) -> None:
    for value in (document, {"keys": [document]}):
        try:
            found = jwks.read(json.dumps(value).encode(), ALL)
        except Invalid:
            continue
        assert not found.keys
