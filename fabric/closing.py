"""Closing a device's connections, as a gateway asks for it.

The administrator's credential lives in the worker only, so the gateway asks over the broker: any worker closes, and
all gateways hear the answer on `wake`; the one that asked knows it by its correlation. Both carry the account they
come from, which the broker checks: gateways ask, workers answer.
"""

import asyncio
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress

from fabric.errors import Temporary
from fabric.ports import Delivery, Publisher
from topology import access, names, wire
from topology.names import DeviceId

CLOSE = "close"
CLOSED = "closed"


class RemoteCloser:
    """The port `fabric.ports.ConnectionCloser`, of a gateway."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._asked: dict[str, asyncio.Future[int]] = {}

    async def close(self, device: DeviceId, timeout: float = 2.0) -> int:
        """Raises `Temporary` when no worker has done it in time."""
        correlation = secrets.token_hex(8)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[correlation] = answer
        request = wire.Message(
            CLOSE,
            body=json.dumps({"device": device}).encode(),
            content_type=wire.JSON,
            correlation_id=correlation,
            user_id=access.GATEWAY,
            expiration_ms=int(timeout * 1000),
            persistent=False,
        )
        try:
            async with asyncio.timeout(timeout):
                await self._publisher.send(names.CONTROL, names.CLOSURES, request)
                return await answer
        except TimeoutError:
            raise Temporary(f"no worker has closed the connections of {device} within {timeout:g} s") from None
        finally:
            del self._asked[correlation]

    async def on_answer(self, delivery: Delivery) -> None:
        """Handle a message of type `closed` from the exchange `wake`; most are for other gateways."""
        answer = self._asked.get(delivery.message.correlation_id or "")
        if delivery.message.user_id == access.WORKER and answer is not None and not answer.done():
            with suppress(ValueError, TypeError, KeyError):
                answer.set_result(int(json.loads(delivery.message.body)["closed"]))
        await delivery.ack()


def answer(correlation: str, closed: int) -> wire.Message:
    """What a worker says to every gateway."""
    document: Mapping[str, int] = {"closed": closed}
    return wire.Message(
        CLOSED,
        body=json.dumps(document).encode(),
        content_type=wire.JSON,
        correlation_id=correlation,
        user_id=access.WORKER,
        persistent=False,
    )
