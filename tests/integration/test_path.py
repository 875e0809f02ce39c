"""One complete path: a command through the real broker to a real agent and back, and what can go otherwise."""

import base64
import json
import os
import stat
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.stack import AgentProcess, RunningStack, eventually


@pytest.fixture(scope="module")
def agent(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> AgentProcess:
    """Enrolled by the command line, as a device is; other tests' agents are enrolled by the function behind it."""
    id, ticket = stack.create_device()
    with AgentProcess(stack, tmp_path_factory.mktemp("agent") / "device", id) as running:
        done = running.cli("enroll", "--api-url", stack.stack.settings.api_url, stdin=ticket.encode())
        assert done.returncode == 0, done.stderr.decode()
        running.start()
        yield running  # type: ignore[misc]  # a generator fixture


def states(command: dict[str, object]) -> list[str]:
    timeline = command["timeline"]
    assert isinstance(timeline, list)
    return [row["state"] for row in timeline]


def test_a_command_succeeds_with_its_result(stack: RunningStack, agent: AgentProcess) -> None:
    command = stack.send(agent.id, "note", {"text": "one"}, wait=20)
    assert command["state"] == "succeeded"
    assert command["outcome"]["result"] == {"noted": "one"}
    assert states(command)[0] == "accepted"
    assert states(command)[-1] == "succeeded"
    assert "running" in states(command)
    assert agent.record().count("one") == 1


def test_a_failing_handler_is_the_devices_own_word(stack: RunningStack, agent: AgentProcess) -> None:
    command = stack.send(agent.id, "fail", {"text": "two"}, wait=20)
    assert (command["state"], command["outcome"]["status"]) == ("failed", "failed")
    assert "jammed: two" in command["reason"]


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("no.such", {}, "unknown-command"),
        ("note", {}, "invalid-arguments"),
        ("note", {"text": 1}, "invalid-arguments"),
        ("note", {"text": "x", "more": 1}, "invalid-arguments"),
    ],
)
def test_rejected_means_the_handler_did_not_start(
    stack: RunningStack, agent: AgentProcess, name: str, args: dict[str, object], reason: str
) -> None:
    before = agent.record()
    command = stack.send(agent.id, name, args, wait=20)
    assert command["state"] == "rejected"
    assert reason in command["reason"]
    assert agent.record() == before


def test_a_request_that_does_not_wait_gets_202_and_a_location(stack: RunningStack, agent: AgentProcess) -> None:
    answer = stack.http.post(f"/v1/devices/{agent.id}/commands", json={"name": "note", "args": {"text": "three"}})
    assert answer.status_code in (200, 202)
    location = answer.headers["Location"]
    found = stack.ok(stack.http.get(location, headers={"Prefer": "wait=20"}))
    assert found["state"] == "succeeded"


