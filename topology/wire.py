"""The wire contract: messages as frozen values, to and from AMQP properties, headers and body.

`encode_*` builds a `Message`, `decode_*` reads one and raises only `Malformed`. Every message carries
the headers `v` (contract version) and `at` (epoch ms when it was said); bodies are opaque bytes with a
content type. Both ends import this module, so a field has one name and one check.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from topology import enrollment, guard, names

VERSION = "1.0"
JSON = "application/json"

MAX_BODY = 256 * 1024  # bytes
MAX_REASON = 500  # characters of a device's reason, after which it is cut
MAX_CLAIMS = 50  # command ids in one claim
MAX_CONTENT_TYPE = 127  # characters
MAX_ISSUER = 200  # characters

_CONTENT_TYPE = re.compile(
    r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(?:; ?[A-Za-z0-9!#$&^_.+-]+=[A-Za-z0-9!#$&^_.+-]+)*", re.ASCII
)
_AGENT = re.compile(r"[A-Za-z0-9_-]{8,64}", re.ASCII)
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)

Header = str | int | bool
OutcomeStatus = Literal["succeeded", "failed", "rejected"]
ReceiptState = Literal["received", "running"]


class Malformed(ValueError):
    """A message outside the contract; the text says what is wrong with it."""


class Unsupported(Malformed):
    """A contract version with an unknown major number."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the adapters carry it: AMQP's properties under AMQP's names."""

    type: str | None
    headers: Mapping[str, object] = field(default_factory=dict)
    body: bytes = b""
    content_type: str | None = None
    message_id: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    user_id: str | None = None
    expiration_ms: int | None = None
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it lies in a mailbox. `not_after` and `at` are epoch ms, `response_timeout` is ms."""

    id: names.CommandId
    name: str
    body: bytes
    content_type: str
    not_after: int
    response_timeout: int
    issuer: str
    seq: int
    attempt: int
    claim: bool
    generation: int
    sig: str
    sig_kid: str
    at: int
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """The device's word that it has a command. `progress` is a text of its own."""

    command: names.CommandId
    agent: str
    state: ReceiptState
    at: int
    progress: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    command: names.CommandId
    agent: str
    status: OutcomeStatus
    reason: str | None
    body: bytes
    content_type: str
    at: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A question: may this agent start these commands? Answered by `ClaimAnswer`."""

    correlation: str
    agent: str
    commands: tuple[names.CommandId, ...]
    at: int


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """`granted` maps each id of the claim that may start to True, the others to a refusal reason."""

    correlation: str
    granted: tuple[names.CommandId, ...]
    refused: Mapping[names.CommandId, str]
    time: int


@dataclass(frozen=True, slots=True)
class Hello:
    """`keys_version` is that of the keys for commands that the agent knows (`enrollment.KEYS_TYPE`),
    `authorities_version` that of the authorities that it is pinned to (`enrollment.AUTHORITIES_TYPE`)."""

    correlation: str
    agent: str
    agent_version: str
    at: int
    keys_version: int = 0
    authorities_version: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to a hello: the fabric's time (epoch ms), its incarnation and its contract version; and the news of
    the keys that sign commands, and of the authorities, JWS's in their order, for who knows an earlier version."""

    correlation: str
    time: int
    incarnation: str
    contract: str
    keys: tuple[str, ...] = ()
    authorities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """One telemetry reading; `at` is when it was measured."""

    id: str
    body: bytes
    content_type: str
    at: int
    seq: int | None = None
    traceparent: str | None = None


def signing_input(command: Command, device: names.DeviceId) -> bytes:
    """What a command's signature covers: everything that makes it mean what it means, unambiguously.

    A JSON array of (v, device, generation, id, name, not-after, claim, issuer, content type, SHA-256 of
    the body in hex); order of publishing (`seq`, `attempt`) is not part of it, so one signature serves
    every attempt.
    """
    covered = [
        VERSION.partition(".")[0],
        device,
        command.generation,
        command.id,
        command.name,
        command.not_after,
        command.claim,
        command.issuer,
        command.content_type,
        hashlib.sha256(command.body).hexdigest(),
    ]
    return json.dumps(covered, separators=(",", ":"), ensure_ascii=True).encode()


