"""Rows of the tables, to and from the fabric's values."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa

from fabric.command import ANSWERED, SETTLED, Command, Entry, Outcome, State
from fabric.model import Device, DeviceKey, DomainEvent, IssuedToken, LogRow, TimelineRow
from fabric.sql import schema
from fabric.text import clean
from topology.names import CommandId, DeviceId

Row = dict[str, Any]

COMMAND_COLUMNS: Final = tuple(column for column in schema.commands.c if column.name != "due")
_events: Final = schema.events.c
TIMELINE_COLUMNS: Final = (
    _events.state, _events.at, _events.evidence, _events.detail, _events.changed, _events.version, _events.position,
)  # fmt: skip
LOG_COLUMNS: Final = (
    _events.position, _events.kind, _events.device, _events.command, _events.version, _events.at, _events.state,
    _events.evidence, _events.detail, _events.changed, _events.document,
)  # fmt: skip
_DEVICE_FIELDS: Final = (
    "id", "cell", "generation", "enabled", "created_at", "version", "next_seq", "last_seen", "agent_version",
    "connected", "connection_since", "backlog",
)  # fmt: skip


def new_command(command: Command) -> Row:
    """The whole row of a command."""
    return {
        "id": command.id,
        "device": command.device,
        "generation": command.generation,
        "seq": command.seq,
        "name": command.name,
        "body": command.body,
        "content_type": command.content_type,
        "issuer": command.issuer,
        "claim": command.claim,
        "supersedes": command.supersedes,
        "accepted_at": command.accepted_at,
        "deadline": command.deadline,
        "response_timeout": command.response_timeout,
        "sig": command.sig,
        "sig_kid": command.sig_kid,
        "traceparent": command.traceparent,
        **command_state(command),
    }


def command_state(command: Command) -> Row:
    """What of a command's row may change."""
    outcome = command.outcome
    return {
        "state": command.state.value,
        "reason": command.reason,
        "late": command.late,
        "attempt": command.attempt,
        "copies": ",".join(map(str, command.copies)),
        "publish_due": command.publish_due,
        "holder": command.holder,
        "response_due": command.response_due,
        "settled_at": command.settled_at,
        "progress": command.progress,
        "outcome_status": outcome.status.value if outcome else None,
        "outcome_reason": outcome.reason if outcome else None,
        "outcome_content_type": outcome.content_type if outcome else None,
        "outcome_body": outcome.body if outcome else None,
        "version": command.version,
        "rows": command.rows,
        "due": command.due,
    }


def command(row: Sequence[Any]) -> Command:
    """A command from `COMMAND_COLUMNS`, which may be followed by others."""
    (
        id, device, generation, seq, name, body, content_type, issuer, claim, supersedes, accepted_at, deadline,
        response_timeout, sig, sig_kid, traceparent, state, reason, late, attempt, copies, publish_due, holder,
        response_due, settled_at, progress, outcome_status, outcome_reason, outcome_content_type, outcome_body,
        version, rows,
    ) = row[: len(COMMAND_COLUMNS)]  # fmt: skip
    outcome = None
    if outcome_status is not None:
        outcome = Outcome(State(outcome_status), outcome_reason, outcome_content_type, bytes(outcome_body))
    return Command(
        CommandId(id), DeviceId(device), generation, seq, name, bytes(body), content_type, issuer, claim, supersedes,
        accepted_at, deadline, response_timeout, sig, sig_kid, traceparent, State(state), reason, late, attempt,
        tuple(map(int, copies.split(","))) if copies else (), publish_due, holder, response_due, settled_at, progress,
        outcome, version, rows,
    )  # fmt: skip


