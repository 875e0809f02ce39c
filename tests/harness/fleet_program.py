"""Many real agents in one process: `python -m tests.harness.fleet_program HOME`.

It runs one for each folder in HOME that holds a device key. Each has its own state directory, connection and
journal. One `kill -9` kills them all.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from device_agent import Agent
from device_agent.context import Context


class Record:
    """The handlers' own record: a line when one starts, another when it ends. A killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, what: str, context: Context, text: str) -> None:
        row = {"what": what, "device": context.device, "command": context.id, "text": text, "at": time.time()}
        os.write(self._file, json.dumps(row).encode() + b"\n")


def agent(record: Record) -> Agent:
    made = Agent()

    @made.command("note")
    def note(context: Context, text: str) -> dict[str, str]:
        record.write("start", context, text)
        record.write("end", context, text)
        return {"noted": text}

    @made.command("slow")
    def slow(context: Context, text: str, seconds: float) -> dict[str, str]:
        record.write("start", context, text)
        time.sleep(seconds)
        record.write("end", context, text)
        return {"noted": text}

    return made


def main(home: Path) -> int:
    logging.basicConfig(format="%(asctime)s %(threadName)s %(levelname)s %(message)s", level=logging.INFO)
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    record = Record(home / "record")
    agents = []
    for key in sorted(home.glob("*/device.key")):
        one = agent(record)
        one.start(key.parent)
        agents.append(one)
    ended.wait()
    for one in agents:
        one.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
