"""The database: from a URL to an engine, with threads to use it in and errors the fabric knows.

SQLAlchemy is used synchronously, in threads: an async engine pays a greenlet switch for every statement.
"""

import asyncio
import enum
import fcntl
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fabric.command import Micros
from fabric.errors import FabricError, Invalid, LedgerUnavailable
from fabric.sql.prepared import PIPELINED, say

T = TypeVar("T")

READERS = 3  # threads for reads and for the registry; the batch ledger has one of its own
BUSY_TIMEOUT = 10_000  # ms that SQLite waits for another process's transaction
STATEMENT_TIMEOUT = 10_000  # ms, PostgreSQL
LOCK_TIMEOUT = 5_000  # ms, PostgreSQL
IDLE_TIMEOUT = 30_000  # ms after which PostgreSQL ends a transaction whose client has hung
CONNECT_TIMEOUT = 5  # seconds
RETRY_FOR = 5.0  # seconds that a call goes on reconnecting to a database that went away
RETRY_PAUSE = (0.02, 0.5)  # seconds: the first pause and the longest, doubled in between, jittered
QUEUED = 2_000  # calls that may wait for a reader thread

_FILE_MODE = 0o600
_WAL_TRIES = 50  # of 0.1 s: turning on WAL doesn't wait for other processes by itself


def refused(error: SQLAlchemyError) -> FabricError:
    return Invalid(f"The database refused it: {first_line(error)}")


