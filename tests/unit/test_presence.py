"""What sessions become of events that are late, repeated or lost, and presence of the sessions."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.identity.meters import SECOND, Limits, Meter, spend
from fabric.presence import (
    AGE,
    LISTED_EVERY,
    METERED,
    REPLACED_FOR,
    SETTLED_AFTER,
    STATISTICS_EVERY,
    Change,
    Closed,
    Life,
    Listed,
    Lost,
    Opened,
    Session,
    compare,
    creation,
    fold,
    outlived,
    pause_after,
    recent,
    surplus,
)
from topology.names import DeviceId

LIMITS = Limits()
PUMP, DOOR = DeviceId("pump-17"), DeviceId("door-1")
NODE, CELL = "rabbit@one", "local"


def session(number: int, device: DeviceId = PUMP, opened_at: int | None = None) -> Session:
    name = f"10.0.0.7:{40_000 + number} -> 10.0.0.1:5671"
    return Session(device, CELL, NODE, name, number if opened_at is None else opened_at, f"<pid.{number}>", number)


def closed(of: Session, at: int = 100) -> Closed:
    return Closed(of.node, of.name, of.pid or "", at)


def told(changes: list[Change], known: list[Session] | None = None, *, connected: bool = False) -> list[str]:
    return [event.kind.partition(".")[2] for event in fold({PUMP: connected}, known or [], changes).events]


OLD, NEW = session(1), session(2)


def test_a_late_end_of_an_old_connection_leaves_a_live_device_alone() -> None:
    folded = fold({PUMP: False}, [], [Opened(OLD, 1), Opened(NEW, 2), closed(OLD, 3)])
    assert folded.presence == {PUMP: (True, 1)}
    assert [event.kind for event in folded.events] == ["device.connected"]
    assert folded.live == {PUMP: 1}
    assert {it.epoch: it.ended_at for it in folded.fresh} == {OLD.epoch: 3, NEW.epoch: None}


def test_hearing_it_again_changes_nothing() -> None:
    once: list[Change] = [Opened(OLD, 1), closed(OLD, 2)]
    assert told(once * 2) == ["connected", "disconnected"]
    ended = replace(OLD, ended_at=2)
    assert fold({PUMP: False}, [ended], [*once, Lost(OLD, 3)]).events == ()
    assert fold({PUMP: False}, [ended], once).changed == ()


def test_the_same_name_again_is_another_connection() -> None:
    again = replace(OLD, opened_at=50, pid="<pid.50>")
    assert told([Opened(OLD, 1), closed(OLD, 2), Opened(again, 50), closed(OLD, 51)]) == [
        "connected", "disconnected", "connected",
    ]  # fmt: skip


def test_one_found_in_the_listing_is_ended_by_its_event() -> None:
    found = replace(OLD, pid=None)
    assert told([closed(OLD)], [found], connected=True) == ["disconnected"]
    folded = fold({PUMP: True}, [found], [Opened(OLD, 1)])
    assert folded.changed == (OLD,), "its process becomes known"
    assert folded.events == ()


def test_a_replaced_one_ends_with_the_newcomers_session_and_says_nothing() -> None:
    folded = fold({PUMP: True}, [replace(OLD, replaced_at=2)], [Opened(NEW, 3)])
    assert folded.events == ()
    assert folded.live == {PUMP: 1}
    assert [it.ended_at for it in folded.changed] == [3]


def test_a_device_that_does_not_exist_has_no_sessions() -> None:
    folded = fold({}, [], [Opened(OLD, 1), closed(OLD), Lost(OLD, 3)])
    assert (folded.fresh, folded.changed, folded.events) == ((), (), ())
    assert fold({}, [OLD], [closed(OLD)]).changed == ()


@given(st.lists(st.tuples(st.sampled_from([session(n, d) for n in range(4) for d in (PUMP, DOOR)]), st.booleans())))
def test_presence_is_whether_a_session_lives_and_each_change_is_told_once(steps: list[tuple[Session, bool]]) -> None:
    # The two devices have sessions of the same names, which can't be at a time: give each its own.
    steps = [(replace(it, name=f"{it.device} {it.name}"), opens) for it, opens in steps]
    changes: list[Change] = [Opened(it, at) if opens else closed(it, at) for at, (it, opens) in enumerate(steps)]
    folded = fold({PUMP: False, DOOR: False}, [], changes)
    for device in (PUMP, DOOR):
        live = [it for it in folded.fresh if it.device == device and it.live]
        kinds = [event.kind for event in folded.events if event.device == device]
        assert kinds == (["device.connected", "device.disconnected"] * len(kinds))[: len(kinds)]
        assert bool(live) is (len(kinds) % 2 == 1)
        assert folded.live[device] == len(live)
        assert folded.presence.get(device, (False, 0))[0] is bool(live)
    # In two parts it is the same.
    half = fold({PUMP: False, DOOR: False}, [], changes[: len(changes) // 2])
    so_far = {PUMP: False, DOOR: False} | {id: is_ for id, (is_, _) in half.presence.items()}
    rest = fold(so_far, half.fresh, changes[len(changes) // 2 :])
    assert half.events + rest.events == folded.events


# ---- The listing -------------------------------------------------------------------------------------


def listed(of: Session) -> Listed:
    return Listed(of.device, of.node, of.name, of.opened_at, 0)


def test_what_the_listing_has_and_the_ledger_has_not_was_missed() -> None:
    changes, missing = compare(CELL, [OLD], [listed(OLD), listed(NEW)], (), 10)
    assert changes == [Opened(replace(NEW, pid=None, seen_at=10), NEW.opened_at)]
    assert missing == set()


def test_what_is_missing_in_it_twice_is_over() -> None:
    later = OLD.seen_at + SETTLED_AFTER + 1
    assert compare(CELL, [OLD], [], (), OLD.seen_at + SETTLED_AFTER) == ([], set()), "too young to be listed"
    changes, missing = compare(CELL, [OLD], [], (), later)
    assert (changes, missing) == ([], {OLD.epoch}), "the listing may be late, once"
    assert compare(CELL, [OLD], [], missing, later)[0] == [Lost(OLD, later)]


def test_a_replaced_one_whose_newcomer_did_not_come_is_over() -> None:
    replaced = replace(OLD, replaced_at=10)
    assert compare(CELL, [replaced], [listed(OLD)], (), 10 + REPLACED_FOR)[0] == []
    late = 11 + REPLACED_FOR
    assert compare(CELL, [replaced], [listed(OLD)], (), late)[0] == [Lost(replaced, late)]


# ---- A node that starts again ------------------------------------------------------------------------


def test_what_a_node_had_before_it_started_is_over() -> None:
    before, after = replace(OLD, pid="<node@one.100.7.0>"), replace(NEW, pid="<node@one.200.7.0>")
    elsewhere, unheard = replace(before, node="another"), replace(before, pid=None)
    life = Life(creation("<node@one.200.5.0>"), NEW.opened_at)
    assert outlived([before, after, elsewhere, unheard], {NODE: life}, 9) == [Lost(before, 9)]
    assert outlived([before], {}, 9) == []


def test_an_event_of_an_earlier_life_ends_nothing_of_a_later() -> None:
    after = replace(NEW, pid="<node@one.200.7.0>")
    assert outlived([after], {NODE: Life("100", OLD.opened_at)}, 9) == []


def test_what_does_not_say_which_life_it_is_of_ends_nothing() -> None:
    assert [creation(pid) for pid in ("", "<pid>", "<1.2>", "1.2.3")] == [None] * 4
    assert outlived([OLD], {NODE: Life("200", NEW.opened_at)}, 9) == []


# ---- What a listing costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(("took", "pause"), [(0.0, 10.0), (0.5, 10.0), (1.0, 20.0), (3.0, 60.0), (60.0, 60.0)])
def test_a_listing_that_takes_long_is_asked_for_less_often(took: float, pause: float) -> None:
    assert pause_after(took) == pause


@given(
    st.integers(SECOND * int(LISTED_EVERY), 120 * SECOND),
    st.integers(0, 2 * LIMITS.traffic),
    st.lists(st.integers(0, AGE), min_size=20, max_size=60),
)
def test_who_keeps_to_the_limit_is_within_it_whenever_the_listings_are(span: int, speed: int, ages: list[int]) -> None:
    rate, full_at, known, over = LIMITS.rates[Meter.TRAFFIC], 0, 0, False
    for turn, age in enumerate(ages, 1):
        told = max(known, turn * span - age)  # until when what it moved is in this listing
        after = spend(full_at, turn * span, rate, recent(speed * (told - known) // SECOND, span))
        over, known, full_at = over or after is None, told, full_at if after is None else after
    assert not over or speed > LIMITS.traffic


def test_who_is_over_the_limit_is_found_however_far_apart_the_listings_are() -> None:
    for span in (SECOND, 10 * SECOND, 20 * SECOND, 60 * SECOND):
        full_at: int | None = 0
        for turn in range(1, 61):
            full_at = spend(
                full_at, turn * span, LIMITS.rates[Meter.TRAFFIC], recent(2 * LIMITS.traffic * span // SECOND, span)
            )
            if full_at is None:
                break
        assert full_at is None, span


def test_all_but_the_newest_are_surplus() -> None:
    third, other = session(3), session(1, DOOR)
    assert surplus([NEW, third, OLD, other]) == [OLD, NEW]
    assert surplus([]) == surplus([OLD, other]) == []


# ---- What must agree ---------------------------------------------------------------------------------


def test_the_broker_is_asked_as_often_as_it_is_told_to_count() -> None:
    said = (Path(__file__).parents[2] / "deploy/rabbitmq/rabbitmq.conf").read_text()
    assert f"\ncollect_statistics_interval = {STATISTICS_EVERY // 1000}\n" in said
    rate = LIMITS.rates[Meter.TRAFFIC]
    assert rate.burst * rate.period // rate.units == METERED == int(LISTED_EVERY * SECOND) + AGE
