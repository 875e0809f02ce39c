"""`restante backup` and `restante restore`: all that the ledger knows, in one file that either database takes.

A backup is made while everything runs; a restoration needs everything to be stopped. The revocation log is in no
backup: it is what tells a restored database whom it must not let in (ADR 14).
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from api.operator.archive import BackupFailed, BadArchive, Reader, Writer
from api.operator.progress import Progress
from api.operator.secrets import make_lasting, private_directory, replace_private
from api.settings import Settings
from fabric.sql import dump

_MOST = 1024 * 1024  # bytes of a file of the state directory
_PUBLIC: Final = ("authority/*.pem", "authority/*.json", "certificates/*.pem", "keys/*.json")
_SECRET: Final = ("certificates/*.key", "secrets/*", "secrets/tokens/*", "secrets/commands/*", "operator.token")
_AUTHORITY: Final = ("authority/*.key",)

Log = Callable[[str], None]


def make(
    settings: Settings, file: Path, log: Log, *, force: bool, with_secrets: bool, with_authority_key: bool
) -> dict[str, object]:
    """Write a backup to `file`, mode 0600, which is there only once it is whole; what is in it.

    Raises:
        BackupFailed: the file is there (and not `force`), or can't be written.
        fabric.errors.FabricError: the database is away, or is not at this version's schema.
    """
    if file.exists() and not force:
        raise BackupFailed(f"{file} is there already; choose another name, or overwrite it with --force.")
    patterns = (*_PUBLIC, *(_SECRET if with_secrets else ()), *(_AUTHORITY if with_authority_key else ()))
    if with_secrets:
        log("the backup has SECRETS in the clear: whoever reads it signs tokens and commands, and is the operator")
    if with_authority_key:
        log("the backup has the AUTHORITY'S KEY: whoever reads it can pass for this fabric to every device")
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w+b") as opened:
                rows = _write(settings, Writer(opened), patterns, log)
                size = opened.tell()
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        make_lasting(file.parent)
    except OSError as error:
        raise BackupFailed(f"The backup {file} can't be written: {error.strerror}.") from error
    return {"file": str(file), "bytes": size, "rows": rows, "secrets": with_secrets}


def restore(settings: Settings, file: Path, log: Log, *, replace: bool) -> dict[str, object]:
    """Fill the database from a backup, and put back what the state directory lacks; what was done.

    Raises:
        BackupFailed: it is no backup, or was damaged; nothing was touched.
        fabric.errors.FabricError: the database is as it was: it is in use, away, or the backup is of a newer version.
    """
    try:
        with file.open("rb") as opened:
            archive = Reader(opened)
            tables, there = _tables(archive), _state_files(archive)
            log(f"the backup of {archive.manifest['made_at']} is whole")
            private_directory(settings.state_dir)
            dump.load(
                settings.database,
                archive.manifest["schema"],
                {name: table.columns for name, table in tables.items()},
                lambda table: archive.lines(f"tables/{table}.ndjson", dump.LONGEST),
                Progress(log),
                replace=replace,
            )
            put = _put_back(settings.state_dir, archive, there, log)
    except BadArchive as error:
        raise BackupFailed(f"{file} is not restored: {error}.") from error
    except OSError as error:
        raise BackupFailed(f"{error.filename or file} can't be used: {error.strerror}.") from error
    rows = sum(table.rows for table in tables.values())
    return {"made_at": archive.manifest["made_at"], "rows": rows, "files": put}


@dataclass(frozen=True, slots=True)
class _Table:
    columns: tuple[str, ...]
    rows: int


def _write(settings: Settings, archive: Writer, patterns: Sequence[str], log: Log) -> int:
    """The rows, as they are at one moment, then the files; how many rows."""
    about: dict[str, object] = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "fabric": settings.fabric}
    progress, tables = Progress(log), dict[str, _Table]()
    with dump.snapshot(settings.database) as snapshot:
        for name, columns in snapshot.tables.items():
            counted = _Counted(name, snapshot.lines(name), progress)
            archive.add(f"tables/{name}.ndjson", counted)
            tables[name] = _Table(columns, counted.rows)
    for pattern in patterns:  # the rings of keys before the keys: those that a ring names are there already
        for path in sorted(settings.state_dir.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                archive.add(f"state/{path.relative_to(settings.state_dir)}", [path.read_bytes()])
    said = {name: asdict(table) for name, table in tables.items()}
    archive.close({**about, "schema": snapshot.revision, "tables": said})
    return sum(table.rows for table in tables.values())


def _tables(archive: Reader) -> dict[str, _Table]:
    """What the manifest says of the tables; raises `BadArchive` unless each has its file, and no other has."""
    found = {}
    match archive.manifest:
        case {"schema": str(), "made_at": str(), "tables": dict(tables)}:
            for name, table in tables.items():
                match table:
                    case {"columns": [*columns], "rows": int(rows)}:
                        found[str(name)] = _Table(tuple(map(str, columns)), rows)
    if not found or {f"tables/{name}.ndjson" for name in found} != set(archive.names("tables")):
        raise BadArchive("its manifest does not say which tables it has")
    return found


def _state_files(archive: Reader) -> list[str]:
    """Its files of a state directory; raises `BadArchive` when one is none of those that are put into backups."""
    names = [name.removeprefix("state/") for name in archive.names("state")]
    for name in names:
        if not any(_matches(name, pattern) for pattern in (*_PUBLIC, *_SECRET, *_AUTHORITY)):
            raise BadArchive(f"it has the file {name}, which no backup has")
        if archive.size(f"state/{name}") > _MOST:
            raise BadArchive(f"its file {name} is too large")
    return names


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _put_back(state_dir: Path, archive: Reader, names: Sequence[str], log: Log) -> int:
    """Write the files that are missing; those that are there are the newer ones."""
    missing = [name for name in names if not (state_dir / name).exists()]
    for name in missing:
        path = state_dir / name
        for folder in reversed(path.relative_to(state_dir).parents):
            private_directory(state_dir / folder)
        replace_private(path, archive.content(f"state/{name}"))
    if len(missing) < len(names):
        log(f"{len(names) - len(missing)} files of {state_dir} are there, and were left as they are")
    return len(missing)


class _Counted:
    """Lines, counted as they go by."""

    def __init__(self, table: str, lines: Iterator[bytes], progress: Progress) -> None:
        self.rows = 0
        self._table, self._lines, self._progress = table, lines, progress

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            yield line
            self.rows += 1
            self._progress(self._table, self.rows)
