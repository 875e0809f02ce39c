"""Which addresses we call: public ones, and private ones only where the configuration names their network.

Judged is the address that a connection is made to, never a name or how an address was written. Pure.
"""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address

# Whatever is configured: this host's own, whole groups, tunnels that hide an address, and where clouds keep the
# credentials of their machines.
_NEVER: Final = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "100.100.100.200/32", "168.63.129.16/32",
            "192.0.0.192/32", "::/128", "fe80::/10", "fec0::/10", "ff00::/8", "2001::/32", "2002::/16",
            "64:ff9b:1::/48", "fd00:ec2::254/128", "fd20:ce::254/128",
        ),
    )
)  # fmt: skip
# IANA's special-purpose registries, for Python's own table has gaps that differ by its version.
_PRIVATE: Final = tuple(
    map(
        ip_network,
        (
            "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
            "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "2001::/23",
            "2001:db8::/32", "3fff::/20",
        ),
    )
)  # fmt: skip
_PUBLIC_IPV6: Final = IPv6Network("2000::/3")


def may_call(address: Address, private: Collection[Network]) -> bool:
    """Is it public, or in one of these networks? An IPv4 address inside an IPv6 one is judged as what it is."""
    real = _embedded(address)
    if _in(real, _NEVER):
        return False
    return _is_public(real) or _in(real, private)


def _embedded(address: Address) -> Address:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    return not _in(address, _PRIVATE) and (isinstance(address, IPv4Address) or address in _PUBLIC_IPV6)


def _in(address: Address, networks: Collection[Network]) -> bool:
    return any(address in network for network in networks)
