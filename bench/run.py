"""What the measures share: their options, databases, a stack of their own, and how figures are taken."""

import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
from psycopg import sql

from api.operator.stack import Stack
from api.settings import Settings
from tests.harness.postgres import PostgresCluster

LEAST_ROUNDS = 3
_DRIVER = "postgresql+psycopg"


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds that a measure may take: in a quick run, and in a full one, its stacks included."""

    quick: float
    full: float


@dataclass(frozen=True, slots=True)
class Common:
    """What the measures of a quick run share: it has no time for a stack each. `database` is its ledger's URL."""

    stack: Stack
    database: str


@dataclass(frozen=True, slots=True)
class Options:
    """`budget`: seconds for the measure. `database`: the URL of a PostgreSQL server on which databases may be made;
    empty for a private one. `common`: the stack to measure on, instead of one of its own."""

    quick: bool
    budget: float
    database: str = ""
    common: Common | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds of the budget that are not yet used up."""
        return self.began + self.budget - time.monotonic()


class Databases:
    """Empty ledgers to measure with; they go with the run."""

    def __init__(self, new: Callable[[], str]) -> None:
        self._new = new

    def sqlite(self) -> str:
        """The URL of a ledger in the stack's own folder."""
        return ""

    def postgresql(self) -> str:
        """The URL of an empty database."""
        return self._new()


@contextmanager
def databases(options: Options) -> Iterator[Databases]:
    """SQLite, and PostgreSQL on a private cluster or on the server that was named."""
    if (common := options.common) is not None:
        yield Databases(lambda: common.database)
    elif options.database:
        with _named_server(options.database) as new:
            yield Databases(new)
    else:
        with PostgresCluster() as cluster:
            yield Databases(cluster.new_database)


@contextmanager
def _named_server(url: str) -> Iterator[Callable[[], str]]:
    server, _, _ = url.replace(f"{_DRIVER}://", "postgresql://").rpartition("/")
    made: list[str] = []
    with psycopg.connect(url.replace(f"{_DRIVER}://", "postgresql://"), autocommit=True) as connection:

        def new() -> str:
            made.append(f"restante_bench_{secrets.token_hex(6)}")
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(made[-1])))
            return f"{server.replace('postgresql://', f'{_DRIVER}://')}/{made[-1]}"

        try:
            yield new
        finally:
            for name in made:
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def common(options: Options) -> Iterator[Common]:
    """A stack for several measures, its ledger on PostgreSQL."""
    with databases(options) as given:
        database = given.postgresql()
        with stack_on(options, database) as (stack, _):
            yield Common(stack, database)


@contextmanager
def stack_on(options: Options, database: str) -> Iterator[tuple[Stack, Path]]:
    """A running stack, and an empty folder; both go at the end, but for a stack that others share."""
    with tempfile.TemporaryDirectory(prefix="restante-bench-") as directory:
        root = Path(directory)
        if options.common is not None:
            yield options.common.stack, root
            return
        say(f"starting a stack of its own ({ledger_name(database)})")
        # One device does here what a fleet does elsewhere.
        unlimited = Settings(limit_reports=1_000_000, limit_traffic=1_000_000_000, limit_logins=1_000_000)
        stack = Stack(replace(unlimited, state_dir=root / "stack", database_url=database), _whisper)
        stack.start()
        try:
            yield stack, root
        finally:
            stack.stop()


def ledger_name(database: str) -> str:
    return "PostgreSQL" if database.startswith("postgresql") else "SQLite"


def rounds(most: int, seconds: float) -> Iterator[int]:
    """Number the rounds from 1, until `most`, or until one more would end after `seconds`; three at least."""
    began = time.monotonic()
    for number in range(1, most + 1):
        yield number
        taken = time.monotonic() - began
        if number >= LEAST_ROUNDS and taken * (number + 1) / number > seconds:
            return


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _whisper(_: str) -> None:
    """A stack's start is not worth telling step by step; its failure is an error that says it all."""
