"""Steps of transactions about issued tokens: made with one another, and revoked with whatever was made with them. Each
comes with the deed that it was."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from fabric.audit import Action, Deed
from fabric.command import Micros
from fabric.errors import NotFound, Unauthenticated
from fabric.identity.issued import MARK
from fabric.identity.providers import LONGEST_LEEWAY
from fabric.model import IssuedToken, RevokedTokens
from fabric.sql import rows, schema
from fabric.sql.identity import INSERTS

_LOCK: Final = 0x746F6B656E73  # "tokens": PostgreSQL's advisory lock

_tokens = schema.tokens.c
_identities = schema.revoked_identities.c


def add(connection: sa.Connection, token: IssuedToken, minter_issued_at: Micros | None) -> tuple[None, Deed]:
    """Raises `Unauthenticated` when its parent is unknown or revoked, or its minter's token is."""
    _one_at_a_time(connection)
    if token.parent is not None and not connection.execute(_ALIVE, {"of": token.parent}).first():
        raise Unauthenticated("the token was revoked")
    not_before = connection.execute(NOT_BEFORE, {"of": token.minter}).scalar() if token.minter is not None else None
    if not_before is not None and (minter_issued_at is None or minter_issued_at <= not_before):
        raise Unauthenticated("the token was revoked")
    row = {
        "jti": token.jti,
        "subject": token.subject,
        "scopes": rows.as_json(token.scopes),
        "issued_at": token.issued_at,
        "expires_at": token.expires_at,
        "revoked_at": token.revoked_at,
        "parent": token.parent,
        "minter": token.minter,
    }
    connection.execute(sa.insert(schema.tokens), row)
    made = {"jti": token.jti, "subject": token.subject, "scopes": token.scopes, "parent": token.parent}
    return None, Deed(Action.TOKEN_CREATED, detail=made)


def revoke(connection: sa.Connection, jti: str, now: Micros) -> tuple[RevokedTokens, Deed | None]:
    """Raises `NotFound`."""
    revoked = _revoke(connection, _FAMILY, jti, now)
    found = connection.execute(TOKEN, {"of": jti}).first()
    if found is None:
        raise NotFound(f"there is no token {jti}")
    done = {"jti": jti, "subject": found.subject, "revoked": revoked.count}
    return revoked, Deed(Action.TOKEN_REVOKED, detail=done) if revoked.count else None


def last_issued(connection: sa.Connection, subject: str, now: Micros) -> Micros:
    """When the last token of a subject was issued, if that is after `now` by another gateway's clock; else `now`. Of an
    external identity, when it may have been by its provider's."""
    _one_at_a_time(connection)
    if MARK in subject:
        return now + LONGEST_LEEWAY * 1_000_000
    return max(now, connection.execute(_LAST_ISSUED, {"of": subject}).scalar() or 0)


def revoke_subject(connection: sa.Connection, subject: str, now: Micros) -> tuple[RevokedTokens, Deed]:
    """Those that were issued by `now`, and whatever was made with them. An external identity has no token here, only
    those that it made: its own are not good from then on."""
    revoked = _revoke(connection, _FAMILIES_OF_SUBJECT, subject, now)
    if MARK in subject:
        connection.execute(_SET_NOT_BEFORE[connection.dialect.name], {"of": subject, "now": now})
        revoked = replace(revoked, subjects=(subject, *revoked.subjects))
    return revoked, Deed(Action.SUBJECT_REVOKED, detail={"subject": subject, "revoked": revoked.count})


def _revoke(connection: sa.Connection, family: "_Family", of: str, now: Micros) -> RevokedTokens:
    _one_at_a_time(connection)
    count = len(connection.execute(family.revoke, {"of": of, "now": now}).all())
    return RevokedTokens(count, tuple(connection.execute(family.subjects, {"of": of, "now": now}).scalars()))


def _one_at_a_time(connection: sa.Connection) -> None:
    """Nothing is made with a token while that is being revoked. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(_ALONE)


@dataclass(frozen=True, slots=True)
class _Family:
    """Statements about some tokens, and whatever was made with them: expired or revoked ones may have made others."""

    revoke: sa.Executable
    subjects: sa.Executable


def _family(root: sa.ColumnElement[bool]) -> _Family:
    made = sa.select(_tokens.jti).where(root).cte("made", recursive=True)
    child = schema.tokens.alias()
    made = made.union(sa.select(child.c.jti).where(child.c.parent == made.c.jti))
    among = _tokens.jti.in_(sa.select(made.c.jti))
    revoke = sa.update(schema.tokens).where(among, _tokens.revoked_at.is_(None)).values(revoked_at=sa.bindparam("now"))
    subjects = sa.select(_tokens.subject).where(among).distinct().order_by(_tokens.subject)
    return _Family(revoke.returning(_tokens.jti), subjects)


def _set_not_before(insert: Callable[..., Any]) -> Any:  # the two dialects' inserts have no common type
    new = insert(schema.revoked_identities).values(identity=sa.bindparam("of"), not_before=sa.bindparam("now"))
    return new.on_conflict_do_update(
        index_elements=["identity"],
        set_={"not_before": new.excluded.not_before},
        where=_identities.not_before < new.excluded.not_before,
    )


TOKEN = sa.select(schema.tokens).where(_tokens.jti == sa.bindparam("of"))
TOKENS = (
    sa.select(schema.tokens)
    .where(_tokens.jti > sa.bindparam("after"))
    .order_by(_tokens.jti)
    .limit(sa.bindparam("limit"))
)
_ALONE = sa.select(sa.func.pg_advisory_xact_lock(_LOCK))
_ALIVE = sa.select(_tokens.jti).where(_tokens.jti == sa.bindparam("of"), _tokens.revoked_at.is_(None))
_FAMILY = _family(_tokens.jti == sa.bindparam("of"))
_FAMILIES_OF_SUBJECT = _family(
    sa.and_(
        sa.or_(_tokens.subject == sa.bindparam("of"), _tokens.minter == sa.bindparam("of")),
        _tokens.issued_at <= sa.bindparam("now"),
    )
)
_LAST_ISSUED = sa.select(sa.func.max(_tokens.issued_at)).where(_tokens.subject == sa.bindparam("of"))
NOT_BEFORE = sa.select(_identities.not_before).where(_identities.identity == sa.bindparam("of"))
_SET_NOT_BEFORE = {name: _set_not_before(insert) for name, insert in INSERTS.items()}
