"""The guard around pika's decoder: nothing a message carries may raise in it."""

import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec

from device_agent import errors, guard
from topology import guard as topology_guard


def header_frame(properties: bytes, body_size: int = 0) -> bytes:
    payload = struct.pack(">HHQ", 60, 0, body_size) + properties
    return struct.pack(">BHI", spec.FRAME_HEADER, 1, len(payload)) + payload + b"\xce"


def decode(buffer: bytes) -> tuple[int, Any]:
    return guard.decode(buffer, frame.decode_frame)


def deep(levels: int) -> bytes:
    nested = b""
    for _ in range(levels):
        nested = b"\x01kF" + struct.pack(">I", len(nested)) + nested
    return b"\x20\x00" + struct.pack(">I", len(nested)) + nested


POISONS = {
    "late header": b"\x20\x00" + struct.pack(">I", 11) + b"\x01kT" + b"\xff" * 8,
    "timestamp": b"\x00\x40" + b"\xff" * 8,
    "deep": deep(3_000),
    "content type": b"\x80\x00\x02\xff\xfe",
    "correlation id": b"\x04\x00\x02\xff\xfe",
    "header key": b"\x20\x00" + struct.pack(">I", 4) + b"\x02\xff\xfeV",
    "unknown field type": b"\x20\x00" + struct.pack(">I", 3) + b"\x01kZ",
    "more flags": b"\x00\x01\x00\x00",
    "empty": b"",
}


@pytest.mark.parametrize("poison", list(POISONS.values()), ids=list(POISONS))
def test_poison_becomes_a_message_without_properties(poison: bytes) -> None:
    buffer = header_frame(poison, body_size=7)
    consumed, value = decode(buffer + b"next")
    assert consumed == len(buffer)
    assert value.body_size == 7
    assert value.properties.type == topology_guard.UNDECODABLE
    assert value.properties.headers[topology_guard.REASON]
    assert value.properties.message_id is None


def test_the_built_in_poison_is_one_for_an_unguarded_pika() -> None:
    poison = guard._poison()
    first = struct.unpack(">BHI", poison[:7])[2] + 8
    for single in (poison[:first], poison[first:]):
        with pytest.raises((OverflowError, ValueError, OSError, RecursionError)):
            frame.decode_frame(single)


def test_the_agent_refuses_to_start_unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.check()
    monkeypatch.delattr(guard.GuardedConnection, "_read_frame")
    with pytest.raises(errors.Unguarded):
        guard.check()


@given(st.binary(max_size=400))
def test_no_properties_raise(properties: bytes) -> None:
    buffer = header_frame(properties)
    consumed, value = decode(buffer)
    assert consumed == len(buffer)
    assert isinstance(value.properties, spec.BasicProperties)


@given(st.binary(max_size=300), st.sampled_from([0x2000, 0xF8F8, 0xFFF8]))
def test_no_headers_raise(table: bytes, flags: int) -> None:
    buffer = header_frame(struct.pack(">HI", flags, len(table)) + table)
    assert decode(buffer)[0] == len(buffer)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_a_routing_key_of_any_bytes_is_text_afterwards(exchange: bytes, key: bytes) -> None:
    payload = struct.pack(">I", spec.Basic.Deliver.INDEX) + b"\x01c" + struct.pack(">QB", 5, 1)
    payload += bytes([len(exchange)]) + exchange + bytes([len(key)]) + key
    buffer = struct.pack(">BHI", spec.FRAME_METHOD, 1, len(payload)) + payload + b"\xce"
    _, value = decode(buffer)
    assert value.method.delivery_tag == 5
    assert isinstance(value.method.routing_key, str)
    assert isinstance(value.method.exchange, str)


@given(st.integers(0, 40))
def test_an_incomplete_frame_waits_for_the_rest(cut: int) -> None:
    buffer = header_frame(POISONS["timestamp"])
    if cut < len(buffer):
        assert decode(buffer[:cut]) == (0, None)


def test_what_is_sent_together_leaves_in_one_write_in_its_order() -> None:
    written: list[bytes] = []

    class Transport:
        def write(self, data: bytes) -> None:
            written.append(data)

    connection = guard.GuardedConnection.__new__(guard.GuardedConnection)
    connection.bytes_sent = connection.frames_sent = 0
    connection._transport = Transport()
    connection._output_marshaled_frames([b"a", b"b"])
    with connection.together():
        pass
    with connection.together():
        connection._output_marshaled_frames([b"ack"])
        with connection.together():
            connection._output_marshaled_frames([b"receipt ", b"header"])
    with suppress(ZeroDivisionError), connection.together():
        connection._output_marshaled_frames([b"sent"])
        raise ZeroDivisionError
    connection._output_marshaled_frames([b"c"])
    assert written == [b"ab", b"ackreceipt header", b"sent", b"c"]
    # Many large ones are not copied into one.
    large = bytes(guard.GATHERED // 2)
    with connection.together():
        for _ in range(5):
            connection._output_marshaled_frames([large])
    assert list(map(len, written[4:])) == [guard.GATHERED, guard.GATHERED, len(large)]
