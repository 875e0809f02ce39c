"""Ports of this machine: choosing free ones, and asking whether what listens there is really the broker."""

import contextlib
import http.client
import random
import socket
import ssl
import struct
from base64 import b64encode

# Below the range the kernel gives to outgoing connections (from 32768 on): a port that was free stays free.
_RANGE = range(20_000, 32_000)
_claims: dict[int, socket.socket] = {}  # by port
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"  # AMQP 0-9-1, specification section 4.2.2
_METHOD_FRAME = 1
_CONNECTION_START = (10, 10)  # class and method of the broker's first frame
_FRAME_START = struct.Struct(">BHIHH")  # type, channel, size; class, method


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT does not count
        try:
            candidate.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str, *, besides: set[int]) -> int:
    """A port that is free on `host` and on loopback, and not given to anybody else as long as this process runs.

    Raises:
        OSError: none was found in a thousand tries.
    """
    for _ in range(1000):
        port = random.choice(_RANGE)  # noqa: S311 - not a secret
        if port not in besides and port not in _claims and is_free("127.0.0.1", port) and take(host, port):
            return port
    raise OSError("no free port")


def take(host: str, port: int) -> bool:
    """Whether a server could listen there now and, if so, keep the port from those who choose one as we do, until this
    process ends: a server begins to listen seconds after its port was chosen, and is away for a while when it crashes.
    """
    if not is_free(host, port):
        return False
    if port not in _claims:
        # An abstract name goes with the process that has it, and is of the same network namespace as the port.
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0restante-port-{port}")
        except OSError:
            claim.close()
            return False
        _claims[port] = claim
    return True


def reachable(host: str) -> str:
    """The address to connect to for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def speaks_amqp(host: str, port: int, timeout: float, *, certificate: bytes | None = None) -> bool:
    """Whether a broker greets a client there.

    Args:
        host: address.
        port: port.
        timeout: seconds, for each step.
        certificate: for TLS: what the server must present, in DER. Comparing it says more than a verification would
            (that it is *this* server), and holds for certificates that are expired or for another host, too.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        link = stack.enter_context(socket.create_connection((host, port), timeout))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            link = stack.enter_context(context.wrap_socket(link))
            if link.getpeercert(binary_form=True) != certificate:
                return False
        link.sendall(_PROTOCOL_HEADER)
        greeting = b""
        while len(greeting) < _FRAME_START.size and (more := link.recv(4096)):
            greeting += more
        if len(greeting) >= _FRAME_START.size:
            kind, _, _, *method = _FRAME_START.unpack_from(greeting)
            return kind == _METHOD_FRAME and tuple(method) == _CONNECTION_START
    return False


def answers_http(host: str, port: int, path: str, timeout: float, *, user: str, password: str) -> bool:
    """Whether `GET path` is answered with 200 for this account."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    credentials = b64encode(f"{user}:{password}".encode()).decode("ascii")
    try:
        connection.request("GET", path, headers={"Authorization": f"Basic {credentials}"})
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class NoWayError(Exception):
    """A host has no address, or no way leads there; the message says which."""


def own_address(host: str) -> str:
    """`host`; or, for `@NAME`, the address of this machine from which it reaches that one.

    Raises:
        NoWayError: it doesn't.
    """
    if not host.startswith("@"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host[1:], 9))  # sends nothing
        except OSError as error:
            raise NoWayError(f"There is no way to {host[1:]}, towards which to listen: {error}.") from error
        return str(probe.getsockname()[0])
