"""A running agent: its parts put together, started, and stopped in order."""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from device_agent import clock, errors, files, guard, handlers, identity, journal, log, telemetry
from device_agent.control import ControlServer
from device_agent.executables import Executables
from device_agent.greeting import Greeter
from device_agent.link import Link, Mail
from device_agent.mailbox import Mailbox
from device_agent.reports import Reporter
from device_agent.runner import Runner
from device_agent.system import SystemReporter
from device_agent.timekeeping import Times
from topology import wire

T = TypeVar("T")

LOCK_FILE = "agent.lock"
MAX_SLOTS = 64
REPORT_GRACE = 5.0  # seconds a stopping agent waits for its last confirms; the journal keeps what stays unsent
STATUS_TIMEOUT = 5.0  # seconds for the I/O thread to answer


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run. `system_interval` is in seconds, 0 switches the channel off."""

    state_dir: Path
    slots: int = 1
    commands_dir: Path | None = None
    system_interval: float = 0.0


class Runtime:
    """One device's agent. `start` returns at once; the connection comes and goes by itself until `stop`."""

    def __init__(self, settings: Settings, python: handlers.PythonHandlers) -> None:
        """Check everything that can be checked without the network.

        Raises:
            errors.NotEnrolled, errors.StateRefused, errors.JournalRefused, errors.Unguarded,
            errors.BadHandler, errors.AlreadyRunning, errors.InvalidValue
        """
        if not 1 <= settings.slots <= MAX_SLOTS:
            raise errors.InvalidValue(f"slots must be 1 to {MAX_SLOTS}")
        guard.check()
        files.private_directory(settings.state_dir)
        self._identity = identity.load(settings.state_dir)
        sources: list[handlers.Source] = [python]
        if settings.commands_dir is not None:
            sources.append(Executables(settings.commands_dir))
        self._state_dir = settings.state_dir
        self._lock = _lock(settings.state_dir)
        try:
            self._journal = journal.open_journal(settings.state_dir)
        except BaseException:
            os.close(self._lock)
            raise
        device = self._identity.device
        self._clock = clock.FabricClock()
        self._times = Times(self._clock, self._journal.last_fabric_time())
        self._link = Link(self._identity, lambda: identity.load(settings.state_dir), self._follow, self._times, self)
        self._greeter = Greeter(
            self._link,
            self._journal,
            self._clock,
            self._times,
            device,
            version(),
            lambda: (self._identity.peering.signing_keys.version, self._identity.pins.version),
            self._learn,
            self._welcomed,
        )
        self._reporter = Reporter(self._link, self._journal, device)
        self._runner = Runner(settings.slots, python)
        self._telemetry = telemetry.Telemetry(self._link, device)
        self._mailbox = Mailbox(
            identity=self._identity,
            renew=lambda: identity.load(settings.state_dir),
            link=self._link,
            journal=self._journal,
            clock=self._clock,
            reporter=self._reporter,
            ask=self._greeter.ask,
            runner=self._runner,
            sources=sources,
            slots=settings.slots,
        )
        self._control = ControlServer(settings.state_dir, self._status, self.offer)
        self._system = (
            SystemReporter(settings.system_interval, settings.state_dir, self.publish)
            if settings.system_interval > 0
            else None
        )
        self._keys_refused = self._authorities_refused = False
        self._stop_asked = threading.Event()
        self._ended = False

    def start(self) -> None:
        log.info("agent.starting", device=self._identity.device, agent=self._journal.agent, version=version())
        self._runner.start()
        self._control.start()
        self._link.start()
        if self._system is not None:
            self._system.start()

    def publish(self, channel: str, value: object, content_type: str | None = None) -> "Future[None]":
        """See `Agent.publish`."""
        body, kind = telemetry.encode(value, content_type)
        return self.offer(channel, body, kind, None)

    def offer(self, channel: str, body: bytes, content_type: str, at: int | None) -> "Future[None]":
        return self._telemetry.offer(channel, body, content_type, self._greeter.now() if at is None else at)

    def ask_stop(self) -> None:
        """Wake `wait`; may be called from a signal handler, and twice."""
        self._stop_asked.set()

    def wait(self) -> None:
        """Block until `ask_stop`."""
        self._stop_asked.wait()

    def stop(self) -> None:
        """Fetch no more, finish what is in hand within its time, report it, and close. Twice is once."""
        if self._ended:
            return
        self._ended = True
        log.info("agent.stopping")
        if self._system is not None:
            self._system.stop()
        stopping: Future[float] = Future()
        self._link.call(lambda: _fulfil(stopping, self._stop_fetching))
        deadline = time.monotonic() + stopping.result(10)
        _wait_until(lambda: self._mailbox.in_hand == 0, deadline)
        if self._mailbox.in_hand:
            log.warning("agent.abandons", commands=self._mailbox.in_hand, because="their response time is over")
        _wait_until(
            lambda: not self._link.up or (self._reporter.idle and self._telemetry.idle),
            time.monotonic() + REPORT_GRACE,
        )
        self._link.call(self._link.stop)
        self._link.join(10)
        self._control.stop()
        self._runner.stop()
        with suppress(errors.JournalRefused):
            self._journal.close()
        os.close(self._lock)
        log.info("agent.stopped")

    # What the link tells, on its thread.

    def link_up(self) -> None:
        self._greeter.link_up()
        self._mailbox.link_up()
        self._reporter.link_up()
        self._telemetry.pump()

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
            else:
                log.warning("answer.unknown", type=message.type)
        except wire.Malformed as error:
            log.warning("answer.malformed", because=str(error))
        except errors.JournalRefused as error:
            self._mailbox.journal_failed(error)

    def _learn(self, welcome: wire.Welcome) -> None:
        if welcome.keys:
            self._learn_keys(welcome.keys)
        if welcome.authorities:
            try:
                self._identity = self._follow(welcome.authorities)
            except errors.AgentError as error:
                level = logging.DEBUG if self._authorities_refused else logging.ERROR
                log.event(level, "authorities.refused", code=error.code, because=str(error))
                self._authorities_refused = True
            else:
                self._authorities_refused = False

    def _learn_keys(self, announcements: Sequence[str]) -> None:
        try:
            self._identity = identity.learn(self._state_dir, announcements, self._clock.now_or(0))
        except errors.AgentError as error:
            level = logging.DEBUG if self._keys_refused else logging.ERROR
            log.event(level, "keys.refused", code=error.code, because=str(error))
            self._keys_refused = True
            return
        self._keys_refused = False
        log.info("keys.learnt", version=self._identity.peering.signing_keys.version)
        self._mailbox.trust(self._identity)

    def _follow(self, announcements: Sequence[str]) -> identity.Identity:
        """From any thread: the next connection is made with the pins in the file. Raises `errors.AgentError`."""
        learnt = identity.learn_authorities(self._state_dir, announcements, self._times.floor())
        log.info("authorities.learnt", version=learnt.pins.version)
        return learnt

    def _welcomed(self, changed: bool) -> None:
        if changed:
            self._reporter.again()
        self._mailbox.welcomed()

    def _stop_fetching(self) -> float:
        self._mailbox.stop_fetching()
        return self._mailbox.longest_remaining

    def _status(self) -> dict[str, object]:
        """What `restante-agent status` shows; from a control client's thread."""
        answer: Future[dict[str, object]] = Future()
        self._link.call(lambda: _fulfil(answer, self._gather_status))
        return answer.result(STATUS_TIMEOUT)

    def _gather_status(self) -> dict[str, object]:
        error = self._link.last_error
        return {
            "running": True,
            "connected": self._link.up,
            "last_error": None if error is None else {"code": error.code, "text": str(error)},
            "fabric_time": self._clock.now(),
            "commands_in_hand": self._mailbox.in_hand,
            "journal": self._journal.counts(),
        }


def version() -> str:
    try:
        return metadata.version("restante")
    except metadata.PackageNotFoundError:
        return "0"


def _lock(state_dir: Path) -> int:
    descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise errors.AlreadyRunning(f"an agent runs on {state_dir} already; stop it first") from error
    return descriptor


def _wait_until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)  # only while stopping: nothing waits for it but the end


def _fulfil(future: "Future[T]", function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - it is raised again where the result is awaited
        future.set_exception(error)
