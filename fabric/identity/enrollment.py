"""Enrollment: a one-time code against the registration of a public key.

The fabric stores no device secret: codes are kept hashed, and the private key never leaves the device.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import jwt

from fabric.clock import Clock
from fabric.errors import Invalid
from fabric.identity.keys import accept_jwk, public_key
from fabric.model import Device, DeviceKey, EnrollmentCode
from fabric.ports import Registry
from topology import enrollment
from topology.names import DeviceId

CODE_LIFE = 3_600_000_000  # µs


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a person is shown once: the ticket to copy, and its code for those who build their own agent."""

    ticket: str
    code: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class Enrolled:
    device: Device
    kid: str
    new: bool


class Enrollment:
    """`authority_digest` is the SHA-256 of the authority's DER that devices are to pin."""

    def __init__(self, registry: Registry, clock: Clock, authority_digest: bytes) -> None:
        self._registry, self._clock, self._digest = registry, clock, authority_digest

    def invite(self, device: DeviceId) -> tuple[Invitation, EnrollmentCode]:
        """A fresh code for a device: what is shown, and what is kept. Nothing is stored here."""
        code = secrets.token_bytes(enrollment.CODE_BYTES)
        expires = self._clock.now() + CODE_LIFE
        ticket = enrollment.encode_ticket(enrollment.Ticket(code, self._digest))
        shown = Invitation(ticket, enrollment.encode_code(code), expires)
        return shown, EnrollmentCode(enrollment.code_hash(code), device, expires)

    async def redeem(self, code: str, given_key: Mapping[str, object], proof: str) -> Enrolled:
        """Register a public key.

        Raises:
            Invalid: the code, key or proof is not of the right form, or the proof does not hold.
            Gone: the code is unknown, expired, or was used by another key.
            Conflict: the key is another device's.
        """
        try:
            hashed = enrollment.code_hash(enrollment.decode_code(code))
        except enrollment.BadTicket as error:
            raise Invalid(f"code: {error}") from None
        jwk = accept_jwk(given_key)
        self._check_proof(proof, jwk, hashed)
        now = self._clock.now()
        kid = enrollment.thumbprint(jwk)
        # The code says which device it is.
        device, new = await self._registry.redeem(hashed, DeviceKey(DeviceId(""), kid, jwk, now), now)
        return Enrolled(device, kid, new)

    def _check_proof(self, proof: str, jwk: Mapping[str, str], hashed: str) -> None:
        """A proof is a JWS by the new key over the code's hash: whoever sends a key must hold it."""
        if len(proof) > enrollment.MAX_TOKEN_BYTES:
            raise Invalid("proof is too long")
        try:
            header = jwt.get_unverified_header(proof)
            claims = jwt.decode(
                proof,
                public_key(jwk),
                algorithms=[enrollment.ALGORITHM],
                options={"verify_aud": False, "verify_iat": False, "require": ["iat", "code_hash"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise Invalid("proof is not a JWS by the key in public_key") from None
        if header.get("typ") != enrollment.PROOF_TYPE:
            raise Invalid(f"proof is not of typ {enrollment.PROOF_TYPE}")
        if claims["code_hash"] != hashed:
            raise Invalid("proof is for another code")
        iat = claims["iat"]
        now = self._clock.now() // 1_000_000
        # "Not within" rather than "beyond": JSON's NaN is neither.
        if not isinstance(iat, int | float) or not abs(iat - now) <= enrollment.PROOF_LIFE:
            raise Invalid("proof was not made now; check the device's clock")
