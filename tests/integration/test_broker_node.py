"""A private broker node, for real: it starts, answers, lets nobody else in, and leaves nothing behind."""

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pika
import psutil
import pytest

from api.operator import authority, broker_files
from api.operator import node as node_module
from api.operator.broker_files import Ports
from api.operator.node import BrokerNode, NodeError
from api.operator.processes import marked
from api.operator.userland import Binaries, UserlandError, find_binaries, inspect
from topology import access, names

DEVICES = "127.0.0.2"  # where the AMQPS listener is asked to bind, so that it can be told from loopback's 127.0.0.1
MINUTE = 60.0


@pytest.fixture(scope="module")
def binaries() -> Binaries:
    return find_binaries(log=print)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    now = datetime.now(UTC)
    ours = authority.make_authority("test", [DEVICES, "127.0.0.1"], now=now)
    authority.save(ours, directory / "ca.pem", directory / "ca.key")
    server = authority.issue(ours, [DEVICES, "127.0.0.1"], now=now)
    authority.save(server, directory / "server.pem", directory / "server.key")
    return directory


Make = Callable[..., BrokerNode]


@pytest.fixture(scope="module")
def make(certificates: Path, binaries: Binaries) -> Iterator[Make]:
    made: list[BrokerNode] = []

    def build(state_dir: Path, *, ports: Ports | None = None, **changed: object) -> BrokerNode:
        arguments: dict[str, object] = {
            "certificate": certificates / "server.pem",
            "key": certificates / "server.key",
            "authority": certificates / "ca.pem",
            "auth_url": "http://127.0.0.1:9/broker/auth",  # nobody there: every device is refused
            "binaries": binaries,
            "log": print,
            "host": DEVICES,
        } | changed
        made.append(BrokerNode(state_dir, ports=ports, **arguments))  # type: ignore[arg-type] # checked by the call
        return made[-1]

    yield build
    for node in made:
        node.stop()


@pytest.fixture(scope="module")
def node(make: Make, tmp_path_factory: pytest.TempPathFactory) -> BrokerNode:
    started = make(tmp_path_factory.mktemp("node") / "state")
    started.start()
    return started


@pytest.fixture
def trusted(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates / "ca.pem"))


def connect(node: BrokerNode, account: str, password: str | None = None) -> pika.BlockingConnection:
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            "127.0.0.1",
            node.amqp_port,
            names.VHOST,
            pika.PlainCredentials(account, node.password(account) if password is None else password),
            socket_timeout=5,
            blocked_connection_timeout=10,
        )
    )


