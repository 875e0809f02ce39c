"""The keys of a provider: when they are read, and until when they count."""

import asyncio
from collections.abc import Callable

import pytest

from fabric.errors import ProviderUnavailable, Unauthenticated
from fabric.identity import jwks
from fabric.identity.keyset import FIRST_PAUSE, FRESH, PAUSE, STALE, Held, Keys
from tests.harness import provider as idp

KEY = idp.MAKE["ES256"]()
START = 10**15  # µs


def document(*kids: str) -> bytes:
    return idp.jwks(*(idp.jwk(KEY, kid) for kid in kids))


class Source:
    """The port `KeySource`, that answers when it is let."""

    def __init__(self, *kids: str) -> None:
        self.answer: bytes | Exception = document(*kids)
        self.asked = 0
        self.let = asyncio.Event()
        self.let.set()

    async def fetch(self) -> bytes:
        self.asked += 1
        await self.let.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class World:
    def __init__(self, *kids: str) -> None:
        self.now = START
        self.source = Source(*kids)
        self.keys = Keys(idp.ISSUER, self.source, ("ES256",), lambda: self.now)

    async def has(self, kid: str) -> bool:
        try:
            return (await self.keys.key(kid)).kid == kid
        except Unauthenticated:
            return False

    async def idle(self) -> None:
        """Let a read in the background end."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_they_are_read_once_and_believed() -> None:
    world = World("a", "b")
    assert await world.has("a")
    for _ in range(50):
        world.now += FRESH // 100
        assert await world.has("a")
        assert await world.has("b")
    assert world.source.asked == 1


async def test_a_storm_of_unknown_keys_is_one_read_a_minute() -> None:
    world = World("a")
    assert await world.has("a")
    world.now += PAUSE
    world.source.let.clear()
    storm = [asyncio.create_task(world.has(f"unknown-{number}")) for number in range(200)]
    await world.idle()
    assert await world.has("a"), "whoever has a known key waits for nobody"
    world.source.let.set()
    assert not any(await asyncio.gather(*storm))
    assert world.source.asked == 2
    for _ in range(200):
        assert not await world.has("unknown")
    world.now += PAUSE - 1
    assert not await world.has("unknown")
    assert world.source.asked == 2, "those in between are refused at once"
    world.now += 1
    assert not await world.has("unknown")
    assert world.source.asked == 3


async def test_a_new_key_is_found_when_it_is_used() -> None:
    world = World("old")
    assert await world.has("old")
    world.source.answer = document("old", "new")
    world.now += PAUSE
    assert await world.has("new")
    assert await world.has("old")
    world.source.answer = document("new")
    world.now += FRESH
    assert await world.has("old"), "it is read behind whoever asks"
    await world.idle()
    assert not await world.has("old"), "what the provider withdrew counts no more"
    assert await world.has("new")


async def test_keys_count_for_a_day_without_the_provider_and_no_longer() -> None:
    world = World("a")
    assert await world.has("a")
    world.source.answer = ProviderUnavailable("away")
    for _ in range(23):
        world.now += STALE // 24
        assert await world.has("a")
        await world.idle()
        assert not await world.has("b"), "and it has no others"
    world.now = START + STALE - 1
    assert await world.has("a")
    world.now += 1
    with pytest.raises(ProviderUnavailable):
        await world.keys.key("a")
    world.source.answer = document("a")
    world.now += FIRST_PAUSE
    assert await world.has("a")


@pytest.mark.parametrize("answer", [ProviderUnavailable("away"), b"[]", b"", RuntimeError("a bug")], ids=repr)
async def test_without_keys_nobody_is_let_in_and_the_provider_is_asked_seldom(answer: bytes | Exception) -> None:
    world = World()
    world.source.answer = answer
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await world.keys.key("a")
    assert world.source.asked == 1
    world.source.answer = document("a")
    world.now += FIRST_PAUSE
    assert await world.has("a")


async def test_a_bad_answer_takes_no_good_keys_away() -> None:
    world = World("a")
    assert await world.has("a")
    world.source.answer = b"[]"
    world.now += FRESH
    assert await world.has("a")
    await world.idle()
    assert await world.has("a")
    assert world.source.asked == 2


async def test_whoever_waits_may_go_away() -> None:
    world = World("a")
    world.source.let.clear()
    first, second = (asyncio.create_task(world.has("a")) for _ in range(2))
    await world.idle()
    first.cancel()
    world.source.let.set()
    assert await second
    assert world.source.asked == 1


async def test_closing_ends_a_read() -> None:
    world = World("a")
    await world.keys.close()
    world.source.let.clear()
    waiting = asyncio.create_task(world.keys.key("a"))
    await world.idle()
    await world.keys.close()
    await world.keys.close()
    with pytest.raises(ProviderUnavailable):
        await waiting


def _held(read_at: int | None, asked_at: int | None) -> Held:
    return Held(jwks.read(document("a"), ("ES256",)).keys, read_at, asked_at)


@pytest.mark.parametrize(
    ("held", "kid", "due"),
    [
        (Held(), "a", True),
        (lambda: _held(START, START), "a", False),
        (lambda: _held(START - FRESH, START - FRESH), "a", True),
        (lambda: _held(START - FRESH, START - PAUSE + 1), "a", False),
        (lambda: _held(START - PAUSE, START - PAUSE), "a", False),
        (lambda: _held(START - PAUSE, START - PAUSE), "b", True),
        (lambda: _held(START - 1, START - 1), "b", False),
        (lambda: _held(START - STALE, START - FIRST_PAUSE), "a", True),
        (lambda: _held(START, START + 10 * PAUSE), "b", True),
    ],
    ids=["nothing yet", "fresh", "old", "asked", "known", "unknown", "unknown, asked", "stale", "clock went back"],
)
def test_when_the_provider_is_asked(held: Held | Callable[[], Held], kid: str, due: bool) -> None:
    known = held if isinstance(held, Held) else held()
    assert known.is_due(kid, START) is due
