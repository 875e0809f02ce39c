"""A handler's parameters, checked against a command's arguments before the handler may start.

The annotations say what is allowed: int, float, str, bool, bytes (the raw body), None, Any, Literal, Optional
and unions, list[…] and dict[str, …] of these, and `Context`. What can't be checked is refused at registration.
"""

import inspect
import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from device_agent import errors, log
from device_agent.context import Context
from topology import wire

_SHOWN = 40  # characters of a wrong value in an error text

_PLAIN: dict[object, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


class BadArguments(ValueError):
    """The arguments don't fit; the text says which one and what it should be."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How to call a handler: JSON members by name, or the raw body under `raw`; `context` if it takes one."""

    types: dict[str, object] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    raw: str | None = None
    context: str | None = None

    def bind(self, body: bytes, content_type: str) -> dict[str, Any]:
        """Keyword arguments for the handler, without its context.

        Raises:
            BadArguments
        """
        if self.raw is not None:
            return {self.raw: body}
        values = _object(body, content_type)
        for name in values:
            if name not in self.types:
                known = ", ".join(sorted(self.types)) or "none"
                raise BadArguments(f"unknown argument '{log.escape(name, _SHOWN)}'; known: {known}")
        for name in sorted(self.required):
            if name not in values:
                raise BadArguments(f"argument '{name}' is missing; it must be {describe(self.types[name])}")
        return {name: convert(value, self.types[name], f"argument '{name}'") for name, value in values.items()}


def inspect_handler(function: Callable[..., Any], name: str) -> Signature:
    """The signature of a handler.

    Raises:
        errors.BadHandler: a parameter is not annotated, or in a way that can't be checked.
    """
    parameters = inspect.signature(function).parameters
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise errors.BadHandler(f"the annotations of the handler for {name} can't be read: {error}") from error
    kinds: dict[str, object] = {}
    required: set[str] = set()
    raw = context = None
    for parameter in parameters.values():
        where = f"parameter '{parameter.name}' of the handler for {name}"
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise errors.BadHandler(f"{where} must be an ordinary one: arguments are passed by name")
        if parameter.name not in hints:
            raise errors.BadHandler(f"{where} has no type annotation")
        hint = hints[parameter.name]
        if hint is Context:
            context = parameter.name
        elif hint is bytes:
            raw = parameter.name
        else:
            _check_supported(hint, where)
            kinds[parameter.name] = hint
            if parameter.default is parameter.empty:
                required.add(parameter.name)
    if raw is not None and kinds:
        raise errors.BadHandler(
            f"the handler for {name} takes the raw body ('{raw}'), so it can take no other argument"
        )
    return Signature(kinds, frozenset(required), raw, context)


def convert(value: object, hint: object, where: str) -> object:
    """The JSON value as the annotation wants it (an integer where a float is wanted becomes one).

    Raises:
        BadArguments
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in inner:
            try:
                return convert(value, option, where)
            except BadArguments:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in inner):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(value, where)
    elif hint in (int, str, bool, type(None)):
        if type(value) is hint:
            return value
    elif hint is list or origin is list:
        if isinstance(value, list):
            return (
                [convert(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value)] if inner else value
            )
    elif (hint is dict or origin is dict) and isinstance(value, dict):
        if not inner:
            return value
        return {key: convert(item, inner[1], f"{where}['{log.escape(key, _SHOWN)}']") for key, item in value.items()}
    raise BadArguments(f"{where} must be {describe(hint)}, not {_shown(value)}")


def describe(hint: object) -> str:
    """The annotation in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any JSON value"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in inner)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(option) for option in inner)
    if hint is list or origin is list:
        return f"a list, each {describe(inner[0])}" if inner else "a list"
    if hint is dict or origin is dict:
        return f"an object, each value {describe(inner[1])}" if inner else "an object"
    return _PLAIN[hint]


def _check_supported(hint: object, where: str) -> None:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint in _PLAIN or hint is list or hint is dict:
        return
    if origin in (Union, types.UnionType, list):
        for option in inner:
            _check_supported(option, where)
    elif origin is dict and inner[0] is str:
        _check_supported(inner[1], where)
    elif not (origin is Literal and all(isinstance(option, str | int | bool) for option in inner)):
        raise errors.BadHandler(f"{where} has a type that can't be checked: {hint}")


def _object(body: bytes, content_type: str) -> dict[str, Any]:
    if not body:
        return {}
    if content_type.partition(";")[0].strip().lower() != wire.JSON:
        raise BadArguments(f"the arguments must be {wire.JSON}, not {log.escape(content_type, _SHOWN)}")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadArguments("the arguments are not valid JSON") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadArguments("the arguments must be a JSON object")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadArguments(f"{where} is out of a number's range")
    return number


def _refuse_constant(_: str) -> object:
    raise ValueError("not JSON")
