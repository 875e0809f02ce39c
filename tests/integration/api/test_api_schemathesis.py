"""schemathesis over the OpenAPI document: the gateway answers as it says, whatever it is asked."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.harness.stack import RunningStack


@pytest.fixture
def described(stack: RunningStack) -> Any:
    url = stack.stack.settings.api_url
    document = stack.ok(stack.http.get("/openapi.json"))
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    # Its attempts are limited for everybody at this address, real agents included.
    return schema.exclude(path="/v1/enroll")


cases = schemathesis.pytest.from_fixture("described")

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


@cases.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_gateway_keeps_to_its_document(case: Any, stack: RunningStack) -> None:
    if case.path == "/v1/telemetry" and isinstance(case.query, dict) and "idle" in case.query:
        case.query["idle"] = "0.05"  # or the test would wait as long as it asks
    authority: Path = stack.stack.files.authority
    case.call_and_validate(
        headers={"Authorization": f"Bearer {stack.token}"}, verify=str(authority), timeout=70, checks=CHECKS
    )
