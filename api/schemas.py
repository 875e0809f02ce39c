"""What requests carry and answers look like, as pydantic models.

Requests are refused when they have a field too many or a value of another type; bounds are the fabric's.
The models of answers describe them in the OpenAPI document; `fabric.presenting` and `api.answers` make
them, and tests compare the two.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from api import providers
from fabric import audit
from fabric.command import State
from fabric.commands import (
    DEFAULT_RESPONSE_TIMEOUT,
    DEFAULT_TTL,
    LONGEST_RESPONSE_TIMEOUT,
    LONGEST_TTL,
)
from fabric.devices import MAX_GROUPS, MAX_LABEL, MAX_LABELS
from fabric.identity import issued, scopes
from topology import enrollment, names, wire

SHORTEST = 0.001  # seconds: the wire has whole milliseconds
PAGE_LIMIT = 100
PAGE_DEFAULT = 50
READ_LIMIT = 10_000  # readings of one request
READ_DEFAULT = 100
FILTER_LIMIT = 32  # values of one filter
IDLE_LIMIT = 60.0  # seconds
IDLE_DEFAULT = 2.0
TOKEN_LIFE_DEFAULT = 24 * 3600  # seconds

KEY = "[!-~]{1,128}"  # of `Idempotency-Key` and `supersedes`
POSITION = "[0-9]{1,18}"  # of an event
UUID7 = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_RFC3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"


def parse_time(value: object) -> int:
    """Epoch milliseconds of an RFC 3339 time from 1970 on."""
    return parse_micros(value) // 1000


def parse_micros(value: object) -> int:
    """Epoch microseconds of an RFC 3339 time from 1970 on."""
    if not isinstance(value, str) or not re.fullmatch(_RFC3339, value, re.ASCII):
        raise ValueError("Input should be an RFC 3339 time with its offset, such as 2026-01-31T12:00:00.000Z")
    # Python 3.11 reads six digits of a second at most.
    text = re.sub(r"(\.[0-9]{6})[0-9]+", r"\1", value.upper())
    try:
        at = (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise ValueError("Input should be a time that exists") from None
    if at < 0:
        raise ValueError("Input should be a time from 1970 on")
    return at


def _known_scope(scope: str) -> str:
    if scopes.read(scope) is None:
        raise ValueError(
            f"Input should be one of {', '.join(sorted(scopes.ACTIONS))}, or one narrowed as far as it can be, such as "
            "commands:send@group:garage/door.*"
        )
    return scope


DeviceId = Annotated[str, Field(pattern=f"^{names.DEVICE_ID}$", max_length=63, examples=["garage-7"])]
Dotted = Annotated[str, Field(pattern=f"^{names.DOTTED_NAME}$", max_length=names.NAME_LIMIT, examples=["door.close"])]
Kind = Annotated[
    str,
    Field(
        pattern=rf"^{names.DOTTED_NAME}(?:\.\*)?$",
        max_length=names.NAME_LIMIT,
        examples=["command.*", "device.created"],
    ),
]
Uuid = Annotated[str, Field(pattern=f"^{UUID7}$", examples=["0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e"])]
Ttl = Annotated[float, Field(ge=SHORTEST, le=LONGEST_TTL, allow_inf_nan=False)]
ResponseTimeout = Annotated[float, Field(ge=SHORTEST, le=LONGEST_RESPONSE_TIMEOUT, allow_inf_nan=False)]
Key = Annotated[str, Field(pattern=f"^{KEY}$", max_length=128, examples=["set-point"])]
Scope = Annotated[
    str,
    AfterValidator(_known_scope),
    Field(
        max_length=scopes.LONGEST_SCOPE,
        json_schema_extra={"pattern": f"^{scopes.GRAMMAR}$"},
        examples=["devices:read", "telemetry:read@device:pump-17", "commands:send@group:garage/door.*"],
    ),
]
Subject = Annotated[str, Field(min_length=1, max_length=wire.MAX_ISSUER, pattern="^[ -~]+$", examples=["billing"])]
Time = Annotated[
    str,
    Field(pattern=f"^{_RFC3339}$", json_schema_extra={"format": "date-time"}, examples=["2026-01-31T12:00:00.000000Z"]),
]
EpochMs = Annotated[
    int, BeforeValidator(parse_time), WithJsonSchema({"type": "string", "format": "date-time"}, mode="validation")
]
EpochMicros = Annotated[
    int, BeforeValidator(parse_micros), WithJsonSchema({"type": "string", "format": "date-time"}, mode="validation")
]
Groups = Annotated[list[Dotted], Field(max_length=MAX_GROUPS, json_schema_extra={"uniqueItems": True})]
LabelValue = Annotated[str, Field(max_length=MAX_LABEL)]

_unset: Any = Field(default_factory=lambda: None)  # for what may be left out, but not be null


class Given(BaseModel):
    """What a caller sends as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(BaseModel):
    """What a caller sends in the query: texts, so read as what they stand for."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shown(BaseModel):
    """What an answer looks like. Later versions may add members."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- Requests ----------------------------------------------------------------------------------------


