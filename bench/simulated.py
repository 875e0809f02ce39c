"""One simulated device: the agent's own parts on a link that shares its loop with thousands of others.

Mailbox, reports, greeting, tokens, clocks and journal are `device_agent`'s, so what the rules of pick-up ask of an
agent holds here too. Different are the link below them, and the handlers, which are a delay and no thread.
"""

import asyncio
import random
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from pamqp import base, commands

from bench.connection import Closed, Connection
from bench.journal import MemoryJournal
from device_agent import errors, link, log, tls
from device_agent.backoff import Backoff
from device_agent.clock import FabricClock, wall_ms
from device_agent.context import Context
from device_agent.greeting import Greeter
from device_agent.handlers import Done, Job, PythonHandlers
from device_agent.identity import Identity
from device_agent.journal import Journal
from device_agent.link import Link, Listener, Mail
from device_agent.mailbox import Mailbox
from device_agent.reports import Reporter
from device_agent.runner import Runner
from device_agent.runtime import version
from device_agent.timekeeping import Times
from topology import names, wire

SLOTS = 1  # as the agent's by default
CHANNEL = "bench"  # of telemetry
UPLINK, MAILBOX = 1, 2  # channels
RESOLVED_FOR = 30.0  # seconds that an address is believed


@dataclass(slots=True)
class Tally:
    """What the devices of one process did. `delays` are ms from a command's `at` to its start, on the fabric's clock,
    `confirms` ms from an outcome's publish to the broker's confirm; both since they were last taken."""

    up: int = 0  # connections whose uplink can be written
    serving: int = 0  # devices that consume their mailbox
    connects: int = 0  # attempts
    refused: int = 0  # logins
    lost: int = 0  # connections that were up
    ran: int = 0
    readings: int = 0  # confirmed
    delays: list[float] = field(default_factory=list)
    confirms: list[float] = field(default_factory=list)
    changed: Callable[[], None] = lambda: None  # `serving` has


