"""The port `Registry` on SQL: devices, their keys and codes, tokens, closures.

Whatever changes a device locks its row first, then its open commands in the order of their ids.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fabric.audit import Action, Deed, acting
from fabric.command import PICKED_UP, WAITING, Cancelled, Command, DeviceDeleted, Micros
from fabric.errors import Conflict, FabricError, NotFound, PreconditionFailed, Unauthenticated
from fabric.identity.revoked import DeviceState, KeyRevoked, SubjectRevoked, TokenRevoked
from fabric.model import Device, DeviceKey, DomainEvent, EnrollmentCode, IssuedToken, Mailbox, RevokedTokens
from fabric.sql import audit, identity, keys, mailboxes, rows, schema, tokens
from fabric.sql.engine import Database
from fabric.sql.fold import INSERT_EVENTS, LOCK_COMMANDS, Fold
from fabric.sql.greetings import Greetings
from fabric.sql.prepared import Among
from fabric.sql.revocations import SqlRevocations, note
from fabric.sql.schema import Why
from topology.names import DeviceId

# Whoever is told that one of these is done may rely on it after a backup was restored.
_LASTING: Final = frozenset(
    {
        Action.DEVICE_SUSPENDED, Action.DEVICE_RESUMED, Action.DEVICE_REVOKED, Action.DEVICE_DELETED,
        Action.KEY_RETIRED, Action.KEY_REVOKED, Action.TOKEN_REVOKED, Action.SUBJECT_REVOKED,
    }
)  # fmt: skip

T = TypeVar("T")

_devices = schema.devices.c


class SqlRegistry:
    """Devices, keys, codes and tokens of one fabric.

    What it does to a device is recorded as an event in the same transaction: `device.created`, `.updated`,
    `.suspended`, `.resumed`, `.enrolled`, `.revoked`, `.deleted`, `.key-added`, `.key-retired`, `.key-revoked`,
    and `enrollment.contested`. And whoever asks for it is recorded in the audit, once, with what they did: whatever
    somebody can ask for goes through `_do`. What takes rights away is in the revocation log when the call returns;
    `NotLogged` says that it is done, and not there yet.

    Args:
        clock: the time in microseconds on the database's clock, for calls that are not told it.
    """

    def __init__(self, database: Database, clock: Callable[[], Micros], revocations: SqlRevocations) -> None:
        self._database, self._clock, self._revocations = database, clock, revocations
        self._greetings = Greetings(database)

    def start(self) -> None:
        self._greetings.start()

    async def close(self) -> None:
        """Answer who waits; the database is closed by whoever opened it. Closing twice is closing once."""
        await self._greetings.stop()

    # ---- Devices ---------------------------------------------------------------------------------------

    async def create_device(self, device: Device, code: EnrollmentCode) -> Device:
        def create(connection: sa.Connection) -> tuple[Device, Deed]:
            try:
                generation = connection.execute(_next_generation(connection), {"of": device.id}).scalar_one()
                created = replace(device, generation=generation, version=1, next_seq=1)
                connection.execute(sa.insert(schema.devices), rows.new_device(created))
            except IntegrityError as error:
                raise Conflict(f"there is a device {device.id} already") from error
            connection.execute(sa.insert(schema.codes), identity.new_code(replace(code, device=device.id)))
            detail = {"groups": device.groups, "labels": device.labels, "generation": generation}
            record(connection, DomainEvent("device.created", device.id, device.created_at, detail), 1)
            if generation > 1:  # the next one of this id must know of it
                note(connection, _left(created, created.created_at))
            made = {"groups": device.groups, "labels": sorted(device.labels), "generation": generation}
            return created, Deed(Action.DEVICE_CREATED, device.id, made)

        return await self._do(create)

    async def device(self, id: DeviceId) -> Device | None:
        found = await self._all(_DEVICE, {"of": id})
        return rows.device(found[0]) if found else None

    async def devices(self, after: DeviceId | None, limit: int) -> list[Device]:
        return [rows.device(row) for row in await self._all(_DEVICES, {"after": after or "", "limit": limit})]

    async def groups(self, ids: Sequence[DeviceId]) -> Mapping[DeviceId, tuple[str, ...]]:
        found = await self._database.read(lambda connection: _GROUPS(connection, ids))
        return {DeviceId(id): tuple(json.loads(groups)) for id, groups in found}

    async def mailbox(self, id: DeviceId) -> Mailbox:
        boxes = await self._database.read(lambda connection: mailboxes.read(connection, [id], self._clock()))
        return boxes[id]

    async def update_device(self, device: Device, expected_version: int | None) -> Device:
        """Take over `cell`, `groups`, `labels`, `enabled` and `backlog`. Suspending also voids the open codes."""

        def update(connection: sa.Connection) -> tuple[Device, Deed]:
            now = self._clock()
            known = rows.device(_locked(connection, device.id, expected_version))
            changed = replace(
                known,
                cell=device.cell,
                groups=device.groups,
                labels=device.labels,
                enabled=device.enabled,
                backlog=device.backlog,
                version=known.version + 1,
            )
            put(connection, known, changed, now)
            if known.enabled != changed.enabled:
                note(connection, _left(changed, now))
            return changed, audit.updated(known, changed)

        return await self._do(update)

    async def delete_device(self, id: DeviceId, expected_version: int | None, now: Micros) -> list[Command]:
        def delete(connection: sa.Connection) -> tuple[list[Command], Deed]:
            known = rows.device(_locked(connection, id, expected_version))
            settled = remove(connection, known, now)
            note(connection, replace(_left(known, now), version=known.version + 1, deleted=True))
            done = {"generation": known.generation, "settled": len(settled)}
            return settled, Deed(Action.DEVICE_DELETED, id, done)

        return await self._do(delete)

    async def revoke_device(self, id: DeviceId, now: Micros) -> tuple[Device, list[Command]]:
        """Drop all keys and codes, queue a closure, and start a new generation: what waited is cancelled.
        Returns the device and the commands that were withdrawn. Raises `NotFound`."""

        def revoke(connection: sa.Connection) -> tuple[tuple[Device, list[Command]], Deed]:
            known = rows.device(_locked(connection, id, None))
            connection.execute(identity.DROP_KEYS, {"of": id})
            connection.execute(identity.VOID_CODES, {"of": id})
            renewed, withdrawn = new_generation(connection, known, now, Why.REVOKED, enrolled_at=None)
            record(
                connection, DomainEvent("device.revoked", id, now, {"generation": renewed.generation}), renewed.version
            )
            done = {"generation": renewed.generation, "withdrawn": len(withdrawn)}
            return (renewed, withdrawn), Deed(Action.DEVICE_REVOKED, id, done)

        return await self._do(revoke)

    async def in_hand(self, id: DeviceId) -> int:
        (found,) = await self._all(_IN_HAND, {"of": id})
        many: int = found.many
        return many

    async def greet(self, id: DeviceId, now: Micros, agent_version: str | None) -> str:
        return await self._greetings.greet(id, now, agent_version)

    async def record(self, event: DomainEvent) -> None:
        await self._database.write(lambda connection: record(connection, event))

    # ---- Codes, keys, logins ---------------------------------------------------------------------------

    async def add_code(self, code: EnrollmentCode) -> None:
        def add(connection: sa.Connection) -> tuple[None, Deed]:
            _locked(connection, code.device, None)
            connection.execute(identity.VOID_OPEN_CODES, {"of": code.device})
            connection.execute(identity.DROP_EXPIRED_CODES, {"of": code.device, "now": self._clock()})
            connection.execute(sa.insert(schema.codes), identity.new_code(code))
            return None, Deed(Action.ENROLLMENT_ISSUED, code.device)

        await self._do(add)

    async def redeem(self, code_hash: str, key: DeviceKey, now: Micros) -> tuple[Device, bool]:
        def redeem(connection: sa.Connection) -> tuple[tuple[Device, bool] | FabricError, Deed | None]:
            # The code names the device; the device's row is locked before the code is believed.
            owner = connection.execute(identity.CODE_OWNER, {"of": code_hash}).scalar()
            known = None if owner is None else connection.execute(LOCK_DEVICE, {"of": owner}).first()
            if known is None:
                return identity.gone(), None
            return _redeem(connection, known, code_hash, key, now)

        answer = await self._do(redeem)
        if isinstance(answer, FabricError):  # raised here: the contest's event had to be committed
            raise answer
        return answer

    async def keys(self, id: DeviceId) -> list[DeviceKey]:
        return [rows.device_key(row) for row in await self._all(identity.KEYS, {"of": id})]

    async def add_key(self, key: DeviceKey) -> tuple[DeviceKey, bool]:
        def add(connection: sa.Connection) -> tuple[tuple[DeviceKey, bool], Deed | None]:
            known = connection.execute(LOCK_DEVICE, {"of": key.device}).first()
            if known is None or not known.enabled:
                raise Unauthenticated("the device is suspended or gone")
            known_key = keys.add(connection, key)
            if known_key is not None:
                return (known_key, False), None
            detail = {"kid": key.kid, "parent": key.parent}
            record(connection, DomainEvent("device.key-added", key.device, key.created_at, detail), known.version)
            return (key, True), Deed(Action.KEY_ADDED, key.device, detail)

        return await self._do(add)

    async def retire_key(self, id: DeviceId, kid: str, by: str, now: Micros) -> None:
        def retire(connection: sa.Connection) -> tuple[None, Deed | None]:
            known = _locked(connection, id, None)
            if not keys.retire(connection, id, kid, by, now):
                return None, None
            close_connections(connection, id, Why.KEY_RETIRED)
            detail = {"kid": kid, "by": by}
            record(connection, DomainEvent("device.key-retired", id, now, detail), known.version)
            note(connection, KeyRevoked(now, id, kid, retired=True))
            return None, Deed(Action.KEY_RETIRED, id, detail)

        await self._do(retire)

    async def revoke_key(self, id: DeviceId, kid: str, now: Micros) -> list[str]:
        def revoke(connection: sa.Connection) -> tuple[list[str], Deed]:
            known = rows.device(_locked(connection, id, None))
            dropped = drop_keys(connection, known, kid, now)
            note(connection, KeyRevoked(now, id, kid))
            return dropped, Deed(Action.KEY_REVOKED, id, {"kid": kid, "with": dropped[1:]})

        return await self._do(revoke)

    async def last_login(self, id: DeviceId) -> Micros | None:
        """When a login of this device was last recorded, even if it has been deleted since; for about as long
        as a token lives. After a revocation, a login before it that is younger than the broker's handshake
        may still turn into a connection."""
        found = await self._all(identity.LAST_LOGIN, {"of": id})
        at: Micros | None = found[0].at
        return at

    # ---- Tokens ----------------------------------------------------------------------------------------

    async def add_token(self, token: IssuedToken, minter_issued_at: Micros | None = None) -> None:
        await self._do(lambda connection: tokens.add(connection, token, minter_issued_at))

    async def token(self, jti: str) -> IssuedToken | None:
        found = await self._all(tokens.TOKEN, {"of": jti})
        return rows.issued_token(found[0]) if found else None

    async def tokens(self, after: str | None, limit: int) -> list[IssuedToken]:
        found = await self._all(tokens.TOKENS, {"after": after or "", "limit": limit})
        return [rows.issued_token(row) for row in found]

    async def revoke_token(self, jti: str, now: Micros) -> RevokedTokens:
        def revoke(connection: sa.Connection) -> tuple[RevokedTokens, Deed | None]:
            revoked, deed = tokens.revoke(connection, jti, now)
            if deed is not None:
                note(connection, TokenRevoked(now, jti))
            return revoked, deed

        return await self._do(revoke)

    async def revoke_subject(self, subject: str, now: Micros) -> RevokedTokens:
        def revoke(connection: sa.Connection) -> tuple[RevokedTokens, Deed]:
            at = tokens.last_issued(connection, subject, now)
            note(connection, SubjectRevoked(at, subject))
            return tokens.revoke_subject(connection, subject, at)

        return await self._do(revoke)

    async def not_before(self, identity: str) -> Micros | None:
        found = await self._all(tokens.NOT_BEFORE, {"of": identity})
        return found[0].not_before if found else None

    # ---- Closures --------------------------------------------------------------------------------------

    async def closures(self, limit: int) -> list[tuple[int, DeviceId]]:
        found = await self._all(_CLOSURES, {"limit": limit})
        return [(row.id, DeviceId(row.device)) for row in found]

    async def closed(self, ids: Sequence[int]) -> None:
        if ids:
            done = sa.delete(schema.closures).where(schema.closures.c.id.in_(list(ids)))
            await self._database.write(lambda connection: connection.execute(done))

    async def _do(self, work: Callable[[sa.Connection], tuple[T, Deed | None]]) -> T:
        """A transaction that somebody asks for. It ends with a record of what they did, or None if that was nothing."""
        by = acting()

        def do(connection: sa.Connection) -> tuple[T, Deed | None]:
            result, deed = work(connection)
            if deed is not None:
                audit.record(connection, by, deed, self._clock())
            return result, deed

        result, deed = await self._database.write(do)
        if deed is not None and deed.action in _LASTING:
            await self._revocations.flush()
        return result

    async def _all(self, query: sa.Select[Any], parameters: rows.Row) -> Sequence["sa.Row[Any]"]:
        return await self._database.read(lambda connection: connection.execute(query, parameters).all())


# ---- Steps of transactions ---------------------------------------------------------------------------


def record(connection: sa.Connection, event: DomainEvent, version: int = 0) -> None:
    INSERT_EVENTS.run(connection, [rows.domain_event(event, version)])


def close_connections(connection: sa.Connection, id: DeviceId, why: Why) -> None:
    """Queue a closure."""
    connection.execute(sa.insert(schema.closures), {"device": id, "why": why})


def new_generation(
    connection: sa.Connection, known: Device, now: Micros, why: Why, *, enrolled_at: Micros | None
) -> tuple[Device, list[Command]]:
    """Start a new generation of a locked device: its waiting commands are withdrawn, since their mail is for
    the old one; what was picked up is left to its response time; its connections are closed."""
    generation = connection.execute(_next_generation(connection), {"of": known.id}).scalar_one()
    renewed = replace(known, generation=generation, version=known.version + 1, next_seq=1)
    note(connection, _left(renewed, now))
    return renewed, renew(connection, renewed, now, why, enrolled_at=enrolled_at)


def renew(
    connection: sa.Connection, renewed: Device, now: Micros, why: Why, *, enrolled_at: Micros | None
) -> list[Command]:
    """Let a locked device be of the generation that it has here; the commands that were withdrawn."""
    fold, open_commands = _open_commands(connection, renewed.id, now)
    waiting = [it for it in open_commands if it.state in WAITING]
    withdrawn = [done.command for done in (fold.step(it.id, Cancelled(why.value)) for it in waiting) if done.settled]
    fold.save()
    values = {"generation": renewed.generation, "version": renewed.version, "next_seq": 1, "enrolled_at": enrolled_at}
    values["renewed_at"] = now
    connection.execute(_UPDATE_DEVICE, {"of": renewed.id, **values})
    close_connections(connection, renewed.id, why)
    return withdrawn


def put(connection: sa.Connection, known: Device, changed: Device, now: Micros) -> None:
    """Change a locked device in what `SqlRegistry.update_device` takes over."""
    values: rows.Row = {"cell": changed.cell, "enabled": changed.enabled, "version": changed.version}
    values |= {"groups": rows.as_json(changed.groups), "labels": rows.as_json(changed.labels)}
    values["backlog"] = changed.backlog
    connection.execute(_UPDATE_DEVICE, {"of": changed.id, **values})
    if known.enabled and not changed.enabled:
        connection.execute(identity.VOID_OPEN_CODES, {"of": changed.id})
        close_connections(connection, changed.id, Why.SUSPENDED)
    if changed.enabled and not known.enabled:
        # What it would close was let in before the suspension, or after it: both may stay.
        connection.execute(_END_SUSPENSION, {"of": changed.id})
    kind = "updated" if known.enabled == changed.enabled else "resumed" if changed.enabled else "suspended"
    detail = {"groups": changed.groups, "labels": changed.labels, "enabled": changed.enabled}
    detail["backlog"] = changed.backlog
    record(connection, DomainEvent(f"device.{kind}", changed.id, now, detail), changed.version)


def remove(connection: sa.Connection, known: Device, now: Micros) -> list[Command]:
    """Delete a locked device; the commands that were settled."""
    fold, open_commands = _open_commands(connection, known.id, now)
    settled = [done.command for done in (fold.step(it.id, DeviceDeleted()) for it in open_commands) if done.settled]
    fold.save()
    connection.execute(_DELETE_DEVICE, {"of": known.id})  # its keys and codes go with it
    close_connections(connection, known.id, Why.DELETED)
    detail = {"generation": known.generation, "groups": known.groups}
    record(connection, DomainEvent("device.deleted", known.id, now, detail), known.version + 1)
    return settled


def drop_keys(connection: sa.Connection, known: Device, kid: str, now: Micros) -> list[str]:
    """Drop a locked device's key with those registered under it, the first first. Raises `NotFound`."""
    dropped = keys.revoke(connection, known.id, kid)
    connection.execute(identity.VOID_CODES, {"of": known.id})
    close_connections(connection, known.id, Why.KEY_REVOKED)
    for each in dropped:
        detail = {"kid": each, "because": kid}
        record(connection, DomainEvent("device.key-revoked", known.id, now, detail), known.version)
    return dropped


