"""Events as back ends see them: one shape for server-sent events, the `events` stream and the command line, and
which of them somebody asked for. Pure.
"""

from dataclasses import dataclass

from fabric import presenting
from fabric.identity.scopes import Rights, Target
from fabric.model import LogRow
from fabric.presenting import Document

ANY_OF = ".*"  # the end of a kind that stands for all that begin so


def document(row: LogRow) -> Document:
    """The one document of an event. `command` is as it was then, in brief form; null for what happened to a
    device, whose `detail` is an object."""
    return {
        "position": row.position,
        "kind": row.kind,
        "at": presenting.time(row.at),
        "version": row.version,
        "device": row.device,
        "groups": list(row.groups),
        "evidence": row.evidence,
        "detail": row.detail,
        "changed": row.changed,
        "command": None if row.command is None else presenting.command(row.command, row.timeline, brief=True),
    }


@dataclass(frozen=True, slots=True)
class Filter:
    """What is asked for: of each, one of these; empty for any. A kind may end in `.*`. With `rights`, only what they
    let its reader see: `commands:read` is for events of commands, `devices:read` for those of devices."""

    devices: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    rights: Rights | None = None

    def passes(self, row: LogRow) -> bool:
        if self.devices and row.device not in self.devices:
            return False
        if self.groups and self.groups.isdisjoint(row.groups):
            return False
        if self.kinds and not any(_is_of(row.kind, kind) for kind in self.kinds):
            return False
        action = "devices:read" if row.command is None else "commands:read"
        return self.rights is None or self.rights.may(action, Target(row.device, row.groups))


def _is_of(kind: str, asked: str) -> bool:
    return kind.startswith(asked[:-1]) if asked.endswith(ANY_OF) else kind == asked
