"""Devices: made, looked at, changed, deleted."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, headers, openapi, schemas
from api.callers import Requires, demand, services
from fabric.devices import Patch
from fabric.identity.issued import Caller
from topology import names
from topology.names import DeviceId

router = APIRouter(tags=["devices"])

# A new device comes with an enrollment code, and issuing one has a scope of its own.
_CREATE = Requires("devices:write", "devices:enroll")
_WRITE = Requires("devices:write")
_READ = Requires("devices:read")
_GROUPS = "groups:write"

_ETAG: dict[str, Any] = {"ETag": openapi.header("The device's version, for `If-Match`.")}


@router.post(
    "/v1/devices",
    status_code=201,
    response_model=schemas.NewDeviceDocument,
    summary="Make a device",
    **openapi.operation(
        _CREATE,
        refusals=(409,),
        body={"application/json": schemas.NewDevice},
        answers={
            201: {
                "model": schemas.NewDeviceDocument,
                "description": "The device, and the ticket to enroll it, shown this once.",
                "headers": _ETAG | {"Location": openapi.header("The device.")},
            }
        },
    ),
)
async def create(request: Request, caller: Annotated[Caller, Depends(_CREATE)]) -> Response:
    """A device with its mailbox and a one-time ticket. Putting it into groups needs `groups:write` too."""
    given = await bodies.model(request, schemas.NewDevice)
    if given.groups:
        demand(caller, _GROUPS)
    known = services(request)
    made, invitation = await known.devices.create(DeviceId(given.id), tuple(given.groups), given.labels)
    mailbox = await known.registry.mailbox(made.id)
    document = answers.device_with_mailbox(made, mailbox, known.clock.now())
    return answers.answer(
        document | {"enrollment": answers.invitation(invitation)},
        201,
        {"Location": f"/v1/devices/{made.id}", "ETag": answers.entity_tag(made), "Cache-Control": "no-store"},
    )


@router.get(
    "/v1/devices",
    response_model=schemas.DevicesPage,
    summary="List devices",
    **openapi.operation(_READ),
)
async def listing(
    request: Request, page: Annotated[schemas.Page, Query()], _: Annotated[Caller, Depends(_READ)]
) -> Response:
    """By id, without what their mailboxes hold."""
    after = answers.read_cursor(page.cursor, names.DEVICE_ID)
    found = await services(request).devices.list(None if after is None else DeviceId(after), page.limit)
    following = answers.cursor(found[-1].id) if len(found) == page.limit else None
    return answers.page([answers.device(each) for each in found], following)


@router.get(
    "/v1/devices/{id}",
    response_model=schemas.DeviceDocument,
    summary="Read a device",
    **openapi.operation(
        _READ,
        refusals=(404,),
        answers={200: {"model": schemas.DeviceDocument, "description": "The device.", "headers": _ETAG}},
    ),
)
async def get(request: Request, id: schemas.DeviceId, _: Annotated[Caller, Depends(_READ)]) -> Response:
    """With its connection and what its mailbox holds, both as the ledger knows them."""
    return await _shown(request, DeviceId(id))


@router.patch(
    "/v1/devices/{id}",
    response_model=schemas.DeviceDocument,
    summary="Change a device",
    **openapi.operation(
        _WRITE,
        refusals=(404, 412),
        body={bodies.MERGE_PATCH: schemas.DevicePatch},
        parameters=(openapi.IF_MATCH,),
        answers={200: {"model": schemas.DeviceDocument, "description": "The changed device.", "headers": _ETAG}},
    ),
)
async def patch(request: Request, id: schemas.DeviceId, caller: Annotated[Caller, Depends(_WRITE)]) -> Response:
    """A merge patch (RFC 7396). Changing groups needs `groups:write` too; disabling closes its connections."""
    given = await bodies.model(request, schemas.DevicePatch, bodies.MERGE_PATCH)
    present = given.model_fields_set
    if "groups" in present:
        demand(caller, _GROUPS)
    change = Patch(
        enabled=given.enabled if "enabled" in present else None,
        groups=tuple(given.groups) if "groups" in present else None,
        labels=given.labels if "labels" in present else None,
    )
    expected = await _expected_version(request, DeviceId(id))
    await services(request).devices.patch(DeviceId(id), change, expected)
    return await _shown(request, DeviceId(id))


@router.delete(
    "/v1/devices/{id}",
    status_code=204,
    summary="Delete a device",
    **openapi.operation(_WRITE, refusals=(404, 412), parameters=(openapi.IF_MATCH,)),
)
async def delete(request: Request, id: schemas.DeviceId, _: Annotated[Caller, Depends(_WRITE)]) -> Response:
    """With its keys, its mail and its connections; what is open is settled."""
    expected = await _expected_version(request, DeviceId(id))
    await services(request).devices.delete(DeviceId(id), expected)
    return Response(status_code=204)


async def _shown(request: Request, id: DeviceId) -> Response:
    known = services(request)
    found, mailbox = await known.devices.get(id)
    document = answers.device_with_mailbox(found, mailbox, known.clock.now())
    return answers.answer(document, 200, {"ETag": answers.entity_tag(found)})


async def _expected_version(request: Request, id: DeviceId) -> int | None:
    if_match = headers.entity_tags(request.headers.getlist("if-match"))
    if if_match is None:
        return None
    found, _ = await services(request).devices.get(id)
    return answers.expected_version(found, if_match)
