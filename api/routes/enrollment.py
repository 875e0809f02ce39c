"""How a device gets its identity, and learns whom to believe."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import answers, bodies, openapi, schemas
from api.callers import OnDevice, Public, services
from api.edge import source
from api.limits import SourceLimit
from fabric import presenting
from fabric.identity.issued import Caller
from topology.names import DeviceId

router = APIRouter(tags=["enrollment"])

ATTEMPTS = 30  # a minute, from one source
ATTEMPTS_IN_TOTAL = 600  # a minute

_ENROLL = OnDevice("devices:enroll")
_OPEN = Public()
_PEM = "application/x-pem-file"
_OPEN_PEM = Public(produces=_PEM)
_NO_STORE = {"Cache-Control": "no-store"}


def limit() -> SourceLimit:
    """The bound on attempts to enroll; one for each app."""
    return SourceLimit(ATTEMPTS, ATTEMPTS_IN_TOTAL)


@router.post(
    "/v1/devices/{id}/enrollment",
    status_code=201,
    response_model=schemas.InvitationDocument,
    summary="Make a new enrollment ticket",
    **openapi.operation(_ENROLL, refusals=(404,)),
)
async def invite(request: Request, id: schemas.DeviceId, _: Annotated[Caller, Depends(_ENROLL)]) -> Response:
    """Shown this once. It voids the tickets before it."""
    invitation = await services(request).devices.invite(DeviceId(id))
    return answers.answer(answers.invitation(invitation), 201, _NO_STORE)


@router.post(
    "/v1/enroll",
    response_model=schemas.EnrolledDocument,
    summary="Enroll: trade a code for the registration of a public key",
    **openapi.operation(_OPEN, refusals=(409, 410, 429, 503), body={"application/json": schemas.Enrolling}),
)
async def enroll(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """The same code with the same key gives the same answer for an hour."""
    attempts: SourceLimit = request.app.state.enrolling
    attempts.check(source(request.scope))
    given = await bodies.model(request, schemas.Enrolling)
    known = services(request)
    enrolled = await known.enrollment.redeem(given.code, given.public_key, given.proof)
    peering = known.peering
    document = {
        "device_id": enrolled.device.id,
        "amqps_url": peering.amqps_url,
        "api_url": peering.api_url,
        "audience": {"mq": peering.audiences.mq, "api": peering.audiences.api},
        "authority": peering.authorities.pem,
        "authorities_version": peering.authorities.present.serving_version,
        "signing_keys": peering.signing_keys.trusted(),
        "generation": enrolled.device.generation,
    }
    return answers.answer(document, 200, _NO_STORE)


@router.get(
    "/v1/authority",
    response_class=Response,
    summary="Read the authority's certificate",
    **openapi.operation(
        _OPEN_PEM,
        answers={
            200: {"description": "One certificate (PEM).", "content": {_PEM: {"schema": {"type": "string"}}}},
        },
    ),
)
async def authority(request: Request, _: Annotated[None, Depends(_OPEN_PEM)]) -> Response:
    """To be believed only when its SHA-256 is the one in a ticket."""
    pem = services(request).peering.authorities.pem
    return Response(pem.encode(), 200, {"Cache-Control": "public, max-age=60"}, _PEM)


@router.get(
    "/v1/authority/successors",
    response_model=schemas.SuccessorsDocument,
    summary="Read what the authorities said of their successors",
    **openapi.operation(_OPEN),
)
async def successors(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """For a device that was away while the authority was replaced: to be believed for the signatures' sake only."""
    told = services(request).peering.authorities.announcements(0)
    return answers.answer({"announcements": list(told)}, 200, {"Cache-Control": "public, max-age=60"})


@router.get(
    "/v1/time", response_model=schemas.TimeDocument, summary="Read the fabric's time", **openapi.operation(_OPEN)
)
async def now(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """For a device whose clock can't be right. It may only move the device's floor of time forward."""
    return answers.answer({"time": presenting.time(services(request).clock.now())}, 200, _NO_STORE)
