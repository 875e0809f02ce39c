"""What the domain needs from the outside, as protocols. One adapter package each: `fabric.amqp`,
`fabric.sql`, `fabric.management`.

Every call may raise `fabric.errors.Temporary`; whatever else it raises is said where it differs.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from fabric import presence
from fabric.audit import Action, Deed, Entry
from fabric.command import Command, Micros, State
from fabric.identity.admission import Admission, Attempt
from fabric.identity.meters import Limits, Meter
from fabric.model import (
    Device,
    DeviceKey,
    DomainEvent,
    EnrollmentCode,
    IssuedToken,
    LogRow,
    Mailbox,
    QuarantineRow,
    Result,
    RevokedTokens,
    TimelineRow,
    Write,
)
from fabric.presence import Listed, Session
from topology.layout import Binding, Policy, Queue
from topology.names import CommandId, DeviceId
from topology.wire import Message

# ---- Broker ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it came, and the one way to settle it. `offset` is its place in a stream."""

    message: Message
    exchange: str
    routing_key: str
    redelivered: bool
    ack: Callable[[], Awaitable[None]]
    offset: int | None = None


class PublishAll(Protocol):
    async def __call__(self, messages: Sequence[Message], timeout: float = 5.0) -> None:
        """Return once the broker has confirmed all. Raises `PublishFailed`: the fate of some is unknown."""
        ...


class Publisher(Protocol):
    """Publishes persistent, confirmed messages over a connection of its own."""

    async def publish(
        self, exchange: str, routing_key: str, message: Message, *, mandatory: bool = False, timeout: float = 5.0
    ) -> None:
        """Return once the broker has confirmed.

        Raises:
            NoMailbox: mandatory and returned.
            PublishFailed: nacked, timed out, or the channel was lost: the fate is unknown.
        """
        ...

    def in_order(self, exchange: str, routing_key: str) -> AbstractAsyncContextManager[PublishAll]:
        """For messages whose order counts: what is published goes over the connection that there is on entry, or fails,
        and reaches the queue in the order given. What comes back is a failure, too.

        Raises:
            Temporary: there is no connection (on entry).
        """
        ...

    async def send(self, exchange: str, routing_key: str, message: Message) -> None:
        """Publish without waiting for a confirm (wake-ups and answers, which may be lost)."""
        ...

    async def declare(self, queue: Queue, bindings: Sequence[Binding]) -> None:
        """Declare a queue and its bindings, idempotently."""
        ...

    async def delete_queue(self, name: str) -> None: ...

    async def depth(self, queue: str) -> int | None:
        """Ready messages of a queue, or None when it does not exist."""
        ...


class BrokerAdmin(Protocol):
    """The broker's management API, with the administrator's credential."""

    async def close_connections(self, username: str) -> int:
        """Close every connection of a user; returns how many there were. Takes milliseconds."""
        ...

    async def connections(self) -> list[Listed]:
        """All connections, of whatever user, as they were up to `presence.AGE` ago."""
        ...

    async def close_connection(self, name: str) -> None:
        """Close one that `connections` shows; without effect on one that is too young to be shown."""
        ...

    async def put_policy(self, policy: Policy) -> None: ...


class ConnectionCloser(Protocol):
    """Closes a device's live connections, with the answer that they are closed."""

    async def close(self, device: DeviceId, timeout: float = 2.0) -> int:
        """How many there were. One that is still in its handshake is not among them.

        Raises:
            Temporary: nobody has answered within so many seconds; they may be open or closed.
        """
        ...


# ---- Ledger ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Waiting:
    """A command that waits for its device, with its last attempt's number."""

    command: CommandId
    device: DeviceId
    seq: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Due:
    """A command whose deadline, or time to answer, is `at`."""

    id: CommandId
    state: State
    at: Micros


