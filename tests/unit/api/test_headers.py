"""Request headers, read as their RFCs say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import headers


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ([], None),
        (["wait=10"], 10),
        (["WAIT = 10"], 10),
        (['wait="10"'], 10),
        (["respond-async, wait=5; x=1"], 5),
        (["handling=lenient", "wait=7"], 7),
        (["wait=3, wait=9"], 3),
        (["wait=600"], 60),
        (["wait=0"], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=9999999999999"], None),
        (["wait"], None),
        (["wait=\u0663"], None),
        (["waiting=5"], None),
    ],
)
def test_wait(prefer: list[str], seconds: int | None) -> None:
    assert headers.wait(prefer) == seconds


@pytest.mark.parametrize(
    ("accept", "produced", "allowed"),
    [
        ([], "application/json", True),
        (["*/*"], "application/json", True),
        (["text/html, application/*;q=0.5"], "application/json", True),
        (["text/html"], "application/json", False),
        (["application/json;q=0, */*"], "application/json", False),
        (["*/*;q=0"], "application/json", False),
        (["application/json"], "application/x-ndjson", False),
        (["text/html", "application/json"], "application/json", True),
    ],
)
def test_accept(accept: list[str], produced: str, allowed: bool) -> None:
    assert headers.accepts(accept, produced) is allowed


@pytest.mark.parametrize(
    ("given_header", "tags"),
    [
        ([], None),
        (["*"], {"*"}),
        (['"1.2"'], {'"1.2"'}),
        (['"1.2", "1.3"'], {'"1.2"', '"1.3"'}),
        (['W/"1.2"'], {'W/"1.2"'}),
        (["1.2"], set()),
    ],
)
def test_if_match(given_header: list[str], tags: set[str] | None) -> None:
    assert headers.entity_tags(given_header) == tags


IDS = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("given_header", "kept"),
    [
        ([f"00-{IDS}-01"], f"00-{IDS}-01"),
        ([f"01-{IDS}-00"], f"00-{IDS}-00"),
        ([f"cc-{IDS}-00-what.the-future-holds"], f"00-{IDS}-00"),
        ([], None),
        ([f"00-{IDS}-01", f"00-{IDS}-01"], None),
        ([f"00-{IDS}-01-more"], None),
        ([f"cc-{IDS}-00.more"], None),
        ([f"ff-{IDS}-01"], None),
        ([f"00-{IDS}-1"], None),
        ([f"00-{IDS.upper()}-01"], None),
        ([f"00-{'0' * 32}-00f067aa0ba902b7-01"], None),
        ([f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01"], None),
        ([f"01-{'0' * 32}-00f067aa0ba902b7-01"], None),
    ],
)
def test_traceparent(given_header: list[str], kept: str | None) -> None:
    assert headers.traceparent(given_header) == kept


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=80), max_size=3))
def test_nothing_breaks_them(garbage: list[str]) -> None:
    wait = headers.wait(garbage)
    assert wait is None or 1 <= wait <= headers.LONGEST_WAIT
    headers.accepts(garbage, "application/json")
    headers.entity_tags(garbage)
    headers.traceparent(garbage)
    for each in garbage:
        headers.media_type(each)
