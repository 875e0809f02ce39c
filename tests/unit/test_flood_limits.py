"""The token buckets, and what is remembered between logins; the time is the tests'."""

from hypothesis import given
from hypothesis import strategies as st

from fabric.identity import admission, meters
from fabric.identity.admission import CONTESTED_FOR, FIRST_BACKOFF, FORGIVEN_AFTER, LONGEST_BACKOFF, Guard
from fabric.identity.meters import HOUR, SECOND, Limits, Meter, Meters, Rate, spend
from topology.names import DeviceId

PUMP, DOOR = DeviceId("pump-17"), DeviceId("door-1")
NOW = 1_800_000_000 * SECOND
LIMITS = Limits()


@given(st.integers(1, 50), st.integers(1, 50), st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 5))))
def test_a_bucket_gives_its_burst_and_its_rate_and_no_more(
    units: int, burst: int, asked: list[tuple[int, int]]
) -> None:
    rate = Rate(units, SECOND, burst)
    now, full_at, given_out = NOW, 0, 0
    for pause, wanted in asked:
        now += pause
        after = spend(full_at, now, rate, wanted)
        if after is not None:
            full_at, given_out = after, given_out + wanted
        else:
            # What is refused was not there: less than `wanted`, but for the rounding of each earlier unit.
            there = min(burst, burst - (full_at - now) * units / SECOND)
            assert there < wanted + 1
    assert given_out <= burst + (now - NOW) * units / SECOND + 1


def test_a_device_over_its_limit_is_told_from_its_neighbours() -> None:
    counted = Meters(LIMITS)
    taken = [counted.spend(PUMP, Meter.REPORTS, NOW) for _ in range(20 * LIMITS.reports + 1)]
    assert taken == [True] * (20 * LIMITS.reports) + [False]
    assert counted.spend(DOOR, Meter.REPORTS, NOW)
    assert counted.spend(PUMP, Meter.INQUIRIES, NOW), "each has a bucket of its own"
    later = NOW + SECOND
    assert [counted.spend(PUMP, Meter.REPORTS, later) for _ in range(51)] == [True] * 50 + [False]
    assert not counted.spend(DOOR, Meter.TRAFFIC, NOW, 30 * LIMITS.traffic + 1)
    assert counted.spend(DOOR, Meter.TRAFFIC, NOW, 30 * LIMITS.traffic)


def test_channels_are_counted_once_and_forgotten_after_an_hour() -> None:
    counted = Meters(LIMITS)
    channels = [f"sensor.{number}" for number in range(64)]
    for _ in range(2):
        assert all(counted.use_channel(PUMP, channel, NOW) for channel in channels)
    assert not counted.use_channel(PUMP, "one.more", NOW + HOUR)
    assert counted.use_channel(PUMP, channels[0], NOW + HOUR), "one that it has goes on"
    assert counted.use_channel(PUMP, "one.more", NOW + HOUR + 1)


def test_what_is_kept_is_bounded_and_the_busiest_stay() -> None:
    counted = Meters(LIMITS)
    busy = DeviceId("busy")
    while counted.spend(busy, Meter.REFUSALS, NOW):
        pass
    for number in range(meters.BUCKETS + 10):
        counted.spend(DeviceId(f"device-{number}"), Meter.REPORTS, NOW + number)
    assert len(counted._buckets) <= meters.BUCKETS
    assert not counted.spend(busy, Meter.REFUSALS, NOW + 1)
    for number in range(meters.CHANNELS_OF + 10):
        counted.use_channel(DeviceId(f"device-{number}"), "a", NOW)
    assert len(counted._channels) <= meters.CHANNELS_OF


# ---- Logins ------------------------------------------------------------------------------------------


def admitted(guard: Guard, now: int, *, live: bool = False) -> tuple[Guard, bool]:
    guard, answer = admission.admit(guard, now, LIMITS, live=live, unseen_since=None)
    return guard, answer.refusal is None


def test_ten_logins_at_once_then_one_in_five_seconds() -> None:
    guard = Guard()
    let_in = []
    for _ in range(11):
        guard, is_in = admitted(guard, NOW)
        let_in.append(is_in)
    assert let_in == [True] * 10 + [False]
    assert not admitted(guard, NOW + 5 * SECOND - 1)[1]
    guard, is_in = admitted(guard, NOW + 5 * SECOND)
    assert is_in
    assert not admitted(guard, NOW + 6 * SECOND)[1]


def test_episodes_get_longer_and_are_forgiven() -> None:
    guard, now, spans = Guard(), NOW, []
    for _ in range(8):
        begun = admission.throttle(guard, now)
        assert begun is not None
        assert admission.throttle(begun, begun.throttled_until - 1) is None, "one episode"
        assert not admitted(begun, begun.throttled_until - 1)[1]
        assert admitted(begun, begun.throttled_until)[1]
        guard = begun
        spans.append(guard.throttled_until - now)
        now = guard.throttled_until
    assert spans[:3] == [FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF]
    assert spans[-1] == LONGEST_BACKOFF
    begun = admission.throttle(guard, now + FORGIVEN_AFTER)
    assert begun is not None
    assert begun.throttled_until == now + FORGIVEN_AFTER + FIRST_BACKOFF


def test_the_third_takeover_in_a_minute_is_the_last_for_a_minute() -> None:
    guard = Guard()
    told = []
    for second in (0, 20, 40):
        guard, contested = admission.taken_over(guard, NOW + second * SECOND, LIMITS)
        told.append(contested)
    assert told == [False, False, True]
    at = NOW + 40 * SECOND
    assert not admitted(guard, at + 1, live=True)[1], "whoever is in stays"
    assert admitted(guard, at + 1)[1], "nobody is in: there is nothing to contest"
    assert admitted(guard, at + CONTESTED_FOR, live=True)[1]


def test_takeovers_far_apart_are_no_contest() -> None:
    guard = Guard()
    for minute in range(10):
        guard, contested = admission.taken_over(guard, NOW + minute * 31 * SECOND, LIMITS)
        assert not contested
        assert len(guard.takeovers) <= 2


def test_a_login_that_crosses_another_waits_for_it_as_long_as_its_handshake_may_take() -> None:
    for age, waits in ((SECOND, True), (60 * SECOND, False)):
        _, answer = admission.admit(Guard(), NOW, LIMITS, live=False, unseen_since=NOW - age)
        assert (answer.older, answer.unseen) == (True, waits)
    assert admission.is_repeated(NOW, None, NOW + SECOND)
    assert not admission.is_repeated(None, None, NOW)
    assert not admission.is_repeated(NOW, NOW + 1, NOW + 2), "asked a third time: another login"
    assert not admission.is_repeated(NOW, None, NOW + 6 * SECOND)
