"""Commands: sent, awaited, read, withdrawn."""

import asyncio
import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, headers, openapi, paging, schemas
from api.callers import OutOfReach, RequiresSome, Right, Sight, may, reach, services
from api.problems import Problem, invalid
from api.services import Services
from fabric import presenting
from fabric.command import Command
from fabric.commands import DEFAULT_RESPONSE_TIMEOUT, DEFAULT_TTL, no_command
from fabric.commands import Request as Order
from fabric.errors import BacklogFull
from fabric.identity.issued import Caller
from fabric.presenting import Document
from fabric.waiting import is_settled
from topology import wire
from topology.names import CommandId, DeviceId

router = APIRouter(tags=["commands"])

_SEND = RequiresSome("commands:send")
_READ = RequiresSome("commands:read")

_SOON = 2  # seconds after which a connected device may have picked something up
_LONGEST_PAUSE = 3600  # seconds that a sender is asked to wait at most
_ANY_BODY = "application/octet-stream"  # what a raw body without a type is

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
        refusals=(404, 429),
        body={"application/json": schemas.NewCommand, "*/*": {"type": "string", "format": "binary"}},
        parameters=(openapi.WAIT, openapi.TRACEPARENT, openapi.IDEMPOTENCY_KEY),
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
    the query. Without `Prefer: wait`, the answer comes after the broker's confirm, or half a second. A repeat
    with the same `Idempotency-Key` within a day is answered with the command that the first request made. A device or a
    name out of the caller's scope is like an unknown device."""
    order = await (_raw if query.name is not None else _json)(request, DeviceId(id), query, caller)
    await reach(request, caller, "commands:send", id, order.name)
    wait = headers.wait(request.headers.getlist("prefer"))
    known = services(request)

    right = Right(request, lambda caller: reach(request, caller, "commands:send", id, order.name))
    try:
        document = await known.commands.submit(order, wait, right)
    except BacklogFull as full:
        raise await _backlog_full(known, DeviceId(id), full) from None
    return _answer(document, wait)


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
async def get(request: Request, id: schemas.Uuid, caller: Annotated[Caller, Depends(_READ)]) -> Response:
    """With its timeline and outcome. `Prefer: wait` waits until it is settled."""
    await _reach(request, caller, "commands:read", CommandId(id))
    wait = headers.wait(request.headers.getlist("prefer"))
    right = Right(request, lambda caller: _reach(request, caller, "commands:read", CommandId(id)))
    found = await services(request).commands.find(CommandId(id), wait, right)
    return answers.answer(found, 200, _applied(wait))


@router.delete(
    "/v1/commands/{id}",
    response_model=schemas.CommandDocument,
    summary="Withdraw a command",
    **openapi.operation(
        _SEND,
        refusals=(404, 409),
        answers={200: {"model": schemas.CommandDocument, "description": "The command, cancelled."}},
    ),
)
async def cancel(request: Request, id: schemas.Uuid, caller: Annotated[Caller, Depends(_SEND)]) -> Response:
    """As long as nobody has picked it up, by whoever may send it. Withdrawing it again changes nothing."""
    await _reach(request, caller, "commands:send", CommandId(id))
    return answers.answer(await services(request).commands.cancel(CommandId(id)))


