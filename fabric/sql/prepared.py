"""Statements of the hot path: written as SQLAlchemy's, compiled once, run on the driver's own cursor.

Running a statement through SQLAlchemy costs ten times what SQLite itself needs, and several times more again
when its code has left the caches. What is compiled is the same text, the same order of parameters and the same
conversions to and from the columns' types.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPICursor, DBAPIModule
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

T = TypeVar("T")
Row = tuple[Any, ...]
Rows = list[Row]
Parameters = Mapping[str, Any]
Statement = sa.Select[Any] | sa.Insert | sa.Update | sa.Delete
_Convert = Callable[[Any], Any]

_CURSOR = "prepared-cursor"  # its place in `Connection.info`, which goes with the driver's connection
PIPELINED = "pipelined"  # there, too: whether the driver sends statements before it has the answers to earlier ones


@dataclass(frozen=True, slots=True)
class _Compiled:
    """`given` are the parameters in their order; `read` the places of columns that need a conversion."""

    text: str
    given: tuple[tuple[str | None, _Convert | None, Any], ...]  # name, conversion; or, without a name, the value
    read: tuple[tuple[int, _Convert], ...]

    def arguments(self, parameters: Parameters) -> list[Any]:
        return [
            value if name is None else parameters[name] if convert is None else convert(parameters[name])
            for name, convert, value in self.given
        ]

    def rows(self, found: Iterable[Row]) -> Rows:
        return [self._row(row) for row in found] if self.read else list(found)

    def _row(self, row: Row) -> Row:
        values = list(row)
        for place, convert in self.read:
            values[place] = convert(values[place])
        return tuple(values)


class Prepared:
    """A statement that is compiled at its first use on each dialect.

    Like with SQLAlchemy's `execute`, the names of the parameters say which columns an INSERT or UPDATE without
    values sets; its errors are the same too. A list can't be expanded into it: see `Among`.
    """

    __slots__ = ("_compiled", "_statement")

    def __init__(self, statement: Statement) -> None:
        self._statement = statement
        self._compiled: dict[tuple[str, ...], _Compiled] = {}

    def all(self, connection: sa.Connection, parameters: Parameters) -> Rows:
        """The rows, in the order of the statement's columns."""
        compiled = self._for(connection, parameters)
        arguments = compiled.arguments(parameters)
        try:
            cursor = _cursor(connection)
            cursor.execute(compiled.text, arguments)
            return compiled.rows(cursor.fetchall())
        except connection.dialect.loaded_dbapi.Error as error:
            raise _translated(connection, compiled.text, error) from error

    def ask(self, connection: sa.Connection, parameters: Parameters) -> Callable[[], Rows]:
        """`all`, in two halves: the statement takes its place in the transaction now, and what is returned gives the
        rows. On a connection that is pipelined, whatever is asked before that is called takes one round trip."""
        if PIPELINED not in connection.info:
            found = self.all(connection, parameters)
            return lambda: found
        compiled = self._for(connection, parameters)
        cursor = _queued(connection, compiled, [compiled.arguments(parameters)])

        def rows() -> Rows:
            try:
                return compiled.rows(cursor.fetchall())
            except connection.dialect.loaded_dbapi.Error as error:
                raise _translated(connection, compiled.text, error) from error

        return rows

    def put(self, connection: sa.Connection, many: Sequence[Parameters]) -> Callable[[], int]:
        """`run`, in two halves, as `ask` is of `all`. Its errors may come with a later statement, or the commit."""
        if PIPELINED not in connection.info:
            met = self.run(connection, many)
            return lambda: met
        compiled = self._for(connection, many[0])
        cursor = _queued(connection, compiled, [compiled.arguments(parameters) for parameters in many])

        def count() -> int:
            pipeline = connection.info[PIPELINED]
            if pipeline.result_queue:
                try:
                    pipeline.sync()
                except connection.dialect.loaded_dbapi.Error as error:
                    raise _translated(connection, compiled.text, error) from error
            return cursor.rowcount

        return count

    def first(self, connection: sa.Connection, parameters: Parameters) -> Row | None:
        found = self.all(connection, parameters)
        return found[0] if found else None

    def run(self, connection: sa.Connection, many: Sequence[Parameters]) -> int:
        """Run it with each of these parameters, which have the same names; the number of rows it met."""
        if PIPELINED in connection.info:
            return self.put(connection, many)()
        compiled = self._for(connection, many[0])
        arguments = [compiled.arguments(parameters) for parameters in many]
        try:
            cursor = _cursor(connection)
            if len(arguments) == 1:  # without executemany, which would cost a round trip
                cursor.execute(compiled.text, arguments[0])
            else:
                cursor.executemany(compiled.text, arguments)
            return cursor.rowcount
        except connection.dialect.loaded_dbapi.Error as error:
            raise _translated(connection, compiled.text, error) from error

    def _for(self, connection: sa.Connection, parameters: Parameters) -> _Compiled:
        key = (connection.dialect.name, *parameters)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = _compile(self._statement, connection.dialect, list(parameters))
        return compiled


