"""The port `Retention` on SQL: forgets what is old, a little at a time.

A transaction takes only rows that nobody else holds, and has them for milliseconds: any number of workers may
prune at once, and a writer waits for none of them long. What it takes it finds by an index, also when there is
nothing to take.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import sqlalchemy as sa

from fabric.command import Micros
from fabric.identity.providers import LONGEST_LEEWAY, LONGEST_LIFE
from fabric.sql import schema
from fabric.sql.engine import Database
from fabric.sql.log import SEQUENCER

PRUNED_THROUGH: Final = "pruned_through"
"""The row of `meta` with the largest position of an event that was deleted, in decimal."""

_NEVER = 2**62  # past every position
_TOKEN_LIFE = (LONGEST_LIFE + LONGEST_LEEWAY) * 1_000_000  # µs from the issue of an external token to its end, at most


class SqlRetention:
    """Args:
    clock: the time in microseconds on the database's clock, as `fabric.clock.Clock` keeps it.
    """

    def __init__(self, database: Database, clock: Callable[[], Micros]) -> None:
        self._database, self._now = database, clock

    async def prune(self, before: Micros, limit: int) -> bool:
        """Delete what is older than `before`, up to `limit` of each kind; True when there is more.

        Commands that were settled by then go with all their events, once the broker has each of these and no copy
        can be in the mailbox any more; open ones stay, however old. So do events of devices, and mail in
        quarantine. Idempotency keys go when they have expired, and revocations of external identities when all the
        tokens that they are about have.
        """
        now = self._now()
        # Forgotten in a crash, it is done again.
        return await self._database.write(lambda connection: _prune(connection, before, now, limit), durable=False)


def _prune(connection: sa.Connection, before: Micros, now: Micros, limit: int) -> bool:
    given = {"before": before, "now": now, "issued": now - _TOKEN_LIFE, "limit": limit}
    published = connection.execute(_PUBLISHED).scalar_one()
    settled = connection.execute(_SETTLED, given).scalars().all()
    # Read once the commands are locked: they get no more events.
    logged = {row.command: row.last for row in connection.execute(_LOGGED, {"of": settled})} if settled else {}
    commands = [id for id in settled if logged.get(id, 0) <= published]
    events = connection.execute(_OF_DEVICES, {**given, "published": published}).all()
    keys = connection.execute(_KEYS, given).scalars().all()
    identities = connection.execute(_IDENTITIES, given).scalars().all()
    oldest = connection.execute(_QUARANTINED, given).all()
    quarantined = [row.id for row in oldest if row.at < before]
    _delete(connection, schema.events.c.command, commands)
    _delete(connection, schema.commands.c.id, commands)
    _delete(connection, schema.events.c.id, [row.id for row in events])
    _delete(connection, schema.idempotency.c.key, keys)
    _delete(connection, schema.revoked_identities.c.identity, identities)
    _delete(connection, schema.quarantine.c.id, quarantined)
    positions = [*(logged[id] for id in commands if id in logged), *(row.position for row in events)]
    if positions:  # the last of the locks: whoever holds it waits for nothing
        connection.execute(_RAISE, {"name": PRUNED_THROUGH, "to": str(max(positions))})
    # Those that are settled and not published must wait for the sequencer, not for another pass at once.
    return bool(len(settled) == limit and commands) or limit in (
        len(events),
        len(keys),
        len(identities),
        len(quarantined),
    )


def _delete(connection: sa.Connection, column: "sa.Column[Any]", values: Sequence[Any]) -> None:
    if values:
        connection.execute(sa.delete(column.table).where(column.in_(values)))


_commands, _events, _keys = schema.commands.c, schema.events.c, schema.idempotency.c
_identities = schema.revoked_identities.c
_limit = sa.bindparam("limit", type_=sa.Integer())
_PUBLISHED = sa.select(schema.leases.c.published).where(schema.leases.c.name == SEQUENCER)
_SETTLED = (
    sa.select(_commands.id)
    .where(
        _commands.settled_at < sa.bindparam("before"),
        _commands.deadline < sa.bindparam("now"),  # until then a withdrawn copy takes room in the mailbox
    )
    .order_by(_commands.settled_at)
    .limit(_limit)
    .with_for_update(skip_locked=True)
)
_LOGGED = (
    sa.select(_events.command, sa.func.max(sa.func.coalesce(_events.position, _NEVER)).label("last"))
    .where(_events.command.in_(sa.bindparam("of", expanding=True)))
    .group_by(_events.command)
)
_OF_DEVICES = (
    sa.select(_events.id, _events.position)
    .where(
        _events.command.is_(None), _events.at < sa.bindparam("before"), _events.position <= sa.bindparam("published")
    )
    .order_by(_events.at)
    .limit(_limit)
    .with_for_update(skip_locked=True)
)
_KEYS = (
    sa.select(_keys.key)
    .where(_keys.expires_at < sa.bindparam("now"))
    .order_by(_keys.expires_at)
    .limit(_limit)
    .with_for_update(skip_locked=True)
)
_IDENTITIES = (
    sa.select(_identities.identity)
    .where(_identities.not_before < sa.bindparam("issued"))
    .order_by(_identities.not_before)
    .limit(_limit)
    .with_for_update(skip_locked=True)
)
# In the order they came in, which has an index and is that of their times.
_QUARANTINED = sa.select(schema.quarantine.c.id, schema.quarantine.c.at).order_by(schema.quarantine.c.id).limit(_limit)
_RAISE = sa.text(
    "INSERT INTO meta (name, value) VALUES (:name, :to) ON CONFLICT (name) DO UPDATE SET value = excluded.value "
    "WHERE CAST(meta.value AS BIGINT) < CAST(excluded.value AS BIGINT)"
)
