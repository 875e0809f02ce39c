"""The audit: a row with each deed, in its transaction; none is changed, and none goes early."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from fabric import audit
from fabric.audit import Action, By, Deed, Entry, Kind
from fabric.command import Cancelled, Confirmed, Micros
from fabric.errors import Conflict, FabricError, Gone, Invalid, NotFound, Unauthenticated
from fabric.model import Accept, Accepted, DeviceKey, Idempotency, IssuedToken
from fabric.sql import Store, migrate, schema
from fabric.sql.engine import create_engine
from tests.integration.sql.values import (
    PUMP,
    ROOMY,
    SECOND,
    accept,
    add_device,
    change,
    code,
    draft,
    execute,
    new_device,
    now,
    rows,
)
from topology.names import DeviceId

DAY: Micros = 86_400 * SECOND
OTHER = DeviceId("garage-7")
BILLING = By(Kind.CALLER, "billing", "urn:restante:test", "jti-1", "192.0.2.7", "request-1")


def key(kid: str, parent: str | None = None) -> DeviceKey:
    return DeviceKey(PUMP, kid, {"crv": "P-256", "kty": "EC", "x": kid, "y": "y"}, now(), parent=parent)


def token(jti: str, parent: str | None = None) -> IssuedToken:
    return IssuedToken(jti, "billing", ("devices:read",), now(), now() + 60 * SECOND, parent=parent)


async def kept(store: Store) -> list[Entry]:
    """All but how the schema came to be, the oldest first."""
    found = await store.audit.entries(limit=1000)
    return [entry for entry in reversed(found) if entry.deed.action is not Action.SCHEMA_MIGRATED]


class Story:
    """What can be asked of the registry, one after another, each with what is to be recorded of it."""

    def __init__(self, store: Store) -> None:
        self.registry = store.registry
        self.codes = [code(), code(), code()]

    def deeds(self) -> list[tuple[Callable[[], Awaitable[object]], Deed | None]]:
        registry, made = self.registry, new_device()
        grown = replace(made, groups=("yard",), labels={"floor": "3", "site": "x"}, backlog=7)
        off = replace(grown, enabled=False)
        created = {"groups": ["garage"], "labels": ["floor"], "generation": 1}
        changed = {"joined": ["yard"], "left": ["garage"], "labels": ["floor", "site"], "backlog": [None, 7]}
        return [
            (lambda: registry.create_device(made, self.codes[0]), Deed(Action.DEVICE_CREATED, PUMP, created)),
            (lambda: registry.update_device(grown, None), Deed(Action.DEVICE_UPDATED, PUMP, changed)),
            (lambda: registry.update_device(off, None), Deed(Action.DEVICE_SUSPENDED, PUMP)),
            (lambda: registry.update_device(grown, None), Deed(Action.DEVICE_RESUMED, PUMP)),
            (lambda: registry.add_code(self.codes[1]), Deed(Action.ENROLLMENT_ISSUED, PUMP)),
            (
                lambda: registry.redeem(self.codes[1].code_hash, key("a"), now()),
                Deed(Action.DEVICE_ENROLLED, PUMP, {"kid": "a", "generation": 1}),
            ),
            (lambda: registry.redeem(self.codes[1].code_hash, key("a"), now()), None),
            (lambda: registry.add_key(key("b", "a")), Deed(Action.KEY_ADDED, PUMP, {"kid": "b", "parent": "a"})),
            (lambda: registry.add_key(key("b", "a")), None),
            (lambda: registry.add_key(key("c", "b")), Deed(Action.KEY_ADDED, PUMP, {"kid": "c", "parent": "b"})),
            (
                lambda: registry.retire_key(PUMP, "a", "b", now()),
                Deed(Action.KEY_RETIRED, PUMP, {"kid": "a", "by": "b"}),
            ),
            (lambda: registry.retire_key(PUMP, "a", "b", now()), None),
            (
                lambda: registry.revoke_key(PUMP, "b", now()),
                Deed(Action.KEY_REVOKED, PUMP, {"kid": "b", "with": ["c"]}),
            ),
            (
                lambda: registry.revoke_device(PUMP, now()),
                Deed(Action.DEVICE_REVOKED, PUMP, {"generation": 2, "withdrawn": 0}),
            ),
            (
                lambda: registry.delete_device(PUMP, None, now()),
                Deed(Action.DEVICE_DELETED, PUMP, {"generation": 2, "settled": 0}),
            ),
            (
                lambda: registry.add_token(token("t-1")),
                Deed(
                    Action.TOKEN_CREATED,
                    None,
                    {"jti": "t-1", "subject": "billing", "scopes": ["devices:read"], "parent": None},
                ),
            ),
            (
                lambda: registry.revoke_token("t-1", now()),
                Deed(Action.TOKEN_REVOKED, None, {"jti": "t-1", "subject": "billing", "revoked": 1}),
            ),
            (lambda: registry.revoke_token("t-1", now()), None),
            (
                lambda: registry.revoke_subject("billing", now()),
                Deed(Action.SUBJECT_REVOKED, None, {"subject": "billing", "revoked": 0}),
            ),
        ]


async def test_each_deed_is_recorded_once_with_who_did_it(store: Store) -> None:
    began = now()
    expected: list[Deed] = []
    for do, deed in Story(store).deeds():
        with audit.acting_as(BILLING):
            await do()
        expected += [] if deed is None else [deed]
        assert len(await kept(store)) == len(expected), deed
    found = await kept(store)
    assert [entry.deed for entry in found] == expected
    enrolled = replace(BILLING, kind=Kind.DEVICE, subject=PUMP)
    assert [entry.by for entry in found] == [
        enrolled if deed.action is Action.DEVICE_ENROLLED else BILLING for deed in expected
    ]
    assert [entry.position for entry in found] == sorted(entry.position for entry in found)
    assert all(began <= entry.at <= now() for entry in found)


async def test_every_action_of_the_registry_is_in_the_story(store: Store) -> None:
    told = {deed.action for _, deed in Story(store).deeds() if deed is not None}
    mine = {action for action in Action if action.value.partition(".")[0] in ("device", "enrollment", "key", "token")}
    assert mine - told == {Action.ENROLLMENT_CONTESTED}


async def test_what_is_refused_by_the_registry_leaves_no_row(store: Store) -> None:
    await add_device(store.registry)
    before = await kept(store)
    refused: list[tuple[type[FabricError], Callable[[], Awaitable[Any]]]] = [
        (Conflict, lambda: add_device(store.registry)),
        (NotFound, lambda: store.registry.update_device(new_device(OTHER), None)),
        (NotFound, lambda: store.registry.delete_device(OTHER, None, now())),
        (NotFound, lambda: store.registry.revoke_device(OTHER, now())),
        (NotFound, lambda: store.registry.add_code(code(OTHER))),
        (Gone, lambda: store.registry.redeem("unknown", key("a"), now())),
        (Unauthenticated, lambda: store.registry.add_key(key("b", "a"))),
        (NotFound, lambda: store.registry.revoke_key(PUMP, "a", now())),
        (Unauthenticated, lambda: store.registry.add_token(token("t-2", "t-1"))),
    ]
    for error, ask in refused:
        with pytest.raises(error):
            await ask()
    assert await kept(store) == before


async def test_a_deed_and_its_row_are_one_transaction(store: Store, url: str) -> None:
    """Where the audit can't be written, nothing is done."""
    execute(url, "ALTER TABLE audit RENAME TO elsewhere")
    try:
        for do, deed in Story(store).deeds():
            if deed is not None and deed.action in (Action.DEVICE_CREATED, Action.TOKEN_CREATED):
                with pytest.raises(Invalid):
                    await do()
    finally:
        execute(url, "ALTER TABLE elsewhere RENAME TO audit")
    assert await store.registry.device(PUMP) is None
    assert await store.registry.token("t-1") is None
    assert await kept(store) == []
    await add_device(store.registry)
    assert len(await kept(store)) == 1, "the control: now it can"


