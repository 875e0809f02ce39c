"""The raw AMQP floor of many devices: its accounts and queues on a stack's broker, and its two sides as processes."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pika

from api.operator.stack import Stack
from bench.bare_pika import PASSWORD
from bench.peers import accounts
from bench.peers.accounts import Account
from bench.run import say
from topology import names

NO_LIMIT = "The physical limit was not taken: there is no C compiler here, or no librabbitmq."
PIKA = (sys.executable, "-m", "bench.bare_pika")
_SOURCE = Path(__file__).parent / "native" / "amqp_floor.c"
_STOPPING = 15.0  # seconds


@dataclass(frozen=True, slots=True)
class Throughput:
    """`rate`: round trips a second; the others are milliseconds of one of them."""

    rate: float
    p50: float
    p99: float


class Raw:
    """So many bare devices that are connected, and a bare sender to them. From entering until leaving."""

    def __init__(self, sender: "subprocess.Popen[str]") -> None:
        self._sender = sender

    def keep_up(self, seconds: float) -> Throughput:
        """Send for so long, with as many in flight as this was made for."""
        assert self._sender.stdin is not None
        assert self._sender.stdout is not None
        self._sender.stdin.write(f"{seconds}\n")
        self._sender.stdin.flush()
        said = self._sender.stdout.readline().split()
        if len(said) != 4:
            raise RuntimeError("the bare sender died; what it said is above")
        done, taken, p50, p99 = map(float, said)
        return Throughput(done / taken, p50, p99)


@contextmanager
def raw(program: Sequence[str], stack: Stack, count: int, in_flight: int, processes: int = 1) -> Iterator[Raw]:
    """The floor as `program` (`PIKA`, or what `native` gives) makes it."""
    with accounts.account(stack, f"bench.raw.{secrets.token_hex(3)}") as account:
        _declare(stack, account, count)
        with _started(program, stack, account, count, in_flight, processes) as made:
            yield made


@contextmanager
def _started(
    program: Sequence[str], stack: Stack, account: Account, count: int, in_flight: int, processes: int
) -> Iterator[Raw]:
    assert stack.broker is not None
    name, environment = account.name, {**os.environ, PASSWORD: account.password}
    tls, plain = str(stack.broker.amqps_port), str(stack.settings.amqp_port)
    children: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        children.append(subprocess.Popen([*program, *arguments], env=environment, text=True, **pipes))  # type: ignore[call-overload]  # noqa: S603
        return children[-1]

    try:
        each = -(-count // processes)
        for first in range(0, count, each):
            many = str(min(each, count - first))
            authority = str(stack.files.authority)
            start("devices", "localhost", tls, authority, name, names.VHOST, name, str(first), many)
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError("the bare devices did not connect; what they said is above")
        yield Raw(start("load", "127.0.0.1", plain, name, names.VHOST, name, str(count), str(in_flight)))
    finally:
        for child in reversed(children):
            _end(child)


@contextmanager
def native() -> Iterator[tuple[str, ...] | None]:
    """The C client, compiled for this run; None, and a word about it, where it can't be."""
    compiler = shutil.which("cc")
    with tempfile.TemporaryDirectory(prefix="restante-bench-") as directory:
        binary = Path(directory) / "amqp_floor"
        argv = [compiler or "cc", "-O2", "-o", str(binary), str(_SOURCE), "-lrabbitmq"]
        done = None if compiler is None else subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603
        if done is None or done.returncode != 0:
            why = "there is no C compiler" if done is None else done.stderr.strip().splitlines()[0]
            say(f"no physical limit: {why} (on Debian: apt-get install gcc libc6-dev librabbitmq-dev)")
            yield None
        else:
            yield (str(binary),)


def _declare(stack: Stack, account: Account, count: int) -> None:
    """A durable classic queue for each device."""
    parameters = pika.ConnectionParameters(
        "127.0.0.1", stack.settings.amqp_port, names.VHOST, pika.PlainCredentials(account.name, account.password)
    )
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        for number in range(count):
            channel.queue_declare(f"{account.name}.{number}", durable=True)


def _end(child: "subprocess.Popen[str]") -> None:
    """They end when nobody talks to them any more."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(_STOPPING)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdout is not None
    child.stdout.close()
