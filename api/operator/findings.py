"""What `restante doctor` finds."""

import json
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """The worst of all is the exit status."""

    OK = 0
    WARN = 1
    FAIL = 2


class Problem(Exception):
    """Something is not as it must be, or, as a warning, soon won't be; the text says what, and what to do."""

    def __init__(self, text: str, level: Level = Level.FAIL) -> None:
        super().__init__(text)
        self.level = level


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    level: Level
    text: str

    def as_json(self) -> str:
        return json.dumps({"check": self.check, "level": self.level.name.lower(), "text": self.text})

    def line(self) -> str:
        """For a terminal: what others may have named has no control characters."""
        shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in self.text)
        level = self.level.name if self.level is Level.FAIL else self.level.name.lower()
        return f"{level:<5} {self.check:<16} {shown}"


def by_limits(value: float, limits: tuple[float, float]) -> Level:
    """How bad it is that a value is beyond the first limit, or the second."""
    return Level(sum(value > limit for limit in limits))
