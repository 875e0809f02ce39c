"""Commands: sent, awaited, read."""

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, headers, openapi, schemas
from api.callers import Requires, services
from api.problems import Problem, invalid
from fabric import presenting
from fabric.commands import DEFAULT_RESPONSE_TIMEOUT, DEFAULT_TTL
from fabric.commands import Request as Order
from fabric.identity.issued import Caller
from fabric.presenting import Document
from fabric.waiting import is_settled
from topology import wire
from topology.names import CommandId, DeviceId

router = APIRouter(tags=["commands"])

_SEND = Requires("commands:send")
_READ = Requires("commands:read")

_ANY_BODY = "application/octet-stream"  # what a raw body without a type is
_CURSOR = rf"[0-9]{{1,17}}:{schemas.UUID7}"

_APPLIED = {"Preference-Applied": openapi.header("The `wait` that was honoured.")}
_LOCATION = {"Location": openapi.header("The command.")}
_SETTLED: dict[str, Any] = {
    "model": schemas.CommandDocument,
    "description": "The command, settled: whatever became of it.",
    "headers": _APPLIED | _LOCATION,
}
_OPEN: dict[str, Any] = {
    "model": schemas.CommandDocument,
    "description": "The command, accepted and not yet settled.",
    "headers": _APPLIED | _LOCATION,
}


@router.post(
    "/v1/devices/{id}/commands",
    response_model=schemas.CommandDocument,
    summary="Send a command",
    **openapi.operation(
        _SEND,
        refusals=(404,),
        body={"application/json": schemas.NewCommand, "*/*": {"type": "string", "format": "binary"}},
        parameters=(openapi.WAIT, openapi.TRACEPARENT),
        answers={200: _SETTLED, 202: _OPEN},
    ),
)
async def send(
    request: Request,
    id: schemas.DeviceId,
    query: Annotated[schemas.RawCommand, Query()],
    caller: Annotated[Caller, Depends(_SEND)],
) -> Response:
    """As JSON; or, with `?name=`, the body is the arguments in their own content type and the rest stands in
    the query. Without `Prefer: wait`, the answer comes after the broker's confirm, or half a second."""
    if "idempotency-key" in request.headers:
        raise Problem("not-supported", "'Idempotency-Key' is not supported yet; leave it out.")
    if "supersedes" in request.query_params:
        raise _no_supersedes()
    order = await (_raw if query.name is not None else _json)(request, DeviceId(id), query, caller)
    wait = headers.wait(request.headers.getlist("prefer"))
    return _answer(await services(request).commands.submit(order, wait), wait)


@router.get(
    "/v1/commands/{id}",
    response_model=schemas.CommandDocument,
    summary="Read a command",
    **openapi.operation(
        _READ,
        refusals=(404,),
        parameters=(openapi.WAIT,),
        answers={
            200: {
                "model": schemas.CommandDocument,
                "description": "The command as it is now, or once it was settled.",
                "headers": _APPLIED,
            }
        },
    ),
)
async def get(request: Request, id: schemas.Uuid, _: Annotated[Caller, Depends(_READ)]) -> Response:
    """With its timeline and outcome. `Prefer: wait` waits until it is settled."""
    wait = headers.wait(request.headers.getlist("prefer"))
    return answers.answer(await services(request).commands.find(CommandId(id), wait), 200, _applied(wait))


@router.get(
    "/v1/commands",
    response_model=schemas.CommandsPage,
    summary="List commands",
    **openapi.operation(_READ),
)
async def listing(
    request: Request, page: Annotated[schemas.CommandPage, Query()], _: Annotated[Caller, Depends(_READ)]
) -> Response:
    """The newest first. Args and results over 4 KiB are shown as `{"href": …}`."""
    last = answers.read_cursor(page.cursor, _CURSOR)
    ledger = services(request).ledger
    found = await ledger.commands(
        device=None if page.device is None else DeviceId(page.device),
        states=None if page.state is None else [page.state],
        issuer=page.issuer,
        after=None if last is None else _position(last),
        limit=page.limit,
    )
    records = await asyncio.gather(*(ledger.command(each.id) for each in found))
    items = [presenting.command(*record, brief=True) for record in records if record is not None]
    following = None
    if len(found) == page.limit:
        following = answers.cursor(f"{found[-1].accepted_at}:{found[-1].id}")
    return answers.page(items, following)


async def _json(request: Request, device: DeviceId, query: schemas.RawCommand, caller: Caller) -> Order:
    if query.model_fields_set:
        where = sorted(query.model_fields_set)
        raise invalid([(f"query:{name}", "In the query only beside 'name'; else in the body.") for name in where])
    value = await bodies.document(request)
    if isinstance(value, dict) and "supersedes" in value:
        raise _no_supersedes()
    given = bodies.check(schemas.NewCommand, value)
    body = json.dumps(given.args, separators=(",", ":"), ensure_ascii=False).encode()
    if len(body) > wire.MAX_BODY:
        raise bodies.too_large(wire.MAX_BODY)
    return Order(
        device,
        given.name,
        body,
        wire.JSON,
        caller.subject,
        given.ttl,
        given.response_timeout,
        given.claim,
        headers.traceparent(request.headers.getlist("traceparent")),
    )


async def _raw(request: Request, device: DeviceId, query: schemas.RawCommand, caller: Caller) -> Order:
    media = bodies.media_type(request)
    content_type = request.headers.get("content-type", _ANY_BODY) if media else _ANY_BODY
    if not wire.is_content_type(content_type):
        raise Problem("unsupported-media-type", "'Content-Type' must be type/subtype with plain parameters.")
    body = await bodies.read(request)
    if media == wire.JSON and body:
        bodies.parse(body)  # better refused here than by the device
    return Order(
        device,
        query.name or "",
        body,
        content_type,
        caller.subject,
        DEFAULT_TTL if query.ttl is None else query.ttl,
        DEFAULT_RESPONSE_TIMEOUT if query.response_timeout is None else query.response_timeout,
        bool(query.claim),
        headers.traceparent(request.headers.getlist("traceparent")),
    )


def _answer(document: Document, wait: int | None) -> Response:
    status = 200 if is_settled(document) else 202
    location = {"Location": f"/v1/commands/{document['id']}"}
    return answers.answer(document, status, location | _applied(wait))


def _applied(wait: int | None) -> dict[str, str]:
    return {} if wait is None else {"Preference-Applied": f"wait={wait}"}


def _position(cursor: str) -> tuple[int, CommandId]:
    at, _, id = cursor.partition(":")
    return int(at), CommandId(id)


def _no_supersedes() -> Problem:
    return Problem("not-supported", "'supersedes' is not supported yet; leave it out.")
