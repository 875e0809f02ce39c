"""What went over the wire, from the kernel's own counters of each TCP connection.

They count the bytes that TCP carried, TLS and retransmissions included, and the segments of both directions, those
that only acknowledge, open or close included. A segment has 52 bytes of headers beside: IPv4, TCP, and time stamps as
Linux sends them. What the layer below adds (Ethernet: 38 bytes a segment) is left out.
"""

import re
import socket
import struct
import subprocess
from dataclasses import dataclass
from typing import Self

from api.operator.processes import tool

HEADERS = 52  # bytes of a segment
_SEGMENTS = struct.Struct("@II")  # of `struct tcp_info` in linux/tcp.h: tcpi_segs_out, tcpi_segs_in
_SEGMENTS_AT = 136
_RECEIVED_AT = 128  # tcpi_bytes_received
_SENT_AT = 200  # tcpi_bytes_sent
_LONG = struct.Struct("@Q")
_INFO_SIZE = 232
_COUNTERS = re.compile(r"\b(bytes_sent|bytes_received|segs_out|segs_in):(\d+)")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of both directions, headers not counted in `payload`. `connections` are those that it was read of."""

    payload: int = 0
    segments: int = 0
    connections: int = 0

    @property
    def size(self) -> int:
        return self.payload + self.segments * HEADERS

    def __add__(self, other: Self) -> "Traffic":
        return Traffic(
            self.payload + other.payload, self.segments + other.segments, self.connections + other.connections
        )

    def __sub__(self, other: Self) -> "Traffic":
        return Traffic(self.payload - other.payload, self.segments - other.segments, self.connections)


def of(connection: socket.socket) -> Traffic:
    """What this connection has had so far, also when it is closed but the socket is not."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
    sent, received = (_LONG.unpack_from(info, at)[0] for at in (_SENT_AT, _RECEIVED_AT))
    return Traffic(sent + received, sum(_SEGMENTS.unpack_from(info, _SEGMENTS_AT)), 1)


def at(port: int) -> Traffic:
    """What the connections that are established to a port of this machine have had so far."""
    said = subprocess.run(  # noqa: S603 - a fixed command
        [tool("ss", "iproute2"), "-tinHO", "state", "established", f"( sport = :{port} )"],
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout  # fmt: skip
    found = {"bytes_sent": 0, "bytes_received": 0, "segs_out": 0, "segs_in": 0}
    for name, value in _COUNTERS.findall(said):
        found[name] += int(value)
    payload, segments = found["bytes_sent"] + found["bytes_received"], found["segs_out"] + found["segs_in"]
    return Traffic(payload, segments, len(said.splitlines()))
