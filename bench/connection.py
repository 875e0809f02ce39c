"""An AMQP 0-9-1 connection over TLS that costs little: thousands of them share one loop and one read buffer.

No stream, no task and no timer of its own: asyncio's and uvloop's TLS keep a buffer of 256 KiB for each connection,
OpenSSL on a plain socket keeps a few KiB. Frames are built and read by pamqp, and a process that
opens any has installed the fabric's guard (`fabric.amqp.guard`).
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from pamqp import base, commands, exceptions, frame, header
from pamqp.common import FieldTable

from topology.wire import Message

HANDSHAKE_TIMEOUT = 20.0  # seconds for TCP and TLS, as the agent's for its whole stack
CHANNELS = 2  # mailbox and uplink
FRAME_MAX = 131_072  # bytes
HEARTBEAT = 30  # seconds; sent at half of it, missed after two
READ = 64 * 1024  # bytes of the loop's one buffer; a TLS record has 16 KiB at most

_FRAME = struct.Struct(">BHI")  # type, channel, payload size
_INDEX = struct.Struct(">I")  # class and method
_TAGGED = struct.Struct(">Q?")  # delivery tag, redelivered
_CONTENT = struct.Struct(">HHQ")  # class, weight, body size
_METHOD, _HEADER, _BODY, _BEAT = 1, 2, 3, 8
_END = b"\xce"
_BEATING = _FRAME.pack(_BEAT, 0, 0) + _END
_DELIVER = commands.Basic.Deliver.index
_PUBLISH = _INDEX.pack(commands.Basic.Publish.index) + b"\0\0"  # and the ticket, which is reserved

_CAPABILITIES: Final[FieldTable] = {
    "publisher_confirms": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "authentication_failure_close": True,
}
_PROPERTIES: Final[FieldTable] = {"product": "restante-bench", "capabilities": _CAPABILITIES}

_buffer = memoryview(bytearray(READ))  # of whichever connection reads now: the loop has one thread


class Closed(ConnectionError):
    """The broker, or this side, has ended it. `code` is AMQP's, 0 if there was none."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}" if code else text)
        self.code = code


class Owner(Protocol):
    """Who is told; all calls come on the loop, none of them after `lost`, which comes once."""

    def opened(self) -> None: ...

    def answered(self, channel: int, method: base.Frame) -> None:
        """Any method that is neither a delivery nor the connection's own."""

    def delivered(self, channel: int, tag: int, redelivered: bool, message: Message) -> None: ...

    def lost(self, error: Exception) -> None: ...


