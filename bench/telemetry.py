"""Readings a second from a device to a back end, each confirmed: from the agent's library over AMQP, and over HTTP.

A process offers the agent's library more readings than it takes; a bare pika consumer follows the stream `telemetry` in
another. The time runs from the first reading until all are confirmed and the consumer has them all.

The floor takes turns with it: a bare pika client over TLS that keeps 500 unconfirmed publishes of the same body on
their way to the same stream, and the same consumer. Over HTTP, one reading a request with 32 requests in flight, and
batches of 100 with 4 in flight, are counted when they are answered, which is when the broker has confirmed them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from api.operator.stack import Stack
from bench.bare_pika import PASSWORD
from bench.caller import Caller
from bench.cpu import Meter
from bench.device import enroll
from bench.load import Load, Requests, load
from bench.peers import accounts
from bench.readings import BODY, CHANNEL
from bench.results import Bar, Comparison, Result, Series, Table
from bench.run import Budget, Options, rounds, say, stack_on
from topology import names
from topology.names import DeviceId

RATE = Bar("confirmed telemetry, agent to consumer", 0.7, at_most=False)
BARS = (RATE,)
BUDGET = Budget(quick=12.0, full=90.0)

_ACCOUNT = "bench.telemetry"
_DEVICE = DeviceId("telemetry-1")
_BATCH = 100  # readings of one request


def run(options: Options) -> Result:
    with ExitStack() as cleanup:
        stack, root = cleanup.enter_context(stack_on(options, ""))
        assert stack.broker is not None
        state = enroll(root / "device", stack, Caller(stack).create_device(_DEVICE))
        password = cleanup.enter_context(accounts.account(stack, _ACCOUNT)).password
        plain = ("127.0.0.1", str(stack.settings.amqp_port), _ACCOUNT, names.VHOST)
        consumer = cleanup.enter_context(_end(password, "consumer", *plain))
        consumer.wait("ready")
        place = ("localhost", str(stack.broker.amqps_port), str(stack.files.authority), _ACCOUNT, names.VHOST)
        key = names.telemetry_key(DeviceId("telemetry-2"), CHANNEL)
        agent = cleanup.enter_context(_end("", "agent", str(state)))
        pika_ = cleanup.enter_context(_end(password, "pika", *place, key))
        path = f"/v1/devices/{_DEVICE}/telemetry/{CHANNEL}"
        single = Requests([path], {}, BODY.decode(), 200)
        batch = Requests([path], {"Content-Type": "application/x-ndjson"}, (BODY.decode() + "\n") * _BATCH, 200)
        one_by_one = cleanup.enter_context(load(stack, single, 32))
        batches = cleanup.enter_context(load(stack, batch, 4))
        return _measure(options, stack, consumer, agent, pika_, one_by_one, batches)


class _End:
    """One of the processes of `bench.readings`."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self, count: int) -> None:
        """Let it publish so many, or expect so many more."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{count}\n")
        self._child.stdin.flush()

    def wait(self, what: object) -> None:
        """Return when it says so."""
        assert self._child.stdout is not None
        if (said := self._child.stdout.readline().strip()) != str(what):
            raise RuntimeError(f"one of bench.readings said {said!r} instead of {what}; what else it said is above")


@contextmanager
def _end(password: str, *arguments: str) -> Iterator[_End]:
    argv = [sys.executable, "-m", "bench.readings", *arguments]
    environment = {**os.environ, PASSWORD: password}
    child = subprocess.Popen(argv, stdin=-1, stdout=-1, text=True, env=environment)  # noqa: S603 - our own program
    try:
        yield _End(child)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _rate(publisher: _End, consumer: _End, count: int) -> float:
    """Readings a second, from the first until all are confirmed and the consumer has all of them."""
    began = time.perf_counter()
    consumer.start(count)
    publisher.start(count)
    publisher.wait(count)
    consumer.wait(count)
    return count / (time.perf_counter() - began)


def _measure(
    options: Options, stack: Stack, consumer: _End, agent: _End, floor: _End, single: Load, batch: Load
) -> Result:
    warm = [_rate(publisher, consumer, 2_000) for publisher in (floor, agent)]
    single.keep_up(0.5)
    batch.keep_up(0.5)
    each = 1.0 if options.quick else 2.0  # seconds that a turn is to take
    counts = [int(rate * each) for rate in warm]
    bare, ours, alone, batched = [], [], [], []
    meter = Meter.of(stack, {"agent": [agent.pid], "consumer": [consumer.pid]})
    cpu: list[dict[str, float]] = []
    for number in rounds(9, options.left - 3.0):
        bare.append(_rate(floor, consumer, counts[0]))
        meter.start()
        ours.append(_rate(agent, consumer, counts[1]))
        cpu.append({part: seconds / counts[1] * 1e6 for part, seconds in meter.seconds().items()})
        alone.append(single.keep_up(each / 2).rate)
        batched.append(batch.keep_up(each / 2).rate * _BATCH)
        say(f"round {number}: agent {ours[-1]:.0f} /s, bare {bare[-1]:.0f} /s; HTTP {alone[-1]:.0f}, {batched[-1]:.0f}")
    under = Series("bare pika", "/s", tuple(bare))
    parts = sorted(cpu[0])
    middle = {part: sorted(each[part] for each in cpu)[len(cpu) // 2] for part in parts}
    return Result(
        "telemetry",
        "Confirmed readings a second, one device to a back end",
        [
            Comparison("agent, to the stream's consumer", Series("readings", "/s", tuple(ours)), under, RATE),
            Comparison("over HTTP, one a request, 32 in flight", Series("readings", "/s", tuple(alone)), under),
            Comparison(f"over HTTP, {_BATCH} a request, 4 in flight", Series("readings", "/s", tuple(batched)), under),
        ],
        [Table("CPU of one reading from the agent, µs", tuple(parts), (tuple(middle[part] for part in parts),))],
    )
