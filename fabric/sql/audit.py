"""The port `Audit` on SQL, and the one statement that everything else records its deeds with."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa

from fabric.audit import Action, By, Deed, Entry, Kind, acting
from fabric.command import Micros
from fabric.model import Device
from fabric.sql import rows, schema
from fabric.sql.engine import Database
from fabric.sql.prepared import Prepared
from topology.names import DeviceId

_audit = schema.audit.c
INSERT: Final = Prepared(sa.insert(schema.audit).inline())


def row(by: By, deed: Deed, at: Micros) -> rows.Row:
    if deed.itself:
        by = replace(by, kind=Kind.DEVICE, subject=deed.device)
    return {
        "at": at,
        "kind": by.kind.value,
        "subject": by.subject,
        "issuer": by.issuer,
        "jti": by.jti,
        "address": by.address,
        "request": by.request,
        "action": deed.action.value,
        "device": deed.device,
        "outcome": deed.outcome,
        "detail": rows.as_json(deed.detail),
    }


def record(connection: sa.Connection, by: By, deed: Deed, at: Micros) -> None:
    """To be called in the transaction of what was done."""
    INSERT.run(connection, [row(by, deed, at)])


def updated(known: Device, changed: Device) -> Deed:
    """The deed of a patch: the names of what it changed, and of labels without their values."""
    action = Action.DEVICE_UPDATED
    if known.enabled != changed.enabled:
        action = Action.DEVICE_RESUMED if changed.enabled else Action.DEVICE_SUSPENDED
    labels = sorted(
        name for name in {*known.labels, *changed.labels} if known.labels.get(name) != changed.labels.get(name)
    )
    found = {
        "joined": sorted({*changed.groups} - {*known.groups}),
        "left": sorted({*known.groups} - {*changed.groups}),
        "labels": labels,
        "backlog": [] if known.backlog == changed.backlog else [known.backlog, changed.backlog],
    }
    return Deed(action, known.id, {name: value for name, value in found.items() if value})


class SqlAudit:
    """Args:
    clock: the time in microseconds on the database's clock, as `fabric.clock.Clock` keeps it.
    """

    def __init__(self, database: Database, clock: Callable[[], Micros]) -> None:
        self._database, self._clock = database, clock

    async def record(self, deed: Deed) -> None:
        by = acting()
        await self._database.write(lambda connection: record(connection, by, deed, self._clock()))

    async def entries(
        self,
        *,
        device: DeviceId | None = None,
        subject: str | None = None,
        action: Action | None = None,
        since: Micros | None = None,
        until: Micros | None = None,
        after: tuple[Micros, int] | None = None,
        limit: int = 100,
    ) -> list[Entry]:
        query = sa.select(schema.audit).order_by(_audit.at.desc(), _audit.position.desc()).limit(limit)
        if device is not None:
            query = query.where(_audit.device == device)
        if subject is not None:
            query = query.where(_audit.subject == subject)
        if action is not None:
            query = query.where(_audit.action == action.value)
        if since is not None:
            query = query.where(_audit.at >= since)
        if until is not None:
            query = query.where(_audit.at < until)
        if after is not None:
            query = query.where(sa.tuple_(_audit.at, _audit.position) < sa.tuple_(*map(sa.literal, after)))
        return await self._database.read(lambda connection: list(map(_entry, connection.execute(query))))

    async def prune(self, before: Micros, limit: int) -> bool:
        def prune(connection: sa.Connection) -> bool:
            old = connection.execute(_OLD, {"before": before, "limit": limit}).scalars().all()
            if old:
                connection.execute(sa.delete(schema.audit).where(_audit.position.in_(old)))
            return len(old) == limit

        # Forgotten in a crash, it is done again.
        return await self._database.write(prune, durable=False)


def _entry(found: "sa.Row[Any]") -> Entry:
    by = By(Kind(found.kind), found.subject, found.issuer, found.jti, found.address, found.request)
    device = None if found.device is None else DeviceId(found.device)
    return Entry(
        found.position, found.at, by, Deed(Action(found.action), device, json.loads(found.detail), found.outcome)
    )


_OLD = (
    sa.select(_audit.position)
    .where(_audit.at < sa.bindparam("before"))
    .order_by(_audit.at)
    .limit(sa.bindparam("limit", type_=sa.Integer()))
    .with_for_update(skip_locked=True)
)
