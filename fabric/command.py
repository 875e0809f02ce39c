"""The life of a command: states, inputs, and the one table that says what follows what.

Pure: values in, values out; the time is passed in. Everything that can change a command's state is an
`Input` applied by `step`, and everything `step` does is read from `TABLE`. The source of every row is
the contract's transition table; the diagram in the docs is generated from here.

Times are integer microseconds since the epoch on the fabric's clock.
"""

from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Final

from topology.names import CommandId, DeviceId

Micros = int

TIMELINE_LIMIT = 64  # rows; evidence that changes nothing is no longer recorded beyond it
PUBLISH_GRACE: Micros = 5_000_000  # after which a publish without a recorded fate counts as lost
RETRY_FIRST: Micros = 500_000
RETRY_LONGEST: Micros = 60_000_000
_TRACKED_COPIES = 64  # attempts of unknown fate remembered one by one; then "another copy is possible" stays true
_UNTRACKED = 0  # the attempt number that stands for those beyond


class State(StrEnum):
    ACCEPTED = "accepted"
    QUEUED = "queued"
    DELIVERED = "delivered"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    UNDELIVERABLE = "undeliverable"
    UNANSWERED = "unanswered"


WAITING: Final = frozenset({State.ACCEPTED, State.QUEUED})
PICKED_UP: Final = frozenset({State.DELIVERED, State.RUNNING})
ANSWERED: Final = frozenset({State.SUCCEEDED, State.FAILED, State.REJECTED})
SETTLED: Final = frozenset(State) - WAITING - PICKED_UP


class Input(StrEnum):
    """A row of the table. Where a row depends on the command (who holds it, which copies exist, what the
    clock says), `classify` has decided before."""

    CONFIRMED = "confirm, not returned"
    NOT_CONFIRMED = "nack / time-out / lost channel"
    RETURNED = "return, device exists"
    DEAD_MAXLEN_SOLE = "dead `maxlen`, sole copy"
    DEAD_MAXLEN_COPY = "dead `maxlen`, another copy possible"
    DEAD_EXPIRED_DUE = "dead `expired`, now ≥ deadline"
    DEAD_EXPIRED_EARLY = "dead `expired`, earlier"
    DEAD_REJECTED = "dead `rejected`"
    RECEIVED = "`received`, no claim"
    RECEIVED_CLAIM = "`received`, `claim: true`"
    RUNNING = "`running` / progress"
    CLAIM = "claim, now < deadline"
    CLAIM_LATE = "claim, now ≥ deadline"
    CLAIM_BY_OTHER = "claim, held by another agent"
    SUCCEEDED = "outcome succeeded"
    FAILED = "outcome failed"
    REJECTED = "outcome rejected"
    REJECTED_EXPIRED = "outcome rejected: expired, now ≥ deadline"
    REJECTED_BY_OTHER = "outcome rejected, held by another agent"
    CANCEL = "cancel / supersede / purge"
    DEADLINE = "deadline"
    RESPONSE_DUE = "response due"
    REPUBLISH = "republish"
    DEVICE_DELETED = "device deleted"


class Verdict(Enum):
    """What the one who brought the input is told, beside the state."""

    NONE = "·"
    RETRY = "retry"
    REDECLARE = "redeclare, retry"
    GRANT = "grant"
    TAKEN = "taken"
    REFUSE = "refuse"
    CONFLICT = "conflict logged"
    VIOLATION = "violation logged"
    DONE_BEFORE = "200"
    TOO_LATE = "409"
    ILLEGAL = "✗"


@dataclass(frozen=True, slots=True)
class Cell:
    """What an input does in a state: `to` None keeps the state; `late` marks the command late."""

    to: State | None = None
    verdict: Verdict = Verdict.NONE
    late: bool = False


_COLUMNS: Final = (
    (State.ACCEPTED,),
    (State.QUEUED,),
    (State.DELIVERED,),
    (State.RUNNING,),
    (State.SUCCEEDED, State.FAILED, State.REJECTED),
    (State.EXPIRED,),
    (State.CANCELLED,),
    (State.UNDELIVERABLE,),
    (State.UNANSWERED,),
)

