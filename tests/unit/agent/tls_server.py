"""A real HTTPS server on loopback that plays a gateway's part in an enrollment, honestly or not."""

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from api.operator import authority
from api.operator.authority import Credential

Answer = Callable[["Recorded"], tuple[int, bytes]]


@dataclass
class Recorded:
    """One request as it came in."""

    method: str
    path: str
    body: bytes
    connection: int


@dataclass
class Gateway:
    """Serves `answers[path]`; everything it was ever sent is in `requests`."""

    credential: Credential
    answers: dict[str, Answer]
    requests: list[Recorded] = field(default_factory=list)
    failed_handshakes: int = 0
    _connections: int = 0

    def start(self, directory: Path) -> "Gateway":
        authority.save(self.credential, directory / "server.pem", directory / "server.key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.pem", directory / "server.key")
        gateway = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                gateway._connections += 1
                self.number = gateway._connections

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                recorded = Recorded(self.command, self.path, body, self.number)
                gateway.requests.append(recorded)
                status, content = gateway.answers[self.path](recorded)
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _serve  # noqa: N815 - http.server's names

            def log_message(self, *_: Any) -> None:
                return

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def finish_request(self, request: Any, client_address: Any) -> None:
                try:
                    wrapped = context.wrap_socket(request, server_side=True)
                except (ssl.SSLError, OSError):
                    gateway.failed_handshakes += 1
                    return
                super().finish_request(wrapped, client_address)

            def handle_error(self, *_: Any) -> None:
                return

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    @property
    def port(self) -> int:
        return self._server.server_port

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def credentials(
    hosts: tuple[str, ...] = ("localhost",), *, expired: bool = False, future: bool = False
) -> tuple[Credential, Credential]:
    """An authority for localhost and 127.0.0.1, and a server certificate of it."""
    now = datetime.now(UTC)
    issuer = authority.make_authority("test", ["localhost", "127.0.0.1"], now=now - timedelta(days=30))
    begins = now - timedelta(days=20) if expired else now + timedelta(days=20) if future else now
    return issuer, authority.issue(issuer, hosts, now=begins, validity=timedelta(days=10))


def problem(status: int, title: str) -> Answer:
    content = json.dumps({"type": "about:blank", "title": title, "status": status}).encode()
    return lambda _: (status, content)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
