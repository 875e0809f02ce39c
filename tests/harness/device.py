"""A device as an attacker builds it: a valid identity of its own, and no manners.

The key is made here, enrolled over HTTP with a correct proof, and signs whatever it is told to. `Device`
connects with the raw 0-9-1 client, with pika, or in AMQP 1.0 (`One`, `all_at_once`), which the broker refuses unless
a test switches it on; `forge` makes any compact JWS at all.
"""

import base64
import hashlib
import hmac
import itertools
import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import httpx
import pika
import proton
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from proton.reactor import LinkOption
from proton.utils import BlockingConnection, BlockingReceiver, BlockingSender

from tests.harness.rawamqp import ConnectionClosed, RawClient
from tests.harness.stack import RunningStack
from topology import enrollment, names

Json = dict[str, Any]
Sign = Callable[[bytes], bytes]

TIMEOUT = 10.0  # seconds for each step on a connection
MANAGEMENT = "/management"

_ES256 = ECAlgorithm(ECAlgorithm.SHA256)
_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)
_sources = itertools.count(2)


class _Drop(Enum):
    """What stands for a member that is left out."""

    DROP = "drop"

    def __repr__(self) -> str:
        return self.name


DROP = _Drop.DROP
"""As a header's or claim's value: leave that member out."""


# ---- Tokens ------------------------------------------------------------------------------------------


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forge(header: Mapping[str, object] | str, payload: Mapping[str, object] | str, sign: Sign) -> str:
    """A compact JWS of these parts, mappings or the very JSON text, signed by whatever `sign` does."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, payload)]
    signed = ".".join(b64(part.encode()) for part in parts)
    return f"{signed}.{b64(sign(signed.encode()))}"


def es256(key: ec.EllipticCurvePrivateKey) -> Sign:
    return lambda signed: bytes(_ES256.sign(signed, key))


def rs256(key: rsa.RSAPrivateKey) -> Sign:
    return lambda signed: bytes(_RS256.sign(signed, key))


def hs256(secret: bytes) -> Sign:
    return lambda signed: hmac.new(secret, signed, hashlib.sha256).digest()


def unsigned(_: bytes) -> bytes:
    return b""


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    return {
        "kty": "EC",
        "crv": "P-256",
        "x": b64(numbers.x.to_bytes(32, "big")),
        "y": b64(numbers.y.to_bytes(32, "big")),
    }


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


# ---- Enrollment --------------------------------------------------------------------------------------


def proof(code: bytes, key: ec.EllipticCurvePrivateKey, *, typ: str = enrollment.PROOF_TYPE, **claims: object) -> str:
    """The proof of possession that a well-behaved agent sends; `claims` replace its own."""
    header = {"alg": "ES256", "typ": typ}
    payload = {"code_hash": enrollment.code_hash(code), "iat": int(time.time()), **claims}
    return forge(header, payload, es256(key))


def enroll_request(code: bytes, key: ec.EllipticCurvePrivateKey) -> Json:
    return {"code": enrollment.encode_code(code), "public_key": public_jwk(key), "proof": proof(code, key)}


def own_source(stack: RunningStack) -> httpx.Client:
    """A client without a token at a loopback address of its own, since attempts are counted by address."""
    number = next(_sources)
    transport = httpx.HTTPTransport(verify=stack.context, local_address=f"127.77.{number // 250}.{number % 250 + 1}")
    return httpx.Client(base_url=stack.stack.settings.api_url, transport=transport, timeout=TIMEOUT)


def at_once(client: RawClient) -> RawClient:
    """Without Nagle's delay, which costs 40 ms wherever two small writes follow each other."""
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