def management(node: BrokerNode, path: str, user: str, password: str) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", node.management_port, timeout=10)
    credentials = b64encode(f"{user}:{password}".encode()).decode()
    with contextlib.closing(connection):
        connection.request("GET", f"/api/{path}", headers={"Authorization": f"Basic {credentials}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def as_admin(node: BrokerNode, path: str) -> list[dict[str, str]]:
    status, found = management(node, path, access.ADMIN, node.password(access.ADMIN))
    assert status == http.client.OK
    assert isinstance(found, list)
    return found


def processes(node: BrokerNode) -> list[psutil.Process]:
    """All of the node's processes."""
    found = []
    for pid in marked("RESTANTE_BROKER", str(node._home)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found.append(psutil.Process(pid))
    return found


def until(condition: Callable[[], bool], seconds: float = MINUTE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


# --- Who gets in ---------------------------------------------------------------------------------------------------


def greeting(node: BrokerNode, trusted: ssl.SSLContext | None, header: bytes) -> bytes:
    """What the broker says first, on the plain listener or, with a context, on the devices' one."""
    host, port = (DEVICES, node.amqps_port) if trusted else ("127.0.0.1", node.amqp_port)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(socket.create_connection((host, port), 5))
        if trusted is not None:
            link = stack.enter_context(trusted.wrap_socket(link, server_hostname=host))
        link.sendall(header)
        received = b""
        while b"PLAIN" not in received and (more := link.recv(4096)):
            received += more
    return received


@pytest.mark.parametrize("encrypted", [False, True])
def test_only_plain_is_offered_in_amqp_0_9_1(node: BrokerNode, trusted: ssl.SSLContext, encrypted: bool) -> None:
    received = greeting(node, trusted if encrypted else None, b"AMQP\x00\x00\x09\x01")
    # connection.start ends with the mechanisms and the locales, both long strings, and the frame's end.
    assert received.endswith(b"\x00\x00\x00\x05PLAIN" + b"\x00\x00\x00\x05en_US" + b"\xce")


@pytest.mark.parametrize("encrypted", [False, True])
def test_only_plain_is_offered_in_amqp_1_0(node: BrokerNode, trusted: ssl.SSLContext, encrypted: bool) -> None:
    received = greeting(node, trusted if encrypted else None, b"AMQP\x03\x01\x00\x00")
    assert b"PLAIN" in received
    for other in (b"ANONYMOUS", b"AMQPLAIN", b"EXTERNAL"):
        assert other not in received


@pytest.mark.parametrize("mechanism", [b"ANONYMOUS", b"AMQPLAIN"])
def test_other_mechanisms_are_refused_when_asked_for(node: BrokerNode, mechanism: bytes) -> None:
    with socket.create_connection(("127.0.0.1", node.amqp_port), 5) as link:
        link.sendall(b"AMQP\x00\x00\x09\x01")
        received = b""
        while not received.endswith(b"\xce"):
            received += link.recv(4096)
        # connection.start-ok: no client properties, the mechanism, an empty response, the locale
        payload = b"\x00\x0a\x00\x0b" + bytes(4) + bytes([len(mechanism)]) + mechanism + bytes(4) + b"\x05en_US"
        link.sendall(b"\x01\x00\x00" + len(payload).to_bytes(4) + payload + b"\xce")
        link.settimeout(15)
        with contextlib.suppress(ConnectionResetError):
            answer = link.recv(4096)
            assert answer[7:11] in (b"", b"\x00\x0a\x00\x32")  # closed, or connection.close
            assert b"NOT_ALLOWED" in answer or b"ACCESS_REFUSED" in answer or not answer


@pytest.mark.parametrize(
    ("user", "password"), [("guest", "guest"), (access.WORKER, "wrong"), (access.WORKER, ""), ("pump-17", "token")]
)
def test_strangers_are_refused(node: BrokerNode, user: str, password: str) -> None:
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        connect(node, user, password)
    status, _ = management(node, "whoami", user, password)
    assert status == http.client.UNAUTHORIZED


def test_there_are_our_accounts_and_our_vhost_only(node: BrokerNode) -> None:
    users = {user["name"]: tuple(user["tags"]) for user in as_admin(node, "users")}
    assert users == {account.name: account.tags for account in access.ACCOUNTS}
    assert [vhost["name"] for vhost in as_admin(node, "vhosts")] == [names.VHOST]
    granted = {entry["user"]: entry for entry in as_admin(node, "permissions")}
    for account in access.ACCOUNTS:
        assert granted[account.name]["configure"] == account.configure
        assert granted[account.name]["write"] == account.write
        assert granted[account.name]["read"] == account.read


def test_a_service_account_is_no_administrator(node: BrokerNode) -> None:
    status, _ = management(node, "connections", access.WORKER, node.password(access.WORKER))
    assert status == http.client.UNAUTHORIZED


def test_plugins_are_exactly_ours(node: BrokerNode) -> None:
    asked = (broker_files.CONFIGURATION / "enabled_plugins").read_text().strip().strip("[].").split(",")
    until = time.monotonic() + 30
    while "enabled_plugins" not in (described := as_admin(node, "nodes")[0]):  # it comes with the first statistics
        assert time.monotonic() < until
        time.sleep(0.2)
    assert sorted(described["enabled_plugins"]) == sorted(asked)


def test_only_the_devices_listener_is_where_it_was_asked_to_be(node: BrokerNode) -> None:
    listening = {
        (entry.laddr.ip, entry.laddr.port)
        for process in processes(node)
        for entry in process.net_connections("tcp")
        if entry.status == psutil.CONN_LISTEN
    }
    ports = node.ports
    assert (DEVICES, ports.amqps) in listening
    elsewhere = {address for address in listening if address[0] not in ("127.0.0.1", "::1")}
    assert elsewhere == {(DEVICES, ports.amqps)}
    assert {port for _, port in listening} == {
        ports.amqps,
        ports.amqp,
        ports.management,
        ports.prometheus,
        ports.distribution,
        ports.epmd,
    }


# --- What one client may take --------------------------------------------------------------------------------------


def test_a_connection_has_sixteen_channels(node: BrokerNode) -> None:
    with connect(node, access.WORKER) as connection:
        for _ in range(16):
            connection.channel()
        with pytest.raises(pika.exceptions.NoFreeChannels):
            connection.channel()


def test_a_channel_has_eight_consumers(node: BrokerNode) -> None:
    with connect(node, access.WORKER) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        for _ in range(8):
            channel.basic_consume(queue, lambda *_: None)
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="consumer"):
            channel.basic_consume(queue, lambda *_: None)


def test_a_message_is_at_most_320_kibibytes(node: BrokerNode) -> None:
    with connect(node, access.WORKER) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("amq.topic", "size", bytes(327_680))
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="larger than"):
            channel.basic_publish("amq.topic", "size", bytes(327_681))


def test_the_broker_stamps_messages_itself(node: BrokerNode) -> None:
    before = int(time.time() * 1000) - 2000
    with connect(node, access.WORKER) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        lie = pika.BasicProperties(headers={"timestamp_in_ms": 1}, timestamp=1)
        channel.basic_publish("", queue, b"", lie)
        _, properties, _ = channel.basic_get(queue, auto_ack=True)
    assert properties is not None
    assert before < properties.headers["timestamp_in_ms"] < time.time() * 1000 + 2000
    assert properties.timestamp >= before // 1000


def test_connections_are_announced_in_our_vhost(node: BrokerNode) -> None:
    with connect(node, access.WORKER) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue, "amq.rabbitmq.event", "connection.created")
        with connect(node, access.GATEWAY):
            seen: list[str] = []
            for _, properties, _ in channel.consume(queue, auto_ack=True, inactivity_timeout=5):
                if properties is None:
                    break
                seen.append(properties.headers["user"])
                if access.GATEWAY in seen:
                    break
    assert access.GATEWAY in seen


# --- Secrets -------------------------------------------------------------------------------------------------------


def test_secrets_are_in_private_files_only(node: BrokerNode) -> None:
    state_dir = node._home.parent
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    cookie = node._home / "home" / ".erlang.cookie"
    assert len(cookie.read_text()) >= 32
    secret_files = [cookie, node._home / "tls" / "server.pem", node._home / "etc" / "definitions.json"]
    secret_files += [state_dir / "secrets" / account.name for account in access.ACCOUNTS]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret_files} == {0o600}

    secrets = [cookie.read_text(), *(node.password(account.name) for account in access.ACCOUNTS)]
    exposed = [" ".join(process.cmdline()) for process in processes(node)]
    exposed += ["\n".join(process.environ().values()) for process in processes(node)]
    exposed += [path.read_text("utf-8", "replace") for path in (node._home / "log").iterdir()]
    exposed += [path.read_text() for path in (node._home / "etc").rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for text in exposed if secret in text]


