"""A streamed answer, of JSON lines or server-sent events, that ends when its reader goes away, loses its right to
read, or takes nothing."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api import logs, problems
from api.problems import Problem
from fabric.errors import FabricError
from fabric.presenting import Document
from fabric.waiting import Right

FIRST_WAIT = 0.5  # seconds: what goes wrong at once is answered with its own status
CHECK_EVERY = 1.0  # seconds between looks at whether the reader may still read
LONGEST = 3600.0  # seconds of one answer
TAKEN_WITHIN = 30.0  # seconds that the reader has for what is sent, before it is cut off
LAST_WORDS = 2.0  # seconds that the answer has to end when the gateway stops
CUT_WITHIN = 1.0  # seconds that it has when its reader has lost its right
LINGER = 0.5  # seconds that the reader then has to close: TLS would wait for it as long as it likes
AHEAD = 64  # pieces made before they are sent

ABORT = "restante.abort"
"""The ASGI extension of the gateway's server that drops a connection at once: closing it would wait until its
reader has taken everything."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Form:
    """What a streamed answer looks like. `problem` makes its last piece when something went wrong."""

    media_type: str
    problem: Callable[[Document], bytes]


def line(document: Document) -> bytes:
    """A line of NDJSON."""
    return _text(document).encode("ascii") + b"\n"


def block(*, id: int | None = None, event: str | None = None, data: str | None = None) -> bytes:
    """A block of a server-sent event stream (WHATWG HTML, section 9.2). `data` is one line of ASCII."""
    fields = [("id", id), ("event", event), ("data", data)]
    return "".join([*(f"{name}: {value}\n" for name, value in fields if value is not None), "\n"]).encode("ascii")


def notice(event: str, document: Document, *, id: int | None = None) -> bytes:
    """A block that tells a document."""
    return block(id=id, event=event, data=_text(document))


NDJSON = Form("application/x-ndjson", lambda problem: line({"problem": problem}))
SSE = Form("text/event-stream", lambda problem: notice("problem", problem))


class Stream(Response):
    """Sends the pieces of `source` as they come, an hour at most.

    What goes wrong before the first of them has its own status; behind it, the last piece is the problem.

    Args:
        right: the reader's, looked at once a second, and when it is taken away; the answer ends with it.
        stopping: set when the gateway stops; the answer then ends.
    """

    def __init__(
        self,
        form: Form,
        source: AsyncGenerator[bytes, None],
        right: Right,
        stopping: asyncio.Event,
    ) -> None:
        super().__init__(None, 200, {"Content-Type": form.media_type, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # not known before
        self._form, self._source, self._right, self._stopping = form, source, right, stopping
        self._pieces: asyncio.Queue[bytes | Problem | None] = asyncio.Queue(AHEAD)
        self._lost = asyncio.Event()
        self._check_at = 0.0
        self._pause: asyncio.Timeout | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything that this answer starts ends with it. Raises what `right` does on entering."""
        making = asyncio.create_task(self._make())
        gone = asyncio.create_task(_gone(receive))
        sending = asyncio.create_task(self._watched(scope, receive, send))
        stopping, lost = asyncio.create_task(self._stopping.wait()), asyncio.create_task(self._lost.wait())
        try:
            await asyncio.wait({sending, gone, stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() or lost.done():
                words = LAST_WORDS if stopping.done() else CUT_WITHIN
                await asyncio.wait({sending, gone}, timeout=words, return_when=asyncio.FIRST_COMPLETED)
            sent = sending.done() and sending.result()
            if sent and stopping.done():
                await asyncio.sleep(LINGER)
            if stopping.done() or not (sent or gone.done()):
                await _abort(scope, gone)
        finally:
            tasks = (making, gone, sending, stopping, lost)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self) -> None:
        """Queue the pieces, and at last None or the problem that ended them."""
        end: Problem | None = None
        try:
            async with aclosing(self._source) as source:
                async for piece in source:
                    await self._pieces.put(piece)
        except FabricError as error:
            end = problems.of_error(error)
        except Exception:  # the reader is told, without internals
            log.exception("http.bug while streaming")
            end = problems.bug()
        await self._pieces.put(end)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> bool:
        async with self._right.watched(self._look):
            return await self._send(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Was it sent to its end? Not when the reader took nothing for too long."""
        loop = asyncio.get_running_loop()
        self._check_at = loop.time() + CHECK_EVERY
        item = await self._next(FIRST_WAIT)
        if isinstance(item, Problem):
            await problems.answer(item, logs.request_id.get())(scope, receive, send)
            return True
        if not await _taken(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers}):
            return False
        end = loop.time() + LONGEST
        while isinstance(item, bytes) and loop.time() < end:
            chunk = [item]
            while not self._pieces.empty() and isinstance(item, bytes):
                item = self._pieces.get_nowait()
                if isinstance(item, bytes):
                    chunk.append(item)
            # The first chunk may be empty: it tells the reader that its reading has begun.
            if not await _taken(send, _body(b"".join(chunk), more=True)):
                return False
            if isinstance(item, bytes):
                item = await self._next(CHECK_EVERY)
        last = self._form.problem(_brief(item)) if isinstance(item, Problem) else b""
        return await _taken(send, _body(last, more=False))

    async def _next(self, seconds: float) -> bytes | Problem | None:
        """The next piece, nothing when none comes in time, or how it ended."""
        loop = asyncio.get_running_loop()
        item: bytes | Problem | None = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if self._lost.is_set() else seconds) as self._pause:
                item = await self._pieces.get()
        self._pause = None
        if loop.time() < self._check_at and not self._lost.is_set():
            return item
        self._check_at = loop.time() + CHECK_EVERY
        return await self._refusal() or item

    def _look(self) -> None:
        """The right was taken away: wait for no piece any more."""
        self._lost.set()
        if self._pause is not None and not self._pause.expired():
            self._pause.reschedule(asyncio.get_running_loop().time())

    async def _refusal(self) -> Problem | None:
        """Why this must end."""
        if self._stopping.is_set():
            return Problem("temporarily-unavailable", "The gateway is stopping; ask again, from where this ends.")
        try:
            await self._right.check()
        except Problem as problem:
            return problem
        except FabricError as error:
            return problems.of_error(error)
        return None


def _body(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _taken(send: Send, message: Message) -> bool:
    """Was it taken in time?"""
    try:
        async with asyncio.timeout(TAKEN_WITHIN):
            await send(message)
    except TimeoutError:
        log.info("http.stuck the reader took nothing for %.0f s", TAKEN_WITHIN)
        return False
    return True


async def _abort(scope: Scope, gone: "asyncio.Task[None]") -> None:
    abort = scope.get("extensions", {}).get(ABORT, {}).get("abort")
    if abort is not None:
        abort()
        await asyncio.wait({gone}, timeout=LAST_WORDS)


async def _gone(receive: Receive) -> None:
    with suppress(Problem):  # a body that was announced and never comes
        while (await receive())["type"] != "http.disconnect":
            pass


def _brief(problem: Problem) -> Document:
    status, title = problems.TITLES[problem.code]
    return {"type": problems.TYPE_PREFIX + problem.code, "title": title, "status": status, "detail": problem.detail}


def _text(document: Document) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)
