"""One batch of writes, folded in memory and saved with a constant number of statements.

`Fold` holds the locked rows; what happens to a command is `fabric.command.step`, here as everywhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from fabric.command import Command, Event, Micros, Step, accept, step
from fabric.errors import Conflict, FabricError, NotFound
from fabric.model import Accept, Accepted, Change, Changed, Dropped, Result, TimelineRow, Write
from fabric.sql import rows, schema
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
            for row in _among(self._connection, _LOCK_DEVICES, wanted):
                self._counters[row.id] = _Counter(row.generation, row.next_seq, row.next_seq)
        if ids := sorted(set(commands)):
            self.take(_among(self._connection, _LOCK_COMMANDS, ids))
        self._now = self._clock()

    def count(self, device: DeviceId, generation: int, many: int) -> bool:
        """`load` for commands of one device that are new: in one statement, its row locked, as many numbers are
        taken. False when there is no such device of that generation."""
        taken = self._connection.execute(_TAKE_NUMBERS, {"of": device, "is": generation, "many": many}).scalar()
        if taken is None:
            return False
        self._counters[device] = _Counter(generation, taken - many, taken)
        self._now = self._clock()
        return True

    def take(self, found: Iterable["sa.Row[Any]"]) -> None:
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
        execute = self._connection.execute
        counters = [
            {"of": id, "next_seq": counter.next_seq}
            for id, counter in sorted(self._counters.items())
            if counter.next_seq != counter.stored
        ]
        fresh = [held.command for held in self._held.values() if held.stored is None]
        changed = [held for held in self._held.values() if held.stored not in (None, held.command.version)]
        if counters:
            execute(_COUNT, _one_or_many(counters))
        if fresh:
            execute(_INSERT_COMMANDS, _one_or_many([rows.new_command(command) for command in fresh]))
        if changed:
            updates = [
                {"of": held.command.id, "stored": held.stored, **rows.command_state(held.command)} for held in changed
            ]
            if execute(_UPDATE_COMMANDS, _one_or_many(updates)).rowcount != len(updates):
                raise Stale
        if self._events:
            execute(INSERT_EVENTS, _one_or_many(self._events))
        return fresh + [held.command for held in changed]

    def told(self, results: Sequence[Result]) -> list[Result]:
        """The results, those of changes that settled a command with its timeline. To be called after `save`."""
        settled = sorted(
            {result.step.command.id for result in results if isinstance(result, Changed) and result.step.settled}
        )
        if not settled:
            return list(results)
        timelines: dict[CommandId, list[TimelineRow]] = {id: [] for id in settled}
        for row in _among(self._connection, _TIMELINES, settled):
            timelines[row.command].append(rows.timeline_row(row))
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


def padded(ids: Sequence[str]) -> list[str]:
    """The ids, the last one repeated up to a power of two, so that only a few statements are ever prepared."""
    return [*ids, *[ids[-1]] * ((1 << (len(ids) - 1).bit_length()) - len(ids))]


def are_stored(connection: sa.Connection, written: Sequence[Command]) -> bool:
    """Are these exact rows in the database? For a commit whose fate is unknown."""
    if not written:
        return True
    found = _among(connection, _LOCK_COMMANDS, sorted(command.id for command in written))
    stored = {row.id: rows.new_command(rows.command(row)) for row in found}
    return all(stored.get(command.id) == rows.new_command(command) for command in written)


def _among(connection: sa.Connection, one_and_many: tuple[sa.Select[Any], sa.Select[Any]], ids: Sequence[str]) -> Any:
    """A list of ids is expanded into the statement each time; a single one is spared that."""
    one, many = one_and_many
    return connection.execute(one, {"of": ids[0]}) if len(ids) == 1 else connection.execute(many, {"ids": padded(ids)})


def _one_and_many(query: sa.Select[Any], id: "sa.Column[Any]") -> tuple[sa.Select[Any], sa.Select[Any]]:
    return query.where(id == sa.bindparam("of")), query.where(id.in_(sa.bindparam("ids", expanding=True)))


def _identity(command: Command) -> tuple[object, ...]:
    return (command.device, command.generation, command.name, command.body, command.content_type, command.issuer)


def _one_or_many(parameters: list[rows.Row]) -> Any:
    """A single row goes without executemany, which would cost a round trip."""
    return parameters[0] if len(parameters) == 1 else parameters


_LOCK_DEVICES = _one_and_many(
    sa.select(schema.devices.c.id, schema.devices.c.generation, schema.devices.c.next_seq)
    .order_by(schema.devices.c.id)
    .with_for_update(),
    schema.devices.c.id,
)
LOCK_COMMANDS: Final[sa.Select[Any]] = (
    sa.select(*rows.COMMAND_COLUMNS, schema.devices.c.generation.label("device_generation"))
    .select_from(schema.commands.outerjoin(schema.devices, schema.devices.c.id == schema.commands.c.device))
    .order_by(schema.commands.c.id)
    .with_for_update(of=schema.commands)
)
_LOCK_COMMANDS = _one_and_many(LOCK_COMMANDS, schema.commands.c.id)
_TIMELINES = _one_and_many(sa.select(schema.events).order_by(schema.events.c.id), schema.events.c.command)
_COUNT = sa.update(schema.devices).where(schema.devices.c.id == sa.bindparam("of"))
_TAKE_NUMBERS = (
    sa.update(schema.devices)
    .where(schema.devices.c.id == sa.bindparam("of"), schema.devices.c.generation == sa.bindparam("is"))
    .values(next_seq=schema.devices.c.next_seq + sa.bindparam("many"))
    .returning(schema.devices.c.next_seq)
)
_INSERT_COMMANDS = sa.insert(schema.commands)
_UPDATE_COMMANDS = sa.update(schema.commands).where(
    schema.commands.c.id == sa.bindparam("of"), schema.commands.c.version == sa.bindparam("stored")
)
INSERT_EVENTS = sa.insert(schema.events).inline()  # nobody asks for the id
