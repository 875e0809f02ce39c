"""The wire contract: what is encoded comes back, and whatever else arrives is `Malformed` and nothing worse."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from topology import guard, names, wire
from topology.wire import Malformed, Message

DEVICE = names.device("garage-7")
ID = names.CommandId("01990000-0000-7000-8000-000000000001")
OTHER = names.CommandId("01990000-0000-7000-8000-000000000002")

ids = st.integers(0, 2**74 - 1).map(
    lambda n: names.CommandId(
        f"{n >> 42:08x}-{n >> 26 & 0xFFFF:04x}-7{n >> 14 & 0xFFF:03x}-8{n & 0xFFF:03x}-{n % 2**48:012x}"
    )
)
wholes = st.integers(0, 2**53 - 1)
words = st.from_regex(names.DOTTED_NAME, fullmatch=True).filter(names.is_dotted)
agents = st.from_regex(r"[A-Za-z0-9_-]{8,64}", fullmatch=True).filter(str.isascii)
correlations = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
content_types = st.sampled_from([wire.JSON, "text/plain; charset=utf-8", "application/octet-stream", "a/b"])
traces = st.none() | st.just("00-0123456789abcdef0123456789abcdef-0123456789abcdef-01")
bodies = st.binary(max_size=300)
reasons = st.none() | st.text(min_size=1, max_size=wire.MAX_REASON)

commands = st.builds(
    wire.Command,
    id=ids,
    name=words,
    body=bodies,
    content_type=content_types,
    not_after=wholes,
    response_timeout=wholes,
    issuer=st.text(max_size=wire.MAX_ISSUER),
    seq=wholes,
    attempt=wholes,
    claim=st.booleans(),
    generation=wholes,
    sig=st.text(max_size=200),
    sig_kid=st.text(max_size=100),
    at=wholes,
    traceparent=traces,
)
receipts = st.builds(wire.Receipt, ids, agents, st.sampled_from(["received", "running"]), wholes, reasons)
outcomes = st.builds(
    wire.Outcome,
    ids,
    agents,
    st.sampled_from(["succeeded", "failed", "rejected"]),
    reasons,
    bodies,
    content_types,
    wholes,
)
claims = st.builds(
    wire.Claim, correlations, agents, st.lists(ids, min_size=1, max_size=wire.MAX_CLAIMS).map(tuple), wholes
)
claim_answers = st.builds(
    wire.ClaimAnswer,
    correlations,
    st.lists(ids, max_size=5).map(tuple),
    st.dictionaries(ids, st.text(max_size=wire.MAX_REASON), max_size=5),
    wholes,
)
hellos = st.builds(wire.Hello, correlations, agents, st.text(max_size=64), wholes, wholes)
news = st.lists(st.text(max_size=50), max_size=8).map(tuple)
welcomes = st.builds(wire.Welcome, correlations, wholes, st.text(max_size=64), st.text(max_size=16), news)
readings = st.builds(wire.Reading, correlations, bodies, content_types, wholes, st.none() | wholes, traces)

DECODERS: list[Callable[[Message], object]] = [
    wire.decode_command,
    wire.decode_receipt,
    wire.decode_outcome,
    wire.decode_claim,
    wire.decode_claim_answer,
    wire.decode_hello,
    wire.decode_welcome,
    wire.decode_reading,
]
TYPES = ["command", "receipt", "outcome", "claim", "claim-answer", "hello", "welcome", "telemetry"]


@given(commands, wholes)
def test_a_command_comes_back(command: wire.Command, now: int) -> None:
    message = wire.encode_command(command, now)
    assert wire.decode_command(message) == command
    assert message.persistent
    assert message.expiration_ms == max(command.not_after - now, 0)


@given(receipts)
def test_a_receipt_comes_back(receipt: wire.Receipt) -> None:
    assert wire.decode_receipt(wire.encode_receipt(receipt, DEVICE)) == receipt


@given(outcomes)
def test_an_outcome_comes_back(outcome: wire.Outcome) -> None:
    message = wire.encode_outcome(outcome, DEVICE)
    assert wire.decode_outcome(message) == outcome
    assert message.user_id == DEVICE


@given(claims)
def test_a_claim_comes_back(claim: wire.Claim) -> None:
    assert wire.decode_claim(wire.encode_claim(claim, DEVICE)) == claim


@given(claim_answers)
def test_a_claims_answer_comes_back(answer: wire.ClaimAnswer) -> None:
    assert wire.decode_claim_answer(wire.encode_claim_answer(answer)) == answer


@given(hellos)
def test_a_hello_comes_back(hello: wire.Hello) -> None:
    assert wire.decode_hello(wire.encode_hello(hello, DEVICE)) == hello


@given(welcomes)
def test_a_welcome_comes_back(welcome: wire.Welcome) -> None:
    assert wire.decode_welcome(wire.encode_welcome(welcome)) == welcome


@given(readings)
def test_a_reading_comes_back(reading: wire.Reading) -> None:
    assert wire.decode_reading(wire.encode_reading(reading, DEVICE)) == reading


@given(st.text(min_size=wire.MAX_REASON, max_size=2 * wire.MAX_REASON))
def test_a_long_reason_is_cut(reason: str) -> None:
    outcome = wire.Outcome(ID, "agent-0001", "failed", reason, b"", wire.JSON, 0)
    assert wire.decode_outcome(wire.encode_outcome(outcome, DEVICE)).reason == reason[: wire.MAX_REASON]


# ---- Anything else -----------------------------------------------------------------------------------

field_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
known_headers = st.sampled_from(
    [
        "v",
        "at",
        "agent",
        "state",
        "status",
        "reason",
        "name",
        "not-after",
        "response-timeout",
        "issuer",
        "seq",
        "attempt",
        "claim",
        "generation",
        "sig",
        "sig-kid",
        "traceparent",
        "progress",
        "agent-version",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | ids,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | ids, inner, max_size=4),
    max_leaves=8,
)
json_bodies = st.one_of(
    json_values,
    st.fixed_dictionaries({}, optional={"granted": json_values, "refused": json_values, "time": json_values}),
    st.fixed_dictionaries({}, optional={"incarnation": json_values, "contract": json_values, "time": json_values}),
).map(lambda value: json.dumps(value).encode())
optional_text = st.none() | st.text(max_size=80) | correlations | ids
messages = st.builds(
    Message,
    type=st.none() | st.sampled_from([*TYPES, guard.UNDECODABLE]) | st.text(max_size=10),
    headers=st.dictionaries(known_headers | st.text(max_size=5), field_values, max_size=10).flatmap(
        lambda found: st.sampled_from([found, {**found, "v": wire.VERSION}])
    ),
    body=bodies | json_bodies,
    content_type=st.none() | st.text(max_size=20) | content_types,
    message_id=optional_text,
    correlation_id=optional_text,
    reply_to=optional_text,
    user_id=optional_text,
    expiration_ms=st.none() | st.integers(),
)


def only_malformed(message: Message) -> None:
    for decode in DECODERS:
        with contextlib.suppress(Malformed):
            decode(message)


@settings(max_examples=200, deadline=None)
@given(messages)
@example(Message("claim", {"v": "1.0", "at": 0, "agent": "a" * 8}, b"[" * 100_000, correlation_id="c"))
@example(Message("claim", {"v": "1.0", "at": 0, "agent": "a" * 8}, b"1" * 100_000, correlation_id="c"))
@example(Message("welcome", {"v": "1.0", "at": 0}, b'{"time": 1e999}', correlation_id="c"))
@example(Message("welcome", {"v": "1.0", "at": 0}, b"\xff\xfe{", correlation_id="c"))
@example(Message("welcome", {"v": "\u0661.\u0660", "at": 0}, b"{}", correlation_id="c"))
@example(Message("receipt", {"v": 1.0}))
def test_only_malformed_escapes(message: Message) -> None:
    only_malformed(message)


encoded = st.one_of(
    commands.map(lambda command: wire.encode_command(command, 0)),
    receipts.map(lambda receipt: wire.encode_receipt(receipt, DEVICE)),
    outcomes.map(lambda outcome: wire.encode_outcome(outcome, DEVICE)),
    claims.map(lambda claim: wire.encode_claim(claim, DEVICE)),
    claim_answers.map(wire.encode_claim_answer),
    hellos.map(lambda hello: wire.encode_hello(hello, DEVICE)),
    welcomes.map(wire.encode_welcome),
    readings.map(lambda reading: wire.encode_reading(reading, DEVICE)),
)


@st.composite
def almost(draw: st.DrawFn) -> Message:
    """A message as the contract wants it, but for one thing."""
    message = draw(encoded)
    match draw(st.sampled_from(["header", "drop", "property", "body"])):
        case "header":
            return dataclasses.replace(message, headers={**message.headers, draw(known_headers): draw(field_values)})
        case "drop":
            dropped = draw(st.sampled_from(sorted(message.headers)))
            return dataclasses.replace(message, headers={k: v for k, v in message.headers.items() if k != dropped})
        case "property":
            which = draw(st.sampled_from(["message_id", "correlation_id", "content_type", "type"]))
            changed: dict[str, Any] = {which: draw(optional_text)}
            return dataclasses.replace(message, **changed)
        case _:
            return dataclasses.replace(message, body=draw(bodies | json_bodies))


@settings(max_examples=200, deadline=None)
@given(almost())
def test_only_malformed_escapes_from_what_is_almost_right(message: Message) -> None:
    only_malformed(message)


def refusing(reason: str) -> Message:
    body = f'{{"granted": [], "refused": {{"{ID}": {reason}}}, "time": 0}}'.encode()
    return Message("claim-answer", {"v": wire.VERSION, "at": 0}, body, wire.JSON, correlation_id="c")


@pytest.mark.parametrize("depth", [10, 100, 300, 400, 500, 700, 900, 970, 990, 2_000, 20_000])
def test_a_deeply_nested_refusal_is_no_recursion_error(depth: int) -> None:
    only_malformed(refusing("[" * depth + "]" * depth))


# ---- Single refusals ---------------------------------------------------------------------------------


def test_each_decoder_refuses_the_others_messages() -> None:
    message = wire.encode_receipt(wire.Receipt(ID, "agent-0001", "running", 5), DEVICE)
    for decode in DECODERS:
        if decode is not wire.decode_receipt:
            with pytest.raises(Malformed):
                decode(message)


@pytest.mark.parametrize("version", [None, 1, "", "1", "1.", "2", "1.0.0", "١.٠", "1.0\n", "99999.0"])
def test_a_version_that_is_none_is_malformed(version: object) -> None:
    for decode, kind in zip(DECODERS, TYPES, strict=True):
        with pytest.raises(Malformed) as caught:
            decode(Message(kind, {"v": version, "at": 0}))
        assert not isinstance(caught.value, wire.Unsupported)


def test_another_major_version_is_unsupported_and_another_minor_one_is_not() -> None:
    message = wire.encode_receipt(wire.Receipt(ID, "agent-0001", "running", 5), DEVICE)
    with pytest.raises(wire.Unsupported):
        wire.decode_receipt(dataclasses.replace(message, headers={**message.headers, "v": "2.0"}))
    wire.decode_receipt(dataclasses.replace(message, headers={**message.headers, "v": "1.7"}))


def test_undecodable_mail_says_why() -> None:
    for decode in DECODERS:
        with pytest.raises(Malformed, match=r"undecodable: text that is not UTF-8"):
            decode(Message(guard.UNDECODABLE, {guard.REASON: "text that is not UTF-8"}))


@pytest.mark.parametrize(
    "text",
    [
        "text",
        "text/",
        "/plain",
        "text/plain\r\nX: y",
        "text/plain\n",
        "text/pl ain",
        "a/b;c",
        "ä/b",
        "a/b; c=d\x00",
        "",
        "a/" + "b" * wire.MAX_CONTENT_TYPE,
    ],
)
def test_what_is_no_content_type(text: str) -> None:
    assert not wire.is_content_type(text)


def test_a_body_over_the_limit_is_malformed() -> None:
    message = wire.encode_reading(wire.Reading("r", b"." * wire.MAX_BODY, "a/b", 0), DEVICE)
    wire.decode_reading(message)
    with pytest.raises(Malformed):
        wire.decode_reading(dataclasses.replace(message, body=message.body + b"."))


@pytest.mark.parametrize("listed", [[], [ID] * (wire.MAX_CLAIMS + 1), [1], [None], ["x"], {}, ID, [ID + "\n"]])
def test_a_claim_lists_one_to_fifty_ids(listed: object) -> None:
    message = wire.encode_claim(wire.Claim("c", "agent-0001", (ID,), 0), DEVICE)
    with pytest.raises(Malformed):
        wire.decode_claim(dataclasses.replace(message, body=json.dumps(listed).encode()))


COMMAND = wire.Command(
    id=ID,
    name="door.close",
    body=b"{}",
    content_type=wire.JSON,
    not_after=10,
    response_timeout=30,
    issuer="billing",
    seq=1,
    attempt=1,
    claim=False,
    generation=1,
    sig="",
    sig_kid="",
    at=5,
)


@pytest.mark.parametrize(
    "change",
    [
        {"id": OTHER},
        {"name": "door.open"},
        {"body": b"{ }"},
        {"content_type": "a/b"},
        {"not_after": 11},
        {"issuer": "bill"},
        {"claim": True},
        {"generation": 2},
        {"name": 'x","y'},
    ],
    ids=str,
)
def test_a_signature_covers_what_a_command_means(change: dict[str, Any]) -> None:
    assert wire.signing_input(COMMAND, DEVICE) != wire.signing_input(dataclasses.replace(COMMAND, **change), DEVICE)


def test_a_signature_serves_every_attempt_and_no_other_device() -> None:
    again = dataclasses.replace(COMMAND, seq=9, attempt=4, at=9, traceparent=None)
    assert wire.signing_input(COMMAND, DEVICE) == wire.signing_input(again, DEVICE)
    assert wire.signing_input(COMMAND, DEVICE) != wire.signing_input(COMMAND, names.device("garage-8"))
