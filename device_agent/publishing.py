"""One-off publishing, for programs beside the agent: through the running agent if there is one, else over a
short connection of its own."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from device_agent import clock, control, errors, guard, identity, journal, telemetry
from device_agent.link import Link, Mail
from device_agent.timekeeping import Times
from topology import wire

TIMEOUT = 30.0  # seconds for the connection and for each confirm


class Publisher(Protocol):
    def publish(self, channel: str, body: bytes, content_type: str, at: int | None) -> None:
        """Returns when the broker has it; raises `errors.AgentError`."""

    def close(self) -> None: ...


def publish_all(state_dir: Path, channel: str, bodies: Iterable[bytes], content_type: str) -> int:
    """Publish each body as a reading measured when it came; returns how many were confirmed.

    Raises:
        errors.AgentError
    """
    telemetry.check(channel, b"", content_type)
    count = 0
    with _publisher(state_dir) as publisher:
        for body in bodies:
            telemetry.check(channel, body, content_type)
            publisher.publish(channel, body, content_type, None)
            count += 1
    return count


@contextmanager
def _publisher(state_dir: Path) -> Iterator[Publisher]:
    publisher: Publisher = control.connect(state_dir) or _OwnLink(state_dir)
    try:
        yield publisher
    finally:
        publisher.close()


@dataclass(slots=True)
class _Wakes:
    """A listener that only tells when the link is up."""

    up: "Future[None]"
    buffer: telemetry.Telemetry | None = None

    def link_up(self) -> None:
        if not self.up.done():
            self.up.set_result(None)
        if self.buffer is not None:
            self.buffer.pump()

    def link_down(self) -> None:
        return

    def answer(self, message: wire.Message) -> None:  # noqa: ARG002 - nothing is asked
        return

    def mail(self, mail: Mail) -> None:  # noqa: ARG002 - nothing is fetched
        return


class _OwnLink:
    def __init__(self, state_dir: Path) -> None:
        guard.check()
        who = identity.load(state_dir)
        counts = journal.read_counts(state_dir)
        self._times = Times(clock.FabricClock(), counts[1] if counts else 0)
        self._state_dir = state_dir
        wakes = _Wakes(Future())
        self._link = Link(who, lambda: identity.load(state_dir), self._follow, self._times, wakes)
        self._telemetry = telemetry.Telemetry(self._link, who.device)
        wakes.buffer = self._telemetry
        self._link.start()
        try:
            wakes.up.result(TIMEOUT)
        except FutureTimeoutError:
            error = self._link.last_error
            self.close()
            raise error or errors.Unreachable(f"the broker did not answer within {TIMEOUT:g} s") from None

    def _follow(self, announcements: Sequence[str]) -> None:
        identity.learn_authorities(self._state_dir, announcements, self._times.floor())

    def publish(self, channel: str, body: bytes, content_type: str, at: int | None) -> None:
        confirmed = self._telemetry.offer(channel, body, content_type, self._times.now() if at is None else at)
        try:
            confirmed.result(TIMEOUT)
        except FutureTimeoutError:
            raise errors.NotConfirmed(
                f"the broker has not confirmed the reading within {TIMEOUT:g} s; whether it arrived is unknown"
            ) from None

    def close(self) -> None:
        self._link.call(self._link.stop)
        self._link.join(5)
