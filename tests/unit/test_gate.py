"""Deadlines are announced only when no evidence against them still waits in `reports`."""

import asyncio
from collections.abc import Callable

import pytest

from fabric.errors import BrokerUnavailable
from fabric.worker.gate import BEHIND_AFTER, WAIT_AT_MOST, Gate


class Broker:
    """What the gate sees of it, and the loop's clock, in the test's hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depth: int | None = 0
        self.connected = True
        self.now = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.shed = 0
        self.gate = Gate(self._depth, lambda: self.shed, lambda: self.connected)

    async def _depth(self) -> int | None:
        if not self.connected:
            raise BrokerUnavailable("away")
        return self.depth


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Broker]:
    return lambda: Broker(monkeypatch)


async def test_it_is_closed_until_the_consumer_has_started(make: Callable[[], Broker]) -> None:
    broker = make()
    assert not broker.gate.is_open()
    broker.gate.started(0)
    assert broker.gate.is_open()


async def test_it_opens_when_the_reports_found_are_handled(make: Callable[[], Broker]) -> None:
    broker = make()
    broker.gate.started(2)
    assert not broker.gate.is_open()
    broker.gate.handled()
    assert not broker.gate.is_open()
    broker.gate.handled()
    assert broker.gate.is_open()


async def test_it_closes_when_the_queue_lags_and_opens_when_it_is_read(make: Callable[[], Broker]) -> None:
    broker = make()
    broker.gate.started(0)
    broker.depth = 7
    await broker.gate.look()
    assert broker.gate.is_open(), "a moment's backlog is no lag"
    broker.now += BEHIND_AFTER + 0.1
    await broker.gate.look()
    assert not broker.gate.is_open()
    broker.depth = 0
    await broker.gate.look()
    assert broker.gate.is_open()


async def test_a_lag_that_is_a_throttled_devices_holds_nothing_back(make: Callable[[], Broker]) -> None:
    broker = make()
    broker.gate.started(0)
    broker.depth = 5_000
    for handled, shed, is_open in ((100, 60, True), (100, 90, True), (100, 50, False)):
        await broker.gate.look()
        broker.now += BEHIND_AFTER + 0.1
        broker.shed += shed
        for _ in range(handled):
            broker.gate.handled()
        await broker.gate.look()
        assert broker.gate.is_open() is is_open


async def test_a_lost_connection_closes_it_until_the_consumer_has_started_again(make: Callable[[], Broker]) -> None:
    broker = make()
    broker.gate.started(0)
    broker.connected = False
    assert not broker.gate.is_open()
    with pytest.raises(BrokerUnavailable):
        await broker.gate.look()
    broker.connected = True
    assert not broker.gate.is_open(), "what waits in the queue is not known yet"
    broker.gate.started(1)
    broker.gate.handled()
    assert broker.gate.is_open()


async def test_no_wait_is_for_ever(make: Callable[[], Broker]) -> None:
    broker = make()
    broker.gate.started(1000)
    assert not broker.gate.is_open()
    broker.now += WAIT_AT_MOST
    assert broker.gate.is_open()
