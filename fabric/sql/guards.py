"""What is remembered of devices between their logins (`fabric.identity.admission.Guard`), for transactions that have
locked their rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from fabric.identity.admission import Guard
from fabric.sql import rows, schema
from fabric.sql.identity import INSERTS
from fabric.sql.prepared import Among, Prepared
from topology.names import DeviceId


def read(connection: sa.Connection, devices: Sequence[DeviceId]) -> dict[DeviceId, Guard]:
    """Those of at least one device."""
    found = {device: Guard() for device in devices}
    for device, full_at, takeovers, contested_until, throttled_until, strikes in _GUARDS(connection, devices):
        found[device] = Guard(full_at, tuple(json.loads(takeovers)), contested_until, throttled_until, strikes)
    return found


def save(connection: sa.Connection, guards: Mapping[DeviceId, Guard]) -> None:
    """At least one."""
    _SAVE[connection.dialect.name].run(connection, [_row(device, guard) for device, guard in guards.items()])


def _row(device: DeviceId, guard: Guard) -> rows.Row:
    row = {"device": device, **{each.name: getattr(guard, each.name) for each in fields(Guard)}}
    row["takeovers"] = json.dumps(guard.takeovers)
    return row


def _save_statement(insert: Any) -> Prepared:  # the two dialects' inserts have no common type
    new = insert(schema.guards)
    set_ = {each.name: new.excluded[each.name] for each in fields(Guard)}
    return Prepared(new.on_conflict_do_update(index_elements=["device"], set_=set_))


_guards = schema.guards.c
_SAVE = {name: _save_statement(insert) for name, insert in INSERTS.items()}
_GUARDS = Among(
    sa.select(
        _guards.device,
        _guards.logins_full_at,
        _guards.takeovers,
        _guards.contested_until,
        _guards.throttled_until,
        _guards.strikes,
    ),
    _guards.device,
)