async def test_a_contested_code_is_recorded_as_refused(store: Store) -> None:
    ticket = code()
    await store.registry.create_device(new_device(), ticket)
    await store.registry.redeem(ticket.code_hash, key("a"), now())
    stranger = By(Kind.ANONYMOUS, address="198.51.100.1", request="request-2")
    with audit.acting_as(stranger), pytest.raises(Gone):
        await store.registry.redeem(ticket.code_hash, key("b"), now())
    last = (await kept(store))[-1]
    assert (last.by, last.deed) == (stranger, Deed(Action.ENROLLMENT_CONTESTED, PUMP, {"kid": "b"}, "gone"))


def test_migrating_is_recorded_with_who_did_it(empty_url: str) -> None:
    with audit.acting_as(By(Kind.OPERATOR, "root")):
        migrate(empty_url)
        migrate(empty_url)
    ((kind, subject, detail),) = rows(empty_url, "SELECT kind, subject, detail FROM audit")
    assert (kind, subject, json.loads(detail)["from"]) == ("operator", "root", None)
    assert json.loads(detail)["to"]


# ---- Commands ----------------------------------------------------------------------------------------


async def test_a_command_is_recorded_with_its_acceptance_and_its_withdrawal(store: Store) -> None:
    await add_device(store.registry)
    keyed = Accept(draft(), ROOMY, Idempotency("key", "fingerprint", now() + 60 * SECOND))
    with audit.acting_as(BILLING):
        sent = await accept(store.ledger)
        await store.ledger.write(keyed)
        (again,) = await store.ledger.write(replace(keyed, command=draft()))
        await store.ledger.write(keyed)
        await change(store.ledger, sent.id, Confirmed(1))
        await change(store.ledger, sent.id, Cancelled("cancelled"))
        await change(store.ledger, sent.id, Cancelled("cancelled"))
        with pytest.raises(NotFound):
            await accept(store.ledger, draft(OTHER))
    assert isinstance(again, Accepted)
    assert again.repeated
    await accept(store.ledger)
    _, *found = await kept(store)
    told = {"command": sent.id, "name": sent.name}
    assert [entry.deed for entry in found] == [
        Deed(Action.COMMAND_SENT, PUMP, told),
        Deed(Action.COMMAND_SENT, PUMP, {**told, "command": keyed.command.id}),
        Deed(Action.COMMAND_CANCELLED, PUMP, told),
    ]
    assert {entry.by for entry in found} == {BILLING}


