"""A prepared statement does what SQLAlchemy does with the same one."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from fabric.errors import Invalid
from fabric.sql import migrate, open_store, schema
from fabric.sql.engine import Database, create_engine
from fabric.sql.prepared import Among, Prepared, say
from tests.harness.postgres import PostgresCluster
from tests.integration.sql.values import SUCCEEDED, accept, add_device, change, rows

EVENT: dict[str, Any] = {
    "kind": "command.evidence", "device": "pump-17", "command": "c1", "version": 1, "at": 17, "state": None,
    "evidence": "nul \x00 and \ud800", "detail": None, "changed": True, "document": "{}",
}  # fmt: skip
QUARANTINED: dict[str, Any] = {
    "at": 1, "source": "reports", "device": "", "routing_key": "k", "reason": "r", "body": b"\x00\xff",
}  # fmt: skip
_events, _quarantine = schema.events, schema.quarantine


@pytest.fixture
def connection(url: str) -> Iterator[sa.Connection]:
    yield from _connected(url, pipelined=False)


@pytest.fixture(params=[False, True], ids=["plain", "pipelined"])
def either(url: str, request: pytest.FixtureRequest) -> Iterator[sa.Connection]:
    """Also one that the ledger writes over."""
    yield from _connected(url, pipelined=request.param)


def _connected(url: str, *, pipelined: bool) -> Iterator[sa.Connection]:
    engine = create_engine(url, connections=1, pipelined=pipelined)
    with engine.connect() as opened:
        yield opened
    engine.dispose()


def test_values_are_converted_like_sqlalchemy_does(connection: sa.Connection) -> None:
    both = [EVENT, {**EVENT, "command": "c2", "changed": False}, {**EVENT, "command": "c3", "changed": None}]
    assert Prepared(sa.insert(_events).inline()).run(connection, both) == 3
    query = sa.select(_events).order_by(_events.c.id)
    found = Prepared(query).all(connection, {})
    assert found == [tuple(row) for row in connection.execute(query)]
    assert [row[10] for row in found] == [True, False, None]
    assert {row[8] for row in found} == {"nul \ufffd and \ufffd"}
    assert Prepared(sa.insert(_quarantine).inline()).run(connection, [QUARANTINED]) == 1
    assert Prepared(sa.select(_quarantine.c.body)).first(connection, {}) == (b"\x00\xff",)


def test_the_parameters_say_which_columns_an_update_sets(either: sa.Connection) -> None:
    Prepared(sa.insert(_events).inline()).run(either, [EVENT])
    update = Prepared(sa.update(_events).where(_events.c.command == sa.bindparam("of")))
    assert update.run(either, [{"of": "c1", "detail": "x"}]) == 1
    assert update.run(either, [{"of": "c1", "state": "queued"}]) == 1
    assert update.run(either, [{"of": "c1", "at": 18}, {"of": "none", "at": 19}]) == 1
    columns = sa.select(_events.c.detail, _events.c.state, _events.c.at)
    assert Prepared(columns.where(_events.c.kind == EVENT["kind"])).all(either, {}) == [("x", "queued", 18)]


@pytest.mark.parametrize("many", [1, 2, 3, 100])
def test_among_finds_each_once(either: sa.Connection, many: int) -> None:
    ids = [f"c{n}" for n in range(many)]
    Prepared(sa.insert(_events).inline()).run(either, [{**EVENT, "command": id} for id in [*ids, "another"]])
    find = Among(sa.select(_events.c.command).order_by(_events.c.id), _events.c.command)
    assert find(either, ids) == [(id,) for id in ids]


def test_errors_are_sqlalchemys(connection: sa.Connection) -> None:
    insert = Prepared(sa.insert(schema.meta))
    insert.run(connection, [{"name": "twice", "value": ""}])
    with pytest.raises(IntegrityError):
        insert.run(connection, [{"name": "twice", "value": ""}])
    connection.connection.rollback()
    with pytest.raises(DBAPIError):
        say(connection, "NONSENSE")
    connection.connection.rollback()
    with pytest.raises(TypeError, match="of"):
        Prepared(sa.select(_events.c.id).where(_events.c.id == sa.bindparam("of"))).all(connection, {})


def test_halves_are_answered_in_their_order(either: sa.Connection) -> None:
    insert = Prepared(sa.insert(_events).inline())
    count = Prepared(sa.select(sa.func.count()).select_from(_events))
    find = Among(sa.select(_events.c.command).order_by(_events.c.id), _events.c.command)
    before = count.ask(either, {})
    many = insert.put(either, [{**EVENT, "command": f"c{number}"} for number in range(3)])
    one = insert.put(either, [{**EVENT, "command": "c3"}])
    found = find.ask(either, ["c1", "c3", "none"])
    after = count.ask(either, {})
    assert (found(), after(), before()) == ([("c1",), ("c3",)], [(4,)], [(0,)])
    assert (many(), one()) == (3, 1)
    none = Prepared(sa.update(_events).where(_events.c.command == sa.bindparam("of")))
    assert none.put(either, [{"of": "c9", "detail": "x"}])() == 0
    assert count.all(either, {}) == [(4,)]


def test_what_is_put_fails_by_the_commit_at_the_latest(url: str) -> None:
    database = Database(url)
    insert = Prepared(sa.insert(schema.meta))
    find = Prepared(sa.select(schema.meta.c.value).where(schema.meta.c.name == sa.bindparam("of")))

    def write(name: str, times: int) -> None:
        rows = [{"name": name, "value": "1"}] * times
        database.transact(lambda connection: insert.put(connection, rows), pipelined=True)

    with pytest.raises(Invalid):
        write("twice", 2)
    write("once", 1)

    def abandon(connection: sa.Connection) -> None:
        insert.put(connection, [{"name": "once", "value": "2"}])
        raise RuntimeError("before anybody looked")

    # SQLite answers at once.
    with pytest.raises((RuntimeError, Invalid)):
        database.transact(abandon, pipelined=True)
    write("another", 1)
    read = partial(database.transact, pipelined=True)
    assert read(lambda connection: find.all(connection, {"of": "twice"})) == []
    assert read(lambda connection: find.all(connection, {"of": "once"})) == [("1",)]
    assert read(lambda connection: find.all(connection, {"of": "another"})) == [("1",)]
    database._close()


def _begin(connection: sa.Connection) -> None:
    connection.begin()
    if connection.dialect.name == "sqlite":
        say(connection, "BEGIN")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_lost_connection_is_noticed_and_made_again(connection: sa.Connection) -> None:
    look = Prepared(sa.select(sa.func.pg_backend_pid()))
    found = look.first(connection, {})
    with pytest.raises(DBAPIError) as error:
        say(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert error.value.connection_invalidated
    connection.rollback()
    assert look.first(connection, {}) not in (None, found)


async def test_what_a_device_was_sent_before_does_not_burden_the_next_command(postgres: PostgresCluster) -> None:
    """In a database that nobody has analyzed yet, whose plans were made when it was empty."""
    url = postgres.new_database()
    migrate(url)
    store = await open_store(url)
    await add_device(store.registry)
    for _ in range(600):
        command = await accept(store.ledger)
        await change(store.ledger, command.id, SUCCEEDED)
    await store.close()
    # It would be 180,000 if each read all that were before.
    (read,) = rows(url, "SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'commands'")
    (scanned,) = rows(url, "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'commands'")
    assert read[0] + scanned[0] < 90_000
