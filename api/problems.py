"""Problem documents (RFC 9457): every refusal, with a stable `type` and a `detail` that says what to do."""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from api import logs
from fabric import errors

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:restante:problem:"
REALM = "restante"

RETRY_AFTER = 2  # seconds, when whoever is away has not said more
MAX_ERRORS = 20  # reported of one request
_SEGMENT_LIMIT = 100  # characters of a member's name in a pointer

log = logging.getLogger(__name__)

TITLES: Final[Mapping[str, tuple[int, str]]] = {
    "bad-request": (400, "The request can't be read"),
    "malformed-json": (400, "The body is not JSON"),
    "unauthenticated": (401, "Who asks is not established"),
    "forbidden": (403, "The token does not allow this"),
    "not-found": (404, "There is no such thing"),
    "method-not-allowed": (405, "The resource has no such method"),
    "not-acceptable": (406, "The answer has another media type"),
    "slow-request": (408, "The body did not arrive in time"),
    "conflict": (409, "It exists already, or is in the way"),
    "too-late": (409, "It can't be withdrawn any more"),
    "gone": (410, "It is no longer to be had"),
    "precondition-failed": (412, "It has changed meanwhile"),
    "too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The body's media type is not understood"),
    "invalid": (422, "The request has invalid values"),
    "key-reused": (422, "The idempotency key stands for another request"),
    "too-many-requests": (429, "Too many requests"),
    "backlog-full": (429, "The device's mailbox may be full"),
    "internal": (500, "A mistake of ours"),
    "temporarily-unavailable": (503, "Not available for a moment"),
    "broker-unavailable": (503, "The broker is not available"),
    "ledger-unavailable": (503, "The ledger is not available"),
    "provider-unavailable": (503, "The token's issuer is not available"),
    "not-logged": (503, "It is done, and not safe from a restored backup yet"),
    "publish-failed": (503, "The broker did not confirm"),
    "not-ready": (503, "The gateway is not ready"),
}
"""Each problem's code, the last part of its `type`, with its status and title."""

_NOT_OURS: Final = (
    "Nothing is wrong with the request. Report it with the request id in 'instance'; trying again may help."
)


class Problem(Exception):
    """A refusal that is about HTTP. `members` are added to the document, `headers` to the answer."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.headers, self.members = dict(headers or {}), dict(members or {})


def unauthenticated(detail: str, *, token_given: bool) -> Problem:
    """401 (RFC 6750, section 3): the error code is left out when there was no token at all."""
    error = ', error="invalid_token"' if token_given else ""
    return Problem("unauthenticated", detail, headers={"WWW-Authenticate": f'Bearer realm="{REALM}"{error}'})


def insufficient_scope(missing: Sequence[str]) -> Problem:
    needed = " ".join(missing)
    challenge = f'Bearer realm="{REALM}", error="insufficient_scope", scope="{needed}"'
    return Problem(
        "forbidden",
        f"The token lacks the scope {' and '.join(missing)}; use a token that has it.",
        headers={"WWW-Authenticate": challenge},
    )


def invalid(found: Sequence[tuple[str, str]]) -> Problem:
    """422 for `(pointer, detail)` pairs."""
    listed = [{"pointer": pointer, "detail": detail} for pointer, detail in found[:MAX_ERRORS]]
    return Problem(
        "invalid", "Some values are not as they must be; 'errors' says where and why.", members={"errors": listed}
    )


def of_validation(error: ValidationError | RequestValidationError, *, where: str | None = None) -> Problem:
    """422 for what pydantic refused. `where` is `body` for a model of the whole body; else the place of a
    parameter begins its location. Values are not repeated."""
    if isinstance(error, ValidationError):
        found: Sequence[Any] = error.errors(include_url=False, include_input=False, include_context=False)
    else:
        found = error.errors()
    return invalid([(_pointer(where, each["loc"]), _said(each)) for each in found])


def of_error(error: errors.FabricError) -> Problem:
    """What an error of the fabric is in HTTP."""
    text = str(error)
    match error:
        case errors.TooManyRequests():
            return Problem(error.code, text, headers={"Retry-After": str(max(1, round(error.retry_after + 0.5)))})
        case errors.Temporary():
            code = error.code if error.code in TITLES else errors.Temporary.code
            log.warning("http.unavailable code=%s error=%s", code, logs.shown(text))
            # The text may name hosts and ports of our own: it is for the log.
            return Problem(code, _away(error), headers={"Retry-After": str(RETRY_AFTER)})
        case errors.Unauthenticated():
            return unauthenticated(text, token_given=True)
        case errors.TooLate():
            return Problem(error.code, text, members={"state": error.state})
        case (
            errors.NotFound()
            | errors.Conflict()
            | errors.PreconditionFailed()
            | errors.Invalid()
            | errors.KeyReused()
            | errors.Gone()
            | errors.Forbidden()
        ):
            return Problem(error.code, text)
        case _:
            log.error("http.bug error=%s", logs.shown(repr(error)))
            return Problem("internal", _NOT_OURS)


def answer(problem: Problem, instance: str | None) -> Response:
    """The problem as a response. `instance` is the request's id."""
    status, title = TITLES[problem.code]
    document = {
        "type": TYPE_PREFIX + problem.code,
        "title": title,
        "status": status,
        "detail": problem.detail,
        "instance": instance,
        **problem.members,
    }
    # ASCII only: details may carry any character that a caller sent as a member's name.
    body = json.dumps(document, separators=(",", ":")).encode("ascii")
    return Response(body, status, {**problem.headers, "Cache-Control": "no-store"}, MEDIA_TYPE)


