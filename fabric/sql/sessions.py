"""The port `Sessions` on SQL: connections of devices, and the guard of their logins.

Each transaction locks the rows of its devices first, in the order of their ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from fabric.command import Micros
from fabric.identity import admission
from fabric.identity.admission import Admission, Guard
from fabric.identity.meters import Limits, Meter
from fabric.model import DomainEvent
from fabric.presence import Change, Closed, Session, fold
from fabric.sql import rows, schema
from fabric.sql.engine import Database
from fabric.sql.fold import INSERT_EVENTS
from fabric.sql.identity import INSERTS, jti_hash
from fabric.sql.prepared import Among, Prepared
from topology.names import DeviceId

_sessions = schema.sessions.c
_logins = schema.logins.c
_devices = schema.devices.c
_guards = schema.guards.c


class SqlSessions:
    """Sessions and guards of one fabric. Records `device.connected`, `.disconnected`, `.contested`, `.throttled`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def apply(self, changes: Sequence[Change]) -> Mapping[DeviceId, int]:
        def apply(connection: sa.Connection) -> Mapping[DeviceId, int]:
            named = sorted({it.name if isinstance(it, Closed) else it.session.name for it in changes})
            wanted = {device for (device,) in _DEVICES_OF(connection, named)}
            wanted |= {it.session.device for it in changes if not isinstance(it, Closed)}
            if not wanted:
                return {}
            connected = {id: bool(was) for id, was in _LOCK_DEVICES(connection, sorted(wanted))}
            if not connected:
                return {}
            known = {_session(row) for row in _LIVE_OF(connection, sorted(connected))}
            known |= {_session(row) for row in _NAMED(connection, named)}
            folded = fold(connected, known, changes)
            if folded.fresh:
                _INSERT.run(connection, [_row(session) for session in folded.fresh])
            if folded.changed:
                _UPDATE.run(connection, [_changed(session) for session in folded.changed])
            if folded.presence:
                _PRESENCE.run(
                    connection,
                    [{"of": id, "connected": is_, "connection_since": at} for id, (is_, at) in folded.presence.items()],
                )
            if folded.events:
                INSERT_EVENTS.run(connection, [rows.domain_event(event, 0) for event in folded.events])
            return folded.live

        return await self._database.write(apply) if changes else {}

    async def live(self, cell: str) -> list[Session]:
        found = await self._database.read(lambda connection: _LIVE.all(connection, {"cell": cell}))
        return [_session(row) for row in found]

    async def forget(self, ended_before: Micros) -> None:
        await self._database.write(lambda connection: _FORGET.run(connection, [{"before": ended_before}]))

    async def admit(self, device: DeviceId, jti: str, now: Micros, limits: Limits) -> Admission:
        hashed = jti_hash(jti)

        def admit(connection: sa.Connection) -> Admission:
            own = {"of": device, "jti": hashed}
            locked = _LOCK_DEVICES(connection, [device])
            login = _LOGIN.first(connection, own)
            if not locked or login is None:
                return Admission("the device is gone")
            admitted_at, repeated_at = login
            if admission.is_repeated(admitted_at, repeated_at, now):
                _MARK_LOGIN.run(connection, [{**own, "repeated_at": now}])
                return Admission()
            live = any(_session(row).replaced_at is None for row in _LIVE_OF(connection, [device]))
            unseen_since = _unseen_since(connection, device, hashed)
            before = _guard(connection, device)
            guard, answer = admission.admit(before, now, limits, live=live, unseen_since=unseen_since)
            if answer.refusal is None:
                _save(connection, device, guard)
                _MARK_LOGIN.run(connection, [{**own, "admitted_at": now, "repeated_at": None}])
            return answer

        return await self._database.write(admit)

    async def took_over(self, device: DeviceId, now: Micros, limits: Limits) -> bool:
        def take_over(connection: sa.Connection) -> bool:
            if not _LOCK_DEVICES(connection, [device]):
                return False
            _REPLACED.run(connection, [{"of": device, "before": now, "replaced_at": now}])
            guard, contested = admission.taken_over(_guard(connection, device), now, limits)
            _save(connection, device, guard)
            if contested:
                detail = {"takeovers": limits.takeovers, "refused_for": admission.CONTESTED_FOR / 1_000_000}
                event = DomainEvent("device.contested", device, now, detail)
                INSERT_EVENTS.run(connection, [rows.domain_event(event, 0)])
            return contested

        return await self._database.write(take_over)

    async def throttle(self, device: DeviceId, exceeded: Meter, now: Micros) -> Micros | None:
        def throttle(connection: sa.Connection) -> Micros | None:
            if not _LOCK_DEVICES(connection, [device]):
                return None
            guard = admission.throttle(_guard(connection, device), now)
            if guard is None:
                return None
            _save(connection, device, guard)
            span = guard.throttled_until - now
            detail = {"exceeded": exceeded.value, "refused_for": span / 1_000_000}
            event = DomainEvent("device.throttled", device, now, detail)
            INSERT_EVENTS.run(connection, [rows.domain_event(event, 0)])
            return span

        return await self._database.write(throttle)


