"""Retention: what goes, what stays, and that looking for it reads no table through."""

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from fabric.command import Confirmed, Micros
from fabric.model import Change, DomainEvent, Dropped, QuarantineRow
from fabric.sql import Store, open_store, schema
from fabric.sql.engine import create_engine
from fabric.sql.fold import UNKNOWN_COMMAND
from tests.integration.sql.values import (
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
    rows,
)
from topology.names import CommandId

DAY: Micros = 86_400 * SECOND
KEPT = 30 * DAY
LIMIT = 1000


async def settle(store: Store, count: int = 1) -> list[CommandId]:
    """Commands that have three events each."""
    commands = await asyncio.gather(*(accept(store.ledger) for _ in range(count)))
    for command in commands:
        await change(store.ledger, command.id, Confirmed(1), SUCCEEDED)
    return [command.id for command in commands]


def set_back(url: str, ids: Sequence[str], days: int = 31) -> None:
    by = days * DAY
    wanted = ", ".join(f"'{id}'" for id in ids)
    execute(
        url,
        f"UPDATE commands SET accepted_at = accepted_at - {by}, deadline = deadline - {by}, "
        f"settled_at = settled_at - {by} WHERE id IN ({wanted})",
    )


async def prune(store: Store, limit: int = LIMIT, before: Micros | None = None) -> bool:
    return await store.retention.prune(now() - KEPT if before is None else before, limit)


def kept(url: str) -> set[str]:
    """The commands that are there; each has its events, and no other has any."""
    commands = {row.id for row in rows(url, "SELECT id FROM commands")}
    events = rows(url, "SELECT command, count(*) AS many FROM events WHERE command IS NOT NULL GROUP BY command")
    assert {row.command for row in events} == commands
    versions = {row.id: row.rows for row in rows(url, "SELECT id, rows FROM commands")}
    assert {row.command: row.many for row in events} == versions
    return commands


def pruned_through(url: str) -> int | None:
    found = rows(url, "SELECT value FROM meta WHERE name = 'pruned_through'")
    return int(found[0].value) if found else None


async def test_old_settled_commands_go_with_their_events(store: Store, url: str) -> None:
    await add_device(store.registry)
    (old,) = await settle(store)
    (recent,) = await settle(store)
    open_one = (await accept(store.ledger)).id
    last = (await settle(store))[0]
    await all_events(store.ledger)
    assert await prune(store) is False
    assert pruned_through(url) is None
    set_back(url, [old, open_one])
    set_back(url, [recent], 29)
    assert await prune(store) is False
    assert await store.ledger.command(old) is None
    assert kept(url) == {recent, open_one, last}
    # Position 1 is the device's; the old command had 2 to 4.
    assert [row.position for row in await store.ledger.events(0, 100)] == [1, *range(5, 12)]
    assert pruned_through(url) == 4
    set_back(url, [last])
    await prune(store)
    assert kept(url) == {recent, open_one}
    assert pruned_through(url) == 11
    set_back(url, [recent], 2)
    await prune(store)
    assert kept(url) == {open_one}
    assert pruned_through(url) == 11, "it is never lowered"
    assert await store.ledger.last_position() == 11


async def test_what_is_not_published_stays_with_its_command(store: Store, url: str) -> None:
    await add_device(store.registry)
    first, second = await settle(store, 2)
    set_back(url, [first, second])
    await prune(store)
    assert kept(url) == {first, second}, "nothing has a position yet"
    assert await store.ledger.sequence("me", 1, LIMIT)
    await prune(store)
    assert kept(url) == {first, second}, "nothing is published"
    of_first, of_second = (
        rows(url, f"SELECT max(position) AS last FROM events WHERE command = '{id}'")[0].last for id in (first, second)
    )
    assert of_first < of_second
    await store.ledger.sequenced("me", 1, of_second - 1)
    assert await prune(store, limit=2) is True
    assert kept(url) == {second}
    assert await prune(store, limit=1) is False, "another pass at once would find no more"
    await store.ledger.sequenced("me", of_second, of_second)
    # A late word is an event of its own, which must be published, too.
    await change(store.ledger, second, Confirmed(2))
    assert await prune(store) is False
    assert kept(url) == {second}
    await all_events(store.ledger)
    await prune(store)
    assert kept(url) == set()


