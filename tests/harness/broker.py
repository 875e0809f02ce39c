"""A private broker for tests of the AMQP side: no gateway behind it, so only service accounts get in."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from api.operator import authority
from api.operator.node import BrokerNode
from api.operator.processes import enclosed
from api.operator.secrets import private_directory, replace_private
from api.operator.userland import find_binaries
from fabric.amqp.connection import Endpoint, Link
from fabric.management import ManagementClient
from tests.harness import leaks
from topology import access
from topology.access import WORKER

LOOPBACK = "127.0.0.1"


class Broker:
    """A node, and what tests ask of it."""

    def __init__(self, node: BrokerNode, state: Path) -> None:
        self.node = node
        self.authority = state / "ca.pem"

    def endpoint(self, account: str = WORKER) -> Endpoint:
        return Endpoint(LOOPBACK, self.node.amqp_port, account, self.node.password(account))

    @asynccontextmanager
    async def link(self, name: str = "test", account: str = WORKER, *, wait: bool = True) -> AsyncIterator[Link]:
        link = Link(self.endpoint(account), name)
        await link.start()
        try:
            if wait:
                await link.ready(20)
            yield link
        finally:
            await link.stop()

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[ManagementClient]:
        base_url = f"http://{LOOPBACK}:{self.node.management_port}"
        client = ManagementClient(base_url, access.ADMIN, self.node.password(access.ADMIN))
        try:
            yield client
        finally:
            await client.close()


def evaluate(node: BrokerNode, expression: str) -> str:
    """The value of an Erlang expression in the node, as Erlang writes it."""
    command = [str(node._binaries.epmd.with_name("erl_call")), "-n", node.name, "-e"]
    if node._binaries.root is not None:
        command = enclosed(node._binaries.root, [node._home], command)
    # It needs the node's own environment, to find its cookie and its epmd.
    environment = Path(f"/proc/{node.pid}/environ").read_bytes().decode().split("\0")
    env = dict(entry.split("=", 1) for entry in environment if "=" in entry)
    done = subprocess.run(
        command, env=env, input=f"{expression}\n", capture_output=True, text=True, timeout=30, check=False
    )
    said = done.stdout.strip()
    assert said.startswith("{ok, "), said + done.stderr
    return said.removeprefix("{ok, ").removesuffix("}")


@contextmanager
def running_broker(directory: Path, configuration: str = "") -> Iterator[Broker]:
    """A started node with its state in `directory`; `configuration` is read after its own."""
    state = private_directory(directory / "state")
    hosts = ["localhost", LOOPBACK]
    now = datetime.now(UTC)
    ours = authority.make_authority("test", hosts, now=now)
    authority.save(ours, state / "ca.pem", state / "ca.key")
    authority.save(authority.issue(ours, hosts, now=now), state / "server.pem", state / "server.key")
    if configuration:
        for part in ("broker", "broker/etc", "broker/etc/conf.d"):
            private_directory(state / part)
        replace_private(state / "broker" / "etc" / "conf.d" / "30-test.conf", configuration.encode())
    node = BrokerNode(
        state,
        certificate=state / "server.pem",
        key=state / "server.key",
        authority=state / "ca.pem",
        auth_url=f"http://{LOOPBACK}:9/broker/auth",  # nobody there: every device is refused
        binaries=find_binaries(log=print),
        log=print,
    )
    with node:
        yield Broker(node, state)
    leaks.check(leaks.logs_in(state), leaks.kept_in(state))


async def eventually(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: it did not within `timeout` seconds.
    """
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        await asyncio.sleep(0.01)
