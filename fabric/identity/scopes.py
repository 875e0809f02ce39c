"""What a caller may do: the standard space-separated `scope` claim, read strictly.

Grammar: `action ["@" ("device:" id | "group:" group) ["/" name]]`. A malformed scope grants nothing, and
never falls back to its prefix. Narrowed scopes are understood and grant nothing un-narrowed.
"""

from dataclasses import dataclass

ACTIONS = frozenset(
    {
        "devices:read",
        "devices:write",
        "devices:enroll",
        "groups:write",
        "commands:send",
        "commands:read",
        "notifications:send",
        "telemetry:read",
        "telemetry:write",
        "inquiries:answer",
        "tokens:write",
        "audit:read",
    }
)
MAX_SCOPES = 100


@dataclass(frozen=True, slots=True)
class Rights:
    """The actions that a caller may do on everything."""

    actions: frozenset[str]

    def may(self, action: str) -> bool:
        return action in self.actions


NOTHING = Rights(frozenset())


def parse(scope: str | None) -> Rights:
    """The rights that a `scope` claim grants; none when it is absent or has over 100 entries.

    Only U+0020 separates: `str.split()` would also split on U+0085 and U+00A0.
    """
    if not scope or not scope.isascii():
        return NOTHING
    entries = scope.split(" ")
    if len(entries) > MAX_SCOPES:
        return NOTHING
    return Rights(frozenset(entry for entry in entries if entry in ACTIONS))
