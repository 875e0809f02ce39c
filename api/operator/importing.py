"""`restante device import`: many devices from a file, a bounded number at a time, to be resumed when interrupted.

Tickets go to a file of its own (0600, CSV: id, ticket, expires_at), appended and synced batch by batch. What was
made in a batch that was not written any more is found again by `resume`: such a device exists and has no key, and is
given a new ticket.
"""

import csv
import io
import json
import os
import random
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from api.operator.client import CallFailed, Connection, failure
from topology import names

AT_ONCE = 8  # requests; a gateway has more callers than this one
BATCH = 100  # devices between two syncs of the tickets
LARGEST = 1_000_000  # devices in a file
ATTEMPTS = 6  # for a device, while the gateway is not available
LONGEST_PAUSE = 5.0  # seconds between two of them
TELL_EVERY = 1.0  # seconds between two lines of progress
COLUMNS = ("id", "ticket", "expires_at")
_FIELDS = {"id", "groups", "labels"}
_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Entry:
    """A device that is to be made; `line` is where it stands."""

    line: int
    id: str
    groups: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """How many were made (`again`: existed without a key, and got a new ticket), skipped since they exist or have their
    ticket already, and refused."""

    made: int
    again: int
    skipped: int
    refused: int


@dataclass(frozen=True, slots=True)
class _Done:
    what: str
    id: str
    ticket: str = ""
    expires_at: str = ""
    why: str = ""


def run(connection: Connection, source: Path, tickets: Path, say: Callable[[str], None], *, resume: bool) -> Imported:
    """Make the devices of a file. CSV with a header (`id`, and `groups` and `labels` as `a b` and `a=1 b=2`), or one
    JSON object a line.

    Raises:
        CallFailed: a file can't be used, or the gateway stays away; what was made until then is kept.
    """
    entries = read(source)
    with _Tickets(tickets, resume=resume) as kept:
        todo = [entry for entry in entries if entry.id not in kept.known]
        counts = {"made": 0, "again": 0, "skipped": len(entries) - len(todo), "refused": 0}
        began = told = time.monotonic()
        with connection.client(_TIMEOUT) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            maker = _Maker(connection, client, resume=resume)
            for start in range(0, len(todo), BATCH):
                batch = list(pool.map(maker.make, todo[start : start + BATCH]))
                kept.add([done for done in batch if done.ticket])
                for done in batch:
                    if done.what == "failed":
                        raise CallFailed(f"{done.why} Run it again with --resume: what was made is kept in {tickets}.")
                    counts[done.what] += 1
                    if done.why:
                        say(f"{done.id}: {done.why}")
                now = time.monotonic()
                if now - told >= TELL_EVERY:
                    told, many = now, start + len(batch)
                    say(f"{many} of {len(todo)}, {many / (now - began):.0f} a second")
    return Imported(**counts)


def read(source: Path) -> list[Entry]:
    """What a file asks for, each id once. Raises `CallFailed` that names the line."""
    try:
        text = source.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CallFailed(f"{source} can't be read: {error}.") from None
    found: dict[str, Entry] = {}
    for entry in _objects(source, text) if text.lstrip().startswith("{") else _rows(source, text):
        wrong = _wrong(entry)
        if wrong is None and entry.id in found:
            wrong = f"{entry.id} stands in line {found[entry.id].line} already"
        if wrong is not None:
            raise CallFailed(f"{source}, line {entry.line}: {wrong}. Nothing was made.")
        found[entry.id] = entry
        if len(found) > LARGEST:
            raise CallFailed(f"{source} has more than {LARGEST} devices. Nothing was made.")
    return list(found.values())


