"""Many who connect to the gateway and hold on to it: each is cut off, and callers are served meanwhile.

How each is cut off, and what it may send, is in `tests/unit/api/test_listener.py`.
"""

import selectors
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from api.operator import listener
from tests.harness.stack import RunningStack

EACH = 40  # connections of each kind
PATIENCE = 60.0  # seconds within which all are cut off; it should be 10

HEADERS = b"GET /v1/devices HTTP/1.1\r\nHost: gateway\r\n"
REFUSED = b"POST /v1/devices HTTP/1.1\r\nHost: gateway\r\nContent-Length: 100000\r\n\r\n{"  # answered with 401


def test_slow_callers_are_cut_off_and_others_served(stack: RunningStack) -> None:
    url = urlsplit(stack.stack.settings.api_url)
    assert url.hostname is not None

    def tcp() -> socket.socket:
        return socket.create_connection((url.hostname, url.port), 20)

    def tls() -> socket.socket:
        return stack.context.wrap_socket(tcp(), server_hostname=url.hostname)

    def sends(what: bytes) -> Callable[[], socket.socket]:
        def connect() -> socket.socket:
            made = tls()
            made.sendall(what)
            return made

        return connect

    held: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        for connect in (tcp, tls, sends(b"G"), sends(HEADERS), sends(REFUSED)):
            for _ in range(EACH):
                made = connect()
                made.setblocking(False)
                selector.register(made, selectors.EVENT_READ)
                held.add(made)
        began, dripped = time.monotonic(), 0.0
        while held:
            now = time.monotonic()
            assert now - began < PATIENCE, f"{len(held)} are still there"
            if now - dripped > 1:
                dripped = now
                with stack.client(stack.token) as caller:
                    stack.ok(caller.get("/v1/devices"))
                assert time.monotonic() - now < 5, "callers wait"
                for each in held:
                    if isinstance(each, ssl.SSLSocket):
                        with suppress(OSError):
                            each.send(b"x")
            for key, _ in selector.select(0.2):
                each = key.fileobj
                assert isinstance(each, socket.socket)
                if ended(each):
                    selector.unregister(each)
                    each.close()
                    held.remove(each)
    assert time.monotonic() - began > listener.TLS_TIMEOUT - 1, "the control: they were there for a while"


def ended(each: socket.socket) -> bool:
    """Is it closed, once what has come is read?"""
    try:
        while True:
            if each.recv(65536) == b"":
                return True
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
