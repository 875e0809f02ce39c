"""`restante audit`: who did what, as the gateway tells it; and who this is, for what is done without the gateway."""

import json
import os
import pwd
from collections.abc import Iterator, Mapping
from typing import Any

from api import logs
from api.operator.client import Connection
from fabric.audit import DONE, By, Kind

_PAGE = 100  # entries of one request
_FORM = "{at:<27}  {action:<23} {device:<20} {by:<24} {address:<15} {jti:<36}  {detail}"


def operator() -> By:
    """Whoever runs this program, by the name that the operating system has for them."""
    user = os.getuid()
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:  # as in many containers
        name = f"uid {user}"
    return By(Kind.OPERATOR, name)


def lines(connection: Connection, query: Mapping[str, str], limit: int, *, as_json: bool) -> Iterator[str]:
    """The newest `limit` entries that fit the query, each in a line, under one that names the columns unless as JSON.
    What others have said is escaped.

    Raises:
        CallFailed: the gateway refuses, or it can't be reached.
    """
    if not as_json:
        names = ("at", "action", "device", "by", "address", "jti", "detail")
        yield _FORM.format(**{name: name.upper() for name in names}).rstrip()
    asked = dict(query)
    while limit > 0:
        page = connection.call("GET", "/v1/audit", params=asked | {"limit": str(min(limit, _PAGE))})
        for entry in page["items"]:
            yield json.dumps(entry) if as_json else line(entry)
        limit -= len(page["items"])
        if page["next"] is None:
            return
        asked["cursor"] = page["next"]


def line(entry: Mapping[str, Any]) -> str:
    """One for a person to read."""
    by = entry["by"]
    detail = {"refused": entry["outcome"]} if entry["outcome"] != DONE else {}
    told = [f"{name}={_text(value)}" for name, value in (detail | entry["detail"]).items()]
    return _FORM.format(
        at=_text(entry["at"]),
        action=_text(entry["action"]),
        device=_text(entry["device"]),
        by=_text(by["kind"] if by["subject"] is None else f"{by['kind']}:{by['subject']}"),
        address=_text(by["address"]),
        jti=_text(by["jti"]),
        detail=" ".join(told),
    ).rstrip()


def _text(value: object) -> str:
    """As it may be shown on a terminal."""
    if value is None:
        return "-"
    return logs.shown(value if isinstance(value, str) else json.dumps(value))