async def test_a_batch_keeps_apart_who_sent_what(store: Store) -> None:
    await add_device(store.registry)

    async def send(subject: str) -> tuple[str, str]:
        with audit.acting_as(replace(BILLING, subject=subject)):
            return (await accept(store.ledger)).id, subject

    sent = await asyncio.gather(*(send(f"caller-{number}") for number in range(20)))
    _, *found = await kept(store)
    assert {(entry.deed.detail["command"], entry.by.subject) for entry in found} == set(sent)
    assert len(found) == len(sent)


# ---- Reading -----------------------------------------------------------------------------------------


async def told(store: Store, *told: tuple[str, str | None, Action]) -> list[Entry]:
    """Deeds of subjects to devices, in order."""
    for subject, device, action in told:
        with audit.acting_as(replace(BILLING, subject=subject)):
            await store.audit.record(Deed(action, None if device is None else DeviceId(device)))
    return await kept(store)


async def test_it_is_read_by_device_subject_action_and_time(store: Store) -> None:
    all_of_them = await told(
        store,
        ("a", "x", Action.DEVICE_UPDATED),
        ("b", "x", Action.DEVICE_REVOKED),
        ("a", None, Action.TOKEN_CREATED),
        ("b", "y", Action.DEVICE_UPDATED),
        ("b", None, Action.TOKEN_CREATED),
    )
    newest_first = all_of_them[::-1]
    first, second, third, *_ = all_of_them

    async def found(**asked: Any) -> list[Entry]:
        entries = await store.audit.entries(**asked)
        return [entry for entry in entries if entry.deed.action is not Action.SCHEMA_MIGRATED]

    assert await found() == newest_first
    assert await found(device=DeviceId("x")) == [second, first]
    assert await found(subject="a") == [third, first]
    assert await found(action=Action.TOKEN_CREATED) == [entry for entry in newest_first if entry.deed.device is None]
    assert await found(device=DeviceId("x"), subject="b", action=Action.DEVICE_UPDATED) == []
    assert await found(since=third.at) == [entry for entry in newest_first if entry.at >= third.at]
    assert await found(until=third.at) == [entry for entry in newest_first if entry.at < third.at]
    paged: list[Entry] = []
    while page := await found(after=(paged[-1].at, paged[-1].position) if paged else None, limit=2):
        paged += page
    assert paged == newest_first


