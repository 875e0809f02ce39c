"""The edge's certificate, replaced while it runs (HAProxy's Runtime API, `set ssl cert`): no connection is closed."""

import socket
from pathlib import Path

from api.operator.authority import AuthorityError

_TIMEOUT = 5.0  # seconds for each step
_LONGEST = 64 * 1024  # bytes of an answer


def replace_certificate(control: Path, name: str, content: bytes) -> bool:
    """Give the edge another certificate, if it runs; whether it did.

    Args:
        control: the edge's socket.
        name: the file of its certificate, as its configuration has it.
        content: certificate, chain and private key in PEM.

    Raises:
        AuthorityError: it runs, and does not take it.
    """
    # An empty line would end what is told.
    pem = b"\n".join(line for line in content.splitlines() if line.strip())
    try:
        said = _say(control, b"set ssl cert %b <<\n%b\n\n" % (name.encode(), pem))
        said += _say(control, b"commit ssl cert %b\n" % name.encode())
    except (FileNotFoundError, ConnectionRefusedError):  # it is not there: it will read the file when it starts
        return False
    except OSError as error:
        raise AuthorityError(f"The edge did not take its certificate: {error}.") from error
    if b"Success!" not in said:
        # What it says is about the certificate, and does not repeat it.
        raise AuthorityError(f"The edge did not take its certificate: {said.decode('ascii', 'replace').strip()}")
    return True


def _say(control: Path, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_TIMEOUT)
        link.connect(str(control))
        link.sendall(command)
        link.shutdown(socket.SHUT_WR)
        answer = b""
        while len(answer) < _LONGEST and (more := link.recv(4096)):
            answer += more
        return answer
