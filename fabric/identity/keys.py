"""Public keys of devices, as JWKs from outside."""

import binascii
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.utils import base64url_decode, base64url_encode

from fabric.errors import Invalid

_MEMBERS = {"kty", "crv", "x", "y"}
_IGNORED = {"kid", "alg", "use"}


def accept_jwk(given: Mapping[str, object]) -> dict[str, str]:
    """The members crv, kty, x, y of a P-256 public key, checked to be a point of the curve.

    Raises:
        Invalid: anything else, a private key above all.
    """
    if "d" in given:
        raise Invalid(
            "public_key carries the private member 'd': keep the private key on the device, and make a new one"
        )
    if not _MEMBERS <= given.keys() <= _MEMBERS | _IGNORED or given["kty"] != "EC" or given["crv"] != "P-256":
        raise Invalid("public_key is a JWK with kty 'EC', crv 'P-256', x and y")
    jwk = {name: value for name, value in given.items() if name in _MEMBERS and isinstance(value, str)}
    if len(jwk) != len(_MEMBERS):
        raise Invalid("public_key's members are texts")
    public_key(jwk)
    return jwk


def public_key(jwk: Mapping[str, str]) -> ec.EllipticCurvePublicKey:
    """Raises `Invalid` for what is not a point of P-256 in canonical form."""
    try:
        x, y = (_coordinate(jwk[name]) for name in ("x", "y"))
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except (ValueError, KeyError, binascii.Error):
        raise Invalid("public_key is not a point of the curve P-256") from None


def _coordinate(text: str) -> int:
    raw = base64url_decode(text)
    # Decoding overlooks two spare bits and some characters: a key spelled otherwise would have another thumbprint.
    if len(raw) != 32 or base64url_encode(raw).decode() != text:
        raise ValueError("a coordinate has 32 bytes, in the one spelling that base64url has for them")
    return int.from_bytes(raw, "big")
