"""The ledger and the registry of one database, opened and closed together."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from fabric.clock import MEASURE_EVERY, Clock
from fabric.errors import Temporary
from fabric.sql.engine import Database
from fabric.sql.ledger import SqlLedger
from fabric.sql.migrate import check_current
from fabric.sql.registry import SqlRegistry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """`clock` is the fabric's clock: this database's, measured again every half a minute."""

    ledger: SqlLedger
    registry: SqlRegistry
    clock: Clock
    _database: Database
    _measuring: asyncio.Task[None]

    async def close(self) -> None:
        """Commit what was submitted, then disconnect. Closing twice is closing once."""
        await self.ledger.close()
        self._measuring.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._measuring
        await self._database.close()


async def open_store(url: str) -> Store:
    """Connect to a migrated database.

    Raises:
        Invalid: a database that is not supported.
        SchemaOutdated: `restante migrate` must be run first.
        LedgerUnavailable: it does not answer.
    """
    await asyncio.to_thread(check_current, url)
    database = Database(url)
    clock = Clock(database.time_offset)
    try:
        await clock.synchronize()
    except BaseException:
        await database.close()
        raise
    ledger = SqlLedger(database, clock.now)
    ledger.start()
    measuring = asyncio.create_task(_keep_time(clock), name="database-clock")
    return Store(ledger, SqlRegistry(database, clock.now), clock, database, measuring)


async def _keep_time(clock: Clock) -> None:
    while True:
        await asyncio.sleep(MEASURE_EVERY)
        try:
            await clock.synchronize()
        except Temporary as error:
            log.debug("clock.unmeasured error=%s", error)
