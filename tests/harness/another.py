"""A second gateway or worker of a stack, as a process of its own."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from api.operator.processes import Child
from api.operator.sockets import free_port
from api.operator.stack import Stack
from tests.harness.stack import RunningStack, eventually


class Another:
    """A gateway or worker, with the stack's settings but for these."""

    def __init__(self, stack: Stack, service: str, environment: dict[str, str]) -> None:
        self._argv = [sys.executable, "-m", "api.operator.cli", service]
        self._environment = stack._environment() | environment
        self._log = stack.files.state_dir / f"{service}-2.log"
        self._child = self._start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def restart(self) -> float:
        """Stop it as an operator would, and start it again; how many seconds its end took."""
        began = time.monotonic()
        self.stop()
        took = time.monotonic() - began
        self._child = self._start()
        return took

    def stop(self) -> None:
        self._child.stop(signal.SIGTERM, 20.0)

    def _start(self) -> Child:
        return Child(self._argv, environment=self._environment, output=self._log, death_signal=signal.SIGTERM)


class AnotherGateway(RunningStack):
    """The same stack, called through another gateway."""

    def __init__(self, stack: Stack, url: str, process: Another) -> None:
        self._url, self.process = url, process
        super().__init__(stack)

    def client(self, token: str | None) -> httpx.Client:
        made = super().client(token)
        made.base_url = httpx.URL(self._url)
        return made

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def is_ready(self) -> bool:
        try:
            return self.http.get("/health/ready").is_success
        except httpx.TransportError:
            return False


@contextmanager
def another_gateway(running: RunningStack, **environment: str) -> Iterator[AnotherGateway]:
    """Ready to be called; with more settings, if any."""
    host = running.stack.settings.api_host
    api = free_port(host, besides=set())
    auth = free_port(host, besides={api})
    ports = {"RESTANTE_API_PORT": str(api), "RESTANTE_AUTH_PORT": str(auth)}
    scheme = "https" if environment.get("RESTANTE_TLS_CERTIFICATE", "given") else "http"
    with _another(running, "gateway", ports | environment) as process:
        gateway = AnotherGateway(running.stack, f"{scheme}://localhost:{api}", process)
        eventually(gateway.is_ready, "the second gateway", within=40)
        yield gateway


@contextmanager
def another_worker(running: RunningStack) -> Iterator[Another]:
    """Starting."""
    port = {"RESTANTE_WORKER_PORT": str(free_port("127.0.0.1", besides=set()))}
    with _another(running, "worker", port) as process:
        yield process


@contextmanager
def _another(running: RunningStack, service: str, environment: dict[str, str]) -> Iterator[Another]:
    process = Another(running.stack, service, environment)
    try:
        yield process
    finally:
        process.stop()
