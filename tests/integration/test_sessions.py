"""Presence and takeover, seen with real connections: who is connected is known within 2 s of whatever happened."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.harness import crowd, inside
from tests.harness.device import Device
from tests.harness.rawamqp import ConnectionClosed, RawClient
from tests.harness.stack import NO_LIMITS, RunningStack, eventually, start_stack

SOON = 2.0  # seconds within which presence is right

HOLDER = """
import sys
from tests.harness.rawamqp import RawClient
import ssl
host, port, authority, id = sys.argv[1:]
client = RawClient(host, int(port), tls=ssl.create_default_context(cafile=authority))
client.login(id, sys.stdin.readline().strip())
client.open_channel()
client.consume(f"mailbox.{id}")
print("holding", flush=True)
while True:
    client.receive(3600)
"""


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.soak)])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack whose limits are the defaults where takeovers are concerned."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()
    limits = {**NO_LIMITS, "limit_takeovers": 3}
    with start_stack(tmp_path_factory.mktemp(f"sessions-{request.param}"), url, limits) as started:
        yield started


# What is told here is the broker's, the same on either database.
on_one = pytest.mark.parametrize("running", ["sqlite"], indirect=True)


def state(running: RunningStack, device: str) -> str:
    return str(running.ok(running.http.get(f"/v1/devices/{device}"))["connection"]["state"])


def becomes(running: RunningStack, device: Device, wanted: str) -> None:
    eventually(lambda: state(running, device.id) == wanted, f"{device.id} {wanted}", SOON)


def kinds(running: RunningStack, device: Device, *wanted: str) -> list[str]:
    """The events of these kinds about a device, in order."""
    return [row.kind for row in inside.events(running, device.id, *wanted)]


def presence_events(running: RunningStack, device: Device) -> list[str]:
    return [kind.partition(".")[2] for kind in kinds(running, device, "device.connected", "device.disconnected")]


def changes_alternate(running: RunningStack, device: Device) -> None:
    """Each change of presence was announced once, and the device is gone now."""
    told: list[str] = []

    def alternate() -> bool:
        told[:] = presence_events(running, device)
        return bool(told) and told == ["connected", "disconnected"] * (len(told) // 2)

    eventually(alternate, f"connected, disconnected, and so on: {told}")


def test_a_connection_is_seen_as_it_comes_and_goes(running: RunningStack) -> None:
    device = Device.enrolled(running, "plain")
    assert state(running, device.id) == "disconnected"
    for _ in range(2):
        client = device.raw()
        becomes(running, device, "connected")
        client.close()
        becomes(running, device, "disconnected")
    eventually(
        lambda: presence_events(running, device) == ["connected", "disconnected"] * 2, "each change announced once", 5
    )


@on_one
def test_client_properties_of_any_size_hide_nobody(running: RunningStack) -> None:
    """They are in the broker's event, and can make it undecodable; then the listing tells."""
    device = Device.enrolled(running, "verbose")
    client = device.socket()
    client.login(device.id, device.token(), capabilities=[f"capability-{n}-" + "\x00\x1b[2J" * 8 for n in range(60)])
    eventually(lambda: state(running, device.id) == "connected", "seen in the listing", 20)
    client.close()
    eventually(lambda: state(running, device.id) == "disconnected", "and gone from it", 30)
    log = (running.stack.files.state_dir / "worker.log").read_bytes()
    assert b"\x1b[2J" not in log


@on_one
def test_the_newcomer_takes_the_mailbox_of_a_half_open_link(running: RunningStack) -> None:
    device = Device.enrolled(running, "half")
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDER, device.host, str(device.port), running.stack.files.authority, device.id],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdin is not None
        assert held.stdout is not None
        print(device.token(), file=held.stdin, flush=True)
        assert held.stdout.readline() == "holding\n"
        becomes(running, device, "connected")
        os.kill(held.pid, signal.SIGSTOP)  # it answers nothing from now on, and its socket stays open
        sent = running.send(device.id, "note", {"text": "for whoever is there"}, ttl=60)
        began = time.monotonic()
        with device.raw() as client:
            client.consume(device.mailbox)
            got = client.delivery()
            took = time.monotonic() - began
            assert sent["id"].encode() in got.header
            assert took < 10, f"{took:.2f} s: the broker gives a half-open link up after half a minute"
            assert state(running, device.id) == "connected"
        # The old link takes half a minute to end on the broker; it must not make the device look connected.
        becomes(running, device, "disconnected")
    finally:
        held.kill()
        held.wait(10)
    eventually(lambda: presence_events(running, device) == ["connected", "disconnected"], "a takeover is no change")


def test_two_devices_with_one_identity_stop_pushing_each_other_out(running: RunningStack) -> None:
    device = Device.enrolled(running, "twin")
    stop = threading.Event()
    logins: list[float] = []
    refusals: list[float] = []
    side_by_side: list[float] = []

    def fight(gives_up: bool) -> None:
        while not stop.is_set():
            try:
                client = device.raw()
            except (ConnectionClosed, OSError):
                refusals.append(time.monotonic())
                stop.wait(0.2)
                continue
            logins.append(time.monotonic())
            with suppress(ConnectionClosed, OSError, TimeoutError), client:
                while not stop.is_set():
                    with suppress(TimeoutError):
                        client.receive(0.2)
                    if gives_up and not refusals and time.monotonic() - max(logins) > 3:
                        # A worker that is slow to close lets the newcomer in beside the other (ADR 11). One of them
                        # comes again; if both did, it would be at the same moment.
                        side_by_side.append(time.monotonic())
                        break

    twins = [threading.Thread(target=fight, args=[gives_up]) for gives_up in (True, False)]
    for twin in twins:
        twin.start()
    try:
        contested = lambda: kinds(running, device, "device.contested")  # noqa: E731
        eventually(lambda: contested() == ["device.contested"], "it is contested", within=50)
        early = len(refusals)  # logins in the midst of which the other's had theirs closed
        eventually(lambda: len(refusals) >= early + 2, "the newcomer is refused")
        becomes(running, device, "connected")  # whoever was last in stays
        before = len(logins)
        time.sleep(1.5)
        assert len(logins) == before, "and is left alone"
        assert contested() == ["device.contested"], "said once"
    finally:
        stop.set()
        for twin in twins:
            twin.join(20)
    becomes(running, device, "disconnected")
    assert before + early - len(side_by_side) >= 4  # one, and three takeovers
    changes_alternate(running, device)


