"""What this gateway has open that lasts: streams, waiting requests, bodies on their way, each by its caller's token.

Each looks at its caller's right once a second. When a right was taken away, `Lasting.end` looks at once.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from api.problems import Problem
from fabric.errors import Temporary, Unauthenticated
from topology.names import DeviceId

ENDED_WITHIN = 1.5  # seconds that what has lost its right may take to end

log = logging.getLogger(__name__)

Verify = Callable[[], Awaitable[object]]


@dataclass(eq=False, slots=True)
class _Open:
    """One of them: `lost` tells it that its token is good no more, `ended` is set when it is over."""

    verify: Verify
    lost: Callable[[], None]
    told: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Tell it, once."""
        if not self.told:
            self.told = True
            self.lost()


class Lasting:
    """What is open, by device (None: another caller) and token.

    Args:
        forget: has what was read of tokens believed no more.

    Attributes:
        rounds: how often it was looked at. Whoever was let in before the last round, and is not yet among those that
            are open, has to be looked at again.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._open: defaultdict[tuple[str | None, str], set[_Open]] = defaultdict(set)
        self.rounds = 0

    @property
    def size(self) -> int:
        """How many are open."""
        return sum(map(len, self._open.values()))

    @asynccontextmanager
    async def open(
        self, device: str | None, token: str, let_in: int, verify: Verify, lost: Callable[[], None]
    ) -> AsyncIterator[None]:
        """It is open within this.

        Args:
            let_in: the round in which its token was found good.
            verify: asks whether the token is good; raises when it is not.
            lost: called when it is not; it ends then by itself.
        """
        key, entry = (device, token), _Open(verify, lost)
        self._open[key].add(entry)
        try:
            if let_in != self.rounds:
                await verify()
            yield
        finally:
            self._open[key].discard(entry)
            if not self._open[key]:
                del self._open[key]
            entry.ended.set()

    async def end(self, device: DeviceId | None) -> None:
        """End what is open by a token that is good no more, and return when it has ended; with a device only that by
        its own tokens, else that of all other callers. Each token is asked about once.

        Raises:
            Temporary: it could not be found out, or something has not ended in time.
        """
        self.rounds += 1
        self._forget()
        ending: list[_Open] = []
        for key in [key for key in self._open if key[0] == device]:
            if (entries := self._open.get(key)) and not await _is_good(entries):
                for entry in entries:
                    entry.end()
                ending += entries
        if ending:
            log.info("answers.cut count=%d", len(ending))
        try:
            async with asyncio.timeout(ENDED_WITHIN):
                for entry in ending:
                    await entry.ended.wait()
        except TimeoutError:
            raise Temporary("something that was open has not ended in time") from None


async def _is_good(entries: set[_Open]) -> bool:
    try:
        await next(iter(entries)).verify()
    except (Unauthenticated, Problem):
        return False
    return True
