"""Is the gateway alive, and ready?"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import answers, openapi, schemas
from api.callers import Public, services
from api.problems import Problem
from fabric.errors import Temporary

router = APIRouter(tags=["health"])

_OPEN = Public()
_TIMEOUT = 3.0  # seconds


@router.get(
    "/health/live",
    response_model=schemas.HealthDocument,
    summary="Is it alive, and to be asked?",
    **openapi.operation(_OPEN, refusals=(503,)),
)
async def live(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """Answers as long as the process does: 503 from when it is told to stop, so that nothing new is sent to it."""
    if services(request).leaving.is_set():
        raise _leaving()
    return answers.answer({"status": "ok"})


@router.get(
    "/health/ready",
    response_model=schemas.HealthDocument,
    summary="Can it do its work?",
    **openapi.operation(_OPEN, refusals=(503,)),
)
async def ready(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """503 with `reasons` when it can't, and from when it is told to stop."""
    if services(request).leaving.is_set():
        raise _leaving()
    try:
        async with asyncio.timeout(_TIMEOUT):
            reasons = dict(await services(request).ready())
    except TimeoutError:
        reasons = {"gateway": "the check took too long"}
    except Temporary as error:
        reasons = {"gateway": error.code}
    if reasons:
        raise Problem(
            "not-ready",
            "Wait until 'reasons' is empty.",
            headers={"Retry-After": "1"},
            members={"reasons": reasons},
        )
    return answers.answer({"status": "ok"})


def _leaving() -> Problem:
    return Problem("not-ready", "Ask another gateway.", members={"reasons": {"gateway": "about to stop"}})
