"""How long a command and its answer take, one at a time, over what people would pick instead, and what each gives.

Every peer has a back end and a device, two processes of their own, the back end connected in the clear and the device
over TLS, with the stack's certificate. The device answers with the number of commands it has had; that must be the
number of those sent. They take turns with the floor, a bare AMQP round trip on the stack's broker, and with a command
over HTTP with `Prefer: wait`, to a real agent, its ledger on PostgreSQL.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from api.operator.stack import Stack
from bench.caller import Caller
from bench.device import Agent
from bench.floor import Floor
from bench.peers.packages import NotHereError
from bench.results import Bar, Comparison, Result, Series, Table
from bench.run import Budget, Options, databases, percentile, rounds, say, stack_on

BARS: tuple[Bar, ...] = ()  # the bars of a command's round trip are those of `roundtrip`
BUDGET = Budget(quick=35.0, full=115.0)

_DEVICE = "messaging-1"
_FLOOR, _OURS = "bare AMQP", "Restante over HTTP"
_WARM_UP = 0.3  # seconds of each that don't count
_STOPPING = 12.0  # seconds for all of them
_PARTS = (("p50", 0.5), ("p99", 0.99))


Round = Callable[[float], list[float]]
"""Send for so many seconds: the milliseconds of each command."""


class Subject(Protocol):
    """A command's way to a device and back."""

    def round_trip(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Gives:
    """What a command sent this way has, in words."""

    lasts: str
    outcome: str
    expires: str
    issuer: str


_LISTENING = "no: the answer goes to whoever still listens"
_GIVES = {
    _FLOOR: Gives(
        "yes: a durable queue, confirmed",
        _LISTENING,
        "if the sender asks for it; a dead letter, if set up",
        "the sender's account, if it states it",
    ),
    "Mosquitto, defaults": Gives(
        "in memory for a known session; on disk every 30 minutes",
        "no: the answer is a message like any other",
        "in MQTT 5, if the sender asks for it; nobody is told",
        "no",
    ),
    "NATS request–reply": Gives("no: who is away gets nothing", _LISTENING, "no", "no"),
    "RabbitMQ MQTT, no delay": Gives(
        "yes: a durable queue for a known session, confirmed",
        "no: the answer is a message like any other",
        "in MQTT 5, if the sender asks for it; a dead letter, if set up",
        "no",
    ),
    _OURS: Gives(
        "yes: committed in the ledger before it is published, confirmed by the broker, published again if lost",
        "yes: each state with time and evidence; readable for 30 days, and told as an event",
        "yes: at a deadline, announced and recorded",
        "yes: the caller's identity, signed into the command and checked by the device",
    ),
}
_GIVES["Mosquitto, no delay"] = _GIVES["Mosquitto, defaults"]


def run(options: Options) -> Result:
    slice_ = 0.4 if options.quick else 1.2  # seconds that each has in a round
    with ExitStack() as cleanup:
        given = cleanup.enter_context(databases(options))
        stack, root = cleanup.enter_context(stack_on(options, given.postgresql()))
        subjects, notes = _subjects(stack, root, cleanup)
        for measured in subjects.values():
            measured(_WARM_UP)
        taken: dict[str, list[list[float]]] = {name: [] for name in subjects}
        for number in rounds(3 if options.quick else 9, options.left - _STOPPING):
            for name, measured in subjects.items():
                taken[name].append(measured(slice_))
            said = ", ".join(f"{name} {percentile(taken[name][-1], 0.5):.2f}" for name in subjects)
            say(f"round {number}, p50 in ms: {said}")
    return _result(taken, notes)


def _subjects(stack: Stack, root: Path, cleanup: ExitStack) -> tuple[dict[str, Round], list[str]]:
    """All that can be run here, and of each that can't, why."""
    agent = Agent(root / "device", stack, Caller(stack).create_device(_DEVICE))
    cleanup.callback(agent.stop)
    floor = Floor(stack)
    cleanup.callback(floor.stop)
    found: dict[str, Round] = {_FLOOR: partial(_round, floor.round_trip)}
    notes = []
    for name, start in _peers(stack, root).items():
        try:
            peer = start(cleanup)
        except NotHereError as why:
            say(f"{name}: {why}")
            notes.append(f"{name}: {why}")
            continue
        found[name] = partial(_round, peer.round_trip)
    found[_OURS] = partial(_round_of_ours, stack)
    return found, notes


def _peers(stack: Stack, root: Path) -> Mapping[str, Callable[[ExitStack], Subject]]:
    certificate, authority = stack.files.broker_certificate, stack.files.authority

    def mosquitto(no_delay: bool, cleanup: ExitStack) -> Subject:
        _need("paho", "paho-mqtt")
        from bench.peers.mosquitto import Mosquitto
        from bench.peers.mqtt import MqttCommands

        name = "no-delay" if no_delay else "defaults"
        home = root / f"mosquitto-{name}"
        server = Mosquitto(home, certificate, authority, no_delay=no_delay)
        cleanup.callback(server.stop)
        commands = MqttCommands(server.place, home, name, no_delay=no_delay)
        cleanup.callback(commands.stop)
        return commands

    def nats(cleanup: ExitStack) -> Subject:
        _need("nats", "nats-py")
        from bench.peers.nats_server import Nats

        peer = Nats(root / "nats", certificate, authority)
        cleanup.callback(peer.stop)
        return peer

    def rabbit(cleanup: ExitStack) -> Subject:
        _need("paho", "paho-mqtt")
        from bench.peers.mqtt import MqttCommands
        from bench.peers.rabbit import RabbitMqtt

        home = root / "rabbit-mqtt"
        home.mkdir(mode=0o700)
        server = RabbitMqtt(home / "node", stack)
        cleanup.callback(server.stop)
        commands = MqttCommands(server.place, home, "rabbit", no_delay=True)
        cleanup.callback(commands.stop)
        return commands

    return {
        "Mosquitto, defaults": partial(mosquitto, False),
        "Mosquitto, no delay": partial(mosquitto, True),
        "NATS request–reply": nats,
        "RabbitMQ MQTT, no delay": rabbit,
    }


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise NotHereError(f"not run: the Python package {package} is not installed")


def _round(call: Callable[[], None], seconds: float) -> list[float]:
    """Milliseconds of each call; ten at least."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 10 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _round_of_ours(stack: Stack, seconds: float) -> list[float]:
    """Over a connection of its own: the gateway has closed that of the round before, idle since then."""
    caller = Caller(stack)
    caller.command(_DEVICE)
    return _round(partial(caller.command, _DEVICE), seconds)


def _result(taken: Mapping[str, list[list[float]]], notes: list[str]) -> Result:
    def series(name: str, part: float) -> Series:
        return Series(name, "ms", tuple(percentile(each, part) for each in taken[name]))

    return Result(
        "messaging",
        "Round trip of one command, beside what people would pick instead",
        [
            Comparison(f"{name}, {part}", series(name, share), series(_FLOOR, share))
            for part, share in _PARTS
            for name in taken
            if name != _FLOOR
        ],
        [
            Table(
                "One command at a time, and what it has",
                ("sent over", "commands", "p50, ms", "p99, ms", "lasts", "outcome recorded", "expires", "issuer known"),
                tuple(_row(name, taken[name]) for name in taken),
            )
        ],
        notes=[*notes, "p99 of all commands in the table, of each round in the comparisons"],
    )


def _row(name: str, found: list[list[float]]) -> tuple[str | float, ...]:
    values = [each for round_ in found for each in round_]
    gives = _GIVES[name]
    p50, p99 = (round(percentile(values, part), 2) for _, part in _PARTS)
    return name, len(values), p50, p99, gives.lasts, gives.outcome, gives.expires, gives.issuer
