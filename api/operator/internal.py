"""The internal listener of a gateway or a worker: what watches it asks there, and at a gateway the broker."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from api.operator.metrics import CONTENT_TYPE, Metrics
from fabric.errors import Temporary

READY_TIMEOUT = 3.0  # seconds
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Page:
    status: int
    content_type: str
    body: bytes


Pages = dict[str, Callable[[], Awaitable[Page]]]


class Internal:
    """An ASGI app: `GET` of some pages; everything else is another app's, or not there."""

    def __init__(self, pages: Pages, others: ASGIApp | None = None) -> None:
        self._pages, self._others = pages, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        make = self._pages.get(scope["path"])
        if make is None and self._others is not None:
            await self._others(scope, receive, send)
        elif make is None:
            await _answer(send, Page(404, "text/plain", b"not found"))
        elif scope["method"] != "GET":
            await _answer(send, Page(405, "text/plain", b"method not allowed"), (b"allow", b"GET"))
        else:
            await _answer(send, await make())


def health(ready: Callable[[], Awaitable[Mapping[str, str]]]) -> Pages:
    """`/health/live` and `/health/ready`, which has 503 with `reasons` as long as there are any."""

    async def live() -> Page:
        return Page(200, _JSON, _OK)

    async def page() -> Page:
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                reasons = dict(await ready())
        except (TimeoutError, Temporary):
            reasons = {"ledger": "not answering"}
        return Page(503, _JSON, json.dumps({"reasons": reasons}).encode()) if reasons else Page(200, _JSON, _OK)

    return {"/health/live": live, "/health/ready": page}


class Listener:
    """Shows metrics at `/metrics`, and other pages and another app beside them. Never to be reached from outside."""

    def __init__(self, metrics: Metrics, host: str, port: int, pages: Pages, others: ASGIApp | None = None) -> None:
        async def shown() -> Page:
            return Page(200, CONTENT_TYPE, await metrics.text())

        self._metrics = metrics
        self._server = uvicorn.Server(
            uvicorn.Config(
                Internal({"/metrics": shown, **pages}, others),
                host=host,
                port=port,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )

    async def run(self) -> None:
        """Serve until stopped; a listener that can't be opened ends the process with a clear line."""
        measuring = asyncio.create_task(self._metrics.measure_lag())
        try:
            await serve(self._server)
        finally:
            measuring.cancel()

    def stop(self) -> None:
        self._server.should_exit = True


async def serve(server: uvicorn.Server) -> None:
    await server._serve()  # noqa: SLF001 - `serve` would take the signals that this process handles itself


async def _answer(send: Send, page: Page, *headers: tuple[bytes, bytes]) -> None:
    head = [(b"content-type", page.content_type.encode()), (b"content-length", str(len(page.body)).encode()), *headers]
    await send({"type": "http.response.start", "status": page.status, "headers": head})
    await send({"type": "http.response.body", "body": page.body})


_OK: Final = b'{"status": "ok"}'
