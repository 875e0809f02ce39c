"""What the domain needs from the outside, as protocols. One adapter package each: `fabric.amqp`,
`fabric.sql`, `fabric.management`.

Every call may raise `fabric.errors.Temporary`; whatever else it raises is said where it differs.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from fabric.command import Command, Micros, State
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
    TimelineRow,
    Write,
)
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

    async def connected_users(self) -> frozenset[str]:
        """The users that have a connection now, or had one a few seconds ago."""
        ...

    async def put_policy(self, policy: Policy) -> None: ...


# ---- Ledger ------------------------------------------------------------------------------------------


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

    async def mailboxes(self, devices: Sequence[DeviceId]) -> Mapping[DeviceId, Mailbox]:
        """What may be in these mailboxes: commands that wait, and withdrawn ones until their deadline."""
        ...

    async def due(self, now: Micros, limit: int) -> list[tuple[CommandId, State]]:
        """Commands whose deadline or response time has passed, the longest overdue first."""
        ...

    async def to_publish(self, now: Micros, limit: int) -> list[tuple[CommandId, int]]:
        """Waiting commands that must be published (again), with their last attempt's number."""
        ...

    async def waiting_by_device(self, cell: str) -> Mapping[DeviceId, list[tuple[CommandId, int]]]:
        """Per device, the commands that the ledger holds `queued` and no publish is due for, with their last
        attempt's number."""
        ...

    async def sequence(self, owner: str, lease: Micros, limit: int) -> list[LogRow] | None:
        """Give the next unsequenced events their positions and return those not yet marked published.
        None when another owner holds the lease."""
        ...

    async def sequenced(self, owner: str, position: int) -> None:
        """Everything up to `position` has been published."""
        ...

    async def events(self, after: int, limit: int) -> list[LogRow]:
        """The event log from the position after `after`, in order, without gaps."""
        ...

    async def last_position(self) -> int:
        """The last position given to an event; 0 when there is none."""
        ...

    async def quarantine(self, rows: Sequence[QuarantineRow]) -> None:
        """Keep mail that could not be understood, the newest 100 rows per device."""
        ...

    async def time_offset(self) -> Micros:
        """The database's clock minus this process's, measured now."""
        ...

    async def incarnation(self) -> str: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Login:
    """What the login decision needs, read and recorded under the device's row lock."""

    device: Device
    key: DeviceKey | None
    first_use: Micros


class Registry(Protocol):
    """Devices, keys, codes and tokens."""

    async def create_device(self, device: Device, code: EnrollmentCode) -> Device:
        """Raises `Conflict` when the id exists. The generation is one past the last of that id, ever."""
        ...

    async def device(self, id: DeviceId) -> Device | None: ...

    async def devices(self, after: DeviceId | None, limit: int) -> list[Device]: ...

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

    async def revoke_key(self, id: DeviceId, kid: str, now: Micros) -> None:
        """Drop one key, void the open codes and queue a closure. Raises `NotFound`."""
        ...

    async def last_login(self, id: DeviceId) -> Micros | None:
        """When a login was last recorded, also of a device deleted since; kept as long as its token lives.
        After a revocation, one younger than the broker's handshake may still become a connection."""
        ...

    async def keys(self, id: DeviceId) -> list[DeviceKey]: ...

    async def login(self, id: DeviceId, kid: str, jti: str, now: Micros, expires: Micros) -> Login | None:
        """Lock the device's row, read the key, record the token's first use. None: no such device."""
        ...

    async def seen(self, id: DeviceId, now: Micros, agent_version: str | None) -> None: ...

    async def connection(self, id: DeviceId, connected: bool, now: Micros) -> None: ...

    async def add_token(self, token: IssuedToken) -> None: ...

    async def token(self, jti: str) -> IssuedToken | None: ...

    async def tokens(self, after: str | None, limit: int) -> list[IssuedToken]: ...

    async def revoke_token(self, jti: str, now: Micros) -> IssuedToken | None: ...

    async def closures(self, limit: int) -> list[tuple[int, DeviceId]]:
        """Devices whose connections are to be closed, oldest first, each with the closure's id."""
        ...

    async def closed(self, ids: Sequence[int]) -> None: ...

    async def record(self, event: DomainEvent) -> None: ...

    async def close(self) -> None: ...


# ---- Streams -----------------------------------------------------------------------------------------


class StreamReader(Protocol):
    def read(self, stream: str, offset: str | int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Messages of a stream from `first`, `next` or an offset, as they come."""
        ...
