"""Proofs of possession: a JWS by a new key, so that whoever registers a key must hold it."""

from collections.abc import Mapping

import jwt

from fabric.clock import Clock
from fabric.errors import Invalid
from fabric.identity.keys import public_key
from topology import enrollment


def check(proof: str, jwk: Mapping[str, str], typ: str, said: Mapping[str, str], clock: Clock) -> None:
    """Check that the key signed these claims, just now.

    Args:
        typ: the proof's media type, which says what it is for.

    Raises:
        Invalid: says what does not hold.
    """
    if len(proof) > enrollment.MAX_TOKEN_BYTES:
        raise Invalid("proof is too long")
    try:
        header = jwt.get_unverified_header(proof)
        claims = jwt.decode(
            proof,
            public_key(jwk),
            algorithms=[enrollment.ALGORITHM],
            options={"verify_aud": False, "verify_iat": False, "require": ["iat", *said]},
        )
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise Invalid("proof is not a JWS by the key in public_key") from None
    if header.get("typ") != typ:
        raise Invalid(f"proof is not of typ {typ}")
    for name, value in said.items():
        if claims[name] != value:
            raise Invalid(f"proof is for another {name.partition('_')[0]}")
    iat = claims["iat"]
    now = clock.now() // 1_000_000
    # "Not within" rather than "beyond": JSON's NaN is neither.
    if not isinstance(iat, int | float) or not abs(iat - now) <= enrollment.PROOF_LIFE:
        raise Invalid("proof was not made now; check the device's clock")
