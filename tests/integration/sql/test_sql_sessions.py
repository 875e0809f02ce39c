"""Sessions, presence and the guard of logins, as the database keeps them."""

import asyncio
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from fabric.identity.admission import Admission, Attempt, use_of
from fabric.identity.meters import Limits, Meter
from fabric.presence import Closed, Lost, Opened, Session
from fabric.sql import Store, open_store, schema
from tests.integration.sql.values import PUMP, SECOND, add_device, all_events, now, rows
from topology.names import DeviceId

OTHER = DeviceId("pump-18")
LIMITS = Limits()


def session(number: int, device: DeviceId = PUMP, **changes: Any) -> Session:
    at = now()
    made = Session(device, "cell-1", "rabbit@one", f"10.0.0.7:{number} -> 10.0.0.1:5671", at, f"<pid.{number}>", at)
    return replace(made, **changes)


def closed(of: Session) -> Closed:
    return Closed(of.node, of.name, of.pid or "", now())


async def presence(store: Store, id: DeviceId = PUMP) -> tuple[bool, int | None]:
    device = await store.registry.device(id)
    assert device is not None
    return device.connected, device.connection_since


async def told(store: Store, device: DeviceId = PUMP) -> list[str]:
    return [kind for kind, of in await all_events(store.ledger) if of == device and kind != "device.created"]


async def log_in(store: Store, jti: str, at: int, device: DeviceId = PUMP) -> Admission:
    """As a question of the broker about a token does, signed with the key that `add_key` made."""
    return await store.sessions.admit(Attempt(device, device, use_of(jti), at + 120 * SECOND, at), LIMITS)


async def add_key(store: Store, device: DeviceId = PUMP) -> None:
    """A device with a key whose id is the device's own."""
    await add_device(store.registry, device)
    at = now()
    key = {"kid": device, "device": device, "jwk": "{}", "created_at": at}
    await store.registry._database.write(lambda connection: connection.execute(sa.insert(schema.device_keys), key))


async def test_presence_follows_the_sessions(store: Store) -> None:
    await add_device(store.registry)
    old, new = session(1), session(2)
    assert await store.sessions.apply([Opened(old, 11)]) == {PUMP: 1}
    assert await presence(store) == (True, 11)
    assert await store.sessions.apply([Opened(new, 12), closed(old)]) == {PUMP: 1}
    assert await presence(store) == (True, 11)
    assert await store.sessions.live("cell-1") == [new]
    assert await store.sessions.live("cell-2") == []
    assert await store.sessions.apply([Lost(new, 13), closed(new)]) == {PUMP: 0}
    assert await presence(store) == (False, 13)
    # All of it again, as after a crash before the acks.
    await store.sessions.apply([Opened(old, 11), Opened(new, 12), closed(old), closed(new)])
    assert await told(store) == ["device.connected", "device.disconnected"]
    assert await store.sessions.live("cell-1") == []


async def test_what_concerns_no_device_is_dropped(store: Store, url: str) -> None:
    stranger = session(1, DeviceId("nobody"))
    assert await store.sessions.apply([]) == {}
    assert await store.sessions.apply([closed(stranger)]) == {}
    assert await store.sessions.apply([Opened(stranger, 1), closed(stranger)]) == {}
    assert rows(url, sa.select(schema.sessions)) == []
    assert not await store.sessions.took_over(stranger.device, now(), LIMITS)
    assert await store.sessions.throttle(stranger.device, Meter.REPORTS, now()) is None
    assert (await log_in(store, "a", now(), stranger.device)).refusal == "the device or its key is gone"


async def test_sessions_go_with_their_device_and_are_forgotten_in_time(store: Store, url: str) -> None:
    for device in (PUMP, OTHER):
        await add_device(store.registry, device)
    ended = session(2, OTHER)
    await store.sessions.apply([Opened(session(1), 1), Opened(ended, 1), Lost(ended, 50)])
    await store.sessions.forget(50)
    assert len(rows(url, sa.select(schema.sessions))) == 2
    await store.sessions.forget(51)
    await store.registry.delete_device(PUMP, None, now())
    assert rows(url, sa.select(schema.sessions)) == []


