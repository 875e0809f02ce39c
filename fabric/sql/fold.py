"""One batch of writes, folded in memory and saved with a constant number of statements.

`Fold` holds the locked rows; what happens to a command is `fabric.command.step`, here as everywhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from fabric.audit import Action, By, Deed, Kind
from fabric.command import WAITING, Cancelled, Command, Event, Micros, Step, accept, step
from fabric.errors import BacklogFull, Conflict, FabricError, KeyReused, NotFound
from fabric.model import (
    AFTER_REVOCATION,
    Accept,
    Accepted,
    Change,
    Changed,
    Dropped,
    Idempotency,
    Mailbox,
    Result,
    TimelineRow,
    Write,
)
from fabric.sql import audit, mailboxes, rows, schema
from fabric.sql.prepared import Among, Prepared, Row
from topology.names import CommandId, DeviceId

UNKNOWN_COMMAND: Final = "unknown-command"
OTHER_DEVICE: Final = "another-device"
OTHER_GENERATION: Final = "another-generation"
SUPERSEDED: Final = "superseded"


class Stale(Exception):
    """A row changed between reading and writing, in spite of its lock: read again."""


@dataclass(slots=True)
class _Held:
    """A command in the batch: `stored` is its version in the database, None when it is new."""

    command: Command
    stored: int | None
    device_generation: int | None
    renewed_at: Micros | None = None


@dataclass(slots=True)
class _Recipient:
    """A device that is sent commands. `backlog` is its own limit, `box` what may be in its mailbox."""

    generation: int
    next_seq: int
    stored: int
    backlog: int | None
    box: Mailbox


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
        self._recipients: dict[DeviceId, _Recipient] = {}
        self._keys: dict[str, tuple[str, CommandId]] = {}  # what each stands for: fingerprint and command
        self._new_keys: list[rows.Row] = []
        self._events: list[rows.Row] = []
        self._audit: list[rows.Row] = []

    def load(self, new: Sequence[Accept], commands: Iterable[CommandId]) -> None:
        """Lock and read, devices before commands, each in the order of their ids."""
        ids = set(commands)
        if new:
            wanted = sorted({accept.command.device for accept in new})
            locked = _LOCK_DEVICES(self._connection, wanted)
            self._now = self._clock()
            # Read after the lock: whoever held it before has added to them.
            boxes = mailboxes.read(self._connection, wanted, self._now)
            for id, generation, next_seq, backlog in locked:
                self._recipients[id] = _Recipient(generation, next_seq, next_seq, backlog, boxes[id])
            ids |= {accept.command.id for accept in new} | self._known_keys(new) | self._superseded(new)
        if ids:
            self.take(_LOCK_COMMANDS(self._connection, sorted(ids)))
        self._now = self._clock()

    def count(self, new: Sequence[Accept]) -> bool:
        """`load` for commands of one device that are new, by two statements: as many numbers are taken, its row
        locked. False when there is no such device of that generation, or no room for all."""
        device, generation, many = new[0].command.device, new[0].command.generation, len(new)
        taking = _TAKE_NUMBERS.ask(self._connection, {"of": device, "is": generation, "many": many})
        boxes = mailboxes.ask(self._connection, [device], self._now)
        found = taking()
        if not found:
            return False
        ((taken, backlog),) = found
        self._now = self._clock()
        box = boxes()[device]
        self._recipients[device] = _Recipient(generation, taken - many, taken, backlog, box)
        return all(box.depth + many <= (backlog or accept.backlog) for accept in new)

    def take(self, found: Iterable[Row]) -> None:
        """Hold these rows: `rows.COMMAND_COLUMNS`, the device's generation, and when it followed the last one."""
        for row in found:
            command = rows.command(row)
            self._held[command.id] = _Held(command, command.version, *row[-2:])

    def apply(self, writes: Sequence[Write], by: By) -> list[Result] | FabricError:
        """All of these, or, when a command among them can't be accepted, none: then the error that says why. What
        somebody asks for goes into the audit; what the fabric does by itself is in the timeline."""
        ahead = 0
        for write in writes:
            if isinstance(write, Accept):
                if (error := self._refusal(write, ahead)) is not None:
                    return error
                ahead += 1
        return [self._accept(write, by) if isinstance(write, Accept) else self._change(write, by) for write in writes]

    def step(self, id: CommandId, event: Event) -> Step:
        """Step a command that is held."""
        held = self._held[id]
        done = step(held.command, event, self._now, jitter=self._jitter())
        held.command = done.command
        if done.entry is not None:
            self._events.append(rows.entry_event(done.entry, done.command))
        return done

    def save(self, results: Sequence[Result] = ()) -> tuple[list[Result], list[Command]]:
        """Write everything. Returns the results as they are at the end of the batch (accepted commands in their last
        state, changes that settled one with its timeline), and the commands written.

        Raises:
            Stale: a row was not as it was read.
        """
        counters = [
            {"of": id, "next_seq": recipient.next_seq}
            for id, recipient in sorted(self._recipients.items())
            if recipient.next_seq != recipient.stored
        ]
        fresh = [held.command for held in self._held.values() if held.stored is None]
        changed = [held for held in self._held.values() if held.stored not in (None, held.command.version)]
        if counters:
            _COUNT.put(self._connection, counters)
        if fresh:
            _INSERT_COMMANDS.put(self._connection, [rows.new_command(command) for command in fresh])
        updates = [
            {"of": held.command.id, "stored": held.stored, **rows.command_state(held.command)} for held in changed
        ]
        updated = _UPDATE_COMMANDS.put(self._connection, updates) if updates else int
        if self._new_keys:
            _FORGET_KEY.put(self._connection, [{"of": row["key"]} for row in self._new_keys])
            _INSERT_KEYS.put(self._connection, self._new_keys)
        if self._events:
            INSERT_EVENTS.put(self._connection, self._events)
        if self._audit:
            audit.INSERT.put(self._connection, self._audit)
        timelines = self._timelines(results)
        if updated() != len(updates):
            raise Stale
        told = [self._told(result, timelines) for result in results]
        return told, fresh + [held.command for held in changed]

    def _timelines(self, results: Sequence[Result]) -> dict[CommandId, list[TimelineRow]]:
        """Of the commands that are settled by these."""
        settled = sorted(
            {result.step.command.id for result in results if isinstance(result, Changed) and result.step.settled}
        )
        timelines: dict[CommandId, list[TimelineRow]] = {id: [] for id in settled}
        if settled:
            for id, *row in _TIMELINES(self._connection, settled):
                timelines[id].append(rows.timeline_row(row))
        return timelines

    def _told(self, result: Result, timelines: dict[CommandId, list[TimelineRow]]) -> Result:
        match result:
            case Accepted(command):
                return replace(result, command=self._held[command.id].command)
            case Changed(done) if done.settled:
                return replace(result, timeline=tuple(timelines[done.command.id]))
            case _:
                return result

    def _known_keys(self, new: Sequence[Accept]) -> set[CommandId]:
        """Read the idempotency keys of these; returns the commands that they stand for."""
        if keys := sorted({accept.idempotency.key for accept in new if accept.idempotency is not None}):
            for key, fingerprint, command in _READ_KEYS(self._connection, keys, now=self._now):
                self._keys[key] = (fingerprint, command)
        return {command for _, command in self._keys.values()}

    def _superseded(self, new: Sequence[Accept]) -> set[CommandId]:
        """The commands in the ledger that these may supersede."""
        devices = sorted({accept.command.device for accept in new if accept.command.supersedes is not None})
        return {id for (id,) in _WITH_KEY(self._connection, devices)} if devices else set()

    def _refusal(self, accept: Accept, ahead: int) -> FabricError | None:
        """Why a command is not accepted; `ahead` of it, others of its group go to the same device."""
        command = accept.command
        held = self._held.get(command.id)
        if held is not None:
            # The same one again: a retry of a write whose fate was unknown.
            known = _identity(held.command) == _identity(command)
            return None if known else Conflict(f"there is another command {command.id}")
        recipient = self._recipients.get(command.device)
        if recipient is None:
            return NotFound(f"there is no device {command.device}")
        if accept.idempotency is not None and (earlier := self._earlier(accept)) is not None:
            return None if earlier[0] == accept.idempotency.fingerprint else _reused()
        if recipient.generation != command.generation:
            return Conflict(f"{command.device} is of generation {recipient.generation}, not {command.generation}")
        limit = recipient.backlog or accept.backlog
        return _full(command.device, recipient.box, limit, self._now) if recipient.box.depth + ahead >= limit else None

    def _earlier(self, accept: Accept) -> tuple[str, CommandId] | None:
        """What its idempotency key stands for, as far as that is still in the ledger."""
        found = None if accept.idempotency is None else self._keys.get(accept.idempotency.key)
        return found if found is not None and found[1] in self._held else None

    def _accept(self, new: Accept, by: By) -> Accepted:
        held = self._held.get(new.command.id)
        if held is not None:
            return Accepted(held.command)
        if (earlier := self._earlier(new)) is not None:
            return Accepted(self._held[earlier[1]].command, repeated=True)
        superseded = self._supersede(new.command)
        recipient = self._recipients[new.command.device]
        accepted, entry = accept(replace(new.command, seq=recipient.next_seq))
        recipient.next_seq += 1
        box = recipient.box
        recipient.box = replace(
            box,
            depth=box.depth + 1,
            oldest_at=box.oldest_at or accepted.accepted_at,
            first_deadline=min(box.first_deadline or accepted.deadline, accepted.deadline),
        )
        self._held[accepted.id] = _Held(accepted, None, recipient.generation)
        self._events.append(rows.entry_event(entry, accepted))
        if new.idempotency is not None:
            self._remember(new, new.idempotency)
        self._record(by, Action.COMMAND_SENT, accepted)
        return Accepted(accepted, superseded=superseded)

    def _supersede(self, by: Command) -> tuple[Command, ...]:
        """Withdraw what waits of the same device, name and key. What was picked up meanwhile is left."""
        if by.supersedes is None:
            return ()
        waiting = sorted(
            (
                held.command
                for held in self._held.values()
                if held.command.state in WAITING
                and (held.command.device, held.command.name, held.command.supersedes)
                == (by.device, by.name, by.supersedes)
            ),
            key=lambda command: command.seq,
        )
        return tuple(self.step(command.id, Cancelled(SUPERSEDED)).command for command in waiting)

    def _remember(self, accept: Accept, idempotency: Idempotency) -> None:
        self._keys[idempotency.key] = (idempotency.fingerprint, accept.command.id)
        row = {
            "key": idempotency.key,
            "device": accept.command.device,
            "fingerprint": idempotency.fingerprint,
            "command": accept.command.id,
            "expires_at": idempotency.expires_at,
        }
        self._new_keys.append(row)

    def _change(self, change: Change, by: By) -> Changed | Dropped:
        held = self._held.get(change.command)
        if held is None:
            return Dropped(UNKNOWN_COMMAND)
        if change.device is not None:
            if held.command.device != change.device:
                return Dropped(OTHER_DEVICE)
            if (why := _outlived(held, change.said_at)) is not None:
                return Dropped(why)
        done = self.step(change.command, change.event)
        if isinstance(change.event, Cancelled) and done.settled:
            self._record(by, Action.COMMAND_CANCELLED, done.command)
        return Changed(done)

    def _record(self, by: By, action: Action, command: Command) -> None:
        if by.kind is not Kind.FABRIC:
            deed = Deed(action, command.device, {"command": command.id, "name": command.name})
            self._audit.append(audit.row(by, deed, self._now))


