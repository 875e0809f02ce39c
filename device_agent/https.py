"""HTTPS as this agent speaks it: one request on a connection of its own, no redirects, a bounded answer, a deadline."""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from device_agent import errors, log, tls

TIMEOUT = 10.0  # seconds for each step on a socket
DEADLINE = 30.0  # seconds for a whole request, however slowly it drips
MAX_ANSWER = 64 * 1024  # bytes
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Service:
    """Where the gateway is; `base` is the path its routes hang under, usually empty."""

    host: str
    port: int
    base: str

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}{self.base}"


def parse_url(api_url: str) -> Service:
    """Raises `errors.InvalidValue`: not `https://host[:port][/path]`."""
    try:
        parts = urlsplit(api_url.strip())
        port = parts.port or 443
    except ValueError:
        raise errors.InvalidValue(
            "the address of the service is not a URL such as https://gateway.example:8443"
        ) from None
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise errors.InvalidValue("the address of the service must look like https://gateway.example:8443")
    return Service(parts.hostname, port, parts.path.rstrip("/"))


def exchange(
    service: Service,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: Mapping[str, str] | None = None,
    accept: str = JSON,
) -> tuple[int, bytes]:
    """Status and content of the answer to one request; `body` is sent as JSON.

    Raises:
        errors.BadAnswer, errors.Unreachable, errors.PeerNotTrusted
    """
    connection = http.client.HTTPSConnection(service.host, service.port, timeout=TIMEOUT, context=context)
    content = None if body is None else json.dumps(body).encode()
    sent = {"Accept": accept, "Connection": "close", **(headers or {})}
    if content is not None:
        sent["Content-Type"] = JSON
    try:
        connection.connect()
        with _deadline(connection.sock):
            connection.request(method, service.base + path, content, sent)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER + 1)
    except http.client.HTTPException as error:
        raise errors.BadAnswer(f"{service.url} does not speak HTTP as expected ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise tls.translate(error, service.host, service.port) from error
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER:
        raise errors.BadAnswer(f"{service.url}{path} answered more than {MAX_ANSWER} bytes")
    return response.status, answer


def json_object(body: bytes) -> dict[str, Any] | None:
    """What an answer holds; None when it is not a JSON object."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def said(answer: dict[str, Any] | None) -> str:
    """What a problem document says, fit for a terminal."""
    parts = [str(answer[part]) for part in ("title", "detail") if answer.get(part)] if answer else []
    return log.escape(": ".join(parts))


@contextmanager
def _deadline(connected: socket.socket) -> Iterator[None]:
    """Cut the connection when the time is up: a socket's own timeout starts again with every byte."""

    def cut() -> None:
        with suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(DEADLINE, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
