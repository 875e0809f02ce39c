"""Commands as their issuers see them: accepted, awaited, read."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace

from fabric import ids, presenting
from fabric.clock import Clock
from fabric.command import Command
from fabric.errors import Conflict, NotFound
from fabric.mail import Postman, to_wire
from fabric.model import Accept, Accepted
from fabric.ports import Ledger, Registry
from fabric.presenting import Document
from fabric.signing import SigningKey, sign_command
from fabric.waiting import Waiters, is_settled
from topology.names import CommandId, DeviceId

SECOND = 1_000_000
DEFAULT_TTL = 60.0  # seconds from acceptance to pick-up
LONGEST_TTL = 7 * 24 * 3600.0
DEFAULT_RESPONSE_TIMEOUT = 30.0  # seconds from pick-up to outcome
LONGEST_RESPONSE_TIMEOUT = 24 * 3600.0
LONGEST_WAIT = 60.0
CONFIRM_WAIT = 0.5  # seconds that a request which does not wait gives the broker's confirm

_REMEMBERED = 100_000  # devices whose generation is kept in memory


@dataclass(frozen=True, slots=True)
class Request:
    """What an issuer asks for; `ttl` and `response_timeout` are seconds. The caller has checked the bounds."""

    device: DeviceId
    name: str
    body: bytes
    content_type: str
    issuer: str
    ttl: float = DEFAULT_TTL
    response_timeout: float = DEFAULT_RESPONSE_TIMEOUT
    claim: bool = False
    traceparent: str | None = None


class Commands:
    """The gateway's side of the life of a command.

    `start` runs a coroutine as a task that its owner awaits at shutdown.
    """

    def __init__(
        self,
        ledger: Ledger,
        registry: Registry,
        postman: Postman,
        waiters: Waiters,
        clock: Clock,
        key: SigningKey,
        start: Callable[[Coroutine[None, None, None]], "asyncio.Task[None]"],
    ) -> None:
        self._ledger, self._registry, self._postman = ledger, registry, postman
        self._waiters, self._clock, self._key, self._start = waiters, clock, key, start
        self._generations: dict[DeviceId, int] = {}

    async def submit(self, request: Request, wait: float | None = None) -> Document:
        """Accept a command and bring it to the device's mailbox; returns its document.

        Args:
            wait: seconds to wait for it to settle; None waits for the broker's confirm, half a second at
                most.

        Raises:
            NotFound: no such device.
            Temporary: the ledger is away; nothing was accepted.
        """
        id = ids.command_id(self._clock.now_ms())
        with self._waiters.register(id) as waiter:
            accepted = await self._accept(id, request)
            carrying = self._start(self._postman.carry(accepted))
            if wait is None:
                await asyncio.wait([carrying], timeout=CONFIRM_WAIT)
                found = await self._waiters.read(id)
            else:
                found = await waiter.settled(wait)
        return found or presenting.command(accepted, [])

    async def find(self, id: CommandId, wait: float | None = None) -> Document:
        """A command's document; with `wait`, once it is settled or that many seconds are over.

        Raises:
            NotFound: no such command.
        """
        with self._waiters.register(id) as waiter:
            found = await self._waiters.read(id)
            if found is not None and wait and not is_settled(found):
                found = await waiter.settled(wait)
        if found is None:
            raise NotFound(f"there is no command {id}")
        return found

    async def _accept(self, id: CommandId, request: Request) -> Command:
        remembered = self._generations.get(request.device)
        generation = remembered if remembered is not None else await self._generation(request.device)
        while True:
            try:
                (result,) = await self._ledger.write(Accept(self._draft(id, request, generation)))
            except (Conflict, NotFound):
                # Deleted, and perhaps made again, since we remembered it.
                self._generations.pop(request.device, None)
                if remembered is None:
                    raise
                remembered, generation = None, await self._generation(request.device)
                continue
            assert isinstance(result, Accepted)  # noqa: S101 - an `Accept` has no other result
            return result.command

    async def _generation(self, id: DeviceId) -> int:
        device = await self._registry.device(id)
        if device is None:
            raise NotFound(f"there is no device {id}")
        if len(self._generations) >= _REMEMBERED:
            self._generations.clear()
        self._generations[id] = device.generation
        return device.generation

    def _draft(self, id: CommandId, request: Request, generation: int) -> Command:
        now = self._clock.now()
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
            supersedes=None,
            accepted_at=now,
            # Whole milliseconds, as the device is told: both ends then mean the same instant.
            deadline=(now + int(request.ttl * SECOND)) // 1000 * 1000,
            response_timeout=int(request.response_timeout * SECOND),
            sig="",
            sig_kid=self._key.kid,
            traceparent=request.traceparent,
        )
        return replace(draft, sig=sign_command(self._key, to_wire(draft), request.device))
