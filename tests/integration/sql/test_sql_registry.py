"""The registry's promises, on both databases."""

import asyncio
from dataclasses import replace

import pytest
import sqlalchemy as sa

from fabric.command import Confirmed, Receipted, State
from fabric.errors import Conflict, FabricError, Gone, NotFound, PreconditionFailed
from fabric.identity.admission import FIRST_USE_LIFE, Admission
from fabric.identity.meters import Limits
from fabric.model import Change, Device, DeviceKey, DomainEvent, IssuedToken
from fabric.sql import Store, logins
from fabric.sql.greetings import SEEN_EVERY
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    SECOND,
    SUCCEEDED,
    accept,
    add_device,
    all_events,
    change,
    code,
    draft,
    log_in,
    new_device,
    now,
    rows,
    stored,
)
from topology.names import DeviceId

OTHER = DeviceId("garage-7")
NOBODY = DeviceId("")


def key(kid: str) -> DeviceKey:
    return DeviceKey(NOBODY, kid, {"crv": "P-256", "kty": "EC", "x": kid, "y": "y"}, now())


async def enrolled(store: Store, id: DeviceId = PUMP, kid: str = "kid-1") -> Device:
    """A new device with a key."""
    ticket = code(id)
    await store.registry.create_device(new_device(id), ticket)
    return (await store.registry.redeem(ticket.code_hash, key(kid), now()))[0]


# ---- Devices -----------------------------------------------------------------------------------------


async def test_a_device_comes_back_as_it_was_made(store: Store) -> None:
    made = await add_device(store.registry)
    assert made == replace(new_device(), created_at=made.created_at)
    assert await store.registry.device(PUMP) == made
    assert await store.registry.device(OTHER) is None
    with pytest.raises(Conflict):
        await add_device(store.registry)


async def test_devices_are_listed_in_pages_by_id(store: Store) -> None:
    ids = [DeviceId(id) for id in ("a", "a-b", "a_b", "ab", "b-1", "b1")]
    for id in reversed(ids):
        await add_device(store.registry, id)
    first = await store.registry.devices(None, 4)
    rest = await store.registry.devices(first[-1].id, 4)
    assert [device.id for device in first + rest] == sorted(ids)


async def test_the_generation_of_an_id_grows_for_ever(store: Store) -> None:
    for generation in (1, 2, 3):
        made = await add_device(store.registry)
        assert (made.generation, made.next_seq) == (generation, 1)
        assert (await accept(store.ledger, draft(generation=generation))).seq == 1
        await store.registry.delete_device(PUMP, None, now())
    assert (await add_device(store.registry, OTHER)).generation == 1


async def test_an_update_needs_the_version_it_was_based_on(store: Store) -> None:
    made = await add_device(store.registry)
    changed = await store.registry.update_device(replace(made, groups=("yard",), labels={"a": "é"}), 1)
    assert (changed.version, changed.groups, changed.labels) == (2, ("yard",), {"a": "é"})
    assert await store.registry.device(PUMP) == changed
    with pytest.raises(PreconditionFailed):
        await store.registry.update_device(made, 1)
    with pytest.raises(NotFound):
        await store.registry.update_device(replace(made, id=OTHER), None)


async def test_of_concurrent_updates_one_wins(store: Store) -> None:
    made = await add_device(store.registry)
    outcomes = await asyncio.gather(
        *(store.registry.update_device(replace(made, groups=(f"g{n}",)), 1) for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(outcome, Device) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, PreconditionFailed) for outcome in outcomes) == 7


async def test_suspending_closes_connections_and_voids_open_codes(store: Store) -> None:
    ticket = code()
    made = await store.registry.create_device(new_device(), ticket)
    await store.registry.update_device(replace(made, enabled=False), None)
    ((id, device),) = await store.registry.closures(10)
    assert device == PUMP
    with pytest.raises(Gone):
        await store.registry.redeem(ticket.code_hash, key("kid-1"), now())
    await store.registry.closed([id])
    await store.registry.closed([])
    assert await store.registry.closures(10) == []
    await store.registry.update_device(made, None)
    kinds = [kind for kind, _ in await all_events(store.ledger)]
    assert kinds == ["device.created", "device.suspended", "device.resumed"]
    assert await store.registry.closures(10) == []