class Device:
    """An enrolled device whose key the test holds."""

    def __init__(self, stack: RunningStack, id: str, key: ec.EllipticCurvePrivateKey, peering: Json) -> None:
        self.stack, self.id, self.key, self.peering = stack, id, key, peering
        self.jwk = public_jwk(key)
        self.kid = enrollment.thumbprint(self.jwk)
        self.agent = secrets.token_hex(8)
        self.mailbox = names.mailbox(names.DeviceId(id))
        url = urlsplit(peering["amqps_url"])
        assert url.hostname is not None
        assert url.port is not None
        self.host, self.port = url.hostname, url.port

    @classmethod
    def enrolled(cls, stack: RunningStack, prefix: str, key: ec.EllipticCurvePrivateKey | None = None) -> "Device":
        """A fresh device, enrolled as DESIGN.md says."""
        id, ticket = stack.create_device(prefix)
        key = key or new_key()
        with own_source(stack) as http:
            answer = http.post("/v1/enroll", json=enroll_request(enrollment.decode_ticket(ticket).code, key))
        return cls(stack, id, key, stack.ok(answer))

    # -- Tokens --

    def token(
        self,
        audience: str | None = None,
        *,
        header: Mapping[str, object] | None = None,
        claims: Mapping[str, object] | None = None,
        sign: Sign | None = None,
        life: int = 60,
    ) -> str:
        """A token of this device, for the broker unless told; `header` and `claims` replace, add and `DROP`."""
        return forge(
            self.header(**(header or {})), self.claims(audience, life, **(claims or {})), sign or es256(self.key)
        )

    def header(self, **changed: object) -> Json:
        return _without({"alg": "ES256", "typ": enrollment.DEVICE_TOKEN_TYPE, "kid": self.kid} | changed)

    def claims(self, audience: str | None = None, life: int = 60, **changed: object) -> Json:
        now = int(time.time())
        made = {
            "iss": self.id,
            "sub": self.id,
            "aud": audience or self.peering["audience"]["mq"],
            "iat": now,
            "exp": now + life,
            "jti": secrets.token_urlsafe(12),
        }
        return _without(made | changed)

    def api_token(self, **changed: Any) -> str:
        return self.token(self.peering["audience"]["api"], **changed)

    # -- Connections --

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.peering["authority"])

    def socket(self) -> RawClient:
        """Connected over TLS, not logged in."""
        return at_once(RawClient(self.host, self.port, tls=self.tls(), timeout=TIMEOUT))

    def raw(self, token: str | None = None, *, confirms: bool = True) -> RawClient:
        """Logged in, with channel 1 open. Raises `rawamqp.ConnectionClosed`."""
        client = self.socket()
        try:
            client.login(self.id, self.token() if token is None else token)
            client.open_channel(confirms=confirms)
        except BaseException:
            client.close()
            raise
        return client

    def may_log_in(self, token: str) -> bool:
        """Does the broker let this token in, and is it the broker's plain refusal if not?"""
        try:
            self.raw(token).close()
        except ConnectionClosed as refused:
            if refused.code != 403:
                raise
            return False
        return True

    def parameters(self, token: str | None = None) -> pika.ConnectionParameters:
        return pika.ConnectionParameters(
            self.host,
            self.port,
            names.VHOST,
            pika.PlainCredentials(self.id, token or self.token()),
            ssl_options=pika.SSLOptions(self.tls(), self.host),
            socket_timeout=TIMEOUT,
        )

    @contextmanager
    def pika(self, token: str | None = None) -> Iterator[pika.BlockingConnection]:
        connection = pika.BlockingConnection(self.parameters(token))
        try:
            yield connection
        finally:
            if connection.is_open:
                connection.close()


# ---- AMQP 1.0 ----------------------------------------------------------------------------------------


class Refused(Exception):
    """The broker ended the link, the session or the connection: `name` is its error condition."""

    def __init__(self, name: object, description: object) -> None:
        super().__init__(f"{name}: {description}")
        self.name, self.description = str(name), str(description)


class _Paired(LinkOption):
    """Half of a pair of links to the broker's management node (RabbitMQ's HTTP over AMQP)."""

    def apply(self, link: proton.Link) -> None:
        link.properties = proton.PropertyDict({proton.symbol("paired"): True})
        link.source.address = link.target.address = MANAGEMENT
        link.snd_settle_mode = proton.Link.SND_SETTLED


class _Request(proton.Message):  # type: ignore[misc]  # proton carries no types
    """A message that says null where there is no body: the management node insists on an amqp-value."""

    def encode(self) -> bytes:
        encoded: bytes = super().encode()
        return encoded if self.body is not None else encoded + b"\x00\x53\x77\x40"


