"""The ledger's promises, on both databases."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from fabric.command import (
    TIMELINE_LIMIT,
    Cancelled,
    Claimed,
    Confirmed,
    DeadlinePassed,
    Receipted,
    Republished,
    Returned,
    State,
    Verdict,
)
from fabric.errors import Conflict, Invalid, LedgerUnavailable, NotFound, Temporary
from fabric.model import Accept, Accepted, Change, Dropped, QuarantineRow
from fabric.ports import Due
from fabric.sql import Store, fold, open_store, schema
from fabric.sql import engine as sql_engine
from fabric.sql.ledger import QUARANTINED_ROWS, SqlLedger
from fabric.sql.prepared import Prepared
from fabric.sql.registry import SqlRegistry
from fabric.sql.revocations import SqlRevocations
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    ROOMY,
    SECOND,
    SUCCEEDED,
    accept,
    add_device,
    all_events,
    change,
    changed,
    command_count,
    draft,
    now,
    rows,
    stored,
    timeline,
)
from topology.names import CommandId, DeviceId

OTHER = DeviceId("garage-7")


async def test_a_command_comes_back_as_it_was_accepted(store: Store) -> None:
    await add_device(store.registry)
    given = draft(claim=True, body=b"\x00\xff", traceparent="00-1-2-03", supersedes="x")
    accepted = await accept(store.ledger, given)
    assert accepted == replace(given, seq=1, publish_due=given.accepted_at + 5 * SECOND)
    assert await stored(store.ledger, given.id) == accepted
    assert [(entry.state, entry.evidence) for entry in await timeline(store.ledger, given.id)] == [
        (State.ACCEPTED, "ledger")
    ]


async def test_an_outcome_is_kept_whole(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    said = replace(SUCCEEDED, status=State.FAILED, reason="jammed", body=b"\x00" * 1000)
    (result,) = await change(store.ledger, command.id, said, device=PUMP)
    assert result.step.settled
    assert await stored(store.ledger, command.id) == result.step.command
    assert result.step.command.outcome is not None
    assert result.step.command.outcome.body == said.body


async def test_numbers_are_given_in_submission_order_without_gaps(store: Store) -> None:
    await add_device(store.registry)
    await add_device(store.registry, OTHER)
    drafts = [draft(PUMP if number % 3 else OTHER) for number in range(60)]
    accepted = await asyncio.gather(*(accept(store.ledger, given) for given in drafts))
    for device in (PUMP, OTHER):
        mine = [command.seq for command in accepted if command.device == device]
        assert mine == list(range(1, len(mine) + 1))


async def test_events_of_one_batch_are_folded(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    results = await change(store.ledger, command.id, Confirmed(1), Receipted(AGENT, running=True), SUCCEEDED)
    assert [result.step.command.state for result in results] == [State.QUEUED, State.RUNNING, State.SUCCEEDED]
    assert [result.step.command.version for result in results] == [2, 3, 4]
    found = await store.ledger.command(command.id)
    assert found is not None
    assert found[0] == results[-1].step.command
    assert [(row.entry.state, row.version) for row in found[1]] == [
        (State.ACCEPTED, 1),
        (State.QUEUED, 2),
        (State.RUNNING, 3),
        (State.SUCCEEDED, 4),
    ]


async def test_an_accept_and_changes_of_it_go_together(store: Store) -> None:
    await add_device(store.registry)
    old = await accept(store.ledger)
    new = draft(supersedes=old.id)
    results = await store.ledger.write(
        Accept(new), Change(old.id, Cancelled("superseded")), Change(new.id, Confirmed(1))
    )
    assert isinstance(results[0], Accepted)
    assert results[0].command.state is State.QUEUED, "as it is at the end of the batch"
    assert (await stored(store.ledger, old.id)).state is State.CANCELLED
    assert (await stored(store.ledger, new.id)).state is State.QUEUED


async def test_a_batch_takes_a_constant_number_of_statements(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await add_device(store.registry)
    commands = [await accept(store.ledger) for _ in range(40)]
    statements: list[str] = []
    engine = store.ledger._database.engine

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.split(maxsplit=1)[0])

    original = Prepared._for

    def counted(prepared: Prepared, *given: Any) -> object:
        statements.append(str(prepared._statement).split(maxsplit=1)[0])
        return original(prepared, *given)

    monkeypatch.setattr(Prepared, "_for", counted)
    sa.event.listen(engine, "before_cursor_execute", count)
    await store.ledger.write(*(Change(command.id, Receipted(AGENT, running=True)) for command in commands))
    assert _work(statements) == ["SELECT", "UPDATE", "INSERT"]
    statements.clear()
    await store.ledger.write(*(Accept(draft(), ROOMY) for _ in range(40)))
    assert _work(statements) == ["UPDATE", "SELECT", "INSERT", "INSERT"]
    statements.clear()
    await store.ledger.write(*(Change(command.id, SUCCEEDED) for command in commands))
    assert _work(statements) == ["SELECT", "UPDATE", "INSERT", "SELECT"], "what was settled comes with its timeline"
    sa.event.remove(engine, "before_cursor_execute", count)


def _work(statements: list[str]) -> list[str]:
    return [word for word in statements if word not in ("BEGIN", "PRAGMA")]


async def test_a_refused_accept_is_its_own_affair(store: Store) -> None:
    await add_device(store.registry)
    old = await accept(store.ledger)
    outcomes = await asyncio.gather(
        accept(store.ledger),
        store.ledger.write(Accept(draft(OTHER)), Change(old.id, Cancelled("superseded"))),
        store.ledger.write(Accept(draft(generation=2))),
        accept(store.ledger),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], type(old))
    assert isinstance(outcomes[1], NotFound)
    assert isinstance(outcomes[2], Conflict)
    assert isinstance(outcomes[3], type(old))
    assert (outcomes[0].seq, outcomes[3].seq) == (2, 3)
    # The change that came with a refused accept was not made.
    assert (await stored(store.ledger, old.id)).state is State.ACCEPTED


async def test_the_same_accept_again_is_answered_with_the_command_as_it_is(store: Store) -> None:
    await add_device(store.registry)
    given = draft()
    first = await accept(store.ledger, given)
    (settled,) = await change(store.ledger, given.id, SUCCEEDED)
    assert await accept(store.ledger, given) == settled.step.command
    with pytest.raises(Conflict):
        await accept(store.ledger, replace(given, body=b"another"))
    assert (await accept(store.ledger)).seq == first.seq + 1


async def test_a_poisonous_item_does_not_fail_its_neighbours(store: Store) -> None:
    await add_device(store.registry)
    outcomes = await asyncio.gather(
        accept(store.ledger),
        accept(store.ledger, draft(deadline=2**70)),
        accept(store.ledger),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], Invalid)
    assert not isinstance(outcomes[0], BaseException)
    assert not isinstance(outcomes[2], BaseException)
    assert (outcomes[0].seq, outcomes[2].seq) == (1, 2)


async def test_reports_must_match_the_command_the_device_and_the_generation(store: Store) -> None:
    await add_device(store.registry)
    await add_device(store.registry, OTHER)
    command = await accept(store.ledger)
    unknown = CommandId("01990000-0000-7000-8000-000000000000")
    assert await store.ledger.write(Change(unknown, SUCCEEDED, PUMP)) == [Dropped(fold.UNKNOWN_COMMAND)]
    assert await store.ledger.write(Change(command.id, SUCCEEDED, OTHER)) == [Dropped(fold.OTHER_DEVICE)]
    await store.registry.delete_device(PUMP, None, now())
    assert await store.ledger.write(Change(command.id, SUCCEEDED, PUMP)) == [Dropped(fold.OTHER_GENERATION)]
    await add_device(store.registry)
    assert await store.ledger.write(Change(command.id, SUCCEEDED, PUMP)) == [Dropped(fold.OTHER_GENERATION)]
    assert (await stored(store.ledger, command.id)).state is State.UNDELIVERABLE


async def test_what_changes_nothing_is_not_written(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    await change(store.ledger, command.id, SUCCEEDED)
    before = await store.ledger.command(command.id)
    (result,) = await change(store.ledger, command.id, Cancelled("issuer"))
    assert result.step.verdict is Verdict.TOO_LATE
    assert await store.ledger.command(command.id) == before


async def test_a_timeline_is_bounded(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    events = [Receipted(AGENT, running=True, progress=str(number)) for number in range(100)]
    await change(store.ledger, command.id, *events)
    assert len(await timeline(store.ledger, command.id)) == TIMELINE_LIMIT
    assert (await stored(store.ledger, command.id)).progress == "99"


async def test_text_that_a_database_refuses_is_cleaned(store: Store) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    bad = "a\x00b\ud800c\U0001f600"
    await change(store.ledger, command.id, replace(SUCCEEDED, status=State.FAILED, reason=bad), Confirmed(1))
    kept = await stored(store.ledger, command.id)
    assert kept.reason == "a\ufffdb\ufffdc\U0001f600"
    assert await store.ledger.command(CommandId(bad)) is None
    await store.ledger.quarantine([QuarantineRow(now(), "reports", None, bad, bad, b"")])
    await all_events(store.ledger)
    for row in await store.ledger.events(0, 100):
        assert "\x00" not in str(row)
        str(row).encode()


async def test_due_commands_are_found_with_their_time_the_longest_overdue_first(store: Store) -> None:
    await add_device(store.registry)
    at = now()
    late, later, running, settled = [
        await accept(store.ledger, draft(deadline=at + delay * SECOND)) for delay in (10, 5, 60, 1)
    ]
    await change(store.ledger, running.id, Receipted(AGENT, running=True))
    await change(store.ledger, settled.id, SUCCEEDED)
    assert await store.ledger.due(at, 10) == []
    first, second = (Due(each.id, State.ACCEPTED, each.deadline) for each in (later, late))
    assert await store.ledger.due(first.at - 1, 10) == []
    assert await store.ledger.due(first.at, 10) == [first]
    assert await store.ledger.due(second.at, 10) == [first, second]
    assert await store.ledger.due(second.at, 1) == [first]
    assert (running.id, State.RUNNING) in [
        (each.id, each.state) for each in await store.ledger.due(at + 40 * SECOND, 10)
    ]


async def test_what_must_be_published_is_found_until_its_deadline(store: Store) -> None:
    await add_device(store.registry)
    at = now()
    command = await accept(store.ledger)
    assert await store.ledger.to_publish(at, 10) == []
    assert await store.ledger.to_publish(at + 6 * SECOND, 10) == [(command.id, 1)]
    assert await store.ledger.to_publish(command.deadline, 10) == []
    assert await store.ledger.waiting_by_device("cell-1") == {}
    await change(store.ledger, command.id, Republished(1, "retry"), Confirmed(2))
    assert await store.ledger.to_publish(at + 20 * SECOND, 10) == []
    assert await store.ledger.waiting_by_device("cell-1") == {PUMP: [(command.id, 2)]}
    assert await store.ledger.waiting_by_device("cell-2") == {}


async def test_a_mailbox_counts_what_may_be_in_it(store: Store) -> None:
    await add_device(store.registry)
    assert (await store.registry.mailbox(PUMP)).depth == 0
    first, cancelled, withdrawn_unsent, picked_up = [await accept(store.ledger) for _ in range(4)]
    await change(store.ledger, cancelled.id, Cancelled("issuer"))
    await change(store.ledger, withdrawn_unsent.id, Returned(1), Cancelled("issuer"))
    await change(store.ledger, picked_up.id, Claimed(AGENT))
    box = await store.registry.mailbox(PUMP)
    assert (box.depth, box.oldest_at) == (2, first.accepted_at)
    boxes = await store.ledger.mailboxes([OTHER, PUMP])
    assert boxes[PUMP] == box
    assert boxes[OTHER].depth == 0


async def test_commands_are_listed_newest_first_in_pages(store: Store) -> None:
    await add_device(store.registry)
    await add_device(store.registry, OTHER)
    at = now()
    given = [
        await accept(
            store.ledger,
            draft(PUMP if number % 2 else OTHER, accepted_at=at + number // 4, issuer="a" if number % 3 else "b"),
        )
        for number in range(24)
    ]
    await change(store.ledger, given[5].id, SUCCEEDED)
    newest_first = sorted(given, key=lambda command: (command.accepted_at, command.id), reverse=True)
    seen: list[CommandId] = []
    after = None
    while page := await store.ledger.commands(after=after, limit=7):
        seen += [command.id for command in page]
        after = (page[-1].accepted_at, page[-1].id)
    assert seen == [command.id for command in newest_first]
    found = await store.ledger.commands(device=PUMP, issuer="a", states={State.ACCEPTED})
    assert [command.id for command in found] == [
        command.id
        for command in newest_first
        if command.device == PUMP and command.issuer == "a" and command != given[5]
    ]
    assert [command.id for command in await store.ledger.commands(states={State.SUCCEEDED})] == [given[5].id]


async def test_quarantine_is_bounded_per_device(store: Store, url: str) -> None:
    def mail(device: DeviceId | None, number: int) -> QuarantineRow:
        return QuarantineRow(number, "reports", device, "receipt.x", "undecodable", bytes([number % 256]) * 5000)

    await store.ledger.quarantine([mail(PUMP, number) for number in range(QUARANTINED_ROWS + 20)])
    for number in range(3):
        await store.ledger.quarantine([mail(PUMP, 1000 + number), mail(None, number)])
    kept = rows(
        url, sa.select(schema.quarantine.c.at, schema.quarantine.c.body).where(schema.quarantine.c.device == PUMP)
    )
    assert sorted(row.at for row in kept) == [*range(23, QUARANTINED_ROWS + 20), 1000, 1001, 1002]
    assert {len(row.body) for row in kept} == {4096}
    assert rows(url, "SELECT count(*) FROM quarantine WHERE device = ''")[0][0] == 3


async def test_a_row_that_changed_is_read_and_stepped_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await add_device(store.registry)
    command = await accept(store.ledger)
    saves = 0
    save = fold.Fold.save

    def stale(self: fold.Fold, results: Any) -> object:
        nonlocal saves
        saves += 1
        if saves < 4:
            raise fold.Stale
        return save(self, results)

    monkeypatch.setattr(fold.Fold, "save", stale)
    (result,) = await change(store.ledger, command.id, Confirmed(1))
    assert result.step.command.version == 2
    saves = -100
    with pytest.raises(LedgerUnavailable):
        await change(store.ledger, command.id, SUCCEEDED)
    monkeypatch.undo()
    assert (await stored(store.ledger, command.id)).state is State.QUEUED


async def test_a_stopped_ledger_has_written_what_was_submitted(store: Store, url: str) -> None:
    await add_device(store.registry)
    writes = [asyncio.create_task(accept(store.ledger)) for _ in range(50)]
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    assert len(await asyncio.gather(*writes)) == command_count(url) == 50
    with pytest.raises(Temporary, match="stopped"):
        await accept(store.ledger)
    with pytest.raises(LedgerUnavailable, match="closed"):
        await store.registry.device(PUMP)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_database_that_is_locked_is_unavailable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_engine, "BUSY_TIMEOUT", 50)
    store = await open_store(url)
    await add_device(store.registry)
    other = sql_engine.create_engine(url, connections=1)
    with other.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable):
            await accept(store.ledger)
        with pytest.raises(LedgerUnavailable):
            await store.registry.revoke_device(PUMP, now())
        assert await store.registry.device(PUMP) is not None  # reading goes on
        connection.exec_driver_sql("ROLLBACK")
    other.dispose()
    assert (await accept(store.ledger)).seq == 1
    await store.close()


async def test_the_clock_is_the_databases(store: Store) -> None:
    assert abs(await store.ledger.time_offset()) < SECOND
    assert abs(store.clock.now() - now()) < SECOND
    assert len(await store.ledger.incarnation()) == 16


async def test_steps_are_timed_by_the_ledgers_clock(url: str) -> None:
    database = sql_engine.Database(url)
    clock = [1_000_000]
    ledger = SqlLedger(database, lambda: clock[0])
    ledger.start()
    await add_device(SqlRegistry(database, lambda: clock[0], SqlRevocations(database, None)))
    command = await accept(ledger, draft(accepted_at=1_000_000, deadline=2_000_000))
    clock[0] = 2_000_001
    (result,) = await change(ledger, command.id, DeadlinePassed())
    assert result.step.command.settled_at == 2_000_001
    assert changed([result])[0].step.settled
    await ledger.close()
    await database.close()
