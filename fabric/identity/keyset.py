"""The keys of one external provider as they are kept here: read again before they are old, and when a token names one
that is not among them, but never often, however many ask."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from fabric.command import Micros
from fabric.errors import Invalid, ProviderUnavailable, Unauthenticated
from fabric.identity import jwks
from fabric.identity.jwks import Key
from fabric.ports import KeySource

_SECOND = 1_000_000  # µs
FRESH: Micros = 600 * _SECOND  # after which they are read again, while they go on counting
STALE: Micros = 24 * 3600 * _SECOND  # after which they count no more
PAUSE: Micros = 60 * _SECOND  # between two reads, whoever asks: anybody can name a key that does not exist
FIRST_PAUSE: Micros = 5 * _SECOND  # as long as there are no keys that count

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of the keys. `asked_at` is when they were last asked for, `read_at` when these ones were."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    read_at: Micros | None = None
    asked_at: Micros | None = None

    def counts(self, now: Micros) -> bool:
        return self.read_at is not None and now - self.read_at < STALE

    def key(self, kid: str, now: Micros) -> Key | None:
        return self.keys.get(kid) if self.counts(now) else None

    def is_due(self, kid: str, now: Micros) -> bool:
        """Should the provider be asked, now that somebody asks for this key?"""
        pause = PAUSE if self.counts(now) else FIRST_PAUSE
        if self.asked_at is not None and 0 <= now - self.asked_at < pause:
            return False
        return self.key(kid, now) is None or self.read_at is None or now - self.read_at >= FRESH


class Keys:
    """The keys of one provider.

    Args:
        issuer: for the log.
        now: the time in microseconds.
    """

    def __init__(self, issuer: str, source: KeySource, algorithms: Collection[str], now: Callable[[], Micros]) -> None:
        self._issuer, self._source, self._algorithms, self._now = issuer, source, algorithms, now
        self._held = Held()
        self._reading: asyncio.Task[None] | None = None
        self._failing = False

    async def key(self, kid: str) -> Key:
        """The key of that id. Whoever needs one that is not there waits for the read that is under way, if any.

        Raises:
            Unauthenticated: the provider has no such key.
            ProviderUnavailable: its keys can't be had, and those known, if any, are too old.
        """
        now = self._now()
        if self._reading is None and self._held.is_due(kid, now):
            self._held = replace(self._held, asked_at=now)
            self._reading = asyncio.create_task(self._read(now), name=f"keys of {self._issuer}")
        if (key := self._held.key(kid, now)) is not None:
            return key
        if self._reading is not None:
            await asyncio.wait({self._reading})
        if (key := self._held.key(kid, now)) is not None:
            return key
        if not self._held.counts(now):
            raise ProviderUnavailable(f"the keys of {self._issuer} can't be had")
        raise Unauthenticated("the token's issuer has no key of that 'kid'")

    async def close(self) -> None:
        """Stop reading. Closing twice is closing once."""
        if (reading := self._reading) is not None:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    async def _read(self, asked_at: Micros) -> None:
        try:
            found = jwks.read(await self._source.fetch(), self._algorithms)
        except (ProviderUnavailable, Invalid) as error:
            log.log(
                logging.DEBUG if self._failing else logging.WARNING,
                "provider.unavailable issuer=%s error=%s", self._issuer, error,
            )  # fmt: skip
            self._failing = True
        except Exception:  # whoever waits is refused, and the next one asks again
            log.exception("provider.bug issuer=%s", self._issuer)
        else:
            if found.keys.keys() != self._held.keys.keys() or self._failing:
                log.info("provider.keys issuer=%s keys=%d ignored=%s", self._issuer, len(found.keys), found.ignored)
            self._failing = False
            self._held = Held(found.keys, asked_at, asked_at)
        finally:
            self._reading = None
