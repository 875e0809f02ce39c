"""Statements about codes, keys and logins, for transactions that have locked the device's row."""

from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fabric.errors import Gone
from fabric.model import DeviceKey, EnrollmentCode
from fabric.sql import rows, schema
from topology.names import DeviceId

INSERTS: Final[dict[str, Callable[..., Any]]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

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


def gone() -> Gone:
    return Gone("the code is unknown, expired or used; ask for a new ticket")


LAST_LOGIN = sa.select(sa.func.max(_logins.last_use).label("at")).where(_logins.device == sa.bindparam("of"))

_ACTIVE = sa.select(schema.device_keys).where(_keys.device == sa.bindparam("of"), _keys.retired_at.is_(None))
KEYS = _ACTIVE.order_by(_keys.created_at, _keys.kid)
KEY_OWNER = sa.select(_keys.device, _keys.retired_at).where(_keys.kid == sa.bindparam("of"))
DROP_KEYS = sa.delete(schema.device_keys).where(_keys.device == sa.bindparam("of"))

CODE = sa.select(schema.codes).where(_codes.code_hash == sa.bindparam("of"))
CODE_OWNER = sa.select(_codes.device).where(_codes.code_hash == sa.bindparam("of"))
USE_CODE = sa.update(schema.codes).where(_codes.code_hash == sa.bindparam("of")).values(used_by=sa.bindparam("key"))
VOID_CODES = sa.delete(schema.codes).where(_codes.device == sa.bindparam("of"))
VOID_OPEN_CODES = VOID_CODES.where(_codes.used_by.is_(None))
DROP_EXPIRED_CODES = VOID_CODES.where(_codes.expires_at <= sa.bindparam("now"))
