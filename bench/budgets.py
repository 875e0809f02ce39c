"""How the time of a quick run is shared."""

import time
from collections.abc import Callable, Mapping

QUICK = 160.0  # seconds for all of it, so that it is under 3 minutes
_LEAST = 0.4  # of its budget, below which a measure would find nothing


class Budgets:
    """Seconds for each measure. One that took longer leaves the others less.

    Args:
        own: what each would take, by name, in the order in which they come.
        now: seconds.
    """

    def __init__(self, own: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._own, self._now = dict(own), now
        self._until = now() + QUICK

    def next(self, name: str) -> float | None:
        """None: there is not enough left."""
        part = min(1.0, (self._until - self._now()) / sum(self._own.values()))
        own = self._own.pop(name)
        return part * own if part >= _LEAST else None
