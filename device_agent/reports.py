"""Receipts and outcomes on their way to the fabric: the last word about a command is sent until the broker confirms it.

That is its outcome, or, of one that a crash interrupted, the receipt which says that it started: without that a fabric
that lost the first one would go on saying that the handler never ran.

The journal is the queue; only what is in flight is in memory. Runs on the I/O thread.
"""

import random
from collections import deque

from device_agent import log
from device_agent.journal import Journal, Word
from device_agent.link import Link
from topology import names, wire

WINDOW = 100  # words in flight
BURST = 500  # words sent from the journal in one go: the fabric takes 1,000 reports of a device at once
PACE = 40  # a second from then on, of the 50 that it takes
MAX_PASSING = 500  # answers about mail that is in no journal (junk): kept in memory only
RETRY_BASE = 0.2  # seconds: bound of the first delay after a nack, doubled with each in a row
RETRY_MAX = 10.0  # seconds
FLUSH_AFTER = 1.0  # seconds that confirmed outcomes may wait to be marked, if no other write takes them along


class Reporter:
    """Sends outcomes, from the journal and about junk; `idle` tells when nothing is left to be confirmed."""

    def __init__(self, link: Link, journal: Journal, device: names.DeviceId) -> None:
        self._link = link
        self._journal = journal
        self._device = device
        self._in_flight: set[names.CommandId] = set()
        self._early: dict[names.CommandId, bool] = {}  # said and not yet in the journal: is it confirmed?
        self._backlog = True  # the journal may hold outcomes that are not in flight
        self._passing: deque[wire.Outcome] = deque()
        self._nacks = 0
        self._retry_pending = False
        self._flush_pending = False
        self._allowed = BURST
        self._pausing = False

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self._backlog and not self._passing

    def link_up(self) -> None:
        self._backlog = True
        self._nacks = 0
        self.pump()

    def early(self, outcome: wire.Outcome) -> None:
        """Send an outcome that is about to be in the journal, if that is possible now; `kept` must follow."""
        if self._passes() and self._publish(outcome, journaled=True):
            self._early[outcome.command] = False

    def unkept(self, outcome: wire.Outcome) -> None:
        """Instead of `kept`, when the journal could not take it: it is sent from memory, if it was not yet."""
        confirmed = self._early.pop(outcome.command, False)
        if not confirmed and outcome.command not in self._in_flight:
            self.passing(outcome)

    def kept(self, word: Word) -> None:
        """Send what is in the journal, unless it is on its way, or there."""
        if self._early.pop(word.command, False):
            self._confirmed(word.command)
            return
        if word.command in self._in_flight:
            return
        if not self._passes():
            self._backlog = True
        elif not self._publish(word, journaled=True):
            self._backlog = True
            self._retry()

    def passing(self, outcome: wire.Outcome) -> None:
        """Send an answer about mail that is in no journal. Lost with the process; the ledger's clock covers it."""
        if not self._publish(outcome, journaled=False):
            if len(self._passing) >= MAX_PASSING:
                log.warning("report.dropped", command=outcome.command, because="too many answers wait")
                return
            self._passing.append(outcome)
            self._retry()

    def receipt(self, receipt: wire.Receipt) -> None:
        """Send a receipt once; `Mailbox` says it again after a reconnect while the command still runs."""
        self._link.publish(names.receipt_key(self._device), wire.encode_receipt(receipt, self._device), None)

    def again(self) -> None:
        """Look at the journal again: what is in it may have become unreported."""
        self._backlog = True
        self.pump()

    def pump(self) -> None:
        while self._passing and self._link.up:
            if not self._publish(self._passing[0], journaled=False):
                self._retry()
                return
            self._passing.popleft()
        if not self._backlog or not self._link.up or self._retry_pending:
            return
        if not self._allowed:
            self._pause()
        room = min(WINDOW - len(self._in_flight), self._allowed)
        if room <= 0:
            return
        waiting = self._journal.unreported(room, self._in_flight)
        self._backlog = len(waiting) == room
        for word in waiting:
            if not self._publish(word, journaled=True):
                self._backlog = True
                self._retry()
                return
            self._allowed -= 1
        if not self._backlog:
            self._allowed = BURST
        elif not self._allowed:
            self._pause()

    def _passes(self) -> bool:
        """May a new outcome go at once? Not past others that wait, unless those are held back for their number."""
        return (not self._backlog or self._pausing) and len(self._in_flight) < WINDOW

    def _pause(self) -> None:
        if not self._pausing:
            self._pausing = True
            self._link.later(1.0, self._resume)

    def _resume(self) -> None:
        self._pausing = False
        self._allowed = PACE
        self.pump()

    def _publish(self, word: Word, *, journaled: bool) -> bool:
        def done(confirmed: bool) -> None:
            if journaled:
                self._settled(word.command, confirmed)
            elif isinstance(word, wire.Outcome) and not confirmed and len(self._passing) < MAX_PASSING:
                self._passing.append(word)
                self._retry()

        if isinstance(word, wire.Outcome):
            key, message = names.outcome_key(self._device), wire.encode_outcome(word, self._device)
        else:
            key, message = names.receipt_key(self._device), wire.encode_receipt(word, self._device)
        sent = self._link.publish(key, message, done)
        if sent and journaled:
            self._in_flight.add(word.command)
        return sent

    def _settled(self, command: names.CommandId, confirmed: bool) -> None:
        self._in_flight.discard(command)
        if confirmed:
            self._nacks = 0
            if command in self._early:
                self._early[command] = True
            else:
                self._confirmed(command)
            if self._backlog:
                self.pump()
        else:
            self._backlog = True
            self._retry()

    def _confirmed(self, command: names.CommandId) -> None:
        self._journal.reported(command)
        if not self._flush_pending:
            self._flush_pending = True
            self._link.later(FLUSH_AFTER, self._flush)

    def _retry(self) -> None:
        """After a nack or without room: later, with back-off. Without a connection `link_up` is what comes next."""
        if self._retry_pending or not self._link.up:
            return
        self._retry_pending = True
        bound = min(RETRY_MAX, RETRY_BASE * 2.0 ** min(self._nacks, 16))
        self._nacks += 1
        self._link.later(random.random() * bound, self._retry_now)  # noqa: S311 - jitter

    def _retry_now(self) -> None:
        self._retry_pending = False
        self.pump()

    def _flush(self) -> None:
        self._flush_pending = False
        self._journal.flush()
