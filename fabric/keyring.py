"""The keys that sign for the fabric, a ring for each purpose: published before they sign, and good for a while after.

A ring is a value. What a key is in it follows from the time alone, so that nothing needs to happen, anywhere, at the
moment when one key takes over from another. Times are epoch seconds on the fabric's clock.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import jwt

from fabric.errors import Conflict, Invalid, NotFound
from fabric.identity.keys import accept_jwk
from fabric.signing import Jwk, SigningKey, jwks
from topology import enrollment

CACHED_FOR = 60  # seconds that others may keep the published keys of tokens


class State(StrEnum):
    NEXT = "next"  # published, and not yet signing
    CURRENT = "current"
    RETIRED = "retired"  # what it signed still counts


@dataclass(frozen=True, slots=True)
class RingKey:
    """The public half of a key, and its times. `until` is None for the newest of a ring: nobody knows its end yet."""

    kid: str
    public: Jwk
    made_at: int
    signs_from: int
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Ring:
    """At least one key, in the order in which they sign.

    `version` grows with each change. `announcements` tell those who know the key that was the newest at an earlier
    version what the keys are now (`announced`); the last ones, in their order.
    """

    keys: tuple[RingKey, ...]
    version: int
    announcements: tuple[str, ...] = ()

    @property
    def newest(self) -> RingKey:
        return self.keys[-1]

    def good(self, now: int) -> tuple[RingKey, ...]:
        """The keys whose signatures count."""
        return tuple(key for key in self.keys if key.until is None or now < key.until)

    def current(self, now: int) -> RingKey:
        """The key that signs."""
        begun = [key for key in self.keys if key.signs_from <= now]
        return begun[-1] if begun else self.keys[0]

    def next(self, now: int) -> RingKey | None:
        return self.newest if self.newest is not self.current(now) else None

    def state(self, key: RingKey, now: int) -> State:
        """Of a key that is good."""
        current = self.current(now)
        if key is current:
            return State.CURRENT
        return State.NEXT if self.keys.index(key) > self.keys.index(current) else State.RETIRED


def ring(first: SigningKey, now: int) -> Ring:
    return Ring((RingKey(first.kid, first.public, now, now),), now)


def rotated(before: Ring, made: SigningKey, now: int, lead: int, overlap: int) -> Ring:
    """The ring with a successor of its newest key, which signs in `lead` seconds. What the key before it has signed
    counts for `overlap` seconds after that.

    Raises:
        Conflict: a successor waits already, or the ring is full.
    """
    if before.next(now) is not None:
        raise Conflict("a next key waits already")
    signs_from = now + lead
    kept = [replace(key, until=signs_from + overlap) if key is before.newest else key for key in before.good(now)]
    return _renewed(before, (*kept, RingKey(made.kid, made.public, now, signs_from)), now)


def retired(before: Ring, kid: str, spare: SigningKey, now: int, lead: int) -> Ring:
    """The ring in which nothing counts that the key has signed: from now on, or, if it is the one that signs, from
    the moment in `lead` seconds when its successor does. That is `spare` when there is none yet.

    Raises:
        NotFound: there is no such key, or no more.
        Conflict: the ring is full.
    """
    leaked = next((key for key in before.good(now) if key.kid == kid), None)
    if leaked is None:
        raise NotFound(f"there is no key {kid}")
    keys = list(before.good(now))
    at = keys.index(leaked)
    if leaked is before.newest:
        keys.append(RingKey(spare.kid, spare.public, now, max(leaked.signs_from, now + lead)))
    if leaked is before.current(now):
        begins = min(keys[at + 1].signs_from, now + lead)
        keys[at : at + 2] = [replace(leaked, until=begins), replace(keys[at + 1], signs_from=begins)]
    else:
        del keys[at]
    return _renewed(before, tuple(keys), now)


def announced(before: Ring, after: Ring, signer: SigningKey) -> Ring:
    """The ring `after`, with the news of it: a JWS by the newest key of the ring before, which whoever knew that ring
    believes. Claims: `version`, and `keys`, JWKs with `exp` where their end is known."""
    listed = [{**key.public, **({} if key.until is None else {"exp": key.until})} for key in after.keys]
    if signer.kid != before.newest.kid:
        raise ValueError("an announcement is signed by the newest key of the ring before")
    headers = {"typ": enrollment.KEYS_TYPE, "kid": signer.kid}
    claims = {"version": after.version, "keys": listed}
    news = jwt.encode(claims, signer.private, algorithm=enrollment.ALGORITHM, headers=headers)
    return replace(after, announcements=(*before.announcements, news)[-enrollment.MAX_ANNOUNCEMENTS :])


def encode(given: Ring) -> bytes:
    """The ring as its file holds it; nothing in it is secret."""
    keys = [
        {"kid": key.kid, "made_at": key.made_at, "signs_from": key.signs_from, "until": key.until, "public": key.public}
        for key in given.keys
    ]
    return json.dumps({"version": given.version, "keys": keys, "announcements": given.announcements}, indent=1).encode()


def decode(raw: bytes) -> Ring:
    """Raises `Invalid` for what `encode` does not make."""
    try:
        held = json.loads(raw)
        keys = tuple(_key(each) for each in held["keys"])
        announcements = tuple(held["announcements"])
        version = _time(held["version"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"it is no ring of keys ({type(error).__name__})") from None
    if not keys or keys[-1].until is not None or not all(isinstance(text, str) for text in announcements):
        raise Invalid("it is no ring of keys")
    return Ring(keys, version, announcements)


class Keys:
    """The keys of one purpose as they are now: the ring that was read last, at the present time.

    Args:
        held: the private halves, by kid, as far as this process has them.
        clock: microseconds on the fabric's clock.
    """

    def __init__(self, ring: Ring, held: Mapping[str, SigningKey], clock: Callable[[], int]) -> None:
        self._ring, self._held, self._clock = ring, held, clock

    def replace(self, ring: Ring, held: Mapping[str, SigningKey]) -> None:
        self._ring, self._held = ring, held

    def signing(self) -> SigningKey:
        """The key to sign with now."""
        return self._held[self._ring.current(self._now()).kid]

    def public(self, kid: str) -> Jwk | None:
        """The key of that id, if what it signs counts."""
        return next((key.public for key in self._ring.good(self._now()) if key.kid == kid), None)

    def published(self) -> dict[str, list[Jwk]]:
        """The JWK set of the keys whose signatures count or will."""
        return jwks(*self._ring.good(self._now()))

    def trusted(self) -> dict[str, object]:
        """The same with the ends that are known (`exp`) and the version, for who will follow the announcements."""
        good = self._ring.good(self._now())
        listed = zip(good, jwks(*good)["keys"], strict=True)
        keys = [{**jwk, **({} if key.until is None else {"exp": key.until})} for key, jwk in listed]
        return {"keys": keys, "version": self._ring.version}

    def announcements(self, known: int) -> tuple[str, ...]:
        """What leads from a version that somebody knows to the present one; older news may be among it."""
        return self._ring.announcements if known < self._ring.version else ()

    def _now(self) -> int:
        return self._clock() // 1_000_000


def _renewed(before: Ring, keys: tuple[RingKey, ...], now: int) -> Ring:
    if len(keys) > enrollment.MAX_SIGNING_KEYS:
        raise Conflict(f"the ring holds {enrollment.MAX_SIGNING_KEYS} keys that still count; retire one of them first")
    # The time rather than a count: a ring that is restored from a backup goes on above what it had told before.
    return Ring(keys, max(before.version + 1, now), before.announcements)


def _key(held: Mapping[str, object]) -> RingKey:
    until = held["until"]
    public = held["public"]
    if not isinstance(public, dict):
        raise TypeError
    jwk = accept_jwk(public)
    if held["kid"] != enrollment.thumbprint(jwk):
        raise ValueError
    return RingKey(
        enrollment.thumbprint(jwk),
        jwk,
        _time(held["made_at"]),
        _time(held["signs_from"]),
        None if until is None else _time(until),
    )


def _time(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise TypeError
    return value
