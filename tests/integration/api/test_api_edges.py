"""The gateway over real connections: what callers may send, and what they get for it."""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api import edge, schemas
from tests.harness.stack import RunningStack, eventually
from topology import wire

PROBLEM = "urn:restante:problem:"
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def device(stack: RunningStack) -> str:
    return stack.create_device("edges")[0]


@pytest.fixture
def connection(stack: RunningStack) -> Iterator[ssl.SSLSocket]:
    url = urlsplit(stack.stack.settings.api_url)
    plain = socket.create_connection((url.hostname, url.port), timeout=30)
    with stack.context.wrap_socket(plain, server_hostname=url.hostname) as secured:
        yield secured


def is_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    document: dict[str, Any] = answer.json()
    schemas.ProblemDocument.model_validate(document)
    assert document["type"] == PROBLEM + code
    assert document["instance"] == answer.headers["x-request-id"]
    return document


# ---- Bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"id":NaN}', b'{"id":"a","id":"b"}', b'{"id":"\\ud800"}', b"[" * 100_000, b"9" * 5000],
)
def test_malformed_json_is_400(stack: RunningStack, body: bytes) -> None:
    for path in ("/v1/devices", "/v1/tokens", "/v1/enroll"):
        answer = stack.http.post(path, content=body, headers={"Content-Type": "application/json"})
        is_problem(answer, 400, "malformed-json")


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "json", "application/json+", ";;", "a/b/c"],
)
def test_another_content_type_is_415(stack: RunningStack, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    is_problem(stack.http.post("/v1/devices", content=b"{}", headers=headers), 415, "unsupported-media-type")


def test_a_patch_is_a_merge_patch(stack: RunningStack, device: str) -> None:
    is_problem(stack.http.patch(f"/v1/devices/{device}", json={"labels": {}}), 415, "unsupported-media-type")


@pytest.mark.parametrize(
    ("path", "size"),
    [("/v1/devices", edge.COMMAND_LIMIT), ("commands?name=x", wire.MAX_BODY), ("telemetry/x", edge.TELEMETRY_LIMIT)],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(stack: RunningStack, device: str, path: str, size: int, chunked: bool) -> None:
    full = path if path.startswith("/") else f"/v1/devices/{device}/{path}"
    body = b"x" * (size + 1)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    answer = stack.http.post(full, content=pieces() if chunked else body, headers={"Content-Type": "application/json"})
    is_problem(answer, 413, "too-large")


def test_arguments_may_have_their_full_size(stack: RunningStack, device: str) -> None:
    body = b"x" * wire.MAX_BODY
    answer = stack.http.post(
        f"/v1/devices/{device}/commands?name=x&ttl=5", content=body, headers={"Content-Type": "a/b"}
    )
    assert answer.status_code == 202, answer.text
    assert len(answer.json()["args"]["base64"]) == -(-wire.MAX_BODY // 3) * 4


def test_a_slow_body_is_408(stack: RunningStack, connection: ssl.SSLSocket) -> None:
    began = time.monotonic()
    head = (
        "POST /v1/devices HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        f"Authorization: Bearer {stack.token}\r\n\r\n"
    )
    connection.sendall(head.encode() + b"{")
    done = threading.Event()

    def drip() -> None:
        while not done.wait(1):
            connection.sendall(b" ")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        status = connection.recv(100).split(b"\r\n")[0]
    finally:
        done.set()
        dripping.join()
    assert status.startswith(b"HTTP/1.1 408")
    assert edge.BODY_TIMEOUT - 1 < time.monotonic() - began < edge.BODY_TIMEOUT + 5


# ---- Requests that are none --------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    line=st.sampled_from(
        [b"GET /v1/devices", b"POST /v1/devices", b"PATCH /v1/devices/a", b"GET /v1/commands", b"GET /v1/telemetry"]
    ),
    path=st.binary(max_size=20).map(lambda raw: raw.translate(None, b"\r\n \0")),
    name=st.sampled_from(
        [b"Prefer", b"If-Match", b"Accept", b"Content-Type", b"X-Request-Id", b"Authorization", b"traceparent"]
    ),
    value=st.binary(max_size=40).map(lambda raw: raw.translate(None, b"\r\n\0")),
    authorized=st.booleans(),
)
def test_no_garbage_is_a_500(
    stack: RunningStack, line: bytes, path: bytes, name: bytes, value: bytes, authorized: bool
) -> None:
    url = urlsplit(stack.stack.settings.api_url)
    token = b"Authorization: Bearer " + stack.token.encode() + b"\r\n" if authorized else b""
    plain = socket.create_connection((url.hostname, url.port), timeout=20)
    with stack.context.wrap_socket(plain, server_hostname=url.hostname) as secured:
        head = b"?" + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
        secured.sendall(line + head + token + name + b": " + value + b"\r\n\r\n{}")
        status = secured.recv(100)[9:12]
    assert status[:1] in (b"2", b"4"), status


@pytest.mark.parametrize(
    "path",
    ["/v1/devices/%00", "/v1/devices/%ff", "/v1/devices/a%2Fb", "/v1/devices/%F0%9F%98%80", "//", "/v1/devices/"],
)
def test_no_path_is_a_500(stack: RunningStack, path: str) -> None:
    assert stack.http.get(path).status_code in (404, 422)


def test_unknown_paths_and_methods_are_problems(stack: RunningStack, device: str) -> None:
    is_problem(stack.http.get("/v1/nothing"), 404, "not-found")
    answer = stack.http.put(f"/v1/devices/{device}", json={})
    is_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "DELETE, GET, PATCH"
    is_problem(stack.http.get("/v1/devices", headers={"Accept": "text/html"}), 406, "not-acceptable")


def test_a_sane_request_id_is_kept_and_no_other(stack: RunningStack) -> None:
    assert (
        stack.http.get("/health/live", headers={"X-Request-Id": "trace-12345"}).headers["x-request-id"] == "trace-12345"
    )
    for bad in ("short", "x" * 65, "with space in", "a" * 9 + '"'):
        made = stack.http.get("/health/live", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32


def test_headers_of_every_answer(stack: RunningStack) -> None:
    for path in ("/health/live", "/v1/devices", "/nothing", "/openapi.json"):
        headers = stack.http.get(path).headers
        assert "server" not in headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "content-security-policy" in headers


# ---- Tokens ------------------------------------------------------------------------------------------


def test_two_authorizations_are_none(stack: RunningStack) -> None:
    with stack.client(None) as client:
        twice = [("Authorization", f"Bearer {stack.token}")] * 2
        is_problem(client.get("/v1/devices", headers=twice), 401, "unauthenticated")


def test_who_may_not_learns_so_before_the_body_is_looked_at(stack: RunningStack, device: str) -> None:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "reader", "scopes": ["devices:read"], "life": 60}))
    with stack.client(made["token"]) as reader:
        assert reader.get("/v1/devices").status_code == 200
        answer = reader.post(f"/v1/devices/{device}/commands", content=b"{", headers={"Content-Type": "text/plain"})
        document = is_problem(answer, 403, "forbidden")
        assert "commands:send" in document["detail"]
        assert 'scope="commands:send"' in answer.headers["www-authenticate"]
        wider = reader.post("/v1/tokens", json={"subject": "reader", "scopes": ["devices:read"]})
        is_problem(wider, 403, "forbidden")