def test_a_flapping_device_is_seen_as_it_is_left(running: RunningStack) -> None:
    device = Device.enrolled(running, "flapping")
    client: RawClient | None = None
    for _ in range(15):
        client = device.raw()
        time.sleep(0.1)
        client.close()
        time.sleep(0.1)
    becomes(running, device, "disconnected")
    assert kinds(running, device, "device.contested") == []
    for _ in range(5):  # resets, too
        client = device.raw()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        time.sleep(0.1)
    with device.raw():
        becomes(running, device, "connected")
    becomes(running, device, "disconnected")
    changes_alternate(running, device)


@pytest.mark.parametrize(("many", "soon"), [(60, SOON), pytest.param(500, 20.0, marks=pytest.mark.soak)])
def test_a_crowd_that_comes_back_at_once_is_all_there(running: RunningStack, many: int, soon: float) -> None:
    peering = Device.enrolled(running, "guide").peering
    devices = crowd.register(running, f"crowd{many}", many, peering)

    def all_are(wanted: bool) -> Any:
        return lambda: set(crowd.connected(running, f"crowd{many}-").values()) == {wanted}

    clients = crowd.at_once(Device.raw, devices)
    eventually(all_are(True), "all connected", soon)
    for client in clients:
        client.close()
    clients = crowd.at_once(Device.raw, devices)
    eventually(all_are(True), "all connected again", soon)
    for client in clients:
        client.close()
    eventually(all_are(False), "all gone", soon)
    for device in devices[:: many // 10]:
        changes_alternate(running, device)


def test_what_was_missed_is_found_in_the_listing(running: RunningStack) -> None:
    devices = [Device.enrolled(running, name) for name in ("stays", "leaves", "comes")]
    stays, leaves, comes = devices
    held = [stays.raw(), leaves.raw()]
    for device in (stays, leaves):
        becomes(running, device, "connected")
    running.stack.kill_service("worker")
    held.pop().close()
    held.append(comes.raw())
    # What the broker tells meanwhile is lost.
    with inside.channel(running) as channel:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            channel.queue_purge("sessions")
            time.sleep(0.1)
    running.stack.start_service("worker")
    wanted = {stays: "connected", leaves: "disconnected", comes: "connected"}
    for device, its in wanted.items():
        eventually(lambda device=device, its=its: state(running, device.id) == its, f"{device.id} {its}", 40)
    assert presence_events(running, stays) == ["connected"]
    for client in held:
        client.close()


def test_after_a_crash_of_the_broker_only_those_are_connected_that_came_back(running: RunningStack) -> None:
    """It tells of no end then. That it has started again does, long before its listing is believed."""
    back, gone = (Device.enrolled(running, name) for name in ("back", "gone"))
    held = [back.raw(), gone.raw()]
    for device in (back, gone):
        becomes(running, device, "connected")
    broker = running.stack.broker
    assert broker is not None
    broker.kill9()
    broker.start()
    for client in held:
        client.close()
    eventually(lambda: back.may_log_in(back.token()), "devices are let in again", 40)
    with back.raw():
        wanted = {back: "connected", gone: "disconnected"}
        for device, its in wanted.items():
            becomes(running, device, its)
    eventually(lambda: state(running, back.id) == "disconnected", "gone at last", 20)
    for device in (back, gone):
        changes_alternate(running, device)


@on_one
def test_a_login_that_waits_holds_up_no_other(running: RunningStack) -> None:
    """One whose takeover nobody does has all the time there is for it; the broker asks about others meanwhile."""
    device = Device.enrolled(running, "waits")
    others = [Device.enrolled(running, "passes") for _ in range(4)]
    with device.raw():
        becomes(running, device, "connected")
        running.stack.kill_service("worker")
        order: list[str] = []

        def log_in(who: Device) -> None:
            with who.pika():
                order.append(who.id)

        waiting = threading.Thread(target=log_in, args=[device])
        waiting.start()
        crowd.at_once(log_in, others)
        waiting.join(20)
    running.stack.start_service("worker")
    assert order[-1] == device.id
    assert sorted(order[:-1]) == sorted(each.id for each in others)


@on_one
def test_without_a_worker_the_newcomer_is_let_in(running: RunningStack) -> None:
    device = Device.enrolled(running, "alone")
    with device.raw():
        becomes(running, device, "connected")
        running.stack.kill_service("worker")
        began = time.monotonic()
        # It takes its leave: a raw client has no heartbeat. The broker may miss an end that comes at once.
        with device.pika() as client:
            client.channel()
        assert time.monotonic() - began < 5
    running.stack.start_service("worker")
    eventually(lambda: state(running, device.id) == "disconnected", "seen again", 40)
