"""How long an agent waits before it connects again."""

from hypothesis import given
from hypothesis import strategies as st

from device_agent.backoff import CROWDED_AFTER, FIRST, LONGEST, LONGEST_CROWDED, Backoff

QUICK = CROWDED_AFTER / 2


def bounds(took: float | None, many: int) -> list[float]:
    tried = Backoff()
    return [tried.wait(took, 1.0) for _ in range(many)]


@given(st.lists(st.none() | st.floats(0, 60), max_size=40), st.floats(0, 1))
def test_it_is_bounded_and_the_first_is_quick(attempts: list[float | None], part: float) -> None:
    tried = Backoff()
    waits = [tried.wait(took, part) for took in attempts]
    assert all(0 <= wait <= LONGEST_CROWDED for wait in waits)
    assert all(wait <= FIRST for wait in waits[:1])
    tried.served()
    assert tried.wait(None, part) <= FIRST


def test_who_reaches_nobody_or_is_refused_at_once_waits_half_a_minute_at_most() -> None:
    for took in (None, QUICK):
        assert bounds(took, 10) == [0.5, 1, 2, 4, 8, 16, LONGEST, LONGEST, LONGEST, LONGEST]


def test_who_is_not_served_within_a_while_makes_room() -> None:
    assert bounds(CROWDED_AFTER, 12) == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, LONGEST_CROWDED, LONGEST_CROWDED]
    away = Backoff()
    for _ in range(20):
        away.wait(None, 1.0)
    assert [away.wait(9.0, 1.0) for _ in range(5)] == [60, 120, 240, 300, 300], "not longer for the time before"
    assert away.wait(None, 1.0) == LONGEST_CROWDED, "until it was served"
    away.served()
    assert bounds(None, 1) == [away.wait(9.0, 1.0)] == [FIRST]
