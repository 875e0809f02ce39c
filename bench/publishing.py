"""How fast a back end hands over commands by HTTP: to the gateway, and to RabbitMQ's own HTTP publish API.

The gateway answers 202 once the command is in the ledger and the broker has confirmed it, or after half a second if
that takes longer: what is in the ledger gets there. The management API of the same broker answers once the broker has
confirmed. Both are asked by the same light client over kept connections, the gateway over TLS. On either side the
devices are away: a message stays in a durable queue of its device, as many devices for the one as for the other, and in
the end there must be as many messages as were answered for.
"""

import asyncio
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import pika
import uvloop

from api.operator.stack import Stack
from bench.peers import accounts
from bench.peers.accounts import Account
from bench.peers.http import Answer, Connection, Place
from bench.results import Bar, Comparison, Result, Series
from bench.run import Budget, Options, databases, percentile, rounds, say, stack_on
from topology import names
from topology.names import DeviceId

ONE_BY_ONE = Bar("publish of a command over HTTP against RabbitMQ's HTTP API, one by one", 5.0, at_most=False)
IN_FLIGHT = Bar("publish of a command over HTTP against RabbitMQ's HTTP API, 32 in flight", 5.0, at_most=False)
BARS = (ONE_BY_ONE, IN_FLIGHT)
BUDGET = Budget(quick=18.0, full=110.0)

_CONNECTIONS = 32
_MAILBOX = 250  # commands that wait for one device at most
_PATIENCE = 20.0  # seconds for what was accepted to be in its mailbox
_STOPPING = 8.0  # seconds for the stack


def run(options: Options) -> Result:
    plan = _Plan(3, 40, 150, 2.0) if options.quick else _Plan(9, 200, 1500, 4.0)
    with (
        databases(options) as given,
        stack_on(options, given.postgresql()) as (stack, _),
        accounts.account(stack, "bench.publisher", tags="management") as account,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_measure(stack, account, plan, options))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Of each side in one round: so many requests one by one, and so many in flight, or as many as there are `seconds`
    for, for each: RabbitMQ's API takes 5 s for one now and then."""

    rounds: int
    one_by_one: int
    in_flight: int
    seconds: float

    @property
    def devices(self) -> int:
        return (self.rounds + 1) * (self.one_by_one + self.in_flight) // _MAILBOX + 2


@dataclass(slots=True)
class _Side:
    """One of the two: its requests, each for the next device, and what was found, a figure for each round."""

    name: str
    connections: list[Connection]
    requests: Iterator[bytes]
    accepted: Callable[[Answer], bool]
    count: int = 0
    latency: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    async def publish(self, connection: Connection) -> None:
        answer = await connection.ask(next(self.requests))
        if not self.accepted(answer):
            raise RuntimeError(f"{self.name} answered {answer.status}: {answer.body[:500]!r}")
        self.count += 1

    async def one_by_one(self, plan: _Plan) -> tuple[float, float]:
        """The median in milliseconds, and how many a second."""
        taken: list[float] = []
        while len(taken) < plan.one_by_one and sum(taken) < plan.seconds * 1000:
            began = time.perf_counter()
            await self.publish(self.connections[0])
            taken.append((time.perf_counter() - began) * 1000)
        return percentile(taken, 0.5), 1000 * len(taken) / sum(taken)

    async def in_flight(self, plan: _Plan) -> float:
        """How many a second."""
        began, left, before = time.perf_counter(), iter(range(plan.in_flight)), self.count

        async def lane(connection: Connection) -> None:
            for _ in left:
                await self.publish(connection)
                if time.perf_counter() - began > plan.seconds:
                    return

        async with asyncio.TaskGroup() as group:
            for connection in self.connections:
                group.create_task(lane(connection))
        return (self.count - before) / (time.perf_counter() - began)

    async def round(self, plan: _Plan) -> None:
        latency, alone = await self.one_by_one(plan)
        self.latency.append(latency)
        self.alone.append(alone)
        self.together.append(await self.in_flight(plan))

    def forget(self) -> None:
        """What was found while everything was warming up."""
        for found in (self.latency, self.alone, self.together):
            found.clear()


