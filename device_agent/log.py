"""Log lines: an event name plus fields. Text from outside is capped and escaped, so that it can't forge a
line or reach a terminal as an escape sequence."""

import json
import logging

FIELD_LIMIT = 300  # characters of a field, after which it is cut

logger = logging.getLogger("restante.agent")


def event(level: int, name: str, /, **fields: object) -> None:
    """Log `name key=value …`; values are numbers, or text that is capped and escaped."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", line(name, fields))


def debug(name: str, /, **fields: object) -> None:
    event(logging.DEBUG, name, **fields)


def info(name: str, /, **fields: object) -> None:
    event(logging.INFO, name, **fields)


def warning(name: str, /, **fields: object) -> None:
    event(logging.WARNING, name, **fields)


def error(name: str, /, **fields: object) -> None:
    event(logging.ERROR, name, **fields)


def line(name: str, fields: dict[str, object]) -> str:
    return " ".join([name, *(f"{key.replace('_', '-')}={_shown(value)}" for key, value in fields.items())])


def escape(text: str, limit: int = FIELD_LIMIT) -> str:
    """Printable ASCII without control characters; cut to `limit` characters of the original."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return json.dumps(cut)[1:-1].replace("\x7f", "\\u007f")


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool | int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    text = escape(str(value))
    return text if text and all(c not in text for c in ' ="\\') else f'"{text}"'
