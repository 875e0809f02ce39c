"""The one guard on every decoder of a message's properties.

A message can pass the broker and still break the client library that decodes it: the connection
dies, and dies again at every redelivery. So the raw content header is checked here, byte by byte and
without recursion, before any library sees it. Whoever imports a client library wraps its decoder with
`inspect` (`fabric.amqp.guard` for pamqp, `device_agent.guard` for pika); what is refused becomes a
message without properties, of type `UNDECODABLE`, which the consumer can store and ack.

Layout of the bytes: AMQP 0-9-1 section 4.2.6, with RabbitMQ's field types (its errata page).
"""

import math
import struct

UNDECODABLE = "restante.undecodable"
"""`type` that a guarded decoder gives a message it refused; the header `REASON` says why."""
REASON = "reason"

MAX_HEADERS = 32  # entries of the headers table itself; nested ones are bounded by MAX_BYTES
MAX_DEPTH = 4  # containers, the headers table included: the broker's own x-death needs them all
MAX_BYTES = 8 * 1024  # of the headers table
LATEST_TIMESTAMP = 253_402_300_799  # s: the end of 9999, where Python's datetime ends

_SHORT, _TABLE, _OCTET, _TIME = range(4)

# The fourteen basic properties in wire order; the first has the highest bit of the flags.
_PROPERTIES = (
    _SHORT,
    _SHORT,
    _TABLE,
    _OCTET,
    _OCTET,
    _SHORT,
    _SHORT,
    _SHORT,
    _SHORT,
    _TIME,
    _SHORT,
    _SHORT,
    _SHORT,
    _SHORT,
)

_FIXED_SIZES = {
    ord("t"): 1, ord("b"): 1, ord("B"): 1, ord("s"): 2, ord("u"): 2, ord("I"): 4, ord("i"): 4,
    ord("l"): 8, ord("L"): 8, ord("D"): 5, ord("V"): 0,
}  # fmt: skip
_FLOATS = {ord("f"): struct.Struct(">f"), ord("d"): struct.Struct(">d")}
_BASIC = 60  # the only class whose messages have content headers


class Refused(ValueError):
    """The content header is outside the bounds; the text says which."""


def inspect(payload: bytes) -> str | None:
    """Why this content header must not reach a decoder, or None when it may.

    Args:
        payload: a content-header frame's payload: class, weight, body size (12 bytes), flags, properties.
    """
    try:
        _properties(payload)
    except Refused as refusal:
        return str(refusal)
    return None


def _properties(payload: bytes) -> None:
    flags = _number(payload, 12, 2)
    if _number(payload, 0, 2) != _BASIC:
        raise Refused("a content header of another class")
    if flags & 1:
        raise Refused("more property flags than the protocol has")
    at = 14
    for index, kind in enumerate(_PROPERTIES):
        if not flags & (0x8000 >> index):
            continue
        if kind == _SHORT:
            at = _text(payload, at, 1, len(payload))
        elif kind == _OCTET:
            at = _skip(at, 1, len(payload))
        elif kind == _TIME:
            at = _timestamp(payload, at, len(payload))
        else:
            at = _table(payload, at)


def _table(payload: bytes, at: int) -> int:
    size = _number(payload, at, 4)
    if size > MAX_BYTES:
        raise Refused(f"headers of more than {MAX_BYTES} bytes")
    end = _skip(at + 4, size, len(payload))
    at += 4
    headers = 0
    # Open containers, innermost last: where each ends, and whether its entries carry keys.
    open_containers = [(end, True)]
    while open_containers:
        limit, keyed = open_containers[-1]
        if at == limit:
            open_containers.pop()
            continue
        if len(open_containers) == 1:
            headers += 1
            if headers > MAX_HEADERS:
                raise Refused(f"more than {MAX_HEADERS} headers")
        if keyed:
            at = _text(payload, at, 1, limit)
        kind = _number(payload, at, 1, limit)
        at += 1
        if kind in (ord("F"), ord("A")):
            if len(open_containers) == MAX_DEPTH:
                raise Refused(f"headers nested deeper than {MAX_DEPTH - 1}")
            inner = _number(payload, at, 4, limit)
            open_containers.append((_skip(at + 4, inner, limit), kind == ord("F")))
            at += 4
        elif kind == ord("S"):
            at = _text(payload, at, 4, limit)
        elif kind == ord("x"):
            at = _skip(at + 4, _number(payload, at, 4, limit), limit)
        elif kind == ord("T"):
            at = _timestamp(payload, at, limit)
        elif kind in _FLOATS:
            at = _float(payload, at, limit, _FLOATS[kind])
        elif kind in _FIXED_SIZES:
            at = _skip(at, _FIXED_SIZES[kind], limit)
        else:
            raise Refused("a header of an unknown type")
    return end


def _number(payload: bytes, at: int, size: int, limit: int | None = None) -> int:
    end = _skip(at, size, len(payload) if limit is None else limit)
    return int.from_bytes(payload[at:end], "big")


def _text(payload: bytes, at: int, prefix: int, limit: int) -> int:
    size = _number(payload, at, prefix, limit)
    start = at + prefix
    end = _skip(start, size, limit)
    try:
        payload[start:end].decode()
    except UnicodeDecodeError:
        raise Refused("text that is not UTF-8") from None
    return end


def _timestamp(payload: bytes, at: int, limit: int) -> int:
    if _number(payload, at, 8, limit) > LATEST_TIMESTAMP:
        raise Refused("a timestamp past the year 9999")
    return at + 8


def _float(payload: bytes, at: int, limit: int, layout: struct.Struct) -> int:
    end = _skip(at, layout.size, limit)
    if not math.isfinite(layout.unpack_from(payload, at)[0]):  # pika makes whole numbers of floats
        raise Refused("a number that is not finite")
    return end


def _skip(at: int, size: int, limit: int) -> int:
    if at + size > limit:
        raise Refused("a value that ends behind its frame")
    return at + size
