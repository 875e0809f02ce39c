"""Devices of which only the connection matters: each with a key of its own, over TLS, consuming its mailbox."""

import secrets
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import jwt
import pika
from cryptography.hazmat.primitives.asymmetric import ec
from pika.exceptions import ConnectionClosedByBroker, ProbableAuthenticationError

from api.operator.stack import Stack
from fabric.model import DeviceKey
from fabric.signing import SigningKey, signing_key
from fabric.sql import Store
from topology import enrollment, names
from topology.names import DeviceId

_TOKEN_LIFE = 60  # seconds
_PATIENCE = 30.0  # seconds that a connection is given to be closed


@dataclass(slots=True)
class LiveDevice:
    """A device that is enrolled, and after `connect` has one connection."""

    id: DeviceId
    stack: Stack
    key: SigningKey = field(default_factory=lambda: signing_key(ec.generate_private_key(ec.SECP256R1())))
    connection: pika.BlockingConnection | None = None

    async def enroll(self, store: Store, ticket: str) -> None:
        """Register the key as `POST /v1/enroll` does, which lets no address in so often."""
        code, now = enrollment.code_hash(enrollment.decode_ticket(ticket).code), store.clock.now()
        await store.registry.redeem(code, DeviceKey(self.id, self.key.kid, self.key.public, now), now)

    def connect(self) -> None:
        """With a fresh token. Raises `ProbableAuthenticationError` when it is refused."""
        self.connection = pika.BlockingConnection(self._parameters())
        self.connection.channel().basic_consume(names.mailbox(self.id), lambda *_: None)

    def is_refused(self) -> bool:
        """Does the broker refuse it a new connection?"""
        try:
            pika.BlockingConnection(self._parameters()).close()
        except ProbableAuthenticationError:
            return True
        return False

    def cut_at(self) -> float:
        """Wait until the broker closes the connection: when that was, by `time.perf_counter`. Raises `TimeoutError`."""
        assert self.connection is not None
        try:
            self.connection.process_data_events(time_limit=_PATIENCE)
        except ConnectionClosedByBroker:
            return time.perf_counter()
        raise TimeoutError(f"{self.id} is still connected")

    def _parameters(self) -> pika.ConnectionParameters:
        place = urlsplit(self.stack.settings.amqps_url)
        host = place.hostname or ""
        return pika.ConnectionParameters(
            host,
            place.port,
            names.VHOST,
            pika.PlainCredentials(self.id, self._token()),
            ssl_options=pika.SSLOptions(ssl.create_default_context(cafile=self.stack.files.authority), host),
            heartbeat=0,  # nobody serves this connection until it is its turn
        )

    def _token(self) -> str:
        now, settings = int(time.time()), self.stack.settings
        claims = {
            "iss": self.id,
            "sub": self.id,
            "aud": enrollment.mq_audience(settings.fabric, settings.cell),
            "iat": now,
            "exp": now + _TOKEN_LIFE,
            "jti": secrets.token_urlsafe(16),
        }
        headers = {"typ": enrollment.DEVICE_TOKEN_TYPE, "kid": self.key.kid}
        return jwt.encode(claims, self.key.private, algorithm=enrollment.ALGORITHM, headers=headers)
