"""Every test here runs on a fresh database, once on SQLite and once on PostgreSQL."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fabric.sql import Store, migrate, open_store, schema
from tests.harness.postgres import PostgresCluster
from tests.integration.sql.values import execute


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_url(postgres: PostgresCluster) -> str:
    """A migrated database that the tests empty for one another: making one each takes most of a second."""
    url = postgres.new_database()
    migrate(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a schema."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated database without content."""
    if request.param == "sqlite":
        path = tmp_path / "ledger.db"
        shutil.copy(request.getfixturevalue("template"), path)
        return f"sqlite:///{path}"
    found = str(request.getfixturevalue("postgres_url"))
    emptied = [
        f"DELETE FROM {table.name}" for table in schema.metadata.sorted_tables if table.name not in ("meta", "leases")
    ]
    emptied.append("DELETE FROM meta WHERE name <> 'incarnation'")
    emptied.append("UPDATE leases SET owner = NULL, until = 0, position = 0, published = 0")
    execute(found, "ALTER TABLE audit DISABLE TRIGGER USER", *emptied, "ALTER TABLE audit ENABLE TRIGGER USER")
    return found


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    opened = await open_store(url)
    yield opened
    await opened.close()
