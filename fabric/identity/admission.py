"""What is remembered of a device between its logins, so that any gateway knows it; and what follows from it. Pure."""

from dataclasses import dataclass, replace

from fabric.command import Micros
from fabric.identity.meters import SECOND, Limits, spend

CONTEST_WINDOW: Micros = 60 * SECOND  # in which takeovers are counted
CONTESTED_FOR: Micros = 60 * SECOND
FIRST_BACKOFF: Micros = 5 * SECOND  # of a throttled device, doubled with each episode
LONGEST_BACKOFF: Micros = 300 * SECOND
FORGIVEN_AFTER: Micros = 600 * SECOND  # without an episode, after which the back-off starts over
MAX_STRIKES = 16
HANDSHAKE: Micros = 10 * SECOND  # the broker's time-out: an older login has become a session, or never will
REPEATED_WITHIN: Micros = 5 * SECOND  # the broker asks a second time as soon as it has the first answer


@dataclass(frozen=True, slots=True)
class Guard:
    """Times are 0 for never.

    Attributes:
        logins_full_at: of the bucket of logins.
        takeovers: when newcomers replaced a live connection, within the window.
        contested_until: no newcomer replaces one before then.
        throttled_until: no login before then.
        strikes: episodes of throttling in a row.
    """

    logins_full_at: Micros = 0
    takeovers: tuple[Micros, ...] = ()
    contested_until: Micros = 0
    throttled_until: Micros = 0
    strikes: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a login may go on.

    Attributes:
        refusal: why not, for the log; None when it may.
        flooded: it is refused for too many logins.
        older: the device has a connection, or may have, that is to be closed first.
        unseen: a login of less than the broker's handshake ago has not become a session yet.
    """

    refusal: str | None = None
    flooded: bool = False
    older: bool = False
    unseen: bool = False


def is_repeated(admitted_at: Micros | None, repeated_at: Micros | None, now: Micros) -> bool:
    """Is it the broker's second question about a login, rather than another login with the same token?"""
    return admitted_at is not None and repeated_at is None and now - admitted_at < REPEATED_WITHIN


def admit(
    guard: Guard, now: Micros, limits: Limits, *, live: bool, unseen_since: Micros | None
) -> tuple[Guard, Admission]:
    """The decision about a login whose token is good.

    Args:
        guard: what is remembered of the device.
        now: the time.
        limits: those of any device.
        live: does it have a session that nothing has replaced?
        unseen_since: when its last login was admitted, if no session has been heard of since.
    """
    older = live or unseen_since is not None
    if now < guard.throttled_until:
        return guard, Admission(f"throttled for {_seconds(guard.throttled_until - now)} s more")
    full_at = spend(guard.logins_full_at, now, limits.logging_in)
    if full_at is None:
        return guard, Admission("too many logins", flooded=True)
    if older and now < guard.contested_until:
        return guard, Admission(f"contested for {_seconds(guard.contested_until - now)} s more")
    unseen = unseen_since is not None and now - unseen_since < HANDSHAKE
    return replace(guard, logins_full_at=full_at), Admission(older=older, unseen=unseen)


def taken_over(guard: Guard, now: Micros, limits: Limits) -> tuple[Guard, bool]:
    """A newcomer has replaced a live connection; True when that was once too often."""
    recent = (*(at for at in guard.takeovers if now - at < CONTEST_WINDOW), now)
    if len(recent) < limits.takeovers:
        return replace(guard, takeovers=recent), False
    return replace(guard, takeovers=(), contested_until=now + CONTESTED_FOR), True


def throttle(guard: Guard, now: Micros) -> Guard | None:
    """The device is over a limit: the beginning of an episode, or None within one."""
    if now < guard.throttled_until:
        return None
    recent = now - guard.throttled_until < FORGIVEN_AFTER
    strikes = min(guard.strikes + 1, MAX_STRIKES) if recent else 1
    until = now + min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (strikes - 1))
    return replace(guard, throttled_until=until, strikes=strikes)


def _seconds(span: Micros) -> int:
    return -(-span // SECOND)
