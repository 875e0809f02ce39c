"""The broker's doors, checked over real connections at each start: nobody gets in but by PLAIN with our answer."""

import http.client
import json
import socket
import struct
from base64 import b64encode
from collections.abc import Iterable

from topology.access import ACCOUNTS, ADMIN
from topology.names import VHOST

_HEADER = b"AMQP\0\0\x09\x01"
_TIMEOUT = 5.0  # seconds, for each step
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
