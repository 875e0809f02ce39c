"""`restante keys`: the signing keys of the fabric, listed, rotated with overlap, and retired when one leaked."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from api.operator import rings
from api.operator.rings import Purpose, RingFiles
from api.operator.setup import renew_operator_token
from api.settings import Settings
from fabric.audit import Action, Deed
from fabric.commands import LONGEST_TTL
from fabric.errors import Invalid, NotFound
from fabric.identity.issued import LONGEST_LIFE
from fabric.keyring import CACHED_FOR, Ring, RingKey
from fabric.sql import Store, open_store
from topology import enrollment

LEAD = 120  # seconds: longer than others cache the published keys, and than an agent says nothing
SHORTEST_LEAD = 3  # seconds, in which every process has read the ring
LONGEST = 10 * 366 * 24 * 3600  # seconds
OVERLAP = {
    Purpose.TOKENS: LONGEST_LIFE + enrollment.CLOCK_LEEWAY,
    Purpose.COMMANDS: int(LONGEST_TTL) + 3600,  # an hour for clocks
}
_SECOND = 1_000_000  # µs

Log = Callable[[str], None]
Document = dict[str, object]
T = TypeVar("T")


def listing(settings: Settings) -> list[Document]:
    """All keys of both rings, in the order in which they sign. Raises `FabricError` or `AuthorityError`."""

    async def read(store: Store) -> list[Document]:
        now = store.clock.now() // _SECOND
        found = [(purpose, rings.read(RingFiles(settings.state_dir, purpose))) for purpose in Purpose]
        return [_document(purpose, ring, key, now) for purpose, ring in found for key in ring.good(now)]

    return asyncio.run(_with_store(settings, read))


def rotate(settings: Settings, purpose: str | None, lead: int | None, retire_after: int | None, log: Log) -> None:
    """Give the ring of a purpose, or both, a next key, which signs in `lead` seconds; what the present one signed
    counts for `retire_after` seconds after that. A ring whose next key waits already stays as it is.

    Raises:
        Invalid: a number outside its bounds; nothing was done.
        FabricError, AuthorityError: one sentence.
    """
    purposes = tuple(Purpose) if purpose is None else (Purpose(purpose),)
    lead = LEAD if lead is None else lead
    for name, value, lowest in (("lead", lead, SHORTEST_LEAD), ("retire-after", retire_after, 0)):
        if value is not None and not lowest <= value <= LONGEST:
            raise Invalid(f"--{name} is {lowest} to {LONGEST} seconds")

    async def change(store: Store) -> None:
        for each in purposes:
            files = RingFiles(settings.state_dir, each)
            now = store.clock.now() // _SECOND
            waiting = rings.read(files).next(now)
            if waiting is not None:
                log(f"{each}: nothing to do, the key {waiting.kid} signs from {_time(waiting.signs_from)} on already")
                continue
            overlap = OVERLAP[each] if retire_after is None else retire_after
            after = rings.rotate(files, now, lead, overlap)
            old, new = after.keys[-2], after.newest
            await _record(store, Action.SIGNING_KEY_ROTATED, {"purpose": each, "kid": new.kid, "after": old.kid})
            log(f"{each}: the key {new.kid} signs from {_time(new.signs_from)} on")
            log(f"{each}: what {old.kid} has signed counts until {_time(old.until or 0)}")
        if Purpose.TOKENS in purposes and lead < CACHED_FOR:
            log(f"others may keep the published keys for {CACHED_FOR} s; until then they may not know the new one")

    asyncio.run(_with_store(settings, change))


def retire(settings: Settings, kid: str, log: Log) -> None:
    """Have everything refused that a key has signed; returns when it is, by whoever reads the ring's file.

    Raises:
        NotFound: it is in neither ring, or no more.
        FabricError, AuthorityError: one sentence.
    """

    async def change(store: Store) -> None:
        now = store.clock.now() // _SECOND
        files = _holding(settings, kid, now)
        after = rings.retire(files, kid, now, SHORTEST_LEAD)
        await _record(store, Action.SIGNING_KEY_RETIRED, {"purpose": files.purpose, "kid": kid})
        ends = next((key.until for key in after.keys if key.kid == kid), None) or now
        # One more look of every process, and what it takes to read.
        left = ends + 2 * rings.READ_EVERY - store.clock.now() / _SECOND
        log(f"{files.purpose}: the key {after.current(ends).kid} signs instead; waiting {max(left, 0):.0f} s")
        await asyncio.sleep(max(left, 0))
        if files.purpose is Purpose.TOKENS:
            log(f"tokens that {kid} has signed are refused by every gateway that follows {files.ring}")
            await renew_operator_token(store, settings, log)
        else:
            log(f"devices that are connected refuse what {kid} has signed within a minute, others once they connect")

    asyncio.run(_with_store(settings, change))


async def _with_store(settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    store = await open_store(settings.database)
    try:
        return await work(store)
    finally:
        await store.close()


async def _record(store: Store, action: Action, detail: Document) -> None:
    await store.audit.record(Deed(action, detail=detail))


def _holding(settings: Settings, kid: str, now: int) -> RingFiles:
    for purpose in Purpose:
        files = RingFiles(settings.state_dir, purpose)
        if any(key.kid == kid for key in rings.read(files).good(now)):
            return files
    raise NotFound(f"there is no signing key {kid}, or it counts no more; `restante keys list` shows them")


def _document(purpose: Purpose, ring: Ring, key: RingKey, now: int) -> Document:
    return {
        "purpose": purpose,
        "kid": key.kid,
        "state": ring.state(key, now),
        "made_at": _time(key.made_at),
        "signs_from": _time(key.signs_from),
        "until": None if key.until is None else _time(key.until),
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
