"""Hello: how the agent learns the fabric's time, whether it is still the same fabric, what keys sign its commands, and
which authorities vouch for it. On the I/O thread."""

import asyncio
import secrets
from collections.abc import Callable

from device_agent import log
from device_agent.clock import FabricClock
from device_agent.journal import Journal
from device_agent.link import Link
from device_agent.timekeeping import Times
from topology import names, wire

ASK_AGAIN = 5.0  # seconds without an answer
REFRESH = 60.0  # seconds between hellos that keep the clock fresh


class Greeter:
    """Says hello on every connection until it is answered, then once a minute.

    `welcomed(new_fabric)` is called with each answer; before it `learn`, when there is news after `versions()`, of the
    keys and of the authorities that are known.
    """

    def __init__(
        self,
        link: Link,
        journal: Journal,
        clock: FabricClock,
        times: Times,
        device: names.DeviceId,
        version: str,
        versions: Callable[[], tuple[int, int]],
        learn: Callable[[wire.Welcome], None],
        welcomed: Callable[[bool], None],
    ) -> None:
        self._link = link
        self._journal = journal
        self._clock = clock
        self._times = times
        self._device = device
        self._version = version
        self._versions = versions
        self._learn = learn
        self._welcomed = welcomed
        self._asked: tuple[str, float] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered = 0

    def now(self) -> int:
        """The best known time in epoch ms."""
        return self._times.now()

    def link_up(self) -> None:
        self._unanswered = 0
        self.ask()

    def link_down(self) -> None:
        self._asked = None
        self._again_in(None)

    def answer(self, message: wire.Message) -> None:
        """Raises `wire.Malformed`."""
        welcome = wire.decode_welcome(message)
        if self._asked is None or welcome.correlation != self._asked[0]:
            log.debug("hello.stray-answer")
            return
        sent = self._asked[1]
        self._asked = None
        self._again_in(REFRESH)
        self._clock.adjust(welcome.time, sent, self._clock.boot())
        if self._unanswered > 1:
            log.info("hello.answered")
        self._unanswered = 0
        known = self._journal.incarnation()
        changed = known != welcome.incarnation
        if changed:
            self._journal.meet(welcome.incarnation)
            log.info("fabric.met" if known is None else "fabric.changed", incarnation=welcome.incarnation)
        self._times.reached(welcome.time)
        self._journal.store_fabric_time(welcome.time)
        if welcome.keys or welcome.authorities:
            self._learn(welcome)
        self._welcomed(changed)

    def ask(self) -> None:
        """Say hello now; an answer to an earlier one counts no more."""
        correlation = secrets.token_hex(8)
        hello = wire.Hello(correlation, self._journal.agent, self._version, self.now(), *self._versions())
        self._asked = (correlation, self._clock.boot())
        self._link.publish(names.hello_key(self._device), wire.encode_hello(hello, self._device), None)
        self._unanswered += 1
        if self._unanswered == 2:
            log.warning("hello.unanswered", because="the broker is there, but the fabric did not answer")
        self._again_in(ASK_AGAIN)

    def _again_in(self, delay: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay is None else self._link.later(delay, self.ask)
