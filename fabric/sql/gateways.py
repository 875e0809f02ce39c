"""The port `Gateways` on SQL: a lease for each gateway that serves."""

from typing import Any

import sqlalchemy as sa

from fabric.command import Micros
from fabric.sql import schema
from fabric.sql.engine import Database
from fabric.sql.identity import INSERTS
from fabric.sql.prepared import Prepared

_gateways = schema.gateways.c


class SqlGateways:
    """The gateways of one fabric."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def renew(self, id: str, now: Micros, lease: Micros) -> None:
        def renew(connection: sa.Connection) -> None:
            _FORGET.run(connection, [{"now": now}])
            _RENEW[connection.dialect.name].run(connection, [{"id": id, "until": now + lease}])

        await self._database.write(renew, durable=False)  # lost in a crash, it is said again

    async def leave(self, id: str) -> None:
        await self._database.write(lambda connection: _LEAVE.run(connection, [{"of": id}]), durable=False)

    async def live(self, now: Micros) -> list[str]:
        found = await self._database.read(lambda connection: _LIVE.all(connection, {"now": now}))
        return [id for (id,) in found]


def _renew_statement(insert: Any) -> Prepared:
    new = insert(schema.gateways)
    return Prepared(new.on_conflict_do_update(index_elements=["id"], set_={"until": new.excluded.until}))


_RENEW = {name: _renew_statement(insert) for name, insert in INSERTS.items()}
_LEAVE = Prepared(sa.delete(schema.gateways).where(_gateways.id == sa.bindparam("of")))
_FORGET = Prepared(sa.delete(schema.gateways).where(_gateways.until <= sa.bindparam("now")))
_LIVE = Prepared(sa.select(_gateways.id).where(_gateways.until > sa.bindparam("now")))