def _outlived(held: _Held, said_at: Micros | None) -> str | None:
    """Why a report does not count any more; None when it does."""
    if held.command.generation == held.device_generation:
        return None
    if held.renewed_at is None or said_at is None or held.command.generation + 1 != held.device_generation:
        return OTHER_GENERATION
    return None if said_at < held.renewed_at else AFTER_REVOCATION


def are_stored(connection: sa.Connection, written: Sequence[Command]) -> bool:
    """Are these exact rows in the database? For a commit whose fate is unknown."""
    if not written:
        return True
    found = map(rows.command, _LOCK_COMMANDS(connection, sorted(command.id for command in written)))
    stored = {command.id: rows.new_command(command) for command in found}
    return all(stored.get(command.id) == rows.new_command(command) for command in written)


def _identity(command: Command) -> tuple[object, ...]:
    return (command.device, command.generation, command.name, command.body, command.content_type, command.issuer)


def _reused() -> KeyReused:
    return KeyReused("the idempotency key stands for another request; use a new key for a new request")


def _full(device: DeviceId, box: Mailbox, limit: int, now: Micros) -> BacklogFull:
    gone = 0 if box.first_deadline is None else box.first_deadline - now
    age = 0 if box.oldest_at is None else now - box.oldest_at
    return BacklogFull(
        f"{box.depth} commands may be in the mailbox of {device}, and its limit is {limit}; withdrawn ones count "
        "until their deadline",
        box.depth,
        limit,
        max(age, 0) / 1_000_000,
        max(gone, 0) / 1_000_000,
    )


