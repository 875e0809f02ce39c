"""The OpenAPI document: what FastAPI derives from the routes, completed with what it can't know.

Bodies are read by `api.bodies`, so their schemas are named here by the routes (`operation(body=…)`);
security is read from the routes' guards.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import problems, schemas
from api.callers import OnDevice, Public, Requires

TITLE = "Restante"
VERSION = "1"
_SUMMARY = "A messaging fabric for devices: every device has a mailbox."
_DESCRIPTION = """\
Commands, telemetry and devices over HTTP. Callers send `Authorization: Bearer …`; what a token may do is its
`scope`. Every refusal is a problem document (RFC 9457) whose `type` is stable and whose `detail` says what to do.
Times are RFC 3339 UTC with microseconds, durations seconds (fractions allowed). Lists come in pages: pass `next` as
`cursor` to get the following one.
"""
_SCHEME: Final = "bearer"
_REF = "#/components/schemas/{model}"

_REQUESTS: Final[tuple[type[BaseModel], ...]] = (
    schemas.NewDevice,
    schemas.DevicePatch,
    schemas.NewCommand,
    schemas.Enrolling,
    schemas.NewKey,
    schemas.NewReading,
    schemas.NewToken,
)
_ANSWERS: Final[tuple[type[BaseModel], ...]] = (
    schemas.ProblemDocument,
    schemas.ReadingDocument,
    schemas.EventDocument,
)

_WHY: Final[Mapping[int, str]] = {
    400: "The request or its JSON can't be read.",
    401: "No token, or one that does not hold.",
    403: "The token lacks a scope.",
    404: "There is no such thing.",
    406: "`Accept` excludes the answer's media type.",
    408: "The body did not arrive in time.",
    409: "It exists already, or can't be undone any more.",
    410: "The code is used, expired or withdrawn.",
    412: "`If-Match` names another version.",
    413: "The body is too large.",
    415: "The body has another media type than the operation takes.",
    422: "Values are not as they must be; `errors` says where and why.",
    429: "Too many requests, or too many commands waiting; `Retry-After` says when to try again.",
    500: "A mistake of ours.",
    503: "The broker, the database or the token's issuer is not available; `Retry-After` says when to try again.",
}
_HEADERS: Final[Mapping[int, Mapping[str, object]]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "RFC 6750."}},
    429: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
}

WAIT: Final = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`wait=10`: answer once the command is settled, or after that many seconds (60 at most; RFC 7240).",
    "schema": {"type": "string"},
    "example": "wait=10",
}
IF_MATCH: Final = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "The `ETag` that the change is for.",
    "schema": {"type": "string"},
}
IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Names the command: a repeat within 24 hours, of the same issuer to the same device, is answered "
    "with the command that the first request made. For another request use another key.",
    "schema": {"type": "string", "pattern": f"^{schemas.KEY}$", "maxLength": 128},
}
LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The `id` that was read last: the answer goes on behind it.",
    "schema": {"type": "string", "pattern": f"^{schemas.POSITION}$"},
}
TRACEPARENT: Final = {
    "name": "traceparent",
    "in": "header",
    "required": False,
    "description": "W3C Trace Context; passed on to the device.",
    "schema": {"type": "string"},
}


def header(description: str) -> dict[str, object]:
    return {"schema": {"type": "string"}, "description": description}


def operation(
    guard: Requires | Public,
    *,
    refusals: tuple[int, ...] = (),
    body: Mapping[str, object] | None = None,
    body_required: bool = True,
    parameters: tuple[Mapping[str, object], ...] = (),
    answers: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator.

    Args:
        refusals: statuses beside those that follow from the guard and the body.
        body: schema by media type; a model stands for its schema.
        answers: beside the default one: OpenAPI responses by status.
    """
    statuses = {406, 500, *refusals}
    security: list[dict[str, list[str]]] = []
    if isinstance(guard, Requires):
        statuses |= {401, 403, 503}
        security = [{_SCHEME: list(guard.actions)}]
        if isinstance(guard, OnDevice):
            statuses |= {404}
    if body is not None:
        statuses |= {400, 408, 413, 415, 422}
    extra: dict[str, Any] = {"security": security}
    if parameters:
        extra["parameters"] = [dict(parameter) for parameter in parameters]
    if body is not None:
        content = {media: {"schema": _schema(kind)} for media, kind in body.items()}
        extra["requestBody"] = {"required": body_required, "content": content}
    responses: dict[int | str, dict[str, Any]] = {status: refusal(status) for status in sorted(statuses)}
    return {"responses": responses | dict(answers or {}), "openapi_extra": extra}


def refusal(status: int) -> dict[str, Any]:
    codes = [code for code, (of, _) in problems.TITLES.items() if of == status]
    title = problems.TITLES[codes[0]][1] if codes else HTTPStatus(status).phrase
    example = {
        "type": problems.TYPE_PREFIX + codes[0],
        "title": title,
        "status": status,
        "detail": _WHY[status],
        "instance": "9f86d081884c7d65",
    }
    found: dict[str, Any] = {
        "description": f"{_WHY[status]} Types: {', '.join(problems.TYPE_PREFIX + code for code in codes)}.",
        "content": {
            problems.MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemDocument")}, "example": example}
        },
    }
    if status in _HEADERS:
        found["headers"] = dict(_HEADERS[status])
    return found


def install(app: FastAPI) -> None:
    """Give the app its complete document, made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=TITLE, version=VERSION, summary=_SUMMARY, description=_DESCRIPTION, routes=app.routes, tags=_TAGS
    )
    components = made.setdefault("components", {})
    components["securitySchemes"] = {
        _SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A token from POST /v1/tokens, one that a device signed itself, or one of an external "
            "identity provider that the gateway is configured to believe. "
            "The names beside it are the scopes that an operation needs. A scope may be narrowed to a device or a "
            "group, and some to a name there: what it does not reach is answered as if it did not exist.",
        }
    }
    _, definitions = models_json_schema(
        [*((kind, "validation") for kind in _REQUESTS), *((kind, "serialization") for kind in _ANSWERS)],
        ref_template=_REF,
    )
    components.setdefault("schemas", {}).update(definitions.get("$defs", {}))
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    for methods in made["paths"].values():
        for described in methods.values():
            _complete(described)
    return made


def _complete(described: dict[str, Any]) -> None:
    for parameter in described.get("parameters", ()):
        parameter["schema"] = _without_null(parameter["schema"])
    # FastAPI adds its own error model wherever there are parameters; ours says the same better.
    if described.get("parameters"):
        described["responses"]["422"] = refusal(422)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query parameter is there or not; it is never null."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) != 1:
        return schema
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default") or value}
    rest.pop("anyOf", None)
    return {**options[0], **rest}


def _schema(kind: object) -> object:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {"$ref": _REF.format(model=kind.__name__)}
    return kind


_TAGS: Final = [
    {"name": "devices", "description": "Devices, their groups and labels."},
    {"name": "enrollment", "description": "How a device gets its identity, and learns whom to believe."},
    {"name": "keys", "description": "The keys of devices, and taking them away."},
    {"name": "commands", "description": "Commands and what became of them."},
    {"name": "events", "description": "Everything that happens to commands and devices."},
    {"name": "telemetry", "description": "Readings of devices."},
    {"name": "tokens", "description": "Tokens of callers."},
    {"name": "audit", "description": "Who did what."},
    {"name": "health", "description": "Is the gateway alive, and ready?"},
]
