"""The events over HTTP: followed, filtered, resumed, refused, and followed from the command line."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api import schemas
from api.routes.events import FOLLOWERS
from fabric import feed
from tests.harness.events import following, of
from tests.harness.stack import AgentProcess, RunningStack, eventually

PROBLEM = "urn:restante:problem:"
SCOPES = ["commands:read", "devices:read"]


@pytest.fixture(scope="module")
def agent(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with stack.agent(tmp_path_factory.mktemp("events") / "device") as process:
        yield process.start()


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    document: dict[str, object] = answer.json()
    assert document["type"] == PROBLEM + code
    return document


# ---- What is told ------------------------------------------------------------------------------------


def test_a_command_is_told_from_acceptance_to_outcome(stack: RunningStack, agent: AgentProcess) -> None:
    with following(stack, device=agent.id, kind="command.*") as events:
        assert events.answer.headers["content-type"] == "text/event-stream"
        assert events.answer.headers["cache-control"] == "no-store"
        assert events.answer.headers["x-accel-buffering"] == "no"
        done = stack.send(agent.id, "note", {"text": "told"}, wait=20)
        assert done["state"] == "succeeded"
        told = events.until(of(done["id"], "command.succeeded"))
    for event in told:
        schemas.EventDocument.model_validate_json(json.dumps(event))
        assert event["command"]["state"] == event["command"]["timeline"][-1]["state"]
        assert event["version"] >= len(event["command"]["timeline"])
    assert told[0]["kind"] == "command.accepted"
    assert told[0]["command"]["outcome"] is None
    assert [event["position"] for event in told] == sorted({event["position"] for event in told})
    assert told[-1]["command"] == done


def test_followers_get_what_they_asked_for(stack: RunningStack) -> None:
    one, _ = stack.create_device("told", groups=["told.north"])
    other, _ = stack.create_device("told", groups=["told.south", "told.all"])
    with (
        following(stack, device=[one, other]) as both,
        following(stack, group="told.south", kind=["command.accepted", "device.deleted"]) as south,
    ):
        for device in (one, other):
            stack.send(device, "a", {}, ttl=0.5)
        last = stack.send(other, "a", {}, ttl=0.5)["id"]
        stack.ok(stack.http.delete(f"/v1/devices/{other}"))
        told = both.until(lambda event: event["kind"] == "device.deleted")
        assert {event["device"] for event in told} == {one, other}
        assert any(map(of(last, "command.accepted"), told))
        of_south = south.until(lambda event: event["kind"] == "device.deleted")
    assert [event["kind"] for event in of_south] == ["command.accepted", "command.accepted", "device.deleted"]
    assert all((event["device"], event["groups"]) == (other, ["told.south", "told.all"]) for event in of_south)
    deleted = of_south[-1]
    assert (deleted["command"], deleted["evidence"], deleted["changed"]) == (None, None, None)
    assert deleted["detail"] == {"generation": 1, "groups": ["told.south", "told.all"]}


def test_a_place_is_resumed_and_the_header_goes_before_the_query(stack: RunningStack) -> None:
    device, _ = stack.create_device("resumed")
    with following(stack, after=0, device=device) as events:
        assert events.last == "0"
        first = events.event()
        assert first["kind"] == "device.created"
        last = stack.send(device, "a", {}, ttl=30)["id"]
        told = events.until(of(last, "command.queued"))
    place = str(first["position"])
    with following(stack, place, device=device, after=0) as again:
        assert again.last == place
        assert again.until(of(last, "command.queued")) == told
    with following(stack, after=first["position"]) as everything:
        positions = [event["position"] for event in everything.until(of(last, "command.queued"))]
    assert positions == list(range(first["position"] + 1, told[-1]["position"] + 1)), "no gaps"
    with following(stack, "9" * 18) as beyond:
        assert int(beyond.last) >= told[-1]["position"], "reset to the present end"
        assert int(beyond.last) < 10**17
        stack.http.delete(f"/v1/commands/{last}")
        assert beyond.until(lambda event: event["device"] == device)


def test_a_reset_is_told(stack: RunningStack) -> None:
    answer_headers = {"Last-Event-ID": "9" * 18}
    with stack.http.stream("GET", "/v1/events", headers=answer_headers) as answer:
        lines = answer.iter_lines()
        id, event, data = next(lines), next(lines), next(lines)
    assert event == "event: reset"
    assert id == f"id: {json.loads(data.removeprefix('data: '))['position']}"


def test_no_text_of_a_device_breaks_out_of_its_event(stack: RunningStack, agent: AgentProcess) -> None:
    evil = "\r\n\nid: 1\r\nevent: x\ndata: {}\n\n\u2028\u2029\x85\x00\x1b[2J\U0001f600"
    with following(stack, device=agent.id, kind="command.*") as events:
        done = stack.send(agent.id, "fail", {"text": evil}, wait=20)
        assert done["state"] == "failed"
        assert "event: x" in done["reason"]
        # Who waits is told what is stored, and the same outcome again would be no other one.
        assert done["reason"] == stack.command(done["id"])["reason"]
        told = events.until(of(done["id"], "command.failed"))
    assert told[-1]["command"] == stack.command(done["id"])
    assert {event["command"]["id"] for event in told} == {done["id"]}


def test_a_filtered_readers_place_moves_on(stack: RunningStack) -> None:
    device, _ = stack.create_device("quiet")
    with following(stack, device="nobody-at-all") as events:
        began = time.monotonic()
        stack.send(device, "a", {}, ttl=0.5)
        place = int(events.last)
        while int(events.last) <= place:
            block = events.block()
            assert (block.event, block.data) == ("", "")
    assert time.monotonic() - began < 2 * feed.HEARTBEAT + 5


# ---- Who may, and how many ---------------------------------------------------------------------------


def test_both_scopes_are_needed(stack: RunningStack) -> None:
    for scope in SCOPES:
        made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "half", "scopes": [scope], "life": 60}))
        with stack.client(made["token"]) as client:
            refused(client.get("/v1/events"), 403, "forbidden")
    with stack.client(None) as client:
        refused(client.get("/v1/events"), 401, "unauthenticated")
    refused(stack.http.get("/v1/events", headers={"Accept": "application/json"}), 406, "not-acceptable")


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"device": "Garage"}, "query:device"),
        ({"group": "a..b"}, "query:group"),
        ({"kind": "*"}, "query:kind"),
        ({"kind": "command.*.x"}, "query:kind"),
        ({"kind": "x" * 200}, "query:kind"),
        ({"after": "-1"}, "query:after"),
        ({"after": "9" * 19}, "query:after"),
        ({"since": "1"}, "query:since"),
        ({"device": [f"d{n}" for n in range(33)]}, "query:device"),
    ],
)
def test_bad_filters_are_422_and_named(stack: RunningStack, query: dict[str, object], pointer: str) -> None:
    document = refused(stack.http.get("/v1/events", params=query), 422, "invalid")  # type: ignore[arg-type]
    assert pointer in str(document["errors"])


@pytest.mark.parametrize("id", ["", "x", "-1", "+1", "1.0", "1e3", "9" * 19, "\u0661".encode(), "1, 2"])
def test_a_malformed_last_event_id_is_422(stack: RunningStack, id: str | bytes) -> None:
    document = refused(stack.http.get("/v1/events", headers={"Last-Event-ID": id}), 422, "invalid")  # type: ignore[dict-item]
    assert "header:Last-Event-ID" in str(document["errors"])


def test_a_follower_whose_token_is_revoked_is_told_so_and_cut(stack: RunningStack) -> None:
    made = stack.ok(stack.http.post("/v1/tokens", json={"subject": "r", "scopes": SCOPES, "life": 600}))
    with following(stack, token=made["token"], kind="no.such") as events:
        stack.http.delete(f"/v1/tokens/{made['jti']}")
        began = time.monotonic()
        block = events.block()
        assert time.monotonic() - began < 5
        assert block.event == "problem"
        assert json.loads(block.data)["type"] == PROBLEM + "unauthenticated"
        with pytest.raises(StopIteration):
            events.block()


def test_followers_are_bounded_and_give_back_their_places(stack: RunningStack) -> None:
    url = urlsplit(stack.stack.settings.api_url)
    headers = {"Authorization": f"Bearer {stack.token}"}
    readers = []
    for _ in range(FOLLOWERS):
        reader = http.client.HTTPSConnection(url.hostname or "", url.port, context=stack.context, timeout=20)
        reader.request("GET", "/v1/events?kind=no.such", headers=headers)
        assert reader.getresponse().status == 200
        readers.append(reader)
    busy = stack.http.get("/v1/events")
    refused(busy, 429, "too-many-requests")
    assert int(busy.headers["retry-after"]) >= 1
    for reader in readers:
        reader.sock and reader.sock.shutdown(socket.SHUT_RDWR)
        reader.close()

    def is_free() -> bool:
        with stack.http.stream("GET", "/v1/events") as answer:
            return answer.status_code == 200

    eventually(is_free, "a place is free", within=10)


# ---- From the command line ---------------------------------------------------------------------------


def test_the_command_line_follows(stack: RunningStack, tmp_path: Path) -> None:
    device, _ = stack.create_device("shown")
    argv = [sys.executable, "-m", "api.operator.cli", "--state-dir", str(stack.stack.settings.state_dir), "events"]
    output = tmp_path / "events"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*argv, "--after", "0", "--device", device, "--kind", "command.*", "--kind", "device.created"],
            stdout=file,
            stderr=subprocess.PIPE,
        )
    try:
        id = stack.send(device, "a", {}, ttl=30)["id"]

        def told() -> list[dict[str, object]]:
            return [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]

        eventually(lambda: [event["kind"] for event in told()][2:3] == ["command.queued"], "it is told")
        assert [event["kind"] for event in told()] == ["device.created", "command.accepted", "command.queued"]
        assert told()[1]["command"]["id"] == id  # type: ignore[index]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, b"")
    finally:
        process.kill()
        process.wait(10)
    refused = subprocess.run([*argv, "--kind", "A b"], capture_output=True, timeout=30, check=False)
    assert refused.returncode == 1
    assert b"invalid values" in refused.stderr