class Ledger(Protocol):
    """The commands. All changes go through `write`, in batches: one transaction per flush."""

    async def write(self, *writes: Write, patience: float = 0.0) -> list[Result]:
        """Apply all, in one transaction with others that wait, and commit; results in order. With `patience`
        (seconds), wait so long at most for another write to start the transaction.

        A change is stepped through the transition table against the committed row (locked), so that
        any number of processes may write at once.

        Raises:
            NotFound: an `Accept` on an unknown device.
            Conflict: an `Accept` for another generation of its device, or with another command's id. The same
                command again is no conflict: the result is the command as it is now.
        """
        ...

    async def command(self, id: CommandId) -> tuple[Command, list[TimelineRow]] | None: ...

    async def commands(
        self,
        *,
        device: DeviceId | None = None,
        states: Collection[State] | None = None,
        issuer: str | None = None,
        after: tuple[Micros, CommandId] | None = None,
        limit: int = 100,
    ) -> list[Command]:
        """Commands, the newest first; `after` is `(accepted_at, id)` of the last one seen."""
        ...

    async def waiting_of(self, issuers: Sequence[str], limit: int) -> list[CommandId]:
        """Commands of these issuers, at least one, that wait for their devices."""
        ...

    async def mailboxes(self, devices: Sequence[DeviceId]) -> Mapping[DeviceId, Mailbox]:
        """What may be in these mailboxes: commands that wait, and withdrawn ones until their deadline."""
        ...

    async def due(self, by: Micros, limit: int) -> list[Due]:
        """Commands whose deadline or response time is not after `by`, in its order."""
        ...

    async def to_publish(self, now: Micros, limit: int) -> list[tuple[CommandId, int]]:
        """Waiting commands that must be published (again), with their last attempt's number."""
        ...

    async def waiting_by_device(self, cell: str) -> Mapping[DeviceId, list[tuple[CommandId, int]]]:
        """Per device, the commands that the ledger holds `queued` and no publish is due for, with their last
        attempt's number."""
        ...

    async def waiting(self, cell: str, *, accepted_by: Micros, after: Waiting | None, limit: int) -> list[Waiting]:
        """Commands that wait for the devices of a cell, accepted at that time or before and not past their
        deadline, by device and `seq`; `after` is the last one seen."""
        ...

    async def sequence(self, owner: str, lease: Micros, limit: int) -> int | None:
        """Take or renew the lease, and give the next unsequenced events their positions; returns how many.
        None when another owner holds the lease."""
        ...

    async def leave_sequence(self, owner: str) -> None:
        """Give the lease up, if `owner` holds it, for whoever is next."""
        ...

    async def unpublished(self, owner: str, limit: int) -> list[LogRow]:
        """The events that have a position and are not yet marked published, in order; none for whoever does not
        hold the lease."""
        ...

    async def sequenced(self, owner: str, first: int, last: int) -> None:
        """Everything from position `first` to `last` has been published. Without effect when something before
        `first` has not."""
        ...

    async def publish_again(self, limit: int) -> None:
        """The newest events, so many at most, are to be published once more: the stream that had them is gone."""
        ...

    async def events(self, after: int, limit: int) -> list[LogRow]:
        """The event log from the position after `after`, in order, without what was pruned; empty only at its end."""
        ...

    async def last_position(self) -> int:
        """The last position given to an event; 0 when there is none."""
        ...

    async def pruned_through(self) -> int:
        """The largest position of an event that was pruned; 0 when none was. Smaller ones may be kept."""
        ...

    async def quarantine(self, rows: Sequence[QuarantineRow]) -> None:
        """Keep mail that could not be understood, the newest 100 rows per device."""
        ...

    async def time_offset(self) -> Micros:
        """The database's clock minus this process's, measured now."""
        ...

    async def incarnation(self) -> str: ...

    async def close(self) -> None: ...


