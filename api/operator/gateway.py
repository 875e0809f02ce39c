"""`restante gateway`: the HTTP API on its public listener, the broker's auth endpoint on an internal one."""

import asyncio
import gc
import logging
import secrets
import signal
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass

import uvicorn
import uvloop
from fastapi import FastAPI

from api import logs
from api.app import create_app
from api.broker_auth import BrokerAuth
from api.forwarded import BehindEdge
from api.lasting import Lasting
from api.operator import authority, certificates, figures, internal, rings, succession, wiring
from api.operator.beat import beat
from api.operator.listener import KEEP_ALIVE, PublicServer
from api.operator.secrets import secret
from api.operator.setup import Files
from api.operator.sockets import own_address
from api.paging import Cursors
from api.services import Peering, Services
from api.settings import Settings
from fabric import presenting
from fabric.amqp.consumer import wake_consumer
from fabric.amqp.streams import AmqpStreamReader
from fabric.clock import Clock
from fabric.closing import CLOSED, RemoteCloser
from fabric.commands import Commands
from fabric.cutting import CUT, HAVE_CUT, RENEW_EVERY, Cutter
from fabric.devices import Devices
from fabric.errors import Temporary
from fabric.feed import Feed
from fabric.guarding import HANDS, FloodGuard
from fabric.identity.enrollment import Enrollment
from fabric.identity.external import ExternalTokens
from fabric.identity.issued import IssuedTokens
from fabric.identity.login import Audiences, DeviceLogins
from fabric.identity.revocation import Revocation
from fabric.identity.revocation_log import RevocationLog
from fabric.identity.rotation import Rotation
from fabric.identity.takeover import Admissions
from fabric.mail import Postman
from fabric.outward.https import HttpsKeySource
from fabric.ports import Delivery, Registry
from fabric.presenting import Document
from fabric.sql import Store, open_store
from fabric.telemetry import Telemetry
from fabric.waiting import Waiters
from fabric.worker.clocks import keep_running
from topology import access, enrollment, names
from topology.names import CommandId

log = logging.getLogger(__name__)

_NOTICE = 5.0  # seconds in which an edge in front notices that this gateway leaves, and sends it nothing new
_LAST_WAIT = 4.0  # seconds that a command may still settle in, for those who wait; they are answered with what it is
_DRAIN = 8.0  # seconds that requests under way and publishes get at shutdown, all within 15 with the notice


class Background:
    """Publishes that outlive their request: each is owned here, and awaited at shutdown."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def drain(self, timeout: float) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("publish.crashed", exc_info=task.exception())


@dataclass(frozen=True, slots=True)
class SigningKeys:
    """The keys of both purposes, and the authorities, as this process follows them."""

    tokens: rings.Watch
    commands: rings.Watch
    authorities: succession.Watch


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    gc.freeze()  # what is imported stays: collections need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    store = await open_store(settings.database, RevocationLog(settings.revocations))
    broker = wiring.broker(settings, access.GATEWAY)
    background = Background()

    async def read(id: CommandId) -> Document | None:
        found = await store.ledger.command(id)
        return None if found is None else presenting.command(*found)

    waiters = Waiters(read)
    closer = RemoteCloser(broker.publisher)

    leaving, stopping = asyncio.Event(), asyncio.Event()
    flood = FloodGuard(settings.limits, store.sessions, closer.close, store.clock)
    files = Files(settings.state_dir)
    keys = SigningKeys(
        rings.Watch(files.token_keys, store.clock),
        rings.Watch(files.command_keys, store.clock),
        succession.Watch(files.authorities),
    )
    services = _services(settings, store, broker, waiters, closer, flood, keys, background, leaving, stopping)
    cutter = services.cutter
    handlers = {CLOSED: closer.on_answer, CUT: cutter.on_delivery, HAVE_CUT: cutter.on_delivery}

    async def on_wake(delivery: Delivery) -> None:
        await handlers.get(delivery.message.type or "", waiters.on_delivery)(delivery)

    wakes = wake_consumer(broker.consuming, on_wake)

    app = create_app(services)
    public = PublicServer(_public(settings, app))
    inside = _inside(
        settings,
        app,
        BrokerAuth(services.logins, flood, services.vhost),
        figures.Everywhere(settings.state_dir, services.ready, store.ledger.lives, broker.publisher, flood),
        waiters,
    )
    try:
        await broker.start()
        await wakes.start()
        await cutter.renew()
        async with asyncio.TaskGroup() as group:
            servers = [group.create_task(serve) for serve in (inside.run(), internal.serve(public))]
            guarding = [
                group.create_task(keep_running(f"flood-guard-{hand}", 0.0, flood.run_once)) for hand in range(HANDS)
            ]
            watching = [
                group.create_task(keep_running(name, rings.READ_EVERY, watch.look))
                for name, watch in (
                    ("signing-keys", keys.tokens),
                    ("signing-keys", keys.commands),
                    ("authorities", keys.authorities),
                )
            ]
            watching.append(group.create_task(certificates.follow(settings, public.config.ssl)))
            renewing = group.create_task(keep_running("gateway-lease", RENEW_EVERY, cutter.renew))
            guarding.append(group.create_task(beat(settings.ready_file, services.ready)))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, leaving.set)
            await leaving.wait()
            log.info("gateway.stopping")
            if not settings.tls_certificate:
                await asyncio.sleep(_NOTICE)
            stopping.set()
            # The public listener first: what waits there may still need a login to succeed.
            await _drain(public, servers[1], waiters, background)
            inside.stop()
            for task in (*guarding, *watching, renewing):
                task.cancel()
    finally:
        await cutter.leave()
        await services.external.close()
        await wakes.stop()
        await broker.stop()
        await store.close()


async def _drain(public: PublicServer, serving: "asyncio.Task[None]", waiters: Waiters, background: Background) -> None:
    """Answer those who wait, and let publishes come to their end: within `_DRAIN` seconds, or a second more."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _DRAIN
    waiters.end(_LAST_WAIT)
    public.should_exit = True
    await serving
    await background.drain(max(1.0, end - loop.time()))


