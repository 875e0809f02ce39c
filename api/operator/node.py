"""A private broker node: started, asked whether it really answers, stopped, and never left behind."""

import fcntl
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.serialization import Encoding

from api.operator import doors
from api.operator.authority import load_certificate
from api.operator.broker_files import LOOPBACK, Place, Ports, write
from api.operator.processes import Child, MissingToolError, enclosed, end_marked, marked
from api.operator.secrets import account_password, private_directory, replace_private
from api.operator.sockets import answers_http, free_port, is_free, reachable, speaks_amqp, take
from api.operator.userland import MINIMUM, Binaries
from topology.access import ACCOUNTS, ADMIN

_MARK = "RESTANTE_BROKER"  # environment variable by which the node's processes are found again: its directory
_START_TIMEOUT = 180.0  # seconds; a start takes 4 on a small machine, and half a minute with 10,000 mailboxes
_STOP_TIMEOUT = 30.0  # seconds until a node that was asked to stop is killed
_PROBE_TIMEOUT = 10.0  # seconds per step of a probe: a whole fleet may be before it
_OPEN_FILES = 65_536  # the Erlang machine's limit of ports, which the broker's scripts set
_LOG_LINES = 15  # of the broker's log, in the error when a start fails


class NodeError(Exception):
    """The node can't run; the message starts with one sentence that says why."""