def test_nothing_is_mounted_on_the_host(node: BrokerNode) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    assert str(node._home) not in mounts
    assert "userland" not in mounts


# --- Start, stop, and what can go wrong -----------------------------------------------------------------------------


def test_data_and_ports_outlive_restart_and_kill9_and_not_wipe(node: BrokerNode) -> None:
    ports = node.ports
    with connect(node, access.WORKER) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"mail", pika.BasicProperties(delivery_mode=2))
    for interrupt in (node.stop, node.kill9):
        interrupt()
        assert not node.running
        assert processes(node) == []
        node.start()
        assert node.ports == ports
        with connect(node, access.WORKER) as connection:
            assert connection.channel().queue_declare("kept", passive=True).method.message_count == 1
    with pytest.raises(NodeError, match="stop it before"):
        node.wipe()
    node.stop()
    node.stop()
    node.wipe()
    node.start()
    with (
        connect(node, access.WORKER) as connection,
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no queue 'kept'"),
    ):
        connection.channel().queue_declare("kept", passive=True)


def test_a_second_runner_is_refused_while_the_first_one_lives(node: BrokerNode, make: Make) -> None:
    second = make(node._home.parent)
    with pytest.raises(NodeError, match="Another process runs the broker"):
        second.start()
    with pytest.raises(NodeError, match="Another process runs the broker"):
        second.wipe()
    second.stop()
    assert node.running
    connect(node, access.WORKER).close()


