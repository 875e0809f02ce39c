"""The keys of devices: listed, added by the devices themselves, and taken away."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from api import answers, bodies, openapi, schemas
from api.callers import DeviceItself, DeviceItselfOr, OnDevice, no_device, services
from fabric.identity.issued import Caller
from topology.names import DeviceId

router = APIRouter(tags=["keys"])

_READ = DeviceItselfOr("devices:read")
_REVOKE = OnDevice("devices:write")
_DROP = DeviceItselfOr("devices:write")
_ADD = DeviceItself()

Thumbprint = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{43}$", max_length=43)]


@router.get(
    "/v1/devices/{id}/keys",
    response_model=schemas.KeysPage,
    summary="List a device's keys",
    **openapi.operation(_READ, refusals=(404,)),
)
async def keys(request: Request, id: schemas.DeviceId, _: Annotated[Caller, Depends(_READ)]) -> Response:
    """All of them in one page: there are few."""
    registry = services(request).registry
    if await registry.device(DeviceId(id)) is None:
        raise no_device(id)
    return answers.page([answers.key(each) for each in await registry.keys(DeviceId(id))], None)


@router.post(
    "/v1/devices/{id}/keys",
    status_code=201,
    response_model=schemas.KeyDocument,
    summary="Add a key to the device",
    **openapi.operation(
        _ADD,
        refusals=(409,),
        body={"application/json": schemas.NewKey},
        answers={200: {"model": schemas.KeyDocument, "description": "It was added before."}},
    ),
)
async def add(request: Request, id: schemas.DeviceId, caller: Annotated[Caller, Depends(_ADD)]) -> Response:
    """By the device, with a token of its present key, which stays good: it has three at most. The proof is of `typ`
    `restante-key+jwt`, with the claims `device`, `parent` and `iat`."""
    given = await bodies.model(request, schemas.NewKey)
    key, new = await services(request).rotation.add(DeviceId(id), caller.kid or "", given.public_key, given.proof)
    return answers.answer(answers.key(key), 201 if new else 200)


@router.delete(
    "/v1/devices/{id}/keys/{kid}",
    response_model=schemas.RevocationDocument,
    summary="Revoke or drop a key",
    **openapi.operation(_DROP, refusals=(404,)),
)
async def drop(
    request: Request, id: schemas.DeviceId, kid: Thumbprint, caller: Annotated[Caller, Depends(_DROP)]
) -> Response:
    """By an operator: with all that were registered under it. By the device itself: only a key that its present one was
    registered under, which stays good. The device's connections are closed when the answer comes."""
    revocation = services(request).revocation
    if caller.kid is not None:
        return answers.answer(answers.revoked(await revocation.retire(DeviceId(id), kid, caller.kid)))
    return answers.answer(answers.revoked(await revocation.key(DeviceId(id), kid)))


@router.post(
    "/v1/devices/{id}/revoke",
    response_model=schemas.RevocationDocument,
    summary="Revoke a device",
    **openapi.operation(_REVOKE, refusals=(404,)),
)
async def revoke(request: Request, id: schemas.DeviceId, _: Annotated[Caller, Depends(_REVOKE)]) -> Response:
    """All its keys and tickets are void, waiting commands are cancelled, and its connections are closed when the answer
    comes. The device is still there: it can be enrolled again."""
    return answers.answer(answers.revoked(await services(request).revocation.device(DeviceId(id))))