class Registry(Protocol):
    """Devices, keys, codes and tokens."""

    async def create_device(self, device: Device, code: EnrollmentCode) -> Device:
        """Raises `Conflict` when the id exists. The generation is one past the last of that id, ever."""
        ...

    async def device(self, id: DeviceId) -> Device | None: ...

    async def devices(self, after: DeviceId | None, limit: int) -> list[Device]: ...

    async def groups(self, ids: Sequence[DeviceId]) -> Mapping[DeviceId, tuple[str, ...]]:
        """The groups of those that exist; at least one is asked for."""
        ...

    async def mailbox(self, id: DeviceId) -> Mailbox: ...

    async def update_device(self, device: Device, expected_version: int | None) -> Device:
        """Raises `NotFound`; `PreconditionFailed` when the version differs. Disabling queues a closure."""
        ...

    async def delete_device(self, id: DeviceId, expected_version: int | None, now: Micros) -> list[Command]:
        """Settle the open commands, drop keys and codes, and queue a closure, in one transaction;
        returns the commands it settled. Raises `NotFound`, `PreconditionFailed`."""
        ...

    async def add_code(self, code: EnrollmentCode) -> None:
        """A new code voids the device's open ones. Raises `NotFound`."""
        ...

    async def redeem(self, code_hash: str, key: DeviceKey, now: Micros) -> tuple[Device, bool]:
        """Register the key for the device of a code (`key.device` is ignored); True when it is new.

        Raises `Gone` when the code is unknown, expired or was used by another key (an event
        `enrollment.contested` is recorded then), `Conflict` when the key is another device's.
        """
        ...

    async def revoke_device(self, id: DeviceId, now: Micros) -> tuple[Device, list[Command]]:
        """Drop all keys and codes, queue a closure and start a new generation, whose predecessor's waiting
        commands are cancelled: returned with the device. Raises `NotFound`."""
        ...

    async def add_key(self, key: DeviceKey) -> tuple[DeviceKey, bool]:
        """Register a key under `key.parent`; False, and the key as it is kept, when it was registered before.

        Raises `Unauthenticated` when the device is suspended or gone, or the parent is; `Conflict` when it has
        `MAX_KEYS` active ones, or the key was retired or is another device's.
        """
        ...

    async def retire_key(self, id: DeviceId, kid: str, by: str, now: Micros) -> None:
        """Let a key log in no more, leave those registered under it, and queue a closure. Doing it again changes
        nothing.

        Raises `NotFound`, `Forbidden` unless `by` descends from it, `Unauthenticated` when `by` is gone.
        """
        ...

    async def revoke_key(self, id: DeviceId, kid: str, now: Micros) -> list[str]:
        """Drop a key and those registered under it, and under those, void the open codes and queue a closure;
        returns the keys. Raises `NotFound`."""
        ...

    async def in_hand(self, id: DeviceId) -> int:
        """How many open commands a device has picked up, of whatever generation."""
        ...

    async def last_login(self, id: DeviceId) -> Micros | None:
        """When a login was last recorded, also of a device deleted since; kept as long as its token lives.
        After a revocation, one younger than the broker's handshake may still become a connection."""
        ...

    async def keys(self, id: DeviceId) -> list[DeviceKey]:
        """The active ones, the oldest first."""
        ...

    async def greet(self, id: DeviceId, now: Micros, agent_version: str | None) -> str:
        """Note that a device said hello, if it is one; returns the fabric's incarnation."""
        ...

    async def add_token(self, token: IssuedToken, minter_issued_at: Micros | None = None) -> None:
        """Raises `Unauthenticated` when its parent is unknown or revoked, or the tokens of `token.minter` are, of which
        the one that this is made with was issued at that time."""
        ...

    async def token(self, jti: str) -> IssuedToken | None: ...

    async def tokens(self, after: str | None, limit: int) -> list[IssuedToken]: ...

    async def revoke_token(self, jti: str, now: Micros) -> RevokedTokens:
        """Revoke a token and all that were made with it, and with those. Raises `NotFound`."""
        ...

    async def revoke_subject(self, subject: str, now: Micros) -> RevokedTokens:
        """Revoke all tokens of a subject, and all that were made with them."""
        ...

    async def not_before(self, identity: str) -> Micros | None:
        """When an external identity was revoked: tokens that were issued then or before are not good. None when it was
        not within the life of a token."""
        ...

    async def closures(self, limit: int) -> list[tuple[int, DeviceId]]:
        """Devices whose connections are to be closed, oldest first, each with the closure's id."""
        ...

    async def closed(self, ids: Sequence[int]) -> None: ...

    async def record(self, event: DomainEvent) -> None: ...

    async def close(self) -> None: ...