_KEEP = Cell()
_ILLEGAL = Cell(verdict=Verdict.ILLEGAL)
_RETRY = Cell(verdict=Verdict.RETRY)
_GRANT = Cell(verdict=Verdict.GRANT)
_TAKEN = Cell(verdict=Verdict.TAKEN)
_REFUSE = Cell(verdict=Verdict.REFUSE)
_CONFLICT = Cell(verdict=Verdict.CONFLICT)
_TOO_LATE = Cell(verdict=Verdict.TOO_LATE)


def _to(state: State, verdict: Verdict = Verdict.NONE) -> Cell:
    return Cell(state, verdict)


def _late(state: State) -> Cell:
    return Cell(state, late=True)


_DOUBT = _late(State.UNANSWERED)
_PICKED_UP_LATE = (_KEEP, _DOUBT, _DOUBT, _DOUBT, _KEEP)  # from D to unanswered: started though settled
_NO_CLAIM = (_REFUSE,) * 5


def _outcome(state: State) -> tuple[Cell, ...]:
    return (_to(state),) * 4 + (_CONFLICT,) + (_late(state),) * 4


# accepted, queued, delivered, running, D, expired, cancelled, undeliverable, unanswered
_ROWS: Final[dict[Input, tuple[Cell, ...]]] = {
    Input.CONFIRMED: (_to(State.QUEUED),) + (_KEEP,) * 8,
    Input.NOT_CONFIRMED: (_RETRY,) + (_KEEP,) * 8,
    Input.RETURNED: (Cell(verdict=Verdict.REDECLARE), _to(State.ACCEPTED, Verdict.REDECLARE)) + (_KEEP,) * 7,
    Input.DEAD_MAXLEN_SOLE: (_to(State.UNDELIVERABLE),) * 2 + (_KEEP,) * 7,
    Input.DEAD_MAXLEN_COPY: (_KEEP,) * 9,
    Input.DEAD_EXPIRED_DUE: (_to(State.EXPIRED),) * 2 + (_KEEP,) * 7,
    Input.DEAD_EXPIRED_EARLY: (_KEEP,) * 9,
    Input.DEAD_REJECTED: (_to(State.UNANSWERED),) * 2 + (_KEEP,) * 2 + _PICKED_UP_LATE,
    Input.RECEIVED: (_to(State.DELIVERED),) * 2 + (_KEEP,) * 2 + _PICKED_UP_LATE,
    Input.RECEIVED_CLAIM: (_KEEP,) * 9,
    Input.RUNNING: (_to(State.RUNNING),) * 3 + (_KEEP,) + _PICKED_UP_LATE,
    Input.CLAIM: (_to(State.DELIVERED, Verdict.GRANT),) * 2 + (_GRANT,) * 2 + _NO_CLAIM,
    Input.CLAIM_LATE: (_to(State.EXPIRED, Verdict.REFUSE),) * 2 + (_GRANT,) * 2 + _NO_CLAIM,
    Input.CLAIM_BY_OTHER: (_ILLEGAL,) * 2 + (_TAKEN,) * 2 + _NO_CLAIM,
    Input.SUCCEEDED: _outcome(State.SUCCEEDED),
    Input.FAILED: _outcome(State.FAILED),
    Input.REJECTED: (
        (_to(State.REJECTED),) * 3
        + (_to(State.REJECTED, Verdict.VIOLATION), _CONFLICT)
        + (_KEEP,) * 3
        + (_late(State.REJECTED),)
    ),
    Input.REJECTED_EXPIRED: (
        (_to(State.EXPIRED),) * 2
        + (_to(State.REJECTED), _to(State.REJECTED, Verdict.VIOLATION), _CONFLICT)
        + (_KEEP,) * 3
        + (_late(State.REJECTED),)
    ),
    Input.REJECTED_BY_OTHER: (
        (_ILLEGAL,) * 2 + (_to(State.REJECTED), _to(State.REJECTED, Verdict.VIOLATION), _CONFLICT) + (_KEEP,) * 4
    ),
    Input.CANCEL: (
        (_to(State.CANCELLED),) * 2 + (_TOO_LATE,) * 4 + (Cell(verdict=Verdict.DONE_BEFORE),) + (_TOO_LATE,) * 2
    ),
    Input.DEADLINE: (_to(State.EXPIRED),) * 2 + (_KEEP,) * 7,
    Input.RESPONSE_DUE: (_ILLEGAL,) * 2 + (_to(State.UNANSWERED),) * 2 + (_KEEP,) * 5,
    Input.REPUBLISH: (_RETRY,) * 2 + (_KEEP,) * 7,
    Input.DEVICE_DELETED: (_to(State.UNDELIVERABLE),) * 2 + (_to(State.UNANSWERED),) * 2 + (_KEEP,) * 5,
}

