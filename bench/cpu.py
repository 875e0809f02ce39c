"""CPU time of the processes that a figure is made of: what other work on the machine changes least."""

from collections.abc import Mapping, Sequence
from typing import Self

from api.operator.stack import Stack
from bench import processes


class Meter:
    """CPU seconds of each part since `start`. A part is some processes and all below them."""

    def __init__(self, parts: Mapping[str, Sequence[int]]) -> None:
        self._parts = parts
        self._before: dict[str, float] = {}

    @classmethod
    def of(cls, stack: Stack, besides: Mapping[str, Sequence[int]]) -> Self:
        """Broker, gateway, worker and database of a stack, and what else is named."""
        return cls({name: pids[:1] for name, pids in processes.parts(stack).items()} | dict(besides))

    def start(self) -> None:
        self._before = self._now()

    def seconds(self) -> dict[str, float]:
        return {name: now - self._before[name] for name, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        return {
            name: processes.cpu(each for pid in pids for each in processes.tree(pid))
            for name, pids in self._parts.items()
        }
