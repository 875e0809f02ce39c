"""Events over kills, on both databases: followed on by their place, nothing is missed and nothing told twice."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api import streaming
from tests.harness.events import Document, following, of
from tests.harness.stack import RunningStack, eventually


@pytest.mark.timeout(360)
def test_a_place_outlives_the_gateway(own_stack: RunningStack, tmp_path: Path) -> None:
    device, _ = own_stack.create_device("outlives")
    output = tmp_path / "events"
    argv = [sys.executable, "-m", "api.operator.cli", "--state-dir", str(own_stack.stack.settings.state_dir)]
    with output.open("wb") as file:
        process = subprocess.Popen([*argv, "events", "--after", "0", "--device", device], stdout=file)

    def printed() -> list[Document]:
        return [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]

    try:
        eventually(lambda: len(printed()) == 1, "the command line follows")
        with following(own_stack, after=0, device=device) as events:
            sent = [own_stack.send(device, "a", {}, ttl=60)["id"] for _ in range(10)]
            told = events.until(of(sent[4], "command.queued"))
            own_stack.stack.kill_service("gateway")
            with suppress(httpx.TransportError, StopIteration):  # until it ends
                while True:
                    told.append(events.event())
        own_stack.stack.start_service("gateway")
        own_stack.stack.wait_until_ready()
        own_stack.http = own_stack.client(own_stack.token)
        last = own_stack.send(device, "b", {}, ttl=60)["id"]
        with following(own_stack, events.last, device=device) as again:
            told += again.until(of(last, "command.queued"))
        with following(own_stack, after=0, device=device) as anew:
            everything = anew.until(of(last, "command.queued"))
        assert told == everything
        positions = [event["position"] for event in told]
        assert positions == sorted(set(positions))
        assert [kinds(told, id) for id in [*sent, last]] == [["command.accepted", "command.queued"]] * 11
        eventually(lambda: len(printed()) >= len(everything), "all is printed", within=30)
        assert printed() == everything
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("disk", ["kept", "lost"])
@pytest.mark.timeout(360)
def test_without_a_broker_events_are_told_from_the_ledger(own_stack: RunningStack, disk: str) -> None:
    device, _ = own_stack.create_device("brokerless")
    broker = own_stack.stack.broker
    assert broker is not None
    with following(own_stack, after=0, device=device) as events:
        before = own_stack.send(device, "a", {}, ttl=90)["id"]
        told = events.until(of(before, "command.queued"))
    broker.kill9()
    try:
        if disk == "lost":
            broker.wipe()
        accepted = own_stack.send(device, "a", {}, ttl=90)
        assert accepted["state"] == "accepted"
        with following(own_stack, events.last, device=device) as again:
            during = again.until(of(accepted["id"], "command.accepted"))
            assert [event["kind"] for event in during] == ["command.accepted"]
            broker.start()
            told += during + again.until(of(accepted["id"], "command.queued"))
    finally:
        broker.start()
    with following(own_stack, after=0, device=device) as anew:
        assert anew.until(of(accepted["id"], "command.queued")) == told
    positions = [event["position"] for event in told]
    assert positions == sorted(set(positions))


@pytest.mark.timeout(360)
def test_the_gateways_end_waits_for_no_follower(own_stack: RunningStack) -> None:
    """One reads, one takes nothing; both are ended, and the one that reads is told why."""
    url = urlsplit(own_stack.stack.settings.api_url)
    device, _ = own_stack.create_device("ending")
    idle = http.client.HTTPSConnection(url.hostname or "", url.port, context=own_stack.context, timeout=30)
    idle.connect()
    idle.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    idle.request("GET", "/v1/events?after=0", headers={"Authorization": f"Bearer {own_stack.token}"})
    with following(own_stack, after=0, device=device) as events:
        assert events.event()["kind"] == "device.created"
        began = time.monotonic()
        own_stack.stack.stop_service("gateway")
        ended = time.monotonic() - began
        block = events.block()
        assert block.event == "problem"
        assert json.loads(block.data)["status"] == 503
        with pytest.raises(StopIteration):
            events.block()
    assert ended < streaming.LAST_WORDS + 5
    idle.close()
    own_stack.stack.start_service("gateway")
    own_stack.stack.wait_until_ready()
    own_stack.http = own_stack.client(own_stack.token)


@pytest.mark.timeout(360)
def test_what_waited_for_a_position_is_told_afterwards(own_stack: RunningStack) -> None:
    """Workers alone give positions: while there is none nothing is told, and afterwards everything."""
    device, _ = own_stack.create_device("workerless")
    with following(own_stack, device=device) as events:
        own_stack.stack.kill_service("worker")
        sent = [own_stack.send(device, "a", {}, ttl=60)["id"] for _ in range(3)]
        own_stack.stack.start_service("worker")
        told = events.until(of(sent[-1], "command.queued"))
    assert [kinds(told, id)[0] for id in sent] == ["command.accepted"] * 3


def kinds(told: list[Document], command: str) -> list[str]:
    return [event["kind"] for event in told if event["command"] and event["command"]["id"] == command]