def test_a_command_waits_for_a_device_that_is_away(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        command = stack.send(agent.id, "note", {"text": "later"})
        eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
        agent.start()
        assert stack.settled(command["id"])["state"] == "succeeded"
        assert agent.record() == ["later"]


def test_a_command_expires_at_its_deadline_behind_a_longer_one(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        longer = stack.send(agent.id, "note", {"text": "longer"}, ttl=120)
        shorter = stack.send(agent.id, "note", {"text": "shorter"}, ttl=1)
        assert stack.settled(shorter["id"])["state"] == "expired"
        assert stack.command(longer["id"])["state"] == "queued"
        agent.start()
        assert stack.settled(longer["id"])["state"] == "succeeded"
        assert agent.record() == ["longer"]


def test_commands_start_in_the_order_of_their_seq(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        sent = [stack.send(agent.id, "note", {"text": str(number)}) for number in range(20)]
        assert [command["seq"] for command in sent] == list(range(1, 21))
        agent.start()
        for command in sent:
            assert stack.settled(command["id"])["state"] == "succeeded"
        assert agent.record() == [str(number) for number in range(20)]


def test_a_missing_outcome_is_doubt_and_a_late_one_settles_it(stack: RunningStack, agent: AgentProcess) -> None:
    command = stack.send(agent.id, "slow", {"text": "slow", "seconds": 3}, wait=2, response_timeout=1)
    assert command["state"] == "unanswered"
    eventually(lambda: stack.command(command["id"])["state"] == "succeeded", "the late outcome")
    found = stack.command(command["id"])
    assert found["late"] is True
    assert states(found)[-2:] == ["unanswered", "succeeded"]


def test_the_agent_opens_no_listening_socket(stack: RunningStack, agent: AgentProcess) -> None:
    stack.send(agent.id, "note", {"text": "connected"}, wait=20)
    sockets = psutil.Process(agent.pid).net_connections(kind="inet")
    assert [found for found in sockets if found.status == psutil.CONN_LISTEN] == []
    established = [found for found in sockets if found.status == psutil.CONN_ESTABLISHED]
    assert [found.raddr.port for found in established] == [stack.stack.broker.amqps_port]


def test_what_the_agent_keeps_is_private(agent: AgentProcess) -> None:
    assert stat.S_IMODE(agent.state.stat().st_mode) == 0o700
    for path in agent.state.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 or path.is_symlink(), path


def test_an_executable_is_a_handler(stack: RunningStack, home: Path) -> None:
    commands = home / "commands.d"
    commands.mkdir(parents=True, mode=0o755)
    script = commands / "lamp.set"
    script.write_text('#!/bin/sh\nread -r line\necho "$line" > "$RECORD.lamp"\necho \'{"lamp": "on"}\'\n')
    failing = commands / "lamp.break"
    failing.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    for path in (script, failing):
        path.chmod(0o755)
    with stack.agent(home) as agent:
        agent.start("--commands-dir", str(commands))
        done = stack.send(agent.id, "lamp.set", {"level": 3}, wait=20)
        assert (done["state"], done["outcome"]["result"]) == ("succeeded", {"lamp": "on"})
        failed = stack.send(agent.id, "lamp.break", {}, wait=20)
        assert failed["state"] == "failed"
        assert "broken" in failed["reason"]


def test_a_clean_stop_finishes_the_command_in_hand(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        agent.start()
        command = stack.send(agent.id, "slow", {"text": "in hand", "seconds": 2})
        eventually(lambda: agent.record() == ["in hand"], "the handler to start")
        assert agent.stop() == 0
        assert stack.settled(command["id"])["state"] == "succeeded"


def test_heartbeats_survive_a_slow_handler(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        agent.start()
        stack.send(agent.id, "note", {"text": "up"}, wait=20)
        before = psutil.Process(agent.pid).net_connections(kind="inet")
        command = stack.send(agent.id, "slow", {"text": "slow", "seconds": 25}, wait=40, response_timeout=60)
        assert command["state"] == "succeeded"
        assert psutil.Process(agent.pid).net_connections(kind="inet") == before, "it is the same connection"


def test_telemetry_comes_back_over_http(stack: RunningStack, agent: AgentProcess) -> None:
    for number in range(3):
        done = agent.cli("publish", "gas.flow", stdin=json.dumps({"litres": number}).encode())
        assert done.returncode == 0, done.stderr.decode()
    answer = stack.ok(stack.http.post(f"/v1/devices/{agent.id}/telemetry/gas.flow", json={"litres": 3}))
    assert answer is not None

    def read(start: str, limit: int = 100) -> list[dict[str, object]]:
        query = {"from": start, "device": agent.id, "channel": "gas.flow", "limit": str(limit), "idle": "1"}
        found = stack.http.get("/v1/telemetry", params=query)
        assert found.status_code == 200, found.text
        assert found.headers["content-type"].startswith("application/x-ndjson")
        return [json.loads(line) for line in found.text.splitlines()]

    readings = read("first")
    assert [reading["value"] for reading in readings] == [{"litres": number} for number in range(4)]
    assert read(str(readings[2]["offset"]), limit=1)[0]["value"] == {"litres": 2}
    assert read("next") == []


def test_the_system_channel_reads_this_machine(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        agent.start("--system-interval", "1")

        def readings() -> list[dict[str, object]]:
            query = {"from": "first", "device": agent.id, "channel": "system", "limit": "2", "idle": "2"}
            return [json.loads(line) for line in stack.http.get("/v1/telemetry", params=query).text.splitlines()]

        eventually(lambda: len(readings()) == 2, "two readings of the system channel")
        value = readings()[0]["value"]
        assert isinstance(value, dict)
        assert value.keys() >= {"load", "memory", "disk"}, value
        assert json.dumps(value).count(str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))) == 1, value


def test_a_binary_body_passes_unchanged(stack: RunningStack, agent: AgentProcess) -> None:
    raw = bytes(range(256))
    answer = stack.http.post(
        f"/v1/devices/{agent.id}/commands",
        params={"name": "no.such"},
        content=raw,
        headers={"Content-Type": "application/octet-stream", "Prefer": "wait=20"},
    )
    command = stack.ok(answer)
    assert command["state"] == "rejected"
    assert command["args"] == {"base64": base64.b64encode(raw).decode(), "content_type": "application/octet-stream"}


def test_the_connection_is_shown_as_it_is(stack: RunningStack, home: Path) -> None:
    def connection(id: str) -> str:
        return str(stack.ok(stack.http.get(f"/v1/devices/{id}"))["connection"]["state"])

    with stack.agent(home) as agent:
        assert connection(agent.id) == "disconnected"
        agent.start()
        eventually(lambda: connection(agent.id) == "connected", "the device to be shown as connected", within=40)
        agent.stop()
        eventually(lambda: connection(agent.id) == "disconnected", "the device to be shown as gone", within=40)


def test_a_suspended_devices_connection_is_closed_and_refused(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        agent.start()
        stack.send(agent.id, "note", {"text": "up"}, wait=20)
        patch = {"Content-Type": "application/merge-patch+json"}
        stack.ok(stack.http.patch(f"/v1/devices/{agent.id}", content='{"enabled": false}', headers=patch))
        eventually(lambda: not _connected(agent), "the connection to be closed")
        waiting = stack.send(agent.id, "note", {"text": "kept"}, ttl=60)
        time.sleep(1.5)  # long enough for several attempts to come back; one may be under way
        assert stack.ok(stack.http.get(f"/v1/devices/{agent.id}"))["connection"]["state"] == "disconnected"
        assert stack.command(waiting["id"])["state"] == "queued"
        stack.ok(stack.http.patch(f"/v1/devices/{agent.id}", content='{"enabled": true}', headers=patch))
        assert stack.settled(waiting["id"])["state"] == "succeeded"


def test_deleting_a_device_settles_what_is_open(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        command = stack.send(agent.id, "note", {"text": "never"})
        assert stack.http.delete(f"/v1/devices/{agent.id}").status_code == 204
        found = stack.command(command["id"])
        assert (found["state"], found["reason"]) == ("undeliverable", "device-deleted")
        assert stack.http.get(f"/v1/devices/{agent.id}").status_code == 404


def _connected(agent: AgentProcess) -> bool:
    return any(found.status == psutil.CONN_ESTABLISHED for found in psutil.Process(agent.pid).net_connections("inet"))
