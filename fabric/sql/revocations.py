"""What was taken away, on its way into the revocation log.

It is committed with what takes it away, and then written to the log; so whatever is in the log is true, and a crash in
between leaves it here for the next process. A line that was written, and not removed here, is written twice: no harm.
"""

from typing import Final

import sqlalchemy as sa

from fabric.identity import revoked
from fabric.identity.revocation_log import RevocationLog
from fabric.identity.revoked import Revoked
from fabric.sql import schema
from fabric.sql.engine import Database
from fabric.sql.prepared import Prepared

BATCH: Final = 500  # lines in one transaction
MARK: Final = "revocation-log"  # in `meta`: how far the database has followed the log

_unlogged = schema.unlogged.c


def note(connection: sa.Connection, what: Revoked) -> None:
    """In the transaction that takes it away."""
    _NOTE.run(connection, [{"line": revoked.encode(what)}])


class SqlRevocations:
    """Writes to the log what was noted; without a log, that is left to other processes."""

    def __init__(self, database: Database, log: RevocationLog | None) -> None:
        self._database, self._log = database, log

    async def flush(self) -> None:
        """Return once all that was noted before is in the log.

        Raises:
            NotLogged: the log can't be written.
        """
        log = self._log
        while log is not None and await self._database.read(_any_waits):
            # Forgotten in a crash, it is written again.
            await self._database.write(lambda connection: _write_down(connection, log), durable=False)


def _any_waits(connection: sa.Connection) -> bool:
    return bool(_FIRST.all(connection, {}))


def _write_down(connection: sa.Connection, log: RevocationLog) -> None:
    waiting = _WAITING.all(connection, {})
    if waiting:
        log.append([line for _, line in waiting])
        _DONE.run(connection, [{"of": id} for id, _ in waiting])


_NOTE = Prepared(sa.insert(schema.unlogged).inline())
_FIRST = Prepared(sa.select(_unlogged.id).limit(1))
_WAITING = Prepared(sa.select(_unlogged.id, _unlogged.line).order_by(_unlogged.id).limit(BATCH).with_for_update())
_DONE = Prepared(sa.delete(schema.unlogged).where(_unlogged.id == sa.bindparam("of")))
