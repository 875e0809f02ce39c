"""Python handlers: arguments checked before the start, outcomes after."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import Agent, CommandFailed, Context, Result, arguments, errors, handlers
from topology import names, wire

COMMAND = wire.Command(
    id=names.CommandId("0199c0de-0000-7000-8000-000000000001"),
    name="a.b",
    body=b"{}",
    content_type=wire.JSON,
    not_after=2**50,
    response_timeout=30_000,
    issuer="billing",
    seq=1,
    attempt=1,
    claim=False,
    generation=1,
    sig="",
    sig_kid="",
    at=0,
)


def run(function: Callable[..., Any], args: object = None, *, body: bytes | None = None, kind: str = wire.JSON) -> Any:
    """The `Done` of a handler, or the reason it was not started."""
    source = handlers.PythonHandlers()
    source.register("a.b", function, idempotent=False)
    content = json.dumps(args or {}).encode() if body is None else body
    command = replace(COMMAND, body=content, content_type=kind)
    try:
        job = handlers.bind([source], command)
    except handlers.CannotTake as error:
        return str(error)
    return job.run(Context(names.DeviceId("garage-7"), command, lambda _: None))


def value(done: Any) -> Any:
    assert done.status == "succeeded", done
    return json.loads(done.body)


def test_arguments_reach_the_handler_as_annotated() -> None:
    def handle(
        a: int, b: float, c: str, d: bool, e: list[int], f: dict[str, float], g: int | None = None, h: Any = 7
    ) -> list[object]:
        return [a, b, c, d, e, f, g, h]

    args = {"a": 1, "b": 2, "c": "x", "d": True, "e": [1], "f": {"k": 1}, "g": None}
    assert value(run(handle, args)) == [1, 2.0, "x", True, [1], {"k": 1.0}, None, 7]


def _typed(annotation: object) -> Callable[..., Any]:
    def handle(a: Any) -> None:
        return

    handle.__annotations__["a"] = annotation
    return handle


@pytest.mark.parametrize(
    ("annotation", "given", "said"),
    [
        (int, "1", "argument 'a' must be an integer, not \"1\""),
        (int, True, "argument 'a' must be an integer, not true"),
        (int, 1.0, "an integer"),
        (float, "x", "a number"),
        (float, True, "a number"),
        (bool, 1, "true or false"),
        (str, None, "a text"),
        (list[int], [1, "x"], "argument 'a'[1] must be an integer"),
        (dict[str, int], {"k": "x"}, "argument 'a'['k'] must be an integer"),
        (int | None, "x", "an integer or null"),
        (Literal["open", "closed"], "ajar", 'one of "open", "closed"'),
    ],
)
def test_wrong_types_are_refused_and_named(annotation: object, given: object, said: str) -> None:
    reason = run(_typed(annotation), {"a": given})
    assert reason.startswith("invalid-arguments: ")
    assert said in reason


def test_missing_and_unknown_arguments_are_named() -> None:
    assert run(_typed(int), {}) == "invalid-arguments: argument 'a' is missing; it must be an integer"
    assert run(_typed(int), {"a": 1, "b\x1b": 2}) == "invalid-arguments: unknown argument 'b\\u001b'; known: a"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"1", b'"x"', b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b'{"a": Infinity}']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert run(_typed(float), body=body).startswith("invalid-arguments: ")


@pytest.mark.parametrize("body", [b"", b"{}", b"null"])
def test_no_arguments_may_be_said_in_three_ways(body: bytes) -> None:
    assert run(lambda: "ran", body=body).status == "succeeded"


def test_another_content_type_needs_a_handler_for_raw_bytes() -> None:
    def handle(picture: bytes, context: Context) -> Result:
        return Result(picture[::-1], context.content_type)

    done = run(handle, body=b"\x00\x01", kind="image/png")
    assert (done.body, done.content_type) == (b"\x01\x00", "image/png")
    assert "must be application/json" in run(_typed(int), body=b"\x00", kind="image/png")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.sampled_from([int, float, str, bool, list[int], dict[str, str], int | None, list[dict[str, float | None]]]),
)
def test_conversion_either_fits_or_says_no(given: object, annotation: object) -> None:
    try:
        converted = arguments.convert(given, annotation, "a")
    except arguments.BadArguments:
        return
    assert arguments.convert(converted, annotation, "a") == converted


def test_failures() -> None:
    def fail() -> None:
        raise CommandFailed("the door is stuck")

    def raise_error() -> None:
        raise ValueError("x" * 10_000)

    def leave() -> None:
        raise SystemExit(3)

    assert run(fail).reason == "the door is stuck"
    assert run(raise_error).status == "failed"
    assert len(run(raise_error).reason) == wire.MAX_REASON
    assert run(leave).reason == "SystemExit: 3"


@pytest.mark.parametrize("result", [object(), {1, 2}, float("nan"), "x" * wire.MAX_BODY])
def test_a_result_that_can_not_be_said_fails(result: object) -> None:
    done = run(lambda: result)
    assert done.status == "failed"
    assert "result" in done.reason


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def test_async_handlers_run_on_their_loop(loop: asyncio.AbstractEventLoop) -> None:
    async def handle(a: int) -> int:
        await asyncio.sleep(0)
        return a + 1

    source = handlers.PythonHandlers()
    source.register("a.b", handle, idempotent=False)
    source.loop = loop
    command = replace(COMMAND, body=b'{"a": 1}')
    done = handlers.bind([source], command).run(Context(names.DeviceId("garage-7"), command, lambda _: None))
    assert value(done) == 2


def test_an_unknown_command_is_said_to_be_unknown() -> None:
    with pytest.raises(handlers.CannotTake, match="unknown-command"):
        handlers.bind([handlers.PythonHandlers()], COMMAND)


def _variadic(*values: int) -> None:
    return


def _unannotated(a) -> None:  # type: ignore[no-untyped-def]  # the point
    return


def _two_ways(raw: bytes, a: int) -> None:
    return


@pytest.mark.parametrize("function", [_variadic, _unannotated, _two_ways, _typed(set[int]), _typed(dict[int, int])])
def test_a_signature_that_can_not_be_checked_is_refused_at_once(function: Callable[..., Any]) -> None:
    with pytest.raises(errors.BadHandler):
        Agent().command("a.b")(function)


def test_names_are_checked_and_taken_once() -> None:
    agent = Agent()
    agent.command("door.close")(lambda: None)
    with pytest.raises(errors.BadHandler, match="two handlers"):
        agent.command("door.close")(lambda: None)
    with pytest.raises(errors.BadHandler, match="command name"):
        agent.command("../x")(lambda: None)
    assert agent.commands == ["door.close"]
