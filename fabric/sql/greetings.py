"""Devices that said hello, in batches: a fleet that comes back says it all at once."""

from collections.abc import Sequence
from typing import Final

import sqlalchemy as sa

from fabric.batch import Batcher
from fabric.command import Micros
from fabric.errors import LedgerUnavailable
from fabric.sql import rows, schema
from fabric.sql.engine import Database
from fabric.sql.prepared import Among, Prepared
from topology.names import DeviceId

SEEN_EVERY: Final = 10_000_000  # µs between two writes of a device's `last_seen`

_Item = tuple[DeviceId, Micros, str | None]  # the agent's version, if it told it

_devices, _meta = schema.devices.c, schema.meta.c


class Greetings:
    """`Registry.greet`; to be started and stopped."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batcher: Batcher[_Item, str] = Batcher(self._flush)

    def start(self) -> None:
        self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def greet(self, id: DeviceId, now: Micros, agent_version: str | None) -> str:
        return await self._batcher.submit((id, now, agent_version))

    async def _flush(self, items: Sequence[_Item]) -> Sequence[str | Exception]:
        incarnation, news = await self._database.read(lambda connection: _read(connection, items))
        if news:
            # Lost in a crash, it is said again.
            await self._database.write(lambda connection: _SAY.run(connection, news), durable=False)
        return [incarnation] * len(items)


def incarnation(connection: sa.Connection) -> str:
    """Raises `LedgerUnavailable`: there is none."""
    found = _INCARNATION.first(connection, {})
    if found is None:
        raise LedgerUnavailable("The database has no incarnation; run `restante migrate`.")
    return str(found[0])


def _read(connection: sa.Connection, items: Sequence[_Item]) -> tuple[str, list[rows.Row]]:
    """The incarnation, and what is worth writing, in the order of the devices' ids."""
    known = {id: (seen, version) for id, seen, version in _SEEN(connection, sorted({id for id, _, _ in items}))}
    news: dict[DeviceId, rows.Row] = {}
    for id, now, said in items:
        if id not in known:
            continue
        seen, kept = known[id]
        version = kept if said is None else said
        if seen is None or now - seen >= SEEN_EVERY or version != kept:
            known[id] = now, version
            news[id] = {"of": id, "last_seen": now, "agent_version": version}
    return incarnation(connection), [news[id] for id in sorted(news)]


_INCARNATION = Prepared(sa.select(_meta.value).where(_meta.name == "incarnation"))
_SEEN = Among(sa.select(_devices.id, _devices.last_seen, _devices.agent_version), _devices.id)
_SAY = Prepared(sa.update(schema.devices).where(_devices.id == sa.bindparam("of")))
