"""Devices: made, looked at, changed, deleted."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, headers, openapi, paging, schemas
from api.callers import OnDevice, RequiresSome, demand, no_device, services
from fabric.devices import Patch
from fabric.identity.issued import Caller
from fabric.identity.scopes import Target
from fabric.model import Device
from topology.names import DeviceId

router = APIRouter(tags=["devices"])

# A new device comes with an enrollment code, and issuing one has a scope of its own.
_CREATE = RequiresSome("devices:write", "devices:enroll")
_WRITE = OnDevice("devices:write")
_READ = OnDevice("devices:read")
_LIST = RequiresSome("devices:read")

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
    """A device with its mailbox and a one-time ticket. Putting it into groups needs `groups:write` for each. Narrowed
    scopes are enough when they are for this id, or for a group that it is put into."""
    given = await bodies.model(request, schemas.NewDevice)
    made_as = Target(given.id, given.groups)
    lacking = [action for action in _CREATE.actions if not caller.rights.may(action, made_as)]
    demand(caller, *(f"{action}@device:{given.id}" for action in lacking), *_writing(given.groups))
    known = services(request)
    limit = given.mailbox.limit if "mailbox" in given.model_fields_set else None
    made, invitation = await known.devices.create(DeviceId(given.id), tuple(given.groups), given.labels, limit)
    mailbox = await known.registry.mailbox(made.id)
    document = answers.device_with_mailbox(made, mailbox, known.backlog, known.clock.now())
    return answers.answer(
        document | {"enrollment": answers.invitation(invitation)},
        201,
        {"Location": f"/v1/devices/{made.id}", "ETag": answers.entity_tag(made), "Cache-Control": "no-store"},
    )


@router.get(
    "/v1/devices",
    response_model=schemas.DevicesPage,
    summary="List devices",
    **openapi.operation(_LIST),
)
async def listing(
    request: Request, page: Annotated[schemas.Page, Query()], caller: Annotated[Caller, Depends(_LIST)]
) -> Response:
    """Those that the caller may read, by id, without what their mailboxes hold."""
    rights = caller.rights

    async def behind(id: str | None, limit: int) -> list[Device]:
        return await services(request).devices.list(None if id is None else DeviceId(id), limit)

    async def seen(found: Sequence[Device]) -> list[Device]:
        return [each for each in found if rights.may("devices:read", Target(each.id, each.groups))]

    narrowed = None if rights.may("devices:read") else seen
    found, following = await paging.read(request, caller, page, behind, lambda each: each.id, narrowed)
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
    """A merge patch (RFC 7396). Changing groups needs `groups:write` for each that it joins or leaves; disabling closes
    its connections."""
    given = await bodies.model(request, schemas.DevicePatch, bodies.MERGE_PATCH)
    present = given.model_fields_set
    change = Patch(
        enabled=given.enabled if "enabled" in present else None,
        groups=tuple(given.groups) if "groups" in present else None,
        labels=given.labels if "labels" in present else None,
        backlog=(given.mailbox.limit or "default") if "mailbox" in present else None,
    )
    expected = await _expected_version(request, DeviceId(id))
    if change.groups is not None and not caller.rights.may("groups:write"):
        expected = await _regrouping(request, caller, DeviceId(id), change.groups, expected)
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
    document = answers.device_with_mailbox(found, mailbox, known.backlog, known.clock.now())
    return answers.answer(document, 200, {"ETag": answers.entity_tag(found)})


async def _regrouping(
    request: Request, caller: Caller, id: DeviceId, groups: Sequence[str], expected: int | None
) -> int:
    """The version that was looked at: only to that one may the groups be given."""
    found = await services(request).registry.device(id)
    if found is None:
        raise no_device(id)
    demand(caller, *_writing(sorted({*found.groups} ^ {*groups})))
    return expected or found.version


def _writing(groups: Sequence[str]) -> list[str]:
    return [f"groups:write@group:{group}" for group in groups]


async def _expected_version(request: Request, id: DeviceId) -> int | None:
    if_match = headers.entity_tags(request.headers.getlist("if-match"))
    if if_match is None:
        return None
    found, _ = await services(request).devices.get(id)
    return answers.expected_version(found, if_match)
