"""Tokens for callers: signed here, listed, and revocable one by one.

Claims follow RFC 9068 (`typ: at+jwt`). What is kept of a token is its `jti`, never the token.
"""

from dataclasses import dataclass, replace
from typing import Final

import jwt

from fabric import ids
from fabric.clock import Clock
from fabric.errors import Invalid, Unauthenticated
from fabric.identity import scopes, tokens
from fabric.identity.scopes import Rights
from fabric.identity.tokens import Claims, Unverified
from fabric.keyring import Keys
from fabric.model import IssuedToken
from fabric.ports import Registry
from topology import enrollment

LONGEST_LIFE = 366 * 24 * 3600  # seconds
BELIEVED_FOR = 1_000_000  # µs that an answer of the registry about a token is believed
_REMEMBERED = 10_000  # tokens

MARK: Final = "#"
"""Stands between issuer and subject in an identity: neither an issuer (OpenID Connect Core, section 2) nor the subject
of a token of ours has one."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks over HTTP, and what they may do. `device` is set when it is a device itself, `kid` then is the key of
    its token; `issuer` when the token is an external provider's, which may have no `jti`. `issued_at` and `ends`, in
    epoch seconds, are the token's."""

    subject: str
    jti: str | None
    rights: Rights
    device: str | None = None
    kid: str | None = None
    issuer: str | None = None
    issued_at: int = 0
    ends: int = 0

    @property
    def identity(self) -> str:
        """What commands, idempotency keys, cursors and the audit know them by. No two have the same: `mint` gives
        nobody an external one."""
        return self.subject if self.issuer is None else identity(self.issuer, self.subject)


def identity(issuer: str, subject: str) -> str:
    """A subject of an external provider, whose issuer has no `MARK`."""
    return f"{issuer}{MARK}{subject}"


class IssuedTokens:
    """Mints and verifies the fabric's own tokens."""

    def __init__(self, registry: Registry, clock: Clock, issuer: str, audience: str, keys: Keys) -> None:
        self._registry, self._clock = registry, clock
        self.issuer, self._audience, self._keys = issuer, audience, keys
        self._alive: dict[str, int] = {}
        self._verified: dict[str, Claims] = {}

    async def mint(
        self, subject: str, granted: tuple[str, ...], life: int, minter: Caller | None = None
    ) -> tuple[str, IssuedToken]:
        """A new token, to be shown once, and what is kept of it. `life` is seconds; `minter` is whose token it is made
        with, whose rights and end somebody has compared with it.

        Raises:
            Invalid: a scope outside the grammar, more of them than a token holds, or a life outside the bounds.
            Unauthenticated: the minter's token was revoked.
        """
        if not 1 <= len(granted) <= scopes.MAX_SCOPES or None in map(scopes.read, granted):
            raise Invalid(f"scopes are 1 to {scopes.MAX_SCOPES}, each an action, or narrowed to a device or a group")
        if not 60 <= life <= LONGEST_LIFE:
            raise Invalid(f"a token lives 60 s to {LONGEST_LIFE} s")
        if not 1 <= len(subject) <= 200 or not subject.isascii() or not subject.isprintable() or MARK in subject:
            raise Invalid(f"a subject is 1 to 200 printable ASCII characters, and has no '{MARK}'")
        now = self._clock.now()
        kept = IssuedToken(ids.uuid7(now // 1000), subject, granted, now, now + life * 1_000_000)
        if minter is not None and minter.issuer is None:
            kept = replace(kept, parent=minter.jti)
        elif minter is not None:
            kept = replace(kept, minter=minter.identity)
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
        key = self._keys.signing()
        headers = {"typ": tokens.ISSUED_TOKEN_TYPE, "kid": key.kid}
        token = jwt.encode(claims, key.private, algorithm=enrollment.ALGORITHM, headers=headers)
        if len(token) > enrollment.MAX_TOKEN_BYTES:
            raise Invalid(f"the token would have more than {enrollment.MAX_TOKEN_BYTES} bytes; give it fewer scopes")
        await self._registry.add_token(kept, None if minter is None else minter.issued_at * 1_000_000)
        return token, kept

    async def bearer(self, token: Unverified) -> Caller:
        """Raises `Unauthenticated`."""
        claims = self._verify(token)
        await self._check_alive(claims.jti)
        return Caller(claims.sub, claims.jti, scopes.parse(claims.scope), issued_at=claims.iat, ends=claims.exp)

    def forget(self) -> None:
        """Believe nothing of what was read of tokens up to now."""
        self._alive = {}

    def _verify(self, token: Unverified) -> Claims:
        """Verified once per token: afterwards only its expiry and its key's end can change the answer."""
        key = self._keys.public(token.kid)
        if token.typ != tokens.ISSUED_TOKEN_TYPE or key is None:
            raise Unauthenticated("the token was not signed by a key of this fabric, or by one that counts no more")
        known = self._verified.get(token.token)
        now = self._clock.now() // 1_000_000
        if known is not None and now < known.exp:
            return known
        claims = tokens.verify(token, key, self._audience, LONGEST_LIFE, now)
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[token.token] = claims
        return claims

    async def _check_alive(self, jti: str) -> None:
        now, alive = self._clock.now(), self._alive
        if now - alive.get(jti, 0) < BELIEVED_FOR:
            return
        kept = await self._registry.token(jti)
        if kept is None or kept.revoked_at is not None:
            alive.pop(jti, None)
            raise Unauthenticated("the token was revoked")
        if len(alive) >= _REMEMBERED:
            alive.clear()
        alive[jti] = now  # forgotten with the others, if `forget` was called since it was read
