"""A small AMQP 0-9-1 client on a socket, for tests that must send what no library lets through.

Everything blocks, with a time limit. Requests are method frames built here by hand; whatever closes the
channel or the connection is raised as `ChannelClosed` or `ConnectionClosed` with the broker's reply code.
"""

import socket
import ssl
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
BASIC = 60

Argument = str | int | bool | bytes


class Closed(Exception):
    """The broker closed something: `code` and `text` are its reply."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text


class ChannelClosed(Closed):
    """channel.close; the connection lives, and `open_channel` opens it again."""


class ConnectionClosed(Closed):
    """connection.close; code 0: the socket was closed without a word."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    channel: int
    payload: bytes

    @property
    def method(self) -> tuple[int, int]:
        """Class and method ids of a method frame."""
        return struct.unpack_from(">HH", self.payload) if self.kind == METHOD else (0, 0)


@dataclass(frozen=True, slots=True)
class Got:
    """A message as it came; `header` is the content header's payload, undecoded."""

    tag: int
    redelivered: bool
    exchange: bytes
    key: bytes
    header: bytes
    body: bytes


# ---- Encoding ----------------------------------------------------------------------------------------


def short(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return bytes([len(raw)]) + raw


def long(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def field(value: Argument) -> bytes:
    """A field value: text, bool, whole number or bytes."""
    if isinstance(value, bool):
        return b"t" + bytes([value])
    if isinstance(value, int):
        return b"l" + struct.pack(">q", value)
    return b"S" + long(value)


def table(entries: Mapping[str, Argument] | None = None) -> bytes:
    return long(b"".join(short(key) + field(value) for key, value in (entries or {}).items()))


# The fourteen properties in wire order; the first has the highest bit of the flags.
_NAMES = (
    "content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
    "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id",
)  # fmt: skip


def properties(**values: bytes) -> bytes:
    """Flags and properties of a content header from encoded values, such as `correlation_id=short(b"\\xff")`."""
    flags = 0
    for name in values:
        flags |= 0x8000 >> _NAMES.index(name)
    return struct.pack(">H", flags) + b"".join(values[name] for name in _NAMES if name in values)


def header(raw_properties: bytes, body_size: int) -> bytes:
    """A content header's payload."""
    return struct.pack(">HHQ", BASIC, 0, body_size) + raw_properties


# ---- The client --------------------------------------------------------------------------------------


class RawClient:
    """One connection; `channel` arguments are channel numbers."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        plain = socket.create_connection((host, port), timeout)
        self.socket = tls.wrap_socket(plain, server_hostname=server_hostname or host) if tls else plain
        self._buffer = b""
        self._awaited: dict[int, int] = {}  # per channel, the last publish whose confirm was asked for
        self._settled: dict[int, dict[int, bool]] = {}  # confirms that came before they were asked for
        self.mechanisms: list[str] = []
        self.frame_max = 0
        self.channel_max = 0

    # -- Connection --

    def login(
        self,
        username: str,
        password: str,
        vhost: str = "devices",
        *,
        mechanism: str = "PLAIN",
        response: bytes | None = None,
        capabilities: Iterable[str] = ("authentication_failure_close", "consumer_cancel_notify", "basic.nack"),
    ) -> Self:
        """The whole handshake; `response` replaces the one PLAIN makes of name and password.

        Raises:
            ConnectionClosed: refused (403 bad credentials, 530 vhost).
        """
        self.socket.sendall(b"AMQP\x00\x00\x09\x01")
        start = self.expect(0, (10, 10)).payload
        at = 6 + 4 + struct.unpack_from(">I", start, 6)[0]
        length = struct.unpack_from(">I", start, at)[0]
        self.mechanisms = start[at + 4 : at + 4 + length].decode().split()
        if response is None:
            response = b"\0" + username.encode() + b"\0" + password.encode()
        named = b"".join(short(name) + b"t\x01" for name in capabilities)
        client = long(short("capabilities") + b"F" + long(named))
        self.method(0, (10, 11), client + short(mechanism) + long(response) + short("en_US"))
        tune = self.expect(0, (10, 30)).payload
        self.channel_max, self.frame_max, _ = struct.unpack_from(">HIH", tune, 4)
        self.method(0, (10, 31), struct.pack(">HIH", self.channel_max, self.frame_max, 0))
        self.method(0, (10, 40), short(vhost) + short("") + b"\0")
        self.expect(0, (10, 41))
        return self

    def close(self) -> None:
        """Close the socket, without a word."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- Frames --

    def send(self, kind: int, channel: int, payload: bytes) -> None:
        self.socket.sendall(struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce")

    def method(self, channel: int, method: tuple[int, int], arguments: bytes = b"") -> None:
        self.send(METHOD, channel, struct.pack(">HH", *method) + arguments)

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame that is no heartbeat.

        Raises:
            ConnectionClosed: the broker closed the connection.
            TimeoutError: nothing came.
        """
        if timeout is not None:
            before = self.socket.gettimeout()
            self.socket.settimeout(timeout)
            try:
                return self.receive()
            finally:
                self.socket.settimeout(before)
        while True:
            kind, channel, size = struct.unpack(">BHI", self._read(7))
            payload = self._read(size + 1)
            assert payload[-1] == 0xCE
            frame = Frame(kind, channel, payload[:-1])
            if frame.method == (10, 50):
                code, text = _reply(frame.payload)
                self.method(0, (10, 51))
                raise ConnectionClosed(code, text)
            if kind != HEARTBEAT:
                return frame

    def expect(self, channel: int, *methods: tuple[int, int]) -> Frame:
        """The next frame of the channel, which must be one of these methods.

        Raises:
            ChannelClosed: the broker closed the channel instead.
        """
        while True:
            frame = self.receive()
            if frame.channel != channel:
                continue
            if frame.method == (20, 40):
                code, text = _reply(frame.payload)
                self.method(channel, (20, 41))
                raise ChannelClosed(code, text)
            if frame.method in methods:
                return frame
            raise AssertionError(f"expected one of {methods}, got {frame}")

    # -- Requests --

    def open_channel(self, channel: int = 1, *, confirms: bool = False) -> None:
        self.method(channel, (20, 10), short(""))
        self.expect(channel, (20, 11))
        if confirms:
            self.method(channel, (85, 10), b"\0")
            self.expect(channel, (85, 11))

    def declare_exchange(self, name: str, kind: str = "direct", *, channel: int = 1, passive: bool = False) -> None:
        flags = (1 if passive else 0) | 2  # durable
        self.method(channel, (40, 10), b"\0\0" + short(name) + short(kind) + bytes([flags]) + table())
        self.expect(channel, (40, 11))

    def delete_exchange(self, name: str, *, channel: int = 1) -> None:
        self.method(channel, (40, 20), b"\0\0" + short(name) + b"\0")
        self.expect(channel, (40, 21))

    def declare(
        self,
        queue: str,
        arguments: Mapping[str, Argument] | None = None,
        *,
        channel: int = 1,
        passive: bool = False,
        durable: bool = True,
        exclusive: bool = False,
    ) -> int:
        """Declare a queue; returns how many messages are ready."""
        flags = (1 if passive else 0) | (2 if durable else 0) | (4 if exclusive else 0)
        self.method(channel, (50, 10), b"\0\0" + short(queue) + bytes([flags]) + table(arguments))
        answer = self.expect(channel, (50, 11)).payload
        messages: int = struct.unpack_from(">I", answer, 5 + answer[4])[0]
        return messages

    def bind(self, queue: str, exchange: str, key: str | bytes, *, channel: int = 1) -> None:
        self.method(channel, (50, 20), b"\0\0" + short(queue) + short(exchange) + short(key) + b"\0" + table())
        self.expect(channel, (50, 21))

    def unbind(self, queue: str, exchange: str, key: str | bytes, *, channel: int = 1) -> None:
        self.method(channel, (50, 50), b"\0\0" + short(queue) + short(exchange) + short(key) + table())
        self.expect(channel, (50, 51))

    def purge(self, queue: str, *, channel: int = 1) -> None:
        self.method(channel, (50, 30), b"\0\0" + short(queue) + b"\0")
        self.expect(channel, (50, 31))

    def delete(self, queue: str, *, channel: int = 1) -> None:
        self.method(channel, (50, 40), b"\0\0" + short(queue) + b"\0")
        self.expect(channel, (50, 41))

    def qos(self, prefetch: int, *, channel: int = 1) -> None:
        self.method(channel, (60, 10), struct.pack(">IHB", 0, prefetch, 0))
        self.expect(channel, (60, 11))

    def consume(
        self,
        queue: str,
        arguments: Mapping[str, Argument] | None = None,
        *,
        channel: int = 1,
        tag: str = "raw",
        no_ack: bool = False,
    ) -> None:
        flags = 2 if no_ack else 0
        self.method(channel, (60, 20), b"\0\0" + short(queue) + short(tag) + bytes([flags]) + table(arguments))
        self.expect(channel, (60, 21))

    def delivery(self, *, channel: int = 1) -> Got:
        """The next message of a consumer."""
        frame = self.expect(channel, (60, 60))
        at = 5 + frame.payload[4]
        return self._content(frame.payload, at, channel)

    def get(self, queue: str, *, channel: int = 1, no_ack: bool = False) -> Got | None:
        self.method(channel, (60, 70), b"\0\0" + short(queue) + (b"\1" if no_ack else b"\0"))
        frame = self.expect(channel, (60, 71), (60, 72))
        return self._content(frame.payload, 4, channel) if frame.method == (60, 71) else None

    def ack(self, tag: int, *, channel: int = 1, multiple: bool = False) -> None:
        self.method(channel, (60, 80), struct.pack(">QB", tag, multiple))

    def publish(
        self,
        exchange: str,
        key: str | bytes,
        body: bytes = b"",
        raw_properties: bytes | None = None,
        *,
        channel: int = 1,
        mandatory: bool = False,
        raw_header: bytes | None = None,
    ) -> None:
        """Publish with these flags and properties (or this whole content header), whatever is in them."""
        flags = b"\1" if mandatory else b"\0"
        self.method(channel, (60, 40), b"\0\0" + short(exchange) + short(key) + flags)
        none = properties()
        self.send(HEADER, channel, raw_header or header(none if raw_properties is None else raw_properties, len(body)))
        room = (self.frame_max or 131_072) - 8
        for start in range(0, len(body), room):
            self.send(BODY, channel, body[start : start + room])

    def confirmed(self, *, channel: int = 1) -> bool:
        """Wait for the confirm of the next publish on a channel opened with `confirms`: was it an ack?

        Call it once for each publish, in their order.

        Raises:
            ChannelClosed, ConnectionClosed: the broker refused the message that way.
        """
        tag = self._awaited[channel] = self._awaited.get(channel, 0) + 1
        settled = self._settled.setdefault(channel, {})
        while tag not in settled:
            frame = self.expect(channel, (60, 80), (60, 120))
            last, multiple = struct.unpack_from(">QB", frame.payload, 4)
            for settled_tag in range(tag if multiple & 1 else last, last + 1):
                settled[settled_tag] = frame.method == (60, 80)
        return settled.pop(tag)

    def sync(self, *, channel: int = 1) -> None:
        """Return once the broker has dealt with everything sent on the channel; raises what it closed it for."""
        self.method(channel, (60, 10), struct.pack(">IHB", 0, 0, 0))
        self.expect(channel, (60, 11))

    def _content(self, payload: bytes, at: int, channel: int) -> Got:
        tag, redelivered = struct.unpack_from(">Q?", payload, at)
        at += 9
        exchange = payload[at + 1 : at + 1 + payload[at]]
        at += 1 + payload[at]
        key = payload[at + 1 : at + 1 + payload[at]]
        head = self._content_frame(HEADER, channel)
        size = struct.unpack_from(">Q", head, 4)[0]
        body = b""
        while len(body) < size:
            body += self._content_frame(BODY, channel)
        return Got(tag, redelivered, exchange, key, head, body)

    def _content_frame(self, kind: int, channel: int) -> bytes:
        frame = self.receive()
        assert (frame.kind, frame.channel) == (kind, channel), frame
        return frame.payload

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                more = self.socket.recv(65_536)
            except (ConnectionError, ssl.SSLError) as error:
                raise ConnectionClosed(0, str(error)) from error
            if not more:
                raise ConnectionClosed(0, "the socket was closed")
            self._buffer += more
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


def _reply(payload: bytes) -> tuple[int, str]:
    code = struct.unpack_from(">H", payload, 4)[0]
    return code, payload[7 : 7 + payload[6]].decode("utf-8", "replace")
