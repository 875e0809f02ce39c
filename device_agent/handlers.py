"""Handlers: what a command's name stands for on this device, and what running it gives."""

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from device_agent import arguments, errors, log
from device_agent.context import Context
from topology import names, wire

OCTETS = "application/octet-stream"
INVALID_ARGUMENTS = "invalid-arguments"
UNKNOWN_COMMAND = "unknown-command"

F = TypeVar("F", bound=Callable[..., Any])


class CommandFailed(Exception):
    """Raise it in a handler to fail the command with exactly this text as the reason."""


@dataclass(frozen=True, slots=True)
class Result:
    """A result that is not JSON: return it from a handler."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended, as an outcome will say it."""

    status: wire.OutcomeStatus
    reason: str | None
    body: bytes = b""
    content_type: str = wire.JSON


class CannotTake(ValueError):
    """No handler can take this command; the text is the reason of its rejection."""


class Job(Protocol):
    """A command bound to its handler, ready to run in a worker thread. `run` never raises."""

    @property
    def idempotent(self) -> bool: ...

    def run(self, context: Context) -> Done: ...


class Source(Protocol):
    """A set of handlers; `bind` answers None for a name it does not have."""

    def bind(self, command: wire.Command) -> Job | None:
        """Raises `CannotTake`."""


def bind(sources: list[Source], command: wire.Command) -> Job:
    """The job for a command, from the first source that has its name.

    Raises:
        CannotTake: unknown name, or arguments that don't fit.
    """
    for source in sources:
        job = source.bind(command)
        if job is not None:
            return job
    raise CannotTake(UNKNOWN_COMMAND)


@dataclass(frozen=True, slots=True)
class _Handler:
    function: Callable[..., Any]
    signature: arguments.Signature
    idempotent: bool
    is_async: bool


class PythonHandlers:
    """Functions by command name; async ones run on `loop`, which lives in a thread of its own."""

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def has_async(self) -> bool:
        return any(handler.is_async for handler in self._handlers.values())

    @property
    def commands(self) -> list[str]:
        return sorted(self._handlers)

    def register(self, name: str, function: Callable[..., Any], *, idempotent: bool) -> None:
        """Raises `errors.BadHandler`: a bad or taken name, or a signature that can't be checked."""
        if not names.is_dotted(name):
            raise errors.BadHandler(f"{name!r} is no command name: dot-separated words of a-z, 0-9, '_' and '-'")
        if name in self._handlers:
            raise errors.BadHandler(f"there are two handlers for {name}")
        signature = arguments.inspect_handler(function, name)
        self._handlers[name] = _Handler(function, signature, idempotent, inspect.iscoroutinefunction(function))

    def bind(self, command: wire.Command) -> Job | None:
        handler = self._handlers.get(command.name)
        if handler is None:
            return None
        try:
            values = handler.signature.bind(command.body, command.content_type)
        except arguments.BadArguments as error:
            raise CannotTake(f"{INVALID_ARGUMENTS}: {error}") from None
        return _PythonJob(handler, values, self.loop)


@dataclass(frozen=True, slots=True)
class _PythonJob:
    handler: _Handler
    values: dict[str, Any]
    loop: asyncio.AbstractEventLoop | None

    @property
    def idempotent(self) -> bool:
        return self.handler.idempotent

    def run(self, context: Context) -> Done:
        values = self.values
        if self.handler.signature.context is not None:
            values = {**values, self.handler.signature.context: context}
        try:
            return succeeded(self._call(values))
        except CommandFailed as error:
            return failed(str(error) or "failed")
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises, SystemExit too, is its outcome
            log.warning("handler.raised", command=context.id, name=context.command.name, error=type(error).__name__)
            log.debug(
                "handler.traceback", command=context.id, traceback="".join(traceback.format_exception(error))[-2000:]
            )
            text = str(error)
            return failed(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def _call(self, values: dict[str, Any]) -> object:
        if not self.handler.is_async:
            return self.handler.function(**values)
        if self.loop is None:
            raise RuntimeError("the loop for async handlers does not run")
        future: Future[object] = asyncio.run_coroutine_threadsafe(self.handler.function(**values), self.loop)
        return future.result()


def succeeded(returned: object) -> Done:
    """The outcome of a handler that returned this."""
    if isinstance(returned, Result):
        if not wire.is_content_type(returned.content_type):
            return failed("the handler gave its result a content type that is none")
        body, content_type = returned.body, returned.content_type
    elif isinstance(returned, bytes | bytearray | memoryview):
        body, content_type = bytes(returned), OCTETS
    else:
        try:
            body = json.dumps(returned, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return failed(f"the handler ended, but its result is not JSON: {error}")
        content_type = wire.JSON
    if len(body) > wire.MAX_BODY:
        return failed(f"the handler ended, but its result has {len(body)} bytes; {wire.MAX_BODY} are allowed")
    return Done("succeeded", None, body, content_type)


def failed(reason: str) -> Done:
    return Done("failed", cap(reason))


def cap(reason: str) -> str:
    return reason if len(reason) <= wire.MAX_REASON else reason[: wire.MAX_REASON - 1] + "…"
