"""Bringing a database's schema up to date, and refusing to work with another one.

Alembic is imported by whoever migrates. To know that there is nothing to do takes a look at the names of its scripts:
`0007_gateways.py` is revision 0007.

Any number of processes may migrate at once: one does, the others wait and find it done. A migration is one
transaction on both databases.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from fabric.audit import Action, Deed, acting
from fabric.command import Micros
from fabric.errors import FabricError, LedgerUnavailable
from fabric.sql import audit, schema
from fabric.sql.engine import CLOCK, Trouble, create_engine, refused, trouble
from fabric.sql.log import SEQUENCER
from fabric.sql.revocations import MARK

VERSION_TABLE: Final = "alembic_version"

_SCRIPTS = Path(__file__).parent / "migrations"
_REVISION: Final = sa.select(sa.column("version_num", sa.Text())).select_from(sa.table(VERSION_TABLE))
_LOCK: Final = 0x72657374616E7465  # "restante": PostgreSQL's advisory lock


class SchemaOutdated(FabricError):
    """The database's schema is not the one this version works with."""

    code = "schema-outdated"


def migrate(url: str) -> None:
    """Create the schema or bring it up to date; without effect when it is.

    Raises:
        Invalid: a database that is not supported.
        LedgerUnavailable: it can't be reached or locked.
    """
    with connected(url) as connection, connection.begin():
        lock(connection)
        before = revision_of(connection)
        upgrade(connection)
        if (after := revision_of(connection)) != before:
            deed = Deed(Action.SCHEMA_MIGRATED, detail={"from": before, "to": after})
            audit.record(connection, acting(), deed, database_time(connection))
        if (
            connection.execute(sa.select(schema.meta.c.value).where(schema.meta.c.name == "incarnation")).first()
            is None
        ):
            connection.execute(sa.insert(schema.meta), {"name": "incarnation", "value": secrets.token_hex(8)})
            lease = {"name": SEQUENCER, "owner": None, "until": 0, "position": 0, "published": 0}
            connection.execute(sa.insert(schema.leases), lease)


def renew_incarnation(url: str) -> str:
    """A new incarnation, after which agents send every retained outcome again; for `setup` and `rebuild`."""
    fresh = secrets.token_hex(8)
    with connected(url) as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.execute(sa.update(schema.meta).where(schema.meta.c.name == "incarnation").values(value=fresh))
    return fresh


def accept_revocation_log(url: str) -> None:
    """Whatever revocation log the next process finds belongs to this database, and is replayed from its beginning."""
    with connected(url) as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.execute(sa.delete(schema.meta).where(schema.meta.c.name == MARK))
        audit.record(connection, acting(), Deed(Action.REVOCATION_LOG_ACCEPTED), database_time(connection))


def check_current(url: str) -> None:
    """Raise unless the schema is the one this version works with.

    Raises:
        SchemaOutdated: it is older, newer, or not there.
        LedgerUnavailable: the database can't be reached.
    """
    with connected(url) as connection:
        found = revision_of(connection)
    if found is None:
        raise SchemaOutdated("The database has no Restante schema yet. Run `restante migrate`.")
    check_known(found, "database")
    wanted = revisions()[-1]
    if found != wanted:
        raise SchemaOutdated(f"The database's schema is at {found} and must be at {wanted}. Run `restante migrate`.")


def check_known(revision: str, whose: str) -> None:
    """Raise `SchemaOutdated` when a schema's revision is of a newer version than this one."""
    known = revisions()
    if revision not in known:
        raise SchemaOutdated(
            f"The {whose}'s schema ({revision}) is of a newer version than this one ({known[-1]}). Upgrade Restante."
        )


def revisions() -> list[str]:
    """All that this version knows, the newest last."""
    return sorted(script.name[:4] for script in (_SCRIPTS / "versions").glob("[0-9]*.py"))


def lock(connection: sa.Connection) -> None:
    """Begin a transaction that changes the schema, as the only one that does."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
    else:
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


def revision_of(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(_REVISION).scalar_one_or_none()
    return found


def database_time(connection: sa.Connection) -> Micros:
    if connection.dialect.name == "sqlite":
        return time.time_ns() // 1000
    now: Micros = connection.execute(CLOCK).scalar_one()
    return now


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    engine = create_engine(url, connections=1)
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        if trouble(error) is Trouble.REFUSED:
            raise refused(error) from error
        raise LedgerUnavailable(f"The database can't be used now: {error.orig}") from error
    finally:
        engine.dispose()


def upgrade(connection: sa.Connection, revision: str = "head") -> None:
    """Run the migrations up to a revision, in the transaction that `lock` began."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
