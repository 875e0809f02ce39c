"""A light HTTP/1.1 client on asyncio and httptools: whatever is measured with it, little is its own cost."""

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

_PATIENCE = 60.0  # seconds for an answer; a long poll takes 30


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is. `tls` is what its certificate is checked with; None: in the clear."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str, tls: ssl.SSLContext | None = None) -> "Place":
        parts = urlsplit(url)
        return cls(parts.hostname or "", parts.port or 0, tls)

    def request(self, method: str, path: str, headers: Mapping[str, str], body: object = None) -> bytes:
        """A request as it goes over the wire, with `body` as JSON."""
        sent = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        told = {"Host": f"{self.host}:{self.port}", **headers}
        if body is not None:
            told |= {"Content-Type": "application/json", "Content-Length": str(len(sent))}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + sent


class Connection(asyncio.Protocol):
    """One kept-alive connection, for one request at a time; opened again if the server has closed it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._body = bytearray()

    async def ask(self, request: bytes) -> Answer:
        """Raises `OSError` when the connection ends before its answer, `TimeoutError` when that does not come."""
        if self._transport is None or self._transport.is_closing():
            await self.open()
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        async with asyncio.timeout(_PATIENCE):
            return await self._answer

    async def open(self) -> None:
        place, loop = self._place, asyncio.get_running_loop()
        name = place.host if place.tls else None
        self._transport, _ = await loop.create_connection(
            lambda: self, place.host, place.port, ssl=place.tls, server_hostname=name
        )

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        assert self._parser is not None
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None and not self._transport.is_closing():
            return  # that was the one before
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def on_message_begin(self) -> None:
        self._body.clear()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._parser is not None
        answer = Answer(self._parser.get_status_code(), bytes(self._body))
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)
