"""Logs of the server: one line per event, `event key=value …` or JSON, safe to read on a terminal.

Every line passes `clean` at the last moment, whoever wrote it: credentials are blotted out, control
characters escaped. Text from outside is capped where it is logged (`shown`).
"""

import json
import logging
import re
import sys
import time
import traceback
from contextvars import ContextVar
from typing import TextIO

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


def configure(level: str, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send everything that is logged to `stream` (standard error), from `level` up. Replaces earlier handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


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
        event = clean(record.getMessage())
        request = request_id.get()
        trace = [clean(line) for line in _traceback(record)]
        if self._as_json:
            line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "event": event}
            more = {name: value for name, value in (("request", request), ("traceback", trace)) if value}
            return json.dumps(line | more)
        head = f"{at} {record.levelname:<7} {record.name} {event}" + (f" request={request}" if request else "")
        return "\n".join([head, *(f"  | {line}" for line in trace)])


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
    return lines if len(lines) <= 200 else [*lines[:100], "…", *lines[-100:]]


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"
