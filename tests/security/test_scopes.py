"""Scopes: what a narrowed caller reaches, and that everything else is to it as if it did not exist."""

import base64
import itertools
import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.harness.device import es256, forge
from tests.harness.events import following, of
from tests.harness.stack import Document, RunningStack, eventually

PATCH = {"Content-Type": "application/merge-patch+json"}
NOBODY = "01990000-0000-7000-8000-000000000000"
PROBLEM = "urn:restante:problem:"

Caller = Callable[..., httpx.Client]
"""A client with a token of these scopes; `subject` may be told."""


@dataclass(frozen=True)
class World:
    """Two groups; `mine` is in the one, `other` in the other, `both` in both."""

    here: str
    there: str
    mine: str
    other: str
    both: str


@pytest.fixture(scope="module")
def world(stack: RunningStack) -> World:
    here, there = (f"{name}-{secrets.token_hex(3)}" for name in ("here", "there"))
    mine, other, both = (stack.create_device("scoped", groups=groups)[0] for groups in ([here], [there], [here, there]))
    return World(here, there, mine, other, both)


@pytest.fixture
def caller(stack: RunningStack) -> Iterator[Caller]:
    with ExitStack() as clients:

        def make(*scopes: str, subject: str = "narrow") -> httpx.Client:
            return clients.enter_context(stack.client(mint(stack.http, *scopes, subject=subject)["token"]))

        yield make


def mint(http: httpx.Client, *scopes: str, subject: str = "narrow", **body: object) -> Document:
    return RunningStack.ok(http.post("/v1/tokens", json={"subject": subject, "scopes": scopes, **body}))


def claiming(stack: RunningStack, scope: str) -> str:
    """A token of the fabric whose `scope` nobody would mint: signed with its own key, with a `jti` that exists."""
    key = stack.signing_key(stack.stack.files.token_keys).private
    made = mint(stack.http, "devices:read", subject="probe")["token"].split(".")
    head, payload = (json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in made[:2])
    return forge(head, payload | {"scope": scope}, es256(key))


def command(stack: RunningStack, device: str, name: str, **body: object) -> str:
    """One that waits: nobody is there to pick it up."""
    return str(stack.send(device, name, {}, ttl=600, **body)["id"])


def plain(answer: httpx.Response) -> tuple[int, str | None, bytes]:
    """Status, type and body, without what is each request's own."""
    id = answer.headers["x-request-id"].encode()
    return answer.status_code, answer.headers.get("content-type"), answer.content.replace(id, b"")


