"""Refusals, for the audit: who was turned away, from what."""

import logging

from fastapi import Request

from api import logs
from api.callers import OutOfReach
from api.limits import SourceLimit
from api.problems import Problem
from fabric.audit import Action, Deed, Kind, acting
from fabric.errors import Temporary, TooManyRequests, Unauthenticated
from topology import names
from topology.names import DeviceId

log = logging.getLogger(__name__)

OF_ONE = 5  # refusals a minute of one source that are recorded
IN_TOTAL = 10  # a minute, by each process; and as many again of callers whose token holds

_ON_DEVICE = "/v1/devices/{id}"


class Refusals:
    """Records what callers were refused for their token or its rights, within bounds; what is over is counted, and told
    with the next. Requests that have no token at all are not recorded."""

    def __init__(self) -> None:
        self._anonymous, self._known = SourceLimit(OF_ONE, IN_TOTAL), SourceLimit(OF_ONE, IN_TOTAL)
        self._left_out = 0

    async def note(self, request: Request, error: Exception) -> None:
        """Look at the error that a request ends with. Never raises for what a caller sent."""
        code = _code(error)
        if code is None or "authorization" not in request.headers:
            return
        by = acting()
        try:
            (self._anonymous if by.kind is Kind.ANONYMOUS else self._known).check(by.address)
        except TooManyRequests:
            self._left_out += 1
            return
        detail: dict[str, object] = {"operation": f"{request.method} {request.scope['route'].path}"}
        if self._left_out:
            detail["unrecorded"], self._left_out = self._left_out, 0
        deed = Deed(Action.REQUEST_REFUSED, _device(request), detail, code)
        try:
            await request.app.state.services.audit.record(deed)
        except Temporary as failed:
            self._left_out += 1
            log.warning("audit.unrecorded error=%s", logs.shown(str(failed)))


def _code(error: Exception) -> str | None:
    """What it was refused with, if that was for who asked."""
    match error:
        case Problem(code=("unauthenticated" | "forbidden") as code):
            return str(code)
        case Unauthenticated() | OutOfReach():
            return error.code
    return None


def _device(request: Request) -> DeviceId | None:
    """The one that the path names."""
    id = request.path_params.get("id")
    under = request.scope["route"].path.startswith(_ON_DEVICE)
    return DeviceId(id) if under and isinstance(id, str) and names.is_device(id) else None
