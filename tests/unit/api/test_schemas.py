"""What requests may carry."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from api import bodies, schemas
from api.problems import Problem

NAME = {"name": "door.close"}


@pytest.mark.parametrize(
    ("kind", "value", "pointer"),
    [
        (schemas.NewCommand, {}, "#/name"),
        (schemas.NewCommand, NAME | {"ttl": "60"}, "#/ttl"),
        (schemas.NewCommand, NAME | {"ttl": True}, "#/ttl"),
        (schemas.NewCommand, NAME | {"ttl": None}, "#/ttl"),
        (schemas.NewCommand, NAME | {"ttl": 0}, "#/ttl"),
        (schemas.NewCommand, NAME | {"ttl": 604_800.001}, "#/ttl"),
        (schemas.NewCommand, NAME | {"ttl": 10**400}, "#/ttl"),
        (schemas.NewCommand, NAME | {"response_timeout": 86_401}, "#/response_timeout"),
        (schemas.NewCommand, NAME | {"claim": 1}, "#/claim"),
        (schemas.NewCommand, NAME | {"clam": True}, "#/clam"),
        (schemas.NewCommand, NAME | {"a/b~c": True}, "#/a~1b~0c"),
        (schemas.NewCommand, {"name": "door.close\n"}, "#/name"),
        (schemas.NewCommand, {"name": "Door"}, "#/name"),
        (schemas.NewCommand, {"name": "a" * 129}, "#/name"),
        (schemas.NewDevice, {"id": "a.b"}, "#/id"),
        (schemas.NewDevice, {"id": "a\0"}, "#/id"),
        (schemas.NewDevice, {"id": "a", "groups": "b"}, "#/groups"),
        (schemas.NewDevice, {"id": "a", "groups": ["b", 1]}, "#/groups/1"),
        (schemas.NewDevice, {"id": "a", "labels": {"b": 1}}, "#/labels/b"),
        (schemas.DevicePatch, {"enabled": None}, "#/enabled"),
        (schemas.DevicePatch, {"groups": None}, "#/groups"),
        (schemas.NewToken, {"subject": "a", "scopes": []}, "#/scopes"),
        (schemas.NewToken, {"subject": "a\n", "scopes": ["devices:read"]}, "#/subject"),
        (schemas.NewToken, {"subject": "a", "scopes": ["devices:read@group:a/x"]}, "#/scopes/0"),
        (schemas.NewToken, {"subject": "a", "scopes": ["devices:read"], "life": 60.5}, "#/life"),
        (schemas.NewReading, {"value": 1, "at": 5}, "#/at"),
        (schemas.NewReading, {"value": 1, "at": None}, "#/at"),
        (schemas.NewReading, {"at": "2026-01-01T00:00:00Z"}, "#/value"),
    ],
)
def test_a_refusal_points_at_the_field_and_repeats_no_value(kind: type[BaseModel], value: Any, pointer: str) -> None:
    with pytest.raises(Problem) as refusal:
        bodies.check(kind, value)
    assert refusal.value.code == "invalid"
    assert pointer in [each["pointer"] for each in refusal.value.members["errors"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [None, [], "a", 1, True])
def test_a_body_is_an_object(value: object) -> None:
    with pytest.raises(Problem):
        bodies.check(schemas.NewCommand, value)


def test_fractions_and_whole_numbers_are_both_seconds() -> None:
    given_command = schemas.NewCommand.model_validate(NAME | {"ttl": 1, "response_timeout": 0.5})
    assert (given_command.ttl, given_command.response_timeout, given_command.args) == (1.0, 0.5, {})


def test_what_a_patch_leaves_out_is_told_from_what_it_sets() -> None:
    patch = schemas.DevicePatch.model_validate({"labels": {"a": None}})
    assert patch.model_fields_set == {"labels"}
    assert patch.labels == {"a": None}


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:01.5z", 1500),
        ("1970-01-01T01:00:00.123456789+01:00", 123),
        ("9999-12-31T23:59:59.999999Z", 253_402_300_799_999),
    ],
)
def test_times(text: str, ms: int) -> None:
    assert schemas.parse_time(text) == ms


@given(
    st.text(max_size=40)
    | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})", fullmatch=True)
)
def test_no_time_breaks_the_reader(text: str) -> None:
    with suppress(ValueError):
        assert schemas.parse_time(text) >= 0


@pytest.mark.parametrize(
    "text", ["1969-12-31T23:59:59Z", "2026-02-30T00:00:00Z", "2026-01-01T00:00:00", "20260101T000000Z", "2026-W01-1"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        schemas.parse_time(text)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.floats() | st.text(max_size=5) | st.none(), max_size=4))
def test_queries_raise_nothing_but_their_error(value: dict[str, Any]) -> None:
    for kind in (schemas.Page, schemas.CommandPage, schemas.RawCommand, schemas.OneReading, schemas.Read):
        with suppress(ValidationError):
            kind.model_validate(value)