class MailboxLimit(Given):
    """`limit`: commands that may wait; null: the fabric's default."""

    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None


class NewDevice(Given):
    id: DeviceId
    groups: Groups = []
    labels: Annotated[dict[Dotted, LabelValue], Field(max_length=MAX_LABELS)] = {}
    mailbox: MailboxLimit = _unset


class DevicePatch(Given):
    """A merge patch (RFC 7396): `groups` is replaced whole, a label of null is removed."""

    enabled: bool = _unset
    groups: Groups = _unset
    labels: dict[Dotted, LabelValue | None] = _unset
    mailbox: MailboxLimit = _unset


class NewCommand(Given):
    """`ttl`: seconds from acceptance to pick-up; `response_timeout`: seconds from pick-up to outcome.
    `claim`: the device asks before it runs it. `supersedes`: a key; what still waits of the same device, name and
    key is withdrawn."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "door.close", "args": {"speed": 1}, "ttl": 60, "claim": False}]}
    )

    name: Dotted
    args: JsonValue = Field(default_factory=dict, description="Any JSON value; handlers take objects.")
    ttl: Ttl = DEFAULT_TTL
    response_timeout: ResponseTimeout = DEFAULT_RESPONSE_TIMEOUT
    claim: bool = False
    supersedes: Key = _unset


class Enrolling(Given):
    """Code, public key (JWK, P-256) and the proof: a JWS by that key over the code's hash."""

    code: Annotated[str, Field(min_length=1, max_length=64)]
    public_key: Annotated[dict[str, str], Field(max_length=8)]
    proof: Annotated[str, Field(min_length=1, max_length=enrollment.MAX_TOKEN_BYTES)]


class NewKey(Given):
    """Public key (JWK, P-256) and the proof: a JWS by that key over the device id and the present key's thumbprint."""

    public_key: Annotated[dict[str, str], Field(max_length=8)]
    proof: Annotated[str, Field(min_length=1, max_length=enrollment.MAX_TOKEN_BYTES)]


class NewReading(Given):
    """One line of a batch. Without `at`, it was measured now."""

    at: EpochMs = _unset
    value: JsonValue


Issuer = Annotated[
    str,
    Field(
        pattern=f"^{providers.ISSUER}$",
        description="The `iss` of an external provider, whose subject it is.",
        examples=["https://idp.example"],
    ),
]


class NewToken(Given):
    """`life` is seconds; without it a day, or as long as the minter's token still lives."""

    subject: Annotated[
        str, Field(min_length=1, max_length=wire.MAX_ISSUER, pattern='^[ -"$-~]+$', examples=["billing"])
    ]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=scopes.MAX_SCOPES)]
    life: Annotated[int, Field(ge=60, le=issued.LONGEST_LIFE)] = _unset


Cursor = Annotated[str, Field(max_length=200, pattern="^[A-Za-z0-9_-]+$", description="`next` of the page before.")]


class Page(Query):
    cursor: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=PAGE_LIMIT)] = PAGE_DEFAULT


class CommandPage(Page):
    device: DeviceId | None = None
    state: State | None = None
    issuer: Subject | None = None


