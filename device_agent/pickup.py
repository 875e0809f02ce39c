"""The pick-up rules (COMMANDS.md, rules 1 to 5), as decisions without I/O. Times are epoch ms of the fabric.

The shell (`mailbox`) does what is decided here, in the order that rule 1 demands: journal, ack, receipt, start.
"""

from dataclasses import dataclass

from device_agent.journal import Entry, Interrupted
from topology import names, wire

STALE_AFTER = 2_000  # ms: fresh mail is not claimed, so that live traffic pays nothing
MAX_RERUNS = 3  # of an idempotent handler after crashes
MAX_DENIED = 1_000  # answers about unverified mail that are remembered
DOUBT_FOR = 60_000  # ms in which all mail is claimed after such an answer had to be forgotten

MAX_STRANGERS = 100  # ids of unknown keys that are remembered
STRANGE_FOR = 60_000  # ms in which the fabric is not asked again about such an id

EXPIRED = "expired"
MALFORMED = "malformed"
UNSUPPORTED = "unsupported"
UNSIGNED = "unsigned"
CLAIM_REFUSED = "claim-refused"
INTERRUPTED = "interrupted"

TAKEN = "taken"
UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True)
class Run:
    """Journal, ack, receipt, start."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask the fabric first; the mail stays unacked and keeps its slot."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Journal, ack, and say why it did not start. Always the status `rejected`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Journal and ack in silence; `conflict`: another agent holds this identity's command."""

    conflict: bool


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Ack; it is in the journal already. A last word about it is said again: the fabric may not know."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Say `failed` with this reason for an interrupted command."""

    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Say no more about an interrupted command than that it started: nobody knows what it did."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Ack unverified mail and say nothing under its id."""


Decision = Run | Claim | Answer | Duplicate


class Denied:
    """What was said under the ids of mail that is no true command; the true one must not make a lie of it.

    Bounded, since whoever can put mail here could fill it. Times are those of the fabric, in ms.
    """

    def __init__(self) -> None:
        self._said: dict[names.CommandId, str] = {}
        self._doubt_until = 0

    def add(self, command: names.CommandId, reason: str, now: int) -> None:
        if len(self._said) >= MAX_DENIED:
            del self._said[next(iter(self._said))]  # the oldest
            self._doubt_until = now + DOUBT_FOR
        self._said[command] = reason

    def said(self, command: names.CommandId) -> str | None:
        return self._said.get(command)

    def forgot(self, now: int) -> bool:
        """May fresh mail have been denied without our knowing it? Then the fabric is asked, which has been told."""
        return now < self._doubt_until


class Strangers:
    """The ids of keys that the fabric had no news of when it was asked. Bounded, since whoever can put mail here makes
    up as many as it likes. Times are of any one clock, in ms."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def add(self, kid: str, now: float) -> None:
        if len(self._until) >= MAX_STRANGERS:
            del self._until[next(iter(self._until))]  # the oldest
        self._until[kid] = now + STRANGE_FOR

    def has(self, kid: str, now: float) -> bool:
        return now < self._until.get(kid, now)


def decide(
    command: wire.Command,
    *,
    redelivered: bool,
    entry: Entry | None,
    problem: str | None,
    denied: str | None,
    doubtful: bool,
    granted: bool,
    now: int,
) -> Decision:
    """What to do with verified mail when a slot is free.

    Args:
        command: decoded, and its signature checked.
        redelivered: the broker's flag.
        entry: the journal's, if it has one.
        problem: why no handler can take it (unknown command, invalid arguments), or None.
        denied: what was said under its id about mail that could not be verified. That stands, and is not asked about:
            the claim could overtake what was said, and be granted.
        doubtful: something may have been said under its id (`Denied.forgot`).
        granted: the fabric has granted our claim.
        now: the fabric's time.
    """
    if entry is not None:
        return Duplicate()
    if denied is not None:
        return Answer(denied)
    if now >= command.not_after:
        return Answer(EXPIRED)
    if problem is not None:
        return Answer(problem)
    if not granted and (doubtful or must_claim(command, redelivered=redelivered, now=now)):
        return Claim()
    return Run()


def unverified(reason: str, *, held: bool, entry: Entry | None, denied: str | None) -> Answer | Silence:
    """What to say under the id of mail that is unsigned, altered or malformed; nothing of it is journaled.

    `rejected` means that the handler did not start. So nothing is said while the true mail is held here (it waits,
    is being claimed, or runs) or was: it may start, or has. Nor is anything said twice.
    """
    if held or entry is not None or denied is not None:
        return Silence()
    return Answer(reason)


def must_claim(command: wire.Command, *, redelivered: bool, now: int) -> bool:
    """Rule 2: asked for, redelivered, not the first attempt, or older than 2 s."""
    return command.claim or redelivered or command.attempt > 1 or now - command.at > STALE_AFTER


def refused(reason: str) -> Answer | Refused:
    """What a refused claim means for a command that never started here."""
    if reason == UNANSWERED:
        return Answer(CLAIM_REFUSED)
    return Refused(conflict=reason == TAKEN)


def after_crash(entry: Interrupted, *, now: int) -> Run | Fail | Doubt:
    """What becomes of a command that was started and has no outcome.

    An idempotent one (its request was kept) runs again, at most three times, and never later than its first
    run could have lasted: "unlock the door" must not run a day late because the power was off.
    """
    if entry.request is None:
        return Doubt()
    latest = max(entry.not_after, entry.started_at + entry.request.response_timeout)
    if entry.reruns >= MAX_RERUNS or now >= latest:
        return Fail(INTERRUPTED)
    return Run()


def junk(message_id: str | None, error: wire.Malformed) -> tuple[names.CommandId, str] | None:
    """Whom to answer about a message that is no command of this contract, and how; None: nobody can be named."""
    if message_id is None or not names.is_command_id(message_id):
        return None
    return names.CommandId(message_id), UNSUPPORTED if isinstance(error, wire.Unsupported) else MALFORMED
