"""Receipts, outcomes and dead letters: what devices and the broker say became of commands."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from fabric import command as life
from fabric.model import AFTER_REVOCATION, Change, Changed, Dropped
from fabric.ports import Delivery, Ledger, Publisher
from fabric.text import clean
from fabric.uplink import Inbox, said_at
from fabric.waiting import announce
from topology import guard, names, wire
from topology.names import CommandId, DeviceId

log = logging.getLogger(__name__)

RECEIPT_PATIENCE = 0.01  # seconds: most outcomes are that close behind, and both then cost one transaction

_STATUS = {
    "succeeded": life.State.SUCCEEDED,
    "failed": life.State.FAILED,
    "rejected": life.State.REJECTED,
}


class Recorder:
    """Writes what happened to commands into the ledger and wakes those who wait for them.

    Attributes:
        odd: what was said of commands and did not count, or should not have been said, by reason.
    """

    def __init__(self, ledger: Ledger, publisher: Publisher) -> None:
        self._ledger, self._publisher = ledger, publisher
        self.odd: Counter[str] = Counter()

    async def record(self, *changes: Change, patience: float = 0.0) -> list[Changed | Dropped]:
        """Apply the changes, in order; announces every command that they settled. `patience` is the ledger's."""
        results = []
        for change, result in zip(changes, await self._ledger.write(*changes, patience=patience), strict=True):
            if isinstance(result, Dropped):
                self.odd[result.reason] += 1
                log.warning(
                    "report.dropped command=%s device=%s reason=%s", change.command, change.device, result.reason
                )
            elif isinstance(result, Changed):
                self._note(result.step)
            else:
                continue
            results.append(result)
        settled = (result for result in results if isinstance(result, Changed) and result.step.settled)
        # At once: a broker that takes nothing makes each wait its full time.
        await asyncio.gather(*(announce(self._publisher, each.step.command, each.timeline) for each in settled))
        return results

    def _note(self, step: life.Step) -> None:
        if step.verdict in (life.Verdict.CONFLICT, life.Verdict.VIOLATION, life.Verdict.ILLEGAL):
            self.odd[step.verdict.name.lower()] += 1
            log.warning(
                "command.%s command=%s device=%s state=%s input=%r",
                step.verdict.name.lower(), step.command.id, step.command.device, step.command.state, step.given.value,
            )  # fmt: skip


class Reports:
    """Consumer of `reports`. A message is acked after what it says is committed."""

    def __init__(self, inbox: Inbox, recorder: Recorder, handled: Callable[[], None]) -> None:
        self._inbox, self._recorder, self._handled = inbox, recorder, handled

    async def on_delivery(self, delivery: Delivery) -> None:
        try:
            change = await self._change(delivery)
            if change is not None:
                patience = RECEIPT_PATIENCE if isinstance(change.event, life.Receipted) else 0.0
                results = await self._recorder.record(change, patience=patience)
                if Dropped(AFTER_REVOCATION) in results:
                    await self._inbox.set_aside(delivery, "said after the device's revocation")
            await delivery.ack()
        finally:
            self._handled()

    async def _change(self, delivery: Delivery) -> Change | None:
        letter = await self._inbox.open(delivery)
        if letter is None:
            return None
        if letter.kind == "receipt":
            receipt = await self._inbox.read(delivery, wire.decode_receipt)
            if receipt is None:
                return None
            progress = receipt.progress and clean(receipt.progress)
            receipted = life.Receipted(receipt.agent, receipt.state == "running", progress)
            return Change(receipt.command, receipted, letter.device, said_at(delivery.message))
        outcome = await self._inbox.read(delivery, wire.decode_outcome)
        if outcome is None:
            return None
        answered = life.Answered(
            outcome.agent,
            _STATUS[outcome.status],
            outcome.reason and clean(outcome.reason),
            outcome.content_type,
            outcome.body,
        )
        return Change(outcome.command, answered, letter.device, said_at(delivery.message))


class DeadLetters:
    """Consumer of `returned`: mail that expired, found its mailbox full, or was rejected.

    The device is the owner of the mailbox in which it died; the broker says so in `x-death`.
    """

    def __init__(self, inbox: Inbox, recorder: Recorder, clock_open: Callable[[], bool]) -> None:
        self._inbox, self._recorder, self._clock_open = inbox, recorder, clock_open

    async def on_delivery(self, delivery: Delivery) -> None:
        change = self._change(delivery.message)
        if change is not None:
            await self._recorder.record(change)
        elif delivery.message.type != "notification":
            await self._inbox.set_aside(delivery, "a dead letter that is no command of ours")
        await delivery.ack()

    def _change(self, message: wire.Message) -> Change | None:
        device = _died_in(message)
        reason = message.headers.get("x-first-death-reason")
        attempt = message.headers.get("attempt")
        id = message.message_id
        if message.type == guard.UNDECODABLE or message.type != "command" or device is None:
            return None
        if not isinstance(reason, str) or not isinstance(attempt, int) or id is None or not names.is_command_id(id):
            return None
        return Change(CommandId(id), life.DeadLettered(attempt, reason, self._clock_open()), device)


def _died_in(message: wire.Message) -> DeviceId | None:
    queue = message.headers.get("x-first-death-queue")
    return names.mailbox_owner(queue) if isinstance(queue, str) else None
