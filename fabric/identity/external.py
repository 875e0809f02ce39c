"""Tokens of external providers: each verified by the one provider that its `iss` is, with a key of that provider."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fabric.clock import Clock
from fabric.command import Micros
from fabric.errors import Unauthenticated
from fabric.identity import providers
from fabric.identity.issued import BELIEVED_FOR, Caller
from fabric.identity.jwks import Key
from fabric.identity.keyset import Keys
from fabric.identity.providers import Provider
from fabric.identity.tokens import Unverified
from fabric.ports import KeySource, Registry

_REMEMBERED = 10_000  # tokens, and identities
_SECOND = 1_000_000  # µs


@dataclass(frozen=True, slots=True)
class _Known:
    """A provider, and the tokens of it that were verified, each with the key."""

    provider: Provider
    keys: Keys
    verified: dict[str, tuple[Key, Caller]] = field(default_factory=dict)


class ExternalTokens:
    """Verifies tokens of external providers."""

    def __init__(self, registry: Registry, clock: Clock, known: Iterable[tuple[Provider, KeySource]]) -> None:
        self._registry, self._clock = registry, clock
        self._known = {
            provider.issuer: _Known(provider, Keys(provider.issuer, source, provider.algorithms, clock.now))
            for provider, source in known
        }
        self._revoked: dict[str, tuple[Micros, Micros | None]] = {}

    @property
    def issuers(self) -> frozenset[str]:
        """Each `iss` of which tokens are verified here."""
        return frozenset(self._known)

    async def bearer(self, token: Unverified) -> Caller:
        """Raises `Unauthenticated`, or `ProviderUnavailable` when the provider's keys can't be had."""
        caller = await self._verify(token)
        not_before = await self._not_before(caller.identity)
        if not_before is not None and caller.issued_at * _SECOND <= not_before:
            raise Unauthenticated("the tokens of this subject were revoked; it needs a new one")
        return caller

    def forget(self) -> None:
        """Believe nothing of what was read of revocations up to now."""
        self._revoked = {}

    async def close(self) -> None:
        """Stop reading keys. Closing twice is closing once."""
        for known in self._known.values():
            await known.keys.close()

    async def _verify(self, token: Unverified) -> Caller:
        """Verified once per token: afterwards only its end and its key's can change the answer."""
        known = self._known[token.iss]
        key = await known.keys.key(token.kid)
        now = self._clock.now() // _SECOND
        verified_with, caller = known.verified.get(token.token, (None, None))
        if caller is not None and verified_with == key and now < caller.ends:
            return caller
        caller = providers.verify(known.provider, token, key, now)
        if len(known.verified) >= _REMEMBERED:
            known.verified.clear()
        known.verified[token.token] = key, caller
        return caller

    async def _not_before(self, identity: str) -> Micros | None:
        now, revoked = self._clock.now(), self._revoked
        read_at, not_before = revoked.get(identity, (0, None))
        if now - read_at < BELIEVED_FOR:
            return not_before
        not_before = await self._registry.not_before(identity)
        if len(revoked) >= _REMEMBERED:
            revoked.clear()
        revoked[identity] = now, not_before  # forgotten with the others, if `forget` was called since it was read
        return not_before
