"""`make demo`: the main job on real parts, told as it happens. Exit 0 only if every step did what it says.

A private broker, a worker and a gateway; a device that is enrolled with a ticket and runs the real agent as
a process of its own; commands that succeed, fail, wait for an absent device, and expire; its telemetry read
back over HTTP.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from api.operator.client import Connection
from api.operator.errors import KNOWN_ERRORS
from api.operator.stack import Stack
from api.settings import Settings

GARAGE = Path(__file__).parent / "garage_door"
DEVICE = "garage-7"
_STARTED = time.monotonic()

Document = dict[str, Any]


class StepFailed(Exception):
    """A step did not do what it says."""


def main() -> int:
    root = Path(tempfile.mkdtemp(prefix="restante-demo-"))
    try:
        with ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, root, ignore_errors=True)
            _run(root, cleanup)
    except (StepFailed, *KNOWN_ERRORS) as error:
        _say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    _say("every step did what it says; nothing is left running")
    return 0


def _run(root: Path, cleanup: ExitStack) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _title("Setting up")
    stack = Stack(Settings(state_dir=root / "stack"), _say)
    cleanup.callback(stack.stop)
    stack.start()
    service = Service(Connection.of(stack.settings), stack)
    _say(f"the stack is up: gateway {stack.settings.api_url}, broker {stack.settings.amqps_url}")

    _title("A device gets an identity")
    device = Device(root / "device", service)
    cleanup.callback(device.stop)
    device.enroll()

    _title("Commands to a device that is there")
    device.start()
    _command(service, "door.close", {"speed": 1}, expect="succeeded")
    _command(service, "light.on", {}, expect="succeeded")
    _command(service, "door.stuck", {}, expect="failed")
    _command(service, "door.close", {"speed": "fast"}, expect="rejected")
    times = sorted(_timed(lambda: service.send("door.close", {"speed": 1}, wait=10))[1] for _ in range(20))
    _say(f"20 more round trips over HTTPS: median {times[10] * 1000:.1f} ms, slowest {times[-1] * 1000:.1f} ms")

    _title("A command to a device that is away and comes back in time")
    device.stop()
    waiting = service.send("door.open", {"speed": 1}, ttl=60)
    _expect(waiting["state"] in ("accepted", "queued"), f"the command waits, but is {waiting['state']}")
    _say(f"door.open is {waiting['state']}: it waits in the mailbox")
    device.start()
    _settled(service, waiting, expect="succeeded")

    _title("A command that expires behind a longer-lived one, while the device is away")
    device.stop()
    longer = service.send("door.close", {"speed": 1}, ttl=120)
    shorter = service.send("door.open", {"speed": 2}, ttl=1)
    expired = _settled(service, shorter, expect="expired")
    late = _seconds(expired["settled_at"]) - _seconds(expired["deadline"])
    _expect(0 <= late < 1.0, f"expired {late * 1000:.0f} ms after its deadline")
    _say(f"announced expired {late * 1000:.0f} ms after its deadline, behind a command with 120 s to live")
    device.start()
    _settled(service, longer, expect="succeeded")
    _expect(device.door() == "closed", f"the expired command never ran: the door is {device.door()}")
    _say("the door is closed: the expired command never ran")

    _title("Telemetry, as the device sent it")
    readings = service.telemetry(channel="system")
    _expect(bool(readings), "no reading of the channel 'system' came back")
    _say(f"{len(readings)} readings of this machine; the last: {json.dumps(readings[-1]['value'])}")
    device.publish("door.position", b'{"percent": 0}')
    (position,) = service.telemetry(channel="door.position")
    _say(f"and one from the command line: {json.dumps(position['value'])}")
    device.stop()


class Service:
    """A back-end service that commands devices over HTTP."""

    def __init__(self, connection: Connection, stack: Stack) -> None:
        import ssl

        self.authority = stack.files.authority
        self.api_url = connection.api_url
        self._http = httpx.Client(
            base_url=connection.api_url,
            headers={"Authorization": f"Bearer {connection.token}"},
            verify=ssl.create_default_context(cafile=self.authority),
            timeout=30,
        )

    def send(self, name: str, args: Document, *, ttl: float = 60, wait: int | None = None) -> Document:
        headers = {} if wait is None else {"Prefer": f"wait={wait}"}
        body = {"name": name, "args": args, "ttl": ttl}
        return self._json(self._http.post(f"/v1/devices/{DEVICE}/commands", json=body, headers=headers))

    def command(self, id: str, wait: int) -> Document:
        return self._json(self._http.get(f"/v1/commands/{id}", headers={"Prefer": f"wait={wait}"}))

    def create_device(self) -> Document:
        return self._json(self._http.post("/v1/devices", json={"id": DEVICE, "groups": ["garages"]}))

    def telemetry(self, channel: str) -> list[Document]:
        query = {"from": "first", "device": DEVICE, "channel": channel, "limit": "1000", "idle": "0.5"}
        answer = self._http.get("/v1/telemetry", params=query)
        _expect(answer.status_code == httpx.codes.OK, f"reading telemetry: {answer.status_code} {answer.text}")
        return [json.loads(line) for line in answer.text.splitlines()]

    def _json(self, answer: httpx.Response) -> Document:
        _expect(
            answer.is_success, f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}"
        )
        document: Document = answer.json()
        return document


class Device:
    """The device: a state directory, and the agent's command line."""

    def __init__(self, state: Path, service: Service) -> None:
        self._state, self._service = state, service
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "GARAGE_STATE": str(state / "door")}

    def enroll(self) -> None:
        ticket = self._service.create_device()["enrollment"]["ticket"]
        _say(f"device {DEVICE} is made; its ticket has {len(ticket)} characters and is good once, for an hour")
        self._state.mkdir(mode=0o700)
        self._agent("enroll", "--api-url", self._service.api_url, stdin=ticket.encode())
        _say("the agent made its key, checked the authority against the ticket, and is enrolled")

    def start(self) -> None:
        log = (self._state / "agent.log").open("ab")
        with log:
            self._process = subprocess.Popen(  # noqa: S603 - our own agent
                self._command(
                    "run",
                    "--handlers", str(GARAGE / "door.py"),
                    "--commands-dir", str(GARAGE / "commands.d"),
                    "--system-interval", "1",
                ),
                env=self._environment,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        _say(f"the agent runs, as process {self._process.pid}")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(20)
            _say("the agent is stopped: the device is away")

    def publish(self, channel: str, reading: bytes) -> None:
        self._agent("publish", channel, stdin=reading)

    def door(self) -> str:
        state: Document = json.loads((self._state / "door" / "door.json").read_text())
        return str(state["door"])

    def _agent(self, *arguments: str, stdin: bytes) -> None:
        done = subprocess.run(  # noqa: S603 - our own agent
            self._command(*arguments), env=self._environment, input=stdin, capture_output=True, timeout=60, check=False
        )
        _expect(done.returncode == 0, f"restante-agent {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "device_agent.cli", name, "--state-dir", str(self._state / "agent"), *arguments]


def _command(service: Service, name: str, args: Document, *, expect: str) -> None:
    command, seconds = _timed(lambda: service.send(name, args, wait=10))
    outcome = command["outcome"] or {}
    said = outcome.get("result") if expect == "succeeded" else command["reason"]
    _say(f"{name} {json.dumps(args)}: {command['state']} in {seconds * 1000:.1f} ms: {json.dumps(said)}")
    _expect(command["state"] == expect, f"{name} is {command['state']}, not {expect}: {json.dumps(command)}")


def _settled(service: Service, command: Document, *, expect: str) -> Document:
    found, seconds = _timed(lambda: service.command(command["id"], wait=30))
    steps = " → ".join(f"{row['state']} ({row['evidence']})" for row in found["timeline"])
    _say(f"{found['name']}: {found['state']} after {seconds:.2f} s more: {steps}")
    _expect(found["state"] == expect, f"{found['name']} is {found['state']}, not {expect}")
    return found


def _timed(call: Callable[[], Document]) -> tuple[Document, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


def _seconds(time_: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(time_).timestamp()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StepFailed(otherwise)


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _say(text: str) -> None:
    print(f"  {time.monotonic() - _STARTED:6.2f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