async def test_no_filter_reads_the_table_through(store: Store, url: str) -> None:
    engine = create_engine(url, connections=1)
    row = {"at": now(), "kind": "caller", "action": "device.updated", "outcome": "done", "detail": "{}"}
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        many = [{**row, "at": row["at"] + n, "subject": f"s{n}", "device": f"d{n % 900}"} for n in range(3000)]
        connection.execute(sa.insert(schema.audit), many)
    execute(url, "ANALYZE")
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    ran: list[tuple[str, Any]] = []
    reading = store.registry._database._reading
    sa.event.listen(reading, "before_cursor_execute", lambda *args: ran.append((args[2], args[3])))
    await store.audit.entries(device=DeviceId("d7"), limit=50)
    await store.audit.entries(subject="s7", limit=50)
    await store.audit.entries(action=Action.DEVICE_REVOKED, limit=50)
    await store.audit.entries(limit=50)
    with engine.connect() as connection:
        for (statement, parameters), index in zip(ran, ("device", "subject", "action", "time"), strict=True):
            plan = str(connection.exec_driver_sql(explain + statement, parameters).all())
            assert f"ix_audit_by_{index}" in plan, plan
    engine.dispose()


# ---- Append-only -------------------------------------------------------------------------------------


def aged(url: str, *days: int) -> None:
    """Rows of so many days ago."""
    for each in days:
        values = f"{now() - each * DAY}, 'caller', 'device.updated', 'done', '{{}}'"
        execute(url, f"INSERT INTO audit (at, kind, action, outcome, detail) VALUES ({values})")


async def test_nothing_is_changed_and_nothing_goes_early(store: Store, url: str) -> None:
    aged(url, 91, 89)
    await store.audit.record(Deed(Action.BROKER_REBUILT))
    before = rows(url, sa.select(schema.audit).order_by(schema.audit.c.position))
    (young,) = (row for row in before if row.action == "broker.rebuilt")
    (old,) = (row for row in before if row.at < now() - 90 * DAY)
    statements = [
        "UPDATE audit SET subject = 'somebody-else'",
        f"UPDATE audit SET at = 0 WHERE position = {old.position}",
        f"DELETE FROM audit WHERE position = {young.position}",
        "DELETE FROM audit",
    ]
    if url.startswith("sqlite"):
        statements.append(
            "INSERT OR REPLACE INTO audit (position, at, kind, action, outcome, detail) VALUES "
            f"({young.position}, 0, 'caller', 'device.updated', 'done', '{{}}')"
        )
    else:
        statements.append("TRUNCATE audit")
    for statement in statements:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"):
            execute(url, statement)
    assert rows(url, sa.select(schema.audit).order_by(schema.audit.c.position)) == before
    execute(url, f"DELETE FROM audit WHERE position = {old.position}")
    assert len(rows(url, "SELECT 1 FROM audit")) == len(before) - 1


async def test_what_is_old_is_pruned_a_little_at_a_time(store: Store, url: str) -> None:
    aged(url, 500, 450, 401, 399, 1)
    before = now() - 400 * DAY
    assert await store.audit.prune(before, 2) is True
    assert await store.audit.prune(before, 2) is False
    assert await store.audit.prune(before, 2) is False
    assert len(await store.audit.entries(action=Action.DEVICE_UPDATED)) == 2
    with pytest.raises(Invalid, match="append-only"):
        await store.audit.prune(now(), 10)
    assert len(await store.audit.entries(action=Action.DEVICE_UPDATED)) == 2
