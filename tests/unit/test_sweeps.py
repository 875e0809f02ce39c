"""Closures are swept until nothing can be in its handshake any more, each whatever becomes of the others."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from fabric.errors import BrokerUnavailable
from fabric.worker.closing import HANDS, Closures
from topology.names import DeviceId

SILENT, OTHER = DeviceId("silent"), DeviceId("other")


class World:
    """What the sweeps see of the ledger and of the broker, and the loop's clock, in the test's hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: dict[int, DeviceId] = {}
        self.silent: set[DeviceId] = set()
        self.swept: Counter[DeviceId] = Counter()
        self.now = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.sweeps = Closures(self, self)  # type: ignore[arg-type]  # these are what it uses of both

    async def closures(self, limit: int) -> list[tuple[int, DeviceId]]:
        return list(self.queued.items())[:limit]

    async def closed(self, ids: Sequence[int]) -> None:
        for id in ids:
            del self.queued[id]

    async def close_connections(self, username: str) -> int:
        if username in self.silent:
            raise BrokerUnavailable("it does not answer")
        self.swept[DeviceId(username)] += 1
        return 0


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    return lambda: World(monkeypatch)


async def test_each_is_swept_at_its_times_and_then_forgotten(make: Callable[[], World]) -> None:
    world = make()
    world.queued = {1: OTHER}
    began = world.now
    for after, sweeps in ((0.0, 0), (0.5, 1), (1.4, 1), (1.5, 2), (10.4, 2), (10.5, 3)):
        world.now = began + after
        await world.sweeps.run_once()
        assert (world.swept[OTHER], 1 in world.queued) == (sweeps, sweeps < 3)


async def test_one_that_can_not_be_closed_holds_up_no_other(make: Callable[[], World]) -> None:
    world = make()
    world.silent = {SILENT}
    world.queued = {**dict.fromkeys(range(HANDS), SILENT), HANDS: OTHER}
    await world.sweeps.run_once()
    for sweeps, seconds in enumerate((0.5, 1.0, 9.0), 1):
        world.now += seconds
        with pytest.raises(BrokerUnavailable):
            await world.sweeps.run_once()
        assert world.swept == {OTHER: sweeps}
    assert set(world.queued.values()) == {SILENT}, "it is tried on"
    world.silent.clear()
    await world.sweeps.run_once()
    assert world.swept[SILENT] == HANDS


async def test_what_is_taken_back_is_swept_no_more(make: Callable[[], World]) -> None:
    world = make()
    world.queued = {1: OTHER}
    await world.sweeps.run_once()
    world.now += 0.5
    await world.sweeps.run_once()
    world.queued.clear()
    world.now += 1.0
    await world.sweeps.run_once()
    assert world.swept == {OTHER: 1}
