"""The worker's look at the broker's door for AMQP 1.0, each time the broker has come back (`doors`)."""

import asyncio
import logging
from collections.abc import Callable

from api.operator import doors
from fabric.amqp.connection import Link
from fabric.errors import BrokerUnavailable

log = logging.getLogger(__name__)


class Knocker:
    """`run_once` is for `keep_running`.

    Attributes:
        refused: whether AMQP 1.0 was found open; the process must not go on, and was told to stop.
    """

    def __init__(self, link: Link, stop: Callable[[], None]) -> None:
        """`link` is one that is not started yet, to the broker's plain listener."""
        self.refused = False
        self._endpoint, self._stop = link.endpoint, stop
        self._unknown = asyncio.Event()
        link.on_connect(self._came_back)

    async def run_once(self) -> None:
        """Wait until the broker has come back, and knock.

        Raises:
            BrokerUnavailable: it could not be told; the next call asks again.
        """
        await self._unknown.wait()
        self._unknown.clear()
        to = self._endpoint
        try:
            await doors.check_amqp_1_0(to.host, to.port, to.username, to.password)
        except doors.DoorOpen as error:
            log.critical("broker.refused error=the broker is not used, since %s", error)
            self.refused = True
            self._stop()
        except (OSError, ValueError) as error:
            self._unknown.set()
            raise BrokerUnavailable(f"whether the broker speaks AMQP 1.0 can't be told: {error!r}") from error

    async def _came_back(self, _: Link) -> None:
        self._unknown.set()