async def test_a_copy_that_may_be_in_the_mailbox_keeps_its_command(store: Store, url: str) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger, draft(deadline=now() + 7 * DAY))
    await change(store.ledger, command.id, SUCCEEDED)
    await all_events(store.ledger)
    execute(url, f"UPDATE commands SET settled_at = settled_at - {2 * DAY}")
    await prune(store, before=now() - DAY)
    assert kept(url) == {command.id}
    set_back(url, [command.id], 7)
    await prune(store, before=now() - DAY)
    assert kept(url) == set()


async def test_a_late_report_of_a_pruned_command_is_dropped(store: Store, url: str) -> None:
    await add_device(store.registry)
    (id,) = await settle(store)
    await all_events(store.ledger)
    set_back(url, [id])
    await prune(store)
    (result,) = await store.ledger.write(Change(id, SUCCEEDED, PUMP))
    assert result == Dropped(UNKNOWN_COMMAND)
    assert kept(url) == set()


async def test_old_events_of_devices_go(store: Store, url: str) -> None:
    await add_device(store.registry)
    at = now()
    for days in (40, 35, 20):
        await store.registry.record(DomainEvent("device.contested", PUMP, at - days * DAY, {"days": days}))
    await prune(store)
    assert len(await all_events(store.ledger)) == 4, "none had been published"
    await store.registry.record(DomainEvent("device.contested", PUMP, at - 50 * DAY, {"days": 50}))
    await prune(store)
    assert [row.position for row in await store.ledger.events(0, 100)] == [1, 4]
    assert pruned_through(url) == 3
    assert len(rows(url, "SELECT id FROM events WHERE position IS NULL")) == 1


async def test_expired_keys_and_old_mail_in_quarantine_go(store: Store, url: str) -> None:
    await add_device(store.registry)
    keys = [key(f"k{n}", left) for n, left in enumerate((-DAY, -SECOND, 60 * SECOND))]
    insert(url, schema.idempotency, keys)
    await store.ledger.quarantine([quarantined(40), quarantined(31), quarantined(29), quarantined(0)])
    await prune(store)
    assert [row.key for row in rows(url, "SELECT key FROM idempotency")] == ["k2"]
    left = rows(url, "SELECT routing_key FROM quarantine ORDER BY id")
    assert [row.routing_key for row in left] == ["29 days", "0 days"]


def key(name: str, left: Micros) -> dict[str, Any]:
    return {"key": name, "device": PUMP, "fingerprint": "f", "command": "c", "expires_at": now() + left}


def quarantined(days: int) -> QuarantineRow:
    return QuarantineRow(now() - days * DAY, "reports", PUMP, f"{days} days", "malformed", b"\xff")


async def test_a_pass_takes_so_many_and_says_that_there_is_more(store: Store, url: str) -> None:
    await add_device(store.registry)
    ids = await settle(store, 25)
    await all_events(store.ledger)
    set_back(url, ids)
    passes = [(await prune(store, limit=10), len(kept(url))) for _ in range(4)]
    assert passes == [(True, 15), (True, 5), (False, 0), (False, 0)]


