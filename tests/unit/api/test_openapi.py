"""The OpenAPI document says it all: security, every refusal, and valid examples."""

from typing import Any, cast

import httpx
import pytest
import schemathesis
from cryptography.hazmat.primitives.asymmetric import ec

from api import openapi, problems, schemas
from api.app import create_app
from api.lasting import Lasting
from api.routes import enrollment
from api.services import Services
from fabric import keyring
from fabric.identity import scopes
from fabric.identity.issued import IssuedTokens
from fabric.keyring import Keys
from fabric.signing import signing_key

PUBLIC = {
    "/v1/enroll",
    "/v1/authority",
    "/v1/authority/successors",
    "/v1/time",
    "/health/live",
    "/health/ready",
    "/.well-known/jwks.json",
}


BY_THE_DEVICE_ITSELF = ("post", "/v1/devices/{id}/keys")


class Deaf:
    """Plays the audit's part: it keeps nothing."""

    async def record(self, deed: object) -> None: ...


class NothingBehind:
    """Services of a gateway that gets only requests without a valid token, which must touch nothing else."""

    audit = Deaf()
    tokens = IssuedTokens(
        cast("Any", None),
        cast("Any", None),
        "urn:restante:test",
        "test/api",
        Keys(keyring.ring(signing_key(ec.generate_private_key(ec.SECP256R1())), 0), {}, lambda: 0),
    )
    lasting = Lasting(tokens.forget)


APP = create_app(cast("Services", NothingBehind()))
DOCUMENT: dict[str, Any] = APP.openapi()
OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method} {path}")
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]


def test_it_is_a_valid_document() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            inner: set[str] = set().union(*map(references, value.values())) if value else set()
            return inner | ({value["$ref"]} if isinstance(value.get("$ref"), str) else set())
        return set().union(*map(references, value)) if isinstance(value, list) and value else set()

    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert references(DOCUMENT) <= known


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_every_operation_says_who_may(path: str, method: str, operation: dict[str, Any]) -> None:
    if path in PUBLIC:
        assert operation["security"] == []
        return
    ((scheme, needed),) = [pair for each in operation["security"] for pair in each.items()]
    assert scheme in DOCUMENT["components"]["securitySchemes"]
    assert needed or (method, path) == BY_THE_DEVICE_ITSELF
    assert set(needed) <= scopes.ACTIONS
    assert {"401", "403", "503"} <= operation["responses"].keys()


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_every_refusal_is_a_problem(path: str, method: str, operation: dict[str, Any]) -> None:
    assert "500" in operation["responses"]
    for status, response in operation["responses"].items():
        if int(status) < 400:
            continue
        assert set(response["content"]) == {problems.MEDIA_TYPE}
        content = response["content"][problems.MEDIA_TYPE]
        assert content["schema"] == {"$ref": "#/components/schemas/ProblemDocument"}
        schemas.ProblemDocument.model_validate(content["example"])
    if "requestBody" in operation:
        assert {"400", "408", "413", "415", "422"} <= operation["responses"].keys()
    if operation.get("parameters"):
        assert "422" in operation["responses"]
    if status_of_success := [status for status in operation["responses"] if status in ("200", "201", "202")]:
        assert all(operation["responses"][status]["content"] for status in status_of_success)


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
async def test_without_a_token_nothing_else_is_looked_at(path: str, method: str, operation: dict[str, Any]) -> None:
    if path in PUBLIC:
        return
    transport = httpx.ASGITransport(APP)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for headers in (
            [],
            [("Authorization", "Basic eA==")],
            [("Authorization", "Bearer")],
            [("Authorization", "Bearer x.y.z")],
            [("Authorization", b"Bearer \xff")],
            [("Authorization", "Bearer a"), ("Authorization", "Bearer b")],
        ):
            # Neither the path, nor the query, nor the body is one that would be accepted.
            answer = await client.request(
                method, path, content=b"{", headers=[*headers, ("Accept", "text/html")], params={"nonsense": "1"}
            )
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
            assert answer.json()["type"] == "urn:restante:problem:unauthenticated"


async def test_attempts_to_enroll_are_limited_before_they_are_looked_at() -> None:
    transport = httpx.ASGITransport(create_app(cast("Services", NothingBehind())))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answers = [await client.post("/v1/enroll", content=b"{") for _ in range(enrollment.ATTEMPTS + 1)]
    assert [answer.status_code for answer in answers] == [415] * enrollment.ATTEMPTS + [429]
    assert int(answers[-1].headers["Retry-After"]) >= 1


def test_parameters_are_never_null() -> None:
    for each in OPERATIONS:
        for parameter in each.values[2].get("parameters", ()):  # type: ignore[attr-defined]
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), parameter


def test_every_problem_is_told_of() -> None:
    told = {status for each in OPERATIONS for status in each.values[2]["responses"]}  # type: ignore[index]
    assert {str(status) for status, _ in problems.TITLES.values()} - told == {"405"}, "405 belongs to no operation"
    assert openapi.refusal(404)["content"]
