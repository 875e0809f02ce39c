"""The one login decision: may this device open a connection with this token, now?

Existence, enabled, key and token are decided here and nowhere else; what the connection may then touch is
`topology.access`. The decision is taken under the device's row lock, so that a revocation either sees the
login or forbids it.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice

from fabric.clock import Clock
from fabric.errors import Invalid, Unauthenticated
from fabric.identity import tokens
from fabric.identity.admission import Admission, Attempt, use_of
from fabric.identity.takeover import Admissions
from fabric.identity.tokens import Claims, Unverified
from fabric.ports import Registry
from topology import enrollment, names
from topology.names import DeviceId

log = logging.getLogger(__name__)

AT_ONCE = 32  # logins that are decided at the same time, in few transactions
TURN_WITHIN = 1.5  # seconds: the broker is answered within 2.5 in any case
REMEMBERED = 2.0  # seconds from the answer about a login until the broker's second question about it, at most


@dataclass(frozen=True, slots=True)
class Audiences:
    mq: str
    api: str


class DeviceLogins:
    """Verifies device tokens, for the broker (`login`) and for HTTP (`bearer`)."""

    def __init__(self, registry: Registry, clock: Clock, audiences: Audiences, admissions: Admissions) -> None:
        self._registry, self._clock, self._audiences, self._admissions = registry, clock, audiences, admissions
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._let_in: dict[tuple[str, bytes], float] = {}  # until when, by name and digest of the token; oldest first

    async def login(self, username: str, password: str) -> None:
        """Allow an AMQP login, once the device's older connections are closed.

        The broker asks twice about each. The second time it gets the first one's answer, if that was given here a
        moment ago. Whoever is revoked between the two is closed like one whose second question came just before: a
        revocation looks until no login from before it can become a connection any more.

        Raises:
            Unauthenticated: denied; the text is for the log, never for the one who asked.
            Temporary: the registry is away; to be answered as a denial.
        """
        if not names.is_device(username):
            raise Unauthenticated("the user name is no device id")
        device, token = DeviceId(username), tokens.examine(password)  # what is no token waits for nothing
        asked = device, hashlib.sha256(password.encode()).digest()
        now = asyncio.get_running_loop().time()
        if self._let_in.pop(asked, 0.0) > now:
            return
        async with self._turn():
            admission = await self._decide(device, token)
        await self._admissions.make_room(device, admission)
        self._remember(asked)

    def _remember(self, asked: tuple[str, bytes]) -> None:
        now = asyncio.get_running_loop().time()
        for old, until in list(islice(self._let_in.items(), 2)):  # two go for one that comes: it stays small
            if until <= now:
                del self._let_in[old]
        self._let_in[asked] = now + REMEMBERED

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of so many at once. When a whole fleet comes back, those that can't be served in time must cost nothing:
        what is begun for all of them is finished for none before the broker gives up."""
        try:
            async with asyncio.timeout(TURN_WITHIN):
                await self._turns.acquire()
        except TimeoutError as error:
            raise Unauthenticated("too many devices log in at once; it comes again") from error
        try:
            yield
        finally:
            self._turns.release()

    async def _decide(self, device: DeviceId, token: Unverified) -> Admission:
        claims = await self._check(device, token, self._audiences.mq, enrollment.AMQP_TOKEN_LIFE)
        expires = (claims.exp + enrollment.CLOCK_LEEWAY) * 1_000_000
        attempt = Attempt(device, claims.kid, use_of(claims.jti), expires, self._clock.now())
        return await self._admissions.decide(attempt)

    async def bearer(self, token: Unverified) -> Claims:
        """Verify a device's token for HTTP. Raises `Unauthenticated`."""
        if not names.is_device(token.iss):
            raise Unauthenticated("no verifier for the token's issuer")
        device = DeviceId(token.iss)
        claims = await self._check(device, token, self._audiences.api, enrollment.HTTP_TOKEN_LIFE)
        found = await self._registry.device(device)
        if found is None or not found.enabled:
            raise Unauthenticated("the device is suspended or gone")
        return claims

    async def _check(self, device: DeviceId, token: Unverified, audience: str, longest: int) -> Claims:
        if token.typ != enrollment.DEVICE_TOKEN_TYPE:
            raise Unauthenticated("the token is not a device token")
        if not token.iss == token.sub == device:
            raise Unauthenticated("the token is not the device's own")
        for key in await self._registry.keys(device):
            if key.kid == token.kid:
                break
        else:
            raise Unauthenticated("the device has no such key")
        try:
            return tokens.verify(token, key.jwk, audience, longest, self._clock.now() // 1_000_000)
        except Invalid as error:
            raise Unauthenticated(f"the registered key is unusable: {error}") from error