class BrokerNode:
    """One RabbitMQ node of its own: ports, data, cookie, plugins and configuration, all under `<state_dir>/broker`.

    Synchronous; asyncio callers use `asyncio.to_thread`. Use it as a context manager, or call `start` and `stop`. If
    this process dies without stopping it, the kernel tells the node to stop; should even that fail, the next start
    with the same state directory ends what is left.

    The service accounts' passwords are in `<state_dir>/secrets/<account>`.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        certificate: Path,
        key: Path | None,
        authority: Path,
        auth_url: str,
        binaries: Binaries,
        log: Callable[[str], None],
        ports: Ports | None = None,
        host: str = LOOPBACK,
    ) -> None:
        """Describe a node; nothing is touched before `start`.

        Args:
            state_dir: where its state is, kept private (0700).
            certificate: PEM file with the certificate devices see; read at each start.
            key: PEM file with its private key; None: it is in the same file.
            authority: PEM file with the certificate of the authority.
            auth_url: the gateway's auth endpoint, such as `http://127.0.0.1:8081/broker/auth`.
            binaries: from `userland.find_binaries`.
            log: gets a line per step.
            ports: those that are not 0 are used as they are; the others are chosen once and remembered.
            host: the address the AMQPS listener binds to; everything else binds to loopback.
        """
        self._state_dir = state_dir.absolute()
        self._home = self._state_dir / "broker"
        self._certificate, self._key, self._authority = certificate, key, authority
        self._auth_url = auth_url
        self._binaries = binaries
        self._log = log
        self._wanted = ports or Ports()
        self._host = host
        self._ports: Ports | None = None
        self._lock: int | None = None
        self._node: Child | None = None
        self._epmd: Child | None = None
        self._logged_before = 0

    @property
    def name(self) -> str:
        """The Erlang node's name, one for each state directory."""
        return f"restante-{sha256(os.fsencode(self._home)).hexdigest()[:12]}@localhost"

    @property
    def amqps_port(self) -> int:
        """Where devices connect."""
        return self._chosen.amqps

    @property
    def amqp_port(self) -> int:
        """Where the fabric connects, on loopback."""
        return self._chosen.amqp

    @property
    def management_port(self) -> int:
        """The management API, on loopback."""
        return self._chosen.management

    @property
    def prometheus_port(self) -> int:
        """The broker's metrics, on loopback."""
        return self._chosen.prometheus

    @property
    def ports(self) -> Ports:
        """All ports, from the first start on."""
        return self._chosen

    @property
    def pid(self) -> int | None:
        """The Erlang machine's process, if it runs."""
        return self._node.pid if self._node is not None and self._node.running else None

    @property
    def running(self) -> bool:
        """Whether its process runs (it answers from the end of `start` on)."""
        return self.pid is not None

    def password(self, account: str) -> str:
        """The password of one of `topology.access.ACCOUNTS`."""
        return account_password(self._state_dir, account)

    def start(self, timeout: float = _START_TIMEOUT) -> None:
        """Start the node and return once it answers on all its listeners. Does nothing if it runs.

        Raises:
            NodeError: it can't be started, or didn't answer within `timeout` seconds; nothing of it is left then.
        """
        if self.running:
            return
        if self._binaries.version < MINIMUM:
            raise NodeError(
                f"RabbitMQ {'.'.join(map(str, self._binaries.version))} is too old,"
                f" {'.'.join(map(str, MINIMUM))} or newer is needed."
            )
        try:
            self._end_processes()  # a node that ended by itself
            self._acquire()
            self._ports = self._choose_ports()
            self._write_files()
            self._start_processes()
            self._wait_until_it_answers(time.monotonic() + timeout)
            self._check_doors()
        except MissingToolError as error:
            self.stop()
            raise NodeError(str(error)) from error
        except (OSError, ValueError) as error:
            self.stop()
            raise NodeError(f"The broker's files in {self._home} can't be prepared: {error}.") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the node cleanly, or kill it after half a minute. Stopping twice is stopping once."""
        self._end_processes()
        self._release()

    def kill9(self) -> None:
        """End it as a power cut would, leaving the data; `start` brings it back on the same ports."""
        for child in (self._node, self._epmd):
            if child is not None:
                child.kill()
        self._end_processes()

    def restart(self, timeout: float = _START_TIMEOUT) -> None:
        """Stop and start on the same ports and data."""
        self.stop()
        self.start(timeout)

    def wipe(self) -> None:
        """Delete its data: queues, messages, users. Ports and passwords stay.

        Raises:
            NodeError: it runs, here or in another process.
        """
        if self.running:
            raise NodeError("The broker runs; stop it before its data is deleted.")
        self._acquire()
        try:
            if (self._home / "data").exists():
                shutil.rmtree(self._home / "data")
        finally:
            self._release()

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The first errors the node logged since its last start, else its last lines."""
        # Until the configuration is read there is the console only.
        logs = _tail(self._home / "log" / "console.log", 0)
        logs += _tail(self._home / "log" / f"{self.name}.log", self._logged_before)
        errors = [text for line in logs if (text := line.partition(" [error] ")[2].partition("> ")[2].strip())]
        return "\n".join(errors[:lines] or logs[-lines:])  # the first error is the cause

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _chosen(self) -> Ports:
        if self._ports is None:
            raise NodeError("The broker's ports are chosen when it is first started.")
        return self._ports

    def _acquire(self) -> None:
        """Hold the state directory (the kernel lets go of it when this process dies) and end what is left in it.

        While we hold it nobody else's node can be in it, so what carries our mark was left by a killed runner.
        """
        if self._lock is None:
            private_directory(self._state_dir)
            private_directory(self._home)
            lock = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise NodeError(f"Another process runs the broker of {self._state_dir}; stop it first.") from error
            self._lock = lock
        if left := marked(_MARK, str(self._home)):
            self._log(f"ending what an earlier run left (process {left[0]})")
            end_marked(_MARK, str(self._home), _STOP_TIMEOUT)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _end_processes(self) -> None:
        """End the node, then its port mapper, then whatever they started and did not end."""
        if self._node is not None:
            self._node.stop(signal.SIGTERM, _STOP_TIMEOUT)
            self._node = None
        if self._epmd is not None:
            self._epmd.stop(signal.SIGTERM, 5.0)
            self._epmd = None
        if self._lock is not None:
            end_marked(_MARK, str(self._home), 5.0)

    def _choose_ports(self) -> Ports:
        remembered = self._ports or self._remembered_ports()
        used = {value for value in asdict(self._wanted).values() if value}
        chosen: dict[str, int] = {}
        for field in fields(Ports):
            host = self._host if field.name == "amqps" else LOOPBACK
            wanted, before = getattr(self._wanted, field.name), getattr(remembered, field.name)
            if wanted:
                if not is_free(host, wanted):
                    raise NodeError(
                        f"The {field.name} port {wanted} on {host} is taken or can't be used;"
                        " end what listens there or choose another port."
                    )
                port = wanted
            elif before and before not in used and take(host, before):
                port = before
            else:
                port = free_port(host, besides=used)
                if before:
                    self._log(f"the {field.name} port {before} is taken: using {port}")
            used.add(port)
            chosen[field.name] = port
        ports = Ports(**chosen)
        replace_private(self._home / "ports.json", json.dumps(asdict(ports)).encode())
        return ports

    def _remembered_ports(self) -> Ports:
        try:
            stored = json.loads((self._home / "ports.json").read_text("ascii"))
            known = {field.name: int(stored[field.name]) for field in fields(Ports) if field.name in stored}
        except (FileNotFoundError, ValueError, TypeError):
            return Ports()
        return replace(Ports(), **known)

    def _write_files(self) -> None:
        for directory in ("data", "log"):
            private_directory(self._home / directory)
        place = Place(self._host, self._chosen, self._auth_url)
        certificate = self._certificate.read_bytes() + (b"" if self._key is None else self._key.read_bytes())
        passwords = {account.name: self.password(account.name) for account in ACCOUNTS}
        write(self._home, place, certificate, self._authority.read_bytes(), passwords)

    def _start_processes(self) -> None:
        console = self._home / "log" / "console.log"
        replace_private(console, b"")
        log = self._home / "log" / f"{self.name}.log"
        self._logged_before = log.stat().st_size if log.exists() else 0
        self._epmd = self._run([str(self._binaries.epmd)], console)
        self._log(f"starting RabbitMQ {'.'.join(map(str, self._binaries.version))} as {self.name}")
        self._node = self._run([str(self._binaries.server)], console)

    def _environment(self) -> dict[str, str]:
        """The whole environment of the node's processes: nothing of ours is handed on but PATH."""
        ports, etc = self._chosen, self._home / "etc"
        return {
            _MARK: str(self._home),
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            if self._binaries.root
            else os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(self._home / "home"),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(ports.epmd),
            "ERL_INETRC": f"{etc}/inetrc",
            "ERL_CRASH_DUMP_BYTES": "0",  # a dump holds whatever was in memory, tokens too
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(ports.distribution),
            # A certificate that was replaced is read within 5 s, instead of 2 minutes.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} -ssl ssl_pem_cache_clean 5000"
            ),
            "RABBITMQ_CONFIG_FILES": f"{etc}/conf.d/*.conf",
            "RABBITMQ_CONFIG_FILE": f"{etc}/none",  # not the machine's own in /etc/rabbitmq
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{etc}/advanced.config",
            "RABBITMQ_CONF_ENV_FILE": f"{etc}/none.sh",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{etc}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": str(self._home / "data"),
            "RABBITMQ_LOG_BASE": str(self._home / "log"),
            "RABBITMQ_PID_FILE": str(self._home / "data" / "rabbitmq.pid"),
            "RABBITMQ_MAX_OPEN_FILES": str(_open_files()),
            # The script then becomes the Erlang machine instead of waiting for it: one process to signal.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _run(self, argv: list[str], output: Path) -> Child:
        if self._binaries.root is not None:
            argv = enclosed(self._binaries.root, [self._home], argv)
        return Child(argv, environment=self._environment(), output=output, death_signal=signal.SIGTERM)

    def _wait_until_it_answers(self, deadline: float) -> None:
        certificate = load_certificate(self._home / "tls" / "server.pem").public_bytes(Encoding.DER)
        host, ports = reachable(self._host), self._chosen
        password = self.password(ADMIN)
        probes: tuple[tuple[str, Callable[[], bool]], ...] = (
            ("AMQP listener", lambda: speaks_amqp(LOOPBACK, ports.amqp, _PROBE_TIMEOUT)),
            ("AMQPS listener", lambda: speaks_amqp(host, ports.amqps, _PROBE_TIMEOUT, certificate=certificate)),
            (
                "management API",
                lambda: answers_http(
                    LOOPBACK, ports.management, "/api/whoami", _PROBE_TIMEOUT, user=ADMIN, password=password
                ),
            ),
        )
        for what, answers in probes:
            while not answers():
                if not self.running:
                    status = self._node.returncode if self._node is not None else None
                    raise NodeError(f"The broker ended while it started (status {status}).\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise NodeError(f"The broker's {what} did not answer in time.\n{self.log_tail()}")
                time.sleep(0.05)
        self._log(f"the broker answers: AMQPS on {self._host}:{ports.amqps}")

    def _check_doors(self) -> None:
        try:
            doors.check(LOOPBACK, self.amqp_port, self.management_port, self.password(ADMIN))
        except doors.DoorOpen as error:
            raise NodeError(f"The broker is not used, since {error}.") from error


def _open_files() -> int:
    """As many as we may have, within what the broker makes use of."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)


def _tail(path: Path, start: int) -> list[str]:
    """The lines with text in the last 64 KiB of a log, from the offset `start` on."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(start if start <= size else 0, size - 65_536))  # shorter than before: it was rotated
            return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