class Database:
    """An engine and its threads. One per process; the ledger and the registry share it.

    Raises:
        Invalid: the URL is not of a database that is supported.
    """

    def __init__(self, url: str, *, readers: int = READERS) -> None:
        self.engine = create_engine(url, connections=readers + 1)
        self.sqlite = self.engine.dialect.name == "sqlite"
        # A read on PostgreSQL then needs no BEGIN; on SQLite a statement without one is its own transaction.
        self._reading = self.engine if self.sqlite else create_engine(url, connections=readers, autocommit=True)
        self._batching = self.engine if self.sqlite else create_engine(url, connections=1, pipelined=True)
        # SQLite's own waiting polls, for longer each time; a lock of the operating system wakes at once.
        self._turn = Turn(Path(f"{self.engine.url.database}-turn")) if self.sqlite else nullcontext()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sql-writer")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="sql-reader")
        self._kept = _Kept()
        self._waiting = 0
        self._closed = False

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run reading statements, each on its own snapshot. Tried again when the connection was lost."""
        return await self._in_reader(lambda: self._retrying(lambda: self._read(work)))

    async def write(self, work: Callable[[sa.Connection], T], *, durable: bool = True) -> T:
        """Run a transaction. It is tried again as long as it can't have been committed. One that is not
        `durable` may be lost when the database's machine crashes within the second.

        Raises:
            LedgerUnavailable: not committed, or, if the connection was lost during the commit, perhaps so.
        """
        return await self._in_reader(lambda: self.transact(work, durable=durable))

    async def write_batch(self, work: Callable[[], T]) -> T:
        """Run something in the batch ledger's thread; it calls `transact` itself."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def transact(
        self,
        work: Callable[[sa.Connection], T],
        *,
        committed: Callable[[sa.Connection, T], bool] | None = None,
        durable: bool = True,
        refused: Callable[[DBAPIError], Exception] = refused,
        pipelined: bool = False,
    ) -> T:
        """`write`, in the calling thread.

        Args:
            work: with `pipelined`, runs nothing but `Prepared`'s statements.
            committed: asked on a new connection when the old one was lost during the commit, with the result of
                `work`: is it in the database? If not, `work` is run again.
            durable: as for `write`.
            refused: makes the error to raise of what the database does not take.
            pipelined: in as few round trips as its statements allow.
        """
        engine = self._batching if pipelined else self.engine
        doubtful: list[T] = []

        def attempt() -> T:
            with self._turn, self._kept.of(engine) as connection:
                transaction = connection.begin()
                try:
                    self._begin(connection, durable)
                    if doubtful and committed is not None and committed(connection, doubtful[-1]):
                        transaction.rollback()
                        return doubtful[-1]
                    result = work(connection)
                except BaseException as error:
                    _undo(connection, transaction, error)
                    raise
                doubtful[:] = [result]
                try:
                    transaction.commit()
                except DBAPIError as error:
                    _undo(connection, transaction, error)
                    if committed is None and trouble(error) is Trouble.LOST:
                        raise LedgerUnavailable("The database went away during a commit; it may be done.") from error
                    raise
                return result

        return self._retrying(attempt, refused)

    def _begin(self, connection: sa.Connection, durable: bool) -> None:
        if self.sqlite:
            wanted = "FULL" if durable else "NORMAL"
            if connection.info.get(_SYNCHRONOUS) != wanted:
                connection.info.pop(_SYNCHRONOUS, None)
                say(connection, f"PRAGMA synchronous={wanted}")
                connection.info[_SYNCHRONOUS] = wanted
            say(connection, "BEGIN IMMEDIATE")
        else:
            _plan_anew(connection)
            if not durable:
                say(connection, "SET LOCAL synchronous_commit = off")

    async def time_offset(self) -> Micros:
        """The database's clock minus this process's, in microseconds; the quickest of three measurements."""
        if self.sqlite:
            return 0

        def measure(connection: sa.Connection) -> Micros:
            best: tuple[int, Micros] | None = None
            for _ in range(3):
                before = time.time_ns() // 1000
                theirs = connection.execute(CLOCK).scalar_one()
                after = time.time_ns() // 1000
                if best is None or after - before < best[0]:
                    best = (after - before, theirs - (before + after) // 2)
            assert best is not None  # noqa: S101 - three measurements
            return best[1]

        return await self.read(measure)

    async def close(self) -> None:
        """Wait for what runs, then disconnect. Closing twice is closing once."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        if isinstance(self._turn, Turn):
            self._turn.close()
        self._kept.close()
        for engine in (self.engine, self._reading, self._batching):
            engine.dispose()

    async def _in_reader(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise LedgerUnavailable("The database is closed.")
        if self._waiting >= QUEUED:
            raise LedgerUnavailable(f"The database is too slow: {QUEUED} calls wait for it.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, work)
        finally:
            self._waiting -= 1

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        with self._kept.of(self._reading) as connection:
            if not self.sqlite:
                _plan_anew(connection)
            return work(connection)

    def _retrying(self, attempt: Callable[[], T], refused: Callable[[DBAPIError], Exception] = refused) -> T:
        until = time.monotonic() + RETRY_FOR
        pause, longest = RETRY_PAUSE
        while True:
            try:
                return attempt()
            except PoolTimeout as error:
                raise LedgerUnavailable("The database is too slow: no connection was free.") from error
            except OverflowError as error:  # sqlite3 says so itself, not as an error of the database
                raise Invalid("The database refused it: a number is out of range.") from error
            except DBAPIError as error:
                kind = trouble(error)
                if kind is Trouble.REFUSED:
                    raise refused(error) from error
                if kind is Trouble.BUSY or time.monotonic() > until or self._closed:
                    raise LedgerUnavailable(f"The database can't be used now: {first_line(error)}") from error
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(pause * 2, longest)


def _plan_anew(connection: sa.Connection) -> None:
    """At a connection's first, second, fourth, eighth … use, forget the plans of its prepared statements.

    PostgreSQL keeps a plan until the table is analyzed, a minute later or never; one that was made when it was nearly
    empty reads all of it, or all of a device's commands.
    """
    uses = connection.info[_USES] = connection.info.get(_USES, 0) + 1
    if uses & (uses - 1) == 0:
        say(connection, "DISCARD PLANS")


class _Lent:
    """A thread's connection to one engine, kept from use to use; a context manager. After a failure it goes back
    to the pool, which looks after it."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.Connection | None = None

    def __enter__(self) -> sa.Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._connection is not None  # noqa: S101 - made on entering
        if kind is not None:
            self.close()
        elif self._connection.in_transaction():  # one that SQLAlchemy began for a read
            self._connection.rollback()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Mine(threading.local):
    def __init__(self) -> None:
        self.by_engine: dict[sa.Engine, _Lent] = {}


class _Kept:
    """The connections of all threads: taking one from the pool and giving it back costs as much as a statement."""

    def __init__(self) -> None:
        self._mine = _Mine()
        self._all: list[_Lent] = []

    def of(self, engine: sa.Engine) -> _Lent:
        """The calling thread's."""
        mine = self._mine.by_engine
        lent = mine.get(engine)
        if lent is None:
            lent = mine[engine] = _Lent(engine)
            self._all.append(lent)
        return lent

    def close(self) -> None:
        """Once the threads have ended."""
        for lent in self._all:
            lent.close()


class Turn:
    """Whose turn it is to write a SQLite database, among all threads of all processes; a context manager.

    Only a courtesy: SQLite's own locks decide. The kernel releases it when its holder dies.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.Lock()  # `flock` is per open file, and this process has one
        self._descriptor: int | None = None

    def __enter__(self) -> None:
        self._thread.acquire()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, _FILE_MODE)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as error:
            self._thread.release()
            raise LedgerUnavailable(f"The file {self._path} can't be locked: {error.strerror}.") from error

    def __exit__(self, *_: object) -> None:
        assert self._descriptor is not None  # noqa: S101 - opened on entering
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._thread.release()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Trouble(enum.Enum):
    LOST = "the connection is gone, or could not be made"
    COLLIDED = "the transaction lost against another one and may be run again"
    BUSY = "a lock, time or space ran out"
    REFUSED = "the database does not take these values or this statement"


def trouble(error: DBAPIError) -> Trouble:
    """What kind of failure it is: by SQLSTATE on PostgreSQL, by result code on SQLite."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        return Trouble.BUSY if code in _SQLITE_BUSY else Trouble.REFUSED
    state: str | None = getattr(cause, "sqlstate", None)
    if error.connection_invalidated or state is None:
        operational = error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
        return Trouble.LOST if operational else Trouble.REFUSED
    if state.startswith("08") or state in ("57P01", "57P02", "57P03"):
        return Trouble.LOST
    if state in ("40001", "40P01"):
        return Trouble.COLLIDED
    return Trouble.BUSY if state.startswith(("53", "55", "57", "58", "25")) else Trouble.REFUSED


def create_engine(url: str, *, connections: int, autocommit: bool = False, pipelined: bool = False) -> sa.Engine:
    """An engine for `sqlite:///path` or `postgresql://…` (also `postgresql+psycopg://…`).

    Args:
        connections: at most so many.
        autocommit: each statement on PostgreSQL is its own transaction; on SQLite it is always so until BEGIN.
        pipelined: connections to PostgreSQL send statements before they have the answers to earlier ones (`Prepared`).

    Raises:
        Invalid: another database, or no file.
    """
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise Invalid("The database URL can't be read; it is sqlite:///path or postgresql://…") from error
    match parsed.drivername:
        case "sqlite" | "sqlite+pysqlite":
            return _sqlite(parsed, connections)
        case "postgresql" | "postgresql+psycopg":
            engine = _postgresql(parsed, connections, "AUTOCOMMIT" if autocommit else "READ COMMITTED")
            if pipelined:
                _pipeline(engine)
            return engine
        case other:
            raise Invalid(f"The database URL starts with {other}://; it must be sqlite:///path or postgresql://…")


def _sqlite(url: sa.URL, connections: int) -> sa.Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise Invalid("The SQLite URL must name a file: sqlite:///path (four slashes for an absolute path).")
    path = Path(url.database)
    engine = sa.create_engine(
        url.set(drivername="sqlite+pysqlite"),
        poolclass=sa.QueuePool,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=10,
        pool_use_lifo=True,
        connect_args={"timeout": BUSY_TIMEOUT / 1000, "check_same_thread": False, "cached_statements": 256},
    )

    @event.listens_for(engine, "do_connect")
    def make_private(*_: object) -> None:
        """Nobody else may read the ledger; SQLite gives the files beside it the same mode.

        A file that is there must not be opened: closing any descriptor of it drops every lock that this
        process holds on it (POSIX), under the feet of the connections that are open, and the file is corrupted.
        """
        with _making:  # so that no thread finds the file, and locks it, before it is closed here
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, _FILE_MODE))
            except FileExistsError:
                if path.stat().st_mode & 0o077:
                    path.chmod(_FILE_MODE)
            except OSError as error:
                raise LedgerUnavailable(f"The database file {path} can't be made: {error.strerror}.") from error

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in (f"busy_timeout={BUSY_TIMEOUT}", "foreign_keys=ON", "synchronous=FULL", "cache_size=-16000"):
            connection.execute(f"PRAGMA {pragma}")
        _turn_on_wal(connection)

    return engine


