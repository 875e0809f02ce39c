"""What a caller may do: the standard space-separated `scope` claim, read strictly.

Grammar: `action ["@" ("device:" id | "group:" group) ["/" name]]`, where a name is a dotted one that may end in `.*`,
which stands for one or more words. A malformed scope grants nothing, and never falls back to its prefix; so does one
that is narrowed in a way which means nothing for its action: see `NARROWED`. Pure.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import Final

from topology import names


class Narrowing(Enum):
    """To what the scopes of an action can be narrowed."""

    NOT = "not at all"
    GROUP = "a group: what is changed is the group, not a device"
    DEVICE = "a device, or the devices of a group"
    NAME = "a device, or the devices of a group, and there to a name"


NARROWED: Final[Mapping[str, Narrowing]] = MappingProxyType(
    {
        "devices:read": Narrowing.DEVICE,
        "devices:write": Narrowing.DEVICE,
        "devices:enroll": Narrowing.DEVICE,
        "groups:write": Narrowing.GROUP,
        "commands:send": Narrowing.NAME,
        "commands:read": Narrowing.DEVICE,
        "notifications:send": Narrowing.NAME,
        "telemetry:read": Narrowing.NAME,
        "telemetry:write": Narrowing.NAME,
        "inquiries:answer": Narrowing.NAME,
        "tokens:write": Narrowing.NOT,
        "audit:read": Narrowing.DEVICE,
    }
)
ACTIONS: Final = frozenset(NARROWED)
MAX_SCOPES = 100
LONGEST_SCOPE = 300  # characters, and a few more than any has

_GROUP = rf"group:{names.DOTTED_NAME}"
_DEVICE = rf"device:{names.DEVICE_ID}"
_NAME = rf"{names.DOTTED_NAME}(?:\.\*)?"
_WHERE = {
    Narrowing.NOT: "",
    Narrowing.GROUP: rf"(?:@{_GROUP})?",
    Narrowing.DEVICE: rf"(?:@(?:{_DEVICE}|{_GROUP}))?",
    Narrowing.NAME: rf"(?:@(?:{_DEVICE}|{_GROUP})(?:/{_NAME})?)?",
}
GRAMMAR: Final = "(?:{})".format(
    "|".join(
        rf"(?:{'|'.join(action for action, most in NARROWED.items() if most is narrowing)}){where}"
        for narrowing, where in _WHERE.items()
    )
)
"""A regular expression, in what Python and ECMA have in common, of a scope but for the lengths of its names."""
_grammar = re.compile(GRAMMAR, re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """What something is done to: a device with its groups, or, without an id, the groups themselves."""

    device: str | None = None
    groups: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Scope:
    """One scope, or what several have in common; what is None or empty is not narrowed. The target is in all of the
    groups: a text names one at most, and an intersection may need more."""

    action: str
    device: str | None = None
    groups: frozenset[str] = frozenset()
    name: str | None = None

    def grants(self, target: Target | None, name: str | None) -> bool:
        """Is this, of its action, within it? None stands for everything; a name may be a pattern."""
        if self.device is not None and (target is None or target.device != self.device):
            return False
        if self.groups and (target is None or not self.groups.issubset(target.groups)):
            return False
        if self.name is None:
            return True
        return name is not None and _names(self.name, name)

    def common(self, other: "Scope") -> "Scope | None":
        """What both grant, for one action; None when that is nothing."""
        if None not in (self.device, other.device) and self.device != other.device:
            return None
        name = self.name if other.name is None else other.name
        if self.name is not None and other.name is not None:
            if _names(self.name, other.name):
                name = other.name
            elif _names(other.name, self.name):
                name = self.name
            else:
                return None
        return Scope(self.action, self.device or other.device, self.groups | other.groups, name)


@dataclass(frozen=True, slots=True)
class Rights:
    """The union of scopes. What a question leaves out is asked for all: `may("commands:send")` is about every device
    and every name."""

    whole: frozenset[str] = frozenset()
    narrow: Mapping[str, tuple[Scope, ...]] = field(default_factory=dict)

    def may(self, action: str, target: Target | None = None, name: str | None = None) -> bool:
        return action in self.whole or any(scope.grants(target, name) for scope in self.narrow.get(action, ()))

    def may_some(self, action: str) -> bool:
        """Is there anything that it may be done to?"""
        return action in self.whole or action in self.narrow

    def by_group(self, action: str) -> bool:
        """Could the groups of a device make the difference?"""
        return action not in self.whole and any(scope.groups for scope in self.narrow.get(action, ()))

    def covers(self, scope: str) -> bool:
        """Is all that the scope will ever grant within these? Which devices are in a group today is no matter; what
        is malformed is within nothing."""
        if scope in self.whole:
            return True
        asked = read(scope)
        if asked is None:
            return False
        target = None
        if asked.device is not None or asked.groups:
            target = Target(asked.device, asked.groups)
        return self.may(asked.action, target, asked.name)

    def within(self, ceiling: "Rights") -> "Rights":
        """The intersection: it grants what both grant, and nothing else."""
        actions = (self.whole | self.narrow.keys()) & (ceiling.whole | ceiling.narrow.keys())
        pairs = (pair for action in sorted(actions) for pair in product(self.of(action), ceiling.of(action)))
        return _union(scope for scope in dict.fromkeys(one.common(other) for one, other in pairs) if scope is not None)

    def of(self, action: str) -> tuple[Scope, ...]:
        """The scopes of an action."""
        return (Scope(action),) if action in self.whole else self.narrow.get(action, ())


NOTHING = Rights()


@lru_cache(1024)
def parse(claim: str | None) -> Rights:
    """The rights that a `scope` claim grants; none when it is absent, not ASCII, or has over 100 entries.

    Only U+0020 separates: `str.split()` would also split on U+0085 and U+00A0.
    """
    if not claim or not claim.isascii():
        return NOTHING
    entries = claim.split(" ")
    if len(entries) > MAX_SCOPES:
        return NOTHING
    return _union(scope for scope in map(read, entries) if scope is not None)


def read(text: str) -> Scope | None:
    """One scope, or None for what grants nothing."""
    if len(text) > LONGEST_SCOPE or not _grammar.fullmatch(text):
        return None
    action, _, where = text.partition("@")
    place, _, name = where.partition("/")
    kind, _, owner = place.partition(":")
    if not all(names.is_dotted(each) for each in (owner, name.removesuffix(".*")) if each):
        return None
    return Scope(
        action,
        device=owner if kind == "device" else None,
        groups=frozenset([owner] if kind == "group" else []),
        name=name or None,
    )


def _names(pattern: str, name: str) -> bool:
    """Is the name, or the pattern, within the pattern?"""
    return name.startswith(pattern[:-1]) if pattern.endswith(".*") else name == pattern


def _union(granted: Iterable[Scope]) -> Rights:
    whole: set[str] = set()
    narrow: dict[str, tuple[Scope, ...]] = {}
    for scope in granted:
        if scope == Scope(scope.action):
            whole.add(scope.action)
        else:
            narrow[scope.action] = (*narrow.get(scope.action, ()), scope)
    return Rights(frozenset(whole), MappingProxyType(narrow))
