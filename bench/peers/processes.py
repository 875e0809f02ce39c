"""Peers' processes: started with all they are told in a file, waited for until they say that they are ready, ended."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api.operator.processes import Child

READY = "ready"
_START_PATIENCE = 60.0  # seconds
_STOP_PATIENCE = 10.0


def start_device(module: str, home: Path, name: str, told: Mapping[str, object]) -> Child:
    """`start_python`; returns when it has printed `ready`."""
    child, log = start_python(module, home, name, told), home / f"{name}.log"
    wait(child, log, lambda: READY in log.read_text().splitlines())
    return child


def start_python(module: str, home: Path, name: str, told: Mapping[str, object]) -> Child:
    """`python -m module FILE`, with `told` in the file; what it says is in `home/name.log`."""
    file = home / f"{name}.json"
    file.touch(mode=0o600)  # there are passwords in it
    file.write_text(json.dumps(told))
    return Child(
        [sys.executable, "-m", module, str(file)],
        environment={**os.environ, "PYTHONUNBUFFERED": "1"},
        output=home / f"{name}.log",
        death_signal=signal.SIGTERM,
    )


def start_server(argv: list[str], environment: Mapping[str, str], home: Path, name: str, port: int) -> Child:
    """A server; returns when it accepts connections on the port, on loopback."""
    log = home / f"{name}.log"
    child = Child(argv, environment=environment, output=log, death_signal=signal.SIGTERM)
    wait(child, log, lambda: listens(port))
    return child


def wait(child: Child, log: Path, done: Callable[[], bool]) -> None:
    """Wait for the condition.

    Raises:
        RuntimeError: the process ended, or it takes too long; with the end of its log.
    """
    until = time.monotonic() + _START_PATIENCE
    while not (log.exists() and done()):
        if not child.running or time.monotonic() > until:
            child.stop(signal.SIGTERM, _STOP_PATIENCE)
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{log.stem} does not start (exit {child.returncode}):\n{said}")
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end(child: Child) -> None:
    child.stop(signal.SIGTERM, _STOP_PATIENCE)


def told(argv: list[str]) -> dict[str, Any]:
    """In the process: what `start_python` told it."""
    document: dict[str, Any] = json.loads(Path(argv[1]).read_text())
    return document
