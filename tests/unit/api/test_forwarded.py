"""Only the edge's word about a request's source counts."""

import pytest
from starlette.types import Receive, Scope, Send

from api.forwarded import BehindEdge

EDGE = "127.0.0.1"
STRANGER = "192.0.2.1"


async def source_of(peer: str, *forwarded: bytes, edge: str = EDGE) -> str:
    """What the app sees as the source of such a request."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["client"][0])

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    headers = [(b"x-forwarded-for", value) for value in forwarded]
    scope = {"type": "http", "client": (peer, 1234), "headers": headers}
    await BehindEdge(app, edge)(scope, nothing, nothing)  # type: ignore[arg-type]
    return seen[0]


@pytest.mark.parametrize(("said", "source"), [(b"203.0.113.9", "203.0.113.9"), (b" 2001:db8::1 ", "2001:db8::1")])
async def test_the_edge_is_believed(said: bytes, source: str) -> None:
    assert await source_of(EDGE, said) == source


async def test_a_stranger_is_not() -> None:
    assert await source_of(STRANGER, b"203.0.113.9") == STRANGER


@pytest.mark.parametrize(
    "forwarded", [(), (b"203.0.113.9", b"203.0.113.10"), (b"203.0.113.9, 10.0.0.1",), (b"x",), (b"\xff",), (b"",)]
)
async def test_what_is_not_one_address_is_left_out(forwarded: tuple[bytes, ...]) -> None:
    assert await source_of(EDGE, *forwarded) == EDGE


async def test_an_edge_that_is_not_found_is_nobody() -> None:
    assert await source_of(EDGE, b"203.0.113.9", edge="nowhere.invalid") == EDGE
