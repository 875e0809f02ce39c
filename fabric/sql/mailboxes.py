"""What may be in mailboxes, as the ledger knows it."""

from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa

from fabric.command import Micros, State
from fabric.model import Mailbox
from fabric.sql import schema
from fabric.sql.prepared import Among
from topology.names import DeviceId


def read(connection: sa.Connection, devices: Sequence[DeviceId], now: Micros) -> dict[DeviceId, Mailbox]:
    """The mailboxes of these devices, empty ones too."""
    return ask(connection, devices, now)()


def ask(connection: sa.Connection, devices: Sequence[DeviceId], now: Micros) -> Callable[[], dict[DeviceId, Mailbox]]:
    """`read`, in two halves, as `Prepared.ask` is."""
    found = _MAILBOXES.ask(connection, devices, now=now) if devices else list

    def boxes() -> dict[DeviceId, Mailbox]:
        known = {
            device: Mailbox(int(depth), oldest_at, first_deadline)
            for device, depth, oldest_at, first_deadline in found()
        }
        return {device: known.get(device) or Mailbox(0, None) for device in devices}

    return boxes


_commands: Final = schema.commands.c
# The index's condition in its own words, so that prepared statements use it too.
IN_MAILBOX: Final = sa.text("state IN ('accepted', 'queued', 'cancelled')")
_separators = sa.func.length(_commands.copies) - sa.func.length(sa.func.replace(_commands.copies, ",", ""))
_copies = sa.case((_commands.copies == "", 1), else_=_separators + 1)
# A withdrawn command's copies stay until their deadline: only the broker could take them out, and it can't.
_MAILBOXES = Among(
    sa.select(
        _commands.device,
        sa.func.sum(_copies),
        sa.func.min(_commands.accepted_at),
        sa.func.min(_commands.deadline),
    )
    .join(
        schema.devices,
        sa.and_(schema.devices.c.id == _commands.device, schema.devices.c.generation == _commands.generation),
    )
    .where(
        IN_MAILBOX,
        _commands.deadline > sa.bindparam("now"),
        sa.or_(_commands.state != State.CANCELLED.value, _commands.copies != ""),
    )
    .group_by(_commands.device),
    _commands.device,
)
