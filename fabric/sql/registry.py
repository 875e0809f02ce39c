"""The port `Registry` on SQL: devices, their keys and codes, tokens, closures.

Whatever changes a device locks its row first, then its open commands in the order of their ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fabric.command import WAITING, Cancelled, Command, DeviceDeleted, Micros
from fabric.errors import Conflict, FabricError, NotFound, PreconditionFailed
from fabric.model import Device, DeviceKey, DomainEvent, EnrollmentCode, IssuedToken, Mailbox
from fabric.ports import Login
from fabric.sql import identity, rows, schema
from fabric.sql.engine import Database
from fabric.sql.fold import INSERT_EVENTS, LOCK_COMMANDS, Fold
from fabric.sql.ledger import mailboxes
from topology.names import DeviceId

SEEN_EVERY: Final = 10_000_000  # µs between two writes of a device's `last_seen`

_devices = schema.devices.c


class SqlRegistry:
    """Devices, keys, codes and tokens of one fabric.

    What it does to a device is recorded as an event in the same transaction: `device.created`, `.updated`,
    `.suspended`, `.resumed`, `.enrolled`, `.revoked`, `.deleted`, `.connected`, `.disconnected`, and
    `enrollment.contested`.

    Args:
        clock: the time in microseconds on the database's clock, for calls that are not told it.
    """

    def __init__(self, database: Database, clock: Callable[[], Micros]) -> None:
        self._database, self._clock = database, clock

    async def close(self) -> None:
        """Nothing is held here; the database is closed by whoever opened it."""

    # ---- Devices ---------------------------------------------------------------------------------------

    async def create_device(self, device: Device, code: EnrollmentCode) -> Device:
        def create(connection: sa.Connection) -> Device:
            try:
                generation = connection.execute(_next_generation(connection), {"of": device.id}).scalar_one()
                created = replace(device, generation=generation, version=1, next_seq=1)
                connection.execute(sa.insert(schema.devices), rows.new_device(created))
            except IntegrityError as error:
                raise Conflict(f"there is a device {device.id} already") from error
            connection.execute(sa.insert(schema.codes), identity.new_code(replace(code, device=device.id)))
            detail = {"groups": device.groups, "labels": device.labels, "generation": generation}
            record(connection, DomainEvent("device.created", device.id, device.created_at, detail), 1)
            return created

        return await self._database.write(create)

    async def device(self, id: DeviceId) -> Device | None:
        found = await self._all(_DEVICE, {"of": id})
        return rows.device(found[0]) if found else None

    async def devices(self, after: DeviceId | None, limit: int) -> list[Device]:
        return [rows.device(row) for row in await self._all(_DEVICES, {"after": after or "", "limit": limit})]

    async def mailbox(self, id: DeviceId) -> Mailbox:
        boxes = await self._database.read(lambda connection: mailboxes(connection, [id], self._clock()))
        return boxes[id]

    async def update_device(self, device: Device, expected_version: int | None) -> Device:
        """Take over `cell`, `groups`, `labels` and `enabled`. Suspending also voids the open codes."""

        def update(connection: sa.Connection) -> Device:
            now = self._clock()
            known = rows.device(_locked(connection, device.id, expected_version))
            changed = replace(
                known,
                cell=device.cell,
                groups=device.groups,
                labels=device.labels,
                enabled=device.enabled,
                version=known.version + 1,
            )
            values = {"cell": changed.cell, "enabled": changed.enabled, "version": changed.version}
            values |= {"groups": rows.as_json(changed.groups), "labels": rows.as_json(changed.labels)}
            connection.execute(_UPDATE_DEVICE, {"of": device.id, **values})
            if known.enabled and not changed.enabled:
                connection.execute(identity.VOID_OPEN_CODES, {"of": device.id})
                close_connections(connection, device.id)
            kind = "updated" if known.enabled == changed.enabled else "resumed" if changed.enabled else "suspended"
            detail = {"groups": changed.groups, "labels": changed.labels, "enabled": changed.enabled}
            record(connection, DomainEvent(f"device.{kind}", device.id, now, detail), changed.version)
            return changed

        return await self._database.write(update)

    async def delete_device(self, id: DeviceId, expected_version: int | None, now: Micros) -> list[Command]:
        def delete(connection: sa.Connection) -> list[Command]:
            known = _locked(connection, id, expected_version)
            fold, open_commands = _open_commands(connection, id, now)
            settled = [
                done.command for done in (fold.step(it.id, DeviceDeleted()) for it in open_commands) if done.settled
            ]
            fold.save()
            connection.execute(_DELETE_DEVICE, {"of": id})  # its keys and codes go with it
            close_connections(connection, id)
            detail = {"generation": known.generation}
            record(connection, DomainEvent("device.deleted", id, now, detail), known.version + 1)
            return settled

        return await self._database.write(delete)

    async def revoke_device(self, id: DeviceId, now: Micros) -> tuple[Device, list[Command]]:
        """Drop all keys and codes, queue a closure, and start a new generation: what waited is cancelled.
        Returns the device and the commands that were withdrawn. Raises `NotFound`."""

        def revoke(connection: sa.Connection) -> tuple[Device, list[Command]]:
            known = rows.device(_locked(connection, id, None))
            connection.execute(identity.DROP_KEYS, {"of": id})
            connection.execute(identity.VOID_CODES, {"of": id})
            renewed, withdrawn = new_generation(connection, known, now, "revoked", enrolled_at=None)
            record(
                connection, DomainEvent("device.revoked", id, now, {"generation": renewed.generation}), renewed.version
            )
            return renewed, withdrawn

        return await self._database.write(revoke)

    async def seen(self, id: DeviceId, now: Micros, agent_version: str | None) -> None:
        known = await self._all(_SEEN, {"of": id})
        if not known:
            return
        recent = known[0].last_seen is not None and now - known[0].last_seen < SEEN_EVERY
        if recent and agent_version in (None, known[0].agent_version):
            return
        values: rows.Row = {"last_seen": now}
        if agent_version is not None:
            values["agent_version"] = agent_version
        await self._database.write(lambda connection: connection.execute(_UPDATE_DEVICE, {"of": id, **values}))

    async def connection(self, id: DeviceId, connected: bool, now: Micros) -> None:
        def note(connection: sa.Connection) -> None:
            changed = connection.execute(_CONNECTION, {"of": id, "is": connected, "now": now})
            if changed.rowcount:
                kind = "device.connected" if connected else "device.disconnected"
                record(connection, DomainEvent(kind, id, now))

        known = await self.device(id)
        if known is not None and (known.connected is not connected or known.connection_since is None):
            await self._database.write(note)

    async def record(self, event: DomainEvent) -> None:
        await self._database.write(lambda connection: record(connection, event))

    # ---- Codes, keys, logins ---------------------------------------------------------------------------

    async def add_code(self, code: EnrollmentCode) -> None:
        def add(connection: sa.Connection) -> None:
            _locked(connection, code.device, None)
            connection.execute(identity.VOID_OPEN_CODES, {"of": code.device})
            connection.execute(identity.DROP_EXPIRED_CODES, {"of": code.device, "now": self._clock()})
            connection.execute(sa.insert(schema.codes), identity.new_code(code))

        await self._database.write(add)

    async def redeem(self, code_hash: str, key: DeviceKey, now: Micros) -> tuple[Device, bool]:
        def redeem(connection: sa.Connection) -> tuple[Device, bool] | FabricError:
            # The code names the device; the device's row is locked before the code is believed.
            owner = connection.execute(identity.CODE_OWNER, {"of": code_hash}).scalar()
            known = None if owner is None else connection.execute(LOCK_DEVICE, {"of": owner}).first()
            if known is None:
                return identity.gone()
            return _redeem(connection, known, code_hash, key, now)

        answer = await self._database.write(redeem)
        if isinstance(answer, FabricError):  # raised here: the contest's event had to be committed
            raise answer
        return answer

    async def keys(self, id: DeviceId) -> list[DeviceKey]:
        return [rows.device_key(row) for row in await self._all(identity.KEYS, {"of": id})]

    async def revoke_key(self, id: DeviceId, kid: str, now: Micros) -> None:
        """Drop one key, void the open codes and queue a closure. Raises `NotFound`."""

        def revoke(connection: sa.Connection) -> None:
            known = _locked(connection, id, None)
            if not connection.execute(identity.DROP_KEY, {"of": id, "key": kid}).rowcount:
                raise NotFound(f"{id} has no key {kid}")
            connection.execute(identity.VOID_CODES, {"of": id})
            close_connections(connection, id)
            record(connection, DomainEvent("device.key-revoked", id, now, {"kid": kid}), known.version)

        await self._database.write(revoke)

    async def login(self, id: DeviceId, kid: str, jti: str, now: Micros, expires: Micros) -> Login | None:
        def login(connection: sa.Connection) -> Login | None:
            known = connection.execute(LOCK_DEVICE, {"of": id}).first()
            if known is None:
                return None
            key, first_use = identity.use_token(connection, id, kid, jti, now, expires)
            return Login(rows.device(known), key, first_use)

        return await self._database.write(login)

    async def last_login(self, id: DeviceId) -> Micros | None:
        """When a login of this device was last recorded, even if it has been deleted since; for about as long
        as a token lives. After a revocation, a login before it that is younger than the broker's handshake
        may still turn into a connection."""
        found = await self._all(identity.LAST_LOGIN, {"of": id})
        at: Micros | None = found[0].at
        return at

    # ---- Tokens ----------------------------------------------------------------------------------------

    async def add_token(self, token: IssuedToken) -> None:
        row = {
            "jti": token.jti,
            "subject": token.subject,
            "scopes": rows.as_json(token.scopes),
            "issued_at": token.issued_at,
            "expires_at": token.expires_at,
            "revoked_at": token.revoked_at,
        }
        await self._database.write(lambda connection: connection.execute(sa.insert(schema.tokens), row))

    async def token(self, jti: str) -> IssuedToken | None:
        found = await self._all(_TOKEN, {"of": jti})
        return rows.issued_token(found[0]) if found else None

    async def tokens(self, after: str | None, limit: int) -> list[IssuedToken]:
        return [rows.issued_token(row) for row in await self._all(_TOKENS, {"after": after or "", "limit": limit})]

    async def revoke_token(self, jti: str, now: Micros) -> IssuedToken | None:
        def revoke(connection: sa.Connection) -> IssuedToken | None:
            connection.execute(_REVOKE_TOKEN, {"of": jti, "now": now})
            found = connection.execute(_TOKEN, {"of": jti}).first()
            return rows.issued_token(found) if found else None

        return await self._database.write(revoke)

    # ---- Closures --------------------------------------------------------------------------------------

    async def closures(self, limit: int) -> list[tuple[int, DeviceId]]:
        found = await self._all(_CLOSURES, {"limit": limit})
        return [(row.id, DeviceId(row.device)) for row in found]

    async def closed(self, ids: Sequence[int]) -> None:
        if ids:
            done = sa.delete(schema.closures).where(schema.closures.c.id.in_(list(ids)))
            await self._database.write(lambda connection: connection.execute(done))

    async def _all(self, query: sa.Select[Any], parameters: rows.Row) -> Sequence["sa.Row[Any]"]:
        return await self._database.read(lambda connection: connection.execute(query, parameters).all())


# ---- Steps of transactions ---------------------------------------------------------------------------


def record(connection: sa.Connection, event: DomainEvent, version: int = 0) -> None:
    INSERT_EVENTS.run(connection, [rows.domain_event(event, version)])


def close_connections(connection: sa.Connection, id: DeviceId) -> None:
    """Queue a closure."""
    connection.execute(sa.insert(schema.closures), {"device": id})


def new_generation(
    connection: sa.Connection, known: Device, now: Micros, why: str, *, enrolled_at: Micros | None
) -> tuple[Device, list[Command]]:
    """Start a new generation of a locked device: its waiting commands are withdrawn, since their mail is for
    the old one; what was picked up is left to its response time; its connections are closed."""
    generation = connection.execute(_next_generation(connection), {"of": known.id}).scalar_one()
    fold, open_commands = _open_commands(connection, known.id, now)
    waiting = [it for it in open_commands if it.state in WAITING]
    withdrawn = [done.command for done in (fold.step(it.id, Cancelled(why)) for it in waiting) if done.settled]
    fold.save()
    renewed = replace(known, generation=generation, version=known.version + 1, next_seq=1)
    values = {"generation": generation, "version": renewed.version, "next_seq": 1, "enrolled_at": enrolled_at}
    connection.execute(_UPDATE_DEVICE, {"of": known.id, **values})
    close_connections(connection, known.id)
    return renewed, withdrawn


def _redeem(
    connection: sa.Connection, row: "sa.Row[Any]", code_hash: str, key: DeviceKey, now: Micros
) -> tuple[Device, bool] | FabricError:
    known = rows.device(row)
    code = connection.execute(identity.CODE, {"of": code_hash}).first()
    if code is None or code.expires_at <= now:
        return identity.gone()
    if code.used_by is not None and code.used_by != key.kid:
        record(connection, DomainEvent("enrollment.contested", known.id, now, {"kid": key.kid}), known.version)
        return identity.gone()
    owner = connection.execute(identity.KEY_OWNER, {"of": key.kid}).scalar()
    if owner is not None and owner != known.id:
        return Conflict("the key is another device's; a key belongs to one device")
    if code.used_by is not None:
        return known, False
    connection.execute(identity.USE_CODE, {"of": code_hash, "key": key.kid})
    if owner is not None:
        return known, False
    enrolled = known
    if row.enrolled_at is not None:
        connection.execute(identity.DROP_KEYS, {"of": known.id})
        enrolled, _ = new_generation(connection, known, now, "enrolled-again", enrolled_at=now)
    else:
        connection.execute(_UPDATE_DEVICE, {"of": known.id, "enrolled_at": now})
    try:
        connection.execute(sa.insert(schema.device_keys), identity.new_key(key, known.id))
    except IntegrityError as error:
        raise Conflict("the key is another device's; a key belongs to one device") from error
    detail = {"kid": key.kid, "generation": enrolled.generation}
    record(connection, DomainEvent("device.enrolled", known.id, now, detail), enrolled.version)
    return enrolled, True


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
_SEEN = sa.select(_devices.last_seen, _devices.agent_version).where(_devices.id == sa.bindparam("of"))
_UPDATE_DEVICE = sa.update(schema.devices).where(_devices.id == sa.bindparam("of"))
_DELETE_DEVICE = sa.delete(schema.devices).where(_devices.id == sa.bindparam("of"))
_CONNECTION = (
    sa.update(schema.devices)
    .where(
        _devices.id == sa.bindparam("of"),
        sa.or_(_devices.connected != sa.bindparam("is"), _devices.connection_since.is_(None)),
    )
    .values(connected=sa.bindparam("is"), connection_since=sa.bindparam("now"))
)
_OPEN_COMMANDS = LOCK_COMMANDS.where(schema.commands.c.device == sa.bindparam("of"), schema.commands.c.due.is_not(None))
_TOKEN = sa.select(schema.tokens).where(schema.tokens.c.jti == sa.bindparam("of"))
_TOKENS = (
    sa.select(schema.tokens)
    .where(schema.tokens.c.jti > sa.bindparam("after"))
    .order_by(schema.tokens.c.jti)
    .limit(sa.bindparam("limit"))
)
_REVOKE_TOKEN = (
    sa.update(schema.tokens)
    .where(schema.tokens.c.jti == sa.bindparam("of"), schema.tokens.c.revoked_at.is_(None))
    .values(revoked_at=sa.bindparam("now"))
)
_CLOSURES = sa.select(schema.closures).order_by(schema.closures.c.id).limit(sa.bindparam("limit"))
