"""Telemetry: readings that come over HTTP, and the stream read back."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, headers, openapi, schemas
from api.callers import DeviceItselfOr, RequiresSome, Right, Sight, no_device, services
from api.edge import TELEMETRY_LIMIT
from api.problems import Problem, invalid
from api.streaming import NDJSON, Stream, line
from fabric.errors import TooManyRequests
from fabric.identity.issued import Caller
from fabric.telemetry import MAX_BATCH, Reading
from topology import wire
from topology.names import DeviceId

router = APIRouter(tags=["telemetry"])

READERS = 8  # at a time: each takes a channel of the gateway's one connection, which has 16

_WRITE = DeviceItselfOr("telemetry:write", name="channel")
_READ = RequiresSome("telemetry:read", produces=NDJSON.media_type)

Readings = list[tuple[bytes, str, int | None]]


def readers() -> asyncio.Semaphore:
    """The bound on simultaneous readers; one for each app."""
    return asyncio.Semaphore(READERS)


@router.post(
    "/v1/devices/{id}/telemetry/{channel}",
    response_model=schemas.AcceptedReadings,
    summary="Publish readings",
    **openapi.operation(
        _WRITE,
        refusals=(404,),
        body={
            NDJSON.media_type: {"type": "string", "description": 'Lines of `{"at": …, "value": …}`.'},
            "application/json": {},
            "*/*": {"type": "string", "format": "binary"},
        },
        parameters=(openapi.TRACEPARENT,),
    ),
)
async def publish(
    request: Request,
    id: schemas.DeviceId,
    channel: schemas.Dotted,
    query: Annotated[schemas.OneReading, Query()],
    _: Annotated[Caller, Depends(_WRITE)],
) -> Response:
    """One reading: any body in its own content type. A batch: `application/x-ndjson`, each line an object
    `{"at": …, "value": …}` (`at` may be left out). Answered once the broker has confirmed all of them; for the device
    itself, or for a service with `telemetry:write`."""
    known = services(request)
    if await known.registry.device(DeviceId(id)) is None:
        raise no_device(id)
    media = bodies.media_type(request)
    if media == NDJSON.media_type:
        if query.at is not None:
            raise invalid([("query:at", "In a batch, each line has its own 'at'.")])
        readings = _batch(await bodies.read(request, TELEMETRY_LIMIT))
    else:
        readings = [(*await _single(request, media), query.at)]
    traceparent = headers.traceparent(request.headers.getlist("traceparent"))
    await known.telemetry.publish(DeviceId(id), channel, readings, traceparent)
    return answers.answer({"accepted": len(readings)})


@router.get(
    "/v1/telemetry",
    response_class=Response,
    summary="Read the telemetry stream",
    **openapi.operation(
        _READ,
        refusals=(404, 429),
        answers={
            200: {
                "description": "One reading a line. Ends after `limit` readings, or `idle` seconds without one; "
                'should it fail on the way, the last line is `{"problem": …}`.',
                "content": {NDJSON.media_type: {"schema": {"type": "string"}}},
            }
        },
    ),
)
async def read(
    request: Request, query: Annotated[schemas.Read, Query()], caller: Annotated[Caller, Depends(_READ)]
) -> Response:
    """What the caller may read, from `first`, `next` or an offset. Readers keep their own place: the last
    line's `offset` and one."""
    places: asyncio.Semaphore = request.app.state.readers
    if places.locked():
        raise TooManyRequests("All places for reading the stream are taken; try again later.", 5)
    start = query.start if query.start in ("first", "next") else int(query.start)
    sight = Sight(request, caller, "telemetry:read")

    async def seen(reading: Reading) -> bool:
        return bool(await sight.among([reading], lambda each: (each.device, each.channel)))

    async def lines() -> AsyncGenerator[bytes, None]:
        async with places:
            reading = services(request).telemetry.read(
                start,
                device=None if query.device is None else DeviceId(query.device),
                channel=query.channel,
                limit=query.limit,
                idle=query.idle,
                seen=seen,
            )
            async with aclosing(reading):
                async for each in reading:
                    yield line(each.document())

    return Stream(NDJSON, lines(), Right(request), services(request).stopping)


async def _single(request: Request, media: str) -> tuple[bytes, str]:
    content_type = request.headers.get("content-type", "") if media else "application/octet-stream"
    if not wire.is_content_type(content_type):
        raise Problem("unsupported-media-type", "'Content-Type' must be type/subtype with plain parameters.")
    body = await bodies.read(request)
    if media == wire.JSON:
        bodies.parse(body)
    return body, content_type


def _batch(body: bytes) -> Readings:
    """Raises 400, 413 or 422 as a `Problem`, naming the line."""
    lines = body.split(b"\n")
    if lines[-1].strip() == b"":
        lines.pop()
    if not 1 <= len(lines) <= MAX_BATCH:
        raise invalid([("#", f"A batch has 1 to {MAX_BATCH} lines.")])
    return [_line(number, line) for number, line in enumerate(lines, 1)]


def _line(number: int, line: bytes) -> tuple[bytes, str, int | None]:
    try:
        given = bodies.check(schemas.NewReading, bodies.parse(line))
    except Problem as problem:
        problem.detail = f"Line {number}: {problem.detail}"
        raise
    value = json.dumps(given.value, separators=(",", ":"), ensure_ascii=False).encode()
    if len(value) > wire.MAX_BODY:
        raise Problem("too-large", f"Line {number}: a reading may have {wire.MAX_BODY} bytes at most.")
    return value, wire.JSON, given.at if "at" in given.model_fields_set else None