def test_a_token_is_minted_within_its_minters_rights(stack: RunningStack) -> None:
    scopes = ["tokens:write", "devices:read"]
    minter = stack.ok(stack.http.post("/v1/tokens", json={"subject": "minter", "scopes": scopes, "life": 600}))
    with stack.client(minter["token"]) as client:
        wider = client.post("/v1/tokens", json={"subject": "x", "scopes": ["commands:send"], "life": 60})
        assert "commands:send" in is_problem(wider, 403, "forbidden")["detail"]
        longer = client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:read"], "life": 601})
        is_problem(longer, 403, "forbidden")
        within = stack.ok(client.post("/v1/tokens", json={"subject": "x", "scopes": ["devices:read"]}))
        assert within["expires_at"] <= minter["expires_at"]
    listed = [each for page in [stack.ok(stack.http.get("/v1/tokens"))] for each in page["items"]]
    assert all("token" not in each for each in listed)


def test_a_revoked_token_is_refused_within_its_second(stack: RunningStack) -> None:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "brief", "scopes": ["devices:read"], "life": 600}))
    with stack.client(made["token"]) as client:
        assert client.get("/v1/devices").status_code == 200
        assert stack.http.delete(f"/v1/tokens/{made['jti']}").status_code == 200
        eventually(lambda: client.get("/v1/devices").status_code == 401, "the token is refused", within=3)


