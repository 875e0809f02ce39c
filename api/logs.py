"""Logs of the server: one line per event, `event key=value …` or JSON, safe to read on a terminal.

Every line passes `clean` at the last moment, whoever wrote it: credentials are blotted out, control
characters escaped. Text from outside is capped where it is logged (`shown`). The request and the command that a line is
about are added to it, unless it names them.
"""

import json
import logging
import math
import re
import sys
import time
import traceback
from contextvars import ContextVar
from typing import TextIO

from fabric import context

LINE_LIMIT = 8192  # characters
FIELD_LIMIT = 300  # characters of a text from outside

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being answered, as its answer's `X-Request-Id` says."""

_CREDENTIALS = re.compile(
    r"eyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]*)?"  # JWTs, cut ones too
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user:password of a URL
    r"|\b[A-Z2-7]{26,}\b"  # enrollment codes and tickets
)
_BLOT = "[redacted]"
_FIELD = re.compile(r" ([a-z_-]+)=(%[-+#0-9.]*[a-z])")

Value = str | int | float


def configure(level: str, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send everything that is logged to `stream` (standard error), from `level` up. Replaces earlier handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # A line for each request, and a worker asks the broker's management API every five seconds.
    logging.getLogger("httpx").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


def shown(text: str, limit: int = FIELD_LIMIT) -> str:
    """Text from outside as a field's value: capped, printable ASCII, quoted when it has white space."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    escaped = json.dumps(cut).replace("\x7f", "\\u007f")
    return escaped[1:-1] if re.fullmatch(r"[!-~]+", cut) and '"' not in cut and "\\" not in cut else escaped


def clean(text: str) -> str:
    """The text without credentials and control characters, `LINE_LIMIT` characters at most."""
    blotted = _CREDENTIALS.sub(_BLOT, text[: LINE_LIMIT * 2])
    if len(blotted) > LINE_LIMIT:
        blotted = blotted[:LINE_LIMIT] + "…"
    return blotted if blotted.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in blotted)


class Formatter(logging.Formatter):
    """One line per record; the lines of a traceback follow, each marked as such."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        about = {"request": request_id.get(), "command": context.command.get()}
        trace = [clean(line) for line in _traceback(record)]
        if self._as_json:
            event, fields = _parts(record)
            line = {"time": at, "level": record.levelname.lower(), "logger": record.name, "event": event}
            known = {name: value for name, value in about.items() if value} | fields
            return json.dumps(known | line | ({"traceback": trace} if trace else {}), allow_nan=False)
        event = clean(record.getMessage())
        more = "".join(f" {name}={value}" for name, value in about.items() if value and f" {name}=" not in event)
        return "\n".join(
            [f"{at} {record.levelname:<7} {record.name} {event}{more}", *(f"  | {line}" for line in trace)]
        )


def _parts(record: logging.LogRecord) -> tuple[str, dict[str, Value]]:
    """The event's name and its fields; what is not written as `event key=%s …` is all name."""
    template, arguments = record.msg, record.args
    named = _FIELD.findall(template) if isinstance(template, str) and isinstance(arguments, tuple) else []
    name = template[: len(template) - sum(len(f" {key}={spec}") for key, spec in named)] if named else ""
    if not named or name + "".join(f" {key}={spec}" for key, spec in named) != template:
        return clean(record.getMessage()), {}
    assert isinstance(arguments, tuple)  # noqa: S101 - looked at above
    split = len(arguments) - len(named)
    values = zip(named, arguments[split:], strict=True)
    return clean(name % arguments[:split]), {key: _value(spec, value) for (key, spec), value in values}


def _value(spec: str, value: object) -> Value:
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return clean(spec % (value,))


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
    return lines if len(lines) <= 200 else [*lines[:100], "…", *lines[-100:]]


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"
