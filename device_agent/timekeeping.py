"""What time it is for a device whose clock may be wrong (SECURITY.md, rule 9).

Certificates are checked against a floor: the machine's clock, but not before this version was made and not before
the last fabric time that was stored. A device whose clock is behind asks `GET /v1/time`: with the pin and the host
name checked, the certificate's times not, and without any credential. The answer can only move the floor forward,
and must lie within the times of the certificate that came with it; the certificate is then checked against the
floor before any token is sent.
"""

import http.client
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, TypeVar

from device_agent import errors, https, log, successors, tls
from device_agent.clock import FabricClock, wall_ms

T = TypeVar("T")

MADE: Final = 1_767_225_600_000  # epoch ms: no fabric that this version knows is older; moved with each release
ASK_EVERY = 60.0  # seconds between two questions of a running agent
DOUBTFUL: Final = 60_000  # ms that a clock must be off to explain a refusal: what the fabric allows

PATH = "/v1/time"

_DOUBTS = (
    errors.CertificateExpired,
    errors.CertificateNotYetValid,
    errors.EnrollmentRefused,
    errors.LoginRefused,
)
"""What a wrong clock may be the cause of."""


class Times:
    """The best known time, in epoch ms: `now` for what is signed, `floor` for the certificates of others.

    Args:
        stored: the last fabric time that was stored, 0 if there is none.
    """

    def __init__(self, clock: FabricClock, stored: int, wall: Callable[[], int] = wall_ms) -> None:
        self._clock, self._wall = clock, wall
        self._least = max(MADE, stored)
        self._told: tuple[int, float] | None = None

    def now(self) -> int:
        known = self._clock.now()
        if known is not None:
            return known
        return self.floor() if self._told is None else self._now_as_told(*self._told)

    def floor(self) -> int:
        known = self._clock.now()
        if known is not None:
            return known
        told = 0 if self._told is None else self._now_as_told(*self._told)
        return max(self._wall(), self._least, told)

    def reached(self, fabric_ms: int) -> None:
        """It can't be earlier any more."""
        self._least = max(self._least, fabric_ms)

    def told(self, fabric_ms: int) -> None:
        """Take over the answer to a question for the time, unless it is before what is known for certain."""
        if fabric_ms < self._least:
            log.warning("clock.answer-ignored", because="it is before the last known time", told=_shown(fabric_ms))
            return
        off = self._wall() - fabric_ms
        if abs(off) > DOUBTFUL:
            log.warning("clock.wrong", told=_shown(fabric_ms), ahead_by=off / 1000)
        self.reached(fabric_ms)
        self._told = (fabric_ms, self._clock.boot())

    def _now_as_told(self, fabric_ms: int, at: float) -> int:
        return fabric_ms + round(self._clock.boot() - at)


def ask(service: https.Service, authority: str, times: Times) -> None:
    """Ask the service what time it is.

    Raises:
        errors.PeerNotTrusted: it is another service; or its answer lies outside its certificate's own times.
        errors.BadAnswer, errors.Unreachable
    """
    context = tls.pinned(authority, None)
    status, body = https.exchange(service, context, "GET", PATH)
    told = _time(https.json_object(body)) if status == http.client.OK else None
    if told is None:
        raise errors.BadAnswer(f"{service.url}{PATH} did not answer with a time, but with {status}")
    # Whoever holds an old key of the service can't lead beyond that key's own end.
    tls.check_times(context.validity, told, service.host, service.port)
    times.told(told)


def with_right_time(service: https.Service, authority: str, times: Times, attempt: Callable[[], T]) -> T:
    """Make an attempt; when it fails for what may be a wrong clock, and the clock is wrong, once more.

    Raises:
        errors.AgentError: what the last attempt raised.
    """
    before = times.now(), times.floor()
    try:
        return attempt()
    except _DOUBTS as error:
        try:
            ask(service, authority, times)
        except errors.AgentError as unanswered:
            log.debug("clock.unanswered", because=str(unanswered))
            raise error from None
        if all(abs(after - was) < DOUBTFUL for was, after in zip(before, (times.now(), times.floor()), strict=True)):
            raise
    return attempt()


class Asker:
    """Asks for a running agent, on a thread of its own, when a connection failed: for the time if that may be for a
    wrong clock, for the authority's successors if another one issued the certificate."""

    def __init__(self, api_url: str, times: Times, follow: Callable[[Sequence[str]], object]) -> None:
        """`follow` is told what the successors are said to be, on that thread; it raises `errors.AgentError`."""
        self._api_url, self._times, self._follow = api_url, times, follow
        self._next = 0.0
        self._asking = threading.Lock()

    def consider(self, error: errors.AgentError, authority: str) -> None:
        """Returns at once; the connection after the next may profit."""
        now = time.monotonic()
        if (
            not isinstance(error, (*_DOUBTS, errors.WrongAuthority))
            or now < self._next
            or not self._asking.acquire(blocking=False)
        ):
            return
        self._next = now + ASK_EVERY
        work = self._ask_successors if isinstance(error, errors.WrongAuthority) else self._ask
        threading.Thread(target=work, args=(authority,), name="restante-ask", daemon=True).start()

    def _ask(self, authority: str) -> None:
        try:
            ask(https.parse_url(self._api_url), authority, self._times)
        except errors.AgentError as error:
            log.warning("clock.unanswered", because=str(error))
        finally:
            self._asking.release()

    def _ask_successors(self, _: str) -> None:
        try:
            if told := successors.ask(https.parse_url(self._api_url)):
                self._follow(told)
        except errors.AgentError as error:
            log.warning("authorities.unanswered", code=error.code, because=str(error))
        finally:
            self._asking.release()


def _time(answer: dict[str, object] | None) -> int | None:
    text = None if answer is None else answer.get("time")
    if not isinstance(text, str) or not 20 <= len(text) <= 40:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if at.tzinfo is None else int(at.timestamp() * 1000)


def _shown(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))