class _Maker:
    """Makes devices, from any thread."""

    def __init__(self, connection: Connection, client: httpx.Client, *, resume: bool) -> None:
        self._connection, self._client, self._resume = connection, client, resume

    def make(self, entry: Entry) -> _Done:
        try:
            return self._make(entry)
        except CallFailed as failed:
            return _Done("failed", entry.id, why=str(failed))

    def _make(self, entry: Entry) -> _Done:
        body = {"id": entry.id, "groups": list(entry.groups), "labels": dict(entry.labels)}
        answer, repeated = self._ask("POST", "/v1/devices", json=body)
        if answer.status_code == httpx.codes.CREATED:
            return _with_ticket("made", entry.id, answer.json()["enrollment"])
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise failure(answer)
        if answer.status_code != httpx.codes.CONFLICT:
            return _Done("refused", entry.id, why=f"line {entry.line}: {failure(answer)}")
        if not self._resume and not repeated:
            return _Done("skipped", entry.id, why="there is a device of this id already")
        return self._again(entry.id)

    def _again(self, id: str) -> _Done:
        """It exists; was it made by this import, and its ticket lost?"""
        listed, _ = self._ask("GET", f"/v1/devices/{id}/keys")
        if not listed.is_success:
            return _Done("refused", id, why=str(failure(listed)))
        if listed.json()["items"]:
            return _Done("skipped", id, why="it is enrolled")
        answer, _ = self._ask("POST", f"/v1/devices/{id}/enrollment")
        if not answer.is_success:
            return _Done("refused", id, why=str(failure(answer)))
        return _with_ticket("again", id, answer.json())

    def _ask(self, method: str, path: str, **arguments: Any) -> tuple[httpx.Response, bool]:
        """The answer, and whether the request was sent before, with an unknown fate.

        Raises `CallFailed` when the gateway stays away.
        """
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            pause = LONGEST_PAUSE
            try:
                answer = self._client.request(method, path, **arguments)
            except httpx.TransportError as error:
                if last:
                    raise self._connection.unreachable(error) from None
            else:
                if answer.status_code not in (429, 500, 502, 503, 504):
                    return answer, attempt > 0
                if last:
                    raise failure(answer)
                after = answer.headers.get("retry-after", "")
                pause = min(float(after) if after.isdigit() else pause, LONGEST_PAUSE)
            time.sleep(random.random() * min(pause, 0.2 * 2**attempt))  # noqa: S311 - jitter
        raise AssertionError("the last attempt returns or raises")


class _Tickets:
    """The file of tickets; `known` are the ids that have one in it."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Raises `CallFailed`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags if resume else flags | os.O_EXCL, 0o600)
        except FileExistsError:
            raise CallFailed(f"{path} exists; use --resume to go on with it, or another file.") from None
        except OSError as error:
            raise CallFailed(f"{path} can't be made: {error.strerror}.") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            _check_private(path, descriptor)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]  # a crash may have torn the last line
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
            rows = csv.reader(io.StringIO(whole.decode("utf-8", "replace")))
            self.known = {row[0] for row in rows if len(row) == len(COLUMNS) and row[0] != COLUMNS[0]}
            if not whole:
                self._write([COLUMNS])
        except BaseException:
            self._file.close()
            raise

    def add(self, made: Sequence[_Done]) -> None:
        """Durable when this returns."""
        self._write([(done.id, done.ticket, done.expires_at) for done in made])

    def __enter__(self) -> "_Tickets":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue().encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _with_ticket(what: str, id: str, enrollment: Mapping[str, Any]) -> _Done:
    return _Done(what, id, str(enrollment["ticket"]), str(enrollment["expires_at"]))


def _check_private(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise CallFailed(f"{path} is no file of yours that is closed to others; run: chmod 600 {path}")


def _objects(source: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CallFailed(f"{source}, line {number}: {error}. Nothing was made.") from None
        given = value if isinstance(value, dict) else {"": value}
        groups, labels = given.get("groups", []), given.get("labels", {})
        if not given.keys() <= _FIELDS or not isinstance(groups, list) or not isinstance(labels, dict):
            raise CallFailed(f"{source}, line {number}: it is no object of id, groups and labels. Nothing was made.")
        yield Entry(number, given.get("id", ""), tuple(groups), labels)


def _rows(source: Path, text: str) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if "id" not in (rows.fieldnames or ()) or not {*(rows.fieldnames or ())} <= _FIELDS:
            raise CallFailed(f"{source}: the first line names the columns: id, and groups and labels if there are any.")
        for row in rows:
            labels = [each.partition("=") for each in (row.get("labels") or "").split()]
            if None in row or not all(equals for _, equals, _ in labels):
                raise CallFailed(f"{source}, line {rows.line_num}: labels are name=value, with spaces between them.")
            named = {name: value for name, _, value in labels}
            yield Entry(rows.line_num, row["id"] or "", tuple((row.get("groups") or "").split()), named)
    except csv.Error as error:
        raise CallFailed(f"{source}, line {rows.line_num}: {error}. Nothing was made.") from None


def _wrong(entry: Entry) -> str | None:
    """What the gateway would refuse for its form."""
    if not isinstance(entry.id, str) or not names.is_device(entry.id):
        return "the id is not of a-z, 0-9, '_' and '-', 63 characters at most"
    if not all(isinstance(group, str) and names.is_dotted(group) for group in entry.groups):
        return "a group is dot-separated words of a-z, 0-9, '_' and '-'"
    if not all(isinstance(text, str) for pair in entry.labels.items() for text in pair):
        return "labels are texts"
    return None