class AuditQuery(Page):
    """From `since` on, and before `until`."""

    device: DeviceId | None = None
    subject: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    action: audit.Action | None = None
    since: EpochMicros | None = None
    until: EpochMicros | None = None


class Purge(Query):
    purge: bool = Field(False, description="Withdraw the commands that would be counted as `queued`.")


class Tokens(Purge):
    subject: Subject
    issuer: Issuer | None = None


class RawCommand(Query):
    """With `name`, the body is the arguments in their own content type, and the rest stands here."""

    name: Dotted | None = None
    ttl: Ttl | None = None
    response_timeout: ResponseTimeout | None = None
    claim: bool | None = None
    supersedes: Key | None = None


class OneReading(Query):
    at: EpochMs | None = Field(default=None, description="When it was measured; now, when left out.")


class Read(Query):
    """`idle`: seconds without a reading after which the answer ends."""

    start: Annotated[
        str, Field(alias="from", pattern="^(?:first|next|[0-9]{1,18})$", description="`first`, `next` or an offset.")
    ] = "first"
    device: DeviceId | None = None
    channel: Dotted | None = None
    limit: Annotated[int, Field(ge=1, le=READ_LIMIT)] = READ_DEFAULT
    idle: Annotated[float, Field(ge=0.05, le=IDLE_LIMIT, allow_inf_nan=False)] = IDLE_DEFAULT


class Follow(Query):
    """Each filter may be repeated."""

    device: Annotated[list[DeviceId], Field(max_length=FILTER_LIMIT)] = []
    group: Annotated[list[Dotted], Field(max_length=FILTER_LIMIT)] = []
    kind: Annotated[list[Kind], Field(max_length=FILTER_LIMIT)] = []
    after: Annotated[int, Field(ge=0, lt=10**18, description="A position; `Last-Event-ID` goes before it.")] | None = (
        None
    )


# ---- Answers -----------------------------------------------------------------------------------------


class FieldError(Shown):
    """`pointer`: `#/…` into the body (RFC 6901), or a parameter as `query:limit`."""

    pointer: str
    detail: str


class ProblemDocument(BaseModel):
    """RFC 9457. `type` is stable; `instance` is the request's id."""

    type: Annotated[str, Field(examples=["urn:restante:problem:not-found"])]
    title: str
    status: int
    detail: str
    instance: str | None
    errors: list[FieldError] = _unset
    reasons: dict[str, str] = _unset
    state: State = _unset
    mailbox: "MailboxDocument" = _unset
    connection: Literal["connected", "disconnected"] = _unset
    last_seen: Time | None = _unset


class ConnectionDocument(Shown):
    state: Literal["connected", "disconnected"]
    since: Time | None = Field(description="null: it was never connected.")


class MailboxDocument(Shown):
    """From the ledger: copies of commands that may be in it, withdrawn ones until their deadline. `oldest_age` is
    seconds."""

    depth: int
    limit: int
    oldest_age: float | None


class DeviceSummary(Shown):
    id: DeviceId
    enabled: bool
    groups: list[Dotted]
    labels: dict[str, str]
    created_at: Time
    connection: ConnectionDocument
    last_seen: Time | None
    agent_version: str | None


class DeviceDocument(DeviceSummary):
    mailbox: MailboxDocument


class InvitationDocument(Shown):
    """Shown once. The ticket is what a person copies to the device."""

    ticket: str
    code: str
    expires_at: Time


class NewDeviceDocument(DeviceDocument):
    enrollment: InvitationDocument


class KeyDocument(Shown):
    """`kid` is the key's thumbprint (RFC 7638), `parent` that of the key whose token authorized it; null: it was
    enrolled."""

    kid: str
    parent: str | None
    created_at: Time
    last_used: Time | None


class RevocationDocument(Shown):
    """`closed_connections`: null when no worker has answered in time; they may still be open, and are closed as soon as
    one does. Until `pending_until` a connection that was being made may appear, or an upload go on at a gateway that
    has not answered, and is closed then; null: none can. `withdrawn`: waiting commands that were cancelled. `in_hand`:
    commands that the device has picked up, which nobody can call back."""

    closed_connections: int | None
    pending_until: Time | None
    withdrawn: int
    in_hand: int


