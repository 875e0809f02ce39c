"""Streamed answers: what they look like, that little is made ahead, and how they end."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import streaming
from api.operator.following import Block, blocks
from api.problems import Problem, unauthenticated
from api.streaming import NDJSON, SSE, Form, Stream
from fabric.errors import LedgerUnavailable

# ---- Blocks ------------------------------------------------------------------------------------------

LINE_ENDS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0"


@given(st.text() | st.text(LINE_ENDS + ':{"'))
def test_no_text_breaks_out_of_its_block(text: str) -> None:
    made = streaming.notice("command.failed", {"reason": text}, id=7)
    assert made.endswith(b"\n\n")
    assert made.count(b"\n") == 4
    assert b"\r" not in made
    (read,) = blocks(made.decode("ascii").splitlines())
    assert (read.id, read.event) == ("7", "command.failed")
    assert json.loads(read.data) == {"reason": text}


def test_blocks_are_read_back_and_one_that_is_cut_off_is_not() -> None:
    made = streaming.block(id=1) + streaming.block(id=2, event="a.b", data="{}") + b"id: 3\ndata: {"
    assert list(blocks(made.decode().splitlines())) == [Block("1"), Block("2", "a.b", "{}")]


# ---- Answers -----------------------------------------------------------------------------------------


class Reader:
    """The server's end of one answer; `takes` is how many messages its reader takes before it takes no more."""

    def __init__(self, takes: float = float("inf")) -> None:
        self.takes = takes
        self.sent: list[dict[str, Any]] = []
        self.began, self.gone = asyncio.Event(), asyncio.Event()
        self.aborted = False

    async def send(self, message: Any) -> None:
        if len(self.sent) >= self.takes:
            await self.gone.wait()
            return
        self.sent.append(message)
        if len(self.sent) == 2:
            self.began.set()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def abort(self) -> None:
        self.aborted = True
        self.gone.set()

    async def read(self, answer: Stream) -> None:
        scope = {"type": "http", "extensions": {streaming.ABORT: {"abort": self.abort}}}
        async with asyncio.timeout(20):
            await answer(scope, self.receive, self.send)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def complete(self) -> bool:
        return self.sent[-1].get("more_body") is False


class Source:
    """Pieces without end; counts those that were made."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = False

    async def pieces(self, every: float = 0.0) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                self.made += 1
                yield b"x\n"
                await asyncio.sleep(every)
        finally:
            self.closed = True


class Right:
    """Of a reader whose token is good until it is revoked."""

    def __init__(self) -> None:
        self.revoked = False

    async def check(self) -> None:
        if self.revoked:
            raise unauthenticated("the token was revoked", token_given=True)

    @asynccontextmanager
    async def watched(self, lost: Callable[[], None]) -> AsyncIterator[None]:
        await self.check()
        self.lost = lost
        yield

    def revoke(self) -> None:
        self.revoked = True
        self.lost()


def stream(source: AsyncGenerator[bytes, None], form: Form = SSE, **changed: Any) -> Stream:
    return Stream(form, source, changed.get("right", Right()), changed.get("stopping", asyncio.Event()))


async def test_the_headers_are_those_of_an_unbuffered_stream() -> None:
    async def nothing() -> AsyncGenerator[bytes, None]:
        return
        yield b""

    reader = Reader()
    await reader.read(stream(nothing()))
    assert dict(reader.sent[0]["headers"]) == {b"content-type": b"text/event-stream", b"x-accel-buffering": b"no"}
    assert reader.complete
    assert reader.body == b""


async def test_little_is_made_ahead_for_a_reader_that_takes_nothing_and_it_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "TAKEN_WITHIN", 0.5)
    source, reader = Source(), Reader(takes=2)
    await reader.read(stream(source.pieces()))
    assert reader.aborted
    assert source.closed
    # Two chunks at most, one of them under way; the queue; the piece that waits for a place in it.
    assert source.made <= 3 * (streaming.AHEAD + 1)


async def test_a_reader_that_goes_away_ends_its_source() -> None:
    source, reader = Source(), Reader()
    reading = asyncio.create_task(reader.read(stream(source.pieces(every=0.01))))
    await reader.began.wait()
    reader.gone.set()
    await reading
    assert source.closed
    assert not reader.aborted


@pytest.mark.parametrize("every", [0.01, 60], ids=["busy", "idle"])
@pytest.mark.parametrize("told", [True, False], ids=["at-once", "by-looking"])
@pytest.mark.parametrize("form", [SSE, NDJSON], ids=["sse", "ndjson"])
async def test_whoever_loses_its_right_is_told_so_at_last(
    form: Form, told: bool, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHECK_EVERY", 60 if told else 0.05)
    source, reader, right = Source(), Reader(), Right()
    reading = asyncio.create_task(reader.read(stream(source.pieces(every), form, right=right)))
    await reader.began.wait()
    if told:
        right.revoke()
    else:
        right.revoked = True
    await reading
    assert reader.complete
    assert not reader.aborted
    assert source.closed
    _, _, last = reader.body.rpartition(b"x\n")
    if form is SSE:
        (block,) = blocks(last.decode().splitlines())
        assert block.event == "problem"
        problem = json.loads(block.data)
    else:
        problem = json.loads(last)["problem"]
    assert (problem["type"], problem["status"]) == ("urn:restante:problem:unauthenticated", 401)


async def test_whoever_loses_its_right_and_takes_nothing_is_cut_off() -> None:
    source, reader, right = Source(), Reader(takes=2), Right()
    reading = asyncio.create_task(reader.read(stream(source.pieces(every=0.01), right=right)))
    await reader.began.wait()
    right.revoke()
    await reading
    assert reader.aborted
    assert source.closed


async def test_whoever_has_lost_its_right_before_the_first_piece_is_answered_nothing() -> None:
    source, right = Source(), Right()
    right.revoked = True
    reader = Reader()
    with pytest.raises(Problem):
        await reader.read(stream(source.pieces(), right=right))
    assert reader.sent == []


async def test_the_gateways_end_is_not_held_up() -> None:
    stopping = asyncio.Event()
    for takes in (float("inf"), 2):
        stopping.clear()
        source, reader = Source(), Reader(takes)
        reading = asyncio.create_task(reader.read(stream(source.pieces(every=0.01), stopping=stopping)))
        await reader.began.wait()
        stopping.set()
        async with asyncio.timeout(streaming.LAST_WORDS + streaming.LINGER + 1):
            await reading
        assert source.closed
        assert reader.aborted, "TLS would wait for a reader that does not close"
        assert reader.complete is (takes != 2)
        assert (b"temporarily-unavailable" in reader.body) is (takes != 2)


async def test_an_answer_ends_after_its_longest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LONGEST", 0.2)
    source, reader = Source(), Reader()
    await reader.read(stream(source.pieces(every=0.01)))
    assert reader.complete
    assert set(reader.body.split(b"\n")) == {b"x", b""}


@pytest.mark.parametrize(
    ("error", "code"), [(LedgerUnavailable("away"), 503), (RuntimeError("a bug"), 500), (Problem("gone", "x"), 500)]
)
async def test_what_goes_wrong_at_once_has_its_own_status(error: Exception, code: int) -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        raise error
        yield b""

    reader = Reader()
    await reader.read(stream(broken()))
    assert reader.sent[0]["status"] == code
    assert json.loads(reader.body)["status"] == code
