"""Bringing commands to mailboxes: one attempt at a time, its fate written to the ledger.

The attempt's number was committed before (by the acceptance, or by `Republished`), so a crash here
leaves a command that is due for another attempt, never one that was forgotten.
"""

import asyncio
import logging

from fabric import command as life
from fabric import context
from fabric.clock import Clock
from fabric.command import Command
from fabric.errors import NoMailbox, PublishFailed, Temporary
from fabric.model import Change, Changed
from fabric.ports import Ledger, Publisher
from topology import layout, names, wire

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT = 4.0  # seconds: under `command.PUBLISH_GRACE`, after which another attempt may start


class Postman:
    """Publishes commands to their mailboxes and records what became of each attempt."""

    def __init__(self, ledger: Ledger, publisher: Publisher, clock: Clock) -> None:
        self._ledger, self._publisher, self._clock = ledger, publisher, clock

    async def carry(self, command: Command) -> None:
        """Publish the command's present attempt. Never raises for a broker or a ledger that is away: the
        attempt then counts as of unknown fate, and the republisher takes over."""
        context.command.set(command.id)
        event = await self._attempt(command)
        try:
            await self._ledger.write(Change(command.id, event))
        except Temporary as error:
            log.warning("attempt.unrecorded attempt=%d error=%s", command.attempt, error)

    async def _attempt(self, command: Command) -> life.Event:
        message = wire.encode_command(to_wire(command), self._clock.now_ms())
        try:
            await self._publisher.publish(names.MAIL, command.device, message, mandatory=True, timeout=CONFIRM_TIMEOUT)
        except NoMailbox:
            await self._make_mailbox(command)
            return life.Returned(command.attempt)
        except PublishFailed as error:
            return life.NotConfirmed(command.attempt, str(error)[:200])
        return life.Confirmed(command.attempt)

    async def _make_mailbox(self, command: Command) -> None:
        """Declare the mailbox that was missing, so that the next attempt finds it."""
        try:
            await self._publisher.declare(layout.mailbox(command.device), [layout.mailbox_binding(command.device)])
        except Temporary as error:
            log.warning("mailbox.undeclared device=%s error=%s", command.device, error)


class Republisher:
    """Makes the next attempt for every command whose publish is due: lost by a crash, nacked or returned."""

    BATCH = 200

    def __init__(self, ledger: Ledger, postman: Postman, clock: Clock) -> None:
        self._ledger, self._postman, self._clock = ledger, postman, clock

    async def run_once(self) -> int:
        """Publish what is due; returns how many were tried."""
        due = await self._ledger.to_publish(self._clock.now(), self.BATCH)
        return await self.republish(due, "retry")

    async def republish(self, attempts: list[tuple[names.CommandId, int]], why: str) -> int:
        """Make the attempt after each given one, unless somebody else has; in `seq` order per device."""
        if not attempts:
            return 0
        changes = [Change(id, life.Republished(attempt, why)) for id, attempt in attempts]
        results = await self._ledger.write(*changes)
        ours = [
            result.step.command
            for result in results
            if isinstance(result, Changed) and result.step.verdict is life.Verdict.RETRY
        ]
        ours.sort(key=lambda command: command.seq)
        await asyncio.gather(*(self._postman.carry(command) for command in ours))
        return len(ours)


def to_wire(command: Command) -> wire.Command:
    return wire.Command(
        id=command.id,
        name=command.name,
        body=command.body,
        content_type=command.content_type,
        not_after=command.deadline // 1000,
        response_timeout=command.response_timeout // 1000,
        issuer=command.issuer,
        seq=command.seq,
        attempt=command.attempt,
        claim=command.claim,
        generation=command.generation,
        sig=command.sig,
        sig_kid=command.sig_kid,
        at=command.accepted_at // 1000,
        traceparent=command.traceparent,
    )
