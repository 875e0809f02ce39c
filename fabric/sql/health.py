"""What `restante doctor` asks a database."""

import time
from dataclasses import dataclass

import sqlalchemy as sa

from fabric.identity.revocation_log import Mark
from fabric.sql import replay, schema
from fabric.sql.log import SEQUENCER
from fabric.sql.migrate import check_current, connected, database_time, revision_of


@dataclass(frozen=True, slots=True)
class Health:
    """Attributes:
    schema: its revision.
    offset: of the database's clock against this machine's, in seconds; the time of one statement is in it.
    unpublished: seconds since the oldest event that the stream does not have yet; 0 when there is none.
    closures: connections that are to be closed.
    unlogged: revocations that are not yet in the revocation log.
    mark: how far it has followed the revocation log; None: it knows of none.
    """

    schema: str
    offset: float
    unpublished: float
    closures: int
    unlogged: int
    mark: Mark | None


def look(url: str) -> Health:
    """Blocks.

    Raises:
        SchemaOutdated, LedgerUnavailable, Invalid: one sentence that says what to do.
    """
    check_current(url)
    events = schema.events.c
    published = sa.select(schema.leases.c.published).where(schema.leases.c.name == SEQUENCER).scalar_subquery()
    waiting = (  # two looks: each has an index
        sa.select(sa.func.min(events.at)).where(events.position.is_(None)),
        sa.select(events.at).where(events.position > published).order_by(events.position).limit(1),
    )
    with connected(url) as connection:
        now = database_time(connection)
        offset = now - time.time_ns() // 1000
        oldest = [at for query in waiting if (at := connection.execute(query).scalar()) is not None]
        closures, unlogged = (
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (schema.closures, schema.unlogged)
        )
        return Health(
            str(revision_of(connection)),
            offset / 1_000_000,
            max(now - min(oldest), 0) / 1_000_000 if oldest else 0.0,
            closures,
            unlogged,
            replay.mark_of(connection),
        )
