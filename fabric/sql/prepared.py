"""Statements of the hot path: written as SQLAlchemy's, compiled once, run on the driver's own cursor.

Running a statement through SQLAlchemy costs ten times what SQLite itself needs, and several times more again
when its code has left the caches. What is compiled is the same text, the same order of parameters and the same
conversions to and from the columns' types.
"""

import functools
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
_Convert = Callable[[Any], Any]

_CURSOR = "prepared-cursor"  # its place in `Connection.info`, which goes with the driver's connection


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
    values sets; its errors are the same too. A list can't be expanded into it: see `among`.
    """

    __slots__ = ("_compiled", "_statement")

    def __init__(self, statement: sa.Select[Any] | sa.Insert | sa.Update) -> None:
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

    def first(self, connection: sa.Connection, parameters: Parameters) -> Row | None:
        found = self.all(connection, parameters)
        return found[0] if found else None

    def run(self, connection: sa.Connection, many: Sequence[Parameters]) -> int:
        """Run it with each of these parameters, which have the same names; the number of rows it met."""
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


def among(statement: sa.Select[Any], column: "sa.Column[Any]") -> Callable[[sa.Connection, Sequence[Any]], Rows]:
    """A function that gives the statement's rows for each of a number of values, at least one, of a column."""

    @functools.cache  # the powers of two up to the longest list
    def sized(size: int) -> Prepared:
        return Prepared(statement.where(column.in_([sa.bindparam(f"of_{n}", type_=column.type) for n in range(size)])))

    def rows(connection: sa.Connection, values: Sequence[Any]) -> Rows:
        wanted = padded(values)
        return sized(len(wanted)).all(connection, {f"of_{n}": value for n, value in enumerate(wanted)})

    return rows


def padded(values: Sequence[T]) -> list[T]:
    """The values, the last one repeated up to a power of two, so that only a few statements are ever prepared."""
    return [*values, *[values[-1]] * ((1 << (len(values) - 1).bit_length()) - len(values))]


def say(connection: sa.Connection, text: str) -> None:
    """Run a statement without parameters and results."""
    try:
        _cursor(connection).execute(text)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _translated(connection, text, error) from error


def _compile(statement: sa.Select[Any] | sa.Insert | sa.Update, dialect: sa.Dialect, names: list[str]) -> _Compiled:
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
