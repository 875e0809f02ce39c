"""No way in but PLAIN with the auth endpoint's answer, and no listener but the ones that are meant."""

import asyncio
import base64
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import proton
import psutil
import pytest

from api.operator import doors
from api.operator.processes import marked
from api.operator.sockets import free_port
from tests.harness.device import Device, One, Refused, all_at_once, until_closed
from tests.harness.rawamqp import ConnectionClosed, RawClient, table
from tests.harness.stack import RunningStack, eventually
from tests.security.conftest import Witness
from topology import access, names

LOOPBACK = "127.0.0.1"
HEADER_0_9_1 = b"AMQP\x00\x00\x09\x01"
HEADER_1_0 = b"AMQP\x00\x01\x00\x00"
SASL_1_0 = b"AMQP\x03\x01\x00\x00"

Attempt = Callable[[RawClient], object]


def plain(authorization: str, name: str, password: str) -> bytes:
    return b"\0".join(part.encode() for part in (authorization, name, password))


def refusal(device: Device, attempt: Attempt) -> int:
    """The reply code with which the broker ended the handshake; 0 for a closed socket."""
    with device.socket() as client:
        try:
            attempt(client)
        except ConnectionClosed as closed:
            return closed.code
    pytest.fail("the broker let it in")


def refusals(device: Device, attempts: dict[str, Attempt]) -> dict[str, int]:
    """Of many attempts at once: the broker delays some of its refusals by three seconds."""
    with ThreadPoolExecutor(len(attempts)) as pool:
        codes = pool.map(lambda attempt: refusal(device, attempt), attempts.values())
    return dict(zip(attempts, codes, strict=True))


def test_the_right_token_opens(attacker: Device) -> None:
    """The control of everything below."""
    with attacker.raw() as client:
        assert client.mechanisms == ["PLAIN"]
        client.sync()
    with attacker.pika() as connection:
        assert connection.is_open


def test_plain_is_the_only_mechanism(stack: RunningStack, attacker: Device) -> None:
    broker = stack.stack.broker
    assert broker is not None
    amqplain = table({"LOGIN": attacker.id, "PASSWORD": attacker.token()})[4:]
    found = refusals(
        attacker,
        {
            "ANONYMOUS": lambda it: it.login("", "", mechanism="ANONYMOUS", response=b""),
            "ANONYMOUS with a trace": lambda it: it.login("", "", mechanism="ANONYMOUS", response=b"guest"),
            "AMQPLAIN": lambda it: it.login("", "", mechanism="AMQPLAIN", response=amqplain),
            "EXTERNAL": lambda it: it.login("", "", mechanism="EXTERNAL", response=attacker.id.encode()),
            "RABBIT-CR-DEMO": lambda it: it.login("", "", mechanism="RABBIT-CR-DEMO", response=attacker.id.encode()),
            "lower case": lambda it: it.login(attacker.id, attacker.token(), mechanism="plain"),
            "no name": lambda it: it.login(attacker.id, attacker.token(), mechanism=""),
        },
    )
    assert set(found.values()) <= {0, 403, 504}, found
    # The fabric's own listener makes no exception.
    with RawClient(LOOPBACK, broker.amqp_port) as client:
        client.login(access.WORKER, broker.password(access.WORKER))
        assert client.mechanisms == ["PLAIN"]


@pytest.mark.parametrize("mechanism", ["ANONYMOUS", "EXTERNAL", "AMQPLAIN", "CRAM-MD5"])
def test_plain_is_the_only_mechanism_of_1_0(attacker: Device, mechanism: str) -> None:
    with pytest.raises(Refused, match="Authentication failed"):
        One(attacker, mechanisms=mechanism)


def test_1_0_without_sasl_gets_nothing(attacker: Device) -> None:
    """A client may leave SASL out; the broker would take it for ANONYMOUS if that were allowed."""
    described_open = b"\x00\x53\x10\xc0\x13\x02\xa1\x01x\xa1\x0dvhost:devices"
    open_frame = (8 + len(described_open)).to_bytes(4, "big") + b"\x02\x00\x00\x00" + described_open
    with attacker.socket() as client:
        client.socket.sendall(HEADER_1_0 + open_frame)
        answer = until_closed(client.socket)
    assert not answer.startswith(HEADER_1_0), "the broker went on without SASL"
    assert b"\x00\x53\x10" not in answer, "the broker opened a connection"


