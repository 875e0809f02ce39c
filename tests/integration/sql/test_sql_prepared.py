"""A prepared statement does what SQLAlchemy does with the same one."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from fabric.sql import schema
from fabric.sql.engine import create_engine
from fabric.sql.prepared import Prepared, among, say

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
    engine = create_engine(url, connections=1)
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


def test_the_parameters_say_which_columns_an_update_sets(connection: sa.Connection) -> None:
    Prepared(sa.insert(_events).inline()).run(connection, [EVENT])
    update = Prepared(sa.update(_events).where(_events.c.command == sa.bindparam("of")))
    assert update.run(connection, [{"of": "c1", "detail": "x"}]) == 1
    assert update.run(connection, [{"of": "c1", "state": "queued"}]) == 1
    assert update.run(connection, [{"of": "c1", "at": 18}, {"of": "none", "at": 19}]) == 1
    columns = sa.select(_events.c.detail, _events.c.state, _events.c.at)
    assert Prepared(columns.where(_events.c.kind == EVENT["kind"])).all(connection, {}) == [("x", "queued", 18)]


@pytest.mark.parametrize("many", [1, 2, 3, 100])
def test_among_finds_each_once(connection: sa.Connection, many: int) -> None:
    ids = [f"c{n}" for n in range(many)]
    Prepared(sa.insert(_events).inline()).run(connection, [{**EVENT, "command": id} for id in [*ids, "another"]])
    find = among(sa.select(_events.c.command).order_by(_events.c.id), _events.c.command)
    assert find(connection, ids) == [(id,) for id in ids]


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


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_lost_connection_is_noticed_and_made_again(connection: sa.Connection) -> None:
    look = Prepared(sa.select(sa.func.pg_backend_pid()))
    found = look.first(connection, {})
    with pytest.raises(DBAPIError) as error:
        say(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert error.value.connection_invalidated
    connection.rollback()
    assert look.first(connection, {}) not in (None, found)