async def test_several_prune_at_once_while_others_write(store: Store, url: str) -> None:
    await add_device(store.registry)
    old = await settle(store, 150)
    await all_events(store.ledger)
    set_back(url, old)
    others = [await open_store(url) for _ in range(2)]
    done = asyncio.Event()

    async def work(pruner: Store) -> None:
        while await prune(pruner, limit=7):
            pass

    async def write() -> list[CommandId]:
        """New commands, and late words about old ones."""
        ours: list[CommandId] = []
        while not done.is_set():
            ours += await settle(store)
            for id in old[len(ours) :: 50]:
                await store.ledger.write(Change(id, SUCCEEDED, PUMP))
        return ours

    writer = asyncio.create_task(write())
    await asyncio.gather(*(work(pruner) for pruner in (store, *others)))
    done.set()
    fresh = await writer
    # What got a late word meanwhile goes once that is published.
    await all_events(store.ledger)
    while await prune(store):
        pass
    assert kept(url) == set(fresh)
    assert pruned_through(url) is not None
    for other in others:
        await other.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_row_that_somebody_holds_is_passed_over(store: Store, url: str) -> None:
    await add_device(store.registry)
    held, free = await settle(store, 2)
    await all_events(store.ledger)
    set_back(url, [held, free])
    engine = create_engine(url, connections=1)
    with engine.begin() as connection:
        connection.execute(sa.select(schema.commands).where(schema.commands.c.id == held).with_for_update())
        began = time.monotonic()
        await prune(store)
        assert time.monotonic() - began < 20, "it waits for nobody"
        assert kept(url) == {held}
    engine.dispose()
    await prune(store)
    assert kept(url) == set()


async def test_nothing_due_is_found_without_reading_a_table_through(store: Store, url: str) -> None:
    """Each statement of a pass, as the database would run it on a ledger of some size."""
    await add_device(store.registry)
    (id,) = await settle(store)
    open_one = (await accept(store.ledger)).id
    await store.ledger.quarantine([quarantined(0)])
    await all_events(store.ledger)
    insert(url, schema.idempotency, [key("k", 60 * SECOND)])
    for table, identity in (("commands", "id"), ("events", None), ("quarantine", None), ("idempotency", "key")):
        multiply(url, schema.metadata.tables[table], identity, 4000)
    execute(url, "ANALYZE")
    plans = await plans_of_a_pass(store, url)
    assert len(plans) >= 4
    for statement, plan in plans:
        full = re.search(r"Seq Scan on (commands|events|quarantine|idempotency)|SCAN (commands|events)", plan)
        assert full is None, f"{statement}\n{plan}"
        if "FROM commands" in statement:
            assert "ix_commands_settled_at" in plan, plan
        if "FROM events" in statement:
            assert "ix_events_of_devices" in plan, plan
        if "FROM idempotency" in statement:
            assert "ix_idempotency_expires_at" in plan, plan
    assert {id, open_one} <= {row.id for row in rows(url, "SELECT id FROM commands")}


def multiply(url: str, table: sa.Table, identity: str | None, times: int) -> None:
    """Copies of every row, with ids of their own; of commands, `seq` has to differ, too."""
    found = rows(url, sa.select(table))
    serial = {"seq", "position"}
    copies: list[dict[str, Any]] = []
    for row in found * times:
        copy = dict(row._mapping)
        copy.pop("id", None)
        for name in serial & copy.keys():
            copy[name] = 1_000_000 + len(copies)
        if identity:
            copy[identity] = f"copy-{len(copies)}"
        copies.append(copy)
    insert(url, table, copies)


def insert(url: str, table: sa.Table, values: list[dict[str, Any]]) -> None:
    engine = create_engine(url, connections=1)
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        connection.execute(sa.insert(table), values)
    engine.dispose()


async def plans_of_a_pass(store: Store, url: str) -> list[tuple[str, str]]:
    ran: list[tuple[str, Any]] = []

    def note(connection: object, cursor: object, statement: str, parameters: Any, *_: object) -> None:
        ran.append((statement, parameters))

    engine = store.ledger._database.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    assert await prune(store) is False
    sa.event.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    plans = []
    own = create_engine(url, connections=1)
    with own.connect() as connection:
        for statement, parameters in ran:
            if statement.startswith("SELECT"):
                plan = connection.exec_driver_sql(explain + statement, parameters).all()
                plans.append((statement, "\n".join(" ".join(map(str, row)) for row in plan)))
    own.dispose()
    return plans
