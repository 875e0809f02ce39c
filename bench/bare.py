"""The floor of simulated devices: the same client, TLS and mailboxes, one internal account, and nothing of the fabric.

A bare device connects, opens a channel and consumes its mailbox; what comes is acked, and answered at `reply_to` if
it has one. So many dial at once and no more: what they reach is what the broker can.
"""

import asyncio
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

from pamqp import base, commands

from bench.connection import Connection
from bench.peers.accounts import Account
from bench.simulated import Tally
from topology import names, wire

AT_ONCE = 64  # devices that dial at the same time
AGAIN = 0.05  # seconds after a failure


class BareDevices:
    """Bare devices on the running loop: `start` them, then `stop`."""

    def __init__(self, ids: Sequence[names.DeviceId], url: str, authority: str, account: Account, tally: Tally) -> None:
        """`url` is the broker's for devices, `authority` in PEM."""
        self._place, self.account, self.tally = urlsplit(url), account, tally
        self._context = ssl.create_default_context(cadata=authority)
        self._devices = [_Bare(self, id) for id in ids]
        self._away: asyncio.Queue[_Bare] = asyncio.Queue()
        self._diallers: list[asyncio.Task[None]] = []
        self.address = ("127.0.0.1", 0)

    async def start(self) -> None:
        """Raises `OSError`."""
        host, port = self._place.hostname or "", self._place.port or 5671
        found = await asyncio.get_running_loop().getaddrinfo(host, port)
        self.address = min((str(each[4][0]) for each in found), key=lambda it: ":" in it), port
        for device in self._devices:
            self._away.put_nowait(device)
        self._diallers = [asyncio.create_task(self._dial()) for _ in range(AT_ONCE)]

    def stop(self) -> None:
        """Without a word: nothing of them is worth keeping."""
        for dialler in self._diallers:
            dialler.cancel()
        for device in self._devices:
            device.abort()

    def beat(self, now: float) -> None:
        for device in self._devices:
            device.beat(now)

    def is_away(self, device: "_Bare") -> None:
        self._away.put_nowait(device)

    def connection(self, device: "_Bare") -> Connection:
        credentials = (self.account.name, self.account.password)
        return Connection(device, self.address, self._place.hostname or "", self._context, credentials, names.VHOST)

    async def _dial(self) -> None:
        while True:
            device = await self._away.get()
            if not await device.dial():
                await asyncio.sleep(AGAIN)


class _Bare:
    def __init__(self, all_: BareDevices, id: names.DeviceId) -> None:
        self._all, self._id = all_, id
        self._connection: Connection | None = None
        self._settled: asyncio.Future[bool] | None = None
        self._serving = False

    async def dial(self) -> bool:
        """Does it consume now? Returns when that is known; after a failure it is its turn again."""
        self._all.tally.connects += 1
        self._settled = asyncio.get_running_loop().create_future()
        self._connection = self._all.connection(self)
        await self._connection.dial()
        return await self._settled

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def beat(self, now: float) -> None:
        if self._connection is not None:
            self._connection.beat(now)

    def opened(self) -> None:
        assert self._connection is not None
        self._all.tally.up += 1
        consume = commands.Basic.Consume(0, names.mailbox(self._id), "mail")
        self._connection.send(1, commands.Channel.Open(), commands.Basic.Qos(0, 3), consume)

    def answered(self, _: int, method: base.Frame) -> None:
        if isinstance(method, commands.Basic.ConsumeOk):
            self._serving = True
            self._all.tally.serving += 1
            self._all.tally.changed()
            self._settle(is_there=True)
        elif isinstance(method, commands.Channel.Close):
            self.abort()

    def delivered(self, _: int, tag: int, redelivered: bool, message: wire.Message) -> None:  # noqa: ARG002 - as told
        assert self._connection is not None
        self._all.tally.ran += 1
        with self._connection.together():
            self._connection.send(1, commands.Basic.Ack(tag))
            if message.reply_to:
                answer = wire.Message(None, {}, message.body, correlation_id=message.correlation_id, persistent=False)
                self._connection.publish(1, "", message.reply_to, answer, mandatory=False)

    def lost(self, _: Exception) -> None:
        tally = self._all.tally
        self._connection = None
        if self._serving:
            self._serving = False
            tally.serving -= 1
            tally.lost += 1
            tally.changed()
        self._all.is_away(self)
        self._settle(is_there=False)

    def _settle(self, *, is_there: bool) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(is_there)