TABLE: Final[dict[tuple[State, Input], Cell]] = {
    (state, given): cell
    for given, row in _ROWS.items()
    for states, cell in zip(_COLUMNS, row, strict=True)
    for state in states
}


# ---- What happens to commands, as it is brought here -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker confirmed this attempt's publish and did not return it."""

    attempt: int


@dataclass(frozen=True, slots=True)
class NotConfirmed:
    """Nacked, timed out or the channel was lost: the attempt's fate is unknown."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Returned:
    """The broker returned the attempt: the device has no mailbox."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """`reason` is the broker's: `maxlen`, `expired`, `rejected`; another counts as `rejected`.
    `clock_open`: may deadlines be announced now?"""

    attempt: int
    reason: str
    clock_open: bool


@dataclass(frozen=True, slots=True)
class Receipted:
    agent: str
    running: bool
    progress: str | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    agent: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The device's word. `status` is one of `ANSWERED`."""

    agent: str
    status: State
    reason: str | None
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Withdrawn by its issuer, superseded or purged; `by` says which."""

    by: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


@dataclass(frozen=True, slots=True)
class ResponseDue:
    pass


@dataclass(frozen=True, slots=True)
class Republished:
    """The attempt after `attempt` is about to be published; `why` is the evidence. Moot when another
    worker has made that next attempt already."""

    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class DeviceDeleted:
    pass


Event = (
    Confirmed | NotConfirmed | Returned | DeadLettered | Receipted | Claimed | Answered | Cancelled
    | DeadlinePassed | ResponseDue | Republished | DeviceDeleted
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    status: State
    reason: str | None
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Command:
    """A command as the ledger holds it.

    `holder` is the agent that picked it up, `copies` the attempts that may be in the mailbox,
    `publish_due` when it must be published (again), `response_due` when its outcome is missing.
    `version` counts its changes; `rows` its timeline.
    """

    id: CommandId
    device: DeviceId
    generation: int
    seq: int
    name: str
    body: bytes
    content_type: str
    issuer: str
    claim: bool
    supersedes: str | None
    accepted_at: Micros
    deadline: Micros
    response_timeout: Micros
    sig: str
    sig_kid: str
    traceparent: str | None
    state: State = State.ACCEPTED
    reason: str | None = None
    late: bool = False
    attempt: int = 1
    copies: tuple[int, ...] = (1,)
    publish_due: Micros | None = None
    holder: str | None = None
    response_due: Micros | None = None
    settled_at: Micros | None = None
    progress: str | None = None
    outcome: Outcome | None = None
    version: int = 1
    rows: int = 1

    @property
    def due(self) -> Micros | None:
        """When the clock next has something to say about it; None once settled."""
        if self.state in WAITING:
            return self.deadline
        return self.response_due if self.state in PICKED_UP else None


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the timeline: the state after an input, and the input as evidence."""

    state: State
    at: Micros
    evidence: str
    detail: str | None
    changed: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What one input did. `entry` is None when nothing is worth recording; `settled` when the command was
    settled by it, for the first time or late: that is announced."""

    command: Command
    given: Input
    verdict: Verdict
    entry: Entry | None
    settled: bool


def classify(command: Command, event: Event, now: Micros) -> Input:
    """The table's row for what happened to this command."""
    match event:
        case Confirmed():
            return Input.CONFIRMED
        case NotConfirmed():
            return Input.NOT_CONFIRMED
        case Returned():
            return Input.RETURNED
        case DeadLettered(attempt, "maxlen", _):
            others = set(command.copies) - {attempt}
            return Input.DEAD_MAXLEN_COPY if others else Input.DEAD_MAXLEN_SOLE
        case DeadLettered(_, "expired", clock_open):
            due = clock_open and now >= command.deadline
            return Input.DEAD_EXPIRED_DUE if due else Input.DEAD_EXPIRED_EARLY
        case DeadLettered():
            return Input.DEAD_REJECTED
        case Receipted(_, running, _):
            if running:
                return Input.RUNNING
            return Input.RECEIVED_CLAIM if command.claim else Input.RECEIVED
        case Claimed(agent):
            if command.holder not in (None, agent):
                return Input.CLAIM_BY_OTHER
            return Input.CLAIM if now < command.deadline else Input.CLAIM_LATE
        case Answered(agent, status, reason):
            if status is not State.REJECTED:
                return Input.SUCCEEDED if status is State.SUCCEEDED else Input.FAILED
            if command.holder not in (None, agent):
                return Input.REJECTED_BY_OTHER
            expired = reason == "expired" and now >= command.deadline
            return Input.REJECTED_EXPIRED if expired else Input.REJECTED
        case Cancelled():
            return Input.CANCEL
        case DeadlinePassed():
            return Input.DEADLINE
        case ResponseDue():
            return Input.RESPONSE_DUE
        case Republished():
            return Input.REPUBLISH
        case DeviceDeleted():
            return Input.DEVICE_DELETED


