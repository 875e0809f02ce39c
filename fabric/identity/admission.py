"""What is remembered of a device between its logins, so that any gateway knows it; and what follows from it. Pure."""

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from fabric.command import Micros
from fabric.identity.meters import SECOND, Limits, spend
from topology.names import DeviceId

CONTEST_WINDOW: Micros = 60 * SECOND  # in which takeovers are counted
CONTESTED_FOR: Micros = 60 * SECOND
FIRST_BACKOFF: Micros = 5 * SECOND  # of a throttled device, doubled with each episode
LONGEST_BACKOFF: Micros = 300 * SECOND
FORGIVEN_AFTER: Micros = 600 * SECOND  # without an episode, after which the back-off starts over
MAX_STRIKES = 16
HANDSHAKE: Micros = 10 * SECOND  # the broker's time-out: an older login has become a session, or never will
REPEATED_WITHIN: Micros = 5 * SECOND  # the broker asks a second time as soon as it has the first answer
FIRST_USE_LIFE: Micros = 15 * SECOND  # the broker asks twice for one login, and retries at most so long


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


def use_of(jti: str) -> str:
    """A token's id, hashed: an index takes no text of any length, and the id is the device's to choose."""
    return hashlib.sha256(jti.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A login whose token's signature holds.

    Attributes:
        device: whose.
        kid: of the key that signed.
        use: `use_of` the token.
        expires: until when the token could be used again.
        at: when it was asked about.
    """

    device: DeviceId
    kid: str
    use: str
    expires: Micros
    at: Micros


@dataclass(frozen=True, slots=True)
class Use:
    """A token that its device was let in with: first and last; admitted, and asked about once more since."""

    first_use: Micros
    last_use: Micros
    expires_at: Micros
    admitted_at: Micros | None
    repeated_at: Micros | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What the registry knows of a device that logs in.

    Attributes:
        enabled: it is not suspended.
        keys: its active ones.
        uses: of tokens that are not expired, by `use_of`.
        live: does it have a session that nothing has replaced?
        seen_at: when a session of it was last heard of.
        guard: what is remembered of it.
    """

    enabled: bool
    keys: Set[str]
    uses: Mapping[str, Use]
    live: bool
    seen_at: Micros | None
    guard: Guard


def decide(known: Known | None, attempt: Attempt, limits: Limits) -> tuple[Known | None, Admission]:
    """The decision, and what is known from then on. A login that is refused changes nothing but that its token, once
    its key is good, was used, which is recorded before."""
    if known is None or attempt.kid not in known.keys:
        return known, Admission("the device or its key is gone")
    if not known.enabled:
        return known, Admission("the device is suspended")
    use = known.uses.get(attempt.use)
    if use is None:
        use = Use(attempt.at, attempt.at, attempt.expires, None)
    elif attempt.at - use.first_use > FIRST_USE_LIFE:
        return known, Admission("the token was used before; each connection needs one of its own")
    elif is_repeated(use.admitted_at, use.repeated_at, attempt.at):
        again = replace(use, last_use=attempt.at, repeated_at=attempt.at)
        return replace(known, uses={**known.uses, attempt.use: again}), Admission()
    unseen_since = _unseen_since(known, attempt.use)
    guard, answer = admit(known.guard, attempt.at, limits, live=known.live, unseen_since=unseen_since)
    if answer.refusal is not None:
        return known, answer
    use = replace(use, last_use=attempt.at, admitted_at=attempt.at, repeated_at=None)
    return replace(known, uses={**known.uses, attempt.use: use}, guard=guard), answer


def _unseen_since(known: Known, but: str) -> Micros | None:
    """When the last login, other than this one, was let in, if no session has been seen since."""
    admitted = max((it.admitted_at or 0 for key, it in known.uses.items() if key != but), default=0)
    return admitted if admitted > (known.seen_at or 0) else None


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