def bug() -> Problem:
    return Problem("internal", _NOT_OURS)


def install(app: FastAPI, note: Callable[[Request, Exception], Awaitable[None]]) -> None:
    """Make every error that leaves a route a problem document, once `note` has seen it. (Bugs are `api.edge`'s.)"""

    async def on_problem(request: Request, error: Exception) -> Response:
        await note(request, error)
        return answer(_as_problem(error), logs.request_id.get())

    for kind in (Problem, errors.FabricError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_problem)


def _as_problem(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case errors.FabricError():
            return of_error(error)
        case RequestValidationError():
            return of_validation(error)
        case HTTPException():
            return _of_http(error)
        case _:
            raise error


def _of_http(error: HTTPException) -> Problem:
    """What Starlette's router refuses."""
    if error.status_code == 404:
        return Problem(
            "not-found", "There is nothing at this path; the OpenAPI document at /openapi.json lists what there is."
        )
    code = "internal" if error.status_code >= 500 else "bad-request"
    return Problem(code, str(error.detail), headers=error.headers)


def _away(error: errors.Temporary) -> str:
    match error:
        case errors.PublishFailed():
            return "The broker did not confirm in time, so it is not known whether the message arrived. Try again."
        case errors.BrokerUnavailable():
            return "The message broker can't be reached. Try again after the time in 'Retry-After'."
        case errors.ProviderUnavailable():
            return "The keys of the token's issuer can't be had, so that its tokens can't be verified. Try again later."
        case errors.LedgerUnavailable():
            return "The database can't be reached; nothing was done. Try again after the time in 'Retry-After'."
        case errors.NotLogged():
            return (
                "It is done, but not in the revocation log yet: a backup of the database that is restored now would "
                "undo it. A worker goes on trying to write it."
            )
        case _:
            return "Try again after the time in 'Retry-After'."


def _pointer(where: str | None, location: Sequence[str | int]) -> str:
    """`#/groups/0` for a body (RFC 6901), else the parameter's place and name: `query:limit`."""
    path = [str(part)[:_SEGMENT_LIMIT] for part in location]
    if where is None and path and path[0] in ("query", "path", "header", "cookie"):
        return ":".join(path[:2])
    return "#" + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)


def _said(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "There is no such field."
        case "missing":
            return "This field is required."
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            return str(error["msg"])
