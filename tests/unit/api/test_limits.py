"""The bound on how often somebody may ask."""

import pytest

from api.limits import SourceLimit, source_of
from fabric.errors import TooManyRequests


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_source_is_refused_after_its_share_and_let_in_again_later() -> None:
    time = Time()
    limit = SourceLimit(30, 600, clock=time)
    for _ in range(30):
        limit.check("192.0.2.1")
    with pytest.raises(TooManyRequests) as refusal:
        limit.check("192.0.2.1")
    assert 0 < refusal.value.retry_after <= 2
    limit.check("192.0.2.2")
    time.now += refusal.value.retry_after
    limit.check("192.0.2.1")


def test_all_together_are_bounded_too() -> None:
    limit = SourceLimit(30, 100, clock=Time())
    for number in range(100):
        limit.check(f"192.0.2.{number}")
    with pytest.raises(TooManyRequests):
        limit.check("198.51.100.1")


def test_what_is_remembered_is_bounded() -> None:
    limit = SourceLimit(30, 10**9, remembered=100, clock=Time())
    for number in range(1000):
        limit.check(f"10.0.{number // 256}.{number % 256}")
    assert len(limit._sources) == 100


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "unknown"),
        (None, "unknown"),
    ],
)
def test_sources(host: str | None, source: str) -> None:
    assert source_of(host) == source
