"""One batch of writes, folded in memory and saved with a constant number of statements.

`Fold` holds the locked rows; what happens to a command is `fabric.command.step`, here as everywhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from fabric.command import Command, Event, Micros, Step, accept, step
from fabric.errors import Conflict, FabricError, NotFound
from fabric.model import Accept, Accepted, Change, Changed, Dropped, Result, TimelineRow, Write
from fabric.sql import rows, schema
from fabric.sql.prepared import Prepared, Row, among
from topology.names import CommandId, DeviceId

UNKNOWN_COMMAND: Final = "unknown-command"
OTHER_DEVICE: Final = "another-device"
OTHER_GENERATION: Final = "another-generation"


class Stale(Exception):
    """A row changed between reading and writing, in spite of its lock: read again."""


@dataclass(slots=True)
class _Held:
    """A command in the batch: `stored` is its version in the database, None when it is new."""

    command: Command
    stored: int | None
    device_generation: int | None


@dataclass(slots=True)
class _Counter:
    generation: int
    next_seq: int
    stored: int


class Fold:
    """The commands and devices of a batch, locked.

    Args:
        connection: in a transaction.
        clock: read once the rows are locked: what is in them was said before.
        jitter: gives numbers from 0 to 1, for the back-off of retries.
    """

    def __init__(self, connection: sa.Connection, clock: Callable[[], Micros], jitter: Callable[[], float]) -> None:
        self._connection, self._clock, self._jitter = connection, clock, jitter
        self._now = clock()
        self._held: dict[CommandId, _Held] = {}
        self._counters: dict[DeviceId, _Counter] = {}
        self._events: list[rows.Row] = []

    def load(self, devices: Iterable[DeviceId], commands: Iterable[CommandId]) -> None:
        """Lock and read, devices before commands, each in the order of their ids."""
        if wanted := sorted(set(devices)):
            for id, generation, next_seq in _LOCK_DEVICES(self._connection, wanted):
                self._counters[id] = _Counter(generation, next_seq, next_seq)
        if ids := sorted(set(commands)):
            self.take(_LOCK_COMMANDS(self._connection, ids))
        self._now = self._clock()

    def count(self, device: DeviceId, generation: int, many: int) -> bool:
        """`load` for commands of one device that are new: in one statement, its row locked, as many numbers are
        taken. False when there is no such device of that generation."""
        found = _TAKE_NUMBERS.first(self._connection, {"of": device, "is": generation, "many": many})
        if found is None:
            return False
        (taken,) = found
        self._counters[device] = _Counter(generation, taken - many, taken)
        self._now = self._clock()
        return True

    def take(self, found: Iterable[Row]) -> None:
        """Hold these rows: `rows.COMMAND_COLUMNS` and the device's generation."""
        for row in found:
            command = rows.command(row)
            self._held[command.id] = _Held(command, command.version, row[-1])

    def apply(self, writes: Sequence[Write]) -> list[Result] | FabricError:
        """All of these, or, when a command among them can't be accepted, none: then the error that says why."""
        for write in writes:
            if isinstance(write, Accept) and (error := self._refusal(write.command)) is not None:
                return error
        return [self._accept(write.command) if isinstance(write, Accept) else self._change(write) for write in writes]

    def step(self, id: CommandId, event: Event) -> Step:
        """Step a command that is held."""
        held = self._held[id]
        done = step(held.command, event, self._now, jitter=self._jitter())
        held.command = done.command
        if done.entry is not None:
            self._events.append(rows.entry_event(done.entry, done.command))
        return done

    def save(self) -> list[Command]:
        """Write everything; returns the rows written.

        Raises:
            Stale: a row was not as it was read.
        """
        counters = [
            {"of": id, "next_seq": counter.next_seq}
            for id, counter in sorted(self._counters.items())
            if counter.next_seq != counter.stored
        ]
        fresh = [held.command for held in self._held.values() if held.stored is None]
        changed = [held for held in self._held.values() if held.stored not in (None, held.command.version)]
        if counters:
            _COUNT.run(self._connection, counters)
        if fresh:
            _INSERT_COMMANDS.run(self._connection, [rows.new_command(command) for command in fresh])
        if changed:
            updates = [
                {"of": held.command.id, "stored": held.stored, **rows.command_state(held.command)} for held in changed
            ]
            if _UPDATE_COMMANDS.run(self._connection, updates) != len(updates):
                raise Stale
        if self._events:
            INSERT_EVENTS.run(self._connection, self._events)
        return fresh + [held.command for held in changed]

    def told(self, results: Sequence[Result]) -> list[Result]:
        """The results, those of changes that settled a command with its timeline. To be called after `save`."""
        settled = sorted(
            {result.step.command.id for result in results if isinstance(result, Changed) and result.step.settled}
        )
        if not settled:
            return list(results)
        timelines: dict[CommandId, list[TimelineRow]] = {id: [] for id in settled}
        for id, *row in _TIMELINES(self._connection, settled):
            timelines[id].append(rows.timeline_row(row))
        return [
            replace(result, timeline=tuple(timelines[result.step.command.id]))
            if isinstance(result, Changed) and result.step.settled
            else result
            for result in results
        ]

    def _refusal(self, command: Command) -> FabricError | None:
        held = self._held.get(command.id)
        if held is not None:
            # The same one again: a retry of a write whose fate was unknown.
            known = _identity(held.command) == _identity(command)
            return None if known else Conflict(f"there is another command {command.id}")
        counter = self._counters.get(command.device)
        if counter is None:
            return NotFound(f"there is no device {command.device}")
        if counter.generation != command.generation:
            return Conflict(f"{command.device} is of generation {counter.generation}, not {command.generation}")
        return None

    def _accept(self, command: Command) -> Accepted:
        held = self._held.get(command.id)
        if held is not None:
            return Accepted(held.command)
        counter = self._counters[command.device]
        accepted, entry = accept(replace(command, seq=counter.next_seq))
        counter.next_seq += 1
        self._held[accepted.id] = _Held(accepted, None, counter.generation)
        self._events.append(rows.entry_event(entry, accepted))
        return Accepted(accepted)

    def _change(self, change: Change) -> Changed | Dropped:
        held = self._held.get(change.command)
        if held is None:
            return Dropped(UNKNOWN_COMMAND)
        if change.device is not None:
            if held.command.device != change.device:
                return Dropped(OTHER_DEVICE)
            if held.command.generation != held.device_generation:
                return Dropped(OTHER_GENERATION)
        return Changed(self.step(change.command, change.event))


