"""What is accepted as JSON can be written again, by any encoder, to any reader."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric import strict_json


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"NaN",
        b"-Infinity",
        b"[1e999]",
        b'{"a":1,"a":1}',
        b'"\\ud800"',
        b'{"\\udfff":1}',
        b'"\xff"',
        b"\xef\xbb\xbf1",
        b"9" * 5000,
        b"[" * 100_000,
        b"[" * 65 + b"]" * 65 + b"",
        b'{"a":' * 65 + b"1" + b"}" * 65,
    ],
)
def test_what_is_refused(raw: bytes) -> None:
    with pytest.raises(strict_json.NotJson):
        strict_json.parse(raw)


@pytest.mark.parametrize("raw", [b"null", b"[" * 64 + b"]" * 64, b'"\\ud83d\\ude00"', b'"\\u0000"', b"[1.5,-0,1e300]"])
def test_what_is_accepted(raw: bytes) -> None:
    assert strict_json.parse(raw) == json.loads(raw)


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0dNa1.e-', max_size=60).map(str.encode))
def test_only_its_own_error_escapes_and_what_is_accepted_can_be_written(raw: bytes) -> None:
    try:
        value = strict_json.parse(raw)
    except strict_json.NotJson:
        return
    assert json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode()) == value
