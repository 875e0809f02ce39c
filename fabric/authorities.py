"""The authorities that devices are pinned to: the present one, and for a while the one before or after it.

A value, like a ring of signing keys (`fabric.keyring`), and announced like one: the whole list of a higher version,
signed by the authority that was the newest in the list before. Times are epoch seconds on the fabric's clock.
"""

import base64
import binascii
import json
import ssl
from dataclasses import dataclass, replace
from hashlib import sha256

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fabric.errors import Conflict, Invalid
from topology import enrollment


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate in DER. `until`: when nobody is to believe it any more; None: not known yet."""

    der: bytes
    until: int | None = None

    @property
    def id(self) -> str:
        return enrollment.authority_id(self.der)


@dataclass(frozen=True, slots=True)
class Authorities:
    """One, or two of which the second is the successor of the first.

    `version` grows with each change, `before` is the version that it grew from. `announcements` tell those who know an
    earlier list what it is now, the last ones in their order.
    """

    listed: tuple[Authority, ...]
    version: int = 0
    before: int = 0
    announcements: tuple[str, ...] = ()

    @property
    def newest(self) -> Authority:
        return self.listed[-1]

    @property
    def serving(self) -> Authority:
        """The one that issues the servers' certificates, and that a ticket names."""
        return self.newest if self.listed[0].until is not None else self.listed[0]

    @property
    def serving_version(self) -> int:
        """What somebody knows who knows the serving one alone."""
        return self.version if self.serving is self.newest else self.before

    def good(self, now: int) -> tuple[Authority, ...]:
        """Those to believe."""
        return tuple(each for each in self.listed if each.until is None or now < each.until)


def alone(der: bytes) -> Authorities:
    return Authorities((Authority(der),))


def succeeded(present: Authorities, successor: bytes, signer: ec.EllipticCurvePrivateKey, now: int) -> Authorities:
    """The list with a successor, which issues nothing yet; `signer` is the present authority's key.

    Raises:
        Conflict: a successor waits already, or the one before the present is still believed.
        Invalid: the successor can't be announced.
    """
    if len(good := present.good(now)) > 1:
        ends = good[0].until
        raise Conflict(
            "a successor waits already; `restante certs ca switch` has it issue the certificates"
            if ends is None
            else f"devices still believe the authority before the present one, for {ends - now} s"
        )
    return _announced(present, (*good, Authority(successor)), signer, now)


def switched(present: Authorities, signer: ec.EllipticCurvePrivateKey, now: int, overlap: int) -> Authorities:
    """The list in which the successor serves, and the one before it ends in `overlap` seconds; `signer` is the
    successor's key.

    Raises:
        Conflict: there is no successor that waits.
    """
    if present.serving is present.newest:
        raise Conflict("no successor waits; `restante certs ca rotate` makes one")
    return _announced(present, (replace(present.serving, until=now + overlap), present.newest), signer, now)


def encode(given: Authorities) -> bytes:
    """The list as its file holds it; nothing in it is secret."""
    listed = [{"certificate": _base64(each.der), "until": each.until} for each in given.listed]
    held = {"version": given.version, "before": given.before, "authorities": listed}
    return json.dumps({**held, "announcements": given.announcements}, indent=1).encode()


def decode(raw: bytes) -> Authorities:
    """Raises `Invalid` for what `encode` does not make."""
    try:
        held = json.loads(raw)
        listed = tuple(
            Authority(base64.b64decode(each["certificate"], validate=True), _until(each["until"]))
            for each in held["authorities"]
        )
        version, before = int(held["version"]), int(held["before"])
        announcements = tuple(map(str, held["announcements"]))
        for each in listed:
            x509.load_der_x509_certificate(each.der)
    except (ValueError, RecursionError, KeyError, TypeError, binascii.Error) as error:
        raise Invalid(f"it is no list of authorities ({type(error).__name__})") from None
    if not 1 <= len(listed) <= enrollment.MAX_AUTHORITIES or listed[-1].until is not None:
        raise Invalid("it is no list of authorities")
    return Authorities(listed, version, before, announcements)


class Pinned:
    """The authorities as they were read last."""

    def __init__(self, present: Authorities) -> None:
        self.present = present

    def replace(self, present: Authorities) -> None:
        self.present = present

    @property
    def digest(self) -> bytes:
        """What a ticket carries: SHA-256 of the one that issues the servers' certificates."""
        return sha256(self.present.serving.der).digest()

    @property
    def pem(self) -> str:
        """That one."""
        return ssl.DER_cert_to_PEM_cert(self.present.serving.der)

    def announcements(self, known: int) -> tuple[str, ...]:
        """What leads from a version that somebody knows to the present one; older news may be among it."""
        return self.present.announcements if known < self.present.version else ()


def _announced(
    present: Authorities, listed: tuple[Authority, ...], signer: ec.EllipticCurvePrivateKey, now: int
) -> Authorities:
    newest = x509.load_der_x509_certificate(present.newest.der)
    if newest.public_key() != signer.public_key():
        raise ValueError("an announcement is signed by the newest authority of the list before")
    if len(listed[-1].der) > enrollment.MAX_AUTHORITY:
        raise Invalid(
            f"the successor's certificate has {len(listed[-1].der)} bytes, {enrollment.MAX_AUTHORITY} at most"
            " can be announced: it vouches for too many names"
        )
    # The time rather than a count: a list that is restored from a backup goes on above what it had told before.
    version = max(present.version + 1, now)
    told = [
        {"certificate": _base64(each.der), **({} if each.until is None else {"exp": each.until})} for each in listed
    ]
    headers = {"typ": enrollment.AUTHORITIES_TYPE, "kid": present.newest.id}
    claims = {"version": version, "authorities": told}
    news = jwt.encode(claims, signer, algorithm=enrollment.ALGORITHM, headers=headers)
    kept = (*present.announcements, news)[-enrollment.MAX_ANNOUNCEMENTS :]
    return Authorities(listed, version, present.version, kept)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _until(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError
    return value
