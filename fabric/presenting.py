"""How things look to people and programs: one representation for HTTP, events and the command line.

Times are RFC 3339 UTC with microseconds, durations seconds.
"""

import functools
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from fabric import strict_json
from fabric.command import Command, Micros, Outcome
from fabric.model import TimelineRow
from topology import wire

SECOND = 1_000_000
LARGE = 4096  # bytes: in lists and events, a larger body is shown as a link to its command

_LATEST: Micros = 253_402_300_799_999_999  # the end of 9999, where RFC 3339 ends

Document = dict[str, object]


def time(at: Micros) -> str:
    """What lies past the year 9999 (a device may say so) is shown as its end."""
    seconds, micros = divmod(min(at, _LATEST), SECOND)
    return f"{_second(seconds)}.{micros:06d}Z"


@functools.lru_cache(maxsize=256)  # what is told together happened in the same few seconds
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def optional_time(at: Micros | None) -> str | None:
    return None if at is None else time(at)


def seconds(duration: Micros) -> int | float:
    whole, rest = divmod(duration, SECOND)
    return whole if rest == 0 else duration / SECOND


def value(content_type: str, body: bytes) -> object:
    """A body: JSON as itself, anything else (JSON of unclear meaning too) as `{"base64": …}`."""
    if content_type.partition(";")[0].strip() == wire.JSON:
        if not body:
            return None
        try:
            return strict_json.parse(body)
        except strict_json.NotJson:
            pass
    return {"base64": b64encode(body).decode()}


def typed(content_type: str, body: bytes, name: str) -> Document:
    """A body beside its type: `{"content_type": …, name: …}`."""
    return {"content_type": content_type, name: value(content_type, body)}


def command(command: Command, timeline: Sequence[TimelineRow], *, brief: bool = False) -> Document:
    """The one document of a command. `brief`, for lists and events: large bodies as `{"href": …}`."""
    return {
        "id": command.id,
        "device": command.device,
        "name": command.name,
        "args": _args(command, brief=brief),
        "state": command.state.value,
        "reason": command.reason,
        "late": command.late,
        "issuer": command.issuer,
        "seq": command.seq,
        "attempt": command.attempt,
        "accepted_at": time(command.accepted_at),
        "deadline": time(command.deadline),
        "settled_at": optional_time(command.settled_at),
        "response_timeout": seconds(command.response_timeout),
        "claim": command.claim,
        "supersedes": command.supersedes,
        "traceparent": command.traceparent,
        "timeline": [
            {"state": row.entry.state.value, "at": time(row.entry.at), "evidence": row.entry.evidence}
            for row in timeline
        ],
        "outcome": None if command.outcome is None else _outcome(command, command.outcome, brief=brief),
    }


def _args(command: Command, *, brief: bool) -> object:
    if brief and len(command.body) > LARGE:
        return _link(command)
    shown = value(command.content_type, command.body)
    if command.content_type.partition(";")[0].strip() == wire.JSON:
        return shown
    # An outcome has a place of its own for its type; args have none, so it stands beside the bytes.
    assert isinstance(shown, Mapping)  # noqa: S101 - whatever is not JSON is base64
    return {"content_type": command.content_type, **shown}


def _outcome(command: Command, outcome: Outcome, *, brief: bool) -> Document:
    large = brief and len(outcome.body) > LARGE
    return {
        "status": outcome.status.value,
        "reason": outcome.reason,
        "content_type": outcome.content_type,
        "result": _link(command) if large else value(outcome.content_type, outcome.body),
    }


def _link(command: Command) -> Document:
    return {"href": f"/v1/commands/{command.id}"}
