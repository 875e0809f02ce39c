"""Tokens for callers: signed here, listed, and revocable one by one.

Claims follow RFC 9068 (`typ: at+jwt`). What is kept of a token is its `jti`, never the token.
"""

from dataclasses import dataclass

import jwt

from fabric import ids
from fabric.clock import Clock
from fabric.errors import Invalid, Unauthenticated
from fabric.identity import scopes, tokens
from fabric.identity.scopes import Rights
from fabric.identity.tokens import Claims, Unverified
from fabric.model import IssuedToken
from fabric.ports import Registry
from fabric.signing import SigningKey
from topology import enrollment

LONGEST_LIFE = 366 * 24 * 3600  # seconds
BELIEVED_FOR = 1_000_000  # µs that an answer of the registry about a token is believed
_REMEMBERED = 10_000  # tokens


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks over HTTP, and what they may do. `device` is set when it is a device itself."""

    subject: str
    jti: str
    rights: Rights
    device: str | None = None


class IssuedTokens:
    """Mints and verifies the fabric's own tokens."""

    def __init__(self, registry: Registry, clock: Clock, issuer: str, audience: str, key: SigningKey) -> None:
        self._registry, self._clock = registry, clock
        self.issuer, self._audience, self._key = issuer, audience, key
        self._alive: dict[str, int] = {}
        self._verified: dict[str, Claims] = {}

    async def mint(self, subject: str, granted: tuple[str, ...], life: int) -> tuple[str, IssuedToken]:
        """A new token, to be shown once, and what is kept of it. `life` is seconds.

        Raises:
            Invalid: a scope outside the grammar, or a life outside the bounds.
        """
        unknown = [scope for scope in granted if scope not in scopes.ACTIONS]
        if unknown or not granted or len(granted) > scopes.MAX_SCOPES:
            raise Invalid(f"scopes are 1 to {scopes.MAX_SCOPES} of: {', '.join(sorted(scopes.ACTIONS))}")
        if not 60 <= life <= LONGEST_LIFE:
            raise Invalid(f"a token lives 60 s to {LONGEST_LIFE} s")
        if not 1 <= len(subject) <= 200 or not subject.isascii() or not subject.isprintable():
            raise Invalid("a subject is 1 to 200 printable ASCII characters")
        now = self._clock.now()
        kept = IssuedToken(ids.uuid7(now // 1000), subject, granted, now, now + life * 1_000_000)
        claims = {
            "iss": self.issuer,
            "sub": subject,
            "client_id": subject,
            "aud": self._audience,
            "iat": now // 1_000_000,
            "exp": now // 1_000_000 + life,
            "jti": kept.jti,
            "scope": " ".join(granted),
        }
        headers = {"typ": tokens.ISSUED_TOKEN_TYPE, "kid": self._key.kid}
        await self._registry.add_token(kept)
        return jwt.encode(claims, self._key.private, algorithm=enrollment.ALGORITHM, headers=headers), kept

    async def bearer(self, token: Unverified) -> Caller:
        """Raises `Unauthenticated`."""
        claims = self._verify(token)
        await self._check_alive(claims.jti)
        return Caller(claims.sub, claims.jti, scopes.parse(claims.scope))

    def _verify(self, token: Unverified) -> Claims:
        """Verified once per token: afterwards only its expiry can change the answer."""
        known = self._verified.get(token.token)
        now = self._clock.now() // 1_000_000
        if known is not None and now < known.exp:
            return known
        if token.typ != tokens.ISSUED_TOKEN_TYPE or token.kid != self._key.kid:
            raise Unauthenticated("the token was not signed by this fabric")
        claims = tokens.verify(token, self._key.public, self._audience, LONGEST_LIFE, now)
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[token.token] = claims
        return claims

    async def _check_alive(self, jti: str) -> None:
        now = self._clock.now()
        if now - self._alive.get(jti, 0) < BELIEVED_FOR:
            return
        kept = await self._registry.token(jti)
        if kept is None or kept.revoked_at is not None:
            self._alive.pop(jti, None)
            raise Unauthenticated("the token was revoked")
        if len(self._alive) >= _REMEMBERED:
            self._alive.clear()
        self._alive[jti] = now