def entry_event(entry: Entry, after: Command) -> Row:
    """The event row of a command's timeline entry; `after` is the command it led to. Its document has what may
    change again and is in no column; see `log_row` for the rest."""
    document = {"reason": after.reason, "late": after.late, "attempt": after.attempt}
    return {
        "kind": f"command.{entry.state.value}" if entry.changed else "command.evidence",
        "device": after.device,
        "command": after.id,
        "version": after.version,
        "at": entry.at,
        "state": entry.state.value,
        "evidence": entry.evidence,
        "detail": entry.detail,
        "changed": entry.changed,
        "document": as_json(document),
    }


def domain_event(event: DomainEvent, version: int = 0) -> Row:
    """The event row of something that happened to a device."""
    return {
        "kind": event.kind,
        "device": event.device,
        "command": None,
        "version": version,
        "at": event.at,
        "state": None,
        "evidence": None,
        "detail": None,
        "changed": None,
        "document": as_json(event.detail),
    }


def timeline_row(row: Sequence[Any]) -> TimelineRow:
    """From `TIMELINE_COLUMNS`."""
    state, at, evidence, detail, changed, version, position = row
    return TimelineRow(Entry(State(state), at, evidence, detail, changed), version, position)


def log_row(
    row: Sequence[Any], groups: tuple[str, ...], command: Command | None, timeline: Sequence[TimelineRow]
) -> LogRow:
    """From `LOG_COLUMNS`, the command as it is now, and its timeline, which may be longer."""
    position, kind, device, _, version, at, state, evidence, detail, changed, document = row
    if command is None:
        return LogRow(position, kind, DeviceId(device), groups, version, at, None, json.loads(document), None)
    until = tuple(entry for entry in timeline if entry.version <= version)
    then = _command_at(command, State(state), version, json.loads(document), until)
    return LogRow(position, kind, command.device, groups, version, at, evidence, detail, changed, then, until)


def _command_at(
    command: Command, state: State, version: int, document: Mapping[str, Any], timeline: Sequence[TimelineRow]
) -> Command:
    changes = [row.entry.at for row in timeline if row.entry.changed]
    return replace(
        command,
        state=state,
        reason=document["reason"],
        late=document["late"],
        attempt=document["attempt"],
        settled_at=changes[-1] if state in SETTLED else None,
        # It is there from the device's word on, and never changes.
        outcome=command.outcome if state in ANSWERED else None,
        version=version,
    )


def new_device(device: Device) -> Row:
    return {
        **{name: getattr(device, name) for name in _DEVICE_FIELDS},
        "groups": as_json(device.groups),
        "labels": as_json(device.labels),
        "enrolled_at": None,
    }


def device(row: "sa.Row[Any]") -> Device:
    known = row._mapping  # noqa: SLF001 - SQLAlchemy's public name
    return Device(
        **{name: known[name] for name in _DEVICE_FIELDS},
        groups=tuple(json.loads(row.groups)),
        labels=json.loads(row.labels),
    )


def device_key(row: "sa.Row[Any]") -> DeviceKey:
    return DeviceKey(DeviceId(row.device), row.kid, json.loads(row.jwk), row.created_at, row.last_used, row.parent)


def issued_token(row: "sa.Row[Any]") -> IssuedToken:
    scopes = tuple(json.loads(row.scopes))
    return IssuedToken(
        row.jti, row.subject, scopes, row.issued_at, row.expires_at, row.revoked_at, row.parent, row.minter
    )


def as_json(value: object) -> str:
    """JSON in ASCII, without NUL and lone surrogates: its escapes would carry them past the column's type, to
    whoever reads the document."""
    text = _encode(value)
    return _encode(_clean(value)) if _SUSPECT.search(text) else text


_encode = json.JSONEncoder(separators=(",", ":")).encode
_SUSPECT = re.compile(r"\\u(?:0000|d[89a-f])")


def _clean(value: object) -> object:
    match value:
        case str():
            return clean(value)
        case Mapping():
            return {clean(str(name)): _clean(member) for name, member in value.items()}
        case list() | tuple():
            return [_clean(member) for member in value]
        case _:
            return value
