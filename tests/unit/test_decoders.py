"""Decoders of what a device, a caller or whoever pretends to be the fabric controls: any bytes, and only their own
error comes out. Those that have a file of their own are tested there: `test_guard`, `test_wire`, `test_scope_grammar`,
`agent/test_agent_guard`, `agent/test_handlers`, `api/test_broker_auth`, `api/test_callers` (cursors),
`api/test_headers`, `api/test_schemas`, `api/test_strict_json`."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api import edge, schemas
from api.limits import source_of
from api.operator import importing
from api.operator.errors import CallFailed
from device_agent import errors, https, identity, timekeeping
from device_agent.arguments import BadArguments, _object
from device_agent.control import ControlServer
from fabric.clock import Micros
from fabric.errors import Invalid, Unauthenticated
from fabric.identity import keys, proofs, tokens
from tests.harness.device import DROP, b64, es256, forge, new_key, public_jwk
from topology import enrollment, names, wire

NOW = 1_800_000_000  # epoch seconds
KEY = new_key()
JWK = public_jwk(KEY)
AUDIENCE = "restante/api"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
odd = json_values | st.sampled_from([DROP, NOW, -1, 2**70, float("inf"), float("nan"), "", "\ud800", [], {}])
"""A member of JSON as nobody expects it, or none."""

base64urls = st.text(alphabet="ABCxyz019-_=+/. \n", max_size=60)


class Clock:
    def now(self) -> Micros:
        return NOW * 1_000_000


def changed(members: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    return {each: it for each, it in {**members, name: value}.items() if it is not DROP}


def test_the_controls() -> None:
    """Nothing is odd, and nothing is refused."""
    token = forge(HEADER, CLAIMS, es256(KEY))
    assert tokens.verify(tokens.examine(token), JWK, AUDIENCE, 600, NOW).sub == "a"
    said = {"code_hash": "h"}
    proof = forge({"alg": "ES256", "typ": enrollment.PROOF_TYPE}, {**said, "iat": NOW}, es256(KEY))
    proofs.check(proof, JWK, enrollment.PROOF_TYPE, said, Clock())
    assert keys.accept_jwk(JWK) == JWK
    assert identity.parse_peering(PEERING).device == "garage-7"
    assert timekeeping._time({"time": "2026-01-31T12:00:00.000000Z"}) == 1_769_860_800_000


# ---- Tokens and keys ---------------------------------------------------------------------------------

HEADER = {"alg": "ES256", "typ": enrollment.DEVICE_TOKEN_TYPE, "kid": enrollment.thumbprint(JWK)}
CLAIMS = {"iss": "a", "sub": "a", "aud": AUDIENCE, "iat": NOW, "exp": NOW + 60, "jti": "j", "nbf": NOW}


@given(st.text(max_size=80) | st.lists(st.binary(max_size=30).map(b64) | base64urls, max_size=4).map(".".join))
def test_any_text_as_a_token(text: str) -> None:
    with contextlib.suppress(Unauthenticated):
        tokens.examine(text)


@given(st.sampled_from([*HEADER, "crit", "b64", "zip"]), st.sampled_from(sorted(CLAIMS)), odd, odd)
@example("typ", "exp", DROP, float("inf"))
def test_a_signed_token_that_says_anything(in_header: str, in_claims: str, one: object, other: object) -> None:
    """The signature is right: what is odd is what was signed."""
    for header, claims in (
        (changed(HEADER, in_header, one), CLAIMS),
        (HEADER, changed(CLAIMS, in_claims, other)),
    ):
        token = forge(header, claims, es256(KEY))
        with contextlib.suppress(Unauthenticated):
            found = tokens.verify(tokens.examine(token), JWK, AUDIENCE, 600, NOW)
            assert found.exp - found.iat <= 600


@given(st.sampled_from(["code_hash", "iat", "exp", "nbf", "aud", "iss", "sub", "jti"]), odd, st.text(max_size=30))
@example("exp", float("inf"), "")
@example("nbf", float("inf"), "")
def test_a_proof_that_says_anything(name: str, value: object, text: str) -> None:
    said = {"code_hash": "h"}
    signed = forge(
        {"alg": "ES256", "typ": enrollment.PROOF_TYPE}, changed({**said, "iat": NOW}, name, value), es256(KEY)
    )
    for proof in (signed, text, f"{text}.{text}.{text}"):
        with contextlib.suppress(Invalid):
            proofs.check(proof, JWK, enrollment.PROOF_TYPE, said, Clock())


@given(st.dictionaries(st.sampled_from([*JWK, "d", "kid", "alg", "use"]), json_values | base64urls, max_size=6))
def test_any_object_as_a_public_key(given_jwk: dict[str, object]) -> None:
    for jwk in (given_jwk, {**JWK, **given_jwk}):
        with contextlib.suppress(Invalid):
            accepted = keys.accept_jwk(jwk)
            assert enrollment.thumbprint(accepted)
            assert "d" not in jwk


@given(st.text(max_size=90) | st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ234567= \n", max_size=90))
def test_any_text_as_a_ticket_or_code(text: str) -> None:
    for decode in (enrollment.decode_ticket, enrollment.decode_code):
        with contextlib.suppress(enrollment.BadTicket):
            decode(text)


# ---- What the gateway reads --------------------------------------------------------------------------


@given(st.text(max_size=70) | st.lists(st.text(alphabet="a1-_.*#", max_size=9), max_size=5).map(".".join))
def test_any_text_as_a_routing_key(text: str) -> None:
    found = names.parse_uplink_key(text)
    if found is not None:
        kind, device, rest = found
        assert text == ".".join(filter(None, (kind, device, rest)))
        assert text.isascii()


@given(st.text(max_size=40) | st.text(alphabet="0123456789abcdef:.%", max_size=40) | st.none())
def test_any_text_as_a_source(host: str | None) -> None:
    assert len(source_of(host)) <= 64


@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,30}"))
def test_any_text_as_a_position_or_an_idempotency_key(text: str) -> None:
    """The patterns are all that is between the header and the number or the row."""
    if re.fullmatch(schemas.POSITION, text, re.ASCII):
        assert 0 <= int(text) < 2**63
    if re.fullmatch(schemas.KEY, text, re.ASCII):
        assert text.isascii()
        assert text.isprintable()


@given(st.lists(st.tuples(st.sampled_from([b"content-length", b"x-request-id", b"x"]), st.binary(max_size=30))))
def test_any_headers_at_the_edge(headers: list[tuple[bytes, bytes]]) -> None:
    assert edge._declared(headers) >= 0
    assert edge._request_id(headers).isascii()


# ---- What the agent reads ----------------------------------------------------------------------------

PEERING = {
    "device_id": "garage-7",
    "generation": 1,
    "amqps_url": "amqps://localhost:5671/devices",
    "api_url": "https://localhost",
    "audience": {"mq": "restante/mq/local", "api": AUDIENCE},
    "signing_keys": {"keys": [JWK]},
}
urls = st.text(max_size=30) | st.text(alphabet="amqps:/[]@0129.%?#", max_size=30).map("amqps://".__add__)


@given(
    st.sampled_from(sorted(PEERING)), odd | urls | st.fixed_dictionaries({"keys": st.lists(json_values, max_size=2)})
)
def test_any_answer_to_enrollment(name: str, value: object) -> None:
    with contextlib.suppress(errors.BadAnswer):
        identity.parse_peering(changed(PEERING, name, value))


@given(urls)
def test_any_text_as_the_gateways_address(text: str) -> None:
    with contextlib.suppress(errors.AgentError):
        https.parse_url(text)


times = st.text(max_size=40) | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}(Z|[+-][0-9]{2}:[0-9]{2})")


@given(st.dictionaries(st.just("time"), times | json_values))
@example({"time": "0001-01-01T00:00:00+23:59"})
@example({"time": "9999-12-31T23:59:59-23:59"})
def test_any_answer_about_the_time(answer: dict[str, object]) -> None:
    told = timekeeping._time(answer)
    assert told is None or isinstance(timekeeping._shown(told), str)


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"9" * 5_000)
def test_any_bytes_as_arguments_or_an_answer(body: bytes) -> None:
    with contextlib.suppress(BadArguments):
        _object(body, wire.JSON)
    https.said(https.json_object(body))


def _published(*_: object) -> "Future[None]":
    done: Future[None] = Future()
    done.set_result(None)
    return done


@pytest.fixture(scope="module")
def control() -> Iterator[ControlServer]:
    with tempfile.TemporaryDirectory() as directory:
        server = ControlServer(Path(directory), dict, _published)
        yield server


members = st.fixed_dictionaries(
    {},
    optional={"do": json_values | st.sampled_from(["status", "publish"]), "body": json_values, "at": json_values},
)


@given(line=st.binary(max_size=60) | (json_values | members).map(lambda value: json.dumps(value).encode()))
@example(line=b"[" * 100_000)
def test_any_line_on_the_local_socket(control: ControlServer, line: bytes) -> None:
    assert isinstance(json.dumps(control._answer(line)), str)


# ---- What the operator's command reads ---------------------------------------------------------------

rows = st.text(alphabet='abc,= "\n{}[]:.\x00', max_size=80)


@given(st.text(max_size=80) | rows | rows.map("id,groups,labels\n".__add__) | rows.map('{"id": "a"}\n{'.__add__))
def test_any_text_as_a_list_of_devices(text: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        with contextlib.suppress(CallFailed):
            importing.read(Path(file.name))
