"""`restante worker`: consumes what devices say, runs the clocks, and publishes the event log."""

import asyncio
import gc
import logging
import os
import signal
import socket

import uvloop

from api import logs
from api.operator import wiring
from api.operator.secrets import account_password
from api.settings import Settings
from fabric.amqp.connection import Link
from fabric.amqp.consumer import Consumer
from fabric.amqp.declarer import declare_topology
from fabric.amqp.mending import mend_streams
from fabric.mail import Postman, Republisher
from fabric.management import ManagementClient
from fabric.sql import open_store
from fabric.uplink import Inbox
from fabric.worker.claims import Claims
from fabric.worker.clocks import Closures, Deadlines, Presence, Reconciler, Sequencer, keep_running
from fabric.worker.gate import LOOK_EVERY, Gate
from fabric.worker.reports import DeadLetters, Recorder, Reports
from topology import access, layout, names

log = logging.getLogger(__name__)

_TICK = 0.05  # seconds between looks at the deadlines
_POLL = 0.1  # seconds between looks at what else waits in the ledger
_PRESENCE = 5.0  # seconds: the broker's statistics are no fresher
_PREFETCH = 200


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    logs.configure(settings.log_level)
    gc.freeze()  # what is imported stays: collections need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = await open_store(settings.database)
    broker = wiring.broker(settings, access.WORKER)
    admin = ManagementClient(settings.management_url, access.ADMIN, account_password(settings.state_dir, access.ADMIN))
    came_back = asyncio.Event()

    async def prepare(link: Link) -> None:
        await declare_topology(link)
        await mend_streams(link)
        for policy in layout.POLICIES:
            await admin.put_policy(policy)
        came_back.set()

    broker.publishing.on_connect(prepare)
    # There is nothing to consume before the topology is declared.
    broker.consuming.on_connect(lambda _: broker.publishing.ready())
    ledger, registry, clock, publisher = store.ledger, store.registry, store.clock, broker.publisher
    recorder = Recorder(ledger, publisher)
    republisher = Republisher(ledger, Postman(ledger, publisher, clock), clock)
    gate = Gate(lambda: publisher.depth(names.REPORTS), broker.consuming.connected.is_set)
    reports = Reports(Inbox(names.REPORTS, ledger, clock), recorder, gate.handled)
    claims = Claims(Inbox(names.CLAIMS, ledger, clock), recorder, ledger, registry, publisher, clock)
    dead = DeadLetters(Inbox(names.RETURNED, ledger, clock), recorder, gate.is_open)
    consumers = [
        Consumer(broker.consuming, names.REPORTS, reports.on_delivery, prefetch=_PREFETCH, on_start=gate.started),
        Consumer(broker.consuming, names.CLAIMS, claims.on_delivery, prefetch=_PREFETCH),
        Consumer(broker.consuming, names.RETURNED, dead.on_delivery, prefetch=_PREFETCH),
    ]
    owner = f"{socket.gethostname()}:{os.getpid()}"
    reconciler = Reconciler(settings.cell, ledger, publisher, republisher)
    passes = {
        "gate": (LOOK_EVERY, gate.look),
        "deadlines": (_TICK, Deadlines(ledger, recorder, clock, gate).run_once),
        "republisher": (_POLL, republisher.run_once),
        "sequencer": (_POLL, Sequencer(owner, ledger, publisher).run_once),
        "closures": (_POLL, Closures(registry, admin).run_once),
        "presence": (_PRESENCE, Presence(registry, admin, clock).run_once),
    }
    try:
        await broker.start()
        for consumer in consumers:
            await consumer.start()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep_running(name, every, once)) for name, (every, once) in passes.items()]
            tasks.append(group.create_task(_reconcile(came_back, reconciler)))
            log.info("worker.started owner=%s", owner)
            await stopping.wait()
            log.info("worker.stopping")
            for task in tasks:
                task.cancel()
    finally:
        for consumer in consumers:
            await consumer.stop()
        await broker.stop()
        await admin.close()
        await store.close()


async def _reconcile(came_back: asyncio.Event, reconciler: Reconciler) -> None:
    """Compare the mailboxes with the ledger each time the broker has come back."""
    while True:
        await came_back.wait()
        came_back.clear()

        async def once() -> None:
            await reconciler.run_once()
            raise _Done

        try:
            await keep_running("reconciler", 0.0, once)
        except _Done:
            continue


class _Done(Exception):
    """One pass went through."""