# ---- Devices -----------------------------------------------------------------------------------------


def test_a_device_from_creation_to_deletion(stack: RunningStack) -> None:
    created = stack.http.post(
        "/v1/devices", json={"id": "edges-life", "groups": ["garages"], "labels": {"site": "north"}}
    )
    assert created.status_code == 201
    assert created.headers["location"] == "/v1/devices/edges-life"
    document = created.json()
    schemas.NewDeviceDocument.model_validate_json(created.content)
    assert document["connection"] == {"state": "disconnected", "since": None}
    is_problem(stack.http.post("/v1/devices", json={"id": "edges-life"}), 409, "conflict")
    patch = {"Content-Type": "application/merge-patch+json"}
    stale = created.headers["etag"]
    changed = stack.http.patch(
        "/v1/devices/edges-life", content=b'{"labels":{"site":null,"floor":"2"}}', headers=patch | {"If-Match": stale}
    )
    assert changed.json()["labels"] == {"floor": "2"}
    assert changed.headers["etag"] != stale
    for method in ("PATCH", "DELETE"):
        for tag in (stale, f"W/{changed.headers['etag']}", "nonsense"):
            refused = stack.http.request(
                method, "/v1/devices/edges-life", content=b"{}", headers=patch | {"If-Match": tag}
            )
            is_problem(refused, 412, "precondition-failed")
    gone = stack.http.delete("/v1/devices/edges-life", headers={"If-Match": changed.headers["etag"]})
    assert gone.status_code == 204
    is_problem(stack.http.get("/v1/devices/edges-life"), 404, "not-found")


def test_pages_hold_everything_once(stack: RunningStack) -> None:
    made = {stack.create_device("paged")[0] for _ in range(5)}
    found: list[str] = []
    query: dict[str, str] = {"limit": "2"}
    while True:
        page = stack.ok(stack.http.get("/v1/devices", params=query))
        found += [each["id"] for each in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert made <= set(found)
    assert len(found) == len(set(found))
    for bad in ("!", "AAAA", "x" * 300):
        is_problem(stack.http.get("/v1/devices", params={"cursor": bad}), 422, "invalid")


# ---- Commands ----------------------------------------------------------------------------------------


def test_a_command_that_waits_is_accepted_listed_and_expires(stack: RunningStack, device: str) -> None:
    answer = stack.http.post(f"/v1/devices/{device}/commands", json={"name": "a.b", "args": {"n": 1.5}, "ttl": 0.5})
    assert answer.status_code == 202
    schemas.CommandDocument.model_validate_json(answer.content)
    assert answer.json()["state"] == "queued"
    path = answer.headers["location"]
    settled = stack.http.get(path, headers={"Prefer": "wait=30"})
    assert settled.headers["preference-applied"] == "wait=30"
    assert settled.json()["state"] == "expired"
    page = stack.ok(stack.http.get("/v1/commands", params={"device": device, "state": "expired", "limit": "1"}))
    (listed,) = page["items"]
    # The broker's dead letter may come later, as one more piece of evidence.
    assert listed | {"timeline": None} == settled.json() | {"timeline": None}
    assert listed["timeline"][: len(settled.json()["timeline"])] == settled.json()["timeline"]


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "é", "a\x7f"])
def test_bad_keys_are_422(stack: RunningStack, device: str, key: str) -> None:
    path = f"/v1/devices/{device}/commands"
    if key and key.isascii() and key.isprintable():
        is_problem(stack.http.post(path, json={"name": "a"}, headers={"Idempotency-Key": key}), 422, "invalid")
    is_problem(stack.http.post(path, json={"name": "a", "supersedes": key}), 422, "invalid")
    is_problem(stack.http.post(path, params={"name": "a", "supersedes": key}), 422, "invalid")
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    is_problem(stack.http.post(path, json={"name": "a"}, headers=twice), 422, "invalid")


@pytest.mark.parametrize("limit", [0, -1, 251, 2**70, 1.5, "9", True])
def test_bad_limits_of_mailboxes_are_422(stack: RunningStack, device: str, limit: object) -> None:
    given = {"mailbox": {"limit": limit}}
    is_problem(stack.http.post("/v1/devices", json={"id": "limits", **given}), 422, "invalid")
    patch = {"Content-Type": "application/merge-patch+json"}
    is_problem(stack.http.patch(f"/v1/devices/{device}", json=given, headers=patch), 422, "invalid")