def encode_command(command: Command, now: int) -> Message:
    """The message for a mailbox; `now` (epoch ms) gives its remaining life."""
    headers: dict[str, Header] = {
        "v": VERSION,
        "at": command.at,
        "name": command.name,
        "not-after": command.not_after,
        "response-timeout": command.response_timeout,
        "issuer": command.issuer,
        "seq": command.seq,
        "attempt": command.attempt,
        "claim": command.claim,
        "generation": command.generation,
        "sig": command.sig,
        "sig-kid": command.sig_kid,
    }
    if command.traceparent:
        headers["traceparent"] = command.traceparent
    return Message(
        "command",
        headers,
        command.body,
        command.content_type,
        message_id=command.id,
        expiration_ms=max(command.not_after - now, 0),
    )


def decode_command(message: Message) -> Command:
    """The command in a mailbox message.

    Raises:
        Unsupported: of an unknown major version.
        Malformed: anything else is missing or out of bounds.
    """
    _expect(message, "command")
    get = _Reader(message.headers)
    return Command(
        id=_command_id(message.message_id, "message_id"),
        name=get.dotted("name"),
        body=_body(message),
        content_type=_content_type(message),
        not_after=get.whole("not-after"),
        response_timeout=get.whole("response-timeout"),
        issuer=get.text("issuer", MAX_ISSUER),
        seq=get.whole("seq"),
        attempt=get.whole("attempt"),
        claim=get.flag("claim"),
        generation=get.whole("generation"),
        sig=get.text("sig", 200, default=""),
        sig_kid=get.text("sig-kid", 100, default=""),
        at=get.whole("at"),
        traceparent=get.traceparent(),
    )


def encode_receipt(receipt: Receipt, device: names.DeviceId) -> Message:
    headers: dict[str, Header] = {"v": VERSION, "at": receipt.at, "agent": receipt.agent, "state": receipt.state}
    if receipt.progress is not None:
        headers["progress"] = receipt.progress[:MAX_REASON]
    return Message("receipt", headers, correlation_id=receipt.command, user_id=device)


def decode_receipt(message: Message) -> Receipt:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "receipt")
    get = _Reader(message.headers)
    state = get.text("state", 20)
    if state not in ("received", "running"):
        raise Malformed("header 'state' is neither 'received' nor 'running'")
    return Receipt(
        _command_id(message.correlation_id, "correlation_id"),
        get.agent(),
        "running" if state == "running" else "received",
        get.whole("at"),
        get.text("progress", MAX_REASON, default="") or None,
    )


def encode_outcome(outcome: Outcome, device: names.DeviceId) -> Message:
    headers: dict[str, Header] = {"v": VERSION, "at": outcome.at, "agent": outcome.agent, "status": outcome.status}
    if outcome.reason is not None:
        headers["reason"] = outcome.reason[:MAX_REASON]
    return Message(
        "outcome", headers, outcome.body, outcome.content_type, correlation_id=outcome.command, user_id=device
    )


def decode_outcome(message: Message) -> Outcome:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "outcome")
    get = _Reader(message.headers)
    status = get.text("status", 20)
    if status not in ("succeeded", "failed", "rejected"):
        raise Malformed("header 'status' is none of 'succeeded', 'failed', 'rejected'")
    known: dict[str, OutcomeStatus] = {"succeeded": "succeeded", "failed": "failed", "rejected": "rejected"}
    return Outcome(
        _command_id(message.correlation_id, "correlation_id"),
        get.agent(),
        known[status],
        get.text("reason", MAX_REASON, default="") or None,
        _body(message),
        _content_type(message),
        get.whole("at"),
    )


def encode_claim(claim: Claim, device: names.DeviceId) -> Message:
    return Message(
        "claim",
        {"v": VERSION, "at": claim.at, "agent": claim.agent},
        _json(list(claim.commands)),
        JSON,
        correlation_id=claim.correlation,
        reply_to=names.DIRECT_REPLY_TO,
        user_id=device,
        persistent=False,
    )


