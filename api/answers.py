"""Answers: what the fabric's values look like as JSON, and the responses that carry them."""

import json
from collections.abc import Mapping, Sequence

from fastapi import Response

from api.problems import Problem
from fabric import presenting
from fabric.audit import Entry
from fabric.command import Micros
from fabric.identity.enrollment import Invitation
from fabric.identity.revocation import Revoked
from fabric.model import Device, DeviceKey, IssuedToken, Mailbox
from fabric.presenting import Document


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


def device_with_mailbox(found: Device, mailbox: Mailbox, default_backlog: int, now: Micros) -> Document:
    oldest = None if mailbox.oldest_at is None else presenting.seconds(max(now - mailbox.oldest_at, 0))
    limit = found.backlog or default_backlog
    return device(found) | {"mailbox": {"depth": mailbox.depth, "limit": limit, "oldest_age": oldest}}


def invitation(invitation: Invitation) -> Document:
    return {
        "ticket": invitation.ticket,
        "code": invitation.code,
        "expires_at": presenting.time(invitation.expires_at),
    }


def key(key: DeviceKey) -> Document:
    return {
        "kid": key.kid,
        "parent": key.parent,
        "created_at": presenting.time(key.created_at),
        "last_used": presenting.optional_time(key.last_used),
    }


def revoked(revoked: Revoked) -> Document:
    return {
        "closed_connections": revoked.cut.closed,
        "pending_until": presenting.optional_time(revoked.cut.pending_until),
        "withdrawn": revoked.withdrawn,
        "in_hand": revoked.in_hand,
    }


def token(token: IssuedToken) -> Document:
    return {
        "jti": token.jti,
        "subject": token.subject,
        "scopes": list(token.scopes),
        "issued_at": presenting.time(token.issued_at),
        "expires_at": presenting.time(token.expires_at),
        "revoked_at": presenting.optional_time(token.revoked_at),
        "parent": token.parent,
    }


def audited(entry: Entry) -> Document:
    by, deed = entry.by, entry.deed
    return {
        "position": entry.position,
        "at": presenting.time(entry.at),
        "action": deed.action.value,
        "device": deed.device,
        "outcome": deed.outcome,
        "by": {
            "kind": by.kind.value,
            "subject": by.subject,
            "issuer": by.issuer,
            "jti": by.jti,
            "address": by.address,
        },
        "request": by.request,
        "detail": dict(deed.detail),
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
