"""Events: everything that happened to commands and devices, as it happens, as server-sent events."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import openapi, schemas, streaming
from api.callers import RequiresSome, Right, services
from api.problems import invalid
from api.streaming import SSE, Stream
from fabric.errors import LedgerUnavailable, TooManyRequests
from fabric.events import Filter
from fabric.feed import Gap, Item, Lagging, Place, Reset, Told
from fabric.identity.issued import Caller

router = APIRouter(tags=["events"])

FOLLOWERS = 200  # at a time: each may have a page of events in memory

_FOLLOW = RequiresSome("commands:read", "devices:read", produces=SSE.media_type)
_ID = re.compile(schemas.POSITION, re.ASCII)
_BLOCK = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": f"^{schemas.POSITION}$"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def followers() -> asyncio.Semaphore:
    """The bound on simultaneous followers; one for each app."""
    return asyncio.Semaphore(FOLLOWERS)


@router.get(
    "/v1/events",
    response_class=Response,
    summary="Follow the events",
    **openapi.operation(
        _FOLLOW,
        refusals=(429,),
        parameters=(openapi.LAST_EVENT_ID,),
        answers={
            200: {
                "description": "`id` is an event's position, `event` its kind, `data` an `EventDocument`. Every 15 s "
                "without one, a block of an `id` alone. Also `event: lagging` (`{behind}`), `event: gap` "
                "(`{through}`: events up to there may have been pruned), `event: reset` (`{position}`: the place was "
                "beyond the end) and, before it ends with an error, `event: problem`. Ends after an hour.",
                "content": {SSE.media_type: {"schema": _BLOCK}},
            }
        },
    ),
)
async def follow(
    request: Request, query: Annotated[schemas.Follow, Query()], caller: Annotated[Caller, Depends(_FOLLOW)]
) -> Response:
    """What the caller may read, from behind `Last-Event-ID`, else behind `after`, else from now on. Of several values
    of a filter one must fit, of several filters all; a kind may end in `.*`."""
    after = _place(request, query)
    places: asyncio.Semaphore = request.app.state.followers
    if places.locked():
        raise TooManyRequests("All places for following the events are taken; try again later.", 5)
    wanted = Filter(frozenset(query.device), frozenset(query.group), frozenset(query.kind), caller.rights)

    async def blocks() -> AsyncGenerator[bytes, None]:
        async with places, aclosing(services(request).feed.follow(after, wanted)) as items:
            async for item in items:
                yield _block(item)

    return Stream(SSE, blocks(), _Following(request), services(request).stopping)


class _Following(Right):
    async def check(self) -> None:
        # Tokens are in the ledger, like the events: while that is away there is nothing to be told, either.
        with suppress(LedgerUnavailable):
            await super().check()


def _place(request: Request, query: schemas.Follow) -> int | None:
    given = request.headers.getlist("last-event-id")
    if not given:
        return query.after
    if len(given) > 1 or not _ID.fullmatch(given[0]):
        raise invalid([("header:Last-Event-ID", "Send the 'id' of the last event, once: a position in decimal.")])
    return int(given[0])


def _block(item: Item) -> bytes:
    match item:
        case Told(row):
            return streaming.block(id=row.position, event=row.kind, data=item.text)
        case Place(position):
            return streaming.block(id=position)
        case Gap(through):
            return streaming.notice("gap", {"through": through})
        case Lagging(behind):
            return streaming.notice("lagging", {"behind": behind})
        case Reset(position):
            return streaming.notice("reset", {"position": position}, id=position)
