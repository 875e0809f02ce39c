"""Enrollment (SECURITY.md, rule 7): a ticket becomes a peering.

The authority is fetched over a connection that carries nothing else, compared with the digest in the
ticket, and pinned; only a second connection, verified against it, ever carries the code. Running it again
with the same ticket and key gives the same answer.
"""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from device_agent import errors, files, identity, log, tls
from topology import enrollment

TIMEOUT = 10.0  # seconds for each step on a socket
DEADLINE = 30.0  # seconds for a whole request, however slowly it drips
MAX_ANSWER = 64 * 1024  # bytes


@dataclass(frozen=True, slots=True)
class Service:
    """Where the gateway is; `base` is the path its routes hang under, usually empty."""

    host: str
    port: int
    base: str

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}{self.base}"


def enroll(state_dir: Path, api_url: str, ticket_text: str) -> identity.Identity:
    """Trade the ticket for a peering, kept in `state_dir`.

    Raises:
        errors.InvalidValue: the ticket or the URL is not one.
        errors.PeerNotTrusted: the service is not the one the ticket names (a subclass says why).
        errors.EnrollmentRefused: the service said no.
        errors.BadAnswer, errors.Unreachable, errors.StateRefused
    """
    service = parse_url(api_url)
    try:
        ticket = enrollment.decode_ticket(ticket_text)
    except enrollment.BadTicket as error:
        raise errors.InvalidValue(str(error)) from None
    files.private_directory(state_dir)
    authority = fetch_authority(service, ticket.authority_digest)
    key = identity.make_key(state_dir)
    answer = _request_enrollment(service, authority, ticket, key)
    peering = identity.parse_peering(answer)
    _same_authority(answer, authority)
    _same_device(state_dir, peering)
    identity.store_peering(state_dir, answer, authority)
    return identity.Identity(key, peering, authority)


def parse_url(api_url: str) -> Service:
    """Raises `errors.InvalidValue`: not `https://host[:port][/path]`."""
    try:
        parts = urlsplit(api_url.strip())
        port = parts.port or 443
    except ValueError:
        raise errors.InvalidValue(
            "the address of the service is not a URL such as https://gateway.example:8443"
        ) from None
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise errors.InvalidValue("the address of the service must look like https://gateway.example:8443")
    return Service(parts.hostname, port, parts.path.rstrip("/"))


def fetch_authority(service: Service, digest: bytes) -> str:
    """The service's authority as PEM, if it is the one with this SHA-256.

    Raises:
        errors.WrongAuthority: it is another one.
        errors.BadAnswer, errors.Unreachable
    """
    status, body = _exchange(service, tls.unverified(), "GET", "/v1/authority", None)
    if status != http.client.OK:
        raise errors.BadAnswer(
            f"{service.url}/v1/authority answered {status} instead of a certificate; check the address"
        )
    pem = _one_certificate(body)
    if sha256(ssl.PEM_cert_to_DER_cert(pem)).digest() != digest:
        raise errors.WrongAuthority(
            f"the authority of {service.url} is not the one the ticket names: the ticket is for another service, or"
            " the connection is intercepted. Nothing was sent. Check the address and ask for a new ticket"
        )
    return pem


def _request_enrollment(
    service: Service, authority: str, ticket: enrollment.Ticket, key: identity.DeviceKey
) -> dict[str, Any]:
    claims = {"code_hash": enrollment.code_hash(ticket.code), "iat": int(time.time())}
    proof = jwt.encode(
        claims, key.private, algorithm=enrollment.ALGORITHM, headers={"typ": enrollment.PROOF_TYPE, "kid": key.kid}
    )
    request = {"code": enrollment.encode_code(ticket.code), "public_key": key.jwk, "proof": proof}
    status, body = _exchange(service, tls.pinned(authority), "POST", "/v1/enroll", json.dumps(request).encode())
    answer = _json_object(body)
    if status not in (http.client.OK, http.client.CREATED):
        raise _refusal(service, status, answer)
    if answer is None:
        raise errors.BadAnswer(f"{service.url} answered the enrollment with something that is not a JSON object")
    return answer


def _refusal(service: Service, status: int, answer: dict[str, Any] | None) -> errors.AgentError:
    said = ": ".join(str(answer[part]) for part in ("title", "detail") if answer.get(part)) if answer else ""
    text = f"{service.url} refused the enrollment with {status}" + (f" ({log.escape(said)})" if said else "")
    if 300 <= status < 400:
        return errors.BadAnswer(f"{text}; redirects are not followed: use the service's own address")
    if status == http.client.GONE:
        return errors.EnrollmentRefused(f"{text}; the ticket is used, expired or withdrawn: ask for a new one")
    if status >= 500 or status == http.client.TOO_MANY_REQUESTS:
        return errors.Unreachable(f"{text}; try again later with the same ticket")
    return errors.EnrollmentRefused(f"{text}; ask for a new ticket if this one can't be right")


def _same_authority(answer: dict[str, Any], pinned: str) -> None:
    given = answer.get("authority")
    try:
        same = isinstance(given, str) and _one_certificate(given.encode()) == pinned
    except errors.BadAnswer:
        same = False
    if not same:
        raise errors.WrongAuthority(
            "the authority in the enrollment's answer is not the one the ticket names; nothing was kept."
            " The service is misconfigured or compromised: tell whoever runs it"
        )


def _same_device(state_dir: Path, peering: identity.Peering) -> None:
    # Only the name matters: a file that an earlier version wrote must not keep the device from enrolling again.
    present = identity.enrolled_device(state_dir)
    if present not in (None, peering.device):
        raise errors.StateRefused(
            f"{state_dir} already holds device {log.escape(present)}, and the ticket is for {peering.device};"
            " use a state directory of its own for each device"
        )


def _one_certificate(body: bytes) -> str:
    try:
        found = x509.load_pem_x509_certificates(body)
    except ValueError:
        found = []
    if len(found) != 1:
        raise errors.BadAnswer("the service's authority is not exactly one certificate in PEM form; check the address")
    return found[0].public_bytes(serialization.Encoding.PEM).decode("ascii")


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _exchange(
    service: Service, context: ssl.SSLContext, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    """One request on a connection of its own: no redirects, a bounded answer, a deadline."""
    connection = http.client.HTTPSConnection(service.host, service.port, timeout=TIMEOUT, context=context)
    headers = {"Accept": "application/json" if body else "application/x-pem-file", "Connection": "close"}
    if body:
        headers["Content-Type"] = "application/json"
    try:
        connection.connect()
        with _deadline(connection.sock):
            connection.request(method, service.base + path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER + 1)
    except http.client.HTTPException as error:
        raise errors.BadAnswer(f"{service.url} does not speak HTTP as expected ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise tls.translate(error, service.host, service.port) from error
    finally:
        connection.close()
    if len(content) > MAX_ANSWER:
        raise errors.BadAnswer(f"{service.url}{path} answered more than {MAX_ANSWER} bytes")
    return response.status, content


@contextmanager
def _deadline(connected: socket.socket) -> Iterator[None]:
    """Cut the connection when the time is up: a socket's own timeout starts again with every byte."""

    def cut() -> None:
        with suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(DEADLINE, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