# ---- Telemetry ---------------------------------------------------------------------------------------


def read(stack: RunningStack, **query: object) -> list[dict[str, Any]]:
    answer = stack.http.get("/v1/telemetry", params={key.rstrip("_"): str(value) for key, value in query.items()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_readings_are_read_back_as_they_were_sent(stack: RunningStack, device: str) -> None:
    path = f"/v1/devices/{device}/telemetry"
    stack.ok(stack.http.post(f"{path}/one?at=2026-01-01T00:00:00.5Z", json={"c": 21.5}))
    stack.ok(stack.http.post(f"{path}/raw", content=b"\xff\0", headers={"Content-Type": "image/png"}))
    lines = b'{"at":"2026-01-01T00:00:00Z","value":1}\n{"value":"\xc3\xa9"}\n'
    assert stack.ok(stack.http.post(f"{path}/many", content=lines, headers=NDJSON)) == {"accepted": 2}
    one, raw, first, second = read(stack, from_="first", device=device, limit=4, idle=3)
    schemas.ReadingDocument.model_validate(one)
    assert (one["channel"], one["at"], one["value"]) == ("one", "2026-01-01T00:00:00.500000Z", {"c": 21.5})
    assert (raw["content_type"], raw["value"]) == ("image/png", {"base64": "/wA="})
    assert (first["value"], second["value"]) == (1, "é")
    assert read(stack, from_=second["offset"], device=device, limit=1) == [second]
    assert read(stack, from_="first", device=device, channel="one", idle=0.5) == [one]


def test_a_bad_line_refuses_the_batch_and_is_named(stack: RunningStack, device: str) -> None:
    path = f"/v1/devices/{device}/telemetry/bad"
    answer = stack.http.post(path, content=b'{"value":1}\n{"value":NaN}', headers=NDJSON)
    assert "Line 2" in is_problem(answer, 400, "malformed-json")["detail"]
    assert "Line 1" in is_problem(stack.http.post(path, content=b"1", headers=NDJSON), 422, "invalid")["detail"]
    is_problem(stack.http.post(path, content=b"", headers=NDJSON), 422, "invalid")
    is_problem(stack.http.post(path, content=b'{"value":1}\n' * 1001, headers=NDJSON), 422, "invalid")
    assert read(stack, from_="first", device=device, channel="bad", idle=0.5) == []


def test_telemetry_of_an_unknown_device_is_404(stack: RunningStack) -> None:
    is_problem(stack.http.post("/v1/devices/nobody/telemetry/x", json=1), 404, "not-found")


def test_readers_that_go_away_give_back_their_place(stack: RunningStack, device: str) -> None:
    url = urlsplit(stack.stack.settings.api_url)
    headers = {"Authorization": f"Bearer {stack.token}"}
    readers = []
    for _ in range(8):
        reader = http.client.HTTPSConnection(url.hostname or "", url.port, context=stack.context, timeout=20)
        reader.request("GET", "/v1/telemetry?from=next&idle=60", headers=headers)
        assert reader.getresponse().status == 200
        readers.append(reader)
    busy = stack.http.get("/v1/telemetry")
    is_problem(busy, 429, "too-many-requests")
    assert int(busy.headers["retry-after"]) >= 1
    for reader in readers:
        reader.sock and reader.sock.shutdown(socket.SHUT_RDWR)
        reader.close()
    eventually(lambda: stack.http.get("/v1/telemetry?idle=0.05").status_code == 200, "a place is free", within=10)


def test_a_reader_whose_token_is_revoked_is_cut(stack: RunningStack) -> None:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "r", "scopes": ["telemetry:read"], "life": 600}))
    with stack.client(made["token"]) as client, client.stream("GET", "/v1/telemetry?from=next&idle=60") as answer:
        assert answer.status_code == 200
        stack.http.delete(f"/v1/tokens/{made['jti']}")
        began = time.monotonic()
        lines = [json.loads(line) for line in answer.iter_lines() if line]
    assert time.monotonic() - began < 5
    assert lines[-1]["problem"]["type"] == PROBLEM + "unauthenticated"