def are_stored(connection: sa.Connection, written: Sequence[Command]) -> bool:
    """Are these exact rows in the database? For a commit whose fate is unknown."""
    if not written:
        return True
    found = map(rows.command, _LOCK_COMMANDS(connection, sorted(command.id for command in written)))
    stored = {command.id: rows.new_command(command) for command in found}
    return all(stored.get(command.id) == rows.new_command(command) for command in written)


def _identity(command: Command) -> tuple[object, ...]:
    return (command.device, command.generation, command.name, command.body, command.content_type, command.issuer)


_LOCK_DEVICES = among(
    sa.select(schema.devices.c.id, schema.devices.c.generation, schema.devices.c.next_seq)
    .order_by(schema.devices.c.id)
    .with_for_update(),
    schema.devices.c.id,
)
LOCK_COMMANDS: Final = (
    sa.select(*rows.COMMAND_COLUMNS, schema.devices.c.generation.label("device_generation"))
    .select_from(schema.commands.outerjoin(schema.devices, schema.devices.c.id == schema.commands.c.device))
    .order_by(schema.commands.c.id)
    .with_for_update(of=schema.commands)
)
_LOCK_COMMANDS = among(LOCK_COMMANDS, schema.commands.c.id)
_TIMELINES = among(
    sa.select(schema.events.c.command, *rows.TIMELINE_COLUMNS).order_by(schema.events.c.id), schema.events.c.command
)
_COUNT = Prepared(sa.update(schema.devices).where(schema.devices.c.id == sa.bindparam("of")))
_TAKE_NUMBERS = Prepared(
    sa.update(schema.devices)
    .where(schema.devices.c.id == sa.bindparam("of"), schema.devices.c.generation == sa.bindparam("is"))
    .values(next_seq=schema.devices.c.next_seq + sa.bindparam("many"))
    .returning(schema.devices.c.next_seq)
)
_INSERT_COMMANDS = Prepared(sa.insert(schema.commands).inline())
_UPDATE_COMMANDS = Prepared(
    sa.update(schema.commands).where(
        schema.commands.c.id == sa.bindparam("of"), schema.commands.c.version == sa.bindparam("stored")
    )
)
INSERT_EVENTS = Prepared(sa.insert(schema.events).inline())  # nobody asks for the id