async def test_resuming_takes_back_what_the_suspension_had_closed(store: Store, url: str) -> None:
    """The closures of the suspension, and no others: not those of what happened meanwhile, nor another device's."""
    both = [await enrolled(store), await enrolled(store, OTHER, "kid-2")]
    for device in both:
        await store.registry.update_device(replace(device, enabled=False), None)
    await store.registry.revoke_key(PUMP, "kid-1", now())
    await store.registry.update_device(both[0], None)
    await store.registry.update_device(replace(both[0], groups=("g",)), None)
    assert [tuple(row) for row in rows(url, "SELECT device, why FROM closures ORDER BY id")] == [
        (OTHER, "suspended"),
        (PUMP, "key-revoked"),
    ]


async def test_deleting_settles_what_is_open(store: Store) -> None:
    await enrolled(store)
    waiting, queued, running, done = [await accept(store.ledger) for _ in range(4)]
    await change(store.ledger, queued.id, Confirmed(1))
    await change(store.ledger, running.id, Receipted(AGENT, running=True))
    await change(store.ledger, done.id, SUCCEEDED)
    with pytest.raises(PreconditionFailed):
        await store.registry.delete_device(PUMP, 17, now())
    settled = await store.registry.delete_device(PUMP, 1, now())
    assert {command.id: command.state for command in settled} == {
        waiting.id: State.UNDELIVERABLE,
        queued.id: State.UNDELIVERABLE,
        running.id: State.UNANSWERED,
    }
    for command in settled:
        assert await stored(store.ledger, command.id) == command
    assert (await stored(store.ledger, done.id)).state is State.SUCCEEDED
    assert await store.registry.device(PUMP) is None
    assert await store.registry.keys(PUMP) == []
    assert [device for _, device in await store.registry.closures(10)] == [PUMP]
    assert await store.ledger.due(now() + 10_000 * SECOND, 10) == []
    with pytest.raises(NotFound):
        await accept(store.ledger)
    with pytest.raises(NotFound):
        await store.registry.delete_device(PUMP, None, now())
    # The key is free again, with the next generation of the id or with another device.
    assert (await enrolled(store)).generation == 2


