"""What `topology.guard` accepts, neither pamqp nor pika may fail on; and it never raises itself."""

import importlib.util
import inspect
import struct
import sys
from types import ModuleType

import pika.spec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import frame, header

from fabric.amqp import guard as amqp_guard
from topology import guard

# ---- Building content headers, byte by byte ---------------------------------------------------------

BODY_SIZE = 7


def payload(flags: int, properties: bytes) -> bytes:
    return struct.pack(">HHQH", 60, 0, BODY_SIZE, flags) + properties


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def long(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def with_headers(entries: bytes) -> bytes:
    return payload(0x2000, long(entries))


texts = st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20))
sizes = {"t": 1, "b": 1, "B": 1, "s": 2, "u": 2, "I": 4, "i": 4, "l": 8, "L": 8, "f": 4, "d": 8, "D": 5, "V": 0, "T": 8}
fixed = st.sampled_from(sorted(sizes)).flatmap(
    lambda kind: st.binary(min_size=sizes[kind], max_size=sizes[kind]).map(lambda value: kind.encode() + value)
)
sane_time = st.integers(0, guard.LATEST_TIMESTAMP + 1).map(lambda at: b"T" + struct.pack(">Q", at))
scalar = st.one_of(
    fixed,
    sane_time,
    texts.map(lambda text: b"S" + long(text)),
    st.binary(max_size=20).map(lambda content: b"x" + long(content)),
    st.binary(min_size=1, max_size=4),  # of an unknown type, or cut short
)