def step(command: Command, event: Event, now: Micros, *, jitter: float = 1.0) -> Step:
    """Apply one event. `jitter` (0 to 1, random) spreads the back-off of a retry.

    Never raises: what the table calls illegal changes nothing and has the verdict `ILLEGAL`.
    """
    given = classify(command, event, now)
    cell = TABLE[command.state, given]
    if cell.verdict is Verdict.ILLEGAL:
        return Step(command, given, cell.verdict, None, settled=False)
    verdict = cell.verdict
    if verdict is Verdict.CONFLICT and isinstance(event, Answered) and _same_outcome(command.outcome, event):
        verdict = Verdict.NONE
    if verdict is Verdict.RETRY and isinstance(event, NotConfirmed | Republished):
        # What concerns an attempt that was overtaken asks for nothing more.
        verdict = Verdict.RETRY if event.attempt == command.attempt and now < command.deadline else Verdict.NONE
    state = cell.to or command.state
    changed = state is not command.state
    after = _take_in(command, event, now, verdict, state, jitter)
    settled = changed and state in SETTLED
    if changed:
        after = replace(
            after,
            state=state,
            late=command.late or cell.late,
            reason=_reason(event, state),
            settled_at=now if settled else None,
            publish_due=after.publish_due if state is State.ACCEPTED else None,
            response_due=after.response_due if state in PICKED_UP else None,
        )
    entry = None
    if changed or (command.rows < TIMELINE_LIMIT and _worth_recording(event, after, command)):
        entry = Entry(state, now, _evidence(event), _detail(event, verdict), changed)
    if after == command and entry is None:
        return Step(command, given, verdict, None, settled=False)
    after = replace(after, version=command.version + 1, rows=command.rows + (entry is not None))
    return Step(after, given, verdict, entry, settled)


def accept(command: Command) -> tuple[Command, Entry]:
    """A new command's first state: its first attempt is committed with it, before it is published."""
    return (
        replace(command, publish_due=command.accepted_at + PUBLISH_GRACE),
        Entry(State.ACCEPTED, command.accepted_at, "ledger", None, changed=True),
    )


