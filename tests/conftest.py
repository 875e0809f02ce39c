"""What all tests share: private databases, a private stack, and real agents."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from xdist.scheduler import LoadScopeScheduling

from tests.harness.postgres import PostgresCluster
from tests.harness.stack import RunningStack, start_stack

# How long an example takes to be made is the machine's business.
hypothesis_settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("ci")

DATABASES = ("sqlite", "postgresql")
READING = ("test_follow_events.py",)  # they read all that ever happened
FILLING = ("test_chaos.py", "test_disk_lost.py")  # they leave thousands of commands, which others would look through
LONG = ("test_sessions.py", "test_revocation.py")  # minutes: begun late, they would be waited for in the end


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """Nothing of the person who runs the tests may reach them."""
    for name in [name for name in os.environ if name.startswith("RESTANTE_") and name != "RESTANTE_RABBITMQ"]:
        del os.environ[name]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's job in the background has it ignored, and so would all that is started here.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    with PostgresCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack on SQLite, shared by all tests that leave it running."""
    with start_stack(tmp_path_factory.mktemp("stack"), "") as running:
        yield running


class Killable:
    """The stacks whose parts tests kill: one on each database, for all modules that want one."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._running: dict[str, RunningStack] = {}

    def on(self, database: str, url: Callable[[], str], directory: Callable[[], Path]) -> RunningStack:
        """The one on this database, started when it is first asked for."""
        if database not in self._running:
            self._running[database] = self._open.enter_context(start_stack(directory(), url()))
        return self._running[database]

    def clear(self, database: str) -> None:
        """For the next module, unless it was stopped."""
        if database in self._running:
            self._running[database].clear()

    def stop(self) -> None:
        self._running.clear()
        self._open.close()


KILLABLE = pytest.StashKey[Killable]()


def _database(item: pytest.Item | None) -> str | None:
    """The database of the killable stack that a test uses, if it uses one."""
    called = getattr(item, "callspec", None)
    return called.params.get("killable") if called is not None else None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KILLABLE] = Killable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses a killable stack takes longest, so it comes first; the unit tests come last and fill the end."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[bool, bool, bool]:
    if _database(item) is None:
        return True, item.path.name not in LONG, False
    return False, item.path.name in FILLING, item.path.name not in READING


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """What one process runs together: a module, and all that shares a killable stack or a folder's broker."""
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):
    # Not `--dist loadgroup`, whose mark is not seen in the ids that pytest 9.2 makes.
    def _split_scope(self, nodeid: str) -> str:
        shared = re.search(r"\[own-(?:sqlite|postgresql)\b|^tests/integration/amqp/", nodeid)
        if shared is None:
            return nodeid.partition("::")[0]
        # Those that fill a stack have it for themselves, so that nobody waits for both halves one after the other.
        return f"{shared[0]} filled" if any(name in nodeid for name in FILLING) else shared[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """A stack that nobody will kill any more is stopped: it would go on costing until the end of the run."""
    try:
        return (yield)
    finally:
        if _database(item) not in (None, _database(nextitem)):
            item.config.stash[KILLABLE].stop()


@pytest.fixture(scope="session", params=DATABASES, ids="own-{}".format)
def killable(request: pytest.FixtureRequest) -> str:
    """The database of a killable stack; all tests of one are run by one process."""
    return str(request.param)


@pytest.fixture(scope="module")
def own_stack(
    request: pytest.FixtureRequest, killable: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStack]:
    """A stack, on each database, whose parts may be killed. It runs and is empty when a module begins."""
    stacks = request.config.stash[KILLABLE]
    yield stacks.on(
        killable,
        lambda: request.getfixturevalue("postgres").new_database() if killable == "postgresql" else "",
        lambda: tmp_path_factory.mktemp(f"stack-{killable}"),
    )
    stacks.clear(killable)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder for a device."""
    return tmp_path / "device"
