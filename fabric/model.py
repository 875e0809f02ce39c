"""The fabric's values beside the command: devices, their keys, tickets, issued tokens, events, quarantine.

Times are integer microseconds since the epoch on the fabric's clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric.command import Command, Entry, Event, Micros, Step
from topology import layout
from topology.names import CommandId, DeviceId


@dataclass(frozen=True, slots=True)
class Device:
    """`generation` grows with every re-creation, revocation and further enrollment: mail of another one is dropped,
    and reports but for those that `Change` lets count. `version` is the ETag. `backlog` is how many commands may
    wait for it; None: the fabric's default."""

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
    backlog: int | None = None


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What the ledger knows of a mailbox. `depth` counts copies that may be in it, withdrawn ones too;
    `oldest_at` is when its oldest command was accepted, `first_deadline` when the first of them is gone."""

    depth: int
    oldest_at: Micros | None
    first_deadline: Micros | None = None


MAX_KEYS = 3  # active ones of a device


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """A registered public key; `jwk` has the members crv, kty, x, y. `parent` is the kid of the key whose token
    authorized it; None: it was enrolled."""

    device: DeviceId
    kid: str
    jwk: Mapping[str, str]
    created_at: Micros
    last_used: Micros | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class EnrollmentCode:
    """A one-time code as it is kept: hashed. `used_by` is the thumbprint that used it."""

    code_hash: str
    device: DeviceId
    expires_at: Micros
    used_by: str | None = None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """What is kept of a token that the gateway signed: never the token. `parent` is the one it was made with, or
    `minter` the external identity."""

    jti: str
    subject: str
    scopes: tuple[str, ...]
    issued_at: Micros
    expires_at: Micros
    revoked_at: Micros | None = None
    parent: str | None = None
    minter: str | None = None


@dataclass(frozen=True, slots=True)
class RevokedTokens:
    """`count`: those that were not revoked before. `subjects`: of all that were to be, revoked before or not."""

    count: int
    subjects: tuple[str, ...]


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
    """A row of the event log: an entry of a command's timeline, or something that happened to a device.

    `groups` are the device's present ones, or its last when it is deleted. `command` is the command as it was at
    `version`, as far as it is shown in brief form (so its bodies may be cut behind `presenting.LARGE`), `timeline`
    its entries up to this one. `detail` is a text for an entry, an object for an event of a device, which has
    neither `command` nor `evidence`.
    """

    position: int
    kind: str
    device: DeviceId
    groups: tuple[str, ...]
    version: int
    at: Micros
    evidence: str | None
    detail: str | Mapping[str, object] | None
    changed: bool | None
    command: Command | None = None
    timeline: tuple[TimelineRow, ...] = ()


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
class Idempotency:
    """A digest of the device, the issuer and the issuer's key; a digest of what is asked; when the key is forgotten."""

    key: str
    fingerprint: str
    expires_at: Micros


@dataclass(frozen=True, slots=True)
class Accept:
    """Take a new command into the ledger. The device's row gives `seq` and must be of `generation`.

    It withdraws the waiting commands of its device, name and `supersedes` key. `backlog` is how many copies
    may be in the mailbox of a device that has no limit of its own. An idempotency key that is known is
    answered with the command that it stands for; nothing else is done then.
    """

    command: Command
    backlog: int = layout.DEFAULT_BACKLOG
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to a command. With `device`, the change is dropped unless the command is that
    device's, and of its present generation; or of the one before, if it was `said_at` (the broker's clock) before
    that one ended in a revocation or another enrollment."""

    command: CommandId
    event: Event
    device: DeviceId | None = None
    said_at: Micros | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """`repeated`: it is the command of an earlier request with the same idempotency key. `superseded` are the
    commands that it withdrew."""

    command: Command
    repeated: bool = False
    superseded: tuple[Command, ...] = ()


@dataclass(frozen=True, slots=True)
class Changed:
    """`timeline`: the whole of it, when the change settled the command, so that it can be announced."""

    step: Step
    timeline: tuple[TimelineRow, ...] = ()


AFTER_REVOCATION = "after-the-revocation"


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nothing was changed: the reason says why (unknown command, another device's, another generation)."""

    reason: str


Write = Accept | Change
Result = Accepted | Changed | Dropped
