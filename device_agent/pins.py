"""Which authorities vouch for this device's service: the one from its ticket, and whatever that announces.

An announcement is a JWS (`restante-authorities+jwt`) with the whole list of authorities of a higher version, two at
most, signed by the newest of the list before it. It replaces the list: it brings a successor, and ends who went
before. Pure.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_agent import errors
from topology import enrollment


@dataclass(frozen=True, slots=True)
class Pin:
    """An authority. `exp`: the epoch second from which on it counts no more; None: not known yet."""

    certificate: x509.Certificate
    exp: int | None = None

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def digest(self) -> bytes:
        """What a ticket carries of it."""
        return self.certificate.fingerprint(hashes.SHA256())

    def counts(self, now_ms: int) -> bool:
        return self.exp is None or now_ms < self.exp * 1000


@dataclass(frozen=True, slots=True)
class Pins:
    """The authorities, the newest last, as the fabric listed them in this version; 0 is before there were versions."""

    pins: tuple[Pin, ...]
    version: int = 0

    def pem(self, now_ms: int) -> str:
        """The certificates of those that count at that time; the newest always does."""
        good = [pin for pin in self.pins if pin is self.pins[-1] or pin.counts(now_ms)]
        return "".join(pin.certificate.public_bytes(serialization.Encoding.PEM).decode("ascii") for pin in good)

    def follow(self, announcements: Sequence[str], now_ms: int) -> "Pins":
        """The pins after these announcements, in their order; what is no news in them is passed over.

        Raises:
            errors.AuthoritiesRefused: one is malformed, or not signed by the newest authority when it was its turn.
        """
        if len(announcements) > enrollment.MAX_ANNOUNCEMENTS:
            raise errors.AuthoritiesRefused("the news of the authorities is more than there can be")
        pins = self
        for text in announcements:
            pins = pins._after(text, now_ms)
        return pins

    def document(self) -> dict[str, object]:
        """What `parse` reads."""
        told = [
            {"certificate": base64.b64encode(pin.der).decode(), **({} if pin.exp is None else {"exp": pin.exp})}
            for pin in self.pins
        ]
        return {"authorities": told, "version": self.version}

    def _after(self, announcement: str, now_ms: int) -> "Pins":
        header, news = _read(announcement)
        if news.version <= self.version:
            return self
        newest = self.pins[-1]
        key = newest.certificate.public_key()
        if header != {
            "alg": enrollment.ALGORITHM,
            "typ": enrollment.AUTHORITIES_TYPE,
            "kid": enrollment.authority_id(newest.der),
        } or not isinstance(key, ec.EllipticCurvePublicKey):
            raise errors.AuthoritiesRefused(
                "the news of the authorities is not signed by the one that this device trusts: it was away for too many"
                " changes of them, or somebody else made it up. The device stays with the authority that it has"
            )
        if now_ms > newest.certificate.not_valid_after_utc.timestamp() * 1000:
            raise errors.AuthoritiesRefused("the news of the authorities is signed by one whose certificate has ended")
        try:
            jwt.decode(announcement, key, algorithms=[enrollment.ALGORITHM])
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise errors.AuthoritiesRefused(
                f"the signature of the news of the authorities does not hold ({error})"
            ) from None
        return news


def one(pem: str) -> Pins:
    """The pins of who trusts this authority alone.

    Raises:
        errors.BadAnswer: it is not exactly one certificate in PEM form.
    """
    try:
        (found,) = x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        raise errors.BadAnswer(
            "the service's authority is not exactly one certificate in PEM form; check the address"
        ) from None
    return Pins((Pin(found),))


def named(digest: bytes, announcements: Sequence[str]) -> Pins | None:
    """The pins of who trusts the authority with this SHA-256 alone, if it is in one of these lists. What else is in
    them is not believed.

    Raises:
        errors.AuthoritiesRefused: one can't be read.
    """
    found = (pin for pin in _told(announcements) if pin.digest == digest)
    first = next(found, None)
    return None if first is None else Pins((Pin(first.certificate),))


def parse(value: object) -> Pins:
    """The pins in a list with `version`.

    Raises:
        errors.BadAnswer: it holds no certificate of an authority, too many, or something else.
    """
    listed = value.get("authorities") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(listed, list):
        raise errors.BadAnswer("'authorities' is not a list")
    if not 1 <= len(listed) <= enrollment.MAX_AUTHORITIES:
        raise errors.BadAnswer(f"'authorities' holds not 1 to {enrollment.MAX_AUTHORITIES} certificates")
    return Pins(tuple(_pin(each) for each in listed), _whole(value.get("version"), "version"))


def _told(announcements: Sequence[str]) -> Iterator[Pin]:
    for text in announcements[: enrollment.MAX_ANNOUNCEMENTS]:
        yield from _read(text)[1].pins


def _read(announcement: str) -> tuple[dict[str, object], Pins]:
    """What an announcement says, whoever signed it; a successor in it is an authority, and not too large."""
    if len(announcement) > enrollment.MAX_AUTHORITIES_NEWS:
        raise errors.AuthoritiesRefused(
            f"the news of the authorities has more than {enrollment.MAX_AUTHORITIES_NEWS} characters"
        )
    try:
        header = jwt.get_unverified_header(announcement)
        # Which authority it is, the header says; that the claims are that authority's is found out by the caller.
        news = parse(jwt.decode(announcement, options={"verify_signature": False}))
        _check(news.pins[-1])
    except (jwt.PyJWTError, errors.BadAnswer, ValueError, TypeError, RecursionError) as error:
        raise errors.AuthoritiesRefused(f"the news of the authorities can't be read ({error})") from None
    return header, news


def _check(newest: Pin) -> None:
    try:
        basic = newest.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise errors.BadAnswer("the newest certificate is not that of an authority") from None
    if not basic.ca or newest.exp is not None:
        raise errors.BadAnswer("the newest certificate is not that of an authority, or has an end")


def _pin(told: object) -> Pin:
    text = told.get("certificate") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(text, str):
        raise errors.BadAnswer("'authorities' holds something that is no certificate")
    try:
        certificate = x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise errors.BadAnswer("'authorities' holds something that is no certificate") from error
    exp = told.get("exp")
    return Pin(certificate, None if exp is None else _whole(exp, "exp"))


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise errors.BadAnswer(f"'{what}' of the authorities is not a whole number from 0 to 2^53")
    return value
