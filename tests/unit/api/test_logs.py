"""Log lines: one per event, with no credential and no control character in them."""

import io
import json
import logging

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import logs
from fabric import context
from topology.names import CommandId

TOKEN = jwt.encode({"sub": "x"}, "k" * 32)


def lines(message: str, *arguments: object, as_json: bool = False, error: BaseException | None = None) -> list[str]:
    record = logging.LogRecord(
        "fabric.mail", logging.WARNING, "", 0, message, arguments, (type(error), error, None) if error else None
    )
    return logs.Formatter(as_json=as_json).format(record).split("\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_credentials_never_reach_it(as_json: bool) -> None:
    ticket = "62X5OABGAQEEZZYJM4TOJ4KEV4YDAMBQGAYDAMBQGAYDAMBQGAYDAMBQGAYDAMBQGAYDAMBQGAYDA"
    secrets = (TOKEN, TOKEN.rpartition(".")[0], ticket, ticket[:26], "hunter2")
    error = ValueError(f"amqp://fabric:hunter2@host/ {TOKEN}")
    for secret in secrets[:4]:
        assert secret not in "\n".join(lines("x.y password=%s", secret, as_json=as_json))
    assert not any(secret in "\n".join(lines("x.y", as_json=as_json, error=error)) for secret in secrets)


@given(st.text())
def test_no_text_forges_a_line_or_reaches_the_terminal(text: str) -> None:
    (line,) = lines("x.y text=%s", text)
    assert line.isprintable()
    (line,) = lines("x.y text=%s", text, as_json=True)
    assert line.isascii()
    json.loads(line)
    shown = logs.shown(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 12 * (logs.FIELD_LIMIT + 1) + 2


def test_a_traceback_is_marked_line_by_line() -> None:
    found = lines("x.y", error=ValueError("a\n2026-01-01 INFO forged"))
    assert all(line.startswith("  | ") for line in found[1:])


def test_configured_once_it_carries_the_request() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        stream = io.StringIO()
        logs.configure("info", stream=stream)
        token = logs.request_id.set("request-1")
        logging.getLogger("a.b").info("x.y n=%d", 5)
        logs.request_id.reset(token)
        assert stream.getvalue().endswith("INFO    a.b x.y n=5 request=request-1\n")
    finally:
        root.handlers[:], root.level = handlers, level
        logging.captureWarnings(capture=False)


def test_as_json_each_field_stands_for_itself() -> None:
    arguments = ("deadlines", "no\nanswer", 3, 2.5, None)
    (line,) = lines("%s.failed error=%s after=%d ms=%.1f kind=%s", *arguments, as_json=True)
    found = json.loads(line)
    assert {name: found[name] for name in ("event", "error", "after", "ms", "kind")} == {
        "event": "deadlines.failed", "error": "no\\nanswer", "after": 3, "ms": 2.5, "kind": "None",
    }  # fmt: skip
    assert found["level"] == "warning"


@pytest.mark.parametrize(
    ("template", "arguments"),
    [("x.y", ()), ("x.y a=%s and so on", ("b",)), ("x.y a=b", ()), ("100 %% a=%s", ("b",)), ("%(a)s", ({"a": 1},))],
)
def test_what_is_no_list_of_fields_is_all_event(template: str, arguments: tuple[object, ...]) -> None:
    (line,) = lines(template, *arguments, as_json=True)
    assert json.loads(line)["event"]


def test_a_line_is_about_a_command_and_says_so_once() -> None:
    token = context.command.set(CommandId("command-1"))
    try:
        assert lines("x.y n=%d", 5)[0].endswith("x.y n=5 command=command-1")
        assert lines("x.y command=%s", "command-2")[0].endswith("x.y command=command-2")
        assert json.loads(lines("x.y n=%d", 5, as_json=True)[0])["command"] == "command-1"
        assert json.loads(lines("x.y command=%s", "command-2", as_json=True)[0])["command"] == "command-2"
    finally:
        context.command.reset(token)
