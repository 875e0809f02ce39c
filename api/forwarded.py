"""Behind an edge: whom a request comes from is what the edge says, and nobody else is believed."""

import asyncio
import ipaddress
import logging
import time

from starlette.types import ASGIApp, Receive, Scope, Send

LOOKED_UP_FOR = 5.0  # seconds: an edge that is started again may have another address
_TIMEOUT = 1.0  # seconds to look it up
_HEADER = b"x-forwarded-for"

log = logging.getLogger(__name__)


class BehindEdge:
    """ASGI middleware: a request that the edge sends on has the source that its one `X-Forwarded-For` names."""

    def __init__(self, app: ASGIApp, edge: str) -> None:
        """`edge` is the name by which it is found."""
        self._app, self._edge = app, edge
        self._addresses: frozenset[str] = frozenset()
        self._until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("client") and scope["client"][0] in await self._known():
            named = [value for name, value in scope["headers"] if name == _HEADER]
            source = _address(named[0]) if len(named) == 1 else None
            if source is not None:
                scope = {**scope, "client": (source, 0)}
        await self._app(scope, receive, send)

    async def _known(self) -> frozenset[str]:
        now = time.monotonic()
        if now >= self._until:
            self._until = now + LOOKED_UP_FOR  # one request looks it up, the others go on with what was known
            try:
                async with asyncio.timeout(_TIMEOUT):
                    found = await asyncio.get_running_loop().getaddrinfo(self._edge, None)
                self._addresses = frozenset(str(each[4][0]) for each in found)
            except (OSError, TimeoutError) as error:
                log.warning("edge.unknown host=%s error=%s", self._edge, error)
        return self._addresses


def _address(text: bytes) -> str | None:
    try:
        return str(ipaddress.ip_address(text.decode("ascii").strip()))
    except ValueError:
        return None
