"""Migrations, the schema they make, and the URLs that are taken."""

import asyncio
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fabric.command import State
from fabric.errors import Invalid, LedgerUnavailable
from fabric.sql import SchemaOutdated, check_current, migrate, open_store, schema
from fabric.sql.engine import create_engine
from fabric.sql.migrate import renew_incarnation, revisions
from tests.harness.postgres import PostgresCluster
from tests.integration.sql.values import add_device, execute, rows


def definitions(url: str) -> set[str]:
    """Every table, index and constraint in the database's own words."""
    if url.startswith("sqlite"):
        found = rows(url, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE '%alembic%'")
        return {re.sub(r"\s+", " ", row[0]) for row in found if "sqlite_sequence" not in row[0]}
    # Alembic's own table is no part of it.
    parts = rows(
        url,
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        " UNION ALL SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'"
        " UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
        " UNION ALL SELECT prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        " UNION ALL SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable, collation_name,"
        " column_default) FROM information_schema.columns"
        " WHERE table_schema = 'public' AND table_name <> 'alembic_version'",
    )
    return {row[0] for row in parts}


def test_migrations_make_what_the_tables_say(empty_url: str) -> None:
    migrate(empty_url)
    engine = create_engine(empty_url, connections=1)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []
    migrated = definitions(empty_url)
    # compare_metadata sees neither CHECKs nor the conditions of partial indexes.
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
        schema.metadata.create_all(connection)
    engine.dispose()
    assert definitions(empty_url) == migrated


def test_the_database_knows_exactly_the_states_of_the_table(url: str) -> None:
    engine = create_engine(url, connections=1)
    (check,) = sa.inspect(engine).get_check_constraints("commands")
    engine.dispose()
    assert set(re.findall(r"'(\w+)'", check["sqltext"])) == {state.value for state in State}


async def test_migrating_again_changes_nothing(empty_url: str) -> None:
    migrate(empty_url)
    store = await open_store(empty_url)
    device = await add_device(store.registry)
    incarnation = await store.ledger.incarnation()
    await asyncio.to_thread(migrate, empty_url)
    assert await store.registry.device(device.id) == device
    assert await store.ledger.incarnation() == incarnation
    assert renew_incarnation(empty_url) == await store.ledger.incarnation() != incarnation
    await store.close()


async def test_processes_that_migrate_at_once_agree(empty_url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, empty_url) for _ in range(5)))
    check_current(empty_url)
    assert rows(empty_url, "SELECT count(*) FROM meta")[0][0] == 1
    assert rows(empty_url, "SELECT count(*) FROM leases")[0][0] == 1


def test_the_names_of_the_scripts_tell_what_alembic_would() -> None:
    known = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    assert revisions() == [script.revision for script in known.walk_revisions()][::-1]


def test_a_process_that_finds_nothing_to_migrate_does_without_alembic(empty_url: str) -> None:
    migrate(empty_url)
    look = "import sys; from fabric import sql; sql.check_current(sys.argv[1]); print('alembic' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", look, empty_url], text=True) == "False\n"


async def test_another_schema_is_refused_with_advice(empty_url: str) -> None:
    with pytest.raises(SchemaOutdated, match="restante migrate"):
        await open_store(empty_url)
    migrate(empty_url)
    check_current(empty_url)
    execute(empty_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaOutdated, match="newer"):
        check_current(empty_url)


def test_a_failing_migration_leaves_nothing_behind(empty_url: str) -> None:
    execute(empty_url, "CREATE TABLE tokens (x INTEGER)")
    with pytest.raises(Invalid):
        migrate(empty_url)
    execute(empty_url, "DROP TABLE tokens")
    assert definitions(empty_url) == set()
    migrate(empty_url)


@pytest.mark.parametrize(
    "url", ["mysql://localhost/x", "postgresql+psycopg2://localhost/x", "sqlite://", "sqlite:///:memory:", "x", ""]
)
def test_another_database_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="sqlite:///path"):
        create_engine(url, connections=1)


def test_a_server_that_does_not_answer_is_unavailable(postgres: PostgresCluster) -> None:
    wrong = postgres.new_database().replace(f":{postgres.port}/", ":1/")
    with pytest.raises(LedgerUnavailable):
        check_current(wrong)
    with pytest.raises(LedgerUnavailable) as refused:
        check_current(re.sub(r":[^:@]+@", ":not-the-password@", postgres.new_database()))
    assert "not-the-password" not in str(refused.value)


def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="nowhere"):
        check_current(f"sqlite:///{tmp_path / 'nowhere' / 'x.db'}")


def test_nobody_else_can_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "ledger.db"
        migrate(f"sqlite:///{path}")
        engine = create_engine(f"sqlite:///{path}", connections=1)
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            files = list(tmp_path.glob("ledger.db*"))
            assert len(files) == 3
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            connection.exec_driver_sql("ROLLBACK")
            settings = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
            assert settings == ["wal", 2, 1]
        engine.dispose()
        path.chmod(0o644)
        check_current(f"sqlite:///{path}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
