"""The event log as it grows, for everybody in this process who follows it.

One poller looks where the log ends, as long as somebody follows. Each follower reads its own pages, no faster than
its reader takes the events; so what a slow one costs is a page. Positions come from the ledger, not from the broker's
stream, and stay true over restarts of either.
"""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

from fabric import events
from fabric.errors import Temporary
from fabric.events import Filter
from fabric.model import LogRow
from fabric.ports import Ledger

PAGE = 200  # events of one read
LOOK_EVERY = 0.1  # seconds between looks at the log's end
LONGEST_PAUSE = 5.0  # seconds between looks at a ledger that is away
HEARTBEAT = 15.0  # seconds without an event after which a follower's place is told
LAGGING = 10_000  # events behind the end at which a follower is told so
LAGGING_EVERY = 60.0  # seconds between two such

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """An event. Followers of one page share it; its text is made once, when one of them asks for it."""

    row: LogRow

    @cached_property
    def text(self) -> str:
        """Its JSON, one line of ASCII."""
        return json.dumps(events.document(self.row), separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Place:
    """Everything up to this position was looked at."""

    position: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Events up to this position were pruned before they were told; some of them may still follow."""

    through: int


@dataclass(frozen=True, slots=True)
class Lagging:
    """The log's end is so many events ahead."""

    behind: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The follower's place was beyond the end, as after a restored database: it goes on from this one."""

    position: int


Item = Told | Place | Gap | Lagging | Reset


@dataclass(frozen=True, slots=True)
class _Page:
    """The events behind `after`. `seen` is where the log ended before they were read."""

    after: int
    events: tuple[Told, ...]
    pruned: int
    seen: int


class Feed:
    """The followers of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._followers = 0
        self._polling: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # replaced each time it is set
        self._last = 0
        self._away = False
        self._reading = asyncio.Lock()
        self._page: _Page | None = None

    async def follow(self, after: int | None, wanted: Filter) -> AsyncGenerator[Item, None]:
        """Events behind a position as they come, without end; from the present end when there is none given.

        The first item says where it begins. While the ledger is away, it waits and goes on afterwards.

        Raises:
            Temporary: the ledger is away at the start.
        """
        clock = asyncio.get_running_loop().time
        async with self._following() as polling:
            place = await self._ledger.last_position()
            self._last = max(self._last, place)
            if after is None or after <= place:
                place = place if after is None else after
                yield Place(place)
            else:
                yield Reset(place)
            gap, heard, lagging_from = 0, clock(), clock()
            while True:
                page = await self._read(place) if place < self._last else None
                if page is not None:
                    if page.pruned > max(place, gap):
                        gap = page.pruned
                        yield Gap(gap)
                    if self._last - place > LAGGING and clock() >= lagging_from:
                        lagging_from = clock() + LAGGING_EVERY
                        yield Lagging(self._last - place)
                    for event in page.events:
                        place = event.row.position
                        if wanted.passes(event.row):
                            yield event
                            heard = clock()
                    if not page.events:
                        place = max(place, page.seen)
                if self._last < place and (last := await self._reset(place)) is not None:
                    place = last
                    yield Reset(place)
                    heard = clock()
                if clock() >= heard + HEARTBEAT:
                    yield Place(place)
                    heard = clock()
                if self._away or place >= self._last:
                    await self._news(polling, heard + HEARTBEAT)

    @asynccontextmanager
    async def _following(self) -> AsyncIterator["asyncio.Task[None]"]:
        """The poller, which runs from the first follower to the last."""
        self._followers += 1
        if self._polling is None:
            self._last, self._away = 0, False
            self._polling = asyncio.create_task(self._poll(), name="event-log")
        polling = self._polling
        try:
            yield polling
        finally:
            self._followers -= 1
            if not self._followers:
                self._polling = self._page = None
                polling.cancel()
                await asyncio.wait({polling})

    async def _poll(self) -> None:
        looked: int | None = None
        failures = 0
        while True:
            try:
                last = await self._ledger.last_position()
            except Temporary as error:
                failures += 1
                log.log(logging.WARNING if failures == 1 else logging.DEBUG, "feed.failed error=%s", error)
                longest = min(LONGEST_PAUSE, LOOK_EVERY * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(LOOK_EVERY, longest))  # noqa: S311 - jitter
                continue
            if failures:
                log.info("feed.recovered after=%d", failures)
                failures = 0
            moved = last != looked or last < self._last
            self._last = last
            if moved or self._away:
                looked, self._away = last, False
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(LOOK_EVERY)

    async def _news(self, polling: "asyncio.Task[None]", until: float) -> None:
        """Return when the log's end has moved, when the ledger is back, or then."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        if polling.done():
            polling.result()

    async def _read(self, after: int) -> _Page | None:
        """The page behind a position, shared by all who are there; None while the ledger is away."""
        async with self._reading:  # one at a time: other readers of the ledger have more to do
            if self._page is not None and self._page.after == after:
                return self._page
            if self._away:
                return None
            seen = self._last
            try:
                rows = await self._ledger.events(after, PAGE)
                pruned = await self._ledger.pruned_through()  # afterwards: it tells what the page may lack
            except Temporary:
                self._away = True
                return None
            page = _Page(after, tuple(map(Told, rows)), pruned, seen)
            if rows:
                self._page = page
                self._last = max(self._last, rows[-1].position)
            return page

    async def _reset(self, place: int) -> int | None:
        """The log's end, if that is really before a place that was read: the look may be older than the place."""
        try:
            last = await self._ledger.last_position()
        except Temporary:
            return None
        if last >= place:
            return None
        self._page = None  # its positions will be given again
        return last