_LOCK_DEVICES = Among(
    sa.select(schema.devices.c.id, schema.devices.c.generation, schema.devices.c.next_seq, schema.devices.c.backlog)
    .order_by(schema.devices.c.id)
    .with_for_update(),
    schema.devices.c.id,
)
LOCK_COMMANDS: Final = (
    sa.select(
        *rows.COMMAND_COLUMNS, schema.devices.c.generation.label("device_generation"), schema.devices.c.renewed_at
    )
    .select_from(schema.commands.outerjoin(schema.devices, schema.devices.c.id == schema.commands.c.device))
    .order_by(schema.commands.c.id)
    .with_for_update(of=schema.commands)
)
_LOCK_COMMANDS = Among(LOCK_COMMANDS, schema.commands.c.id)
_TIMELINES = Among(
    sa.select(schema.events.c.command, *rows.TIMELINE_COLUMNS).order_by(schema.events.c.id), schema.events.c.command
)
_COUNT = Prepared(sa.update(schema.devices).where(schema.devices.c.id == sa.bindparam("of")))
_TAKE_NUMBERS = Prepared(
    sa.update(schema.devices)
    .where(schema.devices.c.id == sa.bindparam("of"), schema.devices.c.generation == sa.bindparam("is"))
    .values(next_seq=schema.devices.c.next_seq + sa.bindparam("many"))
    .returning(schema.devices.c.next_seq, schema.devices.c.backlog)
)
_INSERT_COMMANDS = Prepared(sa.insert(schema.commands).inline())
_UPDATE_COMMANDS = Prepared(
    sa.update(schema.commands).where(
        schema.commands.c.id == sa.bindparam("of"), schema.commands.c.version == sa.bindparam("stored")
    )
)
INSERT_EVENTS = Prepared(sa.insert(schema.events).inline())  # nobody asks for the id
_keys: Final = schema.idempotency.c
_READ_KEYS = Among(
    sa.select(_keys.key, _keys.fingerprint, _keys.command).where(_keys.expires_at > sa.bindparam("now")), _keys.key
)
# One that has expired, or whose command was pruned.
_FORGET_KEY = Prepared(sa.delete(schema.idempotency).where(_keys.key == sa.bindparam("of")))
_INSERT_KEYS = Prepared(sa.insert(schema.idempotency).inline())
_WITH_KEY = Among(
    sa.select(schema.commands.c.id).where(sa.text("supersedes IS NOT NULL AND state IN ('accepted', 'queued')")),
    schema.commands.c.device,
)
