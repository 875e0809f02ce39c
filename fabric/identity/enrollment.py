"""Enrollment: a one-time code against the registration of a public key.

The fabric stores no device secret: codes are kept hashed, and the private key never leaves the device.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.authorities import Pinned
from fabric.clock import Clock
from fabric.errors import Invalid
from fabric.identity import proofs
from fabric.identity.keys import accept_jwk
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
    """`authorities` are what devices are to be pinned to."""

    def __init__(self, registry: Registry, clock: Clock, authorities: Pinned) -> None:
        self._registry, self._clock, self._authorities = registry, clock, authorities

    def invite(self, device: DeviceId) -> tuple[Invitation, EnrollmentCode]:
        """A fresh code for a device: what is shown, and what is kept. Nothing is stored here."""
        code = secrets.token_bytes(enrollment.CODE_BYTES)
        expires = self._clock.now() + CODE_LIFE
        ticket = enrollment.encode_ticket(enrollment.Ticket(code, self._authorities.digest))
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
        proofs.check(proof, jwk, enrollment.PROOF_TYPE, {"code_hash": hashed}, self._clock)
        now = self._clock.now()
        kid = enrollment.thumbprint(jwk)
        # The code says which device it is.
        device, new = await self._registry.redeem(hashed, DeviceKey(DeviceId(""), kid, jwk, now), now)
        return Enrolled(device, kid, new)
