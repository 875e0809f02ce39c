"""schemathesis over the OpenAPI document: the gateway answers as it says, whatever it is asked."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi import checks

from api import schemas
from api.routes import ROUTERS
from tests.harness.stack import RunningStack
from topology import names

OPERATIONS = [
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
    # Its attempts are limited for everybody at this address, real agents included.
    if route.path != "/v1/enroll"
]


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Connections that are used again: there are thousands of requests."""
    with requests.Session() as made:
        yield made


@pytest.fixture(scope="module")
def described(stack: RunningStack) -> Any:
    schema = schemathesis.openapi.from_dict(stack.ok(stack.http.get("/openapi.json")))
    schema.config.update(base_url=stack.stack.settings.api_url)
    return schema


CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.ignored_auth,
    checks.unsupported_method,
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_gateway_keeps_to_its_document(
    stack: RunningStack, described: Any, session: requests.Session, method: str, path: str
) -> None:
    operation = described[path][method]
    device = stack.create_device("described")[0]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def holds(case: Any) -> None:
        _shorten(case, path)
        if path.startswith("/v1/devices/{id}/") and names.is_device(str(case.path_parameters.get("id"))):
            case.path_parameters["id"] = device  # most ids are nobody's, and the rest would never be reached
        # With a name in the query the body is the arguments: any JSON is right, and nothing wrong for its body alone.
        wrong = {location for location, part in case.meta.components.items() if part.mode.is_negative}
        free = path.endswith("/commands") and "name" in (case.query or {}) and wrong == {ParameterLocation.BODY}
        judged = [check for check in CHECKS if not (free and check is checks.negative_data_rejection)]
        headers = {"Authorization": f"Bearer {stack.token}"}
        verify = str(stack.stack.files.authority)
        if path == "/v1/events":
            answer = _beginning(case, headers, verify)
            case.validate_response(answer, checks=CHECKS, headers=headers, transport_kwargs={"verify": verify})
        else:
            case.call_and_validate(session=session, headers=headers, verify=verify, timeout=70, checks=judged)

    holds()


def _beginning(case: Any, headers: dict[str, str], verify: str) -> requests.Response:
    """The answer; of one that goes on for an hour, its first block."""
    asked = case.as_transport_kwargs(headers=headers)
    with requests.request(**asked, verify=verify, timeout=70, stream=True) as answer:
        if answer.status_code == 200:
            answer._content = next(answer.iter_content(None))
        else:
            assert answer.content
    return answer


def _shorten(case: Any, path: str) -> None:
    """What may take as long as the caller asks for takes a moment; what is invalid stays so."""
    if case.headers and str(case.headers.get("Prefer", "")).startswith("wait="):
        case.headers["Prefer"] = "wait=1"
    if path == "/v1/telemetry":
        case.query = case.query or {}
        idle = case.query.get("idle", schemas.IDLE_DEFAULT)
        if isinstance(idle, int | float) and 0.05 <= idle <= schemas.IDLE_LIMIT:
            case.query["idle"] = 0.05
