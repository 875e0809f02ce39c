"""One verifier per token, chosen by exact `iss` and never tried in turn.

`examine` reads a token's unverified header and claims strictly; whoever then picks the key verifies with
`verify`, which checks the signature, the times and the audience. Claims that are not read here are
ignored, `scope` of a device token above all: a device's rights are fixed.
"""

import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jwt

from fabric.errors import Unauthenticated
from fabric.identity.jwks import PublicKey
from fabric.identity.keys import public_key
from topology import enrollment

ISSUED_TOKEN_TYPE = "at+jwt"  # noqa: S105 - RFC 9068's media type, not a secret

# Header members that would let a token say which key to verify it with, or change how it is read.
_FORBIDDEN = ("jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "zip", "enc")


@dataclass(frozen=True, slots=True)
class Unverified:
    """What a token says of itself, before anything of it is believed. Only an external provider's may have no `jti`."""

    token: str
    alg: str
    typ: str
    kid: str
    iss: str
    sub: str
    jti: str | None


@dataclass(frozen=True, slots=True)
class Claims:
    """A verified token. Times are epoch seconds."""

    sub: str
    jti: str
    iat: int
    exp: int
    kid: str
    scope: str | None


def examine(token: str) -> Unverified:
    """The token's own word about itself.

    Raises:
        Unauthenticated: it is no JWS of the accepted shape.
    """
    if not token or len(token) > enrollment.MAX_TOKEN_BYTES or not token.isascii():
        raise Unauthenticated(f"a token is 1 to {enrollment.MAX_TOKEN_BYTES} ASCII characters")
    header = _part(token, 0)
    payload = _part(token, 1)
    present = [name for name in _FORBIDDEN if name in header]
    if present:
        raise Unauthenticated(f"the token's header has '{present[0]}', which is not accepted")
    return Unverified(
        token,
        alg=_text(header, "alg"),
        typ=_text(header, "typ"),
        kid=_text(header, "kid"),
        iss=_text(payload, "iss"),
        sub=_text(payload, "sub"),
        jti=_text(payload, "jti") if "jti" in payload else None,
    )


def verify(token: Unverified, jwk: Mapping[str, str], audience: str, longest: int, now: int) -> Claims:
    """The claims of a device's or one of our own tokens, once signature, audience and times hold.

    Args:
        longest: seconds that such a token may live.
        now: epoch seconds on the fabric's clock.

    Raises:
        Unauthenticated: says which of them does not hold.
    """
    if token.alg != enrollment.ALGORITHM:
        raise Unauthenticated(f"the token's 'alg' is not {enrollment.ALGORITHM}")
    claims = signed_claims(token, public_key(jwk), ("iss", "sub", "aud", "iat", "exp", "jti"))
    if claims["aud"] != audience:
        raise Unauthenticated("the token is for another audience")
    iat, exp, nbf = time(claims, "iat"), time(claims, "exp"), claims.get("nbf")
    if exp - iat > longest or exp <= iat:
        raise Unauthenticated(f"the token lives longer than the {longest} s allowed")
    if iat > now + enrollment.CLOCK_LEEWAY or (nbf is not None and time(claims, "nbf") > now + enrollment.CLOCK_LEEWAY):
        raise Unauthenticated("the token is not valid yet; check the clock of whoever signed it")
    if now >= exp + enrollment.CLOCK_LEEWAY:
        raise Unauthenticated("the token has expired")
    scope = claims.get("scope")
    return Claims(token.sub, _text(claims, "jti"), iat, exp, token.kid, scope if isinstance(scope, str) else None)


def signed_claims(token: Unverified, key: PublicKey, required: Sequence[str]) -> dict[str, object]:
    """The claims, once the signature holds by the algorithm that the token says: the caller has compared that with
    what it accepts, and compares the claims next.

    Raises:
        Unauthenticated: it does not, or one of the required claims is missing.
    """
    try:
        return jwt.decode(
            token.token,
            key,
            algorithms=[token.alg],
            # The times and the audience are the caller's: on the fabric's clock, and exactly.
            options={
                "verify_aud": False,
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
                "require": list(required),
            },
        )
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise Unauthenticated(f"the token's signature or form does not hold: {type(error).__name__}") from None


def time(claims: Mapping[str, object], name: str) -> int:
    """A claim in epoch seconds. Raises `Unauthenticated`."""
    value = claims[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise Unauthenticated(f"the token's '{name}' is not a time")
    return int(value)


def _part(token: str, index: int) -> dict[str, object]:
    parts = token.split(".")
    if len(parts) != 3:
        raise Unauthenticated("the token is not a compact JWS of three parts")
    try:
        value = json.loads(jwt.utils.base64url_decode(parts[index]), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError, binascii.Error):
        raise Unauthenticated("the token's parts are not base64url JSON objects") from None
    if not isinstance(value, dict):
        raise Unauthenticated("the token's parts are not base64url JSON objects")
    return value


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is repeated")
    return found


def _text(part: Mapping[str, object], name: str) -> str:
    value = part.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 255 or not value.isprintable():
        raise Unauthenticated(f"the token has no usable '{name}'")
    return value
