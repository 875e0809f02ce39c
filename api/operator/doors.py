"""The broker's doors, checked over real connections at each start: nobody gets in but by PLAIN with our answer."""

import asyncio
import http.client
import json
import socket
import struct
from base64 import b64encode
from collections.abc import Iterable

from topology.access import ACCOUNTS, ADMIN
from topology.names import VHOST

_HEADER = b"AMQP\0\0\x09\x01"
_SASL_1_0, _HEADER_1_0 = b"AMQP\x03\x01\0\0", b"AMQP\0\x01\0\0"
_OPEN, _INIT, _OUTCOME = 0x10, 0x41, 0x44  # descriptors of AMQP 1.0: 2.7.1, 5.3.3.2, 5.3.3.6
_LET_IN = b"\x50\0"  # the outcome's code, a ubyte
_TIMEOUT = 5.0  # seconds, for each step
_TIMEOUT_1_0 = 30.0  # seconds: the broker lets whom it refuses in AMQP 1.0 wait for 3
_BEFORE_TABLE = 7 + 4 + 2  # frame header, class and method, protocol version


class DoorOpen(Exception):
    """The broker admits more than it should; the message says what."""


def check(host: str, amqp_port: int, management_port: int, password: str) -> None:
    """Compare what the broker offers with what it was told: mechanisms, users, vhosts.

    Args:
        host: of the plain listener and the management API.
        password: of the administrator.

    Raises:
        DoorOpen: something differs, left by an earlier configuration or by another hand.
        OSError, ValueError: it does not answer as a broker does.
    """
    offered = mechanisms(host, amqp_port)
    if offered != {"PLAIN"}:
        raise DoorOpen(f"it offers the mechanisms {_listed(offered)} and must offer PLAIN only")
    users = {row["name"] for row in _get(host, management_port, "/api/users", password)}
    expected = {account.name for account in ACCOUNTS}
    if not users <= expected:
        raise DoorOpen(f"it has the users {_listed(users - expected)}, which are not ours; delete them")
    vhosts = {row["name"] for row in _get(host, management_port, "/api/vhosts", password)}
    if vhosts != {VHOST}:
        raise DoorOpen(f"it has the vhosts {_listed(vhosts)} and must have '{VHOST}' only")


def mechanisms(host: str, port: int) -> set[str]:
    """The SASL mechanisms of the broker's `connection.start` (AMQP 0-9-1, section 1.4.2.1)."""
    with socket.create_connection((host, port), _TIMEOUT) as link:
        link.sendall(_HEADER)
        frame = b""
        while len(frame) < 7 or len(frame) < 8 + int.from_bytes(frame[3:7], "big"):
            more = link.recv(4096)
            if not more:
                raise ValueError("the broker closed the connection before its greeting")
            frame += more
    try:
        (table,) = struct.unpack_from(">I", frame, _BEFORE_TABLE)
        at = _BEFORE_TABLE + 4 + table
        (length,) = struct.unpack_from(">I", frame, at)
        return set(frame[at + 4 : at + 4 + length].decode("ascii").split(" "))
    except struct.error:
        raise ValueError("the broker's greeting is cut off") from None


async def check_amqp_1_0(host: str, port: int, account: str, password: str) -> None:
    """Knock in AMQP 1.0, as an account of ours and as ANONYMOUS: neither gets a connection.

    It takes 6 s, since the broker lets those wait whom it refuses.

    Args:
        host, port: of the plain listener.
        account, password: of one who may enter the vhost.

    Raises:
        DoorOpen: one of them gets in.
        OSError, ValueError: it can't be told, since the account did not come as far as `open`.
    """
    async with asyncio.timeout(_TIMEOUT_1_0):
        ours = await _heard(host, port, b"PLAIN", b"\0" + account.encode() + b"\0" + password.encode())
        if _OPEN in ours:
            raise DoorOpen("it opens AMQP 1.0 connections: its advanced.config is not read, or has no effect any more")
        if _LET_IN not in ours.get(_OUTCOME, b""):
            raise ValueError(f"in AMQP 1.0 the broker does not let {account} log in")
        nobodys = await _heard(host, port, b"ANONYMOUS", b"")
        if _OPEN in nobodys or _LET_IN in nobodys.get(_OUTCOME, b""):
            raise DoorOpen("it lets anybody log in by ANONYMOUS in AMQP 1.0")


async def _heard(host: str, port: int, mechanism: bytes, response: bytes) -> dict[int, bytes]:
    """The bodies of the AMQP 1.0 frames by which the broker answers a whole handshake, until it has opened or hangs up.

    They are keyed by their descriptor. All is sent at once: nothing is answered to what comes before.
    """
    vhost = f"vhost:{VHOST}".encode()
    sasl = _frame(1, _INIT, b"\xa3" + _counted(mechanism) + b"\xb0" + _counted(response, 4))
    opening = _frame(0, _OPEN, b"\xa1" + _counted(b"doors") + b"\xa1" + _counted(vhost))
    heard: dict[int, bytes] = {}
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_SASL_1_0 + sasl + _HEADER_1_0 + opening)
        while _OPEN not in heard:
            head = await reader.readexactly(8)
            if not head.startswith(b"AMQP"):  # else it is a protocol header, as long as a frame's
                body = await reader.readexactly(int.from_bytes(head[:4]) - 8)
                heard[body[2]] = body
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()
    return heard


def _frame(kind: int, performative: int, fields: bytes) -> bytes:
    """A frame of AMQP 1.0 with two fields, on channel 0."""
    body = bytes([0, 0x53, performative, 0xD0]) + _counted((2).to_bytes(4) + fields, 4)
    return (8 + len(body)).to_bytes(4) + bytes([2, kind, 0, 0]) + body


def _counted(raw: bytes, width: int = 1) -> bytes:
    return len(raw).to_bytes(width) + raw


def _get(host: str, port: int, path: str, password: str) -> list[dict[str, str]]:
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    credentials = b64encode(f"{ADMIN}:{password}".encode()).decode("ascii")
    try:
        connection.request("GET", path, headers={"Authorization": f"Basic {credentials}"})
        found = json.loads(connection.getresponse().read())
    except http.client.HTTPException as error:
        raise ValueError(f"the management API did not answer {path}") from error
    finally:
        connection.close()
    if not isinstance(found, list):
        raise TypeError(f"the management API answered {path} with no list")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))
