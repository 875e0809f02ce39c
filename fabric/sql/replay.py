"""A database that was restored from a backup learns again what was taken away since.

It keeps a mark: how far it has followed the revocation log. The lines behind it are those of the last run, which it
knows, unless it was restored: then it has its backup's mark.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa

from fabric.audit import Action, By, Deed, Kind
from fabric.command import Micros
from fabric.identity.revocation_log import LogRefused, Mark, RevocationLog
from fabric.identity.revoked import (
    DeviceState,
    KeyRevoked,
    NotUnderstood,
    Revoked,
    SubjectRevoked,
    TokenRevoked,
    decode,
)
from fabric.model import Device, DomainEvent
from fabric.sql import audit, identity, keys, registry, rows, schema, tokens
from fabric.sql.engine import Database
from fabric.sql.prepared import Among, Prepared
from fabric.sql.revocations import BATCH, MARK
from fabric.sql.schema import Why

log = logging.getLogger(__name__)

T = TypeVar("T")


async def replay(database: Database, file: RevocationLog, clock: Callable[[], Micros]) -> None:
    """Take away again what the log says and the database does not know. A log is begun for a database that has none.

    Raises:
        LogRefused: the log is not as it must be; the text says what to do.
    """
    changed = await database.write_batch(lambda: _replay(database, file, clock))
    if changed:
        log.warning("revocation-log.replayed changed=%d", changed)


def _replay(database: Database, file: RevocationLog, clock: Callable[[], Micros]) -> int:
    known = database.transact(mark_of)
    changed = 0
    if known is None:
        known = file.begin()
        database.transact(partial(_keep, mark=known))
    for batch in _batches(file.read(known)):
        changed += database.transact(partial(_apply, file=file, batch=batch, now=clock()))
    return changed


def _apply(connection: sa.Connection, file: RevocationLog, batch: Sequence[tuple[Mark, bytes]], now: Micros) -> int:
    """How many lines it did not know."""
    lines = [_read(file, mark, line) for mark, line in batch]
    done = [
        *_devices(connection, [line for line in lines if isinstance(line, DeviceState)]),
        *_keys(connection, [line for line in lines if isinstance(line, KeyRevoked)]),
        *_tokens(connection, [line for line in lines if isinstance(line, TokenRevoked | SubjectRevoked)]),
    ]
    for deed in done:
        audit.record(connection, By(Kind.FABRIC), replace(deed, detail={**deed.detail, "replayed": True}), now)
    _keep(connection, batch[-1][0])
    return len(done)


def _devices(connection: sa.Connection, states: Sequence[DeviceState]) -> Iterator[Deed]:
    if not states:
        return
    ids = sorted({state.device for state in states})
    places = {id: (generation, version) for id, generation, version in _PLACES(connection, ids)}
    last: dict[str, int] = dict(_GENERATIONS(connection, ids))
    behind = [state for state in states if last.get(state.device, 0) < state.generation]
    if behind:
        _COUNT[connection.dialect.name].run(
            connection, [{"device": state.device, "last": state.generation} for state in behind]
        )
    for state in states:
        if places.get(state.device, state.place) < state.place:
            row = connection.execute(registry.LOCK_DEVICE, {"of": state.device}).first()
            if row is not None and (row.generation, row.version) < state.place:
                yield Deed(_left(connection, rows.device(row), state), state.device, {"generation": state.generation})


def _left(connection: sa.Connection, known: Device, state: DeviceState) -> Action:
    """Leave a locked device as it was left; what that was."""
    if state.deleted:
        registry.remove(connection, known, state.at)
        return Action.DEVICE_DELETED
    changed = replace(known, version=state.version, enabled=state.enabled)
    if known.generation == state.generation or known.enabled != state.enabled:
        registry.put(connection, known, changed, state.at)
    if known.generation == state.generation:
        return Action.DEVICE_RESUMED if state.enabled else Action.DEVICE_SUSPENDED
    connection.execute(identity.DROP_KEYS, {"of": known.id})
    connection.execute(identity.VOID_CODES, {"of": known.id})
    renewed = replace(changed, generation=state.generation, next_seq=1)
    registry.renew(connection, renewed, state.at, Why.REVOKED, enrolled_at=None)
    detail = {"generation": state.generation}
    registry.record(connection, DomainEvent("device.revoked", known.id, state.at, detail), state.version)
    return Action.DEVICE_REVOKED


def _keys(connection: sa.Connection, lines: Sequence[KeyRevoked]) -> Iterator[Deed]:
    there = {kid for (kid,) in _KIDS(connection, [line.kid for line in lines])} if lines else set()
    for line in lines:
        if line.kid not in there:
            continue
        device = connection.execute(registry.LOCK_DEVICE, {"of": line.device}).first()
        key = connection.execute(_KEY, {"of": line.device, "key": line.kid}).first()
        if device is None or key is None or key.created_at > line.at:
            continue
        if not line.retired:
            dropped = registry.drop_keys(connection, rows.device(device), line.kid, line.at)
            yield Deed(Action.KEY_REVOKED, line.device, {"kid": line.kid, "with": dropped[1:]})
        elif key.retired_at is None:
            connection.execute(keys.RETIRE, {"of": line.device, "key": line.kid, "now": line.at})
            registry.close_connections(connection, line.device, Why.KEY_RETIRED)
            registry.record(
                connection, DomainEvent("device.key-retired", line.device, line.at, {"kid": line.kid}), device.version
            )
            yield Deed(Action.KEY_RETIRED, line.device, {"kid": line.kid})


def _tokens(connection: sa.Connection, lines: Sequence[TokenRevoked | SubjectRevoked]) -> Iterator[Deed]:
    named = [line.jti for line in lines if isinstance(line, TokenRevoked)]
    alive = {jti for (jti,) in _ALIVE(connection, named)} if named else set()
    for line in lines:
        if isinstance(line, SubjectRevoked):
            revoked, deed = tokens.revoke_subject(connection, line.subject, line.at)
            if revoked.count:
                yield deed
        elif line.jti in alive and (done := tokens.revoke(connection, line.jti, line.at)[1]) is not None:
            yield done


def _batches(found: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(islice(found, BATCH)):
        yield batch


def _read(file: RevocationLog, mark: Mark, line: bytes) -> Revoked:
    try:
        return decode(line)
    except NotUnderstood as error:
        raise LogRefused(
            f"The line of the revocation log {file.path} that ends at byte {mark.offset} is not understood: {error}. "
            "A newer version has written it: run that one."
        ) from error


def mark_of(connection: sa.Connection) -> Mark | None:
    """How far the database has followed the revocation log; None: it knows of none."""
    kept = connection.execute(_MARK, {"name": MARK}).scalar()
    if kept is None:
        return None
    id, _, offset = kept.partition(" ")
    return Mark(id, int(offset))


def _keep(connection: sa.Connection, mark: Mark) -> None:
    connection.execute(_KEEP[connection.dialect.name], {"name": MARK, "value": f"{mark.id} {mark.offset}"})


def _keep_statement(insert: Callable[..., Any]) -> Any:  # the two dialects' inserts have no common type
    new = insert(schema.meta)
    return new.on_conflict_do_update(index_elements=["name"], set_={"value": new.excluded.value})


def _count(insert: Callable[..., Any]) -> Prepared:
    """Generations only go up."""
    new = insert(schema.generations)
    last = schema.generations.c.last
    return Prepared(
        new.on_conflict_do_update(
            index_elements=["device"], set_={"last": new.excluded.last}, where=last < new.excluded.last
        )
    )


_device_keys = schema.device_keys.c
_MARK = sa.select(schema.meta.c.value).where(schema.meta.c.name == sa.bindparam("name"))
_KEEP = {name: _keep_statement(insert) for name, insert in identity.INSERTS.items()}
_COUNT = {name: _count(insert) for name, insert in identity.INSERTS.items()}
_PLACES = Among(
    sa.select(schema.devices.c.id, schema.devices.c.generation, schema.devices.c.version), schema.devices.c.id
)
_GENERATIONS = Among(sa.select(schema.generations.c.device, schema.generations.c.last), schema.generations.c.device)
_KIDS = Among(sa.select(_device_keys.kid), _device_keys.kid)
_KEY = sa.select(_device_keys.created_at, _device_keys.retired_at).where(
    _device_keys.device == sa.bindparam("of"), _device_keys.kid == sa.bindparam("key")
)
_ALIVE = Among(sa.select(schema.tokens.c.jti).where(schema.tokens.c.revoked_at.is_(None)), schema.tokens.c.jti)