def containers(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    array = st.lists(values, max_size=4).map(lambda items: b"A" + long(b"".join(items)))
    return st.one_of(array, tables(values).map(lambda entries: b"F" + long(entries)))


def tables(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    entry = st.tuples(texts.map(short), values).map(b"".join)
    return st.lists(entry, max_size=6).map(b"".join)


values = st.recursive(scalar, containers, max_leaves=12)
kinds = "sstbbssssTssss"  # the fourteen properties: short text, table, byte, timestamp


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    flags, properties = 0, b""
    for index, kind in enumerate(kinds):
        if not draw(st.booleans()):
            continue
        flags |= 0x8000 >> index
        if kind == "s":
            properties += short(draw(texts))
        elif kind == "t":
            properties += long(draw(tables(values)))
        elif kind == "b":
            properties += draw(st.binary(min_size=1, max_size=1))
        else:
            properties += struct.pack(">Q", draw(st.integers(0, guard.LATEST_TIMESTAMP + 1)))
    flags |= draw(st.sampled_from([0, 0, 0, 0, 1, 2]))
    return payload(flags, properties + draw(st.binary(max_size=3)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    whole = bytearray(draw(headers()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(whole) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if whole:
                whole[at] = draw(st.integers(0, 255))
            case "cut":
                del whole[at : at + draw(st.integers(1, 8))]
            case "insert":
                whole[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                whole[at:at] = whole[at : at + draw(st.integers(1, 16))]
    return bytes(whole)


# ---- The decoders as their authors wrote them -------------------------------------------------------


def fresh(module: ModuleType) -> ModuleType:
    """A second copy, which no guard of this process has wrapped."""
    found = importlib.util.spec_from_file_location(f"fresh_{module.__name__.replace('.', '_')}", module.__file__)
    assert found is not None
    assert found.loader is not None
    copy = importlib.util.module_from_spec(found)
    sys.modules[found.name] = copy
    found.loader.exec_module(copy)
    return copy


unguarded_pika = fresh(pika.spec)
unguarded_pamqp = inspect.unwrap(header.ContentHeader.unmarshal)


def decode_with_pamqp(content: bytes) -> header.ContentHeader:
    decoded = header.ContentHeader()
    unguarded_pamqp(decoded, content)
    return decoded


def decode_with_pika(content: bytes) -> object:
    class_id, _, _ = struct.unpack_from(">HHQ", content)
    return unguarded_pika.props[class_id]().decode(content[12:])


def judge(content: bytes) -> None:
    if guard.inspect(content) is None:
        decoded = decode_with_pamqp(content)
        decode_with_pika(content)
        assert decoded.body_size == int.from_bytes(content[4:12], "big")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00<")
def test_random_bytes_never_raise(content: bytes) -> None:
    judge(content)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 0xFFFF), st.binary(max_size=200))
def test_random_properties_are_refused_or_decodable(flags: int, properties: bytes) -> None:
    judge(payload(flags, properties))


@settings(max_examples=150, deadline=None)
@given(headers())
@example(with_headers(short(b"nan") + b"f\x7f\xc0\x00\x00"))
@example(with_headers(short(b"infinite") + b"d\x7f\xf0\x00\x00\x00\x00\x00\x00"))
@example(with_headers(short(b"decimal") + b"D\xff\x7f\xff\xff\xff"))
@example(with_headers(short(b"void") + b"V" + short(b"") + b"A" + long(b"VVV")))
@example(payload(0x0040, struct.pack(">Q", guard.LATEST_TIMESTAMP)))
@example(struct.pack(">HHQH", 61, 0, 0, 0))
def test_headers_are_refused_or_decodable(content: bytes) -> None:
    judge(content)


@settings(max_examples=150, deadline=None)
@given(damaged())
def test_damaged_headers_are_refused_or_decodable(content: bytes) -> None:
    judge(content)


# ---- The bounds --------------------------------------------------------------------------------------


def nested(levels: int, kind: bytes) -> bytes:
    inner = b""
    for _ in range(levels):
        inner = kind + long((short(b"k") if kind == b"F" else b"") + inner if inner else b"")
    return short(b"k") + inner


@pytest.mark.parametrize(
    "content",
    [
        payload(0x0040, b"\xff" * 8),
        payload(0x0400, short(b"\xff\xfe")),
        payload(0x8000, short(b"text/\xff")),
        payload(0x8001, short(b"a/b")),
        payload(0x8000, b"\x05ab"),
        with_headers(short(b"\xff") + b"V"),
        with_headers(short(b"k") + b"S" + long(b"\xff")),
        with_headers(short(b"k") + b"T" + b"\xff" * 8),
        with_headers(short(b"k") + b"\x00"),
        with_headers(short(b"k") + b"S\xff\xff\xff\xffx"),
        with_headers(nested(guard.MAX_DEPTH, b"F")),
        with_headers(nested(20_000, b"F")),
        with_headers(nested(20_000, b"A")),
        with_headers((short(b"k") + b"V") * 12_000),
        with_headers((short(b"k") + b"V") * (guard.MAX_HEADERS + 1)),
        with_headers(short(b"k") + b"x" + long(b"." * 100_000)),
    ],
    ids=range(16),
)
def test_refuses(content: bytes) -> None:
    assert guard.inspect(content) is not None


@pytest.mark.parametrize(
    "content",
    [
        payload(0, b""),
        with_headers(b""),
        with_headers(nested(guard.MAX_DEPTH - 1, b"F")),
        with_headers((short(b"k") + b"V") * guard.MAX_HEADERS),
        with_headers(short(b"k") + b"x" + long(b"\xff" * (guard.MAX_BYTES - 7))),
        payload(0x8000, short("Å/ö".encode())),
    ],
    ids=range(6),
)
def test_accepts(content: bytes) -> None:
    assert guard.inspect(content) is None
    judge(content)


def test_accepts_what_dead_lettering_adds() -> None:
    keys = b"A" + long(b"S" + long(b"garage-7"))
    names = [b"queue", b"reason", b"exchange"]
    texts_ = b"".join(short(name) + b"S" + long(b"mailbox.garage-7") for name in names)
    death = b"F" + long(
        texts_ + short(b"count") + b"l" + b"\0" * 8 + short(b"time") + b"T" + b"\0" * 8 + short(b"routing-keys") + keys
    )
    content = with_headers(short(b"x-death") + b"A" + long(death))
    assert guard.inspect(content) is None
    decoded = decode_with_pamqp(content).properties.headers
    assert decoded is not None
    assert decoded["x-death"][0]["routing-keys"] == ["garage-7"]  # type: ignore[index, call-overload]


# ---- pamqp's guard -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.one_of(headers(), damaged(), st.binary(min_size=12, max_size=200)))
def test_guarded_pamqp_never_raises_and_keeps_the_body_size(content: bytes) -> None:
    amqp_guard.install()
    if len(content) < 12:
        return
    raw = struct.pack(">BHI", 2, 1, len(content)) + content + b"\xce"
    _, _, decoded = frame.unmarshal(raw)
    assert isinstance(decoded, header.ContentHeader)
    assert decoded.body_size == int.from_bytes(content[4:12], "big")
    refused = guard.inspect(content)
    if refused is not None:
        assert decoded.properties.message_type == guard.UNDECODABLE
        assert decoded.properties.headers == {guard.REASON: refused}
        assert decoded.properties.message_id is None


@settings(max_examples=150, deadline=None)
@given(texts, texts, st.booleans())
def test_guarded_pamqp_decodes_any_routing_key(exchange: bytes, key: bytes, redelivered: bool) -> None:
    amqp_guard.install()
    tagged = struct.pack(">Q?", 5, redelivered)
    for index, content in (
        (0x003C003C, short(b"tag") + tagged + short(exchange) + short(key)),
        (0x003C0047, tagged + short(exchange) + short(key) + struct.pack(">I", 9)),
        (0x003C0032, struct.pack(">H", 312) + short(b"NO_ROUTE") + short(exchange) + short(key)),
    ):
        raw = struct.pack(">BHII", 1, 1, len(content) + 4, index) + content + b"\xce"
        _, _, decoded = frame.unmarshal(raw)
        assert decoded.routing_key == key.decode("utf-8", "backslashreplace")
        assert decoded.exchange == exchange.decode("utf-8", "backslashreplace")
        if index != 0x003C0032:
            assert (decoded.delivery_tag, decoded.redelivered) == (5, redelivered)


def test_check_passes_when_installed_and_installing_twice_is_once() -> None:
    amqp_guard.install()
    first = header.ContentHeader.unmarshal
    amqp_guard.install()
    assert header.ContentHeader.unmarshal is first
    amqp_guard.check()


def test_check_refuses_an_unguarded_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    amqp_guard.install()
    monkeypatch.setattr(header.ContentHeader, "unmarshal", unguarded_pamqp)
    with pytest.raises(amqp_guard.Unguarded):
        amqp_guard.check()
