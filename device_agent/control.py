"""The running agent's local door: a unix socket in the state directory, open to its owner only.

One JSON object per line each way. `{"do": "status"}`, or `{"do": "publish", "channel", "content_type", "at",
"body": base64}`, answered after the broker's confirm. It is no network socket: nobody outside this machine,
and no other user on it, can reach it.
"""

import json
import os
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from device_agent import errors, log
from topology import wire

FILE = "control.sock"
MAX_CLIENTS = 16
MAX_LINE = 2 * wire.MAX_BODY  # bytes: a body in base64 and the little around it
IDLE = 300.0  # seconds a client may say nothing
CONFIRM_TIMEOUT = 30.0  # seconds a publish may wait for the broker
_PATH_LIMIT = 100  # bytes of a unix socket's path, by the kernel 107

Publish = Callable[[str, bytes, str, int | None], "Future[None]"]


class ControlServer:
    """Serves clients, each on a thread of its own, a bounded number at a time."""

    def __init__(self, state_dir: Path, status: Callable[[], dict[str, object]], publish: Publish) -> None:
        self._path = state_dir / FILE
        self._status = status
        self._publish = publish
        self._socket: socket.socket | None = None
        self._free = threading.Semaphore(MAX_CLIENTS)

    def start(self) -> None:
        """Raises `errors.StateRefused`."""
        if len(os.fsencode(self._path)) > _PATH_LIMIT:
            raise errors.StateRefused(
                f"the path {self._path} is too long for a unix socket; use a shorter state directory"
            )
        self._path.unlink(missing_ok=True)  # the caller holds the directory's lock: nobody serves it
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            server.bind(str(self._path))
        except OSError as error:
            server.close()
            raise errors.StateRefused(f"the control socket {self._path} can't be made: {error.strerror}") from error
        finally:
            os.umask(before)
        server.listen(MAX_CLIENTS)
        self._socket = server
        threading.Thread(target=self._accept, name="restante-control", daemon=True).start()

    def stop(self) -> None:
        if self._socket is not None:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None

    def _accept(self) -> None:
        server = self._socket
        while server is not None:
            self._free.acquire()
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.settimeout(IDLE)
            with client, client.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE):
                    client.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        except (OSError, ValueError) as error:
            log.debug("control.ended", because=str(error))
        finally:
            self._free.release()

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            if request["do"] == "status":
                return self._status()
            if request["do"] != "publish":
                raise errors.InvalidValue("unknown request")
            body = b64decode(request["body"], validate=True)
            self._publish(request["channel"], body, request["content_type"], request["at"]).result(CONFIRM_TIMEOUT)
        except errors.AgentError as error:
            return {"error": error.code, "text": str(error)}
        except TimeoutError:
            return {
                "error": errors.NotConfirmed.code,
                "text": f"the broker has not confirmed it within {CONFIRM_TIMEOUT:g} s; the agent goes on trying",
            }
        except CancelledError:
            return {"error": errors.NotConfirmed.code, "text": "the agent is stopping"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return {"error": errors.InvalidValue.code, "text": f"not a request: {type(error).__name__}"}
        return {"ok": True}


class ControlClient:
    """A connection to the agent that runs on this state directory."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lines = connected.makefile("rb")

    def status(self) -> dict[str, Any]:
        return self._ask({"do": "status"})

    def publish(self, channel: str, body: bytes, content_type: str, at: int | None) -> None:
        """Hand a reading over, and wait until the broker has it.

        Raises:
            errors.AgentError: of the kind the agent names.
        """
        text = b64encode(body).decode("ascii")
        answer = self._ask({"do": "publish", "channel": channel, "content_type": content_type, "at": at, "body": text})
        if "error" in answer:
            raise _error(str(answer["error"]), str(answer.get("text", "")))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._lines.readline()
        except OSError as error:
            raise errors.NotConfirmed(f"the running agent did not answer ({error}); it may have stopped") from error
        if not line:
            raise errors.NotConfirmed("the running agent ended before it answered")
        answer: dict[str, Any] = json.loads(line)
        return answer


def connect(state_dir: Path) -> ControlClient | None:
    """A client, or None if no agent runs on this directory."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(CONFIRM_TIMEOUT + 5)
    try:
        client.connect(str(state_dir / FILE))
    except OSError:
        client.close()
        return None
    return ControlClient(client)


def _error(code: str, text: str) -> errors.AgentError:
    kinds = (errors.BufferFull, errors.InvalidValue, errors.NotConfirmed)
    return next((kind(text) for kind in kinds if kind.code == code), errors.AgentError(text))
