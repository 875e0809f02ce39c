"""Which keys may sign commands for this device: those it got at enrollment, and whatever they announce.

An announcement is a JWS (`restante-keys+jwt`) with the whole list of keys of a higher version, signed by a key of a
list before it. It replaces the list, so it can end keys as well as bring new ones. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.utils import base64url_decode, base64url_encode

from device_agent import errors
from topology import enrollment


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """`exp`: the epoch second from which on it counts no more; None: not known yet."""

    public: ec.EllipticCurvePublicKey
    jwk: Mapping[str, str]
    exp: int | None = None


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys by their thumbprints, as the fabric listed them in this version; 0 is before there were versions."""

    keys: Mapping[str, TrustedKey]
    version: int = 0

    def key(self, kid: str, now_ms: int) -> ec.EllipticCurvePublicKey | None:
        """The key of that id, if it counts at that time of the fabric."""
        found = self.keys.get(kid)
        if found is None or (found.exp is not None and now_ms >= found.exp * 1000):
            return None
        return found.public

    def follow(self, announcements: Sequence[str], now_ms: int) -> "Trust":
        """The trust after these announcements, in their order; what is no news in them is passed over.

        Raises:
            errors.KeysRefused: one is malformed, or not signed by a key that was trusted when it was its turn.
        """
        trust = self
        for text in announcements:
            trust = trust._after(text, now_ms)
        return trust

    def document(self) -> dict[str, object]:
        """What `parse` reads."""
        keys = [{**key.jwk, **({} if key.exp is None else {"exp": key.exp})} for key in self.keys.values()]
        return {"keys": keys, "version": self.version}

    def _after(self, announcement: str, now_ms: int) -> "Trust":
        try:
            header = jwt.get_unverified_header(announcement)
            # Which key it is, the header says; that the claims are that key's is found out below.
            said = jwt.decode(announcement, options={"verify_signature": False})
            news = parse(said)
        except (jwt.PyJWTError, errors.BadAnswer, ValueError, TypeError, RecursionError) as error:
            raise errors.KeysRefused(f"the news of the signing keys can't be read ({error})") from None
        if news.version <= self.version:
            return self
        kid = header.get("kid")
        signer = self.key(kid, now_ms) if isinstance(kid, str) else None
        if signer is None or header.get("typ") != enrollment.KEYS_TYPE:
            raise errors.KeysRefused(
                "the news of the signing keys is not signed by a key that this device trusts: it was away for too many"
                " changes of them, or somebody else made it up. Its commands are refused until it is enrolled again"
            )
        try:
            jwt.decode(announcement, signer, algorithms=[enrollment.ALGORITHM])
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise errors.KeysRefused(f"the signature of the news of the signing keys does not hold ({error})") from None
        return news


def parse(value: object) -> Trust:
    """The trust in a JWK set with `version`.

    Raises:
        errors.BadAnswer: it holds no key, too many, or something else than public P-256 keys.
    """
    listed = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(listed, list):
        raise errors.BadAnswer("'signing_keys' is not a JWK set")
    if not 1 <= len(listed) <= enrollment.MAX_SIGNING_KEYS:
        raise errors.BadAnswer(f"'signing_keys' holds not 1 to {enrollment.MAX_SIGNING_KEYS} keys")
    keys = [_key(jwk) for jwk in listed]
    return Trust(
        {enrollment.thumbprint(dict(key.jwk)): key for key in keys}, _whole(value.get("version", 0), "version")
    )


def _key(jwk: object) -> TrustedKey:
    if not isinstance(jwk, dict) or (jwk.get("kty"), jwk.get("crv")) != ("EC", "P-256"):
        raise errors.BadAnswer("'signing_keys' holds something that is no P-256 public key")
    if "d" in jwk:
        raise errors.BadAnswer("'signing_keys' holds a private key")
    try:
        x, y = (_coordinate(jwk.get(name)) for name in ("x", "y"))
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise errors.BadAnswer("'signing_keys' holds something that is no point of P-256") from error
    exp = jwk.get("exp")
    members = {name: str(jwk[name]) for name in ("crv", "kty", "x", "y")}
    return TrustedKey(public, members, None if exp is None else _whole(exp, "exp"))


def _coordinate(text: Any) -> int:
    if not isinstance(text, str) or not text.isascii():
        raise ValueError("a coordinate is a text")
    raw = base64url_decode(text)
    # Decoding overlooks two spare bits and some characters: a key spelled otherwise would have another thumbprint.
    if len(raw) != 32 or base64url_encode(raw).decode() != text:
        raise ValueError("a coordinate has 32 bytes, in the one spelling that base64url has for them")
    return int.from_bytes(raw, "big")


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise errors.BadAnswer(f"'{what}' of the signing keys is not a whole number from 0 to 2^53")
    return value
