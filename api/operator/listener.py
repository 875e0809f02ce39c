"""The gateway's public listener: whoever connects and doesn't ask is cut off, however many they are.

uvicorn bounds neither the time nor the size of a request's head, nor what may follow a body. The body itself and the
answer are `api.edge`'s and `api.streaming`'s.
"""

import asyncio
import logging
import resource
import ssl
import sys
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.streaming import ABORT

TLS_TIMEOUT = 5.0  # seconds for a handshake, as at the broker
HEAD_TIMEOUT = 10.0  # seconds from a connection, or an answer, to the end of the next request's head
KEEP_ALIVE = 8  # seconds for which an idle connection is kept: longer than httpx keeps its end, so it never meets ours
HEAD_LIMIT = 64 * 1024  # bytes of a head, and of whatever else isn't a body
MOST_WAITING = 2_000  # connections that wait for a head; one more, and the one that has waited longest is cut off

log = logging.getLogger(__name__)

Waiting = dict["Connection", asyncio.TimerHandle]
"""Connections without a request, the longest wait first."""


class Connection(HttpToolsProtocol):
    """A caller's connection. It has its heads in time and within their size, and doesn't hold up the gateway's end."""

    def __init__(self, waiting: Waiting, **given: Any) -> None:
        super().__init__(**given)
        self._waiting = waiting
        self._unused = 0  # bytes received since the last head or piece of a body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unused += len(data)
        super().data_received(data)
        if self._unused > HEAD_LIMIT:
            log.info("http.head-too-large")
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}

    def on_headers_complete(self) -> None:
        self._unused = 0
        self._wait_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unused = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait()

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            # Closing TLS waits for the peer's answer, and a peer that keeps an idle connection reads nothing.
            self.transport.abort()
        else:
            super().shutdown()

    def cut_off(self) -> None:
        self._wait_no_more()
        self.transport.abort()

    def _wait(self) -> None:
        self._wait_no_more()
        self._waiting[self] = self.loop.call_later(HEAD_TIMEOUT, self.cut_off)
        if len(self._waiting) > MOST_WAITING:
            next(iter(self._waiting)).cut_off()

    def _wait_no_more(self) -> None:
        timer = self._waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


class PublicServer(uvicorn.Server):
    """A server whose connections are `Connection`s, over TLS 1.2 or later if the configuration has a certificate."""

    async def startup(self, sockets: object = None) -> None:  # noqa: ARG002 - it opens its own
        config, loop = self.config, asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if config.ssl is not None:
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
            config.ssl.options |= ssl.OP_NO_RENEGOTIATION
            tls = {"ssl": config.ssl, "ssl_handshake_timeout": TLS_TIMEOUT}
        waiting: Waiting = {}

        def connection() -> Connection:
            return Connection(waiting, config=config, server_state=self.server_state, app_state={})

        _allow_many_files()
        try:
            server = await loop.create_server(connection, config.host, config.port, backlog=config.backlog, **tls)
        except OSError as error:
            log.error("listener.failed error=%s", error)  # noqa: TRY400 - one clear line
            sys.exit(STARTUP_FAILURE)
        self.servers = [server]
        self.started = True


def _allow_many_files() -> None:
    """The usual limit of 1,024 would be reached by strangers in the middle of their handshakes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
