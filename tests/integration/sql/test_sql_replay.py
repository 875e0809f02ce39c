"""A backup of the database is restored: what was taken away since stays away, on both databases."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fabric.command import Micros, State
from fabric.errors import NotFound, NotLogged
from fabric.identity.revocation_log import LogRefused, RevocationLog
from fabric.model import DeviceKey, IssuedToken
from fabric.sql import Store, accept_revocation_log, open_store
from tests.harness.postgres import PostgresCluster
from tests.integration.sql.values import (
    SECOND,
    accept,
    all_events,
    code,
    draft,
    execute,
    log_in,
    new_device,
    now,
    rows,
    stored,
)
from topology.names import DeviceId

Backup = Callable[[], str]
FORGET = "DELETE FROM meta WHERE name = 'revocation-log'"


@pytest.fixture
def log(tmp_path: Path) -> RevocationLog:
    return RevocationLog(tmp_path / "apart" / "revocations.log")


@pytest.fixture
def backup(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Backup:
    """Copies the database, which nobody uses at the time; the URL of the copy."""

    def copy() -> str:
        if url.startswith("sqlite"):
            execute(url, f"VACUUM INTO '{tmp_path / 'backup.db'}'")
            return f"sqlite:///{tmp_path / 'backup.db'}"
        postgres: PostgresCluster = request.getfixturevalue("postgres")
        return postgres.copy(url)

    return copy


def id(name: str) -> DeviceId:
    return DeviceId(name)


def key(device: str, kid: str, parent: str | None = None, at: Micros | None = None) -> DeviceKey:
    jwk = {"crv": "P-256", "kty": "EC", "x": kid, "y": "y"}
    return DeviceKey(id(device), kid, jwk, at or now(), parent=parent)


async def enrolled(store: Store, name: str) -> None:
    """A device with the key that is called like it."""
    ticket = code(id(name))
    await store.registry.create_device(new_device(id(name)), ticket)
    await store.registry.redeem(ticket.code_hash, key(name, name), now())


async def again(store: Store, name: str, kid: str) -> None:
    """Enroll it once more."""
    ticket = code(id(name))
    await store.registry.add_code(ticket)
    await store.registry.redeem(ticket.code_hash, key(name, kid), now())


async def switch(store: Store, name: str, *, enabled: bool) -> None:
    found = await store.registry.device(id(name))
    assert found is not None
    await store.registry.update_device(replace(found, enabled=enabled), None)


async def token(store: Store, jti: str, subject: str, parent: str | None = None) -> None:
    at = now()
    await store.registry.add_token(IssuedToken(jti, subject, ("devices:read",), at, at + 3600 * SECOND, parent=parent))


async def may_log_in(store: Store, name: str, kid: str) -> bool:
    """As the login decides it."""
    return (await log_in(store, "jti", now(), id(name), kid)).refusal is None


async def holds(store: Store, jti: str) -> bool:
    found = await store.registry.token(jti)
    return found is not None and found.revoked_at is None


async def generation(store: Store, name: str) -> int | None:
    found = await store.registry.device(id(name))
    return None if found is None else found.generation


DEVICES = ("revoked", "suspended", "resumed", "deleted", "replaced", "enrolled-again", "keys", "retired", "spared")
ALIVE = {("resumed", "resumed"), ("keys", "keys"), ("retired", "second"), ("spared", "spared")}
DEAD = {(name, name) for name in DEVICES} - ALIVE | {("keys", "child"), ("keys", "grandchild")}
GOOD, BAD = ("t-spared", "t-other"), ("t-one", "t-child", "t-subject", "t-of-subject")


async def furnish(store: Store) -> str:
    """What the backup has; the id of a command that waits in it."""
    for name in DEVICES:
        await enrolled(store, name)
    for device, kid, parent in (
        ("keys", "child", "keys"), ("keys", "grandchild", "child"), ("retired", "second", "retired"),
    ):  # fmt: skip
        await store.registry.add_key(key(device, kid, parent))
    for jti, subject, parent in (
        ("t-one", "billing", None), ("t-child", "helper", "t-one"), ("t-other", "billing", None),
        ("t-subject", "leaver", None), ("t-of-subject", "helper", "t-subject"), ("t-spared", "helper", None),
    ):  # fmt: skip
        await token(store, jti, subject, parent)
    return (await accept(store.ledger, draft(id("revoked")))).id


async def take_away(store: Store) -> None:
    registry = store.registry
    await registry.revoke_device(id("revoked"), now())
    for name in ("suspended", "resumed"):
        await switch(store, name, enabled=False)
    await switch(store, "resumed", enabled=True)
    for name in ("deleted", "replaced"):
        await registry.delete_device(id(name), None, now())
    await registry.create_device(new_device(id("replaced")), code(id("replaced")))
    await again(store, "enrolled-again", "its-next")
    await registry.revoke_key(id("keys"), "child", now())
    await registry.retire_key(id("retired"), "retired", "second", now())
    await registry.revoke_token("t-one", now())
    await registry.revoke_subject("leaver", now())
    await token(store, "t-later", "leaver")
    await store.revocations.flush()


async def check(store: Store) -> None:
    for name, kid in ALIVE | DEAD:
        assert await may_log_in(store, name, kid) == ((name, kid) in ALIVE), (name, kid)
    for jti in GOOD + BAD:
        assert await holds(store, jti) == (jti in GOOD), jti


async def test_a_restored_backup_brings_nothing_back(url: str, log: RevocationLog, backup: Backup) -> None:
    store = await open_store(url, log)
    waiting = await furnish(store)
    await store.close()
    restored = backup()
    store = await open_store(url, log)
    await take_away(store)
    await check(store)
    before = await all_events(store.ledger)
    await store.close()

    for mark in ("kept", "forgotten"):  # the database that was never restored learns nothing from the log
        store = await open_store(url, log)
        assert await all_events(store.ledger) == before, mark
        assert await may_log_in(store, "enrolled-again", "its-next")
        assert await holds(store, "t-later")
        await store.close()
        execute(url, FORGET)

    store = await open_store(restored, log)
    await check(store)
    assert (await stored(store.ledger, waiting)).state is State.CANCELLED
    assert await generation(store, "deleted") is await generation(store, "replaced") is None
    closed = {device for _, device in await store.registry.closures(100)}
    assert closed >= {"revoked", "suspended", "deleted", "replaced", "enrolled-again", "keys", "retired"}
    told = await all_events(store.ledger)
    for kind, device in (("revoked", "revoked"), ("suspended", "suspended"), ("resumed", "resumed"),
                         ("deleted", "deleted"), ("key-revoked", "keys"), ("key-retired", "retired")):  # fmt: skip
        assert (f"device.{kind}", device) in told
    by_fabric = rows(restored, "SELECT action FROM audit WHERE kind = 'fabric' AND detail LIKE '%replayed%'")
    assert {action for (action,) in by_fabric} >= {"device.revoked", "key.revoked", "token.revoked"}
    await store.close()

    execute(restored, FORGET)  # and all of it again
    store = await open_store(restored, log)
    assert await all_events(store.ledger) == told
    await check(store)
    await store.close()


async def test_generations_go_on_behind_those_that_the_backup_does_not_know(
    url: str, log: RevocationLog, backup: Backup
) -> None:
    store = await open_store(url, log)
    for name in ("revoked", "replaced"):
        await enrolled(store, name)
    await store.close()
    restored = backup()
    store = await open_store(url, log)
    await store.registry.revoke_device(id("revoked"), now())
    await store.registry.delete_device(id("revoked"), None, now())
    for _ in range(2):
        await store.registry.delete_device(id("replaced"), None, now())
        await store.registry.create_device(new_device(id("replaced")), code(id("replaced")))
    await store.revocations.flush()
    assert (await generation(store, "replaced"), await generation(store, "revoked")) == (3, None)
    await store.close()
    store = await open_store(restored, log)
    for name, latest in (("revoked", 2), ("replaced", 3)):
        made = await store.registry.create_device(new_device(id(name)), code(id(name)))
        assert made.generation == latest + 1
    # What is done from now on comes behind what was done before the restoration.
    await switch(store, "replaced", enabled=False)
    await store.close()
    execute(restored, FORGET)
    store = await open_store(restored, log)
    assert (await generation(store, "replaced"), await generation(store, "revoked")) == (4, 3)
    found = await store.registry.device(id("replaced"))
    assert found is not None
    assert not found.enabled
    await store.close()


async def test_a_crash_between_the_commit_and_the_log_loses_nothing(url: str, log: RevocationLog) -> None:
    store = await open_store(url)  # never comes to writing the log
    await enrolled(store, "pump")
    await store.registry.revoke_device(id("pump"), now())
    await store.close()
    store = await open_store(url, log)
    assert list(log.read(log.begin())) == []
    await store.revocations.flush()  # a worker does, every second
    ((_, line),) = log.read(log.begin())
    assert b'"device":"pump"' in line
    await store.close()


async def test_a_crash_behind_the_log_writes_it_twice(url: str, log: RevocationLog) -> None:
    log.begin()
    store = await open_store(url)
    await enrolled(store, "pump")
    await switch(store, "pump", enabled=False)
    log.append([line for (line,) in rows(url, "SELECT line FROM unlogged")])
    await store.close()  # without removing it
    store = await open_store(url, log)
    await switch(store, "pump", enabled=True)
    assert rows(url, "SELECT line FROM unlogged") == []
    assert len(list(log.read(log.begin()))) == 3
    await store.close()
    execute(url, FORGET)
    store = await open_store(url, log)
    assert await may_log_in(store, "pump", "pump")
    await store.close()


async def test_processes_write_at_once(url: str, log: RevocationLog) -> None:
    stores = [await open_store(url, log) for _ in range(3)]
    names = [f"pump-{number}" for number in range(12)]
    for name in names:
        await enrolled(stores[0], name)
    await asyncio.gather(
        *(stores[number % 3].registry.revoke_device(id(name), now()) for number, name in enumerate(names))
    )
    assert rows(url, "SELECT line FROM unlogged") == []
    for name in names:
        assert sum(f'"device":"{name}"'.encode() in line for _, line in log.read(log.begin())) == 1
    for store in stores:
        await store.close()


async def test_whoever_revokes_hears_that_the_log_can_not_be_written(url: str, log: RevocationLog) -> None:
    store = await open_store(url, log)
    await enrolled(store, "pump")
    away = log.path.rename(log.path.with_name("away"))
    with pytest.raises(NotLogged):
        await store.registry.revoke_device(id("pump"), now())
    assert not await may_log_in(store, "pump", "pump"), "it is revoked nevertheless"
    await store.registry.update_device(replace(new_device(id("pump")), groups=()), None)
    away.rename(log.path)
    await store.revocations.flush()
    assert len(list(log.read(log.begin()))) == 1
    await store.close()


async def test_a_database_is_not_opened_without_its_log(url: str, log: RevocationLog) -> None:
    store = await open_store(url, log)
    await store.close()
    log.append(['{"v":1,"kind":"moon","at":1}'])
    with pytest.raises(LogRefused, match="newer version"):
        await open_store(url, log)
    log.path.unlink()
    with pytest.raises(LogRefused, match="accept-revocation-log"):
        await open_store(url, log)
    assert not log.path.exists()
    accept_revocation_log(url)
    store = await open_store(url, log)
    await store.close()
    assert rows(url, "SELECT action FROM audit WHERE action LIKE 'revocation-log%'") == [("revocation-log.accepted",)]


async def test_what_is_made_after_a_revocation_is_not_meant_by_it(url: str, log: RevocationLog) -> None:
    store = await open_store(url, log)
    await enrolled(store, "pump")
    await store.registry.add_key(key("pump", "child", "pump"))
    await store.registry.revoke_key(id("pump"), "child", now())
    await store.registry.add_key(key("pump", "child", "pump"))
    await store.registry.revoke_subject("billing", now())
    await token(store, "later", "billing")
    with pytest.raises(NotFound):
        await store.registry.revoke_token("nobody", now())
    await store.close()
    execute(url, FORGET)
    store = await open_store(url, log)
    assert await may_log_in(store, "pump", "child")
    assert await holds(store, "later")
    await store.close()
