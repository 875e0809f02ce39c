"""A streamed answer of JSON lines that ends when its reader goes away."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import logs, problems
from api.problems import Problem
from fabric.errors import FabricError
from fabric.presenting import Document

MEDIA_TYPE = "application/x-ndjson"
FIRST_WAIT = 0.5  # seconds: what goes wrong at once is answered with its own status
CHECK_EVERY = 1.0  # seconds between looks at whether the reader may still read
LONGEST = 3600.0  # seconds of one answer
_AHEAD = 256  # lines made before they are sent

log = logging.getLogger(__name__)


class Lines(Response):
    """`allowed` is asked once a second and raises when the reader has lost its right; the answer then ends.

    What goes wrong before the first line has its own status; behind it, the last line is `{"problem": …}`.
    """

    media_type = MEDIA_TYPE

    def __init__(self, source: AsyncGenerator[Document, None], allowed: Callable[[], Awaitable[object]]) -> None:
        super().__init__(None, 200)
        del self.headers["content-length"]  # not known before
        self._source, self._allowed = source, allowed
        self._lines: asyncio.Queue[bytes | Problem | None] = asyncio.Queue(_AHEAD)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything that this answer starts ends with it."""
        making = asyncio.create_task(self._make())
        gone = asyncio.create_task(_gone(receive))
        sending = asyncio.create_task(self._send(scope, receive, send))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (making, gone, sending):
                task.cancel()
            await asyncio.gather(making, gone, sending, return_exceptions=True)

    async def _make(self) -> None:
        """Queue the lines, and at last None or the problem that ended them."""
        end: Problem | None = None
        try:
            async with aclosing(self._source) as source:
                async for document in source:
                    await self._lines.put(_line(document))
        except FabricError as error:
            end = problems.of_error(error)
        except Exception:  # the reader is told, without internals
            log.exception("http.bug while streaming")
            end = problems.bug()
        await self._lines.put(end)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        item = await self._next(FIRST_WAIT)
        if isinstance(item, Problem):
            await problems.answer(item, logs.request_id.get())(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        end, check_at = loop.time() + LONGEST, loop.time() + CHECK_EVERY
        while isinstance(item, bytes) and loop.time() < end:
            chunk = [item]
            while not self._lines.empty() and isinstance(item, bytes):
                item = self._lines.get_nowait()
                if isinstance(item, bytes):
                    chunk.append(item)
            # The first chunk may be empty: it tells the reader that its reading has begun.
            await send({"type": "http.response.body", "body": b"".join(chunk), "more_body": True})
            if isinstance(item, bytes):
                item = await self._next(CHECK_EVERY)
            if loop.time() >= check_at:
                check_at = loop.time() + CHECK_EVERY
                item = await self._lost() or item
        last = _line({"problem": _brief(item)}) if isinstance(item, Problem) else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _next(self, seconds: float) -> bytes | Problem | None:
        """The next line, nothing when none comes in time, or how it ended."""
        try:
            async with asyncio.timeout(seconds):
                return await self._lines.get()
        except TimeoutError:
            return b""

    async def _lost(self) -> Problem | None:
        try:
            await self._allowed()
        except Problem as problem:
            return problem
        except FabricError as error:
            return problems.of_error(error)
        return None


async def _gone(receive: Receive) -> None:
    with suppress(Problem):  # a body that was announced and never comes
        while (await receive())["type"] != "http.disconnect":
            pass


def _brief(problem: Problem) -> Document:
    status, title = problems.TITLES[problem.code]
    return {"type": problems.TYPE_PREFIX + problem.code, "title": title, "status": status, "detail": problem.detail}


def _line(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
