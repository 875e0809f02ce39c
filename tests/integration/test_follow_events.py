"""The example for back ends, as a process on a real stack: its broker is killed, and loses its disk."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.stack import AgentProcess, Document, RunningStack, eventually
from tests.integration.sql.values import rows
from topology import access

PROGRAM = [sys.executable, "-m", "examples.backend.follow_events"]


class Reader:
    """The example as a process; what it printed stays over its restarts."""

    def __init__(self, running: RunningStack, directory: Path) -> None:
        self._running = running
        self._output, self._said = directory / "output", directory / "said"
        self._place = directory / "place.json"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        files = self._running.stack.files
        with self._output.open("ab") as output, self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [
                    *PROGRAM,
                    *("--url", self._running.stack.settings.amqps_url, "--ca-file", str(files.authority)),
                    *("--password-file", str(files.state_dir / "secrets" / access.BACKEND)),
                    *("--place-file", str(self._place), *arguments),
                ],
                stdout=output,
                stderr=said,
            )
        return self._process

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def said(self) -> str:
        return self._said.read_text()

    def printed(self) -> list[tuple[int, str]]:
        """Position and kind of each event, in the order of the lines."""
        return [(event["position"], event["kind"]) for event in self._events()]

    def kinds(self, device: str) -> list[str]:
        """The kinds of one device's events."""
        return [event["kind"] for event in self._events() if event["device"] == device]

    def wait_until_it_has_all(self) -> None:
        """Until everything that happened is printed: each event once, in order."""
        logged: list[tuple[int, str]] = []

        def has_all() -> bool:
            logged[:] = in_ledger(self._running)
            eventually(lambda: self._lines() >= len(logged), "all is printed", within=90)
            return len(in_ledger(self._running)) == len(logged)

        try:
            eventually(has_all, "nothing more happens", within=90)
        except AssertionError:
            first = next(iter(self.printed()), None)
            raise AssertionError(
                f"{len(self.printed())} of {len(logged)} from {first}, saying:\n{self.said()}"
            ) from None
        assert self.printed() == logged, self.said()

    def _lines(self) -> int:
        return self._output.read_bytes().count(b"\n")

    def _events(self) -> list[Document]:
        lines = self._output.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def in_ledger(running: RunningStack) -> list[tuple[int, str]]:
    """The log once nothing is missing in it."""
    url = running.stack.settings.database
    eventually(lambda: not rows(url, "SELECT 1 FROM events WHERE position IS NULL"), "all is sequenced")
    found = rows(url, "SELECT position, kind FROM events ORDER BY position")
    return [(row.position, row.kind) for row in found]


def command(running: RunningStack, agent: AgentProcess, count: int) -> list[str]:
    return [running.send(agent.id, "note", {"text": f"n{number}"}, ttl=60)["id"] for number in range(count)]


@pytest.mark.soak
@pytest.mark.timeout(480)
def test_nothing_is_missing_and_nothing_comes_twice(own_stack: RunningStack, home: Path, tmp_path: Path) -> None:
    broker = own_stack.stack.broker
    assert broker is not None
    own_stack.http = own_stack.client(own_stack.token)
    # Room for the copies that are sent again when the broker is back.
    with own_stack.agent(home, mailbox={"limit": 200}) as agent, Reader(own_stack, tmp_path) as reader:
        agent.start()
        reader.start()
        ids = command(own_stack, agent, 20)
        broker.kill9()
        ids += command(own_stack, agent, 3)
        time.sleep(0.5)
        broker.start()
        own_stack.stack.wait_until_ready()
        ids += command(own_stack, agent, 20)
        for id in ids:
            assert own_stack.settled(id)["state"] == "succeeded"
        reader.wait_until_it_has_all()
        kinds = reader.kinds(agent.id)
        assert kinds.count("command.accepted") == kinds.count("command.succeeded") == len(ids)

        reader.kill()
        for id in command(own_stack, agent, 5):
            own_stack.settled(id)
        reader.start()
        reader.wait_until_it_has_all()

        # A disk that is lost takes the stream with it: the next one begins again at offset 0.
        broker.kill9()
        broker.wipe()
        broker.start()
        own_stack.stack.wait_until_ready()
        for id in command(own_stack, agent, 5):
            assert own_stack.settled(id)["state"] == "succeeded"
        reader.wait_until_it_has_all()
        assert "was made anew" in reader.said()
        assert "lost the events" not in reader.said()
        newcomers = tmp_path / "newcomer"
        newcomers.mkdir()
        with Reader(own_stack, newcomers) as newcomer:
            newcomer.start()
            newcomer.wait_until_it_has_all()


def test_it_ends_after_so_many_and_goes_on_there(stack: RunningStack, tmp_path: Path) -> None:
    for _ in range(3):
        stack.create_device()
    with Reader(stack, tmp_path) as reader:
        for count in (2, 1):
            assert reader.start("--count", str(count)).wait(30) == 0
    positions = [position for position, _ in reader.printed()]
    assert positions == list(range(positions[0], positions[0] + 3))
    assert reader.said() == ""


def test_what_it_can_not_mend_is_one_line(stack: RunningStack, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("wrong")
    url, authority = stack.stack.settings.amqps_url, stack.stack.files.authority
    given = ["--url", url, "--password-file", str(password), "--place-file", str(tmp_path / "place"), "--ca-file"]
    refused = subprocess.run([*PROGRAM, *given, authority], capture_output=True, timeout=30, check=False)
    missing = subprocess.run([*PROGRAM, *given, tmp_path / "none"], capture_output=True, timeout=30, check=False)
    for done, said in ((refused, "refuses backend.reader"), (missing, "No such file")):
        assert done.returncode == 1
        (line,) = done.stderr.decode().splitlines()
        assert said in line
        assert "wrong" not in line
    explained = subprocess.run([*PROGRAM, "--help"], capture_output=True, timeout=30, check=True)
    assert explained.stdout.startswith(b"usage: follow_events")
