"""The pick-up rules: COMMANDS.md, rules 1 to 5."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import pickup
from device_agent.journal import Entry, Interrupted, State
from topology import names, wire

ID = names.CommandId("0199c0de-0000-7000-8000-000000000001")
NOW = 1_800_000_000_000

COMMAND = wire.Command(
    id=ID,
    name="door.close",
    body=b"{}",
    content_type=wire.JSON,
    not_after=NOW + 60_000,
    response_timeout=30_000,
    issuer="billing",
    seq=1,
    attempt=1,
    claim=False,
    generation=1,
    sig="",
    sig_kid="",
    at=NOW - 5,
)


def decide(command: wire.Command = COMMAND, **changed: object) -> pickup.Decision:
    arguments: dict[str, object] = {
        "redelivered": False,
        "entry": None,
        "problem": None,
        "denied": None,
        "doubtful": False,
        "granted": False,
        "now": NOW,
    }
    return pickup.decide(command, **(arguments | changed))  # type: ignore[arg-type]  # the call checks them


def test_fresh_mail_runs_unclaimed() -> None:
    assert decide() == pickup.Run()


@pytest.mark.parametrize(
    ("command", "redelivered"),
    [
        (replace(COMMAND, claim=True), False),
        (COMMAND, True),
        (replace(COMMAND, attempt=2), False),
        (replace(COMMAND, at=NOW - 2_001), False),
    ],
    ids=["asked for", "redelivered", "second attempt", "older than 2 s"],
)
def test_stale_mail_is_claimed_first_and_runs_when_granted(command: wire.Command, redelivered: bool) -> None:
    assert decide(command, redelivered=redelivered) == pickup.Claim()
    assert decide(command, redelivered=redelivered, granted=True) == pickup.Run()


def test_mail_of_exactly_two_seconds_is_not_stale() -> None:
    assert decide(replace(COMMAND, at=NOW - 2_000)) == pickup.Run()


def test_expired_mail_is_answered_even_after_a_grant() -> None:
    late = replace(COMMAND, not_after=NOW)
    assert decide(late) == decide(late, granted=True) == pickup.Answer("expired")


def test_what_no_handler_takes_is_answered_without_a_claim() -> None:
    assert decide(replace(COMMAND, claim=True), problem="unknown-command") == pickup.Answer("unknown-command")


@pytest.mark.parametrize("state", list(State))
def test_journaled_mail_is_a_duplicate_whatever_became_of_it(state: State) -> None:
    assert decide(entry=Entry(ID, state), redelivered=True, now=NOW + 10**9) == pickup.Duplicate()


def test_refusals() -> None:
    assert pickup.refused("cancelled") == pickup.Refused(conflict=False)
    assert pickup.refused("taken") == pickup.Refused(conflict=True)
    assert pickup.refused("unanswered") == pickup.Answer("claim-refused")


@pytest.mark.parametrize("granted", [False, True])
def test_what_was_denied_is_not_run_whatever_the_fabric_says_and_the_same_is_said_again(granted: bool) -> None:
    assert decide(denied="malformed: x", granted=granted) == pickup.Answer("malformed: x")
    assert decide(denied="unsigned", granted=granted, now=NOW + 10**9) == pickup.Answer("unsigned")


def test_fresh_mail_is_claimed_while_something_denied_was_forgotten() -> None:
    assert decide(doubtful=True) == pickup.Claim()
    assert decide(doubtful=True, granted=True) == pickup.Run()


@pytest.mark.parametrize("entry", [None, *(Entry(ID, state) for state in State)])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("denied", [None, "unsigned"])
def test_unverified_mail_is_answered_once_and_never_beside_its_true_mail(
    entry: Entry | None, held: bool, denied: str | None
) -> None:
    says = entry is None and not held and denied is None
    expected = pickup.Answer("unsigned") if says else pickup.Silence()
    assert pickup.unverified("unsigned", held=held, entry=entry, denied=denied) == expected


def test_what_was_denied_is_remembered_within_bounds() -> None:
    def id(number: int) -> names.CommandId:
        return names.CommandId(f"0199c0de-0000-7000-8000-{number:012x}")

    denied = pickup.Denied()
    for number in range(pickup.MAX_DENIED):
        denied.add(id(number), f"reason {number}", NOW)
    assert denied.said(id(0)) == "reason 0"
    assert denied.said(id(pickup.MAX_DENIED)) is None
    assert not denied.forgot(NOW)
    denied.add(id(pickup.MAX_DENIED), "unsigned", NOW)
    assert denied.said(id(0)) is None
    assert denied.said(id(1)) == "reason 1"
    assert denied.said(id(pickup.MAX_DENIED)) == "unsigned"
    assert denied.forgot(NOW)
    assert denied.forgot(NOW + pickup.DOUBT_FOR - 1)
    assert not denied.forgot(NOW + pickup.DOUBT_FOR)


COMMANDS = st.builds(
    replace,
    st.just(COMMAND),
    claim=st.booleans(),
    attempt=st.integers(1, 3),
    at=st.integers(NOW - 10_000, NOW),
    not_after=st.integers(NOW - 10_000, NOW + 10_000),
)


@given(
    COMMANDS,
    st.booleans(),
    st.none() | st.builds(Entry, st.just(ID), st.sampled_from(State)),
    st.none() | st.just("unknown-command"),
    st.none() | st.just("unsigned"),
    st.booleans(),
    st.booleans(),
)
def test_never_late_never_twice_never_denied_never_stale_without_a_grant(
    command: wire.Command,
    redelivered: bool,
    entry: Entry | None,
    problem: str | None,
    denied: str | None,
    doubtful: bool,
    granted: bool,
) -> None:
    decision = decide(
        command,
        redelivered=redelivered,
        entry=entry,
        problem=problem,
        denied=denied,
        doubtful=doubtful,
        granted=granted,
    )
    if isinstance(decision, pickup.Run):
        assert entry is None
        assert problem is None
        assert denied is None
        assert command.not_after > NOW
        assert granted or not (doubtful or pickup.must_claim(command, redelivered=redelivered, now=NOW))
    if isinstance(decision, pickup.Claim):
        assert denied is None
        assert not granted
        assert command.not_after > NOW
    if entry is not None:
        assert isinstance(decision, pickup.Duplicate)


def interrupted(reruns: int = 0, request: wire.Command | None = COMMAND, not_after: int = NOW + 1) -> Interrupted:
    return Interrupted(ID, "door.close", not_after, NOW - 1_000, reruns, request)


def test_after_a_crash_an_unsafe_command_is_in_doubt() -> None:
    assert pickup.after_crash(interrupted(request=None), now=NOW) == pickup.Doubt()


def test_after_a_crash_an_idempotent_command_runs_again_three_times_at_most() -> None:
    assert [pickup.after_crash(interrupted(reruns), now=NOW) for reruns in range(5)] == [
        *[pickup.Run()] * 3,
        *[pickup.Fail("interrupted")] * 2,
    ]


def test_after_a_crash_nothing_runs_later_than_its_first_run_could_have_lasted() -> None:
    entry = interrupted(not_after=NOW)
    last = entry.started_at + COMMAND.response_timeout
    assert pickup.after_crash(entry, now=last - 1) == pickup.Run()
    assert pickup.after_crash(entry, now=last) == pickup.Fail("interrupted")


def test_junk_is_answered_only_if_it_names_a_command() -> None:
    assert pickup.junk(ID, wire.Malformed("x")) == (ID, "malformed")
    assert pickup.junk(ID, wire.Unsupported("x")) == (ID, "unsupported")
    assert pickup.junk("not an id", wire.Malformed("x")) is None
    assert pickup.junk(None, wire.Malformed("x")) is None
