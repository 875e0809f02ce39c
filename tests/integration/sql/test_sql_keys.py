"""Several keys of a device, and what counts after a revocation, on both databases."""

import asyncio
from dataclasses import replace

import pytest

from fabric.command import Claimed, Receipted, State
from fabric.errors import Conflict, FabricError, Forbidden, NotFound, Unauthenticated
from fabric.model import AFTER_REVOCATION, MAX_KEYS, Change, Changed, DeviceKey, Dropped
from fabric.sql import Store, fold
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    SECOND,
    SUCCEEDED,
    accept,
    all_events,
    change,
    code,
    log_in,
    new_device,
    now,
    stored,
)
from topology.names import DeviceId

OTHER = DeviceId("garage-7")


def key(kid: str, parent: str | None = None, device: DeviceId = PUMP) -> DeviceKey:
    return DeviceKey(device, kid, {"crv": "P-256", "kty": "EC", "x": kid, "y": "y"}, now(), parent=parent)


async def enrolled(store: Store, id: DeviceId = PUMP, kid: str = "a") -> None:
    ticket = code(id)
    await store.registry.create_device(new_device(id), ticket)
    await store.registry.redeem(ticket.code_hash, key(kid), now())


async def kids(store: Store) -> list[str]:
    return [each.kid for each in await store.registry.keys(PUMP)]


async def test_a_key_is_added_under_the_one_that_authorizes_it(store: Store) -> None:
    await enrolled(store)
    child = key("b", "a")
    assert await store.registry.add_key(child) == (child, True)
    assert await store.registry.add_key(key("b", "a")) == (child, False)
    assert [(each.kid, each.parent) for each in await store.registry.keys(PUMP)] == [("a", None), ("b", "a")]
    assert (await log_in(store, "jti", now(), kid="b")).refusal is None
    await all_events(store.ledger)
    assert [(row.kind, row.detail) for row in await store.ledger.events(2, 10)] == [
        ("device.key-added", {"kid": "b", "parent": "a"})
    ]


async def test_a_device_has_few_keys_and_each_is_its_own(store: Store) -> None:
    await enrolled(store)
    await enrolled(store, OTHER, "other")
    for kid in ("b", "c"):
        assert (await store.registry.add_key(key(kid, "a")))[1]
    with pytest.raises(Conflict, match=str(MAX_KEYS)):
        await store.registry.add_key(key("d", "a"))
    await store.registry.revoke_key(PUMP, "c", now())
    with pytest.raises(Conflict, match="another device"):
        await store.registry.add_key(key("other", "a"))
    for parent in ("c", "other", None):
        with pytest.raises(Unauthenticated):
            await store.registry.add_key(key("d", parent))
    with pytest.raises(Unauthenticated):
        await store.registry.add_key(key("d", "a", DeviceId("nobody")))
    device = await store.registry.device(PUMP)
    assert device is not None
    await store.registry.update_device(replace(device, enabled=False), None)
    with pytest.raises(Unauthenticated, match="suspended"):
        await store.registry.add_key(key("d", "a"))


