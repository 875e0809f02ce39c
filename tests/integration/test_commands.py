"""The life of a command over HTTP: backlog, idempotency keys, cancel, supersedes, claim; on both databases."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from api import schemas
from tests.harness.stack import Document, RunningStack, eventually

PATCH = {"Content-Type": "application/merge-patch+json"}
PROBLEM = "urn:restante:problem:"


def post(
    running: RunningStack, device: str, key: str | None = None, prefer: str | None = None, **body: object
) -> httpx.Response:
    headers = {"Idempotency-Key": key, "Prefer": prefer}
    return running.http.post(
        f"/v1/devices/{device}/commands",
        json={"name": "note", **body},
        headers={name: value for name, value in headers.items() if value is not None},
    )


def delete(running: RunningStack, id: str) -> httpx.Response:
    return running.http.delete(f"/v1/commands/{id}")


def problem(answer: httpx.Response, status: int, code: str) -> Document:
    assert answer.status_code == status, answer.text
    document: Document = answer.json()
    schemas.ProblemDocument.model_validate(document)
    assert document["type"] == PROBLEM + code
    return document


def states(running: RunningStack, device: str) -> Counter[str]:
    found = running.ok(running.http.get("/v1/commands", params={"device": device, "limit": "100"}))
    return Counter(item["state"] for item in found["items"])


# ---- Backlog -----------------------------------------------------------------------------------------


def test_a_full_mailbox_is_429(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("full", mailbox={"limit": 3})
    first = own_stack.ok(post(own_stack, device, ttl=30))
    for _ in range(2):
        own_stack.ok(post(own_stack, device, ttl=600))
    answer = post(own_stack, device)
    refused = problem(answer, 429, "backlog-full")
    assert 20 <= int(answer.headers["retry-after"]) <= 30, "when the first one's time is up"
    assert (refused["mailbox"]["depth"], refused["mailbox"]["limit"]) == (3, 3)
    assert refused["mailbox"]["oldest_age"] >= 0
    assert (refused["connection"], refused["last_seen"]) == ("disconnected", None)
    path = f"/v1/devices/{device}"
    shown = own_stack.ok(own_stack.http.get(path))["mailbox"]
    assert (shown["depth"], shown["limit"]) == (3, 3)
    own_stack.ok(delete(own_stack, first["id"]))
    problem(post(own_stack, device), 429, "backlog-full")
    changed = own_stack.ok(own_stack.http.patch(path, json={"mailbox": {"limit": 4}}, headers=PATCH))
    assert changed["mailbox"]["limit"] == 4
    own_stack.ok(post(own_stack, device))
    problem(post(own_stack, device), 429, "backlog-full")
    changed = own_stack.ok(own_stack.http.patch(path, json={"mailbox": {"limit": None}}, headers=PATCH))
    assert changed["mailbox"]["limit"] == 50
    own_stack.ok(post(own_stack, device))


def test_senders_at_once_do_not_overshoot(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("rush")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(own_stack, device), range(80)))
    assert Counter(answer.status_code for answer in answers) == {202: 50, 429: 30}
    eventually(lambda: states(own_stack, device) == {"queued": 50}, "all of them are in the mailbox")


# ---- Idempotency keys --------------------------------------------------------------------------------


def test_a_key_names_the_command(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home) as agent:
        device = agent.id
        first = post(own_stack, device, "order-1", args={"text": "once"})
        assert first.status_code == 202
        again = post(own_stack, device, "order-1", args={"text": "once"})
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        assert again.headers["location"] == first.headers["location"]
        problem(post(own_stack, device, "order-1", args={"text": "twice"}), 422, "key-reused")
        problem(post(own_stack, device, "order-1", args={"text": "once"}, ttl=9), 422, "key-reused")
        assert post(own_stack, device, "order-2", args={"text": "two"}).json()["id"] != first.json()["id"]
        raw = own_stack.http.post(
            f"/v1/devices/{device}/commands",
            params={"name": "note"},
            content=b"x",
            headers={"Idempotency-Key": "order-1"},
        )
        problem(raw, 422, "key-reused")
        agent.start()
        done = post(own_stack, device, "order-1", "wait=20", args={"text": "once"})
        assert (done.status_code, done.json()["state"]) == (200, "succeeded"), "a repeat honours its own Prefer"
        assert done.headers["preference-applied"] == "wait=20"
        assert post(own_stack, device, "order-1", args={"text": "once"}).status_code == 200
        eventually(lambda: sorted(agent.record()) == ["once", "two"], "each ran once")


def test_a_key_outlives_a_killed_gateway(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("keyed")
    first = own_stack.ok(post(own_stack, device, "k", args={"n": 1}))
    own_stack.stack.kill_service("gateway")
    own_stack.stack.start_service("gateway")
    own_stack.stack.wait_until_ready()
    own_stack.http = own_stack.client(own_stack.token)
    assert own_stack.ok(post(own_stack, device, "k", args={"n": 1}))["id"] == first["id"]


def test_repeats_at_once_make_one_command(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("twins")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: own_stack.ok(post(own_stack, device, "same")), range(24)))
    assert len({command["id"] for command in made}) == 1


def test_a_key_is_its_issuers_alone(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("issuers")
    mine = own_stack.ok(post(own_stack, device, "k"))
    token = own_stack.ok(
        own_stack.http.post("/v1/tokens", json={"subject": "another", "scopes": ["commands:send"], "life": 600})
    )["token"]
    theirs = own_stack.client(token).post(
        f"/v1/devices/{device}/commands", json={"name": "note"}, headers={"Idempotency-Key": "k"}
    )
    assert theirs.status_code == 202
    assert theirs.json()["id"] != mine["id"]


def test_a_refused_request_does_not_use_its_key_up(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("refused", mailbox={"limit": 1})
    first = own_stack.ok(post(own_stack, device, ttl=1))
    problem(post(own_stack, device, "later", args={"n": 1}), 429, "backlog-full")
    assert own_stack.settled(first["id"])["state"] == "expired"
    assert own_stack.ok(post(own_stack, device, "later", args={"n": 2}))["args"] == {"n": 2}


# ---- Withdrawing -------------------------------------------------------------------------------------


def test_a_waiting_command_can_be_withdrawn(own_stack: RunningStack) -> None:
    device, _ = own_stack.create_device("cancel")
    sent = own_stack.ok(post(own_stack, device))
    waited: list[Document] = []
    waiting = threading.Thread(target=lambda: waited.append(own_stack.command(sent["id"], wait=30)))
    waiting.start()
    cancelled = own_stack.ok(delete(own_stack, sent["id"]))
    schemas.CommandDocument.model_validate(cancelled)
    assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "cancelled")
    assert cancelled["timeline"][-1] | {"at": None} == {"state": "cancelled", "at": None, "evidence": "cancel"}
    waiting.join(5)
    assert waited == [cancelled], "who waited is told at once"
    again = delete(own_stack, sent["id"])
    assert (again.status_code, again.json()) == (200, cancelled)


def test_what_was_picked_up_or_settled_can_not(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home) as agent:
        agent.start()
        running = own_stack.ok(
            own_stack.http.post(
                f"/v1/devices/{agent.id}/commands", json={"name": "slow", "args": {"text": "s", "seconds": 1.5}}
            )
        )
        eventually(lambda: own_stack.command(running["id"])["state"] == "running", "it runs")
        assert problem(delete(own_stack, running["id"]), 409, "too-late")["state"] == "running"
        assert own_stack.settled(running["id"])["state"] == "succeeded"
        assert problem(delete(own_stack, running["id"]), 409, "too-late")["state"] == "succeeded"
    expired = own_stack.ok(post(own_stack, agent.id, ttl=0.2))
    assert own_stack.settled(expired["id"])["state"] == "expired"
    assert problem(delete(own_stack, expired["id"]), 409, "too-late")["state"] == "expired"
    problem(delete(own_stack, "0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e"), 404, "not-found")


@pytest.mark.parametrize(
    "withdraw",
    [
        pytest.param(lambda running, _, command: delete(running, command), id="cancelled"),
        pytest.param(lambda running, device, _: post(running, device, supersedes="s"), id="superseded"),
    ],
)
def test_a_device_that_was_away_runs_nothing_that_was_withdrawn(
    own_stack: RunningStack, home: Path, withdraw: Callable[[RunningStack, str, str], httpx.Response]
) -> None:
    with own_stack.agent(home) as agent:
        claimed = own_stack.ok(post(own_stack, agent.id, args={"text": "claimed"}, supersedes="s", claim=True))
        own_stack.ok(withdraw(own_stack, agent.id, claimed["id"]))
        agent.start()
        own_stack.send(agent.id, "note", {"text": "after"}, wait=20)
        assert "claimed" not in agent.record()
        assert own_stack.command(claimed["id"])["state"] == "cancelled"
        assert not own_stack.command(claimed["id"])["late"]


def test_the_latest_set_point_wins(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home) as agent:
        # Claimed, so that a fast machine's fresh mail can't race.
        sent = [
            own_stack.ok(post(own_stack, agent.id, args={"text": f"speed-{n}"}, supersedes="speed", claim=True))
            for n in range(10)
        ]
        path = f"/v1/devices/{agent.id}/commands"
        raw = {"name": "note", "supersedes": "raw", "claim": "true"}
        json = {"Content-Type": "application/json"}
        sent += [
            own_stack.ok(own_stack.http.post(path, params=raw, content=f'{{"text": "raw-{n}"}}', headers=json))
            for n in range(3)
        ]
        assert sent[0]["supersedes"] == "speed"
        assert states(own_stack, agent.id) == {"cancelled": 11, "queued": 2}
        agent.start()
        assert own_stack.settled(sent[9]["id"])["state"] == "succeeded"
        assert own_stack.settled(sent[12]["id"])["state"] == "succeeded"
        assert agent.record() == ["speed-9", "raw-2"]
        assert {own_stack.command(command["id"])["reason"] for command in sent[:9]} == {"superseded"}