def _turn_on_wal(connection: sqlite3.Connection) -> None:
    for tries_left in reversed(range(_WAL_TRIES)):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if not tries_left:
                raise
            time.sleep(0.1)
        else:
            return


def _postgresql(url: sa.URL, connections: int, isolation: IsolationLevel) -> sa.Engine:
    settings = {
        "statement_timeout": STATEMENT_TIMEOUT,
        "lock_timeout": LOCK_TIMEOUT,
        "idle_in_transaction_session_timeout": IDLE_TIMEOUT,
        "jit": "off",
    }
    defaults: dict[str, Any] = {
        "application_name": "restante",
        "connect_timeout": CONNECT_TIMEOUT,
        "tcp_user_timeout": STATEMENT_TIMEOUT,
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        isolation_level=isolation,
        paramstyle="format",  # by position, like SQLite's: `Prepared` knows no other
        pool_size=connections,
        max_overflow=0,
        pool_timeout=10,
        pool_use_lifo=True,  # the connection in use keeps its prepared statements warm
        connect_args={
            **{name: value for name, value in defaults.items() if name not in url.query},
            "prepare_threshold": 2,  # uses after which a statement is prepared
        },
    )


def _pipeline(engine: sa.Engine) -> None:
    """Keep the engine's connections in psycopg's pipeline mode: to leave it at the end of each transaction would cost
    the round trip that it saves."""

    @event.listens_for(engine, "connect")
    def enter(connection: Any, record: Any) -> None:
        held = record.info[_HELD] = connection.pipeline()
        record.info[PIPELINED] = held.__enter__()

    @event.listens_for(engine, "close")
    def leave(_: object, record: Any) -> None:
        held = record.info.pop(_HELD, None)
        if held is not None:
            with suppress(Exception):  # the connection is gone already
                held.__exit__(None, None, None)


_HELD = "pipeline"  # the context manager's place beside it
_SQLITE_BUSY = frozenset(
    {
        sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
    }
)  # fmt: skip
_SYNCHRONOUS = "synchronous"  # where a SQLite connection's present value is remembered
_USES = "uses"  # how often a connection to PostgreSQL was used
_making = threading.Lock()
CLOCK = sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")


def _undo(connection: sa.Connection, transaction: sa.Transaction, error: BaseException) -> None:
    """Roll back. A connection that is gone has nothing to say about that which is not known."""
    with suppress(SQLAlchemyError):
        if PIPELINED not in connection.info:
            transaction.rollback()
            return
        try:
            if not isinstance(error, DBAPIError):
                transaction.rollback()
                return
        except SQLAlchemyError:  # of a statement whose answer nobody had waited for
            pass
        connection.invalidate()  # the answers to what was sent behind the failed statement would come first
        if transaction.is_active:
            transaction.rollback()


def first_line(error: Exception) -> str:
    """What the driver says, without the values that it adds in further lines."""
    cause = getattr(error, "orig", None) or error
    return str(cause).partition("\n")[0][:200]
