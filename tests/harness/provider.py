"""An external identity provider: keys, tokens, and a real HTTPS server that publishes a JWK set."""

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from api.operator import authority
from tests.harness.device import DROP

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
HOSTS = ("localhost", "127.0.0.1", "idp.example")
ISSUER = "https://idp.example/realms/test"
AUDIENCE = "restante-api"

MAKE: Mapping[str, Callable[[], PrivateKey]] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def jwk(key: PrivateKey, kid: str, /, **members: object) -> dict[str, Any]:
    """The public half; `DROP` leaves a member out."""
    match key:
        case rsa.RSAPrivateKey():
            public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case ec.EllipticCurvePrivateKey():
            public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case _:
            public = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    made = {**public, "kid": kid, "use": "sig", **members}
    made.pop("key_ops", None) if "key_ops" not in members else None
    return {name: value for name, value in made.items() if value is not DROP}


def jwks(*keys: Mapping[str, object]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def token(key: PrivateKey, kid: str, alg: str, claims: Mapping[str, object] | None = None, **header: object) -> str:
    """A good token for `AUDIENCE`, but for these claims and header members; `DROP` leaves one out."""
    now = int(time.time())
    good = {
        "iss": ISSUER,
        "sub": "alice",
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + 300,
        "jti": "0",
        "scope": "devices:read",
        **(claims or {}),
    }
    payload = {name: value for name, value in good.items() if value is not DROP}
    # PyJWT refuses to write some claims, and to leave `typ` out.
    text = json.dumps(payload).encode()
    head = {name: value for name, value in {"typ": "at+jwt", "kid": kid, **header}.items() if value is not DROP}
    return jwt.api_jws.encode(text, key, algorithm=alg, headers={"typ": None, **head})


class JwksServer:
    """Answers each GET with what `answer` does, and counts them."""

    def __init__(self, directory: Path) -> None:
        now = datetime.now(UTC)
        signer = authority.make_authority("Test authority", HOSTS, now=now)
        self.authority = directory / "idp-ca.pem"
        authority.save(signer, self.authority, directory / "idp-ca.key")
        authority.save(authority.issue(signer, HOSTS, now=now), directory / "idp.pem", directory / "idp.key")
        self.asked: list[str] = []
        self.document = jwks()
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self.plainly
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_GET(self) -> None:
                server.asked.append(self.path)
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that breaks off is what some tests are about."""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "idp.pem", directory / "idp.key")
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self._server.server_address[1]

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}/keys"

    def plainly(self, request: BaseHTTPRequestHandler) -> None:
        self.send(request, self.document)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    @contextmanager
    def running(self) -> Iterator["JwksServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join(10)
            self._server.server_close()