def _take_in(command: Command, event: Event, now: Micros, verdict: Verdict, state: State, jitter: float) -> Command:
    """The command with what the event says beside its state."""
    match event:
        case Confirmed(attempt):
            # An older attempt's late confirm says nothing about the one now under way.
            return replace(command, publish_due=None) if attempt == command.attempt else command
        case NotConfirmed() if verdict is Verdict.RETRY:
            return replace(command, publish_due=_retry_at(command, now, jitter))
        case Returned(attempt):
            without = replace(command, copies=_without(command.copies, attempt))
            return replace(without, publish_due=now) if verdict is Verdict.REDECLARE else without
        case DeadLettered(attempt):
            return replace(command, copies=_without(command.copies, attempt))
        case Receipted(agent, _, progress):
            held = _picked_up(command, agent, now) if state not in WAITING else command
            return replace(held, progress=progress) if progress is not None else held
        case Claimed(agent) if verdict is Verdict.GRANT:
            return _picked_up(command, agent, now)
        case Answered(agent, status, reason, content_type, body) if state in ANSWERED and command.state is not state:
            held = replace(command, holder=command.holder or agent)
            return replace(held, outcome=Outcome(status, reason, content_type, body))
        case Republished() if verdict is Verdict.RETRY:
            number = command.attempt + 1
            return replace(
                command, attempt=number, copies=_with(command.copies, number), publish_due=now + PUBLISH_GRACE
            )
        case _:
            return command


def _picked_up(command: Command, agent: str, now: Micros) -> Command:
    return replace(
        command,
        holder=command.holder or agent,
        response_due=command.response_due or now + command.response_timeout,
    )


def _retry_at(command: Command, now: Micros, jitter: float) -> Micros:
    ceiling = min(RETRY_LONGEST, RETRY_FIRST * 2 ** min(command.attempt - 1, 10))
    return now + max(int(ceiling * jitter), RETRY_FIRST // 10)


def _with(copies: tuple[int, ...], attempt: int) -> tuple[int, ...]:
    if len(copies) < _TRACKED_COPIES:
        return (*copies, attempt)
    return (_UNTRACKED, *copies[2:], attempt)


def _without(copies: tuple[int, ...], attempt: int) -> tuple[int, ...]:
    return tuple(copy for copy in copies if copy != attempt)


def _same_outcome(known: Outcome | None, event: Answered) -> bool:
    said = Outcome(event.status, event.reason, event.content_type, event.body)
    return known == said


def _reason(event: Event, state: State) -> str | None:
    match event:
        case Answered(_, _, reason):
            return reason
        case Cancelled(by):
            return by
        case DeadLettered(_, "maxlen", _):
            return "mailbox-full"
        case DeadLettered(_, "rejected", _):
            return "rejected-by-foreign-client"
        case DeviceDeleted():
            return "device-deleted"
        case ResponseDue():
            return "no-outcome"
        case Receipted() if state is State.UNANSWERED:
            return "started-after-settling"
        case _:
            return None


def _evidence(event: Event) -> str:
    match event:
        case Confirmed():
            return "confirm"
        case NotConfirmed():
            return "no-confirm"
        case Returned():
            return "return"
        case DeadLettered():
            return "dead-letter"
        case Receipted():
            return "receipt"
        case Claimed():
            return "claim"
        case Answered():
            return "outcome"
        case Cancelled():
            return "cancel"
        case DeadlinePassed() | ResponseDue():
            return "clock"
        case Republished():
            return "republish"
        case DeviceDeleted():
            return "device-deleted"


def _detail(event: Event, verdict: Verdict) -> str | None:
    match event:
        case NotConfirmed(_, reason) | DeadLettered(_, reason, _):
            return reason
        case Receipted(_, _, progress):
            return progress
        case Claimed():
            return verdict.value
        case Answered(_, status, reason) if verdict in (Verdict.CONFLICT, Verdict.VIOLATION):
            return f"{verdict.value}: {status.value}" + (f": {reason}" if reason else "")
        case Republished(_, why):
            return why
        case _:
            return None


def _worth_recording(event: Event, after: Command, before: Command) -> bool:
    """Evidence that keeps the state is recorded once; repeats, refused cancels and clock ticks are not."""
    match event:
        case Cancelled() | DeadlinePassed() | ResponseDue() | DeviceDeleted():
            return False
        case Receipted(_, _, progress):
            return before.holder != after.holder or progress is not None
        case Answered() if before.state in ANSWERED:
            return not _same_outcome(before.outcome, event)
        case Republished():
            return after.attempt != before.attempt
        case _:
            return True
