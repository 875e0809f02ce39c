"""The sequencer: one owner at a time, positions without gaps."""

import asyncio
from collections.abc import Sequence

from fabric.command import Confirmed
from fabric.model import LogRow
from fabric.sql import Store
from fabric.sql.engine import Database
from fabric.sql.ledger import SqlLedger
from fabric.sql.registry import SqlRegistry
from tests.integration.sql.values import PUMP, SECOND, SUCCEEDED, accept, add_device, change, now


def positions(log: Sequence[LogRow] | None) -> list[int]:
    assert log is not None
    return [row.position for row in log]


async def test_the_log_tells_what_happened_in_order(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    await change(store.ledger, command.id, Confirmed(1), SUCCEEDED, SUCCEEDED, Confirmed(1))
    assert await store.ledger.events(0, 10) == []
    assert await store.ledger.last_position() == 0
    log = await store.ledger.sequence("me", 10 * SECOND, 100)
    assert log is not None
    assert [(row.position, row.kind, row.command) for row in log] == [
        (1, "device.created", None),
        (2, "command.accepted", command.id),
        (3, "command.queued", command.id),
        (4, "command.succeeded", command.id),
        (5, "command.evidence", command.id),
    ]
    document = dict(log[3].document)
    at = document.pop("at")
    assert isinstance(at, str)
    assert at.endswith("Z")
    assert len(at) == 27
    assert document == {
        "id": command.id,
        "device": PUMP,
        "name": "door.close",
        "state": "succeeded",
        "reason": None,
        "late": False,
        "seq": 1,
        "attempt": 1,
        "evidence": "outcome",
        "detail": None,
        "version": 3,
    }
    assert await store.ledger.events(0, 100) == log
    assert await store.ledger.events(3, 1) == log[3:4]
    assert await store.ledger.last_position() == 5


async def test_what_was_not_marked_published_comes_again(store: Store) -> None:
    await add_device(store.registry)
    for _ in range(4):
        await accept(store.ledger)
    assert positions(await store.ledger.sequence("me", 10 * SECOND, 3)) == [1, 2, 3]
    assert positions(await store.ledger.sequence("me", 10 * SECOND, 3)) == [1, 2, 3]
    await store.ledger.sequenced("me", 2)
    assert positions(await store.ledger.sequence("me", 10 * SECOND, 3)) == [3, 4, 5]
    await store.ledger.sequenced("me", 5)
    await store.ledger.sequenced("me", 4)  # an answer that comes late takes nothing back
    await store.ledger.sequenced("me", 99)  # nor can it pass over what has no position yet
    assert positions(await store.ledger.sequence("me", 10 * SECOND, 3)) == []
    await accept(store.ledger)
    assert positions(await store.ledger.sequence("me", 10 * SECOND, 3)) == [6]


async def test_the_lease_has_one_owner(url: str) -> None:
    database = Database(url)
    clock = [now()]
    ledger = SqlLedger(database, lambda: clock[0])
    ledger.start()
    await add_device(SqlRegistry(database, lambda: clock[0]))
    assert positions(await ledger.sequence("a", 10 * SECOND, 10)) == [1]
    assert await ledger.sequence("b", 10 * SECOND, 10) is None
    clock[0] += 9 * SECOND
    assert positions(await ledger.sequence("a", 10 * SECOND, 10)) == [1]  # renewed
    clock[0] += 9 * SECOND
    assert await ledger.sequence("b", 10 * SECOND, 10) is None
    clock[0] += 2 * SECOND
    assert positions(await ledger.sequence("b", 10 * SECOND, 10)) == [1]
    await ledger.sequenced("a", 1)  # without effect
    assert await ledger.sequence("a", 10 * SECOND, 10) is None
    assert positions(await ledger.sequence("b", 10 * SECOND, 10)) == [1]
    await ledger.sequenced("b", 1)
    # An idle owner keeps its lease.
    for _ in range(10):
        clock[0] += 3 * SECOND
        assert positions(await ledger.sequence("b", 10 * SECOND, 10)) == []
        assert await ledger.sequence("a", 10 * SECOND, 10) is None
    await ledger.close()
    await database.close()


async def test_two_owners_that_fight_for_the_lease_leave_no_gap(store: Store, url: str) -> None:
    await add_device(store.registry)
    second = Database(url)
    rival = SqlLedger(second, lambda: now() + 10 * SECOND)  # to whom every lease has run out
    writing = True
    given: dict[int, tuple[object, int]] = {}

    async def sequence(ledger: SqlLedger, owner: str) -> None:
        while writing or await store.ledger.sequence(owner, 0, 7):
            log = await ledger.sequence(owner, 0, 7)
            for row in log or ():
                assert given.setdefault(row.position, (row.command, row.version)) == (row.command, row.version)
            if log:
                await ledger.sequenced(owner, log[-1].position)
            await asyncio.sleep(0)

    async def write() -> None:
        for _ in range(10):
            command = await accept(store.ledger)
            await change(store.ledger, command.id, Confirmed(1))
            await change(store.ledger, command.id, SUCCEEDED)

    owners = [asyncio.create_task(sequence(store.ledger, "a")), asyncio.create_task(sequence(rival, "b"))]
    await asyncio.gather(*(write() for _ in range(8)))
    writing = False
    await asyncio.gather(*owners)
    log = await store.ledger.events(0, 1000)
    assert positions(log) == list(range(1, 1 + 1 + 8 * 10 * 3))
    assert sorted(given) == positions(log)
    versions: dict[object, int] = {}
    for row in log[1:]:
        assert row.version == versions.get(row.command, 0) + 1
        versions[row.command] = row.version
    await second.close()
