"""What surrounds every request: its id, bounds on its body, safe headers, and the last catch for bugs."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import bodies, logs, problems
from api.problems import Problem
from fabric import audit, context
from fabric.audit import By, Kind
from fabric.measures import Histogram
from topology import wire

COMMAND_LIMIT = wire.MAX_BODY + 16 * 1024  # bytes: arguments, and the JSON around them
TELEMETRY_LIMIT = 1024 * 1024  # bytes of a batch
BODY_TIMEOUT = 15.0  # seconds that a whole body may take

_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_NO_STORE = (b"cache-control", b"no-store")

log = logging.getLogger(__name__)


Answers = dict[tuple[str, str, str], Histogram]
"""How long requests took, by method, route and class of status (`2xx`). What no route is for is `other`, and so is what
was never answered."""


class Edge:
    """ASGI middleware, to be the outermost. Never raises for what a caller sent."""

    def __init__(self, app: ASGIApp, answers: Answers) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = _request_id(scope["headers"])
        tokens = logs.request_id.set(id), context.command.set(None)
        try:
            # Whatever the connection's last request left behind, this one is nobody's yet.
            with audit.acting_as(By(Kind.ANONYMOUS, address=source(scope), request=id)):
                await self._serve(scope, receive, _Answer(send, id), id)
        finally:
            logs.request_id.reset(tokens[0])
            context.command.reset(tokens[1])

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer", id: str) -> None:
        began = time.monotonic()
        body = _Body(receive, body_limit(scope["path"]), _declared(scope["headers"]))
        try:
            await self._app(scope, body, answer)
        except ClientDisconnect:
            log.debug("http.disconnected")
        except Exception:  # whatever it is, the caller gets no internals
            log.exception("http.bug method=%s path=%s", logs.shown(scope["method"]), logs.shown(scope["path"]))
            if answer.status is None:
                await problems.answer(problems.bug(), id)(scope, receive, answer)
        took = time.monotonic() - began
        self._measure(scope, answer.status, took)
        level = logging.DEBUG if answer.status is None or answer.status < 400 else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "http.answered method=%s path=%s status=%s ms=%.1f",
                logs.shown(scope["method"]),
                logs.shown(scope["path"]),
                answer.status,
                took * 1000,
            )

    def _measure(self, scope: Scope, status: int | None, took: float) -> None:
        route, method = scope.get("route"), scope["method"]
        if isinstance(route, APIRoute) and method in (route.methods or ()):
            path: str = route.path
        else:
            method = path = "other"
        key = (method, path, "other" if status is None else f"{status // 100}xx")
        histogram = self._answers.get(key)
        if histogram is None:
            histogram = self._answers[key] = Histogram()
        histogram.observe(took)


def source(scope: Scope) -> str | None:
    """The address that a request comes from: the connection's other end."""
    client = scope.get("client")
    return None if client is None else str(client[0])


def body_limit(path: str) -> int:
    """Bytes that a body sent to this path may have."""
    return TELEMETRY_LIMIT if path.startswith("/v1/devices/") and "/telemetry/" in path else COMMAND_LIMIT


class _Answer:
    """`send`, with the headers that every answer has."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self._id = send, id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *_SAFE_HEADERS, (b"x-request-id", self._id.encode())]
            if all(name.lower() != b"cache-control" for name, _ in headers):
                headers.append(_NO_STORE)
            message = {**message, "headers": headers}
        await self._send(message)


class _Body:
    """`receive`, within a size and a time. What is declared too large is refused before it is read, but only
    when somebody wants to read it: whoever may not ask at all is told so first."""

    def __init__(self, receive: Receive, limit: int, declared: int) -> None:
        self._receive, self._limit, self._declared = receive, limit, declared
        self._size = 0
        self._deadline: float | None = None
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        if self._declared > self._limit:
            raise self._too_large()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            detail = f"The body did not arrive within {BODY_TIMEOUT:.0f} s. Send it again, or in smaller parts."
            raise Problem("slow-request", detail, headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> Problem:
        problem = bodies.too_large(self._limit)
        problem.headers["Connection"] = "close"  # the rest is not worth reading
        return problem


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return secrets.token_hex(16)


def _declared(headers: Iterable[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0
