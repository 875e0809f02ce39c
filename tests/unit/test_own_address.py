"""Where a listener binds that is for one network only."""

import pytest

from api.operator.sockets import NoWayError, own_address


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "gateway.example"])
def test_an_address_is_itself(host: str) -> None:
    assert own_address(host) == host


def test_towards_a_host_it_is_this_machines_own() -> None:
    assert own_address("@127.0.0.9") == "127.0.0.1"


def test_no_way_is_one_sentence() -> None:
    with pytest.raises(NoWayError, match=r"^There is no way to nowhere\.invalid, towards which to listen: .*\.$"):
        own_address("@nowhere.invalid")