async def test_any_number_of_workers_may_hear_the_same(store: Store, url: str) -> None:
    other = await open_store(url)
    devices = [DeviceId(f"pump-{number:02}") for number in range(20)]
    for device in devices:
        await add_device(store.registry, device)
    opened = [Opened(session(number, device), now()) for number, device in enumerate(devices)]
    ended = [closed(each.session) for each in opened]
    changes = [change for pair in zip(opened, ended, strict=True) for change in pair]
    try:
        await asyncio.gather(*(each.sessions.apply(changes) for each in (store, other) for _ in range(3)))
    finally:
        await other.close()
    for device in devices:
        assert await told(store, device) == ["device.connected", "device.disconnected"]


async def test_the_second_question_about_a_login_counts_for_nothing(store: Store) -> None:
    await add_key(store)
    at = now()
    assert not (await log_in(store, "a", at)).older
    answer = await log_in(store, "a", at + 1)
    assert (answer.refusal, answer.older) == (None, False)
    # A third one is another login with the same token; its own first one is no older login that is still to come.
    await store.sessions.apply([Opened(session(1, seen_at=at + 2), at)])
    assert (await log_in(store, "a", at + 3)).older
    for number in range(8):
        assert (await log_in(store, f"b{number}", at + 4)).refusal is None
    answer = await log_in(store, "c", at + 5)
    assert (answer.flooded, answer.refusal) == (True, "too many logins")
    assert (await log_in(store, "b7", at + 6)).refusal is None, "but the second question of one that is in is answered"


async def test_a_login_is_followed_until_its_session_is_seen(store: Store) -> None:
    await add_key(store)
    at = now()
    await log_in(store, "a", at)
    answer = await log_in(store, "b", at + SECOND)
    assert (answer.older, answer.unseen) == (True, True)
    await store.sessions.apply([Opened(session(1, seen_at=at + 2 * SECOND), at)])
    answer = await log_in(store, "c", at + 3 * SECOND)
    assert (answer.older, answer.unseen) == (True, False)
    seen = session(2, seen_at=at + 4 * SECOND)
    await store.sessions.apply([Opened(seen, at), closed(session(1)), closed(seen)])
    answer = await log_in(store, "d", at + 5 * SECOND)
    assert (answer.older, answer.unseen) == (False, False)


async def test_three_takeovers_make_a_contest_that_every_gateway_knows(store: Store, url: str) -> None:
    await add_key(store)
    at = now()
    held = session(1, seen_at=at)
    await store.sessions.apply([Opened(held, at)])
    for number in range(3):
        assert (await log_in(store, f"a{number}", at + number)).older
        assert await store.sessions.took_over(PUMP, at + number, LIMITS) is (number == 2)
        newest = session(10 + number, seen_at=at + number + 1)
        await store.sessions.apply([Opened(newest, at)])
        assert [it.epoch for it in await store.sessions.live("cell-1")] == [newest.epoch], "what was replaced is over"
    other = await open_store(url)
    try:
        answer = await log_in(other, "b", at + 4)
    finally:
        await other.close()
    assert answer.refusal == "contested for 60 s more"
    assert await told(store) == ["device.connected", "device.contested"]


async def test_an_episode_is_told_once_and_kept_for_every_gateway(store: Store) -> None:
    await add_key(store)
    at = now()
    assert await store.sessions.throttle(PUMP, Meter.REPORTS, at) == 5 * SECOND
    assert await store.sessions.throttle(PUMP, Meter.TRAFFIC, at + SECOND) is None
    assert (await log_in(store, "a", at + 4 * SECOND)).refusal == "throttled for 1 s more"
    assert (await log_in(store, "b", at + 5 * SECOND)).refusal is None
    assert await store.sessions.throttle(PUMP, Meter.REPORTS, at + 6 * SECOND) == 10 * SECOND
    assert await told(store) == ["device.throttled"] * 2