def test_a_taken_port_is_named(make: Make, tmp_path: Path) -> None:
    with socket.create_server((DEVICES, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(NodeError, match=rf"^The amqps port {port} on {DEVICES} is taken.*\.$"):
            make(tmp_path, ports=Ports(amqps=port)).start()


def test_a_remembered_port_that_was_taken_since_is_replaced(make: Make, tmp_path: Path) -> None:
    node = make(tmp_path)
    node._acquire()
    before = node._choose_ports()
    assert node._choose_ports() == before
    with socket.create_server(("127.0.0.1", before.management)):
        after = node._choose_ports()
    assert after.management != before.management
    assert after.amqps == before.amqps


def test_a_value_can_not_smuggle_options_in(make: Make, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"holds what a configuration file can't"):
        make(tmp_path, auth_url="http://127.0.0.1:9\nanonymous_login_user = guest").start()


def test_a_missing_certificate_is_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"can't be prepared: .*none\.pem"):
        make(tmp_path, certificate=tmp_path / "none.pem").start()


def test_a_failed_start_says_why_and_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "deploy"
    configuration.mkdir()
    for source in broker_files.CONFIGURATION.iterdir():
        (configuration / source.name).write_bytes(source.read_bytes())
    with (configuration / "rabbitmq.conf").open("a") as file:
        file.write("no_such_option = 1\n")
    monkeypatch.setattr(broker_files, "CONFIGURATION", configuration)
    node = make(tmp_path / "state")
    with pytest.raises(NodeError, match=r"(?s)ended while it started.*no_such_option"):
        node.start()
    assert not node.running
    assert processes(node) == []
    node._acquire()  # nobody holds the directory


_RUNNER = """
import sys, time
from pathlib import Path
from api.operator.node import BrokerNode
from api.operator.processes import marked
from api.operator.userland import find_binaries
state, certificates = Path(sys.argv[1]), Path(sys.argv[2])
node = BrokerNode(
    state, certificate=certificates / "server.pem", key=certificates / "server.key",
    authority=certificates / "ca.pem", auth_url="http://127.0.0.1:9", binaries=find_binaries(log=lambda _: None),
    log=lambda _: None,
)
with node:
    print(node.pid, node.amqps_port, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_node_ends_with_its_runner(ending: signal.Signals, make: Make, certificates: Path, tmp_path: Path) -> None:
    runner = subprocess.Popen(
        [sys.executable, "-c", _RUNNER, str(tmp_path), str(certificates)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(node_module.__file__).parents[2],
        text=True,
    )
    assert runner.stdout is not None
    with runner:
        left, port = map(int, runner.stdout.readline().split())
        runner.send_signal(ending)
    node = make(tmp_path, host="127.0.0.1")
    if ending == signal.SIGKILL:  # the next start does not wait for the kernel to have ended it
        node.start()
        assert node.amqps_port == port
        node.stop()
    until(lambda: processes(node) == [], 30)
    until(lambda: not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE, 5)


def test_what_a_killed_runner_left_is_ended_by_the_next_start(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make(tmp_path / "state")
    # A process that the kernel did not end with its parent, and that ignores the polite request.
    marked = {"RESTANTE_BROKER": str(node._home), "PATH": os.environ["PATH"]}
    deaf = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"
    left = subprocess.Popen(["sh", "-c", deaf], env=marked, stdout=subprocess.PIPE)
    other = {"RESTANTE_BROKER": f"{node._home}-2", "PATH": os.environ["PATH"]}
    foreign = subprocess.Popen(["sleep", "600"], env=other)
    try:
        assert left.stdout is not None
        assert left.stdout.readline() == b"deaf\n"
        assert len(processes(node)) > 0
        monkeypatch.setattr(node_module, "_STOP_TIMEOUT", 0.5)  # seconds
        node._acquire()
        assert left.wait(10) == -signal.SIGKILL
        assert foreign.poll() is None, "another directory's process was ended"
    finally:
        for process in (left, foreign):
            process.kill()
            process.wait()
        if left.stdout is not None:
            left.stdout.close()


# --- Which broker ---------------------------------------------------------------------------------------------------


def fake_broker(directory: Path, version: str) -> Path:
    """The files by which a release tells its version, and a script that must never be run."""
    release = directory / f"lib/rabbitmq/lib/rabbitmq_server-{version}"
    application = release / f"plugins/rabbit-{version}/ebin/rabbit.app"
    application.parent.mkdir(parents=True)
    application.write_text(f'{{application, rabbit, [{{description, "RabbitMQ"}}, {{vsn, "{version}"}}]}}.')
    for name in ("rabbitmq-server", "epmd"):
        script = release / "sbin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\ntouch {directory}/was-run\n")
        script.chmod(0o755)
    return release / "sbin"


def test_the_version_is_read_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = fake_broker(tmp_path, "4.3.1")
    monkeypatch.setenv("PATH", f"{scripts}:{os.environ['PATH']}")  # for epmd
    for given in (scripts, scripts / "rabbitmq-server"):
        found = inspect(given)
        assert found is not None
        assert found.version == (4, 3, 1)
        assert found.server == scripts / "rabbitmq-server"
    assert not (tmp_path / "was-run").exists()


def test_a_distribution_s_wrapper_is_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = fake_broker(tmp_path, "4.2.7")
    monkeypatch.setenv("PATH", f"{scripts}:{os.environ['PATH']}")
    for directory in ("bin", "sbin"):
        (tmp_path / ("lib/rabbitmq/bin" if directory == "bin" else directory)).mkdir()
    (tmp_path / "lib/rabbitmq/bin/rabbitmq-server").symlink_to(scripts / "rabbitmq-server")
    wrapper = tmp_path / "sbin/rabbitmq-server"
    wrapper.write_text("#!/bin/sh\n")
    found = inspect(wrapper)
    assert found is not None
    assert found.server == scripts / "rabbitmq-server"


def test_a_configured_broker_that_is_too_old_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = fake_broker(tmp_path, "4.0.5")
    monkeypatch.setenv("PATH", f"{scripts}:{os.environ['PATH']}")
    with pytest.raises(UserlandError, match=r"^RabbitMQ 4\.0\.5 at .* is too old, 4\.2\.6 or newer is needed"):
        find_binaries(scripts, log=print)


def test_a_configured_path_without_a_broker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserlandError, match=r"^There is no RabbitMQ at the configured path"):
        find_binaries(tmp_path, log=print)


def test_an_old_broker_in_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binaries: Binaries
) -> None:
    monkeypatch.setenv("PATH", f"{fake_broker(tmp_path, '3.10.8')}:{os.environ['PATH']}")
    lines: list[str] = []
    found = find_binaries(log=lines.append)
    assert found.version >= (4, 2, 6)
    assert found.version == binaries.version
    assert any("is RabbitMQ 3.10.8, 4.2.6 or newer is needed" in line for line in lines)


def test_a_node_of_an_old_broker_does_not_start(make: Make, tmp_path: Path) -> None:
    old = Binaries((4, 1, 9), Path("/none/rabbitmq-server"), Path("/none/epmd"))
    with pytest.raises(NodeError, match=r"^RabbitMQ 4\.1\.9 is too old, 4\.2\.6 or newer is needed\.$"):
        make(tmp_path, binaries=old).start()


def test_a_broker_with_a_user_that_is_not_ours_is_not_used(make: Make, tmp_path: Path) -> None:
    own = make(tmp_path / "state")
    own.start()
    credentials = (access.ADMIN, own.password(access.ADMIN))
    with httpx.Client(base_url=f"http://127.0.0.1:{own.management_port}", auth=credentials, timeout=10) as http:
        http.put("/api/users/guest", json={"password": "guest", "tags": "administrator"}).raise_for_status()
    own.stop()
    with pytest.raises(NodeError, match="users guest, which are not ours"):
        own.start()
    assert not own.running