def on_device(id: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Every operation on one device, in forms that are right."""
    path = f"/v1/devices/{id}"
    order = {"name": "door.open", "args": {}, "ttl": 1}
    return [
        ("GET", path, {}),
        ("PATCH", path, {"content": "{}", "headers": PATCH}),
        ("PATCH", path, {"content": '{"groups": []}', "headers": PATCH}),
        ("PATCH", path, {"content": '{"enabled": false}', "headers": PATCH | {"If-Match": "*"}}),
        ("DELETE", path, {}),
        ("DELETE", path, {"headers": {"If-Match": '"1.1"'}}),
        ("POST", f"{path}/enrollment", {}),
        ("GET", f"{path}/keys", {}),
        ("POST", f"{path}/commands", {"json": order}),
        ("POST", f"{path}/commands", {"json": order, "headers": {"Prefer": "wait=1"}}),
        ("POST", f"{path}/commands", {"json": order, "headers": {"Idempotency-Key": "once"}}),
        ("POST", f"{path}/commands?name=door.open", {"content": b"x", "headers": {"Content-Type": "a/b"}}),
        ("POST", f"{path}/telemetry/door.state", {"json": 1}),
    ]


EVERYTHING_ON_A_DEVICE = (
    "devices:read", "devices:write", "devices:enroll", "commands:send", "commands:read", "telemetry:read",
    "telemetry:write",
)  # fmt: skip


def narrowed(*, to: str, names: str = "") -> list[str]:
    named = ("commands:send", "telemetry:read", "telemetry:write")
    return [f"{action}@{to}{names if action in named else ''}" for action in EVERYTHING_ON_A_DEVICE]


# ---- Out of scope is unknown -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "group", "device and name", "group and name"])
def test_a_device_out_of_scope_is_like_one_that_is_not_there(
    stack: RunningStack, world: World, caller: Caller, kind: str
) -> None:
    to = f"device:{world.mine}" if kind.startswith("device") else f"group:{world.here}"
    client = caller(*narrowed(to=to, names="/door.*" if kind.endswith("name") else ""), "groups:write")
    foreign, _ = stack.create_device("foreign", groups=[world.there, f"{world.here}.x"])
    before = stack.ok(stack.http.get(f"/v1/devices/{foreign}"))
    while_it_exists = [plain(client.request(method, path, **given)) for method, path, given in on_device(foreign)]
    assert stack.ok(stack.http.get(f"/v1/devices/{foreign}")) == before, "nothing was done"
    assert stack.ok(stack.http.get("/v1/commands", params={"device": foreign}))["items"] == []
    stack.http.delete(f"/v1/devices/{foreign}")
    afterwards = [plain(client.request(method, path, **given)) for method, path, given in on_device(foreign)]
    assert {status for status, *_ in while_it_exists} == {404}
    assert while_it_exists == afterwards


def test_a_caller_of_the_right_scope_gets_through(stack: RunningStack, caller: Caller) -> None:
    """The control of the test above."""
    for kind in ("device", "group"):
        group = f"own-{secrets.token_hex(3)}"
        id, _ = stack.create_device("own", groups=[group])
        to = f"device:{id}" if kind == "device" else f"group:{group}"
        client = caller(*narrowed(to=to, names="/door.*"), f"groups:write@group:{group}")
        calls = [each for each in on_device(id) if each[0] != "DELETE" and "groups" not in str(each)]
        answers = [client.request(method, path, **given) for method, path, given in calls]
        assert [answer.status_code for answer in answers if not answer.is_success] == []
        assert client.patch(f"/v1/devices/{id}", content='{"groups": []}', headers=PATCH).is_success
        # By its own leave it is out of reach now, unless it is named.
        assert client.delete(f"/v1/devices/{id}").status_code == (204 if kind == "device" else 404)


def test_a_command_out_of_scope_is_like_one_that_is_not_there(
    stack: RunningStack, world: World, caller: Caller
) -> None:
    theirs = command(stack, world.other, "door.open")
    for to in (f"device:{world.mine}", f"group:{world.here}", f"group:{world.there}.x"):
        client = caller(*narrowed(to=to))
        for method, headers in (("GET", {}), ("GET", {"Prefer": "wait=1"}), ("DELETE", {})):
            seen = client.request(method, f"/v1/commands/{theirs}", headers=headers)
            unknown = client.request(method, f"/v1/commands/{NOBODY}", headers=headers)
            assert seen.status_code == 404
            assert plain(seen) == (*plain(unknown)[:2], plain(unknown)[2].replace(NOBODY.encode(), theirs.encode()))
    assert stack.command(theirs)["state"] in ("accepted", "queued")
    reader = caller(f"commands:read@group:{world.there}")
    assert RunningStack.ok(reader.get(f"/v1/commands/{theirs}"))["id"] == theirs
    assert reader.delete(f"/v1/commands/{theirs}").status_code == 403


@pytest.mark.parametrize(
    ("name", "status"), [("door.open", 202), ("door.open.wide", 202), ("door", 404), ("doors.x", 404), ("light", 404)]
)
def test_the_final_star_is_one_or_more_words(world: World, caller: Caller, name: str, status: int) -> None:
    client = caller(f"commands:send@group:{world.here}/door.*", f"telemetry:write@device:{world.mine}/door.*")
    for device, expected in ((world.mine, status), (world.both, status), (world.other, 404)):
        answers = [
            client.post(f"/v1/devices/{device}/commands", json={"name": name, "ttl": 1}),
            client.post(f"/v1/devices/{device}/commands", params={"name": name, "ttl": 1}, content=b""),
        ]
        unknown = client.post("/v1/devices/nobody/commands", json={"name": name})
        for answer in answers:
            assert answer.status_code == expected
            if expected == 404:
                assert plain(answer)[2] == plain(unknown)[2].replace(b"nobody", device.encode())
    reading = client.post(f"/v1/devices/{world.mine}/telemetry/{name}", json=1)
    assert reading.status_code == (200 if status == 202 else 404)


@pytest.mark.parametrize(
    "scope",
    [
        "commands:send@device:{mine}/door.*x", "commands:send@device:{mine}/*", "commands:send@device:{mine}/",
        "commands:send@device:{mine}/.*", "commands:send@device:*", "commands:send@device:", "commands:send@",
        "commands:send@{mine}", "commands:send@group:{here}/door.*/x", "commands:send@group:*", "commands:send/door",
        "commands:send@group:{here}.*", "commands:send@DEVICE:{mine}", "Commands:send@device:{mine}",
        "commands:send\u0085commands:send@device:{mine}", "commands:send\u00a0commands:send", "commands:*",
        "commands:send@device:{mine}\ncommands:send", "commands:send@device:{mine}@group:{here}",
        "devices:read@device:{mine}/door.open", "groups:write@device:{mine}", "tokens:write@device:{mine}",
        "tokens:write@group:{here}", "devices:read@device:{mine}/*", "telemetry:read@group:{here}/*",
        " ".join(["audit:read"] * 101),
    ],
)  # fmt: skip
def test_a_malformed_scope_grants_nothing(stack: RunningStack, world: World, scope: str) -> None:
    """Nor does it fall back to what stands before the fault."""
    scope = scope.format(mine=world.mine, here=world.here)
    with stack.client(claiming(stack, scope)) as client:
        asked = [
            *on_device(world.mine), ("GET", "/v1/devices", {}), ("GET", "/v1/commands", {}),
            ("POST", "/v1/devices", {"json": {"id": "not-to-be-made"}}), ("GET", "/v1/telemetry?idle=0.05", {}),
            ("GET", "/v1/tokens", {}), ("POST", "/v1/tokens", {"json": {"subject": "x", "scopes": ["devices:read"]}}),
            ("GET", "/v1/audit", {}), ("DELETE", "/v1/tokens?subject=x", {}), ("DELETE", f"/v1/tokens/{NOBODY}", {}),
        ]  # fmt: skip
        assert {client.request(method, path, **given).status_code for method, path, given in asked} == {403}


# ---- Lists and streams -------------------------------------------------------------------------------


def all_of(client: httpx.Client, path: str, **query: str) -> list[Document]:
    """A list's items, page by page; no page is over its limit."""
    found: list[Document] = []
    while True:
        page = RunningStack.ok(client.get(path, params=query))
        assert len(page["items"]) <= int(query.get("limit", "50"))
        found += page["items"]
        if page["next"] is None:
            return found
        query["cursor"] = page["next"]


@pytest.mark.parametrize("limit", ["1", "2", "100"])
def test_lists_hold_only_what_is_within(stack: RunningStack, world: World, caller: Caller, limit: str) -> None:
    sent = {device: command(stack, device, "door.open") for device in (world.mine, world.other, world.both)}
    for to, seen in (
        (f"device:{world.mine}", {world.mine}),
        (f"group:{world.here}", {world.mine, world.both}),
        (f"group:{world.there}", {world.other, world.both}),
        ("device:nobody", set()),
        ("group:nobody", set()),
    ):
        client = caller(f"devices:read@{to}", f"commands:read@{to}")
        devices = [each["id"] for each in all_of(client, "/v1/devices", limit=limit)]
        assert sorted(devices) == sorted(seen)
        commands = [each["id"] for each in all_of(client, "/v1/commands", limit=limit)]
        assert len(commands) == len(set(commands))
        assert {sent[device] for device in seen} <= set(commands)
        assert {stack.command(id)["device"] for id in commands} <= seen
        for device in (world.mine, world.other, world.both):
            listed = client.get("/v1/commands", params={"device": device})
            if device not in seen:
                assert plain(listed) == plain(client.get("/v1/commands", params={"device": "nobody"}))
            else:
                assert {each["device"] for each in listed.json()["items"]} == {device}


def test_two_scopes_add_up(world: World, caller: Caller) -> None:
    client = caller(f"devices:read@device:{world.mine}", f"devices:read@group:{world.there}")
    listed = {each["id"] for each in all_of(client, "/v1/devices")}
    assert listed == {world.mine, world.other, world.both}


def readings(client: httpx.Client, **query: str) -> list[tuple[str, str]]:
    answer = client.get("/v1/telemetry", params={"idle": "0.5", "limit": "10000", **query})
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    return [(each["device"], each["channel"]) for each in lines]


def test_a_reader_of_telemetry_gets_only_its_devices_and_channels(stack: RunningStack, caller: Caller) -> None:
    channels = ("door.state", "door", "doors.state", "light")
    here, there = (f"read-{secrets.token_hex(3)}" for _ in range(2))
    mine, other, both = (stack.create_device("read", groups=groups)[0] for groups in ([here], [there], [here, there]))
    for device in (mine, other, both):
        for channel in channels:
            stack.ok(stack.http.post(f"/v1/devices/{device}/telemetry/{channel}", json=1))
    assert readings(caller(f"telemetry:read@group:{here}/door.*")) == [(mine, "door.state"), (both, "door.state")]
    assert readings(caller(f"telemetry:read@device:{other}")) == [(other, channel) for channel in channels]
    assert readings(caller(f"telemetry:read@device:{mine}"), device=other) == []
    assert readings(caller("telemetry:read@device:nobody")) == []


def test_each_reading_is_judged_when_it_comes(stack: RunningStack, caller: Caller) -> None:
    group = f"fickle-{secrets.token_hex(3)}"
    leaver, stayer = (stack.create_device("fickle", groups=[group])[0] for _ in range(2))
    numbers = itertools.count()
    with caller(f"telemetry:read@group:{group}").stream("GET", "/v1/telemetry?from=next&idle=10") as answer:
        lines = answer.iter_lines()

        def seen() -> set[str]:
            """Whose reading of a round came through, when both have sent one; the stayer's is the second."""
            number, passed = next(numbers), set()
            for device in (leaver, stayer):
                stack.ok(stack.http.post(f"/v1/devices/{device}/telemetry/x", json=number))
            while stayer not in passed:
                reading = json.loads(next(lines))
                assert reading["value"] == number
                passed.add(reading["device"])
            return passed

        assert seen() == {leaver, stayer}
        stack.ok(stack.http.patch(f"/v1/devices/{leaver}", content='{"groups": []}', headers=PATCH))
        eventually(lambda: seen() == {stayer}, "what it is in is believed for a second", within=5)
        assert seen() == {stayer}


def test_a_follower_of_events_is_told_only_of_its_devices(stack: RunningStack, world: World, caller: Caller) -> None:
    """Of their commands by `commands:read`, of themselves by `devices:read`."""
    start = _position(stack)
    sent = {id: command(stack, id, "door.open") for id in (world.other, world.mine, world.both)}
    for id in sent:
        stack.ok(stack.http.patch(f"/v1/devices/{id}", content='{"labels": {"a": "b"}}', headers=PATCH))
    last = command(stack, world.both, "door.open")

    def told(*scopes: str, **query: object) -> set[tuple[str, str]]:
        token = mint(stack.http, *scopes)["token"]
        with following(stack, start, token=token, **query) as events:
            found = events.until(of(last, "command.accepted"))
        return {(each["device"], each["kind"].partition(".")[0]) for each in found}

    here, there = f"group:{world.here}", f"group:{world.there}"
    both = {(world.both, "command"), (world.both, "device")}
    assert told(f"commands:read@{here}", f"devices:read@{here}") == both | {
        (world.mine, "command"),
        (world.mine, "device"),
    }
    assert told(f"commands:read@{there}", f"devices:read@device:{world.mine}") == {
        (world.both, "command"),
        (world.other, "command"),
        (world.mine, "device"),
    }
    only = told(f"commands:read@device:{world.both}", "devices:read@device:nobody", device=[world.both, world.other])
    assert only == {(world.both, "command")}


def test_each_event_is_judged_when_it_comes(stack: RunningStack) -> None:
    group = f"fickle-{secrets.token_hex(3)}"
    leaver, stayer = (stack.create_device("fickle", groups=[group])[0] for _ in range(2))
    token = mint(stack.http, f"commands:read@group:{group}", f"devices:read@group:{group}")["token"]
    with following(stack, token=token) as events:
        first = command(stack, leaver, "x")
        events.until(of(first, "command.accepted"))
        stack.ok(stack.http.patch(f"/v1/devices/{leaver}", content='{"groups": []}', headers=PATCH))
        missed, last = command(stack, leaver, "x"), command(stack, stayer, "x")
        seen = events.until(of(last, "command.accepted"))
    assert not any(of(missed, each["kind"])(each) for each in seen)
    assert all(each["kind"] != "device.updated" for each in seen), "by then it had left"


def _position(stack: RunningStack) -> str:
    with following(stack) as events:
        return events.last


# ---- Cursors -----------------------------------------------------------------------------------------


def test_a_cursor_is_good_for_its_caller_list_and_filter_only(
    stack: RunningStack, world: World, caller: Caller
) -> None:
    for _ in range(2):
        command(stack, world.mine, "door.open")
    mine = caller("devices:read", "commands:read", "tokens:write", subject="pager")
    again = caller("devices:read", "commands:read", subject="pager")
    foreign = caller("devices:read", "commands:read", subject="another")
    asked = {"device": world.mine, "limit": "1"}

    def following(client: httpx.Client, path: str, **query: str) -> str:
        return str(RunningStack.ok(client.get(path, params=query))["next"])

    cursor = following(mine, "/v1/commands", **asked)
    for client in (mine, again):
        assert client.get("/v1/commands", params=asked | {"cursor": cursor}).status_code == 200
        assert client.get("/v1/commands", params=asked | {"cursor": cursor, "limit": "7"}).status_code == 200
    refused = {
        "foreign": foreign.get("/v1/commands", params=asked | {"cursor": cursor}),
        "operator's": stack.http.get("/v1/commands", params=asked | {"cursor": cursor}),
        "no filter": mine.get("/v1/commands", params={"cursor": cursor}),
        "another device": mine.get("/v1/commands", params=asked | {"cursor": cursor, "device": world.both}),
        "a filter more": mine.get("/v1/commands", params=asked | {"cursor": cursor, "state": "queued"}),
        "another list": mine.get("/v1/devices", params={"cursor": following(mine, "/v1/commands", limit="1")}),
        "tokens with a device's": mine.get("/v1/tokens", params={"cursor": following(mine, "/v1/devices", limit="1")}),
    }
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for place in (0, len(cursor) // 2, len(cursor) - 1):
        changed = alphabet[alphabet.index(cursor[place]) ^ 1]
        altered = cursor[:place] + changed + cursor[place + 1 :]
        refused[f"altered at {place}"] = mine.get("/v1/commands", params=asked | {"cursor": altered})
    for name, other in (("shorter", cursor[:-1]), ("longer", cursor + "A"), ("plain", b64(world.mine))):
        refused[name] = mine.get("/v1/commands", params=asked | {"cursor": other})
    for name, answer in refused.items():
        assert answer.status_code == 422, name
        assert answer.json()["errors"][0]["pointer"] == "query:cursor", name


def b64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def test_a_cursor_tells_nothing(caller: Caller) -> None:
    """It may stand for a device that its bearer must not know of."""
    page = RunningStack.ok(caller("devices:read").get("/v1/devices", params={"limit": "1"}))
    cursor = page["next"]
    raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    assert page["items"][0]["id"].encode() not in raw


# ---- Cancel, supersede, idempotency keys -------------------------------------------------------------


def test_cancelling_needs_the_commands_device_and_name(stack: RunningStack, world: World, caller: Caller) -> None:
    waits = command(stack, world.mine, "door.open")
    for scopes in (
        [f"commands:send@device:{world.mine}/light.*", "commands:read"],
        [f"commands:send@device:{world.mine}/door", f"commands:send@device:{world.mine}/doors.*"],
        [f"commands:send@device:{world.other}/door.*", f"commands:send@group:{world.there}"],
    ):
        assert caller(*scopes).delete(f"/v1/commands/{waits}").status_code == 404
    assert stack.command(waits)["state"] in ("accepted", "queued")
    allowed = caller(f"commands:send@group:{world.here}/door.*").delete(f"/v1/commands/{waits}")
    assert RunningStack.ok(allowed)["state"] == "cancelled"


def test_superseding_keeps_to_the_name(stack: RunningStack, world: World, caller: Caller) -> None:
    waits = command(stack, world.mine, "door.open", supersedes="position")
    client = caller(f"commands:send@device:{world.mine}/light.*")
    order = {"name": "light.on", "ttl": 600, "supersedes": "position"}
    assert client.post(f"/v1/devices/{world.mine}/commands", json=order).status_code == 202
    refused = client.post(f"/v1/devices/{world.mine}/commands", json=order | {"name": "door.open"})
    assert refused.status_code == 404
    assert stack.command(waits)["state"] in ("accepted", "queued")


def test_an_idempotency_key_is_its_subjects(world: World, caller: Caller) -> None:
    key = {"Idempotency-Key": secrets.token_hex(8)}
    order = {"name": "door.open", "ttl": 600}
    path = f"/v1/devices/{world.mine}/commands"
    scope = f"commands:send@device:{world.mine}/door.*"
    first = RunningStack.ok(caller(scope, subject="first").post(path, json=order, headers=key))
    assert RunningStack.ok(caller(scope, subject="first").post(path, json=order, headers=key))["id"] == first["id"]
    theirs = RunningStack.ok(caller(scope, subject="second").post(path, json=order, headers=key))
    assert theirs["id"] != first["id"]
    assert theirs["issuer"] == "second"


def test_a_key_opens_nothing_to_whoever_may_not_send(world: World, caller: Caller) -> None:
    key = {"Idempotency-Key": secrets.token_hex(8)}
    order = {"name": "door.open", "ttl": 600}
    path = f"/v1/devices/{world.mine}/commands"
    RunningStack.ok(caller("commands:send", subject="first").post(path, json=order, headers=key))
    for scope in (f"commands:send@device:{world.mine}/light", f"commands:send@group:{world.there}"):
        replayed = caller(scope, subject="first").post(path, json=order, headers=key)
        assert (replayed.status_code, replayed.json()["type"]) == (404, PROBLEM + "not-found")
    assert caller("commands:read", subject="first").post(path, json=order, headers=key).status_code == 403


# ---- Groups ------------------------------------------------------------------------------------------


def test_a_device_changes_groups_by_the_leave_of_each(stack: RunningStack, world: World, caller: Caller) -> None:
    id, _ = stack.create_device("mover", groups=[world.here])

    def put(client: httpx.Client, *groups: str) -> httpx.Response:
        return client.patch(f"/v1/devices/{id}", content=json.dumps({"groups": groups}), headers=PATCH)

    client = caller(f"devices:write@device:{id}", f"groups:write@group:{world.here}")
    joined = put(client, world.here, world.there)
    assert joined.status_code == 403
    assert f'scope="groups:write@group:{world.there}"' in joined.headers["www-authenticate"]
    assert put(client, world.there).status_code == 403
    assert put(client, world.here).status_code == 200, "nothing changes"
    assert put(client).status_code == 200
    assert put(client, world.here).status_code == 200
    RunningStack.ok(put(stack.http, world.here, world.there))
    assert put(client, world.here).status_code == 403, "leaving needs it too"
    assert put(client, world.there).status_code == 200
    assert put(caller(f"devices:write@device:{id}"), world.here).status_code == 403
    assert put(caller("groups:write", "devices:read"), world.here).status_code == 403
    # Whoever may change a group can't draw in devices that it may not change.
    greedy = caller(f"groups:write@group:{world.here}", f"devices:write@group:{world.here}")
    assert put(greedy, world.here, world.there).status_code == 404
    assert sorted(RunningStack.ok(stack.http.get(f"/v1/devices/{id}"))["groups"]) == [world.there]


def test_a_device_is_made_within_the_scope(stack: RunningStack, world: World, caller: Caller) -> None:
    id = f"made-{secrets.token_hex(3)}"

    def make(client: httpx.Client, id: str, *groups: str) -> int:
        return client.post("/v1/devices", json={"id": id, "groups": groups}).status_code

    named = caller(f"devices:write@device:{id}", f"devices:enroll@device:{id}")
    assert make(named, f"{id}-x") == make(named, world.other) == 403, "whether or not it is there"
    assert make(named, id, world.here) == 403
    assert make(named, id) == 201
    here = (f"{action}@group:{world.here}" for action in ("devices:write", "devices:enroll", "groups:write"))
    grouped = caller(*here)
    assert make(grouped, f"{id}-1") == make(grouped, f"{id}-1", world.there) == 403
    assert make(grouped, f"{id}-1", world.here, world.there) == 403
    assert make(grouped, f"{id}-1", world.here) == 201
    assert make(grouped, world.other, world.here) == 409
    assert stack.ok(stack.http.get(f"/v1/devices/{world.other}"))["groups"] == [world.there]
    assert make(caller(f"devices:write@group:{world.here}", "devices:enroll"), f"{id}-2", world.here) == 403
    assert make(caller(f"devices:write@group:{world.here}", "groups:write"), f"{id}-2", world.here) == 403


# ---- Minting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "asked", "status"),
    [
        (["commands:send@group:g"], "commands:send@group:g/door.*", 201),
        (["commands:send@group:g/door.*"], "commands:send@group:g/door.open", 201),
        (["commands:send"], "commands:send@device:d", 201),
        (["devices:read"], "tokens:write", 201),
        (["commands:send@group:g/door.*"], "commands:send@group:g/door", 403),
        (["commands:send@group:g/door.*"], "commands:send@group:g/doors.x", 403),
        (["commands:send@group:g/door.*"], "commands:send@group:g", 403),
        (["commands:send@group:g/door.open"], "commands:send@group:g/door.*", 403),
        (["commands:send@group:g/door.*"], "commands:send", 403),
        (["commands:send@group:g"], "commands:send@group:h", 403),
        (["commands:send@group:g"], "commands:send@group:g.x", 403),
        (["commands:send@group:g"], "commands:send@device:g", 403),
        (["commands:send@device:d"], "commands:send@device:e", 403),
        (["commands:send@device:d"], "commands:read@device:d", 403),
        (["groups:write@group:g"], "groups:write", 403),
        (["commands:send"], "commands:send@group:g/door.*x", 422),
        (["commands:send"], "commands:send@group:*", 422),
        (["commands:send"], "commands:send commands:read", 422),
        (["tokens:write"], "tokens:write@device:d", 422),
        (["groups:write"], "groups:write@device:d", 422),
        (["devices:read"], "devices:read@device:d/x", 422),
    ],
)
def test_a_token_is_never_wider_than_its_minter(caller: Caller, held: list[str], asked: str, status: int) -> None:
    client = caller("tokens:write", *held)
    answer = client.post("/v1/tokens", json={"subject": "x", "scopes": [asked]})
    assert answer.status_code == status, answer.text
    if status == 403:
        assert asked in answer.json()["detail"]
        both = client.post("/v1/tokens", json={"subject": "x", "scopes": [*held, asked]})
        assert both.status_code == 403, "one too wide is enough"


def test_a_token_does_not_outlive_its_minter(stack: RunningStack) -> None:
    minter = mint(stack.http, "tokens:write", "devices:read", life=600)
    with stack.client(minter["token"]) as client:
        body = {"subject": "x", "scopes": ["devices:read@device:d"]}
        assert client.post("/v1/tokens", json=body | {"life": 601}).status_code == 403
        made = RunningStack.ok(client.post("/v1/tokens", json=body))
        assert made["expires_at"] <= minter["expires_at"]
        assert made["parent"] == minter["jti"]


def test_a_token_that_nobody_could_send_is_not_made(stack: RunningStack) -> None:
    scopes = [f"commands:send@group:{'g' * 120}/{'x' * 100}.{number}" for number in range(100)]
    answer = stack.http.post("/v1/tokens", json={"subject": "x", "scopes": scopes})
    assert (answer.status_code, answer.json()["type"]) == (422, PROBLEM + "invalid")


def test_what_was_minted_works_and_no_more(stack: RunningStack, world: World, caller: Caller) -> None:
    minter = caller("tokens:write", f"commands:send@group:{world.here}")
    with stack.client(mint(minter, f"commands:send@group:{world.here}/door.*")["token"]) as client:
        for name, status in (("door.open", 202), ("light.on", 404)):
            answer = client.post(f"/v1/devices/{world.mine}/commands", json={"name": name, "ttl": 1})
            assert answer.status_code == status


# ---- Revocation --------------------------------------------------------------------------------------


def chain(stack: RunningStack, subjects: list[str]) -> list[Document]:
    """Tokens, each minted with the one before."""
    made: list[Document] = []
    with ExitStack() as clients:
        http = stack.http
        for subject in subjects:
            made.append(mint(http, "tokens:write", "devices:read", subject=subject, life=3600 - 60 * len(made)))
            http = clients.enter_context(stack.client(made[-1]["token"]))
    return made


def is_good(stack: RunningStack, token: Document) -> bool:
    with stack.client(token["token"]) as client:
        status = client.get("/v1/devices", params={"limit": "1"}).status_code
    assert status in (200, 401)
    return status == 200


def test_revoking_a_token_revokes_what_was_made_with_it(stack: RunningStack) -> None:
    tokens = chain(stack, ["a", "b", "c", "d"])
    sibling = mint(stack.http, "devices:read", subject="b")
    assert stack.http.delete(f"/v1/tokens/{tokens[1]['jti']}").status_code == 200
    for token in tokens[1:]:
        eventually(lambda token=token: not is_good(stack, token), "refused", within=3)  # type: ignore[misc]
    assert is_good(stack, tokens[0])
    assert is_good(stack, sibling)
    listed = {each["jti"]: each for each in all_of(stack.http, "/v1/tokens", limit="100")}
    assert all(listed[token["jti"]]["revoked_at"] for token in tokens[1:])
    assert [listed[token["jti"]]["parent"] for token in tokens[1:]] == [token["jti"] for token in tokens[:-1]]


def test_revoking_a_subject_revokes_all_its_tokens(stack: RunningStack) -> None:
    subject = f"gone-{secrets.token_hex(3)}"
    single = mint(stack.http, "devices:read", subject=subject)
    tokens = chain(stack, ["x", subject, "y"])
    program = [sys.executable, "-m", "api.operator.cli", "--state-dir", str(stack.stack.files.state_dir)]
    done = subprocess.run([*program, "token", "revoke", "--subject", subject], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"revoked": 3, "pending_until": None, "queued": 0, "purged": 0}
    for token in (single, *tokens[1:]):
        eventually(lambda token=token: not is_good(stack, token), "refused", within=3)  # type: ignore[misc]
    assert is_good(stack, tokens[0])
    again = stack.http.delete("/v1/tokens", params={"subject": subject})
    assert RunningStack.ok(again)["revoked"] == 0
    assert is_good(stack, mint(stack.http, "devices:read", subject=subject)), "what is made afterwards is good"
    one = subprocess.run([*program, "token", "revoke"], capture_output=True, check=False)
    assert one.returncode == 2, "one of both must be said"


def test_a_revoked_minter_mints_no_more(stack: RunningStack) -> None:
    """Not even in the second for which the gateway may still believe the token."""
    (minter,) = chain(stack, ["late"])
    with stack.client(minter["token"]) as client:
        assert client.get("/v1/devices", params={"limit": "1"}).status_code == 200
        stack.http.delete(f"/v1/tokens/{minter['jti']}")
        answer = client.post("/v1/tokens", json={"subject": "late", "scopes": ["devices:read"]})
    assert answer.status_code == 401
