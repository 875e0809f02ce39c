"""How far something is, told now and then."""

import time
from collections.abc import Callable

_QUIET = 2.0  # seconds without a word, at first and in between


class Progress:
    """A line every two seconds, and none for what is done by then."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._next = time.monotonic() + _QUIET

    def __call__(self, what: str, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._log(f"{what}: {done}")
            self._next = now + _QUIET
