"""Many devices whose agents run in one process, and what their handlers wrote."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from device_agent import files, identity, journal, pins
from tests.harness.device import enroll_request, own_source
from tests.harness.stack import RunningStack
from topology import enrollment

_PROGRAM = [sys.executable, "-m", "tests.harness.fleet_program"]
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Run:
    """A handler's start as the device recorded it; `at` is in epoch seconds, `ended` whether it came to its end."""

    device: str
    command: str
    text: str
    at: float
    ended: bool


def has_told(state: Path, incarnation: str | None = None) -> bool:
    """`Fleet.has_told` of the agent with this state directory, which may be running."""
    path = state / journal.FILE
    if not path.exists():
        return False
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as opened:
        met = opened.execute("SELECT value FROM meta WHERE name = 'incarnation'").fetchone()
        left = opened.execute("SELECT count(*) FROM entry WHERE state IN ('started', 'done', 'doubt')").fetchone()[0]
    return left == 0 and met is not None and incarnation in (None, met[0])


class Fleet:
    """`count` enrolled devices; their agents are one process from `start` to `kill`."""

    def __init__(self, running: RunningStack, home: Path, count: int, **body: object) -> None:
        home.mkdir(parents=True, mode=0o700)
        self.home = home
        self._process: subprocess.Popen[bytes] | None = None
        self.ids = [self._enroll(running, number, body) for number in range(count)]

    def start(self) -> None:
        with (self.home / "fleet.log").open("ab") as log:
            self._process = subprocess.Popen([*_PROGRAM, str(self.home)], cwd=_ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def has_told(self, incarnation: str | None = None) -> bool:
        """Has the broker confirmed all that the agents had to say, to this incarnation of the fabric? An agent that
        waits for its next try to connect has not, for up to half a minute."""
        return all(has_told(self.home / f"{number:03}", incarnation) for number in range(len(self.ids)))

    def runs(self) -> list[Run]:
        """Every start of a handler, in the order in which they were recorded."""
        path = self.home / "record"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        ended = {row["command"] for row in rows if row["what"] == "end"}
        return [
            Run(row["device"], row["command"], row["text"], row["at"], row["command"] in ended)
            for row in rows
            if row["what"] == "start"
        ]

    def _enroll(self, running: RunningStack, number: int, body: dict[str, object]) -> str:
        id, ticket = running.create_device("fleet", **body)
        state = self.home / f"{number:03}"
        files.private_directory(state)
        key = identity.make_key(state)
        # As `restante-agent enroll` does, each from an address of its own: attempts are counted by address.
        with own_source(running) as http:
            request = enroll_request(enrollment.decode_ticket(ticket).code, key.private)
            answer = running.ok(http.post("/v1/enroll", json=request))
        identity.store_peering(state, answer, pins.one(answer["authority"]))
        return id

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
