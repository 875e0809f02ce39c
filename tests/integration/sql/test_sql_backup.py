"""`restante backup` and `restante restore`, on both databases and from one to the other."""

import asyncio
import json
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from api.operator import backup
from api.operator.archive import BackupFailed, Reader, Writer
from api.settings import Settings
from fabric.errors import FabricError
from fabric.model import IssuedToken
from fabric.sql import Store, dump, open_store, schema
from fabric.sql.migrate import SchemaOutdated, connected, lock, revision_of, upgrade
from tests.integration.sql.values import (
    PUMP,
    SUCCEEDED,
    accept,
    add_device,
    all_events,
    change,
    code,
    draft,
    execute,
    new_device,
    now,
    rows,
    stored,
)
from topology.names import DeviceId

# What a restoration makes anew.
RENEWED = ("meta", "leases", "gateways", "audit")


def quiet(_: str) -> None:
    pass


def make(settings: Settings, file: Path, **wanted: bool) -> dict[str, object]:
    flags = {"force": False, "with_secrets": False, "with_authority_key": False}
    return backup.make(settings, file, quiet, **(flags | wanted))


def content(url: str) -> dict[str, list["sa.Row[tuple[object, ...]]"]]:
    return {
        table.name: sorted(rows(url, sa.select(table)), key=repr)
        for table in schema.metadata.sorted_tables
        if table.name not in RENEWED
    }


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def filled(store: Store) -> None:
    """Something of most tables: text that is no ASCII, bytes, numbers, NULLs."""
    await add_device(store.registry)
    gone = replace(new_device(DeviceId("pump-18")), labels={"Küche": "☂"})
    await store.registry.create_device(gone, code(gone.id))
    done = await accept(store.ledger, draft(body=bytes(range(256)), content_type="application/octet-stream"))
    await change(store.ledger, done.id, SUCCEEDED)
    for _ in range(3):
        await accept(store.ledger)
    await store.registry.add_token(IssuedToken("jti", "billing", ("devices:read",), now(), now() + 10**9, None))
    await store.registry.delete_device(gone.id, None, now())
    await all_events(store.ledger)


