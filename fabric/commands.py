"""Commands as their issuers see them: accepted, awaited, read, withdrawn."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace

from fabric import context, ids, presenting
from fabric.clock import Clock
from fabric.command import WAITING, Cancelled, Command, Verdict
from fabric.errors import Conflict, NotFound, TooLate
from fabric.keyring import Keys
from fabric.mail import Postman, to_wire
from fabric.measures import Histogram
from fabric.model import Accept, Accepted, Change, Changed, Idempotency
from fabric.ports import Ledger, Publisher, Registry
from fabric.presenting import Document
from fabric.signing import sign_command
from fabric.waiting import Right, Waiters, announce, is_settled
from topology.names import CommandId, DeviceId

SECOND = 1_000_000
DEFAULT_TTL = 60.0  # seconds from acceptance to pick-up
LONGEST_TTL = 7 * 24 * 3600.0
DEFAULT_RESPONSE_TIMEOUT = 30.0  # seconds from pick-up to outcome
LONGEST_RESPONSE_TIMEOUT = 24 * 3600.0
LONGEST_WAIT = 60.0
KEY_LIFE = 24 * 3600.0  # seconds that an idempotency key is remembered
CONFIRM_WAIT = 0.5  # seconds that a request which does not wait gives the broker's confirm

MOST_PURGED = 10_000  # commands of one call

_AT_ONCE = 500  # commands withdrawn in one transaction
_REMEMBERED = 100_000  # devices whose generation is kept in memory


@dataclass(frozen=True, slots=True)
class Request:
    """What an issuer asks for; `ttl` and `response_timeout` are seconds. The caller has checked the bounds.

    It withdraws the commands of the same device, name and `supersedes` key that still wait.
    """

    device: DeviceId
    name: str
    body: bytes
    content_type: str
    issuer: str
    ttl: float = DEFAULT_TTL
    response_timeout: float = DEFAULT_RESPONSE_TIMEOUT
    claim: bool = False
    traceparent: str | None = None
    supersedes: str | None = None
    idempotency_key: str | None = None


class Commands:
    """The gateway's side of the life of a command.

    Args:
        backlog: commands that may wait for a device without a limit of its own.
        start: runs a coroutine as a task that its owner awaits at shutdown.

    Attributes:
        round_trips: of commands that were sent by who waited, and settled in that time.
    """

    def __init__(
        self,
        ledger: Ledger,
        registry: Registry,
        publisher: Publisher,
        postman: Postman,
        waiters: Waiters,
        clock: Clock,
        keys: Keys,
        backlog: int,
        start: Callable[[Coroutine[None, None, None]], "asyncio.Task[None]"],
    ) -> None:
        self._ledger, self._registry, self._publisher, self._postman = ledger, registry, publisher, postman
        self._waiters, self._clock, self._keys, self._backlog, self._start = waiters, clock, keys, backlog, start
        self._generations: dict[DeviceId, int] = {}
        self.round_trips = Histogram()

    async def submit(self, request: Request, wait: float | None = None, right: Right | None = None) -> Document:
        """Accept a command and bring it to the device's mailbox; returns its document.

        Args:
            wait: seconds to wait for it to settle; None waits for the broker's confirm, half a second at
                most.
            right: the issuer's, to wait: looked at once a second. When it is lost, the command stands.

        A repeat of a request with the same idempotency key is answered with the command as it is now.

        Raises:
            NotFound: no such device.
            BacklogFull: as many commands wait for the device as may.
            KeyReused: the idempotency key was used for another request.
            Temporary: the ledger is away; nothing was accepted.
        """
        began = time.perf_counter()
        id = ids.command_id(self._clock.now_ms())
        with self._waiters.register(id) as waiter:
            accepted = await self._accept(id, request)
            command = accepted.command
            context.command.set(command.id)
            if accepted.repeated:
                return await self.find(command.id, wait, right)
            carrying = self._start(self._deliver(accepted))
            if wait is None:
                await asyncio.wait([carrying], timeout=CONFIRM_WAIT)
                found = await self._waiters.read(id)
            else:
                found = await waiter.settled(wait, right)
                if found is not None and is_settled(found):
                    self.round_trips.observe(time.perf_counter() - began)
        return found or presenting.command(command, [])

    async def find(self, id: CommandId, wait: float | None = None, right: Right | None = None) -> Document:
        """A command's document; with `wait`, once it is settled or that many seconds are over. `right` is as of
        `submit`.

        Raises:
            NotFound: no such command.
        """
        context.command.set(id)
        with self._waiters.register(id) as waiter:
            found = await self._waiters.read(id)
            if found is not None and wait and not is_settled(found):
                found = await waiter.settled(wait, right)
        if found is None:
            raise no_command(id)
        return found

    async def cancel(self, id: CommandId) -> Document:
        """Withdraw a command that nobody has picked up; again, it changes nothing. Returns its document.

        Raises:
            NotFound: no such command.
            TooLate: it was picked up or is settled.
        """
        context.command.set(id)
        (result,) = await self._ledger.write(Change(id, Cancelled("cancelled")))
        if not isinstance(result, Changed):
            raise no_command(id)
        step = result.step
        if step.verdict is Verdict.TOO_LATE:
            raise TooLate(
                f"the command is {step.command.state}; only one that waits can be withdrawn", step.command.state
            )
        if step.settled:
            await announce(self._publisher, step.command, result.timeline)
            return presenting.command(step.command, result.timeline)
        return await self.find(id)

    async def waiting_of(self, issuers: Sequence[str]) -> int:
        """How many commands of these issuers wait for their devices; no more than `MOST_PURGED` are counted."""
        return len(await self._ledger.waiting_of(issuers, MOST_PURGED)) if issuers else 0

    async def purge(self, issuers: Sequence[str]) -> int:
        """Withdraw the commands of these issuers that wait, `MOST_PURGED` at most; how many."""
        found = await self._ledger.waiting_of(issuers, MOST_PURGED) if issuers else []
        purged = 0
        for first in range(0, len(found), _AT_ONCE):
            changes = [Change(id, Cancelled("purged")) for id in found[first : first + _AT_ONCE]]
            for result in await self._ledger.write(*changes):
                if isinstance(result, Changed) and result.step.settled:
                    purged += 1
                    await announce(self._publisher, result.step.command, result.timeline)
        return purged

    async def _deliver(self, accepted: Accepted) -> None:
        for command in accepted.superseded:
            await announce(self._publisher, command)
        if accepted.command.state in WAITING:  # unless it was superseded in the same breath
            await self._postman.carry(accepted.command)

    async def _accept(self, id: CommandId, request: Request) -> Accepted:
        remembered = self._generations.get(request.device)
        generation = remembered if remembered is not None else await self._generation(request.device)
        while True:
            try:
                draft = self._draft(id, request, generation)
                (result,) = await self._ledger.write(Accept(draft, self._backlog, self._idempotency(request)))
            except (Conflict, NotFound):
                # Deleted, and perhaps made again, since we remembered it.
                self._generations.pop(request.device, None)
                if remembered is None:
                    raise
                remembered, generation = None, await self._generation(request.device)
                continue
            assert isinstance(result, Accepted)  # noqa: S101 - an `Accept` has no other result
            return result

    def _idempotency(self, request: Request) -> Idempotency | None:
        if request.idempotency_key is None:
            return None
        asked = (
            request.name,
            request.content_type,
            _digest(request.body),
            request.ttl,
            request.response_timeout,
            request.claim,
            request.supersedes,
        )
        scoped = (request.device, request.issuer, request.idempotency_key)
        expires_at = self._clock.now() + int(KEY_LIFE * SECOND)
        return Idempotency(_digest(json.dumps(scoped).encode()), _digest(json.dumps(asked).encode()), expires_at)

    async def _generation(self, id: DeviceId) -> int:
        device = await self._registry.device(id)
        if device is None:
            raise NotFound(f"there is no device {id}")
        if len(self._generations) >= _REMEMBERED:
            self._generations.clear()
        self._generations[id] = device.generation
        return device.generation

    def _draft(self, id: CommandId, request: Request, generation: int) -> Command:
        now, key = self._clock.now(), self._keys.signing()
        draft = Command(
            id=id,
            device=request.device,
            generation=generation,
            seq=0,
            name=request.name,
            body=request.body,
            content_type=request.content_type,
            issuer=request.issuer,
            claim=request.claim,
            supersedes=request.supersedes,
            accepted_at=now,
            # Whole milliseconds, as the device is told: both ends then mean the same instant.
            deadline=(now + int(request.ttl * SECOND)) // 1000 * 1000,
            response_timeout=int(request.response_timeout * SECOND),
            sig="",
            sig_kid=key.kid,
            traceparent=request.traceparent,
        )
        return replace(draft, sig=sign_command(key, to_wire(draft), request.device))


def no_command(id: CommandId) -> NotFound:
    """What is said of every command that its reader can't see, whether or not it exists."""
    return NotFound(f"there is no command {id}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