def test_1_0_offers_plain_alone(attacker: Device) -> None:
    with attacker.socket() as client:
        client.socket.sendall(SASL_1_0)
        answer = b""
        while len(answer) < 12 or len(answer) < 8 + int.from_bytes(answer[8:12], "big"):
            answer += client.socket.recv(4096)
    assert answer.startswith(SASL_1_0)
    assert b"PLAIN" in answer
    for other in (b"AMQPLAIN", b"ANONYMOUS", b"EXTERNAL", b"CRAM"):
        assert other not in answer


def test_no_known_account_opens(stack: RunningStack, attacker: Device) -> None:
    """Not `guest`, and no service account with anything that a device or a caller can make."""
    attempts: dict[str, Attempt] = {"guest": lambda it: it.login("guest", "guest")}
    tokens = {"device": attacker.token(), "issued": stack.token, "api": attacker.api_token(), "own name": ""}
    for account in access.ACCOUNTS:
        for kind, token in tokens.items():
            attempts[f"{account.name} {kind}"] = lambda it, name=account.name, token=token: it.login(
                name, token or name
            )
    assert set(refusals(attacker, attempts).values()) == {403}


def test_guest_is_no_user_on_loopback_either(stack: RunningStack) -> None:
    broker = stack.stack.broker
    assert broker is not None
    with RawClient(LOOPBACK, broker.amqp_port) as client, pytest.raises(ConnectionClosed) as refused:
        client.login("guest", "guest")
    assert refused.value.code == 403
    with _management(stack, access.ADMIN, broker.password(access.ADMIN)) as admin:
        users = {user["name"] for user in admin.get("/api/users").json()}
        vhosts = {vhost["name"] for vhost in admin.get("/api/vhosts").json()}
    assert users == {account.name for account in access.ACCOUNTS}
    assert vhosts == {"devices"}


def test_names_outside_the_grammar_are_refused(attacker: Device, victim: Device) -> None:
    """Even with the right token of the device whose name they nearly are."""
    token = attacker.token()
    names = {
        "upper case": attacker.id.upper(),
        "one upper case letter": attacker.id.capitalize(),
        "space before": f" {attacker.id}",
        "space behind": f"{attacker.id} ",
        "newline": f"{attacker.id}\n",
        "carriage return": f"{attacker.id}\r",
        "tab": f"{attacker.id}\t",
        "star": "*",
        "hash": "#",
        "star behind": f"{attacker.id}*",
        "dot": f"{attacker.id}.x",
        "key of another": f"{attacker.id}.{victim.id}",
        "slash": f"{attacker.id}/",
        "percent": f"{attacker.id}%00",
        "form": f"{attacker.id}&username={victim.id}",
        "regular expression": ".*",
        "full width": attacker.id.replace("a", "ａ"),
        "64 characters": "a" * 64,
        "another's": victim.id,
    }
    found = refusals(attacker, {what: lambda it, name=name: it.login(name, token) for what, name in names.items()})
    assert set(found.values()) == {403}, found
    # A NUL ends the name in PLAIN: what follows is refused, and never the start of a password.
    found = refusals(
        attacker,
        {
            "NUL behind": lambda it: it.login(f"{attacker.id}\0", token),
            "NUL within": lambda it: it.login(f"{attacker.id}\0{victim.id}", token),
            "authorization identity": lambda it: it.login("", "", response=plain(victim.id, attacker.id, token)),
        },
    )
    assert set(found.values()) <= {0, 403}, found


def test_a_password_is_needed(attacker: Device) -> None:
    found = refusals(
        attacker,
        {
            "empty": lambda it: it.login(attacker.id, ""),
            "absent": lambda it: it.login("", "", response=b"\0" + attacker.id.encode()),
            "nothing": lambda it: it.login("", "", response=b""),
            "NULs": lambda it: it.login("", "", response=b"\0\0"),
            "no name": lambda it: it.login("", attacker.token()),
            "its id": lambda it: it.login(attacker.id, attacker.id),
        },
    )
    assert set(found.values()) <= {0, 403}, found


def test_there_is_one_vhost(attacker: Device) -> None:
    attempts: dict[str, Attempt] = {
        vhost: lambda it, vhost=vhost: it.login(attacker.id, attacker.token(), vhost)
        for vhost in ("/", "", "other", "DEVICES", "devices/", "devices ", "*")
    }
    assert set(refusals(attacker, attempts).values()) == {530}


