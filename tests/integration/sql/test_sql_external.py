"""Callers of external providers: revoked for as long as a token of theirs could live, with the tokens that they made;
on both databases."""

import asyncio
from pathlib import Path

import pytest

from fabric.errors import Unauthenticated
from fabric.identity.issued import identity
from fabric.identity.providers import LONGEST_LEEWAY, LONGEST_LIFE
from fabric.identity.revocation_log import RevocationLog
from fabric.model import IssuedToken, RevokedTokens
from fabric.sql import Store, open_store
from tests.integration.sql.values import SECOND, execute, now, rows

ALICE, BOB = (identity("https://idp.example", subject) for subject in ("alice", "bob"))
NOW = 1_800_000_000 * SECOND
MARGIN = LONGEST_LEEWAY * SECOND  # the provider's clock may be so far ahead


def made(jti: str, minter: str | None = None, parent: str | None = None) -> IssuedToken:
    return IssuedToken(jti, f"of-{jti}", ("devices:read",), NOW, NOW + SECOND, parent=parent, minter=minter)


async def good(store: Store) -> set[str]:
    return {each.jti for each in await store.registry.tokens(None, 100) if each.revoked_at is None}


async def test_a_token_knows_who_made_it(store: Store) -> None:
    await store.registry.add_token(made("a", ALICE), NOW)
    assert await store.registry.token("a") == made("a", ALICE)


async def test_revoking_sets_a_time_that_never_goes_back(store: Store) -> None:
    assert await store.registry.not_before(ALICE) is None
    assert await store.registry.revoke_subject(ALICE, NOW) == RevokedTokens(0, (ALICE,))
    assert await store.registry.not_before(ALICE) == NOW + MARGIN
    await store.registry.revoke_subject(ALICE, NOW - SECOND)
    assert await store.registry.not_before(ALICE) == NOW + MARGIN
    await store.registry.revoke_subject(ALICE, NOW + SECOND)
    assert await store.registry.not_before(ALICE) == NOW + SECOND + MARGIN
    assert await store.registry.not_before(BOB) is None, "nor is anybody else revoked"


async def test_subjects_of_our_own_tokens_have_no_such_time(store: Store) -> None:
    await store.registry.add_token(made("a"))
    await store.registry.revoke_subject("of-a", NOW)
    assert await store.registry.not_before("of-a") is None


async def test_what_it_made_goes_with_it_and_what_that_made(store: Store) -> None:
    for token in (made("a", ALICE), made("b", parent="a"), made("c", parent="b"), made("d", BOB), made("e")):
        await store.registry.add_token(token, NOW)
    assert await store.registry.revoke_subject(ALICE, NOW) == RevokedTokens(3, (ALICE, "of-a", "of-b", "of-c"))
    assert await good(store) == {"d", "e"}
    assert await store.registry.revoke_subject(ALICE, NOW) == RevokedTokens(0, (ALICE, "of-a", "of-b", "of-c"))


async def test_nothing_is_made_with_a_token_of_before(store: Store) -> None:
    await store.registry.revoke_subject(ALICE, NOW)
    for issued_at in (NOW, NOW + MARGIN, None):
        with pytest.raises(Unauthenticated):
            await store.registry.add_token(made("a", ALICE), issued_at)
    await store.registry.add_token(made("b", ALICE), NOW + MARGIN + 1)
    await store.registry.add_token(made("c", BOB), NOW)
    assert await good(store) == {"b", "c"}


async def test_making_and_revoking_at_once_leave_nothing(store: Store) -> None:
    async def make(number: int) -> None:
        await store.registry.add_token(made(f"t{number:02}", ALICE), NOW)

    making = [asyncio.create_task(make(number)) for number in range(20)]
    await store.registry.revoke_subject(ALICE, NOW)
    await asyncio.gather(*making, return_exceptions=True)
    assert await good(store) == set()


async def test_it_is_forgotten_when_every_token_has_ended(store: Store, url: str) -> None:
    life = (LONGEST_LIFE + LONGEST_LEEWAY) * SECOND
    await store.registry.revoke_subject(ALICE, now() - MARGIN - life - 60 * SECOND)
    await store.registry.revoke_subject(BOB, now() - MARGIN - life + 600 * SECOND)
    assert not await store.retention.prune(0, 100)
    assert [row.identity for row in rows(url, "SELECT identity FROM revoked_identities")] == [BOB]


async def test_a_restored_backup_knows_it(url: str, tmp_path: Path) -> None:
    log = RevocationLog(tmp_path / "apart" / "revocations.log")
    store = await open_store(url, log)
    await store.registry.add_token(made("a", ALICE), NOW)
    (mark,) = rows(url, "SELECT value FROM meta WHERE name = 'revocation-log'")
    await store.registry.revoke_subject(ALICE, NOW)
    await store.close()
    execute(
        url,
        "DELETE FROM revoked_identities",
        "UPDATE tokens SET revoked_at = NULL",
        f"UPDATE meta SET value = '{mark.value}' WHERE name = 'revocation-log'",
    )
    store = await open_store(url, log)
    assert await store.registry.not_before(ALICE) == NOW + MARGIN
    assert await good(store) == set()
    await store.close()