def _left(device: Device, at: Micros) -> DeviceState:
    return DeviceState(at, device.id, device.generation, device.version, device.enabled)


def _redeem(
    connection: sa.Connection, row: "sa.Row[Any]", code_hash: str, key: DeviceKey, now: Micros
) -> tuple[tuple[Device, bool] | FabricError, Deed | None]:
    known = rows.device(row)
    code = connection.execute(identity.CODE, {"of": code_hash}).first()
    if code is None or code.expires_at <= now:
        return identity.gone(), None
    if code.used_by is not None and code.used_by != key.kid:
        record(connection, DomainEvent("enrollment.contested", known.id, now, {"kid": key.kid}), known.version)
        refused = identity.gone()
        return refused, Deed(Action.ENROLLMENT_CONTESTED, known.id, {"kid": key.kid}, refused.code)
    owner = connection.execute(identity.KEY_OWNER, {"of": key.kid}).first()
    if owner is not None and owner.device != known.id:
        return Conflict("the key is another device's; a key belongs to one device"), None
    if code.used_by is not None:
        return (known, False), None
    connection.execute(identity.USE_CODE, {"of": code_hash, "key": key.kid})
    if owner is not None and owner.retired_at is None:
        return (known, False), None
    enrolled = known
    if row.enrolled_at is not None:
        connection.execute(identity.DROP_KEYS, {"of": known.id})
        enrolled, _ = new_generation(connection, known, now, Why.ENROLLED_AGAIN, enrolled_at=now)
    else:
        connection.execute(_UPDATE_DEVICE, {"of": known.id, "enrolled_at": now})
    try:
        connection.execute(sa.insert(schema.device_keys), identity.new_key(key, known.id))
    except IntegrityError as error:
        raise Conflict("the key is another device's; a key belongs to one device") from error
    detail = {"kid": key.kid, "generation": enrolled.generation}
    record(connection, DomainEvent("device.enrolled", known.id, now, detail), enrolled.version)
    return (enrolled, True), Deed(Action.DEVICE_ENROLLED, known.id, detail, itself=True)


