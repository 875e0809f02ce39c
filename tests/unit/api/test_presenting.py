"""The document of a command: as the contract shows it, and never unprintable."""

import json

from hypothesis import given
from hypothesis import strategies as st

from api import schemas
from fabric import presenting
from fabric.command import Command, Entry, Outcome, State
from fabric.model import TimelineRow
from topology.names import CommandId, DeviceId

ID = CommandId("0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e")
AT = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z


def command(
    body: bytes = b'{"speed":1}', content_type: str = "application/json", outcome: Outcome | None = None
) -> Command:
    return Command(
        id=ID, device=DeviceId("garage-7"), generation=1, seq=12, name="door.close", body=body,
        content_type=content_type, issuer="billing", claim=False, supersedes=None, accepted_at=AT,
        deadline=AT + 60_000_000, response_timeout=30_000_000, sig="", sig_kid="", traceparent=None,
        state=State.SUCCEEDED if outcome else State.QUEUED, settled_at=AT + 1_500_001 if outcome else None,
        outcome=outcome,
    )  # fmt: skip


TIMELINE = [TimelineRow(Entry(State.ACCEPTED, AT, "ledger", None, changed=True), 1, 1)]


def test_it_is_the_contracts_document() -> None:
    done = Outcome(State.SUCCEEDED, None, "application/json", b'{"door":"closed"}')
    assert list(presenting.command(command(outcome=done), TIMELINE).items()) == [
        ("id", ID),
        ("device", "garage-7"),
        ("name", "door.close"),
        ("args", {"speed": 1}),
        ("state", "succeeded"),
        ("reason", None),
        ("late", False),
        ("issuer", "billing"),
        ("seq", 12),
        ("attempt", 1),
        ("accepted_at", "2026-01-01T00:00:00.000000Z"),
        ("deadline", "2026-01-01T00:01:00.000000Z"),
        ("settled_at", "2026-01-01T00:00:01.500001Z"),
        ("response_timeout", 30),
        ("claim", False),
        ("supersedes", None),
        ("traceparent", None),
        ("timeline", [{"state": "accepted", "at": "2026-01-01T00:00:00.000000Z", "evidence": "ledger"}]),
        (
            "outcome",
            {"status": "succeeded", "reason": None, "content_type": "application/json", "result": {"door": "closed"}},
        ),
    ]


@given(st.binary(max_size=50), st.sampled_from(["application/json", "image/png", "application/json; charset=utf-8"]))
def test_whatever_a_device_answered_is_a_valid_document(body: bytes, content_type: str) -> None:
    shown = presenting.command(command(body, content_type, Outcome(State.FAILED, "x", content_type, body)), TIMELINE)
    text = json.dumps(shown, allow_nan=False).encode("ascii")
    schemas.CommandDocument.model_validate_json(text)


def test_bytes_are_base64_beside_their_type() -> None:
    shown = presenting.command(command(b"\xff", "image/png"), [])
    assert shown["args"] == {"content_type": "image/png", "base64": "/w=="}


def test_json_of_unclear_meaning_is_shown_as_its_bytes() -> None:
    for body in (b"NaN", b'{"a":1,"a":2}', b'"\\ud800"', b"[" * 5000):
        assert set(presenting.typed("application/json", body, "value")["value"]) == {"base64"}  # type: ignore[call-overload]


def test_in_lists_large_bodies_are_links() -> None:
    large = json.dumps("x" * 5000).encode()
    done = Outcome(State.SUCCEEDED, None, "application/json", large)
    shown = presenting.command(command(large, outcome=done), [], brief=True)
    link = {"href": f"/v1/commands/{ID}"}
    assert shown["args"] == link
    assert shown["outcome"]["result"] == link  # type: ignore[index]
    assert presenting.command(command(large), [])["args"] == "x" * 5000


@given(st.integers(0, 2**53 * 1000))
def test_every_time_a_device_may_say_can_be_shown(at: int) -> None:
    assert schemas.parse_time(presenting.time(at)) == min(at, 253_402_300_799_999_999) // 1000


def test_durations_are_seconds() -> None:
    assert [presenting.seconds(each) for each in (30_000_000, 1_500_000, 1)] == [30, 1.5, 1e-6]
