"""`restante worker`: consumes what devices say, runs the clocks, and publishes the event log."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import uvloop

from api import logs
from api.operator import certificates, figures, internal, rings, succession, wiring
from api.operator.beat import beat
from api.operator.knocker import Knocker
from api.operator.secrets import account_password
from api.operator.setup import Files
from api.operator.sockets import own_address
from api.settings import Settings
from fabric.amqp.connection import Link
from fabric.amqp.consumer import Consumer
from fabric.errors import Temporary
from fabric.guarding import HANDS, FloodGuard
from fabric.identity.revocation_log import RevocationLog
from fabric.mail import Postman, Republisher
from fabric.management import ManagementClient
from fabric.ports import Ledger
from fabric.sql import open_store
from fabric.uplink import Inbox
from fabric.worker.claims import Claims
from fabric.worker.clocks import Deadlines, Reconciler, Sequencer, keep_running
from fabric.worker.closing import CloseRequests, Closures
from fabric.worker.gate import LOOK_EVERY, Gate
from fabric.worker.reports import DeadLetters, Recorder, Reports
from fabric.worker.retention import Pruner
from fabric.worker.sessions import Presence, SessionEvents
from topology import access, names

log = logging.getLogger(__name__)

_POLL = 0.1  # seconds between looks at what else waits in the ledger
_RETRYING = 0.25  # seconds between looks at what must be published again: half a second after a nack, at first
_LOGGING = 1.0  # seconds: for what a gateway could not write itself
_PRUNING = 10.0  # seconds: nobody waits for it
_DAY = 86_400_000_000  # microseconds
_PREFETCH = 200
_PREFETCH_RETURNED = 20  # they come in bursts, and must not stand in the way of the clocks that have said it already


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    gc.freeze()  # what is imported stays: collections need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = await open_store(settings.database, RevocationLog(settings.revocations))
    broker = wiring.broker(settings, access.WORKER)
    admin = ManagementClient(settings.management_url, access.ADMIN, account_password(settings.state_dir, access.ADMIN))
    knocker = Knocker(broker.publishing, stopping.set)
    came_back = asyncio.Event()

    async def prepare(link: Link) -> None:
        await wiring.prepare(link, store.ledger, admin, settings)
        came_back.set()

    broker.publishing.on_connect(prepare)
    # There is nothing to consume before the topology is declared.
    broker.consuming.on_connect(lambda _: broker.publishing.ready())
    ledger, registry, clock, publisher = store.ledger, store.registry, store.clock, broker.publisher
    recorder = Recorder(ledger, publisher)
    republisher = Republisher(ledger, Postman(ledger, publisher, clock), clock)
    flood = FloodGuard(settings.limits, store.sessions, admin.close_connections, clock)
    inbox = Inbox(names.REPORTS, ledger, clock, flood)
    gate = Gate(
        lambda: publisher.depth(names.REPORTS), lambda: inbox.refused["flood"], broker.consuming.connected.is_set
    )
    keys = rings.Watch(Files(settings.state_dir).command_keys, clock, private=False)
    trusted = succession.Watch(Files(settings.state_dir).authorities)
    claiming, returned = (Inbox(queue, ledger, clock, flood) for queue in (names.CLAIMS, names.RETURNED))
    claims = Claims(claiming, recorder, registry, publisher, clock, keys.keys, trusted.authorities)
    dead = DeadLetters(returned, recorder, gate.is_open)
    closures = Closures(registry, admin)
    sessions = SessionEvents(settings.cell, store.sessions, flood, clock)
    consumers = [
        Consumer(
            broker.consuming,
            names.REPORTS,
            Reports(inbox, recorder, gate.handled).on_delivery,
            prefetch=_PREFETCH,
            on_start=gate.started,
        ),
        Consumer(broker.consuming, names.CLAIMS, claims.on_delivery, prefetch=_PREFETCH),
        Consumer(broker.consuming, names.RETURNED, dead.on_delivery, prefetch=_PREFETCH_RETURNED),
        Consumer(broker.consuming, names.CLOSURES, CloseRequests(admin, publisher).on_delivery, prefetch=_PREFETCH),
        Consumer(broker.consuming, names.SESSIONS, sessions.on_delivery, prefetch=_PREFETCH, on_start=sessions.started),
    ]
    owner = f"{socket.gethostname()}:{os.getpid()}"
    sequencer = Sequencer(owner, ledger, publisher)

    ready = partial(_ready, broker, ledger, keys)
    everywhere = figures.Everywhere(settings.state_dir, ready, ledger.lives, publisher, flood)
    inside = internal.Listener(
        figures.of_worker(everywhere, store.figures, (inbox, claiming, returned), recorder, closures, gate.is_open),
        own_address(settings.worker_host),
        settings.worker_port,
        internal.health(ready),
    )
    passes = {
        "gate": (LOOK_EVERY, gate.look),
        "deadlines": (0.0, Deadlines(ledger, recorder, clock, gate).run_once),
        "republisher": (_RETRYING, republisher.run_once),
        "sequencer": (_POLL, sequencer.run_once),
        "events": (0.0, sequencer.publish_once),
        "closures": (_POLL, closures.run_once),
        **{f"flood-guard-{hand}": (0.0, flood.run_once) for hand in range(HANDS)},
        "sessions": (0.0, sessions.run_once),
        "presence": (0.0, Presence(settings.cell, store.sessions, sessions.lives, admin, flood, clock).run_once),
        "revocation-log": (_LOGGING, store.revocations.flush),
        "signing-keys": (rings.READ_EVERY, keys.look),
        "authorities": (rings.READ_EVERY, trusted.look),
        "certificates": (certificates.WARN_EVERY, lambda: certificates.warn(settings.state_dir)),
        "doors": (0.0, knocker.run_once),
        "retention": (
            _PRUNING,
            Pruner(
                store.retention, store.audit, clock, settings.retention * _DAY, settings.audit_retention * _DAY
            ).run_once,
        ),
    }
    try:
        await broker.start()
        for consumer in consumers:
            await consumer.start()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep_running(name, every, once)) for name, (every, once) in passes.items()]
            reconciling = _reconcile(came_back, Reconciler(settings.cell, ledger, publisher, republisher))
            tasks += map(group.create_task, (reconciling, beat(settings.ready_file, ready)))
            group.create_task(inside.run())
            log.info("worker.started owner=%s", owner)
            await stopping.wait()
            log.info("worker.stopping")
            inside.stop()
            for task in tasks:
                task.cancel()
        with suppress(Temporary):
            await sequencer.leave()
    finally:
        for stop in (*(consumer.stop for consumer in consumers), broker.stop, admin.close, store.close):
            await stop()
    return int(knocker.refused)


async def _ready(broker: wiring.Broker, ledger: Ledger, keys: rings.Watch) -> Mapping[str, str]:
    """What it lacks to do its work, each with its reason."""
    problems = broker.problems()
    try:
        await ledger.incarnation()
    except Temporary as error:
        log.debug("ready.ledger error=%s", error)
        problems["ledger"] = "not answering"
    if keys.problem:
        problems["signing-keys"] = "can't be read"
    return problems


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