async def _measure(stack: Stack, account: Account, plan: _Plan, options: Options) -> Result:
    credentials = pika.PlainCredentials(account.name, account.password)
    parameters = pika.ConnectionParameters("127.0.0.1", stack.settings.amqp_port, names.VHOST, credentials, heartbeat=0)
    devices = [DeviceId(f"publishing-{number}") for number in range(plan.devices)]
    queues = [f"bench.published.{number}" for number in range(plan.devices)]
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        for queue in queues:
            channel.queue_declare(queue, durable=True)

        def waiting(queues: list[str]) -> int:
            return sum(channel.queue_declare(queue, passive=True).method.message_count for queue in queues)

        theirs = _rabbitmq(stack, account, queues)
        ours = await _restante(stack, devices)
        sides = (theirs, ours)
        for side in sides:
            await side.round(plan)
            side.forget()
        for number in rounds(plan.rounds, options.left - _STOPPING):
            for side in sides:
                await side.round(plan)
            said = ", ".join(f"{side.name} {side.alone[-1]:.0f} and {side.together[-1]:.0f} /s" for side in sides)
            say(f"round {number}, one by one and {_CONNECTIONS} in flight: {said}")
        for side, held in ((theirs, queues), (ours, [names.mailbox(device) for device in devices])):
            until = time.monotonic() + _PATIENCE
            while (found := waiting(held)) != side.count:
                if time.monotonic() > until:
                    raise RuntimeError(f"{side.name} has answered for {side.count} messages, and {found} are there")
                await asyncio.sleep(0.1)
            for opened in side.connections:
                opened.close()
    return _result(ours, theirs)


def _rabbitmq(stack: Stack, account: Account, queues: list[str]) -> _Side:
    place = Place.of(stack.settings.management_url)
    headers = {"Authorization": f"Basic {b64encode(f'{account.name}:{account.password}'.encode()).decode()}"}

    def request(queue: str) -> bytes:
        body = {
            "properties": {"delivery_mode": 2, "content_type": "application/json"},
            "routing_key": queue,
            "payload": "{}",
            "payload_encoding": "string",
        }
        return place.request("POST", f"/api/exchanges/{names.VHOST}/amq.default/publish", headers, body)

    return _Side(
        "RabbitMQ",
        [Connection(place) for _ in range(_CONNECTIONS)],
        cycle([request(queue) for queue in queues]),
        lambda answer: answer.status == 200 and b'"routed":true' in answer.body,
    )


async def _restante(stack: Stack, devices: list[DeviceId]) -> _Side:
    place = Place.of(stack.settings.api_url, ssl.create_default_context(cafile=stack.files.authority))
    headers = {"Authorization": f"Bearer {stack.files.operator_token.read_text().strip()}"}
    connections = [Connection(place) for _ in range(_CONNECTIONS)]
    for device in devices:
        body = {"id": device, "mailbox": {"limit": _MAILBOX}}
        made = await connections[0].ask(place.request("POST", "/v1/devices", headers, body))
        if made.status != 201:
            raise RuntimeError(f"the gateway answered {made.status}: {made.body!r}")
    order = {"name": "noop", "args": {}, "ttl": 3600}
    return _Side(
        "Restante",
        connections,
        cycle([place.request("POST", f"/v1/devices/{device}/commands", headers, order) for device in devices]),
        lambda answer: answer.status == 202,
    )


def _result(ours: _Side, theirs: _Side) -> Result:
    def series(side: _Side, values: list[float], unit: str) -> Series:
        return Series(side.name, unit, tuple(values))

    return Result(
        "publishing",
        "Commands handed over by HTTP, beside RabbitMQ's HTTP publish API",
        [
            Comparison("one by one, p50", series(ours, ours.latency, "ms"), series(theirs, theirs.latency, "ms")),
            Comparison("one by one", series(ours, ours.alone, "/s"), series(theirs, theirs.alone, "/s"), ONE_BY_ONE),
            Comparison(
                f"{_CONNECTIONS} in flight",
                series(ours, ours.together, "/s"),
                series(theirs, theirs.together, "/s"),
                IN_FLIGHT,
            ),
        ],
        notes=[
            f"{ours.count} commands and {theirs.count} messages were answered for, and were in their queues at the end",
            "a command is also signed, committed with its timeline, and told as an event; a message is not",
        ],
    )
