"""Executables as handlers: `commands.d/door.close` is run for the command `door.close`.

Arguments come on stdin, never in argv or the environment; stdout is the result; exit status 0 is success.
The directory and its files must belong to root or this user and be writable by nobody else, as whoever can
write there can do what the agent can.
"""

import contextlib
import json
import os
import selectors
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from device_agent import errors, log
from device_agent.context import Context
from device_agent.handlers import OCTETS, UNKNOWN_COMMAND, CannotTake, Done, Job, failed
from topology import names, wire

_TEXT = "text/plain; charset=utf-8"
_STDERR_KEPT = 2_000  # bytes of its end, from which the reason is made
_DRAIN = 0.2  # seconds for output that is still in the pipe when the process has ended
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Executables:
    """The handlers in a directory, looked at anew for each command, so that files may come and go."""

    def __init__(self, directory: Path) -> None:
        """Raises `errors.BadHandler`: the directory is missing, or others may write to it."""
        self._directory = directory.absolute()
        problem = _unsafe_directory(self._directory)
        if problem:
            raise errors.BadHandler(problem)
        for path in sorted(self._directory.iterdir()):
            if (problem := _unsafe_file(path)) is not None:
                log.warning("handler.ignored", file=path.name, because=problem)

    @property
    def commands(self) -> list[str]:
        return sorted(path.name for path in self._directory.iterdir() if _unsafe_file(path) is None)

    def bind(self, command: wire.Command) -> Job | None:
        if not names.is_dotted(command.name):
            return None
        path = self._directory / command.name
        if not os.path.lexists(path):
            return None
        problem = _unsafe_directory(self._directory) or _unsafe_file(path)
        if problem:
            log.warning("handler.refused", file=path.name, because=problem)
            raise CannotTake(f"{UNKNOWN_COMMAND}: its handler is refused, {problem}")
        return _Executable(path)


@dataclass(frozen=True, slots=True)
class _Executable:
    path: Path
    idempotent: bool = False

    def run(self, context: Context) -> Done:
        environment = {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "RESTANTE_COMMAND": context.command.name,
            "RESTANTE_COMMAND_ID": context.id,
            "RESTANTE_DEVICE": context.device,
            "RESTANTE_CONTENT_TYPE": context.content_type,
        }
        if context.traceparent is not None:
            environment["TRACEPARENT"] = context.traceparent
        try:
            process = subprocess.Popen(  # noqa: S603 - a checked file, and nothing from outside in argv
                [str(self.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            return failed(f"{self.path.name} can't be executed: {error.strerror or error}")
        try:
            return _Talk(process, context.command.body, context.response_timeout).finish()
        except OSError as error:
            return failed(f"{self.path.name} ended in doubt: {error}")
        finally:
            _end(process)


class _Talk:
    """Feed stdin and gather the output of one process, without ever holding more than is allowed."""

    def __init__(self, process: "subprocess.Popen[bytes]", body: bytes, limit: float) -> None:
        self._process = process
        self._pending = memoryview(body)
        self._limit = limit
        self._out = bytearray()
        self._err = bytearray()
        self._selector = selectors.DefaultSelector()

    def finish(self) -> Done:
        deadline = time.monotonic() + self._limit
        exited = False
        with self._selector, contextlib.closing(_ExitSignal(self._process.pid)) as exit_signal:
            self._watch(exit_signal)
            while self._selector.get_map() and not (exited and not self._reading()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    if exited:
                        break
                    return failed(f"killed: it did not end within its {self._limit:g} s")
                for key, _ in self._selector.select(remaining):
                    if key.data == "exit":
                        self._selector.unregister(key.fileobj)
                        exited = True
                        # A child it left behind may hold the pipes open: what is in them is read, no more is awaited.
                        deadline = min(deadline, time.monotonic() + _DRAIN)
                    elif key.data == "in":
                        self._feed()
                    elif not self._gather(key.fileobj, key.data):  # type: ignore[arg-type]  # what we registered
                        return failed(f"killed: it wrote more than {wire.MAX_BODY} bytes")
            if not exited:
                try:
                    self._process.wait(max(deadline - time.monotonic(), 0.001))
                except subprocess.TimeoutExpired:
                    return failed(f"killed: it did not end within its {self._limit:g} s")
        return self._outcome(self._process.wait())

    def _watch(self, exit_signal: "_ExitSignal") -> None:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None  # noqa: PT018, S101 - all are pipes
        for pipe in (stdin, stdout, stderr):
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(stdin, selectors.EVENT_WRITE, "in")
        self._selector.register(stdout, selectors.EVENT_READ, "out")
        self._selector.register(stderr, selectors.EVENT_READ, "err")
        if exit_signal.descriptor is not None:
            self._selector.register(exit_signal.descriptor, selectors.EVENT_READ, "exit")

    def _reading(self) -> bool:
        return any(key.data in ("out", "err") for key in self._selector.get_map().values())

    def _feed(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        try:
            if self._pending:
                self._pending = self._pending[os.write(stdin.fileno(), self._pending[:65_536]) :]
        except BlockingIOError:
            return
        except OSError:  # it does not want its input: its own business
            self._pending = self._pending[:0]
        if not self._pending:
            self._selector.unregister(stdin)
            with contextlib.suppress(OSError):
                stdin.close()

    def _gather(self, pipe: IO[bytes], which: str) -> bool:
        try:
            chunk = os.read(pipe.fileno(), 65_536)
        except BlockingIOError:
            return True
        if not chunk:
            self._selector.unregister(pipe)
        elif which == "out":
            self._out += chunk
        else:
            self._err = (self._err + chunk)[-_STDERR_KEPT:]
        return len(self._out) <= wire.MAX_BODY

    def _outcome(self, status: int) -> Done:
        if status == 0:
            body = bytes(self._out)
            return Done("succeeded", None, *_typed(body))
        what = f"exit status {status}" if status > 0 else f"ended by {_signal_name(-status)}"
        tail = bytes(self._err).decode("utf-8", "replace").strip()
        room = wire.MAX_REASON - len(what) - 2
        return failed(f"{what}: {tail[-room:]}" if tail else what)


class _ExitSignal:
    """A descriptor that becomes readable when the process ends, or None on kernels without it."""

    def __init__(self, pid: int) -> None:
        try:
            self.descriptor: int | None = os.pidfd_open(pid)
        except (OSError, AttributeError):
            self.descriptor = None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def _typed(body: bytes) -> tuple[bytes, str]:
    if not body.strip():
        return b"null", wire.JSON
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        pass
    else:
        return body.strip(), wire.JSON
    try:
        body.decode()
    except UnicodeDecodeError:
        return body, OCTETS
    return body, _TEXT


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process group if the process still runs, and leave nothing behind."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _unsafe_directory(directory: Path) -> str | None:
    try:
        status = directory.lstat()
    except OSError as error:
        return f"the directory {directory} can't be read: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is not a directory (symbolic links are not followed)"
    problem = _writable_by_others(status)
    if problem:
        return f"the directory {directory} {problem}"
    for parent in directory.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{parent}, above the directory of handlers, is writable by everybody"
    return None


def _unsafe_file(path: Path) -> str | None:
    if not names.is_dotted(path.name):
        return "its name is no command name"
    try:
        status = path.lstat()
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a plain file (symbolic links are not followed)"
    problem = _writable_by_others(status)
    if problem:
        return f"it {problem}"
    if not status.st_mode & 0o111:
        return "it is not executable"
    return None


def _writable_by_others(status: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return "belongs to another user"
    if status.st_mode & 0o022:
        return "is writable by group or others"
    return None
