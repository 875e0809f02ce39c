"""The guard around pika's decoder: no content header reaches it before `topology.guard` has passed it.

One message that pika can't decode would end the connection, and again at every redelivery. What is
refused becomes a message without properties of type `topology.guard.UNDECODABLE`, which is acked.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pika
from pika import frame, spec
from pika.adapters.asyncio_connection import AsyncioConnection

from device_agent import errors
from topology import guard

GATHERED = 64 * 1024  # bytes of frames that are held back to be written together

_FRAME_HEADER = struct.Struct(">BHI")  # type, channel, payload size
_CONTENT = struct.Struct(">HHQ")  # class, weight, body size


class GuardedConnection(AsyncioConnection):  # type: ignore[misc]  # pika's classes are untyped
    """pika's connection with the guard between its buffer and its decoder.

    pika's asyncio adapter, not its select one: the select loop opens a listening TCP socket for an instant
    to wake itself up, and this agent listens nowhere.
    """

    def _read_frame(self) -> tuple[int, object]:
        return decode(self._frame_buffer, frame.decode_frame)

    _gathered: list[bytes] | None = None  # frames that wait for the end of `together`, or for many bytes of them
    _size = 0  # bytes

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent within leaves in few writes, in its order: one TLS record, one system call."""
        if self._gathered is not None:
            yield
            return
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            self._write(gathered)

    def _output_marshaled_frames(self, marshaled_frames: list[bytes]) -> None:
        if self._gathered is None:
            self._write(marshaled_frames)
            return
        self._gathered += marshaled_frames
        self._size += sum(map(len, marshaled_frames))
        if self._size >= GATHERED:
            gathered, self._gathered = self._gathered, []
            self._write(gathered)

    def _write(self, marshaled_frames: list[bytes]) -> None:
        """Method, header and body, of one message or of many, in one TLS record instead of three."""
        self._size = 0
        if marshaled_frames:
            super()._output_marshaled_frames([b"".join(marshaled_frames)])


def decode(buffer: bytes, decoder: Callable[[bytes], tuple[int, object]]) -> tuple[int, object]:
    """`(consumed, frame)` from pika's buffer, `(0, None)` while the frame is incomplete."""
    if len(buffer) < _FRAME_HEADER.size:
        return decoder(buffer)
    kind, channel, size = _FRAME_HEADER.unpack_from(buffer)
    end = _FRAME_HEADER.size + size + 1
    if len(buffer) < end or kind not in (spec.FRAME_HEADER, spec.FRAME_METHOD):
        return decoder(buffer)
    payload = buffer[_FRAME_HEADER.size : end - 1]
    if kind == spec.FRAME_METHOD:
        consumed, value = decoder(buffer)
        _textual(value)
        return consumed, value
    reason = guard.inspect(payload)
    if reason is None:
        try:
            return decoder(buffer)
        except Exception as error:  # noqa: BLE001 - RecursionError included: whatever it is, the message is refused
            reason = f"{type(error).__name__} in the decoder"
    if len(payload) < _CONTENT.size or buffer[end - 1] != spec.FRAME_END:
        return decoder(buffer)  # broken framing is the broker's fault, not a message's: the connection ends
    _, _, body_size = _CONTENT.unpack_from(payload)
    properties = pika.BasicProperties(type=guard.UNDECODABLE, headers={guard.REASON: reason})
    return end, frame.Header(channel, body_size, properties)


def check() -> None:
    """Feed a real connection object two poisons and an innocent message behind them.

    Raises:
        errors.Unguarded: the guard is not in pika's way; the agent must not start.
    """
    seen: list[object] = []
    connection = GuardedConnection.__new__(GuardedConnection)
    connection._frame_buffer = b""  # noqa: SLF001 - the seam this check is about
    connection.bytes_received = 0
    connection._process_frame = seen.append  # noqa: SLF001
    try:
        connection._on_data_available(_poison() + _innocent())  # noqa: SLF001
    except Exception as error:
        raise errors.Unguarded("a poisonous content header reached pika's decoder: unsupported version") from error
    kinds = [getattr(getattr(value, "properties", None), "type", None) for value in seen]
    if kinds != [guard.UNDECODABLE, guard.UNDECODABLE, "innocent"]:
        raise errors.Unguarded("the guard around pika's decoder did not hold: unsupported version")


def _textual(value: object) -> None:
    """Text instead of the bytes that pika leaves where a short string is not UTF-8."""
    method = getattr(value, "method", None)
    if isinstance(method, spec.Basic.Deliver | spec.Basic.Return):
        for name in ("consumer_tag", "exchange", "routing_key"):
            text = getattr(method, name, None)
            if isinstance(text, bytes):
                setattr(method, name, text.decode("utf-8", "backslashreplace"))


def _poison() -> bytes:
    timestamp = b"\x01kT" + b"\xff" * 8  # 2^64-1
    late = _header(0x2000, struct.pack(">I", len(timestamp)) + timestamp)
    nested = b"".join(b"\x01kF" + struct.pack(">I", 7 * depth) for depth in range(3000, -1, -1))
    deep = _header(0x2000, struct.pack(">I", len(nested)) + nested)
    return late + deep


def _innocent() -> bytes:
    return _header(0x0020, b"\x08innocent")


def _header(flags: int, properties: bytes) -> bytes:
    payload = _CONTENT.pack(60, 0, 0) + struct.pack(">H", flags) + properties
    return _FRAME_HEADER.pack(spec.FRAME_HEADER, 1, len(payload)) + payload + bytes([spec.FRAME_END])
