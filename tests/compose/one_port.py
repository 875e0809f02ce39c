"""The one public port, as it is from outside, and what is behind it."""

import contextlib
import re
import socket
import ssl
import time

import pytest

from tests.harness.composed import DEVICE, DOMAIN, Caller, Composed

SCAN = """
import socket, sys
host = socket.gethostbyname(sys.argv[1])
def is_open(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
print(*filter(is_open, range(1, 65536)))
"""


def test_one_port_is_published(stack: Composed) -> None:
    published = {
        (container["Config"]["Labels"]["com.docker.compose.service"], binding["HostIp"], binding["HostPort"])
        for container in stack.containers()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    assert published == {("edge", "127.0.0.1", str(stack.port))}


def test_whoever_is_outside_finds_one_open_port_and_no_name(stack: Composed) -> None:
    scanned = stack.run_in("device", "python3", "-c", SCAN, f"api.{DOMAIN}", within=300)
    assert scanned.split() == [str(stack.port)]
    for name in ("rabbitmq", "broker.edge", "broker.backplane", "postgres", "gateway", "auth", "worker"):
        assert not reaches(stack, "device", name, 1), name


@pytest.mark.parametrize(
    ("place", "port", "there"),
    [
        ("broker.edge", 5671, True),
        ("gateway.edge", 8080, True),
        ("broker.edge", 5672, False),
        ("broker.edge", 15672, False),
        ("broker.edge", 15692, False),
        ("broker.edge", 25672, False),
        ("broker.edge", 4369, False),
        ("gateway.edge", 8081, False),
        ("auth.backplane", 8081, False),
        ("postgres.database", 5432, False),
    ],
)
def test_the_edge_reaches_what_it_needs_only(stack: Composed, place: str, port: int, there: bool) -> None:
    assert reaches(stack, "edge", place, port) == there


def reaches(stack: Composed, service: str, host: str, port: int) -> bool:
    connect = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{host}/{port}'"
    return stack.compose("exec", "-T", service, "bash", "-c", connect, check=False).returncode == 0


def test_both_names_are_on_the_one_port_each_with_its_own_key(stack: Composed) -> None:
    context, seen = stack.context(), {}
    for name in (f"api.{DOMAIN}", f"mq.{DOMAIN}"):
        with (
            socket.create_connection(("127.0.0.1", stack.port), 10) as link,
            context.wrap_socket(link, server_hostname=name) as tls,
        ):
            seen[name] = tls.getpeercert(binary_form=True)
            if name.startswith("mq."):
                tls.sendall(b"AMQP\0\0\x09\x01")
                assert tls.recv(1) == b"\x01", "the broker's connection.start"
    assert len(set(seen.values())) == 2


@pytest.mark.parametrize("name", [None, "localhost", f"other.{DOMAIN}", f"api.{DOMAIN}.example.org"])
def test_no_or_another_name_is_refused(stack: Composed, name: str | None) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", stack.port), 10) as link,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(link, server_hostname=name)


def test_a_request_for_another_host_is_misdirected(stack: Composed, caller: Caller) -> None:
    assert caller.request("GET", "/health/live", headers={"Host": f"mq.{DOMAIN}"}).status_code == 421


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "half-a-hello"])
def test_who_says_nothing_is_cut_off_after_five_seconds(stack: Composed, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", stack.port), 10) as link:
        began = time.monotonic()
        link.sendall(said)
        link.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(1) == b""
        assert 4 < time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["api", "mq"])
def test_a_client_that_asks_for_small_records_gets_them(stack: Composed, name: str) -> None:
    """RFC 6066, section 4."""
    sizes = stack.records(name, "-maxfraglen", "512")
    assert len(sizes) > (100 if name == "api" else 4)  # its answer has some 150,000 bytes
    assert max(sizes) <= 512 + 64  # what encryption adds


def test_the_devices_address_is_in_the_edges_log_with_the_brokers_name_for_it(stack: Composed) -> None:
    (device,) = stack.containers("device")
    (address,) = (network["IPAddress"] for network in device["NetworkSettings"]["Networks"].values())
    told = stack.compose("logs", "--no-color", "--no-log-prefix", "edge").stdout
    logged = re.findall(rf"^{re.escape(address)}:\d+ -> ([\d.]+:\d+) broker sni=mq\.{DOMAIN} ", told, re.MULTILINE)
    broker = stack.compose("logs", "--no-color", "rabbitmq").stdout
    assert any(f"{source} -> " in broker for source in logged)


def test_the_audit_names_the_callers_address_and_not_the_edges(stack: Composed, caller: Caller) -> None:
    (edge,) = stack.containers("edge")
    edges = {network["IPAddress"] for network in edge["NetworkSettings"]["Networks"].values()}
    lie = {"X-Forwarded-For": "203.0.113.9"}
    assert caller.request("POST", f"/v1/devices/{DEVICE}/enrollment", headers=lie).is_success
    addresses = {entry["by"]["address"] for entry in caller.request("GET", "/v1/audit").json()["items"]} - {None}
    assert addresses
    assert not addresses & {*edges, "203.0.113.9"}