def _locked(connection: sa.Connection, id: DeviceId, expected_version: int | None) -> "sa.Row[Any]":
    row = connection.execute(LOCK_DEVICE, {"of": id}).first()
    if row is None:
        raise NotFound(f"there is no device {id}")
    if expected_version not in (None, row.version):
        raise PreconditionFailed(f"{id} is at version {row.version}, not {expected_version}")
    return row


def _open_commands(connection: sa.Connection, id: DeviceId, now: Micros) -> tuple[Fold, list[Command]]:
    fold = Fold(connection, lambda: now, lambda: 1.0)
    found = connection.execute(_OPEN_COMMANDS, {"of": id}).all()
    fold.take(found)
    return fold, [rows.command(row) for row in found]


def _next_generation(connection: sa.Connection) -> sa.Executable:
    return _NEXT_GENERATION[connection.dialect.name]


def _grow(insert: Callable[..., Any]) -> sa.Executable:
    new = insert(schema.generations).values(device=sa.bindparam("of"), last=1)
    grown = new.on_conflict_do_update(index_elements=["device"], set_={"last": schema.generations.c.last + 1})
    return grown.returning(schema.generations.c.last)  # type: ignore[no-any-return]  # both dialects' inserts


_NEXT_GENERATION = {name: _grow(insert) for name, insert in identity.INSERTS.items()}
_DEVICE = sa.select(schema.devices).where(_devices.id == sa.bindparam("of"))
LOCK_DEVICE = _DEVICE.with_for_update()
_DEVICES = (
    sa.select(schema.devices)
    .where(_devices.id > sa.bindparam("after"))
    .order_by(_devices.id)
    .limit(sa.bindparam("limit"))
)
_GROUPS = Among(sa.select(_devices.id, _devices.groups), _devices.id)
_UPDATE_DEVICE = sa.update(schema.devices).where(_devices.id == sa.bindparam("of"))
_DELETE_DEVICE = sa.delete(schema.devices).where(_devices.id == sa.bindparam("of"))
_OPEN_COMMANDS = LOCK_COMMANDS.where(schema.commands.c.device == sa.bindparam("of"), schema.commands.c.due.is_not(None))
_IN_HAND = sa.select(sa.func.count().label("many")).where(
    schema.commands.c.device == sa.bindparam("of"),
    schema.commands.c.due.is_not(None),
    schema.commands.c.state.in_(sorted(PICKED_UP)),
)
_END_SUSPENSION = sa.delete(schema.closures).where(
    schema.closures.c.device == sa.bindparam("of"), schema.closures.c.why == Why.SUSPENDED
)
_CLOSURES = sa.select(schema.closures).order_by(schema.closures.c.id).limit(sa.bindparam("limit"))
