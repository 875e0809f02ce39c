"""Bringing a database's schema up to date, and refusing to work with another one.

Any number of processes may migrate at once: one does, the others wait and find it done. A migration is one
transaction on both databases.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from fabric.errors import FabricError, LedgerUnavailable
from fabric.sql import schema
from fabric.sql.engine import Trouble, create_engine, refused, trouble
from fabric.sql.log import SEQUENCER

_SCRIPTS = Path(__file__).parent / "migrations"
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
    with _connected(url) as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
        else:
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        command.upgrade(_config(connection), "head")
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
    with _connected(url) as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.execute(sa.update(schema.meta).where(schema.meta.c.name == "incarnation").values(value=fresh))
    return fresh


def check_current(url: str) -> None:
    """Raise unless the schema is the one this version works with.

    Raises:
        SchemaOutdated: it is older, newer, or not there.
        LedgerUnavailable: the database can't be reached.
    """
    with _connected(url) as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    wanted = ScriptDirectory(str(_SCRIPTS)).get_current_head()
    if found == wanted:
        return
    if found is None:
        raise SchemaOutdated("The database has no Restante schema yet. Run `restante migrate`.")
    known = {script.revision for script in ScriptDirectory(str(_SCRIPTS)).walk_revisions()}
    if found not in known:
        raise SchemaOutdated(
            f"The database's schema ({found}) is of a newer version than this one ({wanted}). Upgrade Restante."
        )
    raise SchemaOutdated(f"The database's schema is at {found} and must be at {wanted}. Run `restante migrate`.")


@contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
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


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
