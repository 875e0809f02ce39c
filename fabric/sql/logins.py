"""Logins, decided in batches: those that come while one transaction runs are all decided by the next."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from fabric.batch import Batcher
from fabric.command import Micros
from fabric.identity import admission
from fabric.identity.admission import Admission, Attempt, Known, Use
from fabric.identity.meters import Limits
from fabric.sql import guards, schema
from fabric.sql.engine import Database
from fabric.sql.identity import INSERTS
from fabric.sql.prepared import Among, Prepared
from topology.names import DeviceId

BATCH = 50  # logins of one transaction: it holds the locks of as many devices
_PRUNED = 100  # expired uses removed by each transaction, so that the table stays bounded

_Item = tuple[Attempt, Limits]

_devices, _keys, _logins, _sessions = (
    table.c for table in (schema.devices, schema.device_keys, schema.logins, schema.sessions)
)


class LoginBatches:
    """`Sessions.admit`; to be started and stopped."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batcher: Batcher[_Item, Admission] = Batcher(self._flush, batch=BATCH)

    def start(self) -> None:
        self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def admit(self, attempt: Attempt, limits: Limits) -> Admission:
        return await self._batcher.submit((attempt, limits))

    async def _flush(self, items: Sequence[_Item]) -> Sequence[Admission | Exception]:
        return await self._database.write(lambda connection: _decided(connection, items))


def _decided(connection: sa.Connection, items: Sequence[_Item]) -> list[Admission]:
    before = _known(connection, [attempt for attempt, _ in items])
    known: dict[DeviceId, Known | None] = dict(before)
    answers, keys = [], {}
    for attempt, limits in items:
        known[attempt.device], answer = admission.decide(known.get(attempt.device), attempt, limits)
        if answer.refusal is None:
            keys[attempt.kid] = attempt.at
        answers.append(answer)
    if keys:
        _KEY_USED.run(connection, [{"key": kid, "last_used": at} for kid, at in sorted(keys.items())])
    changed = {device: after for device, after in known.items() if after is not None and after != before[device]}
    uses = [
        {"of": device, "use": key, "admitted_at": use.admitted_at, "repeated_at": use.repeated_at}
        for device, after in changed.items()
        for key, use in after.uses.items()
        if use != before[device].uses.get(key)
    ]
    if uses:
        _LET_IN.run(connection, uses)
    if saved := {device: after.guard for device, after in changed.items() if after.guard != before[device].guard}:
        guards.save(connection, saved)
    return answers


def _known(connection: sa.Connection, attempts: Sequence[Attempt]) -> dict[DeviceId, Known]:
    """Of the devices that exist, whose rows are locked from now on. That the tokens were used is recorded first."""
    devices = sorted({attempt.device for attempt in attempts})
    enabled = {DeviceId(device): bool(is_) for device, is_ in _LOCK(connection, devices)}
    there = sorted(enabled)
    if not there:
        return {}
    keys: dict[DeviceId, set[str]] = {device: set() for device in there}
    uses: dict[DeviceId, dict[str, Use]] = {device: {} for device in there}
    live: set[DeviceId] = set()
    seen: dict[DeviceId, Micros] = {}
    for device, kid in _KEYS_OF(connection, there):
        keys[device].add(kid)
    _record(connection, [each for each in attempts if each.kid in keys.get(each.device, ())])
    for device, key, *use in _USES_OF(connection, there, since=min(attempt.at for attempt in attempts)):
        uses[device][key] = Use(*use)
    for device, seen_at, replaced_at, ended_at in _SESSIONS_OF(connection, there):
        seen[device] = max(seen_at, seen.get(device, 0))
        if ended_at is None and replaced_at is None:
            live.add(device)
    guarded = guards.read(connection, there)
    return {
        device: Known(enabled[device], keys[device], uses[device], device in live, seen.get(device), guarded[device])
        for device in there
    }


def _record(connection: sa.Connection, attempts: Sequence[Attempt]) -> None:
    if not attempts:
        return
    used = [
        {"device": it.device, "jti_hash": it.use, "first_use": it.at, "last_use": it.at, "expires_at": it.expires}
        for it in sorted(attempts, key=lambda it: (it.device, it.use))
    ]
    _USED[connection.dialect.name].run(connection, used)
    _PRUNE.run(connection, [{"now": max(attempt.at for attempt in attempts)}])


def _used_statement(insert: Any) -> Prepared:  # the two dialects' inserts have no common type
    new = insert(schema.logins)
    last = {"last_use": new.excluded.last_use}
    return Prepared(new.on_conflict_do_update(index_elements=["device", "jti_hash"], set_=last))


_LOCK = Among(sa.select(_devices.id, _devices.enabled).order_by(_devices.id).with_for_update(), _devices.id)
_KEYS_OF = Among(sa.select(_keys.device, _keys.kid).where(_keys.retired_at.is_(None)), _keys.device)
# Those that let the device in, and those just recorded: of what was refused there may be any number.
_USES_OF = Among(
    sa.select(_logins.device, _logins.jti_hash, *(_logins[each.name] for each in fields(Use))).where(
        sa.or_(_logins.admitted_at.is_not(None), _logins.last_use >= sa.bindparam("since"))
    ),
    _logins.device,
)
_SESSIONS_OF = Among(
    sa.select(_sessions.device, _sessions.seen_at, _sessions.replaced_at, _sessions.ended_at), _sessions.device
)
_USED = {name: _used_statement(insert) for name, insert in INSERTS.items()}
_LET_IN = Prepared(
    sa.update(schema.logins).where(_logins.device == sa.bindparam("of"), _logins.jti_hash == sa.bindparam("use"))
)
_KEY_USED = Prepared(sa.update(schema.device_keys).where(_keys.kid == sa.bindparam("key")))
_PRUNE = Prepared(
    sa.delete(schema.logins).where(
        sa.tuple_(_logins.device, _logins.jti_hash).in_(
            sa.select(_logins.device, _logins.jti_hash)
            .where(_logins.expires_at < sa.bindparam("now"))
            .limit(sa.literal_column(str(_PRUNED)))
            .with_for_update(skip_locked=True)
        )
    )
)
