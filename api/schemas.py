"""What requests carry and answers look like, as pydantic models.

Requests are refused when they have a field too many or a value of another type; bounds are the fabric's.
The models of answers describe them in the OpenAPI document; `fabric.presenting` and `api.answers` make
them, and tests compare the two.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

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
IDLE_LIMIT = 60.0  # seconds
IDLE_DEFAULT = 2.0
TOKEN_LIFE_DEFAULT = 24 * 3600  # seconds

UUID7 = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_RFC3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"


def parse_time(value: object) -> int:
    """Epoch milliseconds of an RFC 3339 time from 1970 on."""
    if not isinstance(value, str) or not re.fullmatch(_RFC3339, value, re.ASCII):
        raise ValueError("Input should be an RFC 3339 time with its offset, such as 2026-01-31T12:00:00.000Z")
    # Python 3.11 reads six digits of a second at most; the wire has three.
    text = re.sub(r"(\.[0-9]{6})[0-9]+", r"\1", value.upper())
    try:
        at = (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        raise ValueError("Input should be a time that exists") from None
    if at < 0:
        raise ValueError("Input should be a time from 1970 on")
    return at


def _known_scope(scope: str) -> str:
    if scope not in scopes.ACTIONS:
        raise ValueError(f"Input should be one of: {', '.join(sorted(scopes.ACTIONS))}")
    return scope


DeviceId = Annotated[str, Field(pattern=f"^{names.DEVICE_ID}$", max_length=63, examples=["garage-7"])]
Dotted = Annotated[str, Field(pattern=f"^{names.DOTTED_NAME}$", max_length=names.NAME_LIMIT, examples=["door.close"])]
Uuid = Annotated[str, Field(pattern=f"^{UUID7}$", examples=["0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e"])]
Ttl = Annotated[float, Field(ge=SHORTEST, le=LONGEST_TTL, allow_inf_nan=False)]
ResponseTimeout = Annotated[float, Field(ge=SHORTEST, le=LONGEST_RESPONSE_TIMEOUT, allow_inf_nan=False)]
Scope = Annotated[str, AfterValidator(_known_scope), Field(json_schema_extra={"enum": sorted(scopes.ACTIONS)})]
Time = Annotated[
    str,
    Field(pattern=f"^{_RFC3339}$", json_schema_extra={"format": "date-time"}, examples=["2026-01-31T12:00:00.000000Z"]),
]
EpochMs = Annotated[
    int, BeforeValidator(parse_time), WithJsonSchema({"type": "string", "format": "date-time"}, mode="validation")
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


class NewDevice(Given):
    id: DeviceId
    groups: Groups = []
    labels: Annotated[dict[Dotted, LabelValue], Field(max_length=MAX_LABELS)] = {}


class DevicePatch(Given):
    """A merge patch (RFC 7396): `groups` is replaced whole, a label of null is removed."""

    enabled: bool = _unset
    groups: Groups = _unset
    labels: dict[Dotted, LabelValue | None] = _unset


class NewCommand(Given):
    """`ttl`: seconds from acceptance to pick-up; `response_timeout`: seconds from pick-up to outcome."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "door.close", "args": {"speed": 1}, "ttl": 60, "claim": False}]}
    )

    name: Dotted
    args: JsonValue = Field(default_factory=dict, description="Any JSON value; handlers take objects.")
    ttl: Ttl = DEFAULT_TTL
    response_timeout: ResponseTimeout = DEFAULT_RESPONSE_TIMEOUT
    claim: bool = False


class Enrolling(Given):
    """Code, public key (JWK, P-256) and the proof: a JWS by that key over the code's hash."""

    code: Annotated[str, Field(min_length=1, max_length=64)]
    public_key: Annotated[dict[str, str], Field(max_length=8)]
    proof: Annotated[str, Field(min_length=1, max_length=enrollment.MAX_TOKEN_BYTES)]


class NewReading(Given):
    """One line of a batch. Without `at`, it was measured now."""

    at: EpochMs = _unset
    value: JsonValue


class NewToken(Given):
    """`life` is seconds; without it a day, or as long as the minter's token still lives."""

    subject: Annotated[str, Field(min_length=1, max_length=wire.MAX_ISSUER, pattern="^[ -~]+$", examples=["billing"])]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=scopes.MAX_SCOPES)]
    life: Annotated[int, Field(ge=60, le=issued.LONGEST_LIFE)] = _unset


Cursor = Annotated[str, Field(max_length=200, pattern="^[A-Za-z0-9_-]+$", description="`next` of the page before.")]


class Page(Query):
    cursor: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=PAGE_LIMIT)] = PAGE_DEFAULT


class CommandPage(Page):
    device: DeviceId | None = None
    state: State | None = None
    issuer: Annotated[str, Field(min_length=1, max_length=wire.MAX_ISSUER, pattern="^[ -~]+$")] | None = None


class RawCommand(Query):
    """With `name`, the body is the arguments in their own content type, and the rest stands here."""

    name: Dotted | None = None
    ttl: Ttl | None = None
    response_timeout: ResponseTimeout | None = None
    claim: bool | None = None


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


class ConnectionDocument(Shown):
    state: Literal["connected", "disconnected"]
    since: Time | None = Field(description="null: it was never connected.")


class MailboxDocument(Shown):
    """From the ledger. `oldest_age` is seconds."""

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
    kid: str
    created_at: Time
    last_used: Time | None


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
    timeline: list[TimelineDocument]
    outcome: OutcomeDocument | None


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


class NewTokenDocument(TokenDocument):
    """`token` is shown once."""

    token: str


class AudienceDocument(Shown):
    mq: str
    api: str


class JwksDocument(Shown):
    keys: list[dict[str, str]]


class EnrolledDocument(Shown):
    device_id: DeviceId
    amqps_url: str
    api_url: str
    audience: AudienceDocument
    authority: str
    signing_keys: JwksDocument
    generation: int


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


class TokensPage(Shown):
    items: list[TokenDocument]
    next: str | None
