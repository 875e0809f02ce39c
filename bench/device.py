"""The device of the benchmark: the real agent, as a process of its own, with a handler that does nothing."""

import subprocess
import sys
from pathlib import Path

from api.operator.stack import Stack

HANDLERS = """
from device_agent import Agent

agent = Agent()


@agent.command("noop")
def noop() -> None:
    pass
"""


class Agent:
    """An enrolled agent that runs until `stop`."""

    def __init__(self, home: Path, stack: Stack, ticket: str) -> None:
        state = enroll(home, stack, ticket)
        handlers = home / "handlers.py"
        handlers.write_text(HANDLERS)
        with (home / "agent.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own agent
                _argv("run", state, "--handlers", str(handlers)), stdout=log, stderr=log
            )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def enroll(home: Path, stack: Stack, ticket: str) -> Path:
    """Make a device in an empty folder; its state directory."""
    home.mkdir(mode=0o700)
    argv = _argv("enroll", home / "state", "--api-url", stack.settings.api_url)
    subprocess.run(argv, input=ticket.encode(), check=True, timeout=60, stdout=subprocess.DEVNULL)  # noqa: S603
    return home / "state"


def _argv(name: str, state: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "device_agent.cli", name, "--state-dir", str(state), *arguments]
