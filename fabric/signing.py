"""ES256 keys of the fabric: those that sign commands and issued tokens.

A key file is a P-256 private key as PEM, mode 0600. Public halves are handed out as JWKs.
"""

import base64
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from topology import enrollment, wire
from topology.names import DeviceId

_ES256 = ECAlgorithm(ECAlgorithm.SHA256)
Jwk = dict[str, str]


class Published(Protocol):
    """What has a public half with an id."""

    @property
    def kid(self) -> str: ...

    @property
    def public(self) -> Jwk: ...


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and the id (RFC 7638 thumbprint) of its public half."""

    private: ec.EllipticCurvePrivateKey
    kid: str
    public: Jwk


def signing_key(private: ec.EllipticCurvePrivateKey) -> SigningKey:
    public = public_jwk(private.public_key())
    return SigningKey(private, enrollment.thumbprint(public), public)


def public_jwk(key: ec.EllipticCurvePublicKey) -> Jwk:
    """The JWK members crv, kty, x and y of a P-256 public key (RFC 7518, section 6.2.1)."""
    numbers = key.public_numbers()
    return {"crv": "P-256", "kty": "EC", "x": _coordinate(numbers.x), "y": _coordinate(numbers.y)}


def jwks(*keys: Published) -> dict[str, list[Jwk]]:
    """A JWK set (RFC 7517) of the public halves, each with `kid`, `alg` and `use`."""
    return {"keys": [{**key.public, "kid": key.kid, "alg": enrollment.ALGORITHM, "use": "sig"} for key in keys]}


def sign_command(key: SigningKey, command: wire.Command, device: DeviceId) -> str:
    """The `sig` header: base64url of the raw (r ‖ s) ES256 signature over `wire.signing_input`."""
    return _base64url(_ES256.sign(wire.signing_input(command, device), key.private))


def _coordinate(value: int) -> str:
    return _base64url(value.to_bytes(32, "big"))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
