"""Who did what: the values that the audit keeps, and who acts at present.

Whoever lets somebody in says so (`acting_as`, or `act_as` for the rest of a request); whoever commits what they did
asks (`acting`), and records it in the same transaction. A detail holds names, ids and numbers: never a code, a token,
a key other than by its thumbprint, a label's value or a command's arguments.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from fabric.command import Micros
from topology.names import DeviceId


class Kind(Enum):
    """What somebody is."""

    CALLER = "caller"
    DEVICE = "device"
    OPERATOR = "operator"  # on the command line, without the gateway
    ANONYMOUS = "anonymous"  # no token, or none that holds
    FABRIC = "fabric"  # nobody asked for it


class Action(Enum):
    """What can be done. The names are stable."""

    DEVICE_CREATED = "device.created"
    DEVICE_UPDATED = "device.updated"
    DEVICE_SUSPENDED = "device.suspended"
    DEVICE_RESUMED = "device.resumed"
    DEVICE_REVOKED = "device.revoked"
    DEVICE_DELETED = "device.deleted"
    ENROLLMENT_ISSUED = "enrollment.issued"
    ENROLLMENT_CONTESTED = "enrollment.contested"
    DEVICE_ENROLLED = "device.enrolled"
    KEY_ADDED = "key.added"
    KEY_RETIRED = "key.retired"
    KEY_REVOKED = "key.revoked"
    COMMAND_SENT = "command.sent"
    COMMAND_CANCELLED = "command.cancelled"
    TOKEN_CREATED = "token.created"  # noqa: S105 - no password
    TOKEN_REVOKED = "token.revoked"  # noqa: S105 - no password
    SUBJECT_REVOKED = "tokens.subject-revoked"
    REQUEST_REFUSED = "request.refused"
    SIGNING_KEY_ROTATED = "signing-key.rotated"
    SIGNING_KEY_RETIRED = "signing-key.retired"
    SCHEMA_MIGRATED = "schema.migrated"
    BROKER_REBUILT = "broker.rebuilt"
    REVOCATION_LOG_ACCEPTED = "revocation-log.accepted"
    BACKUP_RESTORED = "backup.restored"


DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class By:
    """Who acts, and from where. `issuer` and `jti` are those of the token, `request` is the id of the request."""

    kind: Kind
    subject: str | None = None
    issuer: str | None = None
    jti: str | None = None
    address: str | None = None
    request: str | None = None


@dataclass(frozen=True, slots=True)
class Deed:
    """What was done. `outcome` is `done`, or the code of the problem that it was refused with. `itself`: by the device,
    which has proved who it is by this."""

    action: Action
    device: DeviceId | None = None
    detail: Mapping[str, object] = field(default_factory=dict)
    outcome: str = DONE
    itself: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A deed as it is kept."""

    position: int
    at: Micros
    by: By
    deed: Deed


_acting: ContextVar[By] = ContextVar("acting", default=By(Kind.FABRIC))  # noqa: B039 - it is frozen


def acting() -> By:
    """Who acts in this task."""
    return _acting.get()


def act_as(by: By) -> None:
    """From here on in this task, within an `acting_as`."""
    _acting.set(by)


@contextmanager
def acting_as(by: By) -> Iterator[None]:
    before = _acting.set(by)
    try:
        yield
    finally:
        _acting.reset(before)
