"""The revocation log: a file that is only added to, and lies outside the database's backups.

Its first line names it, so that a database knows its own. Each line ends with the checksum of what stands before. A
last line that is torn is cut off: whoever wrote it crashed before it could believe that the line is there. Any other
line that is damaged may be about a revocation that nobody else remembers.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final
from zlib import crc32

from fabric.errors import FabricError, NotLogged

log = logging.getLogger(__name__)

LOCK_FOR: Final = 5.0  # seconds to wait for the lines of others
LONGEST: Final = 16_384  # bytes of a line

_LOCK_EVERY = 0.005  # seconds
_FIRST = re.compile(rb'\{"v":1,"kind":"log","id":"([0-9a-f]{32})"\}')
_ACCEPT = "`restante accept-revocation-log` goes on with what there is, and what is lost can then come back."


class LogRefused(FabricError):
    """The file is not such that anybody may be let in."""

    code = "revocation-log"


@dataclass(frozen=True, slots=True)
class Mark:
    """The log `id`, up to the byte at which a line ends."""

    id: str
    offset: int


class RevocationLog:
    """A file that any number of threads and processes add to, each under a lock on it.

    Its methods block. Nothing is open between two calls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> Mark:
        """The mark before its first line; makes the file if there is none. Raises `LogRefused`."""
        with self._refusing("made"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked(os.O_CREAT) as file:
                if not _repair(file):
                    first = {"v": 1, "kind": "log", "id": secrets.token_hex(16)}
                    _add(file, [json.dumps(first, separators=(",", ":"))])
                    _make_lasting(self.path.parent)
                    log.warning("revocation-log.begun path=%s", self.path)
                return self._first(file)

    def append(self, lines: Sequence[str]) -> None:
        """Add JSON objects, durably. Raises `NotLogged`."""
        try:
            with self._locked() as file:
                _repair(file)
                _add(file, lines)
        except OSError as error:
            raise NotLogged(f"The revocation log {self.path} can't be written: {error.strerror}.") from error

    def read(self, after: Mark) -> Iterator[tuple[Mark, bytes]]:
        """The lines behind a mark, each with the mark behind it. All lines are checked: one before the mark that is
        damaged would else be found when it is needed.

        Raises:
            LogRefused: there is no file, or another one, or one that has lost lines, or a line is damaged.
        """
        with self._refusing("read"):
            with self._locked() as file:
                size, first = _repair(file), self._first(file)
            if first.id != after.id:
                raise LogRefused(
                    f"The revocation log {self.path} is not the one that the database knows. Put that one there, or "
                    f"say with the setting 'revocation_log' where it is. If it is lost: {_ACCEPT}"
                )
            with self.path.open("rb") as file:  # others may add to it meanwhile, behind `size`
                yield from self._lines(file, size, after)

    def _lines(self, file: BinaryIO, size: int, after: Mark) -> Iterator[tuple[Mark, bytes]]:
        number = offset = 0
        met = False
        while offset < size:
            line = file.readline(LONGEST)
            number, offset = number + 1, offset + len(line)
            content = _content(line)
            if content is None:
                raise self._damaged(number)
            if met:
                yield Mark(after.id, offset), content
            met = met or offset == after.offset
        if not met:
            raise LogRefused(
                f"The revocation log {self.path} has lost lines that the database has seen. Put the newest copy of the "
                f"file there. If this is the newest: {_ACCEPT}"
            )

    def _first(self, file: BinaryIO) -> Mark:
        file.seek(0)
        read = file.read(LONGEST)
        line = read[: read.find(b"\n") + 1]
        found = _FIRST.fullmatch(_content(line) or b"")
        if found is None:
            raise self._damaged(1)
        return Mark(found[1].decode(), len(line))

    def _damaged(self, number: int) -> LogRefused:
        return LogRefused(
            f"Line {number} of the revocation log {self.path} is damaged. Put a good copy of the file there. If there "
            f"is none, remove {'the file' if number == 1 else 'the line'}: {_ACCEPT}"
        )

    @contextmanager
    def _locked(self, flags: int = 0) -> Iterator[BinaryIO]:
        """The file, which nobody else adds to meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as raw:
            until = time.monotonic() + LOCK_FOR
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise NotLogged(f"The revocation log {self.path} is locked by another process.") from None
                    time.sleep(_LOCK_EVERY)
            yield raw  # closing it releases the lock

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise LogRefused(
                f"The revocation log {self.path} is not there, and the database knows of one. Put it there, or say "
                f"with the setting 'revocation_log' where it is. If it is lost: {_ACCEPT}"
            ) from error
        except OSError as error:
            raise LogRefused(f"The revocation log {self.path} can't be {what}: {error.strerror}.") from error


def _repair(file: BinaryIO) -> int:
    """Cut off what is behind the last whole line; the file's size then."""
    size = kept = file.seek(0, os.SEEK_END)
    while kept:
        start = max(0, kept - LONGEST)
        file.seek(start)
        end = file.read(kept - start).rfind(b"\n") + 1
        kept = start + end
        if end:
            break
    if kept < size:
        log.warning("revocation-log.torn bytes=%d", size - kept)
        file.truncate(kept)
    return kept


def _add(file: BinaryIO, lines: Sequence[str]) -> None:
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(b"".join(map(_sealed, lines)))
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _sealed(line: str) -> bytes:
    content = line.encode()[:-1]
    return b'%b,"sum":"%08x"}\n' % (content, crc32(content))


def _content(line: bytes) -> bytes | None:
    """What was sealed, or None when it was damaged since."""
    content, sum = line[:-19], line[-19:]
    return content + b"}" if sum == b',"sum":"%08x"}\n' % crc32(content) else None


def _make_lasting(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