class TimelineDocument(Shown):
    state: State
    at: Time
    evidence: str


class OutcomeDocument(Shown):
    """`result`: the JSON value, or `{"base64": …}`; in lists, over 4 KiB, `{"href": …}`."""

    status: State
    reason: str | None
    content_type: str
    result: JsonValue


class CommandDocument(Shown):
    id: Uuid
    device: DeviceId
    name: Dotted
    args: JsonValue
    state: State
    reason: str | None
    late: bool
    issuer: str
    seq: int
    attempt: int
    accepted_at: Time
    deadline: Time
    settled_at: Time | None
    response_timeout: float
    claim: bool
    supersedes: str | None
    traceparent: str | None = Field(description="W3C Trace Context, as its issuer sent it and its device gets it.")
    timeline: list[TimelineDocument]
    outcome: OutcomeDocument | None


class EventDocument(Shown):
    """`detail`: a text beside a command's evidence, or an object for an event of a device. `groups` are the device's
    present ones. `changed`: did the command's state change? `command`: as it was then, or null."""

    position: int
    kind: Dotted
    at: Time
    version: int
    device: DeviceId
    groups: list[Dotted]
    evidence: str | None
    detail: JsonValue
    changed: bool | None
    command: CommandDocument | None


class ReadingDocument(Shown):
    offset: int
    device: DeviceId
    channel: Dotted
    at: Time
    content_type: str
    value: JsonValue


class AcceptedReadings(Shown):
    accepted: int


class TokenDocument(Shown):
    jti: Uuid
    subject: str
    scopes: list[str]
    issued_at: Time
    expires_at: Time
    revoked_at: Time | None
    parent: Uuid | None = Field(description="The token it was made with; it is revoked with that one.")


class DisownedDocument(Shown):
    """`revoked`: tokens that were good before. Until `pending_until`, what is open by them may be so at a gateway that
    has not answered; null: it has ended. `queued`: commands of their subjects that wait for devices, as far as they
    are counted. `purged`: those that were withdrawn."""

    revoked: int
    pending_until: Time | None
    queued: int
    purged: int


class NewTokenDocument(TokenDocument):
    """`token` is shown once."""

    token: str


class ActorDocument(Shown):
    """`subject` as commands have it as their issuer, or a device's id, or the name of who was at the command line.
    `issuer` and `jti` are those of the token, `address` where the request came from."""

    kind: audit.Kind
    subject: str | None
    issuer: str | None
    jti: str | None
    address: str | None


class AuditDocument(Shown):
    """`outcome`: `done`, or the last part of the problem's type that it was refused with. `request`: the id of the
    request. `detail`: what of it was done, by names, ids and numbers; never a secret."""

    position: int
    at: Time
    action: audit.Action
    device: DeviceId | None
    outcome: str
    by: ActorDocument
    request: str | None
    detail: dict[str, JsonValue]


class AudienceDocument(Shown):
    mq: str
    api: str


class JwksDocument(Shown):
    keys: list[dict[str, str]]


class TrustedKeysDocument(Shown):
    """`exp` of a key is when it counts no more, in seconds since the epoch. `version` grows with each change."""

    keys: list[dict[str, str | int]]
    version: int


class EnrolledDocument(Shown):
    device_id: DeviceId
    amqps_url: str
    api_url: str
    audience: AudienceDocument
    authority: str
    authorities_version: int
    signing_keys: TrustedKeysDocument
    generation: int


class SuccessorsDocument(Shown):
    """Each is a JWS, in their order."""

    announcements: list[str]


class TimeDocument(Shown):
    time: Time


class HealthDocument(Shown):
    status: Literal["ok"]


class DevicesPage(Shown):
    items: list[DeviceSummary]
    next: str | None


class CommandsPage(Shown):
    items: list[CommandDocument]
    next: str | None


class KeysPage(Shown):
    items: list[KeyDocument]
    next: str | None


class AuditPage(Shown):
    items: list[AuditDocument]
    next: str | None


class TokensPage(Shown):
    items: list[TokenDocument]
    next: str | None
