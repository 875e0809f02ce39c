"""The sequencer: one owner at a time, positions without gaps."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fabric import events, presenting
from fabric.command import Confirmed, Receipted, ResponseDue, State
from fabric.model import DomainEvent, LogRow
from fabric.sql import Store
from fabric.sql.engine import Database
from fabric.sql.ledger import SqlLedger
from fabric.sql.registry import SqlRegistry
from fabric.sql.revocations import SqlRevocations
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    SECOND,
    SUCCEEDED,
    accept,
    add_device,
    all_events,
    change,
    draft,
    execute,
    now,
)
from topology.names import DeviceId


def id_of(row: LogRow) -> str | None:
    return row.command and row.command.id


def positions(log: Sequence[LogRow]) -> list[int]:
    return [row.position for row in log]


async def test_the_log_tells_what_happened_in_order(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    await change(store.ledger, command.id, Confirmed(1), SUCCEEDED, SUCCEEDED, Confirmed(1))
    assert await store.ledger.events(0, 10) == []
    assert await store.ledger.last_position() == 0
    assert await store.ledger.sequence("me", 10 * SECOND, 100) == 5
    log = await store.ledger.unpublished("me", 100)
    assert [(row.position, row.kind, id_of(row)) for row in log] == [
        (1, "device.created", None),
        (2, "command.accepted", command.id),
        (3, "command.queued", command.id),
        (4, "command.succeeded", command.id),
        (5, "command.evidence", command.id),
    ]
    assert await store.ledger.events(0, 100) == log
    assert await store.ledger.events(3, 1) == log[3:4]
    assert await store.ledger.last_position() == 5


async def test_an_event_shows_the_command_as_it_was_then(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    await change(store.ledger, command.id, Confirmed(1))
    await change(store.ledger, command.id, Receipted(AGENT, running=True, progress="half"), ResponseDue())
    await change(store.ledger, command.id, SUCCEEDED, replace(SUCCEEDED, status=State.FAILED))
    await all_events(store.ledger)
    shown = [events.document(row) for row in await store.ledger.events(1, 100)]
    assert [
        (event["kind"], event["version"], event["evidence"], event["detail"], event["changed"]) for event in shown
    ] == [
        ("command.accepted", 1, "ledger", None, True),
        ("command.queued", 2, "confirm", None, True),
        ("command.running", 3, "receipt", "half", True),
        ("command.unanswered", 4, "clock", None, True),
        ("command.succeeded", 5, "outcome", None, True),
        ("command.evidence", 6, "outcome", "conflict logged: failed", False),
    ]
    then: list[Any] = [event["command"] for event in shown]
    states = ["accepted", "queued", "running", "unanswered", "succeeded"]
    assert [document["state"] for document in then] == [*states, "succeeded"]
    assert [document["reason"] for document in then] == [None, None, None, "no-outcome", None, None]
    assert [document["late"] for document in then] == [False] * 4 + [True] * 2
    assert [document["outcome"] for document in then[:4]] == [None] * 4
    assert [document["settled_at"] for document in then] == [None] * 3 + [shown[3]["at"]] + [shown[4]["at"]] * 2
    for number, document in enumerate(then[:5], 1):
        assert [row["state"] for row in document["timeline"]] == states[:number]
        assert document["timeline"][-1]["at"] == shown[number - 1]["at"]
    found = await store.ledger.command(command.id)
    assert found is not None
    assert then[5] == presenting.command(*found, brief=True)
    assert all((event["device"], event["groups"]) == (PUMP, ["garage"]) for event in shown)


async def test_large_bodies_are_links_in_events_and_are_not_read(store: Store) -> None:
    await add_device(store.registry)
    for size in (presenting.LARGE, presenting.LARGE + 1):
        body = json.dumps("x" * (size - 2)).encode()
        command = await accept(store.ledger, draft(body=body))
        await change(store.ledger, command.id, replace(SUCCEEDED, body=body))
    await all_events(store.ledger)
    _, _, within, _, beyond = await store.ledger.events(0, 100)
    told: list[Any] = [events.document(row)["command"] for row in (within, beyond)]
    assert told[0]["args"] == told[0]["outcome"]["result"] == "x" * (presenting.LARGE - 2)
    assert told[1]["args"] == told[1]["outcome"]["result"] == {"href": f"/v1/commands/{told[1]['id']}"}
    assert beyond.command is not None
    assert len(beyond.command.body) == presenting.LARGE + 1


async def test_an_event_of_a_device_tells_its_detail(store: Store) -> None:
    await add_device(store.registry)
    await all_events(store.ledger)
    (row,) = await store.ledger.events(0, 10)
    shown = events.document(row)
    at = shown.pop("at")
    assert isinstance(at, str)
    assert at.endswith("Z")
    assert shown == {
        "position": 1,
        "kind": "device.created",
        "version": 1,
        "device": PUMP,
        "groups": ["garage"],
        "evidence": None,
        "detail": {"groups": ["garage"], "labels": {"floor": "2"}, "generation": 1},
        "changed": None,
        "command": None,
    }


async def test_a_deleted_device_keeps_its_last_groups(store: Store) -> None:
    device = await add_device(store.registry)
    command = await accept(store.ledger)
    await store.registry.record(DomainEvent("device.throttled", DeviceId("nobody"), now()))
    await store.registry.update_device(replace(device, groups=("gate", "north")), None)
    await store.registry.delete_device(PUMP, None, now())
    await all_events(store.ledger)
    log = await store.ledger.events(0, 100)
    assert [(row.kind, row.groups) for row in log] == [
        ("device.created", ("gate", "north")),
        ("command.accepted", ("gate", "north")),
        ("device.throttled", ()),
        ("device.updated", ("gate", "north")),
        ("command.undeliverable", ("gate", "north")),
        ("device.deleted", ("gate", "north")),
    ]
    assert log[4].command is not None
    assert log[4].command.id == command.id
    await add_device(store.registry)
    assert {row.groups for row in await store.ledger.events(0, 100)} == {("garage",), ()}


async def test_what_was_pruned_is_left_out_and_counted(store: Store, url: str) -> None:
    await add_device(store.registry)
    gone = await accept(store.ledger)
    kept = await accept(store.ledger)
    await change(store.ledger, gone.id, Confirmed(1))
    await all_events(store.ledger)
    assert await store.ledger.pruned_through() == 0
    execute(
        url,
        f"DELETE FROM events WHERE command = '{gone.id}'",
        f"DELETE FROM commands WHERE id = '{gone.id}'",
        "INSERT INTO meta (name, value) VALUES ('pruned_through', '4')",
    )
    assert [(row.position, id_of(row)) for row in await store.ledger.events(0, 100)] == [(1, None), (3, kept.id)]
    assert await store.ledger.events(3, 100) == []
    assert await store.ledger.pruned_through() == 4


async def test_reading_goes_on_while_retention_prunes(store: Store) -> None:
    """Events and commands are read by separate statements: what is pruned in between is left out."""
    await add_device(store.registry)
    ids = [(await accept(store.ledger, draft(deadline=now() - SECOND))).id for _ in range(100)]
    for id in ids[:60]:
        await change(store.ledger, id, SUCCEEDED)
    await all_events(store.ledger)

    async def prune() -> None:
        while await store.retention.prune(now() + SECOND, 1):
            pass

    pruning = asyncio.create_task(prune())
    while not pruning.done():
        log = await store.ledger.events(0, 200)
        assert {id_of(row) for row in log} >= set(ids[60:])
        assert all(row.timeline[-1].version == row.version for row in log if row.command)
    await pruning
    assert [id_of(row) for row in await store.ledger.events(0, 200)] == ids[60:]


async def test_what_was_not_marked_published_comes_again(store: Store) -> None:
    await add_device(store.registry)
    for _ in range(4):
        await accept(store.ledger)

    async def unpublished() -> list[int]:
        return positions(await store.ledger.unpublished("me", 3))

    assert await unpublished() == []
    assert await store.ledger.sequence("me", 10 * SECOND, 3) == 3
    assert await unpublished() == await unpublished() == [1, 2, 3]
    assert await store.ledger.sequence("me", 10 * SECOND, 3) == 2, "positions don't wait for the broker"
    assert await store.ledger.sequence("me", 10 * SECOND, 3) == 0
    await store.ledger.sequenced("me", 1, 2)
    assert await unpublished() == [3, 4, 5]
    await store.ledger.sequenced("me", 4, 5)  # something before it is not
    assert await unpublished() == [3, 4, 5]
    await store.ledger.sequenced("me", 3, 5)
    await store.ledger.sequenced("me", 3, 4)  # an answer that comes late takes nothing back
    await store.ledger.sequenced("me", 6, 99)  # nor can it pass over what has no position yet
    assert await unpublished() == []
    await accept(store.ledger)
    assert await store.ledger.sequence("me", 10 * SECOND, 3) == 1
    assert await unpublished() == [6]
    await store.ledger.publish_again(3)
    await store.ledger.sequenced("me", 6, 6)  # what was under way when they were asked for again
    assert await unpublished() == [4, 5, 6]
    await store.ledger.publish_again(100)
    assert await unpublished() == [1, 2, 3]
    await store.ledger.publish_again(1)
    assert await unpublished() == [1, 2, 3], "nothing is passed over"


async def test_the_lease_has_one_owner(url: str) -> None:
    database = Database(url)
    clock = [now()]
    ledger = SqlLedger(database, lambda: clock[0])
    ledger.start()
    await add_device(SqlRegistry(database, lambda: clock[0], SqlRevocations(database, None)))
    assert await ledger.sequence("a", 10 * SECOND, 10) == 1
    assert await ledger.sequence("b", 10 * SECOND, 10) is None
    clock[0] += 9 * SECOND
    assert await ledger.sequence("a", 10 * SECOND, 10) == 0  # renewed
    clock[0] += 9 * SECOND
    assert await ledger.sequence("b", 10 * SECOND, 10) is None
    assert await ledger.unpublished("b", 10) == []
    clock[0] += 2 * SECOND
    assert await ledger.sequence("b", 10 * SECOND, 10) == 0
    assert positions(await ledger.unpublished("b", 10)) == [1]
    await ledger.sequenced("a", 1, 1)  # without effect
    assert await ledger.sequence("a", 10 * SECOND, 10) is None
    assert await ledger.unpublished("a", 10) == []
    assert positions(await ledger.unpublished("b", 10)) == [1]
    await ledger.sequenced("b", 1, 1)
    # An idle owner keeps its lease.
    for _ in range(10):
        clock[0] += 3 * SECOND
        assert await ledger.sequence("b", 10 * SECOND, 10) == 0
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
        while writing or await ledger.sequence(owner, 0, 7) or await ledger.unpublished(owner, 1):
            await ledger.sequence(owner, 0, 7)
            log = await ledger.unpublished(owner, 7)
            for row in log:
                assert given.setdefault(row.position, (id_of(row), row.version)) == (id_of(row), row.version)
            if log:
                await ledger.sequenced(owner, log[0].position, log[-1].position)
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
        assert row.version == versions.get(id_of(row), 0) + 1
        versions[id_of(row)] = row.version
    await second.close()
