"""How late `expired` is announced, with 10,000 commands open whose devices are away.

Deadlines are spread over a minute and shuffled, so that they come in another order than the mailboxes' own.
Lateness is announcement minus deadline on the fabric's clock, twice: of the ledger's `settled_at`, and of the
moment at which a consumer of the exchange `wake` has the announcement, as a gateway would.

The floor is one announcement that is asked for instead of waited for, by a process that does nothing else, again
and again during the same minute: a look for what is due, one command settled and committed, its wake-up published,
and had by the same consumer. What lies between the two is the worker's own: its tick, its batches, and what else it
has to do.
"""

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import uvloop

from api.operator import wiring
from api.operator.stack import Stack
from bench.caller import Caller
from bench.results import Bar, Comparison, Result, Series
from bench.run import Budget, Options, databases, ledger_name, percentile, say, stack_on
from bench.service import Tasks, commands
from fabric import command as life
from fabric.amqp.consumer import wake_consumer
from fabric.clock import Clock
from fabric.commands import SECOND, Request
from fabric.model import Change
from fabric.ports import Delivery
from fabric.sql import Store, open_store
from fabric.waiting import Waiters
from fabric.worker.clocks import BATCH
from fabric.worker.reports import Recorder
from topology import access, layout, wire
from topology.names import CommandId, DeviceId

P99 = Bar("`expired` is announced after its deadline, p99", 250.0, at_most=True, unit="ms")
WRONG = Bar("deadlines announced twice, late by a minute, or as something else", 0.0, at_most=True, unit="")
BARS = (P99, WRONG)
BUDGET = Budget(quick=16.0, full=120.0)

EACH = layout.DEFAULT_BACKLOG  # commands per device: as many as may wait
RATE = 10_000 / 60  # deadlines per second
AT_ONCE = 50  # commands that are brought to their mailboxes at the same time
SPARE = 2  # devices whose commands are the floor's, and tell how fast the others will be sent
MARGIN = 1.7  # times as long as that may take, until the first deadline
PATIENCE = 60.0  # seconds after the last deadline

_LONG = 3600.0  # seconds to live of the floor's commands


def run(options: Options) -> Result:
    devices = 12 if options.quick else 200
    with databases(options) as given, stack_on(options, given.postgresql()) as (stack, _):
        caller = Caller(stack)
        ids = [DeviceId(f"deadlines-{number}") for number in range(devices + SPARE)]
        for id in ids:
            caller.create_device(id)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(_measure(stack, ids[SPARE:], ids[:SPARE]))
        return _result(found, ledger_name(stack.settings.database))


@dataclass(slots=True)
class _Found:
    """Milliseconds. `missing` commands were never announced or are not `expired`; `again` were announced twice."""

    floor: list[float] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    announced: list[float] = field(default_factory=list)
    missing: int = 0
    again: int = 0

    @property
    def commands(self) -> int:
        return len(self.announced) + self.missing


async def _measure(stack: Stack, devices: Sequence[DeviceId], spare: Sequence[DeviceId]) -> _Found:
    async with AsyncExitStack() as cleanup:
        store = await open_store(stack.settings.database)
        cleanup.push_async_callback(store.close)
        broker = wiring.broker(stack.settings, access.WORKER)
        await broker.start()
        cleanup.push_async_callback(broker.stop)
        listener = _Listener(store.clock)
        wakes = wake_consumer(broker.consuming, listener.on_delivery)
        await wakes.start()
        cleanup.push_async_callback(wakes.stop)
        await wakes.consuming.wait()
        sender = _Sender(stack, store, broker)

        far = store.clock.now() + int(_LONG * SECOND)
        spares: list[CommandId] = []
        for device in spare:
            began = store.clock.now()
            spares += await sender.send([(device, far)] * EACH)
        each = (store.clock.now() - began) / EACH  # of the last one: the first has warmed up
        orders = [device for device in devices for _ in range(EACH)]
        first = store.clock.now() + int(each * len(orders) * MARGIN) + 5 * SECOND
        spread = int(len(orders) / RATE * SECOND)
        say(f"sending {len(orders)} commands to {len(devices)} devices that are away")
        sent = await sender.send([(device, first + random.randrange(spread)) for device in orders])  # noqa: S311
        left = (first - store.clock.now()) / SECOND
        if left < 0:
            raise RuntimeError(f"the first deadline passed {-left:.1f} s before all commands were sent")
        say(f"all are open {left:.0f} s before the first deadline; the last one is {spread / SECOND:.0f} s later")
        async with asyncio.TaskGroup() as group:
            group.create_task(listener.heard(sent, left + spread / SECOND + PATIENCE))
            floor = group.create_task(_floors(store, broker, listener, spares, left, spread / SECOND))
        return await _read(store, listener, sent, devices, floor.result())


