"""The targets: each takes bytes, and raises for what may not happen. Imported while atheris instruments."""

import contextlib
import json
import secrets
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from jwt.utils import base64url_encode
from pamqp import header
from pika import frame, spec

from api.broker_auth import Denied
from api.broker_auth import parse as parse_form
from device_agent import errors, guard, https, identity
from device_agent.arguments import BadArguments, _object
from device_agent.link import from_properties
from fabric import strict_json
from fabric.amqp import convert
from fabric.errors import Invalid, Unauthenticated
from fabric.identity import keys, scopes, tokens
from topology import enrollment, names, wire
from topology import guard as topology_guard

DECODERS = (
    wire.decode_command,
    wire.decode_receipt,
    wire.decode_outcome,
    wire.decode_claim,
    wire.decode_claim_answer,
    wire.decode_hello,
    wire.decode_welcome,
    wire.decode_reading,
)
_LENGTH = struct.Struct(">H")
_FRAME = struct.Struct(">BHI")
_ES256 = ECAlgorithm(ECAlgorithm.SHA256)
_KEY = ec.generate_private_key(ec.SECP256R1())
_JWK = {name: str(value) for name, value in ECAlgorithm.to_jwk(_KEY.public_key(), as_dict=True).items()}
_DEVICE = names.DeviceId("garage-7")
_ID = names.CommandId("0199c0de-0000-7000-8000-000000000001")


def _halves(given: bytes) -> tuple[bytes, bytes]:
    """A first part, whose length stands before it, and the rest."""
    size = _LENGTH.unpack_from(given)[0] if len(given) >= _LENGTH.size else 0
    return given[_LENGTH.size : _LENGTH.size + size], given[_LENGTH.size + size :]


def _signed(head: bytes, claims: bytes) -> str:
    """A compact JWS of these parts, whatever they are."""
    signed = base64url_encode(head) + b"." + base64url_encode(claims)
    return (signed + b"." + base64url_encode(_ES256.sign(signed, _KEY))).decode()


def _decode_all(message: wire.Message) -> None:
    for decode in DECODERS:
        with contextlib.suppress(wire.Malformed):
            decode(message)


def fabric_message(given: bytes) -> None:
    """A content header and a body, from the guard through pamqp to every message of the contract."""
    raw, body = _halves(given)
    if topology_guard.inspect(raw) is None:
        decoded = header.ContentHeader()
        decoded.unmarshal(raw)
        _decode_all(convert.message(SimpleNamespace(header=decoded, body=body)))  # type: ignore[arg-type]


def agent_message(given: bytes) -> None:
    """The same at the agent, from the frame on, with pika."""
    raw, body = _halves(given)
    framed = _FRAME.pack(spec.FRAME_HEADER, 1, len(raw)) + raw + bytes([spec.FRAME_END])
    if len(raw) < struct.calcsize(">HHQ"):
        return  # no content header at all: the broker itself is broken, and the connection ends
    consumed, value = guard.decode(framed, frame.decode_frame)
    assert consumed == len(framed)
    _decode_all(from_properties(value.properties, body))  # type: ignore[attr-defined]


def json_body(given: bytes) -> None:
    with contextlib.suppress(strict_json.NotJson):
        value = strict_json.parse(given)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    with contextlib.suppress(BadArguments):
        _object(given, wire.JSON)
    https.said(https.json_object(given))


def token(given: bytes) -> None:
    """Header and claims; as they are, and signed in the right way."""
    for text in (given.decode("latin-1"), _signed(*_halves(given))):
        with contextlib.suppress(Unauthenticated):
            tokens.verify(tokens.examine(text), _JWK, "restante/api", 600, 1_800_000_000)


def text(given: bytes) -> None:
    """What comes as a short text: a scope claim, a ticket, a code, a routing key, the broker's form."""
    said = given.decode("utf-8", "replace")
    scopes.parse(said)
    for decode in (enrollment.decode_ticket, enrollment.decode_code):
        with contextlib.suppress(enrollment.BadTicket):
            decode(said)
    names.parse_uplink_key(said)
    with contextlib.suppress(Denied):
        parse_form(given)


def document(given: bytes) -> None:
    """A JSON document: a public key from a device, the answer to an enrollment."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(given)
        if isinstance(value, dict):
            with contextlib.suppress(Invalid):
                keys.accept_jwk(value)
        with contextlib.suppress(errors.BadAnswer):
            identity.parse_peering(value)


TARGETS: tuple[Callable[[bytes], None], ...] = (fabric_message, agent_message, json_body, token, text, document)


def seeds() -> Iterator[tuple[str, bytes]]:
    """What is right, by the name of the target, to begin with."""
    for message in _messages():
        content = header.ContentHeader(0, len(message.body), convert.properties(message)).marshal()
        for name in ("fabric_message", "agent_message"):
            yield name, _LENGTH.pack(len(content)) + content + message.body
        yield "json_body", message.body
    claims = {"iss": "a", "sub": "a", "aud": "restante/api", "iat": 1_800_000_000, "exp": 1_800_000_060, "jti": "j"}
    head = {"alg": "ES256", "typ": enrollment.DEVICE_TOKEN_TYPE, "kid": "k"}
    parts = json.dumps(head).encode(), json.dumps(claims).encode()
    yield "token", _signed(*parts).encode()
    yield "token", _LENGTH.pack(len(parts[0])) + b"".join(parts)
    yield "text", b"commands:send@group:garage/door.* devices:read"
    yield "text", b"username=garage-7&password=a.b.c&vhost=devices"
    yield "text", b"telemetry.garage-7.door.state"
    yield "text", enrollment.encode_ticket(enrollment.Ticket(secrets.token_bytes(16), secrets.token_bytes(32))).encode()
    yield "document", json.dumps(_JWK).encode()
    yield (
        "document",
        json.dumps({
            "device_id": "garage-7", "generation": 1, "amqps_url": "amqps://localhost:5671/devices",
            "api_url": "https://localhost", "audience": {"mq": "restante/mq/local", "api": "restante/api"},
            "signing_keys": {"keys": [_JWK]},
        }).encode(),
    )  # fmt: skip


def _messages() -> Iterator[wire.Message]:
    yield wire.encode_receipt(wire.Receipt(_ID, "a" * 16, "running", 1, "half"), _DEVICE)
    yield wire.encode_outcome(wire.Outcome(_ID, "a" * 16, "failed", "jammed", b'{"a": 1.5}', wire.JSON, 1), _DEVICE)
    yield wire.encode_claim(wire.Claim("c", "a" * 16, (_ID,), 1), _DEVICE)
    yield wire.encode_hello(wire.Hello("c", "a" * 16, "0.1.0", 1), _DEVICE)