def _inside(
    settings: Settings, app: FastAPI, auth: BrokerAuth, everywhere: figures.Everywhere, waiters: Waiters
) -> internal.Listener:
    """The internal listener, with all that is measured."""
    services: Services = app.state.services
    metrics = everywhere.metrics()
    metrics.histogram("http_request_seconds", "Answers of the API.", ("method", "route", "status"), app.state.answers)
    metrics.histogram("broker_auth_seconds", "Answers to the broker.", ("question", "answer"), auth.answers)
    metrics.histogram(
        "round_trip_seconds",
        "From a command's request until its outcome was there, of requests that waited for it.",
        (),
        {(): services.commands.round_trips},
    )
    metrics.histogram(
        "revocation_seconds", "From a right's end until it was answered.", ("ending",), services.revocation.took
    )
    metrics.gauge("requests_waiting", "Requests that have a command in view.", (), lambda: {(): waiters.open})
    metrics.gauge("answers_open", "Streams, waiting requests, uploads.", (), lambda: {(): services.lasting.size})
    pages = internal.health(services.ready)
    return internal.Listener(metrics, own_address(settings.auth_host), settings.auth_port, pages, auth)


def _public(settings: Settings, app: FastAPI) -> uvicorn.Config:
    config = uvicorn.Config(
        BehindEdge(app, settings.edge) if settings.edge else app,
        host=own_address(settings.api_host),
        port=settings.api_port,
        ssl_certfile=settings.tls_certificate or None,
        ssl_keyfile=settings.tls_key or None,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(_DRAIN),
        ws="none",
        loop="uvloop",
    )
    config.load()  # the TLS context, which is followed
    return config


def _services(
    settings: Settings,
    store: Store,
    broker: wiring.Broker,
    waiters: Waiters,
    closer: RemoteCloser,
    flood: FloodGuard,
    keys: SigningKeys,
    background: Background,
    leaving: asyncio.Event,
    stopping: asyncio.Event,
) -> Services:
    files = Files(settings.state_dir)
    audiences = Audiences(
        enrollment.mq_audience(settings.fabric, settings.cell), enrollment.api_audience(settings.fabric)
    )
    ledger, registry, clock, publisher = store.ledger, store.registry, store.clock, broker.publisher
    enrolling = Enrollment(registry, clock, keys.authorities.authorities)
    tokens = IssuedTokens(registry, clock, enrollment.issuer(settings.fabric), audiences.api, keys.tokens.keys)
    external = _external(settings, registry, clock)

    def forget() -> None:
        tokens.forget()
        external.forget()

    lasting = Lasting(forget)
    cutter = Cutter(secrets.token_hex(8), store.gateways, publisher, lasting.end, clock)
    revocation = Revocation(registry, publisher, closer, cutter, clock)

    async def ready() -> Mapping[str, str]:
        problems = broker.problems()
        try:
            await ledger.incarnation()
        except Temporary as error:
            log.warning("ready.ledger error=%s", error)
            problems["ledger"] = "not answering"
        if keys.tokens.problem or keys.commands.problem:
            problems["signing-keys"] = "can't be read"
        if "broker-publishing" not in problems:
            with suppress(Temporary):
                if await publisher.depth(names.TELEMETRY) is None:
                    problems["topology"] = "not declared yet; is a worker running?"
        return problems

    return Services(
        commands=Commands(
            ledger,
            registry,
            publisher,
            Postman(ledger, publisher, clock),
            waiters,
            clock,
            keys.commands.keys,
            settings.backlog,
            background.start,
        ),
        lasting=lasting,
        cutter=cutter,
        devices=Devices(registry, publisher, enrolling, revocation, clock, settings.cell, settings.largest_backlog),
        telemetry=Telemetry(publisher, AmqpStreamReader(broker.consuming), clock),
        enrollment=enrolling,
        rotation=Rotation(registry, clock),
        revocation=revocation,
        logins=DeviceLogins(registry, clock, audiences, Admissions(store.sessions, closer, flood, clock)),
        tokens=tokens,
        external=external,
        ledger=ledger,
        registry=registry,
        audit=store.audit,
        clock=clock,
        peering=Peering(
            amqps_url=settings.amqps_url,
            api_url=settings.api_url,
            audiences=audiences,
            authorities=keys.authorities.authorities,
            signing_keys=keys.commands.keys,
        ),
        token_keys=keys.tokens.keys,
        cursors=Cursors(secret(files.cursor_secret)),
        vhost=names.VHOST,
        closer=closer,
        feed=Feed(ledger),
        leaving=leaving,
        stopping=stopping,
        backlog=settings.backlog,
        ready=ready,
    )


def _external(settings: Settings, registry: Registry, clock: Clock) -> ExternalTokens:
    """Raises `AuthorityError`."""
    known = []
    for each in settings.providers:
        try:
            source = HttpsKeySource(each.jwks_url, each.allow_private, each.authority)
        except OSError as error:
            raise authority.AuthorityError(f"The authority {each.authority} can't be read: {error}.") from error
        known.append((each, source))
    return ExternalTokens(registry, clock, known)