@router.get(
    "/v1/commands",
    response_model=schemas.CommandsPage,
    summary="List commands",
    **openapi.operation(_READ),
)
async def listing(
    request: Request, page: Annotated[schemas.CommandPage, Query()], caller: Annotated[Caller, Depends(_READ)]
) -> Response:
    """Those of devices whose commands the caller may read, the newest first. Args and results over 4 KiB are shown as
    `{"href": …}`."""
    ledger = services(request).ledger
    # Of one device it is all or nothing; looking for what may be seen would tell how many there are.
    if page.device is not None and not await may(request, caller, "commands:read", page.device):
        return answers.page([], None)
    sight = Sight(request, caller, "commands:read")

    async def behind(last: str | None, limit: int) -> list[Command]:
        return await ledger.commands(
            device=None if page.device is None else DeviceId(page.device),
            states=None if page.state is None else [page.state],
            issuer=page.issuer,
            after=None if last is None else _position(last),
            limit=limit,
        )

    async def seen(found: Sequence[Command]) -> Sequence[Command]:
        return await sight.among(found, lambda each: (each.device, None))

    narrowed = None if caller.rights.may("commands:read") else seen
    found, following = await paging.read(request, caller, page, behind, _place, narrowed)
    records = await asyncio.gather(*(ledger.command(each.id) for each in found))
    items = [presenting.command(*record, brief=True) for record in records if record is not None]
    return answers.page(items, following)


async def _reach(request: Request, caller: Caller, action: str, id: CommandId) -> None:
    """Raises `NotFound` unless the caller may do this to the command's device, under the command's name."""
    if caller.rights.may(action):
        return
    found = await services(request).ledger.command(id)
    if found is None or not await may(request, caller, action, found[0].device, found[0].name):
        raise OutOfReach(no_command(id))


async def _json(request: Request, device: DeviceId, query: schemas.RawCommand, caller: Caller) -> Order:
    if query.model_fields_set:
        where = sorted(query.model_fields_set)
        raise invalid([(f"query:{name}", "In the query only beside 'name'; else in the body.") for name in where])
    given = bodies.check(schemas.NewCommand, await bodies.document(request))
    body = json.dumps(given.args, separators=(",", ":"), ensure_ascii=False).encode()
    if len(body) > wire.MAX_BODY:
        raise bodies.too_large(wire.MAX_BODY)
    return Order(
        device,
        given.name,
        body,
        wire.JSON,
        caller.identity,
        given.ttl,
        given.response_timeout,
        given.claim,
        headers.traceparent(request.headers.getlist("traceparent")),
        given.supersedes,
        _idempotency_key(request),
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
        caller.identity,
        DEFAULT_TTL if query.ttl is None else query.ttl,
        DEFAULT_RESPONSE_TIMEOUT if query.response_timeout is None else query.response_timeout,
        bool(query.claim),
        headers.traceparent(request.headers.getlist("traceparent")),
        query.supersedes,
        _idempotency_key(request),
    )


def _answer(document: Document, wait: int | None) -> Response:
    status = 200 if is_settled(document) else 202
    location = {"Location": f"/v1/commands/{document['id']}"}
    return answers.answer(document, status, location | _applied(wait))


def _applied(wait: int | None) -> dict[str, str]:
    return {} if wait is None else {"Preference-Applied": f"wait={wait}"}


def _place(command: Command) -> str:
    return f"{command.accepted_at}:{command.id}"


def _position(place: str) -> tuple[int, CommandId]:
    at, _, id = place.partition(":")
    return int(at), CommandId(id)


def _idempotency_key(request: Request) -> str | None:
    """Raises a 422 `Problem`."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) != 1 or not re.fullmatch(schemas.KEY, given[0], re.ASCII):
        raise invalid([("header:Idempotency-Key", "Send it once, as 1 to 128 visible ASCII characters.")])
    return given[0]


async def _backlog_full(known: Services, id: DeviceId, full: BacklogFull) -> Problem:
    device = await known.registry.device(id)
    connected = device is not None and device.connected
    after = _SOON if connected else min(math.ceil(full.retry_after), _LONGEST_PAUSE)
    return Problem(
        full.code,
        f"{full}. Try again later, or raise the mailbox's limit.",
        headers={"Retry-After": str(max(after, 1))},
        members={
            "mailbox": {"depth": full.depth, "limit": full.limit, "oldest_age": full.oldest_age},
            "connection": "connected" if connected else "disconnected",
            "last_seen": presenting.optional_time(None if device is None else device.last_seen),
        },
    )
