"""Request bodies: read whole (within `api.edge`'s bounds), decoded strictly, checked against a model.

FastAPI's own body handling is not used: it reads and parses before the guard has looked at the token.
"""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from api import headers
from api.problems import Problem, invalid, of_validation
from fabric import strict_json
from topology import wire

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
    body = await request.body()
    if len(body) > limit:
        raise too_large(limit)
    return body


async def document(request: Request, expected: str = wire.JSON) -> object:
    """The JSON value of a body of the expected media type; raises 415, 413, 408 or 400 as a `Problem`."""
    if media_type(request) != expected:
        raise Problem("unsupported-media-type", f"Send the body as 'Content-Type: {expected}'.")
    return parse(await request.body())


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


def too_large(limit: int) -> Problem:
    return Problem("too-large", f"The body may have {limit} bytes at most.")
