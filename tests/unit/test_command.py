"""The transition table: every state × input, and every sequence of what can happen."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric import command as life
from fabric.command import ANSWERED, SETTLED, TABLE, WAITING, Command, Event, Input, State, Verdict
from topology.names import CommandId, DeviceId

T0 = 1_760_000_000_000_000
SECOND = 1_000_000
DEADLINE = T0 + 60 * SECOND

LATE = {
    # Terminal → terminal only along the table's late entries.
    *((settled, State.UNANSWERED) for settled in (State.EXPIRED, State.CANCELLED, State.UNDELIVERABLE)),
    *(
        (settled, answer)
        for settled in (State.EXPIRED, State.CANCELLED, State.UNDELIVERABLE, State.UNANSWERED)
        for answer in (State.SUCCEEDED, State.FAILED)
    ),
    (State.UNANSWERED, State.REJECTED),
}


def fresh(**changes: object) -> Command:
    draft = Command(
        id=CommandId("0199c0de-0000-7000-8000-000000000001"),
        device=DeviceId("garage-7"),
        generation=1,
        seq=1,
        name="door.close",
        body=b"{}",
        content_type="application/json",
        issuer="billing",
        claim=False,
        supersedes=None,
        accepted_at=T0,
        deadline=DEADLINE,
        response_timeout=30 * SECOND,
        sig="",
        sig_kid="",
        traceparent=None,
    )
    return replace(life.accept(draft)[0], **changes)  # type: ignore[arg-type]  # test data


agents = st.sampled_from(["agent-aaaa", "agent-bbbb"])
attempts = st.integers(1, 4)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(life.Confirmed, attempts),
    st.builds(life.NotConfirmed, attempts, st.just("nack")),
    st.builds(life.Returned, attempts),
    st.builds(
        life.DeadLettered, attempts, st.sampled_from(["maxlen", "expired", "rejected", "delivery_limit"]), st.booleans()
    ),
    st.builds(life.Receipted, agents, st.booleans(), st.none() | st.just("half way")),
    st.builds(life.Claimed, agents),
    st.builds(
        life.Answered,
        agents,
        st.sampled_from([State.SUCCEEDED, State.FAILED, State.REJECTED]),
        st.sampled_from([None, "expired", "jammed"]),
        st.just("application/json"),
        st.sampled_from([b"1", b"2"]),
    ),
    st.builds(life.Cancelled, st.just("issuer")),
    st.just(life.DeadlinePassed()),
    st.just(life.ResponseDue()),
    st.builds(life.Republished, attempts, st.just("retry")),
    st.just(life.DeviceDeleted()),
)
histories = st.lists(st.tuples(events, st.integers(0, 20 * SECOND)), max_size=30)


def run(command: Command, history: list[tuple[Event, int]]) -> list[tuple[Command, Event, life.Step, int]]:
    now, seen = T0, []
    for event, later in history:
        now += later
        step = life.step(command, event, now, jitter=0.5)
        seen.append((command, event, step, now))
        command = step.command
    return seen


def test_the_table_covers_every_state_and_input() -> None:
    assert set(TABLE) == {(state, given) for state in State for given in Input}


@given(histories, st.booleans())
@settings(max_examples=200)
def test_a_settled_command_moves_only_along_the_late_entries(history: list[tuple[Event, int]], claim: bool) -> None:
    for before, _, step, _ in run(fresh(claim=claim), history):
        after = step.command
        if before.state in SETTLED and after.state is not before.state:
            assert (before.state, after.state) in LATE
            assert after.late
        assert after.late or not before.late, "late is never cleared"


@given(histories, st.booleans())
@settings(max_examples=200)
def test_each_settlement_is_announced_once(history: list[tuple[Event, int]], claim: bool) -> None:
    announced = []
    for before, _, step, _ in run(fresh(claim=claim), history):
        assert step.settled == (step.command.state is not before.state and step.command.state in SETTLED)
        if step.settled:
            announced.append(step.command.state)
            assert step.entry is not None
            assert step.entry.changed
    assert len(announced) == len(set(announced)), "no state is announced twice"
    assert len(announced) <= 3, "settled, in doubt, answered"


@given(histories, st.booleans())
@settings(max_examples=200)
def test_bookkeeping_follows_the_state(history: list[tuple[Event, int]], claim: bool) -> None:
    for before, event, step, now in run(fresh(claim=claim), history):
        after = step.command
        assert (after.settled_at is not None) == (after.state in SETTLED)
        assert (after.outcome is not None) == (after.state in ANSWERED)
        assert after.due == (
            after.deadline if after.state in WAITING else after.response_due if after.state in life.PICKED_UP else None
        )
        if after.state in life.PICKED_UP:
            assert after.holder is not None
            assert after.response_due is not None
        if after.state is State.ACCEPTED:
            assert after.publish_due is not None, "an accepted command is always going to be published"
        assert after.rows <= life.TIMELINE_LIMIT + 3
        assert len(after.copies) <= 64
        if after != before:
            assert after.version == before.version + 1
        if isinstance(event, life.Republished) and after.attempt != before.attempt:
            assert now < after.deadline, "no retry at or after the deadline"


@given(histories)
@settings(max_examples=150)
def test_the_same_evidence_again_changes_no_state(history: list[tuple[Event, int]]) -> None:
    for _, event, step, now in run(fresh(), history):
        if step.verdict is Verdict.REDECLARE or isinstance(event, life.Claimed | life.DeadLettered):
            continue
        again = life.step(step.command, event, now, jitter=0.5)
        moved_by_pick_up = isinstance(event, life.Receipted | life.ResponseDue | life.Answered)
        assert again.command.state is step.command.state or moved_by_pick_up
        assert not (again.settled and step.settled)


@given(histories, agents, agents)
@settings(max_examples=150)
def test_only_one_agent_is_ever_granted(history: list[tuple[Event, int]], one: str, other: str) -> None:
    granted = set()
    for _, event, step, now in run(fresh(claim=True), history):
        if isinstance(event, life.Claimed) and step.verdict is Verdict.GRANT:
            granted.add(event.agent)
            assert step.command.holder == event.agent
            assert now < DEADLINE or step.command.response_due is not None
    assert len(granted) <= 1


def test_a_refused_claim_says_what_the_ledger_says() -> None:
    cancelled = life.step(fresh(), life.Cancelled("issuer"), T0).command
    step = life.step(cancelled, life.Claimed("agent-aaaa"), T0)
    assert (step.verdict, step.command.state) == (Verdict.REFUSE, State.CANCELLED)


def test_a_claim_at_the_deadline_expires_the_command() -> None:
    step = life.step(fresh(), life.Claimed("agent-aaaa"), DEADLINE)
    assert (step.verdict, step.command.state, step.settled) == (Verdict.REFUSE, State.EXPIRED, True)


def test_undeliverable_needs_the_last_copy_to_be_dead() -> None:
    queued = life.step(fresh(), life.NotConfirmed(1, "time-out"), T0).command
    second = life.step(queued, life.Republished(1, "retry"), T0).command
    assert second.copies == (1, 2)
    one_dead = life.step(second, life.DeadLettered(2, "maxlen", True), T0).command
    assert one_dead.state is State.ACCEPTED
    assert life.step(one_dead, life.DeadLettered(1, "maxlen", True), T0).command.state is State.UNDELIVERABLE


def test_attempts_beyond_memory_count_as_possible_copies() -> None:
    command = fresh()
    for number in range(1, 100):
        command = life.step(command, life.Republished(number, "retry"), T0).command
    for number in range(1, 101):
        command = life.step(command, life.DeadLettered(number, "maxlen", True), T0).command
    assert command.state is State.ACCEPTED, "what is no longer remembered may still be in the mailbox"


def test_a_republish_is_made_by_one_worker_only() -> None:
    first = life.step(fresh(), life.Republished(1, "retry"), T0)
    second = life.step(first.command, life.Republished(1, "retry"), T0)
    assert (first.verdict, second.verdict) == (Verdict.RETRY, Verdict.NONE)
    assert second.command.attempt == 2


def test_dead_expired_counts_only_while_deadlines_may_be_announced() -> None:
    queued = life.step(fresh(), life.Confirmed(1), T0).command
    held = life.step(queued, life.DeadLettered(1, "expired", False), DEADLINE)
    assert held.command.state is State.QUEUED
    assert life.step(held.command, life.DeadLettered(1, "expired", True), DEADLINE).command.state is State.EXPIRED


def test_a_device_that_says_expired_is_believed_after_the_deadline_only() -> None:
    said = life.Answered("agent-aaaa", State.REJECTED, "expired", "application/json", b"")
    assert life.step(fresh(), said, DEADLINE).command.state is State.EXPIRED
    assert life.step(fresh(), said, DEADLINE - 1).command.state is State.REJECTED


def test_a_late_outcome_wins_over_the_clock_and_is_marked() -> None:
    expired = life.step(fresh(), life.DeadlinePassed(), DEADLINE).command
    doubted = life.step(expired, life.Receipted("agent-aaaa", True), DEADLINE + SECOND)
    assert (doubted.command.state, doubted.command.late, doubted.settled) == (State.UNANSWERED, True, True)
    done = life.step(
        doubted.command,
        life.Answered("agent-aaaa", State.SUCCEEDED, None, "application/json", b"1"),
        DEADLINE + 2 * SECOND,
    )
    assert (done.command.state, done.command.late, done.settled) == (State.SUCCEEDED, True, True)


def test_a_second_different_outcome_is_a_conflict_and_changes_nothing() -> None:
    said = life.Answered("agent-aaaa", State.SUCCEEDED, None, "application/json", b"1")
    done = life.step(fresh(), said, T0).command
    assert life.step(done, said, T0).verdict is Verdict.NONE
    other = life.step(done, replace(said, status=State.FAILED), T0)
    assert (other.verdict, other.command.state) == (Verdict.CONFLICT, State.SUCCEEDED)


def test_a_flood_of_evidence_leaves_a_bounded_timeline() -> None:
    command = life.step(fresh(), life.Receipted("agent-aaaa", True), T0).command
    for number in range(500):
        command = life.step(command, life.Receipted("agent-aaaa", True, f"{number}"), T0).command
    assert command.rows == life.TIMELINE_LIMIT
    assert command.progress == "499"
