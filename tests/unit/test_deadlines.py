"""Deadlines are announced at their time, by few looks, and not while the evidence against them is being read."""

import asyncio
from collections.abc import Callable

import pytest

from fabric.command import DeadlinePassed, ResponseDue, State
from fabric.model import Change
from fabric.ports import Due
from fabric.worker.clocks import BATCH, LOOK_AHEAD, TOGETHER, Deadlines
from topology.names import CommandId

MILLISECOND = 1000


class World:
    """What the clock sees of the ledger, of the gate and of the time, in the test's hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 1_000_000_000
        self.open = True
        self.waiting: list[Due] = []
        self.said: list[tuple[CommandId, type, int]] = []
        self.looks = 0
        monkeypatch.setattr(asyncio, "sleep", self.sleep)
        self.deadlines = Deadlines(self, self, self, self)  # type: ignore[arg-type]  # these are what it uses of all

    def add(self, after: int, state: State = State.QUEUED) -> Due:
        self.waiting.append(Due(CommandId(f"command-{len(self.waiting)}"), state, self.time + after))
        return self.waiting[-1]

    async def sleep(self, seconds: float) -> None:
        self.time += round(seconds * 1_000_000)

    def now(self) -> int:
        return self.time

    def is_open(self) -> bool:
        return self.open

    async def due(self, by: int, limit: int) -> list[Due]:
        self.looks += 1
        self.time += MILLISECOND
        return sorted((each for each in self.waiting if each.at <= by), key=lambda each: each.at)[:limit]

    async def record(self, *changes: Change) -> None:
        self.said += [(each.command, type(each.event), self.time) for each in changes]
        settled = {each.command for each in changes}
        self.waiting = [each for each in self.waiting if each.id not in settled]

    async def run(self, span: int) -> None:
        until = self.time + span
        while self.time < until:
            await self.deadlines.run_once()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    return lambda: World(monkeypatch)


async def test_each_is_announced_at_its_time_and_never_before(make: Callable[[], World]) -> None:
    world = make()
    due = {world.add(after * MILLISECOND).id: world.time + after * MILLISECOND for after in (3000, 700, 705, 1)}
    await world.run(4_000 * MILLISECOND)
    assert {id for id, _, _ in world.said} == set(due)
    assert len(world.said) == len(due)
    late = [at - due[id] for id, _, at in world.said]
    assert min(late) >= 0
    assert max(late) <= TOGETHER * 1_000_000 + 3 * MILLISECOND
    assert world.looks <= 4_000 * MILLISECOND // LOOK_AHEAD + 2 * len(due)


async def test_what_was_overdue_when_it_was_written_waits_for_the_next_look(make: Callable[[], World]) -> None:
    world = make()
    await world.deadlines.run_once()
    world.add(-MILLISECOND)
    await world.deadlines.run_once()
    assert len(world.said) == 1
    assert world.looks == 2


async def test_what_is_due_is_said_by_the_state(make: Callable[[], World]) -> None:
    world = make()
    for state in (State.ACCEPTED, State.QUEUED, State.DELIVERED, State.RUNNING):
        world.add(0, state)
    await world.deadlines.run_once()
    assert [kind for _, kind, _ in world.said] == [DeadlinePassed, DeadlinePassed, ResponseDue, ResponseDue]


async def test_nothing_is_said_and_nothing_looked_for_while_the_gate_is_closed(make: Callable[[], World]) -> None:
    world = make()
    world.add(0)
    world.open = False
    await world.run(2_000 * MILLISECOND)
    assert (world.said, world.looks) == ([], 0)
    world.open = True
    await world.deadlines.run_once()
    assert len(world.said) == 1


async def test_a_full_batch_is_followed_at_once_by_the_next(make: Callable[[], World]) -> None:
    world = make()
    for _ in range(BATCH + 1):
        world.add(0)
    assert await world.deadlines.run_once() is True
    assert await world.deadlines.run_once() is False
    assert len(world.said) == BATCH + 1
