"""The enrollment ticket and the constants of tokens that both ends must agree on.

A ticket is the one string a person copies: base32(code[16] ‖ SHA-256(authority's DER)), without padding.
It both proves the right to enroll and pins the authority, so there is no way to enroll with one of them.
"""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass

CODE_BYTES = 16
_DIGEST_BYTES = 32
_TICKET_BYTES = CODE_BYTES + _DIGEST_BYTES

DEVICE_TOKEN_TYPE = "restante-device+jwt"  # noqa: S105 - a media type, not a secret
PROOF_TYPE = "restante-enroll+jwt"
KEY_PROOF_TYPE = "restante-key+jwt"
KEYS_TYPE = "restante-keys+jwt"
AUTHORITIES_TYPE = "restante-authorities+jwt"
ALGORITHM = "ES256"

MAX_TOKEN_BYTES = 3 * 1024  # of a password or bearer token: it must fit AMQP's login frame
AMQP_TOKEN_LIFE = 120  # seconds at most
HTTP_TOKEN_LIFE = 600  # seconds at most
CLOCK_LEEWAY = 60  # seconds
PROOF_LIFE = 300  # seconds either way that a proof's `iat` may differ
MAX_SIGNING_KEYS = 16  # of the fabric, for one purpose, that count at once
MAX_ANNOUNCEMENTS = 8  # of changes of the keys that sign commands; a device that missed more is enrolled again
MAX_ANNOUNCEMENT = 4 * 1024  # characters: as many keys as may be, in a JWS
MAX_AUTHORITIES = 2  # that a device is pinned to: the present one, and the one before or after it
MAX_AUTHORITY = 1536  # bytes of a certificate in DER that can be announced
MAX_AUTHORITIES_NEWS = 6 * 1024  # characters: two of these in a JWS


_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


class BadTicket(ValueError):
    """Not a ticket; the text says why. The text never contains the ticket."""


@dataclass(frozen=True, slots=True)
class Ticket:
    code: bytes
    authority_digest: bytes


def encode_ticket(ticket: Ticket) -> str:
    return _base32(ticket.code + ticket.authority_digest)


def decode_ticket(text: str) -> Ticket:
    """The ticket a person pasted; case and surrounding or inner white space don't matter.

    Raises:
        BadTicket: not base32, or not of a ticket's length.
    """
    compact = "".join(text.split()).upper()
    try:
        raw = base64.b32decode(compact + "=" * (-len(compact) % 8))
    except (binascii.Error, ValueError):
        raise BadTicket("the ticket is not base32 text; copy it whole, as it was shown") from None
    if len(raw) != _TICKET_BYTES:
        raise BadTicket(f"the ticket has {len(raw)} bytes instead of {_TICKET_BYTES}; copy it whole, as it was shown")
    return Ticket(raw[:CODE_BYTES], raw[CODE_BYTES:])


def encode_code(code: bytes) -> str:
    """The code as it is sent to `POST /v1/enroll`."""
    return _base32(code)


def decode_code(text: str) -> bytes:
    """Raises `BadTicket`."""
    try:
        code = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raise BadTicket("the code is not base32 text") from None
    if len(code) != CODE_BYTES:
        raise BadTicket(f"the code does not have {CODE_BYTES} bytes")
    return code


def code_hash(code: bytes) -> str:
    """base64url(SHA-256(code)): what a proof carries, and what the ledger keeps instead of the code."""
    return base64.urlsafe_b64encode(hashlib.sha256(code).digest()).rstrip(b"=").decode()


def mq_audience(fabric: str, cell: str) -> str:
    return f"{fabric}/mq/{cell}"


def api_audience(fabric: str) -> str:
    return f"{fabric}/api"


def issuer(fabric: str) -> str:
    """The `iss` of tokens that the fabric signs; its colons keep it apart from every device id."""
    return f"urn:restante:{fabric}"


def thumbprint(jwk: dict[str, str]) -> str:
    """RFC 7638 thumbprint of a P-256 public key given as JWK members `crv`, `kty`, `x`, `y`."""
    members = {name: jwk[name] for name in ("crv", "kty", "x", "y")}  # in the order of the RFC
    canonical = json.dumps(members, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()


def authority_id(der: bytes) -> str:
    """base64url(SHA-256(certificate's DER)): how an announcement names the authority that signs it."""
    return base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()


def is_thumbprint(text: str) -> bool:
    """Is it of the form that `thumbprint` gives?"""
    return _THUMBPRINT.fullmatch(text) is not None


def _base32(raw: bytes) -> str:
    return base64.b32encode(raw).rstrip(b"=").decode()
