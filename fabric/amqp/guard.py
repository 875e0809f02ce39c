"""Keeps mail that breaks pamqp's decoder from killing the connection, for everything built on pamqp.

What `topology.guard` refuses, or pamqp fails on, arrives as a message without properties and of type
`guard.UNDECODABLE`; the consumer can store and ack it. Back ends that use aio-pika call `install()` once,
before they connect.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any, Protocol

from pamqp import base, commands, exceptions, frame, header

from topology import guard

_FIXED = struct.Struct(">HHQ")  # class, weight, body size: the content header's beginning
_TAGGED = struct.Struct(">Q?")  # delivery tag, redelivered
_CODE = struct.Struct(">H")
_COUNT = struct.Struct(">I")
_MARK = "_restante_guard"

_Unmarshal = Callable[[Any, bytes], None]  # of whichever class is wrapped


class Unguarded(RuntimeError):
    """pamqp decodes poison unguarded; whoever would consume with it must not start."""


class _Method(Protocol):
    def unmarshal(self, data: bytes) -> None: ...


def install() -> None:
    """Guard pamqp in this process. Installing twice is installing once."""
    _wrap(header.ContentHeader, _guarded_header)
    _wrap(commands.Basic.Deliver, lambda original: _guarded_method(original, _deliver))
    _wrap(commands.Basic.GetOk, lambda original: _guarded_method(original, _get_ok))
    _wrap(commands.Basic.Return, lambda original: _guarded_method(original, _return))


def check() -> None:
    """Decode a built-in set of poison.

    Raises:
        Unguarded: some of it got through, or raised.
    """
    for name, payload in _poison().items():
        try:
            _, _, decoded = frame.unmarshal(_frame(2, payload))
        except (exceptions.PAMQPException, ValueError, ArithmeticError, RecursionError, OSError) as error:
            raise Unguarded(f"pamqp is not guarded: {name} makes it raise {type(error).__name__}") from error
        if (
            not isinstance(decoded, header.ContentHeader)
            or decoded.properties.message_type != guard.UNDECODABLE
            or decoded.body_size != _POISON_BODY
        ):
            raise Unguarded(f"pamqp is not guarded: {name} was decoded")
    for method, payload in _poisoned_methods():
        try:
            frame.unmarshal(_frame(1, _COUNT.pack(method.index) + payload))
        except (exceptions.PAMQPException, ValueError) as error:
            raise Unguarded(f"pamqp is not guarded: a routing key that is not UTF-8 breaks {method.name}") from error


def _wrap(owner: type[_Method], guarded: Callable[[_Unmarshal], _Unmarshal]) -> None:
    original: _Unmarshal = owner.unmarshal
    if not hasattr(original, _MARK):
        wrapper = functools.wraps(original)(guarded(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, "unmarshal", wrapper)  # noqa: B010 - mypy refuses the plain assignment to a method


def _guarded_header(original: _Unmarshal) -> _Unmarshal:
    def unmarshal(self: header.ContentHeader, data: bytes) -> None:
        reason = guard.inspect(data)
        if reason is None:
            try:
                return original(self, data)
            except Exception as error:  # noqa: BLE001 - whatever pamqp raises, the connection must live
                reason = f"pamqp: {type(error).__name__}"
        # Without these twelve bytes there is no frame: that is the broker's fault and may raise.
        self.class_id, self.weight, self.body_size = _FIXED.unpack_from(data)
        self.properties = commands.Basic.Properties(message_type=guard.UNDECODABLE, headers={guard.REASON: reason})
        return None

    return unmarshal


def _guarded_method(original: _Unmarshal, lenient: _Unmarshal) -> _Unmarshal:
    def unmarshal(self: Any, data: bytes) -> None:
        try:
            original(self, data)
        except UnicodeDecodeError:
            lenient(self, data)

    return unmarshal


def _deliver(self: commands.Basic.Deliver, data: bytes) -> None:
    self.consumer_tag, at = _text(data, 0)
    self.delivery_tag, self.redelivered = _TAGGED.unpack_from(data, at)
    self.exchange, at = _text(data, at + _TAGGED.size)
    self.routing_key, _ = _text(data, at)


def _get_ok(self: commands.Basic.GetOk, data: bytes) -> None:
    self.delivery_tag, self.redelivered = _TAGGED.unpack_from(data)
    self.exchange, at = _text(data, _TAGGED.size)
    self.routing_key, at = _text(data, at)
    (self.message_count,) = _COUNT.unpack_from(data, at)


def _return(self: commands.Basic.Return, data: bytes) -> None:
    (self.reply_code,) = _CODE.unpack_from(data)
    self.reply_text, at = _text(data, _CODE.size)
    self.exchange, at = _text(data, at)
    self.routing_key, _ = _text(data, at)


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + data[at]
    # A backslash is outside every grammar of ours, so such a key is refused where keys are checked; unlike
    # a lone surrogate it can be logged and stored.
    return data[at + 1 : end].decode("utf-8", "backslashreplace"), end


# ---- The built-in poison -----------------------------------------------------------------------------

_POISON_BODY = 7  # bytes, announced by each


def _poison() -> dict[str, bytes]:
    def header_of(flags: int, properties: bytes) -> bytes:
        return _FIXED.pack(60, 0, _POISON_BODY) + flags.to_bytes(2, "big") + properties

    def table(entries: bytes) -> bytes:
        return len(entries).to_bytes(4, "big") + entries

    nested = b""
    for _ in range(2_000):
        nested = b"\x01kF" + table(nested)
    return {
        "a timestamp of 2^64-1": header_of(0x0040, b"\xff" * 8),
        "a correlation_id that is not UTF-8": header_of(0x0400, b"\x01\xff"),
        "a content_type that is not UTF-8": header_of(0x8000, b"\x01\xff"),
        "a header key that is not UTF-8": header_of(0x2000, table(b"\x01\xffV")),
        "headers nested 2,000 deep": header_of(0x2000, table(nested)),
        "1,000 headers": header_of(0x2000, table(b"\x01kV" * 1_000)),
        "flags that never end": header_of(0xFFFF, b"\xff" * 100),
    }


def _poisoned_methods() -> list[tuple[type[base.Frame], bytes]]:
    tagged = _TAGGED.pack(1, 0)
    return [
        (commands.Basic.Deliver, b"\x01c" + tagged + b"\x01e\x01\xff"),
        (commands.Basic.GetOk, tagged + b"\x01e\x01\xff" + _COUNT.pack(0)),
        (commands.Basic.Return, _CODE.pack(312) + b"\x01t\x01e\x01\xff"),
    ]


def _frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"
