"""External identity providers as they are configured: tables of TOML, or the same as JSON in the environment."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from fabric.identity import jwks, scopes
from fabric.identity.providers import LONGEST_LEEWAY, Provider
from topology import enrollment

MOST = 20
ISSUER: Final = r'https://[!-"$->@-~]{1,142}'
"""A regular expression, in what Python and ECMA have in common: OpenID Connect Core, section 2, without query and
fragment. It is no device id and not the fabric's own `iss`, which name other verifiers; and it leaves room for a
subject."""

_OURS = (enrollment.DEVICE_TOKEN_TYPE, enrollment.PROOF_TYPE, enrollment.KEY_PROOF_TYPE)


def read(given: object) -> tuple[Provider, ...]:
    """The providers of a setting: an array of tables, or its JSON.

    Raises:
        ValueError: which provider, which member, and what is expected.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError("'providers' is an array of tables, or its JSON") from None
    if not isinstance(given, list) or not all(isinstance(table, dict) for table in given) or len(given) > MOST:
        raise ValueError(f"'providers' is an array of {MOST} tables at most: [[providers]]")
    found = [_provider(number, table) for number, table in enumerate(given, 1)]
    if len({provider.issuer for provider in found}) != len(found):
        raise ValueError("two 'providers' have the same 'issuer'")
    return tuple(found)


def write(providers: Sequence[Provider]) -> str:
    """JSON that `read` takes."""
    tables = [{name: value for name, value in asdict(each).items() if value is not None} for each in providers]
    return json.dumps(tables, default=str)


def _provider(number: int, table: Mapping[str, object]) -> Provider:
    checked: dict[str, Any] = {}
    members = {member.name: member for member in fields(Provider)}
    for name, value in table.items():
        if name not in members:
            raise ValueError(f"provider {number}: there is no '{name}'; there are: {', '.join(members)}")
        check, expected = _MEMBERS[name]
        try:
            checked[name] = check(value)
        except (ValueError, TypeError):
            raise ValueError(f"provider {number}: '{name}' is {expected}, unlike {value!r}") from None
    missing = [name for name, each in members.items() if each.default is MISSING and name not in checked]
    if missing:
        raise ValueError(f"provider {number}: '{missing[0]}' is missing: {_MEMBERS[missing[0]][1]}")
    return Provider(**checked)


def _text(pattern: str) -> Callable[[object], str]:
    expression = re.compile(pattern, re.ASCII)

    def check(value: object) -> str:
        if not isinstance(value, str) or not expression.fullmatch(value):
            raise ValueError
        return value

    return check


def _url(value: object) -> str:
    url = _text("https://[!-~]{1,500}")(value)
    parts = urlsplit(url)
    if not parts.hostname or parts.username is not None or parts.fragment or parts.port == 0:
        raise ValueError
    return url


def _list(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError
    return value


def _algorithms(value: object) -> tuple[str, ...]:
    given = _list(value)
    if not given or not jwks.ALGORITHMS.issuperset(given):
        raise ValueError
    return tuple(given)


def _networks(value: object) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(each) for each in _list(value))


def _scopes(value: object) -> str:
    given = _text("[!-~]+(?: [!-~]+)*")(value)
    entries = given.split(" ")
    if len(entries) > scopes.MAX_SCOPES or None in map(scopes.read, entries):
        raise ValueError
    return given


def _type(value: object) -> str:
    given = _text("[A-Za-z0-9.+/_-]{1,100}")(value)
    if given in _OURS:
        raise ValueError
    return given


def _leeway(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LONGEST_LEEWAY:
        raise ValueError
    return value


_MEMBERS: Final[Mapping[str, tuple[Callable[[object], object], str]]] = {
    "issuer": (_text(ISSUER), "the 'iss' of its tokens: an https:// URL of 150 characters, without query and fragment"),
    "audience": (_text("[!-~]{1,255}"), "the 'aud' of its tokens, up to 255 visible ASCII characters"),
    "jwks_url": (_url, "the https:// URL of its keys, without user and fragment"),
    "max_scope": (_scopes, "what its callers may do at most: scopes, separated by single spaces"),
    "algorithms": (_algorithms, f"an array of some of {', '.join(sorted(jwks.ALGORITHMS))}"),
    "typ": (_type, "the 'typ' of its tokens' headers, at+jwt or JWT, and none of ours"),
    "scope_claim": (_text("[!-~]{1,100}"), "the name of the claim with the scopes"),
    "scope_prefix": (_text("[!-~]{0,100}"), "what stands before the scopes that are meant for us"),
    "allow_private": (_networks, 'an array of networks, such as "10.1.0.0/16"'),
    "authority": (lambda value: Path(_text(".+")(value)), "a file with certificates in PEM"),
    "leeway": (_leeway, f"seconds from 0 to {LONGEST_LEEWAY}"),
}