class _Sender:
    """The gateway's own way of accepting a command and bringing it to its mailbox, without HTTP."""

    def __init__(self, stack: Stack, store: Store, broker: wiring.Broker) -> None:
        self._clock = store.clock
        self._tasks = Tasks()
        self._commands = commands(stack, store, broker, Waiters(_unread), self._tasks)
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def send(self, orders: Sequence[tuple[DeviceId, life.Micros]]) -> list[CommandId]:
        """A command for each device and deadline, all in their mailboxes when this returns."""
        sent = await asyncio.gather(*(self._send(*order) for order in orders))
        await self._tasks.drain()
        return sent

    async def _send(self, device: DeviceId, deadline: life.Micros) -> CommandId:
        async with self._turn:
            ttl = (deadline - self._clock.now()) / SECOND
            found = await self._commands.submit(Request(device, "noop", b"{}", wire.JSON, "bench", ttl=ttl))
            return CommandId(str(found["id"]))


class _Listener:
    """Notes when each command's announcement arrives, on the fabric's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._news = asyncio.Event()
        self.at: dict[CommandId, life.Micros] = {}
        self.again = 0

    async def on_delivery(self, delivery: Delivery) -> None:
        now = self._clock.now()
        id = CommandId(json.loads(delivery.message.body)["id"])
        self.again += id in self.at
        self.at.setdefault(id, now)
        self._news.set()
        await delivery.ack()

    async def heard(self, ids: Sequence[CommandId], within: float) -> None:
        """Return when all were announced, or after so many seconds."""
        try:
            async with asyncio.timeout(within):
                while not all(id in self.at for id in ids):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            say("not all were announced")


async def _floors(
    store: Store, broker: wiring.Broker, listener: _Listener, ids: Sequence[CommandId], wait: float, spread: float
) -> list[float]:
    """One floor with each command, spread over the time in which the deadlines are."""
    await asyncio.sleep(wait)
    floors = []
    for id in ids:
        floors.append(await _floor(store, broker, listener, id))
        await asyncio.sleep(spread / len(ids))
    return floors


async def _floor(store: Store, broker: wiring.Broker, listener: _Listener, id: CommandId) -> float:
    """Milliseconds from the wish to the announcement."""
    began = store.clock.now()
    await store.ledger.due(began, BATCH)
    await Recorder(store.ledger, broker.publisher).record(Change(id, life.Cancelled("bench")))
    await listener.heard([id], 10.0)
    return (listener.at[id] - began) / 1000


async def _read(
    store: Store, listener: _Listener, sent: Sequence[CommandId], devices: Sequence[DeviceId], floor: list[float]
) -> _Found:
    found = _Found(floor, again=listener.again)
    commands = {
        command.id: command for device in devices for command in await store.ledger.commands(device=device, limit=EACH)
    }
    for id in sent:
        command, at = commands[id], listener.at.get(id)
        if at is None or command.settled_at is None or command.state is not life.State.EXPIRED:
            found.missing += 1
            continue
        found.settled.append((command.settled_at - command.deadline) / 1000)
        found.announced.append((at - command.deadline) / 1000)
    return found


def _result(found: _Found, ledger: str) -> Result:
    def at(values: list[float], part: float, name: str) -> Series:
        return Series(name, "ms", (percentile(values, part),))

    floor = "one announcement, asked for"
    comparisons = [
        Comparison(
            f"{what}, {name}",
            at(values, part, what),
            at(found.floor, part, floor),
            P99 if (what, name) == ("announced", "p99") else None,
        )
        for what, values in (("settled in the ledger", found.settled), ("announced", found.announced))
        for name, part in (("p50", 0.5), ("p99", 0.99))
    ]
    return Result(
        "deadlines",
        f"Lateness of `expired`, {found.commands} commands open, ledger on {ledger}",
        [
            *comparisons,
            Comparison("announced, the latest", Series("announced", "ms", (max(found.announced),))),
            Comparison("announced twice, or not as expired", Series("", "", (found.missing + found.again,)), bar=WRONG),
        ],
    )


async def _unread(_: CommandId) -> None:
    """Nobody here looks at a command that was just sent."""
