"""`restante up`: broker, worker and gateway together, on this machine, until told to stop.

Each is a process of its own, so that one can die without the others; `supervise` starts again what died.
Tests use the same class, and kill its parts one by one.
"""

import json
import os
import signal
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from api.operator import setup
from api.operator.broker_files import LOOPBACK
from api.operator.node import BrokerNode, NodeError
from api.operator.processes import Child
from api.operator.running import PLACES
from api.operator.secrets import private_directory, replace_private
from api.operator.setup import LOCAL_NAMES, Files
from api.operator.sockets import free_port, is_free, take
from api.operator.userland import Binaries, find_binaries
from api.settings import PREFIX, Settings, as_environment
from topology import names

READY_TIMEOUT = 60.0  # seconds from the gateway's start until it says it is ready
STOP_PATIENCE = 20.0  # seconds for a process to finish what it does
_RESTART_FIRST = 0.5  # seconds, doubled with each quick death
_RESTART_LONGEST = 10.0
_STEADY_AFTER = 10.0  # seconds of life that make the next death a first one again
_DEFAULTS = Settings()

Log = Callable[[str], None]


@dataclass(slots=True)
class _Service:
    """A part that can be started again: `restante gateway` or `restante worker`."""

    name: str
    child: Child | None = None
    began: float = 0.0
    deaths: int = 0
    again_at: float = 0.0
    wanted: bool = False


