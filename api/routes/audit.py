"""The audit: who did what to which device, when, from where, with which token."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, openapi, paging, schemas
from api.callers import RequiresSome, Sight, may, services
from fabric.audit import Entry
from fabric.identity.issued import Caller
from topology.names import DeviceId

router = APIRouter(tags=["audit"])

_READ = RequiresSome("audit:read")


@router.get("/v1/audit", response_model=schemas.AuditPage, summary="Read the audit", **openapi.operation(_READ))
async def listing(
    request: Request, page: Annotated[schemas.AuditQuery, Query()], caller: Annotated[Caller, Depends(_READ)]
) -> Response:
    """The newest first. With a narrowed scope, what was done to those devices; what was done to none (tokens, the
    database) needs one that is not narrowed."""
    if page.device is not None and not await may(request, caller, "audit:read", page.device):
        return answers.page([], None)
    audit = services(request).audit
    sight = Sight(request, caller, "audit:read")

    async def behind(last: str | None, limit: int) -> list[Entry]:
        return await audit.entries(
            device=None if page.device is None else DeviceId(page.device),
            subject=page.subject,
            action=page.action,
            since=page.since,
            until=page.until,
            after=None if last is None else _position(last),
            limit=limit,
        )

    async def seen(found: Sequence[Entry]) -> Sequence[Entry]:
        to_devices = [(each.deed.device, each) for each in found if each.deed.device is not None]
        return [each for _, each in await sight.among(to_devices, lambda pair: (pair[0], None))]

    narrowed = None if caller.rights.may("audit:read") else seen
    found, following = await paging.read(request, caller, page, behind, _place, narrowed)
    return answers.page([answers.audited(each) for each in found], following)


def _place(entry: Entry) -> str:
    return f"{entry.at}:{entry.position}"


def _position(place: str) -> tuple[int, int]:
    at, _, position = place.partition(":")
    return int(at), int(position)
