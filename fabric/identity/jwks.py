"""JWK sets of external providers (RFC 7517), read strictly: public keys for signatures, of sizes that count. Pure."""

import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.utils import base64url_decode

from fabric import strict_json
from fabric.errors import Invalid

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

MAX_KEYS = 100
ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"}
)  # RFC 7518 and 8037; with a symmetric one, whoever has the public key could sign

_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_SHORTEST_RSA, _LONGEST_RSA = 2048, 8192  # bits; NIST SP 800-131A, and what a verification may cost
_LONGEST_EXPONENT = 32  # bits
_CURVES: Final[Mapping[str, tuple[ec.EllipticCurve, int, str]]] = MappingProxyType(
    {"P-256": (ec.SECP256R1(), 32, "ES256"), "P-384": (ec.SECP384R1(), 48, "ES384")}
)
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_LONGEST_KID = 255  # characters


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the algorithms of signatures that may be verified with it."""

    kid: str
    algorithms: frozenset[str]
    public: PublicKey


@dataclass(frozen=True, slots=True)
class KeySet:
    """Keys by `kid`. `ignored` says of each other one why it is none."""

    keys: Mapping[str, Key]
    ignored: tuple[str, ...] = ()


def read(raw: bytes, algorithms: Collection[str]) -> KeySet:
    """The keys of a JWK set that are good for some of these algorithms.

    Raises:
        Invalid: it is no JWK set, or one of over `MAX_KEYS` keys.
    """
    try:
        document = strict_json.parse(raw)
    except strict_json.NotJson as error:
        raise Invalid(f"the JWK set is not JSON: {error}") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise Invalid("the JWK set is not an object with an array 'keys'")
    if len(listed) > MAX_KEYS:
        raise Invalid(f"the JWK set has {len(listed)} keys; it may have {MAX_KEYS}")
    keys: dict[str, Key] = {}
    ignored = []
    for number, member in enumerate(listed):
        try:
            key = _key(member, frozenset(algorithms))
        except Invalid as error:
            ignored.append(f"key {number}: {error}")
        else:
            if keys.setdefault(key.kid, key) is not key:
                ignored.append(f"key {number}: another one has its 'kid'")
    return KeySet(MappingProxyType(keys), tuple(ignored))


def _key(jwk: object, algorithms: frozenset[str]) -> Key:
    if not isinstance(jwk, dict):
        raise Invalid("it is no object")
    if any(name in jwk for name in _PRIVATE):
        raise Invalid("it is a private or symmetric key")
    kid = jwk.get("kid")
    if not isinstance(kid, str) or not 1 <= len(kid) <= _LONGEST_KID:
        raise Invalid("it has no usable 'kid'")
    if jwk.get("use", "sig") != "sig" or "verify" not in _operations(jwk):
        raise Invalid("it is not for signatures")
    try:
        public, possible = _public(jwk)
    except (ValueError, TypeError, binascii.Error):
        raise Invalid("its members are not those of a public key") from None
    # What it says itself narrows what its type allows, and never adds to it.
    good = possible & algorithms & ({jwk["alg"]} if "alg" in jwk and isinstance(jwk["alg"], str) else possible)
    if not good or not isinstance(jwk.get("alg", ""), str):
        raise Invalid("it is for none of the accepted algorithms")
    return Key(kid, good, public)


def _operations(jwk: Mapping[str, object]) -> Collection[object]:
    given = jwk.get("key_ops", ["verify"])
    return given if isinstance(given, list) else ()


def _public(jwk: Mapping[str, object]) -> tuple[PublicKey, frozenset[str]]:
    """Raises `ValueError`, `TypeError`, or `Invalid`."""
    match jwk.get("kty"), jwk.get("crv"):
        case "RSA", _:
            n, e = (int.from_bytes(_bytes(jwk, name), "big") for name in ("n", "e"))
            if not _SHORTEST_RSA <= n.bit_length() <= _LONGEST_RSA or e.bit_length() > _LONGEST_EXPONENT:
                raise Invalid(f"an RSA key has {_SHORTEST_RSA} to {_LONGEST_RSA} bits and a small exponent")
            return rsa.RSAPublicNumbers(e, n).public_key(), _RSA
        case "EC", str(name) if name in _CURVES:
            curve, length, algorithm = _CURVES[name]
            x, y = (_bytes(jwk, name, length) for name in ("x", "y"))
            numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve)
            return numbers.public_key(), frozenset({algorithm})  # raises for what is not on the curve
        case "OKP", "Ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(_bytes(jwk, "x", 32)), frozenset({"EdDSA"})
        case _:
            raise Invalid("its type or curve is not accepted")


def _bytes(jwk: Mapping[str, object], name: str, length: int | None = None) -> bytes:
    text = jwk.get(name)
    if not isinstance(text, str):
        raise TypeError
    raw = base64url_decode(text)
    if length is not None and len(raw) != length:
        raise ValueError
    return raw