async def test_deleting_and_accepting_at_once_leave_nothing_open(store: Store) -> None:
    await add_device(store.registry)
    accepting = [asyncio.create_task(accept(store.ledger)) for _ in range(40)]
    await asyncio.sleep(0.002)
    settled = await store.registry.delete_device(PUMP, None, now())
    outcomes = await asyncio.gather(*accepting, return_exceptions=True)
    kept = [outcome.id for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert sorted(command.id for command in settled) == sorted(kept)
    assert all(isinstance(outcome, NotFound) for outcome in outcomes if isinstance(outcome, BaseException))


async def test_seen_is_written_now_and_then(store: Store) -> None:
    await add_device(store.registry)
    for at, version in ((SECOND, "1.0"), (SECOND + 1, None), (SECOND + 2, "1.1"), (SECOND + SEEN_EVERY, "1.1")):
        await store.registry.greet(PUMP, at, version)
    device = await store.registry.device(PUMP)
    assert device is not None
    assert (device.last_seen, device.agent_version) == (SECOND + 2, "1.1")
    await store.registry.greet(PUMP, 2 * SECOND + SEEN_EVERY, None)
    await store.registry.greet(OTHER, SECOND, None)
    device = await store.registry.device(PUMP)
    assert device is not None
    assert (device.last_seen, device.agent_version) == (2 * SECOND + SEEN_EVERY, "1.1")


# ---- Enrollment --------------------------------------------------------------------------------------


async def test_a_code_registers_one_key_and_answers_it_again(store: Store) -> None:
    ticket = code()
    await store.registry.create_device(new_device(), ticket)
    at = now()
    device, new = await store.registry.redeem(ticket.code_hash, key("kid-1"), at)
    assert (device.id, new) == (PUMP, True)
    assert await store.registry.redeem(ticket.code_hash, key("kid-1"), at) == (device, False)
    assert [(it.kid, it.device) for it in await store.registry.keys(PUMP)] == [("kid-1", PUMP)]
    with pytest.raises(Gone):
        await store.registry.redeem(ticket.code_hash, key("kid-2"), at)
    with pytest.raises(Gone):
        await store.registry.redeem(ticket.code_hash, key("kid-1"), ticket.expires_at)
    with pytest.raises(Gone):
        await store.registry.redeem("unknown\x00", key("kid-1"), at)
    kinds = [kind for kind, _ in await all_events(store.ledger)]
    assert kinds == ["device.created", "device.enrolled", "enrollment.contested"]


async def test_of_keys_that_race_for_a_code_one_wins(store: Store) -> None:
    ticket = code()
    await store.registry.create_device(new_device(), ticket)
    outcomes = await asyncio.gather(
        *(store.registry.redeem(ticket.code_hash, key(f"kid-{n}"), now()) for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Gone) for outcome in outcomes) == 7
    assert len(await store.registry.keys(PUMP)) == 1
    kinds = [kind for kind, _ in await all_events(store.ledger)]
    assert kinds.count("enrollment.contested") == 7


async def test_a_repeated_request_that_races_itself_gets_one_answer(store: Store) -> None:
    ticket = code()
    await store.registry.create_device(new_device(), ticket)
    outcomes = await asyncio.gather(*(store.registry.redeem(ticket.code_hash, key("kid-1"), now()) for _ in range(8)))
    assert sorted(new for _, new in outcomes) == [False] * 7 + [True]
    assert {device.generation for device, _ in outcomes} == {1}


async def test_a_key_is_one_devices(store: Store) -> None:
    tickets = [code(PUMP), code(OTHER)]
    for id, ticket in zip((PUMP, OTHER), tickets, strict=True):
        await store.registry.create_device(new_device(id), ticket)
    outcomes = await asyncio.gather(
        *(store.registry.redeem(ticket.code_hash, key("kid-1"), now()) for ticket in tickets), return_exceptions=True
    )
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1


async def test_a_new_code_voids_the_open_one(store: Store) -> None:
    old, fresh = code(), code()
    await store.registry.create_device(new_device(), old)
    await store.registry.add_code(fresh)
    with pytest.raises(Gone):
        await store.registry.redeem(old.code_hash, key("kid-1"), now())
    assert (await store.registry.redeem(fresh.code_hash, key("kid-1"), now()))[1]
    with pytest.raises(NotFound):
        await store.registry.add_code(code(OTHER))


async def test_enrolling_again_starts_a_generation_without_the_old_keys_and_mail(store: Store) -> None:
    await enrolled(store)
    waiting, running = await accept(store.ledger), await accept(store.ledger)
    await change(store.ledger, running.id, Receipted(AGENT, running=True))
    ticket = code()
    await store.registry.add_code(ticket)
    device, new = await store.registry.redeem(ticket.code_hash, key("kid-2"), now())
    assert (device.generation, device.version, new) == (2, 2, True)
    assert await store.registry.device(PUMP) == device
    assert [it.kid for it in await store.registry.keys(PUMP)] == ["kid-2"]
    assert [id for _, id in await store.registry.closures(10)] == [PUMP]
    withdrawn = await stored(store.ledger, waiting.id)
    assert (withdrawn.state, withdrawn.reason) == (State.CANCELLED, "enrolled-again")
    # What the old agent had picked up is left to its response time, and its reports count no more.
    assert (await stored(store.ledger, running.id)).state is State.RUNNING
    assert type((await store.ledger.write(Change(running.id, SUCCEEDED, PUMP)))[0]).__name__ == "Dropped"
    assert (await accept(store.ledger, draft(generation=2))).seq == 1
    # The same key again is nothing new.
    again = code()
    await store.registry.add_code(again)
    found, new = await store.registry.redeem(again.code_hash, key("kid-2"), now())
    assert (found.generation, new) == (2, False)


async def test_commands_wait_for_the_first_enrollment(store: Store) -> None:
    ticket = code()
    await store.registry.create_device(new_device(), ticket)
    command = await accept(store.ledger)
    device, _ = await store.registry.redeem(ticket.code_hash, key("kid-1"), now())
    assert device.generation == 1
    assert await stored(store.ledger, command.id) == command


async def test_revoking_a_device_leaves_no_key_code_or_mail(store: Store) -> None:
    await enrolled(store)
    open_code = code()
    await store.registry.add_code(open_code)
    waiting = await accept(store.ledger)
    device, withdrawn = await store.registry.revoke_device(PUMP, now())
    assert (device.generation, [command.id for command in withdrawn]) == (2, [waiting.id])
    assert await stored(store.ledger, waiting.id) == withdrawn[0]
    assert await store.registry.keys(PUMP) == []
    assert len(await store.registry.closures(10)) == 1
    with pytest.raises(Gone):
        await store.registry.redeem(open_code.code_hash, key("kid-1"), now())
    # It accepts commands for its next enrollment, which then starts no further generation.
    await accept(store.ledger, draft(generation=2))
    ticket = code()
    await store.registry.add_code(ticket)
    assert (await store.registry.redeem(ticket.code_hash, key("kid-2"), now()))[0].generation == 2
    with pytest.raises(NotFound):
        await store.registry.revoke_device(OTHER, now())


async def test_revoking_a_key_closes_connections_and_voids_codes(store: Store) -> None:
    await enrolled(store)
    open_code = code()
    await store.registry.add_code(open_code)
    with pytest.raises(NotFound):
        await store.registry.revoke_key(PUMP, "kid-9", now())
    await store.registry.revoke_key(PUMP, "kid-1", now())
    assert await store.registry.keys(PUMP) == []
    assert len(await store.registry.closures(10)) == 1
    with pytest.raises(Gone):
        await store.registry.redeem(open_code.code_hash, key("kid-1"), now())
    assert (await log_in(store, "jti", now(), kid="kid-1")).refusal == "the device or its key is gone"


# ---- Logins ------------------------------------------------------------------------------------------


async def test_a_token_is_good_for_one_login(store: Store) -> None:
    await enrolled(store)
    at = now()
    for later in (0, 5, FIRST_USE_LIFE):
        assert (await log_in(store, "jti-1", at + later, kid="kid-1")).refusal is None
    refused = await log_in(store, "jti-1", at + FIRST_USE_LIFE + 1, kid="kid-1")
    assert (refused.refusal or "").startswith("the token was used before")
    assert (await log_in(store, "jti-2" * 1000, at + 30 * SECOND, kid="kid-1")).refusal is None
    assert (await store.registry.keys(PUMP))[0].last_used == at + 30 * SECOND
    assert await store.registry.last_login(PUMP) == at + 30 * SECOND
    assert (await log_in(store, "jti-1", at, OTHER, "kid-1")).refusal == "the device or its key is gone"


async def test_logins_that_race_agree_on_the_first_use(store: Store, url: str) -> None:
    await enrolled(store)
    at = now()
    await asyncio.gather(*(log_in(store, "jti", at + n, kid="kid-1") for n in range(8)))
    ((first, last),) = rows(url, "SELECT first_use, last_use FROM logins")
    assert at <= first < last < at + 8


async def test_a_login_for_a_key_that_is_not_there_leaves_no_trace(store: Store, url: str) -> None:
    await enrolled(store)
    assert (await log_in(store, "jti", now(), kid="kid-9")).refusal == "the device or its key is gone"
    assert await store.registry.last_login(PUMP) is None
    assert rows(url, "SELECT 1 FROM logins") == rows(url, "SELECT 1 FROM guards") == []


async def test_a_token_that_was_refused_was_used(store: Store) -> None:
    device = await enrolled(store)
    device = await store.registry.update_device(replace(device, enabled=False), None)
    at = now()
    assert (await log_in(store, "jti", at, kid="kid-1")).refusal == "the device is suspended"
    assert await store.registry.last_login(PUMP) == at
    await store.registry.update_device(replace(device, enabled=True), None)
    refused = await log_in(store, "jti", at + FIRST_USE_LIFE + 1, kid="kid-1")
    assert (refused.refusal or "").startswith("the token was used before")
    assert (await log_in(store, "another", at + FIRST_USE_LIFE + 1, kid="kid-1")).refusal is None


async def test_however_many_logins_were_refused_few_are_read(store: Store) -> None:
    await enrolled(store)
    at = now()
    refused = [await log_in(store, f"jti-{n}", at + n, kid="kid-1", limits=Limits(logins=1)) for n in range(50)]
    assert [answer.flooded for answer in refused] == [False] + [True] * 49
    found = await store.registry._database.read(lambda connection: logins._USES_OF(connection, [PUMP], since=at + 49))
    assert len(found) == 2


async def test_logins_of_many_devices_are_decided_together(store: Store) -> None:
    devices = [DeviceId(f"pump-{number:03}") for number in range(3 * logins.BATCH)]
    for device in devices:
        await enrolled(store, device, f"key-of-{device}")
    at, transactions = now(), 0

    def count(_: object) -> None:
        nonlocal transactions
        transactions += 1

    sa.event.listen(store.ledger._database.engine, "begin", count)
    asked = [log_in(store, "jti", at, device, f"key-of-{device}") for device in [*devices, DeviceId("nobody")]]
    *answers, stranger = await asyncio.gather(*asked)
    assert all(answer == Admission() for answer in answers)
    assert stranger.refusal == "the device or its key is gone"
    assert transactions <= 5, "each takes as many as are waiting"
    assert {await store.registry.last_login(device) for device in devices} == {at}


async def test_expired_logins_are_forgotten(store: Store, url: str) -> None:
    await enrolled(store)
    for number in range(5):
        await log_in(store, f"jti-{number}", number, kid="kid-1", life=10)
    await log_in(store, "jti-9", 13, kid="kid-1")
    assert [row[0] for row in rows(url, "SELECT first_use FROM logins ORDER BY first_use")] == [3, 4, 13]


async def test_a_login_is_seen_by_the_deletion_that_follows_it_or_refused(store: Store) -> None:
    await enrolled(store)
    at = now()
    asked = [asyncio.create_task(log_in(store, f"jti-{n}", at + n, kid="kid-1")) for n in range(20)]
    await asyncio.sleep(0.002)
    await store.registry.delete_device(PUMP, None, now())
    seen = await store.registry.last_login(PUMP)
    allowed = [at + n for n, answer in enumerate(await asyncio.gather(*asked)) if answer.refusal is None]
    assert seen == (max(allowed) if allowed else None)


# ---- Tokens, events ----------------------------------------------------------------------------------


async def test_tokens_are_listed_and_revoked_once(store: Store) -> None:
    made = [IssuedToken(f"jti-{n}", "billing", ("commands:send", "devices:read"), 1, 2) for n in range(5)]
    for token in made:
        await store.registry.add_token(token)
    assert await store.registry.token("jti-3") == made[3]
    assert await store.registry.token("jti-9") is None
    assert await store.registry.tokens(None, 3) == made[:3]
    assert await store.registry.tokens("jti-2", 3) == made[3:]
    assert (await store.registry.revoke_token("jti-3", 7)).count == 1
    assert (await store.registry.revoke_token("jti-3", 8)).count == 0
    assert await store.registry.token("jti-3") == replace(made[3], revoked_at=7)
    with pytest.raises(FabricError):
        await store.registry.add_token(made[0])


async def test_a_recorded_event_is_in_the_log(store: Store) -> None:
    await store.registry.record(DomainEvent("device.throttled", PUMP, 17, {"what": ["\ud800", {"x": "\x00"}], "n": 1}))
    await all_events(store.ledger)
    (row,) = await store.ledger.events(0, 10)
    assert (row.kind, row.device, row.command, row.at) == ("device.throttled", PUMP, None, 17)
    assert row.detail == {"what": ["\ufffd", {"x": "\ufffd"}], "n": 1}