def test_no_connection_is_opened_in_1_0(stack: RunningStack, attacker: Device, witness: Witness) -> None:
    """Neither by a library, nor by whoever says everything at once; nor for an account of the fabric's."""
    broker = stack.stack.broker
    assert broker is not None
    key = f"telemetry.{attacker.id}.ch"

    def library() -> None:
        with pytest.raises(Refused):
            One(attacker)

    def at_once() -> None:
        with all_at_once(attacker, f"/exchanges/{names.UPLINK}/{key}", proton.Message(body=b"x").encode()) as client:
            assert until_closed(client.socket).endswith(HEADER_1_0), "logged in, and nothing opened"

    def fabric() -> None:
        password = broker.password(access.WORKER)
        asyncio.run(doors.check_amqp_1_0(LOOPBACK, broker.amqp_port, access.WORKER, password))

    def stranger() -> None:
        with pytest.raises(ValueError, match="does not let"):
            asyncio.run(doors.check_amqp_1_0(LOOPBACK, broker.amqp_port, access.WORKER, "guessed"))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(each) for each in (library, at_once, fabric, stranger)]:
            done.result()
    assert [got.key for got in witness.passed() if got.exchange == names.UPLINK.encode()] == []


@pytest.mark.usefixtures("amqp_1_0")
def test_switched_on_the_same_gets_through(attacker: Device, witness: Witness) -> None:
    """The control of the test above."""
    key = f"telemetry.{attacker.id}.ch"
    with all_at_once(attacker, f"/exchanges/{names.UPLINK}/{key}", proton.Message(body=b"x").encode()):
        eventually(lambda: key.encode() in [got.key for got in witness.passed()], "what was said at once")
    with One(attacker) as one:
        assert one.receiver(f"/queues/{attacker.mailbox}")


