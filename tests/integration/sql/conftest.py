"""Every test here runs on a fresh database, once on SQLite and once on PostgreSQL."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fabric.sql import Store, migrate, open_store


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a schema."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return str(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def url(request: pytest.FixtureRequest, empty_url: str) -> Iterator[str]:
    """A migrated database."""
    if empty_url.startswith("sqlite"):
        shutil.copy(request.getfixturevalue("template"), empty_url.removeprefix("sqlite:///"))
    else:
        migrate(empty_url)
    yield empty_url


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    opened = await open_store(url)
    yield opened
    await opened.close()
