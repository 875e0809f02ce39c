"""`restante rebuild`: a broker that lost its disk gets back from the ledger what it held."""

import asyncio
from collections.abc import Callable

from api import logs
from api.operator import wiring
from api.operator.progress import Progress
from api.operator.secrets import account_password
from api.settings import Settings
from fabric.audit import Action, Deed
from fabric.identity.revocation_log import RevocationLog
from fabric.mail import Postman, Republisher
from fabric.management import ManagementClient
from fabric.sql import open_store, renew_incarnation
from fabric.worker.rebuild import Rebuild, Rebuilt
from topology import access

BROKER_PATIENCE = 120.0  # seconds for the broker to answer and to take the topology

Log = Callable[[str], None]


def run(settings: Settings, log: Log) -> Rebuilt:
    """Rebuild the broker of this cell. Safe at any time, also again after it was interrupted.

    Raises:
        fabric.errors.FabricError: one sentence: the broker or the database is away, or refuses.
    """
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    return asyncio.run(_rebuild(settings, log))


async def _rebuild(settings: Settings, log: Log) -> Rebuilt:
    store = await open_store(settings.database, RevocationLog(settings.revocations))
    broker = wiring.broker(settings, access.WORKER)
    admin = ManagementClient(settings.management_url, access.ADMIN, account_password(settings.state_dir, access.ADMIN))
    broker.publishing.on_connect(lambda link: wiring.prepare(link, store.ledger, admin, settings))
    rebuild = Rebuild(
        settings.cell,
        store.ledger,
        store.registry,
        broker.publisher,
        admin,
        Republisher(store.ledger, Postman(store.ledger, broker.publisher, store.clock), store.clock),
        store.clock,
        lambda: asyncio.to_thread(renew_incarnation, settings.database),
        Progress(log),
    )
    try:
        await store.audit.record(Deed(Action.BROKER_REBUILT, detail={"cell": settings.cell}))
        await broker.publishing.start()
        await broker.publishing.ready(BROKER_PATIENCE)
        return await rebuild.run()
    finally:
        await broker.stop()
        await admin.close()
        await store.close()
