"""Problem documents."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import problems
from fabric import errors


def document(problem: problems.Problem) -> dict[str, object]:
    answer = problems.answer(problem, "request-1")
    assert answer.media_type == problems.MEDIA_TYPE
    assert answer.headers["cache-control"] == "no-store"
    made: dict[str, object] = json.loads(bytes(answer.body))
    assert made["status"] == answer.status_code
    assert made["instance"] == "request-1"
    return made


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.NotFound("x"), 404),
        (errors.Conflict("x"), 409),
        (errors.PreconditionFailed("x"), 412),
        (errors.Invalid("x"), 422),
        (errors.Gone("x"), 410),
        (errors.Unauthenticated("x"), 401),
        (errors.Forbidden("x"), 403),
        (errors.TooManyRequests("x", 1.2), 429),
        (errors.Temporary("x"), 503),
        (errors.BrokerUnavailable("host:5672"), 503),
        (errors.LedgerUnavailable("host:5432"), 503),
        (errors.PublishFailed("x"), 503),
        (errors.NoMailbox("x"), 500),
        (errors.FabricError("x"), 500),
    ],
)
def test_every_error_of_the_fabric_has_its_problem(error: errors.FabricError, status: int) -> None:
    problem = problems.of_error(error)
    made = document(problem)
    assert made["status"] == status
    assert made["type"] == f"urn:restante:problem:{problem.code}"
    assert ("Retry-After" in problem.headers) is (status in (429, 503))
    assert ("WWW-Authenticate" in problem.headers) is (status == 401)
    if status >= 500:
        assert str(error) not in str(made["detail"]) or str(error) == "x"


def test_every_kind_of_error_is_known() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FabricError)]
    for kind in set(kinds) - {errors.NoMailbox}:
        assert kind.code in problems.TITLES, kind


def test_the_wait_is_rounded_up() -> None:
    assert problems.of_error(errors.TooManyRequests("x", 0.01)).headers["Retry-After"] == "1"
    assert problems.of_error(errors.TooManyRequests("x", 4.2)).headers["Retry-After"] == "5"


def test_a_missing_scope_is_named() -> None:
    problem = problems.insufficient_scope(["commands:send"])
    assert "commands:send" in problem.detail
    assert 'error="insufficient_scope", scope="commands:send"' in problem.headers["WWW-Authenticate"]


@given(st.text(), st.text())
def test_any_text_can_be_in_it(detail: str, pointer: str) -> None:
    document(problems.invalid([(pointer, detail)]))


def test_errors_are_bounded() -> None:
    made = document(problems.invalid([("#/x", "no")] * 1000))
    assert len(made["errors"]) == problems.MAX_ERRORS  # type: ignore[arg-type]
