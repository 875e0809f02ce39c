"""What is open and lasts: ended when its token is good no more, and asked about once for each token."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from api import lasting
from api.lasting import Lasting
from fabric.errors import LedgerUnavailable, Temporary, Unauthenticated
from topology.names import DeviceId


class Tokens:
    """Which are revoked, and how often each was asked about."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.forgotten = 0
        self.lasting = Lasting(self.forget)

    def forget(self) -> None:
        self.forgotten += 1

    async def verify(self, token: str) -> None:
        self.asked[token] += 1
        if token in self.revoked:
            raise Unauthenticated("the token was revoked")

    async def serve(self, token: str, device: str | None = None, *, ends: bool = True) -> str:
        """Something that lasts until its token is revoked."""
        lost = asyncio.Event()
        round = self.lasting.rounds
        async with self.lasting.open(device, token, round, lambda: self.verify(token), lost.set):
            await lost.wait()
            if not ends:
                await asyncio.sleep(60)
        return token


async def opened(*serving: "asyncio.Task[str]") -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in serving)


async def test_what_has_lost_its_right_has_ended_and_nothing_else() -> None:
    tokens = Tokens()
    serving = [asyncio.create_task(tokens.serve(token)) for token in ("a", "a", "b", "b", "b")]
    await opened(*serving)
    tokens.revoked = {"a"}
    await tokens.lasting.end(None)
    assert [task.done() for task in serving] == [True, True, False, False, False]
    assert tokens.asked == {"a": 1, "b": 1}
    assert tokens.forgotten == 1, "before anything was asked"
    tokens.revoked = {"a", "b"}
    await tokens.lasting.end(None)
    assert all(task.done() for task in serving)
    await tokens.lasting.end(None)
    assert tokens.asked == {"a": 1, "b": 2}, "nothing is kept of what has ended"


async def test_of_a_device_only_its_own_is_looked_at() -> None:
    tokens = Tokens()
    whose: list[tuple[str, str | None]] = [("a", "pump-1"), ("b", "pump-2"), ("c", None)]
    serving = [asyncio.create_task(tokens.serve(token, device)) for token, device in whose]
    await opened(*serving)
    tokens.revoked = {"a", "b", "c"}
    await tokens.lasting.end(DeviceId("pump-1"))
    assert [task.done() for task in serving] == [True, False, False]
    await tokens.lasting.end(None)
    assert [task.done() for task in serving] == [True, False, True]
    serving[1].cancel()


async def test_whoever_was_let_in_before_a_round_that_did_not_see_it_is_asked_again() -> None:
    tokens = Tokens()
    let_in, never = tokens.lasting.rounds, asyncio.Event()
    tokens.revoked = {"a"}
    await tokens.lasting.end(None)
    with pytest.raises(Unauthenticated):
        async with tokens.lasting.open(None, "a", let_in, lambda: tokens.verify("a"), never.set):
            raise AssertionError("it was let in")
    async with tokens.lasting.open(None, "b", let_in, lambda: tokens.verify("b"), never.set):
        await tokens.lasting.end(None)
    assert tokens.asked == {"a": 1, "b": 2}
    assert not never.is_set()


async def test_it_does_not_say_that_it_ended_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "ENDED_WITHIN", 0.05)
    tokens = Tokens()
    serving = asyncio.create_task(tokens.serve("a", ends=False))
    await opened(serving)
    tokens.revoked = {"a"}
    for _ in range(2):
        with pytest.raises(Temporary):
            await tokens.lasting.end(None)
    serving.cancel()


async def test_nor_what_it_could_not_ask_about() -> None:
    tokens = Tokens()

    async def away() -> None:
        raise LedgerUnavailable("away")

    nothing: Callable[[], None] = lambda: None  # noqa: E731
    async with tokens.lasting.open(None, "a", 0, away, nothing):
        with pytest.raises(Temporary):
            await tokens.lasting.end(None)
