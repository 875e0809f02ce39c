"""JSON from outside, read so that it means one thing to everybody who reads it.

RFC 8259 leaves open what a repeated member, `NaN` or half a surrogate pair means; all of them are refused
here, so that what is accepted can also be written again, by any encoder, to any reader.
"""

import json
import math

DEEPEST = 64  # nested arrays and objects: within what any reader takes
_MANY_BRACKETS = DEEPEST  # fewer can't nest too deep


class NotJson(ValueError):
    """Not JSON as it is understood here; the text says why and repeats nothing of it."""


def parse(raw: bytes) -> object:
    """The value of a JSON text.

    Raises:
        NotJson: it is none, or one of unclear meaning.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None
    try:
        value: object = json.loads(text, object_pairs_hook=_members, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise NotJson(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise NotJson(f"it is nested deeper than {DEEPEST}") from None
    except NotJson:
        raise
    except ValueError:
        raise NotJson("a number has too many digits") from None
    # Both searches are cheap, and spare nearly every document the walk.
    if b"\\u" in raw or raw.count(b"[") + raw.count(b"{") > _MANY_BRACKETS:
        _walk(value)
    return value


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotJson("an object has a member twice")
    return found


def _no_constant(_: str) -> object:
    raise NotJson("NaN and Infinity are no JSON numbers")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJson("a number is too large")
    return value


def _walk(value: object) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        inner: list[object] = []
        for item in level:
            if depth > DEEPEST and isinstance(item, dict | list):
                raise NotJson(f"it is nested deeper than {DEEPEST}")
            if isinstance(item, dict):
                for name in item:
                    _whole(name)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str):
                _whole(item)
        level = inner


def _whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotJson("a text has half of a surrogate pair") from None
