"""Request bodies: read whole (within `api.edge`'s bounds), decoded strictly, checked against a model.

FastAPI's own body handling is not used: it reads and parses before the guard has looked at the token.
"""

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from api import headers
from api.callers import Right, authenticate
from api.problems import Problem, invalid, of_validation
from fabric import strict_json
from fabric.errors import Unauthenticated
from topology import wire

ASKED_AGAIN_AFTER = 1.0  # seconds that a body takes; then its sender's token is looked at again
MERGE_PATCH = "application/merge-patch+json"

Model = TypeVar("Model", bound=BaseModel)


def media_type(request: Request) -> str:
    """Raises a 415 `Problem` when there are several, or an encoded body."""
    given = request.headers.getlist("content-type")
    if len(given) > 1:
        raise Problem("unsupported-media-type", "The request has several 'Content-Type' headers; send one.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem("unsupported-media-type", "Compressed bodies are not understood; leave out 'Content-Encoding'.")
    return headers.media_type(given[0] if given else None)


async def read(request: Request, limit: int = wire.MAX_BODY) -> bytes:
    """Raises a 413 `Problem` over the limit (bytes)."""
    body = await _whole(request)
    if len(body) > limit:
        raise too_large(limit)
    return body


async def document(request: Request, expected: str = wire.JSON) -> object:
    """The JSON value of a body of the expected media type; raises 415, 413, 408 or 400 as a `Problem`."""
    if media_type(request) != expected:
        raise Problem("unsupported-media-type", f"Send the body as 'Content-Type: {expected}'.")
    return parse(await _whole(request))


async def model(request: Request, kind: type[Model], expected: str = wire.JSON) -> Model:
    """The body as a model; raises 422 beside what `document` raises."""
    return check(kind, await document(request, expected))


def check(kind: type[Model], value: object) -> Model:
    """Raises a 422 `Problem`."""
    if not isinstance(value, dict):
        raise invalid([("#", "The body must be a JSON object.")])
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise of_validation(error, where="body") from None


def parse(raw: bytes) -> object:
    """Raises a 400 `Problem`."""
    try:
        return strict_json.parse(raw)
    except strict_json.NotJson as error:
        raise Problem("malformed-json", f"The body can't be read as JSON: {error}.") from None


async def _whole(request: Request) -> bytes:
    """Raises 413 or 408 as a `Problem`; `Unauthenticated` when a token was revoked while its body was on its way."""
    if not hasattr(request.state, "let_in"):
        return await request.body()
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(None) as until, Right(request).watched(lambda: until.reschedule(loop.time())):
            body = await request.body()
    except TimeoutError:
        raise Unauthenticated("the token was revoked") from None
    if loop.time() - began > ASKED_AGAIN_AFTER:
        await authenticate(request)
    return body


def too_large(limit: int) -> Problem:
    return Problem("too-large", f"The body may have {limit} bytes at most.")
