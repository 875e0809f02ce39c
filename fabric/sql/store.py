"""The ledger, the registry, the sessions, the retention and the audit of one database, opened and closed together."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from fabric.clock import MEASURE_EVERY, Clock
from fabric.errors import Temporary
from fabric.identity.revocation_log import RevocationLog
from fabric.sql.audit import SqlAudit
from fabric.sql.engine import Database
from fabric.sql.figures import SqlFigures
from fabric.sql.gateways import SqlGateways
from fabric.sql.ledger import SqlLedger
from fabric.sql.migrate import check_current
from fabric.sql.registry import SqlRegistry
from fabric.sql.replay import replay
from fabric.sql.retention import SqlRetention
from fabric.sql.revocations import SqlRevocations
from fabric.sql.sessions import SqlSessions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """`clock` is the fabric's clock: this database's, measured again every half a minute."""

    ledger: SqlLedger
    registry: SqlRegistry
    sessions: SqlSessions
    gateways: SqlGateways
    retention: SqlRetention
    audit: SqlAudit
    revocations: SqlRevocations
    figures: SqlFigures
    clock: Clock
    _database: Database
    _measuring: asyncio.Task[None]

    async def close(self) -> None:
        """Commit what was submitted, then disconnect. Closing twice is closing once."""
        await self.ledger.close()
        await self.registry.close()
        await self.sessions.close()
        self._measuring.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._measuring
        await self._database.close()


async def open_store(url: str, revocation_log: RevocationLog | None = None) -> Store:
    """Connect to a migrated database, and take away again what the log says and a restored database does not know.

    Args:
        revocation_log: None in a program that lets nobody in and takes nothing away.

    Raises:
        LogRefused: the log is not as it must be.
        Invalid: a database that is not supported.
        SchemaOutdated: `restante migrate` must be run first.
        LedgerUnavailable: it does not answer.
    """
    await asyncio.to_thread(check_current, url)
    database = Database(url)
    clock = Clock(database.time_offset)
    try:
        await clock.synchronize()
        if revocation_log is not None:
            await replay(database, revocation_log, clock.now)
    except BaseException:
        await database.close()
        raise
    ledger = SqlLedger(database, clock.now)
    ledger.start()
    measuring = asyncio.create_task(_keep_time(clock), name="database-clock")
    revocations = SqlRevocations(database, revocation_log)
    registry, retention = SqlRegistry(database, clock.now, revocations), SqlRetention(database, clock.now)
    audit = SqlAudit(database, clock.now)
    sessions, gateways = SqlSessions(database), SqlGateways(database)
    registry.start()
    sessions.start()
    figures = SqlFigures(database, clock.now)
    return Store(
        ledger, registry, sessions, gateways, retention, audit, revocations, figures, clock, database, measuring
    )


async def _keep_time(clock: Clock) -> None:
    while True:
        await asyncio.sleep(MEASURE_EVERY)
        try:
            await clock.synchronize()
        except Temporary as error:
            log.debug("clock.unmeasured error=%s", error)
