"""Questions of agents whose asker waits: may I start this, and what time is it?

Answers go to the asker's direct reply-to address only, and carry only its own data; any other form of
`reply_to` is ignored, since a device chooses it.
"""

import logging
import re

from fabric import command as life
from fabric.authorities import Pinned
from fabric.clock import Clock
from fabric.errors import Temporary
from fabric.keyring import Keys
from fabric.model import Change, Changed, DomainEvent, Dropped
from fabric.ports import Delivery, Publisher, Registry
from fabric.uplink import Inbox
from fabric.worker.reports import Recorder
from topology import names, wire
from topology.names import DeviceId

log = logging.getLogger(__name__)

_REMEMBERED = 1_000  # conflicts that are not reported again

# What the broker makes of `amq.rabbitmq.reply-to` when it passes a message on.
_DIRECT = re.compile(re.escape(names.DIRECT_REPLY_TO) + r"\.[A-Za-z0-9+/=._-]{1,220}", re.ASCII)


class Claims:
    """Consumer of `claims`: claims and hellos."""

    def __init__(
        self,
        inbox: Inbox,
        recorder: Recorder,
        registry: Registry,
        publisher: Publisher,
        clock: Clock,
        keys: Keys,
        authorities: Pinned,
    ) -> None:
        """`keys` are those that sign commands; their private halves are not needed. `authorities` are what devices are
        pinned to."""
        self._inbox, self._recorder = inbox, recorder
        self._registry, self._publisher, self._clock = registry, publisher, clock
        self._keys, self._authorities = keys, authorities
        self._conflicts: set[tuple[str, ...]] = set()

    async def on_delivery(self, delivery: Delivery) -> None:
        answer = await self._answer(delivery)
        reply_to = delivery.message.reply_to or ""
        if answer is not None and _DIRECT.fullmatch(reply_to):
            await self._publisher.send("", reply_to, answer)
        elif answer is not None:
            log.warning("claim.unanswerable key=%s reply_to=%r", delivery.routing_key, reply_to[:80])
        await delivery.ack()

    async def _answer(self, delivery: Delivery) -> wire.Message | None:
        letter = await self._inbox.open(delivery)
        if letter is None:
            return None
        if letter.kind == "hello":
            hello = await self._inbox.read(delivery, wire.decode_hello)
            return None if hello is None else await self._welcome(hello, letter.device)
        claim = await self._inbox.read(delivery, wire.decode_claim)
        return None if claim is None else await self._decide(claim, letter.device)

    async def _welcome(self, hello: wire.Hello, device: DeviceId) -> wire.Message:
        incarnation = await self._registry.greet(device, self._clock.now(), hello.agent_version)
        keys = self._keys.announcements(hello.keys_version)
        authorities = self._authorities.announcements(hello.authorities_version)
        return wire.encode_welcome(
            wire.Welcome(hello.correlation, self._clock.now_ms(), incarnation, wire.VERSION, keys, authorities)
        )

    async def _decide(self, claim: wire.Claim, device: DeviceId) -> wire.Message:
        changes = [Change(id, life.Claimed(claim.agent), device) for id in claim.commands]
        results = await self._recorder.record(*changes)
        granted, refused = [], {}
        for id, result in zip(claim.commands, results, strict=True):
            refusal = _refusal(result)
            if refusal is None:
                granted.append(id)
            else:
                refused[id] = refusal
        for result in results:
            if isinstance(result, Changed) and result.step.verdict is life.Verdict.TAKEN:
                await self._report_conflict(device, result.step.command.holder or "", claim.agent)
        return wire.encode_claim_answer(
            wire.ClaimAnswer(claim.correlation, tuple(granted), refused, self._clock.now_ms())
        )

    async def _report_conflict(self, device: DeviceId, holder: str, agent: str) -> None:
        """Two agents have the device's key. Said once for each pair, as far as this worker remembers."""
        pair = (device, *sorted((holder, agent)))
        if pair in self._conflicts:
            return
        if len(self._conflicts) >= _REMEMBERED:
            self._conflicts.clear()
        self._conflicts.add(pair)
        log.warning("device.identity-conflict device=%s holder=%.64r agent=%.64r", device, holder, agent)
        detail = {"holder": holder, "agent": agent}
        try:
            await self._registry.record(DomainEvent("device.identity-conflict", device, self._clock.now(), detail))
        except Temporary:
            self._conflicts.discard(pair)
            raise


def _refusal(result: Changed | Dropped) -> str | None:
    """Why the command may not start; None when it may."""
    if isinstance(result, Dropped):
        return "unknown"
    match result.step.verdict:
        case life.Verdict.GRANT:
            return None
        case life.Verdict.TAKEN:
            return "taken"
        case _:
            return result.step.command.state.value