class Connection:
    """One connection of one login. `dial` it once; then it lives until `lost`."""

    __slots__ = (
        "_address", "_body", "_context", "_credentials", "_delivery", "_gathered", "_header", "_host", "_left",
        "_loop", "_open", "_over", "_owner", "_rest", "_socket", "_vhost", "heard_at", "reached", "said_at",
    )  # fmt: skip

    def __init__(
        self,
        owner: Owner,
        address: tuple[str, int],
        host: str,
        context: ssl.SSLContext,
        credentials: tuple[str, str],
        vhost: str,
    ) -> None:
        """`address` is where to connect, `host` what the certificate must be for."""
        self._owner, self._address, self._host, self._context = owner, address, host, context
        self._credentials, self._vhost = credentials, vhost
        self._loop = asyncio.get_running_loop()
        self._socket: ssl.SSLSocket | None = None
        self._rest = b""  # of an incomplete frame
        self._left = b""  # that the socket did not take yet
        self._gathered: list[bytes] | None = None
        self._delivery: tuple[int, int, bool] | None = None
        self._header: header.ContentHeader | None = None
        self._body: list[bytes] = []
        self._open = self._over = False
        self.reached = False  # has the port taken the connection?
        self.heard_at = self.said_at = self._loop.time()

    async def dial(self) -> None:
        """Connect and begin the login. Never raises: a failure is `lost`."""
        plain = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET, socket.SOCK_STREAM)
        try:
            plain.setblocking(False)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await self._loop.sock_connect(plain, self._address)
                self.reached = True
                made = self._context.wrap_socket(plain, server_hostname=self._host, do_handshake_on_connect=False)
                self._socket = made
                await self._shake_hands(made)
        except (OSError, TimeoutError) as error:
            plain.close()
            self._lose(error)
            return
        except asyncio.CancelledError:
            plain.close()
            self._lose(Closed(0, "given up"))
            raise
        if self._over:
            return
        self._loop.add_reader(made.fileno(), self._read)
        self.write(header.ProtocolHeader().marshal())

    def send(self, channel: int, *methods: base.Frame) -> None:
        self.write(b"".join(frame.marshal(method, channel) for method in methods))

    def publish(self, channel: int, exchange: str, key: str, message: Message, *, mandatory: bool) -> None:
        method = b"%b%b%b%c" % (_PUBLISH, _short(exchange), _short(key), 1 if mandatory else 0)
        content = header.ContentHeader(0, len(message.body), _properties(message)).marshal()
        parts = [_framed(_METHOD, channel, method), _framed(_HEADER, channel, content)]
        step = FRAME_MAX - _FRAME.size - 1
        starts = range(0, len(message.body), step)
        parts += [_framed(_BODY, channel, message.body[start : start + step]) for start in starts]
        self.write(b"".join(parts))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent within leaves in one write, in its order."""
        if self._gathered is not None:
            yield
            return
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            if gathered:
                self.write(b"".join(gathered))

    def beat(self, now: float) -> None:
        """To be called every second or so: sends a heartbeat when one is due, ends a connection that is silent."""
        if not self._open or self._over:
            return
        if now - self.heard_at > 2 * HEARTBEAT:
            self._lose(Closed(0, "the broker's heartbeats are missing"))
        elif now - self.said_at > HEARTBEAT / 2:
            self.write(_BEATING)

    def close(self) -> None:
        """Ask for a clean end; the owner hears of it."""
        self.send(0, commands.Connection.Close(200, "", 0, 0))

    def abort(self) -> None:
        """End it now, as if the device had lost its power."""
        self._lose(Closed(0, "aborted"))

    def write(self, data: bytes) -> None:
        if self._gathered is not None:
            self._gathered.append(data)
            return
        if self._over or self._socket is None:
            return
        self.said_at = self._loop.time()
        if self._left:
            self._left += data
            return
        self._left = data
        self._flush()

    async def _shake_hands(self, made: ssl.SSLSocket) -> None:
        while True:
            try:
                made.do_handshake()
            except ssl.SSLWantReadError:
                await self._when(self._loop.add_reader, self._loop.remove_reader, made.fileno())
            except ssl.SSLWantWriteError:
                await self._when(self._loop.add_writer, self._loop.remove_writer, made.fileno())
            else:
                return

    async def _when(self, add, remove, descriptor: int) -> None:  # type: ignore[no-untyped-def]  # the loop's own
        ready = self._loop.create_future()
        add(descriptor, _wake, ready)
        try:
            await ready
        finally:
            remove(descriptor)

    def _flush(self) -> None:
        assert self._socket is not None
        try:
            while self._left:
                self._left = self._left[self._socket.send(self._left) :]
        except (ssl.SSLWantWriteError, BlockingIOError):
            self._loop.add_writer(self._socket.fileno(), self._flush_later)
        except ssl.SSLWantReadError:
            self._loop.call_later(0.01, self._flush_later)  # a key update: the reader takes it
        except OSError as error:
            # Not within the call of whoever writes: it may be in the middle of something.
            self._loop.call_soon(self._lose, error)

    def _flush_later(self) -> None:
        if self._socket is not None and not self._over:
            self._loop.remove_writer(self._socket.fileno())
            self._flush()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            count = self._socket.recv_into(_buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return
        except OSError as error:
            self._lose(error)
            return
        if not count:
            self._lose(Closed(0, "the broker ended the connection"))
            return
        self.heard_at = self._loop.time()
        data = bytes(_buffer[:count])
        if self._rest:
            data, self._rest = self._rest + data, b""
        try:
            self._rest = data[self._take(data) :]
        except (ValueError, struct.error, exceptions.PAMQPException) as error:
            self._lose(Closed(0, f"the broker broke the protocol: {error}"))

    def _take(self, data: bytes) -> int:
        """Deal with the whole frames in it; how many bytes they had."""
        at = 0
        while at + _FRAME.size < len(data) and not self._over:
            kind, channel, size = _FRAME.unpack_from(data, at)
            end = at + _FRAME.size + size
            if end >= len(data):
                break
            payload = data[at + _FRAME.size : end]
            at = end + 1
            if kind == _METHOD:
                self._take_method(channel, payload)
            elif kind == _HEADER:
                self._header = header.ContentHeader()
                self._header.unmarshal(payload)
                self._complete()
            elif kind == _BODY:
                self._body.append(payload)
                self._complete()
        return at

    def _take_method(self, channel: int, payload: bytes) -> None:
        (index,) = _INDEX.unpack_from(payload)
        if index == _DELIVER:  # what thousands do all day; exchange and key are not looked at
            tag, redelivered = _TAGGED.unpack_from(payload, 5 + payload[4])
            self._delivery, self._header, self._body = (channel, tag, redelivered), None, []
            return
        method: base.Frame = commands.INDEX_MAPPING[index]()
        method.unmarshal(payload[4:])
        match method:
            case commands.Connection.Start():
                response = "\0{}\0{}".format(*self._credentials)
                self.send(0, commands.Connection.StartOk(_PROPERTIES, "PLAIN", response))
            case commands.Connection.Tune():
                tuned = commands.Connection.TuneOk(min(CHANNELS, method.channel_max), FRAME_MAX, HEARTBEAT)
                self.send(0, tuned, commands.Connection.Open(self._vhost))
            case commands.Connection.OpenOk():
                self._open = True
                self._owner.opened()
            case commands.Connection.Close():
                self.send(0, commands.Connection.CloseOk())
                self._lose(Closed(method.reply_code or 0, method.reply_text))
            case commands.Connection.CloseOk():
                self._lose(Closed(0, "closed"))
            case commands.Basic.Return():
                self._delivery, self._header, self._body = None, None, []
                self._owner.answered(channel, method)
            case _:
                self._owner.answered(channel, method)

    def _complete(self) -> None:
        """Hand the delivery over, if that was the last of it. What was returned is dropped."""
        if self._header is None or sum(map(len, self._body)) < (self._header.body_size or 0):
            return
        delivery, properties, body = self._delivery, self._header.properties, b"".join(self._body)
        self._delivery, self._header, self._body = None, None, []
        if delivery is not None:
            channel, tag, redelivered = delivery
            self._owner.delivered(channel, tag, redelivered, _message(properties, body))

    def _lose(self, error: Exception) -> None:
        if self._over:
            return
        self._over = True
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self._socket = None
        self._rest = self._left = b""
        self._owner.lost(error)


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _framed(kind: int, channel: int, payload: bytes) -> bytes:
    return b"%b%b%b" % (_FRAME.pack(kind, channel, len(payload)), payload, _END)


def _short(text: str) -> bytes:
    raw = text.encode()
    return b"%c%b" % (len(raw), raw)


def _properties(message: Message) -> commands.Basic.Properties:
    headers: FieldTable = dict(message.headers)  # type: ignore[arg-type]  # pamqp refuses what it can't encode
    return commands.Basic.Properties(
        content_type=message.content_type,
        headers=headers or None,
        delivery_mode=2 if message.persistent else 1,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=None if message.expiration_ms is None else str(message.expiration_ms),
        message_id=message.message_id,
        message_type=message.type,
        user_id=message.user_id,
    )


def _message(found: commands.Basic.Properties, body: bytes) -> Message:
    return Message(
        type=found.message_type,
        headers=found.headers or {},
        body=body,
        content_type=found.content_type,
        message_id=found.message_id,
        correlation_id=found.correlation_id,
        reply_to=found.reply_to,
        user_id=found.user_id,
        persistent=found.delivery_mode == 2,
    )
