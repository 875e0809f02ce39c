"""`compose.yaml` on a real engine, as a project of its own beside any other: brought up, asked, broken, taken down."""

import contextlib
import json
import os
import re
import secrets
import shlex
import ssl
import subprocess
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from api.operator.sockets import free_port
from tests.harness.stack import eventually

Document = dict[str, Any]

ROOT = Path(__file__).parents[2]
PROJECT = "restante-test"
IMAGE = "restante:0.1.0"
DOMAIN = "localhost"
DEVICE = "garage-7"
ONCE = {"setup", "migrate", "welcome"}
LASTING = {"rabbitmq", "postgres", "gateway", "worker", "edge", "auth", "device", "prometheus"}
READY = 120.0  # seconds for a service to be healthy again on a slow machine

_KILL = "import os, sys; os.kill(int(sys.argv[1]), 9)"


class Composed:
    """The project, on a port of its own of the loopback address."""

    def __init__(self) -> None:
        self.port = free_port("127.0.0.1", besides=set())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FABRIC_", "COMPOSE_"))}
        self.environment = {
            **kept,
            "COMPOSE_PROFILES": "observability",
            "FABRIC_PORT": str(self.port),
            "FABRIC_DOMAIN": DOMAIN,
            "FABRIC_ADDRESS": "127.0.0.1",
        }
        self.scale: dict[str, int] = {}
        self.took = 0.0  # seconds of the last `up`

    def compose(self, *arguments: str, within: float = 300.0, check: bool = True) -> "subprocess.CompletedProcess[str]":
        command = ["docker", "compose", "-p", PROJECT, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=within, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def recipe(self, page: str, line: str, *, places: Mapping[str, str] | None = None, status: int = 0) -> str:
        """Do what a page of docs/ says, `docker compose …` in one line of it; what that prints.

        Args:
            places: what stands in the line, and what it is here.
            status: that it must end with.
        """
        told = (ROOT / "docs" / page).read_text()
        assert re.search(rf"(?m)(^ *|`){re.escape(line)}($|`|  )", told), f"docs/{page} does not say: {line}"
        for there, here in (places or {}).items():
            assert there in line
            line = line.replace(there, here)
        done = self.compose(*shlex.split(line)[2:], check=False)
        assert done.returncode == status, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def up(self) -> None:
        """Start it, or change its scale; returns when the last service has been started."""
        scaled = [word for service, count in self.scale.items() for word in ("--scale", f"{service}={count}")]
        began = time.monotonic()
        self.compose("up", "-d", *scaled, within=600)
        self.took = time.monotonic() - began

    def down(self, *, volumes: bool) -> None:
        self.compose("down", "--timeout", "60", *(("--volumes",) if volumes else ()), within=400, check=False)

    def logs(self, *services: str) -> str:
        done = subprocess.run(
            ["docker", "compose", "-p", PROJECT, "logs", "--no-color", "--tail", "40", *services],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout

    def containers(self, *services: str) -> list[Document]:
        """What the engine says of each container, those that have ended included."""
        ids = self.compose("ps", "-aq", *services).stdout.split()
        return json.loads(_docker("inspect", *ids)) if ids else []

    def wait_until_healthy(self, *services: str) -> None:
        until = time.monotonic() + READY
        while True:
            health = {each["Name"]: _health(each) for each in self.containers(*(services or tuple(LASTING)))}
            if health and set(health.values()) == {"healthy"}:
                return
            assert time.monotonic() < until, f"{health}\n{self.logs(*services)}"
            time.sleep(0.5)

    def kill(self, container: Document) -> None:
        """SIGKILL its first process, as the kernel would when memory runs out; the engine is to start it again."""
        _docker(
            "run", "--rm", "--pid", "host", "--user", "0", "--network", "none", "--cap-drop", "ALL",
            "--cap-add", "KILL", "--entrypoint", "python3", IMAGE, "-c", _KILL, str(container["State"]["Pid"]),
        )  # fmt: skip

    def run_in(self, service: str, *command: str, within: float = 60.0) -> str:
        return self.compose("exec", "-T", service, *command, within=within).stdout

    def operator(self, *arguments: str) -> Document:
        """A command of `restante`, as the operator runs it; its answer is JSON."""
        found: Document = json.loads(self.compose("run", "--rm", "-T", "operator", *arguments).stdout)
        return found

    def operators_file(self, name: str) -> str:
        return self.compose("run", "--rm", "-T", "--entrypoint", "cat", "operator", f"/state/{name}").stdout

    def client(self) -> "Caller":
        return Caller(self.port, self._authority, self.operators_file("operator.token").strip())

    def anyone(self) -> "Caller":
        """Over a new connection, without a token."""
        return Caller(self.port, self._authority, None)

    def records(self, name: str, *options: str) -> list[int]:
        """The sizes of the TLS records by which the API answers something long, or the broker shakes hands."""
        asked = (
            f"GET /openapi.json HTTP/1.1\r\nHost: api.{DOMAIN}\r\nConnection: close\r\n\r\n" if name == "api" else ""
        )
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{self.port}", "-servername", f"{name}.{DOMAIN}",
             "-tls1_2", "-msg", "-quiet", "-ign_eof" if asked else "-no_ign_eof", *options],
            input=asked.encode(), capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        headers = re.findall(rb"<<< TLS 1\.., RecordHeader \[length 0005\]\n    (?:.. ){3}(..) (..)", done.stdout)
        return [int(high + low, 16) for high, low in headers]

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self._authority)

    @cached_property
    def _authority(self) -> str:
        return self.operators_file("authority/ca.pem")


