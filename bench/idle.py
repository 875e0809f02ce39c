"""What a device costs that is connected and does nothing: memory and CPU of broker, gateway, worker and database, with
more and more devices, and of a real agent.

The devices are simulated (`bench.devices`): each has a TLS connection with two channels, consumes its mailbox, sends a
heartbeat every 15 s and says hello once a minute. Memory is `Pss` and the private pages of all processes of a part,
from `/proc/PID/smaps_rollup`; a further device costs what a part grows by between the first and the last number of
devices.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from api.operator.stack import Stack
from bench import processes, registering
from bench.caller import Caller
from bench.device import Agent
from bench.devices import Fleet, Load
from bench.processes import Usage
from bench.results import Bar, Comparison, Curve, Result, Series, Table
from bench.run import Budget, Options, databases, say, stack_on
from topology.names import DeviceId

GATEWAY = Bar("gateway memory for each further device", 2.0, at_most=True, unit="KB")
BARS = (GATEWAY,)
BUDGET = Budget(quick=22.0, full=240.0)

_QUICK, _FULL = (100, 1_000), (100, 1_000, 10_000)
_WATCHED = {True: 4.0, False: 30.0}  # seconds of idling that are watched: quick, and in full
_QUIET = 0.15  # of a core, in all: what there is to do after so many connects is done then
_SETTLING = {True: 5.0, False: 20.0}  # seconds that this may take
_RESERVE = {True: 6.0, False: 25.0}  # seconds of the budget for a stage beside its connects and what is watched
_CONNECTING = 900.0  # seconds, at most
_FEWEST = 100  # devices of a stage
_PROCESSES = 2  # of simulated devices
_AGENT = DeviceId("bench-agent")


@dataclass(frozen=True, slots=True)
class Stage:
    """With so many devices connected: the memory of each part, and its CPU seconds a second while they idled."""

    devices: int
    memory: Mapping[str, Usage]
    cpu: Mapping[str, float]


def run(options: Options) -> Result:
    with databases(options) as given, stack_on(options, given.postgresql()) as (stack, root):
        others = set(processes.tree(os.getpid()))
        agent = Agent(root / "agent", stack, Caller(stack).create_device(_AGENT))
        try:
            parts = {**processes.parts(stack), "agent": sorted(set(processes.tree(os.getpid())) - others)}
            stages = list(_stages(options, stack, root, parts))
        finally:
            agent.stop()
    return _result(stages, (_QUICK if options.quick else _FULL)[-1])


def _stages(options: Options, stack: Stack, root: Path, parts: Mapping[str, Sequence[int]]) -> Iterator[Stage]:
    connected, rate, watched = 0, 0.0, _WATCHED[options.quick]
    with ExitStack() as fleets:
        for wanted in _QUICK if options.quick else _FULL:
            count = wanted - connected
            if connected:  # on a slow machine, as many as there is time for
                count = min(count, int((options.left - watched - _RESERVE[options.quick]) * rate))
                if count < _FEWEST and connected > _QUICK[0]:
                    return
                count = max(count, _FEWEST)
            began = time.monotonic()
            fleets.enter_context(_more(stack, root, f"idle-{wanted}", count))
            rate = count / (time.monotonic() - began)
            connected += count
            say(f"{connected} devices are connected, the last {count} at {rate:.0f} a second")
            _settle(parts, _SETTLING[options.quick])
            before, began = {name: processes.cpu(pids) for name, pids in parts.items()}, time.monotonic()
            time.sleep(watched)
            seconds = time.monotonic() - began
            cpu = {name: (processes.cpu(pids) - before[name]) / seconds for name, pids in parts.items()}
            yield Stage(connected, {name: processes.usage(pids) for name, pids in parts.items()}, cpu)


@contextmanager
def _more(stack: Stack, root: Path, prefix: str, count: int) -> Iterator[None]:
    """So many more devices are connected meanwhile."""
    token = stack.files.operator_token.read_text().strip()
    made = registering.enrolled_on(stack.settings, stack.files.authority, token, prefix, count, lambda _: None)
    with Fleet(asyncio.run(made), Load(), processes=_PROCESSES, log=root / "devices.log") as fleet:
        try:
            fleet.wait_connected(within=_CONNECTING)
            yield
        finally:
            fleet.kill()  # thousands of goodbyes would take their time


def _settle(parts: Mapping[str, Sequence[int]], seconds: float) -> None:
    """Return when the parts have little to do, or after a while."""
    pids = [pid for each in parts.values() for pid in each]
    until, before = time.monotonic() + seconds, processes.cpu(pids)
    while time.monotonic() < until:
        time.sleep(1.0)
        now = processes.cpu(pids)
        if now - before < _QUIET:
            return
        before = now


def _result(stages: Sequence[Stage], wanted: int) -> Result:
    first, last = stages[0], stages[-1]
    further = last.devices - first.devices
    names = [name for name in first.memory if name != "agent"]
    kilobytes = {name: (last.memory[name].uss - first.memory[name].uss) / further for name in names}
    micros = {name: (last.cpu[name] - first.cpu[name]) * 1e6 / further for name in names}
    notes = [
        f"A further device is counted from {first.devices} to {last.devices} connected ones, in private pages.",
        f"{last.devices} is as many as there was time for." if last.devices < wanted else "",
        f"A process may open {_files()} files here; the devices are in {_PROCESSES} processes for each stage.",
    ]
    columns = ("", *(f"{stage.devices} devices" for stage in stages), "each further one")
    memory = [
        (name, *(_megabytes(stage.memory[name].pss) for stage in stages), f"{kilobytes[name]:.1f} KB") for name in names
    ]
    cpu = [
        (name, *(f"{stage.cpu[name] * 100:.1f} %" for stage in stages), f"{micros[name]:.1f} µs/s") for name in names
    ]
    one = [
        ("proportional (Pss)", _megabytes(last.memory["agent"].pss)),
        ("private", _megabytes(last.memory["agent"].uss)),
        ("CPU", f"{last.cpu['agent'] * 100:.2f} %"),
    ]
    return Result(
        "idle",
        "Devices that idle",
        [
            Comparison(f"{name} memory for each further device", Series(name, "KB", (kilobytes[name],)), None, bar)
            for name, bar in ((name, GATEWAY if name == "gateway" else None) for name in names)
        ],
        (
            Table("Memory (Pss) with so many idle devices", columns, tuple(memory)),
            Table("CPU of one core with so many idle devices", columns, tuple(cpu)),
            Table("A real agent that idles", ("", "one process"), tuple(one)),
        ),
        [
            Curve(
                "idle",
                "Memory with idle devices",
                "devices",
                "MB",
                tuple(float(stage.devices) for stage in stages),
                {name: tuple(stage.memory[name].pss / 1024 for stage in stages) for name in names},
                logarithmic=True,
            )
        ],
        [note for note in notes if note],
    )


def _megabytes(kilobytes: int) -> str:
    return f"{kilobytes / 1024:.1f} MB"


def _files() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
