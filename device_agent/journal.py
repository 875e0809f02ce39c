"""What this agent has picked up and what became of it: the reason why no command starts twice.

SQLite in WAL mode, synchronous FULL: a write that returned survives a power cut. A pick-up is one commit,
an outcome another; that a report was confirmed is remembered lazily, as forgetting it only repeats the
report. Used from one thread.

The journal is made complete under another name and then renamed: whatever has its name and can't be read
is damage, and a reason not to start. A new one in its place would let a command run a second time.

A copy is a journal of its own: what one agent picks up is not in the other's. So it gets an agent id of its
own, and the fabric, which grants a command to one agent, can tell the two apart.
"""

import json
import os
import secrets
import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from device_agent import errors, files, log
from topology import names, wire

FILE = "journal.db"
MAX_ENTRIES = 10_000
MAX_OUTCOME_BYTES = 64 * 1024 * 1024  # of retained outcomes, so that a small disk never fills up
EVICT_MARGIN = 60_000  # ms past `not-after` before an entry may go, whatever the clock's error was
_FORMAT = 1  # `user_version`; another one is refused
# What tells two machines apart that were made from one image, as far as a machine has it.
_MACHINE = (Path("/etc/machine-id"), Path("/proc/device-tree/serial-number"))

_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entry (
  command TEXT PRIMARY KEY,
  state TEXT NOT NULL,
  name TEXT NOT NULL,
  not_after INTEGER NOT NULL,
  started_at INTEGER NOT NULL,
  reruns INTEGER NOT NULL DEFAULT 0,
  request TEXT,
  status TEXT, reason TEXT, body BLOB, content_type TEXT, at INTEGER
);
CREATE INDEX entry_open ON entry (state) WHERE state IN ('started', 'done');
CREATE INDEX entry_age ON entry (not_after) WHERE state NOT IN ('started', 'done');
PRAGMA user_version = {_FORMAT};
"""

_WORD = "command, status, reason, body, content_type, at, started_at"


class State(StrEnum):
    """`started` → `done` → `reported`; or `refused` (a claim); or `doubt` (interrupted, nobody knows) → `told`."""

    STARTED = "started"
    DONE = "done"
    REPORTED = "reported"
    REFUSED = "refused"
    DOUBT = "doubt"
    TOLD = "told"


# What is told of a command once its handler started: how it ended, or, of one in doubt, no more than that it did.
Word = wire.Outcome | wire.Receipt


@dataclass(frozen=True, slots=True)
class Entry:
    command: names.CommandId
    state: State


@dataclass(frozen=True, slots=True)
class Interrupted:
    """An entry that was started and has no outcome; `request` is kept for idempotent handlers only."""

    command: names.CommandId
    name: str
    not_after: int
    started_at: int
    reruns: int
    request: wire.Command | None


class Journal:
    """Raises `errors.JournalRefused` from every method when SQLite can't do its part."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self._path = path
        self._reported: list[str] = []
        with self._translated():
            self.agent = str(self._meta("agent"))
            row = self._db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM entry").fetchone()
        self._entries, self._bytes = int(row[0]), int(row[1])

    @property
    def has_lazy_marks(self) -> bool:
        return bool(self._reported)

    def find(self, command: names.CommandId) -> Entry | None:
        with self._translated():
            row = self._db.execute("SELECT state FROM entry WHERE command = ?", (command,)).fetchone()
        return None if row is None else Entry(command, State(row[0]))

    def room(self, now: int) -> bool:
        """May another command be picked up? Evicts what is reported and past its `not-after` when space is short."""
        if self._entries < MAX_ENTRIES and self._bytes < MAX_OUTCOME_BYTES:
            return True
        with self._transaction():
            self._write_reported()
            self._db.execute(
                "DELETE FROM entry WHERE command IN (SELECT command FROM entry"
                " WHERE state NOT IN ('started', 'done') AND state <> 'doubt' AND not_after < ?"
                " ORDER BY not_after LIMIT ?)",
                (now - EVICT_MARGIN, max(MAX_ENTRIES // 10, 1)),
            )
        with self._translated():
            row = self._db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM entry").fetchone()
        self._entries, self._bytes = int(row[0]), int(row[1])
        return self._entries < MAX_ENTRIES and self._bytes < MAX_OUTCOME_BYTES

    def start(self, command: wire.Command, now: int, *, keep_request: bool) -> None:
        """Record the pick-up. When this returns the command will never be started again from its mail."""
        request = _pack(command) if keep_request else None
        with self._transaction(marks=False):  # the ack and the receipt wait for it; the outcome's write takes them
            self._insert(command, State.STARTED, now, request)

    def refuse(self, command: wire.Command, now: int) -> None:
        """Record that a claim was refused and the mail may go."""
        with self._transaction():
            self._insert(command, State.REFUSED, now, None)

    def reject(self, command: wire.Command, outcome: wire.Outcome) -> None:
        """Record a verified command that is answered without having started."""
        with self._transaction():
            self._insert(command, State.DONE, outcome.at, None)
            self._finish(outcome)

    def finish(self, outcome: wire.Outcome) -> None:
        with self._transaction():
            self._finish(outcome)

    def rerun(self, command: names.CommandId) -> None:
        with self._transaction():
            self._db.execute("UPDATE entry SET reruns = reruns + 1 WHERE command = ?", (command,))

    def doubt(self, commands: Iterable[names.CommandId]) -> None:
        with self._transaction():
            self._db.executemany("UPDATE entry SET state = 'doubt' WHERE command = ?", [(one,) for one in commands])

    def reported(self, command: names.CommandId) -> None:
        """Remember, with a later write, that what is told of it was confirmed."""
        self._reported.append(command)

    def flush(self) -> None:
        if self._reported:
            with self._transaction():
                pass

    def interrupted(self) -> list[Interrupted]:
        """What a crash left behind, oldest first."""
        with self._translated():
            rows = self._db.execute(
                "SELECT command, name, not_after, started_at, reruns, request FROM entry"
                " WHERE state = 'started' ORDER BY started_at, command"
            ).fetchall()
        return [
            Interrupted(names.CommandId(row[0]), row[1], row[2], row[3], row[4], _unpack(row[5]) if row[5] else None)
            for row in rows
        ]

    def unreported(self, limit: int, besides: Iterable[names.CommandId] = ()) -> list[Word]:
        """What was never confirmed, newest first: what has just ended must not wait behind what is only said again."""
        skip = set(besides) | set(self._reported)
        with self._translated():
            rows = self._db.execute(
                f"SELECT {_WORD} FROM entry WHERE state IN ('done', 'doubt')"  # noqa: S608 - a constant
                " ORDER BY coalesce(at, started_at) DESC, command DESC LIMIT ?",
                (limit + len(skip),),
            ).fetchall()
        return [self._word(row) for row in rows if row[0] not in skip][:limit]

    def word(self, command: names.CommandId) -> Word | None:
        """What is told of a command, confirmed or not; None while it runs, or if it never started."""
        with self._translated():
            row = self._db.execute(
                f"SELECT {_WORD} FROM entry"  # noqa: S608 - a constant
                " WHERE command = ? AND state IN ('done', 'reported', 'doubt', 'told')",
                (command,),
            ).fetchone()
        return None if row is None else self._word(row)

    def incarnation(self) -> str | None:
        with self._translated():
            return self._meta("incarnation")

    def meet(self, incarnation: str) -> None:
        """Another fabric: whatever was told is unreported again, in the same commit as its name."""
        with self._transaction():
            self._db.execute(
                "UPDATE entry SET state = iif(state = 'told', 'doubt', 'done') WHERE state IN ('reported', 'told')"
            )
            self._put("incarnation", incarnation)

    def last_fabric_time(self) -> int:
        """Epoch ms of the last hello's answer that was stored, 0 if there was none."""
        with self._translated():
            return int(self._meta("fabric-time") or 0)

    def store_fabric_time(self, now: int) -> None:
        with self._transaction():
            self._put("fabric-time", str(now))

    def counts(self) -> dict[str, int]:
        with self._translated():
            rows = self._db.execute("SELECT state, count(*) FROM entry GROUP BY state").fetchall()
        return {**{str(state): 0 for state in State}, **{row[0]: row[1] for row in rows}}

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._db.close()

    def _insert(self, command: wire.Command, state: State, now: int, request: str | None) -> None:
        self._db.execute(
            "INSERT INTO entry (command, state, name, not_after, started_at, request) VALUES (?, ?, ?, ?, ?, ?)",
            (command.id, state, command.name, command.not_after, now, request),
        )
        self._entries += 1

    def _finish(self, outcome: wire.Outcome) -> None:
        self._db.execute(
            "UPDATE entry SET state = 'done', request = NULL, status = ?, reason = ?, body = ?, content_type = ?,"
            " at = ? WHERE command = ?",
            (outcome.status, outcome.reason, outcome.body, outcome.content_type, outcome.at, outcome.command),
        )
        self._bytes += len(outcome.body)

    def _write_reported(self) -> None:
        if self._reported:
            marks, self._reported = self._reported, []
            self._db.executemany(
                "UPDATE entry SET state = iif(state = 'doubt', 'told', 'reported')"
                " WHERE command = ? AND state IN ('done', 'doubt')",
                [(one,) for one in marks],
            )

    def _word(self, row: tuple[str, wire.OutcomeStatus | None, str | None, bytes, str, int, int]) -> Word:
        command, status, reason, body, content_type, at, started_at = row
        if status is None:
            return wire.Receipt(names.CommandId(command), self.agent, "running", started_at)
        return wire.Outcome(names.CommandId(command), self.agent, status, reason, body, content_type, at)

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _put(self, name: str, value: str) -> None:
        self._db.execute(
            "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, value),
        )

    @contextmanager
    def _transaction(self, *, marks: bool = True) -> Iterator[None]:
        """One commit, in which the lazy marks travel along, if they may."""
        with self._translated():
            kept = self._reported
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if marks:
                    self._write_reported()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._reported = kept
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _refused(self._path, error) from error


def open_journal(state_dir: Path) -> Journal:
    """The journal of this directory, made with a new random agent id if there is none.

    Raises:
        errors.JournalRefused: it exists and can't be used; it is never replaced silently.
    """
    path = state_dir / FILE
    try:
        if not path.exists():
            _create(path)
        connection = _connect(path)
        try:
            _check(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _settle(connection, path)
            return Journal(connection, path)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError, ValueError) as error:
        raise _refused(path, error) from error


def read_counts(state_dir: Path) -> tuple[dict[str, int], int] | None:
    """Counts by state and the last fabric time of a journal that nobody has open, or None if there is none.

    Raises:
        errors.JournalRefused
    """
    path = state_dir / FILE
    if not path.exists():
        return None
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0, isolation_level=None)
    except sqlite3.Error as error:
        raise _refused(path, error) from error
    try:
        journal = Journal(connection, path)
        return journal.counts(), journal.last_fabric_time()
    finally:
        connection.close()


def _create(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.new")
    for leftover in (temporary, *(Path(f"{temporary}{suffix}") for suffix in ("-journal", "-wal", "-shm"))):
        leftover.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(temporary)
    try:
        connection.executescript(f"PRAGMA synchronous = FULL; BEGIN; {_SCHEMA} COMMIT;")
        connection.execute("INSERT INTO meta VALUES ('agent', ?)", (secrets.token_urlsafe(18),))
    finally:
        connection.close()
    os.link(temporary, path)
    temporary.unlink()
    files.sync_directory(path.parent)


def _settle(connection: sqlite3.Connection, path: Path) -> None:
    """Give the journal another agent id if it is not where it was made: then it was copied."""
    machine = b"".join(source.read_bytes() for source in _MACHINE if source.is_file())
    place = sha256(b"%d %b" % (path.stat().st_ino, machine)).hexdigest()
    known = connection.execute("SELECT value FROM meta WHERE name = 'place'").fetchone()
    if known is not None and known[0] == place:
        return
    connection.execute("BEGIN IMMEDIATE")
    if known is not None:
        connection.execute("UPDATE meta SET value = ? WHERE name = 'agent'", (secrets.token_urlsafe(18),))
        log.warning("journal.copied", path=path, because="it was made elsewhere; this agent has a new id")
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('place', ?)", (place,))
    connection.execute("COMMIT")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _FORMAT:
        raise errors.JournalRefused(
            f"the journal {path} has format {version}, not {_FORMAT}; use the version of the agent that wrote it"
        )
    if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(f"damaged: {found}")


def _connect(path: Path) -> sqlite3.Connection:
    # `isolation_level=None`: transactions are ours to begin. The thread check is off because the journal is
    # opened by the thread that starts the agent and then belongs to its I/O thread.
    return sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)


def _refused(path: Path, error: BaseException) -> errors.JournalRefused:
    return errors.JournalRefused(
        f"the journal {path} can't be used ({error}). It is what keeps commands from running twice, so the agent does"
        " not go on without it. Free space or repair the disk; if it is lost, delete it knowingly"
    )


def _pack(command: wire.Command) -> str:
    return json.dumps({**asdict(command), "body": b64encode(command.body).decode("ascii")})


def _unpack(text: str) -> wire.Command:
    values = json.loads(text)
    return wire.Command(**{**values, "body": b64decode(values["body"])})
