"""What the edge is told when its certificate is replaced; HAProxy itself is met by `make compose-test`."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.operator import edge_control
from api.operator.authority import AuthorityError

PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n\n-----BEGIN PRIVATE KEY-----\nBBBB\n"


@contextmanager
def edge(control: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """Answers one command on each connection, as HAProxy does."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(control))
        listening.listen()
        listening.settimeout(20)

        def serve() -> None:
            for answer in answers:
                link, _ = listening.accept()
                with link:
                    link.settimeout(20)
                    heard.append(b"".join(iter(lambda link=link: link.recv(4096), b"")))  # type: ignore[misc]
                    link.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        yield heard
        serving.join(20)


def test_a_certificate_is_set_and_committed(tmp_path: Path) -> None:
    control = tmp_path / "edge.sock"
    with edge(
        control, b"Transaction created for certificate /c.pem!\n\n", b"Committing /c.pem.\nSuccess!\n\n"
    ) as heard:
        assert edge_control.replace_certificate(control, "/c.pem", PEM)
    assert heard == [
        b"set ssl cert /c.pem <<\n" + PEM.replace(b"\n\n", b"\n") + b"\n",
        b"commit ssl cert /c.pem\n",
    ]


def test_an_edge_that_does_not_run_reads_the_file_when_it_starts(tmp_path: Path) -> None:
    control = tmp_path / "edge.sock"
    assert not edge_control.replace_certificate(control, "/c.pem", PEM)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(control))
    assert not edge_control.replace_certificate(control, "/c.pem", PEM)


def test_what_the_edge_does_not_take_is_said(tmp_path: Path) -> None:
    control = tmp_path / "edge.sock"
    refusal = b"unable to load certificate from file '/c.pem'.\n\n"
    with (
        edge(control, refusal, b"No ongoing transaction!\n"),
        pytest.raises(AuthorityError, match="unable to load certificate"),
    ):
        edge_control.replace_certificate(control, "/c.pem", PEM)
