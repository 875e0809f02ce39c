"""Followers of the event log: everything once and in order, each at its own pace, whatever happens to the log."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import pytest

from fabric import feed
from fabric.command import Confirmed
from fabric.errors import LedgerUnavailable
from fabric.events import Filter
from fabric.feed import Feed, Gap, Item, Lagging, Place, Reset, Told
from fabric.model import DomainEvent, LogRow
from fabric.sql import Store
from tests.integration.sql.values import PUMP, SUCCEEDED, accept, add_device, all_events, change, execute, now
from topology.names import DeviceId

GATE = DeviceId("gate-1")
ALL = Filter()


class Watched:
    """The real ledger; keeps what was read of it, and can be away."""

    def __init__(self, store: Store) -> None:
        self._ledger = store.ledger
        self.reads: list[int] = []
        self.looks = 0
        self.away = False
        self._looked = asyncio.Condition()

    async def events(self, after: int, limit: int) -> list[LogRow]:
        self._check()
        self.reads.append(after)
        return await self._ledger.events(after, limit)

    async def last_position(self) -> int:
        self._check()
        found = await self._ledger.last_position()
        async with self._looked:
            self.looks += 1
            self._looked.notify_all()
        return found

    async def pruned_through(self) -> int:
        self._check()
        return await self._ledger.pruned_through()

    async def look(self) -> None:
        """Wait until the poller has looked at everything that there is now."""
        looks = self.looks
        async with asyncio.timeout(20):
            async with self._looked:
                await self._looked.wait_for(lambda: self.looks > looks + 1)

    def _check(self) -> None:
        if self.away:
            raise LedgerUnavailable("away, as the test wants it")


@pytest.fixture
async def watched(store: Store) -> Watched:
    await add_device(store.registry)
    await add_device(store.registry, GATE)
    await all_events(store.ledger)
    return Watched(store)


@pytest.fixture
def followed(watched: Watched) -> Feed:
    return Feed(cast("Any", watched))


async def throttle(store: Store, count: int, device: DeviceId = PUMP) -> None:
    """So many events of a device."""
    for _ in range(count):
        await store.registry.record(DomainEvent("device.throttled", device, now()))
    await all_events(store.ledger)


async def take(items: AsyncGenerator[Item, None], count: int) -> list[Item]:
    async with asyncio.timeout(20):
        return [await anext(items) for _ in range(count)]


def positions(items: Sequence[Item]) -> list[int]:
    return [item.row.position for item in items if isinstance(item, Told)]


async def test_without_a_place_it_begins_at_the_end_and_goes_on(store: Store, followed: Feed) -> None:
    async with aclosing(followed.follow(None, ALL)) as items:
        assert await take(items, 1) == [Place(2)]
        command = await accept(store.ledger)
        await change(store.ledger, command.id, Confirmed(1), SUCCEEDED)
        await all_events(store.ledger)
        told = await take(items, 3)
        assert positions(told) == [3, 4, 5]
    async with aclosing(followed.follow(3, ALL)) as items:
        assert await take(items, 1) == [Place(3)]
        assert positions(await take(items, 2)) == [4, 5]
        await throttle(store, 1)
        assert positions(await take(items, 1)) == [6]


async def test_followers_get_what_they_asked_for_in_order_and_share_the_reading(
    store: Store, followed: Feed, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT", 0.5)
    asked = {
        "all": ALL,
        "pump": Filter(devices=frozenset({PUMP})),
        "garage": Filter(groups=frozenset({"garage", "north"})),
        "nobody": Filter(groups=frozenset({"north"})),
        "commands": Filter(devices=frozenset({GATE}), kinds=frozenset({"command.*"})),
        "two kinds": Filter(kinds=frozenset({"device.throttled", "command.queued"})),
        "no prefix": Filter(kinds=frozenset({"command", "dev.*"})),
    }
    last = 2 + 5 * 4

    async def follow(wanted: Filter) -> list[tuple[int, str, str]]:
        found = []
        async with aclosing(followed.follow(2, wanted)) as items:
            async for item in items:
                if isinstance(item, Told):
                    found.append((item.row.position, item.row.kind, item.row.device))
                if (item.row.position if isinstance(item, Told) else cast("Place", item).position) >= last:
                    break
        return found

    tasks = {name: asyncio.create_task(follow(wanted)) for name, wanted in asked.items()}
    for _ in range(5):
        command = await accept(store.ledger)
        await change(store.ledger, command.id, Confirmed(1), SUCCEEDED)
        await throttle(store, 1, GATE)
    async with asyncio.timeout(20):
        got = {name: await task for name, task in tasks.items()}
    assert [position for position, _, _ in got["all"]] == list(range(3, last + 1))
    assert got["pump"] == [each for each in got["all"] if each[2] == PUMP]
    assert got["garage"] == got["all"]
    assert got["nobody"] == got["commands"] == got["no prefix"] == []
    assert got["two kinds"] == [each for each in got["all"] if each[1] in ("device.throttled", "command.queued")]
    assert len(watched.reads) < 2 * len(set(watched.reads)) + len(asked), "they share what is read"


async def test_a_slow_reader_costs_a_page_and_is_told(
    store: Store, followed: Feed, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PAGE", 20)
    monkeypatch.setattr(feed, "LAGGING", 50)
    async with aclosing(followed.follow(None, ALL)) as items:
        assert await take(items, 1) == [Place(2)]
        await throttle(store, 100)
        await watched.look()
        assert await take(items, 1) == [Lagging(100)]
        told = await take(items, 1)
        for _ in range(3):
            await watched.look()
        assert watched.reads == [2], "nothing more is read until its reader takes more"
        told += await take(items, 99)
        assert positions(told) == list(range(3, 103)), "it is told once a minute at most"
        assert watched.reads == [2, 22, 42, 62, 82]


async def test_what_was_pruned_before_it_was_told_is_a_gap(store: Store, followed: Feed, url: str) -> None:
    await throttle(store, 5)
    execute(
        url,
        "DELETE FROM events WHERE position <= 4 AND position > 2",
        "INSERT INTO meta (name, value) VALUES ('pruned_through', '4')",
    )
    async with aclosing(followed.follow(0, ALL)) as items:
        told = await take(items, 7)
    assert told[:2] == [Place(0), Gap(4)]
    assert positions(told) == [1, 2, 5, 6, 7]
    async with aclosing(followed.follow(4, ALL)) as items:
        assert positions(await take(items, 4)) == [5, 6, 7]
    execute(url, "DELETE FROM events", "UPDATE meta SET value = '7' WHERE name = 'pruned_through'")
    async with aclosing(followed.follow(5, ALL)) as items:
        assert await take(items, 2) == [Place(5), Gap(7)]
        await throttle(store, 1)
        assert positions(await take(items, 1)) == [8]


async def test_a_place_beyond_the_end_is_reset(store: Store, followed: Feed, watched: Watched, url: str) -> None:
    async with aclosing(followed.follow(99, ALL)) as items:
        assert await take(items, 1) == [Reset(2)]
        await throttle(store, 3)
        assert positions(await take(items, 3)) == [3, 4, 5]
        await watched.look()
        # The database is restored under its feet.
        execute(
            url,
            "DELETE FROM events WHERE position > 2",
            "UPDATE leases SET position = 2, published = 2",
        )
        assert await take(items, 1) == [Reset(2)]
        await throttle(store, 1)
        assert positions(await take(items, 1)) == [3]


async def test_a_ledger_that_was_away_loses_nothing(
    store: Store, followed: Feed, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LONGEST_PAUSE", 0.3)
    monkeypatch.setattr(feed, "HEARTBEAT", 0.5)
    async with aclosing(followed.follow(None, ALL)) as items:
        await take(items, 1)
        await throttle(store, 1)
        assert positions(await take(items, 1)) == [3]
        watched.away = True
        await throttle(store, 2)
        assert await take(items, 2) == [Place(3), Place(3)]
        watched.away = False
        assert positions(await take(items, 2)) == [4, 5]
    watched.away = True
    with pytest.raises(LedgerUnavailable):
        await anext(followed.follow(None, ALL))


async def test_the_place_of_a_filtered_reader_moves_on(
    store: Store, followed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT", 0.3)
    async with aclosing(followed.follow(None, Filter(devices=frozenset({GATE})))) as items:
        assert await take(items, 2) == [Place(2), Place(2)]
        await throttle(store, 5)
        async with asyncio.timeout(10):
            assert [item async for item in until(items, Place(7))] == [Place(7)]
        await throttle(store, 1, GATE)
        async with asyncio.timeout(10):
            assert positions([item async for item in until(items, None)]) == [8]


async def until(items: AsyncGenerator[Item, None], wanted: Item | None) -> AsyncIterator[Item]:
    """The first item that is wanted, or the first event."""
    async for item in items:
        if item == wanted or (wanted is None and isinstance(item, Told)):
            yield item
            return


async def test_nobody_looks_when_nobody_follows(followed: Feed, watched: Watched) -> None:
    for _ in range(2):
        one, other = followed.follow(None, ALL), followed.follow(None, ALL)
        await take(one, 1)
        await take(other, 1)
        await one.aclose()
        await watched.look()
        await other.aclose()
        looks = watched.looks
        await asyncio.sleep(3 * feed.LOOK_EVERY)
        assert watched.looks == looks