def decode_claim(message: Message) -> Claim:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "claim")
    get = _Reader(message.headers)
    listed = _parse_json(message)
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_CLAIMS:
        raise Malformed(f"a claim's body is a JSON array of 1 to {MAX_CLAIMS} command ids")
    ids = tuple(_command_id(item if isinstance(item, str) else None, "a claimed id") for item in listed)
    return Claim(_correlation(message), get.agent(), ids, get.whole("at"))


def encode_claim_answer(answer: ClaimAnswer) -> Message:
    body = {"granted": list(answer.granted), "refused": dict(answer.refused), "time": answer.time}
    return Message(
        "claim-answer",
        {"v": VERSION, "at": answer.time},
        _json(body),
        JSON,
        correlation_id=answer.correlation,
        persistent=False,
    )


def decode_claim_answer(message: Message) -> ClaimAnswer:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "claim-answer")
    body = _parse_object(message)
    granted, refused = body.get("granted"), body.get("refused")
    if not isinstance(granted, list) or not isinstance(refused, dict):
        raise Malformed("a claim's answer has a list 'granted' and an object 'refused'")
    return ClaimAnswer(
        _correlation(message),
        tuple(_command_id(item if isinstance(item, str) else None, "a granted id") for item in granted),
        {_command_id(key, "a refused id"): str(reason)[:MAX_REASON] for key, reason in refused.items()},
        _whole(body.get("time"), "time"),
    )


def encode_hello(hello: Hello, device: names.DeviceId) -> Message:
    return Message(
        "hello",
        {
            "v": VERSION,
            "at": hello.at,
            "agent": hello.agent,
            "agent-version": hello.agent_version,
            "keys-version": hello.keys_version,
            "authorities-version": hello.authorities_version,
        },
        correlation_id=hello.correlation,
        reply_to=names.DIRECT_REPLY_TO,
        user_id=device,
        persistent=False,
    )


def decode_hello(message: Message) -> Hello:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "hello")
    get = _Reader(message.headers)
    return Hello(
        _correlation(message),
        get.agent(),
        get.text("agent-version", 64),
        get.whole("at"),
        get.whole("keys-version") if "keys-version" in message.headers else 0,
        get.whole("authorities-version") if "authorities-version" in message.headers else 0,
    )


def encode_welcome(welcome: Welcome) -> Message:
    body = {
        "time": welcome.time,
        "incarnation": welcome.incarnation,
        "contract": welcome.contract,
        "keys": welcome.keys,
        "authorities": welcome.authorities,
    }
    return Message(
        "welcome",
        {"v": VERSION, "at": welcome.time},
        _json(body),
        JSON,
        correlation_id=welcome.correlation,
        persistent=False,
    )


def decode_welcome(message: Message) -> Welcome:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "welcome")
    body = _parse_object(message)
    incarnation, contract = body.get("incarnation"), body.get("contract")
    if not isinstance(incarnation, str) or not isinstance(contract, str):
        raise Malformed("a welcome has texts 'incarnation' and 'contract'")
    keys = _news(body, "keys", enrollment.MAX_ANNOUNCEMENT)
    authorities = _news(body, "authorities", enrollment.MAX_AUTHORITIES_NEWS)
    time = _whole(body.get("time"), "time")
    return Welcome(_correlation(message), time, incarnation[:64], contract[:16], keys, authorities)


def encode_reading(reading: Reading, user_id: str) -> Message:
    """The message for `uplink`; `user_id` is the publishing account: the device, or the gateway's."""
    headers: dict[str, Header] = {"v": VERSION, "at": reading.at}
    if reading.seq is not None:
        headers["seq"] = reading.seq
    if reading.traceparent:
        headers["traceparent"] = reading.traceparent
    return Message("telemetry", headers, reading.body, reading.content_type, message_id=reading.id, user_id=user_id)


def decode_reading(message: Message) -> Reading:
    """Raises `Malformed` (or `Unsupported`)."""
    _expect(message, "telemetry")
    get = _Reader(message.headers)
    return Reading(
        _short(message.message_id, "message_id"),
        _body(message),
        _content_type(message),
        get.whole("at"),
        get.whole("seq") if "seq" in message.headers else None,
        get.traceparent(),
    )


