"""Issued tokens: made with one another, and revoked with whatever was made with them; on both databases."""

import asyncio
from dataclasses import replace

import pytest

from fabric.errors import NotFound, Unauthenticated
from fabric.model import IssuedToken, RevokedTokens
from fabric.sql import Store
from tests.integration.sql.values import add_device
from topology.names import DeviceId


def token(jti: str, parent: str | None = None, subject: str = "billing") -> IssuedToken:
    return IssuedToken(jti, subject, ("devices:read",), 1, 2, parent=parent)


async def family(store: Store) -> None:
    """A made b and c, b made d, d made e; f stands alone."""
    for jti, parent in (("a", None), ("b", "a"), ("c", "a"), ("d", "b"), ("e", "d"), ("f", None)):
        await store.registry.add_token(token(jti, parent, subject=f"of-{jti}"))


async def revoked(store: Store) -> dict[str, int]:
    return {each.jti: each.revoked_at for each in await store.registry.tokens(None, 1000) if each.revoked_at}


async def test_a_token_knows_its_parent(store: Store) -> None:
    await family(store)
    assert await store.registry.token("d") == token("d", "b", "of-d")
    assert [each.parent for each in await store.registry.tokens(None, 10)] == [None, "a", "a", "b", "d", None]


async def test_revoking_one_revokes_its_descendants(store: Store) -> None:
    await family(store)
    assert await store.registry.revoke_token("b", 7) == RevokedTokens(3, ("of-b", "of-d", "of-e"))
    assert await store.registry.token("b") == replace(token("b", "a", "of-b"), revoked_at=7)
    assert await revoked(store) == {"b": 7, "d": 7, "e": 7}
    whole = ("of-a", "of-b", "of-c", "of-d", "of-e")
    assert await store.registry.revoke_token("a", 8) == RevokedTokens(2, whole), "whose they all were"
    assert await store.registry.revoke_token("a", 9) == RevokedTokens(0, whole)
    with pytest.raises(NotFound):
        await store.registry.revoke_token("nobody", 9)
    assert await revoked(store) == {"a": 8, "b": 7, "c": 8, "d": 7, "e": 7}, "what was revoked stays so"


async def test_revoking_goes_on_below_what_is_revoked(store: Store) -> None:
    """Nothing is made with a revoked token; what was made before is found nevertheless."""
    await family(store)
    await store.registry.revoke_token("d", 7)
    assert (await store.registry.revoke_subject("of-a", 8)).count == 3
    assert await revoked(store) == {"a": 8, "b": 8, "c": 8, "d": 7, "e": 7}


async def test_revoking_a_subject_says_how_many(store: Store) -> None:
    await family(store)
    for number in range(3):
        await store.registry.add_token(token(f"x{number}", "c" if number else None, "leaver"))
    await store.registry.add_token(token("y", "x1", "stayer"))
    assert await store.registry.revoke_subject("leaver", 7) == RevokedTokens(4, ("leaver", "stayer"))
    assert set(await revoked(store)) == {"x0", "x1", "x2", "y"}
    assert await store.registry.revoke_subject("leaver", 8) == RevokedTokens(0, ("leaver", "stayer"))
    assert await store.registry.revoke_subject("nobody", 8) == RevokedTokens(0, ())


async def test_nothing_is_made_with_a_revoked_or_unknown_token(store: Store) -> None:
    await family(store)
    await store.registry.revoke_token("b", 7)
    for parent in ("b", "d", "nobody"):
        with pytest.raises(Unauthenticated):
            await store.registry.add_token(token("late", parent))
    assert await store.registry.token("late") is None


async def test_a_token_that_is_made_while_its_parent_is_revoked_is_refused_or_revoked(store: Store) -> None:
    for number in range(20):
        root = f"root-{number:02}"
        await store.registry.add_token(token(root))
        making = [store.registry.add_token(token(f"{root}-{n}", root)) for n in range(6)]
        revoking = store.registry.revoke_token(root, 7)
        done = await asyncio.gather(*making[:3], revoking, *making[3:], return_exceptions=True)
        assert all(isinstance(each, RevokedTokens | Unauthenticated | None) for each in done), done
    assert all(each.revoked_at for each in await store.registry.tokens(None, 1000)), "none got away"


async def test_groups_of_many_devices(store: Store) -> None:
    ids = [DeviceId(f"pump-{number}") for number in range(5)]
    for id in ids:
        await add_device(store.registry, id)
    found = await store.registry.groups([*ids, DeviceId("nobody")])
    assert found == dict.fromkeys(ids, ("garage",))
    assert await store.registry.groups([DeviceId("nobody")]) == {}