@pytest.fixture
async def source(url: str, store: Store, tmp_path: Path) -> Settings:
    """Settings of a database that has something in it and is in use; its state directory has files of each kind."""
    await filled(store)
    state = tmp_path / "state"
    for name in ("authority/ca.pem", "authority/ca.key", "keys/tokens.json", "secrets/cursors", "operator.token",
                 "secrets/tokens/kid.pem", "revocations/revocations.log", "ledger.sqlite", "gateway.log"):  # fmt: skip
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text(name)
    return Settings(state_dir=state, database_url=url)


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
async def test_a_backup_made_in_use_is_restored_into_either_database(
    source: Settings, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = tmp_path / "backup.tar"
    listed_before = listed(tmp_path)
    done = make(source, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert listed(tmp_path) == ["backup.tar", *listed_before]
    before = content(source.database)
    incarnation = dict(rows(source.database, "SELECT name, value FROM meta"))["incarnation"]
    fresh = f"sqlite:///{tmp_path / 'other.db'}"
    if target == "postgresql":
        fresh = str(request.getfixturevalue("postgres").new_database())
    other = Settings(state_dir=tmp_path / "other", database_url=fresh)
    restored = backup.restore(other, file, quiet, replace=False)
    assert restored["rows"] == done["rows"]
    assert content(fresh) == before
    assert dict(rows(fresh, "SELECT name, value FROM meta"))["incarnation"] != incarnation
    assert ("backup.restored",) in rows(fresh, "SELECT action FROM audit")

    store = await open_store(fresh)  # it goes on: numbers are not given twice
    try:
        new = await accept(store.ledger)
        assert new.seq == 5
        assert (await stored(store.ledger, new.id)).state.value == "accepted"
        events = await all_events(store.ledger)
        assert events[-1] == ("command.accepted", PUMP)
    finally:
        await store.close()


async def test_secrets_are_in_a_backup_only_when_they_are_asked_for(source: Settings, tmp_path: Path) -> None:
    def files(**wanted: bool) -> set[str]:
        make(source, tmp_path / "backup.tar", force=True, **wanted)
        with tarfile.open(tmp_path / "backup.tar") as tar:  # anybody's tar reads it
            return {name for name in tar.getnames() if name.startswith("state/")}

    public = {"state/authority/ca.pem", "state/keys/tokens.json"}
    secret = {"state/secrets/cursors", "state/secrets/tokens/kid.pem", "state/operator.token"}
    assert files() == public
    assert files(with_secrets=True) == public | secret
    assert files(with_authority_key=True) == public | {"state/authority/ca.key"}
    make(source, tmp_path / "all.tar", with_secrets=True)
    with pytest.raises(BackupFailed, match="is there already"):
        make(source, tmp_path / "all.tar")
    here = Settings(state_dir=tmp_path / "here", database_url=f"sqlite:///{tmp_path / 'here.db'}")
    here.state_dir.mkdir()
    (here.state_dir / "operator.token").write_text("mine")
    assert backup.restore(here, tmp_path / "all.tar", quiet, replace=False)["files"] == 4
    assert (here.state_dir / "operator.token").read_text() == "mine"
    kept = here.state_dir / "secrets" / "tokens" / "kid.pem"
    assert (kept.read_text(), stat.S_IMODE(kept.stat().st_mode)) == ("secrets/tokens/kid.pem", 0o600)


async def test_a_database_that_is_not_empty_or_in_use_is_left_alone(
    source: Settings, store: Store, url: str, tmp_path: Path
) -> None:
    make(source, tmp_path / "backup.tar")
    later = await accept(store.ledger)

    def refusal(*, replace: bool) -> str:
        before = content(url)
        with pytest.raises(FabricError) as refused:
            backup.restore(source, tmp_path / "backup.tar", quiet, replace=replace)
        assert content(url) == before
        return str(refused.value)

    await store.gateways.renew("g", now(), 60_000_000)
    assert "A gateway works with this database" in refusal(replace=True)
    await store.gateways.leave("g")
    await store.ledger.sequence("w", 60_000_000, 1)
    assert "A worker works with this database" in refusal(replace=True)
    execute(url, "UPDATE leases SET until = 0")
    assert "not empty: it has devices, generations, commands, tokens" in refusal(replace=False)
    backup.restore(source, tmp_path / "backup.tar", quiet, replace=True)
    assert await store.ledger.command(later.id) is None


async def test_rows_that_do_not_fit_change_nothing(source: Settings, url: str, tmp_path: Path) -> None:
    make(source, tmp_path / "good.tar")
    execute(url, "UPDATE leases SET until = 0")
    before = content(url)

    def altered(name: str, change: Callable[[bytes], bytes], **about: object) -> Path:
        """A backup with whole checksums, of which something was changed."""
        with (tmp_path / "good.tar").open("rb") as good, (tmp_path / "odd.tar").open("w+b") as odd:
            reader, writer = Reader(good), Writer(odd)
            for folder in ("tables", "state"):
                for each in reader.names(folder):
                    kept = reader.content(each)
                    writer.add(each, [change(kept) if each == f"tables/{name}.ndjson" else kept])
            writer.close({key: value for key, value in reader.manifest.items() if key != "files"} | about)
        return tmp_path / "odd.tar"

    def refuse(file: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            backup.restore(source, file, quiet, replace=True)
        assert content(url) == before

    refuse(altered("commands", lambda kept: kept + b"[1]\n"), dump.RestoreRefused, "don't fit")
    refuse(altered("commands", lambda kept: kept + b"{}\n"), dump.RestoreRefused, "don't fit")
    refuse(altered("commands", lambda kept: kept[:-1]), dump.RestoreRefused, "too long")
    refuse(altered("device_keys", lambda _: b"[" + b"[" * 100_000 + b"\n"), dump.RestoreRefused, "don't fit")
    refuse(altered("commands", lambda kept: kept.replace(b'"accepted"', b'"no-state"')), dump.RestoreRefused, "state")
    refuse(altered("", bytes, schema="9999"), SchemaOutdated, "newer version")
    refuse(altered("", bytes, tables={}), BackupFailed, "which tables")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "good.tar").read_bytes()[:-1024])
    refuse(cut, BackupFailed, "cut off")


async def test_an_older_backup_is_brought_up_to_date(empty_url: str, tmp_path: Path) -> None:
    """As the first version with an audit would have made it."""
    old = f"sqlite:///{tmp_path / 'old.db'}"
    tables = {}
    with connected(old) as connection, connection.begin():
        lock(connection)
        upgrade(connection, "0006")
        found = sa.MetaData()
        found.reflect(connection)
        for table in found.sorted_tables:
            if table.name != "alembic_version":
                tables[table.name] = tuple(table.columns.keys())
    lines = {
        "meta": [["incarnation", "old"]],
        "leases": [["sequencer", None, 0, 7, 7]],
        "generations": [["pump-17", 3]],
    }

    def read(table: str) -> Iterator[bytes]:
        yield from (json.dumps(row).encode() + b"\n" for row in lines.get(table, []))

    await asyncio.to_thread(dump.load, empty_url, "0006", tables, read, lambda *_: None, replace=False)
    store = await open_store(empty_url)  # which takes no other than the newest schema
    try:
        assert await store.ledger.last_position() == 7
        assert (await add_device(store.registry)).generation == 4
    finally:
        await store.close()
    with connected(empty_url) as connection:
        assert revision_of(connection) != "0006"
