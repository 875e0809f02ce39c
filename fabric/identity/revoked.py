"""What was taken away, as values and as lines of the revocation log.

A line says what was so afterwards, not what was done: it holds whatever is known besides, so lines may be applied
again, and in any order. It has ids and thumbprints, and never a secret.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Final

from fabric.command import Micros
from topology.names import DeviceId

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device as it was left. Of two states of an id, the one with the later `(generation, version)` is later, ever:
    generations go on after a deletion. What is of an earlier generation is void."""

    at: Micros
    device: DeviceId
    generation: int
    version: int
    enabled: bool = True
    deleted: bool = False

    @property
    def place(self) -> tuple[int, int]:
        return self.generation, self.version


@dataclass(frozen=True, slots=True)
class KeyRevoked:
    """A device's key is void with all that were registered under it; when only `retired`, it alone. A key that was
    registered later than `at` is meant by no line, even if it has the same thumbprint."""

    at: Micros
    device: DeviceId
    kid: str
    retired: bool = False


@dataclass(frozen=True, slots=True)
class TokenRevoked:
    """A token is void, with all that were made with it."""

    at: Micros
    jti: str


@dataclass(frozen=True, slots=True)
class SubjectRevoked:
    """A subject's tokens that were issued at `at` or before are void, with all that were made with them."""

    at: Micros
    subject: str


Revoked = DeviceState | KeyRevoked | TokenRevoked | SubjectRevoked

_KINDS: Final[dict[str, type[Revoked]]] = {
    "device": DeviceState,
    "key": KeyRevoked,
    "token": TokenRevoked,
    "subject": SubjectRevoked,
}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_MEMBERS: Final = {kind: frozenset(field.name for field in fields(kind)) for kind in _NAMES}
_TYPES: Final = {"at": int, "generation": int, "version": int, "enabled": bool, "deleted": bool, "retired": bool}


class NotUnderstood(ValueError):
    """A line that this version did not write."""


def encode(revoked: Revoked) -> str:
    """A JSON object in one line."""
    line = {"v": VERSION, "kind": _NAMES[type(revoked)], **asdict(revoked)}
    return json.dumps(line, separators=(",", ":"))


def decode(line: bytes) -> Revoked:
    """Raises `NotUnderstood`."""
    try:
        members = json.loads(line)
    except ValueError as error:
        raise NotUnderstood("it is not JSON") from error
    if not isinstance(members, dict) or members.pop("v", None) != VERSION:
        raise NotUnderstood(f"it is not of version {VERSION}")
    kind = _KINDS.get(str(members.pop("kind", None)))
    if kind is None:
        raise NotUnderstood("its kind is unknown")
    if members.keys() != _MEMBERS[kind]:
        raise NotUnderstood("it has other members")
    for name, value in members.items():
        if type(value) is not _TYPES.get(name, str):
            raise NotUnderstood(f"its '{name}' is of another type")
    return kind(**members)