class Among:
    """A query for a number of values of a column, at least one, beside the statement's own parameters by name."""

    def __init__(self, statement: sa.Select[Any], column: sa.ColumnElement[Any]) -> None:
        self._statement, self._column = statement, column
        self._sized: dict[int, Prepared] = {}  # by the powers of two up to the longest list

    def __call__(self, connection: sa.Connection, values: Sequence[Any], **parameters: object) -> Rows:
        """The statement's rows for each of the values."""
        prepared, given = self._for(values, parameters)
        return prepared.all(connection, given)

    def ask(self, connection: sa.Connection, values: Sequence[Any], **parameters: object) -> Callable[[], Rows]:
        """As `Prepared.ask`."""
        prepared, given = self._for(values, parameters)
        return prepared.ask(connection, given)

    def _for(self, values: Sequence[Any], parameters: Parameters) -> tuple[Prepared, Parameters]:
        wanted = padded(values)
        size = len(wanted)
        prepared = self._sized.get(size)
        if prepared is None:
            places = [sa.bindparam(f"of_{n}", type_=self._column.type) for n in range(size)]
            prepared = self._sized[size] = Prepared(self._statement.where(self._column.in_(places)))
        return prepared, {**{f"of_{n}": value for n, value in enumerate(wanted)}, **parameters}


def padded(values: Sequence[T]) -> list[T]:
    """The values, the last one repeated up to a power of two, so that only a few statements are ever prepared."""
    return [*values, *[values[-1]] * ((1 << (len(values) - 1).bit_length()) - len(values))]


def say(connection: sa.Connection, text: str) -> None:
    """Run a statement without parameters and results. On a connection that is pipelined its errors may come later."""
    try:
        _cursor(connection).execute(text)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _translated(connection, text, error) from error


def _compile(statement: Statement, dialect: sa.Dialect, names: list[str]) -> _Compiled:
    compiled = statement.compile(dialect=dialect, column_keys=names)
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - it is no DDL
    assert compiled.positiontup is not None  # noqa: S101 - see `engine.create_engine`
    binds = {name: bind for bind, name in compiled.bind_names.items()}
    given: list[tuple[str | None, _Convert | None, Any]] = []
    for name in compiled.positiontup:
        convert = binds[name].type.dialect_impl(dialect).bind_processor(dialect)
        if name in names:
            given.append((name, convert, None))
        elif binds[name].required:
            raise TypeError(f"no parameter {name} for: {compiled}")
        else:
            value = binds[name].effective_value
            given.append((None, None, value if convert is None else convert(value)))
    read: list[tuple[int, _Convert]] = []
    for place, column in enumerate(statement.exported_columns):
        back = column.type.dialect_impl(dialect).result_processor(dialect, None)
        if back is not None:
            read.append((place, back))
    return _Compiled(str(compiled), tuple(given), tuple(read))


def _cursor(connection: sa.Connection) -> DBAPICursor:
    """One for the life of the driver's connection: psycopg's keep the conversions that they have looked up."""
    kept = connection.info
    cursor: DBAPICursor | None = kept.get(_CURSOR)
    if cursor is None:
        cursor = kept[_CURSOR] = connection.connection.cursor()
    return cursor


def _queued(connection: sa.Connection, compiled: _Compiled, arguments: Sequence[list[Any]]) -> DBAPICursor:
    """A cursor of its own: the answer is not here yet."""
    try:
        cursor = connection.connection.cursor()
        if len(arguments) == 1:
            cursor.execute(compiled.text, arguments[0])
        else:
            cursor.executemany(compiled.text, arguments)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _translated(connection, compiled.text, error) from error
    return cursor


def _translated(connection: sa.Connection, text: str, error: DBAPIModule.Error) -> BaseException:
    """The error as SQLAlchemy raises it. A connection that is broken is dropped from the pool, and with it those
    that are as old."""
    base = connection.dialect.loaded_dbapi.Error
    lost = connection.invalidated or connection.dialect.is_disconnect(
        error, connection.connection.dbapi_connection, None
    )
    if lost:
        with suppress(DBAPIError):
            connection.exec_driver_sql("SELECT 1")  # SQLAlchemy then finds out for itself
    return DBAPIError.instance(text, None, error, base, connection_invalidated=lost, dialect=connection.dialect)
