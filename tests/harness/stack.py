"""A real stack for tests: broker, worker and gateway as processes, and agents as they run on devices."""

import itertools
import json
import os
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from api.operator import rings
from api.operator.stack import Stack
from api.settings import Settings
from device_agent import enroll
from fabric.signing import SigningKey
from tests.harness import leaks

Document = dict[str, Any]

_numbers = itertools.count(1)

HANDLERS = '''
import os
import time
from pathlib import Path

from device_agent import Agent

agent = Agent()
RECORD = Path(os.environ["RECORD"])


def record(text: str) -> None:
    """The handlers' own record: one line per start, written through."""
    with RECORD.open("a") as file:
        file.write(text + "\\n")
        file.flush()
        os.fsync(file.fileno())


@agent.command("note")
def note(text: str) -> dict[str, str]:
    record(text)
    return {"noted": text}


@agent.command("slow")
def slow(text: str, seconds: float) -> str:
    record(text)
    time.sleep(seconds)
    return text


@agent.command("fail")
def fail(text: str) -> None:
    record(text)
    raise RuntimeError(f"jammed: {text}")
'''


class RunningStack:
    """A stack and a caller with the operator's token."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.context = ssl.create_default_context(cafile=stack.files.authority)
        self.token = stack.files.operator_token.read_text().strip()
        self.http = self.client(self.token)
        self.logs: list[Path] = []  # of agents; the others' are in the stack's state directory

    def client(self, token: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.stack.settings.api_url, headers=headers, verify=self.context, timeout=70)

    @staticmethod
    def signing_key(files: rings.RingFiles) -> SigningKey:
        """The key that signs now."""
        return rings.open_keys(files, lambda: time.time_ns() // 1000).signing()

    def create_device(self, prefix: str = "device", **body: object) -> tuple[str, str]:
        """A fresh device: its id and its ticket."""
        id = f"{prefix}-{next(_numbers)}-{secrets.token_hex(2)}"
        made = self.ok(self.http.post("/v1/devices", json={"id": id, **body}))
        return id, made["enrollment"]["ticket"]

    def send(self, device: str, name: str, args: Document, *, wait: int | None = None, **body: object) -> Document:
        headers = {} if wait is None else {"Prefer": f"wait={wait}"}
        return self.ok(
            self.http.post(f"/v1/devices/{device}/commands", json={"name": name, "args": args, **body}, headers=headers)
        )

    def command(self, id: str, wait: int = 0) -> Document:
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        return self.ok(self.http.get(f"/v1/commands/{id}", headers=headers))

    def settled(self, id: str, within: float = 60.0) -> Document:
        """The command once it is settled; fails when it is not `within` seconds, gateway restarts included."""
        until = time.monotonic() + within
        while True:
            try:
                found = self.command(id, wait=5)
                if found["settled_at"]:
                    return found
            except (httpx.TransportError, AssertionError):
                time.sleep(0.2)
                self.http = self.client(self.token)
            else:
                assert time.monotonic() < until, f"not settled within {within} s: {json.dumps(found)}"
            assert time.monotonic() < until, f"not settled within {within} s: {id}"

    def agent(self, home: Path, prefix: str = "device", **body: object) -> "AgentProcess":
        """A fresh device, enrolled and not yet running."""
        id, ticket = self.create_device(prefix, **body)
        agent = AgentProcess(self, home, id)
        agent.enroll(ticket)
        return agent

    def clear(self) -> None:
        """As the next module may expect it, whatever was killed: all parts run, and nobody waits for anything."""
        assert self.stack.broker is not None
        self.stack.broker.start()
        for service in ("worker", "gateway"):
            self.stack.start_service(service)
        self.stack.wait_until_ready()
        self.http = self.client(self.token)
        while devices := self.ok(self.http.get("/v1/devices", params={"limit": "100"}))["items"]:
            for device in devices:
                self.ok(self.http.delete(f"/v1/devices/{device['id']}"))
        for state in ("accepted", "queued", "delivered", "running"):
            found = self.ok(self.http.get("/v1/commands", params={"state": state, "limit": "1"}))["items"]
            assert not found, f"still {state}: {found}"

    @staticmethod
    def ok(answer: httpx.Response) -> Document:
        assert answer.is_success, f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}"
        document: Document = answer.json() if answer.content else {}
        return document


class AgentProcess:
    """The real agent, as a process of its own, with handlers that keep a record."""

    def __init__(self, running: RunningStack, home: Path, id: str) -> None:
        home.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.running, self.home, self.id = running, home, id
        self.state = home / "state"
        self.handlers = home / "handlers.py"
        self.handlers.write_text(HANDLERS)
        self.log = home / "agent.log"
        running.logs.append(self.log)
        self._record = home / "record"
        self.environment = {**os.environ, "RECORD": str(self._record)}
        self._process: subprocess.Popen[bytes] | None = None

    def enroll(self, ticket: str) -> None:
        """As `restante-agent enroll` does, without an interpreter of its own: that costs as much as ten enrollments."""
        enroll.enroll(self.state, self.running.stack.settings.api_url, ticket)

    def start(self, *arguments: str) -> "AgentProcess":
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv("run", "--handlers", str(self.handlers), *arguments),
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """SIGTERM, as systemd would; the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def record(self) -> list[str]:
        """What the handlers wrote: one line per start."""
        return self._record.read_text().splitlines() if self._record.exists() else []

    def cli(self, name: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(name, *arguments), env=self.environment, input=stdin, capture_output=True, timeout=60, check=False
        )

    def journal(self) -> dict[str, int]:
        """How many entries of its journal are in each state."""
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        counts: dict[str, int] = json.loads(done.stdout)["journal"]
        return counts

    def argv(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "device_agent.cli", name, "--state-dir", str(self.state), *arguments]

    def __enter__(self) -> "AgentProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# For tests of something else, whose devices do in seconds what they should do in an hour.
NO_LIMITS = {
    "limit_reports": 100_000,
    "limit_inquiries": 100_000,
    "limit_channels": 10_000,
    "limit_refusals": 1_000_000,
    "limit_connections": 1_000,
    "limit_logins": 1_000_000,
    "limit_traffic": 1_000_000_000,
    "limit_takeovers": 1_000_000,
}


@contextmanager
def start_stack(directory: Path, database_url: str, limits: Mapping[str, int] = NO_LIMITS) -> Iterator[RunningStack]:
    settings = Settings(state_dir=directory / "stack", database_url=database_url, log_level="debug")
    stack = Stack(replace(settings, **limits), lambda _: None)
    stack.start()
    running = RunningStack(stack)
    try:
        yield running
    finally:
        stack.stop()
        state = stack.files.state_dir
        leaks.check([*leaks.logs_in(state), *running.logs], leaks.kept_in(state))


PATIENCE = 4.0  # times what a machine that does nothing else would need at most: waiting ends with the condition


def eventually(holds: Callable[[], bool], what: str, within: float = 20.0) -> None:
    """Wait for a condition; fail naming `what` when it does not come true."""
    until = time.monotonic() + PATIENCE * within
    while not holds():
        assert time.monotonic() < until, f"not within {PATIENCE * within} s: {what}"
        time.sleep(0.02)
