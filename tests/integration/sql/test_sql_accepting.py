"""What may be accepted: backlogs, idempotency keys, supersedes; also when several processes accept at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from fabric.command import Cancelled, Command, Confirmed, Receipted, Republished, State
from fabric.errors import BacklogFull, KeyReused
from fabric.model import Accept, Accepted, Change, Changed, Idempotency
from fabric.sql import Store, open_store
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    SECOND,
    SUCCEEDED,
    add_device,
    change,
    command_count,
    draft,
    execute,
    now,
    stored,
)
from topology.names import DeviceId

LIMIT = 10
OTHER = DeviceId("pump-18")


@pytest.fixture
async def others(url: str, store: Store) -> AsyncIterator[list[Store]]:
    """The store, and two that other processes might have."""
    async with AsyncExitStack() as opened:
        stores = [store]
        for _ in range(2):
            stores.append(await open_store(url))
            opened.push_async_callback(stores[-1].close)
        yield stores


def key(text: str = "key", fingerprint: str = "request", expires_in: int = 3600 * SECOND) -> Idempotency:
    return Idempotency(text, fingerprint, now() + expires_in)


async def send(store: Store, *, idempotency: Idempotency | None = None, backlog: int = LIMIT, **given: Any) -> Accepted:
    (result,) = await store.ledger.write(Accept(draft(**given), backlog, idempotency))
    assert isinstance(result, Accepted)
    return result


async def fill(store: Store, many: int = LIMIT, **given: Any) -> list[Command]:
    return [(await send(store, **given)).command for _ in range(many)]


# ---- Backlog -----------------------------------------------------------------------------------------


async def test_a_full_mailbox_refuses(store: Store, url: str) -> None:
    await add_device(store.registry)
    commands = await fill(store)
    with pytest.raises(BacklogFull, match="its limit is 10") as refused:
        await send(store)
    assert (refused.value.depth, refused.value.limit) == (LIMIT, LIMIT)
    assert 0 < refused.value.oldest_age < 30
    assert 30 < refused.value.retry_after <= 60, "the first deadline"
    assert command_count(url) == LIMIT
    await change(store.ledger, commands[0].id, Confirmed(1), Receipted(AGENT, running=False))
    await send(store)
    with pytest.raises(BacklogFull):
        await send(store)
    await add_device(store.registry, OTHER)
    await send(store, device=OTHER)


async def test_what_was_withdrawn_counts_until_its_deadline(store: Store) -> None:
    await add_device(store.registry)
    short = await fill(store, 5, deadline=now() + SECOND)
    for command in (*short, *await fill(store, 5)):
        await change(store.ledger, command.id, Cancelled("cancelled"))
    with pytest.raises(BacklogFull):
        await send(store)
    box = (await store.ledger.mailboxes([PUMP]))[PUMP]
    assert (box.depth, box.oldest_at) == (LIMIT, short[0].accepted_at)
    await asyncio.sleep(max(0, short[-1].deadline - now()) / SECOND + 0.01)
    await fill(store, 5)
    with pytest.raises(BacklogFull):
        await send(store)


async def test_each_copy_counts(store: Store) -> None:
    await add_device(store.registry)
    for command in await fill(store, 5):
        await change(store.ledger, command.id, Republished(1, "retry"))
    with pytest.raises(BacklogFull) as refused:
        await send(store)
    assert refused.value.depth == 2 * 5


async def test_a_device_may_have_a_limit_of_its_own(store: Store, url: str) -> None:
    device = await add_device(store.registry)
    execute(url, f"UPDATE devices SET backlog = 3 WHERE id = '{device.id}'")
    await fill(store, 3)
    with pytest.raises(BacklogFull, match="its limit is 3"):
        await send(store)
    execute(url, f"UPDATE devices SET backlog = {LIMIT + 2} WHERE id = '{device.id}'")
    await fill(store, LIMIT + 2 - 3)
    with pytest.raises(BacklogFull):
        await send(store)


async def test_commands_of_an_earlier_device_do_not_count(store: Store) -> None:
    await add_device(store.registry)
    for command in await fill(store):
        await change(store.ledger, command.id, Cancelled("cancelled"))
    await store.registry.delete_device(PUMP, None, now())
    again = await add_device(store.registry)
    await fill(store, generation=again.generation)


async def test_senders_at_once_do_not_overshoot(others: list[Store], url: str) -> None:
    await add_device(others[0].registry)
    results = await asyncio.gather(*(send(others[n % 3]) for n in range(90)), return_exceptions=True)
    assert sum(isinstance(result, Accepted) for result in results) == LIMIT
    assert sum(isinstance(result, BacklogFull) for result in results) == 90 - LIMIT
    assert command_count(url) == LIMIT
    seqs = sorted(result.command.seq for result in results if isinstance(result, Accepted))
    assert seqs == list(range(1, LIMIT + 1)), "a refused one uses no number up"


async def test_of_several_all_are_accepted_or_none(store: Store, url: str) -> None:
    await add_device(store.registry)
    await fill(store, LIMIT - 1)
    with pytest.raises(BacklogFull):
        await store.ledger.write(Accept(draft(), LIMIT), Accept(draft(), LIMIT))
    assert command_count(url) == LIMIT - 1
    await store.ledger.write(Accept(draft(), LIMIT))


# ---- Idempotency keys --------------------------------------------------------------------------------


async def test_a_key_names_the_command(store: Store, url: str) -> None:
    await add_device(store.registry)
    first = await send(store, idempotency=key())
    assert not first.repeated
    await change(store.ledger, first.command.id, SUCCEEDED)
    again = await send(store, idempotency=key())
    assert again.repeated
    assert again.command == await stored(store.ledger, first.command.id), "as it is now"
    with pytest.raises(KeyReused):
        await send(store, idempotency=key(fingerprint="another"))
    assert not (await send(store, idempotency=key("other"))).repeated
    assert command_count(url) == 2


async def test_a_repeat_is_answered_though_the_mailbox_is_full(store: Store) -> None:
    await add_device(store.registry)
    first = await send(store, idempotency=key())
    await fill(store, LIMIT - 1)
    assert (await send(store, idempotency=key())).command.id == first.command.id


async def test_a_refused_request_does_not_use_the_key_up(store: Store) -> None:
    await add_device(store.registry)
    (first, *_) = await fill(store)
    with pytest.raises(BacklogFull):
        await send(store, idempotency=key())
    await change(store.ledger, first.id, SUCCEEDED)
    assert not (await send(store, idempotency=key(fingerprint="another"))).repeated


async def test_a_key_is_forgotten_in_time(store: Store, url: str) -> None:
    await add_device(store.registry)
    first = await send(store, idempotency=key())
    execute(url, f"UPDATE idempotency SET expires_at = {now() - 1}")
    second = await send(store, idempotency=key(fingerprint="another"))
    assert not second.repeated
    assert (await send(store, idempotency=key(fingerprint="another"))).command.id == second.command.id
    execute(url, f"DELETE FROM commands WHERE id = '{second.command.id}'")  # as retention does
    assert not (await send(store, idempotency=key())).repeated
    assert first.command.id != second.command.id


async def test_a_key_goes_with_its_device(store: Store) -> None:
    await add_device(store.registry)
    await send(store, idempotency=key())
    await store.registry.delete_device(PUMP, None, now())
    again = await add_device(store.registry)
    assert not (await send(store, idempotency=key(), generation=again.generation)).repeated


async def test_requests_at_once_make_one_command(others: list[Store], url: str) -> None:
    await add_device(others[0].registry)
    results = await asyncio.gather(*(send(others[n % 3], idempotency=key()) for n in range(30)))
    assert len({result.command.id for result in results}) == 1
    assert sum(not result.repeated for result in results) == 1
    assert command_count(url) == 1


# ---- Supersedes --------------------------------------------------------------------------------------


async def test_the_latest_set_point_wins(store: Store) -> None:
    await add_device(store.registry)
    old = (await send(store, supersedes="speed")).command
    running = (await send(store, supersedes="other")).command
    picked_up = (await send(store, supersedes="speed", name="speed.set")).command
    await change(store.ledger, picked_up.id, Receipted(AGENT, running=True))
    result = await send(store, supersedes="speed")
    assert [command.id for command in result.superseded] == [old.id]
    assert (result.superseded[0].state, result.superseded[0].reason) == (State.CANCELLED, "superseded")
    assert await stored(store.ledger, old.id) == result.superseded[0]
    assert (await stored(store.ledger, running.id)).state is State.ACCEPTED, "another key"
    again = await send(store, supersedes="speed", name="speed.set")
    assert again.superseded == (), "what was picked up is left"
    last = await send(store, supersedes="speed", name="speed.set")
    assert [command.id for command in last.superseded] == [again.command.id], "only of the same name"


async def test_another_device_is_left_alone(store: Store) -> None:
    for device in (PUMP, OTHER):
        await add_device(store.registry, device)
        await send(store, supersedes="speed", device=device)
    result = await send(store, supersedes="speed")
    assert [command.device for command in result.superseded] == [PUMP]


async def test_a_refused_command_supersedes_nothing(store: Store) -> None:
    await add_device(store.registry)
    commands = await fill(store, supersedes="speed")
    assert [(await stored(store.ledger, command.id)).state for command in commands[:-1]] == [State.CANCELLED] * 9
    with pytest.raises(BacklogFull):
        await send(store, supersedes="speed")
    assert (await stored(store.ledger, commands[-1].id)).state is State.ACCEPTED


async def test_of_set_points_at_once_one_is_left(others: list[Store]) -> None:
    await add_device(others[0].registry)
    results = await asyncio.gather(*(send(others[n % 3], supersedes="speed", backlog=100) for n in range(30)))
    last = max((result.command for result in results), key=lambda command: command.seq)
    superseded = [command.id for result in results for command in result.superseded]
    assert sorted(superseded) == sorted(result.command.id for result in results if result.command.id != last.id)
    assert (await stored(others[0].ledger, last.id)).state is State.ACCEPTED


async def test_the_answer_tells_what_the_whole_batch_did(store: Store) -> None:
    await add_device(store.registry)
    first, second = draft(supersedes="speed"), draft(supersedes="speed")
    results = await store.ledger.write(Accept(first), Accept(second), Change(second.id, Confirmed(1)))
    assert [type(result) for result in results] == [Accepted, Accepted, Changed]
    assert isinstance(results[0], Accepted)
    assert isinstance(results[1], Accepted)
    assert results[0].command.state is State.CANCELLED, "so that nobody publishes it"
    assert results[1].command.state is State.QUEUED
