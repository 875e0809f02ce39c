"""A private PostgreSQL cluster: its own directory, port and password, gone when it is stopped."""

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import psycopg
from psycopg import sql

from api.operator.processes import Child, enclosed, tool
from api.operator.secrets import write_private
from api.operator.sockets import free_port
from api.operator.userland import prepare_userland

MINIMUM = 15
_HOST = "127.0.0.1"
_USER = "restante"
_START_TIMEOUT = 30.0  # seconds; a start takes one, recovery after kill9 a little more
_STOP_TIMEOUT = 15.0  # seconds


class PostgresError(Exception):
    """The cluster can't run; the message says why."""


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """Where `postgres` and `initdb` are, as seen inside `root` (None: this machine)."""

    directory: Path
    root: Path | None = None


def find_postgres(*, log: Callable[[str], None] = print) -> PostgresBinaries:
    """PostgreSQL 15 or newer: in PATH, in Debian's place, or in the cached userland (made if need be)."""
    in_path = shutil.which("postgres")
    candidates = [Path(in_path).resolve().parent] if in_path else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_major, reverse=True)
    for directory in candidates:
        if (directory / "initdb").exists() and _version(directory) >= MINIMUM:
            return PostgresBinaries(directory)
    root = prepare_userland(log=log)
    bundled = sorted((root / "usr/lib/postgresql").glob("*/bin"), key=_major)
    if not bundled:
        raise PostgresError(f"The userland {root} has no PostgreSQL.")
    return PostgresBinaries(Path("/") / bundled[-1].relative_to(root), root)


class PostgresCluster:
    """One server, reached over loopback with a password. Context manager, or `start` and `stop`."""

    def __init__(self, binaries: PostgresBinaries | None = None) -> None:
        self._binaries = binaries or find_postgres()
        self._directory: Path | None = None
        self._server: Child | None = None
        self._password = secrets.token_urlsafe(24)
        self.port = 0

    def start(self) -> None:
        """Start it and return once it answers; on the same data and port after `kill9`."""
        if self._server is not None:
            return
        try:
            if self._directory is None:
                self._create()
            self._server = self._spawn()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and delete its directory. Stopping twice is stopping once."""
        if self._server is not None:
            self._server.stop(signal.SIGINT, _STOP_TIMEOUT)  # a fast shutdown: clients are disconnected
            self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill9(self) -> None:
        """End all of its processes as a power cut would, leaving the data."""
        if self._server is None:
            return
        # Stopped first, so that it starts no process between the listing and the end. Its processes are sessions of
        # their own, so the group alone would leave them.
        server = psutil.Process(self._server.pid)
        server.suspend()
        processes = server.children(recursive=True)
        for process in processes:
            process.kill()
        self._server.kill()
        psutil.wait_procs(processes, timeout=5.0)
        self._server = None

    def new_database(self) -> str:
        """Create an empty database; its SQLAlchemy URL."""
        name = f"test_{secrets.token_hex(6)}"
        self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._url(name)

    def copy(self, url: str) -> str:
        """A copy of a database that nobody is connected to; its URL."""
        name = f"test_{secrets.token_hex(6)}"
        original = url.rpartition("/")[2]
        self._execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(original)))
        return self._url(name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _create(self) -> None:
        # In /tmp and not in TMPDIR, which may be closed to the user that PostgreSQL runs as.
        self._directory = Path(tempfile.mkdtemp(prefix="restante-postgres-", dir="/tmp"))
        password = write_private(self._directory / "password", self._password.encode())
        data = self._directory / "data"
        data.mkdir(0o700)
        if (account := _account()) is not None:
            for path in (self._directory, password, data):
                os.chown(path, account.pw_uid, account.pw_gid)
        command = self._command(
            [
                "initdb",
                f"--pgdata={data}",
                f"--username={_USER}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ]
        )
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise PostgresError(f"initdb failed: {done.stderr.strip()}")
        self.port = free_port(_HOST, besides=set())

    def _spawn(self) -> Child:
        assert self._directory is not None
        settings = {
            "listen_addresses": _HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "on",
            "max_connections": "200",
        }
        argv = ["postgres", "-D", str(self._directory / "data")]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        return Child(
            self._command(argv),
            environment=self._environment(),
            output=self._directory / "log",
            death_signal=signal.SIGINT,
        )

    def _command(self, argv: list[str]) -> list[str]:
        """With the full path, as an unprivileged user (PostgreSQL refuses to be root), in the userland if need be."""
        assert self._directory is not None
        command = [str(self._binaries.directory / argv[0]), *argv[1:]]
        if (account := _account()) is not None:
            setpriv = "/usr/bin/setpriv" if self._binaries.root else tool("setpriv", "util-linux")
            who = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
            command = [setpriv, *who, "--pdeathsig=INT", *command]  # changing users has cleared the death signal
        if self._binaries.root is not None:
            return enclosed(self._binaries.root, [self._directory], command)
        return command

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": str(self._directory), "TZ": "UTC"}

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://{_USER}:{self._password}@{_HOST}:{self.port}/{database}"

    def _conninfo(self, database: str) -> str:
        return (
            f"host={_HOST} port={self.port} user={_USER} password={self._password} dbname={database} connect_timeout=3"
        )

    def _wait_until_it_answers(self) -> None:
        assert self._server is not None
        assert self._directory is not None
        until = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                psycopg.connect(self._conninfo("postgres")).close()
            except psycopg.OperationalError as error:
                if not self._server.running or time.monotonic() > until:
                    log = (self._directory / "log").read_text("utf-8", "replace")
                    raise PostgresError(f"PostgreSQL did not start.\n{log[-2000:]}") from error
                time.sleep(0.05)
            else:
                return


def _account() -> pwd.struct_passwd | None:
    """The user to become, or None if this is an ordinary user already."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _major(directory: Path) -> int:
    return int(directory.parent.name) if directory.parent.name.isdigit() else 0


def _version(directory: Path) -> int:
    done = subprocess.run(
        [directory / "postgres", "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    found = re.search(r"\b(\d+)(?:\.|devel|beta|rc|\s|$)", done.stdout)
    return int(found[1]) if found else 0