class One(BlockingConnection):  # type: ignore[misc]  # proton carries no types
    """An AMQP 1.0 connection that raises `Refused` for whatever the broker ends, sessions included."""

    def __init__(self, device: Device, *, mechanisms: str = "PLAIN", hostname: str = f"vhost:{names.VHOST}") -> None:
        self._ended: proton.Condition | None = None
        domain = proton.SSLDomain(proton.SSLDomain.MODE_CLIENT)
        domain.set_trusted_ca_db(str(device.stack.stack.files.authority))
        domain.set_peer_authentication(proton.SSLDomain.VERIFY_PEER_NAME)
        try:
            super().__init__(
                f"amqps://{device.host}:{device.port}",
                timeout=TIMEOUT,
                ssl_domain=domain,
                user=device.id,
                password=device.token(),
                allowed_mechs=mechanisms,
                sni=device.host,
                virtual_host=hostname,
            )
        except proton.ConnectionException as error:
            raise Refused("connection", error) from error

    def on_session_remote_close(self, event: proton.Event) -> None:
        self._ended = event.session.remote_condition or proton.Condition("ended")

    def wait(self, condition: Callable[[], bool], timeout: float | bool = False, msg: str | None = None) -> None:
        super().wait(lambda: self._ended is not None or condition(), timeout, msg)
        if self._ended is not None:
            raise Refused(self._ended.name, self._ended.description)

    def sender(self, address: str | None) -> BlockingSender:
        with _links():
            return self.create_sender(address)

    def send(self, to: str | None, body: bytes = b"", /, **message: Any) -> bool:
        """Attach to an address and send one message there: was it accepted?"""
        with _links():
            delivery = self.sender(to).send(proton.Message(body=body, **message), error_states=[])
        return bool(delivery.remote_state == proton.Delivery.ACCEPTED)

    def receiver(self, address: str | None, **how: Any) -> BlockingReceiver:
        with _links():
            return self.create_receiver(address, credit=1, **how)

    def manage(self, method: str, path: str, body: object = None) -> int:
        """One request to the management node; the status of its answer."""
        with _links():
            answers = self.create_receiver(MANAGEMENT, credit=1, name="management", options=_Paired())
            requests = self.create_sender(MANAGEMENT, name="management", options=_Paired())
            request = _Request(address=path, subject=method, reply_to="$me", id=secrets.token_hex(8), body=body)
            requests.send(request)
            return int(answers.receive(TIMEOUT).subject)

    def __enter__(self) -> "One":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(proton.ProtonException, Refused):
            self.close()


def all_at_once(device: Device, address: str, message: bytes) -> RawClient:
    """Connected over TLS, with all that an AMQP 1.0 sender says written in one piece, and no answer waited for: the
    login, open, begin, attach, and the transfer of one encoded message."""
    client = device.socket()
    secret = b"\0" + device.id.encode() + b"\0" + device.token().encode()
    source, target = _Raw(_described(0x28)), _Raw(_described(0x29, address))
    client.socket.sendall(
        b"AMQP\x03\x01\0\0"
        + _frame(1, _described(0x41, proton.symbol("PLAIN"), secret))
        + b"AMQP\0\x01\0\0"
        + _frame(0, _described(0x10, "at-once", f"vhost:{names.VHOST}"))
        + _frame(0, _described(0x11, None, 0, 100, 100))
        + _frame(0, _described(0x12, "link", 0, False, None, None, source, target, None, None, 0))
        + _frame(0, _described(0x14, 0, 0, b"tag", 0, True) + message)
    )
    return client


def until_closed(open_socket: socket.socket) -> bytes:
    """Everything that the other side says until it hangs up."""
    said = b""
    open_socket.settimeout(20)
    try:
        while more := open_socket.recv(4096):
            said += more
    except (ConnectionError, ssl.SSLError):
        pass
    return said


class _Raw(bytes):
    """A field that is encoded."""


def _frame(kind: int, body: bytes) -> bytes:
    """On channel 0; `kind` is 1 for SASL."""
    return (8 + len(body)).to_bytes(4) + bytes([2, kind, 0, 0]) + body


def _described(descriptor: int, *fields: str | bytes | int | None) -> bytes:
    """A described list: a performative, or a part of one."""
    listed = b"".join(map(_encoded, fields))
    return bytes([0, 0x53, descriptor, 0xD0]) + (4 + len(listed)).to_bytes(4) + len(fields).to_bytes(4) + listed


def _encoded(value: str | bytes | int | None) -> bytes:
    match value:
        case None:
            return b"\x40"
        case _Raw():
            return value
        case bool():
            return b"\x41" if value else b"\x42"
        case int():
            return b"\x70" + value.to_bytes(4)
        case bytes():
            return b"\xb0" + len(value).to_bytes(4) + value
        case proton.symbol():
            return b"\xa3" + bytes([len(value)]) + value.encode()
        case str():
            return b"\xb1" + len(value.encode()).to_bytes(4) + value.encode()


@contextmanager
def _links() -> Iterator[None]:
    try:
        yield
    except proton.LinkException as error:
        raise Refused(getattr(error, "condition", "link"), error) from error
    except proton.ConnectionException as error:
        raise Refused("connection", error) from error


def _without(members: Json) -> Json:
    return {name: value for name, value in members.items() if value is not DROP}
