"""The port `Sessions` on SQL: connections of devices, and the guard of their logins.

Each transaction locks the rows of its devices first, in the order of their ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from fabric.command import Micros
from fabric.identity import admission
from fabric.identity.admission import Admission, Attempt
from fabric.identity.meters import Limits, Meter
from fabric.model import DomainEvent
from fabric.presence import Change, Closed, Session, fold
from fabric.sql import guards, rows, schema
from fabric.sql.engine import Database
from fabric.sql.fold import INSERT_EVENTS
from fabric.sql.logins import LoginBatches
from fabric.sql.prepared import Among, Prepared
from topology.names import DeviceId

_sessions = schema.sessions.c
_devices = schema.devices.c


class SqlSessions:
    """Sessions and guards of one fabric. Records `device.connected`, `.disconnected`, `.contested`, `.throttled`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._logins = LoginBatches(database)

    def start(self) -> None:
        self._logins.start()

    async def close(self) -> None:
        """Answer the logins that wait. Closing twice is closing once."""
        await self._logins.stop()

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

    async def admit(self, attempt: Attempt, limits: Limits) -> Admission:
        return await self._logins.admit(attempt, limits)

    async def took_over(self, device: DeviceId, now: Micros, limits: Limits) -> bool:
        def take_over(connection: sa.Connection) -> bool:
            if not _LOCK_DEVICES(connection, [device]):
                return False
            _REPLACED.run(connection, [{"of": device, "before": now, "replaced_at": now}])
            before = guards.read(connection, [device])[device]
            guard, contested = admission.taken_over(before, now, limits)
            guards.save(connection, {device: guard})
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
            guard = admission.throttle(guards.read(connection, [device])[device], now)
            if guard is None:
                return None
            guards.save(connection, {device: guard})
            span = guard.throttled_until - now
            detail = {"exceeded": exceeded.value, "refused_for": span / 1_000_000}
            event = DomainEvent("device.throttled", device, now, detail)
            INSERT_EVENTS.run(connection, [rows.domain_event(event, 0)])
            return span

        return await self._database.write(throttle)


# ---- Steps of transactions ---------------------------------------------------------------------------


def _session(row: Sequence[Any]) -> Session:
    node, name, opened_at, device, cell, pid, seen_at, replaced_at, ended_at = row
    return Session(DeviceId(device), cell, node, name, opened_at, pid, seen_at, replaced_at, ended_at)


def _row(session: Session) -> rows.Row:
    return {each.name: getattr(session, each.name) for each in fields(Session)}


def _changed(session: Session) -> rows.Row:
    epoch = {"in_node": session.node, "called": session.name, "since": session.opened_at}
    return {**epoch, "pid": session.pid, "replaced_at": session.replaced_at, "ended_at": session.ended_at}


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
