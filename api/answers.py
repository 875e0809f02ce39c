"""Answers: what the fabric's values look like as JSON, and the responses that carry them."""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence

from fastapi import Response

from api.problems import Problem, invalid
from fabric import presenting
from fabric.command import Micros
from fabric.identity.enrollment import Invitation
from fabric.model import Device, DeviceKey, IssuedToken, Mailbox
from fabric.presenting import Document
from topology import layout


def answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(body, status, headers, "application/json")


def device(device: Device) -> Document:
    return {
        "id": device.id,
        "enabled": device.enabled,
        "groups": list(device.groups),
        "labels": dict(device.labels),
        "created_at": presenting.time(device.created_at),
        "connection": {
            "state": "connected" if device.connected else "disconnected",
            "since": presenting.optional_time(device.connection_since),
        },
        "last_seen": presenting.optional_time(device.last_seen),
        "agent_version": device.agent_version,
    }


def device_with_mailbox(found: Device, mailbox: Mailbox, now: Micros) -> Document:
    oldest = None if mailbox.oldest_at is None else presenting.seconds(max(now - mailbox.oldest_at, 0))
    return device(found) | {"mailbox": {"depth": mailbox.depth, "limit": layout.DEFAULT_BACKLOG, "oldest_age": oldest}}


def invitation(invitation: Invitation) -> Document:
    return {
        "ticket": invitation.ticket,
        "code": invitation.code,
        "expires_at": presenting.time(invitation.expires_at),
    }


def key(key: DeviceKey) -> Document:
    return {
        "kid": key.kid,
        "created_at": presenting.time(key.created_at),
        "last_used": presenting.optional_time(key.last_used),
    }


def token(token: IssuedToken) -> Document:
    return {
        "jti": token.jti,
        "subject": token.subject,
        "scopes": list(token.scopes),
        "issued_at": presenting.time(token.issued_at),
        "expires_at": presenting.time(token.expires_at),
        "revoked_at": presenting.optional_time(token.revoked_at),
    }


def entity_tag(device: Device) -> str:
    """Strong; with the generation, so that it never fits a later device of the same id."""
    return f'"{device.generation}.{device.version}"'


def expected_version(device: Device, if_match: frozenset[str] | None) -> int | None:
    """The version a change must meet, or None when any will do. Raises a 412 `Problem`."""
    if if_match is None or "*" in if_match:
        return None
    if entity_tag(device) not in if_match:
        raise Problem("precondition-failed", "The device has changed; read it again, and use its 'ETag'.")
    return device.version


def page(items: Sequence[Document], following: str | None) -> Response:
    return answer({"items": items, "next": following})


def cursor(last: str) -> str:
    """Where the next page begins. Opaque to callers; it grants nothing, and is checked when it comes back."""
    return base64.urlsafe_b64encode(last.encode()).rstrip(b"=").decode()


def read_cursor(text: str | None, grammar: str) -> str | None:
    """What `cursor` was given, if it is of this grammar. Raises a 422 `Problem`."""
    if text is None:
        return None
    try:
        last = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        last = ""
    if not re.fullmatch(grammar, last, re.ASCII):
        raise invalid([("query:cursor", "Use the 'next' of the page before, as it was given.")])
    return last
