"""A device's several keys, for transactions that have locked its row.

A key that was retired logs nobody in. Its row stays, so that revoking it still reaches what was registered
under it.
"""

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fabric.command import Micros
from fabric.errors import Conflict, Forbidden, NotFound, Unauthenticated
from fabric.model import MAX_KEYS, DeviceKey
from fabric.sql import identity, rows, schema
from topology.names import DeviceId

_MAX_RETIRED: Final = 16  # of a device; under older ones, nothing is found any more


def add(connection: sa.Connection, key: DeviceKey) -> DeviceKey | None:
    """Register a key under its parent; the key as it is kept, when it was registered before."""
    known = {row.kid: row for row in _all(connection, key.device)}
    active = {row.kid for row in known.values() if row.retired_at is None}
    if key.parent not in active:
        raise Unauthenticated("the key that authorizes the new one is gone")
    if key.kid in active:
        return rows.device_key(known[key.kid])
    if key.kid in known:
        raise Conflict("the key was retired; make a new one")
    if len(active) >= MAX_KEYS:
        raise Conflict(f"a device has {MAX_KEYS} active keys at most; drop one first")
    try:
        connection.execute(sa.insert(schema.device_keys), identity.new_key(key, key.device))
    except IntegrityError as error:
        raise Conflict("the key is another device's; a key belongs to one device") from error
    return None


def retire(connection: sa.Connection, device: DeviceId, kid: str, by: str, now: Micros) -> bool:
    """Let a key be succeeded by one that descends from it; False when it was retired before."""
    known = {row.kid: row for row in _all(connection, device)}
    if by not in known or known[by].retired_at is not None:
        raise Unauthenticated("the key that asks is gone")
    if kid not in known:
        raise NotFound(f"{device} has no key {kid}")
    ancestors, at = set(), known[by].parent
    while at in known and at not in ancestors:
        ancestors.add(at)
        at = known[at].parent
    if kid not in ancestors:
        raise Forbidden("a device drops only keys that the present one was registered under")
    if known[kid].retired_at is not None:
        return False
    connection.execute(RETIRE, {"of": device, "key": kid, "now": now})
    retired = sorted((row for row in known.values() if row.retired_at is not None), key=lambda row: row.retired_at)
    if len(retired) >= _MAX_RETIRED:
        _drop(connection, device, {row.kid for row in retired[: len(retired) + 1 - _MAX_RETIRED]})
    return True


def revoke(connection: sa.Connection, device: DeviceId, kid: str) -> list[str]:
    """Drop a key and all that were registered under it, and under those; returns them, the first first."""
    known = _all(connection, device)
    if kid not in {row.kid for row in known}:
        raise NotFound(f"{device} has no key {kid}")
    dropped = [kid]
    for parent in dropped:  # grows as it goes
        dropped += [row.kid for row in known if row.parent == parent and row.kid not in dropped]
    _drop(connection, device, set(dropped))
    return dropped


def _drop(connection: sa.Connection, device: DeviceId, kids: set[str]) -> None:
    connection.execute(sa.delete(schema.device_keys).where(_keys.device == device, _keys.kid.in_(sorted(kids))))


def _all(connection: sa.Connection, device: DeviceId) -> Sequence["sa.Row[Any]"]:
    """The oldest first, retired ones too."""
    return connection.execute(_ALL, {"of": device}).all()


_keys = schema.device_keys.c
_ALL: sa.Select[Any] = (
    sa.select(schema.device_keys).where(_keys.device == sa.bindparam("of")).order_by(_keys.created_at, _keys.kid)
)
RETIRE = (
    sa.update(schema.device_keys)
    .where(_keys.device == sa.bindparam("of"), _keys.kid == sa.bindparam("key"))
    .values(retired_at=sa.bindparam("now"))
)
