"""The newcomer wins: a device's older connections are closed before it is let in again.

A link that is only half open would otherwise keep the mailbox, whose single active consumer it is, until the broker
misses its heartbeats.
"""

import asyncio
import logging

from fabric.clock import Clock
from fabric.errors import Temporary, Unauthenticated
from fabric.guarding import FloodGuard
from fabric.identity.admission import Admission, Attempt
from fabric.identity.meters import Meter
from fabric.ports import ConnectionCloser, Sessions
from topology.names import DeviceId

log = logging.getLogger(__name__)

TAKEOVER_TIMEOUT = 1.2  # seconds in all: the login must be answered within 2.5
CLOSE_TIMEOUT = 0.8  # seconds for one request to close
UNSEEN_WAIT = 0.5  # seconds that a login which crosses this one is given to become a connection
UNSEEN_PAUSE = 0.05  # seconds


class Admissions:
    """Decides, once token and key are good, whether a login may go on, and makes room for it."""

    def __init__(self, sessions: Sessions, closer: ConnectionCloser, flood: FloodGuard, clock: Clock) -> None:
        self._sessions, self._closer, self._flood, self._clock = sessions, closer, flood, clock
        self._failing = False

    async def decide(self, attempt: Attempt) -> Admission:
        """May the device come in, once there is room for it? The broker asks twice about one login: the second time
        nothing is counted.

        Raises:
            Unauthenticated: gone, suspended, throttled, contested, or too many logins; the text is for the log.
            Temporary: the registry is away.
        """
        answer = await self._sessions.admit(attempt, self._flood.limits)
        if answer.flooded:
            self._flood.exceed(attempt.device, Meter.LOGINS)
        if answer.refusal is not None:
            raise Unauthenticated(answer.refusal)
        return answer

    async def make_room(self, device: DeviceId, answer: Admission) -> None:
        """Close the connections that are to be closed first. That the closer is away refuses nobody.

        Raises:
            Temporary: the registry is away.
        """
        now = self._clock.now()
        if answer.older and await self._close(device, answer):
            log.info("connections.replaced device=%s", device)
            if await self._sessions.took_over(device, now, self._flood.limits):
                log.warning("device.contested device=%s", device)

    async def _close(self, device: DeviceId, answer: Admission) -> bool:
        """Close what there is; were there any? Without a worker there is nobody to close it: the newcomer is let in
        all the same, for this is about who is served, not about who may be."""
        loop = asyncio.get_running_loop()
        until = loop.time() + UNSEEN_WAIT
        try:
            async with asyncio.timeout(TAKEOVER_TIMEOUT):
                while not (closed := await self._closer.close(device, CLOSE_TIMEOUT)):
                    if not answer.unseen or loop.time() > until:
                        break
                    await asyncio.sleep(UNSEEN_PAUSE)
        except (Temporary, TimeoutError) as error:
            log.log(
                logging.DEBUG if self._failing else logging.WARNING, "takeover.failed device=%s error=%s", device, error
            )
            self._failing = True
            return False
        self._failing = False
        return closed > 0