class Caller:
    """A caller on this machine, which may not know the names: it connects to the port and asks for api.<domain>."""

    def __init__(self, port: int, authority: str, token: str | None) -> None:
        self.name = f"api.{DOMAIN}"
        self._http = httpx.Client(
            base_url=f"https://127.0.0.1:{port}",
            headers={"Host": f"{self.name}:{port}"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            verify=ssl.create_default_context(cadata=authority),
            timeout=30,
        )

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return self._http.request(method, path, extensions={"sni_hostname": self.name}, **arguments)

    def send(self, name: str, *, wait: int = 0, key: str | None = None, **body: object) -> httpx.Response:
        headers = {**({"Prefer": f"wait={wait}"} if wait else {}), **({"Idempotency-Key": key} if key else {})}
        return self.request("POST", f"/v1/devices/{DEVICE}/commands", json={"name": name, **body}, headers=headers)

    def accepted(self, key: str) -> str:
        """A command that one of the gateways took, whichever the edge still asks; its id."""
        answers: list[httpx.Response] = []

        def taken() -> bool:
            with contextlib.suppress(httpx.TransportError):  # it hung on one that hangs
                answers.append(self.send("door.state", key=key, ttl=300))
            return answers != [] and answers[-1].is_success

        eventually(taken, "a gateway to take a command", within=120)
        return str(answers[-1].json()["id"])

    def settled(self, id: str, within: float = 180.0) -> Document:
        until = time.monotonic() + within
        while True:
            try:
                answer = self.request("GET", f"/v1/commands/{id}", headers={"Prefer": "wait=5"})
                assert answer.status_code != httpx.codes.NOT_FOUND, f"command {id} is lost"
                if answer.is_success and answer.json()["settled_at"]:
                    found: Document = answer.json()
                    return found
                text = answer.text
            except httpx.TransportError as error:
                text = str(error)
            assert time.monotonic() < until, f"not settled: {text}"
            time.sleep(0.2)


class Load:
    """Commands to the demo's device, one after the other, while something is done to the stack; a context manager.

    Each is sent again under its idempotency key until it is accepted, as a caller does that wants it done.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.accepted: list[str] = []
        self.refusals: list[str] = []

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def wait_for(self, more: int) -> None:
        """Until so many more were accepted."""
        wanted, until = len(self.accepted) + more, time.monotonic() + READY
        while len(self.accepted) < wanted:
            assert time.monotonic() < until, f"{len(self.accepted)} accepted, then {self.refusals[-3:]}"
            time.sleep(0.1)

    def _run(self) -> None:
        while not self._stop.is_set():
            key = secrets.token_hex(8)
            while not self._stop.is_set() and not self._accepted(key):
                self._stop.wait(0.2)
            self._stop.wait(0.05)

    def _accepted(self, key: str) -> bool:
        try:
            answer = self._caller.send("door.state", key=key, ttl=600, response_timeout=300)
        except httpx.TransportError as error:
            self.refusals.append(repr(error))
            return False
        if answer.status_code not in (httpx.codes.OK, httpx.codes.ACCEPTED):
            self.refusals.append(f"{answer.status_code} {answer.text[:200]}")
            return False
        self.accepted.append(answer.json()["id"])
        return True


def _health(container: Document) -> str:
    return str(container["State"].get("Health", {}).get("Status", container["State"]["Status"]))


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments[:3])}: {done.stderr}"
    return done.stdout