class Stack:
    """A stack on this machine, its state under `settings.state_dir`. Synchronous."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        *,
        hosts: Sequence[str] = LOCAL_NAMES,
        binaries: Binaries | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Describe a stack; nothing is touched before `start`.

        Args:
            settings: ports that differ from the defaults are used as they are; the others are chosen once, and
                remembered.
            hosts: the names and addresses by which devices and callers reach it; the certificate is for these.
            binaries: the broker to run; by default the one that is found.
            environment: more of it for gateway and worker.
        """
        self.files = Files(settings.state_dir.absolute())
        self._wanted = replace(settings, state_dir=self.files.state_dir)
        self._log, self._hosts, self._binaries = log, hosts, binaries
        self._extra = environment or {}
        self.settings = self._wanted
        self.broker: BrokerNode | None = None
        self._services = {name: _Service(name) for name in ("worker", "gateway")}

    def start(self) -> None:
        """Set up what is missing, start all parts, and return once the gateway is ready.

        Raises:
            NodeError, UserlandError, AuthorityError, FabricError: one sentence; all parts are stopped again.
        """
        try:
            self._prepare()
            self.start_service("worker")
            self.start_service("gateway")
            self.wait_until_ready()
            self._write_summary()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all parts, the broker last. Does nothing twice."""
        for service in reversed(self._services.values()):
            service.wanted = False
            if service.child is not None:
                service.child.stop(signal.SIGTERM, STOP_PATIENCE)
        if self.broker is not None:
            self.broker.stop()

    def supervise(self, ended: threading.Event) -> None:
        """Start again what dies, with back-off, until `ended` is set."""
        while not ended.wait(0.2):
            if self.broker is not None and not self.broker.running:
                self._log("the broker died; starting it again")
                try:
                    self.broker.start()
                except NodeError as error:
                    self._log(f"{error}\ntrying again in {_RESTART_LONGEST:g} s")
                    ended.wait(_RESTART_LONGEST)
            for service in self._services.values():
                self._revive(service)

    def start_service(self, name: str) -> None:
        """Start `worker` or `gateway`; does nothing if it runs."""
        service = self._services[name]
        service.wanted = True
        if service.child is None or not service.child.running:
            service.began = time.monotonic()
            service.child = Child(
                [sys.executable, "-m", "api.operator.cli", name],
                environment=self._environment(),
                output=self.files.state_dir / f"{name}.log",
                death_signal=signal.SIGTERM,
            )

    def stop_service(self, name: str) -> None:
        service = self._services[name]
        service.wanted = False
        if service.child is not None:
            service.child.stop(signal.SIGTERM, STOP_PATIENCE)

    def kill_service(self, name: str) -> None:
        """SIGKILL it, as a crash would."""
        child = self._services[name].child
        if child is not None:
            child.kill()

    def service_pid(self, name: str) -> int:
        child = self._services[name].child
        if child is None:
            raise NodeError(f"the {name} was not started")
        return child.pid

    def wait_until_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Return once `/health/ready` answers 200.

        Raises:
            NodeError: not within `timeout` seconds, or a part died: with the end of its log.
        """
        context = ssl.create_default_context(cafile=self.files.authority)
        until = time.monotonic() + timeout
        said = "it does not answer"
        while time.monotonic() < until:
            for service in self._services.values():
                if service.wanted and service.child is not None and not service.child.running:
                    raise NodeError(f"The {service.name} ended at its start:\n{self.log_tail(service.name)}")
            try:
                url = f"{self.settings.api_url}/health/ready"
                with urllib.request.urlopen(url, timeout=2, context=context):  # noqa: S310 - our own https URL
                    return
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
            except OSError as error:
                said = str(error)
            time.sleep(0.05)
        raise NodeError(f"The gateway was not ready within {timeout:g} s: {said}\n{self.log_tail('gateway')}")

    def log_tail(self, name: str, lines: int = 15) -> str:
        path = self.files.state_dir / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def _prepare(self) -> None:
        private_directory(self.files.state_dir)
        setup.run(self._wanted, self._hosts, self._log)
        ports = self._ports()
        self.broker = BrokerNode(
            self.files.state_dir,
            certificate=self.files.broker_certificate,
            key=None,
            authority=self.files.authority,
            auth_url=f"http://{LOOPBACK}:{ports['auth_port']}/broker/auth",
            binaries=self._binaries or find_binaries(_configured_broker(), log=self._log),
            log=self._log,
        )
        self.broker.start()
        self.settings = replace(
            self._wanted,
            amqp_host=LOOPBACK,
            amqp_port=self.broker.amqp_port,
            management_url=f"http://{LOOPBACK}:{self.broker.management_port}",
            amqps_url=f"amqps://{self._hosts[0]}:{self.broker.amqps_port}/{names.VHOST}",
            api_url=f"https://{self._hosts[0]}:{ports['api_port']}",
            api_port=ports["api_port"],
            auth_host=LOOPBACK,
            auth_port=ports["auth_port"],
            worker_host=LOOPBACK,
            worker_port=ports["worker_port"],
            tls_certificate=str(self.files.certificate),
            tls_key="",
        )

    def _ports(self) -> dict[str, int]:
        """The ports of gateway and worker: as configured, else as last time if they are free, else free ones."""
        path = self.files.state_dir / "ports.json"
        remembered: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        chosen: dict[str, int] = {}
        for name, host in (("api_port", self._wanted.api_host), ("auth_port", LOOPBACK), ("worker_port", LOOPBACK)):
            configured: int = getattr(self._wanted, name)
            if configured != getattr(_DEFAULTS, name):
                if not is_free(host, configured):
                    raise NodeError(f"The {name} {configured} is taken on {host}; free it or configure another.")
                chosen[name] = configured
                continue
            last = remembered.get(name)
            chosen[name] = last if last and take(host, last) else free_port(host, besides=set(chosen.values()))
        replace_private(path, json.dumps(chosen).encode())
        return chosen

    def _environment(self) -> dict[str, str]:
        """What the services are told: every setting; secrets are in files that only the settings name."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return {**kept, **as_environment(self.settings), "PYTHONUNBUFFERED": "1", **self._extra}

    def _revive(self, service: _Service) -> None:
        now = time.monotonic()
        if not service.wanted or service.child is None or service.child.running:
            return
        if service.again_at == 0.0:
            service.deaths = 1 if now - service.began > _STEADY_AFTER else service.deaths + 1
            pause = min(_RESTART_LONGEST, _RESTART_FIRST * 2 ** (service.deaths - 1))
            service.again_at = now + pause
            self._log(f"the {service.name} died (exit {service.child.returncode}); starting it again in {pause:g} s")
        elif now >= service.again_at:
            service.again_at = 0.0
            self.start_service(service.name)

    def _write_summary(self) -> None:
        summary = {
            "api_url": self.settings.api_url,
            "amqps_url": self.settings.amqps_url,
            "ca_file": str(self.files.authority),
            "token_file": str(self.files.operator_token),
            "inside": {name: getattr(self.settings, name) for name in PLACES},  # for `restante doctor` and `rebuild`
        }
        replace_private(self.files.stack, (json.dumps(summary, indent=2) + "\n").encode())


def _configured_broker() -> Path | None:
    given = os.environ.get(f"{PREFIX}RABBITMQ")
    return Path(given) if given else None
