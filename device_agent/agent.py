"""The library's entry point: declare handlers, publish telemetry, run. `examples/garage_door` shows it at work."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from device_agent import errors, handlers
from device_agent.runtime import Runtime, Settings

DEFAULT_STATE_DIR = Path("/var/lib/restante-agent")

F = TypeVar("F", bound=Callable[..., Any])


class Agent:
    """A device's handlers, and the agent that runs them once it is started.

    Declaring needs no state directory and no network, so a module with handlers can be imported anywhere.
    """

    def __init__(self) -> None:
        self._python = handlers.PythonHandlers()
        self._runtime: Runtime | None = None

    @property
    def commands(self) -> list[str]:
        """The names that have a handler here."""
        return self._python.commands

    def command(self, name: str, *, idempotent: bool = False) -> Callable[[F], F]:
        """Make a function, plain or async, the handler of a command.

        Its annotated parameters are the arguments, checked before it starts; one of type `bytes` takes the raw
        body instead; one of type `Context` is given the command's particulars. What it returns is the result;
        an exception fails the command. `idempotent`: it may run again after a crash in its midst.

        Raises:
            errors.BadHandler: the name is taken or none, or a parameter can't be checked.
        """

        def declare(function: F) -> F:
            self._python.register(name, function, idempotent=idempotent)
            return function

        return declare

    def publish(self, channel: str, value: object, content_type: str | None = None) -> "Future[None]":
        """Send a reading: bytes as they are, anything else as JSON. Returns at once; safe from any thread.

        The future is done when the broker has confirmed it; most callers ignore it. While the broker is out
        of reach readings wait in memory, a bounded number of them.

        Raises:
            errors.BufferFull: too many wait already.
            errors.InvalidValue: the channel's name or the value is outside the contract.
            errors.AgentError: the agent does not run.
        """
        return self._running().publish(channel, value, content_type)

    def start(
        self,
        state_dir: str | os.PathLike[str] = DEFAULT_STATE_DIR,
        *,
        slots: int = 1,
        commands_dir: str | os.PathLike[str] | None = None,
        system_interval: float = 0.0,
    ) -> None:
        """Start on threads of its own and return; the connection comes and goes by itself until `stop`.

        Args:
            state_dir: where the enrolled identity and the journal are.
            slots: how many handlers may run at once.
            commands_dir: a directory with executables as further handlers.
            system_interval: seconds between readings of the built-in `system` channel; 0 is never.

        Raises:
            errors.AgentError: it can't start; the class and the text say why.
        """
        if self._runtime is not None:
            raise errors.AlreadyRunning("this agent runs already")
        directory = None if commands_dir is None else Path(commands_dir)
        runtime = Runtime(Settings(Path(state_dir), slots, directory, system_interval), self._python)
        runtime.start()
        self._runtime = runtime

    def ask_stop(self) -> None:
        """Let `wait` return; safe in a signal handler."""
        if self._runtime is not None:
            self._runtime.ask_stop()

    def wait(self) -> None:
        """Block until `ask_stop`."""
        self._running().wait()

    def stop(self) -> None:
        """Finish the commands in hand within their time, report them, and close. Twice is once."""
        if self._runtime is not None:
            self._runtime.stop()
            self._runtime = None

    def _running(self) -> Runtime:
        if self._runtime is None:
            raise errors.AgentError("the agent does not run; call start() first")
        return self._runtime