class Surroundings:
    """What all devices of a process share: addresses, TLS contexts, the tally, and the handlers' delay in seconds."""

    def __init__(self, handler_delay: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.tally = Tally()
        self.handler_delay = handler_delay
        self.dialling: set[asyncio.Task[None]] = set()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._addresses: dict[str, tuple[float, str]] = {}

    def context(self, authority: str) -> ssl.SSLContext:
        found = self._contexts.get(authority)
        if found is None:
            found = self._contexts[authority] = tls.pinned(authority, wall_ms)
        return found

    async def address(self, host: str, port: int) -> tuple[str, int]:
        """Raises `OSError`."""
        known = self._addresses.get(host)
        if known is None or self.loop.time() - known[0] > RESOLVED_FOR:
            found = await self.loop.getaddrinfo(host, port)
            # An IPv4 address first: a stack on this machine listens on no other.
            known = self.loop.time(), min((str(each[4][0]) for each in found), key=lambda it: ":" in it)
            self._addresses[host] = known
        return known[1], port


class LeanLink(Link):
    """The agent's link, with a connection that is lean: connects for ever, with full-jitter back-off and a new token
    each time, until stopped. All of it is on the loop."""

    def __init__(self, around: Surroundings, identity: Identity, times: Times, listener: Listener) -> None:
        # Not the parent's: that would make a loop and a thread for each device.
        self._around, self.identity, self._times, self._listener = around, identity, times, listener
        self._lean: Connection | None = None
        self._epoch = 0
        self._next_tag = 1
        self._unconfirmed: dict[int, Callable[[bool], None]] = {}
        self._writable = self._serving = self._consuming = False
        self._since = 0.0
        self._backoff = Backoff()
        self._dialled_at = 0.0
        self._stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._prefetch = 0
        self.ended = asyncio.Event()
        self.last_error: errors.AgentError | None = None

    @property
    def up(self) -> bool:
        return self._writable

    @property
    def room(self) -> int:
        return link.MAX_UNCONFIRMED - len(self._unconfirmed) if self.up else 0

    @property
    def serving(self) -> bool:
        """Is the mailbox consumed?"""
        return self._serving

    def start(self) -> None:
        self._connect()

    def join(self, timeout: float | None = None) -> bool:
        raise NotImplementedError("there is no thread to wait for; await `ended`")

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        self._around.loop.call_soon(function, *arguments)

    def soon(self, function: Callable[..., None], *arguments: object) -> None:
        self._around.loop.call_soon(function, *arguments)

    def later(self, delay: float, function: Callable[..., None], *arguments: object) -> asyncio.TimerHandle:
        return self._around.loop.call_later(delay, function, *arguments)

    def publish(self, key: str, message: wire.Message, done: Callable[[bool], None] | None) -> bool:
        if self._lean is None or not self._writable or len(self._unconfirmed) >= link.MAX_UNCONFIRMED:
            return False
        told = done or _ignore
        self._unconfirmed[self._next_tag] = self._timed(told) if message.type == "outcome" else told
        self._next_tag += 1
        self._lean.publish(UPLINK, names.UPLINK, key, message, mandatory=done is not None)
        return True

    def open_mailbox(self, prefetch: int) -> None:
        if self._lean is not None and self._writable and not self._consuming:
            self._consuming, self._prefetch = True, prefetch
            self._lean.send(MAILBOX, commands.Channel.Open())

    def close_mailbox(self) -> None:
        if self._lean is not None and self._consuming:
            self._not_serving()
            self._lean.send(MAILBOX, commands.Channel.Close(200, "", 0, 0))

    def ack(self, mail: Mail) -> None:
        if self._lean is not None and mail.epoch == self._epoch:
            self._lean.send(MAILBOX, commands.Basic.Ack(mail.tag))

    @contextmanager
    def together(self) -> Iterator[None]:
        with nullcontext() if self._lean is None else self._lean.together():
            yield

    def reset(self, reason: str) -> None:
        log.warning("link.reset", because=reason)
        if self._lean is not None:
            self._lean.close()

    def stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        if self._lean is None:
            self.ended.set()
            return
        self._timer = self.later(link.CLOSE_TIMEOUT, self.cut)
        self._lean.close()

    def cut(self) -> None:
        """Lose the connection without a word, as in a tunnel."""
        if self._lean is not None:
            self._lean.abort()

    def beat(self, now: float) -> None:
        if self._lean is not None:
            self._lean.beat(now)

    # What the connection tells.

    def opened(self) -> None:
        assert self._lean is not None
        self._next_tag = 1
        consume = commands.Basic.Consume(0, names.DIRECT_REPLY_TO, "answers", no_ack=True)
        self._lean.send(UPLINK, commands.Channel.Open(), commands.Confirm.Select(), consume)

    def answered(self, channel: int, method: base.Frame) -> None:
        match method:
            case commands.Basic.Ack():
                self._settle(method.delivery_tag, method.multiple, done=True)
            case commands.Basic.Nack():
                self._settle(method.delivery_tag, method.multiple, done=False)
            case commands.Basic.Return():
                self._give_back()
            case commands.Basic.ConsumeOk() if channel == UPLINK:
                self._come_up()
            case commands.Basic.ConsumeOk():
                self._serving = True
                self._around.tally.serving += 1
                self._around.tally.changed()
            case commands.Channel.OpenOk() if channel == MAILBOX:
                self._take_up_mailbox()
            case commands.Channel.Close():
                # As the agent: a new connection has one well-trodden way up.
                self.reset(f"the broker closed a channel: {method.reply_code} {method.reply_text}")
            case commands.Basic.Cancel():
                self.reset("a consumer was cancelled")
            case _:
                pass

    def delivered(self, channel: int, tag: int, redelivered: bool, message: wire.Message) -> None:
        if channel == UPLINK:
            self._listener.answer(message)
        else:
            self._listener.mail(Mail(tag, self._epoch, redelivered, message))

    def lost(self, error: Exception) -> None:
        was_up, reached = self._writable, self._lean is not None and self._lean.reached
        self._lean, self._writable, self._consuming = None, False, False
        self._not_serving()
        self._give_back()
        tally = self._around.tally
        if was_up:
            tally.up -= 1
            tally.lost += not self._stopping
            self._listener.link_down()
            if self._around.loop.time() - self._since >= link.STABLE_AFTER:
                self._backoff.served()
        if self._stopping:
            if self._timer is not None:
                self._timer.cancel()
            self.ended.set()
            return
        tally.refused += isinstance(error, Closed) and error.code == 403
        self.last_error = tls.translate(error, self.identity.peering.amqps_host, self.identity.peering.amqps_port)
        log.debug("link.down", because=str(self.last_error))
        took = self._around.loop.time() - self._dialled_at if reached and not was_up else None
        delay = self._backoff.wait(took, random.random())  # noqa: S311 - jitter
        self._timer = self.later(delay, self._connect)

    def _connect(self) -> None:
        self._timer = None
        if not self._stopping:
            task = self._around.loop.create_task(self._dial())
            self._around.dialling.add(task)
            task.add_done_callback(self._around.dialling.discard)

    async def _dial(self) -> None:
        peering, now = self.identity.peering, self._times.now()
        self._epoch += 1
        self._dialled_at = self._around.loop.time()
        self._around.tally.connects += 1
        try:
            address = await self._around.address(peering.amqps_host, peering.amqps_port)
        except OSError as error:
            self.lost(error)
            return
        credentials = (self.identity.device, self.identity.amqp_token(now))
        context = self._around.context(self.identity.pins.pem(self._times.floor()))
        self._lean = Connection(self, address, peering.amqps_host, context, credentials, peering.vhost)
        await self._lean.dial()

    def _come_up(self) -> None:
        self._writable, self._since = True, self._around.loop.time()
        self._around.tally.up += 1
        self._listener.link_up()

    def _take_up_mailbox(self) -> None:
        assert self._lean is not None
        queue = names.mailbox(self.identity.device)
        self._lean.send(MAILBOX, commands.Basic.Qos(0, self._prefetch), commands.Basic.Consume(0, queue, "mail"))

    def _timed(self, done: Callable[[bool], None]) -> Callable[[bool], None]:
        began = time.perf_counter()  # the loop's clock knows whole milliseconds

        def confirmed(is_: bool) -> None:
            if is_:
                self._around.tally.confirms.append((time.perf_counter() - began) * 1000)
            done(is_)

        return confirmed

    def _not_serving(self) -> None:
        if self._serving:
            self._serving = False
            self._around.tally.serving -= 1
            self._around.tally.changed()

    def _settle(self, last: int, multiple: bool, *, done: bool) -> None:
        tags = [tag for tag in self._unconfirmed if tag <= last] if multiple else [last]
        for tag in tags:
            told = self._unconfirmed.pop(tag, None)
            if told is not None:
                told(done)

    def _give_back(self) -> None:
        pending, self._unconfirmed = self._unconfirmed, {}
        for done in pending.values():
            done(False)


class Noop:
    """The one command that a simulated device has: `noop`, with any arguments. A source of handlers, and its job."""

    idempotent = False

    def bind(self, command: wire.Command) -> Job | None:
        return self if command.name == "noop" else None

    def run(self, _: Context) -> Done:
        return Done("succeeded", None, b"null")


class _LoopRunner(Runner):
    """Handlers that are a delay on the loop instead of a thread."""

    def __init__(self, around: Surroundings, clock: FabricClock) -> None:
        super().__init__(0, PythonHandlers())
        self._around, self._clock = around, clock

    def submit(self, job: Job, context: Context, ended: Callable[[Done], None]) -> None:
        tally = self._around.tally
        tally.ran += 1
        tally.delays.append(float(self._clock.now_or(0) - context.command.at))
        if self._around.handler_delay > 0:
            self._around.loop.call_later(self._around.handler_delay, lambda: ended(job.run(context)))
        else:
            ended(job.run(context))


_NOOP = Noop()
_VERSION = version()  # looked up in the installed packages' files


class Simulated:
    """A device that is enrolled. `journal` None: one in memory, which its end takes along."""

    def __init__(self, around: Surroundings, identity: Identity, journal: Journal | None) -> None:
        self._around = around
        self._identity = identity
        self._clock = FabricClock()
        self._journal = journal or MemoryJournal()
        self._times = Times(self._clock, self._journal.last_fabric_time())
        self.link = LeanLink(around, identity, self._times, self)
        self._reporter = Reporter(self.link, self._journal, identity.device)
        self._greeter = Greeter(
            self.link, self._journal, self._clock, self._times, identity.device, _VERSION, self._versions, self._learn,
            self._welcomed,
        )  # fmt: skip
        self._mailbox = Mailbox(
            identity=identity,
            renew=lambda: self._identity,
            link=self.link,
            journal=self._journal,
            clock=self._clock,
            reporter=self._reporter,
            ask=self._greeter.ask,
            runner=_LoopRunner(around, self._clock),
            sources=[_NOOP],
            slots=SLOTS,
        )

    @property
    def device(self) -> names.DeviceId:
        return self._identity.device

    def start(self) -> None:
        self.link.start()

    async def stop(self) -> None:
        """Close cleanly. What is in hand is abandoned, as by an agent that is killed."""
        self._mailbox.stop_fetching()
        self.link.stop()
        await self.link.ended.wait()
        self._journal.close()

    def say(self) -> bool:
        """Publish one reading; False: not now."""

        def confirmed(is_: bool) -> None:
            self._around.tally.readings += is_

        now = self._times.now()
        reading = wire.Reading(secrets.token_hex(8), b'{"value": 21.5}', wire.JSON, now)
        key = names.telemetry_key(self.device, CHANNEL)
        return self.link.publish(key, wire.encode_reading(reading, self.device), confirmed)

    # What the link tells.

    def link_up(self) -> None:
        self._greeter.link_up()
        self._mailbox.link_up()
        self._reporter.link_up()

    def link_down(self) -> None:
        self._greeter.link_down()
        self._mailbox.link_down()

    def mail(self, mail: Mail) -> None:
        self._mailbox.take(mail)

    def answer(self, message: wire.Message) -> None:
        try:
            if message.type == "welcome":
                self._greeter.answer(message)
            elif message.type == "claim-answer":
                self._mailbox.claim_answered(message)
        except wire.Malformed as error:
            log.warning("answer.malformed", because=str(error))
        except errors.JournalRefused as error:
            self._mailbox.journal_failed(error)

    def _versions(self) -> tuple[int, int]:
        return self._identity.peering.signing_keys.version, self._identity.pins.version

    def _learn(self, welcome: wire.Welcome) -> None:
        """Raises nothing: news that are not to be believed are passed over."""
        now = self._clock.now_or(0)
        try:
            keys = self._identity.peering.signing_keys.follow(welcome.keys, now)
            pins = self._identity.pins.follow(welcome.authorities, now)
        except errors.AgentError as error:
            log.error("news.refused", because=str(error))
            return
        peering = replace(self._identity.peering, signing_keys=keys)
        self._identity = self.link.identity = replace(self._identity, peering=peering, pins=pins)
        self._mailbox.trust(self._identity)

    def _welcomed(self, changed: bool) -> None:
        if changed:
            self._reporter.again()
        self._mailbox.welcomed()


def _ignore(_: bool) -> None:
    return