@pytest.mark.usefixtures("amqp_1_0")
def test_a_worker_does_not_work_with_a_broker_that_speaks_1_0(stack: RunningStack) -> None:
    ports = {"RESTANTE_WORKER_PORT": str(free_port(LOOPBACK, besides=set()))}
    done = subprocess.run(
        [sys.executable, "-m", "api.operator.cli", "worker"],
        env=stack.stack._environment() | ports, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert "the broker is not used, since it opens AMQP 1.0 connections" in done.stdout + done.stderr


@pytest.mark.usefixtures("amqp_1_0")
def test_there_is_one_vhost_in_1_0(attacker: Device) -> None:
    def opens(hostname: str) -> bool:
        try:
            One(attacker, hostname=hostname).close()
        except Refused:
            return False
        return True

    hostnames = ("vhost:/", "vhost:other", "vhost:", "vhost:devices/")
    with ThreadPoolExecutor(len(hostnames)) as pool:
        assert not any(pool.map(opens, hostnames))
    assert opens("vhost:devices")


# ---- TLS ---------------------------------------------------------------------------------------------


def _with_version(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # or this side would not even ask
    context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_tls_is_refused_by_the_broker(attacker: Device, version: ssl.TLSVersion) -> None:
    with (
        socket.create_connection((attacker.host, attacker.port), 10) as plain_socket,
        pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"),
    ):
        _with_version(version).wrap_socket(plain_socket)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_present_tls_is_spoken(attacker: Device, version: ssl.TLSVersion) -> None:
    with RawClient(attacker.host, attacker.port, tls=_with_version(version)) as client:
        client.login(attacker.id, attacker.token())


@pytest.mark.parametrize("header", [HEADER_0_9_1, SASL_1_0, HEADER_1_0])
def test_plain_tcp_at_the_tls_port_gets_no_word_of_amqp(attacker: Device, header: bytes) -> None:
    with socket.create_connection((attacker.host, attacker.port), 10) as client:
        client.sendall(header)
        answer = until_closed(client)
    assert answer == b"" or answer[0] == 0x15, "a TLS alert is all it may say"


def test_a_client_can_not_renegotiate(attacker: Device) -> None:
    """A line with `R` makes `openssl s_client` ask for it."""
    done = subprocess.run(
        [
            "openssl",
            "s_client",
            "-tls1_2",
            "-connect",
            f"{attacker.host}:{attacker.port}",
            "-servername",
            attacker.host,
        ],
        input=b"R\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert b"RENEGOTIATING" in said, said
    assert b"Secure Renegotiation IS supported" in said, "it was asked in the way that the broker knows"
    assert b"no renegotiation" in said, said


# ---- Other listeners ---------------------------------------------------------------------------------


def test_a_device_is_nobody_at_the_management_api(stack: RunningStack, attacker: Device) -> None:
    routes = ("/api/overview", "/api/whoami", "/api/queues", "/api/connections", "/api/definitions", "/api/users")
    with _management(stack, attacker.id, attacker.token()) as device:
        assert {device.get(route).status_code for route in routes} == {401}
        assert device.put("/api/users/mine", json={"password": "x", "tags": "administrator"}).status_code == 401
        assert device.delete("/api/queues/devices/reports").status_code == 401
        publish = {"routing_key": "x", "payload": "x", "payload_encoding": "string", "properties": {}}
        assert device.post("/api/exchanges/devices/mail/publish", json=publish).status_code == 401
    with _management(stack, None, attacker.token()) as bearer:
        assert {bearer.get(route).status_code for route in routes} == {401}
    with _management(stack, "guest", "guest") as guest:
        assert guest.get("/api/whoami").status_code == 401


def test_the_broker_speaks_no_other_protocol(stack: RunningStack) -> None:
    broker = stack.stack.broker
    assert broker is not None
    with _management(stack, access.ADMIN, broker.password(access.ADMIN)) as admin:
        overview = admin.get("/api/overview").json()
    protocols = {listener["protocol"] for listener in overview["listeners"]}
    assert protocols == {"amqp", "amqp/ssl", "http", "http/prometheus", "clustering"}
    # Nor does it understand them on the port that it has.
    mqtt = b"\x10\x1a\x00\x04MQTT\x04\x02\x00\x3c\x00\x0eattacker-mqtt1"
    stomp = b"CONNECT\naccept-version:1.2\nhost:devices\n\n\0"
    stream = b"\x00\x00\x00\x0a\x00\x11\x00\x01\x00\x00\x00\x01\x00\x00"  # peer properties
    context = _with_version(ssl.TLSVersion.TLSv1_3)
    for greeting in (mqtt, stomp, stream):
        with RawClient("localhost", broker.amqps_port, tls=context) as client:
            client.socket.sendall(greeting)
            answer = until_closed(client.socket)
        assert answer in (b"", SASL_1_0, HEADER_0_9_1), answer


def test_all_but_the_devices_listener_are_on_loopback(stack: RunningStack) -> None:
    """From the socket table: epmd, distribution, management, metrics, the fabric's listener, the auth endpoint."""
    broker = stack.stack.broker
    assert broker is not None
    home = stack.stack.files.state_dir / "broker"
    ports: dict[str, int] = json.loads((home / "ports.json").read_text())
    assert set(ports) == {"amqps", "amqp", "management", "prometheus", "distribution", "epmd"}
    heard = _listening(set(marked("RESTANTE_BROKER", str(home))) | {broker.pid})
    assert {port for _, port in heard} == set(ports.values()), "a listener that is not meant, or one that is missing"
    for address, port in heard:
        assert address in (LOOPBACK, "::1"), f"port {port} is open on {address}"
    settings = stack.stack.settings
    gateway = _listening({stack.stack.service_pid("gateway")})
    assert gateway == {(settings.api_host, settings.api_port), (LOOPBACK, settings.auth_port)}
    assert _listening({stack.stack.service_pid("worker")}) == {(LOOPBACK, settings.worker_port)}


def _listening(pids: set[int]) -> set[tuple[str, int]]:
    found = set()
    for pid in pids:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            for open_socket in each.net_connections(kind="tcp"):
                if open_socket.status == psutil.CONN_LISTEN:
                    found.add((open_socket.laddr.ip, open_socket.laddr.port))
    return found


def _management(stack: RunningStack, username: str | None, password: str) -> httpx.Client:
    broker = stack.stack.broker
    assert broker is not None
    if username is None:
        headers = {"Authorization": f"Bearer {password}"}
    else:
        headers = {"Authorization": "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()}
    return httpx.Client(base_url=f"http://{LOOPBACK}:{broker.management_port}", headers=headers, timeout=10)


def test_the_cookie_is_long_and_private(stack: RunningStack) -> None:
    cookies = list(stack.stack.files.state_dir.rglob(".erlang.cookie"))
    assert cookies
    for cookie in cookies:
        assert len(cookie.read_text().strip()) >= 32
        assert cookie.stat().st_mode & 0o077 == 0
