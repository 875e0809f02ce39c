"""How long to wait before the next attempt to connect: exponential, with full jitter.

A port that takes a connection and does not serve it within a while has more to do than it can. Whoever comes again soon
then makes it worse: with thousands of devices all its time goes into handshakes that come to nothing. So whoever meets
that waits longer and longer, until those that are served make room.
"""

LONGEST = 30.0  # seconds
LONGEST_CROWDED = 300.0  # seconds
FIRST = 0.5  # seconds: the bound of the first wait, doubled with each failure in a row
CROWDED_AFTER = 2.0  # seconds that an attempt takes


class Backoff:
    """Attributes:
    failures: in a row.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._crowded = 0

    def served(self) -> None:
        """A connection was good for something: the next failure is the first."""
        self.failures = self._crowded = 0

    def wait(self, took: float | None, random_part: float) -> float:
        """Seconds until the next attempt.

        Args:
            took: seconds that the attempt has taken; None when it reached nobody, or came up.
            random_part: from 0 to 1.
        """
        self._crowded += took is not None and took >= CROWDED_AFTER
        longest = min(LONGEST_CROWDED, LONGEST * 2.0 ** min(self._crowded, 16))
        bound = min(longest, FIRST * 2.0 ** min(self.failures, 16))
        self.failures += 1
        return bound * random_part