# ---- Steps of transactions ---------------------------------------------------------------------------


def _unseen_since(connection: sa.Connection, device: DeviceId, jti: str) -> Micros | None:
    """When the last login of the device, other than this one, was let in, if no session has been seen since."""
    ((admitted_at, seen_at),) = _UNSEEN.all(connection, {"of": device, "jti": jti})
    return admitted_at if admitted_at is not None and (seen_at is None or seen_at < admitted_at) else None


def _guard(connection: sa.Connection, device: DeviceId) -> Guard:
    row = _GUARD.first(connection, {"of": device})
    if row is None:
        return Guard()
    full_at, takeovers, contested_until, throttled_until, strikes = row
    return Guard(full_at, tuple(json.loads(takeovers)), contested_until, throttled_until, strikes)


def _save(connection: sa.Connection, device: DeviceId, guard: Guard) -> None:
    row = {"device": device, **{each.name: getattr(guard, each.name) for each in fields(Guard)}}
    row["takeovers"] = json.dumps(guard.takeovers)
    _SAVE[connection.dialect.name].run(connection, [row])


def _session(row: Sequence[Any]) -> Session:
    node, name, opened_at, device, cell, pid, seen_at, replaced_at, ended_at = row
    return Session(DeviceId(device), cell, node, name, opened_at, pid, seen_at, replaced_at, ended_at)


def _row(session: Session) -> rows.Row:
    return {each.name: getattr(session, each.name) for each in fields(Session)}


def _changed(session: Session) -> rows.Row:
    epoch = {"in_node": session.node, "called": session.name, "since": session.opened_at}
    return {**epoch, "pid": session.pid, "replaced_at": session.replaced_at, "ended_at": session.ended_at}


def _save_statement(insert: Any) -> Prepared:
    new = insert(schema.guards)
    set_ = {each.name: new.excluded[each.name] for each in fields(Guard)}
    return Prepared(new.on_conflict_do_update(index_elements=["device"], set_=set_))


_SAVE = {name: _save_statement(insert) for name, insert in INSERTS.items()}
_GUARD = Prepared(
    sa.select(
        _guards.logins_full_at, _guards.takeovers, _guards.contested_until, _guards.throttled_until, _guards.strikes
    ).where(_guards.device == sa.bindparam("of"))
)
_LOCK_DEVICES = Among(sa.select(_devices.id, _devices.connected).order_by(_devices.id).with_for_update(), _devices.id)
_PRESENCE = Prepared(sa.update(schema.devices).where(_devices.id == sa.bindparam("of")))

_DEVICES_OF = Among(sa.select(_sessions.device).distinct(), _sessions.name)
_SELECT = sa.select(*schema.sessions.c)
_NAMED = Among(_SELECT, _sessions.name)
_LIVE_OF = Among(_SELECT.where(_sessions.ended_at.is_(None)), _sessions.device)
_LIVE = Prepared(_SELECT.where(_sessions.cell == sa.bindparam("cell"), _sessions.ended_at.is_(None)))
_INSERT = Prepared(sa.insert(schema.sessions).inline())
_UPDATE = Prepared(
    sa.update(schema.sessions).where(
        _sessions.node == sa.bindparam("in_node"),
        _sessions.name == sa.bindparam("called"),
        _sessions.opened_at == sa.bindparam("since"),
    )
)
_REPLACED = Prepared(
    sa.update(schema.sessions).where(
        _sessions.device == sa.bindparam("of"),
        _sessions.ended_at.is_(None),
        _sessions.replaced_at.is_(None),
        _sessions.seen_at <= sa.bindparam("before"),
    )
)
_FORGET = Prepared(sa.delete(schema.sessions).where(_sessions.ended_at < sa.bindparam("before")))

_OWN = (_logins.device == sa.bindparam("of"), _logins.jti_hash == sa.bindparam("jti"))
_LOGIN = Prepared(sa.select(_logins.admitted_at, _logins.repeated_at).where(*_OWN))
_MARK_LOGIN = Prepared(sa.update(schema.logins).where(*_OWN))
_UNSEEN = Prepared(
    sa.select(
        sa.select(sa.func.max(_logins.admitted_at))
        .where(_logins.device == sa.bindparam("of"), _logins.jti_hash != sa.bindparam("jti"))
        .scalar_subquery(),
        sa.select(sa.func.max(_sessions.seen_at)).where(_sessions.device == sa.bindparam("of")).scalar_subquery(),
    )
)
