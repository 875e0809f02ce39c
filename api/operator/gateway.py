"""`restante gateway`: the HTTP API on its public listener, the broker's auth endpoint on an internal one."""

import asyncio
import gc
import logging
import signal
from collections.abc import Coroutine, Mapping
from contextlib import suppress

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api import logs
from api.app import create_app
from api.broker_auth import BrokerAuth
from api.operator import authority, wiring
from api.operator.setup import Files, load_signing_key
from api.services import Peering, Services
from api.settings import Settings
from fabric import presenting
from fabric.amqp.consumer import wake_consumer
from fabric.amqp.streams import AmqpStreamReader
from fabric.commands import Commands
from fabric.devices import Devices
from fabric.errors import Temporary
from fabric.identity.enrollment import Enrollment
from fabric.identity.issued import IssuedTokens
from fabric.identity.login import Audiences, DeviceLogins
from fabric.mail import Postman
from fabric.presenting import Document
from fabric.signing import jwks
from fabric.sql import Store, open_store
from fabric.telemetry import Telemetry
from fabric.waiting import Waiters
from topology import access, enrollment, names
from topology.names import CommandId

log = logging.getLogger(__name__)

_DRAIN = 15.0  # seconds that requests under way and publishes get at shutdown


class Background:
    """Publishes that outlive their request: each is owned here, and awaited at shutdown."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def drain(self) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_DRAIN)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("publish.crashed", exc_info=task.exception())


def run(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    logs.configure(settings.log_level)
    gc.freeze()  # what is imported stays: collections need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    store = await open_store(settings.database)
    broker = wiring.broker(settings, access.GATEWAY)
    background = Background()

    async def read(id: CommandId) -> Document | None:
        found = await store.ledger.command(id)
        return None if found is None else presenting.command(*found)

    waiters = Waiters(read)
    wakes = wake_consumer(broker.consuming, waiters.on_delivery)
    services = _services(settings, store, broker, waiters, background)
    public = uvicorn.Server(_public(settings, services))
    internal = uvicorn.Server(
        uvicorn.Config(
            BrokerAuth(services.logins, services.vhost),
            host=settings.auth_host,
            port=settings.auth_port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    stopping = asyncio.Event()
    try:
        await broker.start()
        await wakes.start()
        async with asyncio.TaskGroup() as group:
            servers = [group.create_task(_run(server)) for server in (internal, public)]
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stopping.set)
            await stopping.wait()
            log.info("gateway.stopping")
            # The public listener first: what waits there may still need a login to succeed.
            public.should_exit = True
            await servers[1]
            await background.drain()
            internal.should_exit = True
    finally:
        await wakes.stop()
        await broker.stop()
        await store.close()


class _Connection(HttpToolsProtocol):
    """A caller's connection, which doesn't hold up the gateway's end."""

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            # Closing TLS waits for the peer's answer, and a peer that keeps an idle connection reads nothing.
            self.transport.abort()
        else:
            super().shutdown()


async def _run(server: uvicorn.Server) -> None:
    """Serve until told to exit; a listener that can't be opened ends the process with a clear line."""
    await server._serve()  # noqa: SLF001 - `serve` would take the signals that this process handles itself


def _public(settings: Settings, services: Services) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(services),
        host=settings.api_host,
        port=settings.api_port,
        ssl_certfile=settings.tls_certificate or None,
        ssl_keyfile=settings.tls_key or None,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(_DRAIN),
        http=_Connection,
        loop="uvloop",
    )


def _services(
    settings: Settings,
    store: Store,
    broker: wiring.Broker,
    waiters: Waiters,
    background: Background,
) -> Services:
    files = Files(settings.state_dir)
    certificate = authority.load_certificate(files.authority)
    token_key, command_key = load_signing_key(files.token_key), load_signing_key(files.command_key)
    audiences = Audiences(
        enrollment.mq_audience(settings.fabric, settings.cell), enrollment.api_audience(settings.fabric)
    )
    ledger, registry, clock, publisher = store.ledger, store.registry, store.clock, broker.publisher
    enrolling = Enrollment(registry, clock, authority.fingerprint(certificate))

    async def ready() -> Mapping[str, str]:
        problems = {}
        try:
            await ledger.incarnation()
        except Temporary as error:
            log.warning("ready.ledger error=%s", error)
            problems["ledger"] = "not answering"
        for what, link in (("broker-publishing", broker.publishing), ("broker-consuming", broker.consuming)):
            if not link.connected.is_set():
                problems[what] = "not connected"
        if "broker-publishing" not in problems:
            with suppress(Temporary):
                if await publisher.depth(names.TELEMETRY) is None:
                    problems["topology"] = "not declared yet; is a worker running?"
        return problems

    return Services(
        commands=Commands(
            ledger, registry, Postman(ledger, publisher, clock), waiters, clock, command_key, background.start
        ),
        devices=Devices(registry, publisher, enrolling, clock, settings.cell),
        telemetry=Telemetry(publisher, AmqpStreamReader(broker.consuming), clock),
        enrollment=enrolling,
        logins=DeviceLogins(registry, clock, audiences),
        tokens=IssuedTokens(registry, clock, enrollment.issuer(settings.fabric), audiences.api, token_key),
        ledger=ledger,
        registry=registry,
        clock=clock,
        peering=Peering(
            amqps_url=settings.amqps_url,
            api_url=settings.api_url,
            audiences=audiences,
            authority_pem=files.authority.read_text(),
            signing_keys=jwks(command_key),
        ),
        token_keys=jwks(token_key),
        vhost=names.VHOST,
        ready=ready,
    )
