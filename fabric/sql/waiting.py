"""Commands that wait for their device."""

from collections.abc import Sequence

import sqlalchemy as sa

from fabric.command import WAITING, Micros
from fabric.ports import Waiting
from fabric.sql import schema
from fabric.sql.prepared import Among
from topology.names import CommandId, DeviceId


def page(
    connection: sa.Connection, cell: str, accepted_by: Micros, now: Micros, after: Waiting | None, limit: int
) -> list[Waiting]:
    """See `fabric.ports.Ledger.waiting`."""
    query = _WAITING
    if after is not None:
        query = query.where(sa.tuple_(_commands.device, _commands.seq) > sa.tuple_(*map(sa.literal, _place(after))))
    found = connection.execute(query, {"cell": cell, "by": accepted_by, "now": now, "limit": limit})
    return [Waiting(CommandId(id), DeviceId(device), seq, attempt) for id, device, seq, attempt in found]


def of_issuers(connection: sa.Connection, issuers: Sequence[str], limit: int) -> list[CommandId]:
    """See `fabric.ports.Ledger.waiting_of`."""
    return [CommandId(id) for (id,) in _OF_ISSUERS(connection, issuers, limit=limit)]


def _place(waiting: Waiting) -> tuple[DeviceId, int]:
    return waiting.device, waiting.seq


_commands = schema.commands.c
_STATES = [_commands.state == state.value for state in sorted(WAITING)]
_OF_ISSUERS = Among(
    sa.select(_commands.id).where(_commands.due > 0, sa.or_(*_STATES)).limit(sa.bindparam("limit", type_=sa.Integer())),
    # Not by the index of issuers: one may have any number of commands, but there are few that are open.
    _commands.issuer.concat(""),
)
_WAITING = (
    sa.select(_commands.id, _commands.device, _commands.seq, _commands.attempt)
    .join(schema.devices, schema.devices.c.id == _commands.device)
    .where(
        schema.devices.c.cell == sa.bindparam("cell"),
        schema.devices.c.generation == _commands.generation,
        _commands.state.in_(sorted(state.value for state in WAITING)),
        _commands.accepted_at <= sa.bindparam("by"),
        _commands.deadline > sa.bindparam("now"),
    )
    .order_by(_commands.device, _commands.seq)
    .limit(sa.bindparam("limit"))
)
