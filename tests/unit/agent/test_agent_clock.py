"""Fabric time, and how little a wall clock matters to it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.clock import FabricClock


class Boot:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_unknown_until_told() -> None:
    clock = FabricClock()
    assert clock.now() is None
    assert not clock.known
    assert clock.now_or(10**15) == 10**15
    assert abs(clock.now_or(0) - time.time() * 1000) < 5_000


def test_the_middle_of_the_round_trip_counts() -> None:
    boot = Boot()
    clock = FabricClock(boot)
    boot.now = 1_200.0
    clock.adjust(50_000, 1_000.0, 1_200.0)
    assert clock.now() == 50_100
    boot.now += 500
    assert clock.now() == 50_600


def test_a_jump_of_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = Boot()
    clock = FabricClock(boot)
    clock.adjust(50_000, 1_000.0, 1_000.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert clock.now() == 50_000


def test_a_vague_sample_does_not_replace_a_sharp_one_that_agrees() -> None:
    boot = Boot()
    clock = FabricClock(boot)
    clock.adjust(50_000, 1_000.0, 1_002.0)
    boot.now = 61_000.0
    clock.adjust(109_400, 60_000.0, 61_000.0)  # 1 s round trip; agrees within it
    assert clock.now() == 50_000 + 60_000 - 1


def test_a_contradicting_sample_is_believed() -> None:
    boot = Boot()
    clock = FabricClock(boot)
    clock.adjust(50_000, 1_000.0, 1_002.0)
    clock.adjust(90_000, 1_000.0, 1_200.0)  # the fabric's clock was set
    boot.now = 1_200.0
    assert clock.now() == 90_100


@given(st.integers(0, 2**45), st.floats(0, 5_000), st.floats(0, 5_000))
def test_never_wrong_by_more_than_half_a_round_trip(fabric: int, out: float, back: float) -> None:
    boot = Boot()
    clock = FabricClock(boot)
    sent = boot.now
    received = sent + out + back
    clock.adjust(fabric, sent, received)
    boot.now = received
    now = clock.now()
    assert now is not None
    assert abs(now - (fabric + back)) <= (out + back) / 2 + 1