class KeySource(Protocol):
    """Where an external provider's keys are."""

    async def fetch(self) -> bytes:
        """The JWK set as it is now, within a few seconds. Raises `ProviderUnavailable`."""
        ...


class Sessions(Protocol):
    """The connections of devices, and what is remembered of a device between its logins."""

    async def apply(self, changes: Sequence[presence.Change]) -> Mapping[DeviceId, int]:
        """Apply what was heard of sessions, in order, with the presence and the events `device.connected` and
        `device.disconnected` that follow; returns how many live ones the devices concerned have."""
        ...

    async def live(self, cell: str) -> list[Session]: ...

    async def forget(self, ended_before: Micros) -> None: ...

    async def admit(self, attempt: Attempt, limits: Limits) -> Admission:
        """Take `admission.decide` under the lock of the device's row, so that a revocation either sees the login or
        forbids it. Those that wait meanwhile are decided together, in one transaction."""
        ...

    async def took_over(self, device: DeviceId, now: Micros, limits: Limits) -> bool:
        """The device's connections were closed for a newcomer admitted at `now`. True when that made an event
        `device.contested`."""
        ...

    async def throttle(self, device: DeviceId, exceeded: Meter, now: Micros) -> Micros | None:
        """Refuse logins for a while, with an event `device.throttled`: how long; None when they already are."""
        ...


class Audit(Protocol):
    """Who did what. What goes through the other ports is recorded by them, in the transaction of the deed."""

    async def record(self, deed: Deed) -> None:
        """For what is done elsewhere, or refused; by whoever acts at present (`fabric.audit.acting`)."""
        ...

    async def entries(
        self,
        *,
        device: DeviceId | None = None,
        subject: str | None = None,
        action: Action | None = None,
        since: Micros | None = None,
        until: Micros | None = None,
        after: tuple[Micros, int] | None = None,
        limit: int = 100,
    ) -> list[Entry]:
        """From `since` on and before `until`, the newest first; `after` is `(at, position)` of the last one seen."""
        ...

    async def prune(self, before: Micros, limit: int) -> bool:
        """Delete up to `limit` of the oldest in one short transaction; True when there is more. Raises `Invalid` for
        any that is younger than the database lets go."""
        ...


class Gateways(Protocol):
    """Which gateways serve, each with a lease that it renews."""

    async def renew(self, id: str, now: Micros, lease: Micros) -> None:
        """A gateway that serves is taken for one for `lease` from now on."""
        ...

    async def leave(self, id: str) -> None: ...

    async def live(self, now: Micros) -> list[str]: ...


class Retention(Protocol):
    """Forgets what was over long ago."""

    async def prune(self, before: Micros, limit: int) -> bool:
        """Delete, in one short transaction, up to `limit` of each: commands settled before then, with their events;
        events of devices; mail in quarantine; expired idempotency keys; revocations that no token outlived. Events that
        are not yet published stay, and their commands with them. True when there is more."""
        ...


# ---- Streams -----------------------------------------------------------------------------------------


class StreamReader(Protocol):
    def read(self, stream: str, offset: str | int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Messages of a stream from `first`, `next` or an offset, as they come."""
        ...
