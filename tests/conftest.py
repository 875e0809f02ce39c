"""What all tests share: private databases, a private stack, and real agents."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from tests.harness.postgres import PostgresCluster
from tests.harness.stack import RunningStack, start_stack

hypothesis_settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis_settings.load_profile("ci")

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """No setting of the person who runs the tests may reach them."""
    for name in [name for name in os.environ if name.startswith("RESTANTE_") and name != "RESTANTE_RABBITMQ"]:
        del os.environ[name]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    with PostgresCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack on SQLite, shared by all tests that leave it running."""
    with start_stack(tmp_path_factory.mktemp("stack"), "") as running:
        yield running


@pytest.fixture(scope="module", params=DATABASES)
def own_stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack of the module's own, on each database: its parts may be killed."""
    url = ""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    with start_stack(tmp_path_factory.mktemp(f"stack-{request.param}"), url) as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder for a device."""
    return tmp_path / "device"
