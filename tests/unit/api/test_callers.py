"""Guards and lists: who costs a read, and no page that costs more than a few."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Request
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st

from api import paging, schemas
from api.callers import OnDevice, Public, Requires, RequiresSome, Sight, may
from api.paging import STEP, STEPS, Cursors
from api.problems import Problem
from api.routes import ROUTERS
from fabric.identity import scopes
from fabric.identity.issued import Caller
from topology.names import DeviceId

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


class Groups:
    """Plays the registry's part: what devices are in, and how often somebody asked."""

    def __init__(self, **groups: tuple[str, ...]) -> None:
        self._groups = groups
        self.asked: list[list[str]] = []

    async def groups(self, ids: Sequence[DeviceId]) -> dict[str, tuple[str, ...]]:
        self.asked.append(list(ids))
        return {id: self._groups[id] for id in ids if id in self._groups}


def request(registry: object = None) -> Request:
    services = SimpleNamespace(registry=registry, cursors=Cursors("a secret"))
    app = SimpleNamespace(state=SimpleNamespace(services=services))
    return cast("Request", SimpleNamespace(app=app, url=SimpleNamespace(path="/v1/things")))


def caller(*granted: str) -> Caller:
    return Caller("somebody", "jti", scopes.parse(" ".join(granted)))


def guard(route: APIRoute) -> Any:
    (found,) = [each.call for each in route.dependant.dependencies]
    return found


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{sorted(route.methods)} {route.path}")
def test_every_route_has_one_guard_that_fits_its_path(route: APIRoute) -> None:
    found = guard(route)
    assert isinstance(found, Public | Requires)
    # Commands look at the name too, which is in the body.
    if route.path.startswith("/v1/devices/{id}") and route.path != "/v1/devices/{id}/commands":
        assert isinstance(found, OnDevice), "a narrowed caller must not get past its devices"
    for action in getattr(found, "actions", ()):
        named = scopes.NARROWED[action] is scopes.Narrowing.NAME
        if isinstance(found, OnDevice) and named:
            assert found.name in route.param_convertors
        if not isinstance(found, RequiresSome):
            with pytest.raises(Problem):
                found.admit(caller(f"{action}@device:a", f"{action}@group:a"))


async def test_who_is_not_narrowed_costs_no_read() -> None:
    """Nor does who is narrowed to devices: their groups make no difference."""
    nothing = request(object())
    assert await may(nothing, caller("commands:send"), "commands:send", "a", "x")
    assert await may(nothing, caller("commands:send@device:a"), "commands:send", "a", "x")
    assert not await may(nothing, caller("commands:send@device:a"), "commands:send", "b", "x")
    assert not await may(nothing, caller("commands:read@group:a"), "commands:send", "b", "x")


async def test_who_is_narrowed_to_a_group_costs_one() -> None:
    registry = Groups(a=("g",), b=("h",))
    for id, allowed in (("a", True), ("b", False), ("c", False)):
        assert await may(request(registry), caller("commands:send@group:g"), "commands:send", id, "x") is allowed
    assert registry.asked == [["a"], ["b"], ["c"]]


async def test_a_stream_reads_each_device_once_a_second() -> None:
    registry = Groups(a=("g",), b=("h",))
    sight = Sight(request(registry), caller("telemetry:read@group:g/x.*"), "telemetry:read")
    come = [(DeviceId(id), name) for id in "abca" for name in ("x.y", "x", "z")]
    for _ in range(3):
        assert await sight.among(come, lambda each: each) == [("a", "x.y")] * 2
    assert registry.asked == [["a", "b", "c"]]


def numbers(total: int, reads: list[int]) -> Any:
    async def behind(last: str | None, limit: int) -> list[int]:
        reads.append(limit)
        start = 0 if last is None else int(last) + 1
        return list(range(start, min(start + limit, total)))

    return behind


@given(total=st.integers(0, 2500), limit=st.integers(1, 100), every=st.integers(1, 1500))
async def test_pages_hold_everything_that_may_be_seen_once(total: int, limit: int, every: int) -> None:
    found: list[int] = []
    cursor: str | None = None

    async def seen(things: Sequence[int]) -> list[int]:
        return [thing for thing in things if thing % every == 0]

    while True:
        reads: list[int] = []
        page, cursor = await paging.read(
            request(), caller(), schemas.Page(cursor=cursor, limit=limit), numbers(total, reads), str, seen
        )
        assert len(page) <= limit
        assert len(reads) <= STEPS
        assert set(reads) == {STEP}
        found += page
        if cursor is None:
            break
    assert found == list(range(0, total, every))


async def test_a_page_without_a_filter_is_one_read() -> None:
    reads: list[int] = []
    page, cursor = await paging.read(request(), caller(), schemas.Page(limit=7), numbers(20, reads), str)
    assert (page, reads) == (list(range(7)), [7])
    assert cursor is not None


@given(st.text(alphabet="ABab01-_", max_size=150), st.text(min_size=1, max_size=80))
def test_no_other_text_is_a_cursor(cursor: str, last: str) -> None:
    cursors, bound = Cursors("a secret"), ("somebody", "/v1/things", {})
    sealed = cursors.seal(last, bound)
    assert cursors.open(sealed, bound) == last
    for other in (cursor, sealed[:-1], f"{sealed}A", sealed.swapcase()):
        if other != sealed:
            with pytest.raises(Problem):
                cursors.open(other, bound)
    with pytest.raises(Problem):
        cursors.open(sealed, ("another", "/v1/things", {}))
    with pytest.raises(Problem):
        Cursors("another").open(sealed, bound)
