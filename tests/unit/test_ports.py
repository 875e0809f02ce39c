"""Ports that are chosen here are not chosen by another process, though nobody listens there yet."""

import socket
import subprocess
import sys

import pytest

from api.operator import sockets
from api.operator.sockets import free_port, take

HOST = "127.0.0.1"
ANOTHER = """
import sys
from api.operator import sockets
first = int(sys.argv[1])
sockets._RANGE = range(first, first + 2)
chosen = sockets.free_port("127.0.0.1", besides=set())
print(chosen, sockets.take("127.0.0.1", first), flush=True)
sys.stdin.read()
"""


def another(first: int) -> "subprocess.Popen[str]":
    """A process that chooses one of two ports, and holds it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def pair() -> int:
    """Two ports, one after the other, of which this process has the first."""
    while True:
        first = free_port(HOST, besides=set())
        if sockets.is_free(HOST, first + 1) and first + 1 not in sockets._claims:
            return first


def test_a_port_is_given_to_one_process_only() -> None:
    first = pair()
    with another(first) as process:
        assert said(process) == [str(first + 1), "False"]
        assert take(HOST, first), "it is still ours"
        assert not take(HOST, first + 1), "and that is the other's, though it does not listen"
        process.communicate("")
    assert take(HOST, first + 1), "until it ends"


def test_a_process_that_is_killed_keeps_nothing() -> None:
    first = pair()
    with another(first) as process:
        said(process)
        process.kill()
        process.wait(10)
        assert take(HOST, first + 1)


def test_one_that_somebody_listens_on_is_not_taken() -> None:
    with socket.create_server((HOST, 0)) as server:
        assert not take(HOST, server.getsockname()[1])


def test_a_process_gets_no_port_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair()
    monkeypatch.setattr(sockets, "_RANGE", range(first, first + 2))
    assert free_port(HOST, besides=set()) == first + 1
    with pytest.raises(OSError, match="no free port"):
        free_port(HOST, besides=set())
