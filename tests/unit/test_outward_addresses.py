"""Which addresses are called."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.outward.addresses import may_call

PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
PRIVATE = [
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "127.0.0.1", "127.8.8.8", "100.64.0.1", "198.18.0.1",
    "192.0.2.1", "203.0.113.9", "192.0.0.8", "::1", "fd12::1", "fc00::1", "2001:db8::1", "3fff::1", "2001:10::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "::127.0.0.1", "1::1", "4000::1",
]  # fmt: skip
NEVER = [
    "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.170.2", "224.0.0.1", "255.255.255.255", "240.0.0.1",
    "100.100.100.200", "168.63.129.16", "192.0.0.192", "::", "fe80::1", "fe80::1%2", "ff02::1", "fec0::1",
    "fd00:ec2::254", "fd20:ce::254", "::ffff:169.254.169.254", "64:ff9b::169.254.169.254", "2002:a9fe:a9fe::1",
    "2002:7f00:1::", "2001:0:a9fe:a9fe::1", "64:ff9b:1::a9fe:a9fe", "::ffff:0.0.0.0",
]  # fmt: skip
EVERYTHING = (ip_network("0.0.0.0/0"), ip_network("::/0"))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_one_is(address: str) -> None:
    assert may_call(ip_address(address), ())


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_one_is_where_its_network_is_named(address: str) -> None:
    assert not may_call(ip_address(address), ())
    assert may_call(ip_address(address), EVERYTHING)


@pytest.mark.parametrize("address", NEVER)
def test_some_never_are(address: str) -> None:
    assert not may_call(ip_address(address), ())
    assert not may_call(ip_address(address), EVERYTHING)


def test_a_named_network_is_no_other() -> None:
    ours = (ip_network("10.1.0.0/16"), ip_network("fd12::/64"))
    for address, allowed in (("10.1.2.3", True), ("10.2.0.1", False), ("::ffff:10.1.2.3", True), ("fd12::9", True)):
        assert may_call(ip_address(address), ours) is allowed
    assert not may_call(ip_address("fd12:0:0:1::9"), ours)


@given(st.integers(0, 2**32 - 1))
def test_an_ipv4_address_is_the_same_in_an_ipv6_one(number: int) -> None:
    plain = may_call(IPv4Address(number), ())
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert may_call(IPv6Address(prefix | number), ()) is plain


@given(st.ip_addresses())
def test_what_python_takes_for_private_is_not_called(address: IPv4Address | IPv6Address) -> None:
    # 2002::/16 and the like are refused without being private.
    real = getattr(address, "ipv4_mapped", None) or address
    if not real.is_global or real.is_multicast:
        wrapped = isinstance(real, IPv6Address) and real in ip_network("64:ff9b::/96")
        assert wrapped or not may_call(address, ())
