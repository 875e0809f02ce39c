"""All rows of a database as lines of JSON, and back: what one database wrote, the other kind reads as well.

A row is a JSON array, in the order of the table's columns; bytes are `{"base64": "…"}`.
"""

import base64
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from fabric.audit import Action, Deed, acting
from fabric.errors import FabricError
from fabric.sql import audit, schema
from fabric.sql.engine import first_line
from fabric.sql.log import SEQUENCER
from fabric.sql.migrate import (
    VERSION_TABLE,
    check_current,
    check_known,
    connected,
    database_time,
    lock,
    revision_of,
    upgrade,
)

LONGEST: Final = 8 * 1024 * 1024  # bytes of a line; a row has two bodies of 256 KiB at most, and an event

_BATCH = 200  # rows that are read or written at once
_BATCH_BYTES = 4 * 1024 * 1024  # of lines that are written at once
_FOREIGN: Final = ("devices", "generations", "commands", "tokens")  # what makes a database one that is in use

Columns = tuple[str, ...]
Progress = Callable[[str, int], None]


class RestoreRefused(FabricError):
    """The database is left as it was; the text says why."""

    code = "restore-refused"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The database as it was at one moment. `revision` is that of its schema."""

    revision: str
    tables: Mapping[str, Columns]
    _connection: sa.Connection

    def lines(self, table: str) -> Iterator[bytes]:
        """The rows of a table, a few of them in memory at a time."""
        found = self._connection.execution_options(yield_per=_BATCH).execute(sa.select(schema.metadata.tables[table]))
        for row in found:
            yield json.dumps([_written(value) for value in row], separators=(",", ":")).encode() + b"\n"


@contextmanager
def snapshot(url: str) -> Iterator[Snapshot]:
    """Read a database in one transaction, while others write to it.

    Raises:
        SchemaOutdated: it is not at this version's schema.
        LedgerUnavailable: it can't be reached, or went away.
    """
    check_current(url)
    with connected(url) as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        tables = {table.name: tuple(table.columns.keys()) for table in schema.metadata.sorted_tables}
        yield Snapshot(str(revision_of(connection)), tables, connection)


def load(
    url: str,
    revision: str,
    tables: Mapping[str, Columns],
    lines: Callable[[str], Iterator[bytes]],
    progress: Progress,
    *,
    replace: bool,
) -> None:
    """Fill a database with the rows of a snapshot, bring it up to date, and give it a new incarnation, all in one
    transaction.

    Args:
        url: a database that is empty, or of which all is thrown away if `replace`.
        revision: of the snapshot's schema.
        tables: its tables with their columns.
        lines: of a table.

    Raises:
        SchemaOutdated: the snapshot is of a newer version, or the database is.
        RestoreRefused: the database is in use, or the rows are not such a schema's.
        LedgerUnavailable: it can't be reached or locked.
    """
    check_known(revision, "backup")
    with connected(url) as connection, connection.begin():
        lock(connection)
        _make_room(connection, replace=replace)
        upgrade(connection, revision)
        try:
            _fill(connection, tables, lines, progress)
        except (ValueError, TypeError, RecursionError, OverflowError, SQLAlchemyError) as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            raise RestoreRefused(f"The backup's rows don't fit its schema ({revision}): {first_line(error)}") from error
        upgrade(connection)
        _begin_anew(connection)
        deed = Deed(Action.BACKUP_RESTORED, detail={"schema": revision})
        audit.record(connection, acting(), deed, database_time(connection))


def _make_room(connection: sa.Connection, *, replace: bool) -> None:
    """An empty schema; refuses to throw away what is not to be replaced, or what somebody works with."""
    there = set(sa.inspect(connection).get_table_names()) & {*schema.metadata.tables, VERSION_TABLE}
    if not there:
        return
    found = revision_of(connection)
    if found is not None:
        check_known(found, "database")
    old = sa.MetaData()
    old.reflect(connection, only=sorted(there))
    now = database_time(connection)
    for name, what in (("gateways", "gateway"), ("leases", "worker")):
        lease = old.tables.get(name)
        if lease is not None and connection.execute(sa.select(lease).where(lease.c.until > now)).first() is not None:
            raise RestoreRefused(
                f"A {what} works with this database. Stop all gateways and workers; of one that was killed, the lease "
                "runs out within half a minute."
            )
    full = [name for name in _FOREIGN if name in there and connection.execute(sa.select(old.tables[name])).first()]
    if full and not replace:
        raise RestoreRefused(
            f"The database is not empty: it has {', '.join(full)}. Restore into an empty one, or make a backup of this "
            "one and throw away what it has, with --replace."
        )
    old.drop_all(connection)


def _fill(
    connection: sa.Connection,
    tables: Mapping[str, Columns],
    lines: Callable[[str], Iterator[bytes]],
    progress: Progress,
) -> None:
    made = sa.MetaData()
    made.reflect(connection)
    ours = {table.name: table for table in made.sorted_tables if table.name != VERSION_TABLE}
    expected = {name: sorted(table.columns.keys()) for name, table in ours.items()}
    if expected != {name: sorted(columns) for name, columns in tables.items()}:
        raise ValueError("other tables or columns")
    for name, table in ours.items():
        done = 0
        for batch in _batches(lines(name)):
            values = [_row(tables[name], line) for line in batch]
            connection.execute(sa.insert(table), values)
            done += len(values)
            progress(name, done)
        _count_on(connection, table)


def _count_on(connection: sa.Connection, table: sa.Table) -> None:
    """PostgreSQL's sequence doesn't see which numbers were given; SQLite's does."""
    key = next(iter(table.primary_key.columns))
    if connection.dialect.name != "postgresql" or not isinstance(key.type, sa.BigInteger):
        return
    sequence = connection.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, key.name))).scalar()
    if sequence is not None:
        highest = connection.execute(sa.select(sa.func.max(key))).scalar()
        connection.execute(sa.select(sa.func.setval(sequence, highest or 1, highest is not None)))


def _begin_anew(connection: sa.Connection) -> None:
    """Agents send again what they know, and nobody waits for a process that was there when the backup was made."""
    fresh = {"value": secrets.token_hex(8)}
    connection.execute(sa.update(schema.meta).where(schema.meta.c.name == "incarnation").values(fresh))
    connection.execute(sa.delete(schema.gateways))
    lease = sa.update(schema.leases).where(schema.leases.c.name == SEQUENCER)
    connection.execute(lease.values(owner=None, until=0))


def _batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(value: object) -> object:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes | memoryview) else value


def _row(columns: Columns, line: bytes) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, list):
        raise TypeError("a line is no array")
    return {name: _read(value) for name, value in zip(columns, values, strict=True)}


def _read(value: object) -> object:
    match value:
        case None | bool() | int() | str():
            return value
        case {"base64": str(text)}:
            return base64.b64decode(text, validate=True)
        case _:
            raise TypeError("a value is of no known form")
