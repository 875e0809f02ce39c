"""A device that takes what it can get: it is closed and kept out, and the others notice nothing.

The limits are the defaults here, but for the backlog. How soon something is noticed is bounded generously: what it
should be is measured in `bench/`.
"""

import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from typing import Any

import pika.exceptions
import pytest

from device_agent.link import to_properties
from fabric.ids import command_id
from tests.harness import inside
from tests.harness.device import Device
from tests.harness.rawamqp import ChannelClosed, Closed, ConnectionClosed, long, properties, short
from tests.harness.stack import RunningStack, eventually, start_stack
from topology import names, wire
from topology.names import CommandId, DeviceId

SOON = 8.0  # seconds after its deadline within which a command is announced, whatever another device does
BACKLOG = 5  # the setting: commands that may wait for a device without a limit of its own
SILENT = 1_000  # connections that say nothing after TCP
HANDSHAKES = 150  # of each kind that say nothing later: what these cost is the client's TLS


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack with the limits that are the defaults, but for the backlog."""
    with start_stack(tmp_path_factory.mktemp("limited"), "", {"backlog": BACKLOG}) as running:
        yield running


@pytest.fixture
def device(limited: RunningStack) -> Device:
    return Device.enrolled(limited, "greedy")


def exceeded(running: RunningStack, device: Device) -> list[str]:
    """The limits that the events say a device has exceeded, one for each episode."""
    return [row.detail["exceeded"] for row in inside.events(running, device.id, "device.throttled")]


def is_throttled(running: RunningStack, device: Device, limit: str, within: float = 20) -> None:
    eventually(lambda: exceeded(running, device)[:1] == [limit], f"throttled for its {limit}", within)
    assert not device.may_log_in(device.token())


@contextmanager
def closed_by_the_fabric() -> Iterator[None]:
    """What is done in this block ends with the connection: the broker closes it, or is found to have done so."""
    with pytest.raises((ConnectionClosed, ConnectionError, ssl.SSLEOFError, pika.exceptions.AMQPError)):
        yield


@contextmanager
def deadlines_are_kept(running: RunningStack) -> Iterator[None]:
    """Commands of another device whose deadlines pass while the block runs, and just after, are announced in time."""
    other, _ = running.create_device("patient")
    sent = [running.send(other, "note", {"text": "too late"}, ttl=ttl) for ttl in (1, 1.5, 2, 3)]
    yield
    for each in sent:
        done = running.settled(each["id"])
        late = _time(done["settled_at"]) - _time(done["deadline"])
        assert done["state"] == "expired"
        assert late < SOON, f"announced {late:.2f} s late"


def receipts(device: Device, id: CommandId, progress: Callable[[int], str | None]) -> Iterator[tuple[str, Any]]:
    number = 0
    while True:
        number += 1
        receipt = wire.Receipt(id, device.agent, "running", int(time.time() * 1000), progress(number))
        message = wire.encode_receipt(receipt, DeviceId(device.id))
        yield names.receipt_key(DeviceId(device.id)), message


def test_what_may_wait_without_a_limit_of_its_own_is_a_setting(limited: RunningStack) -> None:
    usual, _ = limited.create_device("usual")
    roomy, _ = limited.create_device("roomy", mailbox={"limit": BACKLOG + 1})
    for device in (usual, roomy):
        for _ in range(BACKLOG):
            limited.send(device, "note", {}, ttl=600)
    refused = limited.http.post(f"/v1/devices/{usual}/commands", json={"name": "note"})
    assert refused.status_code == 429
    assert (refused.json()["mailbox"]["depth"], refused.json()["mailbox"]["limit"]) == (BACKLOG, BACKLOG)
    limited.send(roomy, "note", {}, ttl=600)


def test_a_flood_of_receipts_ends_and_holds_up_no_deadline(limited: RunningStack, device: Device) -> None:
    with deadlines_are_kept(limited):
        key, receipt = next(receipts(device, command_id(int(time.time() * 1000)), lambda _: None))
        with closed_by_the_fabric(), device.pika() as connection:
            channel = connection.channel()
            until = time.monotonic() + 20
            while time.monotonic() < until:
                for _ in range(100):
                    channel.basic_publish(names.UPLINK, key, receipt.body, to_properties(receipt))
        is_throttled(limited, device, "reports")
    eventually(lambda: inside.depth(limited, names.REPORTS) == 0, "all of it is gone")
    eventually(lambda: device.may_log_in(device.token()), "it may come back", 30)
    # What is read late, on a busy machine, is over the limit again, once the first episode has ended.
    episodes = inside.events(limited, device.id, "device.throttled")
    for one, next_one in pairwise(episodes):
        assert next_one.at - one.at >= one.detail["refused_for"] * 1_000_000, "said once in an episode"
    assert set(exceeded(limited, device)) == {"reports"}


def test_progress_without_end_ends_and_fills_no_timeline(limited: RunningStack, device: Device) -> None:
    command = limited.send(device.id, "note", {"text": "at length"}, ttl=60)
    with deadlines_are_kept(limited):
        with closed_by_the_fabric(), device.pika() as connection:
            channel = connection.channel()
            until = time.monotonic() + 20
            for key, receipt in receipts(device, command["id"], lambda number: f"{number} of 100000"):
                assert time.monotonic() < until
                channel.basic_publish(names.UPLINK, key, receipt.body, to_properties(receipt))
                if channel.connection.is_closed:
                    break
                connection.process_data_events(0)
        is_throttled(limited, device, "reports")
    shown = limited.command(command["id"])
    assert shown["state"] == "running"
    assert len(shown["timeline"]) <= 64


def test_the_tenth_thousand_of_channels_is_never_written(limited: RunningStack, device: Device) -> None:
    written = 0
    with closed_by_the_fabric(), device.raw() as client:
        for number in range(10_000):
            client.publish(names.UPLINK, names.telemetry_key(DeviceId(device.id), f"channel.{number}"), b"1")
            client.confirmed()
            written += 1
    assert 64 <= written < 2_000
    is_throttled(limited, device, "channels")


def test_a_copy_to_400_channels_counts_as_400(limited: RunningStack, device: Device) -> None:
    keys = [names.telemetry_key(DeviceId(device.id), f"copy.{number}") for number in range(400)]
    copies = b"".join(b"S" + long(key) for key in keys)
    headers = long(short("CC") + b"A" + long(copies))
    with closed_by_the_fabric(), device.raw() as client:
        client.publish(names.UPLINK, keys[0], b"1", properties(headers=headers))
        client.confirmed()
        client.receive(10)
    is_throttled(limited, device, "channels")


def test_requests_without_a_right_to_them_end(limited: RunningStack, device: Device) -> None:
    refused = 0
    with closed_by_the_fabric(), device.raw() as client:
        for _ in range(1_000):
            with suppress(ChannelClosed):
                client.declare("amq.anything", passive=True)
            refused += 1
            client.open_channel()
    assert 10 <= refused < 500, "the broker asks up to three times about one"
    is_throttled(limited, device, "refusals")


def test_of_fifty_connections_one_is_left_at_most(limited: RunningStack, device: Device) -> None:
    clients = []
    for _ in range(50):
        try:
            client = device.socket()
            client.login(device.id, device.token())
            clients.append(client)
        except Closed:
            break
    assert len(clients) <= 10

    def alive() -> int:
        count = 0
        for client in clients:
            try:
                client.receive(0.05)
            except TimeoutError:
                count += 1
            except Closed:
                pass
        return count

    eventually(lambda: alive() <= 1, "all but the newest are closed")
    # Three takeovers are a contest. Peers that don't end their TLS make closing them slow, so that newcomers come in
    # beside them: then there are too many at once, and again if they are still there when they may come back.
    eventually(
        lambda: (
            len(inside.events(limited, device.id, "device.contested")) == 1
            or set(exceeded(limited, device)) == {"connections"}
        ),
        "it is said",
    )
    for client in clients:
        client.close()


def test_the_same_token_for_many_connections_is_no_way_around(limited: RunningStack, device: Device) -> None:
    token = device.token()
    clients = []
    for _ in range(20):
        with suppress(Closed):
            client = device.socket()
            client.login(device.id, token)
            clients.append(client)
            continue
        break
    assert len(clients) <= 9
    for client in clients:
        client.close()


def test_logging_in_again_and_again_ends(limited: RunningStack, device: Device) -> None:
    logins = 0
    with suppress(Closed):
        for _ in range(30):
            client = device.raw()
            logins += 1
            client.close()
            eventually(
                lambda: (
                    limited.ok(limited.http.get(f"/v1/devices/{device.id}"))["connection"]["state"] == "disconnected"
                ),
                "seen to have gone",
            )
    assert 10 <= logins <= 13
    is_throttled(limited, device, "logins")


def test_channels_and_consumers_are_few(limited: RunningStack, device: Device) -> None:
    opened = consumers = 1
    with device.raw() as client, suppress(Closed):
        assert client.channel_max == 16
        for number in range(2, 501):
            client.open_channel(number)
            opened += 1
    assert opened == 16
    with device.raw() as client, suppress(Closed):
        client.consume(device.mailbox)
        for number in range(1_000):
            client.consume(device.mailbox, tag=f"consumer-{number}")
            consumers += 1
    assert consumers == 8


def test_mail_requeued_in_a_loop_is_kept_and_the_loop_ends(limited: RunningStack, device: Device) -> None:
    command = limited.send(device.id, "note", {"text": "x" * 200_000}, ttl=120)
    turns = 0
    with deadlines_are_kept(limited):
        with closed_by_the_fabric(), device.raw() as client:
            client.qos(1)
            client.consume(device.mailbox)
            until = time.monotonic() + 40
            while time.monotonic() < until:
                got = client.delivery()
                client.method(1, (60, 120), struct.pack(">QB", got.tag, 2))  # basic.nack, requeue
                turns += 1
        is_throttled(limited, device, "traffic", 30)
    assert turns > 100
    assert inside.depth(limited, device.mailbox) == 1
    assert limited.command(command["id"])["state"] == "queued"


def test_those_who_connect_and_say_nothing_keep_nobody_out(limited: RunningStack, device: Device) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    silent: list[socket.socket] = []
    try:
        silent.extend(socket.create_connection((device.host, device.port), 10) for _ in range(SILENT))
        for _ in range(HANDSHAKES):
            silent.append(device.socket().socket)  # after TLS
            greeted = device.socket()  # after AMQP's first step
            greeted.socket.sendall(b"AMQP\x00\x00\x09\x01")
            greeted.expect(0, (10, 10))
            silent.append(greeted.socket)
        began = time.monotonic()
        assert device.may_log_in(device.token())
        assert time.monotonic() - began < 5
        until = time.monotonic() + 30
        for each in silent:
            each.settimeout(max(0.1, until - time.monotonic()))
            with suppress(ConnectionError):
                assert each.recv(1) == b"", "the broker has nothing to say, and hangs up"
    finally:
        for each in silent:
            each.close()


def test_a_stranger_who_guesses_tokens_locks_nobody_out(limited: RunningStack, device: Device) -> None:
    for _ in range(40):
        client = device.socket()
        with pytest.raises(Closed):
            client.login(device.id, "no.token.at-all")
        client.close()
    assert exceeded(limited, device) == []
    assert device.may_log_in(device.token())


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
