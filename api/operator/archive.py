"""The file of a backup: a tar of plain files, of which the last, the manifest, vouches for the others.

What is read may come from anywhere: only the plainest headers are understood, and everything is bounded. The manifest
tells damage, not forgery; whoever can write a backup decides what a restoration brings.
"""

import hashlib
import io
import json
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_PIECE = 1024 * 1024  # bytes read at once
_MOST_MEMBERS = 2_000
_MOST_MANIFEST = 1024 * 1024  # bytes
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,62}"
_NAME = re.compile(rf"tables/[a-z_]{{1,63}}\.ndjson|state/{_PART}(?:/{_PART}){{0,3}}|manifest\.json", re.ASCII)


class BackupFailed(Exception):
    """A backup was not made, or not restored; the text says why, and what to do."""


class BadArchive(Exception):
    """It is no backup, or was damaged; the text says how."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive: where its `size` bytes begin, and their SHA-256 in hex."""

    offset: int
    size: int
    sha256: str


class Writer:
    """Adds files to an archive in a file that can be sought in. `close` makes it whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._made_at = int(time.time())
        self._members: dict[str, Member] = {}

    def add(self, name: str, pieces: Iterable[bytes]) -> None:
        """Add a file whose size is known only once all its pieces are there."""
        start = self._file.tell()
        self._file.write(bytes(_BLOCK))
        size, digest = 0, hashlib.sha256()
        for piece in pieces:
            self._file.write(piece)
            digest.update(piece)
            size += len(piece)
        self._file.write(bytes(-size % _BLOCK))
        end = self._file.tell()
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = size, 0o600, self._made_at
        self._file.seek(start)
        self._file.write(header.tobuf(tarfile.GNU_FORMAT))
        self._file.seek(end)
        self._members[name] = Member(start + _BLOCK, size, digest.hexdigest())

    def close(self, about: Mapping[str, object]) -> None:
        """Add the manifest: what is said about the backup, and the sum of each file."""
        files = {name: {"size": member.size, "sha256": member.sha256} for name, member in self._members.items()}
        manifest = json.dumps({"format": FORMAT, **about, "files": files}, indent=1)
        self.add(MANIFEST, [manifest.encode()])
        self._file.write(_END)


class Reader:
    """An archive that has been verified from its first byte to its last.

    Attributes:
        manifest: as its writer gave it; `format` and `files` are checked, the rest is not.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Raises `BadArchive`."""
        self._file = file
        self._members = dict(_scan(file))
        kept = self._members.pop(MANIFEST, None)
        if kept is None:
            raise BadArchive("it has no manifest: it was cut off, or is no backup")
        self.manifest = _manifest(b"".join(_read(file, kept)))
        said = {name: (member.size, member.sha256) for name, member in self._members.items()}
        if said != self.manifest["files"]:
            odd = sorted(name for name, _ in said.items() ^ self.manifest["files"].items())
            raise BadArchive(f"what it has is not what its manifest says: {', '.join(odd[:3])}")

    def names(self, folder: str) -> list[str]:
        return [name for name in self._members if name.startswith(f"{folder}/")]

    def lines(self, name: str, longest: int) -> Iterator[bytes]:
        """The lines of a file, with their ends. Raises `ValueError` for one that is longer, or has no end."""
        member = self._members[name]
        left, at = member.size, member.offset
        while left:
            self._file.seek(at)
            line = self._file.readline(min(left, longest))
            if not line.endswith(b"\n"):
                raise ValueError(f"a line of {name} is too long")
            left, at = left - len(line), at + len(line)
            yield line

    def size(self, name: str) -> int:
        return self._members[name].size

    def content(self, name: str) -> bytes:
        return b"".join(_read(self._file, self._members[name]))


def _scan(file: BinaryIO) -> Iterator[tuple[str, Member]]:
    size = file.seek(0, io.SEEK_END)
    at, seen = 0, set[str]()
    while True:
        file.seek(at)
        block = file.read(_BLOCK)
        if block == _END[:_BLOCK]:
            if file.read() != _END[_BLOCK:]:
                raise BadArchive("it goes on behind its end")
            return
        name, length = _header(block)
        if name in seen or len(seen) >= _MOST_MEMBERS:
            raise BadArchive(f"it has {name} twice, or too much else")
        seen.add(name)
        start = at + _BLOCK
        at = start + length + -length % _BLOCK
        if at > size:
            raise BadArchive(f"it was cut off within {name}")
        digest = hashlib.sha256()
        for piece in _read(file, Member(start, length, "")):
            digest.update(piece)
        yield name, Member(start, length, digest.hexdigest())


def _header(block: bytes) -> tuple[str, int]:
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError):
        raise BadArchive("it was cut off, or is no backup") from None
    if header.type != tarfile.REGTYPE or not _NAME.fullmatch(header.name) or header.size < 0:
        raise BadArchive(f"it has {header.name[:80]!r}, which no backup has")
    if header.name == MANIFEST and header.size > _MOST_MANIFEST:
        raise BadArchive("its manifest is too large")
    return header.name, header.size


def _read(file: BinaryIO, member: Member) -> Iterator[bytes]:
    file.seek(member.offset)
    left = member.size
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            raise BadArchive("it became shorter while it was read")
        left -= len(piece)
        yield piece


def _manifest(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        number = found["format"]
        if number == FORMAT:
            found["files"] = {str(name): (each["size"], each["sha256"]) for name, each in found["files"].items()}
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadArchive("its manifest can't be read") from None
    raise BadArchive(f"its format is {number!r:.20} and must be {FORMAT}: restore it with the version that made it")
