"""Statements about codes, keys and logins, for transactions that have locked the device's row."""

import hashlib
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fabric.command import Micros
from fabric.errors import Gone
from fabric.model import DeviceKey, EnrollmentCode
from fabric.sql import rows, schema
from topology.names import DeviceId

INSERTS: Final[dict[str, Callable[..., Any]]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

_PRUNED: Final = 100  # expired logins removed by each new one, so that the table stays bounded

_codes = schema.codes.c
_keys = schema.device_keys.c
_logins = schema.logins.c


def new_code(code: EnrollmentCode) -> rows.Row:
    return {
        "code_hash": code.code_hash,
        "device": code.device,
        "expires_at": code.expires_at,
        "used_by": code.used_by,
    }


def new_key(key: DeviceKey, device: DeviceId) -> rows.Row:
    return {
        "kid": key.kid,
        "device": device,
        "jwk": rows.as_json(key.jwk),
        "created_at": key.created_at,
        "last_used": key.last_used,
        "parent": key.parent,
    }


def jti_hash(jti: str) -> str:
    """Hashed: an index takes no text of any length, and a token's id is the device's to choose."""
    return hashlib.sha256(jti.encode("utf-8", "surrogatepass")).hexdigest()


def gone() -> Gone:
    return Gone("the code is unknown, expired or used; ask for a new ticket")


def use_token(
    connection: sa.Connection, device: DeviceId, kid: str, jti: str, now: Micros, expires: Micros
) -> tuple[DeviceKey | None, Micros]:
    """The device's key, and when the token was first used. Nothing is recorded for a key that is not there."""
    found = connection.execute(_KEY, {"of": device, "key": kid}).first()
    if found is None:
        return None, now
    use = {"device": device, "jti_hash": jti_hash(jti), "first_use": now, "last_use": now, "expires_at": expires}
    first_use: Micros = connection.execute(_USE[connection.dialect.name], use).scalar_one()
    if first_use == now:
        connection.execute(_KEY_USED, {"key": kid, "now": now})
        connection.execute(_PRUNE, {"now": now})
    return rows.device_key(found), first_use


def _use(insert: Callable[..., Any]) -> Any:  # the two dialects' inserts have no common type
    new = insert(schema.logins)
    again = new.on_conflict_do_update(index_elements=["device", "jti_hash"], set_={"last_use": new.excluded.last_use})
    return again.returning(_logins.first_use)


_USE = {name: _use(insert) for name, insert in INSERTS.items()}
_PRUNE = sa.delete(schema.logins).where(
    sa.tuple_(_logins.device, _logins.jti_hash).in_(
        sa.select(_logins.device, _logins.jti_hash)
        .where(_logins.expires_at < sa.bindparam("now"))
        .limit(_PRUNED)
        .with_for_update(skip_locked=True)
    )
)
LAST_LOGIN = sa.select(sa.func.max(_logins.last_use).label("at")).where(_logins.device == sa.bindparam("of"))

_ACTIVE = sa.select(schema.device_keys).where(_keys.device == sa.bindparam("of"), _keys.retired_at.is_(None))
KEYS = _ACTIVE.order_by(_keys.created_at, _keys.kid)
KEY_OWNER = sa.select(_keys.device, _keys.retired_at).where(_keys.kid == sa.bindparam("of"))
DROP_KEYS = sa.delete(schema.device_keys).where(_keys.device == sa.bindparam("of"))
_KEY = _ACTIVE.where(_keys.kid == sa.bindparam("key"))
_KEY_USED = sa.update(schema.device_keys).where(_keys.kid == sa.bindparam("key")).values(last_used=sa.bindparam("now"))

CODE = sa.select(schema.codes).where(_codes.code_hash == sa.bindparam("of"))
CODE_OWNER = sa.select(_codes.device).where(_codes.code_hash == sa.bindparam("of"))
USE_CODE = sa.update(schema.codes).where(_codes.code_hash == sa.bindparam("of")).values(used_by=sa.bindparam("key"))
VOID_CODES = sa.delete(schema.codes).where(_codes.device == sa.bindparam("of"))
VOID_OPEN_CODES = VOID_CODES.where(_codes.used_by.is_(None))
DROP_EXPIRED_CODES = VOID_CODES.where(_codes.expires_at <= sa.bindparam("now"))
