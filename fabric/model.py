"""The fabric's values beside the command: devices, their keys, tickets, issued tokens, events, quarantine.

Times are integer microseconds since the epoch on the fabric's clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric.command import Command, Entry, Event, Micros, Step
from topology.names import CommandId, DeviceId


@dataclass(frozen=True, slots=True)
class Device:
    """`generation` grows with every re-creation: mail and reports of another one are dropped.
    `version` is the ETag."""

    id: DeviceId
    cell: str
    generation: int
    groups: tuple[str, ...]
    labels: Mapping[str, str]
    enabled: bool
    created_at: Micros
    version: int
    next_seq: int = 1
    last_seen: Micros | None = None
    agent_version: str | None = None
    connected: bool = False
    connection_since: Micros | None = None


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What the ledger knows of a mailbox; `oldest_at` is when its oldest command was accepted."""

    depth: int
    oldest_at: Micros | None


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """A registered public key; `jwk` has the members crv, kty, x, y."""

    device: DeviceId
    kid: str
    jwk: Mapping[str, str]
    created_at: Micros
    last_used: Micros | None = None


@dataclass(frozen=True, slots=True)
class EnrollmentCode:
    """A one-time code as it is kept: hashed. `used_by` is the thumbprint that used it."""

    code_hash: str
    device: DeviceId
    expires_at: Micros
    used_by: str | None = None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """What is kept of a token that the gateway signed: never the token."""

    jti: str
    subject: str
    scopes: tuple[str, ...]
    issued_at: Micros
    expires_at: Micros
    revoked_at: Micros | None = None


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something that happened to a device and is no row of a command's timeline."""

    kind: str
    device: DeviceId
    at: Micros
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """A recorded entry of a command; `position` is its place in the event log, once sequenced."""

    entry: Entry
    version: int
    position: int | None


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of the event log as the sequencer publishes it. `document` is its JSON object."""

    position: int
    kind: str
    device: DeviceId
    command: CommandId | None
    version: int
    at: Micros
    document: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """Mail that could not be understood, kept for a person to look at (4 KiB of it)."""

    at: Micros
    source: str
    device: DeviceId | None
    routing_key: str
    reason: str
    body: bytes


# ---- What goes into the batch ledger, and comes out --------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accept:
    """Take a new command into the ledger. The device's row gives `seq` and must be of `generation`."""

    command: Command


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to a command. With `device`, the change is dropped unless the command is that
    device's, and of its present generation."""

    command: CommandId
    event: Event
    device: DeviceId | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    command: Command


@dataclass(frozen=True, slots=True)
class Changed:
    """`timeline`: the whole of it, when the change settled the command, so that it can be announced."""

    step: Step
    timeline: tuple[TimelineRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nothing was changed: the reason says why (unknown command, another device's, another generation)."""

    reason: str


Write = Accept | Change
Result = Accepted | Changed | Dropped