def is_content_type(text: str) -> bool:
    """Is it `type/subtype` with plain parameters, so that it may stand in a header of any protocol?"""
    return len(text) <= MAX_CONTENT_TYPE and _CONTENT_TYPE.fullmatch(text) is not None


def is_traceparent(text: str) -> bool:
    """W3C Trace Context, section 3.2: `traceparent` of version 00, its ids not all zeros."""
    return _TRACEPARENT.fullmatch(text) is not None


def _news(body: Mapping[str, object], name: str, longest: int) -> tuple[str, ...]:
    told = body.get(name, [])
    if not isinstance(told, list) or len(told) > enrollment.MAX_ANNOUNCEMENTS:
        raise Malformed(f"a welcome's '{name}' are a list of {enrollment.MAX_ANNOUNCEMENTS} texts at most")
    if not all(isinstance(text, str) and len(text) <= longest for text in told):
        raise Malformed(f"a welcome's '{name}' are texts of {longest} characters at most")
    return tuple(told)


class _Reader:
    """Typed, bounded access to headers; whatever is missing or of another type is `Malformed`."""

    def __init__(self, headers: Mapping[str, object]) -> None:
        self._headers = headers

    def whole(self, name: str) -> int:
        return _whole(self._headers.get(name), f"header '{name}'")

    def flag(self, name: str) -> bool:
        value = self._headers.get(name)
        if not isinstance(value, bool):
            raise Malformed(f"header '{name}' is not a boolean")
        return value

    def text(self, name: str, limit: int, *, default: str | None = None) -> str:
        value = self._headers.get(name, default)
        if not isinstance(value, str) or len(value) > limit:
            raise Malformed(f"header '{name}' is not a text of at most {limit} characters")
        return value

    def dotted(self, name: str) -> str:
        value = self.text(name, names.NAME_LIMIT)
        if not names.is_dotted(value):
            raise Malformed(f"header '{name}' is outside the grammar of names")
        return value

    def agent(self) -> str:
        value = self.text("agent", 64)
        if not _AGENT.fullmatch(value):
            raise Malformed("header 'agent' is not 8 to 64 characters of base64url")
        return value

    def traceparent(self) -> str | None:
        value = self._headers.get("traceparent")
        # Tracing is a courtesy: a bad one is left out, not a reason to refuse the message.
        return value if isinstance(value, str) and is_traceparent(value) else None


def _expect(message: Message, kind: str) -> None:
    if message.type == guard.UNDECODABLE:
        raise Malformed(f"undecodable: {str(message.headers.get(guard.REASON, ''))[:MAX_REASON]}")
    if message.type != kind:
        raise Malformed(f"type is not '{kind}'")
    version = message.headers.get("v")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version, re.ASCII):
        raise Malformed("header 'v' is not a contract version such as '1.0'")
    if version.partition(".")[0] != VERSION.partition(".")[0]:
        raise Unsupported(f"contract version {version}; this side speaks {VERSION}")


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise Malformed(f"{what} is not a whole number from 0 to 2^53")
    return value


def _short(value: str | None, what: str) -> str:
    if value is None or not 1 <= len(value) <= 64 or not value.isascii() or not value.isprintable():
        raise Malformed(f"{what} is not 1 to 64 printable ASCII characters")
    return value


def _correlation(message: Message) -> str:
    return _short(message.correlation_id, "correlation_id")


def _command_id(value: str | None, what: str) -> names.CommandId:
    if value is None or not names.is_command_id(value):
        raise Malformed(f"{what} is not a command id (a UUIDv7)")
    return names.CommandId(value)


def _body(message: Message) -> bytes:
    if len(message.body) > MAX_BODY:
        raise Malformed(f"a body of more than {MAX_BODY} bytes")
    return message.body


def _content_type(message: Message) -> str:
    value = message.content_type
    if value is None or not is_content_type(value):
        raise Malformed("content_type is not a plain media type")
    return value


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _parse_json(message: Message) -> object:
    try:
        value: object = json.loads(_body(message))
    except (ValueError, RecursionError):
        raise Malformed("the body is not JSON") from None
    return value


def _parse_object(message: Message) -> dict[str, object]:
    value = _parse_json(message)
    if not isinstance(value, dict):
        raise Malformed("the body is not a JSON object")
    return value