async def test_keys_that_are_added_at_once_are_not_too_many(store: Store) -> None:
    await enrolled(store)
    outcomes = await asyncio.gather(
        *(store.registry.add_key(key(f"k{n}", "a")) for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 8 - (MAX_KEYS - 1)
    assert len(await kids(store)) == MAX_KEYS


async def test_revoking_a_key_revokes_those_under_it(store: Store) -> None:
    """Under a are b, which is retired, with d under it, and c."""
    await enrolled(store)
    await store.registry.add_key(key("b", "a"))
    await store.registry.add_key(key("d", "b"))
    await store.registry.retire_key(PUMP, "b", "d", now())
    await store.registry.add_key(key("c", "a"))
    await store.registry.closed([id for id, _ in await store.registry.closures(10)])
    assert await store.registry.revoke_key(PUMP, "b", now()) == ["b", "d"]
    assert await kids(store) == ["a", "c"]
    assert [device for _, device in await store.registry.closures(10)] == [PUMP]
    assert (await log_in(store, "jti", now(), kid="d")).refusal == "the device or its key is gone"
    with pytest.raises(NotFound):
        await store.registry.revoke_key(PUMP, "d", now())
    assert await store.registry.revoke_key(PUMP, "a", now()) == ["a", "c"]
    await all_events(store.ledger)
    revoked = [row.detail for row in await store.ledger.events(0, 100) if row.kind == "device.key-revoked"]
    assert revoked == [
        {"kid": "b", "because": "b"},
        {"kid": "d", "because": "b"},
        {"kid": "a", "because": "a"},
        {"kid": "c", "because": "a"},
    ]


async def test_a_key_and_its_parents_revocation_at_once_leave_none(store: Store) -> None:
    await enrolled(store)
    adding = [asyncio.create_task(store.registry.add_key(key(f"k{n}", "a"))) for n in range(2)]
    await asyncio.sleep(0.001)
    await store.registry.revoke_key(PUMP, "a", now())
    for outcome in await asyncio.gather(*adding, return_exceptions=True):
        assert isinstance(outcome, tuple | Unauthenticated)
    assert await kids(store) == []


async def test_a_retired_key_is_good_for_nothing_and_may_be_enrolled_again(store: Store) -> None:
    await enrolled(store)
    await store.registry.add_key(key("b", "a"))
    await store.registry.add_key(key("c", "b"))
    for kid, by, refused in (
        ("c", "b", Forbidden),  # a descendant
        ("b", "b", Forbidden),  # itself
        ("z", "c", NotFound),
        ("a", "z", Unauthenticated),
    ):
        with pytest.raises(refused):
            await store.registry.retire_key(PUMP, kid, by, now())
    await store.registry.retire_key(PUMP, "a", "c", now())
    await store.registry.retire_key(PUMP, "a", "c", now())
    assert await kids(store) == ["b", "c"]
    assert len(await store.registry.closures(10)) == 1
    assert (await log_in(store, "jti", now(), kid="a")).refusal == "the device or its key is gone"
    for refusal in (store.registry.add_key(key("d", "a")), store.registry.retire_key(PUMP, "b", "a", now())):
        with pytest.raises(Unauthenticated):
            await refusal
    with pytest.raises(Conflict, match="retired"):
        await store.registry.add_key(key("a", "c"))
    ticket = code()
    await store.registry.add_code(ticket)
    device, new = await store.registry.redeem(ticket.code_hash, key("a"), now())
    assert (device.generation, new, await kids(store)) == (2, True, ["a"])


async def test_rotating_for_ever_keeps_a_bounded_past(store: Store) -> None:
    await enrolled(store, kid="k00")
    for n in range(1, 24):
        await store.registry.add_key(key(f"k{n:02}", f"k{n - 1:02}"))
        await store.registry.retire_key(PUMP, f"k{n - 1:02}", f"k{n:02}", now())
    assert await kids(store) == ["k23"]
    with pytest.raises(NotFound):
        await store.registry.revoke_key(PUMP, "k06", now())
    assert len(await store.registry.revoke_key(PUMP, "k07", now())) == 17
    assert await kids(store) == []


async def test_what_was_said_before_a_revocation_counts_and_nothing_after(store: Store) -> None:
    await enrolled(store)
    waiting, running, other, silent = [await accept(store.ledger) for _ in range(4)]
    for command in (running, other, silent):
        await change(store.ledger, command.id, Receipted(AGENT, running=True))
    assert await store.registry.in_hand(PUMP) == 3
    at = now()
    await store.registry.revoke_device(PUMP, at)
    assert await store.registry.in_hand(PUMP) == 3

    async def said(command: str, event: object, when: int | None) -> object:
        (result,) = await store.ledger.write(Change(command, event, PUMP, when))  # type: ignore[arg-type]  # tests' ids
        return result.step.command.state if isinstance(result, Changed) else result

    assert await said(running.id, SUCCEEDED, at - 1) is State.SUCCEEDED
    # It had been withdrawn; the device's word wins, late.
    assert await said(waiting.id, SUCCEEDED, at - 1) is State.SUCCEEDED
    assert (await stored(store.ledger, waiting.id)).late
    for when in (at, at + SECOND):
        assert await said(other.id, SUCCEEDED, when) == Dropped(AFTER_REVOCATION)
    assert await said(other.id, SUCCEEDED, None) == Dropped(fold.OTHER_GENERATION)
    assert await said(other.id, Claimed(AGENT), None) == Dropped(fold.OTHER_GENERATION)
    assert (await stored(store.ledger, other.id)).state is State.RUNNING
    # Two generations on, nobody knows any more when the first one ended.
    await store.registry.revoke_device(PUMP, now())
    assert await said(silent.id, SUCCEEDED, at - 1) == Dropped(fold.OTHER_GENERATION)


async def test_an_id_that_was_made_again_hears_nothing_of_the_one_before(store: Store) -> None:
    await enrolled(store)
    command = await accept(store.ledger)
    await change(store.ledger, command.id, Receipted(AGENT, running=True))
    at = now()
    await store.registry.delete_device(PUMP, None, at)
    assert await store.ledger.write(Change(command.id, SUCCEEDED, PUMP, at - 1)) == [Dropped(fold.OTHER_GENERATION)]
    await store.registry.create_device(new_device(), code())
    assert await store.ledger.write(Change(command.id, SUCCEEDED, PUMP, at - 1)) == [Dropped(fold.OTHER_GENERATION)]
    with pytest.raises(FabricError):
        await store.registry.add_key(key("b", "a"))
