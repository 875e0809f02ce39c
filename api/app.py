"""The gateway's app, made from its services.

To be served with `server_header=False` (uvicorn's own `Server` header says which version to attack),
`proxy_headers=False` unless an edge in front is named, `lifespan="off"` (what the services need is
started and stopped by the composition root), and `log_config=None` (`api.logs` has the log).
"""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute

from api import logs, openapi, problems
from api.auditing import Refusals
from api.edge import Answers, Edge
from api.routes import ROUTERS, enrollment, events, telemetry
from api.services import Services
from topology import names


def create_app(services: Services) -> FastAPI:
    """Pure: nothing is opened, read or started.

    Raises:
        ValueError: tokens of the fabric could be taken for a device's.
    """
    if names.is_device(services.tokens.issuer):
        raise ValueError("the issuer of tokens must not be a possible device id: it names the verifier")
    app = FastAPI(
        title=openapi.TITLE,
        openapi_url="/openapi.json",
        # The pages would load scripts from elsewhere into this origin.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.enrolling = enrollment.limit()
    app.state.readers = telemetry.readers()
    app.state.followers = events.followers()
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app, Refusals().note)
    openapi.install(app)
    _allow_all_methods(app, ROUTERS)
    app.state.answers = answers = Answers()
    app.add_middleware(Edge, answers=answers)
    return app


def _allow_all_methods(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Starlette's 405 names the methods of one route; `Allow` must name those of the resource (RFC 9110)."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    async def on_method(request: Request, _: Exception) -> Response:
        path = request.scope["path"]
        allowed = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
        headers = {"Allow": ", ".join(sorted(allowed or {"GET"}))}  # without a route of ours: the OpenAPI document
        problem = problems.Problem(
            "method-not-allowed", "The header 'Allow' lists the methods that this resource has.", headers=headers
        )
        return problems.answer(problem, logs.request_id.get())

    app.add_exception_handler(405, on_method)
